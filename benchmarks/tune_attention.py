"""Finds the best block sizes of the GPU kernels for a device, head_dim and dtype by trying them.

    python benchmarks/tune_attention.py --kernels "mosaic_gpu forward" --head-dim 128

Each kernel file has a table of tiles by head_dim. Each candidate is put into the table, the kernel
is recompiled, its results are compared with those of the current tiles, and it is timed. The
current tiles come first, then a short list of promising ones, then the others, those closest to the
current tiles first, so `--minutes` may stop the search anywhere. Prints each candidate as it is
measured, and at the end all of them, the fastest first, and the line for the table.
"""

import dataclasses
import importlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import decode
import jax
import jax.numpy as jnp
import typer
from common import (
    Report,
    Timing,
    machine,
    numbers,
    on_gpu,
    reason,
    require_live_device,
    say,
    show,
    timed,
)
from jaxtyping import Array

from dca_jax import DCAConfig, RopeConfig
from dca_jax.attention.op import make_rows, rotate_keys
from dca_jax.attention.softmax import output_delta
from dca_jax.dca import PHASES
from dca_jax.device import current_device
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError

DCA, ROPE = DCAConfig.paper(4096), RopeConfig()
OPTIONS: dict[str, Any] = {"dca": DCA, "phases": PHASES}
TOLERANCE = 0.02  # of the norm, between two tilings of one kernel in 16 bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel to tune.

    Attributes:
        name: backend and kernel.
        module: the module with its table of tiles.
        table: the table's name.
        field: the field of a table entry, if an entry holds the tiles of several kernels.
        call: how it is run: "forward", "backward" or "decode".
        grid: for each field of its tiles, the values to try.
        promising: by head_dim, the changes to the current tiles to try first.
    """

    name: str
    module: str
    table: str = "TILES"
    field: str | None = None
    call: str
    grid: dict[str, tuple[Any, ...]]
    promising: dict[int, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    @property
    def backend(self) -> Any:
        """The module with `forward` and `backward`."""
        return importlib.import_module(f"dca_jax.attention.{self.name.split()[0]}")

    def tables(self) -> dict[int, Any]:
        """The table itself."""
        return getattr(importlib.import_module(f"dca_jax.attention.{self.module}"), self.table)

    def tiles(self, entry: Any) -> Any:
        """This kernel's tiles in an entry of the table."""
        return entry if self.field is None else getattr(entry, self.field)

    def entry(self, entry: Any, choice: dict[str, Any]) -> Any:
        """The entry with other tiles for this kernel."""
        tiles = dataclasses.replace(self.tiles(entry), **choice)
        return tiles if self.field is None else dataclasses.replace(entry, **{self.field: tiles})


def triton_kernels() -> list[Kernel]:
    """The Triton backend's four kernels; a table entry holds the tiles of all of them."""
    table = "HOPPER" if current_device().capability == (9, 0) else "AMPERE"
    blocks = {"block_q": (32, 64, 128), "block_k": (32, 64, 128)}
    rest = {"num_warps": (4, 8), "num_stages": (2, 3, 4)}
    calls = {"forward": "forward", "dq": "backward", "dkv": "backward", "decode": "decode"}
    return [
        Kernel(
            name=f"triton {field}",
            module="triton.tiles",
            table=table,
            field=field,
            call=call,
            grid=(blocks if field != "decode" else {"block_k": (32, 64, 128, 256)}) | rest,
        )
        for field, call in calls.items()
    ]


MOSAIC_KERNELS = [
    Kernel(
        name="mosaic_gpu forward",
        module="mosaic_gpu.forward_tiles",
        call="forward",
        grid={
            "block_k": (64, 128, 192, 256),
            "num_stages": (2, 3, 4),
            "resident": (True, False),
            "registers": (0, 64, 128),
            "cluster": (1, 2),
            "warpgroups": (2, 3),
            "ahead": (True, False),
            "persistent": (True, False),
        },
        promising={
            64: [{"num_stages": 4}, {"cluster": 1}, {"warpgroups": 2, "num_stages": 4}],
            128: [{"persistent": False}, {"registers": 64}, {"cluster": 1}, {"ahead": False}],
            256: [{"registers": 64}, {"registers": 128}, {"cluster": 1}],
        },
    ),
    Kernel(
        name="mosaic_gpu backward",
        module="mosaic_gpu.backward_tiles",
        call="backward",
        grid={"block_q": (64, 128), "num_stages": (2, 3), "num_do_stages": (1, 2)},
        promising={
            64: [{"num_stages": 3}, {"num_do_stages": 1}],
            128: [{"num_do_stages": 1}],
        },
    ),
    Kernel(
        name="mosaic_gpu decode",
        module="mosaic_gpu.decode_tiles",
        call="decode",
        grid={"block": (64, 128, 256), "num_stages": (2, 3, 4, 6), "ctas": (132, 264, 396, 528)},
    ),
]


