"""Decoding on Hopper: few queries per row over a long, ragged KV cache, split over its keys.

Decoding is bound by the reading of the cache, so the kernel is organized around it:

- The blocks of keys that the batch's queries attend to, row by row and phase by phase, form one
  work list. Each kv head has the same number of CTAs, and each CTA an equal part of the list,
  whatever the lengths of the rows: the grid is static, nothing recompiles as a text grows, and a
  batch of one long and many short rows is balanced as well.
- The T x G queries that share a kv head are the *columns* of both products, S^T = K q^T and
  O^T = V^T P^T: a block of keys costs 8 columns of tensor work, instead of the 64 rows that WGMMA
  would otherwise need.
- One warpgroup keeps `num_stages` blocks of keys and of values in flight; the other computes.
- 8-bit keys and values are widened in registers, from which WGMMA can take its left operand
  (`widening`). Their scales multiply logits and weights. This is more work for half the bytes, so
  two CTAs share a multiprocessor.

A row's partial results are merged by their maximum and sum, in plain XLA.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from dca_jax.attention.mosaic_gpu.decode_tiles import (
    QUANTIZED_TILES,
    TILES,
    DecodeTiles,
    fitting,
)
from dca_jax.attention.mosaic_gpu.ranges import Keys
from dca_jax.attention.mosaic_gpu.widening import (
    ROWS,
    in_order_of_head,
    ordered_for_keys,
    widened_keys,
    widened_values,
)
from dca_jax.attention.softmax import LOG2E, MASKED
from dca_jax.attention.stored import Scales
from dca_jax.dca import DCAConfig, Phase, key_range
from dca_jax.device import SHARED_BYTES
from dca_jax.errors import InputError

COLUMNS = plgpu.Layout.WGMMA.reduce(0)


class Columns(NamedTuple):
    """The kernel's queries: those of each row that share a kv head are the columns.

    Attributes:
        query: queries rotated for each phase.
        offset: the least text index of a row's queries.
        lengths: text length of each row; keys from there on are not read.
        key_offset: as in `Rows`.
        index: text index of each column's query, -1 for none; None if the queries are consecutive
            from `offset` on, with each query's heads side by side.
        end: text index from which on a row's keys are not read; None to read all that its queries
            attend to.
    """

    query: Float[Array, "B P K columns H"]
    offset: Int[Array, " B"]
    lengths: Int[Array, " B"]
    key_offset: Int[Array, " B"]
    index: Int[Array, "B columns"] | None = None
    end: Int[Array, " B"] | None = None


def attend_columns(
    columns: Columns,
    key: Num[Array, "L R S K H"],
    value: Num[Array, "L R S K H"],
    layer: Int[Array, ""],
    *,
    dtype: jnp.dtype,
    num_queries: int,
    group: int,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    scales: Scales | None = None,
    pages: Int[Array, "B pages_per_row"] | None = None,
    reach: int | None = None,
    tiles: DecodeTiles | None = None,
) -> tuple[Float[Array, "B K columns H"], Float[Array, "B K columns"]]:
    """Output and natural log-sum-exp of num_queries * group columns, float32.

    Args:
        dtype: dtype of the original queries.
        group: query heads per kv head.
        reach: size of the range of a row's text indices (default: queries are consecutive).
    """
    batch, _, _, width, head_dim = columns.query.shape
    layers, num_rows, capacity, kv_heads = key.shape[:4]
    num_keys = capacity if pages is None else pages.shape[1] * capacity
    quantized = scales is not None
    if quantized:
        columns = columns._replace(query=ordered_for_keys(columns.query))
    tiles = tiles or (QUANTIZED_TILES if quantized else TILES)[head_dim]
    tiles = fitting(tiles, width, head_dim, len(phases), quantized=quantized)
    if tiles is None:
        raise InputError(
            f"{num_queries} queries of {group} heads with head_dim {head_dim} do not fit into the "
            f"decode kernel's {SHARED_BYTES} bytes of shared memory"
        )
    shares = min(max(1, tiles.ctas // kv_heads), tiles.max_shares)
    problem = _Problem(
        reach=reach or num_queries,
        group=group,
        shares=min(shares, batch * -(-num_keys // tiles.block)),
        num_keys=num_keys,
        num_rows=num_rows,
        dca=dca,
        phases=phases,
        tiles=tiles,
    )
    outs, stats = _attend_shares(
        jnp.reshape(jnp.asarray(layer, jnp.int32), (1,)),
        columns,
        dtype,
        key.reshape(layers * num_rows, capacity, kv_heads, head_dim),
        value.reshape(layers * num_rows, capacity, kv_heads, head_dim),
        None if scales is None else scales.key.reshape(layers * num_rows, kv_heads, capacity),
        None if scales is None else scales.value.reshape(layers * num_rows, kv_heads, capacity),
        pages,
        problem,
    )
    used = num_queries * group
    out, lse = _merge_shares(outs[..., :used, :], stats[..., :used])
    return (in_order_of_head(out) if quantized else out), lse


def _merge_shares(
    outs: Float[Array, "slots K columns H"], stats: Float[Array, "shares B K 2 columns"]
) -> tuple[Float[Array, "B K columns H"], Float[Array, "B K columns"]]:
    """Merges the shares' unnormalised softmaxes into one; a query without keys has 0 and -inf.

    Unrolled over shares, so that XLA compiles it to fused elementwise kernels instead of a chain of
    reductions: for short texts, each launch matters.
    """
    shares, batch = stats.shape[:2]
    m_i = functools.reduce(jnp.maximum, [stats[n, :, :, 0] for n in range(shares)])
    l_i, merged = jnp.zeros_like(m_i), jnp.float32(0)
    for n in range(shares):
        weight = jnp.exp2(stats[n, :, :, 0] - m_i)
        l_i = l_i + weight * stats[n, :, :, 1]
        # A share without a part in the row has not written its slot, which holds arbitrary data.
        part = jnp.where((stats[n, :, :, 1] > 0)[..., None], outs[n : n + batch], 0)
        merged = merged + weight[..., None] * part
    met = l_i > 0
    lse = jnp.where(met, m_i / LOG2E + jnp.log(l_i), -jnp.inf)
    return merged / jnp.where(met, l_i, 1)[..., None], lse


# --- the kernel --------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """The static parameters of a call."""

    reach: int  # size of the range of text indices of a row's queries
    group: int  # query heads per kv head
    shares: int  # number of parts into which the work of a kv head is split
    num_keys: int  # capacity of a row
    num_rows: int  # rows of a layer of the cache, or pages
    dca: DCAConfig
    phases: tuple[Phase, ...]
    tiles: DecodeTiles


class _Refs(NamedTuple):
    """The kernel's arguments and results in global memory, as in `_attend_shares`."""

    layer: Any
    offset: Any
    lengths: Any
    key_offset: Any
    query: Any
    key: Any
    value: Any
    key_scale: Any  # None, like the value scale, if keys and values are not quantized
    value_scale: Any
    index: Any  # None, like `end`, if queries are consecutive and read all their keys
    end: Any
    pages: Any  # None if a row's keys are contiguous
    outs: Any
    stats: Any


