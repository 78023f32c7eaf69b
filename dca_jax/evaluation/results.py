"""Results as they come: one line a cell or sample, so that a killed run goes on where it was.

The folder of a run:

    run.json       what was asked: the task and its settings
    results.jsonl  a line: {"key": {...}, "value": {...}, "seconds": ...}; in place of "value", what
                   failed has "error"
    summary.json, table.md and pictures: made of these (`dca_jax.evaluation.report`)

The lists of a run (its methods, lengths, depths) are no settings: they stand in the keys. So a run
is made larger by asking for more in the same folder, and what is there is not computed again.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from dca_jax.distributed import from_primary, several_processes
from dca_jax.errors import InputError

RUN, LINES = "run.json", "results.jsonl"

Key = Mapping[str, str | int | float]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One cell or sample.

    Attributes:
        key: what it is, among all of the run.
        value: what came out; None if it failed.
        error: why it failed; None if it did not.
        seconds: what it took.
    """

    key: dict[str, Any]
    value: dict[str, Any] | None
    error: str | None
    seconds: float


class ResultLog:
    """The lines of one run, appended to its folder as they come; use it with `with`.

    A line is on the disk when `add` returns. Of a process that was killed while it wrote one, the
    half line is dropped. What failed is tried again by the next run. Of several processes
    (`dca_jax.distributed`) the primary alone has the file, and all know what is in it.

    Args:
        folder: made if it is not there.
        task: what the lines are lines of, a name of `dca_jax.evaluation.report.TASKS`.
        settings: all that the samples depend on, but what stands in their keys; JSON values.
        paper: the model of the paper (`dca_jax.evaluation.paper.MODELS`) whose figures are to
            stand beside these; None leaves it as it was.

    Raises:
        InputError: the folder holds another run, or another process writes it.
    """

    def __init__(
        self, folder: Path, task: str, settings: Mapping[str, Any], *, paper: str | None = None
    ) -> None:
        self.folder = folder
        self._file: BinaryIO | None = None  # the primary's alone
        run = json.loads(json.dumps({"task": task, "settings": dict(settings), "paper": paper}))
        lines = from_primary(lambda: self._open(run))
        self._records = _latest([_record(line) for line in lines])

    def _open(self, run: dict[str, Any]) -> list[dict[str, Any]]:
        """Opens the file for this process alone; returns the lines that it has."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.folder / LINES).open("a+b")
        try:
            _lock(file.fileno(), self.folder)
            if (self.folder / RUN).is_file():
                before = read_run(self.folder)
                _check_same(self.folder, before, run)
                run["paper"] = run["paper"] or before.paper
            write_json(run, self.folder / RUN)
            _drop_half_line(file.fileno())
            lines = _read_lines(self.folder)
        except BaseException:
            file.close()
            raise
        self._file = file
        return lines

    def __enter__(self) -> "ResultLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, key: Key) -> bool:
        """Whether this has come out already; what failed has not."""
        record = self._records.get(_identity(key))
        return record is not None and record.error is None

    @property
    def records(self) -> list[Record]:
        """All there is, of this run and those before it, one for each key."""
        return list(self._records.values())

    def add(self, key: Key, value: Mapping[str, Any], seconds: float) -> None:
        """Notes what came out of a cell or sample."""
        self._append(Record(key=dict(key), value=dict(value), error=None, seconds=seconds))

    def fail(self, key: Key, error: Exception, seconds: float) -> None:
        """Notes why there is no result."""
        reason = f"{type(error).__name__}: {error}"[:2000]
        self._append(Record(key=dict(key), value=None, error=reason, seconds=seconds))

    def _append(self, record: Record) -> None:
        outcome = {"value": record.value} if record.error is None else {"error": record.error}
        line = {"key": record.key, **outcome, "seconds": round(record.seconds, 4)}
        if self._file is not None:
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self._records[_identity(record.key)] = record


class Run(NamedTuple):
    """What a run's folder holds: see `ResultLog`."""

    task: str
    settings: dict[str, Any]
    paper: str | None
    records: list[Record]


def read_run(folder: Path) -> Run:
    """Reads a run's folder; of lines with one key, the last one.

    Raises:
        InputError: the folder holds no run, or a damaged one.
    """
    if not (folder / RUN).is_file():
        raise InputError(f"{folder} holds no results: there is no {RUN} in it")
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
        found = Run(run["task"], run["settings"], run["paper"], [])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / RUN} is damaged: {error}") from error
    lines = map(_record, _read_lines(folder))
    return found._replace(records=list(_latest(lines).values()))


def in_batches[T](
    items: Sequence[T],
    size: int,
    run: Callable[[Sequence[T]], None],
    fail: Callable[[T, Exception], None],
) -> None:
    """Runs items `size` at a time; a batch that fails is run again, one item at a time.

    So one bad sample costs no other, and what does not fit into memory together may fit alone.
    With several processes only what all of them refuse (`InputError`) is noted; what else happens
    may happen to one alone, and the others would wait for it forever: it ends the run.

    Args:
        run: does the work, and notes its results only when all of it is done.
        fail: told of each item that failed alone.
    """
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        try:
            run(batch)
        except Exception as error:  # whatever it is, it is noted, and the rest goes on
            if several_processes() and not isinstance(error, InputError):
                raise
            if len(batch) == 1:
                fail(batch[0], error)
            else:
                in_batches(batch, 1, run, fail)


def write_json(value: Any, path: Path) -> None:
    """Writes JSON aside and renames it: it is whole or not there."""
    write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Writes a text (UTF-8) aside and renames it: it is whole or not there."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _identity(key: Key) -> str:
    return json.dumps(dict(key), sort_keys=True)


def _latest(records: Iterable[Record]) -> dict[str, Record]:
    return {_identity(record.key): record for record in records}


def _record(line: Mapping[str, Any]) -> Record:
    return Record(
        key=line["key"],
        value=line.get("value"),
        error=line.get("error"),
        seconds=line["seconds"],
    )


def _read_lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines, in order; what follows the last line's end was never finished."""
    path = folder / LINES
    whole, _, _ = path.read_bytes().rpartition(b"\n") if path.is_file() else (b"", b"", b"")
    lines = []
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(text)
            _record(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: line {number} is damaged: {error}") from error
        lines.append(line)
    return lines


def _drop_half_line(descriptor: int) -> None:
    """Cuts a file open for reading and appending after its last line's end."""
    size = os.fstat(descriptor).st_size
    content = os.pread(descriptor, size, 0)
    os.ftruncate(descriptor, content.rfind(b"\n") + 1)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"another process is writing {folder}; wait for it, or give another folder"
        ) from None


def _check_same(folder: Path, before: Run, asked: dict[str, Any]) -> None:
    was = {"task": before.task, **before.settings}
    now = {"task": asked["task"], **asked["settings"]}
    if was == now:
        return
    changed = next(name for name in was | now if was.get(name) != now.get(name))
    raise InputError(
        f"{folder} holds the results of another run: its {changed} is {was.get(changed)!r}, and "
        f"{now.get(changed)!r} is asked for; give another folder, or remove this one"
    )
