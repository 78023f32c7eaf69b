"""Hugging Face checkpoints with packed weights (`quantization_config`), unpacked as they are read.

Each packed weight [out, in] is w = (q - zero) * scale, with a scale, and a zero where there is one,
for a tile of it: the whole matrix, a row, a group of columns of one row, or a block. Read are

- `fp8`: float8 in blocks (DeepSeek's and Qwen's; `weight_scale_inv` multiplies);
- `compressed-tensors`: int8 and int4 packed into int32, int8, and float8, by tensor, row, group or
  block (https://github.com/vllm-project/compressed-tensors);
- `awq` in its gemm packing (https://github.com/casper-hansen/AutoAWQ);
- `gptq` of 4 and 8 bits, with and without `desc_act`
  (https://github.com/ModelCloud/GPTQModel).

What runs these elsewhere may round activations too; here only the weights are rounded.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from dca_jax import fields
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.weights.tensor_files import StoredTensor

WHERE = "quantization_config of config.json"
METHODS = ("fp8", "compressed-tensors", "awq", "gptq")
# In an int32 of AWQ's, where the four bits of each of eight columns lie.
AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])

Index = tuple[slice, slice]


@dataclass(frozen=True)
class Scheme:
    """How the weights of a checkpoint are packed.

    Attributes:
        name: as a message calls it.
        suffix: of the tensor of a module that holds its packed weights.
        others: suffixes of those that belong to it; what of them is not there need not be.
        shape: [out, in] of the weights, from the module's tensors.
        read: a piece of the weights in float32, from the module's tensors.
        plain: modules that are not packed, by name.
    """

    name: str
    suffix: str
    others: tuple[str, ...]
    shape: Callable[[Mapping[str, StoredTensor]], tuple[int, int]]
    read: Callable[[Mapping[str, StoredTensor], Index], np.ndarray]
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
        """The piece `tensor[index]`, unpacked, in float32.

        Raises:
            InputError: as `StoredTensor.read`; indices of groups that are none.
        """
        rows, columns = index
        with np.errstate(all="ignore"):  # scales that are not finite are refused by who reads
            return self.scheme.read(self.parts, (rows, columns))


def unpack(stored: Mapping[str, StoredTensor], scheme: Scheme) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, with one that unpacks in the place of each packed weight's.

    Raises:
        InputError: a packed weight of a module that is said to be plain, without its scales, or
            with tensors whose shapes do not fit together.
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
    """Whether a tensor's own values mean nothing without its scales."""
    return tensor.dtype.itemsize == 1 or np.issubdtype(tensor.dtype, np.integer)


