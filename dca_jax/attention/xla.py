"""Blockwise attention in plain XLA: any device, any length, any chunk length, O(T) memory.

For each tile of queries, one online softmax runs over the blocks of keys of each band in turn
(`dca_jax.attention.bands`): DCA's phases, or the bands of another method. Only blocks that the
tile's queries attend to are visited, so the work is at most that of causal attention.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from dca_jax.attention.backend import Rows
from dca_jax.attention.bands import (
    Band,
    Method,
    bands_of,
    logit_scale,
    over_bands,
    rotated_keys,
)
from dca_jax.attention.blocks import KeyBlocks
from dca_jax.attention.stored import Scales
from dca_jax.attention.xla_lists import attend_to_blocks
from dca_jax.attention.xla_tiles import (
    Softmax,
    dot,
    join_tiles,
    join_tiles_lse,
    rotated_query,
    split_tiles,
    split_tiles_lse,
)
from dca_jax.dca import DCAConfig, Phase
from dca_jax.device import Device, current_device
from dca_jax.dtypes import compute_dtype
from dca_jax.rope import rotate

TILE = 512  # queries per tile
LOGITS = 512 * 512  # most logits of a tile per head: few queries use longer blocks of keys
# Keys per block; a block is computed in full even if the text is shorter. On a GPU each block costs
# several kernel launches.
LONGEST_BLOCK = 1024
CPU_TILE = CPU_BLOCK = 256  # their logits fit a CPU's caches: faster than twice as many


def unsupported(
    device: "Device",
    query: jax.ShapeDtypeStruct,
    key: jax.ShapeDtypeStruct,
    dca: Method,
    *,
    listed: bool = False,
    paged: bool = False,
) -> str | None:
    """Returns None: it runs everywhere."""
    return None


def forward(
    query: Float[Array, "B T N H"],
    key: Num[Array, "L R S K H"],
    value: Num[Array, "L R S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    dca: Method,
    phases: tuple[Phase, ...],
    with_lse: bool,
    scales: Scales | None = None,
    blocks: KeyBlocks | None = None,
    pages: Int[Array, "B pages_per_row"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """Output and natural log-sum-exp over the rotated keys of `phases`.

    With a `PositionMethod` the keys are raw, and there are no phases.
    """
    if blocks is not None:
        assert isinstance(dca, DCAConfig)  # `attend` rejects anything else
        options = {"dca": dca, "phases": phases, "scales": scales, "pages": pages}
        out, lse = attend_to_blocks(query, key, value, layer, rows, blocks, **options)
        return out, lse if with_lse else None
    num_queries, kv_heads = query.shape[1], key.shape[3]
    num_keys = key.shape[2] if pages is None else pages.shape[1] * key.shape[2]
    read, read_scales = _reader(layer, pages), _scale_reader(layer, pages)
    tile, block = _block_sizes(num_queries, num_keys)

    def one_tile(args: tuple[Array, Array]) -> tuple[Array, Array]:
        queries, start = args
        batch, _, _, group, head_dim = queries.shape
        index = rows.offset[:, None] + start + jnp.arange(tile, dtype=jnp.int32)[None, :]
        compute = compute_dtype(queries.dtype)
        state = Softmax.empty((batch, kv_heads, group, tile, head_dim), compute)
        scale = logit_scale(index, dca, rows.scale).astype(compute)

        def with_band(state: Softmax, band: Band) -> Softmax:
            seen = _seen(queries, band, scale, rows)
            blocks = _blocks(index, band, rows, num_keys, block)

            def step(start: Array, state: Softmax, masked: bool) -> Softmax:
                at = jnp.minimum(start, num_keys - block)
                text = _text_index(at, block, rows)
                keys = read(key, at, block).astype(queries.dtype)
                keys = rotated_keys(keys, text, band, rows.inv_freq)
                logits = [dot("BKGTH,BSKH->BKGTS", rotated, keys) for rotated in seen]
                logits = _chosen(logits, text, band)
                if scales is not None:
                    logits = logits * read_scales(scales.key, at, block)
                if masked:
                    logits = jnp.where(blocks.met(start, at), logits, -jnp.inf)

                def weighted(p: Array) -> Array:
                    if scales is not None:
                        p = p * read_scales(scales.value, at, block)
                    values = read(value, at, block).astype(queries.dtype)
                    return dot("BKGTS,BSKH->BKGTH", p.astype(queries.dtype), values)

                return state.add(logits, weighted)

            return blocks.each(step, state)

        state = over_bands(bands_of(index, dca, rows.whole, phases), with_band, state)
        return state.result(queries.dtype)

    with jax.named_scope("dca_xla_forward"):
        out, lse = jax.lax.map(one_tile, split_tiles(query, kv_heads, tile))
    return join_tiles(out, num_queries), join_tiles_lse(lse, num_queries) if with_lse else None


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    do: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    *,
    dca: Method,
    phases: tuple[Phase, ...],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of query, key (as given) and value, from the global `lse` and `delta`."""
    num_queries, num_keys, kv_heads = query.shape[1], *key.shape[2:4]
    read = _reader(layer, None)
    tile, block = _block_sizes(num_queries, num_keys)
    compute = compute_dtype(query.dtype)

    def one_tile(carry: tuple[Array, Array], args: tuple) -> tuple[tuple[Array, Array], Array]:
        (queries, start), (do_tile, _), (lse, delta) = args
        index = rows.offset[:, None] + start + jnp.arange(tile, dtype=jnp.int32)[None, :]
        lse = jnp.where(jnp.isfinite(lse), lse, 0)[..., None]  # rows without keys: all masked
        do_tile = jnp.moveaxis(do_tile, 1, 3)
        scale = logit_scale(index, dca, rows.scale).astype(compute)

        def with_band(state: tuple, band: Band) -> tuple:
            dq, carry = state
            seen = _seen(queries, band, scale, rows)
            blocks = _blocks(index, band, rows, num_keys, block)

            def step(start: Array, state: tuple, masked: bool) -> tuple:
                dk, dv, dseen = state
                at = jnp.minimum(start, num_keys - block)
                text = _text_index(at, block, rows)
                keys = rotated_keys(read(key, at, block), text, band, rows.inv_freq)
                values = read(value, at, block)
                logits = [dot("BKGTH,BSKH->BKGTS", rotated, keys) for rotated in seen]
                p = jnp.exp(_chosen(logits, text, band) - lse)
                if masked:
                    p = jnp.where(blocks.met(start, at), p, 0)
                dp = dot("BKGTH,BSKH->BKGTS", do_tile, values)
                ds = _shared((p * (dp - delta[..., None])).astype(query.dtype), text, band)
                p = p.astype(value.dtype)
                dseen = [
                    x + dot("BKGTS,BSKH->BKGTH", d, keys) for x, d in zip(dseen, ds, strict=True)
                ]
                dkeys = [dot("BKGTS,BKGTH->BSKH", d, x) for d, x in zip(ds, seen, strict=True)]
                dkeys = functools.reduce(jnp.add, dkeys)
                dk = _add_at(dk, at, _rotated_back(dkeys, at, band, rows))
                dv = _add_at(dv, at, dot("BKGTS,BKGTH->BSKH", p, do_tile))
                return dk, dv, dseen

            init = (*carry, [jnp.zeros(rotated.shape, compute) for rotated in seen])
            dk, dv, dseen = blocks.each(step, init)
            for position, drotated in zip(band.query_positions, dseen, strict=True):
                drotated = jnp.moveaxis(drotated, 3, 1)
                dq = dq + rotate(drotated, -position, rows.inv_freq)
            return dq, (dk, dv)

        state = jnp.zeros(queries.shape, compute), carry
        dq, carry = over_bands(bands_of(index, dca, rows.whole, phases), with_band, state)
        dq = dq * scale[:, :, None, None, None]
        return carry, dq.astype(queries.dtype)

    with jax.named_scope("dca_xla_backward"):
        (dk, dv), dq = jax.lax.scan(
            one_tile,
            (jnp.zeros(key.shape[1:], compute), jnp.zeros(value.shape[1:], compute)),
            (
                split_tiles(query, kv_heads, tile),
                split_tiles(do, kv_heads, tile),
                (split_tiles_lse(lse, kv_heads, tile), split_tiles_lse(delta, kv_heads, tile)),
            ),
        )
    return (
        join_tiles(dq, num_queries),
        dk.astype(key.dtype),
        dv.astype(value.dtype),
    )


