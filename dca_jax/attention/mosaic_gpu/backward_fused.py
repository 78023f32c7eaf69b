"""DCA's backward pass on Hopper: one deterministic kernel with five matmuls per step.

A CTA owns a tile of keys and iterates over the queries that attend to it, phase by phase:

    S^T = K Q^T - lse      P^T = exp2(S^T)      dP^T = V dO^T - delta      dS^T = P^T * dP^T
    dV += P^T dO           dK += dS^T Q         dQ_phase[tile of queries] += dS K

dK and dV stay in registers, where the query heads of one kv head are accumulated one after another.
The copy engine accumulates dQ in global memory in float32. Key tiles add in ascending order, each
waiting for the previous ones, so the sums do not depend on timing. Every key tile goes from the
last query to the first, so tiles that start later hardly wait. Key tiles are also launched in
ascending order, and a GPU starts CTAs in the order of their index, so a CTA only waits for CTAs
that are running or done.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dca_jax.attention.mosaic_gpu.backward_inputs import Gradients, Inputs
from dca_jax.attention.mosaic_gpu.backward_spans import spans_of
from dca_jax.attention.mosaic_gpu.backward_tiles import (
    BLOCK_KV,
    WARPGROUP_KEYS,
    WARPGROUPS,
    BackwardTiles,
    Sizes,
)
from dca_jax.attention.mosaic_gpu.operands import zero
from dca_jax.device import MULTIPROCESSORS

REGISTERS = 240, 24  # per computing thread, and per thread that moves data


def gradients(inputs: Inputs, num_keys: int, tiles: BackwardTiles) -> Gradients:
    """dQ of each phase, dK (rotated) and dV."""
    heads, head_dim = inputs.queries[0].shape[2:]
    sizes = Sizes.of(tiles, head_dim, heads // inputs.key.shape[2])
    spans = spans_of(inputs.low, inputs.high, num_keys, sizes.block_q, BLOCK_KV)
    return _run(inputs._replace(table=spans), sizes)


# --- the kernel --------------------------------------------------------------------------------


class Shared(NamedTuple):
    """Buffers in shared memory."""

    k: Any
    v: Any
    q: Any
    do: Any
    minus_lse: Any
    minus_delta: Any
    ds: Any
    dq: Any


class Barriers(NamedTuple):
    """Barriers for filled and released buffers in shared memory."""

    keys_full: Any
    q_full: Any
    q_free: Any
    do_full: Any
    do_free: Any
    ds_full: Any
    dq_full: Any
    dq_free: Any


@dataclass(frozen=True)
class CTA:
    """A CTA's work, and references to its data."""

    sizes: Sizes
    inputs: Inputs
    outputs: Gradients
    shared: Shared
    barriers: Barriers
    added: Any  # number of key tiles that have added to dQ [phases, B, N, query tiles, warpgroups]
    batch: Array
    tile: Array
    kv_head: Array

    def span(self, n: int | Array) -> Array:
        """The n-th bound of this tile's spans."""
        return self.inputs.table[self.batch, self.tile, n]

    def descend(
        self, start: Array, stop: Array, step: Array, visit: "Callable[[Array, Array, Array], None]"
    ) -> Array:
        """Calls visit(step, query tile, query head) for tiles start - 1 .. stop; the next step."""
        group = jnp.int32(self.sizes.group)

        def one(n: Array, _: None) -> None:
            visit(step + n, start - 1 - lax.div(n, group), self.kv_head * group + lax.rem(n, group))

        steps = (start - stop) * group
        lax.fori_loop(0, steps, one, None)
        return step + steps

    def piece(self, warpgroup: Array, part: int) -> tuple[Array, Array]:
        """First row and column of a warpgroup's 64 x 64 piece of a tile of dQ."""
        n, across = warpgroup * self.sizes.parts + part, jnp.int32(self.sizes.head_dim // 64)
        return lax.div(n, across) * 64, lax.rem(n, across) * 64


def _run(inputs: Inputs, sizes: Sizes) -> Gradients:
    """Launches the kernel."""
    batch, _, heads, head_dim = inputs.queries[0].shape
    kv_heads, num_tiles, padded = inputs.key.shape[2], inputs.table.shape[1], inputs.low.shape[2]
    num_phases, dtype = len(inputs.queries), inputs.key.dtype
    added = (num_phases, batch, heads, padded // sizes.block_q, WARPGROUPS)
    together = _heads_together(kv_heads, num_tiles)

    def body(
        inputs: Inputs, dqs: Any, dk: Any, dv: Any, shared: Shared, barriers: Barriers
    ) -> None:
        cta = CTA(
            sizes=sizes,
            inputs=inputs,
            outputs=Gradients(dqs, dk, dv),
            shared=shared,
            barriers=barriers,
            added=pl.get_global(plgpu.SemaphoreType.REGULAR(added)),
            batch=lax.axis_index("batch"),
            tile=lax.axis_index("tile"),
            kv_head=lax.axis_index("heads") * together + lax.axis_index("head"),
        )
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < WARPGROUPS)
        def _compute_gradients() -> None:
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            _compute(cta, warpgroup)

        @pl.when(warpgroup == WARPGROUPS)
        def _move_data() -> None:
            plgpu.set_max_registers(REGISTERS[1], action="decrease")

            def one_warp(warp: Array) -> None:
                pl.when(warp == 0)(lambda: _load(cta))
                pl.when((warp > 0) & (warp <= WARPGROUPS))(lambda: _add_up(cta, warp - 1))

            plgpu.warp_map(one_warp)

    dq = jax.ShapeDtypeStruct((batch, padded, heads, head_dim), jnp.float32)
    dkv = jax.ShapeDtypeStruct((batch, *inputs.key.shape[1:]), dtype)
    return Gradients(
        *plgpu.kernel(
            body,
            out_type=((dq,) * num_phases, dkv, dkv),
            grid=(batch, kv_heads // together, num_tiles, together),
            grid_names=("batch", "heads", "tile", "head"),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            kernel_name="dca_backward",
            scratch_types=(_shared(sizes, dtype), _barriers(sizes)),
            compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        )(inputs)
    )


def _heads_together(kv_heads: int, num_tiles: int) -> int:
    """Number of kv heads whose key tiles are launched together, the longest first.

    With one head, the queries and sums being read stay in the L2 cache. But the last head's long
    tiles should start while other work is left: two tiles per multiprocessor are enough.
    """
    wanted = min(kv_heads, round(2 * MULTIPROCESSORS / num_tiles))
    return next(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n >= wanted)


def _shared(sizes: Sizes, dtype: Any) -> Shared:
    keys, queries = (BLOCK_KV, sizes.head_dim), (sizes.block_q, sizes.head_dim)
    # dS of this step and of the previous one, from both warpgroups.
    ds = (2, BLOCK_KV, sizes.block_q)
    return Shared(
        k=plgpu.SMEM(keys, dtype),
        v=plgpu.SMEM(keys, dtype),
        q=plgpu.SMEM((sizes.num_stages, *queries), dtype),
        do=plgpu.SMEM((sizes.num_do_stages, *queries), dtype),
        minus_lse=plgpu.SMEM((sizes.num_stages, sizes.block_q), jnp.float32),
        minus_delta=plgpu.SMEM((sizes.num_stages, sizes.block_q), jnp.float32),
        ds=plgpu.SMEM(ds, dtype),
        dq=plgpu.SMEM((WARPGROUPS, 64, 64), jnp.float32),
    )


def _barriers(sizes: Sizes) -> Barriers:
    return Barriers(
        keys_full=plgpu.Barrier(num_arrivals=2),  # K and V
        q_full=plgpu.Barrier(num_arrivals=3, num_barriers=sizes.num_stages),  # with lse and delta
        q_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=sizes.num_stages),
        do_full=plgpu.Barrier(num_barriers=sizes.num_do_stages),
        do_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=sizes.num_do_stages),
        ds_full=plgpu.Barrier(num_arrivals=WARPGROUPS),
        dq_full=plgpu.Barrier(num_barriers=WARPGROUPS),
        dq_free=plgpu.Barrier(num_barriers=WARPGROUPS),
    )


