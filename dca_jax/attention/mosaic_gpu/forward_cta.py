"""What a CTA of Hopper's forward kernel works with: its sizes, its arguments, its shared memory."""

from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array

from dca_jax.attention.mosaic_gpu.forward_tiles import WARPGROUP_Q, WARPGROUPS, ForwardTiles
from dca_jax.dca import DCAConfig, Phase


class Problem(NamedTuple):
    """What is static about a call: some of DCA's phases, or one band of another method."""

    num_keys: int  # of a row, the cache's padding not counted
    group: int  # query heads of a kv head
    cluster: int  # CTAs that share what they read
    dca: DCAConfig | None  # None: a band
    phases: tuple[Phase, ...]  # of a band: none
    tiles: ForwardTiles
    page: int | None  # tokens of a page; None: a row's keys lie one behind the other
    rotations: int  # of the queries, that are in shared memory at once


class OfBand(NamedTuple):
    """What the kernel is told of a band, whose queries and keys come rotated.

    T is whole tiles, S whole blocks of keys.
    """

    walks: Any  # [B, tiles, 3, 2]: `ranges.walks_of_band`
    start: Any  # [B, T]: the first slot each query meets
    stop: Any  # [B, T]: the slot behind the last
    query_steps: Any  # [B, T]: `bands.Steps` of queries; or None
    key_steps: Any  # [B, S]: and of keys


class Refs(NamedTuple):
    """The kernel's arguments and results, in global memory."""

    query: Any  # [B, T, N, H] raw; or rotated: [phases, B, T, N, H]; of a band: one, or several
    key: Any  # [L * B, S, K, H]; or a pool [L * P, page, K, H]
    value: Any
    place: Any  # [B, 5]: rows of the keys and the values, or a pool's first page; then of the text:
    # offset, length, key offset
    tables: Any  # three of `rotation_tables`, if resident; else none
    blocks: Any  # `KeyBlocks`; or None
    pages: Any  # [B, pages of a row]; or None
    band: Any  # `OfBand`; or None
    out: Any  # [B, T, N, H]
    lse: Any  # [B, N, T], whole tiles; or None


class Shared(NamedTuple):
    """Shared memory: tiles, then barriers."""

    q: Any  # [WARPGROUPS, rotations, WARPGROUP_Q, H]; at last the output
    k: Any  # [num_stages, block_k, H]
    v: Any  # [num_stages, block_k, H]
    lse: Any  # [WARPGROUPS, WARPGROUP_Q]
    walks: Any  # [3 * phases, 2], a band being one: which blocks of keys are visited
    q_loaded: Any
    k_loaded: Any
    v_loaded: Any
    planned: Any  # the walks are there
    k_consumed: Any
    v_consumed: Any
    ping_pong: Any  # hands the tensor cores from one computing warpgroup to the other

    @classmethod
    def types(cls, problem: Problem, dtype: Any, head_dim: int) -> "Shared":
        """What is allocated."""
        num_stages, block_k = problem.tiles.num_stages, problem.tiles.block_k
        keys = (num_stages, block_k, head_dim)

        def consumed() -> Any:
            if problem.cluster == 1:
                return plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=num_stages)
            return plgpu.ClusterBarrier(
                collective_axes=("pair",), num_arrivals=WARPGROUPS, num_barriers=num_stages
            )

        return cls(
            q=plgpu.SMEM((WARPGROUPS, problem.rotations, WARPGROUP_Q, head_dim), dtype),
            k=plgpu.SMEM(keys, dtype),
            v=plgpu.SMEM(keys, dtype),
            lse=plgpu.SMEM((WARPGROUPS, WARPGROUP_Q), jnp.float32),
            walks=plgpu.SMEM((3 * max(len(problem.phases), 1), 2), jnp.int32),
            q_loaded=plgpu.Barrier(num_barriers=WARPGROUPS),
            k_loaded=plgpu.Barrier(num_barriers=num_stages),
            v_loaded=plgpu.Barrier(num_barriers=num_stages),
            planned=plgpu.Barrier(),
            k_consumed=consumed(),
            v_consumed=consumed(),
            ping_pong=plgpu.Barrier(num_arrivals=WARPGROUPS),
        )


class CTA(NamedTuple):
    """What a CTA works on, and where its data is."""

    problem: Problem
    gmem: Refs
    smem: Shared
    batch: Array
    head: Array
    tile: Array
