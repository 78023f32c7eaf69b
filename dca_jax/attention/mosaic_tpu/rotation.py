"""Rotary embedding of queries inside a kernel.

A block of queries is transposed there, [H, q]: the two elements of a rotated pair are two rows,
and each query is one lane. Cos and sin are read from tables, one for each phase. The tables include
the logit scale and the factor log2(e) that the kernels' exp2 needs. Each query of a block takes the
cos and sin of its own phase.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_tpu.runs import inter_begin
from dca_jax.attention.softmax import LOG2E
from dca_jax.dca import DCAConfig, Phase, query_position


def rotation_tables(
    num_queries: int, rows: Rows, dca: DCAConfig, phases: tuple[Phase, ...]
) -> Array:
    """Scaled cos and sin at the query positions of each phase.

    Returns:
        [P, B, H, T], float32: along H, H / 2 rows of cos and then H / 2 rows of sin.
    """
    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    positions = jnp.stack([query_position(index, phase, dca) for phase in phases])
    frequency = jnp.concatenate([rows.inv_freq, rows.inv_freq], axis=1)
    angle = positions.astype(jnp.float32)[:, :, None, :] * frequency[None, :, :, None]
    # One `where` instead of concatenating cos and sin, which would hold both tables twice.
    element = jnp.arange(frequency.shape[1], dtype=jnp.int32)[None, None, :, None]
    is_cos = jnp.broadcast_to(element < rows.inv_freq.shape[1], angle.shape)
    return (
        jnp.where(is_cos, jnp.cos(angle), jnp.sin(angle))
        * (rows.scale * LOG2E)[None, :, None, None]
    )


def select_cos_sin(
    tables_ref: Any, index: Array, succ_begin: Array, dca: DCAConfig, phases: tuple[Phase, ...]
) -> tuple[Array, Array]:
    """The cos and sin of each query, from the table of the query's own phase.

    Args:
        tables_ref: `rotation_tables` of a block of queries, [P, H, q].
        index: the queries' text indices, [1, q].
        succ_begin: the text index from which queries are in phase succ (see `runs.Run`).
        dca: the chunk length.
        phases: the phase of each table.

    Returns:
        cos and sin, [H / 2, q] each.
    """
    tables = {phase: tables_ref[number] for number, phase in enumerate(phases)}
    selected = tables[phases[-1]]
    if "succ" in tables and "intra" in tables:
        selected = jnp.where(index >= succ_begin, tables["succ"], selected)
    if "inter" in tables and len(tables) > 1:
        selected = jnp.where(index >= inter_begin(succ_begin, dca), tables["inter"], selected)
    half = selected.shape[0] // 2
    return selected[:half], selected[half:]


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates one head, [H, q] in float32."""
    half = x.shape[0] // 2
    x1, x2 = x[:half], x[half:]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=0)


def rotate_heads(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates several heads, [heads * H, q] in float32."""
    head_dim = 2 * cos.shape[0]
    heads = [
        rotate(x[start : start + head_dim], cos, sin) for start in range(0, x.shape[0], head_dim)
    ]
    return jnp.concatenate(heads, axis=0)


def rotate_back(x: Array, cos: Array, sin: Array) -> Array:
    """The transpose of `rotate`, for gradients."""
    return rotate(x, cos, -sin)