# --- the warps that move data ------------------------------------------------------------------


def _load(cta: CTA) -> None:
    """Loads the keys and values, then the tiles of queries and output gradients."""
    sizes, inputs, shared, barriers = cta.sizes, cta.inputs, cta.shared, cta.barriers
    batch, step = cta.batch, jnp.int32(0)
    keys = inputs.cache_rows[batch], pl.ds(cta.tile * BLOCK_KV, BLOCK_KV)
    keys = *keys, cta.kv_head
    plgpu.copy_gmem_to_smem(inputs.key.at[keys], shared.k, barriers.keys_full)
    plgpu.copy_gmem_to_smem(inputs.value.at[keys], shared.v, barriers.keys_full)

    def load_query(step: Array, query: Any, queries: Any, head: Array) -> None:
        slot = lax.rem(step, jnp.int32(sizes.num_stages))
        full = barriers.q_full.at[slot]
        pl.when(step >= sizes.num_stages)(lambda: plgpu.barrier_wait(barriers.q_free.at[slot]))
        plgpu.copy_gmem_to_smem(query.at[batch, queries, head], shared.q.at[slot], full)
        for gmem, smem in (
            (inputs.minus_lse, shared.minus_lse),
            (inputs.minus_delta, shared.minus_delta),
        ):
            plgpu.copy_gmem_to_smem(gmem.at[batch, head, queries], smem.at[slot], full)

    for number, query in enumerate(inputs.queries):

        def visit(step: Array, q_tile: Array, head: Array, query: Any = query) -> None:
            queries = pl.ds(q_tile * sizes.block_q, sizes.block_q)
            load_query(step, query, queries, head)
            slot = lax.rem(step, jnp.int32(sizes.num_do_stages))
            free = barriers.do_free.at[slot]
            pl.when(step >= sizes.num_do_stages)(lambda: plgpu.barrier_wait(free))
            plgpu.copy_gmem_to_smem(
                inputs.do.at[batch, queries, head],
                shared.do.at[slot],
                barriers.do_full.at[slot],
            )

        step = cta.descend(cta.span(6 * number), cta.span(6 * number + 5), step, visit)
    # Computation is one step ahead: one extra step with arbitrary data is begun and discarded.
    head = cta.kv_head * sizes.group
    load_query(step, inputs.queries[0], pl.ds(0, sizes.block_q), head)


