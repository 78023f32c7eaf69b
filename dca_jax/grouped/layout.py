"""Rows in the order of their groups, each group from a multiple of a block on.

    group    0 0 0 . | 1 . . . | 3 3 3 3 | 3 . . .        blocks of 4, dots are zeros

So a block of rows is multiplied by one matrix. Rows after the last group's last block are
meaningless, before and after a product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dca_jax.dtypes import compute_dtype

# Of the kernels for Hopper, here because importing those takes half a second.
HOPPER_BLOCK = 128  # rows of a block and of a tile: 64 for each computing warpgroup
HOPPER_TILE = 128  # rows and columns of a matrix must be multiples of this


class Layout(NamedTuple):
    """The placement of rows.

    Attributes:
        source: the row at each place; the number of rows for an empty place.
        place: the place of each row; the number of places for a row of no group.
        sizes: number of rows in each group.
    """

    source: Int[Array, " places"]
    place: Int[Array, " rows"]
    sizes: Int[Array, " E"]


def num_places(rows: int, groups: int, block: int) -> int:
    """The number of places that suffices for any choice of groups, a multiple of the block."""
    return (rows + min(rows, groups) * (block - 1)) // block * block


def lay_out(groups: Int[Array, " rows"], num_groups: int, block: int) -> Layout:
    """The layout of rows with these groups; numbers from `num_groups` on mean no group."""
    rows = len(groups)
    numbers = jnp.arange(num_groups, dtype=jnp.int32)
    sizes = (groups[:, None] == numbers[None]).sum(axis=0, dtype=jnp.int32)
    firsts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes  # first row of each group, without padding
    blocks, ends = block_ends(sizes, block)
    starts = (ends - blocks) * block
    order = jnp.argsort(groups, stable=True).astype(jnp.int32)
    rank = (
        jnp.zeros(rows, jnp.int32)
        .at[order]
        .set(jnp.arange(rows, dtype=jnp.int32), unique_indices=True)
    )
    places = jnp.arange(num_places(rows, num_groups, block), dtype=jnp.int32)
    group = group_of_block(ends, len(places) // block).repeat(block)
    within = places - starts[group]
    source = order[jnp.minimum(firsts[group] + within, rows - 1)]
    source = jnp.where(within < sizes[group], source, rows)
    own = jnp.minimum(groups, num_groups - 1)
    place = jnp.where(groups < num_groups, starts[own] + rank - firsts[own], len(places))
    return Layout(source, place, sizes)


def block_ends(sizes: Int[Array, " E"], block: int) -> tuple[Int[Array, " E"], Int[Array, " E"]]:
    """Number of blocks of each group, and the cumulative number up to its last."""
    blocks = -(-sizes // block)
    return blocks, jnp.cumsum(blocks, dtype=jnp.int32)


def group_of_block(ends: Int[Array, " E"], blocks: int) -> Int[Array, " blocks"]:
    """The group of each block; blocks after the last group's count as its own."""
    numbers = jnp.arange(blocks, dtype=jnp.int32)
    found = jnp.searchsorted(ends, numbers, side="right", method="compare_all")
    return jnp.minimum(found.astype(jnp.int32), len(ends) - 1)


# The gradient of a gather by a permutation is the inverse gather; JAX would use a scatter, which
# adds in any order on a GPU.


@jax.custom_vjp
def spread(x: Float[Array, "T D"], layout: Layout) -> Float[Array, "places D"]:
    """Tokens repeated as rows, once for each chosen expert; row r has token r // (rows / T)."""
    times = len(layout.place) // len(x)
    return x.at[layout.source // times].get(mode="fill", fill_value=0)


def _spread_forward(x: Array, layout: Layout) -> tuple[Array, tuple]:
    return spread(x, layout), (layout, jnp.zeros((len(x), 0), x.dtype))


def _spread_backward(saved: tuple, dy: Array) -> tuple[Array, None]:
    layout, like = saved
    by_token = _taken(dy, layout.place).reshape(len(like), -1, dy.shape[1])
    return by_token.astype(compute_dtype(dy.dtype)).sum(axis=1).astype(dy.dtype), None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def collect(y: Float[Array, "places D"], layout: Layout) -> Float[Array, "rows D"]:
    """Rows in their original order; those of no group are zero."""
    return _taken(y, layout.place)


def _taken(y: Array, place: Array) -> Array:
    return y.at[place].get(mode="fill", fill_value=0)


collect.defvjp(
    lambda y, layout: (collect(y, layout), layout),
    lambda layout, dy: (dy.at[layout.source].get(mode="fill", fill_value=0), None),
)
