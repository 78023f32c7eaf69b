"""Attention over lists of key blocks: a tile of queries reads only the blocks in its list.

A tile has 128 queries of all query heads of a kv head, rotated beforehand for each phase. A word in
scalar memory, written before the kernel starts, has the block of each step for the index map of
keys and values. Steps after a tile's last one repeat its block, so nothing is transferred.

    word    block of keys | phase << 20 | whether some query needs a mask << 22

The words of all tiles need not fit into scalar memory: each call has as many tiles as fit.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dca_jax.attention.backend import KeyBlocks, Rows
from dca_jax.attention.blocks import BLOCK, edge_blocks, full_blocks, num_tiles
from dca_jax.attention.mosaic_tpu import block_math
from dca_jax.attention.mosaic_tpu import tiles as tiling
from dca_jax.attention.mosaic_tpu.heads import Heads
from dca_jax.attention.softmax import LOG2E
from dca_jax.dca import PHASES, DCAConfig, Phase, key_range, query_position
from dca_jax.rope import rotate

PHASE, MASKED = 20, 22  # their first bits in a word
NUMBER = (1 << PHASE) - 1


class _Walks(NamedTuple):
    """The blocks that the tiles read.

    Attributes:
        words: words of the steps; 0 after a tile's last step.
        counts: number of steps of each tile.
        spans: start and end of each query's keys in each phase.
    """

    words: Int[Array, "B K tiles steps"]
    counts: Int[Array, "B K tiles"]
    spans: Int[Array, "B tiles P2 128"]


def words_of_tile(num_keys: int, kv_heads: int, batch: int, dca: DCAConfig) -> int:
    """Words of scalar memory that one tile needs for all rows and kv heads."""
    return batch * kv_heads * _most_steps(num_keys, dca)


def vmem_bytes(heads: Heads, itemsize: int) -> int:
    """An upper bound on the bytes of VMEM that the kernel needs."""
    lanes = BLOCK * (heads.query // heads.kv)
    width = max(heads.kv_width, BLOCK)
    buffered = 2 * BLOCK * width * itemsize + (len(PHASES) + 1) * width * lanes * itemsize
    buffered += 4 * lanes * 16
    return 2 * buffered + 4 * lanes * (2 * width + 3 * BLOCK + 16) + tiling.MIB


def attend_to_blocks(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    heads: Heads,
    blocks: KeyBlocks,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    vmem_limit: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Output and natural log-sum-exp; as `Backend.forward`."""
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, tiles = key.shape[2], num_tiles(num_queries)
    group = num_heads // heads.kv
    walks = _walks(rows, blocks, dca, phases, num_queries, num_keys)
    shift = rows.offset % BLOCK
    moved = jnp.pad(query, ((0, 0), (BLOCK, tiles * BLOCK), (0, 0), (0, 0)))
    moved = _cut(moved, BLOCK - shift, tiles * BLOCK)
    rotated = _rotated(moved, rows, heads, dca, phases)
    flat = (x.reshape(*x.shape[:3], -1) for x in (key, value))
    call = functools.partial(_call, layer, *flat, heads, len(phases), vmem_limit)
    together = min(max(1, tiling.SMEM // (4 * walks.words[:, :, 0].size)), tiles)
    if together == tiles:
        out, lse = call(walks, rotated)
    else:
        out, lse = lax.map(
            lambda some: call(*some),
            (
                _Walks(
                    *(_split(x, axis, together) for x, axis in zip(walks, (2, 2, 1), strict=True))
                ),
                _split(rotated, 2, together),
            ),
        )
        out, lse = (_joined(x, tiles) for x in (out, lse))
    out = _own_lanes(out, heads).reshape(batch, heads.kv, tiles, head_dim, group, BLOCK)
    out = out.transpose(0, 2, 5, 1, 4, 3).reshape(batch, tiles * BLOCK, num_heads, head_dim)
    lse = lse.reshape(batch, heads.kv, tiles, group, BLOCK).transpose(0, 2, 4, 1, 3)
    lse = lse.reshape(batch, tiles * BLOCK, num_heads)
    out, lse = _cut(out, shift, num_queries), _cut(lse, shift, num_queries)
    return out, jnp.swapaxes(lse, 1, 2)


# --- the kernel's arguments --------------------------------------------------------------------


def _most_steps(num_keys: int, dca: DCAConfig) -> int:
    """The most blocks that a tile reads; a block across a border is read in several phases."""
    blocks = -(-num_keys // BLOCK)
    return blocks if dca.chunk_len % BLOCK == 0 else len(PHASES) * blocks


def _walks(
    rows: Rows,
    blocks: KeyBlocks,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    num_queries: int,
    num_keys: int,
) -> _Walks:
    """Phase by phase, the list's blocks, and the edges before and after the full blocks."""
    tiles = blocks.counts.shape[2]
    tile = (rows.offset // BLOCK)[:, None] + jnp.arange(tiles, dtype=jnp.int32)[None, :]
    index = (tile * BLOCK)[:, :, None] + jnp.arange(BLOCK, dtype=jnp.int32)[None, None, :]
    end = jnp.minimum(rows.offset + num_queries, rows.lengths)[:, None, None]
    present = (index >= rows.offset[:, None, None]) & (index < end)
    begins, sizes, spans, word = [], [], [], []
    shape = blocks.counts.shape[:3]
    for number, phase in enumerate(phases):
        start, stop = (jnp.clip(x, 0, num_keys) for x in key_range(index, phase, dca))
        stop = jnp.where(present, stop, start)
        spans += [start, stop]
        meets = start < stop
        first = jnp.min(jnp.where(meets, start, jnp.int32(2**31 - 1)), axis=2)
        last = jnp.max(jnp.where(meets, stop, 0), axis=2)
        column = PHASES.index(phase)
        listed = jnp.sum(blocks.counts[..., :column], axis=3, dtype=jnp.int32)
        edges = edge_blocks(first, last, full_blocks(tile, phase, dca))
        begins += [listed, *(jnp.broadcast_to(at[:, None], shape) for at, _ in edges)]
        sizes += [blocks.counts[..., column]]
        sizes += [jnp.broadcast_to(count[:, None], shape) for _, count in edges]
        edge = number << PHASE | 1 << MASKED
        word += [number << PHASE, edge, edge]
    size, begin = jnp.stack(sizes, axis=3), jnp.stack(begins, axis=3)
    stop = jnp.cumsum(size, axis=3, dtype=jnp.int32)
    step = jnp.arange(_most_steps(num_keys, dca), dtype=jnp.int32)[None, None, None, :]
    part = jnp.sum(step[..., None] >= stop[..., None, :], axis=4, dtype=jnp.int32)
    part = jnp.minimum(part, jnp.int32(len(word) - 1))
    within = step - jnp.take_along_axis(stop - size, part, axis=3)
    place = jnp.take_along_axis(begin, part, axis=3) + within
    at = jnp.clip(place, 0, blocks.numbers.shape[3] - 1)
    of_list = jnp.take_along_axis(blocks.numbers, at, axis=3)
    flags = jnp.asarray(word, jnp.int32)[part]
    words = jnp.where(flags >> MASKED == 1, place, of_list) & NUMBER | flags
    return _Walks(
        words=jnp.where(step < stop[..., -1:], words, 0),
        counts=stop[..., -1],
        spans=jnp.stack(spans, axis=2),
    )


def _rotated(
    query: Float[Array, "B T N H"],
    rows: Rows,
    heads: Heads,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> Float[Array, "B K tiles P W M"]:
    """Queries rotated for each phase, times the logit scale in log2 units, with lanes last.

    They occupy the lanes of their kv head in its pack, with zeros in the others.
    """
    batch, tokens, num_heads, head_dim = query.shape
    index = (rows.offset // BLOCK * BLOCK)[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None, :]
    scale = (rows.scale * jnp.float32(LOG2E))[:, None, None, None]
    wide = query.astype(jnp.float32)
    seen = []
    for phase in phases:
        x = rotate(wide, query_position(index, phase, dca), rows.inv_freq) * scale
        x = x.astype(query.dtype)
        x = x.reshape(batch, -1, BLOCK, heads.kv, num_heads // heads.kv, head_dim)
        seen.append(x.transpose(0, 3, 1, 5, 4, 2).reshape(batch, heads.kv, -1, head_dim, _M(heads)))
    x = jnp.stack(seen, axis=3)
    own = _in_pack(heads, x.dtype)
    x = x[..., None, :, :] * own[None, :, None, None, :, None, None]
    return x.reshape(*x.shape[:4], heads.kv_width, -1)


def _M(heads: Heads) -> int:
    """Number of queries of a tile, counting all query heads of a kv head."""
    return heads.query // heads.kv * BLOCK


def _in_pack(heads: Heads, dtype: Any) -> Float[Array, "K per_pack"]:
    """1 at a kv head's place in its pack, else 0."""
    place = jnp.arange(heads.kv, dtype=jnp.int32) % heads.kv_per_pack
    return jax.nn.one_hot(place, heads.kv_per_pack, dtype=dtype)


def _own_lanes(out: Float[Array, "B K tiles W M"], heads: Heads) -> Float[Array, "B K tiles H M"]:
    """The kv head's lanes from those of its pack."""
    if heads.kv_per_pack == 1:
        return out
    place = jnp.arange(heads.kv, dtype=jnp.int32) % heads.kv_per_pack
    out = out.reshape(*out.shape[:3], heads.kv_per_pack, heads.head_dim, -1)
    return jnp.take_along_axis(out, place[None, :, None, None, None, None], axis=3)[:, :, :, 0]


def _cut(x: Array, start: Int[Array, " B"], size: int) -> Array:
    """`size` tokens of each row from `start` on."""
    return jax.vmap(lambda row, at: lax.dynamic_slice_in_dim(row, at, size))(x, start)


def _split(x: Array, axis: int, size: int) -> Array:
    """Splits `axis` into [parts, ..., size, ...], with zeros at its end."""
    missing = [(0, -x.shape[axis] % size if n == axis else 0) for n in range(x.ndim)]
    x = jnp.pad(x, missing)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _joined(x: Float[Array, "parts B K size W M"], tiles: int) -> Float[Array, "B K tiles W M"]:
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :tiles]


# --- the kernel --------------------------------------------------------------------------------


def _call(
    layer: Int[Array, ""],
    key: Float[Array, "L B S KH"],
    value: Float[Array, "L B S KH"],
    heads: Heads,
    num_phases: int,
    vmem_limit: int,
    walks: _Walks,
    rotated: Float[Array, "B K tiles P W M"],
) -> tuple[Float[Array, "B K tiles W M"], Float[Array, "B K tiles 1 M"]]:
    batch, kv_heads, tiles, _, width, lanes = rotated.shape
    group, most = lanes // BLOCK, walks.words.shape[3]
    # In lanes, like the logits of all heads.
    spans = jnp.tile(walks.spans, (1, 1, 1, group))

    def place(b: Array, k: Array, t: Array) -> Array:
        return (b * kv_heads + k) * tiles + t

    def of_tile(b: Array, k: Array, t: Array, *_: Any) -> tuple:
        return b, k, t, 0, 0

    def keys(b: Array, k: Array, t: Array, n: Array, layer: Any, counts: Any, words: Any) -> tuple:
        at = place(b, k, t)
        step = jnp.maximum(jnp.minimum(n, counts[at] - 1), 0)
        block = words[at * most + step] & NUMBER
        return layer[0], b, block, lax.div(k, jnp.int32(heads.kv_per_pack))

    blocks_of_keys = pl.BlockSpec((None, None, BLOCK, width), keys)
    return pl.pallas_call(
        functools.partial(
            _kernel, place=place, most=most, num_keys=key.shape[2], num_phases=num_phases
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, kv_heads, tiles, jnp.maximum(walks.counts.max(), 1)),
            in_specs=[
                pl.BlockSpec(
                    (None, None, None, num_phases, width, lanes), lambda *at: (*of_tile(*at), 0)
                ),
                pl.BlockSpec((None, None, 2 * num_phases, lanes), lambda b, k, t, *_: (b, t, 0, 0)),
                blocks_of_keys,
                blocks_of_keys,
            ],
            out_specs=[
                pl.BlockSpec((None, None, None, width, lanes), of_tile),
                pl.BlockSpec((None, None, None, 1, lanes), of_tile),
            ],
            scratch_shapes=[
                pltpu.VMEM((1, lanes), jnp.float32),
                pltpu.VMEM((1, lanes), jnp.float32),
                pltpu.VMEM((width, lanes), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, kv_heads, tiles, width, lanes), rotated.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, tiles, 1, lanes), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit,
        ),
        name="dca_tpu_lists",
    )(
        layer.reshape(1).astype(jnp.int32),
        walks.counts.reshape(-1),
        walks.words.reshape(-1),
        rotated,
        spans,
        key,
        value,
    )


def _kernel(
    layer_ref: Any,
    counts_ref: Any,
    words_ref: Any,
    query_ref: Any,  # [P, W, M]
    spans_ref: Any,  # [2 P, M]
    key_ref: Any,  # [128, W]
    value_ref: Any,
    out_ref: Any,  # [W, M]
    lse_ref: Any,  # [1, M]
    m_ref: Any,
    l_ref: Any,
    acc_ref: Any,
    *,
    place: Any,
    most: int,
    num_keys: int,
    num_phases: int,
) -> None:
    """Grid: (row, kv head, tile, step)."""
    del layer_ref
    at, step = place(*(pl.program_id(axis) for axis in range(3))), pl.program_id(3)
    count = counts_ref[at]
    word = words_ref[at * most + jnp.maximum(jnp.minimum(step, count - 1), 0)]
    phase, masked = word >> PHASE & 3, word >> MASKED == 1

    @pl.when(step == 0)
    def initialize() -> None:
        block_math.init_softmax(m_ref, l_ref, acc_ref)

    def attend(masked: bool) -> None:
        value = value_ref[...]
        logits = block_math.dot(key_ref[...], query_ref[phase], 1, 0)
        if masked:
            first = (word & NUMBER) * BLOCK
            start, stop = (_of_phase(spans_ref, phase, part, num_phases) for part in (0, 1))
            slot = first + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
            logits = jnp.where((slot >= start) & (slot < stop), logits, -jnp.inf)
            value = block_math.zero_padding(value, first, num_keys, 0)
        p, m_ref[...], alpha = block_math.softmax_weights(logits, m_ref[...], axis=0)
        l_ref[...] = l_ref[...] * alpha + jnp.sum(p, axis=0, keepdims=True)
        pv = block_math.dot(value, p.astype(value.dtype), 0, 0)
        acc_ref[...] = acc_ref[...] * alpha + pv

    active = step < count
    pl.when(active & ~masked)(functools.partial(attend, False))
    pl.when(active & masked)(functools.partial(attend, True))

    @pl.when(step == pl.num_programs(3) - 1)
    def store() -> None:
        any_key, safe_l = block_math.nonzero_sum(l_ref[...])
        out_ref[...] = (acc_ref[...] / safe_l).astype(out_ref.dtype)
        lse_ref[...] = block_math.log_sum_exp(m_ref[...], safe_l, any_key)


def _of_phase(spans_ref: Any, phase: Array, part: int, num_phases: int) -> Int[Array, "1 M"]:
    """A row of `spans_ref` for the step's dynamic phase."""
    found = spans_ref[part : part + 1, :]
    for number in range(1, num_phases):
        row = spans_ref[2 * number + part : 2 * number + part + 1, :]
        found = jnp.where(phase == number, row, found)
    return found
