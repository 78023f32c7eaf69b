"""What the kernels compute with a block: products, masks and the online softmax."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from dca_jax.attention.mosaic_tpu.runs import inter_begin
from dca_jax.attention.mosaic_tpu.steps import KEY_BEGIN, KEY_END, SUCC_BEGIN
from dca_jax.attention.softmax import LOG2E, MASKED
from dca_jax.dca import DCAConfig, Phase


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Contracts one axis of each; sums in float32, and does not round float32 inputs."""
    precision = "highest" if a.dtype == jnp.float32 else None
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def key_end(
    runs_ref: Any,
    run_index: Array,
    index: Array,
    length: Array,
    key_offset: Array,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> Array:
    """The slot before which the run's keys end for each query.

    Args:
        runs_ref: `Tables.runs`.
        run_index: `Step.run_index`.
        index: the queries' text indices.
        length: the row's length; queries from there on are padding.
        key_offset: the text index of the row's first key.
        dca: the chunk length.
        phases: the phases attended to.
    """
    succ_begin = runs_ref[run_index + SUCC_BEGIN]
    inter = inter_begin(succ_begin, dca)
    attends = index < length
    if "intra" not in phases:
        attends &= index >= (succ_begin if "succ" in phases else inter)
    if "inter" not in phases:
        attends &= index < (inter if "succ" in phases else succ_begin)
    causal = index + 1 - key_offset
    return jnp.where(attends, jnp.minimum(causal, runs_ref[run_index + KEY_END]), 0)


def key_mask(runs_ref: Any, run_index: Array, slot: Array, end: Array) -> Array:
    """Which keys of the run each query attends to; `slot` and `end` broadcast to a block."""
    return (slot >= runs_ref[run_index + KEY_BEGIN]) & (slot < end)


def zero_padding(x: Array, start: Array, length: int, axis: int) -> Array:
    """A block that begins at `start`, with zeros from `length` on, where it may hold NaN."""
    if length % x.shape[axis] == 0:
        return x
    index = start + lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(index < length, x, jnp.zeros_like(x))


def init_softmax(m_ref: Any, l_ref: Any, acc_ref: Any) -> None:
    """Initializes the running maximum, the running sum and the accumulator."""
    m_ref[...] = jnp.full(m_ref.shape, MASKED, jnp.float32)
    l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)


def softmax_weights(logits: Array, m: Array, axis: int) -> tuple[Array, Array, Array]:
    """One step of the online softmax, in powers of two, with keys along `axis`.

    Returns:
        The unnormalized weights p, the new running maximum, and the factor alpha that rescales the
        running sum and the accumulator.
    """
    new_m = jnp.maximum(m, jnp.max(logits, axis=axis, keepdims=True))
    alpha = jnp.exp2(m - new_m)
    return jnp.exp2(logits - new_m), new_m, alpha


def nonzero_sum(running_sum: Array) -> tuple[Array, Array]:
    """Which queries attend to any key, and the running sum l with 1 for the others."""
    any_key = running_sum > 0
    return any_key, jnp.where(any_key, running_sum, 1.0)


def log_sum_exp(m: Array, safe_l: Array, any_key: Array) -> Array:
    """The natural log-sum-exp of the logits; -inf for queries that attend to no key.

    `safe_l` and `any_key` are those of `nonzero_sum`.
    """
    lse = m / LOG2E + jnp.log(safe_l)
    return jnp.where(any_key, lse, -jnp.inf)
