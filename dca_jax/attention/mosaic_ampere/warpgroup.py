"""What a warpgroup of these kernels does beyond Pallas' primitives: copies, and operands of products.

A warpgroup is four warps. Each multiplies 16 of every 64 rows of the left operand by the whole
right operand (`mma.sync`, operands and sums in registers).

Pallas copies into shared memory asynchronously by `cp.async` on Ampere and Ada, and by the bulk copy
engine on newer GPUs. These kernels use `cp.async` everywhere, so what runs on one GPU is what runs
on another; it also lets a row that does not exist be replaced by one that does.
"""

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm
from jaxtyping import Array, Float, Int

from dca_jax.attention.mosaic_ampere import tiles

ROWS = 64  # rows of the left operand that a warpgroup's four warps multiply at once
DEPTH = 16  # terms of the sum in one product
# An 8 x 16 tile is 256 contiguous bytes, in an order in which neither `ldmatrix`, which reads 8 rows
# of 16 bytes, nor the copies have bank conflicts.
TRANSFORMS = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(2 * DEPTH))
SUMS = plgpu.Layout.MMA_ACC(jnp.bfloat16)  # of products, float32
PER_ROW, PER_COLUMN = SUMS.reduce(1), SUMS.reduce(0)
_SCALAR = plgpu.Layout.WG_SPLAT(())


