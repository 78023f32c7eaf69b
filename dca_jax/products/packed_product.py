"""Products with packed matrices: many rows use the unpacked matrix, few rows the packed one."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from dca_jax.products import few_rows
from dca_jax.products.packed import Packed
from dca_jax.sharding import Shards


def packed_product(
    subscripts: str,
    x: Array,
    matrix: Packed,
    layer: Int[Array, ""] | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> Array:
    """An einsum of an array and a packed matrix, with float32 sums.

    For many rows the matrix is first unpacked to the dtype of x. On a mesh the matrix may be split
    along `fsdp`; it is gathered in packed form.

    Args:
        subscripts: such as "BTD,DNH->BTNH", with the matrix second and its inputs adjacent.
        matrix: the matrix, or a stack of matrices if `layer` is given.
        layer: index of the matrix in the stack.
        dtype: dtype of the result (default: that of x).
    """
    dtype = x.dtype if dtype is None else dtype
    shards = Shards.of(matrix)
    x_letters, letters = subscripts.partition("->")[0].split(",")
    inputs = sum(letter in x_letters for letter in letters)
    rows = math.prod(x.shape[: x.ndim - inputs]) // shards.size("data", "fsdp")
    if few_rows.are_few(rows, x.dtype):
        return _few(subscripts, x, shards.gathered(matrix), layer, shards).astype(dtype)
    own = shards.gathered(matrix if layer is None else matrix.at(layer))
    kernel = unpacked_inner(own, x.dtype)
    outputs = "".join(letter for letter in letters if letter not in x_letters)
    summed = "".join(letter for letter in letters if letter in x_letters)
    subscripts = f"{x_letters},{outputs}{summed}->{subscripts.partition('->')[2]}"
    return jnp.einsum(
        subscripts,
        x,
        kernel,
        precision="highest" if x.dtype == jnp.float32 else None,
        preferred_element_type=dtype,
        out_sharding=shards.product(subscripts, x, kernel),
    )


def packed_products(
    subscripts: Sequence[str],
    x: Array,
    stacks: Sequence[Packed],
    layer: Int[Array, ""],
) -> list[Array]:
    """`packed_product` with each of several stacks, in the dtype of x; few rows in one launch.

    Args:
        subscripts: one for each stack, with the same letters for inputs.
        stacks: stacks in the same form.
    """
    first, _ = subscripts[0].split(",")
    inputs = sum(letter in first for letter in subscripts[0].partition("->")[0].split(",")[1])
    lead = x.shape[: x.ndim - inputs]
    together = Shards.of(stacks[0]).mesh is None and few_rows.alike(stacks)
    if not together or not few_rows.are_few(math.prod(lead), x.dtype):
        return [packed_product(s, x, m, layer) for s, m in zip(subscripts, stacks, strict=True)]
    rows = x.reshape(math.prod(lead), -1)
    found = few_rows.multiply(rows, [_flat(stack, inputs) for stack in stacks], layer)
    shapes = [stack.inner_shape[1 : stack.ndim - inputs] for stack in stacks]
    return [y.reshape(*lead, *s).astype(x.dtype) for y, s in zip(found, shapes, strict=True)]


def unpacked_inner(matrix: Packed, dtype: DTypeLike) -> Array:
    """`Packed.unpack_inner`; on a mesh each device unpacks its own part."""
    shards = Shards.of(matrix)
    if shards.mesh is None:
        return matrix.unpack_inner(dtype)
    matrix = jax.lax.stop_gradient(matrix)
    specs = shards.specs(matrix)
    return shards.local(lambda own: own.unpack_inner(dtype), (specs,), specs.values)(matrix)


def _few(
    subscripts: str, x: Array, matrix: Packed, layer: Int[Array, ""] | None, shards: Shards
) -> Array:
    """The product with the kernel, in place in the stack; on a mesh, sums over input parts."""
    operands, _, out = subscripts.partition("->")
    x_letters, letters = operands.split(",")
    outputs = [letter for letter in letters if letter not in x_letters]
    inputs = [letter for letter in letters if letter in x_letters]
    if layer is None:
        matrix, layer = matrix[None], jnp.int32(0)
    last = 1 + len(outputs)
    axes: tuple[str, ...] = ()  # the mesh axes that split inputs

    def local(x: Array, matrix: Packed, layer: Any) -> Array:
        flat = _flat(matrix, len(inputs))
        lead = x.shape[: x.ndim - len(inputs)]
        (y,) = few_rows.multiply(x.reshape(math.prod(lead), -1), [flat], layer)
        y = jax.lax.psum(y, axes) if axes else y
        return y.reshape(*lead, *matrix.inner_shape[1:last])

    if shards.mesh is None:
        return local(x, matrix, layer)
    x_spec, specs = shards.specs((x, matrix))
    cuts = dict(zip(x_letters, x_spec, strict=True))
    cuts |= zip(outputs + inputs, specs.values[1:], strict=True)
    for letter in inputs:
        if cuts[letter] is not None:
            axes += cuts[letter] if isinstance(cuts[letter], tuple) else (cuts[letter],)
    out_spec = PartitionSpec(*(cuts[letter] for letter in out))
    return shards.local(local, (x_spec, specs, PartitionSpec()), out_spec)(x, matrix, layer)


def _flat(stack: Packed, inputs: int) -> Packed:
    """A stack with one axis of outputs and one of `inputs` inputs."""

    def flat(part: Array, first: int) -> Array:
        """Merges its first `first` axes into one, and the others into another."""
        sizes = part.shape[1 : 1 + first], part.shape[1 + first :]
        return part.reshape(len(part), *map(math.prod, sizes))

    values = flat(stack.values, stack.ndim - 1 - inputs)
    others = jax.tree.map(lambda part: flat(part, inputs), replace(stack, values=None))
    return replace(others, values=values, order=(1, 0), num_inputs=1)
