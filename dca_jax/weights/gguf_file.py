"""GGUF files: lists metadata and tensors without reading the data, and unpacks piece by piece.

The format is ggml's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): a magic number, a
version, two counts, the metadata, a description of every tensor, and their data, aligned. The
package `gguf` unpacks the data. Its reader for the rest is not used: it creates an object for every
element of every array (14 seconds for a vocabulary of 49,152), and trusts the file.
"""

import functools
import math
import mmap
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.text_files import POINTER, refuse_pointer
from dca_jax.weights.gguf_blocks import GROUP, KEPT, block_scales, block_values, unpacked
from dca_jax.weights.kept import Index, Kept, Scales, corners
from dca_jax.weights.tensor_files import StoredTensor

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ARCHITECTURE, ALIGNMENT = "general.architecture", "general.alignment"
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

# Limits far beyond any model, to reject damaged files.
MOST_ENTRIES = 2**16  # entries of metadata, and tensors
MOST_STRINGS = 2**22  # strings of an array; vocabularies have up to a quarter of a million
MOST_BYTES = 2**24  # bytes of a string
MOST_AXES = 4

FLOAT32, STRING, ARRAY = 6, 8, 9
SIZE = struct.Struct("<Q")  # of a string; a vocabulary has a hundred thousand
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}

# Storage types by ggml's number. In packed types a block of values shares its scales; unpacked
# values are float32, as in ggml.
PLAIN = {
    0: ("F32", np.dtype(np.float32)),
    1: ("F16", np.dtype(np.float16)),
    30: ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
PACKED = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 20: "IQ4_NL", 23: "IQ4_XS"}
PACKED |= {10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}


