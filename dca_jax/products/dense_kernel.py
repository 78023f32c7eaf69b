"""A kernel for Hopper for products of a few rows with dense matrices, as in decoding.

Its time is that of reading the matrices, in place in their stacks. One warpgroup keeps several
steps of a tile in flight from the first moment on; the other multiplies on tensor cores, a tile's
outputs as WGMMA's rows and the rows of x as its eight columns. Rows are normalized while the first
steps arrive; a residual is added or SiLU's gate applied before sums are rounded.

The CTAs of a cluster share a tile's inputs. They write their sums into the shared memory of the
first of them, which adds them in order, so a result is the same every time.
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
from jaxtyping import Array, Float

from dca_jax.products.dense_plan import ROWS, STEP, Plan

OUTPUTS = plgpu.Layout.WGMMA.reduce(1)
TURNED = plgpu.Layout.WGMMA_TRANSPOSED


class Problem(NamedTuple):
    """The static parameters of a product.

    Attributes:
        plan: how it is divided.
        rows: number of rows.
        part: number of inputs of a CTA.
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

    @property
    def each(self) -> int:
        """Matrices of a tile."""
        return 1 + self.gated

    @property
    def has_norm(self) -> bool:
        """Whether rows are normalized first; if not, they arrive step by step."""
        return self.epsilon is not None


class _Refs(NamedTuple):
    """The kernel's arguments and results in global memory."""

    layer: Any  # [1]
    x: Any  # [rows, inputs]
    scale: Any  # [L, inputs], or None like its layer
    scale_layer: Any  # [1]
    residual: Any  # [rows, outputs], or None
    matrices: Any  # [L, inputs, outputs] each
    out: Any  # [rows, outputs of all]


class _Shared(NamedTuple):
    """Shared memory: tiles, then barriers."""

    x: Any  # [ROWS, inputs of a CTA] with a norm, [stages, ROWS, STEP] without
    values: Any  # [stages, matrices of a tile, STEP, tile]
    sums: Any  # [other CTAs of the cluster, matrices of a tile, tile, ROWS] float32, or None
    out: Any  # [rows, tile]
    x_ready: Any  # None without a norm
    ready: Any
    free: Any
    summed: Any  # None like `sums`


def launch(
    arrays: tuple[Any, Any, Any, Any, Any, Any], problem: Problem, *, interpret: bool
) -> Float[Array, "rows outputs"]:
    """The products; `arrays` are those of `_Refs` but the result."""
    plan, each, has_norm = problem.plan, problem.each, problem.has_norm
    x, tiles, others = arrays[1], problem.starts[-1], problem.plan.splits - 1
    out = jax.ShapeDtypeStruct((problem.rows, tiles * plan.tile), x.dtype)
    rows = (ROWS, problem.part) if has_norm else (plan.stages, ROWS, STEP)
    shared = _Shared(
        x=plgpu.SMEM(rows, x.dtype),
        values=plgpu.SMEM((plan.stages, each, STEP, plan.tile), x.dtype),
        sums=plgpu.SMEM((others, each, plan.tile, ROWS), jnp.float32) if others else None,
        out=plgpu.SMEM((problem.rows, plan.tile), x.dtype),
        x_ready=plgpu.Barrier() if has_norm else None,
        ready=plgpu.Barrier(num_arrivals=each + (not has_norm), num_barriers=plan.stages),
        free=plgpu.Barrier(num_barriers=plan.stages),
        summed=plgpu.Barrier(num_arrivals=others * each) if others else None,
    )
    tree = jax.tree.structure((_Refs(*arrays, out), shared))

    def kernel(*refs: Any) -> None:
        gmem, smem = jax.tree.unflatten(tree, refs)
        pl.when(lax.axis_index("warpgroup") == 1)(lambda: _feed(problem, gmem, smem))
        pl.when(lax.axis_index("warpgroup") == 0)(lambda: _compute(problem, gmem, smem))

    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(tiles,),
        grid_names=("tile",),
        cluster=(plan.splits,),
        cluster_names=("split",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="dca_dense_rows",
        scratch_types=jax.tree.leaves(shared),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*jax.tree.leaves(arrays))


