"""The tensors of a Hugging Face folder: listed without reading them, read piece by piece.

It supports safetensors and PyTorch `.bin`, as one file or many with an index. A file is
memory-mapped for every piece, so only a piece stays resident. The exception is a `.bin` file from
before PyTorch 1.6, which is not a zip file and cannot be mapped: it is read whole.
"""

import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from dca_jax import fields
from dca_jax.config import CONFIG
from dca_jax.errors import InputError, is_out_of_memory
from dca_jax.weights.files import member, read_json
from dca_jax.weights.kept import KeptTensor

SAFETENSORS = "model.safetensors"
PYTORCH = "pytorch_model.bin"
INDEX = ".index.json"

FLOATS = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


# Dtypes of packed weights, in addition to scales in `FLOATS`.
PACKED = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor(KeptTensor):
    """A tensor in a file, described by its header. Only `read` accesses the data.

    Attributes:
        dtype: dtype of the result of `read`.
        loaded: the PyTorch tensor, if the file cannot be mapped.
        packed: name of the packed form with fewer bits; empty if it is not packed.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    loaded: Any = None
    packed: str = ""

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of the piece `tensor[index]`; `index` has one slice with both ends per axis.

        Raises:
            InputError: the file has changed since it was listed.
        """
        if self.loaded is not None:
            return _numpy(self.loaded[index])
        with _damage_reported(self.path):
            if self.path.suffix == ".bin":
                return _numpy(_load_bin(self.path)[self.name][index])
            if self.dtype == PACKED["F8_E4M3"]:  # the library has no NumPy dtype for it
                return _mapped(self)[index].copy()
            with safetensors.safe_open(self.path, framework="numpy") as file:
                return file.get_slice(self.name)[index]


def _mapped(tensor: StoredTensor) -> np.ndarray:
    """The memory-mapped data of a tensor in a safetensors file that has been listed."""
    with tensor.path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(size))[tensor.name]["data_offsets"]
    if end - begin != tensor.nbytes or 8 + size + end > tensor.path.stat().st_size:
        raise safetensors.SafetensorError("its header is not what it was")
    return np.memmap(tensor.path, tensor.dtype, "r", 8 + size + begin, tensor.shape)


