"""The warpgroup of Hopper's forward kernel that feeds the others keys and values."""

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dca_jax.attention.mosaic_gpu.forward_cta import BLOCK_Q, CTA, Shared
from dca_jax.attention.mosaic_gpu.ranges import Keys, Walk, full_and_edge_walks, locate, remember, steps


def feed(cta: CTA) -> None:
    """Works out which blocks the tile visits, and keeps their keys and values in flight."""
    plgpu.set_max_registers(40, action="decrease")
    problem, gmem, smem = cta.problem, cta.gmem, cta.smem
    num_queries, tiles = gmem.query.shape[-3], problem.tiles
    num_stages, block_k = tiles.num_stages, tiles.block_k
    kv_head = lax.div(cta.head, jnp.int32(problem.group))
    axes = "pair" if problem.cluster > 1 else None
    cache_row, offset, length, key_offset = (gmem.place[cta.batch, n] for n in range(4))
    first = offset + cta.tile * BLOCK_Q
    last = jnp.minimum(jnp.minimum(first + BLOCK_Q, length), offset + num_queries) - 1
    keys = Keys(key_offset, problem.num_keys)
    full, edges = full_and_edge_walks(first, last, problem.phases, problem.dca, keys, block_k)
    # Here, so that those who compute rotate meanwhile, and have the registers for it.
    remember(full, edges, smem.walks)
    plgpu.barrier_arrive(smem.planned)
    num_full, num_steps = steps(full), steps(full + edges)

    def load(n: Array, _: Any, *, walks: list[Walk], done: Array) -> None:
        slot = lax.rem(n, jnp.int32(num_stages))
        _, block = locate(n, walks, done)
        keys = (cache_row, pl.ds(block * block_k, block_k), kv_head)
        for source, target, loaded, consumed in (
            (gmem.key, smem.k, smem.k_loaded, smem.k_consumed),
            (gmem.value, smem.v, smem.v_loaded, smem.v_consumed),
        ):
            pl.when(n >= num_stages)(functools.partial(plgpu.barrier_wait, consumed.at[slot]))
            plgpu.copy_gmem_to_smem(
                source.at[keys], target.at[slot], loaded.at[slot], collective_axes=axes
            )

    lax.fori_loop(0, num_full, functools.partial(load, walks=full, done=jnp.int32(0)), None)
    lax.fori_loop(num_full, num_steps, functools.partial(load, walks=edges, done=num_full), None)
    if problem.cluster > 1:
        _drain(smem, num_stages, num_steps)


def _drain(smem: Shared, num_stages: int, num_steps: Array) -> None:
    """The other CTA of the cluster still signals to this one: stays until it is done."""
    for slot in range(num_stages):

        def wait(slot: int = slot) -> None:
            plgpu.barrier_wait(smem.k_consumed.at[slot])
            plgpu.barrier_wait(smem.v_consumed.at[slot])

        pl.when(slot < num_steps)(wait)