def _add_up(cta: CTA, warpgroup: Array) -> None:
    """Adds a warpgroup's part of dQ to the sums, after the previous key tiles have added theirs."""
    sizes, barriers, step = cta.sizes, cta.barriers, jnp.int32(0)
    smem, full, free = (
        x.at[warpgroup] for x in (cta.shared.dq, barriers.dq_full, barriers.dq_free)
    )
    for number, dq in enumerate(cta.outputs.dqs):

        def visit(
            step: Array, q_tile: Array, head: Array, number: int = number, dq: Any = dq
        ) -> None:
            first_key = cta.inputs.low[cta.batch, number, q_tile * sizes.block_q]
            before = cta.tile - lax.div(first_key, jnp.int32(BLOCK_KV))
            added = cta.added.at[number, cta.batch, head, q_tile, warpgroup]
            plgpu.semaphore_wait(added, before, decrement=False, memory_scope="gpu")
            for part in range(sizes.parts):
                row, column = cta.piece(warpgroup, part)
                queries, columns = pl.ds(q_tile * sizes.block_q + row, 64), pl.ds(column, 64)
                target = dq.at[cta.batch, queries, head, columns]
                plgpu.barrier_wait(full)
                # The first tile writes, so the sums need no clearing.
                write = functools.partial(plgpu.copy_smem_to_gmem, smem, target)
                pl.when(before == 0)(write)
                pl.when(before > 0)(functools.partial(write, reduction_op="add"))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(free)
            plgpu.wait_smem_to_gmem(0)
            plgpu.semaphore_signal(added, 1, memory_scope="gpu")

        step = cta.descend(cta.span(6 * number), cta.span(6 * number + 5), step, visit)


