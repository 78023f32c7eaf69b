"""The queries of a computing warpgroup, and their rotations in shared memory."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dca_jax.attention.mosaic_gpu.forward_cta import CTA
from dca_jax.attention.mosaic_gpu.forward_tiles import WARPGROUP_Q
from dca_jax.attention.mosaic_gpu.operands import zero
from dca_jax.attention.mosaic_gpu.ranges import Keys, ranges_of_queries
from dca_jax.dca import DCAConfig, Phase

PER_QUERY = plgpu.Layout.WGMMA.reduce(1)


class Queries(NamedTuple):
    """A computing warpgroup's share of a CTA's tile."""

    cta: CTA
    warpgroup: Array
    first: Array  # index of the first one among the row's queries

    @classmethod
    def of(cls, cta: CTA, warpgroup: Array) -> "Queries":
        """The share of warpgroup number `warpgroup`."""
        return cls(cta, warpgroup, cta.tile * cta.problem.tiles.block_q + warpgroup * WARPGROUP_Q)

    @property
    def slots(self) -> Any:
        """Their slots among the row's queries."""
        return pl.ds(self.first, WARPGROUP_Q)

    def index(self) -> Int[Array, " queries"]:
        """Their text indices, recomputed at each use to save registers."""
        iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, (WARPGROUP_Q,), 0)
        return self.cta.gmem.place[self.cta.batch, 2] + self.first + iota(layout=PER_QUERY)

    def in_phase(self, phase: int | Array, step: Array) -> list[Any]:
        """The queries in shared memory, rotated for a phase, or in all rotations of a band."""
        q, problem = self.cta.smem.q, self.cta.problem
        at = self.warpgroup + zero(step) if self.cta.is_dense else self.warpgroup
        if problem.dca is None:
            return [q.at[at, number] for number in range(problem.rotations)]
        return [q.at[at, phase if problem.tiles.resident else 0]]

    def ranges(self, phase: Array) -> tuple[Int[Array, " queries"], Int[Array, " queries"]]:
        """[start, stop) of each query's slots in a phase or a band."""
        problem, gmem, batch = self.cta.problem, self.cta.gmem, self.cta.batch
        if gmem.band is not None:
            return self.load(gmem.band.start), self.load(gmem.band.stop)
        assert problem.dca is not None
        keys = Keys(gmem.place[batch, 4], problem.num_keys)
        length = gmem.place[batch, 3]
        return ranges_of_queries(self.index(), length, phase, problem.phases, problem.dca, keys)

    def load(self, numbers: Any) -> Int[Array, " queries"]:
        """Loads one number per query from [B, T] in global memory."""
        of_queries = numbers.at[self.cta.batch, self.slots]
        return plgpu.load(of_queries, layout=PER_QUERY, optimized=False)


def fetch(queries: Queries, phase: int | Array) -> None:
    """Loads this phase's rotation, if only one rotation of the queries fits."""
    cta, at = queries.cta, queries.warpgroup

    def load(source: Any, *phase: Any) -> None:
        rotated = source.at[*phase, cta.batch, queries.slots, cta.head]
        plgpu.copy_gmem_to_smem(rotated, cta.smem.q.at[at, 0], cta.smem.q_loaded.at[at])

    # No thread still reads the former queries: every thread of the warpgroup has arrived at
    # `ping_pong`, or at a barrier of the last tile's end, since the last product with them.
    if not cta.is_dense:
        load(cta.gmem.query, phase)
    elif isinstance(phase, int):
        load(cta.gmem.query[phase])
    else:
        for number, source in enumerate(cta.gmem.query):
            pl.when(phase == number)(functools.partial(load, source))
    plgpu.barrier_wait(cta.smem.q_loaded.at[at])


def place_band(queries: Queries) -> None:
    """Loads all rotations of a band's queries."""
    cta, at = queries.cta, queries.warpgroup
    for number, source in enumerate(cta.gmem.query):
        rotated = source.at[cta.batch, queries.slots, cta.head]
        plgpu.copy_gmem_to_smem(rotated, cta.smem.q.at[at, number], cta.smem.q_loaded.at[at])
        plgpu.barrier_wait(cta.smem.q_loaded.at[at])


