"""Shared parts of blockwise softmax: constants, and merging by log-sum-exp."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOG2E = math.log2(math.e)  # kernels use powers of two: exp(x) = exp2(x * LOG2E)
MASKED = -1e30  # masked logits and the initial running maximum: finite, to avoid inf - inf
FAR = 2**30  # a position beyond every text; twice that would overflow int32


def merge_passes(
    outs: list[Float[Array, "B T N H"]], lses: list[Float[Array, "B N T"]]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Merges passes over disjoint keys into attention over all of them, by their log-sum-exp.

    o = sum_p w_p o_p with w = softmax over p of lse_p (section 3.4, with one softmax overall). The
    result equals the single softmax up to rounding. Queries without keys keep 0 and -inf.
    """
    largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, lses))
    met = jnp.isfinite(largest)
    largest = jnp.where(met, largest, 0)  # no difference of infinities
    weights = [jnp.exp(lse - largest) for lse in lses]
    # A softmax over no keys has neither value nor gradient.
    total = jnp.where(met, functools.reduce(jnp.add, weights), 1)
    parts = [
        jnp.swapaxes(weight / total, 1, 2)[..., None] * out.astype(total.dtype)
        for weight, out in zip(weights, outs, strict=True)
    ]
    out = functools.reduce(jnp.add, parts).astype(outs[0].dtype)
    return out, jnp.where(met, largest + jnp.log(total), -jnp.inf)


def output_delta(
    do: Float[Array, "*B T N H"], out: Float[Array, "*B T N H"], dtype: jnp.dtype
) -> Float[Array, "*B N T"]:
    """rowsum(dO * O), which the flash backward subtracts from dP: dS = P * (dP - delta).

    It is an elementwise product and a sum in `dtype`, independent of the matrix-product precision.
    """
    return jnp.swapaxes(jnp.sum(do.astype(dtype) * out.astype(dtype), axis=-1), -1, -2)
