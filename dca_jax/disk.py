"""Writing to a disk that may be full, read-only or not ours."""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dca_jax.errors import InputError

_ADVICE = {
    errno.ENOSPC: "make room on the disk, then run the same command again",
    errno.EDQUOT: "make room in your quota, then run the same command again",
    errno.EFBIG: "raise the limit on file sizes (`ulimit -f`), or choose another disk",
    errno.EROFS: "choose a folder on a disk that can be written to",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "create its folder first",
    errno.ENOTDIR: "choose a path that leads through folders only",
    errno.EEXIST: "choose another name, or remove what is there",
    errno.EISDIR: "choose another name, or remove what is there",
}
# How TensorStore, and libraries in Rust (safetensors, tokenizers), pass on an error of the system.
_CODE = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)")


@contextmanager
def output_written() -> Iterator[None]:
    """Around a whole program: a full disk that nobody else has noticed, as under standard output.

    Raises:
        InputError: as `writing`; what is still to be printed is dropped.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 -- until the program ends
        raise _refusal(error.filename or "standard output", error.errno) from error


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Around a block that writes `path`: what the system refuses becomes an `InputError`.

    Libraries that raise an exception of their own for it (TensorStore, Orbax, safetensors) count
    too; every other error passes as it is.

    Raises:
        InputError: the disk is full or read-only, a folder is missing or not ours, a name is too
            long; it says which path, why, and what to do.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        code = _system_code(error)
        if code is None:
            raise
        raise _refusal(path, code) from error


def written(path: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` make a file aside, and renames it to `path`: it is whole or not there.

    Raises:
        InputError: as `writing`.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            write(aside)
            aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def append(file: BinaryIO, line: bytes, path: Path, *, sync: bool = False) -> None:
    """Adds a whole line to a file without a buffer, or none of it.

    Args:
        file: without a buffer, which would try again on closing what a full disk has refused.
        path: its own, for the message.
        sync: whether to wait until the line is on the disk.

    Raises:
        InputError: as `writing`.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        with writing(path):
            while line:  # a disk that fills up may take a part
                line = line[file.write(line) :]
            if sync:
                os.fsync(file.fileno())
    except InputError:
        with suppress(OSError):
            os.ftruncate(file.fileno(), size)
        raise


def _refusal(path: Path | str, code: int) -> InputError:
    advice = _ADVICE.get(code, "check the disk, then run the same command again")
    return InputError(f"{path} cannot be written: {os.strerror(code)}; {advice}")


def _system_code(error: BaseException) -> int | None:
    """The system's error number behind an exception, or behind what it was raised from."""
    if isinstance(error, OSError):
        return error.errno
    told = _CODE.search(str(error))
    if told is not None:
        return int(told[1] or told[2])
    cause = error.__cause__
    return None if cause is None else _system_code(cause)