def read_scheme(quantization: Mapping[str, Any]) -> Scheme:
    """How weights are packed, from the `quantization_config` of a `config.json`.

    Raises:
        InputError: a way that is not read; named.
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
    return InputError(f"{WHERE}: {key} is {shown(value)}, which is not read; expected {expected}")


def _plain(quantization: Mapping[str, Any], key: str) -> frozenset[str]:
    names = quantization.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{WHERE}: {key} must be a list of names, got {shown(names)}")
    return frozenset(names)


# --- the one formula ---------------------------------------------------------------------------


def _part(parts: Mapping[str, StoredTensor], suffix: str) -> StoredTensor:
    if suffix not in parts:
        first = next(iter(parts.values()))
        raise InputError(f"tensor {first.name} in {first.path.name} has no {suffix} beside it")
    return parts[suffix]


def _whole(tensor: StoredTensor) -> np.ndarray:
    return tensor.read(tuple(slice(0, size) for size in tensor.shape))


def _check(tensor: StoredTensor, *expected: tuple[int, ...]) -> None:
    if tensor.shape not in expected:
        raise InputError(
            f"tensor {tensor.name} in {tensor.path.name} has shape {shown(tensor.shape)}; expected "
            f"{' or '.join(map(str, expected))}"
        )


def _tiles(index: Index, tile: tuple[int, int], shape: tuple[int, int]) -> tuple[Index, Any]:
    """Which scales a piece has, and what spreads them over it.

    `tile` is what a scale is for, `shape` that of the array of scales.
    """
    bounds, places = [], []
    for part, size, count in zip(index, tile, shape, strict=True):
        number = np.minimum(np.arange(part.start, part.stop) // size, count - 1)
        bounds.append(slice(int(number[0]), int(number[-1]) + 1))
        places.append(number - number[0])
    return (bounds[0], bounds[1]), np.ix_(*places)


def _scaled(
    values: np.ndarray, scales: StoredTensor, index: Index, tile: tuple[int, int]
) -> np.ndarray:
    """Values in float32, times the scales of their tiles; scales have two axes, or one value."""
    if math.prod(scales.shape) == 1:
        return values * _whole(scales).astype(np.float32).reshape(())
    shape = (scales.shape[0], math.prod(scales.shape[1:]))  # one for each row may have one axis
    bounds, spread = _tiles(index, tile, shape)
    found = scales.read(bounds[: len(scales.shape)]).astype(np.float32)
    return values * found.reshape(bounds[0].stop - bounds[0].start, -1)[spread]


def _unpacked(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Integers of so many bits, the lowest bits first, that are packed into int32 along an axis."""
    count = 32 // bits
    shifts = np.arange(count, dtype=np.uint32) * bits
    words = np.moveaxis(words.view(np.uint32), axis, -1)[..., None]
    found = (words >> shifts) & np.uint32(2**bits - 1)
    found = found.reshape(*found.shape[:-2], -1).astype(np.int32)
    return np.moveaxis(found, -1, axis)


def _read_words(
    tensor: StoredTensor, index: Index, bits: int, axis: int, order: np.ndarray | None = None
) -> np.ndarray:
    """The piece `[index]` of the integers that a tensor packs along an axis."""
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
        read=lambda parts, index: _scaled(
            parts["weight"].read(index).astype(np.float32), parts["weight_scale_inv"], index, tile
        ),
        plain=_plain(quantization, "modules_to_not_convert"),
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= fields.LARGEST