class _Shared(NamedTuple):
    """Shared memory: tiles, then barriers."""

    query: Any  # [P, columns, H]
    span: Any  # [P, 2, columns] int32: the start and end of each query's slots in a phase
    key: Any  # [num_stages, block, H]
    value: Any  # [num_stages, block, H]
    key_scale: Any  # [num_stages, block] float32, or None
    value_scale: Any
    p: Any  # [columns, block]
    out: Any  # [columns, H] float32
    stat: Any  # [2, columns] float32
    query_ready: Any
    key_ready: Any
    value_ready: Any
    key_free: Any
    value_free: Any


def _attend_shares(
    layer: Int[Array, " 1"],
    columns: Columns,
    dtype: jnp.dtype,
    key: Num[Array, "LR S K H"],
    value: Num[Array, "LR S K H"],
    key_scale: Float[Array, "LR K S"] | None,
    value_scale: Float[Array, "LR K S"] | None,
    pages: Int[Array, "B pages_per_row"] | None,
    problem: _Problem,
) -> tuple[Float[Array, "slots K columns H"], Float[Array, "shares B K 2 columns"]]:
    """Each share's part of each row: unnormalised output, and maximum (log2 units) and sum.

    Share n's output for row b is in slot n + b, which no other share uses: shares and rows ascend
    together. If the share has no part in the row, its sum is 0, and the slot is not written.
    """
    batch, num_phases, kv_heads, width, head_dim = columns.query.shape
    shares, block, num_stages = problem.shares, problem.tiles.block, problem.tiles.num_stages
    f32, quantized = jnp.float32, key_scale is not None
    query, offset, lengths, key_offset, index, end = columns
    stored = key, value, key_scale, value_scale
    arrays = layer, offset, lengths, key_offset, query, *stored, index, end, pages
    scale = plgpu.SMEM((num_stages, block), f32) if quantized else None

    def kernel(*refs: Any) -> None:
        gmem, smem = jax.tree.unflatten(tree, refs)
        share = _share(gmem, problem)
        pl.when(lax.axis_index("warpgroup") == 1)(lambda: _load(gmem, smem, problem, share))
        pl.when(lax.axis_index("warpgroup") == 0)(lambda: _compute(gmem, smem, problem, share))

    out_type = (
        jax.ShapeDtypeStruct((shares + batch - 1, kv_heads, width, head_dim), f32),
        jax.ShapeDtypeStruct((shares, batch, kv_heads, 2, width), f32),
    )
    shared = _Shared(
        query=plgpu.SMEM((num_phases, width, head_dim), query.dtype),
        span=plgpu.SMEM((num_phases, 2, width), jnp.int32),
        key=plgpu.SMEM((num_stages, block, head_dim), key.dtype),
        value=plgpu.SMEM((num_stages, block, head_dim), value.dtype),
        key_scale=scale,
        value_scale=scale,
        p=plgpu.SMEM((width, block), dtype),
        out=plgpu.SMEM((width, head_dim), f32),
        stat=plgpu.SMEM((2, width), f32),
        query_ready=plgpu.Barrier(num_arrivals=num_phases),
        key_ready=plgpu.Barrier(num_arrivals=1 + quantized, num_barriers=num_stages),
        value_ready=plgpu.Barrier(num_arrivals=1 + quantized, num_barriers=num_stages),
        key_free=plgpu.Barrier(num_barriers=num_stages),
        value_free=plgpu.Barrier(num_barriers=num_stages),
    )
    # None arguments are omitted.
    given, scratch = jax.tree.leaves(arrays), jax.tree.leaves(shared)
    tree = jax.tree.structure((_Refs._make((*arrays, *out_type)), shared))
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        # Heads first: CTAs that run at the same time read the same rows of the cache.
        grid=(kv_heads, shares),
        grid_names=("head", "share"),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="dca_decode",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*given)


