"""The forward pass on Hopper: one flash-attention kernel for any of DCA's phases together.

A CTA takes 128 queries of one head: two warpgroups compute, 64 queries each, and a third feeds
them keys and values through the bulk copy engine. The query is rotated once for each phase, in the
kernel, and all its rotations stay in shared memory where they fit; so walking from one phase's keys
to the next costs nothing, and DCA does the work of plain causal attention.

Two query heads of one kv head form a cluster, which reads every block of keys once for both.

It also attends to one band of another method (`band_forward`), whose queries and keys come rotated.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from dca_jax.attention.backend import KeyBlocks, Rows
from dca_jax.attention.blocks import BLOCK
from dca_jax.attention.mosaic_gpu.forward_cta import CTA, Problem, Refs, Shared
from dca_jax.attention.mosaic_gpu.forward_feed import feed
from dca_jax.attention.mosaic_gpu.forward_queries import (
    PER_QUERY,
    Queries,
    fetch,
    place_band,
    place_rotations,
)
from dca_jax.attention.mosaic_gpu.forward_tiles import (
    BLOCK_Q,
    LIST_TILES,
    TILES,
    WARPGROUP_Q,
    WARPGROUPS,
    ForwardTiles,
)
from dca_jax.attention.mosaic_gpu.queries import pad_tokens, rotated_queries, rotation_tables
from dca_jax.attention.mosaic_gpu.ranges import (
    Walk,
    locate,
    recall,
    steps,
)
from dca_jax.attention.mosaic_gpu.vote import any_in_warp, any_in_warpgroup
from dca_jax.attention.softmax import LOG2E, MASKED
from dca_jax.dca import DCAConfig, Phase
from dca_jax.errors import InputError

# A query's maximum may lag behind by this much, in log2 units, before the accumulator is rescaled:
# weights stay below 2^8, which float16 holds and float32 sums exactly enough.
SLACK = 8.0


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L R S K H"],
    value: Float[Array, "L R S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    with_lse: bool,
    blocks: KeyBlocks | None = None,
    pages: Int[Array, "B pages_per_row"] | None = None,
    tiles: ForwardTiles | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """Output and natural log-sum-exp over the keys of `phases`; as `Backend.forward`."""
    if blocks is not None:
        if blocks.skip is not None and LIST_TILES[query.shape[3]].block_k != BLOCK:
            raise InputError(
                f"skip-softmax on a Hopper GPU takes heads of 64 or 128, got {query.shape[3]}; "
                "choose another --sparse"
            )
        options = {"dca": dca, "phases": phases, "with_lse": with_lse, "pages": pages}
        return _by_tiles_of_the_text(query, key, value, layer, rows, blocks, tiles, **options)
    tiles = tiles or _tiles_for(query.shape[3], None if pages is None else key.shape[2])
    return _launch(query, key, value, layer, rows, dca, phases, with_lse, None, pages, tiles)


def _tiles_for(head_dim: int, page: int | None) -> ForwardTiles:
    """The tiles of the dense kernel: through pages, those of which no block lies in two."""
    tiles = TILES[head_dim]
    return tiles if page is None or page % tiles.block_k == 0 else LIST_TILES[head_dim]


def _by_tiles_of_the_text(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L R S K H"],
    value: Float[Array, "L R S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    blocks: KeyBlocks,
    tiles: ForwardTiles | None,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    with_lse: bool,
    pages: Int[Array, "B pages_per_row"] | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """Over lists: the queries are moved so that tiles begin at multiples of 128 of the text."""
    num_queries, num_tiles = query.shape[1], blocks.counts.shape[2]
    shift = rows.offset % BLOCK
    moved = jnp.pad(query, ((0, 0), (BLOCK, num_tiles * BLOCK), (0, 0), (0, 0)))
    moved = _cut(moved, BLOCK - shift, num_tiles * BLOCK)
    lengths = jnp.minimum(rows.lengths, rows.offset + num_queries)
    at = rows._replace(offset=rows.offset - shift, lengths=lengths)
    tiles = tiles or LIST_TILES[query.shape[3]]
    out, lse = _launch(moved, key, value, layer, at, dca, phases, with_lse, blocks, pages, tiles)
    if lse is not None:
        lse = jnp.swapaxes(_cut(jnp.swapaxes(lse, 1, 2), shift, num_queries), 1, 2)
    return _cut(out, shift, num_queries), lse


def _cut(x: Num[Array, "B S ..."], start: Int[Array, " B"], size: int) -> Num[Array, "B T ..."]:
    """`size` tokens of each row from `start` on."""
    return jax.vmap(lambda row, at: lax.dynamic_slice_in_dim(row, at, size))(x, start)


def _launch(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L R S K H"],
    value: Float[Array, "L R S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    with_lse: bool,
    blocks: KeyBlocks | None,
    pages: Int[Array, "B pages_per_row"] | None,
    tiles: ForwardTiles,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    batch, num_queries, heads, head_dim = query.shape
    num_rows, num_keys, kv_heads = key.shape[1:4]
    num_tiles = -(-num_queries // BLOCK_Q)
    if tiles.registers % 64 or tiles.registers > head_dim:
        raise InputError(f"{tiles} must hold a multiple of 64 of the {head_dim} columns")
    cluster = tiles.cluster if (heads // kv_heads) % tiles.cluster == 0 else 1
    if key.shape[2] % 8:  # to be padded: then at least of one layer only
        key, value, layer = key[layer][None], value[layer][None], jnp.int32(0)
    key, value = (pad_tokens(x.reshape(-1, *x.shape[2:]), 1) for x in (key, value))
    if tiles.resident:
        tables = rotation_tables(rows, dca, num_tiles * BLOCK_Q)
    else:
        tables, query = (), jnp.stack(rotated_queries(query, rows, dca, phases))
    query = pad_tokens(query, query.ndim - 3)
    cache_row = layer * num_rows + jnp.arange(batch, dtype=jnp.int32)
    page = None
    if pages is not None:
        cache_row, page = jnp.full_like(cache_row, layer * num_rows), num_keys
        num_keys = pages.shape[1] * page
    place = jnp.stack([cache_row, cache_row, rows.offset, rows.lengths, rows.key_offset], axis=1)
    rotations = len(phases) if tiles.resident else 1
    group = heads // kv_heads
    problem = Problem(num_keys, group, cluster, dca, phases, tiles, page, rotations)
    given = Refs(query, key, value, place, tables, blocks, pages, None, None, None)
    return launch(problem, given, num_queries, with_lse)


def launch(
    problem: Problem, given: Refs, num_queries: int, with_lse: bool
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """Runs the kernel on what is given, to which it adds its results; as `Backend.forward`."""
    query = jax.tree.leaves(given)[0]
    batch, _, heads, _ = query.shape[-4:]
    num_tiles, cluster = -(-num_queries // BLOCK_Q), problem.cluster
    out = jax.ShapeDtypeStruct(query.shape[-4:], query.dtype)
    # Whole tiles: a copy out of one row of an array is not cut off at the row's end.
    lse = jax.ShapeDtypeStruct((batch, heads, num_tiles * BLOCK_Q), jnp.float32)
    out_type = (out, lse) if with_lse else (out,)
    # What is None takes no argument.
    refs = given._replace(out=out, lse=lse if with_lse else None)
    out, *lse = plgpu.kernel(
        functools.partial(_kernel, problem, jax.tree.structure(refs)),
        out_type=out_type,
        grid=(heads // cluster, num_tiles, batch),
        grid_names=("heads", "tile", "batch"),
        cluster=(cluster,),
        cluster_names=("pair",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="dca_forward",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,  # maxima and sums are taken within a warp
        ),
    )(*jax.tree.leaves(given))
    return out[:, :num_queries], lse[0][:, :, :num_queries] if with_lse else None


# --- the kernel --------------------------------------------------------------------------------


def _kernel(problem: Problem, tree: Any, *refs: Any) -> None:
    gmem: Refs = jax.tree.unflatten(tree, refs)
    num_queries, _, head_dim = gmem.out.shape[1:]
    batch = lax.axis_index("batch")
    head = lax.axis_index("heads") * problem.cluster + lax.axis_index("pair")
    # The tiles with most work first: what is left at the end is short.
    tile = pl.cdiv(num_queries, BLOCK_Q) - 1 - lax.axis_index("tile")

    def body(smem: Shared) -> None:
        cta = CTA(problem, gmem, smem, batch, head, tile)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup < WARPGROUPS)(lambda: _compute(cta, warpgroup))
        pl.when(warpgroup == WARPGROUPS)(lambda: feed(cta))

    shared = Shared.types(problem, gmem.out.dtype, head_dim)
    pl.run_scoped(body, shared, collective_axes="warpgroup")


# --- the warpgroups that compute ---------------------------------------------------------------


class _Softmax(NamedTuple):
    """The state of an online softmax, in registers; maxima in log2 units.

    `m_i` is what weights are relative to, which may lag behind the largest logit by SLACK;
    `largest` is that logit, and only known where small blocks are passed by.
    """

    acc: Float[Array, "queries H"]
    m_i: Float[Array, " queries"]
    l_i: Float[Array, " queries"]
    largest: Float[Array, " queries"] | None


def _compute(cta: CTA, warpgroup: Array) -> None:
    """Attention of a warpgroup's queries: first to blocks met in full, then to the edges."""
    plgpu.set_max_registers(232, action="increase")
    smem = cta.smem
    queries = Queries(cta, warpgroup, cta.tile * BLOCK_Q + warpgroup * WARPGROUP_Q)
    if cta.problem.dca is None:
        place_band(queries)
    elif cta.problem.tiles.resident:
        place_rotations(queries)

    plgpu.barrier_wait(smem.planned)
    full, edges = recall(smem.walks)
    num_full, num_steps = steps(full), steps(full + edges)
    pl.when(num_steps > 0)(lambda: plgpu.barrier_wait(smem.k_loaded.at[0]))
    pl.when(warpgroup == 1)(lambda: _switch(smem))
    state = _attend_full(queries, full, num_steps)
    state = _attend_edges(queries, state, num_full, num_steps)
    pl.when(warpgroup == 0)(lambda: _switch(smem))
    _write(queries, state)


