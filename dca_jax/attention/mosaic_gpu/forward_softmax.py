"""The online softmax of Hopper's forward kernel."""

from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from dca_jax.attention.mosaic_gpu.forward_tiles import WARPGROUP_Q
from dca_jax.attention.mosaic_gpu.vote import any_in_warp

# The accumulator is rescaled only when a query's maximum has grown by this much, in log2 units:
# weights stay below 2^8, which fits float16, and float32 sums are precise enough.
SLACK = 8.0


class Softmax(NamedTuple):
    """The state of an online softmax, in registers; maxima in log2 units.

    `m_i` is the reference of the weights, which may lag behind the largest logit by SLACK;
    `largest` is that logit, tracked only if small blocks are skipped.
    """

    acc: Float[Array, "queries H"]
    m_i: Float[Array, " queries"]
    l_i: Float[Array, " queries"]
    largest: Float[Array, " queries"] | None


def raise_maxima(state: Softmax, logits: Float[Array, "queries block_k"]) -> Softmax:
    """Raises the maxima to these logits, in warps where they have grown by more than SLACK.

    Otherwise nothing is rescaled: the weights are larger than usual, but as precise.
    """
    m_next = jnp.maximum(state.m_i, logits.max(axis=1))

    def rescale(acc: Array, m_i: Array, l_i: Array) -> tuple[Array, Array, Array]:
        decay = jnp.exp2(m_i - m_next)
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
        return acc, m_next, l_i * decay

    grown = any_in_warp(m_next - state.m_i, SLACK)
    acc, m_i, l_i = lax.cond(grown, rescale, lambda *state: state, *state[:3])
    return state._replace(acc=acc, m_i=m_i, l_i=l_i)


def weigh(
    m_i: Float[Array, " queries"],
    l_i: Float[Array, " queries"],
    logits: Float[Array, "queries block_k"],
) -> tuple[
    Float[Array, " queries"],
    Float[Array, " queries"],
    Float[Array, "queries block_k"],
    Bool[Array, ""],
    Float[Array, " queries"],
]:
    """As `raise_maxima` without the accumulator, which `rescale` brings up later.

    Returns:
        The new `m_i` and `l_i`, the latter with these logits' weights, the weights, whether maxima
        were raised, and the factor for the accumulator if so.
    """
    m_next = jnp.maximum(m_i, logits.max(axis=1))
    grown = any_in_warp(m_next - m_i, SLACK)
    m_next = lax.cond(grown, lambda _, m_next: m_next, lambda m_i, _: m_i, m_i, m_next)
    decay = jnp.exp2(m_i - m_next)
    p = jnp.exp2(logits - along_keys(m_next, logits.shape[1]))
    return m_next, l_i * decay + p.sum(axis=1), p, grown, decay


def rescale(
    acc: Float[Array, "queries H"], grown: Bool[Array, ""], decay: Float[Array, " queries"]
) -> Float[Array, "queries H"]:
    """The accumulator, relative to maxima that `weigh` has raised."""

    def scaled(acc: Array) -> Array:
        return acc * lax.broadcast_in_dim(decay, acc.shape, [0])

    return lax.cond(grown, scaled, lambda acc: acc, acc)


def along_keys(x: Array, block_k: int) -> Array:
    """One number per query, broadcast over keys."""
    return lax.broadcast_in_dim(x, (WARPGROUP_Q, block_k), [0])


def splat(shape: tuple[int, ...], value: float, layout: Any) -> Float[Array, "..."]:
    """An array of one value."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
