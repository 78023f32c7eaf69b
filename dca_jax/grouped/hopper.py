"""Grouped products on Hopper: persistent CTAs compute tiles of the result one after another.

One of three warpgroups keeps `num_stages` steps of both operands in flight, from tile to tile
without a pause; the two others compute 64 rows of the tile each. Three products have this form:

    y = x W          tiles of a block's rows, and of W's columns; steps along W's rows
    dx = dy W^T      the same, with W read the other way
    dW = x^T dy      tiles of a group's matrix; steps along the group's rows
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dca_jax.device import multiprocessors
from dca_jax.grouped.gradient import differentiable, in_stack
from dca_jax.grouped.layout import HOPPER_BLOCK as BLOCK
from dca_jax.grouped.layout import HOPPER_TILE as TILE
from dca_jax.grouped.layout import block_ends, group_of_block

DEPTH = 64  # depth of a step
WARPGROUPS = 2  # computing warpgroups
WARPGROUP_ROWS = BLOCK // WARPGROUPS
PART = 64  # columns that are written at once


class _Problem(NamedTuple):
    """The static parameters of a product.

    Attributes:
        tiles: function from the tables to the number of tiles.
        steps: function from the tables and a tile's number to its steps.
        operands: function that returns the parts of both operands for a step of a tile.
        target: function that returns a tile's rows and first column in the result.
        multiply: adds a step's product to the accumulator of a warpgroup's rows.
        width: number of columns of a tile.
        ctas: number of CTAs, which share the tiles.
        num_stages: number of steps in flight.
    """

    tiles: Callable[[Any], Array]
    steps: Callable[[Any, Array], Any]
    operands: Callable[[Any, Any, Any, Array, Array], tuple[Any, Any]]
    target: Callable[[Any, Any, Array], tuple[Any, Array]]
    multiply: Callable[[Any, Any, Any, Array], None]
    shapes: tuple[tuple[int, int], tuple[int, int]]
    width: int
    ctas: int
    num_stages: int = 4


class _Shared(NamedTuple):
    """Shared memory: tiles, then barriers."""

    a: Any  # [num_stages, *]
    b: Any  # [num_stages, *]
    out: Any  # [WARPGROUPS, 2, WARPGROUP_ROWS, PART]
    ready: Any
    free: Any


def _run(
    problem: _Problem, out: jax.ShapeDtypeStruct, tables: Array, a: Array, b: Array, name: str
) -> Array:
    """The result of a product; `tables` are int32."""
    num_stages, (a_shape, b_shape) = problem.num_stages, problem.shapes

    def kernel(tables: Any, a: Any, b: Any, y: Any, *smem: Any) -> None:
        shared, warpgroup = _Shared(*smem), lax.axis_index("warpgroup")
        pl.when(warpgroup == WARPGROUPS)(lambda: _feed(problem, tables, a, b, shared))
        pl.when(warpgroup < WARPGROUPS)(lambda: _compute(problem, tables, y, shared))

    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(problem.ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        scratch_types=_Shared(
            a=plgpu.SMEM((num_stages, *a_shape), a.dtype),
            b=plgpu.SMEM((num_stages, *b_shape), b.dtype),
            out=plgpu.SMEM((WARPGROUPS, 2, WARPGROUP_ROWS, PART), out.dtype),
            ready=plgpu.Barrier(num_arrivals=2, num_barriers=num_stages),
            free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=num_stages),
        ),
    )(tables, a, b)


def _each_tile(problem: _Problem, tables: Any, visit: Callable[[Array, Any, Array], None]) -> None:
    """Calls visit(tile, its steps, steps before it) for this CTA's tiles."""
    cta = lax.axis_index("cta")
    count = lax.div(problem.tiles(tables) - cta + (problem.ctas - 1), problem.ctas)

    def one(n: Array, done: Array) -> Array:
        tile = cta + n * problem.ctas
        steps = problem.steps(tables, tile)
        visit(tile, steps, done)
        return done + steps

    lax.fori_loop(0, count, one, jnp.int32(0))


