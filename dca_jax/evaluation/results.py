"""Results as JSON lines, one per cell or sample, so that an interrupted run can be resumed.

The folder of a run:

    run.json       the task, its settings, and a checksum of each data file
    results.jsonl  lines {"key": {...}, "value": {...}, "seconds": ...}; a failed sample has "error"
                   instead of "value"
    summary.json, table.md and plots: made from these (`dca_jax.evaluation.report`)

The lists of a run (its methods, lengths, depths, tasks) are not settings, but part of the keys. So
a run can be extended with the same folder, and existing results are not computed again.
"""

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from dca_jax import fields
from dca_jax.disk import append, writing, written
from dca_jax.distributed import from_primary, several_processes
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.text_files import decode, parse_json, read_text_file

RUN, LINES = "run.json", "results.jsonl"
# Settings that are only names of something identified by a checksum in the settings.
LABELS = frozenset({"model", "text", "haystack"})
FINGERPRINT = "fingerprint"  # the setting that identifies the model: checksums of its files

Key = Mapping[str, str | int | float]
Files = Mapping[str, Mapping[str, str]]
"""The `name` and the `sha256` of the data file of each task that has one."""


class UnwritableError(InputError):
    """The results cannot be written; unlike an error in a sample, this ends the run."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One cell or sample.

    Attributes:
        key: its unique key in the run.
        value: its result; None if it failed.
        error: the reason of a failure; None if it did not fail.
        seconds: its duration.
    """

    key: dict[str, Any]
    value: dict[str, Any] | None
    error: str | None
    seconds: float


class ResultLog:
    """The lines of one run, appended to its folder as they are produced; use it with `with`.

    A line is on disk when `add` returns. An incomplete line of a killed process is dropped. Failed
    samples are retried by the next run. With several processes (`dca_jax.distributed`) only the
    primary has the file, and all know its contents.

    Args:
        folder: the run's folder; created if missing.
        task: the task, a name in `dca_jax.evaluation.report.TASKS`.
        settings: everything that the samples depend on, except their keys; JSON values.
        files: the data files of the tasks in the keys; new tasks are added to the folder.
        paper: the model (`dca_jax.evaluation.paper.MODELS`) whose figures in the paper are shown
            alongside; None keeps the previous one.

    Raises:
        InputError: the folder holds another run or a damaged one, is being written by another
            process, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        task: str,
        settings: Mapping[str, Any],
        *,
        files: Files | None = None,
        paper: str | None = None,
    ) -> None:
        self.folder = folder
        self._file: BinaryIO | None = None  # only in the primary
        asked = {"task": task, "settings": dict(settings), "files": files or {}, "paper": paper}
        run = json.loads(json.dumps(asked))
        lines = from_primary(lambda: self._open(run))
        self._records = _latest([_record(line) for line in lines])

    def _open(self, run: dict[str, Any]) -> list[dict[str, Any]]:
        """Opens and locks the file for this process; returns its lines."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / LINES).open("a+b", buffering=0)
        try:
            with writing(self.folder):
                _lock(file.fileno(), self.folder)
            if (self.folder / RUN).is_file():
                before = read_run(self.folder)
                _check_same(self.folder, before, run)
                run["paper"] = run["paper"] or before.paper
                run["files"] = {**before.files, **run["files"]}
            write_json(run, self.folder / RUN)
            with writing(self.folder / LINES):
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
        """Whether there is a result for a key; failed ones do not count."""
        record = self._records.get(_identity(key))
        return record is not None and record.error is None

    @property
    def records(self) -> list[Record]:
        """All records of this run and earlier ones, one per key."""
        return list(self._records.values())

    def add(self, key: Key, value: Mapping[str, Any], seconds: float) -> None:
        """Logs the result of a cell or sample."""
        self._append(Record(key=dict(key), value=dict(value), error=None, seconds=seconds))

    def fail(self, key: Key, error: Exception, seconds: float) -> None:
        """Logs the reason of a failure."""
        reason = f"{type(error).__name__}: {error}"[:2000]
        self._append(Record(key=dict(key), value=None, error=reason, seconds=seconds))

    def _append(self, record: Record) -> None:
        outcome = {"value": record.value} if record.error is None else {"error": record.error}
        line = {"key": record.key, **outcome, "seconds": round(record.seconds, 4)}
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        if self._file is not None:
            # A model's text or an error may contain half a character, which cannot be encoded.
            self._write(self._file, text.encode(errors="replace") + b"\n")
        self._records[_identity(record.key)] = record

    def _write(self, file: BinaryIO, line: bytes) -> None:
        try:
            append(file, line, self.folder / LINES, sync=True)
        except InputError as error:
            raise UnwritableError(str(error)) from error


class Run(NamedTuple):
    """The contents of a run's folder; see `ResultLog`."""

    folder: Path
    task: str
    settings: dict[str, Any]
    files: dict[str, dict[str, str]]
    paper: str | None
    records: list[Record]


