"""What the kernels do with a block: products, masks, and the running softmax."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from dca_jax.attention.mosaic_tpu.stages import far_from
from dca_jax.attention.mosaic_tpu.walk import HIGH, LOW, NEAR
from dca_jax.dca import DCAConfig, Phase

LOWEST = -1e30  # a running maximum to start from: finite, so that no inf - inf appears


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Products summed in float32; float32 inputs unrounded."""
    precision = "highest" if a.dtype == jnp.float32 else None
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def reach(
    stage_ref: Any,
    numbers: Array,
    index: Array,
    limit: Array,
    shift: Array,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> Array:
    """The slot before which a stage's keys end for the queries at text indices `index`.

    `limit` is the row's length (queries from there on are padding), `shift` the text index of its
    first key.
    """
    near = stage_ref[numbers + NEAR]
    far = far_from(near, dca)
    met = index < limit
    if "intra" not in phases:
        met &= index >= (near if "succ" in phases else far)
    if "inter" not in phases:
        met &= index < (far if "succ" in phases else near)
    return jnp.where(met, jnp.minimum(index + 1 - shift, stage_ref[numbers + HIGH]), 0)


def met_keys(stage_ref: Any, numbers: Array, slot: Array, stop: Array) -> Array:
    """Which of the stage's keys each query meets; `slot` and `stop` broadcast to a block."""
    return (slot >= stage_ref[numbers + LOW]) & (slot < stop)


def within(x: Array, at: Array, limit: int, axis: int) -> Array:
    """A block that starts at `at`, zero from `limit` on: what lies there is no number."""
    if limit % x.shape[axis] == 0:
        return x
    index = at + lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(index < limit, x, jnp.zeros_like(x))
