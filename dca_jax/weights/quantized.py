"""Hugging Face checkpoints with packed weights (`quantization_config`): unpacked or kept packed.

Each packed weight [out, in] is w = (q - zero) * scale, with a scale, and possibly a zero, for each
tile: the whole matrix, a row, a group of columns of one row, or a block. Supported are

- `fp8`: float8 in blocks (DeepSeek's and Qwen's; `weight_scale_inv` multiplies);
- `compressed-tensors`: int8 and int4 packed into int32, int8, and float8, by tensor, row, group or
  block (https://github.com/vllm-project/compressed-tensors);
- `awq` in its gemm packing (https://github.com/casper-hansen/AutoAWQ);
- `gptq` of 4 and 8 bits, with and without `desc_act`
  (https://github.com/ModelCloud/GPTQModel).

Other programs may also round activations for these formats; here only the weights are rounded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from dca_jax import fields
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.weights.kept import EVERY, Index, Kept, Scales, sampled
from dca_jax.weights.packed_words import (
    check_shape,
    part_of,
    read_words,
    scaled,
    scales_of_blocks,
    whole,
)
from dca_jax.weights.tensor_files import FLOATS, StoredTensor

WHERE = "quantization_config of config.json"
METHODS = ("fp8", "compressed-tensors", "awq", "gptq")
# The position of the four bits of each of eight columns in an int32 of AWQ.
AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])


@dataclass(frozen=True)
class Scheme:
    """The packing scheme of a checkpoint.

    Attributes:
        name: name for messages.
        suffix: suffix of the tensor with a module's packed weights.
        others: suffixes of its other tensors; these may be missing.
        shape: function from a module's tensors to the shape [out, in] of the weights.
        read: function that reads a piece of the weights in float32.
        kept: function from a module's tensors to the form in which they stay packed, or None.
        values, scales: functions for `dca_jax.weights.kept.KeptTensor`.
        plain: names of modules that are not packed.
    """

    name: str
    suffix: str
    others: tuple[str, ...]
    shape: Callable[[Mapping[str, StoredTensor]], tuple[int, int]]
    read: Callable[[Mapping[str, StoredTensor], Index], np.ndarray]
    kept: Callable[[Mapping[str, StoredTensor]], Kept | None]
    values: Callable[[Mapping[str, StoredTensor], Index], np.ndarray]
    scales: Callable[[Mapping[str, StoredTensor], Index, tuple[int, int]], Scales]
    plain: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class PackedTensor(StoredTensor):
    """A packed weight; `dtype` is float32.

    Attributes:
        parts: the module's tensors, by suffix.
    """

    scheme: Scheme
    parts: Mapping[str, StoredTensor]

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The piece `tensor[index]`, unpacked to float32.

        Raises:
            InputError: as in `StoredTensor.read`, or invalid group indices.
        """
        rows, columns = index
        with np.errstate(all="ignore"):  # callers refuse non-finite scales
            return self.scheme.read(self.parts, (rows, columns))

    @property
    def kept(self) -> Kept | None:
        """The form in which its weights can stay packed."""
        return self.scheme.kept(self.parts)

    def read_packed(self, index: Index, block: tuple[int, int]) -> tuple[np.ndarray, Scales]:
        """A piece of the integer or float8 values, and the scales of its blocks."""
        values = self.scheme.values(self.parts, index)
        return values, self.scheme.scales(self.parts, index, block)


def unpack(stored: Mapping[str, StoredTensor], scheme: Scheme) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, with packed weights replaced by tensors that unpack them.

    Raises:
        InputError: a packed weight in a module declared as not packed, a missing scale, or tensors
            whose shapes do not fit together.
    """
    found = dict(stored)
    for name in stored:
        module, _, suffix = name.rpartition(".")
        if suffix != scheme.suffix or not is_packed(stored[name]):
            continue
        parts = {suffix: found.pop(name)}
        for other in scheme.others:
            if f"{module}.{other}" in found:
                parts[other] = found.pop(f"{module}.{other}")
        if module in scheme.plain:
            raise InputError(
                f"{shown(module, quote=False)} is packed, and {WHERE} says that it is not "
                "(modules_to_not_convert, ignore)"
            )
        first = parts[scheme.suffix]
        found[f"{module}.weight"] = PackedTensor(
            path=first.path,
            name=name,
            shape=scheme.shape(parts),
            dtype=np.dtype(np.float32),
            packed=scheme.name,
            scheme=scheme,
            parts=parts,
        )
    return found


def is_packed(tensor: StoredTensor) -> bool:
    """Whether a tensor's values are meaningless without its scales."""
    return tensor.dtype.itemsize == 1 or np.issubdtype(tensor.dtype, np.integer)


