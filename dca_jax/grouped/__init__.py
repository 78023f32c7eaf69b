"""Grouped products, of rows with the matrix of their group, as needed for experts.

Rows are ordered by group (`layout`) and multiplied in one of three ways, which `choose` selects by
device and shapes:

    ragged       `jax.lax.ragged_dot`, for which XLA has a kernel on TPUs; elsewhere it multiplies
                 every row by every matrix
    mosaic_gpu   kernels for Hopper (`hopper`)
    blocks       a loop over blocks of rows, each of one group; on any device (`blocks`)

Each is exact (no row is dropped), deterministic and differentiable. If there are fewer rows than
groups, as in decoding, `few` reads only the chosen matrices.
"""

from dca_jax.grouped.few import are_few, chosen_products
from dca_jax.grouped.layout import Layout, collect, lay_out, spread
from dca_jax.grouped.op import PRODUCTS, block_size, choose, grouped_product

__all__ = [
    "PRODUCTS",
    "Layout",
    "are_few",
    "block_size",
    "choose",
    "chosen_products",
    "collect",
    "grouped_product",
    "lay_out",
    "spread",
]
