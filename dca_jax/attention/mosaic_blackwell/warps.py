"""The warpgroup of Blackwell's forward kernel that feeds the others: a warp copies, one multiplies.

Step n of a tile: its logits q k^T (here), their weights by a computing warpgroup (`softmax.py`),
and the weights times v, which are added to the tile's sum (here). A tile's steps follow one
another; while one tile's weights are computed, the tensor cores work for the other.
"""

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from dca_jax.attention.mosaic_blackwell.cta import CTA
from dca_jax.attention.mosaic_blackwell.tiles import BLOCK_K, BLOCK_Q, TILE_Q, TILES_PER_CTA
from dca_jax.attention.mosaic_gpu.ranges import (
    Keys,
    Walk,
    full_and_edge_walks,
    locate,
    remember,
    steps,
)

COPIES, MULTIPLIES = 0, 1  # warps


def feed(cta: CTA) -> None:
    """Computes which blocks the CTA visits, then runs both warps."""
    plgpu.set_max_registers(56, action="decrease")
    full, edges = _walks(cta)
    remember(full, edges, cta.smem.walks)
    plgpu.barrier_arrive(cta.smem.planned)

    @plgpu.warp_map
    def _warps(warp: Array) -> None:
        pl.when(warp == COPIES)(lambda: _copy(cta, full + edges))
        pl.when(warp == MULTIPLIES)(lambda: _multiply(cta, full + edges))


def _walks(cta: CTA) -> tuple[list[Walk], list[Walk]]:
    """The full blocks and the edge blocks of the CTA's queries."""
    problem, gmem = cta.problem, cta.gmem
    offset, length, key_offset = (gmem.place[cta.batch, n] for n in range(1, 4))
    first = offset + cta.first
    last = jnp.minimum(jnp.minimum(first + BLOCK_Q, length), offset + gmem.out.shape[1]) - 1
    keys = Keys(key_offset, problem.num_keys)
    return full_and_edge_walks(first, last, problem.phases, problem.dca, keys, BLOCK_K)


def _copy(cta: CTA, walks: list[Walk]) -> None:
    """Keeps keys and values in flight, and the queries' rotation that they need."""
    problem, gmem, smem = cta.problem, cta.gmem, cta.smem
    num_stages, num_steps = problem.num_stages, steps(walks)
    kv_head = lax.div(cta.head, jnp.int32(problem.group))
    row = gmem.place[cta.batch, 0]

    def load(n: Array, previous: Int[Array, ""]) -> Int[Array, ""]:
        phase, block = locate(n, walks, jnp.int32(0))
        pl.when(phase != previous)(functools.partial(_copy_queries, cta, phase, previous))
        slot = lax.rem(n, jnp.int32(num_stages))
        for source, target, loaded, consumed in (
            (gmem.key, smem.k, smem.k_loaded, smem.k_consumed),
            (gmem.value, smem.v, smem.v_loaded, smem.v_consumed),
        ):
            pl.when(n >= num_stages)(functools.partial(plgpu.barrier_wait, consumed.at[slot]))
            keys = source.at[row, pl.ds(block * BLOCK_K, BLOCK_K), kv_head]
            plgpu.copy_gmem_to_smem(keys, target.at[slot], loaded.at[slot])
        return phase

    lax.fori_loop(0, num_steps, load, jnp.int32(-1))
    _drain(cta, num_steps)


def _copy_queries(cta: CTA, phase: Int[Array, ""], previous: Int[Array, ""]) -> None:
    """Replaces the queries by those rotated for `phase`."""
    gmem, smem = cta.gmem, cta.smem
    pl.when(previous >= 0)(lambda: plgpu.barrier_wait(smem.q_consumed))

    def copy(rotated: Any) -> None:
        for tile in range(TILES_PER_CTA):
            slots = pl.ds(cta.first + tile * TILE_Q, TILE_Q)
            source = rotated.at[cta.batch, slots, cta.head]
            plgpu.copy_gmem_to_smem(source, smem.q.at[tile], smem.q_loaded)

    for number, rotated in enumerate(gmem.query):
        pl.when(phase == number)(functools.partial(copy, rotated))


def _drain(cta: CTA, num_steps: Int[Array, ""]) -> None:
    """Waits for the tensor cores' last signals, which must not come after the CTA has left."""
    smem = cta.smem
    for slot in range(cta.problem.num_stages):

        def wait(slot: int = slot) -> None:
            plgpu.barrier_wait(smem.k_consumed.at[slot])
            plgpu.barrier_wait(smem.v_consumed.at[slot])

        pl.when(slot < num_steps)(wait)
    pl.when(num_steps > 0)(lambda: plgpu.barrier_wait(smem.q_consumed))


def _multiply(cta: CTA, walks: list[Walk]) -> None:
    """Issues the products: for each step both tiles' logits, after the sums of the step before."""
    smem, num_stages, num_steps = cta.smem, cta.problem.num_stages, steps(walks)

    def step(n: Array, previous: Int[Array, ""]) -> Int[Array, ""]:
        phase, _ = locate(n, walks, jnp.int32(0))
        following, _ = locate(n + 1, walks, jnp.int32(0))
        slot = lax.rem(n, jnp.int32(num_stages))
        pl.when(phase != previous)(lambda: plgpu.barrier_wait(smem.q_loaded))
        plgpu.barrier_wait(smem.k_loaded.at[slot])
        for tile in range(TILES_PER_CTA):
            pl.when(n > 0)(functools.partial(_add_values, cta, n - 1, tile))
            logits, _ = smem.logits[tile]
            q, k = smem.q.at[tile], smem.k.at[slot]
            plgpu.tcgen05_mma(logits, q, k.transpose((1, 0)), accumulate=False)
            plgpu.tcgen05_commit_arrive(smem.multiplied[tile])
        plgpu.tcgen05_commit_arrive(smem.k_consumed.at[slot])
        is_last = (n + 1 == num_steps) | (following != phase)
        pl.when(is_last)(lambda: plgpu.tcgen05_commit_arrive(smem.q_consumed))
        return phase

    lax.fori_loop(0, num_steps, step, jnp.int32(-1))

    @pl.when(num_steps > 0)
    def _finish() -> None:
        for tile in range(TILES_PER_CTA):
            _add_values(cta, num_steps - 1, tile)
            plgpu.tcgen05_commit_arrive(smem.multiplied[tile])


def _add_values(cta: CTA, n: Array, tile: int) -> None:
    """Adds step n's weighted values to a tile's sum, and waits until it is done.

    The next logits take the place of the weights, and the tensor cores keep the order only of
    products with one and the same result.
    """
    smem = cta.smem
    slot = lax.rem(n, jnp.int32(cta.problem.num_stages))
    if tile == 0:
        plgpu.barrier_wait(smem.v_loaded.at[slot])
    plgpu.barrier_wait(smem.weighted[tile])
    _, weights = smem.logits[tile]
    plgpu.tcgen05_mma(smem.acc[tile], weights, smem.v.at[slot], accumulate=n > 0)
    plgpu.tcgen05_commit_arrive(smem.added[tile])
    if tile == TILES_PER_CTA - 1:
        plgpu.tcgen05_commit_arrive(smem.v_consumed.at[slot])
    plgpu.barrier_wait(smem.added[tile])