def fetch_raw(queries: Queries) -> None:
    """Starts loading the queries before rotation."""
    cta, at = queries.cta, queries.warpgroup
    source = cta.gmem.query.at[cta.batch, queries.slots, cta.head]
    plgpu.copy_gmem_to_smem(source, _raw(queries), cta.smem.q_loaded.at[at])


def _raw(queries: Queries) -> Any:
    return queries.cta.smem.q.at[queries.warpgroup, queries.cta.problem.slots - 1]


def place_rotations(queries: Queries) -> None:
    """Stores the queries that `fetch_raw` loads in shared memory, rotated for each phase."""
    cta, at = queries.cta, queries.warpgroup
    problem, smem = cta.problem, cta.smem
    assert problem.dca is not None
    *intra, fixed = cta.gmem.tables
    intra = [table.at[cta.batch, queries.slots] for table in intra]
    tables = _load_tables(problem.phases, intra, fixed.at[cta.batch])
    plgpu.barrier_wait(smem.q_loaded.at[at])
    q = plgpu.load(_raw(queries), layout=plgpu.Layout.WGMMA)
    rotated = _rotations(q, problem.phases, tables, queries.index, problem.dca)
    if problem.tiles.persistent:  # every thread has read the raw query, and the output has left
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    else:
        plgpu.commit_smem()  # every thread has read the raw query
    for number, q in enumerate(rotated):
        smem.q[at, number] = q.astype(smem.q.dtype)
    plgpu.commit_smem()


def _load_tables(
    phases: tuple[Phase, ...], intra: list[Any], fixed: Any
) -> tuple[list[Array], list[Array]]:
    """(cos and sin of intra positions, constant rotations) needed by `phases`, in registers."""

    def constant(number: int) -> Array:
        layout = plgpu.Layout.WGMMA.reduce(0)
        return plgpu.load(fixed.at[number], layout=layout, optimized=False)

    per_query, constants = [], []
    if "intra" in phases or "succ" in phases:
        per_query = [plgpu.load(x, layout=plgpu.Layout.WGMMA, optimized=False) for x in intra]
    if "inter" in phases or "succ" in phases:
        constants = [constant(number) for number in range(4 if "succ" in phases else 2)]
    return per_query, constants


def _rotations(
    q: Float[Array, "queries H"],
    phases: tuple[Phase, ...],
    tables: tuple[list[Array], list[Array]],
    indices: Callable[[], Int[Array, " queries"]],
    dca: DCAConfig,
) -> list[Float[Array, "queries H"]]:
    """The query rotated for each phase, in float32, scaled so that logits are in log2 units."""
    half = q.shape[1] // 2
    q = q.astype(jnp.float32)
    halves = q[:, :half], q[:, half:]
    per_query, constants = tables
    constants = [lax.broadcast_in_dim(x, (WARPGROUP_Q, half), [1]) for x in constants]

    def rotate(halves: tuple[Array, Array], cos: Array, sin: Array) -> tuple[Array, Array]:
        first, second = halves
        return first * cos - second * sin, second * cos + first * sin

    seen = {}
    if "inter" in phases or "succ" in phases:
        seen["inter"] = rotate(halves, *constants[:2])
    if "intra" in phases or "succ" in phases:
        seen["intra"] = rotate(halves, *per_query)
    if "succ" in phases:
        s, furthest = dca.chunk_len, dca.inter_position
        near = rotate(seen["intra"], *constants[2:])
        is_far = lax.rem(indices(), jnp.int32(s)) + s >= furthest
        is_far = lax.broadcast_in_dim(is_far.astype(jnp.float32), (WARPGROUP_Q, half), [0])
        seen["succ"] = tuple(a + (b - a) * is_far for a, b in zip(near, seen["inter"], strict=True))
    return [jnp.concatenate(seen[phase], axis=1) for phase in phases]
