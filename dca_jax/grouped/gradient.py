"""The gradient of a grouped product, from its two constituent products."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def differentiable(multiply: Callable[..., Array], outer: Callable[..., Array]) -> Any:
    """Creates an implementation of `dca_jax.grouped.grouped_product` with a gradient.

    Args:
        multiply: function of (x, kernels, layer, sizes, block) for the product; with `transposed`,
            for the product with transposed matrices. Each is the gradient of the other's x.
        outer: function of (x, dy, kernels, layer, sizes, block) for each group's transposed rows of
            x times those of dy, in a stack like `kernels`, which is the gradient of the kernels.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(4, 5))
    def product(
        x: Array, kernels: Array, layer: Array, sizes: Array, block: int, transposed: bool = False
    ) -> Array:
        return multiply(x, kernels, layer, sizes, block, transposed=transposed)

    def forward(
        x: Array, kernels: Array, layer: Array, sizes: Array, block: int, transposed: bool
    ) -> tuple:
        return product(x, kernels, layer, sizes, block, transposed), (x, kernels, layer, sizes)

    def backward(
        block: int, transposed: bool, saved: tuple, dy: Array
    ) -> tuple[Array, Array, None, None]:
        x, kernels, layer, sizes = map(jnp.asarray, saved)  # constants may be NumPy arrays
        dx = multiply(dy, kernels, layer, sizes, block, transposed=not transposed)
        rows = (dy, x) if transposed else (x, dy)
        return dx, outer(*rows, kernels, layer, sizes, block), None, None

    product.defvjp(forward, backward)
    return product


def in_stack(
    own: Float[Array, "E inputs outputs"],
    kernels: Float[Array, "L E inputs outputs"],
    layer: Int[Array, ""],
) -> Float[Array, "L E inputs outputs"]:
    """One layer's gradient, embedded in a gradient of the stack."""
    if len(kernels) == 1:
        return own[None].astype(kernels.dtype)
    zeros = jnp.zeros(kernels.shape, kernels.dtype)
    return jax.lax.dynamic_update_index_in_dim(zeros, own.astype(kernels.dtype), layer, 0)