def shared(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for operands [..., rows, H]."""
    return plgpu.SMEM(shape, dtype, transforms=() if tiles.INTERPRET else TRANSFORMS)


# --- copies ------------------------------------------------------------------------------------


def fetch(
    source: Any, target: Any, first: Int[Array, ""] | int, limit: Int[Array, ""] | int
) -> None:
    """Starts copying rows first, first + 1, .. of `source` [S, H] to `target` [rows, H].

    In place of rows from `limit` on, row limit - 1 is copied.
    """
    first, limit = jnp.int32(first), jnp.int32(limit)
    if tiles.INTERPRET:
        size = min(target.shape[0], source.shape[0])
        start = jnp.minimum(first, source.shape[0] - size)
        rows = jnp.minimum(first + jnp.arange(target.shape[0], dtype=jnp.int32), limit - 1)
        target[...] = jnp.take(source[pl.ds(start, size)], rows - start, axis=0)
        return
    types = plgpu.RefType(), plgpu.RefType(TRANSFORMS), _SCALAR, _SCALAR
    plgpu.inline_mgpu(arg_types=types)(_fetch)(source, target, first, limit)


def _fetch(ctx: Any, source: Any, target: Any, first: Any, limit: Any) -> None:
    """A thread copies 16 bytes at a time; eight adjacent ones fill 128 bytes of a tile.

    A warp copies 128 contiguous bytes of each of four rows if rows are that long.
    """
    del ctx
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    row_tiles, across, _, _ = ir.MemRefType(target.type).shape
    strides, _ = ir.MemRefType(source.type).get_strides_and_offset()
    element = ir.MemRefType(source.type).element_type
    first, last = first.registers.item(), arith.subi(limit.registers.item(), _c(1))
    begin, end = mgpu.utils.memref_ptr(source), mgpu.utils.memref_ptr(target)
    begin = llvm.addrspacecast(llvm.PointerType.get(address_space=1), begin)

    thread = mgpu.utils.thread_idx()
    lane, warp = arith.remui(thread, _c(32)), arith.remui(arith.divui(thread, _c(32)), _c(4))
    half, row = arith.remui(lane, _c(2)), arith.remui(arith.divui(lane, _c(2)), _c(4))
    along = min(across, 4)  # tiles along a row that a warp copies
    eighth = arith.divui(lane, _c(8))
    column_tile = arith.remui(eighth, _c(along))
    row = arith.addi(row, arith.muli(arith.divui(eighth, _c(along)), _c(4)))
    warp_rows, parts = 4 * (4 // along), across // along
    steps = row_tiles * 8 // warp_rows * parts // 4
    assert steps > 0, "too few bytes for 128 threads"
    for step in range(steps):
        unit = arith.addi(warp, _c(4 * step))
        tile = arith.addi(column_tile, arith.muli(arith.remui(unit, _c(parts)), _c(along)))
        r = arith.addi(row, arith.muli(arith.divui(unit, _c(parts)), _c(warp_rows)))
        at = arith.minsi(arith.addi(first, r), last)
        column = arith.addi(arith.muli(tile, _c(DEPTH)), arith.muli(half, _c(8)))
        offset = arith.muli(arith.extsi(i64, at), arith.constant(i64, strides[0]))
        offset = arith.addi(offset, arith.extsi(i64, column))
        in_tile = arith.remui(r, _c(8))
        swizzled = arith.xori(half, arith.divui(in_tile, _c(4)))
        to = arith.addi(arith.muli(arith.divui(r, _c(8)), _c(across)), tile)
        to = arith.addi(arith.muli(to, _c(8)), in_tile)
        to = arith.addi(arith.muli(to, _c(DEPTH)), arith.muli(swizzled, _c(8)))
        nvvm.cp_async_shared_global(
            mgpu.utils.getelementptr(end, [to], element),
            mgpu.utils.getelementptr(begin, [offset], element),
            16,
            nvvm.LoadCacheModifierKind.CG,
        )
    nvvm.cp_async_commit_group()


def _c(x: int) -> Any:
    return arith.constant(ir.IntegerType.get_signless(32), x)


def arrive() -> None:
    """Waits until all copies are complete and all warps are here."""
    if not tiles.INTERPRET:
        plgpu.inline_mgpu()(lambda ctx: ctx.await_cp_async_copy(0))()


# --- products ----------------------------------------------------------------------------------


def add_product(acc: Float[Array, "M N"], left: Any, right: Any) -> Float[Array, "M N"]:
    """acc + left right^T for left [M, H] and right [N, H], both in shared memory."""
    for start in range(0, left.shape[1], DEPTH):
        columns = pl.ds(start, DEPTH)
        a, b = left.at[:, columns], right.at[:, columns].transpose((1, 0))
        acc = _mma(acc, _left(a), _right(b))
    return acc


def add_weighted(
    acc: Float[Array, "M H"], weights: Float[Array, "M N"], rows: Any
) -> Float[Array, "M H"]:
    """acc + weights rows for rows [N, H] in shared memory and weights in registers, of its dtype."""
    for start, part in zip(range(0, rows.shape[0], DEPTH), _parts(weights), strict=True):
        acc = _mma(acc, part, _right(rows.at[pl.ds(start, DEPTH)]))
    return acc


def _left(ref: Any) -> Array:
    return ref[...] if tiles.INTERPRET else plgpu.load(ref, layout=plgpu.Layout.MMA_LHS(ref.dtype))


def _right(ref: Any) -> Array:
    return ref[...] if tiles.INTERPRET else plgpu.load(ref, layout=plgpu.Layout.MMA_RHS(ref.dtype))


def _mma(acc: Array, left: Array, right: Array) -> Array:
    if tiles.INTERPRET:
        return acc + jnp.dot(left, right, preferred_element_type=jnp.float32)
    return plgpu.mma(acc, left, right)


def _parts(weights: Float[Array, "M N"]) -> list[Float[Array, "M 16"]]:
    """Sums' columns, 16 at a time, as left operands: the same registers under another name."""
    if tiles.INTERPRET:
        return jnp.split(weights, weights.shape[1] // DEPTH, axis=1)
    rows, columns = weights.shape
    layout = plgpu.Layout.MMA_LHS(weights.dtype)
    part = plgpu.ShapeDtypeStruct((rows, DEPTH), weights.dtype, layout=layout)

    def rename(ctx: Any, x: Any) -> list[Any]:
        del ctx
        to, i32 = layout.to_mgpu(), ir.IntegerType.get_signless(32)
        # Of 64 rows: 8 columns at a time, and of those two halves of a warp's 16 rows.
        registers = x.registers.copy().reshape(rows // ROWS, columns // DEPTH, -1)
        shape = to.registers_shape((rows, DEPTH))
        # If a single part had the very same registers as x, Mosaic would take it for x.
        for at, register in np.ndenumerate(registers):
            word = mgpu.utils.bitcast(register, i32)
            registers[at] = mgpu.utils.bitcast(word, register.type)
        return [
            mgpu.FragmentedArray(
                _registers=registers[:, n].reshape(shape), _layout=to, _is_signed=None
            )
            for n in range(columns // DEPTH)
        ]

    count = columns // DEPTH
    return plgpu.inline_mgpu(arg_types=(SUMS,), return_type=[part] * count)(rename)(weights)


def splat(shape: tuple[int, ...], value: float, layout: Any = SUMS) -> Float[Array, "..."]:
    """A constant array in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def of_rows(x: Array, columns: int) -> Array:
    """One number per row, for each of `columns` columns."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def of_columns(x: Array, rows: int) -> Array:
    """One number per column, for each of `rows` rows."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def masked(
    logits: Float[Array, "M N"],
    low: Int[Array, "M N"],
    high: Int[Array, "M N"],
    first: Int[Array, ""],
    axis: int,
) -> Float[Array, "M N"]:
    """-inf where the key is not in [low, high); keys are consecutive along an axis, from `first`."""
    j = plgpu.broadcasted_iota(jnp.int32, logits.shape, axis, layout=SUMS) + first
    return jnp.where((low <= j) & (j < high), logits, jnp.full_like(logits, -jnp.inf))


def load(ref: Any, layout: Any) -> Array:
    """Numbers in global memory, one per row (`PER_ROW`) or column (`PER_COLUMN`) of sums."""
    return plgpu.load(ref, layout=layout, optimized=False)
