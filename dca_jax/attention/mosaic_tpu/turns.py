"""Rotating queries inside a kernel.

A tile of queries lies transposed there, [H, q]: a plane's two elements are then two rows, and what
belongs to a query is a lane. Cos and sin come from memory, one table a phase, with the logit scale
and the log2(e) of the kernels' exp2 in them; each query of a tile takes those of its own phase.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_tpu.stages import far_from
from dca_jax.dca import DCAConfig, Phase, query_position

LOG2E = math.log2(math.e)


def turns(num_queries: int, rows: Rows, dca: DCAConfig, phases: tuple[Phase, ...]) -> Array:
    """cos, and below it sin, of each phase's query positions, times the scale: [P, B, H, T]."""
    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    positions = jnp.stack([query_position(index, phase, dca) for phase in phases])
    frequency = jnp.concatenate([rows.inv_freq, rows.inv_freq], axis=1)
    angle = positions.astype(jnp.float32)[:, :, None, :] * frequency[None, :, :, None]
    # Written in one piece: put together from two, it would lie in memory twice for a while.
    plane = jnp.arange(frequency.shape[1], dtype=jnp.int32)[None, None, :, None]
    is_cos = jnp.broadcast_to(plane < rows.inv_freq.shape[1], angle.shape)
    return (
        jnp.where(is_cos, jnp.cos(angle), jnp.sin(angle))
        * (rows.scale * LOG2E)[None, :, None, None]
    )


def pick(
    turns_ref: Any, index: Array, near: Array, dca: DCAConfig, phases: tuple[Phase, ...]
) -> tuple[Array, Array]:
    """cos and sin [H / 2, q] of the queries at text indices [1, q], each of its own phase.

    From `near` on they are one chunk behind the stage's keys (`stages.Stage`).
    """
    at = {phase: turns_ref[number] for number, phase in enumerate(phases)}
    table = at[phases[-1]]
    if "succ" in at and "intra" in at:
        table = jnp.where(index >= near, at["succ"], table)
    if "inter" in at and len(at) > 1:
        table = jnp.where(index >= far_from(near, dca), at["inter"], table)
    half = table.shape[0] // 2
    return table[:half], table[half:]


def turn(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates [H, q] (float32) forward."""
    half = x.shape[0] // 2
    one, two = x[:half], x[half:]
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=0)


def turn_heads(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates several heads [heads * H, q] forward."""
    dim = 2 * cos.shape[0]
    heads = [turn(x[at : at + dim], cos, sin) for at in range(0, x.shape[0], dim)]
    return jnp.concatenate(heads, axis=0)


def turn_back(x: Array, cos: Array, sin: Array) -> Array:
    """The transpose of `turn`: what a gradient goes through."""
    return turn(x, cos, -sin)
