"""A product of few rows with a packed matrix, in the time of the matrix's bytes: Pallas-Triton.

What drawing tokens is made of. XLA on a GPU would first write the matrix down unpacked; here a
program takes a tile of outputs through its share of the inputs, unpacking in registers, and tensor
cores multiply. Values are multiplied as they are, and each block's sum by its scale: exact in
float32 where the other way rounds weights to the dtype of x. The matrix is read where it lies in
its stack, so no layer is copied out of it.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from dca_jax.attention.device import current_device
from dca_jax.packed_weights import Packed

INTERPRET = False  # tests set it: the kernel then runs on any device, in Pallas' interpreter
ROWS = 16  # of a product of tensor cores, at least; fewer are filled up
INPUTS, OUTPUTS = 128, 64  # of a tile, at most
PROGRAMS = 264  # that a device should have to run, two for each of an H200's processors


class Tile(NamedTuple):
    """What a program takes at a time: inputs and outputs; and how it runs."""

    inputs: int
    outputs: int
    splits: int
    num_warps: int
    num_stages: int
    vector: bool = False  # one row, without tensor cores


def are_few(rows: int, dtype: Any) -> bool:
    """Whether `multiply` is the way to take: of up to 16 rows, on NVIDIA's GPUs from Ampere on."""
    if rows > ROWS or INTERPRET:
        return rows <= ROWS
    capability = current_device().capability
    return capability is not None and capability >= (8, 0) and dtype == jnp.bfloat16


