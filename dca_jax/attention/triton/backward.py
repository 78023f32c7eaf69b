"""The backward pass in Pallas-Triton: one kernel for dq, one for dk and dv; no atomics."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from dca_jax.attention.backend import Rows
from dca_jax.attention.softmax import FAR, LOG2E, MASKED
from dca_jax.attention.triton.common import (
    Slots,
    by_kv_head,
    dot,
    exp2,
    for_each_block,
    join_halves,
    key_bounds,
    launch_options,
    load_halves,
    load_keys,
    phase_rotation,
    rotate_halves,
    rotation_tables,
    row_arrays,
    split_halves,
    through_memory,
    tile_bounds,
)
from dca_jax.attention.triton.tiles import choose_tiles
from dca_jax.dca import DCAConfig, Phase, key_range, query_position
from dca_jax.device import current_device
from dca_jax.rope import rotate


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
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of query, key (rotated) and value, from the global `lse` and `delta`."""
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[2:4]
    group = heads // kv_heads
    tiles = choose_tiles(current_device(), head_dim)
    # In units of log2, and where a query met no key so large that its p vanish.
    lse = jnp.where(jnp.isfinite(lse), lse * LOG2E, -MASKED).reshape(
        batch, kv_heads, group, num_queries
    )
    delta = delta.reshape(lse.shape)
    scalars = row_arrays(layer, rows)
    grouped, keys, values = by_kv_head(query, key, value)
    do = do.astype(query.dtype).reshape(grouped.shape)
    dq = pl.pallas_call(
        functools.partial(
            _dq_kernel,
            dca=dca,
            phases=phases,
            block_q=tiles.dq.block_q,
            block_k=tiles.dq.block_k,
        ),
        grid=(heads, pl.cdiv(num_queries, tiles.dq.block_q), batch),
        out_shape=jax.ShapeDtypeStruct(grouped.shape, query.dtype),
        **launch_options("dca_triton_dq", tiles.dq.num_warps, tiles.dq.num_stages),
    )(*scalars, *rotation_tables(num_queries, rows, dca), grouped, keys, values, do, lse, delta)
    # A block of keys meets each tile of queries once: rotating it there would cost more than these
    # copies, of which all blocks read.
    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    wide = query.astype(jnp.float32) * (rows.scale * LOG2E)[:, None, None, None]
    rotated = [
        rotate(wide, query_position(index, phase, dca), rows.inv_freq)
        .astype(query.dtype)
        .reshape(grouped.shape)
        for phase in phases
    ]
    dk, dv = pl.pallas_call(
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
        **launch_options("dca_triton_dkv", tiles.dkv.num_warps, tiles.dkv.num_stages),
    )(*scalars, keys, values, do, lse, delta, *rotated)
    return dq.reshape(query.shape), dk, dv


