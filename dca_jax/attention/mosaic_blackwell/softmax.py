"""The warpgroups of Blackwell's forward kernel that compute: one for each tile of 128 queries.

A thread has a query's row of tensor memory to itself, so maxima and sums need no other thread. The
sum of weighted values stays in tensor memory, and is rescaled there only when a query's maximum has
grown by much, which becomes rare after the first few blocks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dca_jax.attention.mosaic_blackwell.cta import CTA
from dca_jax.attention.mosaic_blackwell.tiles import BLOCK_K, TILE_Q
from dca_jax.attention.mosaic_gpu import vote
from dca_jax.attention.mosaic_gpu.ranges import Keys, locate, ranges_of_queries, recall, steps
from dca_jax.attention.softmax import LOG2E, MASKED

IN_ROWS = plgpu.Layout.TCGEN05_TMEM_NATIVE
PER_QUERY = IN_ROWS.reduce(1)
COLUMNS = 32  # of the sum in registers at once, while it is rescaled

# The sum is rescaled only when a query's maximum has grown by this much, in log2 units: weights
# stay below 2^8, which fits float16, and float32 sums are precise enough.
SLACK = 8.0


class _Softmax(NamedTuple):
    """The state of an online softmax; `m_i`, in log2 units, may lag behind by SLACK."""

    m_i: Float[Array, " queries"]
    l_i: Float[Array, " queries"]


class _Queries(NamedTuple):
    """A computing warpgroup's tile."""

    cta: CTA
    tile: int

    @property
    def slots(self) -> Any:
        """Their slots among the row's queries."""
        return pl.ds(self.cta.first + self.tile * TILE_Q, TILE_Q)

    def index(self) -> Int[Array, " queries"]:
        """Their text indices."""
        first = self.cta.gmem.place[self.cta.batch, 1] + self.cta.first + self.tile * TILE_Q
        return first + plgpu.broadcasted_iota(jnp.int32, (TILE_Q,), 0, layout=PER_QUERY)

    def ranges(self, phase: Array) -> tuple[Int[Array, " queries"], Int[Array, " queries"]]:
        """[start, stop) of each query's slots of keys in a phase."""
        problem, place = self.cta.problem, self.cta.gmem.place
        length, key_offset = (place[self.cta.batch, n] for n in (2, 3))
        keys = Keys(key_offset, problem.num_keys)
        return ranges_of_queries(self.index(), length, phase, problem.phases, problem.dca, keys)


def attend(cta: CTA, tile: int) -> None:
    """Attention of a tile's queries: first over full blocks, then over the edges."""
    plgpu.set_max_registers(224, action="increase")
    queries = _Queries(cta, tile)
    plgpu.barrier_wait(cta.smem.planned)
    state = _Softmax(_splat(MASKED), _splat(0.0))
    state = _over_full(queries, state)
    _write(queries, _over_edges(queries, state))


def _over_full(queries: _Queries, state: _Softmax) -> _Softmax:
    full, _ = recall(queries.cta.smem.walks)

    def attend(_: Array, state: _Softmax) -> _Softmax:
        return _attend_block(queries, state, lambda logits: logits)

    return lax.fori_loop(0, steps(full), attend, state)


def _over_edges(queries: _Queries, state: _Softmax) -> _Softmax:
    """Blocks to which some queries attend partly or not at all."""
    _, edges = recall(queries.cta.smem.walks)

    def attend(n: Array, state: _Softmax) -> _Softmax:
        phase, block = locate(n, edges, jnp.int32(0))

        def masked(logits: Array) -> Array:
            in_block = (x - block * BLOCK_K for x in queries.ranges(phase))
            lower, upper = (_along(x, logits) for x in in_block)
            j = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=IN_ROWS)
            return jnp.where((j >= lower) & (j < upper), logits, -jnp.inf)

        return _attend_block(queries, state, masked)

    return lax.fori_loop(0, steps(edges), attend, state)


