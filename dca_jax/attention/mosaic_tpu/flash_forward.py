"""The forward kernel: flash attention over the blocks of keys of every phase.

Logits are transposed, [keys, queries]: what belongs to a query (running maximum, running sum,
log-sum-exp) is then one row of lanes, which VMEM and HBM store without padding.
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
from dca_jax.attention.mosaic_tpu.runs import kv_runs
from dca_jax.attention.mosaic_tpu.specs import QuerySpecs, read_row_scalars, row_scalars
from dca_jax.attention.mosaic_tpu.steps import (
    ACTIVE,
    BLOCK_BEGIN,
    BLOCK_END,
    FULL,
    RUN_BEGIN,
    SUCC_BEGIN,
    Steps,
    pair_blocks,
)
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
    block_q, block_kv = min(tile[0], num_queries), min(tile[1], num_keys)
    steps, tables = pair_blocks(
        *kv_runs(num_queries, num_keys, rows, dca, phases, (block_q, block_kv))
    )
    specs = QuerySpecs(steps=steps, heads=heads)
    flat_query = query.reshape(batch, num_queries, num_heads * head_dim)
    out_shape = [jax.ShapeDtypeStruct(flat_query.shape, query.dtype)]
    out_specs = [specs.queries(block_q)]
    if with_lse:
        out_shape.append(jax.ShapeDtypeStruct((batch, num_heads, 1, num_queries), jnp.float32))
        out_specs.append(specs.query_scalars(block_q))
    expanded = (heads.q_per_pack, heads.kv_width, block_q)
    out, *lse = pl.pallas_call(
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
            ],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM(expanded, query.dtype),
                pltpu.VMEM((heads.q_per_pack, 1, block_q), jnp.float32),
                pltpu.VMEM((heads.q_per_pack, 1, block_q), jnp.float32),
                pltpu.VMEM(expanded, jnp.float32),
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
        tables.runs,
        flat_query,
        key.reshape(*key.shape[:3], -1),
        value.reshape(*value.shape[:3], -1),
        rotation.rotation_tables(num_queries, rows, dca, phases),
    )
    return out.reshape(query.shape), lse[0][:, :, 0] if with_lse else None


def _kernel(
    rows_ref: Any,
    words_ref: Any,
    runs_ref: Any,
    query_ref: Any,  # [q, q_width], not rotated
    key_ref: Any,  # [k, kv_width]
    value_ref: Any,
    tables_ref: Any,  # [P, H, q]
    out_ref: Any,  # [q, q_width]
    *rest: Any,
    steps: Steps,
    heads: Heads,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    num_keys: int,
) -> None:
    """Grid: (row, pack of query heads, worker, step)."""
    *lse_refs, rotated_ref, m_ref, l_ref, acc_ref = rest
    row, q_pack = pl.program_id(0), pl.program_id(1)
    step = steps.read(words_ref, row, pl.program_id(2), pl.program_id(3))
    offset, length, key_offset = read_row_scalars(rows_ref, row)
    block_q, block_kv = query_ref.shape[0], key_ref.shape[0]
    start = step.inner * block_kv
    index = offset + step.outer * block_q + lax.broadcasted_iota(jnp.int32, (1, block_q), 1)

    @pl.when(step.has(BLOCK_BEGIN))
    def initialize() -> None:
        block_math.init_softmax(m_ref, l_ref, acc_ref)

    @pl.when(step.has(RUN_BEGIN))
    def rotate_queries() -> None:
        succ_begin = runs_ref[step.run_index + SUCC_BEGIN]
        cos, sin = rotation.select_cos_sin(tables_ref, index, succ_begin, dca, phases)
        query = query_ref[...].astype(jnp.float32).T
        heads.store_expanded(rotated_ref, rotation.rotate_heads(query, cos, sin), q_pack)

    def attend(masked: bool) -> None:
        value = value_ref[...]
        if masked:
            end = block_math.key_end(
                runs_ref, step.run_index, index, length, key_offset, dca, phases
            )
            slot = start + lax.broadcasted_iota(jnp.int32, (block_kv, block_q), 0)
            mask = block_math.key_mask(runs_ref, step.run_index, slot, end)
            value = block_math.zero_padding(value, start, num_keys, 0)
        for head in range(heads.q_per_pack):
            logits = block_math.dot(key_ref[...], rotated_ref[head], 1, 0)
            if masked:
                logits = jnp.where(mask, logits, -jnp.inf)
            p, m_ref[head], alpha = block_math.softmax_weights(logits, m_ref[head], axis=0)
            l_ref[head] = l_ref[head] * alpha + jnp.sum(p, axis=0, keepdims=True)
            pv = block_math.dot(value, p.astype(value.dtype), 0, 0)
            acc_ref[head] = acc_ref[head] * alpha + pv

    active, full = step.has(ACTIVE), step.has(FULL)
    pl.when(active & full)(functools.partial(attend, False))
    pl.when(active & ~full)(functools.partial(attend, True))

    @pl.when(step.has(BLOCK_END))
    def store() -> None:
        outs = []
        for head in range(heads.q_per_pack):
            any_key, safe_l = block_math.nonzero_sum(l_ref[head])
            outs.append(acc_ref[head, heads.kv_lanes(q_pack, head), :] / safe_l)
            for lse_ref in lse_refs:
                lse_ref[head] = block_math.log_sum_exp(m_ref[head], safe_l, any_key)
        out_ref[...] = jnp.concatenate(outs, axis=0).T.astype(out_ref.dtype)
