"""The tensors of a Hugging Face folder: listed without reading them, read piece by piece.

safetensors or PyTorch `.bin`, one file or many with an index. A file is mapped into memory anew
for every piece, so what stays resident is a piece and not a file.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from dca_jax.errors import InputError
from dca_jax.weights.files import member, read_json

SAFETENSORS = "model.safetensors"
PYTORCH = "pytorch_model.bin"

FLOATS = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file: what its header says. `read` is the only thing that touches the data."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The piece `tensor[index]`, in memory of its own; one slice with both ends per axis."""
        if self.path.suffix == ".bin":
            return _numpy(_load_bin(self.path)[self.name][index])
        with safetensors.safe_open(self.path, framework="numpy") as file:
            return file.get_slice(self.name)[index]


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder`, by name, from the files' headers alone.

    Looks for `model.safetensors.index.json`, `model.safetensors`, `pytorch_model.bin.index.json`
    and `pytorch_model.bin`, in this order.

    Raises:
        InputError: no checkpoint there; a file that is truncated, corrupt, missing or outside the
            folder; an index that does not match its files; a tensor that is not floating-point.
    """
    for name in (SAFETENSORS, PYTORCH):
        if (folder / f"{name}.index.json").exists():
            return _list_sharded(folder, f"{name}.index.json")
        if (folder / name).exists() or (folder / name).is_symlink():
            return {tensor.name: tensor for tensor in list_file(member(folder, name))}
    raise InputError(
        f"{folder} holds no weights: expected {SAFETENSORS} or {PYTORCH}, or one of them in shards "
        "with its .index.json"
    )


def cast_weights(piece: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`piece` in `dtype`, every weight of it finite; `name` is for the message.

    Raises:
        InputError: a weight that is NaN or infinite, or becomes so in `dtype`.
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
    """Writes a safetensors file from (name, dtype, shape)s and their data in pieces, in order.

    The library writes whole tensors only; the format is a header's length, a JSON header and the
    data (https://huggingface.co/docs/safetensors).
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


def _list_sharded(folder: Path, index_name: str) -> dict[str, StoredTensor]:
    shard_of = read_json(folder, index_name).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise InputError(f"{folder / index_name} has no weight_map from tensor names to files")
    if not all(isinstance(shard, str) for shard in shard_of.values()):
        raise InputError(f"{folder / index_name}: a value of weight_map is not a file name")
    # Every name is judged before any file is opened.
    paths = {shard: member(folder, shard) for shard in dict.fromkeys(shard_of.values())}
    tensors: dict[str, StoredTensor] = {}
    for shard, path in paths.items():
        for tensor in list_file(path):
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


def list_file(path: Path) -> Iterator[StoredTensor]:
    """Every tensor of one file, from its header.

    Raises:
        InputError: as `list_tensors` does for a file.
    """
    if path.suffix == ".bin":
        for name, tensor in _load_bin(path).items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield _stored(path, name, tuple(tensor.shape), _TORCH_FLOATS.get(dtype, dtype))
        return
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: expected a .safetensors or .bin file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 -- safe_open is no dict
                header = file.get_slice(name)
                yield _stored(path, name, tuple(header.get_shape()), header.get_dtype())
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{path} is truncated or corrupt ({error}; {path.stat().st_size} bytes); "
            "download or write it again"
        ) from None


def _stored(path: Path, name: str, shape: tuple[int, ...], dtype: str) -> StoredTensor:
    if dtype not in FLOATS:
        raise InputError(
            f"tensor {name} in {path.name} has dtype {dtype}; expected one of {', '.join(FLOATS)} "
            "(quantized weights are not supported: use the unquantized checkpoint)"
        )
    return StoredTensor(path=path, name=name, shape=shape, dtype=FLOATS[dtype])


_TORCH_FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


def _load_bin(path: Path) -> dict[str, Any]:
    """The tensors of a PyTorch file, mapped and not read; `weights_only` runs no code from it."""
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path} is a PyTorch file, and PyTorch is not installed; install torch, or use the "
            "model's safetensors files"
        ) from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # RuntimeError, UnpicklingError, EOFError, ... by kind of damage
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} is not a PyTorch weights file, or damaged: {reason}") from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise InputError(f"{path} holds something other than a dict of tensors")
    return tensors


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.clone()  # out of the mapping
    if tensor.dtype == torch.bfloat16:  # unknown to NumPy: the same bits, named by ml_dtypes
        return tensor.view(torch.int16).numpy().view(FLOATS["BF16"])
    return tensor.numpy()
