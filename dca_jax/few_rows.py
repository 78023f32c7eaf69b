"""A product of few rows with a packed matrix, which is read packed: a kernel of Pallas-Triton.

What drawing tokens is made of. XLA on a GPU would first write the matrix down unpacked; here a
program takes a tile of outputs through its share of the inputs, unpacking in registers, and tensor
cores multiply. Values less their zero are multiplied, exactly, and sums of a block by its scale.
The matrix is read where it lies in its stack, so no layer is copied out of it.

The inputs of an output lie side by side, as tensor cores take them: each thread has four bytes in a
register, and unpacks them there. Outputs side by side it would have to fetch a byte at a time.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt8

from dca_jax.device import current_device
from dca_jax.packed_weights import Packed

INTERPRET = False  # tests set it: the kernel then runs on any device, in Pallas' interpreter
ROWS = 16  # of a product of tensor cores, at least; fewer are filled up
INPUTS, OUTPUTS = 128, 128  # of a tile, at most
STEPS = 4  # tiles that a program takes, at least, if there are as many: the first are waited for
PROGRAMS = 256  # that a device should have to run: two for each processor of an H200, about


class Tile(NamedTuple):
    """What a program takes at a time: inputs and outputs; and how it runs."""

    inputs: int
    outputs: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3  # of 3 and 4 the faster of the tiles taken, on an H200


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
) -> Float[Array, "rows outputs"]:
    """x times matrix `layer` of a stack, in float32.

    Args:
        x: up to `ROWS` rows.
        matrices: of one axis of outputs and one of inputs, stacked.
        tile: sizes that divide those of a matrix, and groups or blocks; default: `choose_tile`'s.
    """
    rows, inputs = x.shape
    outputs = matrices.inner_shape[1]
    tile = choose_tile(matrices) if tile is None else tile
    if tile is None:
        precision = "highest" if x.dtype == jnp.float32 else None
        matrix = matrices.at(layer).unpack_inner(x.dtype)
        return jnp.einsum(
            "rD,VD->rV", x, matrix, precision=precision, preferred_element_type=jnp.float32
        )
    kernel = functools.partial(
        _kernel,
        tile=tile,
        steps=inputs // tile.inputs // tile.splits,
        group=inputs // matrices.scale.shape[2],
        block_outputs=outputs // matrices.scale.shape[1],
    )
    out = pl.pallas_call(
        kernel,
        grid=(outputs // tile.outputs, tile.splits),
        out_shape=jax.ShapeDtypeStruct((tile.splits, rows, outputs), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=INTERPRET,
        name="dca_few_rows",
    )(layer.astype(jnp.int32).reshape(1), _filled_up(x), *jax.tree.leaves(matrices))
    return out.sum(axis=0)


def choose_tile(matrices: Packed) -> Tile | None:
    """Sizes for a stack of matrices; None if tensor cores cannot multiply by its groups.

    Groups and tiles are powers of two, and tensor cores add 16 products.
    """
    _, outputs, inputs = matrices.inner_shape
    group = inputs // matrices.scale.shape[2]
    deep = group if group < inputs else math.gcd(inputs, INPUTS)
    least = 32 if matrices.form == "int4" else 16
    if deep & (deep - 1) or deep < least or math.gcd(outputs, OUTPUTS) < 16:
        return None
    tile = _split(inputs, outputs, deep, math.gcd(outputs, OUTPUTS))
    if inputs // deep // tile.splits < STEPS:  # narrower, so that fewer programs share the inputs
        tile = _split(inputs, outputs, deep, math.gcd(outputs, OUTPUTS // 2))
    return tile


def _split(inputs: int, outputs: int, deep: int, wide: int) -> Tile:
    """A tile of this size, with as many splits of the inputs as give a device enough to do."""
    columns, steps, splits = outputs // wide, inputs // deep, 1
    while columns * splits < PROGRAMS and not steps % (2 * splits):
        splits *= 2
    return Tile(deep, wide, splits)


def _filled_up(x: Array) -> Array:
    """With rows of anything behind, for the interpreter, which reads no row twice."""
    return jnp.pad(x, ((0, ROWS - len(x)), (0, 0))) if INTERPRET else x


def _kernel(
    layer_ref: Any,  # [1]
    x_ref: Any,  # [rows, inputs]
    values_ref: Any,  # [L, outputs, inputs], or half the inputs where two share a byte
    scale_ref: Any,  # [L, blocks of outputs, groups]
    *refs: Any,  # the zeros, if there are any; out: [splits, rows, outputs]
    tile: Tile,
    steps: int,
    group: int,
    block_outputs: int,
) -> None:
    *zero_ref, out_ref = refs
    layer, split = layer_ref[0], pl.program_id(1)
    first = pl.program_id(0) * tile.outputs
    outputs = pl.ds(first, tile.outputs)
    num_rows = out_ref.shape[1]
    row = jnp.arange(ROWS, dtype=jnp.int32)
    # Rows that fill up are neither read nor stored.
    rows = slice(None) if INTERPRET else jnp.minimum(row, num_rows - 1)
    halves = 2 if zero_ref else 1
    width = tile.inputs // halves
    grouped = group == tile.inputs

    def part(ref: Any, number: Array) -> Array:
        """Scales or zeros of a tile's outputs."""
        if block_outputs == 1:
            at: Any = outputs
        elif block_outputs % tile.outputs == 0:
            at = lax.div(first, jnp.int32(block_outputs))
        else:
            every = first + jnp.arange(tile.outputs, dtype=jnp.int32)
            at = lax.div(every, jnp.int32(block_outputs))
        return plgpu.load(ref.at[layer, at, number])

    def load_x(inputs: Any) -> Array:
        if INTERPRET:
            return x_ref[:, inputs]
        mask = jnp.broadcast_to((row < num_rows)[:, None], (ROWS, width))
        return plgpu.load(x_ref.at[rows, inputs], mask=mask, other=0.0)

    def scaled(x: Array, scale: Array) -> Array:
        scale = scale.astype(jnp.float32)
        return x * (scale[None, :] if scale.ndim else scale)

    def parts(number: Array) -> list[Array]:
        return [part(ref, number) for ref in (scale_ref, *zero_ref)] if grouped else []

    def step(n: Array, carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
        number = split * steps + n
        total, (*scale, zero) = carry if zero_ref else (carry[0], [*carry[1], None])
        # Those of the next step are on their way while this one computes.
        following = parts(split * steps + jnp.minimum(n + 1, steps - 1))
        values = plgpu.load(values_ref.at[layer, outputs, pl.ds(number * width, width)])
        found = jnp.zeros_like(total) if grouped else total
        for half in range(halves):
            x = load_x(pl.ds(number * tile.inputs + half * width, width))
            if halves == 1:
                kernel = values.astype(x.dtype)
            else:
                kernel = _half(values, zero, 4 * half, x.dtype)
            found += _dot(x, kernel)
        return (total + scaled(found, scale[0]) if grouped else found), following

    total = jnp.zeros((ROWS, tile.outputs), jnp.float32)
    total, _ = lax.fori_loop(0, steps, step, (total, parts(split * steps)))
    total = total if grouped else scaled(total, part(scale_ref, jnp.int32(0)))
    if INTERPRET:
        out_ref[split, :, outputs] = total[:num_rows]
    else:
        mask = jnp.broadcast_to((row < num_rows)[:, None], total.shape)
        plgpu.store(out_ref.at[split, rows, outputs], total, mask=mask)


def _dot(x: Array, kernel: Array) -> Array:
    precision = "highest" if x.dtype == jnp.float32 else None
    dimensions = (((1,), (1,)), ((), ()))
    return lax.dot_general(
        x, kernel, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


# Four bytes in a register, shifted so that the halves wanted are the lower ones, become four
# numbers in bfloat16: 0x4300 + q is 128 + q, to which -(128 + zero) is added, exactly.
_HALVES = """
{{
.reg .b32 halves, one;
mov.b32 one, 0x3f803f80;
shr.b32 halves, $2, {shift};
and.b32 halves, halves, 0x0f0f0f0f;
prmt.b32 $0, halves, 0x43434343, 0x4140;
prmt.b32 $1, halves, 0x43434343, 0x4342;
fma.rn.bf16x2 $0, $0, one, $3;
fma.rn.bf16x2 $1, $1, one, $4;
}}
"""


def _half(
    values: UInt8[Array, "outputs inputs"], zero: UInt8[Array, " outputs"], shift: int, dtype: Any
) -> Array:
    """The lower (`shift` 0) or the upper (4) halves of bytes, less their zeros."""
    if INTERPRET or dtype != jnp.bfloat16:
        found = (values >> jnp.uint8(shift)) & jnp.uint8(15)
        return found.astype(dtype) - zero.astype(dtype)[:, None]
    zero = -128 - zero.astype(jnp.float32)
    (found,) = plgpu.elementwise_inline_asm(
        _HALVES.format(shift=shift),
        args=[values, jnp.broadcast_to(zero.astype(dtype)[:, None], values.shape)],
        constraints="=&r,=&r,r,r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(values.shape, dtype)],
    )
    return found
