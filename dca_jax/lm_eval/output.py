"""Checks lm-eval's files in `--output_path` before and after an evaluation.

lm-eval itself only warns if a file cannot be written, and then ends successfully.
"""

import argparse
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dca_jax.disk import writing
from dca_jax.errors import InputError


@contextmanager
def output_checked(arguments: Sequence[str]) -> Iterator[None]:
    """A context manager for lm-eval's command with `arguments`.

    Incomplete files are removed.

    Raises:
        InputError: the path cannot be written (before), the cache of `--use_cache` cannot be
            written (during), or results or samples are incomplete (after).
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-o", "--output_path", type=Path)
    path: Path | None = parser.parse_known_args(list(arguments))[0].output_path
    if path is None:
        folder, before = None, frozenset()
    else:
        folder = path.parent if path.suffix == ".json" else path
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".dca_jax.partial"
            try:
                probe.write_bytes(bytes(4096))
            finally:
                probe.unlink(missing_ok=True)
        before = frozenset(folder.rglob("*.json*"))
    try:
        yield
    except sqlite3.Error as error:
        raise InputError(
            f"lm-eval's cache cannot be written: {error}; make room on the disk, or give another "
            "file to --use_cache, then repeat the same command"
        ) from error
    if folder is not None:
        _check_written(folder, frozenset(folder.rglob("*.json*")) - before)


def _check_written(folder: Path, files: frozenset[Path]) -> None:
    broken = sorted(file for file in files if not _whole(file))
    for file in broken:
        file.unlink()
    if broken or not files:
        names = ", ".join(file.name for file in broken) or "its results"
        raise InputError(
            f"lm-eval could not write {names} to {folder} (see its warning); make room there, or "
            "choose another folder, then repeat the same command"
        )


def _whole(file: Path) -> bool:
    """Whether a file of JSON or JSON lines is complete."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".jsonl":
        return text == "" or text.endswith("\n")
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
