"""The forward pass on Hopper: one flash-attention kernel for any of DCA's phases together.

A CTA processes 128 or 192 queries of one head: two or three warpgroups compute 64 queries each, and
another one feeds them keys and values through the bulk copy engine. The kernel rotates the query
once for each phase, and all rotations stay in shared memory if they fit. So going from one phase's
keys to the next costs nothing, and DCA does the same work as plain causal attention.

Two query heads of one kv head form a cluster, which reads every block of keys once for both.

It also computes one band of another method (`band_forward`), with rotated queries and keys.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from dca_jax.attention.backend import KeyBlocks, Rows
from dca_jax.attention.blocks import BLOCK
from dca_jax.attention.mosaic_gpu.forward_ahead import attend_ahead
from dca_jax.attention.mosaic_gpu.forward_cta import CTA, Problem, Refs, Shared
from dca_jax.attention.mosaic_gpu.forward_feed import feed
from dca_jax.attention.mosaic_gpu.forward_queries import (
    PER_QUERY,
    Queries,
    fetch,
    place_band,
    place_rotations,
)
from dca_jax.attention.mosaic_gpu.forward_softmax import Softmax, along_keys, raise_maxima, splat
from dca_jax.attention.mosaic_gpu.forward_tiles import (
    EXITING,
    LIST_TILES,
    PAGE_TILES,
    PASS_TILES,
    TILES,
    WARPGROUP_Q,
    ForwardTiles,
)
from dca_jax.attention.mosaic_gpu.queries import pad_tokens, rotated_queries, rotation_tables
from dca_jax.attention.mosaic_gpu.ranges import (
    Walk,
    any_met,
    locate,
    recall,
    steps,
)
from dca_jax.attention.mosaic_gpu.vote import any_in_warpgroup
from dca_jax.attention.softmax import LOG2E, MASKED
from dca_jax.dca import PHASES, DCAConfig, Phase
from dca_jax.errors import InputError


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
                f"skip-softmax on a Hopper GPU needs head_dim 64 or 128, got {query.shape[3]}; "
                "choose another --sparse"
            )
        options = {"dca": dca, "phases": phases, "with_lse": with_lse, "pages": pages}
        return _by_tiles_of_the_text(query, key, value, layer, rows, blocks, tiles, **options)
    tiles = tiles or _tiles_for(query.shape[3], phases, None if pages is None else key.shape[2])
    return _launch(query, key, value, layer, rows, dca, phases, with_lse, None, pages, tiles)


def _tiles_for(head_dim: int, phases: tuple[Phase, ...], page: int | None) -> ForwardTiles:
    """The tiles of the dense kernel; with pages, tiles whose blocks do not cross pages."""
    if page is None:
        return (TILES if len(phases) == len(PHASES) else PASS_TILES)[head_dim]
    tiles = PAGE_TILES[head_dim]
    return tiles if page % tiles.block_k == 0 else LIST_TILES[head_dim]


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
    """`forward` over lists; shifts queries so that tiles begin at multiples of 128 of the text."""
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
    num_tiles = -(-num_queries // tiles.block_q)
    if tiles.registers % 64 or tiles.registers > head_dim:
        raise InputError(f"{tiles} must hold a multiple of 64 of the {head_dim} columns")
    if tiles.warpgroups != 2 and not (tiles.ahead and tiles.warpgroups == 3):
        raise InputError(f"{tiles} must have two warpgroups, or three that run ahead")
    cluster = tiles.cluster if (heads // kv_heads) % tiles.cluster == 0 else 1
    if key.shape[2] % 8:  # needs padding: take only one layer
        key, value, layer = key[layer][None], value[layer][None], jnp.int32(0)
    key, value = (pad_tokens(x.reshape(-1, *x.shape[2:]), 1) for x in (key, value))
    tables: Any = ()
    rotated: Any = query
    if tiles.resident:
        tables = rotation_tables(rows, dca, num_tiles * tiles.block_q)
    else:
        rotated = rotated_queries(query, rows, dca, phases)
        if blocks is not None or pages is not None:
            rotated = jnp.stack(rotated)
    queries = jax.tree.map(lambda x: pad_tokens(x, x.ndim - 3), rotated)
    cache_row = layer * num_rows + jnp.arange(batch, dtype=jnp.int32)
    page = None
    if pages is not None:
        cache_row, page = jnp.full_like(cache_row, layer * num_rows), num_keys
        num_keys = pages.shape[1] * page
    place = jnp.stack([cache_row, cache_row, rows.offset, rows.lengths, rows.key_offset], axis=1)
    rotations = len(phases) if tiles.resident else 1
    group = heads // kv_heads
    problem = Problem(num_keys, group, cluster, dca, phases, tiles, page, rotations)
    given = Refs(queries, key, value, place, tables, blocks, pages, None, None, None)
    return launch(problem, given, num_queries, with_lse)


def launch(
    problem: Problem, given: Refs, num_queries: int, with_lse: bool
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """Runs the kernel on the given references, adding its results; as `Backend.forward`."""
    query = jax.tree.leaves(given)[0]
    batch, _, heads, _ = query.shape[-4:]
    block_q, cluster = problem.tiles.block_q, problem.cluster
    num_tiles = -(-num_queries // block_q)
    out = jax.ShapeDtypeStruct(query.shape[-4:], query.dtype)
    # Whole tiles: a copy from a row of an array does not stop at the row's end.
    lse = jax.ShapeDtypeStruct((batch, heads, num_tiles * block_q), jnp.float32)
    out_type = (out, lse) if with_lse else (out,)
    # None arguments are omitted.
    refs = given._replace(out=out, lse=lse if with_lse else None)
    out, *lse = plgpu.kernel(
        functools.partial(_kernel, problem, jax.tree.structure(refs)),
        out_type=out_type,
        grid=(heads // cluster, num_tiles, batch),
        grid_names=("heads", "tile", "batch"),
        cluster=(cluster,),
        cluster_names=("pair",),
        num_threads=problem.tiles.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="dca_forward",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,  # maxima and sums are computed within a warp
        ),
    )(*jax.tree.leaves(given))
    return out[:, :num_queries], lse[0][:, :, :num_queries] if with_lse else None


# --- the kernel --------------------------------------------------------------------------------


def _kernel(problem: Problem, tree: Any, *refs: Any) -> None:
    gmem: Refs = jax.tree.unflatten(tree, refs)
    num_queries, _, head_dim = gmem.out.shape[1:]
    batch = lax.axis_index("batch")
    head = lax.axis_index("heads") * problem.cluster + lax.axis_index("pair")
    # Tiles with the most work go first, so that the last ones are short.
    tile = pl.cdiv(num_queries, problem.tiles.block_q) - 1 - lax.axis_index("tile")

    def body(smem: Shared) -> None:
        cta = CTA(problem, gmem, smem, batch, head, tile)
        warpgroup = lax.axis_index("warpgroup")
        computing = problem.tiles.warpgroups
        pl.when(warpgroup < computing)(lambda: _compute(cta, warpgroup))
        pl.when(warpgroup == computing)(lambda: feed(cta))

    shared = Shared.types(problem, gmem.out.dtype, head_dim)
    pl.run_scoped(body, shared, collective_axes="warpgroup")


# --- the warpgroups that compute ---------------------------------------------------------------


def _compute(cta: CTA, warpgroup: Array) -> None:
    """Attention of a warpgroup's queries, if they have keys."""
    problem = cta.problem
    plgpu.set_max_registers(problem.tiles.registers_per_thread[0], action="increase")
    queries = Queries(cta, warpgroup, cta.tile * problem.tiles.block_q + warpgroup * WARPGROUP_Q)
    exits = cta.smem.q.shape[-1] in EXITING and cta.is_dense and "intra" not in problem.phases
    if not exits or problem.dca is None:
        _attend(queries)
    else:  # a single pass: the first tiles of a text have no keys in its phase
        first, last, keys = cta.text()
        met = any_met(first, last, problem.phases, problem.dca, keys)
        pl.when(met)(lambda: _attend(queries))
        pl.when(~met)(lambda: _write(queries, _start(queries)))


