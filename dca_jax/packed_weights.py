"""Packed matrices: int8 by output, int4 in groups of inputs, float8 in blocks.

A packed matrix stands where an array of its shape would: w = values * scale + offset, where a scale
is for a block of the matrix, and so is an offset, which only int4 has. Three forms:

    int8   a scale for each output: its column of inputs has one; values -127 to 127
    int4   a scale and an offset for each group of inputs of one output; values 0 to 15, two in a
           byte, that of the even input in the lower half
    fp8    a scale for each block of inputs and outputs; float8 (e4m3)

Matrices of layers, and of experts, are stacked on leading axes, and those of attention have more
than one axis of inputs or outputs: groups and blocks lie along the last one. What each scale is for
follows from the shapes: `values` and `scale` have the same axes, and the sizes of scale's divide
those of values. So a packed matrix is cut on a mesh as an array is, scales with their weights.

int4 holds integer zero points too, as an offset of -zero * scale (AWQ, GPTQ); it is the form of
GGUF's Q4_0 and Q4_1. Activations are never packed, and no gradient reaches a packed matrix.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dca_jax.errors import InputError

# How many inputs (and, of fp8, outputs) a scale is for at most; an axis that this does not divide
# has the largest common divisor.
FORMS = {"int8": 1, "int4": 64, "int4:32": 32, "int4:128": 128, "fp8": 128}
FP8 = jnp.float8_e4m3fn
DTYPES = {"int8": jnp.dtype(jnp.int8), "int4": jnp.dtype(jnp.uint8), "fp8": jnp.dtype(FP8)}
LARGEST = {"int8": 127.5, "int4": 15.0, "fp8": 448.0}
SMALLEST_GROUP = 4  # of int4: fewer would not tell the axis of the groups from the others
FLOAT32 = jnp.float32
SCALE = jnp.dtype(jnp.bfloat16)  # of int4's scales and offsets; others' are float32


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale", "offset"),
    meta_fields=(),
)
@dataclass(frozen=True)
class Packed:
    """A packed matrix, or a stack of them.

    Attributes:
        values: int8, float8_e4m3fn, or uint8 with two of int4 in a byte.
        scale: of a floating dtype; each axis is that of `values`, or a divisor of it.
        offset: like `scale`, of int4 alone.
    """

    values: Array
    scale: Array
    offset: Array | None = None

    @property
    def form(self) -> str:
        """int8, int4 or fp8."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.values.dtype)

    @property
    def name(self) -> str:
        """The form as in `FORMS`, with the size of groups that it really has: "int4:64"."""
        if self.halved is None:
            return self.form
        return f"int4:{self.shape[self.halved] // self.scale.shape[self.halved]}"

    @property
    def halved(self) -> int | None:
        """The axis, counted from the end, along which two values share a byte; None if none do."""
        if self.form != "int4":
            return None
        sizes = zip(self.values.shape, self.scale.shape, strict=True)
        return next(n for n, (own, scales) in enumerate(sizes) if own != scales) - self.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        sizes = list(self.values.shape)
        if self.halved is not None:
            sizes[self.halved] *= 2
        return tuple(sizes)

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return self.values.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in jax.tree.leaves(self))

    def __getitem__(self, index: Any) -> "Packed":
        """The same index, of leading axes, in every part."""
        return jax.tree.map(lambda part: part[index], self)

    def __len__(self) -> int:
        return len(self.values)

    def at(self, layer: Int[Array, ""]) -> "Packed":
        """One of a stack, whose number may be traced."""
        return jax.tree.map(
            lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False), self
        )

    def rows(self, numbers: Int[Array, "*n"], dtype: DTypeLike) -> Float[Array, "*n inputs"]:
        """Rows of a table [outputs, inputs], unpacked; no other is read."""

        def taken(part: Array) -> Array:
            each = len(self) // len(part)  # rows that share a scale
            return part[numbers if each == 1 else numbers // each]

        return jax.tree.map(taken, self).unpack(dtype)

    def unpack(self, dtype: DTypeLike) -> Array:
        """The matrix: computed in float32, in `dtype`. Without the gradient of scales."""
        self = jax.lax.stop_gradient(self)
        values, scale, offset = self.values, self.scale, self.offset
        if self.halved is not None:
            axis = self.ndim + self.halved + 1
            shifts = jnp.expand_dims(
                jnp.array([0, 4], jnp.uint8), [n for n in range(self.ndim + 1) if n != axis]
            )
            values = (jnp.expand_dims(values, axis) >> shifts) & jnp.uint8(15)
        shape, blocked, spread = self.shape, [], []
        for size, count in zip(shape, scale.shape, strict=True):
            # An axis with one scale, or one each, needs no splitting (nor that a mesh allows it).
            whole = count in (1, size)
            blocked += [size] if whole else [count, size // count]
            spread += [count] if whole else [count, 1]
        wide = values.reshape(blocked).astype(FLOAT32) * scale.reshape(spread).astype(FLOAT32)
        if offset is not None:
            wide += offset.reshape(spread).astype(FLOAT32)
        return wide.reshape(shape).astype(dtype)


def is_packed(value: Any) -> bool:
    """Whether it is a packed matrix: what `jax.tree` takes as `is_leaf` to stop at."""
    return isinstance(value, Packed)


def packed_forms(tree: Any) -> str:
    """The names of all forms in a tree, such as a model: "int4:64, int8"; empty if none."""
    leaves = jax.tree.leaves(tree, is_leaf=is_packed)
    return ", ".join(sorted({leaf.name for leaf in leaves if is_packed(leaf)}))


def check_form(name: str | None) -> None:
    """Raises InputError for a name that is not one of `FORMS`, and not None."""
    if name is not None and name not in FORMS:
        raise InputError(f"weights must be one of {', '.join(FORMS)}, or not given, got {name!r}")


def block_sizes(form: str, shape: Sequence[int], inputs: Sequence[int]) -> tuple[int, ...]:
    """How many elements along each axis of a matrix a scale is for.

    Args:
        form: a name in `FORMS`.
        shape: of the matrix, or of one device's part of it: no block is divided between devices.
        inputs: its axes that are summed over.

    Raises:
        InputError: int4, of an axis whose size leaves no groups.
    """
    kind, most = form.partition(":")[0], FORMS[form]
    if kind == "int8":
        return tuple(size if axis in inputs else 1 for axis, size in enumerate(shape))
    grouped = [inputs[-1]]
    if kind == "fp8":
        grouped += [axis for axis in range(len(shape)) if axis not in inputs][-1:]
    sizes = [1] * len(shape)
    for axis in grouped:
        sizes[axis] = math.gcd(most, shape[axis])
    if kind == "int4" and sizes[inputs[-1]] < SMALLEST_GROUP:
        raise InputError(
            f"int4 weights stand in groups of {SMALLEST_GROUP} to {most} inputs, which do not "
            f"divide the {shape[inputs[-1]]} that a device has; choose int8"
        )
    return tuple(sizes)


def packed_bytes(form: str, shape: Sequence[int], inputs: Sequence[int]) -> int:
    """What a packed matrix takes, or one device's part of it; arguments as of `block_sizes`."""
    blocks = block_sizes(form, shape, inputs)
    scales = math.prod(size // block for size, block in zip(shape, blocks, strict=True))
    if form.startswith("int4"):
        return math.prod(shape) // 2 + scales * 2 * SCALE.itemsize
    return math.prod(shape) + scales * FLOAT32.dtype.itemsize


def pack(matrix: Array, form: str, blocks: Sequence[int], axes: Sequence[Any] = ()) -> Packed:
    """A matrix, packed.

    No weight is off by more than half its scale (int8, int4, where the scale's own rounding to
    bfloat16 adds 1/16) or 1/16 of itself (fp8, of weights above 1/28,672 of the block's largest).

    Args:
        matrix: of any floating dtype; one, not a stack.
        form: a name in `FORMS`. blocks: what `block_sizes` gives.
        axes: of a mesh, if this is one device's part of a matrix: those that cut its inputs.
    """
    kind = form.partition(":")[0]
    counts = [size // block for size, block in zip(matrix.shape, blocks, strict=True)]
    split = [size for pair in zip(counts, blocks, strict=True) for size in pair]
    inner = tuple(range(1, len(split), 2))
    wide = matrix.astype(FLOAT32).reshape(split)
    if kind == "int4":
        low = wide.min(axis=inner, keepdims=True).astype(SCALE)
        high = wide.max(axis=inner, keepdims=True)
        scale = ((high - low.astype(FLOAT32)) / LARGEST[kind]).astype(SCALE)
        step = jnp.where(scale > 0, scale, 1).astype(FLOAT32)
        values = jnp.clip(jnp.round((wide - low.astype(FLOAT32)) / step), 0, LARGEST[kind])
        values = values.astype(jnp.uint8).reshape(matrix.shape)
        axis = next(n for n, block in enumerate(blocks) if block > 1)
        even, odd = (
            jax.lax.slice_in_dim(values, start, None, stride=2, axis=axis) for start in (0, 1)
        )
        return Packed(even | (odd << jnp.uint8(4)), scale.reshape(counts), low.reshape(counts))
    largest = jnp.abs(wide).max(axis=inner, keepdims=True)
    if axes:
        largest = jax.lax.pmax(largest, axes)
    scale = jnp.where(largest > 0, largest / LARGEST[kind], 1)
    values = wide / scale
    if kind == "int8":
        values = jnp.clip(jnp.round(values), -127, 127).astype(jnp.int8)
    else:
        values = jnp.clip(values, -LARGEST[kind], LARGEST[kind]).astype(FP8)
    return Packed(values.reshape(matrix.shape), scale.reshape(counts))
