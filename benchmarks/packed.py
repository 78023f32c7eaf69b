"""Packed weights: products of a few rows with one matrix.

    python benchmarks/packed.py matrices --out outputs/packed-matrices.json
    python benchmarks/packed.py matrices --rows 1 --forms int8,int4:128 --only 70B-gate,70B-down

`matrices` times x @ packed for the matrices of Llama-3-8B and Llama-2-70B. It goes through several
layers of a stack, so that no matrix is in the device's cache. Compared are our kernels with several
tiles; for one row on Hopper also `dca_jax.products.packed_row` with several plans; the model's
choice among them ("ours"); XLA's own variants; and bfloat16. `share` is the time that reading the
matrix once takes at the device's copy bandwidth, divided by the measured time. `error` is the
largest difference from the product with the unpacked float32 matrix, divided by the largest value.

The plans for one row are compiled for an H200 in `tests/gpu_aot/test_h200_packed.py`; they have not
been timed with this script.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from common import (
    Report,
    copy_bandwidth,
    machine,
    numbers,
    on_gpu,
    reason,
    require_live_device,
    show,
)

from dca_jax.device import SHARED_BYTES, current_device
from dca_jax.distributed import exit_on_input_error
from dca_jax.inference.compiled import GPU_OPTIONS
from dca_jax.products import few_rows, packed_row
from dca_jax.products.few_rows import Tile
from dca_jax.products.packed import Packed, pack
from dca_jax.products.packed_row import Plan

MATRICES = {
    "8B-qo": (4096, 4096),
    "8B-kv": (4096, 1024),
    "8B-gate": (4096, 14_336),
    "8B-down": (14_336, 4096),
    "8B-head": (4096, 128_256),
    "70B-gate": (8192, 28_672),
    "70B-down": (28_672, 8192),
}
TINY = {"tiny": (256, 128)}
STACK = 16  # layers in turn; fewer of large matrices
STACK_BYTES = 2**30
COLUMNS = ("matrix", "weights", "rows", "way", "us", "share", "error")

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.callback()
def main() -> None:
    """Makes `matrices` a subcommand."""


@app.command()
@exit_on_input_error()
def matrices(
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/packed-matrices.json"
    ),
    minutes: Annotated[
        float, typer.Option(help="Start nothing further after this many minutes.")
    ] = math.inf,
    only: Annotated[str, typer.Option(help="Matrices, separated by commas.")] = ",".join(MATRICES),
    forms: Annotated[
        str, typer.Option(help="Values separated by commas.")
    ] = "bfloat16,int8,int4:128,int4,int4:32,fp8",
    rows: Annotated[str, typer.Option(help="Rows of x, separated by commas.")] = "1,4,16",
    tiny: Annotated[bool, typer.Option(help="Run one small matrix in the interpreter.")] = False,
) -> None:
    """Times each packed form of each matrix with each implementation."""
    few_rows.INTERPRET = not on_gpu()
    counts = sorted(numbers(rows))
    report = Report(out, {"benchmark": "packed matrices"} | machine(), minutes=minutes)
    rate = copy_bandwidth(0.01 if tiny else 2.0)
    report.facts["copy GB/s"] = rate / 1e9
    print(f"copy {rate / 1e9:.0f} GB/s", flush=True)
    chosen = TINY if tiny else {name: MATRICES[name] for name in only.split(",")}
    for name, shape in chosen.items():
        for form in forms.split(","):
            if report.out_of_time():
                break
            try:
                for row in _time_matrix(shape, form, rate, counts):
                    report.add({"matrix": name, "weights": form} | row)
            except Exception as error:
                report.add({"matrix": name, "weights": form, "failed": reason(error)})
            require_live_device()
    told = [row for row in report.rows if row.get("best") or "failed" in row]
    show(f"Packed matrices on {report.facts['device']}", COLUMNS, told)


def _time_matrix(
    shape: tuple[int, int], form: str, rate: float, counts: list[int]
) -> Iterator[dict[str, Any]]:
    """Times every implementation with one row, then the fastest with more rows."""
    inputs, outputs = shape
    layers = max(2, min(STACK, STACK_BYTES // (inputs * outputs)))
    stack = _random_stack(layers, shape, form)
    x = jax.random.normal(jax.random.key(1), (16, inputs), jnp.bfloat16)
    parts = jax.tree.leaves(stack)
    seconds = sum(part.nbytes for part in parts) / layers / rate
    if form == "bfloat16":
        ways: dict[str, Callable] = {"dot": _dot}
    else:
        ways = {"unpacked, dot": _unpacked_dot, "XLA sum": _fused, "ours": _multiply}
        ways |= {
            "kernel {}x{} /{} w{} s{}".format(*tile): partial(_multiply, tile=tile)
            for tile in _tiles(shape, form)
        }
    for rows in counts:
        found: list[tuple[float, str]] = []
        ways = {way: ways[way] for way in ways if not way.startswith("row ")}
        if rows == 1:
            ways |= {
                "row /{} w{} s{}".format(*plan): partial(_multiply_row, plan=plan)
                for plan in row_plans(shape, form)
            }
        for way, row in _time_ways(ways, x[:rows], stack, layers):
            if "us" in row:
                found.append((row["us"], way))
                row["share"] = seconds * 1e6 / row["us"]
            yield {"rows": rows, "way": way} | row
        best = [way for _, way in sorted(found) if way.startswith("kernel ")][:2]
        best_row = [way for _, way in sorted(found) if way.startswith("row ")][:1]
        others = (way for way in ways if not way.startswith(("kernel ", "row ")))
        for way in [*best[:1], *best_row, *others]:
            us = next((us for us, name in found if name == way), math.nan)
            yield {"rows": rows, "way": way, "us": us, "share": seconds * 1e6 / us, "best": True}
        ways = {way: ways[way] for way in ways if way in best or not way.startswith("kernel ")}


def _time_ways(
    ways: dict[str, Callable], x: Any, stack: Any, layers: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Microseconds per layer of each implementation; all are compiled at once."""

    def all_layers(product: Callable, x: Any, stack: Any) -> Any:
        product = jax.jit(product)  # lowered once
        total = jnp.zeros((), jnp.float32)
        for number in range(layers):
            y = product(x, stack, jnp.int32(number))
            # The next call depends on this one, so that no two are merged.
            total = y[0, 0].astype(jnp.float32) * 1e-30
            x = x + total.astype(x.dtype)
        return y

    options = GPU_OPTIONS if on_gpu() else None
    want = _reference(x, stack, layers - 1)
    with ThreadPoolExecutor(12) as pool:
        compiled: dict[str, Future] = {}
        for way, product in ways.items():
            try:
                lowered = jax.jit(partial(all_layers, product)).lower(x, stack)
                compiled[way] = pool.submit(lowered.compile, options)
            except Exception as error:
                yield way, {"failed": reason(error)}
        for way, future in compiled.items():
            try:
                run = future.result()
                got = run(x, stack)
                error = float(jnp.abs(got.astype(jnp.float32) - want).max() / jnp.abs(want).max())
                yield way, {"us": _seconds(run, x, stack) / layers * 1e6, "error": error}
            except Exception as error:
                yield way, {"failed": reason(error)}
                require_live_device()