class _Work(NamedTuple):
    """The blocks of keys that a row's queries attend to: its units of work, phase by phase.

    Attributes:
        firsts: each phase's first block.
        ends: cumulative number of units up to the end of each phase.
    """

    firsts: list[Array]
    ends: list[Array]

    @classmethod
    def of(cls, first: Array, last: Array, keys: Keys, problem: _Problem) -> "_Work":
        """The work of the queries with indices first .. last; empty if last < first."""
        block = problem.tiles.block
        firsts, ends, end = [], [], jnp.int32(0)
        for phase in problem.phases:
            # Both bounds of a phase's keys grow with the query.
            start = keys.slot(key_range(first, phase, problem.dca)[0])
            stop = keys.slot(key_range(last, phase, problem.dca)[1])
            begin = lax.div(start, block)
            count = lax.div(stop + (block - 1), block) - begin
            end = end + jnp.where((last >= first) & (stop > start), count, 0)
            firsts.append(begin)
            ends.append(end)
        return cls(firsts, ends)

    def locate(self, unit: Array) -> tuple[Array, Array]:
        """The phase number and the block number of a unit."""
        phase, block = jnp.int32(0), unit + self.firsts[0]
        for p in range(1, len(self.firsts)):
            later = unit >= self.ends[p - 1]
            phase = jnp.where(later, jnp.int32(p), phase)
            block = jnp.where(later, unit - self.ends[p - 1] + self.firsts[p], block)
        return phase, block


