"""A kernel for Hopper for products of a few rows with dense matrices, as in decoding.

Its time is that of reading the matrices, in place in their stacks. One warpgroup keeps several
steps of a tile in flight from the first moment on; the other multiplies on tensor cores, a tile's
outputs as WGMMA's rows and the rows of x as its eight columns. What surrounds a product in a
decoder layer costs a launch each otherwise, and is done on the way: RMSNorm of the rows before,
while the first steps arrive; the residual sum or SiLU's gate after.

The CTAs of a cluster share a tile's inputs. Their sums go through global memory to the first of
them, which adds them in order, so a result is the same every time.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dca_jax.device import MULTIPROCESSORS, SHARED_BYTES, current_device

INTERPRET = False  # tests set it: the kernel then runs on any device, in Pallas' GPU interpreter
ROWS = 8  # columns of WGMMA's right operand, at least
TILES, STEP = (256, 128, 64), 64  # outputs of a tile (of both matrices if gated); inputs of a step
SPLITS = (1, 2, 4, 8)  # CTAs of a cluster
STAGES = 3  # steps in flight, at least
BUSY, SHARE = 64, 2**19  # CTAs that keep the memory busy; bytes for which one more is worth while
MARGIN = 16384  # bytes of shared memory for sums, barriers and reductions
OUTPUTS = plgpu.Layout.WGMMA.reduce(1)
TURNED = plgpu.Layout.WGMMA_TRANSPOSED


class Norm(NamedTuple):
    """An RMSNorm of the rows, with one of the scales of all layers."""

    scale: Float[Array, "L inputs"]
    layer: Int[Array, ""]
    epsilon: float


class Plan(NamedTuple):
    """How a product is divided.

    Attributes:
        tile: outputs of a tile.
        splits: CTAs that share a tile's inputs.
        stages: number of steps in flight.
    """

    tile: int
    splits: int
    stages: int


class _Problem(NamedTuple):
    """The static parameters of a product.

    Attributes:
        plan: how it is divided.
        rows: number of rows.
        part: number of inputs per split.
        starts: the first tile of each matrix, and the end; of one matrix if they are `gated`.
        gated: whether the result is silu(x gate) * (x up).
        epsilon: that of the norm; None without one.
    """

    plan: Plan
    rows: int
    part: int
    starts: list[int]
    gated: bool
    epsilon: float | None


class _Refs(NamedTuple):
    """The kernel's arguments and results in global memory."""

    layer: Any  # [1]
    x: Any  # [rows, inputs]
    scale: Any  # [L, inputs], or None like its layer
    scale_layer: Any  # [1]
    residual: Any  # [rows, outputs], or None
    matrices: Any  # [L, inputs, outputs] each
    out: Any  # [rows, outputs of all]
    sums: Any  # [tiles, splits, products, rows, tile] float32; None of one split


class _Shared(NamedTuple):
    """Shared memory: tiles, then barriers."""

    x: Any  # [ROWS, inputs of a split]
    values: Any  # [stages, matrices of a tile, STEP, tile]
    out: Any  # [rows, tile]
    sums: Any  # [products, rows, tile] float32, or None
    x_ready: Any
    ready: Any
    free: Any
    summed: Any  # None of one split


