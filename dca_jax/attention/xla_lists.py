"""Attention over lists of key blocks in plain XLA: any device, any text, one tile after another.

A tile reads the blocks of its list and its edges, phase by phase. The rows and kv heads of a batch
go through theirs side by side, as many steps as the longest takes; every block is masked.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from dca_jax.attention.backend import Rows
from dca_jax.attention.bands import Band, phase_bands
from dca_jax.attention.blocks import BLOCK, SKIPPING, KeyBlocks, edge_blocks, full_blocks
from dca_jax.attention.stored import Scales
from dca_jax.attention.xla_tiles import (
    Softmax,
    dot,
    join_tiles,
    join_tiles_lse,
    rotated_query,
    split_tiles,
)
from dca_jax.dca import PHASES, DCAConfig, Phase
from dca_jax.dtypes import compute_dtype

# From a step of the loop: the numbers of the blocks [B, K], and which of them are to be read.
Walk = Callable[[Int[Array, ""]], tuple[Int[Array, "B K"], Bool[Array, "B K"]]]


def attend_to_blocks(
    query: Float[Array, "B T N H"],
    key: Num[Array, "L R S K H"],
    value: Num[Array, "L R S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    blocks: KeyBlocks,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    scales: Scales | None,
    pages: Int[Array, "B pages_per_row"] | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Output and natural log-sum-exp; as `Backend.forward`."""
    batch, num_queries, heads, head_dim = query.shape
    kv_heads, compute = key.shape[3], compute_dtype(query.dtype)
    num_keys = key.shape[2] if pages is None else pages.shape[1] * key.shape[2]
    size = min(BLOCK, num_keys)
    end = jnp.minimum(rows.offset + num_queries, rows.lengths)
    # Tiles stand at multiples of BLOCK of the text's index, and queries where the row's begin.
    shift = (rows.offset % BLOCK)[:, None]
    slots = jnp.arange(blocks.counts.shape[2] * BLOCK, dtype=jnp.int32)[None, :] - shift
    tiles, _ = split_tiles(_taken(query, slots), kv_heads, BLOCK)

    def one_tile(args: tuple) -> tuple[Array, Array]:
        queries, number, counts, numbers = args
        tile = rows.offset // BLOCK + number
        index = (tile * BLOCK)[:, None] + jnp.arange(BLOCK, dtype=jnp.int32)[None, :]
        present = (index >= rows.offset[:, None]) & (index < end[:, None])
        state = Softmax.empty((batch, kv_heads, heads // kv_heads, BLOCK, head_dim), compute)
        for phase, band in zip(phases, phase_bands(index, dca, phases), strict=True):
            scale = rows.scale.astype(compute)[:, None]
            rotated = rotated_query(queries, band.query_position, scale, rows)
            span = _span(band, present, num_keys)
            walk, steps = _walk(span, full_blocks(tile, phase, dca), counts, numbers, phase)

            def step(
                n: Array,
                state: Softmax,
                rotated: Array = rotated,
                span: tuple = span,
                walk: Walk = walk,
            ) -> Softmax:
                block, is_read = walk(n)
                # The last block of a cache that ends within it starts early.
                at = jnp.minimum(block * BLOCK, num_keys - size)
                met = _met(at, block * BLOCK, size, span) & is_read[:, :, None, None]
                read, read_scales = _readers(layer, at, size, pages)
                logits = dot("BKGTH,BKSH->BKGTS", rotated, read(key).astype(query.dtype))
                if scales is not None:
                    logits = logits * read_scales(scales.key)
                logits = jnp.where(met[:, :, None], logits, -jnp.inf)
                if blocks.skip is not None:
                    logits = _without_small(logits, state.m_i, blocks.skip)

                def weighted(p: Array) -> Array:
                    if scales is not None:
                        p = p * read_scales(scales.value)
                    values = read(value).astype(query.dtype)
                    return dot("BKGTS,BKSH->BKGTH", p.astype(query.dtype), values)

                return state.add(logits, weighted)

            state = jax.lax.fori_loop(jnp.int32(0), steps, step, state)
        return state.result(query.dtype)

    with jax.named_scope("dca_xla_lists"):
        number = jnp.arange(blocks.counts.shape[2], dtype=jnp.int32)
        lists = (jnp.moveaxis(x, 2, 0) for x in (blocks.counts, blocks.numbers))
        out, lse = jax.lax.map(one_tile, (tiles, number, *lists))
    back = jnp.arange(num_queries, dtype=jnp.int32)[None, :] + shift
    out = _taken(join_tiles(out, slots.shape[1]), back)
    lse = jnp.take_along_axis(join_tiles_lse(lse, slots.shape[1]), back[:, None, :], axis=2)
    return out, lse


def _taken(x: Float[Array, "B T N H"], slots: Int[Array, "B places"]) -> Array:
    """Tokens of each row; zeros where a slot is not one of the row's."""
    row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    slots = jnp.where(slots < 0, x.shape[1], slots)  # a negative index would count from the end
    return x.at[row, slots].get(mode="fill", fill_value=0)


def _span(band: Band, present: Bool[Array, "B t"], num_keys: int) -> tuple[Array, Array]:
    """[start, stop) of the keys that each query meets; none for a query that is not there."""
    start, stop = (jnp.clip(x, 0, num_keys) for x in (band.start, band.stop))
    return start, jnp.where(present, stop, start)


def _walk(
    span: tuple[Array, Array],
    full: tuple[Array, Array],
    counts: Int[Array, "B K 3"],
    numbers: Int[Array, "B K most"],
    phase: Phase,
) -> tuple[Walk, Int[Array, ""]]:
    """The blocks that each row and kv head reads in a phase: its list, then its edges."""
    start, stop = span
    meets = start < stop
    begin = jnp.min(jnp.where(meets, start, jnp.int32(2**31 - 1)), axis=1)
    end = jnp.max(jnp.where(meets, stop, 0), axis=1)
    edges = edge_blocks(begin, end, full)
    (before_at, before), (after_at, after) = ((x[:, None] for x in pair) for pair in edges)
    column = PHASES.index(phase)
    listed_at = jnp.sum(counts[..., :column], axis=2, dtype=jnp.int32)
    listed = counts[..., column]
    total = listed + before + after

    def walk(n: Array) -> tuple[Array, Array]:
        place = jnp.minimum(listed_at + n, numbers.shape[2] - 1)[..., None]
        of_list = jnp.take_along_axis(numbers, place, axis=2)[..., 0]
        edge = n - listed
        of_edges = jnp.where(edge < before, before_at + edge, after_at + edge - before)
        return jnp.where(edge < 0, of_list, of_edges), n < total

    return walk, jnp.max(total)


def _without_small(
    logits: Float[Array, "B K G t S"], largest: Float[Array, "B K G t"], skip: Float[Array, " B"]
) -> Float[Array, "B K G t S"]:
    """Logits of a block, -inf for queries that pass it by, half a tile of a head at a time.

    Args:
        largest: of each query's logits before this block.
        skip: as in `KeyBlocks`.
    """
    limit = largest + skip.astype(largest.dtype)[:, None, None, None]
    large = (logits.max(axis=-1) > limit).reshape(*limit.shape[:3], -1, SKIPPING)
    large = jnp.repeat(large.any(axis=-1), SKIPPING, axis=-1)
    return jnp.where(large[..., None], logits, -jnp.inf)


def _met(
    at: Int[Array, "B K"], begin: Int[Array, "B K"], size: int, span: tuple[Array, Array]
) -> Bool[Array, "B K t size"]:
    """Which keys each query meets of the block from slot `begin` on; `size` keys come from `at`."""
    start, stop = (x[:, None, :, None] for x in span)
    j = at[:, :, None, None] + jnp.arange(size, dtype=jnp.int32)[None, None, None, :]
    return (j >= jnp.maximum(start, begin[:, :, None, None])) & (j < stop)


def _readers(
    layer: Int[Array, ""],
    at: Int[Array, "B K"],
    size: int,
    pages: Int[Array, "B pages_per_row"] | None,
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """What reads a block of each row and kv head in place: keys or values [B, K, size, H]; scales.

    Scales come laid out as logits, [B, K, 1, 1, size].
    """
    batch, kv_heads = at.shape
    head = jnp.broadcast_to(jnp.arange(kv_heads, dtype=jnp.int32)[None, :], at.shape)

    def places(page: int) -> tuple[Array, Array]:
        if pages is None:
            row = jnp.arange(batch, dtype=jnp.int32)[:, None]
            return jnp.broadcast_to(row, at.shape), at
        return jnp.take_along_axis(pages, at // page, axis=1), at % page

    def each(cut: Callable[..., Array], page: int) -> Array:
        return jax.vmap(jax.vmap(cut))(*places(page), head)

    def read(cache: Array) -> Array:
        def cut(row: Array, slot: Array, head: Array) -> Array:
            start = layer, row, slot, head, jnp.zeros_like(head)
            sizes = 1, 1, size, 1, cache.shape[4]
            return jax.lax.dynamic_slice(cache, start, sizes)[0, 0, :, 0]

        return each(cut, cache.shape[2])

    def read_scales(scales: Array) -> Array:
        def cut(row: Array, slot: Array, head: Array) -> Array:
            sizes = 1, 1, 1, size
            return jax.lax.dynamic_slice(scales, (layer, row, head, slot), sizes)[0, 0, 0]

        return each(cut, scales.shape[3])[:, :, None, None, :]

    return read, read_scales
