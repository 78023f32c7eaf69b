"""What a warpgroup of these kernels does beyond Pallas' primitives: copies, and products.

A warpgroup is four warps. Each multiplies 16 of every 64 rows of the left operand by the whole
right operand (`mma.sync`, operands and sums in registers).

Pallas' own copies into shared memory are `cp.async` on Ampere and Ada, and on newer GPUs the work
of the bulk copy engine. These kernels use `cp.async` everywhere: one program runs on all of them.
It also lets a row that does not exist be replaced by one that does.
"""

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm
from jaxtyping import Array, Float, Int

from dca_jax.attention.mosaic_ampere import tiles

ROWS = 64  # rows of the left operand that a warpgroup's four warps multiply at once
DEPTH = 16  # terms of the sum in one product
# An 8 x 16 tile is 256 contiguous bytes, in an order in which neither the copies nor `ldmatrix`,
# which reads 8 rows of 16 bytes, have bank conflicts.
TRANSFORMS = (
    plgpu.TilingTransform((8, DEPTH)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(2 * DEPTH),  # pyright: ignore[reportAbstractUsage]
)
SUMS = plgpu.Layout.MMA_ACC(jnp.bfloat16)  # of products, float32
PER_ROW, PER_COLUMN = SUMS.reduce(1), SUMS.reduce(0)
# No reduction crosses warps, so none needs shared memory.
PARAMS = plgpu.CompilerParams(
    approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
)
_SCALAR, _OPERAND = plgpu.Layout.WG_SPLAT(()), plgpu.RefType(TRANSFORMS)


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
    types = plgpu.RefType(), _OPERAND, _SCALAR, _SCALAR
    plgpu.inline_mgpu(arg_types=types)(_fetch)(source, target, first, limit)


def _fetch(ctx: Any, source: Any, target: Any, first: Any, limit: Any) -> None:
    """A thread copies 16 bytes at a time; eight adjacent ones fill 128 bytes of a tile.

    A warp copies 128 contiguous bytes of each of four rows if rows are that long.
    """
    del ctx
    i64 = ir.IntegerType.get_signless(64)
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
    if tiles.INTERPRET:
        return acc + jnp.dot(left[...], right[...].T, preferred_element_type=jnp.float32)
    return _inline(_add_product, acc, (SUMS, _OPERAND, _OPERAND))(acc, left, right)


def add_weighted(
    acc: Float[Array, "M H"], weights: Float[Array, "M N"], rows: Any
) -> Float[Array, "M H"]:
    """acc + weights rows for weights in registers, of the dtype of rows [N, H] in shared memory."""
    if tiles.INTERPRET:
        return acc + jnp.dot(weights, rows[...], preferred_element_type=jnp.float32)
    return _inline(_add_weighted, acc, (SUMS, SUMS, _OPERAND))(acc, weights, rows)


def _inline(function: Any, acc: Array, types: tuple[Any, ...]) -> Any:
    # As one operation each, since Mosaic's search for layouts takes time for each operation.
    result = plgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=SUMS)
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(function)


def _add_product(ctx: Any, acc: Any, left: Any, right: Any) -> Any:
    del ctx
    layouts = _layouts(left)
    right = mgpu.memref_transpose(right, (1, 0, 3, 2))
    for tile in range(left.type.shape[1]):
        a = _load(mgpu.memref_slice(left, (slice(None), mgpu.ds(tile, 1))), layouts.lhs)
        b = _load(mgpu.memref_slice(right, (mgpu.ds(tile, 1),)), layouts.rhs)
        acc = mgpu.mma(acc, a, b)
    return acc


def _add_weighted(ctx: Any, acc: Any, weights: Any, rows: Any) -> Any:
    del ctx
    layouts, (height, width) = _layouts(rows), weights.shape
    # Sums have the registers of a left operand: of 64 rows, 8 columns at a time; and of those, two
    # halves of each warp's 16 rows.
    registers = weights.registers.reshape(height // ROWS, width // DEPTH, -1)
    shape = layouts.lhs.registers_shape((height, DEPTH))
    for step in range(width // DEPTH):
        part = registers[:, step].reshape(shape)
        a = mgpu.FragmentedArray(_registers=part, _layout=layouts.lhs, _is_signed=None)
        b = _load(mgpu.memref_slice(rows, (mgpu.ds(2 * step, 2),)), layouts.rhs)
        acc = mgpu.mma(acc, a, b)
    return acc


def _layouts(operand: Any) -> Any:
    return mgpu.MMALayouts(ir.MemRefType(operand.type).element_type)


def _load(tiled: Any, layout: Any) -> Any:
    return mgpu.FragmentedArray.load_tiled(tiled, swizzle=2 * DEPTH, layout=layout)


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
    """-inf where the key is not in [low, high); keys are consecutive along `axis`, from `first`."""
    j = plgpu.broadcasted_iota(jnp.int32, logits.shape, axis, layout=SUMS) + first
    return jnp.where((low <= j) & (j < high), logits, jnp.full_like(logits, -jnp.inf))


def load(ref: Any, layout: Any) -> Array:
    """Numbers in global memory, one per row (`PER_ROW`) or column (`PER_COLUMN`) of sums."""
    return plgpu.load(ref, layout=layout, optimized=False)
