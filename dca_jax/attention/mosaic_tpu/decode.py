"""Attention of few queries (decoding), which reads the cache once, in place.

All queries of a row, of all heads, form one block, and a block of keys contains all kv heads of its
tokens: one contiguous piece of memory. Each query occupies the lanes of its kv head, with zeros in
the others. One product then gives the logits of every head, and another gives the output of every
head, in the same lanes. The products have few rows, so the time goes to reading the cache.

On chips whose two cores act as one device, each core reads half of a row's blocks of keys, and the
two splits are merged by their log-sum-exp.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_tpu import block_math
from dca_jax.attention.mosaic_tpu.heads import Heads
from dca_jax.attention.mosaic_tpu.runs import CHUNKS_BEHIND, kv_run_chunks, kv_runs
from dca_jax.attention.mosaic_tpu.specs import read_row_scalars, row_scalars
from dca_jax.attention.mosaic_tpu.steps import (
    ACTIVE,
    BLOCK_BEGIN,
    BLOCK_END,
    RUN_BEGIN,
    Steps,
    split_block,
)
from dca_jax.attention.softmax import LOG2E, MASKED
from dca_jax.attention.stored import Scales
from dca_jax.dca import DCAConfig, Phase, query_position
from dca_jax.rope import rotate


def decode(
    query: Array,  # [B, T, N, H]
    key: Array,  # [L, B, S, K, H], or a pool of pages [L, P, page, K, H]
    value: Array,
    layer: Array,
    rows: Rows,
    heads: Heads,
    *,
    scales: Scales | None,
    pages: Array | None,  # [B, pages_per_row]
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    with_lse: bool,
    block_kv: int,
    num_splits: int,
    vmem_bytes: int,
) -> tuple[Array, Array | None]:
    """Output [B, T, N, H], and the natural log-sum-exp [B, N, T] on request.

    Through pages, block_kv divides a page.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys = key.shape[2] if pages is None else key.shape[2] * pages.shape[1]
    block_q, width = num_heads * num_queries, heads.kv * head_dim
    block_kv = min(block_kv, num_keys)
    runs, max_steps = kv_runs(num_queries, num_keys, rows, dca, phases, (num_queries, block_kv))
    steps, tables = split_block(runs, max_steps, num_splits)
    tables_of_pages = () if pages is None else (pages.reshape(-1),)
    place = _place_of_row if pages is None else _place_in_pages(pages, key.shape[2] // block_kv)
    query_spec, key_spec, scale_spec, out_spec, lse_spec = _block_specs(
        steps, block_q, block_kv, heads, place, scaled=scales is not None
    )
    out_dtype = query.dtype if num_splits == 1 else jnp.float32
    out_shape = [jax.ShapeDtypeStruct((num_splits, batch, block_q, head_dim), out_dtype)]
    out_specs = [out_spec]
    if with_lse or num_splits > 1:
        out_shape.append(jax.ShapeDtypeStruct((num_splits, batch, block_q, 1), jnp.float32))
        out_specs.append(lse_spec)
    out, *lses = pl.pallas_call(
        functools.partial(
            _kernel if pages is None else _kernel_of_pages,
            steps=steps,
            shape=(heads.kv, num_queries, num_heads // heads.kv),
            dca=dca,
            phases=phases,
            num_keys=num_keys,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3 + len(tables_of_pages),
            grid=(num_splits, batch, tables.num_steps),
            in_specs=[query_spec, key_spec, key_spec, scale_spec],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((block_q, width), query.dtype),
                pltpu.VMEM((block_q, 1), jnp.float32),
                pltpu.VMEM((block_q, 1), jnp.float32),
                pltpu.VMEM((block_q, width), jnp.float32),
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
        tables.runs,
        *tables_of_pages,
        _rotate_queries(query, heads.kv, rows, dca, phases),
        key.reshape(*key.shape[:3], width),
        value.reshape(*value.shape[:3], width),
        scales,
    )
    if num_splits > 1:
        out, lse = _merge_splits(out, lses[0])
    else:
        out, lse = out[0], lses[0][0] if lses else None
    by_head = (batch, heads.kv, num_queries, num_heads // heads.kv, -1)
    out = jnp.swapaxes(out.reshape(by_head), 1, 2).reshape(query.shape).astype(query.dtype)
    if lse is None or not with_lse:
        return out, None
    return out, jnp.swapaxes(lse.reshape(by_head[:-1]), 2, 3).reshape(batch, num_heads, -1)


# Of a row and the number of a block of its keys: the row or page it lies in, and its number there.
Place = Callable[..., tuple[Array, Array]]


def _place_of_row(row: Array, block: Array) -> tuple[Array, Array]:
    return row, block


def _place_in_pages(pages: Array, blocks_per_page: int) -> Place:
    pages_per_row = pages.shape[1]

    def place(row: Array, block: Array, table: Any) -> tuple[Array, Array]:
        page = lax.div(block, jnp.int32(blocks_per_page))
        return table[row * pages_per_row + page], lax.rem(block, jnp.int32(blocks_per_page))

    return place


def _block_specs(
    steps: Steps, block_q: int, block_kv: int, heads: Heads, place: Place, *, scaled: bool
) -> tuple[Any, ...]:
    """For queries, keys (values), scales, outputs and log-sum-exps; grid: (split, row, step)."""
    width, head_dim = heads.kv * heads.head_dim, heads.head_dim

    def key_index(
        c: Array, b: Array, i: Array, rows: Any, words: Any, _: Any, *table: Any
    ) -> tuple:
        return rows[0], *place(b, steps.read(words, b, c, i).inner, *table), 0

    def scale_index(
        c: Array, b: Array, i: Array, rows: Any, words: Any, _: Any, *table: Any
    ) -> tuple:
        row, block = place(b, steps.read(words, b, c, i).inner, *table)
        return rows[0], row, 0, block

    def query_index(c: Array, b: Array, i: Array, rows: Any, words: Any, *_: Any) -> tuple:
        return steps.read(words, b, c, i).run, b, 0, 0

    def out_index(c: Array, b: Array, *_: Any) -> tuple:
        return c, b, 0, 0

    scale_spec: Any = pl.BlockSpec((None, None, heads.kv, block_kv), scale_index)
    return (
        pl.BlockSpec((None, None, block_q, head_dim), query_index),
        pl.BlockSpec((None, None, block_kv, width), key_index),
        Scales(scale_spec, scale_spec) if scaled else None,
        pl.BlockSpec((None, None, block_q, head_dim), out_index),
        pl.BlockSpec((None, None, block_q, 1), out_index),
    )


def _rotate_queries(
    query: Array, kv_heads: int, rows: Rows, dca: DCAConfig, phases: tuple[Phase, ...]
) -> Array:
    """The queries as rotated for each run [runs, B, K * T * N/K, H], scaled for exp2."""
    batch, num_queries, num_heads, head_dim = query.shape
    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    scaled = query.astype(jnp.float32) * (rows.scale * LOG2E)[:, None, None, None]
    by_chunks_behind = {
        CHUNKS_BEHIND[phase]: rotate(scaled, query_position(index, phase, dca), rows.inv_freq)
        for phase in phases
    }
    ahead = index // dca.chunk_len - (rows.offset // dca.chunk_len)[:, None]
    runs = []
    for behind in kv_run_chunks(num_queries, phases, dca):
        chunks = jnp.full_like(ahead, 2) if behind is None else jnp.minimum(ahead + behind, 2)
        selected = jnp.zeros_like(scaled)
        for number, rotated in by_chunks_behind.items():
            selected = jnp.where((chunks == number)[:, :, None, None], rotated, selected)
        runs.append(selected)
    stacked = jnp.stack(runs).astype(query.dtype)
    stacked = stacked.reshape(-1, batch, num_queries, kv_heads, num_heads // kv_heads, head_dim)
    return jnp.swapaxes(stacked, 2, 3).reshape(-1, batch, num_heads * num_queries, head_dim)


def _merge_splits(out: Array, lse: Array) -> tuple[Array, Array]:
    """Merges outputs [C, B, q, H] and log-sum-exps [C, B, q, 1] of C splits of the keys."""
    m = jnp.maximum(jnp.max(lse, axis=0), MASKED)
    weights = jnp.exp(lse - m[None])
    any_key, safe_l = block_math.nonzero_sum(jnp.sum(weights, axis=0))
    out = jnp.sum(weights * out, axis=0) / safe_l
    return out, jnp.where(any_key, m + jnp.log(safe_l), -jnp.inf)


def _kernel(
    rows_ref: Any,
    words_ref: Any,
    runs_ref: Any,
    query_ref: Any,  # [q, H], rotated
    key_ref: Any,  # [k, K * H]
    value_ref: Any,
    scale_refs: Scales | None,  # [K, k]
    out_ref: Any,  # [q, H]
    *rest: Any,
    steps: Steps,
    shape: tuple[int, int, int],
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    num_keys: int,
) -> None:
    """Grid: (split, row, step). The block of queries is ordered by `shape`: kv head, token, head.

    The last is the number of the query head among those of its kv head.
    """
    *lse_refs, expanded_ref, m_ref, l_ref, acc_ref = rest
    row = pl.program_id(1)
    step = steps.read(words_ref, row, pl.program_id(0), pl.program_id(2))
    offset, length, key_offset = read_row_scalars(rows_ref, row)
    kv_heads, num_queries, group = shape
    block_q, head_dim = query_ref.shape
    block_kv = key_ref.shape[0]
    position = lax.broadcasted_iota(jnp.int32, (block_q, 1), 0)
    kv_head = _divide(position, num_queries * group, kv_heads)

    @pl.when(step.has(BLOCK_BEGIN))
    def initialize() -> None:
        block_math.init_softmax(m_ref, l_ref, acc_ref)

    @pl.when(step.has(RUN_BEGIN))
    def expand_queries() -> None:
        for number in range(kv_heads):
            own = jnp.where(kv_head == number, query_ref[...].astype(jnp.float32), 0.0)
            lanes = slice(number * head_dim, (number + 1) * head_dim)
            expanded_ref[:, lanes] = own.astype(expanded_ref.dtype)

    @pl.when(step.has(ACTIVE))
    def attend() -> None:
        start = step.inner * block_kv

        def of_head(scale_ref: Any) -> Array:
            """The scales of each query's kv head [q, k]; behind the last key may be NaN."""
            scale = block_math.zero_padding(scale_ref[...], start, num_keys, 1)
            of_query = jnp.zeros((block_q, block_kv), jnp.float32)
            for number in range(kv_heads):
                own = jnp.broadcast_to(scale[number : number + 1], of_query.shape)
                of_query = jnp.where(kv_head == number, own, of_query)
            return of_query

        token = _divide(position - kv_head * (num_queries * group), group, num_queries)
        end = block_math.key_end(
            runs_ref, step.run_index, offset + token, length, key_offset, dca, phases
        )
        slot = start + lax.broadcasted_iota(jnp.int32, (block_q, block_kv), 1)
        mask = block_math.key_mask(runs_ref, step.run_index, slot, end)
        key = _in_dtype(key_ref[...], expanded_ref.dtype)
        logits = block_math.dot(expanded_ref[...], key, 1, 1)
        if scale_refs is not None:
            logits = logits * of_head(scale_refs.key)
        logits = jnp.where(mask, logits, -jnp.inf)
        p, m_ref[...], alpha = block_math.softmax_weights(logits, m_ref[...], axis=1)
        l_ref[...] = l_ref[...] * alpha + jnp.sum(p, axis=1, keepdims=True)
        if scale_refs is not None:
            p = p * of_head(scale_refs.value)
        value = _in_dtype(value_ref[...], expanded_ref.dtype)
        value = block_math.zero_padding(value, start, num_keys, 0)
        acc_ref[...] = acc_ref[...] * alpha + block_math.dot(p.astype(value.dtype), value, 1, 0)

    @pl.when(step.has(BLOCK_END))
    def store() -> None:
        any_key, safe_l = block_math.nonzero_sum(l_ref[...])
        out = jnp.zeros((block_q, head_dim), jnp.float32)
        for number in range(kv_heads):
            lanes = slice(number * head_dim, (number + 1) * head_dim)
            out = jnp.where(kv_head == number, acc_ref[:, lanes], out)
        out_ref[...] = (out / safe_l).astype(out_ref.dtype)
        for lse_ref in lse_refs:
            lse_ref[...] = block_math.log_sum_exp(m_ref[...], safe_l, any_key)


def _kernel_of_pages(
    rows_ref: Any, words_ref: Any, runs_ref: Any, pages_ref: Any, *refs: Any, **options: Any
) -> None:
    """The same: where a block of keys lies concerns the index maps alone."""
    _kernel(rows_ref, words_ref, runs_ref, *refs, **options)


def _in_dtype(x: Array, dtype: jnp.dtype) -> Array:
    """Keys or values as they are multiplied; 8 bits are exact in 16, by way of 32."""
    return x if x.dtype == dtype else x.astype(jnp.float32).astype(dtype)


def _divide(index: Array, size: int, parts: int) -> Array:
    """index // size, for an index below size * parts, without a division."""
    quotient = jnp.zeros_like(index)
    for number in range(1, parts):
        quotient += (index >= number * size).astype(jnp.int32)
    return quotient
