"""Arguments, shared memory and tensor memory of a CTA of Blackwell's forward kernel."""

from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array

from dca_jax.attention.mosaic_blackwell.tiles import (
    BLOCK_K,
    TILE_Q,
    TILES_PER_CTA,
)
from dca_jax.dca import DCAConfig, Phase


class Problem(NamedTuple):
    """Static parameters of a call."""

    num_keys: int  # keys per row, without the cache's padding
    group: int  # query heads per kv head
    dca: DCAConfig
    phases: tuple[Phase, ...]
    num_stages: int  # blocks of keys, and of values, in flight


class Refs(NamedTuple):
    """The kernel's arguments and results, in global memory."""

    query: Any  # [B, T, N, H], rotated: one for each phase
    key: Any  # [L * B, S, K, H]
    value: Any
    place: Any  # [B, 4]: row of keys and values; the text's offset, length, key offset
    out: Any  # [B, T, N, H]
    lse: Any  # [B, N, T], whole tiles; or None


class Shared(NamedTuple):
    """Memory of a CTA: shared memory, tensor memory, then barriers.

    The barriers of tensor cores order them with other threads; a copy's barrier counts its bytes.
    """

    q: Any  # [TILES_PER_CTA, TILE_Q, H]: one rotation; finally the output
    k: Any  # [num_stages, BLOCK_K, H]
    v: Any  # [num_stages, BLOCK_K, H]
    lse: Any  # [TILES_PER_CTA, TILE_Q]
    walks: Any  # [3 * phases, 2]: the blocks of keys to visit
    logits: Any  # for each tile: logits [TILE_Q, BLOCK_K], and in their place the weights
    acc: Any  # for each tile: the output's sum [TILE_Q, H]
    planned: Any  # the walks are in shared memory
    q_loaded: Any
    k_loaded: Any
    v_loaded: Any
    q_consumed: Any
    k_consumed: Any
    v_consumed: Any
    multiplied: Any  # by tile: logits are ready and the sum complete; finally, the output is
    weighted: Any  # by tile: weights are ready, and the sum has their scale
    added: Any  # by tile: weights are no longer needed, so their place is free for logits

    @classmethod
    def types(cls, problem: Problem, dtype: Any, head_dim: int) -> "Shared":
        """The types to allocate."""
        num_stages = problem.num_stages
        keys = (num_stages, BLOCK_K, head_dim)

        def ordered(**sizes: int) -> Any:
            return plgpu.Barrier(orders_tensor_core=True, **sizes)

        # Apart, so that a warpgroup need not keep the state of the other's in registers.
        def by_tile() -> Any:
            return tuple(ordered() for _ in range(TILES_PER_CTA))

        def logits_and_weights() -> Any:
            return plgpu.RefUnion(
                plgpu.TMEM((TILE_Q, BLOCK_K), jnp.float32),
                plgpu.TMEM((TILE_Q, BLOCK_K), dtype, packed=True),
            )

        return cls(
            q=plgpu.SMEM((TILES_PER_CTA, TILE_Q, head_dim), dtype),
            k=plgpu.SMEM(keys, dtype),
            v=plgpu.SMEM(keys, dtype),
            lse=plgpu.SMEM((TILES_PER_CTA, TILE_Q), jnp.float32),
            walks=plgpu.SMEM((3 * len(problem.phases), 2), jnp.int32),
            logits=tuple(logits_and_weights() for _ in range(TILES_PER_CTA)),
            acc=tuple(plgpu.TMEM((TILE_Q, head_dim), jnp.float32) for _ in range(TILES_PER_CTA)),
            planned=plgpu.Barrier(),
            q_loaded=plgpu.Barrier(num_arrivals=TILES_PER_CTA),
            k_loaded=plgpu.Barrier(num_barriers=num_stages),
            v_loaded=plgpu.Barrier(num_barriers=num_stages),
            q_consumed=ordered(),
            k_consumed=ordered(num_barriers=num_stages),
            v_consumed=ordered(num_barriers=num_stages),
            multiplied=by_tile(),
            weighted=by_tile(),
            added=by_tile(),
        )


class CTA(NamedTuple):
    """A CTA's work, and references to its data."""

    problem: Problem
    gmem: Refs
    smem: Shared
    batch: Array
    head: Array
    first: Array  # index of its first query among the row's queries