# --- the kernels ---------------------------------------------------------------------------------


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
    do_ref: Any,  # [B, T, K, G, H]
    lse_ref: Any,  # [B, K, G, T], in units of log2
    delta_ref: Any,
    dq_ref: Any,  # [B, T, K, G, H]
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    block_q: int,
    block_k: int,
) -> None:
    """Grid: (query heads, tiles, batch)."""
    _, num_queries, _, group, head_dim = query_ref.shape
    batch, num_keys = pl.program_id(2), key_ref.shape[1]
    slots = Slots.of_row(layer_ref[0], batch, offset_ref.shape[0])
    kv_head = lax.div(pl.program_id(0), jnp.int32(group))
    head = lax.rem(pl.program_id(0), jnp.int32(group))
    first = (pl.num_programs(1) - 1 - pl.program_id(1)) * block_q

    token = first + jnp.arange(block_q, dtype=jnp.int32)
    index = offset_ref[batch] + token
    is_query = token < num_queries
    tokens = pl.ds(first, block_q)
    do = plgpu.load(do_ref.at[batch, tokens, kv_head, head, :], mask=is_query[:, None], other=0.0)
    lse = plgpu.load(lse_ref.at[batch, kv_head, head, tokens], mask=is_query, other=-MASKED)
    delta = plgpu.load(delta_ref.at[batch, kv_head, head, tokens], mask=is_query, other=0.0)
    bounds = tile_bounds(first, block_q, num_queries, offset_ref[batch], lengths_ref[batch])
    factor = scale_ref[batch] * LOG2E
    key_offset = key_offset_ref[batch]

    acc = jnp.zeros((block_q, head_dim), jnp.float32)
    for number, phase in enumerate(phases):
        cos, sin = phase_rotation(
            cos_ref, sin_ref, batch, first, block_q, phase, dca, index, num_queries
        )
        halves = load_halves(query_ref, batch, first, block_q, kv_head, head, 1, is_query[:, None])
        rotated = rotate_halves(*halves, cos * factor, sin * factor)
        query = through_memory(dq_ref, (batch, tokens, kv_head, head), rotated, is_query[:, None])
        start, stop = (i - key_offset for i in key_range(index, phase, dca))
        ranges = key_bounds(bounds, phase, dca, key_offset, (jnp.int32(0), jnp.int32(num_keys)))
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
            key = load_keys(key_ref, slots, at, block_k, kv_head, edge, limit)
            value = load_keys(value_ref, slots, at, block_k, kv_head, edge, limit)
            logits = dot(query, key, 1, 1) - lse[:, None]
            if edge:
                j = (at + jnp.arange(block_k, dtype=jnp.int32))[None, :]
                met = (start[:, None] <= j) & (j < stop[:, None])
                logits = jnp.where(met, logits, -jnp.inf)
            dp = dot(do, value, 1, 1)
            ds = exp2(logits) * (dp - delta[:, None])
            return acc + dot(ds.astype(key.dtype), key, 1, 0)

        # One accumulator serves all phases: it is kept in the frame of the phase's own rotation,
        # into which it is rotated before, and out of which it is rotated after.
        if number > 0:
            acc = join_halves(*rotate_halves(*split_halves(acc), cos, sin), acc.dtype)
        acc = for_each_block(*ranges, block_k, step, acc)
        acc = join_halves(*rotate_halves(*split_halves(acc), cos, -sin), acc.dtype)

    plgpu.store(
        dq_ref.at[batch, tokens, kv_head, head, :],
        (acc * scale_ref[batch]).astype(dq_ref.dtype),
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
    do_ref: Any,  # [B, T, K, G, H]
    lse_ref: Any,  # [B, K, G, T], in units of log2
    delta_ref: Any,
    *refs: Any,  # a rotated and scaled query [B, T, K, G, H] for each phase; dk, dv
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    block_q: int,
    block_k: int,
) -> None:
    """Grid: (kv heads, blocks of keys, batch); the first blocks, met by most queries, go first.

    The logits lie transposed, [keys, queries], so that they multiply queries from the left.
    """
    del scale_ref  # it is in the rotated queries
    *query_refs, dk_ref, dv_ref = refs
    _, num_queries, _, group, head_dim = do_ref.shape
    kv_head, batch, num_keys = pl.program_id(0), pl.program_id(2), key_ref.shape[1]
    slots = Slots.of_row(layer_ref[0], batch, offset_ref.shape[0])
    first = pl.program_id(1) * block_k
    j = first + jnp.arange(block_k, dtype=jnp.int32)
    key = load_keys(key_ref, slots, first, block_k, kv_head, True, num_keys)
    value = load_keys(value_ref, slots, first, block_k, kv_head, True, num_keys)
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
                dk, dv = state
                tokens = pl.ds(at, block_q)
                t = at + jnp.arange(block_q, dtype=jnp.int32)
                mask = {"mask": (t < limit)[:, None], "other": 0.0} if edge else {}
                query = plgpu.load(query_ref.at[batch, tokens, kv_head, head, :], **mask)
                do = plgpu.load(do_ref.at[batch, tokens, kv_head, head, :], **mask)
                mask = {"mask": t < limit, "other": 0.0} if edge else {}
                lse = plgpu.load(lse_ref.at[batch, kv_head, head, tokens], **mask)
                delta = plgpu.load(delta_ref.at[batch, kv_head, head, tokens], **mask)
                logits = dot(key, query, 1, 1) - lse[None, :]
                if edge:
                    met = (start[:, None] <= t[None, :]) & (t[None, :] < stop[:, None])
                    logits = jnp.where(met, logits, -jnp.inf)
                p = exp2(logits)
                dv = dv + dot(p.astype(do.dtype), do, 1, 0)
                dp = dot(value, do, 1, 1)
                ds = p * (dp - delta[None, :])
                dk = dk + dot(ds.astype(query.dtype), query, 1, 0)
                return dk, dv

            state = for_each_block(lo, full_lo, full_hi, hi, block_q, step, state)
        return state

    zeros = jnp.zeros((block_k, head_dim), jnp.float32)
    dk, dv = lax.fori_loop(0, group, one_head, (zeros, zeros))
    keys, mask = pl.ds(first, block_k), (j < num_keys)[:, None]
    # The rotated queries carry log2(e), and their factor is the logits' own derivative.
    dk = (dk / LOG2E).astype(dk_ref.dtype)
    plgpu.store(dk_ref.at[batch, keys, kv_head, :], dk, mask=mask)
    dv = dv.astype(dv_ref.dtype)
    plgpu.store(dv_ref.at[batch, keys, kv_head, :], dv, mask=mask)


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