def _work_of(gmem: _Refs, row: Array, problem: _Problem) -> _Work:
    first = gmem.offset[row]
    last = jnp.minimum(first + problem.reach, gmem.lengths[row]) - 1
    return _Work.of(first, last, _keys(gmem, row, problem), problem)


def _keys(gmem: _Refs, row: Array, problem: _Problem) -> Keys:
    return Keys(gmem.key_offset[row], problem.num_keys if gmem.end is None else gmem.end[row])


def _place(
    gmem: _Refs, at: Array, row: Array, number: Array, problem: _Problem
) -> tuple[Array, Any]:
    """The place of block `number` of a row's keys: the cache's row or the page, and the slots.

    `at` is the row of the cache, or in a pool, the layer's first page.
    """
    block = problem.tiles.block
    if gmem.pages is not None:
        in_page = gmem.key.shape[1] // block
        at = at + gmem.pages[row, lax.div(number, in_page)]
        number = lax.rem(number, in_page)
    return at, pl.ds(number * block, block)


def _share(gmem: _Refs, problem: _Problem) -> tuple[Array, Array]:
    """[begin, stop) of this share in the batch's units of work, row by row."""
    total = lax.fori_loop(
        0,
        gmem.offset.shape[0],
        lambda row, total: total + _work_of(gmem, row, problem).ends[-1],
        jnp.int32(0),
    )
    share = lax.axis_index("share")
    return lax.div(total * share, problem.shares), lax.div(total * (share + 1), problem.shares)


def _for_each_row(
    gmem: _Refs, problem: _Problem, share: tuple[Array, Array], visit: Callable, skip: Callable
) -> None:
    """Calls visit(row, its work, first, last, step) if units first .. last - 1 are the share's.

    `step` is the number of units done before. Calls skip(row) for rows without a part.
    """
    begin, stop = share

    def one(row: Array, before: Array) -> Array:
        work = _work_of(gmem, row, problem)
        after = before + work.ends[-1]
        first, last = jnp.maximum(begin, before), jnp.minimum(stop, after)
        pl.when(first < last)(
            lambda: visit(row, work, first - before, last - before, first - begin)
        )
        pl.when(first >= last)(lambda: skip(row))
        return after

    lax.fori_loop(0, gmem.offset.shape[0], one, jnp.int32(0))


