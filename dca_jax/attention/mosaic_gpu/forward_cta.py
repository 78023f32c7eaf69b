"""Sizes, arguments and shared memory of a CTA of Hopper's forward kernel."""

from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dca_jax.attention.mosaic_gpu.forward_tiles import WARPGROUP_Q, ForwardTiles
from dca_jax.attention.mosaic_gpu.ranges import Keys, any_met
from dca_jax.dca import DCAConfig, Phase


class Problem(NamedTuple):
    """Static parameters of a call, for some of DCA's phases or one band of another method."""

    num_keys: int  # keys per row, without the cache's padding
    group: int  # query heads per kv head
    cluster: int  # CTAs that share their reads
    dca: DCAConfig | None  # None for a band
    phases: tuple[Phase, ...]  # empty for a band
    tiles: ForwardTiles
    page: int | None  # tokens per page; None if a row's keys are contiguous
    rotations: int  # rotations of the queries in shared memory at once
    spare: int = 0  # 1 if there is room for the next tile's queries besides

    @property
    def slots(self) -> int:
        """Tiles of queries in shared memory; the last one receives those before rotation."""
        return self.rotations + self.spare


class OfBand(NamedTuple):
    """The kernel's arguments for a band, whose queries and keys are already rotated.

    T is whole tiles, S whole blocks of keys.
    """

    walks: Any  # [B, tiles, 3, 2]: `ranges.walks_of_band`
    start: Any  # [B, T]: first slot of each query's keys
    stop: Any  # [B, T]: end of each query's keys
    query_steps: Any  # [B, T]: `bands.Steps` of queries; or None
    key_steps: Any  # [B, S]: and of keys


class Refs(NamedTuple):
    """The kernel's arguments and results, in global memory."""

    query: Any  # [B, T, N, H] raw; or rotated, one for each phase, or stacked if not dense; or all
    # rotations of a band
    key: Any  # [L * B, S, K, H]; or a pool [L * P, page, K, H]
    value: Any
    place: Any  # [B, 5]: rows of keys and values, or a pool's first page; then the text's
    # offset, length, key offset
    tables: Any  # the three `rotation_tables` if resident, else empty
    blocks: Any  # `KeyBlocks`; or None
    pages: Any  # [B, pages per row]; or None
    band: Any  # `OfBand`; or None
    out: Any  # [B, T, N, H]
    lse: Any  # [B, N, T], whole tiles; or None


class Shared(NamedTuple):
    """Shared memory: tiles, then barriers."""

    q: Any  # [warpgroups, slots, WARPGROUP_Q, H]; finally the output
    k: Any  # [num_stages, block_k, H]
    v: Any  # [num_stages, block_k, H]
    lse: Any  # [warpgroups, WARPGROUP_Q]
    walks: Any  # [3 * phases, 2], a band being one phase: the blocks of keys to visit; if
    # persistent, two of them, for two tiles
    q_loaded: Any
    k_loaded: Any
    v_loaded: Any
    planned: Any  # signals that the walks are ready
    walked: Any  # and that they are not needed any more; None if not persistent
    k_consumed: Any
    v_consumed: Any
    ping_pong: Any  # hands the tensor cores from one computing warpgroup to the other

    @classmethod
    def types(cls, problem: Problem, dtype: Any, head_dim: int) -> "Shared":
        """The types to allocate."""
        num_stages, block_k = problem.tiles.num_stages, problem.tiles.block_k
        warpgroups, persistent = problem.tiles.warpgroups, problem.tiles.persistent
        keys = (num_stages, block_k, head_dim)
        walks = (3 * max(len(problem.phases), 1), 2)

        def consumed() -> Any:
            if problem.cluster == 1:
                return plgpu.Barrier(num_arrivals=warpgroups, num_barriers=num_stages)
            return plgpu.ClusterBarrier(
                collective_axes=("pair",), num_arrivals=warpgroups, num_barriers=num_stages
            )

        return cls(
            q=plgpu.SMEM((warpgroups, problem.slots, WARPGROUP_Q, head_dim), dtype),
            k=plgpu.SMEM(keys, dtype),
            v=plgpu.SMEM(keys, dtype),
            lse=plgpu.SMEM((warpgroups, WARPGROUP_Q), jnp.float32),
            walks=plgpu.SMEM((2, *walks) if persistent else walks, jnp.int32),
            q_loaded=plgpu.Barrier(num_barriers=warpgroups),
            k_loaded=plgpu.Barrier(num_barriers=num_stages),
            v_loaded=plgpu.Barrier(num_barriers=num_stages),
            planned=plgpu.Barrier(num_barriers=2 if persistent else 1),
            walked=(plgpu.Barrier(num_arrivals=warpgroups, num_barriers=2) if persistent else None),
            k_consumed=consumed(),
            v_consumed=consumed(),
            ping_pong=plgpu.Barrier(num_arrivals=warpgroups),
        )


class CTA(NamedTuple):
    """A CTA's work, and references to its data."""

    problem: Problem
    gmem: Refs
    smem: Shared
    batch: Array
    head: Array
    tile: Array
    begin: Array  # steps of the tiles before this one, which have used the stages in turn

    @property
    def is_dense(self) -> bool:
        """Whether it attends to all keys of DCA's phases, contiguous in memory."""
        return (
            self.problem.dca is not None and self.problem.page is None and self.gmem.blocks is None
        )

    def text(self) -> tuple[Array, Array, Keys]:
        """First and last text index of the tile's queries, and the available keys.

        The last is less than the first if the tile has none.
        """
        offset, length, key_offset = (self.gmem.place[self.batch, n] for n in range(2, 5))
        block_q = self.problem.tiles.block_q
        first = offset + self.tile * block_q
        end = jnp.minimum(jnp.minimum(first + block_q, length), offset + self.gmem.out.shape[1])
        return first, end - 1, Keys(key_offset, self.problem.num_keys)

    def has_keys(self) -> Bool[Array, ""]:
        """Whether the tile's queries attend to any keys of DCA's phases."""
        assert self.problem.dca is not None
        first, last, keys = self.text()
        return any_met(first, last, self.problem.phases, self.problem.dca, keys)
