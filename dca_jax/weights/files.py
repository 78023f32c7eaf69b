"""Folders of files: read safely, written whole."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.text_files import parse_json, read_text_file

# Beside the weights and config.json: what a tokenizer and generation need.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def member(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, refused if the name or a link leads out of the folder.

    A link into the `blobs` of the same Hugging Face cache is allowed: there every file of a
    snapshot is one.

    Raises:
        InputError: `name` is not a plain file name, its target lies elsewhere, or it is no file.
    """
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
        raise InputError(
            f"{folder}: names a file outside its folder: {shown(name)}; expected a plain file name"
        )
    path = folder / name
    try:
        is_file = path.is_file()
    except OSError:  # a name that the file system refuses
        is_file = False
    if not is_file:
        raise InputError(f"{folder}: file {shown(name, quote=False)} is missing")
    home, target = folder.resolve(), path.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if target.parent not in allowed:
        raise InputError(
            f"{path} is a link that leads out of its folder (to {target}); "
            "put the file itself into the folder"
        )
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in `folder`'s JSON file `name`.

    Raises:
        InputError: no such file, not UTF-8, not JSON, or not a JSON object.
    """
    path = member(folder, name)
    value = parse_json(read_text_file(path), f"{path}")
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def copy_companions(source: Path, destination: Path) -> list[Path]:
    """Copies a model's config.json and `COMPANIONS`, where there are any; returns the originals."""
    names = [name for name in COMPANIONS if (source / name).exists()]
    originals = [member(source, name) for name in ("config.json", *names)]
    for original in originals:
        shutil.copyfile(original, destination / original.name)
    return originals


@contextmanager
def written_aside(destination: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `destination` when the block ends well.

    Until then it is `.NAME.partial` beside it. If the block raises, it is removed; if the process
    is killed, it stays behind and the next writer clears it. A lock on the folder itself keeps two
    writers of one destination apart, and dies with its process.

    Raises:
        InputError: `destination` exists, its parent does not, or another process is writing it.
    """
    refuse_existing(destination)
    if not destination.parent.is_dir():
        raise InputError(f"{destination.parent} is no folder; create it first")
    aside = destination.with_name(f".{destination.name}.partial")
    aside.mkdir(exist_ok=True)
    lock = os.open(aside, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another writer may have finished between our mkdir and our lock.
            ours = aside.is_dir() and os.path.samestat(os.fstat(lock), aside.stat())
        except BlockingIOError:
            ours = False
        if not ours:
            raise InputError(f"another process is writing {destination}; wait for it, then retry")
        _clear(aside)
        try:
            yield aside
            refuse_existing(destination)
            aside.rename(destination)
        except BaseException:
            shutil.rmtree(aside)
            raise
    finally:
        os.close(lock)


def refuse_existing(destination: Path) -> None:
    """Raises InputError if `destination` exists: nothing is ever overwritten."""
    if destination.exists() or destination.is_symlink():
        raise InputError(f"{destination} exists already; remove it or choose another name")


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