def _switch(smem: Shared) -> None:
    """Leaves the tensor cores to the other warpgroup, until it leaves them to this one."""
    plgpu.barrier_arrive(smem.ping_pong)
    plgpu.barrier_wait(smem.ping_pong)


def _attend_full(queries: Queries, full: list[Walk], num_steps: Array) -> _Softmax:
    """Through the blocks of keys, phase by phase, that all the tile's queries meet."""
    tiles, head_dim = queries.cta.problem.tiles, queries.cta.smem.q.shape[-1]
    skip = _skip(queries)
    state = _Softmax(
        _splat((WARPGROUP_Q, head_dim), 0.0, plgpu.Layout.WGMMA),
        _splat((WARPGROUP_Q,), MASKED, PER_QUERY),
        _splat((WARPGROUP_Q,), 0.0, PER_QUERY),
        None if skip is None else _splat((WARPGROUP_Q,), MASKED, PER_QUERY),
    )
    choose, done = _chooser(queries), jnp.int32(0)
    for walk in full:
        if not tiles.resident:
            pl.when(walk.count > 0)(functools.partial(fetch, queries, walk.phase))
        parts = [_parts(rotated, tiles.registers) for rotated in queries.in_phase(walk.phase)]

        def attend(
            n: Array,
            state: _Softmax,
            parts: list = parts,
            walk: Walk = walk,
            done: Array = done,
        ) -> _Softmax:
            def chosen(logits: list[Array]) -> Array:
                return choose(logits, lambda: walk.start + (n - done))

            return _attend_block(queries, n, num_steps, state, parts, chosen)

        state = lax.fori_loop(done, done + walk.count, attend, state)
        done = done + walk.count
    return state


