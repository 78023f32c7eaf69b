"""Keys and values as a KV cache holds them: exact, or in 8 bits with a scale for each head.

In 8 bits a head of a token is `q * scale`: q is int8, or float8 of 4 exponent and 3 mantissa bits
(OCP 8-bit floating point, E4M3), and scale is float32 and takes the head's largest element to the
largest q. It is computed once, when the token is written. A scale is common to a head, so kernels
multiply by q and give the scale to the logit, or to the weight of the value: nothing is rounded
twice.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

# The largest q of each dtype. Of int8, -128 is left out: so a head and its negative are alike.
LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}


class Scales(NamedTuple):
    """What keys and values in 8 bits are to be multiplied by: one number for a head of a token.

    Slots come last: a kernel reads the scales of a block of keys as one line.
    """

    key: Float[Array, "L B K S"]
    value: Float[Array, "L B K S"]


class Stored(NamedTuple):
    """All layers of a cache, and where they are in 8 bits, their scales.

    Slots are cut in P blocks of w for the scales: where the devices of `context` share a text, each
    has two of the blocks (`dca_jax.attention.parallel.zigzag`); else P is 1.
    """

    key: Num[Array, "*L B S KH"]
    value: Num[Array, "*L B S KH"]
    key_scale: Float[Array, "*L B P K w"] | None = None
    value_scale: Float[Array, "*L B P K w"] | None = None

    @property
    def scales(self) -> Scales | None:
        """The scales, every block of slots as a row of its own; None of an exact cache."""
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

    A vector that is not finite has a scale that is not, so that it is noticed where it is read.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / LARGEST[jnp.dtype(dtype)]
    q = wide / jnp.where(scale == 0, 1, scale)[..., None]
    return (jnp.round(q) if dtype == jnp.int8 else q).astype(dtype), scale


def dequantize(
    q: Num[Array, "*rest H"], scale: Float[Array, "*rest"], dtype: DTypeLike
) -> Float[Array, "*rest H"]:
    """What `quantize` has left of x."""
    return (q.astype(jnp.float32) * scale[..., None]).astype(dtype)


def dequantized_layer(
    key: Num[Array, "L B S K H"],
    value: Num[Array, "L B S K H"],
    scales: Scales,
    layer: Int[Array, ""],
    dtype: DTypeLike,
) -> tuple[Float[Array, "1 B S K H"], Float[Array, "1 B S K H"]]:
    """A layer's keys and values for a kernel that reads none in 8 bits: a stack of one layer.

    For many queries: T of them do 4 T S N H operations with the 2 S K H numbers converted here.
    """
    key, value = (
        dequantize(x[layer], jnp.swapaxes(scale[layer], 1, 2), dtype)[None]
        for x, scale in ((key, scales.key), (value, scales.value))
    )
    return key, value