@exit_on_input_error()
def main(
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/tune_attention.json"
    ),
    kernels: Annotated[
        str,
        typer.Option(help='Only kernels whose name contains one of these: "triton", "forward".'),
    ] = "",
    head_dim: Annotated[int, typer.Option(help="Elements per head.")] = 128,
    heads: Annotated[str, typer.Option(help="Query and kv heads.")] = "32/8",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    tokens: Annotated[str, typer.Option(help="Tokens of forward and backward.")] = "32k",
    keys: Annotated[str, typer.Option(help="Keys per row in decoding.")] = "128k",
    batch: Annotated[int, typer.Option(help="Rows decoded together.")] = 1,
    minutes: Annotated[
        float, typer.Option(help="Start no further measurement after this many minutes in total.")
    ] = math.inf,
) -> None:
    """Tries the candidates of each kernel and prints the best one."""
    wanted = [word.strip() for word in kernels.split(",") if word.strip()]
    chosen = [
        kernel
        for kernel in [*MOSAIC_KERNELS, *triton_kernels()]
        if not wanted or any(word in kernel.name for word in wanted)
    ]
    if not chosen:
        raise InputError(f"there is no kernel {kernels!r}")
    query_heads, kv_heads = map(int, heads.split("/"))
    end = time.monotonic() + 60 * minutes
    for number, kernel in enumerate(chosen):
        path = out if len(chosen) == 1 else out.with_stem(f"{out.stem}_{number}")
        length = numbers(keys if kernel.call == "decode" else tokens)[0]
        rows = batch if kernel.call == "decode" else 1
        facts = {"benchmark": "tune_attention", "kernel": kernel.name, "dtype": dtype}
        facts |= {"batch": rows, "tokens": length, "heads": heads, "head_dim": head_dim}
        share = (end - time.monotonic()) / 60 / (len(chosen) - number)
        if share <= 0:
            say(f"out of time: {kernel.name} and the following were not measured")
            break
        report = Report(path, machine() | facts, minutes=share)
        say(f"{kernel.name}, head_dim {head_dim}, {heads} heads, {length} tokens")
        try:
            tune(kernel, report, (rows, length, query_heads, kv_heads, head_dim), jnp.dtype(dtype))
        except InputError as error:
            say(f"{kernel.name}: {error}")


def tune(kernel: Kernel, report: Report, shape: tuple[int, ...], dtype: jnp.dtype) -> None:
    """Tries every candidate of a kernel and prints them, the best first.

    Args:
        shape: batch, tokens, query heads, kv heads, head_dim.

    Raises:
        InputError: the kernel does not support such shapes on this device.
    """
    table, head_dim = kernel.tables(), shape[-1]
    if head_dim not in table:
        raise InputError(f"has no tiles for head_dim {head_dim}; it has {sorted(table)}")
    query, key = (
        jax.ShapeDtypeStruct(
            (shape[0], 1 if kernel.call == "decode" else shape[1], shape[2], head_dim), dtype
        ),
        jax.ShapeDtypeStruct((2, shape[0], shape[1], shape[3], head_dim), dtype),
    )
    refusal = kernel.backend.unsupported(current_device(), query, key, DCA)
    if refusal is not None:
        raise InputError(refusal)
    present = table[head_dim]
    call = CALLS[kernel.call](kernel.backend, shape, dtype)
    choices = list(candidates(kernel, kernel.tiles(present), kernel.promising.get(head_dim, [])))
    say(f"{len(choices)} candidates, the current one first")
    expected = None
    for choice in choices:
        if report.out_of_time():
            break
        try:
            with replaced(table, head_dim, kernel.entry(present, choice)):
                outputs, timing = call()
        except Exception as error:  # more shared memory or registers than available
            report.add(choice | {"failed": reason(error)})
            require_live_device()
            continue
        expected = outputs if expected is None else expected
        error = max(map(_difference, outputs, expected))
        row = choice | {"ms": timing.median, "low": timing.low, "high": timing.high}
        row |= {"error": error}
        report.add(row if error < TOLERANCE else row | {"failed": "computes something else"})
    rows = sorted(report.rows, key=lambda row: ("failed" in row, row.get("ms", 0.0)))
    show(f"{kernel.name}, head_dim {head_dim}", [*kernel.grid, "ms", "error"], rows)
    if rows and "failed" not in rows[0]:
        best = kernel.entry(present, {name: rows[0][name] for name in kernel.grid})
        say(f"{kernel.table} in dca_jax/attention/{kernel.module.replace('.', '/')}.py:")
        say(f"    {head_dim}: {best},")