def _attend(queries: Queries) -> None:
    """Attends first to full blocks, then to the edges."""
    cta, warpgroup, smem = queries.cta, queries.warpgroup, queries.cta.smem
    tiles = cta.problem.tiles
    if cta.problem.dca is None:
        place_band(queries)
    elif tiles.resident:
        place_rotations(queries)

    plgpu.barrier_wait(smem.planned)
    full, edges = recall(smem.walks)
    num_full, num_steps = steps(full), steps(full + edges)
    pl.when(num_steps > 0)(lambda: plgpu.barrier_wait(smem.k_loaded.at[0]))
    if not tiles.ahead:
        pl.when(warpgroup == 1)(lambda: _switch(smem))
    state = _attend_full(queries, full, num_steps)
    state = _attend_edges(queries, state, full, num_full, num_steps)
    if not tiles.ahead:
        pl.when(warpgroup == 0)(lambda: _switch(smem))
    _write(queries, state)


def _start(queries: Queries) -> Softmax:
    """The state before any keys."""
    return Softmax(
        splat((WARPGROUP_Q, queries.cta.smem.q.shape[-1]), 0.0, plgpu.Layout.WGMMA),
        splat((WARPGROUP_Q,), MASKED, PER_QUERY),
        splat((WARPGROUP_Q,), 0.0, PER_QUERY),
        None if _skip(queries) is None else splat((WARPGROUP_Q,), MASKED, PER_QUERY),
    )


