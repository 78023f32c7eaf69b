"""Full blocks in Hopper's forward kernel, with the next block's logits under way.

A warpgroup starts the product for a block's logits together with that of the previous block's
values: while the latter runs, the block's weights are computed. Warpgroups run freely: each uses
the tensor cores while others compute weights.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from dca_jax.attention.mosaic_gpu.forward_queries import Queries
from dca_jax.attention.mosaic_gpu.forward_softmax import Softmax, rescale, weigh
from dca_jax.attention.mosaic_gpu.forward_tiles import WARPGROUP_Q


def attend_ahead(
    queries: Queries,
    num_steps: Int[Array, ""],
    parts: list[tuple[Any, Any]],
    begin: Int[Array, ""],
    count: Int[Array, ""],
    state: Softmax,
) -> Softmax:
    """Steps begin .. begin + count - 1, at least one; the first one's keys are there already.

    Args:
        num_steps: of the whole tile; at the end the next step's keys are there, if there is one.
        parts: parts of the queries' columns, and functions of the step that return them.
    """
    tiles, smem = queries.cta.problem.tiles, queries.cta.smem
    stages, dtype = jnp.int32(tiles.num_stages), smem.v.dtype
    s_type = plgpu.WGMMAAccumulatorRef((WARPGROUP_Q, tiles.block_k), jnp.float32)
    acc_type = plgpu.WGMMAAccumulatorRef((WARPGROUP_Q, smem.v.shape[-1]), jnp.float32)

    def multiply(s: Any, n: Array) -> None:
        for columns, q in parts:
            plgpu.wgmma(s, q(n), smem.k.at[lax.rem(n, stages), :, columns].transpose((1, 0)))

    def first(s: Any) -> Array:
        multiply(s, begin)
        return s[...]

    logits = pl.run_scoped(first, s_type)
    plgpu.barrier_arrive(smem.k_consumed.at[lax.rem(begin, stages)])
    m_i, l_i, p, grown, decay = weigh(state.m_i, state.l_i, logits)
    acc = rescale(state.acc, grown, decay)

    def step(n: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        so_far, m_i, l_i, p = carry
        slot, before = lax.rem(n, stages), lax.rem(n - 1, stages)
        plgpu.barrier_wait(smem.k_loaded.at[slot])
        plgpu.barrier_wait(smem.v_loaded.at[before])

        def both(s: Any, acc: Any) -> tuple[Array, ...]:
            acc[...] = so_far
            multiply(s, n)
            plgpu.wgmma(acc, p, smem.v.at[before])
            logits = plgpu.wgmma_accumulator_load(s, wait_n=1)
            plgpu.barrier_arrive(smem.k_consumed.at[slot])
            m_next, l_next, p_next, grown, decay = weigh(m_i, l_i, logits)
            done = plgpu.wgmma_accumulator_load(acc, wait_n=0)
            plgpu.barrier_arrive(smem.v_consumed.at[before])
            return rescale(done, grown, decay), m_next, l_next, p_next.astype(dtype)

        return pl.run_scoped(both, s_type, acc_type)

    last = begin + count - 1
    carry = acc, m_i, l_i, p.astype(dtype)
    so_far, m_i, l_i, p = lax.fori_loop(begin + 1, begin + count, step, carry)
    slot = lax.rem(last, stages)
    plgpu.barrier_wait(smem.v_loaded.at[slot])

    def add_values(acc: Any) -> Array:
        acc[...] = so_far
        plgpu.wgmma(acc, p, smem.v.at[slot])

        @pl.when(last + 1 < num_steps)
        def _wait_for_next() -> None:
            plgpu.barrier_wait(smem.k_loaded.at[lax.rem(last + 1, stages)])

        return acc[...]

    acc = pl.run_scoped(add_values, acc_type)
    plgpu.barrier_arrive(smem.v_consumed.at[slot])
    return state._replace(acc=acc, m_i=m_i, l_i=l_i)
