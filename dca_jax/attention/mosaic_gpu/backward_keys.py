"""dK and dV on Hopper where they do not fit into one warpgroup's registers: four matmuls per step.

A CTA owns 64 keys of a kv head and iterates over the queries that attend to them, phase by phase.
One warpgroup computes dV, and hands P to the other one, which computes dK:

    S^T = K Q^T - lse           P^T = exp2(S^T)             dV += P^T dO
    dP^T = V dO^T - delta       dS^T = P^T * dP^T           dK += dS^T Q
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

from dca_jax.attention.mosaic_gpu.backward_inputs import Inputs
from dca_jax.attention.mosaic_gpu.backward_spans import spans_of
from dca_jax.attention.mosaic_gpu.backward_tiles import WARPGROUP_KEYS, WARPGROUPS
from dca_jax.attention.mosaic_gpu.operands import zero

KEYS = WARPGROUP_KEYS  # keys per CTA
BLOCK_Q = 64  # queries per step
STAGES = 2  # tiles of queries, and of the output's gradient, in flight
REGISTERS = 240, 24  # per computing thread, and per thread that feeds them


class Shared(NamedTuple):
    """Shared memory: tiles, then barriers."""

    k: Any  # [1, KEYS, H]; finally dV
    v: Any  # [1, KEYS, H]; finally dK
    q: Any  # [STAGES, BLOCK_Q, H]
    do: Any
    minus_lse: Any  # [STAGES, BLOCK_Q]
    minus_delta: Any
    p: Any  # [STAGES, KEYS, BLOCK_Q]: P^T on its way to the other warpgroup
    keys_full: Any
    q_full: Any
    q_free: Any
    do_full: Any
    do_free: Any
    p_full: Any
    p_free: Any


@dataclass(frozen=True)
class CTA:
    """A CTA's work, and references to its data."""

    group: int  # query heads per kv head
    inputs: Inputs
    smem: Shared
    batch: Array
    tile: Array
    first: Array  # its first key
    kv_head: Array

    def span(self, n: int | Array) -> Array:
        """The n-th bound of this tile's spans."""
        return self.inputs.table[self.batch, self.tile, n]

    def descend(
        self, start: Array, stop: Array, step: Array, visit: Callable[[Array, Array, Array], None]
    ) -> Array:
        """Calls visit(step, query tile, query head) for tiles start - 1 .. stop; the next step."""
        group = jnp.int32(self.group)

        def one(n: Array, _: None) -> None:
            visit(step + n, start - 1 - lax.div(n, group), self.kv_head * group + lax.rem(n, group))

        steps = (start - stop) * group
        lax.fori_loop(0, steps, one, None)
        return step + steps


def gradients(
    inputs: Inputs, num_keys: int
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """dK (rotated) and dV."""
    batch, _, heads, head_dim = inputs.queries[0].shape
    kv_heads, dtype = inputs.key.shape[2], inputs.key.dtype
    spans = spans_of(inputs.low, inputs.high, num_keys, BLOCK_Q, KEYS)
    inputs = inputs._replace(table=spans)
    out = jax.ShapeDtypeStruct((batch, *inputs.key.shape[1:]), dtype)

    def body(inputs: Inputs, dk: Any, dv: Any, smem: Shared) -> None:
        tile = lax.axis_index("tile")
        cta = CTA(
            group=heads // kv_heads,
            inputs=inputs,
            smem=smem,
            batch=lax.axis_index("batch"),
            tile=tile,
            first=tile * KEYS,
            kv_head=lax.axis_index("head"),
        )
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _compute_dv() -> None:
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            _write(cta, smem.k.at[0], _values(cta), dv)

        @pl.when(warpgroup == 1)
        def _compute_dk() -> None:
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            # P, and so dS, is in log2 units.
            _write(cta, smem.v.at[0], _keys(cta) * math.log(2), dk)

        @pl.when(warpgroup == WARPGROUPS)
        def _move_data() -> None:
            plgpu.set_max_registers(REGISTERS[1], action="decrease")
            _feed(cta)

    return plgpu.kernel(
        body,
        out_type=(out, out),
        grid=(batch, spans.shape[1], kv_heads),
        grid_names=("batch", "tile", "head"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="dca_backward_keys",
        scratch_types=(_shared(head_dim, dtype),),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(inputs)


def _shared(head_dim: int, dtype: Any) -> Shared:
    keys, queries = (1, KEYS, head_dim), (STAGES, BLOCK_Q, head_dim)
    free = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES)
    return Shared(
        k=plgpu.SMEM(keys, dtype),
        v=plgpu.SMEM(keys, dtype),
        q=plgpu.SMEM(queries, dtype),
        do=plgpu.SMEM(queries, dtype),
        minus_lse=plgpu.SMEM((STAGES, BLOCK_Q), jnp.float32),
        minus_delta=plgpu.SMEM((STAGES, BLOCK_Q), jnp.float32),
        p=plgpu.SMEM((STAGES, KEYS, BLOCK_Q), dtype),
        keys_full=plgpu.Barrier(num_arrivals=2),
        q_full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),  # with lse
        q_free=free,
        do_full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),  # with delta
        do_free=free,
        p_full=plgpu.Barrier(num_barriers=STAGES),
        p_free=plgpu.Barrier(num_barriers=STAGES),
    )


