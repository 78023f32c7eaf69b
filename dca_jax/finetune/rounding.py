"""Stochastic rounding to bfloat16, which is unbiased.

Small updates then add up correctly on average, while rounding to nearest would lose each of them
(Gupta et al., arXiv 1502.02551; in bfloat16, Zamirai et al., 2010.06192).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, UInt32


def widened(tree: Any) -> Any:
    """A tree of arrays, converted to float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def stochastically_rounded(pair: tuple[Any, Any], key: Array) -> tuple[Any, Any]:
    """Two trees of float32 arrays, equal in structure, rounded to bfloat16 with shared bits."""
    first, second = map(jax.tree.leaves, pair)
    rounded = []
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        place = jax.typeof(a).sharding
        bits = jax.random.bits(
            jax.random.fold_in(key, number),
            a.shape,
            jnp.uint32,
            out_sharding=None if place.mesh.empty else place,
        )
        rounded.append((_rounded(a, bits & 0xFFFF), _rounded(b, bits >> 16)))
    structure = jax.tree.structure(pair[0])
    a, b = (structure.unflatten(leaves) for leaves in zip(*rounded, strict=True))
    return a, b


def _rounded(
    x: Float32[Array, "*shape"], noise: UInt32[Array, "*shape"]
) -> BFloat16[Array, "*shape"]:
    """x and a part of its last place, `noise` of 65,536, cut off; infinity and NaN stay."""
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = jnp.where(jnp.isfinite(x), raw + noise, raw) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(up, jnp.float32).astype(jnp.bfloat16)