def read_run(folder: Path) -> Run:
    """Reads a run's folder; of lines with the same key, the last one counts.

    Raises:
        InputError: the folder has no run, or a damaged one.
    """
    path = folder / RUN
    if not path.is_file():
        raise InputError(f"{folder} has no results: there is no {RUN} in it")
    with damage(f"{path}"):
        run = parse_json(read_text_file(path), "it")
        if not isinstance(run, dict):
            raise InputError(f"a JSON {type(run).__name__}, expected an object")
        for name in ("task", "settings"):
            if run.get(name) is None:
                raise InputError(f"'{name}' is missing")
        files = dict(fields.mapping(run, "files", "it") or {})
        for task, file in files.items():
            if not isinstance(file, dict) or not fields.text(file, "sha256", "files"):
                raise InputError(f"files: {shown(task)} has no sha256, got {shown(file)}")
            fields.text(file, "name", "files")
        found = Run(
            folder=folder,
            task=fields.text(run, "task", "it"),
            settings=dict(fields.mapping(run, "settings", "it") or {}),
            files=files,
            paper=fields.text(run, "paper", "it") or None,
            records=[],
        )
    records = map(_record, _read_lines(folder))
    return found._replace(records=list(_latest(records).values()))


@contextmanager
def damage(where: str) -> Iterator[None]:
    """Reports errors in a run's own files as damage, because they were written correctly."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"{where} is damaged: {error}; restore it, or give another folder"
        ) from None


def in_batches[T](
    items: Sequence[T],
    size: int,
    run: Callable[[Sequence[T]], None],
    fail: Callable[[T, Exception], None],
) -> None:
    """Runs items `size` at a time; a failed batch is run again, one item at a time.

    So one bad sample does not affect others, and items that do not fit into memory together may fit
    alone. With several processes only errors that all of them have (`InputError`) are logged; any
    other error may have occurred in one process only, for which the others would wait forever, so
    it ends the run.

    Args:
        run: does the work, and logs its results only when all of it is done.
        fail: function called for each item that failed alone.

    Raises:
        UnwritableError: results cannot be written, so later ones could not be either.
    """
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        try:
            run(batch)
        except UnwritableError:
            raise
        except Exception as error:  # log any error, and continue with the rest
            if several_processes() and not isinstance(error, InputError):
                raise
            if len(batch) == 1:
                fail(batch[0], error)
            else:
                in_batches(batch, 1, run, fail)


def write_json(value: Any, path: Path) -> None:
    """Writes JSON like `write_text`."""
    write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Writes a UTF-8 text with `dca_jax.disk.written`."""
    # A model's text may contain half a character, which cannot be encoded.
    written(path, lambda aside: aside.write_bytes(text.encode(errors="replace")))


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
    """The complete lines, in order; anything after the last line end is incomplete.

    Raises:
        InputError: a line that `ResultLog` did not write, with its number.
    """
    path = folder / LINES
    if not path.is_file():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    lines = []
    for place, line in enumerate(whole.split(b"\n"), start=1):
        if line.strip():
            with damage(f"{path}: line {place}"):
                lines.append(_checked(parse_json(decode(line, "it"), "it")))
    return lines


def _checked(line: Any) -> dict[str, Any]:
    """Checks that a line is in the format of `ResultLog`; raises InputError if not."""
    key = line.get("key") if isinstance(line, dict) else None
    if not isinstance(key, dict) or not all(isinstance(k, str | int | float) for k in key.values()):
        raise InputError(f"it has no key of strings and numbers, got {shown(line)}")
    value, error = fields.mapping(line, "value", "it"), fields.text(line, "error", "it")
    if value is None and not error:
        raise InputError(f"it has neither a value nor an error, got {shown(line)}")
    if fields.number(line, "seconds", "it", least=0) is None:
        raise InputError(f"it has no seconds, got {shown(line)}")
    for name, found in [*key.items(), *(value or {}).items()]:
        if isinstance(found, float) and not math.isfinite(found):
            raise InputError(f"its {name} is {found}, expected a finite number")
    return line


def _drop_half_line(descriptor: int) -> None:
    """Truncates a file, open for reading and appending, after its last complete line."""
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
    changed = [name for name in was | now if was.get(name) != now.get(name) and name not in LABELS]
    advice = "give another folder (--output), or remove this one"
    if FINGERPRINT in changed and "task" not in changed:
        theirs, ours = (_checksums(settings) for settings in (was, now))
        parts = ", ".join(p for p in theirs | ours if theirs.get(p) != ours.get(p))
        raise InputError(
            f"{folder} holds the results of another model, or of this one before its files changed "
            f"(different: {parts}); {advice}"
        )
    for task in before.files.keys() & asked["files"].keys():
        theirs, ours = before.files[task], asked["files"][task]
        if theirs["sha256"] != ours["sha256"]:
            raise InputError(
                f"{folder} holds results of {task} on other data: the contents of "
                f"{shown(ours['name'], quote=False)} are not those of "
                f"{shown(theirs.get('name', ''), quote=False)} then; {advice}"
            )
    if changed:
        name = changed[0]
        raise InputError(
            f"{folder} holds the results of another run: its {name} is {shown(was.get(name))}, not "
            f"{shown(now.get(name))}; {advice}"
        )


def _checksums(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = settings.get(FINGERPRINT)
    return found if isinstance(found, dict) else {}