def _feed(problem: Problem, gmem: _Refs, smem: _Shared) -> None:
    """The warpgroup that keeps steps in flight."""
    plan, tile, layer = problem.plan, lax.axis_index("tile"), gmem.layer[0]
    begin = lax.axis_index("split") * problem.part

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
        if not problem.has_norm:
            x = gmem.x.at[_all_rows(), inputs]
            plgpu.copy_gmem_to_smem(x, smem.x.at[slot], smem.ready.at[slot])

    lax.fori_loop(0, problem.part // STEP, load, None)


def _all_rows() -> Any:
    """The rows of WGMMA's operand. TMA fills those that x does not have with zeros.

    A traced start, because Pallas refuses a static slice that is longer than x.
    """
    return pl.ds(lax.axis_index("tile") * 0, ROWS)


def _for_own(problem: Problem, gmem: _Refs, tile: Array, do: Callable[..., None]) -> None:
    """Calls do(matrices of a tile, their first tile)."""
    if problem.gated:
        do(gmem.matrices, 0)
        return
    for matrix, (start, stop) in zip(
        gmem.matrices, itertools.pairwise(problem.starts), strict=True
    ):
        pl.when((tile >= start) & (tile < stop))(lambda m=matrix, s=start: do([m], s))


def _compute(problem: Problem, gmem: _Refs, smem: _Shared) -> None:
    """The warpgroup that multiplies."""
    plan, steps = problem.plan, problem.part // STEP
    if problem.has_norm:
        _place_rows(problem, gmem, smem)

    def add_steps(*accs: Any) -> tuple[Array, ...]:
        def add(n: Array, _: None) -> None:
            slot = lax.rem(n, plan.stages)
            plgpu.barrier_wait(smem.ready.at[slot])
            here = (slice(None), pl.ds(n * STEP, STEP))
            x = smem.x.at[here if problem.has_norm else slot]
            for number, acc in enumerate(accs):
                plgpu.wgmma(acc, smem.values.at[slot, number].T, x.T)
            plgpu.wgmma_wait(0)
            pl.when(n < steps - plan.stages)(lambda: plgpu.barrier_arrive(smem.free.at[slot]))

        lax.fori_loop(0, steps, add, None)
        return tuple(acc[...] for acc in accs)

    acc = plgpu.WGMMAAccumulatorRef((plan.tile, ROWS), jnp.float32)
    sums = pl.run_scoped(add_steps, *[acc] * problem.each)
    if plan.splits == 1:
        _store(problem, gmem, smem, sums)
        return
    split = lax.axis_index("split")
    pl.when(split > 0)(lambda: _give(smem, split, sums))
    pl.when(split == 0)(lambda: _take(problem, gmem, smem, sums))


def _give(smem: _Shared, split: Array, sums: Sequence[Float[Array, "tile ROWS"]]) -> None:
    """Writes this CTA's sums into the shared memory of the cluster's first CTA.

    Its barrier counts the bytes as they arrive. (Through global memory, as in an earlier version,
    a CTA could read before another one's sums were there.)
    """
    first = {"cluster_dim": "split", "cluster_idx": jnp.int32(0)}
    for number, total in enumerate(sums):
        target = smem.sums.at[split - 1, number]
        plgpu.async_store_smem(total, target, smem.summed, optimized=False, **first)


def _take(
    problem: Problem, gmem: _Refs, smem: _Shared, sums: Sequence[Float[Array, "tile ROWS"]]
) -> None:
    """Adds the other CTAs' sums to those of the first one, in order, and stores the result."""
    plgpu.barrier_wait(smem.summed)
    totals = list(sums)
    for other in range(problem.plan.splits - 1):
        for number in range(problem.each):
            totals[number] += plgpu.load(smem.sums.at[other, number], layout=plgpu.Layout.WGMMA)
    _store(problem, gmem, smem, totals)


def _by_row(total: Float[Array, "tile ROWS"], rows: int) -> list[Float[Array, " tile"]]:
    """The columns of a tile's sums, each with all threads that have its outputs."""
    column = plgpu.broadcasted_iota(jnp.int32, total.shape, 1, layout=plgpu.Layout.WGMMA)
    return [jnp.where(column == row, total, 0).sum(axis=1) for row in range(rows)]


def _place_rows(problem: Problem, gmem: _Refs, smem: _Shared) -> None:
    """Loads this CTA's part of the rows into shared memory, and normalizes it there."""
    begin, inputs = lax.axis_index("split") * problem.part, gmem.x.shape[1]
    x = gmem.x.at[_all_rows(), pl.ds(begin, problem.part)]
    plgpu.copy_gmem_to_smem(x, smem.x, smem.x_ready)
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
    problem: Problem, gmem: _Refs, smem: _Shared, sums: Sequence[Float[Array, "tile ROWS"]]
) -> None:
    """Finishes a tile's float32 sums, rounds them once, and stores them."""
    tile = problem.plan.tile
    outputs = pl.ds(lax.axis_index("tile") * tile, tile)
    by_row = [_by_row(total, problem.rows) for total in sums]
    for row, (total, *up) in enumerate(zip(*by_row, strict=True)):
        if up:
            total = total / (1 + jnp.exp(-total)) * up[0]
        if gmem.residual is not None:
            before = gmem.residual.at[row, outputs]
            total += plgpu.load(before, layout=OUTPUTS, optimized=False).astype(jnp.float32)
        smem.out[row] = total.astype(smem.out.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.out, gmem.out.at[:, outputs])
    plgpu.wait_smem_to_gmem(0)
