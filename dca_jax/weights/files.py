"""Reading folders safely, and writing them atomically."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dca_jax.disk import writing
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.text_files import POINTER, parse_json, read_text_file, refuse_pointer

PARAMS = "params"  # the Orbax checkpoint's name inside a converted folder

# The folder where transformers stores all chat templates except the default one.
TEMPLATES = "additional_chat_templates"

# Files that are not copied from a checkpoint's folder: weights and trainer states in any format,
# with their indexes; code, which is never run here; descriptions of an adapter or an earlier
# conversion.
WEIGHTS = frozenset(
    ".bin .ckpt .gguf .ggml .h5 .incomplete .joblib .msgpack .npy .npz .onnx .onnx_data .ot "
    ".pickle .pkl .pt .pth .safetensors .tflite".split()
)
INDEX = re.compile(r"\.index(\.\w+)?\.json")
NOT_COPIED = frozenset({"adapter_config.json", "provenance.json"})


def is_converted(folder: str | Path) -> bool:
    """Whether `folder` is a converted folder (Orbax weights) and not a Hugging Face folder.

    Raises:
        InputError: its `params` is a link to another place.
    """
    folder = Path(folder)
    if not (folder / PARAMS).is_dir():
        return False
    if (folder / PARAMS).resolve() != folder.resolve() / PARAMS:
        raise InputError(
            f"{folder / PARAMS} is a link that leads out of its folder (to "
            f"{(folder / PARAMS).resolve()}); put the folder itself there"
        )
    return True


def member(folder: Path, name: str) -> Path:
    """The file `name` in `folder`; refused if the name or a link points outside the folder.

    A link into the `blobs` of the same Hugging Face cache is allowed, because every file of a
    snapshot is such a link.

    Raises:
        InputError: `name` is not a plain file name, its target is elsewhere, or it is not a file or
            only a Git LFS pointer.
    """
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
        raise InputError(
            f"{folder}: names a file outside its folder: {shown(name)}; expected a plain file name"
        )
    path = folder / name
    try:
        is_file = path.is_file()
    except OSError:  # not a valid name for the file system
        is_file = False
    if not is_file:
        raise InputError(f"{folder}: file {shown(name, quote=False)} is missing")
    home, target = folder.resolve(), path.resolve()
    allowed = [home]
    snapshot = home.parent if home.name == TEMPLATES else home
    if snapshot.parent.name == "snapshots":
        allowed.append(snapshot.parent.parent / "blobs")
    if target.parent not in allowed:
        raise InputError(
            f"{path} is a link that leads out of its folder (to {target}); "
            "put the file itself into the folder"
        )
    try:
        with path.open("rb") as file:
            refuse_pointer(file.read(len(POINTER)), path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in `folder`'s JSON file `name`.

    Raises:
        InputError: a missing file, or one that is not UTF-8, not JSON or not a JSON object.
    """
    path = member(folder, name)
    value = parse_json(read_text_file(path), f"{path}")
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def template_files(folder: Path) -> list[Path]:
    """The chat templates in `folder`'s `additional_chat_templates`, by name; often none.

    Raises:
        InputError: the folder or a file in it is a link to a place outside.
    """
    inner = folder / TEMPLATES
    if not inner.is_dir():
        return []
    if inner.resolve() != folder.resolve() / TEMPLATES:
        raise InputError(
            f"{inner} is a link that leads out of its folder (to {inner.resolve()}); put the "
            "folder itself there"
        )
    return [member(inner, path.name) for path in sorted(inner.iterdir()) if path.suffix == ".jinja"]


def copy_companions(source: Path, destination: Path) -> list[Path]:
    """Copies the files of a checkpoint's folder except its weights; returns the originals.

    This includes config.json, tokenizer, chat templates, licence and any other file. It excludes
    folders (except the one of chat templates), hidden files, and those in `WEIGHTS`.

    Raises:
        InputError: no config.json, or a file that cannot be read or is a link to a place outside.
    """
    names = [path.name for path in sorted(source.iterdir()) if _is_companion(path)]
    originals = [member(source, name) for name in dict.fromkeys(["config.json", *names])]
    templates = template_files(source)
    if templates:
        (destination / TEMPLATES).mkdir()
    for original in (*originals, *templates):
        try:
            file = original.open("rb")
        except OSError as error:
            raise InputError(f"{original} cannot be read: {error.strerror}") from None
        with file, (destination / original.relative_to(source)).open("wb") as copy:
            shutil.copyfileobj(file, copy)
    return [*originals, *templates]


def _is_companion(path: Path) -> bool:
    code_or_weights = path.suffix in WEIGHTS or path.suffix == ".py" or INDEX.search(path.name)
    hidden = path.name.startswith(".")
    return (
        not (hidden or code_or_weights or path.name in NOT_COPIED)
        and (path.is_file() or path.is_symlink())
        and not path.is_dir()
    )


@contextmanager
def written_aside(destination: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `destination` when the block ends without an error.

    Until then it is named `.NAME.partial`. If the block raises, it is removed; if the process is
    killed, it remains and the next writer clears it. A lock on the folder, which ends with the
    process, keeps a second process from writing to the same destination.

    Raises:
        InputError: `destination` exists, its parent does not, another process is writing it, or
            writing fails (`dca_jax.disk.writing`).
    """
    with writing(destination):
        refuse_existing(destination)
        parent = destination.parent
        if parent.is_file():
            raise InputError(f"{parent} is a file; expected a folder to write into")
        if not parent.is_dir():
            raise InputError(f"{parent} is not a folder; create it first")
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
                raise InputError(
                    f"another process is writing {destination}; wait for it, then retry"
                )
            _clear(aside)
            try:
                yield aside
                refuse_existing(destination)
                aside.rename(destination)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)  # the next writer clears the rest
                raise
        finally:
            os.close(lock)


def refuse_existing(destination: Path) -> None:
    """Raises InputError if `destination` exists, because nothing is ever overwritten."""
    with writing(destination):
        if destination.exists() or destination.is_symlink():
            raise InputError(f"{destination} exists already; remove it or choose another name")


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