def _attend_edges(queries: Queries, state: _Softmax, num_full: Array, num_steps: Array) -> _Softmax:
    """Through the blocks that some queries meet in part or not at all."""
    tiles = queries.cta.problem.tiles
    block_k = tiles.block_k
    _, edges = recall(queries.cta.smem.walks)
    choose = _chooser(queries)

    def attend(n: Array, state: _Softmax) -> _Softmax:
        phase, block = locate(n, edges, num_full)
        if not tiles.resident:
            fetch(queries, phase)

        def masked(logits: list[Array]) -> Array:
            lower, upper = queries.ranges(phase)
            shape, layout = (WARPGROUP_Q, block_k), plgpu.Layout.WGMMA
            j = block * block_k + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
            met = (j >= _along_keys(lower, block_k)) & (j < _along_keys(upper, block_k))
            return jnp.where(met, choose(logits, lambda: block), -jnp.inf)

        parts = [_parts(rotated, 0) for rotated in queries.in_phase(phase)]
        return _attend_block(queries, n, num_steps, state, parts, masked)

    return lax.fori_loop(num_full, num_steps, attend, state)


def _chooser(queries: Queries) -> Callable[[list[Array], Callable[[], Array]], Array]:
    """From logits with each rotation of the queries, and the block, to those that count."""
    gmem, batch = queries.cta.gmem, queries.cta.batch
    block_k = queries.cta.problem.tiles.block_k
    if gmem.band is None or gmem.band.query_steps is None:
        return lambda logits, block: logits[0]
    of_queries = queries.load(gmem.band.query_steps)

    def choose(logits: list[Array], block: Callable[[], Array]) -> Array:
        steps = gmem.band.key_steps.at[batch, pl.ds(block() * block_k, block_k)]
        layout = plgpu.Layout.WGMMA.reduce(0)
        of_keys = plgpu.load(steps, layout=layout, optimized=False)
        of_keys = lax.broadcast_in_dim(of_keys, (WARPGROUP_Q, block_k), [1])
        return jnp.where(of_keys > _along_keys(of_queries, block_k), logits[1], logits[0])

    return choose


