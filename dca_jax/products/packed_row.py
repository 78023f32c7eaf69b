"""A kernel for Hopper for the product of one row with a packed matrix, read in place in its stack.

One row is the case of decoding a single text. A matrix's tiles are the left operand of WGMMA. They
are copied packed from global to shared memory and from there to registers, where they are unpacked
for the tensor cores, so unpacked weights are never written to memory. The row is the first of eight
columns of the right operand; the others are zeros.

One of the warpgroups keeps several steps of the matrix in flight, from tile to tile without a
pause; each of the others computes 64 outputs of a tile. The inputs are divided into `splits`, and a
CTA always has the same split, so that it reads its part of the row only once.

WGMMA sums pairs of inputs in its own order. Each thread takes four adjacent bytes, and the row is
permuted to match (`_ordered`).
"""

import itertools
from collections.abc import Sequence
from functools import partial
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

from dca_jax.device import MULTIPROCESSORS, SHARED_BYTES, current_device
from dca_jax.products.packed import Packed

COLUMNS = 8  # minimum columns of WGMMA's right operand
ROWS = 64  # outputs per warpgroup: rows of WGMMA
STEP = 128  # bytes of an output that are read per step
WARPGROUPS, MOST_STAGES = 4, 6
MARGIN = 4096  # bytes of shared memory for sums and barriers
TILE_STEPS = 1.5  # time to begin and end a tile, in steps
# On an H200 `dca_jax.products.few_rows` is as fast or faster with fewer weights, or fewer int8
# outputs, and where the tiles leave more of the device idle.
INT4_WEIGHTS, INT8_OUTPUTS, BUSY = 2**24, 2**14, 0.8
ROW = plgpu.Layout.WGMMA.reduce(1)
WORDS = plgpu.Layout.WGMMA_UPCAST_2X


class Plan(NamedTuple):
    """How a product is divided.

    Attributes:
        splits: number of parts of the inputs.
        warpgroups: number of computing warpgroups, each with 64 outputs of a tile.
        stages: number of steps in flight.
    """

    splits: int
    warpgroups: int
    stages: int

    @property
    def tile(self) -> int:
        """Outputs of a tile."""
        return self.warpgroups * ROWS

    @property
    def ctas(self) -> int:
        """Number of CTAs, a multiple of the splits."""
        return MULTIPROCESSORS // self.splits * self.splits


class _Problem(NamedTuple):
    """The static parameters of a product.

    Attributes:
        plan: how it is divided.
        steps: number of steps per tile.
        part: number of inputs per split.
        groups: number of groups per step; 0 for int8, whose scales multiply the sums.
        starts: the first tile of each matrix, and the end.
    """

    plan: Plan
    steps: int
    part: int
    groups: int
    starts: list[int]


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