# --- the warpgroup that feeds the others -------------------------------------------------------


def _feed(cta: CTA) -> None:
    """Loads keys and values, then tiles of queries and of the output's gradient."""
    inputs, smem, batch = cta.inputs, cta.smem, cta.batch
    keys = inputs.cache_rows[batch], pl.ds(cta.first, KEYS), cta.kv_head
    plgpu.copy_gmem_to_smem(inputs.key.at[keys], smem.k.at[0], smem.keys_full)
    plgpu.copy_gmem_to_smem(inputs.value.at[keys], smem.v.at[0], smem.keys_full)

    def load(step: Array, query: Any, q_tile: Array | int, head: Array) -> None:
        slot = lax.rem(step, jnp.int32(STAGES))
        queries = pl.ds(q_tile * BLOCK_Q, BLOCK_Q)
        for tile, target, numbers, of_queries, full, free in (
            (query, smem.q, inputs.minus_lse, smem.minus_lse, smem.q_full, smem.q_free),
            (inputs.do, smem.do, inputs.minus_delta, smem.minus_delta, smem.do_full, smem.do_free),
        ):
            pl.when(step >= STAGES)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            tile = tile.at[batch, queries, head]
            plgpu.copy_gmem_to_smem(tile, target.at[slot], full.at[slot])
            numbers = numbers.at[batch, head, queries]
            plgpu.copy_gmem_to_smem(numbers, of_queries.at[slot], full.at[slot])

    step = jnp.int32(0)
    for number, query in enumerate(inputs.queries):

        def visit(step: Array, q_tile: Array, head: Array, query: Any = query) -> None:
            load(step, query, q_tile, head)

        step = cta.descend(cta.span(6 * number), cta.span(6 * number + 5), step, visit)
    # Computation is one step ahead: one extra step with arbitrary data is begun and discarded.
    load(step, inputs.queries[0], 0, cta.kv_head * cta.group)


# --- the warpgroups that compute ---------------------------------------------------------------


def _values(cta: CTA) -> Float[Array, "keys H"]:
    """dV: the weights' warpgroup."""
    smem = cta.smem

    def run(accumulators: tuple[Any, Any]) -> None:
        s, dv = accumulators

        def begin(step: Array) -> None:
            slot = lax.rem(step, jnp.int32(STAGES))
            plgpu.barrier_wait(smem.q_full.at[slot])
            s[...] = _of_queries(smem.minus_lse.at[slot])
            plgpu.wgmma(s, smem.k.at[zero(step)], smem.q.at[slot].transpose((1, 0)))

        def visit(step: Array, mask: Callable[[Array], Array] | None) -> None:
            slot = lax.rem(step, jnp.int32(STAGES))
            logits = plgpu.wgmma_accumulator_load(s, wait_n=0)
            plgpu.barrier_arrive(smem.q_free.at[slot])
            before = lax.rem(step + (STAGES - 1), jnp.int32(STAGES))
            pl.when(step > 0)(lambda: plgpu.barrier_arrive(smem.do_free.at[before]))
            p = jnp.exp2(logits if mask is None else mask(logits)).astype(smem.p.dtype)
            pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(smem.p_free.at[slot]))
            smem.p[slot] = p
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem.p_full.at[slot])
            plgpu.barrier_wait(smem.do_full.at[slot])
            plgpu.wgmma(dv, p, smem.do.at[slot])
            begin(step + 1)

        steps = _walk(cta, begin, visit)
        _release(steps, smem.do_free, smem.q_free)

    return pl.run_state(run)((_zeros(KEYS, BLOCK_Q), _zeros(*smem.k.shape[1:])))[1]


