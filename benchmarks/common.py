"""Shared by the benchmarks: timing, facts about the machine, tables and files.

A figure is a median over blocks of calls. All calls of a block are queued, and only its end is
waited for, so the device never waits for Python. A chip under load lowers its clock to stay within
its power limit, so every variant runs for a while before it is timed, and ratios compare variants
that were timed one after the other in one process.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from dca_jax.errors import InputError

WARM_UP = 0.5  # seconds of calls before timing starts
BLOCK, BLOCKS = 0.15, 5  # seconds per block (at least one call), and the number of blocks
LONG = 2.0  # seconds; a longer call warms up the chip by itself, and is timed once
PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin"),
    *("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "torch", "triton", "transformers"),
)


# --- time --------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """Milliseconds per call: the median over blocks, and the fastest and slowest block."""

    median: float
    low: float
    high: float


def start_compiling(pool: Executor, function: Callable[..., Any], *arrays: Any) -> Future:
    """Lowers a function and compiles it in a thread; returns the future of the compiled function.

    Args:
        arrays: its arguments, or their `jax.ShapeDtypeStruct`.
    """
    try:
        return pool.submit(jax.jit(function).lower(*arrays).compile)
    except Exception as error:  # an unsupported shape, for example: raised where the result is used
        failed: Future = Future()
        failed.set_exception(error)
        return failed


def timed(function: Callable[..., Any], *arrays: Any) -> Timing:
    """Times a compiled function after a warm-up, in which a jitted one compiles."""
    jax.block_until_ready(function(*arrays))
    seconds = _block(function, arrays, 1)
    if seconds > LONG:
        return Timing(seconds * 1e3, seconds * 1e3, seconds * 1e3)
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP:
        seconds = _block(function, arrays, max(1, int(BLOCK / seconds)))
    calls = max(1, round(BLOCK / seconds))
    samples = [1e3 * _block(function, arrays, calls) for _ in range(BLOCKS)]
    return Timing(statistics.median(samples), min(samples), max(samples))


def _block(function: Callable[..., Any], arrays: Sequence[Any], calls: int) -> float:
    """Seconds per call over `calls` consecutive calls; only the last result is kept."""
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = function(*arrays)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def copy_bandwidth(gigabytes: float = 2.0) -> float:
    """The device's copy bandwidth in bytes per second, counting reads and writes.

    The faster of the driver's own copy and a kernel that changes every element.
    """
    x = jax.random.bits(jax.random.key(0), (int(gigabytes * 1e9) // 4,), jnp.uint32)
    ways = jax.jit(jnp.copy), jax.jit(lambda x: x ^ jnp.uint32(1))
    return max(2 * x.nbytes / timed(way, x).median * 1e3 for way in ways)


# --- failures ----------------------------------------------------------------------------------


def reason(error: BaseException) -> str:
    """An exception in one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]


def require_live_device() -> None:
    """Ends the program if the device no longer responds, as after an illegal memory access."""
    try:
        jax.block_until_ready(jnp.ones(1, jnp.float32) + 1)
    except Exception as error:
        sys.exit(f"the device no longer responds, so nothing else can be measured: {reason(error)}")


# --- figures -----------------------------------------------------------------------------------


class Report:
    """The rows of one run. Each is printed when added, and the file is complete after each.

    Args:
        path: the JSON file; an existing one is replaced.
        facts: facts that hold for every row: device, versions, settings.
        minutes: time limit, after which `out_of_time` returns True.
    """

    def __init__(self, path: Path, facts: dict[str, Any], *, minutes: float = math.inf) -> None:
        self.path, self.facts, self.rows = path, facts, []
        self._start, self._seconds = time.monotonic(), 60 * minutes
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def add(self, row: dict[str, Any]) -> None:
        """Adds and prints a row, and rewrites the file."""
        self.rows.append(row)
        cells = (f"{name} {cell(value)}" for name, value in row.items() if value is not None)
        say(f"{time.monotonic() - self._start:6.1f} s  " + "  ".join(cells))
        self.write()

    def minutes_left(self) -> float:
        """Number of minutes left."""
        return (self._seconds - (time.monotonic() - self._start)) / 60

    def out_of_time(self) -> bool:
        """Whether the time limit is reached; prints a message if it is."""
        over = self.minutes_left() < 0
        if over:
            say("out of time: the rest was not measured")
        return over

    def write(self) -> None:
        """Rewrites the file after its rows have changed."""
        aside = self.path.with_name(f".{self.path.name}.partial")
        aside.write_text(json.dumps(self.facts | {"rows": self.rows}, indent=1) + "\n")
        aside.replace(self.path)


def merged(paths: Iterable[Path], key: Sequence[str]) -> tuple[dict[str, Any], list[dict]]:
    """The facts and rows of several runs; of rows that agree in `key`, the last one counts.

    Raises:
        InputError: there is no file, a file is not a benchmark's result, or devices differ.
    """
    facts: dict[str, Any] = {}
    rows: dict[tuple, dict] = {}
    for path in paths:
        try:
            figures = json.loads(path.read_text())
            rows |= {tuple(row.get(name) for name in key): row for row in figures.pop("rows")}
            device = figures["device"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} holds no result of this benchmark: {error}") from error
        if facts.get("device", device) != device:
            raise InputError(f"{path} was measured on {device}, others on {facts['device']}")
        facts |= figures
    if not rows:
        raise InputError("there is no result to show")
    return facts, list(rows.values())


def show(title: str, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Prints the named columns as a table; a failed row shows the reason instead."""
    rows = list(rows)
    shown = [name for name in columns if any(row.get(name) is not None for row in rows)]
    failed = any("failed" in row for row in rows)
    table = Table(*shown, *(["failed"] if failed else []), title=title)
    for row in rows:
        cells = [cell(row.get(name)) for name in shown]
        table.add_row(*cells, *([row.get("failed", "")] if failed else []))
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def cell(value: Any) -> str:
    """A value as it is printed; floats have four significant digits."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def say(text: str) -> None:
    """Prints a line of progress immediately."""
    print(text, flush=True)


# --- the machine -------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The device in use, its driver and power limit, and the versions of the libraries."""
    device = jax.devices()[0]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device.device_kind,
        "driver, power limit": _nvidia_smi() if device.platform == "gpu" else None,
        "versions": versions,
    }


def _nvidia_smi() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0] if done.stdout else None


def on_gpu() -> bool:
    """Whether JAX computes on a GPU."""
    return jax.default_backend() == "gpu"


def numbers(text: str) -> list[int]:
    """Counts from a list such as "4k,32k,100": k is 1024.

    Raises:
        InputError: the text has another form.
    """
    try:
        parts = [part.strip().lower() for part in text.split(",")]
        found = [int(part.removesuffix("k")) * (1024 if part[-1] == "k" else 1) for part in parts]
    except (ValueError, IndexError):
        found = []
    if not found or min(found) < 1:
        raise InputError(f"expected numbers such as 4k,32k,100 (k is 1024), got {text!r}")
    return found