def _attend_block(
    queries: Queries,
    n: Array,
    num_steps: Array,
    state: _Softmax,
    rotations: list[list[tuple[Any, Any]]],
    chosen: Callable[[list[Array]], Array],
) -> _Softmax:
    """Step n of the online softmax, with the block of keys that is in flight for it.

    Args:
        rotations: of the queries, each in parts. chosen: from logits with each to those that count,
            -inf where masked.
    """
    tiles, smem = queries.cta.problem.tiles, queries.cta.smem
    slot = lax.rem(n, jnp.int32(tiles.num_stages))

    def logits_of(*accs: Any) -> list[Array]:
        for acc, parts in zip(accs, rotations, strict=True):
            for columns, q in parts:
                plgpu.wgmma(acc, q, smem.k.at[slot, :, columns].transpose((1, 0)))
        _switch(smem)
        return [acc[...] for acc in accs]

    acc = plgpu.WGMMAAccumulatorRef((WARPGROUP_Q, tiles.block_k), jnp.float32)
    logits = pl.run_scoped(logits_of, *(acc for _ in rotations))
    plgpu.barrier_arrive(smem.k_consumed.at[slot])
    logits = chosen(logits)
    add = functools.partial(_add_values, queries, n, num_steps)
    skip = _skip(queries)
    if skip is None or state.largest is None:
        return add(state, logits)
    largest = logits.max(axis=1)
    # A difference could be one of infinities, and a NaN would take a thread's other query along.
    wanted = any_in_warpgroup(jnp.where(largest > state.largest + skip, 1.0, 0.0))
    state = state._replace(largest=jnp.maximum(state.largest, largest))
    pass_by = functools.partial(_pass_by, queries, n, num_steps)
    return lax.cond(wanted, add, lambda state, _: pass_by(state), state, logits)


def _skip(queries: Queries) -> Float[Array, ""] | None:
    """`KeyBlocks.skip` of the row, in log2 units."""
    blocks = queries.cta.gmem.blocks
    return None if blocks is None or blocks.skip is None else blocks.skip[queries.cta.batch] * LOG2E


def _pass_by(queries: Queries, n: Array, num_steps: Array, state: _Softmax) -> _Softmax:
    """Leaves out a block of values: keeps step with those who load, and the other warpgroup."""
    tiles, smem = queries.cta.problem.tiles, queries.cta.smem
    slot = lax.rem(n, jnp.int32(tiles.num_stages))
    plgpu.barrier_arrive(smem.ping_pong)
    plgpu.barrier_wait(smem.v_loaded.at[slot])
    plgpu.barrier_wait(smem.ping_pong)

    @pl.when(n + 1 < num_steps)
    def _wait_for_next() -> None:
        plgpu.barrier_wait(smem.k_loaded.at[lax.rem(n + 1, jnp.int32(tiles.num_stages))])

    plgpu.barrier_arrive(smem.v_consumed.at[slot])
    return state