@dataclass(frozen=True, kw_only=True)
class GGUFTensor(StoredTensor):
    """A tensor of a GGUF file; its shape is in NumPy's order, with the last axis fastest.

    Attributes:
        offset: offset of its data in the file, in bytes.
        head_dim: head_dim for q and k of a Llama, whose rows llama.cpp permutes; else 0.
    """

    offset: int
    head_dim: int = 0

    def part(self, number: int) -> "GGUFTensor":
        """One of the tensors that are stacked along this one's first axis.

        Raises:
            InputError: it has too few axes or too few tensors.
        """
        count, *shape = self.shape
        if not shape or number >= count:
            raise InputError(
                f"tensor {shown(self.name)} in {self.path.name} has shape {shown(self.shape)}; "
                f"expected a shape for at least {number + 1} experts"
            )
        offset = self.offset + number * (self.stored_bytes // count)
        return replace(self, shape=tuple(shape), offset=offset)

    @property
    def stored_bytes(self) -> int:
        """Size of its data in the file."""
        values_of_block, block_bytes = self._block
        return math.prod(self.shape) // values_of_block * block_bytes

    @property
    def _block(self) -> tuple[int, int]:
        """Number of values of a block, and its bytes."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if not self.packed:
            return 1, self.dtype.itemsize
        return GGML_QUANT_SIZES[GGMLQuantizationType[self.packed]]

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The piece `tensor[index]`, unpacked; one slice with both ends per axis.

        Raises:
            InputError: the file has changed since it was listed.
        """
        if self.head_dim and len(index) == 1:  # a bias: each value is a row
            whole = replace(self, head_dim=0).read((slice(0, self.shape[0]),))
            return whole[self._rows(index)]
        blocks, first = self._blocks(index)
        if not self.packed:
            return blocks.reshape(*blocks.shape[:-2], -1).view(self.dtype)
        cut = slice(index[-1].start - first, index[-1].stop - first)
        return unpacked(self.packed, blocks)[..., cut]

    @property
    def kept(self) -> Kept | None:
        """How its weights can be kept packed, or None."""
        return KEPT.get(self.packed)

    def read_packed(self, index: Index, block: tuple[int, int]) -> tuple[np.ndarray, Scales]:
        """A piece of the integers, and the scales of its blocks."""
        blocks, first = self._blocks(index)
        values = block_values(self.packed, blocks)
        values = values[:, index[1].start - first : index[1].stop - first]
        scale, offset = block_scales(self.packed, blocks)
        groups = (corners(index, block)[1] - first) // GROUP
        scale, offset = (each if each is None else each[:, groups] for each in (scale, offset))
        assert scale is not None
        zero = np.full(scale.shape, 8, np.uint8) if self.packed == "Q4_0" else None
        return values, Scales(scale, zero, offset)

    def _blocks(self, index: tuple[slice, ...]) -> tuple[np.ndarray, int]:
        """The bytes of all blocks that overlap a piece, and their begin in a row."""
        values_of_block, block_bytes = self._block
        *outer, width = self.shape
        *rows, columns = index
        first, last = columns.start // values_of_block, -(-columns.stop // values_of_block)
        shape = (*outer, width // values_of_block, block_bytes)
        with _reading(self.path):
            data = np.memmap(self.path, np.uint8, "r", self.offset, shape)
        picked = self._rows(rows)
        found = np.array(data[(*picked, slice(first, last))])  # a copy in memory
        return found, first * values_of_block

    def _rows(self, rows: Sequence[slice]) -> tuple[Any, ...]:
        """The places of Hugging Face's rows in the file.

        llama.cpp rotates pairs of neighbours: it stores a head's rows in the order 0, h/2, 1,
        h/2 + 1, ..., and Hugging Face in the order 0, 1, ..., h - 1.
        """
        if not self.head_dim or not rows:
            return tuple(rows)
        row = np.arange(rows[0].start, rows[0].stop)
        head, inner = np.divmod(row, self.head_dim)
        half, plane = np.divmod(inner, self.head_dim // 2)
        return (head * self.head_dim + 2 * plane + half, *rows[1:])


@dataclass(frozen=True)
class GGUF:
    """A GGUF file without the data of its tensors.

    Attributes:
        path: path of the file, or of the first part of a split one.
        metadata: metadata by name: numbers, texts, lists of texts, and arrays of numbers.
        tensors: tensors by llama.cpp's name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def is_gguf(path: str | Path) -> bool:
    """Whether `path` refers to a GGUF file rather than a folder."""
    return Path(path).suffix == SUFFIX and not Path(path).is_dir()


def gguf_files(path: Path) -> list[Path]:
    """The file, or if it is part of a split file, all parts in order.

    Raises:
        InputError: a part is missing.
    """
    match = SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    if not 1 <= int(match[2]) <= count:
        raise InputError(f"{path} is named part {int(match[2])} of {count}")
    names = (f"{match[1]}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1))
    files = [path.parent / name for name in names]  # not of its target
    if missing := [file.name for file in files if not file.is_file()]:
        raise InputError(f"{path.parent}: file {missing[0]} is missing")
    return files


def read_gguf(path: str | Path) -> GGUF:
    """Reads everything except the tensors' data, and checks that the data is complete.

    Raises:
        InputError: the file is missing, truncated or damaged, is not a GGUF file of a supported
            version, has a tensor of an unsupported type, or lacks a part.
    """
    files = gguf_files(Path(path))
    return _read_files(tuple(map(_stamped, files)))


def _stamped(file: Path) -> tuple[Path, int, int]:
    """A file with its time and size, which change if it is written anew."""
    with _reading(file):
        status = file.stat()
    return file, status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=1)  # for the config, the tokenizer and the weights of a model
def _read_files(stamped: tuple[tuple[Path, int, int], ...]) -> GGUF:
    files = [file for file, *_ in stamped]
    parts = [_read_file(file) for file in files]
    count = parts[0].metadata.get("split.count", 1)
    if count not in (0, len(parts)):
        raise InputError(
            f"{files[0]} is one of {shown(count)} parts, but {len(parts)} files are named as its "
            "parts; give all of them names such as model-00001-of-00002.gguf"
        )
    tensors: dict[str, GGUFTensor] = {}
    for number, part in enumerate(parts):
        if part.metadata.get("split.no", number) != number:
            raise InputError(
                f"{part.path} is part {shown(part.metadata['split.no'])} by its metadata (counted "
                f"from 0), and {number} by its name"
            )
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise InputError(f"tensor {shown(name)} is twice in {part.path}")
            tensors[name] = tensor
    return GGUF(files[0], parts[0].metadata, tensors)


def _read_file(path: Path) -> GGUF:
    with _reading(path), path.open("rb") as file:
        size = path.stat().st_size
        if size == 0:
            raise InputError(f"{path} is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(path, data, size).read()


class _Header:
    """Parses a file's metadata and descriptions, never reading past its end."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0

    def read(self) -> GGUF:
        refuse_pointer(self.data[: len(POINTER)], self.path)
        if self.data[:4] != MAGIC:
            raise InputError(f"{self.path} is not a GGUF file: it begins with {self.data[:4]!r}")
        self.at = 4
        (version,) = self.numbers("I")
        if version not in VERSIONS:
            big = int.from_bytes(struct.pack("<I", version), "big") in VERSIONS
            reason = "it is written for big-endian machines" if big else f"its version is {version}"
            raise InputError(
                f"{self.path} cannot be read: {reason}; expected version 2 or 3, little-endian"
            )
        tensor_count, entries = self.numbers("QQ")
        for what, count in (("tensors", tensor_count), ("entries of metadata", entries)):
            if count > MOST_ENTRIES:
                raise InputError(
                    f"{self.path} is damaged: it says that it has {count} {what}; expected at most "
                    f"{MOST_ENTRIES}"
                )
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            name = self.string("a name in the metadata")
            if name in metadata:
                raise InputError(f"{self.path} is damaged: {shown(name)} is twice in its metadata")
            (kind,) = self.numbers("I")
            metadata[name] = self.value(name, kind)
        described = [self.tensor() for _ in range(tensor_count)]
        return GGUF(self.path, metadata, self.placed(described, metadata))

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack_from(f"<{form}", self.data, self.take(struct.calcsize(f"<{form}")))

    def take(self, size: int) -> int:
        """The start of the next `size` bytes."""
        begin, self.at = self.at, self.at + size
        if self.at > self.size:
            raise InputError(
                f"{self.path} is truncated or damaged: its description extends beyond its "
                f"{self.size} bytes; download it again"
            )
        return begin

    def string(self, what: str) -> str:
        (size,) = SIZE.unpack_from(self.data, self.take(8))
        if size > MOST_BYTES:
            raise InputError(
                f"{self.path} is damaged: {shown(what, quote=False)} has {size} bytes; expected at "
                f"most {MOST_BYTES}"
            )
        begin = self.take(size)
        try:
            return self.data[begin : self.at].decode()
        except UnicodeDecodeError:
            raise InputError(
                f"{self.path} is damaged: {shown(what, quote=False)} is not UTF-8 text"
            ) from None

    def value(self, name: str, kind: int) -> Any:
        if kind == FLOAT32:  # its shortest decimal: 1e-5, not 9.999999747378752e-06
            return float(str(np.float32(self.numbers("f")[0])))
        if kind in SCALARS:
            return self.numbers(SCALARS[kind])[0]
        if kind == STRING:
            return self.string(name)
        if kind != ARRAY:
            raise InputError(f"{self.path} is damaged: {shown(name)} has an unknown type ({kind})")
        inner, count = self.numbers("IQ")
        if inner in SCALARS:
            dtype = np.dtype(SCALARS[inner]).newbyteorder("<")
            begin = self.take(count * dtype.itemsize)
            return np.frombuffer(self.data[begin : self.at], dtype)
        if inner != STRING or count > MOST_STRINGS:
            what = "values of an unknown type" if inner != STRING else "texts"
            raise InputError(f"{self.path} is damaged: {shown(name)} lists {count} {what}")
        return [self.string(name) for _ in range(count)]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and offset in the data."""
        name = self.string("a tensor's name")
        (axes,) = self.numbers("I")
        if not 1 <= axes <= MOST_AXES:
            raise InputError(
                f"{self.path}: tensor {shown(name)} has {axes} axes; expected 1 to {MOST_AXES}"
            )
        sizes = self.numbers("Q" * axes)
        kind, offset = self.numbers("IQ")
        return name, tuple(reversed(sizes)), kind, offset

    def placed(
        self, described: list[tuple[str, tuple[int, ...], int, int]], metadata: dict[str, Any]
    ) -> dict[str, GGUFTensor]:
        """The tensors, after checking that all are within the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        alignment = metadata.get(ALIGNMENT, 32)
        if type(alignment) is not int or alignment not in (8 << n for n in range(16)):
            raise InputError(
                f"{self.path}: {ALIGNMENT} must be a power of two from 8 to 262144, got "
                f"{shown(alignment)}"
            )
        start = -(-self.at // alignment) * alignment
        found: dict[str, GGUFTensor] = {}
        for name, shape, number, offset in described:
            kind, dtype = PLAIN.get(number, (PACKED.get(number), np.dtype(np.float32)))
            if kind is None:
                known = {int(each): each.name for each in GGMLQuantizationType}
                raise InputError(
                    f"{self.path}: tensor {shown(name)} is stored in "
                    f"{known.get(number, f'an unknown type ({number})')}, which is not supported; "
                    "expected one of "
                    f"{', '.join([n for n, _ in PLAIN.values()] + list(PACKED.values()))}"
                )
            values, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
            if shape[-1] % values or 0 in shape:
                raise InputError(
                    f"{self.path}: tensor {shown(name)} has shape {shown(shape)}, and {kind} packs "
                    f"rows in blocks of {values}; the file is damaged"
                )
            packed, where = PACKED.get(number, ""), {"path": self.path, "offset": start + offset}
            tensor = GGUFTensor(name=name, shape=shape, dtype=dtype, packed=packed, **where)
            size = tensor.stored_bytes
            if start + offset + size > self.size or offset % alignment:
                raise InputError(
                    f"{self.path} is truncated or damaged: tensor {shown(name)} should have {size} "
                    f"bytes from byte {start + offset} on, of {self.size}; download it again"
                )
            if name in found:
                raise InputError(f"{self.path} is damaged: it has tensor {shown(name)} twice")
            found[name] = tensor
        return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a mapping longer than the file
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} has changed since it was listed; load it again") from None