# --- the warpgroups that compute ---------------------------------------------------------------


class Accumulators(NamedTuple):
    """A warpgroup's WGMMA accumulators, float32."""

    s: Any  # [64, block_q]
    dp: Any  # [64, block_q]
    dq: Any  # [64, 64]
    dk: Any  # [64, head_dim]
    dv: Any  # [64, head_dim]


def _compute(cta: CTA, warpgroup: Array) -> None:
    """Computes dK and dV of a warpgroup's keys, and its pieces of each dQ."""
    sizes, shared = cta.sizes, cta.shared
    first = warpgroup * WARPGROUP_KEYS

    def walk(accumulators: Accumulators) -> None:
        step_of = functools.partial(_step, cta, accumulators, warpgroup)

        def pair(n: Array, step: Array) -> Array:
            phase = lax.div(n, jnp.int32(2))
            start, middle, stop = (cta.span(3 * n + end) for end in range(3))

            def masked(step: Array, q_tile: Array, head: Array) -> None:
                del head
                mask = functools.partial(_mask, cta, phase, q_tile, first)
                step_of(step, mask)

            def full(step: Array, q_tile: Array, head: Array) -> None:
                del q_tile, head
                step_of(step, None)

            step = cta.descend(start, middle, step, masked)
            return cta.descend(middle, stop, step, full)

        plgpu.barrier_wait(cta.barriers.keys_full)
        _begin(cta, accumulators, warpgroup, jnp.int32(0))
        plgpu.wgmma_wait(0)
        lax.fori_loop(0, 2 * len(cta.inputs.queries), pair, jnp.int32(0))

    def zeros(*shape: int) -> Any:
        return plgpu.WGMMAAccumulatorRef.init(_zeros(*shape))

    done = pl.run_state(walk)(
        Accumulators(
            s=zeros(WARPGROUP_KEYS, sizes.block_q),
            dp=zeros(WARPGROUP_KEYS, sizes.block_q),
            dq=zeros(64, 64),
            dk=zeros(WARPGROUP_KEYS, sizes.head_dim),
            dv=zeros(WARPGROUP_KEYS, sizes.head_dim),
        )
    )
    # Keys and values are no longer needed: their gradients replace them.
    _meet(cta.barriers.ds_full)
    # P, and so dS, is in log2 units.
    keys = pl.ds(first, WARPGROUP_KEYS)
    shared.k[keys, :] = (done.dk * math.log(2)).astype(shared.k.dtype)
    shared.v[keys, :] = done.dv.astype(shared.v.dtype)
    plgpu.commit_smem()
    _meet(cta.barriers.ds_full)
    target = cta.batch, pl.ds(cta.tile * BLOCK_KV, BLOCK_KV), cta.kv_head
    pl.when(warpgroup == 0)(lambda: plgpu.copy_smem_to_gmem(shared.k, cta.outputs.dk.at[target]))
    pl.when(warpgroup == 1)(lambda: plgpu.copy_smem_to_gmem(shared.v, cta.outputs.dv.at[target]))
    plgpu.wait_smem_to_gmem(0)


def _begin(cta: CTA, accumulators: Accumulators, warpgroup: Array, step: Array) -> None:
    """Starts a step's S^T with -lse as the initial sum: P^T is exp2 of the result."""
    slot = lax.rem(step, jnp.int32(cta.sizes.num_stages))
    plgpu.barrier_wait(cta.barriers.q_full.at[slot])
    accumulators.s[...] = _of_queries(cta.shared.minus_lse.at[slot])
    queries = cta.shared.q.at[slot].transpose((1, 0))
    plgpu.wgmma(accumulators.s, cta.shared.k.at[_keys(warpgroup, step)], queries)


def _keys(warpgroup: Array, step: Array) -> Any:
    """The warpgroup's keys."""
    return pl.ds((warpgroup + zero(step)) * WARPGROUP_KEYS, WARPGROUP_KEYS)


