"""Operands of matrix products in shared memory."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


def zero(step: Int[Array, ""]) -> Int[Array, ""]:
    """Zero, which the compiler cannot know, to be added to the index of an operand of a product.

    With an index that is the same in all steps, it computes the addresses of all parts of the
    operand before the loop, and spills them, as they take more registers than there are.
    """
    return lax.shift_right_logical(step, jnp.int32(30))
