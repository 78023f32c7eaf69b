"""Attention in Pallas-Triton, for NVIDIA GPUs from Ampere on. JAX deprecates Pallas-Triton (0.11).

One program takes a tile of queries through the key ranges of every phase in turn, with one online
softmax; the tile's rotation changes where the phase does. Blocks of keys that every query of the
tile meets skip the mask. Few queries (decoding) are packed with the query heads that share their
keys, and the keys are split over programs, whose outputs are merged by their log-sum-exp.

Backward: dq walks the same ranges; dk and dv walk, for a block of keys, the ranges of queries that
meet it in each phase, all query heads of the kv head in turn: no atomics, so bitwise deterministic.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from dca_jax.attention.backend import Rows
from dca_jax.attention.device import Device, current_device
from dca_jax.dca import DCAConfig, Phase, key_range, query_position
from dca_jax.rope import rotate

INTERPRET = False  # tests set it: the kernels then run on any device, in Pallas' interpreter
LOG2E = math.log2(math.e)
FAR = 2**30  # beyond every text; twice that would overflow int32
LOWEST = -1e30  # a running maximum to start from: finite, so that no inf - inf appears

PACKED_ROWS = 64  # up to so many queries a kv head, counting its heads, are packed into one tile
PROGRAMS = 264  # programs that split a packed call's keys: two for each of an H200's 132 cores
SPLIT_KEYS = 256  # fewest keys of a cache worth a program of their own
MAX_SPLITS = 128  # the merge holds all splits of one row in registers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """How one kernel is cut: queries and keys of a block, warps a program, buffers of its loop."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """The four kernels' tiles for one kind of device and one head_dim."""

    forward: Tile
    dq: Tile
    dkv: Tile
    decode: Tile  # block_q counts rows: queries times the heads packed with them


def _tile(block_q: int, block_k: int, num_warps: int, num_stages: int) -> Tile:
    return Tile(block_q=block_q, block_k=block_k, num_warps=num_warps, num_stages=num_stages)


# By head_dim; narrower heads use the tiles of 64.
HOPPER = {
    64: Tiles(
        forward=_tile(128, 128, 8, 3),
        dq=_tile(128, 64, 8, 3),
        dkv=_tile(64, 128, 8, 3),
        decode=_tile(16, 128, 4, 3),
    ),
    128: Tiles(
        forward=_tile(128, 128, 8, 3),
        dq=_tile(128, 64, 8, 3),
        dkv=_tile(64, 128, 8, 3),
        decode=_tile(16, 64, 4, 3),
    ),
    256: Tiles(
        forward=_tile(128, 64, 8, 2),
        dq=_tile(64, 64, 8, 2),
        dkv=_tile(64, 64, 8, 2),
        decode=_tile(16, 32, 4, 3),
    ),
}
# Ampere and Ada; every entry fits the 99 KiB of their small chips.
AMPERE = {
    64: Tiles(
        forward=_tile(128, 64, 4, 3),
        dq=_tile(64, 64, 4, 2),
        dkv=_tile(64, 64, 4, 2),
        decode=_tile(16, 128, 4, 2),
    ),
    128: Tiles(
        forward=_tile(128, 32, 4, 3),
        dq=_tile(64, 32, 4, 2),
        dkv=_tile(32, 64, 4, 2),
        decode=_tile(16, 64, 4, 2),
    ),
    256: Tiles(
        forward=_tile(64, 32, 4, 2),
        dq=_tile(32, 32, 4, 2),
        dkv=_tile(32, 32, 4, 2),
        decode=_tile(16, 32, 4, 2),
    ),
}

# KiB of shared memory a program may have, by compute capability (CUDA C++ Programming Guide).
SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227}


def choose_tiles(device: "Device", head_dim: int) -> Tiles:
    """The tiles for a device and a head_dim."""
    table = HOPPER if device.capability == (9, 0) else AMPERE
    return table[max(head_dim, 64)]


def shared_bytes(tiles: Tiles, head_dim: int, itemsize: int) -> int:
    """Shared memory that the largest of the kernels needs: its own rows and its loop's buffers.

    dkv's loop also holds two float32 for each query: log-sum-exp and delta.
    """
    row = head_dim * itemsize
    return max(
        row * (tiles.forward.block_q + 2 * tiles.forward.num_stages * tiles.forward.block_k),
        row * (2 * tiles.dq.block_q + 2 * tiles.dq.num_stages * tiles.dq.block_k),
        row * 2 * tiles.dkv.block_k + (2 * row + 8) * tiles.dkv.num_stages * tiles.dkv.block_q,
        row * (PACKED_ROWS + 2 * tiles.decode.num_stages * tiles.decode.block_k),
    )


