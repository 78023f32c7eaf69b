"""Writing to a disk that may be full, read-only or without write permission."""

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
    errno.ENOTDIR: "choose a path whose parents are all folders",
    errno.EEXIST: "choose another name, or remove what is there",
    errno.EISDIR: "choose another name, or remove what is there",
}
# The form of a system error from TensorStore and from Rust libraries (safetensors, tokenizers).
_CODE = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)")


@contextmanager
def output_written() -> Iterator[None]:
    """Reports write errors on standard output, such as a full disk; wraps a whole program.

    Raises:
        InputError: as in `writing`; the remaining output is discarded.
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
    """Turns system errors in a block that writes `path` into an `InputError`.

    This includes system errors behind the exceptions of TensorStore, Orbax and safetensors. All
    other errors pass unchanged.

    Raises:
        InputError: the disk is full or read-only, a folder is missing or not writable, or a name is
            too long. The message has the path, the reason and what to do.
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
    """Writes a file under a temporary name with `write` and renames it to `path`.

    So the file is either complete or absent.

    Raises:
        InputError: as in `writing`.
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
    """Appends a line to an unbuffered file, completely or not at all.

    Args:
        file: an unbuffered file; a buffer would retry on closing what a full disk has refused.
        path: its path, for the message.
        sync: whether to wait until the line is on the disk.

    Raises:
        InputError: as `writing`.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        with writing(path):
            while line:  # a nearly full disk may accept only a part
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
