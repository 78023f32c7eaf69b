"""Results as they come: one line a cell or sample, so that a killed run goes on where it was.

The folder of a run:

    run.json       what was asked: the task and its settings, and of each file of data a checksum
    results.jsonl  a line: {"key": {...}, "value": {...}, "seconds": ...}; in place of "value", what
                   failed has "error"
    summary.json, table.md and pictures: made of these (`dca_jax.evaluation.report`)

The lists of a run (its methods, lengths, depths, tasks) are no settings: they are part of the keys.
So a run is made larger by asking for more in the same folder, and what is there is not computed
again.
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
# Settings that only name a thing whose content a checksum among the settings tells.
LABELS = frozenset({"model", "text", "haystack"})
FINGERPRINT = "fingerprint"  # the setting that tells the model: its files' checksums

Key = Mapping[str, str | int | float]
Files = Mapping[str, Mapping[str, str]]
"""Of each task that has a file of data: its `name`, and the `sha256` of what it holds."""


class UnwritableError(InputError):
    """The results cannot be written: it ends a run, where what one sample meets is its own."""


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
        settings: all that the samples depend on, but what is in their keys; JSON values.
        files: the data of the tasks in the keys; tasks that the folder does not have yet are added.
        paper: the model of the paper (`dca_jax.evaluation.paper.MODELS`) whose figures are to
            stand beside these; None leaves it as it was.

    Raises:
        InputError: the folder holds another run, or a damaged one; another process writes it; or it
            cannot be written.
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
        self._file: BinaryIO | None = None  # the primary's alone
        asked = {"task": task, "settings": dict(settings), "files": files or {}, "paper": paper}
        run = json.loads(json.dumps(asked))
        lines = from_primary(lambda: self._open(run))
        self._records = _latest([_record(line) for line in lines])

    def _open(self, run: dict[str, Any]) -> list[dict[str, Any]]:
        """Opens the file for this process alone; returns the lines that it has."""
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
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        if self._file is not None:
            # What a model or an error says may have half a character, which no file can hold.
            self._write(self._file, text.encode(errors="replace") + b"\n")
        self._records[_identity(record.key)] = record

    def _write(self, file: BinaryIO, line: bytes) -> None:
        try:
            append(file, line, self.folder / LINES, sync=True)
        except InputError as error:
            raise UnwritableError(str(error)) from error


class Run(NamedTuple):
    """What a run's folder holds: see `ResultLog`."""

    folder: Path
    task: str
    settings: dict[str, Any]
    files: dict[str, dict[str, str]]
    paper: str | None
    records: list[Record]


def read_run(folder: Path) -> Run:
    """Reads a run's folder; of lines with one key, the last one.

    Raises:
        InputError: the folder holds no run, or a damaged one.
    """
    path = folder / RUN
    if not path.is_file():
        raise InputError(f"{folder} holds no results: there is no {RUN} in it")
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
    """Around reading what a run has written: what is wrong with it is damage, for it wrote well."""
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
    """Runs items `size` at a time; a batch that fails is run again, one item at a time.

    So one bad sample costs no other, and what does not fit into memory together may fit alone.
    With several processes only what all of them refuse (`InputError`) is noted; what else happens
    may happen to one alone, and the others would wait for it forever: it ends the run.

    Args:
        run: does the work, and notes its results only when all of it is done.
        fail: told of each item that failed alone.

    Raises:
        UnwritableError: results cannot be written; what comes later could not be, either.
    """
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        try:
            run(batch)
        except UnwritableError:
            raise
        except Exception as error:  # whatever it is, it is noted, and the rest goes on
            if several_processes() and not isinstance(error, InputError):
                raise
            if len(batch) == 1:
                fail(batch[0], error)
            else:
                in_batches(batch, 1, run, fail)


def write_json(value: Any, path: Path) -> None:
    """Writes JSON; as `write_text`."""
    write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Writes a text (UTF-8); as `dca_jax.disk.written`."""
    # What a model says may have half a character, which no file can hold.
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
    """The whole lines, in order; what follows the last line's end was never finished.

    Raises:
        InputError: a line that is none of `ResultLog`'s, with its number.
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
    """A line of `ResultLog`'s; raises InputError if it is something else."""
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
            f"{folder} holds the results of another run: its {name} is {shown(was.get(name))}, and "
            f"{shown(now.get(name))} is asked for; {advice}"
        )


def _checksums(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = settings.get(FINGERPRINT)
    return found if isinstance(found, dict) else {}
