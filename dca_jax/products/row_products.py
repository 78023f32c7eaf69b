"""Products of rows with chosen matrices, reading only those; most of the time of decoding.

The time is that of reading the matrices, in place in their stacks. A Pallas-Triton kernel reads
them with enough programs to keep a GPU's memory busy, and multiplies a row by several matrices in
one launch. For small matrices XLA's product of one row is dominated by launch overhead, and XLA
would write out a gather of chosen matrices.

Each thread multiplies and adds on its own, and sums are combined at a program's end, because one
row does not fill tensor cores. Packed matrices have another kernel (`dca_jax.products.few_rows`).

On a CPU a row is multiplied by blocks of a matrix (`dca_jax.products.cpu_rows`).
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from dca_jax.device import current_device
from dca_jax.products import cpu_rows

INTERPRET = False  # tests set it: the kernel then runs on any device, in Pallas' interpreter
INPUTS, OUTPUTS = 32, 128  # of a tile, at most
PROGRAMS = 512  # enough to keep a GPU's memory busy: about four per multiprocessor of an H200
FEWEST_STEPS, STEPS = 4, 16  # tiles per program, if they divide the inputs


class Tile(NamedTuple):
    """The tile that a program reads at a time, and its schedule.

    Attributes:
        inputs, outputs: size of a tile.
        steps: number of tiles per program, along the inputs.
        ahead: number of tiles that are prefetched.
    """

    inputs: int
    outputs: int
    steps: int
    ahead: int = 4
    num_warps: int = 4


def can_multiply(x: Any, stacks: Sequence[Any]) -> bool:
    """Whether the kernel runs here with these rows and matrices (their shapes and dtypes)."""
    if current_device().platform == "cpu" and not INTERPRET:
        return len(x) == 1 and x.dtype.itemsize <= 4
    if x.dtype.itemsize > 4 or choose_tile(stacks, len(x)) is None:
        return False
    return INTERPRET or (current_device().capability or (0, 0)) >= (8, 0)


def row_products(
    x: Float[Array, "rows inputs"],
    stacks: Sequence[Float[Array, "M inputs _"]],
    numbers: Int[Array, " rows"],
    tile: Tile | None = None,
) -> tuple[Float[Array, "rows _"], ...]:
    """Each row times matrix `numbers[row]` of each of the stacks, in float32.

    Args:
        x: rows with a dtype of up to 32 bits.
        stacks: stacks with the same number of inputs; outputs may differ.
        tile: tile sizes (default: those of `choose_tile`).
    """
    if current_device().platform == "cpu" and not INTERPRET:
        return tuple(cpu_rows.multiply(x, stack, numbers[0]) for stack in stacks)
    rows, inputs = x.shape
    tile = choose_tile(stacks, rows) if tile is None else tile
    assert tile is not None, "as `can_multiply` says"
    widths = [stack.shape[2] for stack in stacks]
    splits = inputs // (tile.inputs * tile.steps)
    out = pl.pallas_call(
        functools.partial(_kernel, tile=tile, widths=widths),
        grid=(sum(widths) // tile.outputs, splits, rows),
        out_shape=jax.ShapeDtypeStruct((splits, rows, sum(widths)), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=1),
        interpret=INTERPRET,
        name="dca_row_products",
    )(numbers.astype(jnp.int32), x, *stacks)
    ends = list(itertools.accumulate(widths))
    return tuple(jnp.split(out.sum(axis=0), ends[:-1], axis=1))


def choose_tile(stacks: Sequence[Any], rows: int) -> Tile | None:
    """Sizes for these stacks; None if no tile divides them."""
    inputs, widths = stacks[0].shape[1], [stack.shape[2] for stack in stacks]
    deep, wide = math.gcd(INPUTS, inputs), math.gcd(OUTPUTS, *widths)
    if min(deep, wide) < 16:
        return None
    columns, count = rows * sum(widths) // wide, inputs // deep
    steps = next(n for n in range(min(STEPS, count), 0, -1) if count % n == 0)
    while steps % 2 == 0 and steps > FEWEST_STEPS and columns * count // steps < PROGRAMS:
        steps //= 2
    return Tile(deep, wide, steps)


def _kernel(
    number_ref: Any,  # [rows]
    x_ref: Any,  # [rows, inputs]
    *refs: Any,  # the stacks, [M, inputs, outputs]; out: [splits, rows, outputs of all]
    tile: Tile,
    widths: list[int],
) -> None:
    """Grid: (tiles of the outputs of all stacks, splits of the inputs, rows)."""
    *stack_refs, out_ref = refs
    column, split, row = (pl.program_id(axis) for axis in range(3))
    number = number_ref[row]
    at = pl.ds(column * tile.outputs, tile.outputs)

    def multiply(stack_ref: Any, start: int) -> None:
        outputs = pl.ds((column - start) * tile.outputs, tile.outputs)
        sums = jnp.zeros((tile.inputs, tile.outputs), jnp.float32)
        for first in range(0, tile.steps, tile.ahead):
            # All loads come before the first use, which waits.
            numbers = range(first, min(first + tile.ahead, tile.steps))
            depths = [pl.ds((split * tile.steps + n) * tile.inputs, tile.inputs) for n in numbers]
            tiles = [plgpu.load(stack_ref.at[number, depth, outputs]) for depth in depths]
            for depth, values in zip(depths, tiles, strict=True):
                x = plgpu.load(x_ref.at[row, depth]).astype(jnp.float32)
                sums += x[:, None] * values.astype(jnp.float32)
        plgpu.store(out_ref.at[split, row, at], sums.sum(axis=0))

    start = 0
    for stack_ref, width in zip(stack_refs, widths, strict=True):
        stop = start + width // tile.outputs
        mine = (column >= start) & (column < stop)
        pl.when(mine)(functools.partial(multiply, stack_ref, start))
        start = stop