def _keys(cta: CTA) -> Float[Array, "keys H"]:
    """dK, in log2 units: the gradients' warpgroup."""
    smem = cta.smem

    def run(accumulators: tuple[Any, Any]) -> None:
        dp, dk = accumulators

        def begin(step: Array) -> None:
            slot = lax.rem(step, jnp.int32(STAGES))
            plgpu.barrier_wait(smem.do_full.at[slot])
            dp[...] = _of_queries(smem.minus_delta.at[slot])
            plgpu.wgmma(dp, smem.v.at[zero(step)], smem.do.at[slot].transpose((1, 0)))

        def visit(step: Array, mask: Callable[[Array], Array] | None) -> None:
            del mask  # P is masked
            slot = lax.rem(step, jnp.int32(STAGES))
            of_weights = plgpu.wgmma_accumulator_load(dp, wait_n=0)
            plgpu.barrier_arrive(smem.do_free.at[slot])
            before = lax.rem(step + (STAGES - 1), jnp.int32(STAGES))
            pl.when(step > 0)(lambda: plgpu.barrier_arrive(smem.q_free.at[before]))
            plgpu.barrier_wait(smem.p_full.at[slot])
            p = plgpu.load(smem.p.at[slot], layout=plgpu.Layout.WGMMA)
            ds = (p.astype(jnp.float32) * of_weights).astype(smem.p.dtype)
            plgpu.barrier_wait(smem.q_full.at[slot])
            plgpu.wgmma(dk, ds, smem.q.at[slot])
            plgpu.barrier_arrive(smem.p_free.at[slot])
            begin(step + 1)

        steps = _walk(cta, begin, visit)
        _release(steps, smem.q_free, smem.do_free)

    return pl.run_state(run)((_zeros(KEYS, BLOCK_Q), _zeros(*smem.v.shape[1:])))[1]


def _walk(
    cta: CTA,
    begin: Callable[[Array], None],
    visit: Callable[[Array, Callable[[Array], Array] | None], None],
) -> Array:
    """Visits the spans of all phases, and begins one step more; the number of visited steps."""

    def pair(n: Array, step: Array) -> Array:
        phase = lax.div(n, jnp.int32(2))
        start, middle, stop = (cta.span(3 * n + end) for end in range(3))

        def masked(step: Array, q_tile: Array, head: Array) -> None:
            del head
            visit(step, functools.partial(_mask, cta, phase, q_tile))

        def full(step: Array, q_tile: Array, head: Array) -> None:
            del q_tile, head
            visit(step, None)

        step = cta.descend(start, middle, step, masked)
        return cta.descend(middle, stop, step, full)

    plgpu.barrier_wait(cta.smem.keys_full)
    begin(jnp.int32(0))
    steps = lax.fori_loop(0, 2 * len(cta.inputs.queries), pair, jnp.int32(0))
    plgpu.wgmma_wait(0)
    return steps


def _release(steps: Array, of_last: Any, of_extra: Any) -> None:
    """Releases what the last step and the extra one hold, so that every load is released."""
    last, extra = (lax.rem(steps + n, jnp.int32(STAGES)) for n in (STAGES - 1, 0))
    pl.when(steps > 0)(lambda: plgpu.barrier_arrive(of_last.at[last]))
    plgpu.barrier_arrive(of_last.at[extra])
    plgpu.barrier_arrive(of_extra.at[extra])


def _write(cta: CTA, smem: Any, gradient: Float[Array, "keys H"], target: Any) -> None:
    """Writes a gradient through the shared memory of keys or values that are no longer needed."""
    smem[...] = gradient.astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, target.at[cta.batch, pl.ds(cta.first, KEYS), cta.kv_head])
    plgpu.wait_smem_to_gmem(0)


def _mask(
    cta: CTA, phase: Array, q_tile: Array, logits: Float[Array, "keys queries"]
) -> Float[Array, "keys queries"]:
    """-inf where a query of tile `q_tile` does not attend to a key in this phase."""
    queries, layout = pl.ds(q_tile * BLOCK_Q, BLOCK_Q), plgpu.Layout.WGMMA.reduce(0)
    low, high = (
        plgpu.load(ends.at[cta.batch, phase, queries], layout=layout, optimized=False)
        for ends in (cta.inputs.low, cta.inputs.high)
    )
    low, high = (lax.broadcast_in_dim(x, logits.shape, [1]) for x in (low, high))
    j = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=plgpu.Layout.WGMMA) + cta.first
    return jnp.where((low <= j) & (j < high), logits, jnp.full_like(logits, -jnp.inf))


def _of_queries(smem: Any) -> Float[Array, "keys queries"]:
    """One number per query, broadcast over keys."""
    x = plgpu.load(smem, layout=plgpu.Layout.WGMMA.reduce(0))
    return lax.broadcast_in_dim(x, (KEYS, x.shape[0]), [1])


def _zeros(*shape: int) -> Any:
    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    return plgpu.WGMMAAccumulatorRef.init(zeros)