def _switch(smem: Shared) -> None:
    """Hands the tensor cores to the other warpgroup, and waits until it returns them."""
    plgpu.barrier_arrive(smem.ping_pong)
    plgpu.barrier_wait(smem.ping_pong)


def _attend_full(queries: Queries, full: list[Walk], num_steps: Array) -> Softmax:
    """Processes the blocks to which all the tile's queries attend fully, phase by phase."""
    tiles = queries.cta.problem.tiles
    state = _start(queries)
    choose, done = _chooser(queries), jnp.int32(0)
    for walk in full:
        if not tiles.resident:
            pl.when(walk.count > 0)(functools.partial(fetch, queries, walk.phase))
        parts = _parts(queries, walk.phase, tiles.registers)

        def attend(
            n: Array,
            state: Softmax,
            parts: list = parts,
            walk: Walk = walk,
            done: Array = done,
        ) -> Softmax:
            def chosen(logits: list[Array]) -> Array:
                return choose(logits, lambda: walk.start + (n - done))

            return _attend_block(queries, n, num_steps, state, parts, chosen)

        if tiles.ahead:
            ahead = functools.partial(attend_ahead, queries, num_steps, parts[0], done, walk.count)
            state = lax.cond(walk.count > 0, ahead, lambda state: state, state)
        else:
            state = lax.fori_loop(done, done + walk.count, attend, state)
        done = done + walk.count
    return state


def _attend_edges(
    queries: Queries, state: Softmax, full: list[Walk], num_full: Array, num_steps: Array
) -> Softmax:
    """Processes the blocks to which some queries attend partly or not at all."""
    tiles = queries.cta.problem.tiles
    block_k = tiles.block_k
    _, edges = recall(queries.cta.smem.walks)
    choose = _chooser(queries)

    held = jnp.int32(-1)  # the phase whose queries are in shared memory, if not all are
    for walk in full:
        held = jnp.where(walk.count > 0, jnp.int32(walk.phase), held)

    def attend(n: Array, carry: tuple[Softmax, Array]) -> tuple[Softmax, Array]:
        state, held = carry
        phase, block = locate(n, edges, num_full)
        if not tiles.resident and queries.cta.is_dense:
            pl.when(phase != held)(lambda: fetch(queries, phase))
        elif not tiles.resident:
            fetch(queries, phase)

        def masked(logits: list[Array]) -> Array:
            lower, upper = queries.ranges(phase)
            shape, layout = (WARPGROUP_Q, block_k), plgpu.Layout.WGMMA
            j = block * block_k + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
            met = (j >= along_keys(lower, block_k)) & (j < along_keys(upper, block_k))
            return jnp.where(met, choose(logits, lambda: block), -jnp.inf)

        parts = _parts(queries, phase, 0)
        return _attend_block(queries, n, num_steps, state, parts, masked), phase

    return lax.fori_loop(num_full, num_steps, attend, (state, held))[0]


