"""The warpgroup of Hopper's forward kernel that feeds the others keys and values."""

import functools
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dca_jax.attention.blocks import BLOCK
from dca_jax.attention.mosaic_gpu.forward_cta import CTA, Shared
from dca_jax.attention.mosaic_gpu.forward_schedule import Worker
from dca_jax.attention.mosaic_gpu.ranges import (
    Walk,
    full_and_edge_walks,
    listed_and_edge_walks,
    locate,
    remember,
    steps,
)
from dca_jax.dca import PHASES


def feed(cta: CTA) -> None:
    """Computes which blocks the tile visits, and keeps their keys and values in flight."""
    plgpu.set_max_registers(cta.problem.tiles.registers_per_thread[1], action="decrease")
    num_steps = _feed_tile(cta)
    if cta.problem.cluster > 1:
        _drain(cta.smem, cta.problem.tiles.num_stages, num_steps)


def feed_tiles(worker: Worker) -> None:
    """As `feed` for one tile of the worker after another."""
    tiles = worker.problem.tiles
    plgpu.set_max_registers(tiles.registers_per_thread[1], action="decrease")

    def feed_next(n: Array, begin: Array) -> Array:
        cta = worker.cta(n, begin)
        # The walks take the place of those of the tile before the last one.
        pl.when(n >= 2)(lambda: plgpu.barrier_wait(cta.smem.walked))
        return _feed_tile(cta)

    num_steps = lax.fori_loop(0, worker.num_tiles(), feed_next, jnp.int32(0))
    if worker.problem.cluster > 1:
        _drain(worker.smem, tiles.num_stages, num_steps)


def _feed_tile(cta: CTA) -> Array:
    """Feeds a tile; returns how many steps the CTA has made then."""
    problem, gmem, smem = cta.problem, cta.gmem, cta.smem
    num_stages = problem.tiles.num_stages
    kv_head = lax.div(cta.head, jnp.int32(problem.group))
    axes = "pair" if problem.cluster > 1 else None
    first_rows = gmem.place[cta.batch, 0], gmem.place[cta.batch, 1]
    full, edges = _walks(cta, kv_head)
    # Done here, while the computing warpgroups rotate, for which they need the registers.
    remember(full, edges, smem.walks)
    plgpu.barrier_arrive(smem.planned)
    first_edge, end = cta.begin + steps(full), cta.begin + steps(full + edges)

    def load(n: Array, _: Any, *, block_of: Callable[[Array], Array]) -> None:
        slot = lax.rem(n, jnp.int32(num_stages))
        page, slots = _place(cta, block_of(n))
        for first_row, source, target, loaded, consumed in (
            (first_rows[0], gmem.key, smem.k, smem.k_loaded, smem.k_consumed),
            (first_rows[1], gmem.value, smem.v, smem.v_loaded, smem.v_consumed),
        ):
            pl.when(n >= num_stages)(functools.partial(plgpu.barrier_wait, consumed.at[slot]))
            keys = source.at[first_row + page, slots, kv_head]
            plgpu.copy_gmem_to_smem(keys, target.at[slot], loaded.at[slot], collective_axes=axes)

    def block_of_full(n: Array) -> Array:
        if gmem.blocks is not None:
            return _listed(cta, kv_head, n)
        return locate(n, full, cta.begin)[1]

    def block_of_edges(n: Array) -> Array:
        return locate(n, edges, first_edge)[1]

    lax.fori_loop(cta.begin, first_edge, functools.partial(load, block_of=block_of_full), None)
    lax.fori_loop(first_edge, end, functools.partial(load, block_of=block_of_edges), None)
    return end


def _walks(cta: CTA, kv_head: Array) -> tuple[list[Walk], list[Walk]]:
    """The full blocks and the edge blocks that the tile visits."""
    problem, gmem = cta.problem, cta.gmem
    if gmem.band is not None:
        walks = gmem.band.walks.at[cta.batch, cta.tile]
        full, *edges = (Walk(0, walks[n, 0], walks[n, 1]) for n in range(3))
        return [full], edges
    assert problem.dca is not None
    (first, last, keys), block_k = cta.text(), problem.tiles.block_k
    if gmem.blocks is None:
        return full_and_edge_walks(first, last, problem.phases, problem.dca, keys, block_k)
    counts = [
        gmem.blocks.counts[cta.batch, kv_head, cta.tile, PHASES.index(phase)]
        for phase in problem.phases
    ]
    return listed_and_edge_walks(first, last, counts, problem.phases, problem.dca, keys, block_k)


def _listed(cta: CTA, kv_head: Array, n: Array) -> Array:
    """The block of step n in the tile's list."""
    parts = jnp.int32(BLOCK // cta.problem.tiles.block_k)
    number = cta.gmem.blocks.numbers[cta.batch, kv_head, cta.tile, lax.div(n, parts)]
    return number * parts + lax.rem(n, parts)


def _place(cta: CTA, block: Array) -> tuple[int | Array, Any]:
    """The place of a block of keys: the page, if keys are paged, and the slots."""
    block_k, page, row = cta.problem.tiles.block_k, cta.problem.page, 0
    if page is not None:
        in_page = jnp.int32(page // block_k)
        row = cta.gmem.pages[cta.batch, lax.div(block, in_page)]
        block = lax.rem(block, in_page)
    return row, pl.ds(block * block_k, block_k)


def _drain(smem: Shared, num_stages: int, num_steps: Array) -> None:
    """Waits until the cluster's other CTA is done, as it still signals to this one."""
    for slot in range(num_stages):

        def wait(slot: int = slot) -> None:
            plgpu.barrier_wait(smem.k_consumed.at[slot])
            plgpu.barrier_wait(smem.v_consumed.at[slot])

        pl.when(slot < num_steps)(wait)