def _load(gmem: _Refs, smem: _Shared, problem: _Problem, share: tuple[Array, Array]) -> None:
    """The warpgroup that loads keys and values, from row to row without a pause."""
    head, num_stages = lax.axis_index("head"), problem.tiles.num_stages

    def visit(row: Array, work: _Work, first: Array, last: Array, step: Array) -> None:
        at = gmem.layer[0] * problem.num_rows
        at = at + row if gmem.pages is None else at

        def load(unit: Array, _: None) -> None:
            n = step + unit - first
            slot = lax.rem(n, num_stages)
            text, slots = _place(gmem, at, row, work.locate(unit)[1], problem)
            for source, scale, target, scale_target, ready, free in (
                (*_keys_in(gmem), *_keys_in(smem), smem.key_ready, smem.key_free),
                (*_values_in(gmem), *_values_in(smem), smem.value_ready, smem.value_free),
            ):
                pl.when(n >= num_stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                keys = source.at[text, slots, head]
                plgpu.copy_gmem_to_smem(keys, target.at[slot], ready.at[slot])
                if scale is not None:
                    keys = scale.at[text, head, slots]
                    plgpu.copy_gmem_to_smem(keys, scale_target.at[slot], ready.at[slot])

        lax.fori_loop(first, last, load, None)

    _for_each_row(gmem, problem, share, visit, lambda row: None)


def _compute(gmem: _Refs, smem: _Shared, problem: _Problem, share: tuple[Array, Array]) -> None:
    """The warpgroup that computes."""
    head, number = lax.axis_index("head"), lax.axis_index("share")
    columns, head_dim = smem.query.shape[1:]
    num_stages = smem.key.shape[0]

    def skip(row: Array) -> None:
        smem.stat[0] = _filled((columns,), MASKED, COLUMNS)
        smem.stat[1] = _filled((columns,), 0, COLUMNS)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.stat, gmem.stats.at[number, row, head])
        plgpu.wait_smem_to_gmem(0)

    def visit(row: Array, work: _Work, first: Array, last: Array, step: Array) -> None:
        _place_queries(gmem, smem, row, problem)

        def attend(unit: Array, state: tuple) -> tuple:
            slot = lax.rem(step + unit - first, num_stages)
            return _attend_block(smem, slot, *work.locate(unit), state)

        state = (
            _filled((columns,), MASKED, COLUMNS),
            _filled((_parts(smem)[0].size, columns), 0, plgpu.Layout.WGMMA),
            _filled((head_dim, columns), 0, plgpu.Layout.WGMMA),
        )
        m_i, l_i, acc = lax.fori_loop(first, last, attend, state)
        smem.out.T[...] = plgpu.layout_cast(acc, plgpu.Layout.WGMMA_TRANSPOSED)
        smem.stat[0] = m_i
        smem.stat[1] = l_i.sum(axis=0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.out, gmem.outs.at[number + row, head])
        plgpu.copy_smem_to_gmem(smem.stat, gmem.stats.at[number, row, head])
        plgpu.wait_smem_to_gmem(0)

    _for_each_row(gmem, problem, share, visit, skip)


def _place_queries(gmem: _Refs, smem: _Shared, row: Array, problem: _Problem) -> None:
    """Loads a row's queries, and the range of keys of each, into shared memory."""
    num_phases, columns = smem.query.shape[:2]
    for p in range(num_phases):
        source = gmem.query.at[row, p, lax.axis_index("head")]
        plgpu.copy_gmem_to_smem(source, smem.query.at[p], smem.query_ready)
    if gmem.index is None:
        column = plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=COLUMNS)
        index = lax.div(column, jnp.int32(problem.group)) + gmem.offset[row]
    else:
        index = plgpu.load(gmem.index.at[row], layout=COLUMNS, optimized=False)
    is_text = (index >= 0) & (index < gmem.lengths[row])
    for p, phase in enumerate(problem.phases):
        start, stop = map(_keys(gmem, row, problem).slot, key_range(index, phase, problem.dca))
        smem.span[p, 0] = plgpu.layout_cast(start, COLUMNS)
        smem.span[p, 1] = plgpu.layout_cast(jnp.where(is_text, stop, start), COLUMNS)
    plgpu.barrier_wait(smem.query_ready)