def _step(
    cta: CTA,
    accumulators: Accumulators,
    warpgroup: Array,
    step: Array,
    mask: "Callable[[Array], Array] | None",
) -> None:
    """Processes one tile of queries of one head; S^T is ready, and at the end so is the next one.

    Products run while the next operands are computed: `wgmma_wait(n)` and `wait_n` wait for all
    but the n started last.
    """
    sizes, shared, barriers = cta.sizes, cta.shared, cta.barriers
    s, dp, dq, dk, dv = accumulators
    slot, do_slot = (lax.rem(step, jnp.int32(n)) for n in (sizes.num_stages, sizes.num_do_stages))
    q, do = shared.q.at[slot], shared.do.at[do_slot]

    dp[...] = _of_queries(shared.minus_delta.at[slot])
    plgpu.barrier_wait(barriers.do_full.at[do_slot])
    plgpu.wgmma(dp, shared.v.at[_keys(warpgroup, step)], do.transpose((1, 0)))
    logits = plgpu.wgmma_accumulator_load(s, wait_n=None)
    p = jnp.exp2(logits if mask is None else mask(logits))
    plgpu.wgmma(dv, p.astype(q.dtype), do)
    ds = (p * plgpu.wgmma_accumulator_load(dp, wait_n=1)).astype(q.dtype)
    # Two buffers, so a warpgroup that is ahead does not overwrite data the other still reads.
    ds_smem = shared.ds.at[lax.rem(step, jnp.int32(2))]
    ds_smem[_keys(warpgroup, step), :] = ds
    plgpu.commit_smem()
    _meet(barriers.ds_full)

    for part in range(sizes.parts):
        row, column = cta.piece(warpgroup + zero(step), part)
        dq[...] = _zeros(64, 64)
        ds_part = ds_smem.at[:, pl.ds(row, 64)].transpose((1, 0))
        plgpu.wgmma(dq, ds_part, shared.k.at[:, pl.ds(column, 64)])
        if part == 0:
            plgpu.wgmma_wait(1)
            plgpu.barrier_arrive(barriers.do_free.at[do_slot])
            plgpu.wgmma(dk, ds, q)
            _begin(cta, accumulators, warpgroup, step + 1)
        piece = plgpu.wgmma_accumulator_load(dq, wait_n=2 if part == 0 else 0)
        free = barriers.dq_free.at[warpgroup]
        pl.when(step + part > 0)(lambda free=free: plgpu.barrier_wait(free))
        shared.dq[warpgroup] = piece
        plgpu.commit_smem()
        plgpu.barrier_arrive(barriers.dq_full.at[warpgroup])
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(barriers.q_free.at[slot])


def _mask(
    cta: CTA, phase: Array, q_tile: Array, first: Array, logits: Float[Array, "64 block_q"]
) -> Float[Array, "64 block_q"]:
    """-inf where a query of tile `q_tile` does not attend to a key in this phase."""
    queries = pl.ds(q_tile * cta.sizes.block_q, cta.sizes.block_q)
    low, high = (
        lax.broadcast_in_dim(
            plgpu.load(
                ends.at[cta.batch, phase, queries],
                layout=plgpu.Layout.WGMMA.reduce(0),
                optimized=False,
            ),
            logits.shape,
            [1],
        )
        for ends in (cta.inputs.low, cta.inputs.high)
    )
    j = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=plgpu.Layout.WGMMA)
    j = j + (cta.tile * BLOCK_KV + first)
    return jnp.where((low <= j) & (j < high), logits, jnp.full_like(logits, -jnp.inf))


def _of_queries(smem: Any) -> Float[Array, "64 block_q"]:
    """One number per query, broadcast over keys."""
    x = plgpu.load(smem, layout=plgpu.Layout.WGMMA.reduce(0))
    return lax.broadcast_in_dim(x, (WARPGROUP_KEYS, x.shape[0]), [1])


def _zeros(*shape: int) -> Float[Array, "rows columns"]:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _meet(barrier: Any) -> None:
    """Waits until both computing warpgroups arrive."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