def multiply(
    x: Float[Array, "rows inputs"],
    matrices: Packed,
    layer: Int[Array, ""],
    tile: Tile | None = None,
    *,
    transposed: bool = False,
) -> Float[Array, "rows outputs"]:
    """x times matrix `layer` of a stack, in float32.

    Args:
        x: up to `ROWS` rows.
        matrices: [L, inputs, outputs], or [L, outputs, inputs] if `transposed`.
        tile: sizes that divide those of a matrix, and of its groups or blocks; None for
            `choose_tile`'s.
    """
    rows, inputs = x.shape
    ins, outs = (2, 1) if transposed else (1, 2)
    outputs = matrices.shape[outs]
    group = inputs // matrices.scale.shape[ins]
    tile = choose_tile(matrices, transposed) if tile is None else tile
    if tile is None:
        matrix = matrices.at(layer).unpack(x.dtype)
        matrix = matrix.T if transposed else matrix
        precision = "highest" if x.dtype == jnp.float32 else None
        return jnp.dot(x, matrix, precision=precision, preferred_element_type=jnp.float32)
    steps = inputs // tile.inputs // tile.splits
    nibbles = matrices.halved is not None
    wide = x if tile.vector else jnp.pad(x, ((0, ROWS - rows), (0, 0)))
    parts = (wide[:, 0::2], wide[:, 1::2]) if nibbles else (wide,)
    kernel = functools.partial(
        _kernel,
        tile=tile,
        steps=steps,
        group=group,
        group_outputs=outputs // matrices.scale.shape[outs],
        num_x=len(parts),
        transposed=transposed,
    )
    out = pl.pallas_call(
        kernel,
        grid=(outputs // tile.outputs, tile.splits),
        out_shape=jax.ShapeDtypeStruct(
            (tile.splits, 1 if tile.vector else ROWS, outputs), jnp.float32
        ),
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=INTERPRET,
        name="dca_few_rows",
    )(layer.astype(jnp.int32).reshape(1), *parts, *jax.tree.leaves(matrices))
    return out[:, :rows].sum(axis=0)


def choose_tile(matrices: Packed, transposed: bool) -> Tile | None:
    """Sizes for a stack of matrices; None if tensor cores cannot multiply by its groups.

    Groups and tiles are powers of two, and tensor cores add 16 products.
    """
    ins, outs = (2, 1) if transposed else (1, 2)
    inputs, outputs = matrices.shape[ins], matrices.shape[outs]
    group = inputs // matrices.scale.shape[ins]
    nibbles = matrices.halved is not None
    deep = group if group < inputs else math.gcd(inputs, INPUTS)
    wide = math.gcd(outputs, OUTPUTS)
    if deep & (deep - 1) or deep < (32 if nibbles else 16) or wide < 16:
        return None
    columns, steps, splits = outputs // wide, inputs // deep, 1
    while columns * splits < PROGRAMS and not steps % (2 * splits):
        splits *= 2
    return Tile(deep, wide, splits, num_warps=4, num_stages=4)


def _kernel(
    layer_ref: Any,  # [1]
    *refs: Any,  # x: [ROWS, inputs], or even and odd ones apart; values, scale, offset; out
    tile: Tile,
    steps: int,
    group: int,
    group_outputs: int,
    num_x: int,
    transposed: bool,
) -> None:
    x_refs, (values_ref, scale_ref, *offset_ref), out_ref = refs[:num_x], refs[num_x:-1], refs[-1]
    layer, split = layer_ref[0], pl.program_id(1)
    first = pl.program_id(0) * tile.outputs
    outputs = pl.ds(first, tile.outputs)
    dtype = x_refs[0].dtype
    width = tile.inputs // num_x

    def part(ref: Any, number: Array) -> Array:
        """Scales or offsets of a tile's outputs."""
        if group_outputs == 1:
            at = outputs
        elif group_outputs % tile.outputs == 0:
            at = lax.div(first, jnp.int32(group_outputs))
        else:
            every = first + jnp.arange(tile.outputs, dtype=jnp.int32)
            at = lax.div(every, jnp.int32(group_outputs))
        found = plgpu.load(ref.at[layer, at, number] if transposed else ref.at[layer, number, at])
        found = found.astype(jnp.float32)
        return found[None, :] if found.ndim else found

    def step(n: Array, total: Array) -> Array:
        number = split * steps + n
        inputs = pl.ds(number * width, width)
        at = (jnp.int32(0),) if tile.vector else (slice(None),)
        xs = [plgpu.load(ref.at[*at, inputs]) for ref in x_refs]
        if transposed:
            values = plgpu.load(values_ref.at[layer, outputs, inputs])
        else:
            values = plgpu.load(values_ref.at[layer, inputs, outputs])
        if num_x == 2:
            kernels = [_halves(values, shift, dtype) for shift in (0, 4)]
        else:
            kernels = [values.astype(dtype)]
        if group != tile.inputs:
            for x, kernel in zip(xs, kernels, strict=True):
                total += product(x, kernel)
            return total
        found = sum(product(x, kernel) for x, kernel in zip(xs, kernels, strict=True))
        found = reduced(found) * part(scale_ref, number)
        for ref in offset_ref:
            sums = sum(x.astype(jnp.float32).sum(axis=-1) for x in xs)
            found += (sums if tile.vector else sums[:, None]) * part(ref, number)
        return total + found

    def product(x: Array, kernel: Array) -> Array:
        if not tile.vector:
            return _dot(x, kernel, transposed)
        x = x.astype(jnp.float32)
        return (x[None, :] if transposed else x[:, None]) * kernel.astype(jnp.float32)

    def reduced(x: Array) -> Array:
        return x.sum(axis=1 if transposed else 0)[None] if tile.vector else x

    grouped = group == tile.inputs
    shape: tuple[int, ...] = (1 if tile.vector else ROWS, tile.outputs)
    if tile.vector and not grouped:
        shape = (tile.outputs, width) if transposed else (width, tile.outputs)
    total = lax.fori_loop(0, steps, step, jnp.zeros(shape, jnp.float32))
    if not grouped:
        total = reduced(total) * part(scale_ref, jnp.int32(0))
    if tile.vector:
        plgpu.store(out_ref.at[split, jnp.int32(0), outputs], total[0])
    else:
        plgpu.store(out_ref.at[split, :, outputs], total)


def _dot(x: Array, kernel: Array, transposed: bool) -> Array:
    precision = "highest" if x.dtype == jnp.float32 else None
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(
        x, kernel, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


# Four bytes in a register, shifted so that the halves wanted are the lower ones, become four
# numbers in bfloat16: 0x4300 + q is 128 + q, from which 128 is taken.
_HALVES = """
{{
.reg .b32 halves, one, bias;
mov.b32 one, 0x3f803f80;
mov.b32 bias, 0xc300c300;
shr.b32 halves, $2, {shift};
and.b32 halves, halves, 0x0f0f0f0f;
prmt.b32 $0, halves, 0x43434343, 0x4140;
prmt.b32 $1, halves, 0x43434343, 0x4342;
fma.rn.bf16x2 $0, $0, one, bias;
fma.rn.bf16x2 $1, $1, one, bias;
}}
"""


def _halves(values: Array, shift: int, dtype: Any) -> Array:
    """The lower (`shift` 0) or the upper (4) halves of bytes, 0 to 15."""
    if INTERPRET or dtype != jnp.bfloat16:
        return ((values >> jnp.uint8(shift)) & jnp.uint8(15)).astype(dtype)
    (found,) = plgpu.elementwise_inline_asm(
        _HALVES.format(shift=shift),
        args=[values],
        constraints="=r,=r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(values.shape, dtype)],
    )
    return found
