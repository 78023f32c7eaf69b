"""The gradient of the query; loops over the blocks of keys as the forward kernel does."""

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
from dca_jax.attention.mosaic_tpu.runs import kv_runs
from dca_jax.attention.mosaic_tpu.specs import QuerySpecs, read_row_scalars, row_scalars
from dca_jax.attention.mosaic_tpu.steps import (
    ACTIVE,
    BLOCK_BEGIN,
    BLOCK_END,
    FULL,
    RUN_BEGIN,
    RUN_END,
    SUCC_BEGIN,
    Steps,
    pair_blocks,
)
from dca_jax.attention.softmax import LOG2E
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
    """Gradient [B, T, N * H] of the query before rotation; `inputs` as `backward` makes them."""
    query, key = inputs[0], inputs[1]
    batch, num_queries, _ = query.shape
    num_keys = key.shape[2]
    block_q, block_kv = min(tile[0], num_queries), min(tile[1], num_keys)
    steps, tables = pair_blocks(
        *kv_runs(num_queries, num_keys, rows, dca, phases, (block_q, block_kv))
    )
    specs = QuerySpecs(steps=steps, heads=heads)
    expanded = (heads.q_per_pack, heads.kv_width, block_q)
    return pl.pallas_call(
        functools.partial(
            _kernel, steps=steps, heads=heads, dca=dca, phases=phases, num_keys=num_keys
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads.q_packs, steps.num_workers, tables.num_steps),
            in_specs=[
                specs.queries(block_q),
                specs.keys(block_kv),
                specs.keys(block_kv),
                specs.rotation_tables(len(phases), block_q),
                specs.queries(block_q),
                specs.query_scalars(block_q),
                specs.query_scalars(block_q),
            ],
            out_specs=specs.queries(block_q),
            scratch_shapes=[
                pltpu.VMEM(expanded, query.dtype),
                pltpu.VMEM(expanded, query.dtype),
                pltpu.VMEM(expanded, jnp.float32),
                pltpu.VMEM((heads.q_per_pack, heads.head_dim, block_q), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes,
        ),
        name="dca_tpu_dq",
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
    dq_ref: Any,  # [q, q_width]
    rotated_ref: Any,  # [q_per_pack, kv_width, q]
    do_expanded_ref: Any,  # [q_per_pack, kv_width, q]
    run_acc_ref: Any,  # [q_per_pack, kv_width, q]: of the current run, with respect to rotated_ref
    acc_ref: Any,  # [q_per_pack, H, q]: of all runs before it, rotated back
    *,
    steps: Steps,
    heads: Heads,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    num_keys: int,
) -> None:
    """Grid: (row, pack of query heads, worker, step)."""
    row, q_pack = pl.program_id(0), pl.program_id(1)
    step = steps.read(words_ref, row, pl.program_id(2), pl.program_id(3))
    offset, length, key_offset = read_row_scalars(rows_ref, row)
    block_q, block_kv = query_ref.shape[0], key_ref.shape[0]
    start = step.inner * block_kv
    index = offset + step.outer * block_q + lax.broadcasted_iota(jnp.int32, (1, block_q), 1)

    def cos_sin() -> tuple[Array, Array]:
        succ_begin = runs_ref[step.run_index + SUCC_BEGIN]
        return rotation.select_cos_sin(tables_ref, index, succ_begin, dca, phases)

    @pl.when(step.has(BLOCK_BEGIN))
    def initialize() -> None:
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
        heads.store_expanded(do_expanded_ref, do_ref[...].astype(jnp.float32).T, q_pack)

    @pl.when(step.has(RUN_BEGIN))
    def rotate_queries() -> None:
        run_acc_ref[...] = jnp.zeros(run_acc_ref.shape, jnp.float32)
        query = query_ref[...].astype(jnp.float32).T
        heads.store_expanded(rotated_ref, rotation.rotate_heads(query, *cos_sin()), q_pack)

    def accumulate(masked: bool) -> None:
        key = key_ref[...]
        if masked:
            end = block_math.key_end(
                runs_ref, step.run_index, index, length, key_offset, dca, phases
            )
            slot = start + lax.broadcasted_iota(jnp.int32, (block_kv, block_q), 0)
            mask = block_math.key_mask(runs_ref, step.run_index, slot, end)
            key = block_math.zero_padding(key, start, num_keys, 0)
        for head in range(heads.q_per_pack):
            p = jnp.exp2(block_math.dot(key_ref[...], rotated_ref[head], 1, 0) - lse_ref[head])
            dp = block_math.dot(value_ref[...], do_expanded_ref[head], 1, 0)
            ds = p * (dp - delta_ref[head])
            if masked:
                ds = jnp.where(mask, ds, 0.0)
            run_acc_ref[head] += block_math.dot(key, ds.astype(key.dtype), 0, 0)

    active, full = step.has(ACTIVE), step.has(FULL)
    pl.when(active & full)(functools.partial(accumulate, False))
    pl.when(active & ~full)(functools.partial(accumulate, True))

    @pl.when(step.has(RUN_END))
    def add_run() -> None:
        cos, sin = cos_sin()
        for head in range(heads.q_per_pack):
            own = run_acc_ref[head, heads.kv_lanes(q_pack, head), :]
            acc_ref[head] += rotation.rotate_back(own, cos, sin)

    @pl.when(step.has(BLOCK_END))
    def store() -> None:
        # The rotation tables include a factor log2(e), which is not part of the logits' derivative.
        grads = [acc_ref[head] / LOG2E for head in range(heads.q_per_pack)]
        dq_ref[...] = jnp.concatenate(grads, axis=0).T.astype(dq_ref.dtype)
