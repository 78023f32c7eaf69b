"""Packed matrices: int8 per output, int4 in groups of inputs, float8 in blocks.

A packed matrix is used in place of an array of its shape: w = (value - zero) * scale + offset. Each
block of the matrix has a scale and, with int4, also a zero, or an offset instead of it with some
files' weights. There are three forms:

    int8   a scale for each output; values -127 to 127 (from some files also -128, and scales for
           groups of inputs)
    int4   a scale and a zero for each group of inputs of one output; values and zeros 0 to 15; two
           values in a byte, those of a group's first half in the lower halves of its bytes
    fp8    a scale for each block of inputs and outputs; float8 (e4m3)

Outputs come before inputs, whatever the array's order, so that a product reads contiguous inputs of
an output. Matrices of layers and of experts are stacked on leading axes. Those of attention have
more than one axis of inputs or outputs; groups and blocks are along the last one. The block of a
scale follows from the shapes: `scale` has the axes of `values` with sizes that divide theirs, but
with inputs before outputs, because a kernel reads the scales of many outputs at once. So a packed
matrix is split on a mesh like an array, with the scales following their weights.

They represent the weights of AWQ, GPTQ, compressed-tensors and GGUF's most common types exactly
(`dca_jax.weights.kept`). Activations are never packed, and packed matrices have no gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dca_jax.device import current_device
from dca_jax.errors import InputError

# Maximum number of inputs (and, with fp8, outputs) per scale; if it does not divide an axis, the
# greatest common divisor is used.
FORMS = {"int8": 1, "int4": 64, "int4:32": 32, "int4:128": 128, "fp8": 128}
# Instead of a form: as in the checkpoint, if one of the forms can represent it; or not packed.
STORED, UNPACKED = "stored", "unpacked"
FP8 = jnp.float8_e4m3fn
DTYPES = {"int8": jnp.dtype(jnp.int8), "int4": jnp.dtype(jnp.uint8), "fp8": jnp.dtype(FP8)}
LARGEST = {"int8": 127.5, "int4": 15.0, "fp8": 448.0}
FLOAT32 = jnp.float32
SCALE = jnp.dtype(jnp.bfloat16)  # of int4 scales computed here; those from files are float32


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale", "zero", "offset"),
    meta_fields=("order", "num_inputs"),
)
@dataclass(frozen=True)
class Packed:
    """A packed matrix, or a stack of them.

    Attributes:
        values: int8, float8_e4m3fn, or uint8 with two int4 values per byte; outputs before inputs.
        scale: floating-point scales, inputs before outputs; the size of each axis equals that of
            `values` or divides it.
        zero: zeros with the shape of `scale`, uint8, only with int4; None means zeros of 0.
        order: for each of its last axes, the corresponding axis of the represented matrix.
        num_inputs: how many of these axes are inputs.
        offset: floating-point offsets with the shape of `scale`; None for no offset.
    """

    # Arrays, or their partition specs in a tree of the same structure.
    values: Any
    scale: Any
    zero: Any
    order: tuple[int, ...]
    num_inputs: int
    offset: Any = None

    @property
    def form(self) -> str:
        """int8, int4 or fp8."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.values.dtype)

    @property
    def name(self) -> str:
        """The form as in `FORMS`, with its actual group size, such as "int4:64"."""
        groups = self.scale.shape[self.lead + self.num_inputs - 1]
        if self.form == "fp8" or (self.form == "int8" and groups == 1):
            return self.form
        return f"{self.form}:{self.inner_shape[-1] // groups}"

    @property
    def inner_shape(self) -> tuple[int, ...]:
        """Shape of the matrix, outputs before inputs."""
        *sizes, last = self.values.shape
        return (*sizes, 2 * last if self.form == "int4" else last)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it represents."""
        lead, inner = self.lead, self.inner_shape
        return inner[:lead] + tuple(
            inner[lead + self.order.index(axis)] for axis in range(len(self.order))
        )

    @property
    def lead(self) -> int:
        """Number of leading stack axes."""
        return self.ndim - len(self.order)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.values.ndim

    def __getitem__(self, index: Any) -> "Packed":
        """Applies an index on leading axes to every part."""
        return jax.tree.map(lambda part: part[index], self)

    def __len__(self) -> int:
        return len(self.values)

    def at(self, layer: Int[Array, ""]) -> "Packed":
        """One matrix of a stack; its number may be traced."""
        return jax.tree.map(
            lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False), self
        )

    def rows(self, numbers: Int[Array, "*n"], dtype: DTypeLike) -> Float[Array, "*n inputs"]:
        """The unpacked inputs of some outputs of a matrix; no others are read."""

        def taken(part: Array) -> Array:
            each = len(self) // part.shape[-1]  # rows that share a scale
            found = part[:, numbers if each == 1 else numbers // each]
            return jnp.moveaxis(found, 0, -2)

        others = jax.tree.map(taken, replace(self, values=None))
        return replace(others, values=self.values[numbers]).unpack_inner(dtype)

    def unpack(self, dtype: DTypeLike) -> Array:
        """The array that it represents, computed in float32 and cast to `dtype`; no gradients."""
        lead = self.lead
        back = [lead + self.order.index(axis) for axis in range(len(self.order))]
        return self.unpack_inner(dtype).transpose([*range(lead), *back])

    def unpack_inner(self, dtype: DTypeLike) -> Array:
        """Like `unpack`, with outputs before inputs."""
        values, others = self.values, (self.scale, self.zero, self.offset)
        lead, first = self.lead, self.lead + self.num_inputs
        turned = [*range(lead), *range(first, self.ndim), *range(lead, first)]
        scale, zero, offset = jax.tree.map(lambda part: part.transpose(turned), others)
        values, scale, zero, offset = jax.lax.stop_gradient((values, scale, zero, offset))
        shape, blocked, spread = self.inner_shape, [], []
        for size, count in zip(shape, scale.shape, strict=True):
            # An axis with one scale, or one per element, needs no splitting (which a mesh may not
            # allow).
            whole = count in (1, size)
            blocked += [size] if whole else [count, size // count]
            spread += [count] if whole else [count, 1]
        if self.form == "int4":
            groups = scale.shape[-1]
            values = values.reshape(*values.shape[:-1], groups, 1, values.shape[-1] // groups)
            shifts = jnp.array([0, 4], jnp.uint8).reshape((1,) * (values.ndim - 2) + (2, 1))
            values = (values >> shifts) & jnp.uint8(15)
            if current_device().platform == "cpu":
                # Bytes first, then float32: XLA's loop that does both at once is not vectorized.
                values = jax.lax.optimization_barrier(values)
        wide = values.reshape(blocked).astype(FLOAT32)
        if zero is not None:
            wide -= zero.reshape(spread).astype(FLOAT32)
        wide *= scale.reshape(spread).astype(FLOAT32)
        if offset is not None:
            wide += offset.reshape(spread).astype(FLOAT32)
        return wide.reshape(shape).astype(dtype)


def is_packed(value: Any) -> TypeGuard[Packed]:
    """Whether a value is a packed matrix; use it as `is_leaf` in `jax.tree` functions."""
    return isinstance(value, Packed)


def packed_forms(tree: Any) -> str:
    """The names of all forms in a tree, such as a model: "int4:64, int8"; empty if none."""
    leaves = jax.tree.leaves(tree, is_leaf=is_packed)
    return ", ".join(sorted({leaf.name for leaf in leaves if is_packed(leaf)}))


def check_form(name: str | None) -> None:
    """Raises InputError for a name that is not one of `FORMS`, and not None."""
    if name is not None and name not in FORMS:
        known = ", ".join([*FORMS, STORED, UNPACKED])
        raise InputError(f"weights must be one of {known}, or None, got {name!r}")


def block_sizes(form: str, shape: Sequence[int], num_inputs: int) -> tuple[int, ...]:
    """The size of a scale's block along each axis of a matrix.

    Args:
        form: a name in `FORMS`.
        shape: shape of the matrix, or of one device's part of it, because blocks are not divided
            between devices. Outputs come before inputs.
        num_inputs: number of input axes.

    Raises:
        InputError: int4 with an odd number of inputs.
    """
    kind, most = form.partition(":")[0], FORMS[form]
    if kind == "int8":
        return (1,) * (len(shape) - num_inputs) + tuple(shape[-num_inputs:])
    sizes = [1] * len(shape)
    for axis in (-1, -1 - num_inputs) if kind == "fp8" else (-1,):
        sizes[axis] = math.gcd(most, shape[axis])
    if kind == "int4" and sizes[-1] % 2:
        raise InputError(
            f"int4 weights need groups of an even number of up to {most} inputs, which must divide "
            f"the {shape[-1]} on a device; choose int8"
        )
    return tuple(sizes)


def packed_bytes(form: str, shape: Sequence[int], num_inputs: int) -> int:
    """Bytes of a packed matrix, or of one device's part; arguments as in `block_sizes`."""
    blocks = block_sizes(form, shape, num_inputs)
    scales = math.prod(size // block for size, block in zip(shape, blocks, strict=True))
    if form.startswith("int4"):
        return math.prod(shape) // 2 + scales * (SCALE.itemsize + 1)
    return math.prod(shape) + scales * FLOAT32.dtype.itemsize


def pack(
    matrix: Array,
    form: str,
    num_inputs: int,
    *,
    order: Sequence[int] | None = None,
    axes: Sequence[Any] = (),
) -> Packed:
    """Packs a matrix.

    The error of a weight is at most half its scale (int8), its scale (int4; half of it for most
    weights), or 1/16 of the weight (fp8, for weights above 1/28,672 of the block's largest).

    Args:
        matrix: a single matrix of any floating dtype, outputs before inputs.
        form: a name in `FORMS`.
        num_inputs: number of input axes.
        order: `Packed.order` (default: the matrix's own order).
        axes: the mesh axes that split the inputs, if this is one device's part of a matrix.
    """
    order = tuple(range(matrix.ndim) if order is None else order)
    kind, blocks = form.partition(":")[0], block_sizes(form, matrix.shape, num_inputs)
    counts = [size // block for size, block in zip(matrix.shape, blocks, strict=True)]
    split = [size for pair in zip(counts, blocks, strict=True) for size in pair]
    inner = tuple(range(1, len(split), 2))
    outputs = matrix.ndim - num_inputs
    turned = [*range(outputs, matrix.ndim), *range(outputs)]
    wide = matrix.astype(FLOAT32).reshape(split)
    if kind == "int4":
        low = jnp.minimum(wide.min(axis=inner, keepdims=True), 0)
        high = jnp.maximum(wide.max(axis=inner, keepdims=True), 0)
        scale = ((high - low) / LARGEST[kind]).astype(SCALE)
        step = jnp.where(scale > 0, scale, 1).astype(FLOAT32)
        zero = jnp.clip(jnp.round(-low / step), 0, LARGEST[kind])
        values = jnp.clip(jnp.round(wide / step) + zero, 0, LARGEST[kind]).astype(jnp.uint8)
        first, second = jnp.split(values.reshape(*counts, -1), 2, axis=-1)
        values = (first | (second << jnp.uint8(4))).reshape(*matrix.shape[:-1], -1)
        scale, zero = (part.reshape(counts).transpose(turned) for part in (scale, zero))
        return Packed(values, scale, zero.astype(jnp.uint8), order, num_inputs)
    largest = jnp.abs(wide).max(axis=inner, keepdims=True)
    if kind == "int8" and axes:
        largest = jax.lax.pmax(largest, axes)
    scale = jnp.where(largest > 0, largest / LARGEST[kind], 1)
    values = wide / scale
    if kind == "int8":
        values = jnp.clip(jnp.round(values), -127, 127).astype(jnp.int8)
    else:
        values = jnp.clip(values, -LARGEST[kind], LARGEST[kind]).astype(FP8)
    scale = scale.reshape(counts).transpose(turned)
    return Packed(values.reshape(matrix.shape), scale, None, order, num_inputs)
