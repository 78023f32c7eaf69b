"""The backward pass: one kernel for dq, one for dk and dv; no atomics, so it is deterministic.

    S = Q K^T - lse      P = exp2(S)      dP = dO V^T - delta      dS = P * dP
    dQ += dS K           dV += P^T dO     dK += dS^T Q

A query is rotated differently in each phase, and so is its gradient: a CTA of the first kernel has
one tile of queries in one phase, and the phases are rotated back and summed outside. A CTA of the
second has one block of keys and visits the queries that attend to it, phase by phase, for all query
heads of its kv head in turn.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_ampere import warpgroup as wg
from dca_jax.attention.mosaic_ampere.tiles import Tile, choose_tiles
from dca_jax.attention.mosaic_ampere.walks import Place, Plan, Steps
from dca_jax.attention.mosaic_gpu.backward_spans import key_ranges, spans_of
from dca_jax.attention.mosaic_gpu.queries import rotated_queries
from dca_jax.attention.mosaic_gpu.ranges import Keys, Walk, full_and_edge_walks
from dca_jax.attention.softmax import LOG2E, MASKED
from dca_jax.dca import DCAConfig, Phase, query_position
from dca_jax.device import current_device
from dca_jax.rope import rotate


class Inputs(NamedTuple):
    """The kernels' arguments, in global memory; R rows of queries, whole tiles."""

    query: Any  # [P, B, R, N, H], rotated for each phase
    do: Any  # [B, R, N, H]
    key: Any  # [L * B, S, K, H]
    value: Any
    minus_lse: Any  # [B, N, R], log2 units
    minus_delta: Any  # [B, N, R]
    low: Any  # [B, P, R]: first slot of each query's keys in a phase
    high: Any  # [B, P, R]: end of each query's keys
    cache_row: Any  # [B]: of keys and values
    spans: Any  # of `Plan`, for the kernel