def _seconds(run: Callable, *arrays: Any) -> float:
    """Time of the fastest of several blocks of calls."""
    jax.block_until_ready(run(*arrays))
    best, calls = math.inf, 1
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(calls):
            y = run(*arrays)
        jax.block_until_ready(y)
        best = min(best, (time.perf_counter() - start) / calls)
        calls = max(1, int(0.01 / best))
    return best


def _random_stack(layers: int, shape: tuple[int, int], form: str) -> Any:
    def one(key: Any) -> Any:
        matrix = 0.02 * jax.random.normal(key, shape, jnp.bfloat16)
        if form == "bfloat16":
            return matrix
        return pack(matrix.T, form, 1, order=(1, 0))

    keys = jax.random.split(jax.random.key(0, impl="rbg"), layers)
    return jax.jit(lambda keys: jax.lax.map(one, keys))(keys)


@partial(jax.jit, static_argnums=2)
def _reference(x: Any, stack: Any, layer: int) -> Any:
    matrix = stack[layer]
    matrix = matrix.unpack(jnp.float32) if isinstance(matrix, Packed) else matrix.astype("float32")
    return jnp.dot(x.astype(jnp.float32), matrix, precision="highest")


def _multiply(x: Any, stack: Packed, layer: Any, tile: Tile | None = None) -> Any:
    return few_rows.multiply(x, [stack], layer, tile)[0]


