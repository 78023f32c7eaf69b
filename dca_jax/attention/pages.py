"""A paged cache: keys and values of many texts in one pool, each where there was room.

A page holds so many tokens, a multiple of 128, of one text. A row's *page table* says where each of
its pages lies in the pool: token i of row b is token i % page of page pages[b, i // page]. The
number within the text decides a key's phase, mask and rotation; the page only where it lies. A key
is rotated to its own index alone, so texts with a common prefix share its pages, exactly.

    pages[b]        7  2  9                     tokens 0 ..    page ..   2 page ..
                    |  |  |
    pool    [L, P, page, K * H]                 all layers; a token's heads lie one behind the other
             .  .  x  .  .  .  .  x  .  x       pages 0 .. P - 1
             0  1  2  3  4  5  6  7  8  9

Scales of keys and values in 8 bits lie in a pool of their own, [L, P, K, page]. A page that no
token of a row's text lies in may be any number of the pool: it is not read.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from dca_jax.attention.blocks import BLOCK
from dca_jax.attention.stored import Scales
from dca_jax.errors import InputError


class Common(NamedTuple):
    """What texts that are drawn from have in common: each such beginning may be read once for all.

    It changes nothing but how often a page is read. A row is in one group at most.

    Attributes:
        rows: of each group, its rows, which begin with the same pages; the number of rows of the
            batch where there is none.
        tokens: of each group, how many they share: whole pages, and fewer than any of them has; 0
            where there is no group.
        place: where each row stands in `rows`, counted through; rows.size where it does not.
    """

    rows: Int[Array, "groups members"]
    tokens: Int[Array, " groups"]
    place: Int[Array, " B"]


def own_pages(
    common: Common, pages: Int[Array, "B pages_per_row"], page: int
) -> tuple[Int[Array, " B"], Int[Array, "B pages_per_row"]]:
    """How many tokens are read in common for each row; and its table of the pages after them."""
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
    """A layer of each row copied out of the pool, as a cache of one layer without pages."""

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
    """Whether a page table is of these queries and this pool [L, P, page, K, H], by their shapes.

    Raises:
        InputError: it is not.
    """
    page = pool_shape[2]
    if page % BLOCK:
        raise InputError(f"a page must hold a multiple of {BLOCK} tokens, got {page}")
    if pages.ndim != 2 or pages.shape[0] != query_shape[0] or pages.shape[1] < 1:
        raise InputError(
            f"a page table of {query_shape[0]} rows must be [{query_shape[0]}, pages of a row], "
            f"got {list(pages.shape)}"
        )
    if pages.dtype != jnp.int32:
        raise InputError(f"a page table must be int32, got {pages.dtype}")