def read_scheme(quantization: Mapping[str, Any]) -> Scheme:
    """The packing scheme from the `quantization_config` of a `config.json`.

    Raises:
        InputError: an unsupported scheme.
    """
    method = fields.text(quantization, "quant_method", WHERE)
    if method == "fp8":
        return _fp8(quantization)
    if method == "compressed-tensors":
        return _compressed(quantization)
    if method == "awq":
        return _awq(quantization)
    if method == "gptq":
        return _gptq(quantization)
    raise _refused("quant_method", method, ", ".join(METHODS))


def _refused(key: str, value: Any, expected: str) -> InputError:
    found = f"{key} is {shown(value)}, which is not supported"
    return InputError(f"{WHERE}: {found}; expected {expected}")


def _plain(quantization: Mapping[str, Any], key: str) -> frozenset[str]:
    names = quantization.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{WHERE}: {key} must be a list of names, got {shown(names)}")
    return frozenset(names)


# --- fp8 in blocks -----------------------------------------------------------------------------


def _fp8(quantization: Mapping[str, Any]) -> Scheme:
    block = quantization.get("weight_block_size")
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(map(_is_size, block)):
        raise _refused("weight_block_size", block, "the two sizes of a block, such as [128, 128]")
    if (form := fields.text(quantization, "fmt", WHERE, default="e4m3")) != "e4m3":
        raise _refused("fmt", form, "e4m3")
    tile = (block[0], block[1])
    return Scheme(
        name="fp8",
        suffix="weight",
        others=("weight_scale_inv", "input_scale"),
        shape=lambda parts: _blocked_shape(parts, "weight_scale_inv", tile),
        read=lambda parts, index: scaled(
            parts["weight"].read(index).astype(np.float32), parts["weight_scale_inv"], index, tile
        ),
        kept=lambda parts: _kept("fp8", tile, parts["weight_scale_inv"]),
        values=lambda parts, index: parts["weight"].read(index),
        scales=lambda parts, index, block: Scales(
            scales_of_blocks(parts["weight_scale_inv"], index, block, tile)
        ),
        plain=_plain(quantization, "modules_to_not_convert"),
    )


def _kept(form: str, tile: tuple[int, int], scales: StoredTensor) -> Kept | None:
    """The form for `Packed`, if it supports scales of this dtype; else None."""
    known = [FLOATS[name] for name in ("F32", "F16", "BF16")]
    return Kept(form, tile, scales.dtype) if scales.dtype in known else None


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= fields.LARGEST


