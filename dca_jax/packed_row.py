"""A product of one row with a packed matrix on Hopper, which is read once, as it lies in its stack.

One row is what drawing tokens for one text is made of. A matrix's tiles are the left side of WGMMA:
they go from global to shared memory as they are, from there into registers, and are unpacked there
into what the tensor cores take, so that no unpacked weight is ever written down. The row is the
first of eight columns on the right side; the others are zeros.

Of some warpgroups one keeps `STAGES` steps of the matrix in flight, from tile to tile without a
pause; each of the others has 64 outputs of a tile. The inputs are divided into `splits`, of which a
CTA has always the same, so that it reads its part of the row once.

WGMMA sums pairs of inputs in an order of its own. Each thread takes the four bytes that lie
together, and the row is brought into the order in which that makes pairs (`_ordered`).
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector
from jaxtyping import Array, Float, Int

from dca_jax.device import MULTIPROCESSORS

COLUMNS = 8  # of WGMMA's right side, at least
ROWS = 64  # outputs of a warpgroup: rows of WGMMA
STEP = 128  # bytes of an output that are read at a time
ROW = plgpu.Layout.WGMMA.reduce(1)
WORDS = plgpu.Layout.WGMMA_UPCAST_2X


class Plan(NamedTuple):
    """How a product is divided.

    Attributes:
        splits: parts of the inputs. warpgroups: that compute; 64 outputs of a tile for each.
        stages: steps in flight.
    """

    splits: int
    warpgroups: int = 2
    stages: int = 8


class _Shared(NamedTuple):
    """Shared memory: tiles, then barriers."""

    x: Any  # [COLUMNS, inputs of a split]
    values: Any  # [stages, outputs of a tile, STEP]
    scale: Any  # [stages, groups of a step, outputs of a tile]; None of int8
    zero: Any
    out: Any  # [warpgroups, ROWS]
    x_ready: Any
    ready: Any
    free: Any


def multiply_row(
    x: Float[Array, "1 inputs"],
    stacks: Sequence[tuple[Array, ...]],
    layer: Int[Array, ""],
    plan: Plan,
) -> tuple[Float[Array, "1 _"], ...]:
    """x times matrix `layer` of each of the stacks, in float32, in one launch.

    Args:
        stacks: of each matrix values [L, outputs, bytes]; and, of int4, scales and zeros
            [L, groups, outputs].
    """
    inputs = x.shape[1]
    widths = [stack[0].shape[1] for stack in stacks]
    tile = plan.warpgroups * ROWS
    is_int4 = len(stacks[0]) == 3
    part = inputs // plan.splits
    steps = part // (STEP * (2 if is_int4 else 1))
    groups = stacks[0][1].shape[1] * 2 * STEP // inputs if is_int4 else 0  # of a step
    ctas = MULTIPROCESSORS // plan.splits * plan.splits
    starts = list(itertools.accumulate((w // tile for w in widths), initial=0))
    x = jnp.pad(_ordered(x, is_int4), ((0, COLUMNS - 1), (0, 0)))
    f32, dtype = jnp.float32, stacks[0][0].dtype

    def kernel(layer: Any, x: Any, *refs: Any) -> None:
        count = len(stacks[0]) * len(stacks)
        given, out, shared = refs[:count], refs[count], refs[count + 1 :]
        matrices = list(itertools.batched(given, len(stacks[0])))
        smem = jax.tree.unflatten(tree, shared)
        warpgroup = lax.axis_index("warpgroup")
        cta = lax.axis_index("cta")
        split, first = lax.rem(cta, plan.splits), lax.div(cta, plan.splits)
        across = ctas // plan.splits
        tiles = lax.div(starts[-1] - first + (across - 1), across)

        def feed() -> None:
            plgpu.copy_gmem_to_smem(x.at[:, pl.ds(split * part, part)], smem.x, smem.x_ready)

            def one(n: Array, _: None) -> None:
                number = first + lax.div(n, steps) * across
                step = split * steps + lax.rem(n, steps)
                slot = lax.rem(n, plan.stages)
                pl.when(n >= plan.stages)(lambda: plgpu.barrier_wait(smem.free.at[slot]))
                for matrix, start, stop in zip(matrices, starts, starts[1:], strict=False):

                    @pl.when((number >= start) & (number < stop))
                    def _(matrix: Any = matrix, start: int = start) -> None:
                        outputs = pl.ds((number - start) * tile, tile)
                        sources = [matrix[0].at[layer[0], outputs, pl.ds(step * STEP, STEP)]]
                        for each in matrix[1:]:
                            sources.append(each.at[layer[0], pl.ds(step * groups, groups), outputs])
                        targets = [smem.values, smem.scale, smem.zero]
                        for source, target in zip(sources, targets, strict=False):
                            plgpu.copy_gmem_to_smem(source, target.at[slot], smem.ready.at[slot])

            lax.fori_loop(0, tiles * steps, one, None)

        def compute() -> None:
            plgpu.barrier_wait(smem.x_ready)
            rows = pl.ds(warpgroup * ROWS, ROWS)

            def visit(n: Array, _: None) -> None:
                def one(step: Array, total: Array) -> Array:
                    at = n * steps + step
                    slot = lax.rem(at, plan.stages)
                    plgpu.barrier_wait(smem.ready.at[slot])
                    if is_int4:
                        total = _add_groups(smem, slot, rows, step, total)
                    else:
                        total = _add_bytes(smem, slot, rows, step, total)
                    plgpu.barrier_arrive(smem.free.at[slot])
                    return total

                zeros = jnp.full((ROWS, COLUMNS), 0, f32)
                total = lax.fori_loop(0, steps, one, plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                smem.out[warpgroup] = total.sum(axis=1)  # the other columns are zeros
                plgpu.commit_smem()
                outputs = pl.ds((first + n * across) * tile + warpgroup * ROWS, ROWS)
                plgpu.copy_smem_to_gmem(smem.out.at[warpgroup], out.at[split, outputs])

            lax.fori_loop(0, tiles, visit, None)
            plgpu.wait_smem_to_gmem(0)

        pl.when(warpgroup == plan.warpgroups)(feed)
        pl.when(warpgroup < plan.warpgroups)(compute)

    stages = plan.stages
    shared = _Shared(
        x=plgpu.SMEM((COLUMNS, part), x.dtype),
        values=plgpu.SMEM((stages, tile, STEP), dtype),
        scale=plgpu.SMEM((stages, groups, tile), stacks[0][1].dtype) if is_int4 else None,
        zero=plgpu.SMEM((stages, groups, tile), jnp.uint8) if is_int4 else None,
        out=plgpu.SMEM((plan.warpgroups, ROWS), f32),
        x_ready=plgpu.Barrier(),
        ready=plgpu.Barrier(num_arrivals=3 if is_int4 else 1, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=stages),
    )
    scratch, tree = jax.tree.flatten(shared)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((plan.splits, sum(widths)), f32),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="dca_packed_row",
        scratch_types=scratch,
    )(layer.astype(jnp.int32).reshape(1), x, *itertools.chain(*stacks))
    ends = list(itertools.accumulate(widths))
    return tuple(jnp.split(out.sum(axis=0)[None], ends[:-1], axis=1))


def _ordered(x: Float[Array, "rows inputs"], halves: bool) -> Float[Array, "rows inputs"]:
    """The inputs in the order in which WGMMA meets those that threads have in their words.

    A word has four of 16 inputs. Its pairs are of bytes that follow one another; or, of int4, of
    bytes that are two apart.
    """
    rows = len(x)
    if halves:
        parts = x.reshape(rows, -1, 2, 2, 2, 2).transpose(0, 1, 5, 3, 2, 4)
    else:
        parts = x.reshape(rows, -1, 2, 2, 2, 2).transpose(0, 1, 4, 3, 2, 5)
    return parts.reshape(x.shape)


def _products(lefts: list[Array], xs: list[Any]) -> list[Array]:
    """[ROWS, COLUMNS] of each pair, all in flight at once."""

    def multiply(*accs: Any) -> list[Array]:
        for acc, left, x in zip(accs, lefts, xs, strict=True):
            plgpu.wgmma(acc, left, x.T)
        return [acc[...] for acc in accs]

    shape = (ROWS, COLUMNS)
    return pl.run_scoped(multiply, *[plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for _ in lefts])


def _add_bytes(smem: _Shared, slot: Array, rows: Any, step: Array, total: Array) -> Array:
    words = plgpu.load(smem.values.at[slot, rows], layout=WORDS)
    wide = _widened(words, None, (ROWS, STEP))
    (product,) = _products([wide], [smem.x.at[:, pl.ds(step * STEP, STEP)]])
    return total + product


def _add_groups(smem: _Shared, slot: Array, rows: Any, step: Array, total: Array) -> Array:
    groups = smem.scale.shape[1]
    width = STEP // groups  # bytes of a group
    wide, xs = [], []
    for group in range(groups):
        words = plgpu.load(smem.values.at[slot, rows, pl.ds(group * width, width)], layout=WORDS)
        zero = plgpu.load(smem.zero.at[slot, group, rows], layout=ROW)
        zero = (-128 - zero.astype(jnp.float32)).astype(jnp.bfloat16)
        wide.append(_widened(words, zero, (ROWS, 2 * width)))
        xs.append(smem.x.at[:, pl.ds((step * groups + group) * 2 * width, 2 * width)])
    for group, product in enumerate(_products(wide, xs)):
        scale = plgpu.load(smem.scale.at[slot, group, rows], layout=ROW).astype(jnp.float32)
        total += product * lax.broadcast_in_dim(scale, product.shape, [0])
    return total


# Bytes two apart, or halves of them: 0x4300 + q is 128 + q in bfloat16.
_HALF = """
{{
.reg .b32 half;
shr.b32 half, $1, {shift};
lop3.b32 half, half, 0x000f000f, 0x43004300, 0xea;
add.rn.bf16x2 $0, half, $2;
}}
"""
# 0x4300 and 7 bits are 128 + m; 0x4300, or with the sign in the exponent's lowest bit 0x4380, is
# 128 or 256, and is taken away.
_BYTE = """
{{
.reg .b32 pair, a, b;
prmt.b32 pair, $1, $1, 0x{bytes};
lop3.b32 a, pair, 0x007f007f, 0x43004300, 0xea;
lop3.b32 b, pair, 0x00800080, 0x43004300, 0xea;
sub.rn.bf16x2 $0, a, b;
}}
"""


def _widened(words: Array, zero: Array | None, shape: tuple[int, int]) -> Array:
    """Registers of `WORDS` as those of WGMMA's left side, in bfloat16; int4 less its zeros."""
    halves = zero is not None

    def convert(ctx: Any, words: Any, zero: Any = None) -> Any:
        del ctx
        i32, i16 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(16)
        one = ir.VectorType.get((1,), i32)
        pair_type = ir.VectorType.get((2,), ir.BF16Type.get())
        to = mgpu.WGMMA_LAYOUT

        def word_of(register: Any) -> Any:
            return vector.extract(vector.bitcast(one, register), [], [0])

        def pair_of(value: Any) -> Any:
            return vector.bitcast(pair_type, vector.broadcast(one, value))

        subtracted = []
        for register in [] if zero is None else zero.registers.flat:
            bits = vector.bitcast(ir.VectorType.get((1,), i16), register)
            bits = vector.extract(bits, [], [0])
            subtracted.append(llvm.inline_asm(i32, [bits], "mov.b32 $0, {$1, $1};", "=r,h"))
        from_words = [word_of(register) for register in words.registers.flat]
        from_words = np.array(from_words, dtype=object).reshape(-1, 2)  # steps, and rows
        wide = np.empty(to.registers_shape(shape), dtype=object)
        out = wide.reshape(-1, 2, 2)  # steps, halves of 16 inputs, and rows
        for (step, half, row), _ in np.ndenumerate(out):
            if halves:
                upper, number = divmod(step, len(from_words))
                ptx = _HALF.format(shift=8 * half + 4 * upper)
                operands, constraints = [from_words[number, row], subtracted[row]], "=r,r,r"
            else:
                first = 2 * half
                ptx = _BYTE.format(bytes=f"{first + 1}{first + 1}{first}{first}")
                operands, constraints = [from_words[step, row]], "=r,r"
            out[step, half, row] = pair_of(llvm.inline_asm(i32, operands, ptx, constraints))
        return mgpu.FragmentedArray(_registers=wide, _layout=to, _is_signed=None)

    inline = plgpu.inline_mgpu(
        arg_types=(WORDS, ROW) if halves else (WORDS,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    return inline(convert)(*((words, zero) if halves else (words,)))