def _blocked_shape(
    parts: Mapping[str, StoredTensor], scale: str, tile: tuple[int, int]
) -> tuple[int, int]:
    rows, columns = _two_axes(parts["weight"])
    blocks = (-(-rows // tile[0]), -(-columns // tile[1]))
    _check(_part(parts, scale), blocks)
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
            plain=plain,
        )
    if weights.get("symmetric") is False:
        raise _refused("symmetric", False, f"true for the format {form}")
    return Scheme(
        name=f"compressed-tensors, {kind}{bits}",
        suffix="weight",
        others=("weight_scale", "input_scale"),
        shape=lambda parts: _scaled_shape(parts, tile),
        read=lambda parts, index: _scaled(
            parts["weight"].read(index).astype(np.float32), parts["weight_scale"], index, tile
        ),
        plain=plain,
    )


EVERY = 2**62  # all rows or columns, in the size of a tile


def _compressed_tile(weights: Mapping[str, Any], where: str) -> tuple[int, int]:
    """What one scale is for: rows and columns."""
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
    """The shapes that an array of scales may have."""
    rows, columns = shape
    full = (-(-rows // tile[0]), -(-columns // tile[1]))
    if full == (1, 1):
        return [full, (1,), ()]
    return [full, full[:1]] if full[1] == 1 else [full]


def _scaled_shape(parts: Mapping[str, StoredTensor], tile: tuple[int, int]) -> tuple[int, int]:
    shape = _two_axes(parts["weight"])
    _check(_part(parts, "weight_scale"), *_scale_shapes(shape, tile))
    return shape


def _packed_shape(
    parts: Mapping[str, StoredTensor], bits: int, tile: tuple[int, int]
) -> tuple[int, int]:
    packed = parts["weight_packed"]
    rows, words = _two_axes(packed)
    _check(_part(parts, "weight_shape"), (2,))
    said = _whole(parts["weight_shape"]).tolist()
    if said[0] != rows or not 0 <= words * 32 // bits - said[1] < 32 // bits or said[1] < 1:
        raise InputError(
            f"tensor {packed.name} in {packed.path.name} has shape {packed.shape}, and its "
            f"weight_shape is {said}; they do not fit together with {bits} bits a weight"
        )
    shape = (rows, int(said[1]))
    scales = _scale_shapes(shape, tile)
    _check(_part(parts, "weight_scale"), *scales)
    if "weight_zero_point" in parts:
        _check(parts["weight_zero_point"], (-(-scales[0][0] * bits // 32), scales[0][1]))
    if "weight_g_idx" in parts:
        _check(parts["weight_g_idx"], (shape[1],))
    return shape


def _read_packed(
    parts: Mapping[str, StoredTensor], index: Index, bits: int, tile: tuple[int, int]
) -> np.ndarray:
    rows, columns = index
    values = _read_words(parts["weight_packed"], index, bits, 1)
    scales = parts["weight_scale"]
    if "weight_g_idx" not in parts and "weight_zero_point" not in parts:
        return _scaled((values - 2 ** (bits - 1)).astype(np.float32), scales, index, tile)
    group = _groups(parts, "weight_g_idx", columns, tile[1], scales)
    if "weight_zero_point" in parts:
        every = slice(0, scales.shape[1])
        zeros = _read_words(parts["weight_zero_point"], (rows, every), bits, 0)[:, group]
    else:
        zeros = np.int32(2 ** (bits - 1))
    scale = scales.read((rows, slice(0, scales.shape[1]))).astype(np.float32)[:, group]
    return (values - zeros).astype(np.float32) * scale


def _groups(
    parts: Mapping[str, StoredTensor], name: str, columns: slice, size: int, scales: StoredTensor
) -> np.ndarray:
    """The group of each column of a piece: by number, or as an array of them says it."""
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
        plain=_plain(quantization, "modules_to_not_convert"),
    )


def _read_awq(parts: Mapping[str, StoredTensor], index: Index, group: int) -> np.ndarray:
    rows, columns = index
    values = _read_words(parts["qweight"], (columns, rows), 4, 1, AWQ_ORDER)
    number = np.arange(columns.start, columns.stop) // group
    groups = slice(int(number[0]), int(number[-1]) + 1)
    zeros = _read_words(parts["qzeros"], (groups, rows), 4, 1, AWQ_ORDER)
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
    more = 0 if form == "gptq_v2" else 1  # the older form keeps zeros less 1
    return Scheme(
        name=f"gptq, int{bits}",
        suffix="qweight",
        others=("qzeros", "scales", "g_idx"),
        shape=lambda parts: _grouped_shape(parts, bits, group, packed_axis=0),
        read=lambda parts, index: _read_gptq(parts, index, bits, group, more),
        plain=_plain(quantization, "modules_to_not_convert"),
    )


def _read_gptq(
    parts: Mapping[str, StoredTensor], index: Index, bits: int, group: int, more: int
) -> np.ndarray:
    rows, columns = index
    values = _read_words(parts["qweight"], (columns, rows), bits, 0)
    scales = parts["scales"]
    number = _groups(parts, "g_idx", columns, group, scales)
    every = slice(0, scales.shape[0])
    zeros = (_read_words(parts["qzeros"], (every, rows), bits, 1) + more) & (2**bits - 1)
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
    """[out, in], of weights that are stored as [in, out]."""
    sizes = list(_two_axes(parts["qweight"]))
    sizes[packed_axis] *= 32 // bits
    ins, outs = sizes
    groups = -(-ins // group)
    if outs % (32 // bits):
        raise InputError(
            f"tensor {parts['qweight'].name} in {parts['qweight'].path.name} has {outs} columns; "
            f"expected a multiple of {32 // bits}"
        )
    _check(_part(parts, "scales"), (groups, outs))
    _check(_part(parts, "qzeros"), (groups, outs * bits // 32))
    if "g_idx" in parts:
        _check(parts["g_idx"], (ins,))
    return outs, ins
