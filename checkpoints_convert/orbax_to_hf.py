"""Orbax folder -> Hugging Face folder: `python -m checkpoints_convert.orbax_to_hf SRC DST`."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich import print

from checkpoints_convert.common import Dtype, prepare_process, progress_bar, told_if_stopped
from dca_jax.config import LlamaConfig
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.weights.files import copy_companions, read_json, written_aside
from dca_jax.weights.huggingface import read_config
from dca_jax.weights.orbax import PARAMS, check_arrays, is_converted, read_piece
from dca_jax.weights.parameters import (
    Parameter,
    Progress,
    abstract_params,
    contiguous,
    parameters,
    pieces,
)
from dca_jax.weights.tensor_files import SAFETENSORS, cast_weights, write_safetensors


@dataclass(frozen=True)
class Tensor:
    """A Hugging Face tensor to write: one layer of a parameter, or one expert of a layer.

    Attributes:
        place: where it lies in our array. layer: its number in the model, -1 without one.
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


def convert(
    source: Path,
    destination: Path,
    *,
    dtype: np.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    show: bool = False,
) -> None:
    """Converts a folder with Orbax weights into a Hugging Face one, bit for bit.

    `destination` gets `config.json`, the tokenizer's files and the weights as safetensors: one
    `model.safetensors`, or shards with their index. Tied embeddings are written once, as
    `model.embed_tokens.weight`. It appears when everything is written. The weights stream through
    in pieces: no tensor is ever whole in memory.

    Args:
        source: folder as `hf_to_orbax` writes it.
        destination: folder to make.
        dtype: of the written weights; None keeps each as it is stored.
        shard_bytes: most bytes of weights in a file (but a tensor is never split).
        show: a progress bar on stderr.

    Raises:
        InputError: `destination` exists, or `source` is not a whole and sound checkpoint.
    """
    config = read_config(source)
    if not is_converted(source):
        raise InputError(f"{source} is no Orbax checkpoint (it has no folder {PARAMS})")
    params = source / PARAMS
    found = check_arrays(params, abstract_params(config, dtype=np.float32))
    tensors = []
    for row in parameters(config):
        written = found[row.path] if dtype is None else dtype
        layers = row.layers(config) if row.stacked else (-1,)
        names = row.their_names(config)
        for number, name in enumerate(names):
            layer = layers[number * len(layers) // len(names)]
            place = row.place_of(config, number)
            tensors.append(Tensor(name, row, place, layer, row.their_shape(config), written))
    shards = _shards(tensors, shard_bytes)
    with written_aside(destination) as aside:
        copy_companions(source, aside)
        _say_dtype(aside, {tensor.dtype for tensor in tensors})
        with progress_bar(sum(tensor.nbytes for tensor in tensors), show) as progress:
            for name, shard in shards.items():
                headers = [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard]
                data = _read(params, config, shard, progress)
                write_safetensors(aside / name, headers, data)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
                "weight_map": {t.name: name for name, shard in shards.items() for t in shard},
            }
            text = json.dumps(index, indent=2) + "\n"
            (aside / f"{SAFETENSORS}.index.json").write_text(text, encoding="utf-8")


def _shards(tensors: list[Tensor], shard_bytes: int) -> dict[str, list[Tensor]]:
    # Layer by layer, as Hugging Face writes them; what has no layer comes before.
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


def _read(
    params: Path, config: LlamaConfig, shard: list[Tensor], progress: Progress
) -> Iterator[bytes]:
    for tensor in shard:
        for index in pieces(tensor.row, config, tensor.place):
            ours = read_piece(params, tensor.row.path, index)
            theirs = tensor.row.to_theirs(ours[(0,) * tensor.row.leading])
            if tensor.row.transposed:
                theirs = contiguous(theirs)
            yield cast_weights(theirs, tensor.dtype, tensor.row.path).tobytes()
            progress(tensor.row.path, ours.size * tensor.dtype.itemsize)


def _say_dtype(folder: Path, dtypes: set[np.dtype]) -> None:
    """Corrects the dtype in config.json: transformers would convert the weights to it."""
    config = read_json(folder, "config.json")
    key = "dtype" if "dtype" in config else "torch_dtype"
    if len(dtypes) == 1 and key in config and config[key] != str(next(iter(dtypes))):
        config[key] = str(next(iter(dtypes)))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def parse_size(text: str) -> int:
    """Bytes in "5GB", "500MB", "100KB" or a plain number of bytes.

    Raises:
        InputError: something else.
    """
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB)?", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise InputError(f"size {text!r} is not understood; expected for example 5GB or 500MB")
    return int(match[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[(match[2] or "").upper()]


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
@exit_on_input_error()
def main(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="Folder made by checkpoints_convert.hf_to_orbax."),
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to make; it must not exist.")
    ],
    dtype: Annotated[
        Dtype,
        typer.Option(help="Dtype of the written weights; **keep** leaves each bit as it is."),
    ] = Dtype.keep,
    shard_size: Annotated[
        str, typer.Option(help="Most bytes of weights in one file, such as 5GB or 500MB.")
    ] = "5GB",
) -> None:
    """Convert an Orbax checkpoint back to a Hugging Face folder (safetensors).

    The result opens with `transformers`, `dca_jax.load` and every server of such models.
    DST appears only when it is whole: after an interruption just run the command again.

    Example: `python -m checkpoints_convert.orbax_to_hf ./llama2-7b ./llama2-7b-hf`
    """
    prepare_process()
    shard_bytes = parse_size(shard_size)
    with told_if_stopped(destination):
        convert(source, destination, dtype=dtype.wanted, shard_bytes=shard_bytes, show=True)
    print(f"wrote {destination}")


if __name__ == "__main__":
    app()
