"""Grouped products on any device: a loop over blocks of rows that reads matrices in place."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dca_jax.dtypes import compute_dtype
from dca_jax.grouped.gradient import differentiable, in_stack
from dca_jax.grouped.layout import block_ends
from dca_jax.products.packed import Packed


def precision(x: Array) -> str | None:
    """The precision for float32 products, which a TPU or GPU would otherwise round."""
    return "highest" if x.dtype == jnp.float32 else None


def _each_block(
    sizes: Array, block: int, body: Callable[[Array, Array, Any], Any], start: Any
) -> Any:
    """Folds `body(group, first row, value)` over all blocks."""
    _, ends = block_ends(sizes, block)

    def step(number: Array, value: Any) -> Any:
        group = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
        return body(group, number * block, value)

    return jax.lax.fori_loop(jnp.int32(0), ends[-1], step, start)


def matrix_of(
    kernels: Float[Array, "L E inputs outputs"] | Packed,
    layer: Int[Array, ""],
    group: Int[Array, ""],
    dtype: Any,
) -> Float[Array, "inputs outputs"]:
    """A matrix of the stack."""
    if isinstance(kernels, Packed):
        return kernels.at(layer).at(group).unpack(dtype)
    shape = (1, 1, *kernels.shape[2:])
    zero = jnp.zeros((), group.dtype)
    start = (layer.astype(group.dtype), group, zero, zero)
    return jax.lax.dynamic_slice(kernels, start, shape)[0, 0].astype(dtype)


def _multiply(
    x: Array, kernels: Array, layer: Array, sizes: Array, block: int, *, transposed: bool
) -> Array:
    def body(group: Array, first: Array, y: Array) -> Array:
        matrix = matrix_of(kernels, layer, group, x.dtype)
        rows = jax.lax.dynamic_slice_in_dim(x, first, block)
        product = jnp.dot(rows, matrix.T if transposed else matrix, precision=precision(x))
        return jax.lax.dynamic_update_slice_in_dim(y, product, first, 0)

    zeros = jnp.zeros((len(x), kernels.shape[2 if transposed else 3]), x.dtype)
    return _each_block(sizes, block, body, zeros)


def _outer(x: Array, dy: Array, kernels: Array, layer: Array, sizes: Array, block: int) -> Array:
    """The gradient of the kernels: each group's rows of x times those of dy."""
    total = compute_dtype(x.dtype)

    def body(group: Array, first: Array, sums: Array) -> Array:
        rows, own = (jax.lax.dynamic_slice_in_dim(a, first, block) for a in (x, dy))
        product = jnp.dot(rows.T, own, precision=precision(x), preferred_element_type=total)
        return sums.at[group].add(product)

    sums = _each_block(sizes, block, body, jnp.zeros(kernels.shape[1:], total))
    return in_stack(sums, kernels, layer)


blocks = differentiable(_multiply, _outer)  # a loop over blocks of rows
