"""Packed matrices in an Orbax checkpoint: written packed, read packed or unpacked.

Instead of a packed matrix a checkpoint has arrays of its parts: `values` and `scale`, and `zero` or
`offset` if present. They have the leading axes of layers and experts, then the rows and columns of
Hugging Face's matrix, [out, in]. Two int4 share a byte, the first in its lower half; the other
arrays have one number per tile. So the arrays do not depend on the mesh; at device borders, groups
are split when they are read (`dca_jax.weights.kept`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dca_jax.config import LlamaConfig
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.products.packed import DTYPES
from dca_jax.weights.kept import Index, Kept, KeptTensor, Scales, check_finite, sampled
from dca_jax.weights.orbax import Pieces, StreamedArray, read_piece
from dca_jax.weights.parameters import PIECE_SIZE, Parameter, Progress
from dca_jax.weights.tensor_files import StoredTensor

UINT8 = np.dtype(np.uint8)


def part_shapes(row: Parameter, config: LlamaConfig, kept: Kept) -> dict[str, Any]:
    """Shape and dtype of a packed matrix's arrays, by name."""
    rows, columns = row.their_shape(config)
    lead = row.shape(config)[: row.leading]
    tiles = [-(-size // tile) for size, tile in zip((rows, columns), kept.tile, strict=True)]
    dtypes = {"scale": kept.scale, "zero": UINT8 if kept.has_zeros else None, "offset": kept.offset}
    width = columns // 2 if kept.form == "int4" else columns
    return {
        "values": jax.ShapeDtypeStruct((*lead, rows, width), DTYPES[kept.form]),
        **{
            name: jax.ShapeDtypeStruct((*lead, *tiles), dtype)
            for name, dtype in dtypes.items()
            if dtype is not None
        },
    }


def streamed_parts(
    row: Parameter,
    config: LlamaConfig,
    tensors: Sequence[KeptTensor],
    progress: Progress | None = None,
) -> dict[str, StreamedArray]:
    """A packed matrix's arrays, which are read piece by piece while being written.

    Args:
        tensors: all its tensors in order; they are packed alike.
        progress: called with the path and the bytes of each piece.

    Raises:
        InputError: a scale is NaN or infinite (when its piece is read).
    """
    kept = tensors[0].kept
    assert kept is not None
    shapes, height = part_shapes(row, config, kept), _height(row, config, kept)
    rows, columns = row.their_shape(config)
    block = (min(kept.tile[0], rows), min(kept.tile[1], columns))

    def pieces() -> Iterator[Pieces]:
        """Some rows of every array, for which the tensor is read once."""
        for number, tensor in enumerate(tensors):
            corner = np.unravel_index(number, shapes["values"].shape[:-2]) if row.leading else ()
            lead = tuple(slice(int(at), int(at) + 1) for at in corner)
            for start in range(0, rows, height):
                part = slice(start, min(start + height, rows))
                found: Pieces = {}
                for name, piece in _read_parts(tensor, kept, part, columns, block).items():
                    at = part
                    if name != "values":
                        if start % block[0]:
                            continue  # one tile has all rows, and came with the first of them
                        at = slice(start // block[0], -(-part.stop // block[0]))
                    where = (*lead, at, slice(0, piece.shape[-1]))
                    found[name] = where, piece[(None,) * row.leading]
                yield found
                if progress is not None:
                    progress(row.path, sum(piece.nbytes for _, piece in found.values()))

    def stream(name: str) -> StreamedArray:
        *_, count, width = shape = shapes[name].shape
        each = height if name == "values" else max(1, height // block[0])
        chunks = (*(1,) * row.leading, min(each, count), width)
        dtype = shapes[name].dtype
        return StreamedArray(shape=shape, dtype=dtype, chunks=chunks, name=name, pieces=pieces)

    return {name: stream(name) for name in shapes}


def _height(row: Parameter, config: LlamaConfig, kept: Kept) -> int:
    """Rows per piece: whole heads and whole tiles, about `PIECE_SIZE` elements."""
    rows, columns = row.their_shape(config)
    sizes, tile = row.sizes(config), kept.tile[0]
    head = math.prod(sizes[axis] for axis in row.groups[0][1:])
    unit = math.lcm(head, 1 if tile >= rows else tile)  # any rows, if there is one tile
    return max(1, PIECE_SIZE // columns // unit) * unit


def _read_parts(
    tensor: KeptTensor, kept: Kept, rows: slice, columns: int, block: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Some rows of one matrix in the arrays of `part_shapes`, by name."""
    values, scales = tensor.read_packed((rows, slice(0, columns)), block)
    check_finite(tensor.name, values, scales.scale, scales.offset)
    if kept.form == "int4":
        values = values[:, ::2] | (values[:, 1::2] << 4)
    parts = {"values": values} | scales._asdict()
    return {name: part for name, part in parts.items() if part is not None}


# --- reading ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PackedArray(StoredTensor):
    """One matrix of a packed parameter; `dtype` is float32.

    Attributes:
        path: path of the checkpoint.
        parameter: path of the parameter.
        corner: its index on the leading axes.
        how: how it is packed.
    """

    parameter: str
    corner: tuple[int, ...]
    how: Kept

    @property
    def kept(self) -> Kept:
        """How its weights are packed."""
        return self.how

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The piece `tensor[index]`, unpacked, in float32.

        Raises:
            InputError: an array is damaged.
        """
        rows, columns = index
        values, (scale, zero, offset) = self.read_packed((rows, columns), (1, 1))
        found = values.astype(np.float32)
        with np.errstate(all="ignore"):  # callers reject non-finite values
            if zero is not None:
                found -= zero
            found *= scale.astype(np.float32)
            if offset is not None:
                found += offset.astype(np.float32)
        return found

    def read_packed(self, index: Index, block: tuple[int, int]) -> tuple[np.ndarray, Scales]:
        """A piece of the integers (int4 as one per byte) or float8 values, and its blocks' scales.

        Raises:
            InputError: a zero is out of range for int4, or an array is damaged.
        """
        return self._values(index), self._scales(index, block)

    def _values(self, index: Index) -> np.ndarray:
        rows, columns = index
        if self.how.form != "int4":
            return self._read("values", index)
        first, last = columns.start // 2, -(-columns.stop // 2)
        halves = self._read("values", (rows, slice(first, last)))
        both = np.stack([halves & 15, halves >> 4], axis=-1).reshape(len(halves), -1)
        return both[:, columns.start - 2 * first : columns.stop - 2 * first]

    def _scales(self, index: Index, block: tuple[int, int]) -> Scales:
        tiles = [-(-n // tile) for n, tile in zip(self.shape, self.how.tile, strict=True)]

        def read(name: str) -> np.ndarray:
            part = partial(self._read, name)
            return sampled(part, index, block, self.how.tile, (tiles[0], tiles[1]))

        zero = read("zero") if self.how.has_zeros else None
        if zero is not None and zero.size and zero.max() > 15:
            raise InputError(
                f"{self.parameter}.zero in {self.path} contains {zero.max()}, but int4 allows at "
                "most 15; convert it again"
            )
        return Scales(read("scale"), zero, None if self.how.offset is None else read("offset"))

    def _read(self, part: str, index: Index) -> np.ndarray:
        lead = tuple(slice(at, at + 1) for at in self.corner)
        found = read_piece(self.path, f"{self.parameter}.{part}", (*lead, *index))
        return found[(0,) * len(lead)]


def packed_arrays(
    path: Path, rows: Sequence[Parameter], config: LlamaConfig, kept: Mapping[str, Kept]
) -> dict[str, list[PackedArray]]:
    """The matrices of each packed parameter of a checkpoint, in Hugging Face's order.

    Args:
        rows: the parameters that can be packed.

    Raises:
        InputError: a parameter described as packed is not one of these, or lacks its arrays.
    """
    known = {row.path: row for row in rows}
    found: dict[str, list[PackedArray]] = {}
    for name, how in kept.items():
        row = known.get(name)
        if row is None:
            raise InputError(
                f"config.json says that {shown(name, quote=False)} is packed in {path}, but this "
                "model has no such matrix that can be packed"
            )
        if how.blocks(row, row.inner(row.shape(config))) is None:
            raise InputError(
                f"config.json says that {name} is packed in int4 in {path}, but its size of "
                f"{row.their_shape(config)} does not divide into pairs"
            )
        lead = row.shape(config)[: row.leading]
        found[name] = [
            PackedArray(
                path=path,
                name=theirs,
                shape=row.their_shape(config),
                dtype=np.dtype(np.float32),
                packed=how.name(row, row.inner(row.shape(config))),
                parameter=name,
                corner=tuple(int(at) for at in np.unravel_index(number, lead)) if lead else (),
                how=how,
            )
            for number, theirs in enumerate(row.their_names(config))
        ]
    return found
