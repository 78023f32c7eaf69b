"""Attention of few queries (decoding): the cache is read once, as it lies.

All queries of a row, of all heads, are one tile, and a block of keys has all kv heads, head after
head of each token: one stretch of memory. A query lies in the lanes of its kv head, the others
zero, so that one product gives every head's logits, and one more every head's output, in those
lanes. The queries are few rows of a product; reading the cache is what takes the time.

On chips whose two cores act as one device, each core reads half of a row's blocks, and the halves
are merged by their log-sum-exp.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_tpu import blocks
from dca_jax.attention.mosaic_tpu.grid import row_scalars
from dca_jax.attention.mosaic_tpu.heads import Heads
from dca_jax.attention.mosaic_tpu.stages import BEHIND, stages_behind, stages_of_queries
from dca_jax.attention.mosaic_tpu.turns import LOG2E
from dca_jax.attention.mosaic_tpu.walk import BEGINS, ENDS, ENTERS, LIVE, Walk, split
from dca_jax.dca import DCAConfig, Phase, query_position
from dca_jax.rope import rotate


def decode(
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
    block_k: int,
    parts: int,
    vmem_bytes: int,
) -> tuple[Array, Array | None]:
    """Output [B, T, N, H], and the natural log-sum-exp [B, N, T] on request."""
    batch, num_queries, num_heads, dim = query.shape
    num_keys, kv_heads = key.shape[2], heads.kv
    group, width, num_rows = num_heads // kv_heads, kv_heads * dim, num_heads * num_queries
    block_k = min(block_k, num_keys)
    stages, most = stages_of_queries(
        num_queries, num_keys, rows, dca, phases, (num_queries, block_k)
    )
    walk, tables = split(stages, most, parts)

    def key_at(c: Array, b: Array, k: Array, rows: Any, words: Any, _: Any) -> tuple:
        return rows[0], b, walk.read(words, b, c, k).block, 0

    def query_at(c: Array, b: Array, k: Array, rows: Any, words: Any, _: Any) -> tuple:
        return walk.read(words, b, c, k).stage, b, 0, 0

    def out_at(c: Array, b: Array, *_: Any) -> tuple:
        return c, b, 0, 0

    out_dtype = query.dtype if parts == 1 else jnp.float32
    out_shape = [jax.ShapeDtypeStruct((parts, batch, num_rows, dim), out_dtype)]
    out_specs = [pl.BlockSpec((None, None, num_rows, dim), out_at)]
    if with_lse or parts > 1:
        out_shape.append(jax.ShapeDtypeStruct((parts, batch, num_rows, 1), jnp.float32))
        out_specs.append(pl.BlockSpec((None, None, num_rows, 1), out_at))
    out, *lse = pl.pallas_call(
        functools.partial(
            _kernel,
            walk=walk,
            shape=(kv_heads, num_queries, group),
            dca=dca,
            phases=phases,
            num_keys=num_keys,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(parts, batch, tables.steps),
            in_specs=[
                pl.BlockSpec((None, None, num_rows, dim), query_at),
                pl.BlockSpec((None, None, block_k, width), key_at),
                pl.BlockSpec((None, None, block_k, width), key_at),
            ],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((num_rows, width), query.dtype),
                pltpu.VMEM((num_rows, 1), jnp.float32),
                pltpu.VMEM((num_rows, 1), jnp.float32),
                pltpu.VMEM((num_rows, width), jnp.float32),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes,
        ),
        name="dca_tpu_decode",
    )(
        row_scalars(layer, rows, num_queries),
        tables.words,
        tables.stages,
        _turned(query, kv_heads, rows, dca, phases),
        key.reshape(*key.shape[:3], width),
        value.reshape(*value.shape[:3], width),
    )
    if parts > 1:
        out, total = _merged(out, lse[0])
    else:
        out, total = out[0], lse[0][0] if lse else None
    by_head = (batch, kv_heads, num_queries, group, -1)
    out = jnp.swapaxes(out.reshape(by_head), 1, 2).reshape(query.shape).astype(query.dtype)
    if total is None or not with_lse:
        return out, None
    return out, jnp.swapaxes(total.reshape(by_head[:-1]), 2, 3).reshape(batch, num_heads, -1)


def _turned(
    query: Array, kv_heads: int, rows: Rows, dca: DCAConfig, phases: tuple[Phase, ...]
) -> Array:
    """The queries as each stage turns them [stages, B, K * T * N/K, H], scaled for exp2."""
    batch, num_queries, num_heads, dim = query.shape
    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    wide = query.astype(jnp.float32) * (rows.scale * LOG2E)[:, None, None, None]
    by_chunks = {
        BEHIND[phase]: rotate(wide, query_position(index, phase, dca), rows.inv_freq)
        for phase in phases
    }
    beyond = index // dca.chunk_len - (rows.offset // dca.chunk_len)[:, None]
    stages = []
    for behind in stages_behind(num_queries, phases, dca):
        chunks = jnp.full_like(beyond, 2) if behind is None else jnp.minimum(beyond + behind, 2)
        turned = jnp.zeros_like(wide)
        for number, rotated in by_chunks.items():
            turned = jnp.where((chunks == number)[:, :, None, None], rotated, turned)
        stages.append(turned)
    turned = jnp.stack(stages).astype(query.dtype)
    turned = turned.reshape(-1, batch, num_queries, kv_heads, num_heads // kv_heads, dim)
    return jnp.swapaxes(turned, 2, 3).reshape(-1, batch, num_heads * num_queries, dim)


def _merged(out: Array, lse: Array) -> tuple[Array, Array]:
    """Parts [C, B, rows, H] and [C, B, rows, 1] merged by their log-sum-exp."""
    peak = jnp.maximum(jnp.max(lse, axis=0), blocks.LOWEST)
    weights = jnp.exp(lse - peak[None])
    total = jnp.sum(weights, axis=0)
    met_any = total > 0
    total = jnp.where(met_any, total, 1.0)
    out = jnp.sum(weights * out, axis=0) / total
    return out, jnp.where(met_any, peak + jnp.log(total), -jnp.inf)


def _kernel(
    row_ref: Any,
    word_ref: Any,
    stage_ref: Any,
    query_ref: Any,  # [rows, H], turned
    key_ref: Any,  # [k, K * H]
    value_ref: Any,
    out_ref: Any,  # [rows, H]
    *rest: Any,
    walk: Walk,
    shape: tuple[int, int, int],
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    num_keys: int,
) -> None:
    """Grid: (part, row of the batch, step). A tile's rows: kv head, query, head of the group."""
    *lse_refs, wide_ref, peak_ref, total_ref, acc_ref = rest
    row = pl.program_id(1)
    step = walk.read(word_ref, row, pl.program_id(0), pl.program_id(2))
    offset, limit, shift = (row_ref[1 + 3 * row + number] for number in range(3))
    kv_heads, num_queries, group = shape
    num_rows, dim = query_ref.shape
    block_k = key_ref.shape[0]
    of_row = lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0)
    head = _part(of_row, num_queries * group, kv_heads)

    @pl.when(step.has(BEGINS))
    def begin() -> None:
        peak_ref[...] = jnp.full(peak_ref.shape, blocks.LOWEST, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    @pl.when(step.has(ENTERS))
    def enter() -> None:
        for number in range(kv_heads):
            own = jnp.where(head == number, query_ref[...].astype(jnp.float32), 0.0)
            wide_ref[:, number * dim : (number + 1) * dim] = own.astype(wide_ref.dtype)

    @pl.when(step.has(LIVE))
    def meet() -> None:
        at = step.block * block_k
        query = _part(of_row - head * (num_queries * group), group, num_queries)
        stop = blocks.reach(stage_ref, step.numbers, offset + query, limit, shift, dca, phases)
        slot = at + lax.broadcasted_iota(jnp.int32, (num_rows, block_k), 1)
        met = blocks.met_keys(stage_ref, step.numbers, slot, stop)
        logits = jnp.where(met, blocks.dot(wide_ref[...], key_ref[...], 1, 1), -jnp.inf)
        peak = peak_ref[...]
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1, keepdims=True))
        decay = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(logits - new_peak)
        peak_ref[...] = new_peak
        total_ref[...] = total_ref[...] * decay + jnp.sum(weights, axis=1, keepdims=True)
        value = blocks.within(value_ref[...], at, num_keys, 0)
        acc_ref[...] = acc_ref[...] * decay + blocks.dot(weights.astype(value.dtype), value, 1, 0)

    @pl.when(step.has(ENDS))
    def end() -> None:
        total = total_ref[...]
        met_any = total > 0
        total = jnp.where(met_any, total, 1.0)
        own = jnp.zeros((num_rows, dim), jnp.float32)
        for number in range(kv_heads):
            own = jnp.where(head == number, acc_ref[:, number * dim : (number + 1) * dim], own)
        out_ref[...] = (own / total).astype(out_ref.dtype)
        for lse_ref in lse_refs:
            lse = peak_ref[...] / LOG2E + jnp.log(total)
            lse_ref[...] = jnp.where(met_any, lse, -jnp.inf)


def _part(index: Array, size: int, parts: int) -> Array:
    """Which of `parts` pieces of `size` an index is in."""
    part = jnp.zeros_like(index)
    for number in range(1, parts):
        part += (index >= number * size).astype(jnp.int32)
    return part