def _attend_block(
    smem: _Shared,
    slot: Array,
    phase: Array,
    number: Array,
    state: tuple[Float[Array, " columns"], Float[Array, "rows columns"], Float[Array, "H columns"]],
) -> tuple:
    """One step of the online softmax, with block `number` of the keys, which is in `slot`.

    The state holds maxima in log2 units, sums of weights, and outputs. Each thread sums its own
    keys, and the sums are combined after the last block. Logits and weights are separate for each
    of `_parts`.
    """
    m_i, l_i, acc = state
    shape = l_i.shape[0], l_i.shape[1]
    across = functools.partial(lax.broadcast_in_dim, broadcast_dimensions=[1])
    start = across(plgpu.load(smem.span.at[phase, 0], layout=COLUMNS), shape)
    stop = across(plgpu.load(smem.span.at[phase, 1], layout=COLUMNS), shape)
    quantized, parts = smem.key_scale is not None, _parts(smem)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)

    plgpu.barrier_wait(smem.key_ready.at[slot])
    if quantized:
        plgpu.barrier_wait(smem.value_ready.at[slot])
    logits, values = [], []
    for part in parts:
        each, wide_values = _logits_and_values(smem, slot, phase, part, shape)
        key = number * smem.key.shape[1] + part.start + row
        logits.append(jnp.where((key >= start) & (key < stop), each, -jnp.inf))
        values.append(wide_values)
    plgpu.barrier_arrive(smem.key_free.at[slot])

    m_next = jnp.maximum(m_i, functools.reduce(jnp.maximum, logits).max(axis=0))
    decay = jnp.exp2(m_i - m_next)
    weights = [jnp.exp2(each - across(m_next, shape)) for each in logits]
    l_i = functools.reduce(operator.add, weights, l_i * across(decay, shape))
    acc = acc * across(decay, acc.shape)
    for part, p in zip(parts, weights, strict=True):
        if quantized:
            p = p * _of_keys(smem.value_scale.at[slot, part], shape)
        narrow = p.astype(smem.p.dtype)
        smem.p.at[:, part].T[...] = plgpu.layout_cast(narrow, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    if not quantized:
        plgpu.barrier_wait(smem.value_ready.at[slot])

    def add_values(acc_ref: Any) -> None:
        if not quantized:
            plgpu.wgmma(acc_ref, smem.value.at[slot].T, smem.p.T)
            return
        for part, each in zip(parts, values, strict=True):
            plgpu.wgmma(acc_ref, each, smem.p.at[:, part].T)

    acc = pl.run_state(add_values)(plgpu.WGMMAAccumulatorRef.init(acc))
    plgpu.barrier_arrive(smem.value_free.at[slot])
    return m_next, l_i, acc


def _logits_and_values(
    smem: _Shared, slot: Array, phase: Array, part: Any, shape: tuple[int, int]
) -> tuple[Float[Array, "rows columns"], Float[Array, "H rows"] | None]:
    """Logits in log2 units of a part of the block of keys in `slot`.

    Also returns its values if they have to be widened, which overlaps with the product.
    """
    keys = smem.key.at[slot, part]
    if smem.key_scale is not None:
        keys = widened_keys(keys, smem.query.dtype)

    def product(acc_ref: Any) -> Any:
        plgpu.wgmma(acc_ref, keys, smem.query.at[phase].T)
        values = None
        if smem.key_scale is not None:
            values = widened_values(smem.value.at[slot, part], smem.p.dtype)
        return acc_ref[...], values

    logits, values = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    if smem.key_scale is None:
        return logits, values
    return logits * _of_keys(smem.key_scale.at[slot, part], shape), values


def _parts(smem: _Shared) -> list[Any]:
    """The parts of a block of keys: 8-bit ones are widened in registers one part at a time."""
    block = smem.key.shape[1]
    rows = block if smem.key_scale is None else ROWS
    return [pl.ds(first, rows) for first in range(0, block, rows)]


def _of_keys(ref: Any, shape: tuple[int, int]) -> Float[Array, "block columns"]:
    """One number per key, in the layout of the logits."""
    number = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))
    return lax.broadcast_in_dim(number, shape, broadcast_dimensions=[0])


def _keys_in(refs: _Refs | _Shared) -> tuple[Any, Any]:
    return refs.key, refs.key_scale


def _values_in(refs: _Refs | _Shared) -> tuple[Any, Any]:
    return refs.value, refs.value_scale


def _filled(shape: tuple[int, ...], value: float, layout: Any) -> Float[Array, "..."]:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