def choose_plan(x: Any, stacks: Sequence[Packed]) -> Plan | None:
    """The plan for these stacks; None if the kernel cannot run here or is not faster.

    Args:
        x, stacks: as in `multiply_row`, or their shapes.
    """
    first = stacks[0]
    alike = {(s.form, s.zero is None, s.offset is None, s.scale.shape[1]) for s in stacks}
    if len(x) > 1 or x.dtype != jnp.bfloat16 or len(alike) > 1 or first.offset is not None:
        return None
    capability = current_device().capability
    if capability is None or capability[0] != 9:  # WGMMA
        return None
    inputs, outputs = x.shape[1], sum(stack.inner_shape[1] for stack in stacks)
    group, weights = inputs // first.scale.shape[1], inputs * outputs
    if first.form == "int4":
        known = first.zero is not None and group in (32, 64, 128) and weights >= INT4_WEIGHTS
    else:
        known = first.form == "int8" and group == inputs and outputs >= INT8_OUTPUTS
    tile = WARPGROUPS * ROWS
    if not known or any(stack.inner_shape[1] % tile for stack in stacks):
        return None
    step = STEP * (2 if first.form == "int4" else 1)
    found: list[
        tuple[float, float, Plan]
    ] = []  # time in steps, share of it that CTAs are busy, plan
    for splits in (1, 2, 4, 8, 16, 32):
        part = inputs // splits
        x_bytes, stage = COLUMNS * 2 * part, tile * (STEP + 3 * step // group)
        stages = min((SHARED_BYTES - MARGIN - x_bytes) // stage, MOST_STAGES)
        if inputs % (splits * step) or stages < 3:
            continue
        plan = Plan(splits, WARPGROUPS, stages)
        tiles, across = outputs // tile, plan.ctas // splits
        rounds = -(-tiles // across)
        found.append((rounds * (part / step + TILE_STEPS), tiles / (rounds * across), plan))
    if not found:
        return None
    _, busy, plan = min(found)
    return plan if busy >= BUSY else None


def multiply_row(
    x: Float[Array, "1 inputs"], stacks: Sequence[Packed], layer: Int[Array, ""], plan: Plan
) -> tuple[Float[Array, "1 _"], ...]:
    """x times matrix `layer` of each stack, in float32, in one launch.

    Args:
        stacks: stacks in the same form, int8 per output or int4 with zeros; each matrix has one
            axis of outputs and one of inputs.
        plan: the result of `choose_plan`.
    """
    inputs, is_int4 = x.shape[1], stacks[0].form == "int4"
    widths = [stack.inner_shape[1] for stack in stacks]
    tiles, part = (width // plan.tile for width in widths), inputs // plan.splits
    problem = _Problem(
        plan=plan,
        steps=part // (STEP * (2 if is_int4 else 1)),
        part=part,
        groups=2 * STEP * stacks[0].scale.shape[1] // inputs if is_int4 else 0,
        starts=list(itertools.accumulate(tiles, initial=0)),
    )
    parts = [(s.values, s.scale, s.zero) if is_int4 else (s.values,) for s in stacks]
    x = jnp.pad(_ordered(x, is_int4), ((0, COLUMNS - 1), (0, 0)))
    sums = _sums(x, parts, layer.astype(jnp.int32).reshape(1), problem).sum(axis=0)[None]
    found = jnp.split(sums, list(itertools.accumulate(widths))[:-1], axis=1)
    if is_int4:
        return tuple(found)
    return tuple(y * stack.at(layer).scale for y, stack in zip(found, stacks, strict=True))


def _sums(
    x: Float[Array, "columns inputs"],
    stacks: Sequence[tuple[Array, ...]],
    layer: Int[Array, " 1"],
    problem: _Problem,
) -> Float[Array, "splits outputs"]:
    plan, (stages, tile) = problem.plan, (problem.plan.stages, problem.plan.tile)
    values, *others = stacks[0]

    def kernel(layer: Any, x: Any, *refs: Any) -> None:
        given, smem = jax.tree.unflatten(tree, refs)
        *matrices, out = given
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == plan.warpgroups)(lambda: _feed(problem, layer, x, matrices, smem))
        pl.when(warpgroup < plan.warpgroups)(lambda: _compute(problem, out, smem))

    def staged(array: Array) -> Any:
        return plgpu.SMEM((stages, problem.groups, tile), array.dtype)

    shared = _Shared(
        x=plgpu.SMEM((COLUMNS, problem.part), x.dtype),
        values=plgpu.SMEM((stages, tile, STEP), values.dtype),
        scale=staged(others[0]) if others else None,
        zero=staged(others[1]) if others else None,
        out=plgpu.SMEM((plan.warpgroups, ROWS), jnp.float32),
        x_ready=plgpu.Barrier(),
        ready=plgpu.Barrier(num_arrivals=1 + len(others), num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=stages),
    )
    outputs = problem.starts[-1] * tile
    out = jax.ShapeDtypeStruct((plan.splits, outputs), jnp.float32)
    tree = jax.tree.structure(([*stacks, out], shared))
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(plan.ctas,),
        grid_names=("cta",),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="dca_packed_row",
        scratch_types=jax.tree.leaves(shared),
    )(layer, x, *itertools.chain(*stacks))


def _own(problem: _Problem) -> tuple[Any, Any, Any]:
    """This CTA's split, first tile and number of tiles, which are `across` apart."""
    cta, splits = lax.axis_index("cta"), problem.plan.splits
    first, across = lax.div(cta, splits), problem.plan.ctas // splits
    return lax.rem(cta, splits), first, lax.div(problem.starts[-1] - first + (across - 1), across)


def _feed(problem: _Problem, layer: Any, x: Any, matrices: Sequence[Any], smem: _Shared) -> None:
    """The warpgroup that keeps steps in flight."""
    plan, steps, groups = problem.plan, problem.steps, problem.groups
    split, first, tiles = _own(problem)
    across = plan.ctas // plan.splits
    own = x.at[:, pl.ds(split * problem.part, problem.part)]
    plgpu.copy_gmem_to_smem(own, smem.x, smem.x_ready)

    def load(n: Array, _: None) -> None:
        tile, step = first + lax.div(n, steps) * across, split * steps + lax.rem(n, steps)
        slot = lax.rem(n, plan.stages)
        pl.when(n >= plan.stages)(lambda: plgpu.barrier_wait(smem.free.at[slot]))

        def load_from(matrix: Sequence[Any], start: int) -> None:
            values, *others = matrix
            outputs = pl.ds((tile - start) * plan.tile, plan.tile)
            plgpu.copy_gmem_to_smem(
                values.at[layer[0], outputs, pl.ds(step * STEP, STEP)],
                *(smem.values.at[slot], smem.ready.at[slot]),
            )
            for source, target in zip(others, (smem.scale, smem.zero), strict=False):
                own = source.at[layer[0], pl.ds(step * groups, groups), outputs]
                plgpu.copy_gmem_to_smem(own, target.at[slot], smem.ready.at[slot])

        for matrix, (start, stop) in zip(matrices, itertools.pairwise(problem.starts), strict=True):
            pl.when((tile >= start) & (tile < stop))(partial(load_from, matrix, start))

    lax.fori_loop(0, tiles * steps, load, None)


def _compute(problem: _Problem, out: Any, smem: _Shared) -> None:
    """The warpgroups that multiply."""
    plan, steps, warpgroup = problem.plan, problem.steps, lax.axis_index("warpgroup")
    split, first, tiles = _own(problem)
    rows = pl.ds(warpgroup * ROWS, ROWS)
    add = _add_groups if problem.groups else _add_bytes
    plgpu.barrier_wait(smem.x_ready)

    def visit(n: Array, _: None) -> None:
        def one(step: Array, total: Array) -> Array:
            slot = lax.rem(n * steps + step, plan.stages)
            plgpu.barrier_wait(smem.ready.at[slot])
            total = add(smem, slot, rows, step, total)
            plgpu.barrier_arrive(smem.free.at[slot])
            return total

        zeros = jnp.full((ROWS, COLUMNS), 0, jnp.float32)
        total = lax.fori_loop(0, steps, one, plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem.out[warpgroup] = total.sum(axis=1)  # the other columns are zeros
        plgpu.commit_smem()
        begin = (first + n * (plan.ctas // plan.splits)) * plan.tile + warpgroup * ROWS
        plgpu.copy_smem_to_gmem(smem.out.at[warpgroup], out.at[split, pl.ds(begin, ROWS)])

    lax.fori_loop(0, tiles, visit, None)
    plgpu.wait_smem_to_gmem(0)


def _ordered(x: Float[Array, "rows inputs"], halves: bool) -> Float[Array, "rows inputs"]:
    """The inputs in the order in which WGMMA combines them with the words of threads.

    A word has four of 16 inputs. Its pairs are adjacent bytes or, with int4, bytes that are two
    apart.
    """
    rows = len(x)
    if halves:
        parts = x.reshape(rows, -1, 2, 2, 2, 2).transpose(0, 1, 5, 3, 2, 4)
    else:
        parts = x.reshape(rows, -1, 2, 2, 2, 2).transpose(0, 1, 4, 3, 2, 5)
    return parts.reshape(x.shape)


def _product(left: Array, x: Any) -> Array:
    def multiply(acc: Any) -> Array:
        plgpu.wgmma(acc, left, x.T)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, COLUMNS), jnp.float32))


def _add_bytes(smem: _Shared, slot: Array, rows: Any, step: Array, total: Array) -> Array:
    words = plgpu.load(smem.values.at[slot, rows], layout=WORDS)
    wide = _widened(words, None, 0, STEP)
    return total + _product(wide, smem.x.at[:, pl.ds(step * STEP, STEP)])


def _add_groups(smem: _Shared, slot: Array, rows: Any, step: Array, total: Array) -> Array:
    groups = smem.scale.shape[1]
    width = STEP // groups  # bytes of a group
    words = plgpu.load(smem.values.at[slot, rows], layout=WORDS)
    for group in range(groups):
        zero = plgpu.load(smem.zero.at[slot, group, rows], layout=ROW)
        scale = plgpu.load(smem.scale.at[slot, group, rows], layout=ROW).astype(jnp.float32)
        zero = (-128 - zero.astype(jnp.float32)).astype(jnp.bfloat16)
        wide = _widened(words, zero, group * width, width)
        product = _product(
            wide, smem.x.at[:, pl.ds((step * groups + group) * 2 * width, 2 * width)]
        )
        total += product * lax.broadcast_in_dim(scale, product.shape, [0])
    return total


# Bytes that are two apart, or their halves: 0x4300 + q is 128 + q in bfloat16.
_HALF = """
{{
.reg .b32 half;
shr.b32 half, $1, {shift};
lop3.b32 half, half, 0x000f000f, 0x43004300, 0xea;
add.rn.bf16x2 $0, half, $2;
}}
"""
# 0x4300 and 7 bits are 128 + m; 0x4300, or 0x4380 with the sign in the exponent's lowest bit, is
# 128 or 256, and is subtracted.
_BYTE = """
{{
.reg .b32 pair, a, b;
prmt.b32 pair, $1, $1, 0x{bytes};
lop3.b32 a, pair, 0x007f007f, 0x43004300, 0xea;
lop3.b32 b, pair, 0x00800080, 0x43004300, 0xea;
sub.rn.bf16x2 $0, a, b;
}}
"""


def _widened(words: Array, zero: Array | None, first: int, width: int) -> Array:
    """Registers of `WORDS` converted to WGMMA's left operand in bfloat16; int4 minus its zeros.

    Args:
        words: [ROWS, STEP].
        first, width: range of bytes, in multiples of 16.
    """
    halves = zero is not None
    shape = (ROWS, 2 * width if halves else width)

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
        from_words = from_words[first // 16 : (first + width) // 16]
        wide = np.empty(to.registers_shape(shape), dtype=object)
        out = wide.reshape(-1, 2, 2)  # steps, halves of 16 inputs, and rows
        for (step, half, row), _ in np.ndenumerate(out):
            if halves:
                upper, number = divmod(step, len(from_words))
                ptx = _HALF.format(shift=8 * half + 4 * upper)
                operands, constraints = [from_words[number, row], subtracted[row]], "=r,r,r"
            else:
                low, high = 2 * half, 2 * half + 1
                ptx = _BYTE.format(bytes=f"{high}{high}{low}{low}")
                operands, constraints = [from_words[step, row]], "=r,r"
            out[step, half, row] = pair_of(llvm.inline_asm(i32, operands, ptx, constraints))
        return mgpu.FragmentedArray(_registers=wide, _layout=to, _is_signed=None)

    inline = plgpu.inline_mgpu(
        arg_types=(WORDS, ROW) if halves else (WORDS,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    return inline(convert)(*((words, zero) if halves else (words,)))
