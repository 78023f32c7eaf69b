"""The forward kernel.

Logits lie transposed, [keys, queries]: what belongs to a query (maximum, sum, log-sum-exp) is then
one row of lanes, which VMEM and HBM hold without padding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_tpu import blocks, turns
from dca_jax.attention.mosaic_tpu.grid import QueryGrid, row_scalars
from dca_jax.attention.mosaic_tpu.heads import Heads
from dca_jax.attention.mosaic_tpu.stages import stages_of_queries
from dca_jax.attention.mosaic_tpu.walk import BEGINS, ENDS, ENTERS, FULL, LIVE, NEAR, Walk, pair_up
from dca_jax.dca import DCAConfig, Phase


def flash_forward(
    query: Array,  # [B, T, N, H]
    key: Array,  # [L, B, S, K, H]
    value: Array,
    layer: Array,
    rows: Rows,
    heads: Heads,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    with_lse: bool,
    tile: tuple[int, int],
    vmem_bytes: int,
) -> tuple[Array, Array | None]:
    """Output [B, T, N, H], and the natural log-sum-exp [B, N, T] on request."""
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys = key.shape[2]
    block_q, block_k = min(tile[0], num_queries), min(tile[1], num_keys)
    walk, tables = pair_up(
        *stages_of_queries(num_queries, num_keys, rows, dca, phases, (block_q, block_k))
    )
    grid = QueryGrid(walk=walk, heads=heads)
    flat_query = query.reshape(batch, num_queries, num_heads * head_dim)
    out_shape = [jax.ShapeDtypeStruct(flat_query.shape, query.dtype)]
    out_specs = [grid.queries(block_q)]
    if with_lse:
        out_shape.append(jax.ShapeDtypeStruct((batch, num_heads, 1, num_queries), jnp.float32))
        out_specs.append(grid.query_scalars(block_q))
    together = heads.together
    out, *lse = pl.pallas_call(
        functools.partial(
            _kernel, walk=walk, heads=heads, dca=dca, phases=phases, num_keys=num_keys
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads.tiles, walk.lanes, tables.steps),
            in_specs=[
                grid.queries(block_q),
                grid.keys(block_k),
                grid.keys(block_k),
                grid.turns(len(phases), block_q),
            ],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((together, heads.width, block_q), query.dtype),
                pltpu.VMEM((together, 1, block_q), jnp.float32),
                pltpu.VMEM((together, 1, block_q), jnp.float32),
                pltpu.VMEM((together, heads.width, block_q), jnp.float32),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes,
        ),
        name="dca_tpu_forward",
    )(
        row_scalars(layer, rows, num_queries),
        tables.words,
        tables.stages,
        flat_query,
        key.reshape(*key.shape[:3], -1),
        value.reshape(*value.shape[:3], -1),
        turns.turns(num_queries, rows, dca, phases),
    )
    return out.reshape(query.shape), lse[0][:, :, 0] if with_lse else None


def _kernel(
    row_ref: Any,
    word_ref: Any,
    stage_ref: Any,
    query_ref: Any,  # [q, heads together * H], not turned
    key_ref: Any,  # [k, width]
    value_ref: Any,
    turns_ref: Any,  # [P, H, q]
    out_ref: Any,  # [q, heads together * H]
    *rest: Any,
    walk: Walk,
    heads: Heads,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    num_keys: int,
) -> None:
    """Grid: (row, tile of query heads, lane, step)."""
    *lse_refs, turned_ref, peak_ref, total_ref, acc_ref = rest
    row, head_tile = pl.program_id(0), pl.program_id(1)
    step = walk.read(word_ref, row, pl.program_id(2), pl.program_id(3))
    offset, limit, shift = (row_ref[1 + 3 * row + number] for number in range(3))
    block_q, block_k = query_ref.shape[0], key_ref.shape[0]
    at = step.block * block_k
    index = offset + step.tile * block_q + lax.broadcasted_iota(jnp.int32, (1, block_q), 1)

    @pl.when(step.has(BEGINS))
    def begin() -> None:
        peak_ref[...] = jnp.full(peak_ref.shape, blocks.LOWEST, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    @pl.when(step.has(ENTERS))
    def enter() -> None:
        near = stage_ref[step.numbers + NEAR]
        cos, sin = turns.pick(turns_ref, index, near, dca, phases)
        query = query_ref[...].astype(jnp.float32).T
        heads.put(turned_ref, turns.turn_heads(query, cos, sin), head_tile)

    def meet(masked: bool) -> None:
        value = value_ref[...]
        if masked:
            stop = blocks.reach(stage_ref, step.numbers, index, limit, shift, dca, phases)
            slot = at + lax.broadcasted_iota(jnp.int32, (block_k, block_q), 0)
            met = blocks.met_keys(stage_ref, step.numbers, slot, stop)
            value = blocks.within(value, at, num_keys, 0)
        for number in range(heads.together):
            logits = blocks.dot(key_ref[...], turned_ref[number], 1, 0)
            if masked:
                logits = jnp.where(met, logits, -jnp.inf)
            peak = peak_ref[number]
            new_peak = jnp.maximum(peak, jnp.max(logits, axis=0, keepdims=True))
            decay = jnp.exp2(peak - new_peak)
            weights = jnp.exp2(logits - new_peak)
            peak_ref[number] = new_peak
            total_ref[number] = total_ref[number] * decay + jnp.sum(weights, axis=0, keepdims=True)
            weighted = blocks.dot(value, weights.astype(value.dtype), 0, 0)
            acc_ref[number] = acc_ref[number] * decay + weighted

    live, full = step.has(LIVE), step.has(FULL)
    pl.when(live & full)(functools.partial(meet, False))
    pl.when(live & ~full)(functools.partial(meet, True))

    @pl.when(step.has(ENDS))
    def end() -> None:
        outs = []
        for number in range(heads.together):
            total = total_ref[number]
            met_any = total > 0
            total = jnp.where(met_any, total, 1.0)
            outs.append(acc_ref[number, heads.place(head_tile, number), :] / total)
            for lse_ref in lse_refs:
                lse = peak_ref[number] / turns.LOG2E + jnp.log(total)
                lse_ref[number] = jnp.where(met_any, lse, -jnp.inf)
        out_ref[...] = jnp.concatenate(outs, axis=0).T.astype(out_ref.dtype)
