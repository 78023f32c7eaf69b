"""Exact top-k of scores, where k differs between tiles."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

LEAST = 32  # minimum number of blocks per tile: 4,096 keys
DIGIT = 4  # bits of the threshold that are determined at once


def blocks_to_keep(share: float, blocks: int) -> Int[np.ndarray, " blocks"]:
    """k for each tile of a text: max(32, ceil(share x blocks up to its own))."""
    exact = Fraction(repr(share))  # the decimal value: 0.07 of 100 blocks is 7
    return np.asarray([max(LEAST, math.ceil(exact * (n + 1))) for n in range(blocks)], np.int32)


def always_kept(tile: Int[Array, "B tiles"], blocks: int) -> Bool[Array, "B tiles blocks"]:
    """Mask of a text's first block, a tile's own block and the one before it."""
    number = jnp.arange(blocks, dtype=jnp.int32)[None, None, :]
    own = tile[:, :, None]
    return (number == 0) | (number == own) | (number == own - 1)


def best_blocks(
    scores: Float[Array, "B K tiles blocks"],
    tile: Int[Array, "B tiles"],
    keep: Int[np.ndarray, " blocks"],
) -> Bool[Array, "B K tiles blocks"]:
    """For tile I, keep[I] blocks: those always kept, and the best of the others up to I.

    Ties go to the first block. If there are not enough blocks, all are kept.
    """
    blocks = scores.shape[3]
    always = always_kept(tile, blocks)[:, None]
    earlier = jnp.arange(blocks, dtype=jnp.int32)[None, None, None, :] <= tile[:, None, :, None]
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
    bits = jnp.where(earlier & ~always, jnp.maximum(bits, 0), -1)
    count = jnp.asarray(keep)[jnp.minimum(tile, blocks - 1)] - jnp.int32(3)
    return always | largest(bits, count[:, None, :])


def largest(
    values: Int[Array, "*tiles blocks"], count: Int[Array, "*#tiles"]
) -> Bool[Array, "*tiles blocks"]:
    """Mask of the `count` largest values, with ties going to the first; negative ones never count.

    The threshold is determined digit by digit, which takes fewer passes than sorting.
    """
    threshold = jnp.zeros((*values.shape[:-1], 1), jnp.int32)
    digits = jnp.arange(1 << DIGIT, dtype=jnp.int32).reshape(*[1] * (threshold.ndim - 1), -1)
    for shift in range(32 - DIGIT, -1, -DIGIT):
        # The upper half of the first digit would be negative numbers, which cannot occur.
        steps = digits[..., : 8 if shift == 32 - DIGIT else None] << shift
        reached = threshold + steps
        at_least = jnp.sum(values[..., None] >= reached[..., None, :], axis=-2, dtype=jnp.int32)
        digit = jnp.sum(at_least[..., 1:] >= count[..., None], axis=-1, keepdims=True)
        threshold = threshold + (digit.astype(jnp.int32) << shift)
    above, equal = values > threshold, values == threshold
    missing = count[..., None] - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= missing))
