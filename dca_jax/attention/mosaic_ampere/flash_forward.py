"""The forward pass: one flash-attention kernel for any of DCA's phases together, and for decoding.

A CTA is one warpgroup with `block_q` queries of one head. It walks the blocks of keys that they
attend to, those that need no mask first, and loads the next block while it computes on one.
Queries are rotated outside the kernel, once for each phase, and fetched again where the phase
changes, which is a few times per tile.

Few queries (decoding): those that share a kv head are packed into one tile, and its blocks of keys
are split over CTAs, whose outputs are merged by their log-sum-exp.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_ampere import warpgroup as wg
from dca_jax.attention.mosaic_ampere.tiles import Tile, choose_tiles, is_packed, splits_of_keys
from dca_jax.attention.mosaic_ampere.walks import Place, Plan, Steps
from dca_jax.attention.mosaic_gpu.backward_spans import key_ranges
from dca_jax.attention.mosaic_gpu.queries import rotated_queries
from dca_jax.attention.mosaic_gpu.ranges import Keys, full_and_edge_walks
from dca_jax.attention.softmax import FAR, LOG2E, MASKED
from dca_jax.dca import DCAConfig, Phase
from dca_jax.device import current_device


class Problem(NamedTuple):
    """Static parameters of a call."""

    tile: Tile
    num_keys: int  # keys per row
    group: int  # query heads per kv head, if they are separate
    splits: int  # CTAs among which a tile's keys are split
    page: int | None  # tokens per page; None if a row's keys are contiguous
    plan: Plan


class Inputs(NamedTuple):
    """The kernel's arguments, in global memory; R rows of queries, whole tiles."""

    query: Any  # [P, B, R, N, H], rotated for each phase
    key: Any  # [L * B, S, K, H]; or a pool [L * P, page, K, H]
    value: Any
    low: Any  # [B, P, R]: first slot of each query's keys in a phase
    high: Any  # [B, P, R]: end of each query's keys
    spans: Any  # of `Plan`, a CTA for each tile
    cache_row: Any  # [B]: of keys and values; with pages, the pool's first page of the layer
    pages: Any  # [B, pages per row]; or None


class Outputs(NamedTuple):
    """The kernel's results, in global memory."""

    out: Any  # [splits, B, R, N, H]
    lse: Any  # [splits, B, N, R], natural


