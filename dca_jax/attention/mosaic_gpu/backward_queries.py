"""dQ on Hopper, apart from dK and dV: three matmuls per step.

A CTA processes 128 queries of one head: two warpgroups compute 64 queries each, and a third feeds
them keys and values. Phase by phase, over all keys of the phase:

    S = Q K^T       P = exp2(S - lse)       dP = dO V^T       dS = P * (dP - delta)       dQ += dS K

"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dca_jax.attention.mosaic_gpu.backward_inputs import Inputs
from dca_jax.attention.mosaic_gpu.forward_tiles import BLOCK_Q, WARPGROUP_Q, WARPGROUPS
from dca_jax.attention.mosaic_gpu.operands import zero
from dca_jax.attention.mosaic_gpu.ranges import walks_of_band
from dca_jax.attention.softmax import FAR

BLOCK_K = 64
KEY_STAGES, VALUE_STAGES = 2, 1  # keys are needed until the end of a step, values only at first
REGISTERS = 240, 24  # per computing thread, and per thread that feeds them
PER_QUERY = plgpu.Layout.WGMMA.reduce(1)


class Shared(NamedTuple):
    """Shared memory: tiles, then barriers."""

    q: Any  # [WARPGROUPS, WARPGROUP_Q, H]
    do: Any
    k: Any  # [KEY_STAGES, BLOCK_K, H]
    v: Any  # [VALUE_STAGES, BLOCK_K, H]
    q_loaded: Any
    k_loaded: Any
    v_loaded: Any
    k_consumed: Any
    v_consumed: Any


@dataclass(frozen=True)
class CTA:
    """A CTA's work, and references to its data."""

    group: int  # query heads per kv head
    inputs: Inputs
    smem: Shared
    batch: Array
    tile: Array
    head: Array

    def walk(self, phase: Array, step: Array, visit: Callable[[Array, Array, Any], None]) -> Array:
        """Calls visit(step, block, whether it is an edge) for a phase's blocks; the next step."""
        walks = self.inputs.table.at[self.batch, phase, self.tile]
        (start, count), (begin, before), (end, after) = (
            (walks[n, 0], walks[n, 1]) for n in range(3)
        )

        def full(n: Array, _: None) -> None:
            visit(step + n, start + n, False)

        def edge(n: Array, _: None) -> None:
            visit(step + count + n, jnp.where(n < before, begin + n, end + (n - before)), True)

        lax.fori_loop(0, count, full, None)
        lax.fori_loop(0, before + after, edge, None)
        return step + count + before + after


def gradients(inputs: Inputs) -> tuple[Float[Array, "B padded N H"], ...]:
    """For each phase float32 dQ in that rotation, before the logit scale.

    Where a phase has no keys nothing is written, and the contents are arbitrary.
    """
    batch, _, heads, head_dim = inputs.queries[0].shape
    num_phases, padded = inputs.low.shape[1:]
    present = inputs.low[:, 0] < FAR
    walks = [
        walks_of_band(inputs.low[:, n], inputs.high[:, n], present, BLOCK_K)
        for n in range(num_phases)
    ]
    inputs = inputs._replace(table=jnp.stack(walks, axis=1))
    num_tiles, group = padded // BLOCK_Q, heads // inputs.key.shape[2]
    out = jax.ShapeDtypeStruct((batch, padded, heads, head_dim), jnp.float32)

    def body(inputs: Inputs, dqs: tuple[Any, ...], smem: Shared) -> None:
        cta = CTA(
            group=group,
            inputs=inputs,
            smem=smem,
            batch=lax.axis_index("batch"),
            # Tiles with the most work go first, so that the last ones are short.
            tile=num_tiles - 1 - lax.axis_index("tile"),
            head=lax.axis_index("head"),
        )
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < WARPGROUPS)
        def _compute_gradient() -> None:
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            _compute(cta, warpgroup, dqs)

        @pl.when(warpgroup == WARPGROUPS)
        def _move_data() -> None:
            plgpu.set_max_registers(REGISTERS[1], action="decrease")
            _feed(cta)

    (dqs,) = plgpu.kernel(
        body,
        out_type=((out,) * num_phases,),
        grid=(heads, num_tiles, batch),
        grid_names=("head", "tile", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="dca_backward_queries",
        scratch_types=(_shared(head_dim, inputs.key.dtype),),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(inputs)
    return dqs


def _shared(head_dim: int, dtype: Any) -> Shared:
    queries = WARPGROUPS, WARPGROUP_Q, head_dim
    return Shared(
        q=plgpu.SMEM(queries, dtype),
        do=plgpu.SMEM(queries, dtype),
        k=plgpu.SMEM((KEY_STAGES, BLOCK_K, head_dim), dtype),
        v=plgpu.SMEM((VALUE_STAGES, BLOCK_K, head_dim), dtype),
        q_loaded=plgpu.Barrier(num_barriers=WARPGROUPS),
        k_loaded=plgpu.Barrier(num_barriers=KEY_STAGES),
        v_loaded=plgpu.Barrier(num_barriers=VALUE_STAGES),
        k_consumed=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=KEY_STAGES),
        v_consumed=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=VALUE_STAGES),
    )


