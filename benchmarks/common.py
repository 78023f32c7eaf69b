"""What the benchmarks share: how they time, what they record of the machine, tables and files.

A figure is a median over blocks of calls. A block is queued at once and waited for at its end, so
the device goes from one call to the next without waiting for Python. A loaded chip lowers its clock
to keep its power: so every variant runs for a while before it is timed, and ratios are between
variants timed one after the other in one process.
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

WARM_UP = 0.5  # seconds of calls before the first that is timed
BLOCK, BLOCKS = 0.15, 5  # seconds of a block, at least one call; how many blocks
LONG = 2.0  # seconds: a call that takes longer has warmed the chip itself, and is timed once
PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin"),
    *("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "torch", "triton", "transformers"),
)


# --- time --------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """Milliseconds a call: the median over blocks, and the fastest and slowest block."""

    median: float
    low: float
    high: float


def start_compiling(pool: Executor, function: Callable[..., Any], *arrays: Any) -> Future:
    """Lowers a function here and compiles it in a thread: the future of what then runs it.

    Args:
        arrays: what it will be called with, or their `jax.ShapeDtypeStruct`.
    """
    try:
        return pool.submit(jax.jit(function).lower(*arrays).compile)
    except Exception as error:  # a shape that it cannot take, say: whoever asks for it is told
        failed: Future = Future()
        failed.set_exception(error)
        return failed


def timed(function: Callable[..., Any], *arrays: Any) -> Timing:
    """Times a compiled function of arrays, after a warm-up (a jitted one compiles in it)."""
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
    """Seconds a call over `calls` calls in a row; only the last result is kept."""
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = function(*arrays)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def copy_bandwidth(gigabytes: float = 2.0) -> float:
    """Bytes a second that the device copies, read and written ones both counted.

    The faster of the driver's own copy and of a kernel that changes every element on its way.
    """
    x = jax.random.bits(jax.random.key(0), (int(gigabytes * 1e9) // 4,), jnp.uint32)
    ways = jax.jit(jnp.copy), jax.jit(lambda x: x ^ jnp.uint32(1))
    return max(2 * x.nbytes / timed(way, x).median * 1e3 for way in ways)


# --- what goes wrong ---------------------------------------------------------------------------


def reason(error: BaseException) -> str:
    """An exception in one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]


def require_live_device() -> None:
    """Ends the program if the device answers no more: an illegal access ends all later calls."""
    try:
        jax.block_until_ready(jnp.ones(1, jnp.float32) + 1)
    except Exception as error:
        sys.exit(f"the device answers no more, so nothing is left to measure: {reason(error)}")


# --- figures -----------------------------------------------------------------------------------


class Report:
    """The rows of one run, in a file that is whole after every row; prints each as it comes.

    Args:
        path: the JSON file; one that is there is replaced.
        facts: what holds for every row: device, versions, settings.
        minutes: after so many, `out_of_time`.
    """

    def __init__(self, path: Path, facts: dict[str, Any], *, minutes: float = math.inf) -> None:
        self.path, self.facts, self.rows = path, facts, []
        self._start, self._seconds = time.monotonic(), 60 * minutes
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def add(self, row: dict[str, Any]) -> None:
        """Prints a row and writes the file anew."""
        self.rows.append(row)
        cells = (f"{name} {cell(value)}" for name, value in row.items() if value is not None)
        say(f"{time.monotonic() - self._start:6.1f} s  " + "  ".join(cells))
        self.write()

    def minutes_left(self) -> float:
        """How many of the minutes are left."""
        return (self._seconds - (time.monotonic() - self._start)) / 60

    def out_of_time(self) -> bool:
        """Whether the minutes are over; it says so if they are."""
        over = self.minutes_left() < 0
        if over:
            say("out of time: the rest is not measured")
        return over

    def write(self) -> None:
        """Writes the file anew, after a change of its rows."""
        aside = self.path.with_name(f".{self.path.name}.partial")
        aside.write_text(json.dumps(self.facts | {"rows": self.rows}, indent=1) + "\n")
        aside.replace(self.path)


def merged(paths: Iterable[Path], key: Sequence[str]) -> tuple[dict[str, Any], list[dict]]:
    """The facts and rows of several runs; of rows that agree in `key`, the last one counts.

    Raises:
        InputError: no file, one that is no result of a benchmark, or results of unlike devices.
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
    """Prints the named columns of rows as a table; a row that failed says why in place of them."""
    rows = list(rows)
    shown = [name for name in columns if any(row.get(name) is not None for row in rows)]
    failed = any("failed" in row for row in rows)
    table = Table(*shown, *(["failed"] if failed else []), title=title)
    for row in rows:
        cells = [cell(row.get(name)) for name in shown]
        table.add_row(*cells, *([row.get("failed", "")] if failed else []))
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def cell(value: Any) -> str:
    """A value as it is printed: four significant digits of a float."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def say(text: str) -> None:
    """A line of progress, printed at once."""
    print(text, flush=True)


# --- the machine -------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The device in use, its driver and power limit, and the versions of what takes part."""
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
        InputError: something else.
    """
    try:
        parts = [part.strip().lower() for part in text.split(",")]
        found = [int(part.removesuffix("k")) * (1024 if part[-1] == "k" else 1) for part in parts]
    except (ValueError, IndexError):
        found = []
    if not found or min(found) < 1:
        raise InputError(f"expected numbers such as 4k,32k,100 (k is 1024), got {text!r}")
    return found
