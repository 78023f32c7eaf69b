"""A Pallas-Triton kernel for products of few rows with a packed matrix, as in decoding.

XLA on a GPU would first write out the unpacked matrix. Here a program processes a tile of outputs
over its share of the inputs, unpacks in registers, and multiplies on tensor cores. Values minus
their zero are multiplied exactly, and the sums of a block are multiplied by its scale. The matrix
is read in place in its stack, without copying a layer.

On Hopper there is another kernel for one row and large matrices (`dca_jax.products.packed_row`).

The inputs of an output are contiguous, as needed by tensor cores: each thread has four bytes in a
register and unpacks them there. With contiguous outputs it would have to fetch single bytes.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt8

from dca_jax.device import current_device
from dca_jax.products import cpu_rows
from dca_jax.products.packed import Packed

INTERPRET = False  # tests set it: the kernel then runs on any device, in Pallas' interpreter
ROWS = 16  # minimum rows of a tensor-core product, to which fewer are padded; maximum here
INPUTS, OUTPUTS = 128, 128  # maximum size of a tile
STEPS = 4  # minimum tiles per program, if there are enough: the first ones are not prefetched
PROGRAMS = 256  # target number of programs: about two per multiprocessor of an H200


class Tile(NamedTuple):
    """Inputs and outputs that a program processes at a time, and its schedule."""

    inputs: int
    outputs: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3  # faster than 4 for the tiles in use, on an H200


def are_few(rows: int, dtype: Any) -> bool:
    """Whether to use `multiply`: for up to 16 rows, on a CPU or with the kernel."""
    on_cpu = current_device().platform == "cpu" and jnp.dtype(dtype).itemsize <= 4
    return rows <= ROWS and (on_cpu or has_kernel(dtype))


def has_kernel(dtype: Any) -> bool:
    """Whether the kernel runs here: on NVIDIA GPUs from Ampere on."""
    capability = current_device().capability or (0, 0)
    return INTERPRET or (capability >= (8, 0) and dtype == jnp.bfloat16)


def multiply(
    x: Float[Array, "rows inputs"],
    stacks: Sequence[Packed],
    layer: Int[Array, ""],
    tile: Tile | None = None,
) -> tuple[Float[Array, "rows _"], ...]:
    """x times matrix `layer` of each stack, in float32; in one launch if a tile fits all.

    On a CPU there is no kernel, and `dca_jax.products.cpu_rows` multiplies.

    Args:
        x: up to `ROWS` rows.
        stacks: stacks in the same form with the same number of inputs; each matrix has one axis of
            outputs and one of inputs.
        tile: sizes that divide those of a matrix and its groups or blocks (default: those of
            `choose_tile`).
    """
    if current_device().platform == "cpu" and not INTERPRET:
        return tuple(cpu_rows.multiply(x, stack, layer) for stack in stacks)
    # Mosaic GPU's compiler takes half a second to import, which only GPUs need to spend.
    from dca_jax.products.packed_row import choose_plan, multiply_row

    plan = None if tile or INTERPRET else choose_plan(x, stacks)
    if plan is not None:
        return multiply_row(x, stacks, layer, plan)
    tile = choose_tile(stacks) if tile is None else tile
    if tile is None and len(stacks) > 1:
        return tuple(multiply(x, [matrices], layer)[0] for matrices in stacks)
    if tile is None:
        precision = "highest" if x.dtype == jnp.float32 else None
        matrix = stacks[0].at(layer).unpack_inner(x.dtype)
        return (
            jnp.einsum(
                "rD,VD->rV", x, matrix, precision=precision, preferred_element_type=jnp.float32
            ),
        )
    return tuple(y[0] for y in _launch(x[None], stacks, layer[None], tile))


def multiply_chosen(
    x: Float[Array, "rows inputs"],
    stacks: Sequence[Packed],
    numbers: Int[Array, " rows"],
    tile: Tile,
) -> tuple[Float[Array, "rows _"], ...]:
    """Each row times matrix `numbers[row]` of each of the stacks, in float32, in one launch.

    Args:
        x, stacks, tile: as in `multiply`, but for any number of rows; `choose_tile(stacks, rows)`
            gives a tile.
    """
    return tuple(y[:, 0] for y in _launch(x[:, None], stacks, numbers, tile))


def _launch(
    x: Float[Array, "sets rows inputs"],
    stacks: Sequence[Packed],
    numbers: Int[Array, " sets"],
    tile: Tile,
) -> list[Float[Array, "sets rows _"]]:
    """Each set of rows times matrix `numbers[set]` of each of the stacks, in float32."""
    sets, rows, inputs = x.shape
    widths = [matrices.inner_shape[1] for matrices in stacks]
    leaves, tree = jax.tree.flatten(list(stacks))
    kernel = functools.partial(
        _kernel,
        tile=tile,
        steps=inputs // tile.inputs // tile.splits,
        group=inputs // stacks[0].scale.shape[1],
        widths=widths,
        tree=tree,
    )
    out = pl.pallas_call(
        kernel,
        grid=(sum(widths) // tile.outputs, tile.splits, sets),
        out_shape=jax.ShapeDtypeStruct((tile.splits, sets, rows, sum(widths)), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=INTERPRET,
        name="dca_few_rows",
    )(numbers.astype(jnp.int32), _filled_up(x), *leaves)
    ends = list(itertools.accumulate(widths))
    return jnp.split(out.sum(axis=0), ends[:-1], axis=2)


def alike(stacks: Sequence[Packed]) -> bool:
    """Whether stacks have the same form, so that one launch can multiply by all of them."""
    kinds = {(jax.tree.structure(s), *(part.dtype for part in jax.tree.leaves(s))) for s in stacks}
    return len(kinds) == 1


def choose_tile(stacks: Sequence[Packed], sets: int = 1) -> Tile | None:
    """Tile sizes for stacks of matrices; None if their groups do not suit tensor cores.

    Groups and tiles are powers of two, and tensor cores add 16 products.

    Args:
        sets: number of matrices of each stack that are multiplied.
    """
    inputs, widths = stacks[0].inner_shape[2], [matrices.inner_shape[1] for matrices in stacks]
    groups = {matrices.scale.shape[1] for matrices in stacks}
    group = inputs // stacks[0].scale.shape[1]
    deep = group if group < inputs else math.gcd(inputs, INPUTS)
    least = 32 if stacks[0].form == "int4" else 16
    if len(groups) > 1 or deep & (deep - 1) or deep < least or math.gcd(OUTPUTS, *widths) < 16:
        return None
    outputs = sets * sum(widths)
    tile = _split(inputs, outputs, deep, math.gcd(OUTPUTS, *widths))
    if (
        inputs // deep // tile.splits < STEPS
    ):  # a narrower tile, so that fewer programs share the inputs
        tile = _split(inputs, outputs, deep, math.gcd(OUTPUTS // 2, *widths))
    return tile


def _split(inputs: int, outputs: int, deep: int, wide: int) -> Tile:
    """A tile of this size, with enough splits of the inputs to keep a device busy."""
    columns, steps, splits = outputs // wide, inputs // deep, 1
    while columns * splits < PROGRAMS and not steps % (2 * splits):
        splits *= 2
    return Tile(deep, wide, splits)


def _filled_up(x: Array) -> Array:
    """Padded with arbitrary rows, for the interpreter, which reads no row twice."""
    return jnp.pad(x, ((0, 0), (0, ROWS - x.shape[1]), (0, 0))) if INTERPRET else x


def _kernel(
    number_ref: Any,  # [sets]
    x_ref: Any,  # [sets, rows, inputs]
    *refs: Any,  # the parts of each stack; out: [splits, sets, rows, outputs]
    tile: Tile,
    steps: int,
    group: int,
    widths: list[int],
    tree: Any,
) -> None:
    """Grid: (tiles of the outputs of all stacks, splits of the inputs, sets)."""
    *parts, out_ref = refs
    stacks = jax.tree.unflatten(tree, parts)
    # At the top, for the interpreter.
    column, split, place = (pl.program_id(axis) for axis in range(3))
    number = number_ref[place]
    start = 0
    for stack, width in zip(stacks, widths, strict=True):
        stop = start + width // tile.outputs

        def multiply(stack: Any = stack, first: Any = (column - start) * tile.outputs) -> None:
            where = number, place, split * steps, first
            total = _tiles(where, x_ref, stack, out_ref.shape[2], tile, steps, group)
            _store(out_ref, total, split, place, column * tile.outputs)

        pl.when((column >= start) & (column < stop))(multiply)
        start = stop


def _tiles(
    where: tuple[Array, Array, Array, Array],
    x_ref: Any,  # [sets, rows, inputs]
    stack: Packed,
    num_rows: int,
    tile: Tile,
    steps: int,
    group: int,
) -> Float[Array, "ROWS outputs"]:
    """The sums over a program's tiles of a matrix.

    Args:
        where: the numbers of the matrix and of the set of rows, the program's first tile and first
            output.
        stack: references to values [L, outputs, inputs], or half the inputs if two share a byte; to
            scales [L, groups, blocks of outputs]; and to zeros and offsets, if there are any.
    """
    values_ref, scale_ref = stack.values, stack.scale
    matrix, place, begin, first = where
    outputs = pl.ds(first, tile.outputs)
    block_outputs = values_ref.shape[1] // scale_ref.shape[2]
    row = jnp.arange(ROWS, dtype=jnp.int32)
    # Padding rows are neither read nor stored.
    rows = slice(None) if INTERPRET else jnp.minimum(row, num_rows - 1)
    halves = 2 if stack.form == "int4" else 1
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
        return plgpu.load(ref.at[matrix, number, at])

    def load_x(inputs: Any) -> Array:
        if INTERPRET:
            return x_ref[place, :, inputs]
        mask = jnp.broadcast_to((row < num_rows)[:, None], (ROWS, width))
        return plgpu.load(x_ref.at[place, rows, inputs], mask=mask, other=0.0)

    def scaled(x: Array, scale: Array) -> Array:
        scale = scale.astype(jnp.float32)
        return x * (scale[None, :] if scale.ndim else scale)

    def parts(number: Array) -> Packed:
        """Scales, zeros and offsets of a tile."""
        of_groups = replace(stack, values=None)
        return jax.tree.map(lambda ref: part(ref, number) if grouped else None, of_groups)

    def step(n: Array, carry: tuple[Array, Packed]) -> tuple[Array, Packed]:
        number = begin + n
        total, own = carry
        # Those of the next step are loaded while this one computes.
        following = parts(begin + jnp.minimum(n + 1, steps - 1))
        values = plgpu.load(values_ref.at[matrix, outputs, pl.ds(number * width, width)])
        found = jnp.zeros_like(total) if grouped else total
        sums = jnp.zeros(ROWS, jnp.float32)
        for half in range(halves):
            x = load_x(pl.ds(number * tile.inputs + half * width, width))
            if halves == 2:
                kernel = _half(values, own.zero, 4 * half, x.dtype)
            elif values.dtype == jnp.int8:
                kernel = _bytes(values, x.dtype)
            else:
                kernel = values.astype(x.dtype)
            found += _dot(x, kernel)
            if own.offset is not None:
                sums += x.astype(jnp.float32).sum(axis=1)
        if own.offset is not None:
            total += scaled(sums[:, None], own.offset)
        return (total + scaled(found, own.scale) if grouped else found), following

    total = jnp.zeros((ROWS, tile.outputs), jnp.float32)
    total, _ = lax.fori_loop(0, steps, step, (total, parts(begin)))
    return total if grouped else scaled(total, part(scale_ref, jnp.int32(0)))


def _store(
    out_ref: Any, total: Float[Array, "ROWS outputs"], split: Array, place: Array, first: Array
) -> None:
    """Stores the sums of a set from output `first` on, without padding rows."""
    num_rows, outputs = out_ref.shape[2], pl.ds(first, total.shape[1])
    if INTERPRET:
        out_ref[split, place, :, outputs] = total[:num_rows]
        return
    row = jnp.arange(ROWS, dtype=jnp.int32)
    mask = jnp.broadcast_to((row < num_rows)[:, None], total.shape)
    rows = jnp.minimum(row, num_rows - 1)
    plgpu.store(out_ref.at[split, place, rows, outputs], total, mask=mask)


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
    values: UInt8[Array, "outputs inputs"],
    zero: UInt8[Array, " outputs"] | None,
    shift: int,
    dtype: Any,
) -> Array:
    """The lower (`shift` 0) or upper (4) halves of bytes, minus their zeros."""
    zero = jnp.zeros(len(values), jnp.uint8) if zero is None else zero
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


# Four bytes become four numbers in bfloat16: 0x4300 and the lower seven bits are 128 + q, from
# which 0x4300 and the sign bit (128 or 256) are subtracted, exactly and without a conversion.
_BYTES = """
{
.reg .b32 one, wide, offset;
mov.b32 one, 0x3f803f80;
prmt.b32 wide, $2, 0x43434343, 0x4140;
and.b32 offset, wide, 0xff80ff80;
xor.b32 offset, offset, 0x80008000;
and.b32 wide, wide, 0xff7fff7f;
fma.rn.bf16x2 $0, wide, one, offset;
prmt.b32 wide, $2, 0x43434343, 0x4342;
and.b32 offset, wide, 0xff80ff80;
xor.b32 offset, offset, 0x80008000;
and.b32 wide, wide, 0xff7fff7f;
fma.rn.bf16x2 $1, wide, one, offset;
}
"""


def _bytes(values: Int[Array, "outputs inputs"], dtype: Any) -> Array:
    """int8 values in a floating-point dtype."""
    if INTERPRET or dtype != jnp.bfloat16:
        return values.astype(dtype)
    (found,) = plgpu.elementwise_inline_asm(
        _BYTES,
        args=[values],
        constraints="=&r,=&r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(values.shape, dtype)],
    )
    return found