def _feed(cta: CTA) -> None:
    """Keeps keys and values in flight."""
    inputs, smem = cta.inputs, cta.smem
    kv_head, row = lax.div(cta.head, jnp.int32(cta.group)), inputs.cache_rows[cta.batch]
    pipes = (
        (inputs.key, smem.k, smem.k_loaded, smem.k_consumed, KEY_STAGES),
        (inputs.value, smem.v, smem.v_loaded, smem.v_consumed, VALUE_STAGES),
    )

    def load(step: Array, block: Array, edge: bool) -> None:
        del edge
        for source, target, loaded, consumed, stages in pipes:
            slot = lax.rem(step, jnp.int32(stages))
            free = consumed.at[slot]
            pl.when(step >= stages)(lambda free=free: plgpu.barrier_wait(free))
            keys = source.at[row, pl.ds(block * BLOCK_K, BLOCK_K), kv_head]
            plgpu.copy_gmem_to_smem(keys, target.at[slot], loaded.at[slot])

    def one_phase(phase: Array, step: Array) -> Array:
        return cta.walk(phase, step, load)

    lax.fori_loop(0, len(inputs.queries), one_phase, jnp.int32(0))


# --- the warpgroups that compute ---------------------------------------------------------------


def _compute(cta: CTA, warpgroup: Array, dqs: tuple[Any, ...]) -> None:
    """Computes and writes dQ of a warpgroup's queries, phase by phase."""
    inputs, smem = cta.inputs, cta.smem
    slots = pl.ds(cta.tile * BLOCK_Q + warpgroup * WARPGROUP_Q, WARPGROUP_Q)
    loaded = smem.q_loaded.at[warpgroup]
    of_queries = cta.batch, slots, cta.head

    def number_of(numbers: Any) -> Float[Array, " queries"]:
        numbers = numbers.at[cta.batch, cta.head, slots]
        return plgpu.load(numbers, layout=PER_QUERY, optimized=False)

    plgpu.copy_gmem_to_smem(inputs.do.at[of_queries], smem.do.at[warpgroup], loaded)
    minus_lse, minus_delta = number_of(inputs.minus_lse), number_of(inputs.minus_delta)
    plgpu.barrier_wait(loaded)

    def run(accumulators: tuple[Any, Any, Any]) -> None:
        s, dp, dq = accumulators

        def visit(phase: Array, step: Array, block: Array, edge: bool) -> None:
            k_slot, v_slot = (lax.rem(step, jnp.int32(n)) for n in (KEY_STAGES, VALUE_STAGES))
            here = warpgroup + zero(step)
            s[...] = _along_keys(minus_lse)
            plgpu.barrier_wait(smem.k_loaded.at[k_slot])
            plgpu.wgmma(s, smem.q.at[here], smem.k.at[k_slot].transpose((1, 0)))
            dp[...] = _along_keys(minus_delta)
            plgpu.barrier_wait(smem.v_loaded.at[v_slot])
            plgpu.wgmma(dp, smem.do.at[here], smem.v.at[v_slot].transpose((1, 0)))
            logits = plgpu.wgmma_accumulator_load(s, wait_n=1)
            p = jnp.exp2(_mask(cta, phase, block, slots, logits) if edge else logits)
            ds = p * plgpu.wgmma_accumulator_load(dp, wait_n=0)
            plgpu.barrier_arrive(smem.v_consumed.at[v_slot])
            plgpu.wgmma(dq, ds.astype(smem.k.dtype), smem.k.at[k_slot])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(smem.k_consumed.at[k_slot])

        def one_phase(phase: Array, step: Array) -> Array:
            for number, query in enumerate(inputs.queries):

                @pl.when(phase == number)
                def _fetch(query: Any = query) -> None:
                    plgpu.copy_gmem_to_smem(query.at[of_queries], smem.q.at[warpgroup], loaded)

            plgpu.barrier_wait(loaded)
            dq[...] = _zeros(*smem.q.shape[1:])
            stop = cta.walk(phase, step, functools.partial(visit, phase))
            result = dq[...]
            for number, target in enumerate(dqs):

                @pl.when((phase == number) & (stop > step))
                def _write(target: Any = target) -> None:
                    target[of_queries] = result

            return stop

        lax.fori_loop(0, len(inputs.queries), one_phase, jnp.int32(0))

    shapes = (WARPGROUP_Q, BLOCK_K), (WARPGROUP_Q, BLOCK_K), smem.q.shape[1:]
    pl.run_state(run)(tuple(plgpu.WGMMAAccumulatorRef.init(_zeros(*shape)) for shape in shapes))


def _mask(
    cta: CTA, phase: Array, block: Array, slots: Any, logits: Float[Array, "queries keys"]
) -> Float[Array, "queries keys"]:
    """-inf where a query does not attend to a key of this block in this phase."""
    low, high = (
        _along_keys(plgpu.load(ends.at[cta.batch, phase, slots], layout=PER_QUERY, optimized=False))
        for ends in (cta.inputs.low, cta.inputs.high)
    )
    j = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
    j = j + block * BLOCK_K
    return jnp.where((low <= j) & (j < high), logits, jnp.full_like(logits, -jnp.inf))


def _along_keys(x: Float[Array, " queries"] | Int[Array, " queries"]) -> Array:
    return lax.broadcast_in_dim(x, (WARPGROUP_Q, BLOCK_K), [0])


def _zeros(*shape: int) -> Float[Array, "rows columns"]:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