class Shared(NamedTuple):
    """Shared memory."""

    query: Any  # [block_q, H]
    key: Any  # [2, block_k, H]
    value: Any  # [2, block_k, H]


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L R S K H"],
    value: Float[Array, "L R S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    pages: Int[Array, "B pages_per_row"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Output and natural log-sum-exp over the keys of `phases`; as `Backend.forward`."""
    batch, num_queries, heads, head_dim = query.shape
    num_rows, capacity, kv_heads = key.shape[1:4]
    group, num_keys = heads // kv_heads, capacity if pages is None else capacity * pages.shape[1]
    tiles = choose_tiles(current_device(), head_dim)
    packed = is_packed(num_queries, group)
    tile, pack = (tiles.decode, group) if packed else (tiles.forward, 1)
    splits = splits_of_keys(batch * kv_heads, num_keys) if packed else 1

    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    rotated = jnp.stack(rotated_queries(query, rows, dca, phases))
    index, rotated = jnp.repeat(index, pack, axis=1), _pack(rotated, pack)
    missing = -index.shape[1] % tile.block_q
    low, high = key_ranges(index, rows, num_keys, tile.block_q, dca, phases)
    rotated = jnp.pad(rotated, ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0)))
    first = index[:, :: tile.block_q]
    last = jnp.minimum(first + (tile.block_q - 1) // pack, rows.offset[:, None] + num_queries - 1)
    last = jnp.minimum(last, rows.lengths[:, None] - 1)
    keys = Keys(rows.key_offset[:, None], num_keys)
    full, edges = full_and_edge_walks(first, last, phases, dca, keys, tile.block_k)
    plan = Plan.of(full, edges)
    inputs = Inputs(
        query=rotated,
        key=key.reshape(-1, *key.shape[2:]),
        value=value.reshape(-1, *value.shape[2:]),
        low=low,
        high=high,
        spans=plan.spans,
        cache_row=_cache_rows(layer, num_rows, batch, pages),
        pages=pages,
    )
    page = None if pages is None else capacity
    problem = Problem(tile, num_keys, 1 if packed else group, splits, page, plan)
    out, lse = _launch(inputs, problem, query.dtype)
    out, lse = _merge(out, lse) if splits > 1 else (out[0], lse[0])
    used = num_queries * pack
    out, lse = _unpack(out[:, :used], lse[:, :, :used], pack)
    return out.astype(query.dtype), lse


def _cache_rows(
    layer: Int[Array, ""], num_rows: int, batch: int, pages: Array | None
) -> Int[Array, " B"]:
    """The index of each row's keys among all layers'; with pages, that of the layer's first."""
    row = jnp.arange(batch, dtype=jnp.int32)
    return layer.astype(jnp.int32) * num_rows + (row if pages is None else 0 * row)


def _pack(query: Float[Array, "P B T N H"], pack: int) -> Float[Array, "P B R M H"]:
    """Heads that share a kv head as adjacent rows."""
    *most, num_queries, heads, head_dim = query.shape
    apart = query.reshape(*most, num_queries, heads // pack, pack, head_dim)
    return jnp.swapaxes(apart, 3, 4).reshape(*most, num_queries * pack, heads // pack, head_dim)


def _unpack(
    out: Float[Array, "B R M H"], lse: Float[Array, "B M R"], pack: int
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    batch, rows, heads, head_dim = out.shape
    out = jnp.swapaxes(out.reshape(batch, rows // pack, pack, heads, head_dim), 2, 3)
    lse = jnp.swapaxes(lse.reshape(batch, heads, rows // pack, pack), 2, 3)
    return (
        out.reshape(batch, rows // pack, heads * pack, head_dim),
        lse.reshape(batch, heads * pack, rows // pack),
    )


def _merge(
    outs: Float[Array, "splits B R N H"], lses: Float[Array, "splits B N R"]
) -> tuple[Float[Array, "B R N H"], Float[Array, "B N R"]]:
    """Merges the splits by their log-sum-exp; a query without keys keeps 0 and -inf."""
    m_i = jnp.maximum(lses.max(axis=0), MASKED)
    p = jnp.exp(lses - m_i[None])
    l_i = p.sum(axis=0)
    met = l_i > 0
    l_i = jnp.where(met, l_i, 1.0)
    weights = jnp.swapaxes(p / l_i[None], 2, 3)[..., None]
    return (weights * outs).sum(axis=0), jnp.where(met, m_i + jnp.log(l_i), -jnp.inf)


def _launch(inputs: Inputs, problem: Problem, dtype: jnp.dtype) -> Outputs:
    _, batch, rows, heads, head_dim = inputs.query.shape
    tile, splits = problem.tile, problem.splits
    out_type = Outputs(
        jax.ShapeDtypeStruct(
            (splits, batch, rows, heads, head_dim), dtype if splits == 1 else jnp.float32
        ),
        jax.ShapeDtypeStruct((splits, batch, heads, rows), jnp.float32),
    )
    operand = inputs.key.dtype
    scratch = Shared(
        wg.shared((tile.block_q, head_dim), operand),
        wg.shared((2, tile.block_k, head_dim), operand),
        wg.shared((2, tile.block_k, head_dim), operand),
    )
    given = jax.tree.leaves(inputs)  # without pages that are None
    tree = jax.tree.structure((inputs, *out_type, scratch))

    def kernel(*refs: Any) -> None:
        gmem, out, lse, smem = jax.tree.unflatten(tree, refs)
        _attend(gmem, Outputs(out, lse), smem, problem)

    return Outputs(
        *plgpu.kernel(
            kernel,
            out_type=tuple(out_type),
            grid=(heads, splits * (rows // tile.block_q), batch),
            grid_names=("head", "tile", "batch"),
            kernel_name="dca_ampere_forward",
            scratch_types=tuple(scratch),
            compiler_params=wg.PARAMS,
        )(*given)
    )


# --- the kernel --------------------------------------------------------------------------------


class _CTA(NamedTuple):
    """A CTA's work, and references to its data."""

    gmem: Inputs
    smem: Shared
    problem: Problem
    batch: Array
    head: Array
    rows: Any  # its queries
    steps: Steps
    end: Array  # the step after its last one


class _State(NamedTuple):
    """An online softmax, in registers; maxima in log2 units."""

    rotated: Array  # the phase for which the queries in shared memory are rotated
    place: Place  # of the step to come
    m_i: Float[Array, " block_q"]
    l_i: Float[Array, " block_q"]
    acc: Float[Array, "block_q H"]


def _attend(gmem: Inputs, outputs: Outputs, smem: Shared, problem: Problem) -> None:
    tile, splits = problem.tile, problem.splits
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    # Tiles with the most work go first, so that the last ones are short.
    number = gmem.spans.shape[1] * splits - 1 - lax.axis_index("tile")
    at, split = lax.div(number, jnp.int32(splits)), lax.rem(number, jnp.int32(splits))
    rows = pl.ds(at * tile.block_q, tile.block_q)
    steps = Steps(gmem.spans.at[batch, at], problem.plan.phases, problem.plan.full)
    num_full, total = steps.count()
    share = lax.div(total + (splits - 1), jnp.int32(splits))
    begin = jnp.minimum(split * share, total)
    end = jnp.minimum(begin + share, total)
    cta = _CTA(gmem, smem, problem, batch, head, rows, steps, end)
    state = _State(
        jnp.int32(-1),
        Place.of(begin, steps),
        wg.splat((tile.block_q,), MASKED, wg.PER_ROW),
        wg.splat((tile.block_q,), 0.0, wg.PER_ROW),
        wg.splat((tile.block_q, smem.query.shape[1]), 0.0),
    )
    pl.when(begin < end)(lambda: _fetch_keys(cta, begin, state.place))
    middle = jnp.clip(num_full, begin, end)
    state = lax.fori_loop(begin, middle, functools.partial(_step, cta, edge=False), state)
    state = lax.fori_loop(middle, end, functools.partial(_step, cta, edge=True), state)
    _write(cta, outputs, split, state)


def _fetch_keys(cta: _CTA, n: Array, place: Place) -> None:
    """Starts copying the keys and values of step n."""
    gmem, problem = cta.gmem, cta.problem
    first, limit = (n + place.shift) * problem.tile.block_k, jnp.int32(problem.num_keys)
    row, head = gmem.cache_row[cta.batch], lax.div(cta.head, jnp.int32(problem.group))
    if problem.page is not None:  # a block lies within a page
        size = jnp.int32(problem.page)
        row = row + gmem.pages[cta.batch, lax.div(first, size)]
        first, limit = lax.rem(first, size), size
    slot = lax.rem(n, jnp.int32(2))
    for source, target in ((gmem.key, cta.smem.key), (gmem.value, cta.smem.value)):
        wg.fetch(source.at[row, :, head], target.at[slot], first, limit)


def _step(cta: _CTA, n: Array, state: _State, *, edge: bool) -> _State:
    """Attention to the block of keys of step n, whose copies are under way."""
    gmem, smem, tile, place = cta.gmem, cta.smem, cta.problem.tile, state.place
    wg.arrive()

    @pl.when(place.phase != state.rotated)
    def _rotate() -> None:
        source = gmem.query.at[place.phase, cta.batch, :, cta.head]
        wg.fetch(source, smem.query, cta.rows.start, gmem.query.shape[2])
        wg.arrive()

    following = place.next(n + 1, cta.steps)
    pl.when(n + 1 < cta.end)(lambda: _fetch_keys(cta, n + 1, following))
    slot = lax.rem(n, jnp.int32(2))
    logits = wg.add_product(
        wg.splat((tile.block_q, tile.block_k), 0.0), smem.query, smem.key.at[slot]
    )
    if edge:
        low, high = (
            wg.of_rows(wg.load(x.at[cta.batch, place.phase, cta.rows], wg.PER_ROW), tile.block_k)
            for x in (gmem.low, gmem.high)
        )
        logits = wg.masked(logits, low, high, (n + place.shift) * tile.block_k, 1)
    m_i = jnp.maximum(state.m_i, logits.max(axis=1))
    p = jnp.exp2(logits - wg.of_rows(m_i, tile.block_k))
    decay = jnp.exp2(state.m_i - m_i)
    l_i = state.l_i * decay + p.sum(axis=1)
    acc = state.acc * wg.of_rows(decay, state.acc.shape[1])
    acc = wg.add_weighted(acc, p.astype(smem.value.dtype), smem.value.at[slot])
    return _State(place.phase, following, m_i, l_i, acc)


def _write(cta: _CTA, outputs: Outputs, split: Array, state: _State) -> None:
    """Writes output and log-sum-exp; 0 and -inf for queries without keys and padding."""
    # Full blocks are not masked for padding either, but its ranges begin at FAR.
    is_text = wg.load(cta.gmem.low.at[cta.batch, 0, cta.rows], wg.PER_ROW) < FAR
    met = (state.l_i > 0) & is_text
    l_i = jnp.where(met, state.l_i, 1.0)
    out = state.acc * wg.of_rows(jnp.where(met, 1 / l_i, 0.0), state.acc.shape[1])
    at = split, cta.batch
    outputs.out[*at, cta.rows, cta.head] = out.astype(outputs.out.dtype)
    lse = jnp.where(met, (state.m_i + jnp.log2(l_i)) / LOG2E, -jnp.inf)
    outputs.lse[*at, cta.head, cta.rows] = lse
