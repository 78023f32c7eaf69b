"""A paged cache: keys and values of many texts in the pages of one pool.

A page holds a fixed number of tokens of one text, a multiple of 128. A row's *page table* lists its
pages in the pool: token i of row b is token i % page of page pages[b, i // page]. A key's phase,
mask and rotation depend on its index in the text; the page is only its location. A key is rotated
to its own index only, so texts with a common prefix can share its pages exactly.

    pages[b]        7  2  9                     tokens 0 ..    page ..   2 page ..
                    |  |  |
    pool    [L, P, page, K * H]                 all layers; a token's heads are concatenated
             .  .  x  .  .  .  .  x  .  x       pages 0 .. P - 1
             0  1  2  3  4  5  6  7  8  9

Scales of 8-bit keys and values have their own pool, [L, P, K, page]. Table entries beyond a row's
text may be any page number; they are not read.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from dca_jax.attention.blocks import BLOCK
from dca_jax.attention.stored import Scales
from dca_jax.errors import InputError


class Common(NamedTuple):
    """Common prefixes of rows in decoding, each of which can be read once for all its rows.

    This changes only how often a page is read. A row is in at most one group.

    Attributes:
        rows: the rows of each group, which begin with the same pages; unused entries are the number
            of rows in the batch.
        tokens: number of tokens that each group shares: whole pages, and fewer than any row has; 0
            for an unused group.
        place: flat index of each row in `rows`; rows.size for a row in no group.
    """

    rows: Int[Array, "groups members"]
    tokens: Int[Array, " groups"]
    place: Int[Array, " B"]


def own_pages(
    common: Common, pages: Int[Array, "B pages_per_row"], page: int
) -> tuple[Int[Array, " B"], Int[Array, "B pages_per_row"]]:
    """The number of shared tokens for each row, and the table of its pages after them."""
    members, count = common.rows.shape[1], pages.shape[1]
    begun = common.tokens.at[common.place // members].get(mode="fill", fill_value=0)
    number = begun[:, None] // page + jnp.arange(count, dtype=jnp.int32)[None, :]
    return begun, jnp.take_along_axis(pages, jnp.minimum(number, count - 1), axis=1)


def unpaged(
    key: Num[Array, "L P page K H"],
    value: Num[Array, "L P page K H"],
    scales: Scales | None,
    layer: Int[Array, ""],
    pages: Int[Array, "B pages_per_row"],
) -> tuple[Num[Array, "1 B S K H"], Num[Array, "1 B S K H"], Scales | None]:
    """A layer of each row copied from the pool, as a contiguous cache of one layer."""

    def laid_out(pool: Array) -> Array:
        found = pool[layer, pages]
        return found.reshape(1, found.shape[0], -1, *found.shape[3:])

    def scales_laid_out(pool: Array) -> Array:
        found = jnp.moveaxis(pool[layer, pages], 2, 1)
        return found.reshape(1, *found.shape[:2], -1)

    if scales is not None:
        scales = Scales(scales_laid_out(scales.key), scales_laid_out(scales.value))
    return laid_out(key), laid_out(value), scales


def check_pages(
    pages: Int[Array, "B pages_per_row"], query_shape: tuple[int, ...], pool_shape: tuple[int, ...]
) -> None:
    """Checks that a page table fits these queries and this pool [L, P, page, K, H].

    Raises:
        InputError: it does not fit.
    """
    page = pool_shape[2]
    if page % BLOCK:
        raise InputError(f"a page must hold a multiple of {BLOCK} tokens, got {page}")
    if pages.ndim != 2 or pages.shape[0] != query_shape[0] or pages.shape[1] < 1:
        raise InputError(
            f"a page table for {query_shape[0]} rows must be [{query_shape[0]}, pages per row], "
            f"got {list(pages.shape)}"
        )
    if pages.dtype != jnp.int32:
        raise InputError(f"a page table must be int32, got {pages.dtype}")
