"""The gradients of key and value: each block of keys loops over the blocks of queries it affects.

All query heads of a pack of kv heads are processed one after another, and their gradients summed in
VMEM in a fixed order, so the result is bitwise deterministic.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_tpu import block_math, rotation
from dca_jax.attention.mosaic_tpu.heads import Heads
from dca_jax.attention.mosaic_tpu.runs import query_runs
from dca_jax.attention.mosaic_tpu.specs import KeySpecs, read_row_scalars, row_scalars
from dca_jax.attention.mosaic_tpu.steps import (
    ACTIVE,
    BLOCK_BEGIN,
    BLOCK_END,
    FULL,
    SUCC_BEGIN,
    Steps,
    pair_blocks,
)
from dca_jax.attention.softmax import LOG2E
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
    block_q, block_kv = min(tile[0], num_queries), min(tile[1], num_keys)
    steps, tables = pair_blocks(
        *query_runs(num_queries, num_keys, rows, dca, phases, (block_q, block_kv))
    )
    specs = KeySpecs(steps=steps, heads=heads)
    gradient = jax.ShapeDtypeStruct(key.shape[1:], key.dtype)
    expanded = (heads.q_per_pack, heads.kv_width, block_q)
    return pl.pallas_call(
        functools.partial(
            _kernel, steps=steps, heads=heads, dca=dca, phases=phases, num_queries=num_queries
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(
                batch,
                heads.kv_packs,
                steps.num_workers,
                tables.num_steps,
                heads.q_packs_per_kv_pack,
            ),
            in_specs=[
                specs.queries(block_q),
                specs.keys(block_kv),
                specs.keys(block_kv),
                specs.rotation_tables(len(phases), block_q),
                specs.queries(block_q),
                specs.query_scalars(block_q),
                specs.query_scalars(block_q),
            ],
            out_specs=[specs.key_gradients(block_kv)] * 2,
            scratch_shapes=[
                pltpu.VMEM(expanded, query.dtype),
                pltpu.VMEM(expanded, query.dtype),
                pltpu.VMEM((block_kv, heads.kv_width), jnp.float32),
                pltpu.VMEM((block_kv, heads.kv_width), jnp.float32),
            ],
        ),
        out_shape=(gradient, gradient),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_bytes,
        ),
        name="dca_tpu_dkv",
    )(row_scalars(layer, rows, num_queries), tables.words, tables.runs, *inputs)


def _kernel(
    rows_ref: Any,
    words_ref: Any,
    runs_ref: Any,
    query_ref: Any,  # [q, q_width]
    key_ref: Any,  # [k, kv_width]
    value_ref: Any,
    tables_ref: Any,  # [P, H, q]
    do_ref: Any,  # [q, q_width]
    lse_ref: Any,  # [q_per_pack, 1, q], in units of log2
    delta_ref: Any,
    dk_ref: Any,  # [k, kv_width]
    dv_ref: Any,
    rotated_ref: Any,  # [q_per_pack, kv_width, q]
    do_expanded_ref: Any,
    dk_acc_ref: Any,  # [k, kv_width]
    dv_acc_ref: Any,
    *,
    steps: Steps,
    heads: Heads,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    num_queries: int,
) -> None:
    """Grid: (row, pack of kv heads, worker, step, pack of their query heads)."""
    row, pack_of_group = pl.program_id(0), pl.program_id(4)
    q_pack = pl.program_id(1) * heads.q_packs_per_kv_pack + pack_of_group
    step = steps.read(words_ref, row, pl.program_id(2), pl.program_id(3))
    offset, length, key_offset = read_row_scalars(rows_ref, row)
    block_q, block_kv = query_ref.shape[0], key_ref.shape[0]
    start = step.inner * block_q
    index = offset + start + lax.broadcasted_iota(jnp.int32, (1, block_q), 1)

    @pl.when(step.has(BLOCK_BEGIN) & (pack_of_group == 0))
    def initialize() -> None:
        dk_acc_ref[...] = jnp.zeros(dk_acc_ref.shape, jnp.float32)
        dv_acc_ref[...] = jnp.zeros(dv_acc_ref.shape, jnp.float32)

    def accumulate(masked: bool) -> None:
        succ_begin = runs_ref[step.run_index + SUCC_BEGIN]
        cos, sin = rotation.select_cos_sin(tables_ref, index, succ_begin, dca, phases)
        rotated = rotation.rotate_heads(query_ref[...].astype(jnp.float32).T, cos, sin)
        do = do_ref[...].astype(jnp.float32).T
        # Past the last query there may be NaN, and NaN times a weight of zero is NaN.
        rotated = block_math.zero_padding(rotated, start, num_queries, 1)
        heads.store_expanded(rotated_ref, rotated, q_pack)
        do = block_math.zero_padding(do, start, num_queries, 1)
        heads.store_expanded(do_expanded_ref, do, q_pack)
        if masked:
            end = block_math.key_end(
                runs_ref, step.run_index, index, length, key_offset, dca, phases
            )
            slot = step.outer * block_kv + lax.broadcasted_iota(jnp.int32, (block_kv, block_q), 0)
            mask = block_math.key_mask(runs_ref, step.run_index, slot, end)
        for head in range(heads.q_per_pack):
            rotated, do = rotated_ref[head], do_expanded_ref[head]
            p = jnp.exp2(block_math.dot(key_ref[...], rotated, 1, 0) - lse_ref[head])
            dp = block_math.dot(value_ref[...], do, 1, 0)
            ds = p * (dp - delta_ref[head])
            if masked:
                p = jnp.where(mask, p, 0.0)
                ds = jnp.where(mask, ds, 0.0)
            dv_acc_ref[...] += block_math.dot(p.astype(do.dtype), do, 1, 1)
            dk_acc_ref[...] += block_math.dot(ds.astype(rotated.dtype), rotated, 1, 1)

    active, full = step.has(ACTIVE), step.has(FULL)
    pl.when(active & full)(functools.partial(accumulate, False))
    pl.when(active & ~full)(functools.partial(accumulate, True))

    @pl.when(step.has(BLOCK_END) & (pack_of_group == heads.q_packs_per_kv_pack - 1))
    def store() -> None:
        # The rotated queries include the logit scale, which belongs in dk, and a factor log2(e),
        # which does not.
        dk_ref[...] = (dk_acc_ref[...] / LOG2E).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)