def choose_plan(inputs: int, widths: Sequence[int], *, gated: bool = False) -> Plan | None:
    """A plan for these sizes; None if no tile divides them or shared memory is too small.

    All CTAs run at once if they can. There are `BUSY` of them, or more if each still reads `SHARE`
    bytes: the sums of a cluster cost time too. Of as many CTAs, those with the widest tiles have
    the longest runs of memory to read (measured on an H200).
    """
    found, each = [], 1 + gated
    useful = max(BUSY, 2 * inputs * sum(widths) // SHARE)
    for wide, splits in itertools.product(TILES, SPLITS):
        tile, part = wide // each, inputs // splits
        ctas = sum(widths) // wide * splits
        stages = min((SHARED_BYTES - MARGIN - part * ROWS * 2) // (wide * STEP * 2), part // STEP)
        divided = inputs % math.lcm(splits * STEP, 128) == 0 and math.gcd(tile, *widths) == tile
        if divided and tile >= TILES[-1] and stages >= STAGES:
            rounds = -(-ctas // MULTIPROCESSORS)
            found.append((rounds, -min(ctas, useful), ctas, -tile, Plan(tile, splits, stages)))
    return min(found)[-1] if found else None


def can_multiply(x: Any, matrices: Sequence[Any], *, gated: bool = False) -> bool:
    """Whether the kernel runs here with these rows and stacks of matrices (or their shapes)."""
    capability = (9, 0) if INTERPRET else current_device().capability
    return (
        capability is not None
        and capability[0] == 9  # WGMMA
        and len(x) <= ROWS
        and x.dtype in (jnp.bfloat16, jnp.float16)
        and all(matrix.dtype == x.dtype for matrix in matrices)
        and choose_plan(x.shape[1], [m.shape[2] for m in matrices], gated=gated) is not None
    )


def multiply(
    x: Float[Array, "rows inputs"],
    stacks: Sequence[Float[Array, "L inputs _"]],
    layer: Int[Array, ""],
    *,
    norm: Norm | None = None,
    residual: Float[Array, "rows outputs"] | None = None,
    gated: bool = False,
    plan: Plan | None = None,
) -> tuple[Float[Array, "rows _"], ...]:
    """x times matrix `layer` of each stack, in the dtype of x, in one launch.

    Args:
        x: up to `ROWS` rows.
        norm: normalizes the rows first.
        residual: is added to the product with a single matrix.
        gated: the stacks are two, gate and up, and the only result is silu(x gate) * (x up).
        plan: how to divide the product (default: that of `choose_plan`).
    """
    widths = [stack.shape[2] for stack in stacks]
    plan = plan or choose_plan(x.shape[1], widths, gated=gated)
    assert plan is not None, "as `can_multiply` says"
    widths = widths[: len(widths) // (1 + gated)]
    problem = _Problem(
        plan=plan,
        rows=len(x),
        part=x.shape[1] // plan.splits,
        starts=list(itertools.accumulate((width // plan.tile for width in widths), initial=0)),
        gated=gated,
        epsilon=None if norm is None else norm.epsilon,
    )
    of_norm = (None, None) if norm is None else (norm.scale, _one(norm.layer))
    out = _launch((_one(layer), x, *of_norm, residual, list(stacks)), problem)
    return tuple(jnp.split(out, list(itertools.accumulate(widths))[:-1], axis=1))


def _one(number: Int[Array, ""]) -> Int[Array, " 1"]:
    return number.astype(jnp.int32).reshape(1)


def _launch(arrays: tuple[Any, ...], problem: _Problem) -> Float[Array, "rows outputs"]:
    plan, each = problem.plan, 1 + problem.gated
    x, tiles = arrays[1], problem.starts[-1]
    out = [jax.ShapeDtypeStruct((problem.rows, tiles * plan.tile), x.dtype), None]
    shared = _Shared(
        x=plgpu.SMEM((ROWS, problem.part), x.dtype),
        values=plgpu.SMEM((plan.stages, each, STEP, plan.tile), x.dtype),
        out=plgpu.SMEM((problem.rows, plan.tile), x.dtype),
        x_ready=plgpu.Barrier(),
        ready=plgpu.Barrier(num_arrivals=each, num_barriers=plan.stages),
        free=plgpu.Barrier(num_barriers=plan.stages),
        sums=None,
        summed=None,
    )
    if plan.splits > 1:
        sums = each, problem.rows, plan.tile
        out[1] = jax.ShapeDtypeStruct((tiles, plan.splits, *sums), jnp.float32)
        shared = shared._replace(
            sums=plgpu.SMEM(sums, jnp.float32),
            summed=plgpu.ClusterBarrier(collective_axes=("split",)),
        )
    tree = jax.tree.structure((_Refs(*arrays, *out), shared))

    def kernel(*refs: Any) -> None:
        gmem, smem = jax.tree.unflatten(tree, refs)
        pl.when(lax.axis_index("warpgroup") == 1)(lambda: _feed(problem, gmem, smem))
        pl.when(lax.axis_index("warpgroup") == 0)(lambda: _compute(problem, gmem, smem))

    return plgpu.kernel(
        kernel,
        out_type=tuple(jax.tree.leaves(out)),
        grid=(tiles,),
        grid_names=("tile",),
        cluster=(plan.splits,),
        cluster_names=("split",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="dca_dense_rows",
        scratch_types=jax.tree.leaves(shared),
        interpret=plgpu.InterpretGPUParams() if INTERPRET else None,
    )(*jax.tree.leaves(arrays))[0]


def _feed(problem: _Problem, gmem: _Refs, smem: _Shared) -> None:
    """The warpgroup that keeps steps in flight."""
    plan, tile = problem.plan, lax.axis_index("tile")
    begin, layer = lax.axis_index("split") * problem.part, gmem.layer[0]

    def load(n: Array, _: None) -> None:
        slot = lax.rem(n, plan.stages)
        pl.when(n >= plan.stages)(lambda: plgpu.barrier_wait(smem.free.at[slot]))
        inputs = pl.ds(begin + n * STEP, STEP)

        def load_from(matrices: Sequence[Any], start: int) -> None:
            outputs = pl.ds((tile - start) * plan.tile, plan.tile)
            for number, matrix in enumerate(matrices):
                values = matrix.at[layer, inputs, outputs]
                plgpu.copy_gmem_to_smem(values, smem.values.at[slot, number], smem.ready.at[slot])

        _for_own(problem, gmem, tile, load_from)

    lax.fori_loop(0, problem.part // STEP, load, None)


def _for_own(problem: _Problem, gmem: _Refs, tile: Array, do: Callable[..., None]) -> None:
    """Calls do(matrices of a tile, their first tile)."""
    if problem.gated:
        do(gmem.matrices, 0)
        return
    for matrix, (start, stop) in zip(
        gmem.matrices, itertools.pairwise(problem.starts), strict=True
    ):
        pl.when((tile >= start) & (tile < stop))(lambda m=matrix, s=start: do([m], s))


def _compute(problem: _Problem, gmem: _Refs, smem: _Shared) -> None:
    """The warpgroup that multiplies."""
    plan, each, steps = problem.plan, 1 + problem.gated, problem.part // STEP
    tile, split = lax.axis_index("tile"), lax.axis_index("split")
    outputs = pl.ds(tile * plan.tile, plan.tile)
    _place_rows(problem, gmem, smem, split * problem.part)

    def add_steps(*accs: Any) -> tuple[Array, ...]:
        def add(n: Array, _: None) -> None:
            slot = lax.rem(n, plan.stages)
            plgpu.barrier_wait(smem.ready.at[slot])
            x = smem.x.at[:, pl.ds(n * STEP, STEP)]
            for number, acc in enumerate(accs):
                plgpu.wgmma(acc, smem.values.at[slot, number].T, x.T)
            plgpu.wgmma_wait(0)
            pl.when(n < steps - plan.stages)(lambda: plgpu.barrier_arrive(smem.free.at[slot]))

        lax.fori_loop(0, steps, add, None)
        return tuple(acc[...] for acc in accs)

    acc = plgpu.WGMMAAccumulatorRef((plan.tile, ROWS), jnp.float32)
    sums = [_by_row(total, problem.rows) for total in pl.run_scoped(add_steps, *[acc] * each)]
    places = list(itertools.product(range(each), range(problem.rows)))
    if plan.splits > 1:

        def give() -> None:
            for number, row in places:
                smem.sums[number, row] = sums[number][row]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem.sums, gmem.sums.at[tile, split])
            plgpu.wait_smem_to_gmem(0)

        pl.when(split > 0)(give)
        plgpu.barrier_arrive(smem.summed)
        plgpu.barrier_wait(smem.summed)

    def finish() -> None:
        for other in range(1, plan.splits):
            for number, row in places:
                part = gmem.sums.at[tile, other, number, row]
                sums[number][row] += plgpu.load(part, layout=OUTPUTS, optimized=False)
        _store(problem, gmem, smem, outputs, sums)

    pl.when(split == 0)(finish)


def _by_row(total: Float[Array, "tile ROWS"], rows: int) -> list[Float[Array, " tile"]]:
    """The columns of a tile's sums, each with all threads that have its outputs."""
    column = plgpu.broadcasted_iota(jnp.int32, total.shape, 1, layout=plgpu.Layout.WGMMA)
    return [jnp.where(column == row, total, 0).sum(axis=1) for row in range(rows)]


def _place_rows(problem: _Problem, gmem: _Refs, smem: _Shared, begin: Array) -> None:
    """Loads a split's part of the rows into shared memory, and normalizes it there.

    Rows that there are not are zeros.
    """
    part, inputs = pl.ds(begin, problem.part), gmem.x.shape[1]
    first = lax.axis_index("tile") * 0
    plgpu.copy_gmem_to_smem(gmem.x.at[pl.ds(first, ROWS), part], smem.x, smem.x_ready)
    if problem.epsilon is None:
        plgpu.barrier_wait(smem.x_ready)
        return
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=TURNED.reduce(0))
    inverse = plgpu.layout_cast(jnp.full((ROWS,), 0, jnp.float32), TURNED.reduce(0))
    for number in range(problem.rows):
        vector = math.gcd(inputs // 128, 8)
        layout = plgpu.Layout.WG_STRIDED((inputs,), vec_size=vector)
        full = plgpu.load(gmem.x.at[number], layout=layout).astype(jnp.float32)
        root = lax.rsqrt(jnp.sum(full * full) / inputs + problem.epsilon)
        inverse = jnp.where(row == number, root, inverse)
    plgpu.barrier_wait(smem.x_ready)
    size = math.gcd(problem.part, 512)

    def normalize(n: Array, _: None) -> None:
        chunk = pl.ds(n * size, size)
        x = plgpu.load(smem.x.at[:, chunk].T, layout=TURNED)
        own = gmem.scale.at[gmem.scale_layer[0], pl.ds(begin + n * size, size)]
        scale = plgpu.load(own, layout=TURNED.reduce(1), optimized=False)
        normed = x.astype(jnp.float32) * lax.broadcast_in_dim(inverse, x.shape, [1])
        scaled = normed.astype(x.dtype) * lax.broadcast_in_dim(scale, x.shape, [0])
        smem.x.at[:, chunk].T[...] = scaled

    lax.fori_loop(0, problem.part // size, normalize, None)
    plgpu.commit_smem()


def _store(
    problem: _Problem, gmem: _Refs, smem: _Shared, outputs: Any, sums: Sequence[Sequence[Array]]
) -> None:
    """Finishes a tile's float32 sums, rounds them once, and stores them."""
    for row, (total, *up) in enumerate(zip(*sums, strict=True)):
        if up:
            total = total / (1 + jnp.exp(-total)) * up[0]
        if gmem.residual is not None:
            before = gmem.residual.at[row, outputs]
            total += plgpu.load(before, layout=OUTPUTS, optimized=False).astype(jnp.float32)
        smem.out[row] = total.astype(smem.out.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.out, gmem.out.at[:, outputs])
    plgpu.wait_smem_to_gmem(0)
