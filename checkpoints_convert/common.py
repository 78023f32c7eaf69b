"""Common parts of the converters: dtype names, companion files, provenance, the progress bar."""

import hashlib
import json
import logging
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress

from dca_jax.dtypes import parse_dtype
from dca_jax.products.packed import FORMS, STORED, UNPACKED
from dca_jax.weights.adapters import CONFIG_FILE, WEIGHTS_FILE
from dca_jax.weights.parameters import Progress


class Dtype(StrEnum):
    """The choices of `--dtype`."""

    keep = "keep"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"

    @property
    def wanted(self) -> np.dtype | None:
        """The dtype, or None for each parameter's own."""
        return None if self is Dtype.keep else jnp.dtype(parse_dtype(self.value))


AdapterOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder of a LoRA adapter (PEFT's) to merge into the weights."
    ),
]

WeightsOption = Annotated[
    str,
    typer.Option(
        metavar="FORM",
        help=f"How matrices are packed: {', '.join(FORMS)}; **{STORED}** as they are, and "
        f"**{UNPACKED}** not at all.",
    ),
]


def write_provenance(
    path: Path,
    source: Path,
    files: Iterable[Path],
    dtypes: Iterable[np.dtype],
    *,
    forms: Iterable[str] = (),
    adapter: Path | None = None,
) -> None:
    """Records the source files (names, sizes, SHA-256), the dtypes, the version and the time."""
    folder = source if source.is_dir() else source.parent
    provenance = {
        "source": source.resolve().name,
        "files": _checksums(folder, files),
        **({} if adapter is None else {"adapter": _adapter_files(adapter)}),
        "dtype": sorted({str(dtype) for dtype in dtypes} | set(forms)),
        "dca_jax": version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path.write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def version() -> str:
    """The installed version of dca_jax."""
    try:
        return metadata.version("dca_jax")
    except metadata.PackageNotFoundError:
        return "not installed (run from its source)"


def prepare_process() -> None:
    """For commands: computes on the host only, and hides irrelevant warnings of Orbax."""
    jax.config.update("jax_platforms", "cpu")  # otherwise JAX would allocate most of a GPU's memory
    logging.getLogger("absl").setLevel(logging.ERROR)


@contextmanager
def progress_bar(total_bytes: int, show: bool) -> Iterator[Progress]:
    """A progress bar on stderr; yields a function of (path, bytes) that advances it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task("", total=total_bytes)
        yield lambda path, num_bytes: bar.update(task, advance=num_bytes, description=path)


@contextmanager
def told_if_stopped(destination: Path) -> Iterator[None]:
    """During a conversion, SIGTERM and Ctrl-C stop it cleanly and report that nothing was written.

    The program then exits with 128 plus the signal's number. Further signals are not ignored: if
    the first came in a callback of the garbage collector, Python has dropped its exception.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except SystemExit as stopped:
        print(
            f"stopped; {destination} was not written: run the same command again", file=sys.stderr
        )
        raise stopped from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _adapter_files(folder: Path) -> dict[str, Any]:
    files = [folder / CONFIG_FILE, folder / WEIGHTS_FILE]
    return {"source": folder.resolve().name, "files": _checksums(folder, files)}


def _checksums(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    return {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in files
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