def _feed(problem: _Problem, tables: Any, a: Any, b: Any, smem: _Shared) -> None:
    """The warpgroup that keeps steps in flight."""
    plgpu.set_max_registers(40, action="decrease")

    def visit(tile: Array, steps: Any, done: Array) -> None:
        def load(step: Array, _: None) -> None:
            n = done + step
            slot = lax.rem(n, problem.num_stages)
            pl.when(n >= problem.num_stages)(partial(plgpu.barrier_wait, smem.free.at[slot]))
            sources = problem.operands(tables, a, b, tile, step)
            for source, target in zip(sources, (smem.a, smem.b), strict=True):
                plgpu.copy_gmem_to_smem(source, target.at[slot], smem.ready.at[slot])

        lax.fori_loop(0, steps, load, None)

    _each_tile(problem, tables, visit)


def _compute(problem: _Problem, tables: Any, y: Any, smem: _Shared) -> None:
    """The warpgroups that multiply."""
    plgpu.set_max_registers(232, action="increase")
    warpgroup = lax.axis_index("warpgroup")

    def visit(tile: Array, steps: Any, done: Array) -> None:
        def multiplied(acc: Any) -> Array:
            def one(step: Array, _: None) -> None:
                slot = lax.rem(done + step, problem.num_stages)
                plgpu.barrier_wait(smem.ready.at[slot])
                problem.multiply(acc, smem.a.at[slot], smem.b.at[slot], warpgroup)
                plgpu.wgmma_wait(1)  # the previous step has finished with its operands

                @pl.when(step > 0)
                def _release() -> None:
                    last = lax.rem(done + step + (problem.num_stages - 1), problem.num_stages)
                    plgpu.barrier_arrive(smem.free.at[last])

            lax.fori_loop(0, steps, one, None)
            return acc[...]

        shape = (WARPGROUP_ROWS, problem.width)
        acc = pl.run_scoped(multiplied, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))

        @pl.when(jnp.int32(steps) > 0)
        def _release_last() -> None:
            last = lax.rem(done + steps - 1, problem.num_stages)
            plgpu.barrier_arrive(smem.free.at[last])

        rows, column = problem.target(tables, y, tile)
        narrow = acc.astype(smem.out.dtype)
        for part in range(problem.width // PART):
            staged = smem.out.at[warpgroup, part % 2]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            staged[...] = narrow[:, part * PART : (part + 1) * PART]
            plgpu.commit_smem()
            columns = pl.ds(column + part * PART, PART)
            own = rows.at[pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), columns]
            plgpu.copy_smem_to_gmem(staged, own)

    _each_tile(problem, tables, visit)
    plgpu.wait_smem_to_gmem(0)


# --- the three products --------------------------------------------------------------------------


def _width(size: int) -> int:
    """Columns of a tile."""
    return 256 if size % 256 == 0 else TILE