# --- a tile of queries against a block of keys -------------------------------------------------


def _block_sizes(num_queries: int, num_keys: int) -> tuple[int, int]:
    on_cpu = current_device().platform == "cpu"
    tile, longest = (CPU_TILE, CPU_BLOCK) if on_cpu else (TILE, LONGEST_BLOCK)
    tile = min(tile, num_queries)
    return tile, min(num_keys, longest, LOGITS // tile)


class _Blocks(NamedTuple):
    """The blocks of keys of a band that any query of a tile attends to.

    The last block of a cache starts early if it does not fit, and masks the keys of the block
    before it: nothing is padded or copied.

    Attributes:
        size: number of keys of a block.
        first: slot at which block 0 starts; every other one starts where the last one ended.
        count: number of blocks; none if it is negative.
        whole: [begin, end) of the blocks that all queries attend to completely; may be empty.
        span: [start, stop) of each query's keys.
    """

    size: int
    first: Int[Array, ""]
    count: Int[Array, ""]
    whole: tuple[Int[Array, ""], Int[Array, ""]]
    span: tuple[Int[Array, "B t"], Int[Array, "B t"]]

    def each(self, step: Callable[[Array, Any, bool], Any], state: Any) -> Any:
        """The state after `step` on each block, given its first slot and whether to mask it.

        Masks are a pass over the logits and more work in their exponentials. One query has so few
        logits that a second loop, without masks, is not worth compiling.
        """

        def one(n: Array, state: Any, masked: bool) -> Any:
            return step(self.first + n * self.size, state, masked)

        begin, end = self.whole
        if self.span[0].shape[1] > 1:
            state = jax.lax.fori_loop(begin, end, functools.partial(one, masked=False), state)
        else:
            end = begin

        def at_edges(n: Array, state: Any) -> Any:
            return one(jnp.where(n < begin, n, n + (end - begin)), state, masked=True)

        return jax.lax.fori_loop(jnp.int32(0), self.count - (end - begin), at_edges, state)

    def met(self, start: Int[Array, ""], at: Int[Array, ""]) -> Bool[Array, "B 1 1 t size"]:
        """Which keys each query attends to, of the block from `start`, read from slot `at` on."""
        j = at + jnp.arange(self.size, dtype=jnp.int32)[None, None, :]
        first, stop = self.span
        met = (j >= jnp.maximum(first, start)[:, :, None]) & (j < stop[:, :, None])
        return met[:, None, None, :, :]


def _blocks(index: Int[Array, "B t"], band: Band, rows: Rows, num_keys: int, block: int) -> _Blocks:
    start = band.start
    stop = jnp.where(index < rows.lengths[:, None], band.stop, start)  # padding attends to nothing
    slots = (text - rows.key_offset[:, None] for text in (start, stop))
    start, stop = (jnp.clip(slot, 0, num_keys) for slot in slots)
    meets = start < stop
    first = jnp.min(jnp.where(meets, start, num_keys))
    last = jnp.max(jnp.where(meets, stop, 0))
    begin, end = -((first - jnp.max(start)) // block), (jnp.min(stop) - first) // block
    whole = begin, jnp.maximum(begin, end)
    return _Blocks(block, first, -((first - last) // block), whole, (start, stop))


def _seen(
    queries: Float[Array, "B t K G H"], band: Band, scale: Float[Array, "B #t"], rows: Rows
) -> list[Float[Array, "B K G t H"]]:
    """The tile's queries, rotated to each of their positions in the band."""
    return [rotated_query(queries, at, scale, rows) for at in band.query_positions]


def _chosen(
    logits: list[Float[Array, "B K G t block"]], text: Int[Array, "B block"], band: Band
) -> Float[Array, "B K G t block"]:
    """Selects each key's logit from those at each of the queries' positions."""
    if band.steps is None:
        return logits[0]
    return jnp.where(band.steps.nearer(text)[:, None, None], logits[1], logits[0])


def _shared(
    dlogits: Float[Array, "B K G t block"], text: Int[Array, "B block"], band: Band
) -> list[Float[Array, "B K G t block"]]:
    """Gradients of the logits, from the gradient of `_chosen`."""
    if band.steps is None:
        return [dlogits]
    nearer = band.steps.nearer(text)[:, None, None]
    return [jnp.where(which, dlogits, 0) for which in (~nearer, nearer)]


def _rotated_back(
    dkeys: Float[Array, "B block K H"], at: Int[Array, ""], band: Band, rows: Rows
) -> Float[Array, "B block K H"]:
    """Gradient of the keys as given, from that of `rotated_keys`."""
    if band.key_position is None:
        return dkeys
    position = band.key_position(_text_index(at, dkeys.shape[1], rows))
    return rotate(dkeys, -position, rows.inv_freq)


def _text_index(at: Int[Array, ""], block: int, rows: Rows) -> Int[Array, "B block"]:
    """Text indices of the `block` keys from slot `at`."""
    slot = at.astype(jnp.int32) + jnp.arange(block, dtype=jnp.int32)[None, :]
    return rows.key_offset[:, None] + slot


def _reader(
    layer: Int[Array, ""], pages: Int[Array, "B pages_per_row"] | None
) -> Callable[[Array, Array, int], Array]:
    """A function that reads `block` keys or values [B, block, K, H] from slot `at` on, in place."""

    def read(cache: Array, at: Array, block: int) -> Array:
        heads = cache.shape[3:]
        flat = cache.reshape(*cache.shape[:3], heads[0] * heads[1])
        if pages is not None:
            found = flat[layer, *_places(at, block, pages, cache.shape[2])]
            return found.reshape(*found.shape[:2], *heads)
        zero = jnp.zeros_like(at)
        start = layer.astype(at.dtype), zero, at, zero
        found = jax.lax.dynamic_slice(flat, start, (1, flat.shape[1], block, flat.shape[3]))
        if current_device().platform == "cpu":
            # A copy of rows that lie side by side. Left to itself, XLA transposes while it copies,
            # an element at a time: one query's attention takes half as long again.
            found = jax.lax.optimization_barrier(found)
        return found.reshape(-1, block, *heads)

    return read


def _scale_reader(
    layer: Int[Array, ""], pages: Int[Array, "B pages_per_row"] | None
) -> Callable[[Array, Array, int], Array]:
    """A function that reads the scales of these keys or values, as [B, K, 1, 1, block]."""

    def read(scales: Array, at: Array, block: int) -> Array:
        if pages is not None:
            page, slot = _places(at, block, pages, scales.shape[3])
            found = jnp.moveaxis(scales[layer, page, :, slot], 2, 1)
        else:
            zero = jnp.zeros_like(at)
            start = layer.astype(at.dtype), zero, zero, at
            found = jax.lax.dynamic_slice(scales, start, (1, *scales.shape[1:3], block))[0]
        return found[:, :, None, None, :]

    return read


def _places(
    at: Int[Array, ""], block: int, pages: Int[Array, "B pages_per_row"], page: int
) -> tuple[Int[Array, "B block"], Int[Array, "1 block"]]:
    """The pages of `block` tokens of each row in a pool, and the slots within them."""
    number, slot = jnp.divmod(at.astype(jnp.int32) + jnp.arange(block, dtype=jnp.int32), page)
    return pages[:, number], slot[None, :]


def _add_at(acc: Array, at: Array, update: Array) -> Array:
    """Adds `update` to acc[:, at : at + len(update)], in place inside a loop."""
    old = jax.lax.dynamic_slice_in_dim(acc, at, update.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(acc, old + update, at, axis=1)
