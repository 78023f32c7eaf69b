"""The warpgroups of Hopper's forward kernel that compute."""

import functools
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dca_jax.attention.mosaic_gpu.forward_ahead import attend_ahead
from dca_jax.attention.mosaic_gpu.forward_cta import CTA, Shared
from dca_jax.attention.mosaic_gpu.forward_queries import (
    PER_QUERY,
    Queries,
    fetch,
    fetch_raw,
    place_band,
    place_rotations,
)
from dca_jax.attention.mosaic_gpu.forward_schedule import Worker
from dca_jax.attention.mosaic_gpu.forward_softmax import Softmax, along_keys, raise_maxima, splat
from dca_jax.attention.mosaic_gpu.forward_tiles import WARPGROUP_Q
from dca_jax.attention.mosaic_gpu.ranges import Walk, locate, recall, steps
from dca_jax.attention.mosaic_gpu.vote import any_in_warpgroup
from dca_jax.attention.softmax import LOG2E, MASKED


def compute(cta: CTA, warpgroup: Array) -> None:
    """Attention of a warpgroup's queries."""
    problem = cta.problem
    plgpu.set_max_registers(problem.tiles.registers_per_thread[0], action="increase")
    queries = Queries.of(cta, warpgroup)
    if problem.dca is None:
        place_band(queries)
    elif problem.tiles.resident:
        fetch_raw(queries)
        place_rotations(queries)
    plgpu.barrier_wait(cta.smem.planned)
    _write(queries, _attend(queries))
    plgpu.wait_smem_to_gmem(0, wait_read_only=cta.is_dense)


def compute_tiles(worker: Worker, warpgroup: Array) -> None:
    """As `compute` for one tile of the worker after another."""
    problem = worker.problem
    plgpu.set_max_registers(problem.tiles.registers_per_thread[0], action="increase")
    count = worker.num_tiles()

    def fetch_tile(n: Array) -> None:
        """Starts loading the queries of the worker's tile n, if there is one and it has keys."""
        if not problem.tiles.resident:
            return  # loaded phase by phase
        cta = worker.cta(n, jnp.int32(0))
        wanted = (n < count) & cta.has_keys()
        pl.when(wanted)(lambda: fetch_raw(Queries.of(cta, warpgroup)))

    def process(n: Array, begin: Array) -> Array:
        cta = worker.cta(n, begin)
        queries = Queries.of(cta, warpgroup)
        plgpu.barrier_wait(cta.smem.planned)

        def num_steps() -> Array:  # read at each use to save registers
            full, edges = recall(cta.smem.walks)
            return steps(full + edges)

        def attend() -> None:
            if problem.tiles.resident:
                place_rotations(queries)
            else:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the output has left
            if problem.spare:
                fetch_tile(n + 1)
            state = _attend(queries)
            if problem.tiles.resident and not problem.spare:
                plgpu.commit_smem()  # every thread has read the last phase's queries
                fetch_tile(n + 1)
            _write(queries, state)

        def pass_by() -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            fetch_tile(n + 1)
            _write(queries, _start(queries))

        pl.when(num_steps() > 0)(attend)
        pl.when(num_steps() == 0)(pass_by)
        end = begin + num_steps()
        plgpu.barrier_arrive(cta.smem.walked)
        return end

    fetch_tile(jnp.int32(0))
    lax.fori_loop(0, count, process, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _attend(queries: Queries) -> Softmax:
    """Attends first to full blocks, then to the edges."""
    cta, warpgroup, smem = queries.cta, queries.warpgroup, queries.cta.smem
    tiles = cta.problem.tiles
    full, edges = recall(smem.walks)
    first_edge, end = cta.begin + steps(full), cta.begin + steps(full + edges)
    slot = lax.rem(cta.begin, jnp.int32(tiles.num_stages))
    pl.when(end > cta.begin)(lambda: plgpu.barrier_wait(smem.k_loaded.at[slot]))
    if not tiles.ahead:
        pl.when(warpgroup == 1)(lambda: _switch(smem))
    state = _attend_full(queries, full, end)
    state = _attend_edges(queries, state, full, first_edge, end)
    if not tiles.ahead:
        pl.when(warpgroup == 0)(lambda: _switch(smem))
    return state


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


def _attend_full(queries: Queries, full: list[Walk], end: Array) -> Softmax:
    """Processes the blocks to which all the tile's queries attend fully, phase by phase."""
    tiles = queries.cta.problem.tiles
    state = _start(queries)
    choose, done = _chooser(queries), queries.cta.begin
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

            return _attend_block(queries, n, end, state, parts, chosen)

        if tiles.ahead:
            ahead = functools.partial(attend_ahead, queries, end, parts[0], done, walk.count)
            state = lax.cond(walk.count > 0, ahead, lambda state: state, state)
        else:
            state = lax.fori_loop(done, done + walk.count, attend, state)
        done = done + walk.count
    return state


def _attend_edges(
    queries: Queries, state: Softmax, full: list[Walk], first_edge: Array, end: Array
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
        phase, block = locate(n, edges, first_edge)
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
        return _attend_block(queries, n, end, state, parts, masked), phase

    return lax.fori_loop(first_edge, end, attend, (state, held))[0]


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
    end: Array,
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
    add = functools.partial(_add_values, queries, n, end)
    skip = _skip(queries)
    if skip is None or state.largest is None:
        return add(state, logits)
    largest = logits.max(axis=1)
    # A difference of infinities would be NaN, which would also affect a thread's other query.
    wanted = any_in_warpgroup(jnp.where(largest > state.largest + skip, 1.0, 0.0))
    state = state._replace(largest=jnp.maximum(state.largest, largest))
    pass_by = functools.partial(_pass_by, queries, n, end)
    return lax.cond(wanted, add, lambda state, _: pass_by(state), state, logits)


def _skip(queries: Queries) -> Float[Array, ""] | None:
    """The row's `KeyBlocks.skip` in log2 units."""
    blocks = queries.cta.gmem.blocks
    return None if blocks is None or blocks.skip is None else blocks.skip[queries.cta.batch] * LOG2E


def _pass_by(queries: Queries, n: Array, end: Array, state: Softmax) -> Softmax:
    """Skips a block of values, in step with the loading warpgroup and the other one."""
    tiles, smem = queries.cta.problem.tiles, queries.cta.smem
    slot = lax.rem(n, jnp.int32(tiles.num_stages))
    plgpu.barrier_arrive(smem.ping_pong)
    plgpu.barrier_wait(smem.v_loaded.at[slot])
    plgpu.barrier_wait(smem.ping_pong)

    @pl.when(n + 1 < end)
    def _wait_for_next() -> None:
        plgpu.barrier_wait(smem.k_loaded.at[lax.rem(n + 1, jnp.int32(tiles.num_stages))])

    plgpu.barrier_arrive(smem.v_consumed.at[slot])
    return state


def _add_values(
    queries: Queries,
    n: Array,
    end: Array,
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

        @pl.when(n + 1 < end)
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
