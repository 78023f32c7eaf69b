"""Writing weights as in a Hugging Face folder: safetensors, in shards with an index."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dca_jax.config import LlamaConfig
from dca_jax.distributed import is_primary
from dca_jax.weights.parameters import (
    Parameter,
    Progress,
    Read,
    contiguous,
    parameters,
    pieces,
)
from dca_jax.weights.tensor_files import SAFETENSORS, write_safetensors

SHARD_BYTES = 5 * 10**9  # as in transformers


@dataclass(frozen=True)
class Tensor:
    """A Hugging Face tensor to write: one layer of a parameter, or one expert of a layer.

    Attributes:
        place: its index in our array.
        layer: its number in the model, -1 without one.
    """

    name: str
    row: Parameter
    place: tuple[slice, ...]
    layer: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of its data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    folder: Path,
    config: LlamaConfig,
    read: Read,
    dtypes: Mapping[str, np.dtype],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes a model's weights into a folder: one `model.safetensors`, or shards with their index.

    Weights are streamed in pieces, so no tensor is ever whole in memory. Tied embeddings are
    written once, as `model.embed_tokens.weight`. With several processes, all must call it, and the
    primary writes.

    Args:
        read: reads pieces of the parameters, in the dtype in `dtypes` for their path.
        shard_bytes: maximum bytes of weights in a file (a tensor is never split).
        progress: function called with the path and the bytes written, after each piece.
    """
    tensors = []
    for row in parameters(config):
        layers = row.layers(config) if row.stacked else (-1,)
        names = row.their_names(config)
        for number, name in enumerate(names):
            layer = layers[number * len(layers) // len(names)]
            place, shape = row.place_of(config, number), row.their_shape(config)
            tensors.append(Tensor(name, row, place, layer, shape, dtypes[row.path]))
    shards = _shards(tensors, shard_bytes)
    for name, shard in shards.items():
        data = _data(config, shard, read, progress)
        if is_primary():
            headers = [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard]
            write_safetensors(folder / name, headers, data)
        else:  # reading may involve communication between processes
            for _ in data:
                pass
    if len(shards) > 1 and is_primary():
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
            "weight_map": {t.name: name for name, shard in shards.items() for t in shard},
        }
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{SAFETENSORS}.index.json").write_text(text, encoding="utf-8")


def _shards(tensors: list[Tensor], shard_bytes: int) -> dict[str, list[Tensor]]:
    # Layer by layer, as in Hugging Face; parameters without a layer come first.
    tensors = sorted(tensors, key=lambda tensor: tensor.layer)
    shards: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    if len(shards) == 1:
        return {SAFETENSORS: shards[0]}
    stem, dot, suffix = SAFETENSORS.partition(".")
    return {
        f"{stem}-{number:05d}-of-{len(shards):05d}{dot}{suffix}": shard
        for number, shard in enumerate(shards, start=1)
    }


def _data(
    config: LlamaConfig, shard: list[Tensor], read: Read, progress: Progress | None
) -> Iterator[bytes]:
    for tensor in shard:
        for index in pieces(tensor.row, config, tensor.place):
            ours = read(tensor.row, index)
            theirs = tensor.row.to_theirs(ours[(0,) * tensor.row.leading])
            if tensor.row.transposed:
                theirs = contiguous(theirs)
            yield theirs.tobytes()
            if progress is not None:
                progress(tensor.row.path, theirs.nbytes)