def _multiply(
    x: Float[Array, "places n"],
    kernels: Float[Array, "LE inputs outputs"],
    first: Int[Array, ""],
    sizes: Int[Array, " E"],
    *,
    transposed: bool,
) -> Float[Array, "places m"]:
    """Blocks of rows times their matrices; the first group's matrix has number `first`."""
    places, inner = x.shape
    outputs = kernels.shape[1 if transposed else 2]
    width = _width(outputs)
    across = outputs // width
    _, ends = block_ends(sizes, BLOCK)
    # The number of blocks, then the number of each block's matrix.
    tables = jnp.concatenate([ends[-1:], first + group_of_block(ends, places // BLOCK)])

    def operands(tables: Any, x: Any, w: Any, tile: Array, step: Array) -> tuple[Any, Any]:
        block, columns = lax.div(tile, across), pl.ds(lax.rem(tile, across) * width, width)
        depth = pl.ds(step * DEPTH, DEPTH)
        matrix = w.at[tables[block + 1]]
        own = matrix.at[columns, depth] if transposed else matrix.at[depth, columns]
        return x.at[pl.ds(block * BLOCK, BLOCK), depth], own

    def target(tables: Any, y: Any, tile: Array) -> tuple[Any, Array]:
        rows = y.at[pl.ds(lax.div(tile, across) * BLOCK, BLOCK)]
        return rows, lax.rem(tile, across) * width

    def multiply(acc: Any, a: Any, b: Any, warpgroup: Array) -> None:
        rows = a.at[pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)]
        plgpu.wgmma(acc, rows, b.T if transposed else b)

    problem = _Problem(
        tiles=lambda tables: tables[0] * across,
        steps=lambda tables, tile: inner // DEPTH,
        operands=operands,
        target=target,
        multiply=multiply,
        shapes=((BLOCK, DEPTH), (width, DEPTH) if transposed else (DEPTH, width)),
        width=width,
        ctas=multiprocessors(),
    )
    out = jax.ShapeDtypeStruct((places, outputs), x.dtype)
    return _run(problem, out, tables, x, kernels, "grouped_product")


def _outer(
    x: Float[Array, "places inputs"],
    dy: Float[Array, "places outputs"],
    sizes: Int[Array, " E"],
    dtype: Any,
) -> Float[Array, "E inputs outputs"]:
    """Each group's rows of x, transposed, times those of dy."""
    inputs, outputs = x.shape[1], dy.shape[1]
    width = _width(outputs)
    down, across = inputs // TILE, outputs // width
    counts, ends = block_ends(sizes, BLOCK)
    # Each group's first block, and its number of blocks.
    tables = jnp.stack([ends - counts, counts], axis=1)

    def operands(tables: Any, x: Any, dy: Any, tile: Array, step: Array) -> tuple[Any, Any]:
        group, rest = lax.div(tile, down * across), lax.rem(tile, down * across)
        rows = pl.ds(tables[group, 0] * BLOCK + step * DEPTH, DEPTH)
        own = x.at[rows, pl.ds(lax.div(rest, across) * TILE, TILE)]
        return own, dy.at[rows, pl.ds(lax.rem(rest, across) * width, width)]

    def target(tables: Any, y: Any, tile: Array) -> tuple[Any, Array]:
        group, rest = lax.div(tile, down * across), lax.rem(tile, down * across)
        rows = y.at[group].at[pl.ds(lax.div(rest, across) * TILE, TILE)]
        return rows, lax.rem(rest, across) * width

    def multiply(acc: Any, a: Any, b: Any, warpgroup: Array) -> None:
        columns = a.at[:, pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)]
        plgpu.wgmma(acc, columns.T, b)

    problem = _Problem(
        tiles=lambda tables: jnp.int32(len(sizes) * down * across),
        steps=lambda tables, tile: tables[lax.div(tile, down * across), 1] * (BLOCK // DEPTH),
        operands=operands,
        target=target,
        multiply=multiply,
        shapes=((DEPTH, TILE), (DEPTH, width)),
        width=width,
        ctas=multiprocessors(),
        num_stages=4 if jnp.dtype(dtype).itemsize == 2 else 3,  # because the result is larger
    )
    out = jax.ShapeDtypeStruct((len(sizes), inputs, outputs), dtype)
    return _run(problem, out, tables, x, dy, "grouped_outer")


def _by_group(
    x: Array, kernels: Array, layer: Array, sizes: Array, block: int, *, transposed: bool
) -> Array:
    del block  # always BLOCK
    groups = kernels.shape[1]
    if kernels.dtype != x.dtype:
        kernels = lax.dynamic_index_in_dim(kernels, layer).astype(x.dtype)
        layer = jnp.int32(0)
    flat = kernels.reshape(-1, *kernels.shape[2:])
    return _multiply(x, flat, layer * groups, sizes, transposed=transposed)


def _outer_in_stack(
    x: Array, dy: Array, kernels: Array, layer: Array, sizes: Array, block: int
) -> Array:
    del block
    return in_stack(_outer(x, dy, sizes, kernels.dtype), kernels, layer)


mosaic_gpu = differentiable(_by_group, _outer_in_stack)  # of 16 bits, in blocks of `BLOCK`