class Problem(NamedTuple):
    """Static parameters of a kernel."""

    tile: Tile
    group: int  # query heads per kv head
    plan: Plan


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    do: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of query, key (rotated) and value; as `Backend.backward`."""
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[2:4]
    group, tiles = heads // kv_heads, choose_tiles(current_device(), head_dim)
    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    multiple = math.lcm(tiles.dq.block_q, tiles.dkv.block_q)
    low, high = key_ranges(index, rows, num_keys, multiple, dca, phases)
    padding = (0, low.shape[2] - num_queries)
    of_tokens = (0, 0), padding, (0, 0), (0, 0)
    rotated = [jnp.pad(x, of_tokens) for x in rotated_queries(query, rows, dca, phases)]
    # A query without keys has log-sum-exp -inf; its weights are exp2(MASKED) = 0.
    minus_lse = jnp.where(jnp.isfinite(lse), lse * jnp.float32(-LOG2E), MASKED)
    inputs = Inputs(
        query=jnp.stack(rotated),
        do=jnp.pad(do.astype(query.dtype), of_tokens),
        key=key.reshape(-1, *key.shape[2:]),
        value=value.reshape(-1, *value.shape[2:]),
        minus_lse=jnp.pad(minus_lse, ((0, 0), (0, 0), padding), constant_values=MASKED),
        minus_delta=jnp.pad(-delta, ((0, 0), (0, 0), padding)),
        low=low,
        high=high,
        cache_row=layer.astype(jnp.int32) * batch + jnp.arange(batch, dtype=jnp.int32),
        spans=None,
    )
    plan = _plan_of_queries(index, rows, num_keys, tiles.dq, dca, phases)
    dqs = _launch_dq(inputs, Problem(tiles.dq, group, plan))
    plan = _plan_of_keys(low, high, num_keys, tiles.dkv)
    dk, dv = _launch_dkv(inputs, Problem(tiles.dkv, group, plan))
    dq = jnp.zeros(query.shape, jnp.float32)
    for of_phase, phase in zip(dqs, phases, strict=True):
        back = -query_position(index, phase, dca)
        dq += rotate(of_phase[:, :num_queries], back, rows.inv_freq)
    return (dq * rows.scale[:, None, None, None]).astype(query.dtype), dk, dv


def _plan_of_queries(
    index: Int[Array, "B T"],
    rows: Rows,
    num_keys: int,
    tile: Tile,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> Plan:
    """The blocks of keys of each tile of queries in each phase, as a CTA each: phases first."""
    first = index[:, :: tile.block_q]
    last = jnp.minimum(first + (tile.block_q - 1), index[:, -1:])
    last = jnp.minimum(last, rows.lengths[:, None] - 1)
    keys = Keys(rows.key_offset[:, None], num_keys)
    walks = []
    for phase in phases:
        full, edges = full_and_edge_walks(first, last, (phase,), dca, keys, tile.block_k)
        walks.append(jax.tree.leaves([(walk.start, walk.count) for walk in (*full, *edges)]))
    numbers = [jnp.concatenate(x, axis=1) for x in zip(*walks, strict=True)]
    spans = [Walk(0, *numbers[n : n + 2]) for n in range(0, len(numbers), 2)]
    return Plan.of(spans[:1], spans[1:])


def _plan_of_keys(
    low: Int[Array, "B phases R"], high: Int[Array, "B phases R"], num_keys: int, tile: Tile
) -> Plan:
    """The tiles of queries of each block of keys."""
    bounds = spans_of(low, high, num_keys, tile.block_q, tile.block_k)
    full, edges = [], []
    for phase in range(low.shape[1]):
        stop, full_stop, full_start, _, start, _ = (bounds[:, :, 6 * phase + n] for n in range(6))
        full.append(Walk(phase, full_start, full_stop - full_start))
        edges.append(Walk(phase, start, full_start - start))
        edges.append(Walk(phase, full_stop, stop - full_stop))
    return Plan.of(full, edges)


# --- dq ----------------------------------------------------------------------------------------


class _QueryShared(NamedTuple):
    """Shared memory of the kernel for dq."""

    query: Any  # [block_q, H]
    do: Any  # [block_q, H]
    key: Any  # [2, block_k, H]
    value: Any  # [2, block_k, H]


def _launch_dq(inputs: Inputs, problem: Problem) -> Float[Array, "P B R N H"]:
    """Gradients of the rotated queries, before the logit scale."""
    num_phases, batch, _, heads, head_dim = inputs.query.shape
    tile, dtype = problem.tile, inputs.key.dtype
    shapes = [(tile.block_q, head_dim)] * 2 + [(2, tile.block_k, head_dim)] * 2
    tiles = problem.plan.spans.shape[1] // num_phases

    def kernel(*refs: Any) -> None:
        gmem, out, smem = Inputs(*refs[:10]), refs[10], _QueryShared(*refs[11:])
        number = tiles - 1 - lax.axis_index("tile")
        _dq(gmem, out, smem, problem, number, tiles)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(inputs.query.shape, jnp.float32),
        grid=(heads, tiles, num_phases, batch),
        grid_names=("head", "tile", "phase", "batch"),
        kernel_name="dca_ampere_dq",
        scratch_types=[wg.shared(shape, dtype) for shape in shapes],
        compiler_params=wg.PARAMS,
    )(*inputs._replace(spans=problem.plan.spans))


def _dq(
    gmem: Inputs, out: Any, smem: _QueryShared, problem: Problem, tile: Array, tiles: int
) -> None:
    batch, phase, head = (lax.axis_index(name) for name in ("batch", "phase", "head"))
    block_q, block_k = problem.tile.block_q, problem.tile.block_k
    num_keys, head_dim = gmem.key.shape[1], gmem.key.shape[3]
    rows = pl.ds(tile * block_q, block_q)
    plan = problem.plan
    steps = Steps(gmem.spans.at[batch, phase * tiles + tile], plan.phases, plan.full)
    num_full, total = steps.count()

    def fetch(n: Array, place: Place) -> None:
        kv_head = lax.div(head, jnp.int32(problem.group))
        for source, target in ((gmem.key, smem.key), (gmem.value, smem.value)):
            source = source.at[gmem.cache_row[batch], :, kv_head]
            to = target.at[lax.rem(n, jnp.int32(2))]
            wg.fetch(source, to, (n + place.shift) * block_k, num_keys)

    def of_rows(ref: Any) -> Array:
        return wg.of_rows(wg.load(ref, wg.PER_ROW), block_k)

    def step(n: Array, state: tuple[Place, Array], *, edge: bool) -> tuple[Place, Array]:
        place, acc = state
        wg.arrive()
        following = place.next(n + 1, steps)
        pl.when(n + 1 < total)(lambda: fetch(n + 1, following))
        slot = lax.rem(n, jnp.int32(2))
        key, value = smem.key.at[slot], smem.value.at[slot]
        logits = wg.add_product(of_rows(gmem.minus_lse.at[batch, head, rows]), smem.query, key)
        if edge:
            low, high = (of_rows(x.at[batch, phase, rows]) for x in (gmem.low, gmem.high))
            logits = wg.masked(logits, low, high, (n + place.shift) * block_k, 1)
        dp = wg.add_product(of_rows(gmem.minus_delta.at[batch, head, rows]), smem.do, value)
        ds = jnp.exp2(logits) * dp
        return following, wg.add_weighted(acc, ds.astype(gmem.key.dtype), key)

    first = Place.of(jnp.int32(0), steps)

    @pl.when(total > 0)
    def _start() -> None:
        for source, target in ((gmem.query.at[phase], smem.query), (gmem.do, smem.do)):
            wg.fetch(source.at[batch, :, head], target, rows.start, gmem.do.shape[1])
        fetch(jnp.int32(0), first)

    state = first, wg.splat((block_q, head_dim), 0.0)
    state = lax.fori_loop(jnp.int32(0), num_full, functools.partial(step, edge=False), state)
    _, acc = lax.fori_loop(num_full, total, functools.partial(step, edge=True), state)
    out[phase, batch, rows, head] = acc


# --- dk and dv ---------------------------------------------------------------------------------


class _KeyShared(NamedTuple):
    """Shared memory of the kernel for dk and dv."""

    key: Any  # [block_k, H]
    value: Any  # [block_k, H]
    query: Any  # [2, block_q, H]
    do: Any  # [2, block_q, H]


def _launch_dkv(
    inputs: Inputs, problem: Problem
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    batch, tile, dtype = inputs.do.shape[0], problem.tile, inputs.key.dtype
    num_keys, kv_heads, head_dim = inputs.key.shape[1:]
    blocks, parts = problem.plan.spans.shape[1], head_dim // tile.columns(head_dim)
    shapes = [(tile.block_k, head_dim)] * 2 + [(2, tile.block_q, head_dim)] * 2

    def kernel(*refs: Any) -> None:
        gmem, out, smem = Inputs(*refs[:10]), refs[10:12], _KeyShared(*refs[12:])
        part = lax.rem(lax.axis_index("block"), jnp.int32(parts))
        block = lax.div(lax.axis_index("block"), jnp.int32(parts))
        _dkv(gmem, out, smem, problem, block, part)

    # Whole blocks.
    dkv = jax.ShapeDtypeStruct((batch, blocks * tile.block_k, kv_heads, head_dim), dtype)
    dk, dv = plgpu.kernel(
        kernel,
        out_type=(dkv, dkv),
        # The first blocks, with the most queries, go first.
        grid=(kv_heads, blocks * parts, batch),
        grid_names=("head", "block", "batch"),
        kernel_name="dca_ampere_dkv",
        scratch_types=[wg.shared(shape, dtype) for shape in shapes],
        compiler_params=wg.PARAMS,
    )(*inputs._replace(spans=problem.plan.spans))
    return dk[:, :num_keys], dv[:, :num_keys]


def _dkv(
    gmem: Inputs, out: Any, smem: _KeyShared, problem: Problem, block: Array, part: Array
) -> None:
    """Products are transposed, [keys, queries], to be left operands of those with queries."""
    batch, kv_head = lax.axis_index("batch"), lax.axis_index("head")
    block_q, block_k = problem.tile.block_q, problem.tile.block_k
    num_keys, head_dim = gmem.key.shape[1], gmem.key.shape[3]
    group, plan = problem.group, problem.plan
    width = problem.tile.columns(head_dim)
    columns = pl.ds(part * width, width)
    steps = Steps(gmem.spans.at[batch, block], plan.phases, plan.full)
    num_full, total = steps.count()

    def of_visit(n: Array, place: Place) -> tuple[Array, Any]:
        """Query head and queries of visit n; a step is one visit for each head of the group."""
        head = kv_head * group + lax.rem(n, jnp.int32(group))
        tile = lax.div(n, jnp.int32(group)) + place.shift
        return head, pl.ds(tile * block_q, block_q)

    def fetch(n: Array, place: Place) -> None:
        head, rows = of_visit(n, place)
        slot = lax.rem(n, jnp.int32(2))
        for source, target in ((gmem.query.at[place.phase], smem.query), (gmem.do, smem.do)):
            source = source.at[batch, :, head]
            wg.fetch(source, target.at[slot], rows.start, gmem.do.shape[1])

    def of_columns(ref: Any) -> Array:
        return wg.of_columns(wg.load(ref, wg.PER_COLUMN), block_k)

    def visit(n: Array, state: tuple[Place, Array, Array], *, edge: bool) -> tuple:
        place, dk, dv = state
        wg.arrive()
        following = place.next(lax.div(n + 1, jnp.int32(group)), steps)
        pl.when(n + 1 < total * group)(lambda: fetch(n + 1, following))
        (head, rows), slot = of_visit(n, place), lax.rem(n, jnp.int32(2))
        query, do = smem.query.at[slot], smem.do.at[slot]
        logits = of_columns(gmem.minus_lse.at[batch, head, rows])
        logits = wg.add_product(logits, smem.key, query)
        if edge:
            low, high = (of_columns(x.at[batch, place.phase, rows]) for x in (gmem.low, gmem.high))
            logits = wg.masked(logits, low, high, block * block_k, 0)
        p = jnp.exp2(logits)
        dv = wg.add_weighted(dv, p.astype(do.dtype), do.at[:, columns])
        dp = of_columns(gmem.minus_delta.at[batch, head, rows])
        ds = p * wg.add_product(dp, smem.value, do)
        dk = wg.add_weighted(dk, ds.astype(do.dtype), query.at[:, columns])
        return following, dk, dv

    first = Place.of(jnp.int32(0), steps)

    @pl.when(total > 0)
    def _start() -> None:
        for source, target in ((gmem.key, smem.key), (gmem.value, smem.value)):
            source = source.at[gmem.cache_row[batch], :, kv_head]
            wg.fetch(source, target, block * block_k, num_keys)
        fetch(jnp.int32(0), first)

    zeros = wg.splat((block_k, width), 0.0)
    middle, end = num_full * group, total * group
    state = first, zeros, zeros
    state = lax.fori_loop(jnp.int32(0), middle, functools.partial(visit, edge=False), state)
    _, dk, dv = lax.fori_loop(middle, end, functools.partial(visit, edge=True), state)
    at = batch, pl.ds(block * block_k, block_k), kv_head, columns
    # The rotated queries include log2(e), and their scale is that of the logits' derivative.
    out[0][at] = (dk * math.log(2)).astype(out[0].dtype)
    out[1][at] = dv.astype(out[1].dtype)
