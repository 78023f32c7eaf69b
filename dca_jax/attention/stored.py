"""Keys and values as stored in a KV cache: unquantized, or in 8 bits with a scale per head.

In 8 bits a head of a token is `q * scale`: q is int8, or float8 with 4 exponent and 3 mantissa bits
(OCP 8-bit floating point, E4M3), and scale is a float32 that maps the head's largest element to the
largest q. It is computed once, when the token is written. Because a head has a single scale,
kernels multiply by q and apply the scale to the logit or to the weight of the value, so nothing is
rounded twice.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

# The largest q of each dtype. int8 does not use -128, so that it is symmetric.
LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}


class Scales(NamedTuple):
    """The scales of 8-bit keys and values: one number per head and token.

    Slots are the last axis, so that a kernel reads the scales of a block of keys contiguously.
    """

    key: Float[Array, "L B K S"]
    value: Float[Array, "L B K S"]


class Stored(NamedTuple):
    """All layers of a cache and, with 8 bits, their scales.

    For the scales, slots are split into P blocks of w. If `context` splits texts, each device has
    two of the blocks (`dca_jax.attention.parallel.zigzag`); otherwise P is 1.
    """

    key: Num[Array, "*L B S KH"]
    value: Num[Array, "*L B S KH"]
    key_scale: Float[Array, "*L B P K w"] | None = None
    value_scale: Float[Array, "*L B P K w"] | None = None

    @property
    def scales(self) -> Scales | None:
        """The scales, with every block of slots as a separate row; None if unquantized."""
        if self.key_scale is None or self.value_scale is None:
            return None
        layers, batch, blocks, kv_heads, width = self.key_scale.shape
        rows = (layers, batch * blocks, kv_heads, width)
        return Scales(self.key_scale.reshape(rows), self.value_scale.reshape(rows))


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether a cache of this dtype needs scales."""
    return jnp.dtype(dtype) in LARGEST


def quantize(
    x: Float[Array, "*rest H"], dtype: DTypeLike
) -> tuple[Num[Array, "*rest H"], Float[Array, "*rest"]]:
    """x in 8 bits, and the scale of each vector of H elements; a zero vector has scale 0.

    A non-finite vector has a non-finite scale, so that it is noticed when it is read.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / LARGEST[jnp.dtype(dtype)]
    q = wide / jnp.where(scale == 0, 1, scale)[..., None]
    return (jnp.round(q) if dtype == jnp.int8 else q).astype(dtype), scale


def dequantize(
    q: Num[Array, "*rest H"], scale: Float[Array, "*rest"], dtype: DTypeLike
) -> Float[Array, "*rest H"]:
    """The approximation of x from the result of `quantize`."""
    return (q.astype(jnp.float32) * scale[..., None]).astype(dtype)


def dequantized_layer(
    key: Num[Array, "L B S K H"],
    value: Num[Array, "L B S K H"],
    scales: Scales,
    layer: Int[Array, ""],
    dtype: DTypeLike,
) -> tuple[Float[Array, "1 B S K H"], Float[Array, "1 B S K H"]]:
    """A layer's dequantized keys and values, as a stack of one layer, for kernels without 8 bits.

    This pays off for many queries: T of them do 4 T S N H operations with the 2 S K H numbers
        converted here.
    """
    key, value = (
        dequantize(x[layer], jnp.swapaxes(scale[layer], 1, 2), dtype)[None]
        for x, scale in ((key, scales.key), (value, scales.value))
    )
    return key, value
