"""Few rows, each times matrices of its own, of which no others are read: what decoding takes.

The time is that of reading the matrices. On NVIDIA's GPUs from Ampere on a kernel of Pallas-Triton
reads them in as many programs as it takes to keep the memory busy; XLA would write down what it
gathers, and read it again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from dca_jax.device import current_device
from dca_jax.dtypes import compute_dtype
from dca_jax.grouped.blocks import matrix_of, precision
from dca_jax.packed_weights import Packed

INTERPRET = False  # tests set it: the kernel then runs on any device, in Pallas' interpreter
WIDTH, DEPTH = 64, 64  # columns and rows that a program reads at once
PROGRAMS = 512  # that keep a GPU's memory busy
WARPS = 4
AHEAD = 4  # tiles that a program reads before it uses the first


def are_few(rows: int, groups: int) -> bool:
    """Whether `chosen_products` is the way to take: a loop over blocks is faster on a CPU."""
    return 2 * rows <= groups and current_device().platform != "cpu"


def chosen_products(
    x: Float[Array, "rows inputs"],
    stacks: tuple[Float[Array, "L E inputs outputs"] | Packed, ...],
    layer: Int[Array, ""],
    groups: Int[Array, " rows"],
) -> tuple[Float[Array, "rows outputs"], ...]:
    """Each row times the matrix of its group, of each of the stacks; sums are float32 at least.

    Args:
        x: in any order. groups: of each row.
        stacks: of one shape, packed or not; layer: which of each stack.
    """
    inputs, outputs = stacks[0].shape[2:]
    device = current_device()
    if device.platform == "gpu" and isinstance(stacks[0], Packed):
        return tuple(_unpacked_sums(x, kernels, layer, groups) for kernels in stacks)
    tiles = inputs % DEPTH == 0 and outputs % WIDTH == 0 and x.dtype.itemsize < 8
    if tiles and (INTERPRET or (device.capability or (0, 0)) >= (8, 0)):
        return _by_triton(x, stacks, layer, groups)
    product = functools.partial(jnp.dot, precision=precision(x))

    def by_row(kernels: Array | Packed) -> Array:
        rows = (
            product(x[row : row + 1], matrix_of(kernels, layer, groups[row], x.dtype))
            for row in range(len(x))
        )
        return jnp.concatenate(list(rows))

    return tuple(map(by_row, stacks))


def _unpacked_sums(x: Array, kernels: Any, layer: Array, groups: Array) -> Array:
    """By one fusion that gathers, unpacks, multiplies and sums."""
    wide = compute_dtype(x.dtype)
    matrices = kernels[layer, groups].unpack_inner(wide)  # outputs before inputs
    return jnp.sum(x.astype(wide)[:, None, :] * matrices, axis=2).astype(x.dtype)


def _by_triton(x: Array, stacks: tuple[Any, ...], layer: Array, groups: Array) -> tuple[Array, ...]:
    rows, experts = len(x), stacks[0].shape[1]
    inputs, outputs = stacks[0].shape[2:]
    # More programs than columns give: each takes a share of the sums, which are added up after.
    shares = 1
    while rows * (outputs // WIDTH) * shares < PROGRAMS and inputs % (2 * shares * DEPTH) == 0:
        shares *= 2
    partial = jax.ShapeDtypeStruct((shares, rows, outputs), jnp.float32)
    parts = pl.pallas_call(
        functools.partial(_kernel, share=inputs // shares),
        grid=(rows, outputs // WIDTH, shares),
        out_shape=(partial,) * len(stacks),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=INTERPRET,
        name="chosen_products",
    )(layer * experts + groups, x, *(w.reshape(-1, inputs, outputs) for w in stacks))
    return tuple(part.sum(axis=0).astype(x.dtype) for part in parts)


def _kernel(matrix_ref: Any, x_ref: Any, *refs: Any, share: int) -> None:
    """Grid: (rows, columns / WIDTH, shares)."""
    row, number = pl.program_id(0), pl.program_id(2)
    columns = pl.ds(pl.program_id(1) * WIDTH, WIDTH)
    matrix = matrix_ref[row]
    split = len(refs) // 2
    steps = range(share // DEPTH)
    for w_ref, y_ref in zip(refs[:split], refs[split:], strict=True):
        # Summed up at the end only: a sum along rows goes through shared memory.
        sums = jnp.zeros((DEPTH, WIDTH), jnp.float32)
        for first in steps[::AHEAD]:
            # All loads before what waits for the first of them.
            depths = [pl.ds(number * share + n * DEPTH, DEPTH) for n in steps[first:][:AHEAD]]
            tiles = [plgpu.load(w_ref.at[matrix, depth, columns]) for depth in depths]
            for depth, tile in zip(depths, tiles, strict=True):
                x = plgpu.load(x_ref.at[row, depth]).astype(jnp.float32)
                sums += x[:, None] * tile.astype(jnp.float32)
        plgpu.store(y_ref.at[number, row, columns], sums.sum(axis=0))