def list_tensors(folder: Path, *, packed: bool = False) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder`, by name, from the files' headers only.

    With `packed`, dtypes in `PACKED` are allowed too, in safetensors files.

    If a folder has several checkpoints, the choice is as in transformers: the file named by
    `transformers_weights` in config.json, else the first of `model.safetensors`,
    `model.safetensors.index.json`, `pytorch_model.bin` and `pytorch_model.bin.index.json`.

    Raises:
        InputError: no checkpoint; a file that is truncated, corrupt, missing or outside the folder;
            an index that does not match its files; a tensor that is not floating-point.
    """
    candidates = [name for base in (SAFETENSORS, PYTORCH) for name in (base, f"{base}{INDEX}")]
    named = _named_weights(folder)
    present = [name for name in candidates if (folder / name).is_file()]
    chosen = named or next(iter(present), None)
    if chosen is None:
        for name in candidates:
            if (folder / name).is_symlink():
                member(folder, name)  # reports a link with a missing target
        raise InputError(
            f"{folder} holds no weights: expected {SAFETENSORS} or {PYTORCH}, or one of them in "
            f"shards with its {INDEX}"
        )
    if chosen.endswith(INDEX):
        return _list_sharded(folder, chosen, packed)
    return {tensor.name: tensor for tensor in list_file(member(folder, chosen), packed=packed)}


def _named_weights(folder: Path) -> str:
    """The weights file named in config.json, as some are written by transformers; or none."""
    if not (folder / CONFIG).is_file():
        return ""
    name = fields.text(read_json(folder, CONFIG), "transformers_weights", CONFIG)
    if name and not name.endswith((".safetensors", f".safetensors{INDEX}")):
        raise InputError(
            f"config.json: transformers_weights must name a .safetensors file or its index, got "
            f"{fields.shown(name)}"
        )
    return name


def cast_weights(piece: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`piece` converted to `dtype` with all weights finite; `name` is for the message.

    Raises:
        InputError: a weight that is not finite, or not finite in `dtype`.
    """
    finite = np.isfinite(piece)
    if not finite.all():
        raise InputError(
            f"tensor {name} holds {piece[~finite][0]}, and weights must be finite: the checkpoint "
            "is broken"
        )
    if piece.dtype == dtype:
        return piece
    with np.errstate(over="ignore"):
        cast = piece.astype(dtype)
    if not np.isfinite(cast).all():
        largest = np.abs(piece).max()
        raise InputError(f"tensor {name} holds {largest}, too large for {dtype}; use bfloat16")
    return cast


def write_safetensors(
    path: Path, tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]], data: Iterator[bytes]
) -> None:
    """Writes a safetensors file from (name, dtype, shape) tuples and pieces of data, in order.

    The library can only write whole tensors. The format is the header's length, a JSON header and
    the data (https://huggingface.co/docs/safetensors).
    """
    names = {dtype: name for name, dtype in FLOATS.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(data)
        written = file.tell() - 8 - len(text)
    if written != end:
        raise ValueError(f"{path}: {written} bytes of data were given for {end} in the header")


def _list_sharded(folder: Path, index_name: str, packed: bool) -> dict[str, StoredTensor]:
    shard_of = read_json(folder, index_name).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise InputError(f"{folder / index_name} has no weight_map from tensor names to files")
    if not all(isinstance(shard, str) for shard in shard_of.values()):
        raise InputError(f"{folder / index_name}: a value of weight_map is not a file name")
    # Every name is checked before any file is opened.
    paths = {shard: member(folder, shard) for shard in dict.fromkeys(shard_of.values())}
    tensors: dict[str, StoredTensor] = {}
    for shard, path in paths.items():
        for tensor in list_file(path, packed=packed):
            if shard_of.get(tensor.name, shard) != shard:
                raise InputError(
                    f"tensor {tensor.name} is in {shard}, but {index_name} says "
                    f"{shard_of[tensor.name]}"
                )
            if tensor.name in tensors:
                raise InputError(f"tensor {tensor.name} is in more than one file of {folder}")
            tensors[tensor.name] = tensor
    for name, shard in shard_of.items():
        if name not in tensors:
            raise InputError(f"{index_name} says that {name} is in {shard}, which lacks it")
    return tensors


def list_file(path: Path, *, packed: bool = False) -> Iterator[StoredTensor]:
    """Every tensor of one file, from its header; `packed` as in `list_tensors`.

    Raises:
        InputError: as in `list_tensors` for a file.
    """
    if path.suffix == ".bin":
        mapped = zipfile.is_zipfile(path)
        for name, tensor in _load_bin(path).items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            dtype, loaded = _TORCH_FLOATS.get(dtype, dtype), None if mapped else tensor
            yield _stored(path, name, tuple(tensor.shape), dtype, loaded)
        return
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: expected a .safetensors or .bin file")
    with _damage_reported(path), safetensors.safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 -- safe_open is not a dict
            header = file.get_slice(name)
            shape, dtype = tuple(header.get_shape()), header.get_dtype()
            if packed and dtype in PACKED:
                yield StoredTensor(path=path, name=name, shape=shape, dtype=PACKED[dtype])
            else:
                yield _stored(path, name, shape, dtype)


@contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    try:
        yield
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{path} is truncated or corrupt ({fields.shown(str(error), quote=False)}; "
            f"{path.stat().st_size} bytes); download or write it again"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise InputError(_unmapped(path)) from None


def _unmapped(path: Path) -> str:
    size = path.stat().st_size / 2**30
    return (
        f"{path} ({size:.1f} GiB) cannot be mapped into memory; free memory, or raise `ulimit -v`"
    )


def _stored(
    path: Path, name: str, shape: tuple[int, ...], dtype: str, loaded: Any = None
) -> StoredTensor:
    if dtype not in FLOATS:
        raise InputError(
            f"tensor {fields.shown(name, quote=False)} in {path.name} has dtype {dtype}; expected "
            f"one of {', '.join(FLOATS)} (of quantized weights config.json must say how they are "
            "packed, in its quantization_config)"
        )
    return StoredTensor(path=path, name=name, shape=shape, dtype=FLOATS[dtype], loaded=loaded)


_TORCH_FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


def _load_bin(path: Path) -> dict[str, Any]:
    """The tensors of a PyTorch file, by name; `weights_only` runs no code from it.

    They are memory-mapped, unless the file has the old format that is not a zip file.
    """
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path} is a PyTorch file, and PyTorch is not installed; install torch, or use the "
            "model's safetensors files"
        ) from None
    try:
        mapped = zipfile.is_zipfile(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # RuntimeError, UnpicklingError, EOFError, ... by kind of damage
        if is_out_of_memory(error):
            raise InputError(_unmapped(path)) from None
        reason = fields.shown(str(error).partition("\n")[0], quote=False)
        raise InputError(f"{path} is not a PyTorch weights file, or damaged: {reason}") from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise InputError(f"{path} holds something other than a dict of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise InputError(f"{path}: a tensor's name must be text, got {fields.shown(name)}")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = tensor.layout if tensor.layout != torch.strided else tensor.device
            raise InputError(
                f"tensor {fields.shown(name, quote=False)} in {path.name} has no plain data "
                f"({kind}); save the dense weights"
            )
    return tensors


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().clone()  # copied out of the mapping, without gradient
    if tensor.dtype == torch.bfloat16:  # unknown to NumPy: the same bits as ml_dtypes' bfloat16
        return tensor.view(torch.int16).numpy().view(FLOATS["BF16"])
    return tensor.numpy()