def _attend_block(queries: _Queries, state: _Softmax, masked: Callable[[Array], Array]) -> _Softmax:
    """One step of the online softmax: weights from logits, for the warp that multiplies."""
    smem, tile = queries.cta.smem, queries.tile
    place_of_logits, place_of_weights = smem.logits[tile]
    plgpu.barrier_wait(smem.multiplied[tile])
    logits = plgpu.async_load_tmem(place_of_logits, layout=IN_ROWS)
    plgpu.wait_load_tmem()
    logits = masked(logits)
    m_i, l_i = _raise_maxima(queries, state, logits)
    p = jnp.exp2(logits - _along(m_i, logits))
    plgpu.async_store_tmem(place_of_weights, p.astype(smem.v.dtype))
    plgpu.commit_tmem()
    plgpu.barrier_arrive(smem.weighted[tile])
    return _Softmax(m_i, l_i + p.sum(axis=1))


def _raise_maxima(
    queries: _Queries, state: _Softmax, logits: Float[Array, "queries keys"]
) -> _Softmax:
    """Raises the maxima to these logits, if any of the tile's has grown by more than SLACK.

    Otherwise nothing is rescaled: the weights are larger than usual, but as precise. The sum is at
    rest: it is complete when logits are ready, and waits for the weights.
    """
    m_next = jnp.maximum(state.m_i, logits.max(axis=1))

    def rescale(state: _Softmax) -> _Softmax:
        decay = jnp.exp2(state.m_i - m_next)
        _update_sum(queries, lambda acc: acc * _along(decay, acc))
        return _Softmax(m_next, state.l_i * decay)

    grown = vote.any_in_warpgroup(m_next - state.m_i - SLACK, PER_QUERY)
    return lax.cond(grown, rescale, lambda state: state, state)


def _update_sum(queries: _Queries, update: Callable[[Array], Array]) -> None:
    """Replaces the tile's sum in tensor memory, a few columns at a time; the caller commits."""
    acc = queries.cta.smem.acc[queries.tile]
    for column in range(0, acc.shape[1], COLUMNS):
        part = acc.at[:, pl.ds(column, COLUMNS)]
        old = plgpu.async_load_tmem(part, layout=IN_ROWS)
        plgpu.wait_load_tmem()
        plgpu.async_store_tmem(part, update(old))


def _write(queries: _Queries, state: _Softmax) -> None:
    """Writes the output and the log-sum-exp via shared memory; 0 and -inf without keys."""
    cta, tile, (m_i, l_i) = queries.cta, queries.tile, state
    gmem, smem = cta.gmem, cta.smem
    full, edges = recall(smem.walks)
    pl.when(steps(full + edges) > 0)(lambda: plgpu.barrier_wait(smem.multiplied[tile]))
    is_met = (queries.index() < gmem.place[cta.batch, 2]) & (l_i > 0)
    safe = jnp.where(is_met, l_i, 1.0)
    inverse = jnp.where(is_met, 1 / safe, 0.0)

    def normalized(acc: Array) -> Array:
        # Without any step the sum holds what an earlier kernel left there, maybe NaN.
        by = _along(inverse, acc)
        return jnp.where(by > 0, acc * by, 0.0)

    _update_sum(queries, normalized)
    plgpu.commit_tmem()
    # Once more through tensor memory: as its threads hold it now, shared memory takes it in order.
    out = plgpu.async_load_tmem(smem.acc[tile], layout=plgpu.Layout.TCGEN05)
    smem.q[tile] = out.astype(smem.q.dtype)
    if gmem.lse is not None:
        log2_l = jnp.log(safe) * LOG2E
        smem.lse[tile] = jnp.where(is_met, (m_i + log2_l) / LOG2E, -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.q.at[tile], gmem.out.at[cta.batch, queries.slots, cta.head])
    if gmem.lse is not None:
        target = gmem.lse.at[cta.batch, cta.head, queries.slots]
        plgpu.copy_smem_to_gmem(smem.lse.at[tile], target)
    plgpu.wait_smem_to_gmem(0)


def _along(x: Array, rows: Array) -> Array:
    return lax.broadcast_in_dim(x, rows.shape, [0])


def _splat(value: float) -> Float[Array, " queries"]:
    return plgpu.layout_cast(jnp.full((TILE_Q,), value, jnp.float32), PER_QUERY)
