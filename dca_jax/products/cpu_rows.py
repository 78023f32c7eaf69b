"""Products of few rows with a matrix of a stack on a CPU, a block of the matrix at a time.

XLA's CPU compiler copies a matrix out of its stack, or unpacks it, before it multiplies by it. Here
it does so with a block at a time, which is still in the cache when it is multiplied, and large
enough for XLA to use several threads. The time is then that of reading the matrix as it is stored.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dca_jax.products.packed import Packed

# Bytes of a block in float32. On two cores of an AMD EPYC with an L3 cache of 32 MiB, 4 to 8 MiB
# were the fastest; with 2 MiB or less XLA hardly uses a second thread.
BLOCK = 4 * 2**20
FLOAT32 = jnp.float32


def multiply(
    x: Float[Array, "rows inputs"],
    stack: Float[Array, "M inputs outputs"] | Packed,
    number: Int[Array, ""],
) -> Float[Array, "rows outputs"]:
    """x times matrix `number` of the stack, computed in float32.

    Args:
        x: rows with a dtype of up to 32 bits.
        stack: packed or not; a packed matrix has one axis of outputs and one of inputs.
    """
    x = x.astype(FLOAT32)
    if isinstance(stack, Packed):
        return _packed(x, stack, number)
    return _dense(x, stack, number)


def _dense(x: Array, stack: Array, number: Array) -> Array:
    """A block has some of the inputs, and all outputs."""
    _, inputs, outputs = stack.shape

    def add(first: Array, at: Array, size: int, sums: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(x, at, size, axis=1)
        row = jnp.where(at + jnp.arange(size) >= first, row, 0)
        kernel = jax.lax.dynamic_slice(stack, (number, at, 0), (1, size, outputs))[0]
        return sums + jnp.matmul(row, kernel.astype(FLOAT32), precision="highest")

    return _over_blocks(add, inputs, 1, outputs, jnp.zeros((len(x), outputs), FLOAT32))


def _packed(x: Array, stack: Packed, number: Array) -> Array:
    """A block has some of the outputs, and all inputs."""
    _, outputs, inputs = stack.inner_shape
    each = outputs // stack.scale.shape[2]  # outputs that share a scale; all of them if it is one

    def cut(part: Array, axis: int, at: Array, size: int) -> Array:
        if part.shape[axis] == 1:
            return jax.lax.dynamic_index_in_dim(part, number, keepdims=False)
        start, sizes = [number, 0, 0], [1, *part.shape[1:]]
        start[axis], sizes[axis] = at, size
        return jax.lax.dynamic_slice(part, start, sizes)[0]

    def write(_: Array, at: Array, size: int, out: Array) -> Array:
        scales = replace(stack, values=None)
        scales = jax.tree.map(lambda part: cut(part, 2, at // each, size // each), scales)
        block = replace(scales, values=cut(stack.values, 1, at, size))
        y = jnp.zeros((), FLOAT32)
        for own, part in _of_bytes(x, block):
            kernel = part.unpack_inner(FLOAT32)
            y += jnp.einsum("rD,VD->rV", own, kernel, precision="highest")
        return jax.lax.dynamic_update_slice(out, y, (0, at))

    step = 1 if each == outputs else each
    return _over_blocks(write, outputs, step, inputs, jnp.zeros((len(x), outputs), FLOAT32))


def _of_bytes(x: Array, matrix: Packed) -> list[tuple[Array, Packed]]:
    """Rows and packed matrices whose products add up to x times the matrix, with a value per byte.

    The lower halves of int4's bytes belong to the first half of a group's inputs, the upper ones to
    the second. To unpack both side by side takes longer (`Packed.unpack_inner`).
    """
    if matrix.form != "int4":
        return [(x, matrix)]
    groups = matrix.scale.shape[0]
    halves = jnp.moveaxis(x.reshape(len(x), groups, 2, -1), 2, 0).reshape(2, len(x), -1)
    values = matrix.values & jnp.uint8(15), matrix.values >> jnp.uint8(4)
    bytes_ = (replace(matrix, values=part.astype(jnp.int8)) for part in values)
    return list(zip(halves, bytes_, strict=True))


def _over_blocks(
    step: Callable[[Array, Array, int, Any], Any], length: int, unit: int, width: int, state: Array
) -> Array:
    """The state after `step` on each block, given its start, where it is read, and its size.

    The last block is read from an earlier place if it does not fit, and overlaps the one before.

    Args:
        length: size of the axis that is divided into blocks, a multiple of `unit`.
        unit: blocks begin and end at multiples of it.
        width: size of the matrix's other axis.
    """
    units = length // unit
    most = max(1, min(BLOCK // (FLOAT32.dtype.itemsize * width * unit), units))
    count = -(-units // most)
    size = -(-units // count) * unit

    def one(block: Array, state: Array) -> Array:
        first = block * size
        return step(first, jnp.minimum(first, length - size), size, state)

    return jax.lax.fori_loop(0, count, one, state)