def unsupported(
    device: "Device", query: jax.ShapeDtypeStruct, key: jax.ShapeDtypeStruct, dca: DCAConfig
) -> str | None:
    """Why these kernels cannot run on these shapes and dtypes on this device; None: they can."""
    head_dim = query.shape[-1]
    if head_dim not in (16, 32, 64, 128, 256):
        return f"head_dim must be 16, 32, 64, 128 or 256, got {head_dim}"
    if INTERPRET:
        return None
    if device.platform != "gpu" or device.capability is None or device.capability < (8, 0):
        have = "" if device.capability is None else f", compute capability {device.capability}"
        return (
            "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer, got "
            f"{device.kind} ({device.platform}{have})"
        )
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return (
            f"the dtype must be bfloat16 or float16, got {query.dtype}: tensor cores multiply "
            "nothing wider without rounding it"
        )
    need = shared_bytes(choose_tiles(device, head_dim), head_dim, query.dtype.itemsize)
    have = 1024 * SHARED_KIB.get(device.capability, 99)
    if need > have:
        return (
            f"its tiles for head_dim {head_dim} need {need} bytes of shared memory, and "
            f"{device.kind} has {have} a program"
        )
    return None


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    with_lse: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """Output over the keys of `phases`, and on request its natural log-sum-exp; as `op.Backend`."""
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[2:4]
    group = heads // kv_heads
    tiles = choose_tiles(current_device(), head_dim)
    packed = num_queries * pl.next_power_of_2(group) <= PACKED_ROWS
    if packed:
        tile, pack = tiles.decode, pl.next_power_of_2(group)
        block_q = max(pl.next_power_of_2(num_queries), pl.cdiv(tile.block_q, pack))
        splits = pl.cdiv(PROGRAMS, batch * kv_heads)
        splits = max(min(splits, num_keys // SPLIT_KEYS, MAX_SPLITS), 1)
        grid = (kv_heads, splits, batch)
    else:
        tile, pack, splits = tiles.forward, 1, 1
        block_q = tile.block_q
        grid = (heads, pl.cdiv(num_queries, block_q), batch)
    kernel = functools.partial(
        _forward_kernel,
        dca=dca,
        phases=phases,
        block_q=block_q,
        block_k=tile.block_k,
        pack=pack,
        splits=splits,
        staged=not packed,
    )
    dtype = query.dtype if splits == 1 else jnp.dtype(jnp.float32)
    out = jax.ShapeDtypeStruct((splits, batch, num_queries, kv_heads, group, head_dim), dtype)
    lse = jax.ShapeDtypeStruct((splits, batch, kv_heads, group, num_queries), jnp.float32)
    out, *lse = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=(out, lse) if with_lse or splits > 1 else (out,),
        compiler_params=_compiler_params(tile),
        interpret=INTERPRET,
        name="dca_triton_forward",
    )(*_row_arrays(layer, rows), *_turns(num_queries, rows, dca), *_by_kv_head(query, key, value))
    if splits > 1:
        lses = lse[0].reshape(splits, batch, heads, num_queries)
        out, *lse = _merge(out.reshape(splits, *query.shape), lses, query.dtype, with_lse)
    return out.reshape(query.shape), lse[0].reshape(batch, heads, num_queries) if lse else None


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    out_bar: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of query, key (rotated) and value, from the global `lse` and `delta`."""
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[2:4]
    group = heads // kv_heads
    tiles = choose_tiles(current_device(), head_dim)
    # In units of log2, and where a query met no key so large that its weights vanish.
    lse = jnp.where(jnp.isfinite(lse), lse * LOG2E, -LOWEST).reshape(
        batch, kv_heads, group, num_queries
    )
    delta = delta.reshape(lse.shape)
    row_arrays = _row_arrays(layer, rows)
    grouped, keys, values = _by_kv_head(query, key, value)
    out_bar = out_bar.astype(query.dtype).reshape(grouped.shape)
    query_bar = pl.pallas_call(
        functools.partial(
            _dq_kernel,
            dca=dca,
            phases=phases,
            block_q=tiles.dq.block_q,
            block_k=tiles.dq.block_k,
        ),
        grid=(heads, pl.cdiv(num_queries, tiles.dq.block_q), batch),
        out_shape=jax.ShapeDtypeStruct(grouped.shape, query.dtype),
        compiler_params=_compiler_params(tiles.dq),
        interpret=INTERPRET,
        name="dca_triton_dq",
    )(*row_arrays, *_turns(num_queries, rows, dca), grouped, keys, values, out_bar, lse, delta)
    # A block of keys meets each tile of queries once: turning it there would cost more than these
    # copies, of which all blocks read.
    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    wide = query.astype(jnp.float32) * (rows.scale * LOG2E)[:, None, None, None]
    turned = [
        rotate(wide, query_position(index, phase, dca), rows.inv_freq)
        .astype(query.dtype)
        .reshape(grouped.shape)
        for phase in phases
    ]
    key_bar, value_bar = pl.pallas_call(
        functools.partial(
            _dkv_kernel,
            dca=dca,
            phases=phases,
            block_q=tiles.dkv.block_q,
            block_k=tiles.dkv.block_k,
        ),
        grid=(kv_heads, pl.cdiv(num_keys, tiles.dkv.block_k), batch),
        out_shape=(
            jax.ShapeDtypeStruct(key.shape[1:], key.dtype),
            jax.ShapeDtypeStruct(value.shape[1:], value.dtype),
        ),
        compiler_params=_compiler_params(tiles.dkv),
        interpret=INTERPRET,
        name="dca_triton_dkv",
    )(*row_arrays, keys, values, out_bar, lse, delta, *turned)
    return query_bar.reshape(query.shape), key_bar, value_bar


# --- what the kernels are given ----------------------------------------------------------------


def _compiler_params(tile: Tile) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages)


def _row_arrays(layer: Int[Array, ""], rows: Rows) -> tuple[Array, ...]:
    """Layer, and each row's offset, length, key offset and logit scale: a program's scalars."""
    layer = layer.astype(jnp.int32).reshape(1)
    return layer, rows.offset, rows.lengths, rows.key_offset, rows.scale


def _by_kv_head(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """query [B, T, K, N/K, H], key and value [L*B, S, K, H]: free reshapes."""
    batch, num_queries, heads, head_dim = query.shape
    num_layers, _, num_keys, kv_heads, _ = key.shape
    query = query.reshape(batch, num_queries, kv_heads, heads // kv_heads, head_dim)
    stacked = (num_layers * batch, num_keys, kv_heads, head_dim)
    return query, key.reshape(stacked), value.reshape(stacked)


def _turns(num_queries: int, rows: Rows, dca: DCAConfig) -> tuple[Array, Array]:
    """cos and sin [B, T + 2, H/2], float32: of P_q(i, intra), of P_q(inter), and of s.

    Every phase's rotation follows from these (`_turn`), so no table per phase is needed.
    """
    batch = rows.offset.shape[0]
    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    constants = jnp.asarray([dca.inter_position, dca.chunk_len], jnp.int32)
    positions = jnp.concatenate(
        [index % dca.chunk_len, jnp.broadcast_to(constants[None, :], (batch, 2))], axis=1
    )
    angle = positions.astype(jnp.float32)[:, :, None] * rows.inv_freq[:, None, :]
    return jnp.cos(angle), jnp.sin(angle)


# --- forward -----------------------------------------------------------------------------------


def _forward_kernel(
    layer_ref: Any,  # [1]
    offset_ref: Any,  # [B]
    lengths_ref: Any,  # [B]
    key_offset_ref: Any,  # [B]
    scale_ref: Any,  # [B]
    cos_ref: Any,  # [B, T + 2, H/2]
    sin_ref: Any,
    query_ref: Any,  # [B, T, K, G, H]
    key_ref: Any,  # [L*B, S, K, H]
    value_ref: Any,
    out_ref: Any,  # [splits, B, T, K, G, H]
    lse_ref: Any = None,  # [splits, B, K, G, T]
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    block_q: int,
    block_k: int,
    pack: int,
    splits: int,
    staged: bool,
) -> None:
    """Grid: (kv heads, splits, batch) if heads are packed, else (query heads, tiles, batch).

    A row of the tile is a query of one head: `block_q` queries of `pack` heads. With `staged`
    (one head, one split) the turned queries pass through the tile's own place in `out_ref`.
    """
    _, num_queries, _, group, head_dim = query_ref.shape
    batch, num_keys = pl.program_id(2), key_ref.shape[1]
    cache_row = layer_ref[0] * offset_ref.shape[0] + batch
    if pack > 1 or group == 1:
        kv_head, first_head = pl.program_id(0), jnp.int32(0)
    else:
        kv_head = lax.div(pl.program_id(0), jnp.int32(group))
        first_head = lax.rem(pl.program_id(0), jnp.int32(group))
    # The longest tiles go first, so that the last programs to finish are short.
    split = pl.program_id(1) if splits > 1 else jnp.int32(0)
    first = jnp.int32(0) if splits > 1 else (pl.num_programs(1) - 1 - pl.program_id(1)) * block_q

    token = first + jnp.arange(block_q, dtype=jnp.int32)
    index = offset_ref[batch] + token
    head = first_head + jnp.arange(pack, dtype=jnp.int32)
    is_query = (token < num_queries)[:, None] & (head < group)[None, :]
    is_text = is_query & (index < lengths_ref[batch])[:, None]
    span = _spread(index, pack)
    bounds = _tile_bounds(first, block_q, num_queries, offset_ref[batch], lengths_ref[batch])

    factor = scale_ref[batch] * LOG2E
    key_offset = key_offset_ref[batch]
    share = _share(jnp.minimum(bounds[1] + 1 - key_offset, num_keys), split, splits, block_k)

    state = (
        jnp.full((block_q * pack,), LOWEST, jnp.float32),  # running maximum
        jnp.zeros((block_q * pack,), jnp.float32),  # running sum
        jnp.zeros((block_q * pack, head_dim), jnp.float32),  # running output
    )
    for phase in phases:
        cos, sin = _turn(cos_ref, sin_ref, batch, first, block_q, phase, dca, index, num_queries)
        halves = _load_halves(query_ref, batch, first, block_q, kv_head, first_head, pack, is_query)
        turned = _rotate(*halves, cos * factor, sin * factor)
        if staged:
            query = _through(
                out_ref,
                (split, batch, pl.ds(first, block_q), kv_head, first_head),
                turned,
                is_query,
            )
        else:
            query = _join(*turned, query_ref.dtype)
        start, stop = (i - key_offset for i in key_range(span, phase, dca))
        ranges = _key_bounds(bounds, phase, dca, key_offset, share)
        stop = jnp.minimum(stop, ranges[3])

        def step(
            at: Array,
            edge: bool,
            state: tuple,
            query: Array = query,
            start: Array = start,
            stop: Array = stop,
            limit: Array = ranges[3],
        ) -> tuple:
            peak, total, acc = state
            key = _load_rows(key_ref, cache_row, at, block_k, kv_head, edge, limit)
            logits = _dot(query, key, 1, 1)
            if edge:
                j = (at + jnp.arange(block_k, dtype=jnp.int32))[None, :]
                met = (start[:, None] <= j) & (j < stop[:, None])
                logits = jnp.where(met, logits, -jnp.inf)
            new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
            weights = _exp2(logits - new_peak[:, None])
            decay = _exp2(peak - new_peak)
            total = total * decay + jnp.sum(weights, axis=1)
            value = _load_rows(value_ref, cache_row, at, block_k, kv_head, edge, limit)
            acc = acc * decay[:, None] + _dot(weights.astype(value.dtype), value, 1, 0)
            return new_peak, total, acc

        state = _sweep(*ranges, block_k, step, state)

    peak, total, acc = state
    met_any = (total > 0) & is_text.reshape(total.shape)
    total = jnp.where(met_any, total, 1.0)
    out = jnp.where(met_any[:, None], acc / total[:, None], 0.0)
    heads = pl.ds(first_head, pack)
    plgpu.store(
        out_ref.at[split, batch, pl.ds(first, block_q), kv_head, heads, :],
        out.reshape(block_q, pack, head_dim).astype(out_ref.dtype),
        mask=is_query[:, :, None],
    )
    if lse_ref is not None:
        lse = jnp.where(met_any, peak / LOG2E + jnp.log(total), -jnp.inf)
        plgpu.store(
            lse_ref.at[split, batch, kv_head, heads, pl.ds(first, block_q)],
            lse.reshape(block_q, pack).T,
            mask=is_query.T,
        )


def _share(total: Array, split: Array, splits: int, block_k: int) -> tuple[Array, Array]:
    """[first, last) of the slots that a program of a split call reads: equal shares of `total`.

    The shares follow the text's length, which is dynamic; their number does not.
    """
    if splits == 1:
        return jnp.int32(0), total
    size = lax.div(jnp.maximum(total, 0) + (splits * block_k - 1), jnp.int32(splits * block_k))
    size = size * block_k
    return split * size, jnp.minimum((split + 1) * size, total)


def _merge(
    outs: Float[Array, "splits B T N H"],
    lses: Float[Array, "splits B N T"],
    dtype: jnp.dtype,
    with_lse: bool,
) -> tuple[Array, ...]:
    """The splits' outputs merged by their log-sum-exp; one program a query and head."""
    _, batch, num_queries, heads, head_dim = outs.shape
    out = jax.ShapeDtypeStruct((batch, num_queries, heads, head_dim), dtype)
    lse = jax.ShapeDtypeStruct((batch, heads, num_queries), jnp.float32)
    return pl.pallas_call(
        _merge_kernel,
        grid=(heads, num_queries, batch),
        out_shape=(out, lse) if with_lse else (out,),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=INTERPRET,
        name="dca_triton_merge",
    )(outs, lses)


def _merge_kernel(outs_ref: Any, lses_ref: Any, out_ref: Any, lse_ref: Any = None) -> None:
    splits = outs_ref.shape[0]
    head, token, batch = (pl.program_id(axis) for axis in range(3))
    every = pl.ds(0, pl.next_power_of_2(splits))
    is_split = jnp.arange(every.size, dtype=jnp.int32) < splits
    lses = plgpu.load(lses_ref.at[every, batch, head, token], mask=is_split, other=-jnp.inf)
    outs = plgpu.load(outs_ref.at[every, batch, token, head, :], mask=is_split[:, None], other=0.0)
    peak = jnp.maximum(jnp.max(lses, axis=0), LOWEST)
    weights = jnp.exp(lses - peak)
    total = jnp.sum(weights, axis=0)
    met_any = total > 0
    total = jnp.where(met_any, total, 1.0)
    out = jnp.sum(weights[:, None] * outs, axis=0) / total
    out_ref[batch, token, head, :] = out.astype(out_ref.dtype)
    if lse_ref is not None:
        lse_ref[batch, head, token] = jnp.where(met_any, peak + jnp.log(total), -jnp.inf)


# --- backward ----------------------------------------------------------------------------------


def _dq_kernel(
    layer_ref: Any,  # [1]
    offset_ref: Any,  # [B]
    lengths_ref: Any,  # [B]
    key_offset_ref: Any,  # [B]
    scale_ref: Any,  # [B]
    cos_ref: Any,  # [B, T + 2, H/2]
    sin_ref: Any,
    query_ref: Any,  # [B, T, K, G, H]
    key_ref: Any,  # [L*B, S, K, H]
    value_ref: Any,
    out_bar_ref: Any,  # [B, T, K, G, H]
    lse_ref: Any,  # [B, K, G, T], in units of log2
    delta_ref: Any,
    query_bar_ref: Any,  # [B, T, K, G, H]
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    block_q: int,
    block_k: int,
) -> None:
    """Grid: (query heads, tiles, batch)."""
    _, num_queries, _, group, head_dim = query_ref.shape
    batch, num_keys = pl.program_id(2), key_ref.shape[1]
    cache_row = layer_ref[0] * offset_ref.shape[0] + batch
    kv_head = lax.div(pl.program_id(0), jnp.int32(group))
    head = lax.rem(pl.program_id(0), jnp.int32(group))
    first = (pl.num_programs(1) - 1 - pl.program_id(1)) * block_q

    token = first + jnp.arange(block_q, dtype=jnp.int32)
    index = offset_ref[batch] + token
    is_query = token < num_queries
    tokens = pl.ds(first, block_q)
    out_bar = plgpu.load(
        out_bar_ref.at[batch, tokens, kv_head, head, :], mask=is_query[:, None], other=0.0
    )
    lse = plgpu.load(lse_ref.at[batch, kv_head, head, tokens], mask=is_query, other=-LOWEST)
    delta = plgpu.load(delta_ref.at[batch, kv_head, head, tokens], mask=is_query, other=0.0)
    bounds = _tile_bounds(first, block_q, num_queries, offset_ref[batch], lengths_ref[batch])
    factor = scale_ref[batch] * LOG2E
    key_offset = key_offset_ref[batch]

    acc = jnp.zeros((block_q, head_dim), jnp.float32)
    for number, phase in enumerate(phases):
        cos, sin = _turn(cos_ref, sin_ref, batch, first, block_q, phase, dca, index, num_queries)
        halves = _load_halves(query_ref, batch, first, block_q, kv_head, head, 1, is_query[:, None])
        turned = _rotate(*halves, cos * factor, sin * factor)
        query = _through(query_bar_ref, (batch, tokens, kv_head, head), turned, is_query[:, None])
        start, stop = (i - key_offset for i in key_range(index, phase, dca))
        ranges = _key_bounds(bounds, phase, dca, key_offset, (jnp.int32(0), jnp.int32(num_keys)))
        stop = jnp.minimum(stop, ranges[3])

        def step(
            at: Array,
            edge: bool,
            acc: Array,
            query: Array = query,
            start: Array = start,
            stop: Array = stop,
            limit: Array = ranges[3],
        ) -> Array:
            key = _load_rows(key_ref, cache_row, at, block_k, kv_head, edge, limit)
            value = _load_rows(value_ref, cache_row, at, block_k, kv_head, edge, limit)
            logits = _dot(query, key, 1, 1) - lse[:, None]
            if edge:
                j = (at + jnp.arange(block_k, dtype=jnp.int32))[None, :]
                met = (start[:, None] <= j) & (j < stop[:, None])
                logits = jnp.where(met, logits, -jnp.inf)
            weights_bar = _dot(out_bar, value, 1, 1)
            logits_bar = _exp2(logits) * (weights_bar - delta[:, None])
            return acc + _dot(logits_bar.astype(key.dtype), key, 1, 0)

        # One accumulator serves all phases: it is kept in the frame of the phase's own rotation,
        # into which it is turned before, and out of which it is turned after.
        if number > 0:
            acc = _join(*_rotate(*_split(acc), cos, sin), acc.dtype)
        acc = _sweep(*ranges, block_k, step, acc)
        acc = _join(*_rotate(*_split(acc), cos, -sin), acc.dtype)

    plgpu.store(
        query_bar_ref.at[batch, tokens, kv_head, head, :],
        (acc * scale_ref[batch]).astype(query_bar_ref.dtype),
        mask=is_query[:, None],
    )


def _dkv_kernel(
    layer_ref: Any,  # [1]
    offset_ref: Any,  # [B]
    lengths_ref: Any,  # [B]
    key_offset_ref: Any,  # [B]
    scale_ref: Any,  # [B]
    key_ref: Any,  # [L*B, S, K, H]
    value_ref: Any,
    out_bar_ref: Any,  # [B, T, K, G, H]
    lse_ref: Any,  # [B, K, G, T], in units of log2
    delta_ref: Any,
    *refs: Any,  # a turned and scaled query [B, T, K, G, H] for each phase; key_bar, value_bar
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    block_q: int,
    block_k: int,
) -> None:
    """Grid: (kv heads, blocks of keys, batch); the first blocks, met by most queries, go first.

    The logits lie transposed, [keys, queries], so that they multiply queries from the left.
    """
    del scale_ref  # it is in the turned queries
    *query_refs, key_bar_ref, value_bar_ref = refs
    _, num_queries, _, group, head_dim = out_bar_ref.shape
    kv_head, batch, num_keys = pl.program_id(0), pl.program_id(2), key_ref.shape[1]
    cache_row = layer_ref[0] * offset_ref.shape[0] + batch
    first = pl.program_id(1) * block_k
    j = first + jnp.arange(block_k, dtype=jnp.int32)
    key = _load_rows(key_ref, cache_row, first, block_k, kv_head, True, num_keys)
    value = _load_rows(value_ref, cache_row, first, block_k, kv_head, True, num_keys)
    offset, key_offset = offset_ref[batch], key_offset_ref[batch]
    limit = jnp.clip(lengths_ref[batch] - offset, 0, num_queries)
    last = jnp.minimum(first + block_k, num_keys) - 1
    text, text_first, text_last = (key_offset + slot for slot in (j, first, last))

    def one_head(head: Array, state: tuple) -> tuple:
        for query_ref, phase in zip(query_refs, phases, strict=True):
            start, stop = (i - offset for i in _query_range(text, phase, dca))
            (lo, full_hi), (full_lo, hi) = (
                [jnp.clip(i - offset, 0, limit) for i in _query_range(end, phase, dca)]
                for end in (text_first, text_last)
            )
            stop = jnp.minimum(stop, limit)

            def step(
                at: Array,
                edge: bool,
                state: tuple,
                query_ref: Any = query_ref,
                start: Array = start,
                stop: Array = stop,
            ) -> tuple:
                key_bar, value_bar = state
                tokens = pl.ds(at, block_q)
                t = at + jnp.arange(block_q, dtype=jnp.int32)
                mask = {"mask": (t < limit)[:, None], "other": 0.0} if edge else {}
                query = plgpu.load(query_ref.at[batch, tokens, kv_head, head, :], **mask)
                out_bar = plgpu.load(out_bar_ref.at[batch, tokens, kv_head, head, :], **mask)
                mask = {"mask": t < limit, "other": 0.0} if edge else {}
                lse = plgpu.load(lse_ref.at[batch, kv_head, head, tokens], **mask)
                delta = plgpu.load(delta_ref.at[batch, kv_head, head, tokens], **mask)
                logits = _dot(key, query, 1, 1) - lse[None, :]
                if edge:
                    met = (start[:, None] <= t[None, :]) & (t[None, :] < stop[:, None])
                    logits = jnp.where(met, logits, -jnp.inf)
                weights = _exp2(logits)
                value_bar = value_bar + _dot(weights.astype(out_bar.dtype), out_bar, 1, 0)
                weights_bar = _dot(value, out_bar, 1, 1)
                logits_bar = weights * (weights_bar - delta[None, :])
                key_bar = key_bar + _dot(logits_bar.astype(query.dtype), query, 1, 0)
                return key_bar, value_bar

            state = _sweep(lo, full_lo, full_hi, hi, block_q, step, state)
        return state

    zeros = jnp.zeros((block_k, head_dim), jnp.float32)
    key_bar, value_bar = lax.fori_loop(0, group, one_head, (zeros, zeros))
    keys, mask = pl.ds(first, block_k), (j < num_keys)[:, None]
    # The turned queries carry log2(e), and their factor is the logits' own derivative.
    key_bar = (key_bar / LOG2E).astype(key_bar_ref.dtype)
    plgpu.store(key_bar_ref.at[batch, keys, kv_head, :], key_bar, mask=mask)
    value_bar = value_bar.astype(value_bar_ref.dtype)
    plgpu.store(value_bar_ref.at[batch, keys, kv_head, :], value_bar, mask=mask)


def _query_range(j: Array, phase: Phase, dca: DCAConfig) -> tuple[Array, Array]:
    """[start, stop) of the queries that meet key j in a phase, as text indices.

    The inverse of `key_range`; clipped to FAR, so that no chunk length overflows int32.
    """
    chunk = j - j % dca.chunk_len
    one, two = min(dca.chunk_len, FAR), min(2 * dca.chunk_len, FAR)
    if phase == "intra":
        return j, chunk + one
    if phase == "succ":
        return chunk + one, chunk + two
    return chunk + two, jnp.full_like(j, FAR)


# --- ranges ------------------------------------------------------------------------------------


def _tile_bounds(
    first: Array, block_q: int, num_queries: int, offset: Array, length: Array
) -> tuple[Array, Array]:
    """Index of the tile's first and of its last query that is text (none: last < first)."""
    stop = jnp.minimum(offset + jnp.minimum(first + block_q, num_queries), length)
    return offset + first, stop - 1


def _key_bounds(
    bounds: tuple[Array, Array],
    phase: Phase,
    dca: DCAConfig,
    key_offset: Array,
    share: tuple[Array, Array],
) -> tuple[Array, Array, Array, Array]:
    """`_sweep`'s four bounds, in slots, within a program's share of them.

    Ranges only move forward, so first and last query tell them all.
    """
    (lo, full_hi), (full_lo, hi) = (
        [i - key_offset for i in key_range(query, phase, dca)] for query in bounds
    )
    first, last = share
    lo, full_lo = jnp.maximum(lo, first), jnp.maximum(full_lo, first)
    hi, full_hi = jnp.minimum(hi, last), jnp.minimum(full_hi, last)
    return lo, full_lo, full_hi, jnp.where(bounds[0] <= bounds[1], hi, lo)


def _sweep(
    lo: Array, full_lo: Array, full_hi: Array, hi: Array, block: int, step: Callable, state: Any
) -> Any:
    """step(at, edge, state) for the blocks that cover [lo, hi), counted from lo.

    Blocks within [full_lo, full_hi) need no mask (edge False) and go first; those at the edges,
    before and after, follow in one loop, so that the kernel holds the code of either only once.
    """
    size = jnp.int32(block)
    blocks = lax.div(jnp.maximum(hi - lo, 0) + (block - 1), size)
    before = jnp.minimum(lax.div(jnp.maximum(full_lo - lo, 0) + (block - 1), size), blocks)
    full = lax.div(jnp.maximum(full_hi - (lo + before * size), 0), size)
    full = jnp.minimum(full, blocks - before)
    state = lax.fori_loop(
        before, before + full, lambda n, state: step(lo + n * size, False, state), state
    )

    def edge(n: Array, state: Any) -> Any:
        return step(lo + (n + jnp.where(n >= before, full, 0)) * size, True, state)

    return lax.fori_loop(jnp.int32(0), blocks - full, edge, state)


# --- rotation ----------------------------------------------------------------------------------


def _turn(
    cos_ref: Any,
    sin_ref: Any,
    batch: Array,
    first: Array,
    block_q: int,
    phase: Phase,
    dca: DCAConfig,
    index: Array,
    num_queries: int,
) -> tuple[Array, Array]:
    """cos and sin [block_q, 1, H/2] of the tile's query positions in a phase.

    With Q' = min(2s - 1, Q): intra is read; inter is a constant; succ is inter where
    i mod s + s >= Q', else intra turned on by s.
    """

    def constant(row: int) -> tuple[Array, Array]:
        return cos_ref[batch, row, :][None, None, :], sin_ref[batch, row, :][None, None, :]

    inter_cos, inter_sin = constant(num_queries)
    if phase == "inter":
        return inter_cos, inter_sin
    tokens = pl.ds(first, block_q)
    mask = ((first + jnp.arange(block_q, dtype=jnp.int32)) < num_queries)[:, None]
    cos = plgpu.load(cos_ref.at[batch, tokens, :], mask=mask, other=0.0)[:, None, :]
    sin = plgpu.load(sin_ref.at[batch, tokens, :], mask=mask, other=0.0)[:, None, :]
    if phase == "intra":
        return cos, sin
    far_cos, far_sin = constant(num_queries + 1)
    held = (index % dca.chunk_len >= dca.inter_position - dca.chunk_len)[:, None, None]
    return (
        jnp.where(held, inter_cos, cos * far_cos - sin * far_sin),
        jnp.where(held, inter_sin, sin * far_cos + cos * far_sin),
    )


def _rotate(first: Array, second: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    return first * cos - second * sin, second * cos + first * sin


def _load_halves(
    query_ref: Any,
    batch: Array,
    first: Array,
    block_q: int,
    kv_head: Array,
    first_head: Array,
    pack: int,
    is_query: Array,
) -> tuple[Array, Array]:
    """The tile's queries as the two halves that rotation pairs, float32 [block_q, pack, H/2].

    Volatile, or one load would serve all phases, and hold its registers through every loop.
    """
    half = query_ref.shape[-1] // 2
    tile = (batch, pl.ds(first, block_q), kv_head, pl.ds(first_head, pack))
    load = functools.partial(plgpu.load, mask=is_query[:, :, None], other=0.0, volatile=True)
    return (
        load(query_ref.at[*tile, pl.ds(0, half)]).astype(jnp.float32),
        load(query_ref.at[*tile, pl.ds(half, half)]).astype(jnp.float32),
    )


def _through(ref: Any, at: tuple, halves: tuple[Array, Array], mask: Array) -> Array:
    """Two halves [block_q, 1, H/2] as rows [block_q, H], by way of `ref`, memory of the tile's own.

    Triton lets a product read its left side from shared memory if that was loaded, and else makes
    every turn of the loop copy it to registers.
    """
    half = halves[0].shape[-1]
    for number, part in enumerate(halves):
        part = part[:, 0, :].astype(ref.dtype)
        plgpu.store(ref.at[*at, pl.ds(number * half, half)], part, mask=mask)
    if not INTERPRET:
        plgpu.debug_barrier()
    rows = plgpu.load(ref.at[*at, :], mask=mask, other=0.0, volatile=True)
    if not INTERPRET:
        plgpu.debug_barrier()
    return rows


def _join(first: Array, second: Array, dtype: jnp.dtype) -> Array:
    """Two halves [block_q, pack, H/2] as rows [block_q * pack, H] of `dtype`."""
    block_q, pack, half = first.shape
    both = jnp.stack([first.astype(dtype), second.astype(dtype)], axis=-1)
    return jnp.swapaxes(both, 2, 3).reshape(block_q * pack, 2 * half)


def _split(rows: Array) -> tuple[Array, Array]:
    """Rows [block_q, H] as two halves [block_q, 1, H/2]."""
    first, second = jnp.split(rows, 2, axis=-1)
    return first[:, None, :], second[:, None, :]


def _spread(index: Array, pack: int) -> Array:
    """A value for each query as one for each row."""
    return jnp.broadcast_to(index[:, None], (*index.shape, pack)).reshape(-1)


# --- what Triton is told -----------------------------------------------------------------------


def _load_rows(
    ref: Any, cache_row: Array, at: Array, block: int, kv_head: Array, edge: bool, limit: Any
) -> Array:
    """`block` keys or values of a head from index `at`; at an edge, zeros from `limit` on."""
    rows = ref.at[cache_row, pl.ds(at, block), kv_head, :]
    if not edge:
        return plgpu.load(rows)
    j = at + jnp.arange(block, dtype=jnp.int32)
    return plgpu.load(rows, mask=(j < limit)[:, None], other=0.0)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Products summed in float32; float32 inputs (the interpreter's) unrounded."""
    precision = "highest" if a.dtype == jnp.float32 else None
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _exp2(x: Array) -> Array:
    """2^x. One instruction on the GPU, where libdevice's keeps denormal results with three more."""
    if INTERPRET:
        return jnp.exp2(x)
    (result,) = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return result
