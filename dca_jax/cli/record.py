"""What the commands of `dca-jax eval` share: their files, their log and how they end."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dca_jax.distributed import is_primary
from dca_jax.errors import InputError
from dca_jax.evaluation import report
from dca_jax.evaluation.paper import MODELS
from dca_jax.evaluation.results import ResultLog
from dca_jax.inference.llm import LLM


def task_files(data: Sequence[str]) -> dict[str, Path]:
    """The files of `--data TASK=FILE`."""
    files: dict[str, Path] = {}
    for pair in data:
        task, equals, path = pair.partition("=")
        if not equals or task in files:
            raise InputError(f"--data takes TASK=FILE, each task once; got {pair!r}")
        files[task] = Path(path)
        if not files[task].is_file():
            raise InputError(f"--data {pair}: {path} is not a file")
    return files


def names_of(files: Mapping[str, Path]) -> dict[str, str]:
    """The files' names, for the settings of a run."""
    return {task: path.name for task, path in files.items()}


@contextmanager
def run(
    output: Path | None,
    task: str,
    model: str,
    llm: LLM,
    settings: Mapping[str, Any],
    paper: str | None,
) -> Iterator[ResultLog]:
    """The log of a command; when the block ends, the report is written and its tables printed.

    Ends the program with code 1 if samples failed, and with 130 on Ctrl-C.
    """
    if paper is not None and paper not in MODELS:
        raise InputError(f"--paper takes one of {', '.join(MODELS)}; got {paper}")
    name = Path(model).resolve().name if Path(model).is_dir() else model
    folder = output or Path("outputs") / f"{task}-{name.replace('/', '-')}"
    config = llm.model.config
    identity = {
        "model": name,
        "config": config.to_hf(),
        "dtype": llm.model.dtype.name,
        "trained_length": config.trained_length,
    }
    start = time.monotonic()
    try:
        with ResultLog(folder, task, {**identity, **settings}, paper=paper) as log:
            yield log
    except KeyboardInterrupt:
        print(f"stopped; repeat the command to resume from {folder}", file=sys.stderr)
        raise SystemExit(130) from None
    failed = [record for record in log.records if record.error is not None]
    if not is_primary():
        if failed:
            raise SystemExit(1)  # as the primary does: what all do alike ends them quietly
        return
    facts = report.machine() | {"wall_seconds_of_last_run": round(time.monotonic() - start, 2)}
    found = report.write_report(folder, facts)
    print("\n".join(table.markdown() for table in found.tables))
    print(f"wrote {folder}", file=sys.stderr)
    if failed:
        first = failed[0]
        print(
            f"{len(failed)} of {len(log.records)} samples failed; the first, {first.key}: "
            f"{first.error}",
            file=sys.stderr,
        )
        raise SystemExit(1)
