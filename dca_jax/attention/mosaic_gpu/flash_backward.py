"""DCA's backward pass on Hopper: what precedes and follows the kernels.

Where dK and dV fit into the registers, one kernel computes everything (`backward_fused`). Elsewhere
one kernel computes dK and dV (`backward_keys`), and another dQ (`backward_queries`).

A query is rotated differently in each phase, and so is its gradient: every phase has its own dQ,
and a last pass rotates them back and sums them. Memory: the rotated query and a float32 dQ per
phase.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_gpu import backward_fused, backward_keys, backward_queries
from dca_jax.attention.mosaic_gpu.backward_inputs import Gradients, Inputs
from dca_jax.attention.mosaic_gpu.backward_spans import key_ranges
from dca_jax.attention.mosaic_gpu.backward_tiles import TILES
from dca_jax.attention.mosaic_gpu.queries import pad_tokens, rotated_queries
from dca_jax.attention.softmax import LOG2E, MASKED
from dca_jax.dca import DCAConfig, Phase, query_position
from dca_jax.rope import rotate

BLOCK_Q = 128  # queries are padded to a multiple of every kernel's tile


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    do: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of query, key (rotated) and value; as `Backend.backward`."""
    batch, num_queries = query.shape[:2]
    num_keys = key.shape[2]
    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    key, value = (pad_tokens(x.reshape(-1, *x.shape[2:]), 1) for x in (key, value))
    low, high = key_ranges(index, rows, num_keys, BLOCK_Q, dca, phases)
    padding = ((0, 0), (0, 0), (0, low.shape[2] - num_queries))
    # A query without keys has log-sum-exp -inf; its weights are exp2(MASKED) = 0.
    minus_lse = jnp.where(jnp.isfinite(lse), lse * jnp.float32(-LOG2E), MASKED)
    inputs = Inputs(
        queries=tuple(pad_tokens(x, 1) for x in rotated_queries(query, rows, dca, phases)),
        do=pad_tokens(do, 1),
        key=key,
        value=value,
        minus_lse=jnp.pad(minus_lse, padding, constant_values=MASKED),
        minus_delta=jnp.pad(-delta, padding),
        low=low,
        high=high,
        cache_rows=layer.astype(jnp.int32) * batch + jnp.arange(batch, dtype=jnp.int32),
    )
    # The fused kernel's counters belong to one launch: `jax.vmap` runs launches one after another.
    run = jax.custom_batching.sequential_vmap(functools.partial(_run, num_keys=num_keys))
    dqs, dk, dv = run(inputs)

    dq = jnp.zeros(query.shape, jnp.float32)
    met = low < high
    for number, phase in enumerate(phases):
        # Where a phase has no keys nothing was written, and the contents are arbitrary.
        is_met = met[:, number, :num_queries, None, None]
        dq_phase = jnp.where(is_met, dqs[number][:, :num_queries], jnp.float32(0))
        dq += rotate(dq_phase, -query_position(index, phase, dca), rows.inv_freq)
    dq = (dq * rows.scale[:, None, None, None]).astype(query.dtype)
    return dq, dk[:, :num_keys], dv[:, :num_keys]


def _run(inputs: Inputs, num_keys: int) -> Gradients:
    """Launches the kernels for this head_dim."""
    head_dim = inputs.do.shape[3]
    if head_dim in TILES:
        return backward_fused.gradients(inputs, num_keys, TILES[head_dim])
    dqs = backward_queries.gradients(inputs)
    return Gradients(dqs, *backward_keys.gradients(inputs, num_keys))
