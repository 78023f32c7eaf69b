"""Products of few rows with chosen matrices, reading only those, as in decoding.

The time is that of reading the matrices, with `dca_jax.products.row_products` on NVIDIA GPUs from
Ampere on; XLA would write out the gathered matrices and read them again.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dca_jax.device import current_device
from dca_jax.dtypes import compute_dtype
from dca_jax.grouped.blocks import matrix_of, precision
from dca_jax.products.packed import Packed
from dca_jax.products.row_products import can_multiply, row_products


def are_few(rows: int, groups: int) -> bool:
    """Whether to use `chosen_products`; on a CPU a loop over blocks is faster."""
    return 2 * rows <= groups and current_device().platform != "cpu"


def chosen_products(
    x: Float[Array, "rows inputs"],
    stacks: tuple[Float[Array, "L E inputs outputs"] | Packed, ...],
    layer: Int[Array, ""],
    groups: Int[Array, " rows"],
) -> tuple[Float[Array, "rows outputs"], ...]:
    """Each row times the matrix of its group in each stack; sums are at least float32.

    Args:
        x: rows in any order.
        groups: the group of each row.
        stacks: stacks of equal shape, packed or not.
        layer: index in each stack.
    """
    wide = [kernels for kernels in stacks if not isinstance(kernels, Packed)]
    if not wide:
        if current_device().platform == "gpu":
            return tuple(_unpacked_sums(x, kernels, layer, groups) for kernels in stacks)
    else:
        flat = [kernels.reshape(-1, *kernels.shape[2:]) for kernels in wide]
        if can_multiply(x, flat):
            found = row_products(x, flat, layer * wide[0].shape[1] + groups)
            return tuple(sums.astype(x.dtype) for sums in found)
    product = functools.partial(jnp.dot, precision=precision(x))

    def by_row(kernels: Array | Packed) -> Array:
        rows = (
            product(x[row : row + 1], matrix_of(kernels, layer, groups[row], x.dtype))
            for row in range(len(x))
        )
        return jnp.concatenate(list(rows))

    return tuple(map(by_row, stacks))


def _unpacked_sums(x: Array, kernels: Any, layer: Array, groups: Array) -> Array:
    """The sums from one fusion that gathers, unpacks, multiplies and sums."""
    wide = compute_dtype(x.dtype)
    matrices = kernels[layer, groups].unpack_inner(wide)  # outputs before inputs
    return jnp.sum(x.astype(wide)[:, None, :] * matrices, axis=2).astype(x.dtype)
