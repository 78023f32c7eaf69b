"""What a CTA of Hopper's forward kernel works with: its sizes, its arguments, its shared memory."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array

from dca_jax.attention.blocks import BLOCK
from dca_jax.dca import DCAConfig, Phase

WARPGROUP_Q = 64  # queries a warpgroup: what one WGMMA multiplies at once
WARPGROUPS = 2  # that compute; one more feeds them
BLOCK_Q = WARPGROUP_Q * WARPGROUPS


@dataclass(frozen=True)
class ForwardTiles:
    """Block sizes of the forward kernel.

    Attributes:
        block_k: keys a step; a multiple of 64.
        num_stages: blocks of keys and values in flight.
        resident: the query is rotated in the kernel, once for each phase, and all of it stays in
            shared memory; else it is rotated outside, and each phase's is fetched when needed.
        registers: columns of the query that are multiplied from registers where no mask is needed,
            a multiple of 64; the rest, and all where there is a mask, from shared memory.
        cluster: query heads of one kv head that share what they read (1 or 2).
    """

    block_k: int
    num_stages: int
    resident: bool
    registers: int
    cluster: int

    def shared_bytes(self, head_dim: int, phases: int) -> int:
        """Shared memory a CTA needs, in bytes."""
        queries = (phases if self.resident else 1) * BLOCK_Q * head_dim * 2
        keys_values = 2 * self.num_stages * self.block_k * head_dim * 2
        return queries + keys_values + RESERVED


RESERVED = 3 * 1024  # for the log-sum-exp, the walks and the barriers: each begins a KiB

# By head_dim, the fastest of a few tried by hand on an H200; 256: the first that fits.
TILES = {
    64: ForwardTiles(block_k=256, num_stages=2, resident=True, registers=0, cluster=2),
    128: ForwardTiles(block_k=128, num_stages=2, resident=True, registers=128, cluster=2),
    256: ForwardTiles(block_k=64, num_stages=2, resident=False, registers=0, cluster=2),
}


class Problem(NamedTuple):
    """What is static about a call."""

    num_keys: int  # of a row of the cache, its padding not counted
    group: int  # query heads of a kv head
    cluster: int  # CTAs that share what they read
    dca: DCAConfig
    phases: tuple[Phase, ...]
    tiles: ForwardTiles


class Refs(NamedTuple):
    """The kernel's arguments and results, in global memory."""

    query: Any  # [B, T, N, H] raw; or [phases, B, T, N, H] rotated, if not resident
    key: Any  # [L * B, S, K, H]
    value: Any
    place: Any  # [B, 4]: row of the cache, offset, length, key offset
    tables: tuple[Any, ...]  # of `rotation_tables`, if resident
    out: Any  # [B, T, N, H]
    lse: Any  # [B, N, T], whole tiles; or None

    @classmethod
    def of(cls, resident: bool, refs: tuple) -> "Refs":
        """From the references in the order in which the kernel gets them."""
        query, key, value, place, *rest = refs
        tables, (out, *lse) = (rest[:3], rest[3:]) if resident else ([], rest)
        return cls(query, key, value, place, tuple(tables), out, lse[0] if lse else None)


class Shared(NamedTuple):
    """Shared memory: tiles, then barriers."""

    q: Any  # [WARPGROUPS, rotations, WARPGROUP_Q, H]; at last the output
    k: Any  # [num_stages, block_k, H]
    v: Any  # [num_stages, block_k, H]
    lse: Any  # [WARPGROUPS, WARPGROUP_Q]
    walks: Any  # [3 * phases, 2]: which blocks of keys are visited
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
        num_phases, keys = len(problem.phases), (num_stages, block_k, head_dim)
        rotations = num_phases if problem.tiles.resident else 1

        def consumed() -> Any:
            if problem.cluster == 1:
                return plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=num_stages)
            return plgpu.ClusterBarrier(
                collective_axes=("pair",), num_arrivals=WARPGROUPS, num_barriers=num_stages
            )

        return cls(
            q=plgpu.SMEM((WARPGROUPS, rotations, WARPGROUP_Q, head_dim), dtype),
            k=plgpu.SMEM(keys, dtype),
            v=plgpu.SMEM(keys, dtype),
            lse=plgpu.SMEM((WARPGROUPS, WARPGROUP_Q), jnp.float32),
            walks=plgpu.SMEM((3 * num_phases, 2), jnp.int32),
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