def candidates(
    kernel: Kernel, present: Any, promising: Sequence[dict[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """The current tiles, the promising ones, then the grid by distance from the current tiles."""
    now = {name: getattr(present, name) for name in kernel.grid}
    values = [dict.fromkeys([now[name], *options]) for name, options in kernel.grid.items()]
    choices = [dict(zip(kernel.grid, picked, strict=True)) for picked in itertools.product(*values)]
    choices.sort(key=lambda choice: sum(choice[name] != now[name] for name in now))
    ordered = [now, *(now | change for change in promising), *choices]
    yield from {tuple(choice.values()): choice for choice in ordered}.values()


@contextmanager
def replaced(table: dict[int, Any], head_dim: int, entry: Any) -> Iterator[None]:
    """Has `entry` in the table, and no earlier compilation, while the block runs."""
    present = table[head_dim]
    jax.clear_caches()
    table[head_dim] = entry
    try:
        yield
    finally:
        table[head_dim] = present


def _difference(ours: Array, expected: Array) -> float:
    """Relative difference in norm, ignoring infinite values of a log-sum-exp."""
    a, b = (jnp.where(jnp.isfinite(expected), x, 0).astype(jnp.float32) for x in (ours, expected))
    return float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-30))


# --- what is timed: each returns its outputs and the time per call -----------------------------

Call = Callable[[], tuple[list[Array], Timing]]


def forward_call(backend: Any, shape: tuple[int, ...], dtype: jnp.dtype) -> Call:
    """The forward pass of all three phases, from an unrotated query and rotated keys."""
    query, key, value, _, rows = _inputs(shape, dtype)

    def forward(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        return backend.forward(query, key, value, jnp.int32(0), rows, **OPTIONS, with_lse=True)

    return lambda: _run(lambda *arrays: forward(*arrays), query, key, value)


def backward_call(backend: Any, shape: tuple[int, ...], dtype: jnp.dtype) -> Call:
    """The backward pass alone, from the output and log-sum-exp of the forward pass."""
    query, key, value, do, rows = _inputs(shape, dtype)
    forward = jax.jit(partial(backend.forward, **OPTIONS, with_lse=True))
    out, lse = forward(query, key, value, jnp.int32(0), rows)
    delta = output_delta(do, out, lse.dtype)

    def backward(*arrays: Array) -> tuple[Array, Array, Array]:
        query, key, value, do, lse, delta = arrays
        return backend.backward(query, key, value, jnp.int32(0), rows, do, lse, delta, **OPTIONS)

    return lambda: _run(lambda *arrays: backward(*arrays), query, key, value, do, lse, delta)


def decode_call(backend: Any, shape: tuple[int, ...], dtype: jnp.dtype) -> Call:
    """One query per row, chained over the layers of a cache as in `benchmarks/decode.py`."""

    def one(query: Array, key: Array, value: Array, rows: Any, layer: Array) -> Array:
        return backend.forward(query, key, value, layer, rows, **OPTIONS, with_lse=False)[0]

    variant = decode.Variant("decode", one, stacked=True)
    chain = decode.chain_of_calls(variant, shape, 4e12 if on_gpu() else 1e10, dtype)
    query, *cache = chain.make_inputs()
    lengths = jnp.full(shape[0], shape[1], jnp.int32)
    rows = make_rows(query.shape, dca=DCA, rope=ROPE, lengths=lengths, query_offset=lengths - 1)

    def call() -> tuple[list[Array], Timing]:
        out = jax.jit(lambda query, key, value: one(query, key, value, rows, jnp.int32(1)))
        outputs = [out(query, *cache)]  # the chain's result is dominated by its first query
        _, timing = _run(lambda *arrays: chain.run(*arrays), query, *cache, lengths)
        return outputs, Timing(*(ms / chain.calls for ms in timing))

    return call


CALLS: dict[str, Callable[[Any, tuple[int, ...], jnp.dtype], Call]] = {
    "forward": forward_call,
    "backward": backward_call,
    "decode": decode_call,
}


def _inputs(shape: tuple[int, ...], dtype: jnp.dtype) -> tuple[Array, Array, Array, Array, Any]:
    """Random query, rotated keys and values of one layer, output gradient; and the rows."""
    batch, tokens, query_heads, kv_heads, head_dim = shape
    query, key, value, do = (
        jax.random.normal(jax.random.key(seed), (batch, tokens, heads, head_dim), dtype)
        for seed, heads in enumerate((query_heads, kv_heads, kv_heads, query_heads))
    )
    rows = make_rows(query.shape, dca=DCA, rope=ROPE)
    index = jnp.arange(tokens, dtype=jnp.int32)[None, :]
    key = rotate_keys(key, index, dca=DCA, inv_freq=rows.inv_freq)
    return query, key[None], value[None], do, rows


def _run(function: Callable[..., Any], *arrays: Any) -> tuple[list[Array], Timing]:
    """Compiles a new function, runs it and times it."""
    jitted = jax.jit(function)
    outputs = jax.tree.leaves(jitted(*arrays))
    return outputs, timed(jitted, *arrays)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=__doc__)(main)
    app()
