"""What all softmaxes by blocks share: their numbers, and the merge by log-sum-exp."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOG2E = math.log2(math.e)  # kernels take powers of two: exp(x) = exp2(x * LOG2E)
MASKED = -1e30  # a masked logit, and a running maximum to start from: finite, so inf - inf is never
FAR = 2**30  # a position beyond every text; twice that would overflow int32


def merge_passes(
    outs: list[Float[Array, "B T N H"]], lses: list[Float[Array, "B N T"]]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Merges passes over disjoint keys into attention over all of them, by their log-sum-exp.

    o = sum_p w_p o_p with w = softmax over p of lse_p (section 3.4, with one softmax overall).
    Equal to the single softmax up to rounding. Queries that met no key stay 0 and -inf.
    """
    lse = jnp.stack(lses)
    met = jnp.isfinite(lse).any(axis=0)
    lse = jnp.where(met[None], lse, 0)  # a softmax of nothing has neither value nor gradient
    total = jax.nn.logsumexp(lse, axis=0)
    weights = jnp.swapaxes(jnp.exp(lse - total[None]), 2, 3)[..., None]
    stacked = jnp.stack(outs).astype(lse.dtype)
    out = jnp.sum(weights * stacked, axis=0).astype(outs[0].dtype)
    return out, jnp.where(met, total, -jnp.inf)


def output_delta(
    do: Float[Array, "*B T N H"], out: Float[Array, "*B T N H"], dtype: jnp.dtype
) -> Float[Array, "*B N T"]:
    """rowsum(dO * O), which the flash backward subtracts from dP: dS = P * (dP - delta).

    A product of elements and a sum in `dtype`, which no setting of matrix products can round.
    """
    return jnp.swapaxes(jnp.sum(do.astype(dtype) * out.astype(dtype), axis=-1), -1, -2)
