"""The blocks of keys that a tile of queries visits.

Here they are scalars computed inside a kernel; `full_and_edge_walks` also takes arrays of tiles.

A phase's keys are a contiguous range for every query, and both its bounds grow with the query. So
for the queries first .. last, a block is full (all of them attend to all of it), an edge (some
attend to a part), or not needed. Full blocks need no mask and come first; the few edges of a tile
come after them, and are masked.

Ranges contain text indices, and blocks contain slots of the available keys. These may be any slice
of the text: before a range, after it, or across its end.
"""

import functools
import itertools
import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from dca_jax.attention.blocks import BLOCK, edge_blocks, full_blocks
from dca_jax.attention.mosaic_gpu.forward_tiles import BLOCK_Q
from dca_jax.dca import DCAConfig, Phase, key_range


class Keys(NamedTuple):
    """The available keys: slots 0 .. count - 1 hold keys offset .. offset + count - 1."""

    offset: Int[Array, "..."]
    count: int | Int[Array, "..."]

    def slot(self, index: Int[Array, "..."]) -> Int[Array, "..."]:
        """The slot of a text index, clipped so that it can be a bound of a range of slots."""
        return jnp.minimum(jnp.maximum(index - self.offset, 0), self.count)


class Walk(NamedTuple):
    """Consecutive blocks of keys that a tile visits in one phase."""

    phase: int  # its number among the kernel's phases
    start: Int[Array, "..."]  # the first block
    count: Int[Array, "..."]


def any_met(
    first: Int[Array, ""],
    last: Int[Array, ""],
    phases: tuple[Phase, ...],
    dca: DCAConfig,
    keys: Keys,
) -> Bool[Array, ""]:
    """Whether queries first .. last attend to any keys: else `full_and_edge_walks` are empty."""
    met = jnp.bool(False)
    for phase in phases:
        low, high = key_range(first, phase, dca)[0], key_range(last, phase, dca)[1]
        met = met | (keys.slot(high) > keys.slot(low))
    return met & (last >= first)


def full_and_edge_walks(
    first: Int[Array, "..."],
    last: Int[Array, "..."],
    phases: tuple[Phase, ...],
    dca: DCAConfig,
    keys: Keys,
    block_k: int,
) -> tuple[list[Walk], list[Walk]]:
    """The full blocks of queries first .. last, and the edges, which need a mask.

    Both are empty if last < first. Edges come in the reverse order of the phases, so that the last
    phase's edges directly follow its full blocks.
    """
    full, edges = [], []
    size = jnp.int32(block_k)
    for number, phase in enumerate(phases):
        (low, low_end), (high, high_end) = (
            map(keys.slot, key_range(i, phase, dca)) for i in (first, last)
        )
        met = (last >= first) & (high_end > low)
        begin = lax.div(low, size)
        end = jnp.where(met, lax.div(high_end + (size - 1), size), begin)
        full_begin = lax.div(high + (size - 1), size)
        full_end = jnp.where(met, lax.div(low_end, size), full_begin)
        count = jnp.maximum(full_end - full_begin, 0)
        full.append(Walk(number, full_begin, count))
        before = jnp.where(count > 0, full_begin, end) - begin
        after = jnp.where(count > 0, end - full_end, 0)
        edges.append((Walk(number, begin, before), Walk(number, full_end, after)))
    return full, [walk for pair in reversed(edges) for walk in pair]


