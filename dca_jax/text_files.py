"""Text and JSON files of other people: one reader for each format."""

import codecs
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dca_jax.errors import InputError
from dca_jax.fields import shown

# By the byte order mark a file begins with; UTF-32's first, which begins like UTF-16's.
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

# How a file begins that Git LFS left in place of a large one.
POINTER = b"version https://git-lfs.github.com/spec/"


def read_text_file(path: Path) -> str:
    """The text of a file in UTF-8, or in the encoding its byte order mark names.

    Lines end in a line feed, whatever ended them in the file.

    Raises:
        InputError: no such file, one that cannot be read, a pointer of Git LFS, or bytes that are
            not text.
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
    """Text from bytes, as `read_text_file`; `where` begins the message."""
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
            f"{where} holds NUL characters (the first at {text.index(chr(0))}), so it is not text "
            "in UTF-8; if it is UTF-16, save it with a byte order mark or as UTF-8"
        )
    return text


def refuse_pointer(beginning: bytes, where: Path | str) -> None:
    """Raises InputError where a file begins as the pointer to one that was not downloaded."""
    if beginning.startswith(POINTER):
        raise InputError(
            f"{where} is a pointer of Git LFS and not the file itself; run `git lfs pull` in its "
            "folder, or download the file again"
        )


def check_characters(text: str, where: str) -> None:
    """Refuses half of a surrogate pair, which is no character and cannot be written anywhere.

    JSON can spell one, and Python makes them of an argument's bytes that are not UTF-8.

    Raises:
        InputError: `text` holds one; `where` begins the message.
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
            f"{where} holds half of a surrogate pair (U+{half:04X} at character {error.start}), "
            "which is no character; leave it out"
        ) from None


def parse_json(text: str, where: str, *, expected: str = "", unique: bool = False) -> Any:
    """The value of a JSON text.

    Of a name that is in an object twice the last value counts, as everywhere in Python.

    Args:
        where: what the message begins with, such as the file and line.
        expected: what it ends with.
        unique: whether such a name is refused instead: right for what people write by hand.

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
        reason = f"it holds an integer of more than {sys.get_int_max_str_digits()} digits"
    raise InputError(f"{where} is not JSON: {shown(reason, quote=False)}{expected}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _TwiceError(f"{shown(twice)} appears twice; keep one")
    return found


class _TwiceError(Exception):
    """A name that is in an object twice."""


def json_lines(text: str, where: str, *, expected: str = "") -> Iterator[tuple[int, Any]]:
    """The number (from 1) and value of each line of JSON that is not blank.

    Only line feeds end a line (RFC 8259): a string may hold U+2028 or U+0085.

    Raises:
        InputError: as `parse_json`, with the line's number.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, parse_json(line, f"{where}: line {number}", expected=expected)
