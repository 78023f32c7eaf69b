"""Common parts of Hugging Face's packed forms: integers in 32-bit words, and scales of tiles."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.weights.kept import Index, sampled
from dca_jax.weights.tensor_files import StoredTensor


def part_of(parts: Mapping[str, StoredTensor], suffix: str) -> StoredTensor:
    """A module's tensor with this suffix.

    Raises:
        InputError: there is none.
    """
    if suffix not in parts:
        first = next(iter(parts.values()))
        raise InputError(f"tensor {first.name} in {first.path.name} has no {suffix} beside it")
    return parts[suffix]


def whole(tensor: StoredTensor) -> np.ndarray:
    """All of a tensor."""
    return tensor.read(tuple(slice(0, size) for size in tensor.shape))


def check_shape(tensor: StoredTensor, *expected: tuple[int, ...]) -> None:
    """Raises InputError if a tensor has another shape than these."""
    if tensor.shape not in expected:
        raise InputError(
            f"tensor {tensor.name} in {tensor.path.name} has shape {shown(tensor.shape)}; expected "
            f"{' or '.join(map(str, expected))}"
        )


def _tiles(index: Index, tile: tuple[int, int], shape: tuple[int, int]) -> tuple[Index, Any]:
    """The scales of a piece, and the indices that repeat them over it.

    `tile` is the size of a scale's tile, `shape` the shape of the array of scales.
    """
    bounds, places = [], []
    for part, size, count in zip(index, tile, shape, strict=True):
        number = np.minimum(np.arange(part.start, part.stop) // size, count - 1)
        bounds.append(slice(int(number[0]), int(number[-1]) + 1))
        places.append(number - number[0])
    return (bounds[0], bounds[1]), np.ix_(*places)


def scaled(
    values: np.ndarray, scales: StoredTensor, index: Index, tile: tuple[int, int]
) -> np.ndarray:
    """Float32 values times the scales of their tiles; scales have two axes, or one value."""
    if math.prod(scales.shape) == 1:
        return values * whole(scales).astype(np.float32).reshape(())
    shape = (scales.shape[0], math.prod(scales.shape[1:]))  # one scale per row may have one axis
    bounds, spread = _tiles(index, tile, shape)
    found = scales.read(bounds[: len(scales.shape)]).astype(np.float32)
    return values * found.reshape(bounds[0].stop - bounds[0].start, -1)[spread]


def scales_of_blocks(
    scales: StoredTensor, index: Index, block: tuple[int, int], tile: tuple[int, int]
) -> np.ndarray:
    """The scale of each block of a piece; they have two axes, or one value."""
    shape = (scales.shape[0], math.prod(scales.shape[1:])) if scales.shape else (1, 1)

    def read(bounds: Index) -> np.ndarray:
        return scales.read(bounds[: len(scales.shape)]).reshape(
            [part.stop - part.start for part in bounds]
        )

    return sampled(read, index, block, tile, shape)


def _unpacked(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Unpacks integers of `bits` bits, lowest bits first, from int32 along an axis."""
    count = 32 // bits
    shifts = np.arange(count, dtype=np.uint32) * bits
    words = np.moveaxis(words.view(np.uint32), axis, -1)[..., None]
    found = (words >> shifts) & np.uint32(2**bits - 1)
    found = found.reshape(*found.shape[:-2], -1).astype(np.int32)
    return np.moveaxis(found, -1, axis)


def read_words(
    tensor: StoredTensor, index: Index, bits: int, axis: int, order: np.ndarray | None = None
) -> np.ndarray:
    """The piece `[index]` of the integers that are packed along an axis of a tensor."""
    count = 32 // bits
    part = index[axis]
    first, last = part.start // count, -(-part.stop // count)
    bounds = list(index)
    bounds[axis] = slice(first, last)
    found = _unpacked(tensor.read(tuple(bounds)), bits, axis)
    if order is not None:
        grouped = found.reshape(found.shape[0], -1, count)
        found = grouped[..., order].reshape(found.shape)
    cut: list[slice] = [slice(None)] * 2
    cut[axis] = slice(part.start - first * count, part.stop - first * count)
    return found[tuple(cut)]
