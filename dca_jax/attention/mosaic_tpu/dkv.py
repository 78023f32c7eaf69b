"""The gradients of key and value: a block of keys walks through the queries that meet it.

All query heads of a block's kv heads pass in turn, and their gradients are summed in VMEM in one
order: so the result is bitwise deterministic.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_tpu import blocks, turns
from dca_jax.attention.mosaic_tpu.grid import row_scalars
from dca_jax.attention.mosaic_tpu.heads import Heads
from dca_jax.attention.mosaic_tpu.stages import stages_of_keys
from dca_jax.attention.mosaic_tpu.walk import BEGINS, ENDS, FULL, LIVE, NEAR, Walk, pair_up
from dca_jax.dca import DCAConfig, Phase


def dkv(
    inputs: tuple[Array, ...],
    layer: Array,
    rows: Rows,
    heads: Heads,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    tile: tuple[int, int],
    vmem_bytes: int,
) -> tuple[Array, Array]:
    """Gradients [B, S, K * H] of key and value; `inputs` as `backward` makes them."""
    query, key = inputs[0], inputs[1]
    batch, num_queries, _ = query.shape
    num_keys = key.shape[2]
    block_q, block_k = min(tile[0], num_queries), min(tile[1], num_keys)
    walk, tables = pair_up(
        *stages_of_keys(num_queries, num_keys, rows, dca, phases, (block_q, block_k))
    )
    grid = _KeyGrid(walk=walk, heads=heads)
    bar = jax.ShapeDtypeStruct(key.shape[1:], key.dtype)
    placed = (heads.together, heads.width, block_q)
    return pl.pallas_call(
        functools.partial(
            _kernel, walk=walk, heads=heads, dca=dca, phases=phases, num_queries=num_queries
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads.kv_blocks, walk.lanes, tables.steps, heads.group),
            in_specs=[
                grid.queries(block_q),
                grid.keys(block_k),
                grid.keys(block_k),
                grid.turns(len(phases), block_q),
                grid.queries(block_q),
                grid.query_scalars(block_q),
                grid.query_scalars(block_q),
            ],
            out_specs=[grid.key_bars(block_k)] * 2,
            scratch_shapes=[
                pltpu.VMEM(placed, query.dtype),
                pltpu.VMEM(placed, query.dtype),
                pltpu.VMEM((block_k, heads.width), jnp.float32),
                pltpu.VMEM((block_k, heads.width), jnp.float32),
            ],
        ),
        out_shape=(bar, bar),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_bytes,
        ),
        name="dca_tpu_dkv",
    )(row_scalars(layer, rows, num_queries), tables.words, tables.stages, *inputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _KeyGrid:
    """Blocks of a grid (row, block of kv heads, lane, step, tile of their query heads)."""

    walk: Walk
    heads: Heads

    def queries(self, block_q: int) -> pl.BlockSpec:
        """Of [B, T, N * H]."""

        def at(b: Array, n: Array, j: Array, k: Array, g: Array, rows: Any, words: Any, _: Any):
            return b, self.walk.read(words, b, j, k).block, n * self.heads.group + g

        return pl.BlockSpec((None, block_q, self.heads.query_width), at)

    def query_scalars(self, block_q: int) -> pl.BlockSpec:
        """Of [B, N, 1, T]."""

        def at(b: Array, n: Array, j: Array, k: Array, g: Array, rows: Any, words: Any, _: Any):
            return b, n * self.heads.group + g, 0, self.walk.read(words, b, j, k).block

        return pl.BlockSpec((None, self.heads.together, 1, block_q), at)

    def turns(self, phases: int, block_q: int) -> pl.BlockSpec:
        """Of [P, B, H, T]."""

        def at(b: Array, n: Array, j: Array, k: Array, g: Array, rows: Any, words: Any, _: Any):
            return 0, b, 0, self.walk.read(words, b, j, k).block

        return pl.BlockSpec((phases, None, self.heads.head_dim, block_q), at)

    def keys(self, block_k: int) -> pl.BlockSpec:
        """Of [L, B, S, K * H]."""

        def at(b: Array, n: Array, j: Array, k: Array, g: Array, rows: Any, words: Any, _: Any):
            return rows[0], b, self.walk.read(words, b, j, k).tile, n

        return pl.BlockSpec((None, None, block_k, self.heads.width), at)

    def key_bars(self, block_k: int) -> pl.BlockSpec:
        """Of [B, S, K * H]."""

        def at(b: Array, n: Array, j: Array, k: Array, g: Array, rows: Any, words: Any, _: Any):
            return b, self.walk.read(words, b, j, k).tile, n

        return pl.BlockSpec((None, block_k, self.heads.width), at)


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
    key_bar_ref: Any,  # [k, width]
    value_bar_ref: Any,
    turned_ref: Any,  # [heads together, width, q]
    out_bar_placed_ref: Any,
    key_acc_ref: Any,  # [k, width]
    value_acc_ref: Any,
    *,
    walk: Walk,
    heads: Heads,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    num_queries: int,
) -> None:
    """Grid: (row, block of kv heads, lane, step, tile of their query heads)."""
    row, number_of_group = pl.program_id(0), pl.program_id(4)
    head_tile = pl.program_id(1) * heads.group + number_of_group
    step = walk.read(word_ref, row, pl.program_id(2), pl.program_id(3))
    offset, limit, shift = (row_ref[1 + 3 * row + number] for number in range(3))
    block_q, block_k = query_ref.shape[0], key_ref.shape[0]
    at = step.block * block_q
    index = offset + at + lax.broadcasted_iota(jnp.int32, (1, block_q), 1)

    @pl.when(step.has(BEGINS) & (number_of_group == 0))
    def begin() -> None:
        key_acc_ref[...] = jnp.zeros(key_acc_ref.shape, jnp.float32)
        value_acc_ref[...] = jnp.zeros(value_acc_ref.shape, jnp.float32)

    def meet(masked: bool) -> None:
        near = stage_ref[step.numbers + NEAR]
        cos, sin = turns.pick(turns_ref, index, near, dca, phases)
        turned = turns.turn_heads(query_ref[...].astype(jnp.float32).T, cos, sin)
        out_bar = out_bar_ref[...].astype(jnp.float32).T
        # What lies beyond the last query may be no number, and would meet a weight of zero.
        heads.put(turned_ref, blocks.within(turned, at, num_queries, 1), head_tile)
        heads.put(out_bar_placed_ref, blocks.within(out_bar, at, num_queries, 1), head_tile)
        if masked:
            stop = blocks.reach(stage_ref, step.numbers, index, limit, shift, dca, phases)
            slot = step.tile * block_k + lax.broadcasted_iota(jnp.int32, (block_k, block_q), 0)
            met = blocks.met_keys(stage_ref, step.numbers, slot, stop)
        for number in range(heads.together):
            turned, out_bar = turned_ref[number], out_bar_placed_ref[number]
            weights = jnp.exp2(blocks.dot(key_ref[...], turned, 1, 0) - lse_ref[number])
            weights_bar = blocks.dot(value_ref[...], out_bar, 1, 0)
            logits_bar = weights * (weights_bar - delta_ref[number])
            if masked:
                weights = jnp.where(met, weights, 0.0)
                logits_bar = jnp.where(met, logits_bar, 0.0)
            value_acc_ref[...] += blocks.dot(weights.astype(out_bar.dtype), out_bar, 1, 1)
            key_acc_ref[...] += blocks.dot(logits_bar.astype(turned.dtype), turned, 1, 1)

    live, full = step.has(LIVE), step.has(FULL)
    pl.when(live & full)(functools.partial(meet, False))
    pl.when(live & ~full)(functools.partial(meet, True))

    @pl.when(step.has(ENDS) & (number_of_group == heads.group - 1))
    def end() -> None:
        # The turned queries carry log2(e), and their factor is the logits' own derivative.
        key_bar_ref[...] = (key_acc_ref[...] / turns.LOG2E).astype(key_bar_ref.dtype)
        value_bar_ref[...] = value_acc_ref[...].astype(value_bar_ref.dtype)