def _blocked_shape(
    parts: Mapping[str, StoredTensor], scale: str, tile: tuple[int, int]
) -> tuple[int, int]:
    rows, columns = _two_axes(parts["weight"])
    blocks = (-(-rows // tile[0]), -(-columns // tile[1]))
    check_shape(part_of(parts, scale), blocks)
    return rows, columns


def _two_axes(tensor: StoredTensor) -> tuple[int, int]:
    if len(tensor.shape) != 2:
        raise InputError(
            f"tensor {tensor.name} in {tensor.path.name} is packed and has {len(tensor.shape)} "
            "axes; expected 2"
        )
    return tensor.shape[0], tensor.shape[1]


# --- compressed-tensors ------------------------------------------------------------------------


def _compressed(quantization: Mapping[str, Any]) -> Scheme:
    groups = fields.mapping(quantization, "config_groups", WHERE) or {}
    if len(groups) != 1:
        raise _refused("config_groups", list(groups), "one group for all linear layers")
    where = f"{WHERE}, {shown(next(iter(groups)), quote=False)}"
    group = fields.mapping(groups, next(iter(groups)), WHERE) or {}
    if group.get("targets") != ["Linear"]:
        raise _refused("targets", group.get("targets"), '["Linear"]')
    for key in ("kv_cache_scheme", "transform_config"):
        if quantization.get(key):
            raise _refused(key, quantization[key], "none")
    sparsity = fields.mapping(quantization, "sparsity_config", WHERE) or {}
    if sparsity.get("format", "dense") != "dense":
        raise _refused("sparsity_config", sparsity, "none, or the format dense")
    weights = fields.mapping(group, "weights", where) or {}
    form = fields.text(group, "format", where) or fields.text(quantization, "format", WHERE)
    kind, bits = weights.get("type", "int"), cast(int, weights.get("num_bits"))
    known = {
        "pack-quantized": [("int", 4), ("int", 8)],
        "int-quantized": [("int", 8)],
        "float-quantized": [("float", 8)],
        "naive-quantized": [("int", 8), ("float", 8)],
    }
    if (kind, bits) not in known.get(form, []):
        raise _refused("format", f"{form} of {kind}{bits}", ", ".join(known))
    tile = _compressed_tile(weights, where)
    plain = _plain(quantization, "ignore")
    if form == "pack-quantized":
        return Scheme(
            name=f"compressed-tensors, int{bits}",
            suffix="weight_packed",
            others=("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
            shape=lambda parts: _packed_shape(parts, bits, tile),
            read=lambda parts, index: _read_packed(parts, index, bits, tile),
            kept=lambda parts: _kept_packed(parts, bits, tile),
            values=lambda parts, index: _packed_values(parts, index, bits),
            scales=lambda parts, index, block: _packed_scales(parts, index, block, bits, tile),
            plain=plain,
        )
    if weights.get("symmetric") is False:
        raise _refused("symmetric", False, f"true for the format {form}")
    return Scheme(
        name=f"compressed-tensors, {kind}{bits}",
        suffix="weight",
        others=("weight_scale", "input_scale"),
        shape=lambda parts: _scaled_shape(parts, tile),
        read=lambda parts, index: scaled(
            parts["weight"].read(index).astype(np.float32), parts["weight_scale"], index, tile
        ),
        kept=lambda parts: _kept("fp8" if kind == "float" else "int8", tile, parts["weight_scale"]),
        values=lambda parts, index: parts["weight"].read(index),
        scales=lambda parts, index, block: Scales(
            scales_of_blocks(parts["weight_scale"], index, block, tile)
        ),
        plain=plain,
    )


def _compressed_tile(weights: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Rows and columns per scale."""
    strategy = fields.text(weights, "strategy", where, default="tensor")
    block = weights.get("block_structure")
    if strategy == "tensor":
        return EVERY, EVERY
    if strategy == "channel":
        return 1, EVERY
    if strategy == "group":
        size = fields.integer(weights, "group_size", where)
        if size is not None:
            return 1, size
    if strategy == "block" and isinstance(block, list) and [*map(_is_size, block)] == [True] * 2:
        return block[0], block[1]
    raise _refused("strategy", strategy, "tensor, channel, group or block, with its size")


def _scale_shapes(shape: tuple[int, int], tile: tuple[int, int]) -> list[tuple[int, ...]]:
    """The possible shapes of an array of scales."""
    rows, columns = shape
    full = (-(-rows // tile[0]), -(-columns // tile[1]))
    if full == (1, 1):
        return [full, (1,), ()]
    return [full, full[:1]] if full[1] == 1 else [full]


def _scaled_shape(parts: Mapping[str, StoredTensor], tile: tuple[int, int]) -> tuple[int, int]:
    shape = _two_axes(parts["weight"])
    check_shape(part_of(parts, "weight_scale"), *_scale_shapes(shape, tile))
    return shape


def _packed_shape(
    parts: Mapping[str, StoredTensor], bits: int, tile: tuple[int, int]
) -> tuple[int, int]:
    packed = parts["weight_packed"]
    rows, words = _two_axes(packed)
    check_shape(part_of(parts, "weight_shape"), (2,))
    said = whole(parts["weight_shape"]).tolist()
    if said[0] != rows or not 0 <= words * 32 // bits - said[1] < 32 // bits or said[1] < 1:
        raise InputError(
            f"tensor {packed.name} in {packed.path.name} has shape {packed.shape}, and its "
            f"weight_shape is {said}; they do not fit together with {bits} bits a weight"
        )
    shape = (rows, int(said[1]))
    scales = _scale_shapes(shape, tile)
    check_shape(part_of(parts, "weight_scale"), *scales)
    if "weight_zero_point" in parts:
        check_shape(parts["weight_zero_point"], (-(-scales[0][0] * bits // 32), scales[0][1]))
    if "weight_g_idx" in parts:
        check_shape(parts["weight_g_idx"], (shape[1],))
    return shape


def _read_packed(
    parts: Mapping[str, StoredTensor], index: Index, bits: int, tile: tuple[int, int]
) -> np.ndarray:
    rows, columns = index
    values = read_words(parts["weight_packed"], index, bits, 1)
    scales = parts["weight_scale"]
    if "weight_g_idx" not in parts and "weight_zero_point" not in parts:
        return scaled((values - 2 ** (bits - 1)).astype(np.float32), scales, index, tile)
    group = _groups(parts, "weight_g_idx", columns, tile[1], scales)
    if "weight_zero_point" in parts:
        every = slice(0, scales.shape[1])
        zeros = read_words(parts["weight_zero_point"], (rows, every), bits, 0)[:, group]
    else:
        zeros = np.int32(2 ** (bits - 1))
    scale = scales.read((rows, slice(0, scales.shape[1]))).astype(np.float32)[:, group]
    return (values - zeros).astype(np.float32) * scale


def _kept_packed(
    parts: Mapping[str, StoredTensor], bits: int, tile: tuple[int, int]
) -> Kept | None:
    """The form to keep; None for reordered inputs and for int8 with zeros."""
    if "weight_g_idx" in parts or (bits == 8 and "weight_zero_point" in parts):
        return None
    return _kept(f"int{bits}", tile, parts["weight_scale"])


def _packed_values(parts: Mapping[str, StoredTensor], index: Index, bits: int) -> np.ndarray:
    values = read_words(parts["weight_packed"], index, bits, 1)
    return values.astype(np.uint8) if bits == 4 else (values - 128).astype(np.int8)


def _packed_scales(
    parts: Mapping[str, StoredTensor],
    index: Index,
    block: tuple[int, int],
    bits: int,
    tile: tuple[int, int],
) -> Scales:
    scale = scales_of_blocks(parts["weight_scale"], index, block, tile)
    if bits == 8:
        return Scales(scale)
    if "weight_zero_point" not in parts:
        return Scales(scale, np.full(scale.shape, 8, np.uint8))
    zeros = parts["weight_zero_point"]
    shape = (parts["weight_packed"].shape[0], zeros.shape[1])
    zero = sampled(lambda bounds: read_words(zeros, bounds, 4, 0), index, block, tile, shape)
    return Scales(scale, zero.astype(np.uint8))


def _groups(
    parts: Mapping[str, StoredTensor], name: str, columns: slice, size: int, scales: StoredTensor
) -> np.ndarray:
    """The group of each column of a piece, by position or from an array of groups."""
    count = scales.shape[-1] if name == "weight_g_idx" else scales.shape[0]
    if name not in parts:
        return np.arange(columns.start, columns.stop) // size
    found = parts[name].read((columns,))
    if found.size and not 0 <= found.min() <= found.max() < count:
        raise InputError(
            f"tensor {parts[name].name} in {parts[name].path.name} names group "
            f"{found.min() if found.min() < 0 else found.max()} of {count}"
        )
    return found


# --- AWQ and GPTQ ------------------------------------------------------------------------------


def _awq(quantization: Mapping[str, Any]) -> Scheme:
    version = fields.text(quantization, "version", WHERE, default="gemm").lower()
    bits = quantization.get("bits", quantization.get("w_bit"))
    if version != "gemm":
        raise _refused("version", version, "gemm")
    if bits != 4:
        raise _refused("bits", bits, "4")
    size = quantization.get("group_size", quantization.get("q_group_size"))
    group = _group_size(size)
    return Scheme(
        name="awq",
        suffix="qweight",
        others=("qzeros", "scales"),
        shape=lambda parts: _grouped_shape(parts, 4, group, packed_axis=1),
        read=lambda parts, index: _read_awq(parts, index, group),
        kept=lambda parts: _kept("int4", (1, group), parts["scales"]),
        values=lambda parts, index: _words_turned(parts["qweight"], index, 1, AWQ_ORDER),
        scales=lambda parts, index, block: _grouped_scales(parts, index, block, group, AWQ_ORDER),
        plain=_plain(quantization, "modules_to_not_convert"),
    )


def _words_turned(
    words: StoredTensor, index: Index, axis: int, order: np.ndarray | None = None
) -> np.ndarray:
    """A piece of int4 values stored as [in, out] and packed along one of these axes."""
    rows, columns = index
    return read_words(words, (columns, rows), 4, axis, order).T.astype(np.uint8)


def _grouped_scales(
    parts: Mapping[str, StoredTensor],
    index: Index,
    block: tuple[int, int],
    group: int,
    order: np.ndarray | None = None,
    more: int = 0,
) -> Scales:
    """Scales of int4 values whose scales and zeros are stored as [groups, out]."""
    groups, outputs = parts["scales"].shape
    shape = outputs, groups

    def zeros(bounds: Index) -> np.ndarray:
        found = _words_turned(parts["qzeros"], bounds, 1, order)
        return (found + np.uint8(more)) & np.uint8(15)

    def scales(bounds: Index) -> np.ndarray:
        return parts["scales"].read(bounds[::-1]).T

    return Scales(*(sampled(read, index, block, (1, group), shape) for read in (scales, zeros)))


def _read_awq(parts: Mapping[str, StoredTensor], index: Index, group: int) -> np.ndarray:
    rows, columns = index
    values = read_words(parts["qweight"], (columns, rows), 4, 1, AWQ_ORDER)
    number = np.arange(columns.start, columns.stop) // group
    groups = slice(int(number[0]), int(number[-1]) + 1)
    zeros = read_words(parts["qzeros"], (groups, rows), 4, 1, AWQ_ORDER)
    scales = parts["scales"].read((groups, rows)).astype(np.float32)
    number = number - number[0]
    return ((values - zeros[number]).astype(np.float32) * scales[number]).T


def _gptq(quantization: Mapping[str, Any]) -> Scheme:
    bits = quantization.get("bits")
    if bits not in (4, 8):
        raise _refused("bits", bits, "4 or 8")
    form = fields.text(quantization, "checkpoint_format", WHERE, default="gptq")
    if form not in ("gptq", "gptq_v2"):
        raise _refused("checkpoint_format", form, "gptq or gptq_v2")
    group = _group_size(quantization.get("group_size"))
    more = 0 if form == "gptq_v2" else 1  # the older format stores zeros minus 1
    return Scheme(
        name=f"gptq, int{bits}",
        suffix="qweight",
        others=("qzeros", "scales", "g_idx"),
        shape=lambda parts: _grouped_shape(parts, bits, group, packed_axis=0),
        read=lambda parts, index: _read_gptq(parts, index, bits, group, more),
        kept=lambda parts: _kept_gptq(parts, bits, group),
        values=lambda parts, index: _words_turned(parts["qweight"], index, 0),
        scales=lambda parts, index, block: _grouped_scales(parts, index, block, group, more=more),
        plain=_plain(quantization, "modules_to_not_convert"),
    )


def _kept_gptq(parts: Mapping[str, StoredTensor], bits: int, group: int) -> Kept | None:
    """The form to keep for int4 whose groups have consecutive inputs; else None."""
    if bits != 4:
        return None
    if "g_idx" in parts:
        found = whole(parts["g_idx"])
        if not np.array_equal(found, np.arange(len(found)) // group):
            return None
    return _kept("int4", (1, group), parts["scales"])


def _read_gptq(
    parts: Mapping[str, StoredTensor], index: Index, bits: int, group: int, more: int
) -> np.ndarray:
    rows, columns = index
    values = read_words(parts["qweight"], (columns, rows), bits, 0)
    scales = parts["scales"]
    number = _groups(parts, "g_idx", columns, group, scales)
    every = slice(0, scales.shape[0])
    zeros = (read_words(parts["qzeros"], (every, rows), bits, 1) + more) & (2**bits - 1)
    scale = scales.read((every, rows)).astype(np.float32)
    return ((values - zeros[number]).astype(np.float32) * scale[number]).T


def _group_size(value: Any) -> int:
    if value == -1:
        return EVERY
    if not _is_size(value):
        raise _refused("group_size", value, "a number of columns, or -1 for all")
    return value


def _grouped_shape(
    parts: Mapping[str, StoredTensor], bits: int, group: int, *, packed_axis: int
) -> tuple[int, int]:
    """The shape [out, in] of weights stored as [in, out]."""
    sizes = list(_two_axes(parts["qweight"]))
    sizes[packed_axis] *= 32 // bits
    ins, outs = sizes
    groups = -(-ins // group)
    if outs % (32 // bits):
        raise InputError(
            f"tensor {parts['qweight'].name} in {parts['qweight'].path.name} has {outs} columns; "
            f"expected a multiple of {32 // bits}"
        )
    check_shape(part_of(parts, "scales"), (groups, outs))
    check_shape(part_of(parts, "qzeros"), (groups, outs * bits // 32))
    if "g_idx" in parts:
        check_shape(parts["g_idx"], (ins,))
    return outs, ins
