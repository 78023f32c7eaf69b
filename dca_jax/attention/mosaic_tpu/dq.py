"""The gradient of the query: walks through the keys as the forward does."""

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
from dca_jax.attention.mosaic_tpu.walk import (
    BEGINS,
    ENDS,
    ENTERS,
    FULL,
    LEAVES,
    LIVE,
    NEAR,
    Walk,
    pair_up,
)
from dca_jax.dca import DCAConfig, Phase


def dq(
    inputs: tuple[Array, ...],
    layer: Array,
    rows: Rows,
    heads: Heads,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    tile: tuple[int, int],
    vmem_bytes: int,
) -> Array:
    """Gradient [B, T, N * H] of the raw query; `inputs` as `backward` makes them."""
    query, key = inputs[0], inputs[1]
    batch, num_queries, _ = query.shape
    num_keys = key.shape[2]
    block_q, block_k = min(tile[0], num_queries), min(tile[1], num_keys)
    walk, tables = pair_up(
        *stages_of_queries(num_queries, num_keys, rows, dca, phases, (block_q, block_k))
    )
    grid = QueryGrid(walk=walk, heads=heads)
    placed = (heads.together, heads.width, block_q)
    return pl.pallas_call(
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
                grid.queries(block_q),
                grid.query_scalars(block_q),
                grid.query_scalars(block_q),
            ],
            out_specs=grid.queries(block_q),
            scratch_shapes=[
                pltpu.VMEM(placed, query.dtype),
                pltpu.VMEM(placed, query.dtype),
                pltpu.VMEM(placed, jnp.float32),
                pltpu.VMEM((heads.together, heads.head_dim, block_q), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes,
        ),
        name="dca_tpu_dq",
    )(row_scalars(layer, rows, num_queries), tables.words, tables.stages, *inputs)


def _kernel(
    row_ref: Any,
    word_ref: Any,
    stage_ref: Any,
    query_ref: Any,  # [q, heads together * H]
    key_ref: Any,  # [k, width]
    value_ref: Any,
    turns_ref: Any,  # [P, H, q]
    out_bar_ref: Any,  # [q, heads together * H]
    lse_ref: Any,  # [heads together, 1, q], in units of log2
    delta_ref: Any,
    query_bar_ref: Any,  # [q, heads together * H]
    turned_ref: Any,  # [heads together, width, q]
    out_bar_placed_ref: Any,  # [heads together, width, q]
    acc_ref: Any,  # [heads together, width, q], in the frame of the stage's rotation
    total_ref: Any,  # [heads together, H, q], in the query's own
    *,
    walk: Walk,
    heads: Heads,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    num_keys: int,
) -> None:
    """Grid: (row, tile of query heads, lane, step)."""
    row, head_tile = pl.program_id(0), pl.program_id(1)
    step = walk.read(word_ref, row, pl.program_id(2), pl.program_id(3))
    offset, limit, shift = (row_ref[1 + 3 * row + number] for number in range(3))
    block_q, block_k = query_ref.shape[0], key_ref.shape[0]
    at = step.block * block_k
    index = offset + step.tile * block_q + lax.broadcasted_iota(jnp.int32, (1, block_q), 1)

    def cos_and_sin() -> tuple[Array, Array]:
        return turns.pick(turns_ref, index, stage_ref[step.numbers + NEAR], dca, phases)

    @pl.when(step.has(BEGINS))
    def begin() -> None:
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        heads.put(out_bar_placed_ref, out_bar_ref[...].astype(jnp.float32).T, head_tile)

    @pl.when(step.has(ENTERS))
    def enter() -> None:
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
        query = query_ref[...].astype(jnp.float32).T
        heads.put(turned_ref, turns.turn_heads(query, *cos_and_sin()), head_tile)

    def meet(masked: bool) -> None:
        key = key_ref[...]
        if masked:
            stop = blocks.reach(stage_ref, step.numbers, index, limit, shift, dca, phases)
            slot = at + lax.broadcasted_iota(jnp.int32, (block_k, block_q), 0)
            met = blocks.met_keys(stage_ref, step.numbers, slot, stop)
            key = blocks.within(key, at, num_keys, 0)
        for number in range(heads.together):
            weights = jnp.exp2(blocks.dot(key_ref[...], turned_ref[number], 1, 0) - lse_ref[number])
            weights_bar = blocks.dot(value_ref[...], out_bar_placed_ref[number], 1, 0)
            logits_bar = weights * (weights_bar - delta_ref[number])
            if masked:
                logits_bar = jnp.where(met, logits_bar, 0.0)
            acc_ref[number] += blocks.dot(key, logits_bar.astype(key.dtype), 0, 0)

    live, full = step.has(LIVE), step.has(FULL)
    pl.when(live & full)(functools.partial(meet, False))
    pl.when(live & ~full)(functools.partial(meet, True))

    @pl.when(step.has(LEAVES))
    def leave() -> None:
        cos, sin = cos_and_sin()
        for number in range(heads.together):
            own = acc_ref[number, heads.place(head_tile, number), :]
            total_ref[number] += turns.turn_back(own, cos, sin)

    @pl.when(step.has(ENDS))
    def end() -> None:
        # The tables of cos and sin carry log2(e), which is not the logits'.
        bars = [total_ref[number] / turns.LOG2E for number in range(heads.together)]
        query_bar_ref[...] = jnp.concatenate(bars, axis=0).T.astype(query_bar_ref.dtype)