def _chooser(queries: Queries) -> Callable[[list[Array], Callable[[], Array]], Array]:
    """A function that selects the logits from those of each rotation of the queries."""
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
        return jnp.where(of_keys > along_keys(of_queries, block_k), logits[1], logits[0])

    return choose


def _attend_block(
    queries: Queries,
    n: Array,
    num_steps: Array,
    state: Softmax,
    rotations: list[list[tuple[Any, Any]]],
    chosen: Callable[[list[Array]], Array],
) -> Softmax:
    """Step n of the online softmax, with the block of keys that is in flight for it.

    Args:
        rotations: rotations of the queries, each in parts.
        chosen: function that selects from the logits of each rotation, with -inf where masked.
    """
    tiles, smem = queries.cta.problem.tiles, queries.cta.smem
    slot = lax.rem(n, jnp.int32(tiles.num_stages))

    def logits_of(*accs: Any) -> list[Array]:
        for acc, parts in zip(accs, rotations, strict=True):
            for columns, q in parts:
                plgpu.wgmma(acc, q(n), smem.k.at[slot, :, columns].transpose((1, 0)))
        if not tiles.ahead:
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
    # A difference of infinities would be NaN, which would also affect a thread's other query.
    wanted = any_in_warpgroup(jnp.where(largest > state.largest + skip, 1.0, 0.0))
    state = state._replace(largest=jnp.maximum(state.largest, largest))
    pass_by = functools.partial(_pass_by, queries, n, num_steps)
    return lax.cond(wanted, add, lambda state, _: pass_by(state), state, logits)


def _skip(queries: Queries) -> Float[Array, ""] | None:
    """The row's `KeyBlocks.skip` in log2 units."""
    blocks = queries.cta.gmem.blocks
    return None if blocks is None or blocks.skip is None else blocks.skip[queries.cta.batch] * LOG2E


def _pass_by(queries: Queries, n: Array, num_steps: Array, state: Softmax) -> Softmax:
    """Skips a block of values, in step with the loading warpgroup and the other one."""
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
    state: Softmax,
    logits: Float[Array, "queries block_k"],
) -> Softmax:
    """Adds the block's weighted values to the state."""
    tiles, smem = queries.cta.problem.tiles, queries.cta.smem
    head_dim = smem.v.shape[-1]
    slot = lax.rem(n, jnp.int32(tiles.num_stages))
    state = raise_maxima(state, logits)
    p = jnp.exp2(logits - along_keys(state.m_i, tiles.block_k))
    narrow = p.astype(smem.v.dtype)
    if not tiles.ahead:
        plgpu.barrier_arrive(smem.ping_pong)
    plgpu.barrier_wait(smem.v_loaded.at[slot])
    if not tiles.ahead:
        plgpu.barrier_wait(smem.ping_pong)  # wait for the tensor cores

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


def _write(queries: Queries, state: Softmax) -> None:
    """Writes the output and the log-sum-exp via shared memory; 0 and -inf for padding."""
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
    plgpu.wait_smem_to_gmem(0, wait_read_only=cta.is_dense)


def _parts(
    queries: Queries, phase: int | Array, registers: int
) -> list[list[tuple[Any, Callable[[Array], Any]]]]:
    """Parts of the columns of each rotation: first in registers, then in shared memory."""
    columns = queries.cta.smem.q.shape[-1]
    held, rest = pl.ds(0, registers), pl.ds(registers, columns - registers)
    rotations = queries.in_phase(phase, jnp.int32(0))
    of_all = []
    for number, rotated in enumerate(rotations):
        parts = []
        if held.size:
            q = plgpu.load(rotated.at[:, held], layout=plgpu.Layout.WGMMA)
            parts.append((held, lambda n, q=q: q))
        if rest.size:
            parts.append((rest, lambda n, at=number: queries.in_phase(phase, n)[at].at[:, rest]))
        of_all.append(parts)
    return of_all