def listed_and_edge_walks(
    first: Int[Array, ""],
    last: Int[Array, ""],
    counts: list[Int[Array, ""]],
    phases: tuple[Phase, ...],
    dca: DCAConfig,
    keys: Keys,
    block_k: int,
) -> tuple[list[Walk], list[Walk]]:
    """As `full_and_edge_walks`, with a list that names `counts` full blocks of each phase.

    The tile begins at a multiple of 128. Edges, like the list's blocks, have 128 keys, that is,
    128 / block_k steps. A full walk's start is that of its part of the list.
    """
    parts = jnp.int32(BLOCK // block_k)
    tile = lax.div(first, jnp.int32(BLOCK))
    full, edges, start = [], [], jnp.int32(0)
    for number, (phase, count) in enumerate(zip(phases, counts, strict=True)):
        low, high = keys.slot(key_range(first, phase, dca)[0]), key_range(last, phase, dca)[1]
        stop = jnp.where(last >= first, keys.slot(high), low)
        before, after = edge_blocks(low, stop, full_blocks(tile, phase, dca))
        edges.append(tuple(Walk(number, at * parts, size * parts) for at, size in (before, after)))
        count = jnp.where(last >= first, count * parts, 0)
        full.append(Walk(number, start, count))
        start = start + count
    return full, [walk for pair in reversed(edges) for walk in pair]


def walks_of_band(
    start: Int[Array, "B T"], stop: Int[Array, "B T"], present: Bool[Array, "B T"], block_k: int
) -> Int[Array, "B tiles 3 2"]:
    """The first block and number of full blocks, of edges before them, and of edges after them.

    For each tile of queries, each of which attends to slots [start, stop); not for use in kernels.

    Args:
        present: False for absent queries, whose ranges are empty.
    """
    start, stop, present = (x.reshape(x.shape[0], -1, BLOCK_Q) for x in (start, stop, present))
    met = start < stop
    most = jnp.int32(2**30)
    low, low_end = (jnp.where(met, x, most).min(axis=2) for x in (start, stop))
    high, high_end = (jnp.where(met, x, 0).max(axis=2) for x in (start, stop))
    begin, end = jnp.minimum(low, high_end) // block_k, -(-high_end // block_k)
    full_begin, full_end = -(-high // block_k), low_end // block_k
    by_all = (met | ~present).all(axis=2) & met.any(axis=2)
    count = jnp.where(by_all, jnp.maximum(full_end - full_begin, 0), 0)
    before = jnp.where(count > 0, full_begin, end) - begin
    after = jnp.where(count > 0, end - full_end, 0)
    starts = jnp.where(count > 0, full_begin, begin), begin, jnp.where(count > 0, full_end, end)
    return jnp.stack([jnp.stack(starts, axis=2), jnp.stack([count, before, after], axis=2)], axis=3)


def steps(walks: list[Walk]) -> Int[Array, ""]:
    """Total number of blocks."""
    return functools.reduce(operator.add, (walk.count for walk in walks))


def remember(full: list[Walk], edges: list[Walk], memory: Any) -> None:
    """Writes walks to [3 * phases, 2] integers in shared memory, for other threads to `recall`."""
    for n, walk in enumerate((*full, *edges)):
        memory[n, 0], memory[n, 1] = walk.start, walk.count


def recall(memory: Any) -> tuple[list[Walk], list[Walk]]:
    """The walks in shared memory, which are read at each use to save registers."""
    # The mask shows the compiler that no sum of these is negative, which saves sign handling.
    numbers = 2**24 - 1
    phases = memory.shape[0] // 3
    order = [*range(phases), *(n for n in reversed(range(phases)) for _ in range(2))]
    walks = [
        Walk(phase, memory[n, 0] & numbers, memory[n, 1] & numbers) for n, phase in enumerate(order)
    ]
    return walks[:phases], walks[phases:]


def locate(
    n: Int[Array, ""], walks: list[Walk], done: Int[Array, ""]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Phase number and block of step n, given that `done` steps precede these walks."""
    phase, block = jnp.int32(walks[0].phase), walks[0].start + (n - done)
    for previous, walk in itertools.pairwise(walks):
        done = done + previous.count
        here = n >= done
        phase = jnp.where(here, jnp.int32(walk.phase), phase)
        block = jnp.where(here, walk.start + (n - done), block)
    return phase, block


def ranges_of_queries(
    index: Int[Array, " queries"],
    length: Int[Array, ""],
    phase: Int[Array, ""],
    phases: tuple[Phase, ...],
    dca: DCAConfig,
    keys: Keys,
) -> tuple[Int[Array, " queries"], Int[Array, " queries"]]:
    """[start, stop) of each query's slots in phase number `phase`; empty for padding."""
    start, stop = index * 0, index * 0
    for number, name in enumerate(phases):
        low, high = key_range(index, name, dca)
        chosen = (phase == number).astype(jnp.int32)
        start, stop = start + low * chosen, stop + high * chosen
    stop = jnp.minimum(stop - keys.offset, keys.count)
    return start - keys.offset, stop * (index < length).astype(jnp.int32)