def _multiply_row(x: Any, stack: Packed, layer: Any, plan: Plan) -> Any:
    return packed_row.multiply_row(x, [stack], layer, plan)[0]


def _own(stack: Any, layer: Any) -> Any:
    return jax.tree.map(
        lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False), stack
    )


def _dot(x: Any, stack: Any, layer: Any) -> Any:
    return jnp.dot(x, _own(stack, layer))


def _unpacked_dot(x: Any, stack: Packed, layer: Any) -> Any:
    return jnp.dot(x, _own(stack, layer).unpack(x.dtype))


def _fused(x: Any, stack: Packed, layer: Any) -> Any:
    """A single fusion that unpacks, multiplies and sums."""
    matrix = _own(stack, layer).unpack(jnp.float32)
    return jnp.sum(x.astype(jnp.float32)[:, :, None] * matrix[None], axis=1)


def _tiles(shape: tuple[int, int], form: str) -> list[Tile]:
    """Tiles worth trying, with enough splits to occupy all of the device's processors."""
    kind, _, group = form.partition(":")
    deep = int(group or 64) if kind == "int4" else 128
    if not on_gpu():
        return [Tile(deep, 64, 2)]
    runs = [(deep, 128, 4, 3), (deep, 128, 4, 4), (deep, 64, 4, 4), (deep, 128, 8, 4)]
    if kind == "int8":
        runs += [(256, 64, 4, 3), (256, 128, 8, 3)]
    tiles = []
    for (inputs, outputs, warps, stages), per_core in itertools.product(runs, (1, 2, 4)):
        columns, steps, splits = shape[1] // outputs, shape[0] // inputs, 1
        while columns * splits < 132 * per_core and not steps % (2 * splits):
            splits *= 2
        if (tile := Tile(inputs, outputs, splits, warps, stages)) not in tiles:
            tiles.append(tile)
    return tiles


def row_plans(shape: tuple[int, int], form: str) -> list[Plan]:
    """One-row kernel plans that fit a Hopper GPU; none on other devices or for other forms."""
    inputs, outputs = shape
    kind, _, group = form.partition(":")
    capability = current_device().capability
    if capability is None or capability[0] != 9 or kind not in ("int8", "int4"):
        return []
    step = packed_row.STEP * (2 if kind == "int4" else 1)
    groups = step // int(group or 64) if kind == "int4" else 0  # of a step
    plans = []
    for splits, warpgroups, stages in itertools.product((1, 2, 4, 8, 16, 32), (2, 4), (3, 4, 6)):
        plan = Plan(splits, warpgroups, stages)
        row = packed_row.COLUMNS * 2 * inputs // splits
        shared = row + stages * plan.tile * (packed_row.STEP + 3 * groups) + packed_row.MARGIN
        divides = inputs % (splits * step) == outputs % plan.tile == 0
        if divides and shared <= SHARED_BYTES:
            plans.append(plan)
    return plans


if __name__ == "__main__":
    app()