def _add_values(
    queries: Queries,
    n: Array,
    num_steps: Array,
    state: _Softmax,
    logits: Float[Array, "queries block_k"],
) -> _Softmax:
    """The state with the block's values, weighted."""
    tiles, smem = queries.cta.problem.tiles, queries.cta.smem
    head_dim = smem.v.shape[-1]
    slot = lax.rem(n, jnp.int32(tiles.num_stages))
    state = _raise_maxima(state, logits)
    p = jnp.exp2(logits - _along_keys(state.m_i, tiles.block_k))
    narrow = p.astype(smem.v.dtype)
    plgpu.barrier_arrive(smem.ping_pong)
    plgpu.barrier_wait(smem.v_loaded.at[slot])
    plgpu.barrier_wait(smem.ping_pong)  # the tensor cores are ours

    def add_values(acc: Any) -> tuple[Array, Array]:
        acc[...] = state.acc
        plgpu.wgmma(acc, narrow, smem.v.at[slot])

        @pl.when(n + 1 < num_steps)
        def _wait_for_next() -> None:
            plgpu.barrier_wait(smem.k_loaded.at[lax.rem(n + 1, jnp.int32(tiles.num_stages))])

        l_i = state.l_i + p.sum(axis=1)  # while the product runs
        return acc[...], l_i

    acc, l_i = pl.run_scoped(
        add_values, plgpu.WGMMAAccumulatorRef((WARPGROUP_Q, head_dim), jnp.float32)
    )
    plgpu.barrier_arrive(smem.v_consumed.at[slot])
    return state._replace(acc=acc, l_i=l_i)


def _raise_maxima(state: _Softmax, logits: Float[Array, "queries block_k"]) -> _Softmax:
    """The state with maxima that count these logits, where a warp's have grown by more than SLACK.

    Else nothing is rescaled: the weights are then larger than they would be, and as exact.
    """
    m_next = jnp.maximum(state.m_i, logits.max(axis=1))

    def rescale(acc: Array, m_i: Array, l_i: Array) -> tuple[Array, Array, Array]:
        decay = jnp.exp2(m_i - m_next)
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
        return acc, m_next, l_i * decay

    grown = any_in_warp(m_next - state.m_i, SLACK)
    acc, m_i, l_i = lax.cond(grown, rescale, lambda *state: state, *state[:3])
    return state._replace(acc=acc, m_i=m_i, l_i=l_i)


def _write(queries: Queries, state: _Softmax) -> None:
    """The output and the log-sum-exp, by way of shared memory; 0 and -inf for padding."""
    cta, (acc, m_i, l_i, _) = queries.cta, state
    gmem, smem, at = cta.gmem, cta.smem, queries.warpgroup
    is_text = (queries.index() < gmem.place[cta.batch, 3]) & (l_i > 0)
    inverse = jnp.where(is_text, 1 / jnp.where(l_i > 0, l_i, 1.0), 0.0)
    out = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
    smem.q[at, 0] = out.astype(smem.q.dtype)
    if gmem.lse is not None:
        log2_l = jnp.log(jnp.where(l_i > 0, l_i, 1.0)) * LOG2E
        smem.lse[at] = jnp.where(is_text, (m_i + log2_l) / LOG2E, -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.q.at[at, 0], gmem.out.at[cta.batch, queries.slots, cta.head])
    if gmem.lse is not None:
        target = gmem.lse.at[cta.batch, cta.head, queries.slots]
        plgpu.copy_smem_to_gmem(smem.lse.at[at], target)
    plgpu.wait_smem_to_gmem(0)


def _parts(q_smem: Any, registers: int) -> list[tuple[Any, Any]]:
    """Columns of the query and where they are multiplied from: registers, then shared memory."""
    columns = q_smem.shape[1]
    held, rest = pl.ds(0, registers), pl.ds(registers, columns - registers)
    parts = []
    if held.size:
        parts.append((held, plgpu.load(q_smem.at[:, held], layout=plgpu.Layout.WGMMA)))
    if rest.size:
        parts.append((rest, q_smem.at[:, rest]))
    return parts


def _along_keys(x: Array, block_k: int) -> Array:
    return lax.broadcast_in_dim(x, (WARPGROUP_Q, block_k), [0])


def _splat(shape: tuple[int, ...], value: float, layout: Any) -> Float[Array, "..."]:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
