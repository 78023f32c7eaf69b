"""Shared parts of the `dca-jax eval` commands: input files, log and termination."""

import hashlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from dca_jax.distributed import from_primary, is_primary
from dca_jax.dtypes import cache_dtype_name
from dca_jax.errors import InputError
from dca_jax.evaluation import report
from dca_jax.evaluation.fingerprint import fingerprint, short_name
from dca_jax.evaluation.paper import MODELS
from dca_jax.evaluation.results import FINGERPRINT, Files, ResultLog, Run
from dca_jax.inference.llm import LLM
from dca_jax.products.packed import packed_forms
from dca_jax.weights.hub import find_folder


def task_files(data: Sequence[str], option: str = "--data") -> dict[str, Path]:
    """The files given with `--data TASK=FILE` or a similar option."""
    files: dict[str, Path] = {}
    for pair in data:
        task, equals, path = pair.partition("=")
        if not equals or task in files:
            raise InputError(f"{option} takes TASK=FILE, each task once; got {pair!r}")
        files[task] = Path(path)
        if not files[task].is_file():
            raise InputError(f"{option} {pair}: {path} is not a file")
    return files


def contents(files: Mapping[str, Path]) -> Files:
    """The files' names and checksums, for the log of a run."""
    return {
        task: {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for task, path in files.items()
    }


@contextmanager
def run(
    output: Path | None,
    task: str,
    model: str,
    llm: LLM,
    settings: Mapping[str, Any],
    paper: str | None,
    files: Files | None = None,
    *,
    adapter: Path | None = None,
) -> Iterator[ResultLog]:
    """The log of a command; when the block ends, writes the report and prints its tables.

    Ends the program with code 1 if samples failed, with 130 on Ctrl-C and with 143 on SIGTERM.
    """
    if paper is not None and paper not in MODELS:
        raise InputError(f"--paper takes one of {', '.join(MODELS)}; got {paper}")
    config = llm.model.config
    checksums = from_primary(lambda: fingerprint(find_folder(model), adapter))
    identity = {
        "model": model,
        FINGERPRINT: checksums,
        "config": config.to_hf(),
        "dtype": llm.model.dtype.name,
        "trained_length": config.trained_length,
    }
    if packed := packed_forms(llm.model):
        identity["weights"] = packed
    if llm.cache_dtype != llm.model.dtype:
        identity["cache_dtype"] = cache_dtype_name(llm.cache_dtype)
    if llm.model.sparse is not None:
        identity["sparse"] = llm.model.sparse.described
    name = Path(model).resolve().name if Path(model).is_dir() else model.replace("/", "-")
    folder = output or Path("outputs") / f"{task}-{name}-{short_name(checksums)}"
    start = time.monotonic()
    with ResultLog(folder, task, {**identity, **settings}, files=files, paper=paper) as log:
        found = Run(folder, task, {**identity, **settings}, {}, paper, log.records)
        report.check_records(found)  # before any sample is read
        with _interruptible(log):
            yield log
    failed = [record for record in log.records if record.error is not None]
    if not is_primary():
        if failed:
            raise SystemExit(1)  # like the primary: an exit common to all processes is silent
        return
    facts = report.machine() | {"wall_seconds_of_last_run": round(time.monotonic() - start, 2)}
    outcome = report.write_report(folder, facts)
    print("\n".join(table.markdown() for table in outcome.tables))
    print(f"wrote {folder}", file=sys.stderr)
    if failed:
        first = failed[0]
        print(
            f"{len(failed)} of {len(log.records)} samples failed; the first, {first.key}: "
            f"{first.error}",
            file=sys.stderr,
        )
        raise SystemExit(1)


@contextmanager
def _interruptible(log: ResultLog) -> Iterator[None]:
    """On Ctrl-C or SIGTERM, prints the progress and how to resume, and ends the program.

    A second signal ends it at once. Only Python's main thread can handle signals; in other threads
    SIGTERM keeps its default effect.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _StoppedError(number)

    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if ours else None
    try:
        yield
    except (KeyboardInterrupt, _StoppedError) as end:
        number = end.number if isinstance(end, _StoppedError) else signal.SIGINT
        print(
            f"stopped: {log.folder} has {len(log.records)} samples; repeat the command to resume",
            file=sys.stderr,
        )
        raise SystemExit(128 + number) from None
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


class _StoppedError(BaseException):
    """SIGTERM was received; not an `Exception`, so that no sample is recorded as failed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
