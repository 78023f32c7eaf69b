"""Decoding on Hopper: few queries a row over a long, ragged KV cache, split over its keys.

What bounds it is the reading of the cache, so everything else is kept out of the way:

- The blocks of keys that the batch's queries meet, row after row and phase after phase, are one
  list of work. Each kv head has the same number of CTAs, and each of them an equal part of the
  list, whatever the lengths of the rows: the grid is static, nothing recompiles as a text grows,
  and a batch of one long and many short rows is as balanced as any.
- The T x G queries of one kv head that share its keys are the *columns* of both products,
  S^T = K q^T and O^T = V^T P^T: a block of keys costs 8 columns of tensor work, and not the 64
  rows that WGMMA would ask for otherwise.
- One warpgroup keeps `num_stages` blocks of keys and of values in flight; the other computes.

A row's partial results are merged by their maximum and sum, in plain XLA.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_gpu.queries import rotated_queries
from dca_jax.attention.mosaic_gpu.ranges import Keys
from dca_jax.attention.softmax import LOG2E, MASKED
from dca_jax.dca import DCAConfig, Phase, key_range
from dca_jax.device import MULTIPROCESSORS, SHARED_BYTES
from dca_jax.errors import InputError

COLUMNS = plgpu.Layout.WGMMA.reduce(0)
RESERVED = 4096  # of them, for reductions across warps, barriers and alignment


@dataclass(frozen=True)
class DecodeTiles:
    """How the work is cut.

    Attributes:
        block: keys a step; a multiple of 64.
        num_stages: blocks of keys, and of values, in flight; fewer where queries take the memory.
        ctas: CTAs in all, over the kv heads: one for each processor of the device.
        max_shares: CTAs a kv head gets at most: each makes the merge longer.
    """

    block: int
    num_stages: int
    ctas: int = MULTIPROCESSORS
    max_shares: int = 64

    def shared_bytes(self, columns: int, head_dim: int, phases: int) -> int:
        """Shared memory a CTA needs, in bytes."""
        queries = phases * columns * (head_dim * 2 + 2 * 4)
        keys_values = 2 * self.num_stages * self.block * head_dim * 2
        results = columns * (self.block * 2 + head_dim * 4 + 2 * 4)
        return queries + keys_values + results + RESERVED


# By head_dim, found on an H200.
TILES = {
    64: DecodeTiles(block=128, num_stages=6),
    128: DecodeTiles(block=128, num_stages=3),
    256: DecodeTiles(block=64, num_stages=3),
}


def fits(query: jax.ShapeDtypeStruct, key: jax.ShapeDtypeStruct) -> bool:
    """Whether `decode` takes these shapes: few queries a row, and a capacity TMA can tile."""
    num_queries, num_heads, head_dim = query.shape[1:]
    capacity, kv_heads = key.shape[2:4]
    columns = _columns(num_queries, num_heads // kv_heads)
    return (
        query.dtype in (jnp.bfloat16, jnp.float16)
        and capacity % 8 == 0
        and columns <= 64
        and head_dim in TILES
        and _fitting(TILES[head_dim], columns, head_dim, phases=3) is not None
    )


def _columns(num_queries: int, group: int) -> int:
    """The queries that share a kv head, in WGMMA's steps of 8."""
    return -(-num_queries * group // 8) * 8


def _fitting(tiles: DecodeTiles, columns: int, head_dim: int, phases: int) -> DecodeTiles | None:
    """`tiles` with as many stages as shared memory has room for; None if not even two."""
    for num_stages in range(tiles.num_stages, 1, -1):
        fitting = replace(tiles, num_stages=num_stages)
        if fitting.shared_bytes(columns, head_dim, phases) <= SHARED_BYTES:
            return fitting
    return None


def decode(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    with_lse: bool,
    tiles: DecodeTiles | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """`Backend.forward` for shapes that `fits` takes."""
    layers, batch, capacity, kv_heads, head_dim = key.shape
    num_queries, num_heads = query.shape[1:3]
    group = num_heads // kv_heads
    queries = _query_columns(query, kv_heads, rows, dca, phases)
    tiles = _fitting(tiles or TILES[head_dim], queries.shape[3], head_dim, len(phases))
    if tiles is None:
        raise InputError(
            f"{num_queries} queries of {group} heads, of head_dim {head_dim}, do not fit into the "
            f"{SHARED_BYTES} bytes of shared memory of the decode kernel"
        )
    shares = min(max(1, tiles.ctas // kv_heads), tiles.max_shares)
    problem = _Problem(
        num_queries=num_queries,
        group=group,
        shares=min(shares, batch * -(-capacity // tiles.block)),
        dca=dca,
        phases=phases,
        tiles=tiles,
    )
    outs, stats = _attend_shares(
        jnp.reshape(jnp.asarray(layer, jnp.int32), (1,)),
        rows.offset,
        rows.lengths,
        rows.key_offset,
        queries,
        key.reshape(layers * batch, capacity, kv_heads, head_dim),
        value.reshape(layers * batch, capacity, kv_heads, head_dim),
        problem,
    )
    used = num_queries * group
    out, lse = _merge_shares(outs[..., :used, :], stats[..., :used])
    out = out.reshape(batch, kv_heads, num_queries, group, head_dim)
    out = jnp.swapaxes(out, 1, 2).reshape(query.shape).astype(query.dtype)
    if not with_lse:
        return out, None
    lse = lse.reshape(batch, kv_heads, num_queries, group)
    return out, jnp.swapaxes(lse, 2, 3).reshape(batch, num_heads, num_queries)


def _query_columns(
    query: Float[Array, "B T N H"],
    kv_heads: int,
    rows: Rows,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> Float[Array, "B P K columns H"]:
    """Queries as each phase sees them, those that share a kv head together, padded with zeros."""
    batch, num_queries, num_heads, head_dim = query.shape
    group, columns = num_heads // kv_heads, _columns(num_queries, num_heads // kv_heads)
    seen = jnp.stack(rotated_queries(query, rows, dca, phases))
    seen = seen.reshape(len(phases), batch, num_queries, kv_heads, group, head_dim)
    seen = seen.transpose(1, 0, 3, 2, 4, 5)
    seen = seen.reshape(batch, len(phases), kv_heads, num_queries * group, head_dim)
    return jnp.pad(seen, ((0, 0), (0, 0), (0, 0), (0, columns - num_queries * group), (0, 0)))


def _merge_shares(
    outs: Float[Array, "slots K columns H"], stats: Float[Array, "shares B K 2 columns"]
) -> tuple[Float[Array, "B K columns H"], Float[Array, "B K columns"]]:
    """One softmax out of the shares' unnormalised ones; a query that met no key: 0 and -inf.

    Written out share by share, so that XLA makes elementwise kernels of it, which it fuses, and not
    a chain of reductions: with short texts, each launch counts.
    """
    shares, batch = stats.shape[:2]
    m_i = functools.reduce(jnp.maximum, [stats[n, :, :, 0] for n in range(shares)])
    l_i, merged = jnp.zeros_like(m_i), jnp.float32(0)
    for n in range(shares):
        weight = jnp.exp2(stats[n, :, :, 0] - m_i)
        l_i = l_i + weight * stats[n, :, :, 1]
        # A share without a part in the row has left its slot as it was, whatever that holds.
        part = jnp.where((stats[n, :, :, 1] > 0)[..., None], outs[n : n + batch], 0)
        merged = merged + weight[..., None] * part
    met = l_i > 0
    lse = jnp.where(met, m_i / LOG2E + jnp.log(l_i), -jnp.inf)
    return merged / jnp.where(met, l_i, 1)[..., None], lse


# --- the kernel --------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """What is static about a call."""

    num_queries: int  # of a row
    group: int  # query heads of a kv head
    shares: int  # parts that the work of a kv head is cut into
    dca: DCAConfig
    phases: tuple[Phase, ...]
    tiles: DecodeTiles


class _Refs(NamedTuple):
    """The kernel's arguments and results, in global memory; as `_attend_shares` has them."""

    layer: Any
    offset: Any
    lengths: Any
    key_offset: Any
    query: Any
    key: Any
    value: Any
    outs: Any
    stats: Any


class _Shared(NamedTuple):
    """Shared memory: tiles, then barriers."""

    query: Any  # [P, columns, H]
    span: Any  # [P, 2, columns] int32: the first slot that each query meets in a phase, and the end
    key: Any  # [num_stages, block, H]
    value: Any  # [num_stages, block, H]
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
    offset: Int[Array, " B"],
    lengths: Int[Array, " B"],
    key_offset: Int[Array, " B"],
    query: Float[Array, "B P K columns H"],
    key: Float[Array, "LB S K H"],
    value: Float[Array, "LB S K H"],
    problem: _Problem,
) -> tuple[Float[Array, "slots K columns H"], Float[Array, "shares B K 2 columns"]]:
    """Each share's part of each row: unnormalised output, and maximum (log2 units) and sum.

    Share n's output for row b lies in slot n + b, which is nobody else's: shares and rows ascend
    together. Where the share has no part in the row, its sum is 0, and the slot is not written.
    """
    batch, num_phases, kv_heads, columns, head_dim = query.shape
    shares, block, num_stages = problem.shares, problem.tiles.block, problem.tiles.num_stages
    dtype, f32 = query.dtype, jnp.float32
    split = len(_Refs._fields)

    def kernel(*refs: Any) -> None:
        gmem, smem = _Refs(*refs[:split]), _Shared(*refs[split:])
        share = _share(gmem, problem)
        pl.when(lax.axis_index("warpgroup") == 1)(lambda: _load(gmem, smem, problem, share))
        pl.when(lax.axis_index("warpgroup") == 0)(lambda: _compute(gmem, smem, problem, share))

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((shares + batch - 1, kv_heads, columns, head_dim), f32),
            jax.ShapeDtypeStruct((shares, batch, kv_heads, 2, columns), f32),
        ),
        # Heads first: CTAs that run at one time read the same rows of the cache.
        grid=(kv_heads, shares),
        grid_names=("head", "share"),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="dca_decode",
        scratch_types=_Shared(
            query=plgpu.SMEM((num_phases, columns, head_dim), dtype),
            span=plgpu.SMEM((num_phases, 2, columns), jnp.int32),
            key=plgpu.SMEM((num_stages, block, head_dim), dtype),
            value=plgpu.SMEM((num_stages, block, head_dim), dtype),
            p=plgpu.SMEM((columns, block), dtype),
            out=plgpu.SMEM((columns, head_dim), f32),
            stat=plgpu.SMEM((2, columns), f32),
            query_ready=plgpu.Barrier(num_arrivals=num_phases),
            key_ready=plgpu.Barrier(num_barriers=num_stages),
            value_ready=plgpu.Barrier(num_barriers=num_stages),
            key_free=plgpu.Barrier(num_barriers=num_stages),
            value_free=plgpu.Barrier(num_barriers=num_stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(layer, offset, lengths, key_offset, query, key, value)


class _Work(NamedTuple):
    """The blocks of keys that a row's queries meet: its units of work, in the order of the phases.

    Attributes:
        firsts: each phase's first block.
        ends: how many units there are up to the end of each phase.
    """

    firsts: list[Array]
    ends: list[Array]

    @classmethod
    def of(cls, first: Array, last: Array, keys: Keys, problem: _Problem) -> "_Work":
        """What the queries of index first .. last meet; nothing if last < first."""
        block = problem.tiles.block
        firsts, ends, end = [], [], jnp.int32(0)
        for phase in problem.phases:
            # Both ends of a phase's keys grow with the query.
            start = keys.slot(key_range(first, phase, problem.dca)[0])
            stop = keys.slot(key_range(last, phase, problem.dca)[1])
            begin = lax.div(start, block)
            count = lax.div(stop + (block - 1), block) - begin
            end = end + jnp.where((last >= first) & (stop > start), count, 0)
            firsts.append(begin)
            ends.append(end)
        return cls(firsts, ends)

    def locate(self, unit: Array) -> tuple[Array, Array]:
        """Number of the phase, and of the block of keys, of one unit."""
        phase, block = jnp.int32(0), unit + self.firsts[0]
        for p in range(1, len(self.firsts)):
            later = unit >= self.ends[p - 1]
            phase = jnp.where(later, jnp.int32(p), phase)
            block = jnp.where(later, unit - self.ends[p - 1] + self.firsts[p], block)
        return phase, block


def _work_of(gmem: _Refs, row: Array, problem: _Problem) -> _Work:
    first = gmem.offset[row]
    last = jnp.minimum(first + problem.num_queries, gmem.lengths[row]) - 1
    return _Work.of(first, last, _keys(gmem, row), problem)


def _keys(gmem: _Refs, row: Array) -> Keys:
    return Keys(gmem.key_offset[row], gmem.key.shape[1])


def _share(gmem: _Refs, problem: _Problem) -> tuple[Array, Array]:
    """[begin, stop) of this share, in units of work of the whole batch, row after row."""
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
    """Calls visit(row, its work, first, last, step) where units first .. last - 1 are the share's.

    `step` is how many units the share has done before. Calls skip(row) where it has no part.
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
    """The warpgroup that keeps keys and values in flight, from row to row without a pause."""
    block, num_stages = problem.tiles.block, problem.tiles.num_stages
    head, batch = lax.axis_index("head"), gmem.offset.shape[0]

    def visit(row: Array, work: _Work, first: Array, last: Array, step: Array) -> None:
        text = gmem.layer[0] * batch + row

        def load(unit: Array, _: None) -> None:
            n = step + unit - first
            slot = lax.rem(n, num_stages)
            keys = (text, pl.ds(work.locate(unit)[1] * block, block), head)
            for source, target, ready, free in (
                (gmem.key, smem.key, smem.key_ready, smem.key_free),
                (gmem.value, smem.value, smem.value_ready, smem.value_free),
            ):
                pl.when(n >= num_stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                plgpu.copy_gmem_to_smem(source.at[keys], target.at[slot], ready.at[slot])

        lax.fori_loop(first, last, load, None)

    _for_each_row(gmem, problem, share, visit, lambda row: None)


def _compute(gmem: _Refs, smem: _Shared, problem: _Problem, share: tuple[Array, Array]) -> None:
    """The warpgroup that computes."""
    head, number = lax.axis_index("head"), lax.axis_index("share")
    columns, head_dim = smem.query.shape[1:]
    num_stages, block = smem.key.shape[:2]

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
            _filled((block, columns), 0, plgpu.Layout.WGMMA),
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
    """Brings a row's queries, and which keys each of them meets, into shared memory."""
    num_phases, columns = smem.query.shape[:2]
    for p in range(num_phases):
        source = gmem.query.at[row, p, lax.axis_index("head")]
        plgpu.copy_gmem_to_smem(source, smem.query.at[p], smem.query_ready)
    column = plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=COLUMNS)
    index = lax.div(column, jnp.int32(problem.group)) + gmem.offset[row]
    is_text = index < gmem.lengths[row]
    for p, phase in enumerate(problem.phases):
        start, stop = map(_keys(gmem, row).slot, key_range(index, phase, problem.dca))
        smem.span[p, 0] = plgpu.layout_cast(start, COLUMNS)
        smem.span[p, 1] = plgpu.layout_cast(jnp.where(is_text, stop, start), COLUMNS)
    plgpu.barrier_wait(smem.query_ready)


def _attend_block(
    smem: _Shared,
    slot: Array,
    phase: Array,
    number: Array,
    state: tuple[
        Float[Array, " columns"], Float[Array, "block columns"], Float[Array, "H columns"]
    ],
) -> tuple:
    """One step of the online softmax, with block `number` of the keys, which lies in `slot`.

    The state: maxima in log2 units, sums of weights, and outputs. A sum is kept in parts, each
    thread's own keys, which are put together after the last block.
    """
    m_i, l_i, acc = state
    block, columns = l_i.shape
    shape = (block, columns)
    across = functools.partial(lax.broadcast_in_dim, broadcast_dimensions=[1])
    start = plgpu.load(smem.span.at[phase, 0], layout=COLUMNS)
    stop = plgpu.load(smem.span.at[phase, 1], layout=COLUMNS)

    plgpu.barrier_wait(smem.key_ready.at[slot])

    def logits_of(acc_ref: Any) -> Array:
        plgpu.wgmma(acc_ref, smem.key.at[slot], smem.query.at[phase].T)
        return acc_ref[...]

    logits = pl.run_scoped(logits_of, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    plgpu.barrier_arrive(smem.key_free.at[slot])

    key = number * block + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
    met = (key >= across(start, shape)) & (key < across(stop, shape))
    logits = jnp.where(met, logits, -jnp.inf)
    m_next = jnp.maximum(m_i, logits.max(axis=0))
    decay = jnp.exp2(m_i - m_next)
    p = jnp.exp2(logits - across(m_next, shape))
    l_i = l_i * across(decay, shape) + p
    acc = acc * across(decay, acc.shape)
    narrow = p.astype(smem.p.dtype)
    smem.p.T[...] = plgpu.layout_cast(narrow, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()

    plgpu.barrier_wait(smem.value_ready.at[slot])

    def add_values(acc_ref: Any) -> None:
        plgpu.wgmma(acc_ref, smem.value.at[slot].T, smem.p.T)

    acc = pl.run_state(add_values)(plgpu.WGMMAAccumulatorRef.init(acc))
    plgpu.barrier_arrive(smem.value_free.at[slot])
    return m_next, l_i, acc


def _filled(shape: tuple[int, ...], value: float, layout: Any) -> Float[Array, "..."]:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
