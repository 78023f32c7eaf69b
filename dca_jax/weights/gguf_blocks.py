"""GGUF's blocks: unpacked, and the integers and scales of those that can be kept packed.

Each row of a tensor is stored in blocks with these numbers of values (ggml's `ggml-common.h`):

    Q4_0   32: a scale; w = (q - 8) * scale
    Q4_1   32: a scale and a minimum; w = q * scale + minimum
    Q4_K   256: 8 groups with 6-bit scales and minima, and two scales of those
    Q8_0   32: a scale; w = q * scale
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Integer, UInt8

from dca_jax.weights.kept import Kept

GROUP = 32  # values per scale, in all of them
_HALF, _WIDE = np.dtype(np.float16), np.dtype(np.float32)
KEPT = {
    "Q4_0": Kept("int4", (1, GROUP), _HALF),
    "Q4_1": Kept("int4", (1, GROUP), _HALF, offset=_HALF),
    "Q4_K": Kept("int4", (1, GROUP), _WIDE, offset=_WIDE),
    "Q8_0": Kept("int8", (1, GROUP), _HALF),
}
# The offset of the integers in a block.
_BEGIN = {"Q4_0": 2, "Q4_1": 4, "Q4_K": 16, "Q8_0": 2}
TOGETHER = 2048  # blocks that `unpacked` takes for a row


def unpacked(
    kind: str, blocks: UInt8[np.ndarray, "*rows blocks bytes"]
) -> Float[np.ndarray, "*rows values"]:
    """The values of whole blocks of any kind, float32; not finite where their scales are not."""
    # Imported where it is needed.
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    *rows, count, size = blocks.shape
    number = GGMLQuantizationType[kind]
    flat, width = blocks.reshape(-1, size), GGML_QUANT_SIZES[number][0]
    values = np.empty((len(flat), width), _WIDE)
    # The library unpacks 16 rows at a time, too few values in a small model: it is given one row.
    with np.errstate(all="ignore"):  # callers reject scales that are not finite
        for at in range(0, len(flat), TOGETHER):
            part = flat[at : at + TOGETHER].reshape(1, -1)
            values[at : at + TOGETHER] = dequantize(part, number).reshape(-1, width)
    return values.reshape(*rows, count * width)


def block_values(
    kind: str, blocks: UInt8[np.ndarray, "rows blocks bytes"]
) -> Integer[np.ndarray, "rows values"]:
    """The integers of whole blocks: int8, or int4 with one per byte of uint8."""
    stored = blocks[..., _BEGIN[kind] :]
    rows = len(blocks)
    if kind == "Q8_0":
        return stored.reshape(rows, -1).view(np.int8)
    stored = stored.reshape(rows, -1, GROUP if kind == "Q4_K" else GROUP // 2)
    halves = np.stack([stored & 15, stored >> 4], axis=-2)
    return halves.reshape(rows, -1)


def block_scales(
    kind: str, blocks: UInt8[np.ndarray, "rows blocks bytes"]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The scale, and the offset if there is one, of each group of whole blocks: [rows, groups]."""
    first, second = _number(blocks, 0), _number(blocks, 2)
    if kind != "Q4_K":
        return first, second if kind == "Q4_1" else None
    scale, minimum = _of_six_bits(blocks[..., 4:16])
    with np.errstate(all="ignore"):  # callers reject non-finite scales
        scale = first[..., None].astype(np.float32) * scale.astype(np.float32)
        minimum = second[..., None].astype(np.float32) * minimum.astype(np.float32)
    return scale.reshape(len(blocks), -1), -minimum.reshape(len(blocks), -1)


def _number(blocks: np.ndarray, begin: int) -> Any:
    return np.ascontiguousarray(blocks[..., begin : begin + 2]).view(np.float16)[..., 0]


def _of_six_bits(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima from 12 bytes.

    The lower six bits of the first eight bytes are four of each. The last four bytes contain the
    lower four bits of the others, whose upper two bits are the upper bits of the first eight bytes.
    """
    first, second, third = (stored[..., n : n + 4] for n in (0, 4, 8))
    scales = [first & 63, (third & 15) | (first >> 6 << 4)]
    minima = [second & 63, (third >> 4) | (second >> 6 << 4)]
    return np.concatenate(scales, axis=-1), np.concatenate(minima, axis=-1)
