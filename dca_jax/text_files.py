"""Readers for untrusted text and JSON files, one for each format."""

import codecs
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dca_jax.errors import InputError
from dca_jax.fields import shown

# Encodings by byte order mark; UTF-32 comes first, because its mark begins like UTF-16's.
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

# The beginning of a pointer file that Git LFS leaves in place of a large file.
POINTER = b"version https://git-lfs.github.com/spec/"


def read_text_file(path: Path) -> str:
    """The text of a file in UTF-8, or in the encoding of its byte order mark.

    Line endings are converted to line feeds.

    Raises:
        InputError: a missing or unreadable file, a Git LFS pointer, or bytes that are not text.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except MemoryError:
        raise InputError(f"{path} is too large to be read whole; split it") from None
    return decode(content, f"{path}")


def decode(content: bytes, where: str) -> str:
    """Text from bytes, as in `read_text_file`; messages begin with `where`."""
    refuse_pointer(content, where)
    encoding = next((e for mark, e in ENCODINGS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise InputError(
                f"{where} begins with the byte order mark of {encoding.upper()} and is not text in "
                f"it (byte {error.start}); the file is damaged"
            ) from None
        raise InputError(
            f"{where} is not UTF-8 text (byte {error.start}); save it as UTF-8, for example with "
            "`iconv -f latin1 -t utf-8` if it is Latin-1"
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads any text file
    if "\0" in text:
        raise InputError(
            f"{where} contains NUL characters (the first at {text.index(chr(0))}), so it is not "
            "UTF-8 text; if it is UTF-16, save it with a byte order mark or as UTF-8"
        )
    return text


def refuse_pointer(beginning: bytes, where: Path | str) -> None:
    """Raises InputError if a file is a Git LFS pointer to one that was not downloaded."""
    if beginning.startswith(POINTER):
        raise InputError(
            f"{where} is a Git LFS pointer and not the file itself; run `git lfs pull` in its "
            "folder, or download the file again"
        )


def check_characters(text: str, where: str) -> None:
    """Refuses lone surrogates, which are not characters and cannot be encoded.

    JSON can contain them, and Python creates them from bytes of an argument that are not UTF-8.

    Raises:
        InputError: `text` contains one; the message begins with `where`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        if 0xDC80 <= half <= 0xDCFF:
            raise InputError(
                f"{where} is not UTF-8 text (byte {half - 0xDC00:#04x} at character "
                f"{error.start}); give it in UTF-8"
            ) from None
        raise InputError(
            f"{where} contains half of a surrogate pair (U+{half:04X} at character {error.start}), "
            "which is not a character; leave it out"
        ) from None


def parse_json(text: str, where: str, *, expected: str = "", unique: bool = False) -> Any:
    """The value of a JSON text.

    If a name appears twice in an object, the last value counts, as usual in Python.

    Args:
        where: beginning of the message, such as the file and line.
        expected: end of the message.
        unique: whether to refuse repeated names instead, for files that people write by hand.

    Raises:
        InputError: not JSON, nested too deeply, or a number with thousands of digits.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        reason = "it is nested too deeply"
    except (json.JSONDecodeError, _TwiceError) as error:
        reason = str(error)
    except ValueError:  # an integer that Python refuses to parse
        reason = f"it contains an integer of more than {sys.get_int_max_str_digits()} digits"
    raise InputError(f"{where} is not JSON: {shown(reason, quote=False)}{expected}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _TwiceError(f"{shown(twice)} appears twice; keep one")
    return found


class _TwiceError(Exception):
    """A name appears twice in an object."""


def json_lines(text: str, where: str, *, expected: str = "") -> Iterator[tuple[int, Any]]:
    """The number (from 1) and value of each line of JSON that is not blank.

    Only line feeds end a line (RFC 8259); a string may contain U+2028 or U+0085.

    Raises:
        InputError: as in `parse_json`, with the line number.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, parse_json(line, f"{where}: line {number}", expected=expected)
