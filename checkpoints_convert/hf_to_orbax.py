"""Hugging Face or GGUF -> Orbax folder: `python -m checkpoints_convert.hf_to_orbax SRC DST`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from flax.traverse_util import unflatten_dict
from rich import print

from checkpoints_convert.common import (
    AdapterOption,
    Dtype,
    WeightsOption,
    prepare_process,
    progress_bar,
    told_if_stopped,
    write_provenance,
)
from dca_jax.config import LlamaConfig
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.products.packed import STORED
from dca_jax.weights.adapters import with_adapter
from dca_jax.weights.files import PARAMS, written_aside
from dca_jax.weights.folder import copy_description, open_weights
from dca_jax.weights.huggingface import read_config
from dca_jax.weights.kept import Kept
from dca_jax.weights.orbax import StreamedArray, save
from dca_jax.weights.orbax_packed import part_shapes, streamed_parts
from dca_jax.weights.packer import matrices, packed_on_reading, packing
from dca_jax.weights.parameters import Parameter


def convert(
    source: Path,
    destination: Path,
    *,
    dtype: np.dtype | None = None,
    weights: str = STORED,
    adapter: Path | None = None,
    show: bool = False,
) -> None:
    """Converts a Hugging Face folder, or a GGUF file, into a folder with Orbax weights.

    `destination` gets `config.json` and the tokenizer's files unchanged, or derived from a GGUF
    file's metadata, `params/` (Orbax) and `provenance.json`. If matrices are packed, `config.json`
    describes how. The folder appears only when it is complete. The weights are converted in pieces:
    no tensor is ever completely in memory.

    Args:
        source: folder with config.json and safetensors or `.bin` weights, or a `.gguf` file.
        destination: folder to create.
        dtype: dtype of unpacked parameters in `destination`; None keeps each parameter's own, and
            the dtype of the values of unpacked ones.
        weights: packing of matrices in `destination`, as in `dca_jax.load`: packed ones unchanged
            ("stored"), all ("int8" and others), or none ("unpacked").
        adapter: folder of a LoRA adapter (PEFT's) to merge into the weights, for which they are
            unpacked.
        show: whether to show a progress bar on stderr.

    Raises:
        InputError: `destination` exists, `source` is not a complete and valid checkpoint,
            `dca_jax.weights.adapters.load_adapter` raises, or `weights` is unknown.
    """
    config = read_config(source)
    form, keep = packing(weights, on_cpu=False)
    found = open_weights(source, config, dtype=dtype, keep=None if adapter else keep)
    read = found.read if adapter is None else with_adapter(found.read, adapter, config)
    tensors = dict(found.kept)
    if form is not None:
        rows = [row for row in matrices(config) if row.path not in tensors]
        tensors |= {row.path: packed_on_reading(row, config, read, form) for row in rows}
    kept = {path: how for path, each in tensors.items() if (how := each[0].kept) is not None}
    dtypes = {path: dtype for path, dtype in found.dtypes.items() if path not in tensors}
    _refuse_wide(dtypes)
    with written_aside(destination) as aside:
        companions = copy_description(source, aside, kept)
        total = sum(_bytes(row, config, dtypes, kept) for row in found.rows)
        with progress_bar(total, show) as progress:
            tree: dict[str, Any] = {}
            for row in found.rows:
                if row.path in tensors:
                    tree[row.path] = streamed_parts(row, config, tensors[row.path], progress)
                else:
                    own = dtypes[row.path]
                    tree[row.path] = StreamedArray.of(row, config, read, own, progress)
            save(aside / PARAMS, unflatten_dict(tree, sep="."))
        write_provenance(
            aside / "provenance.json",
            source,
            [*companions, *found.files],
            dtypes.values(),
            forms=_names(found.rows, config, kept),
            adapter=adapter,
        )


def _bytes(
    row: Parameter, config: LlamaConfig, dtypes: Mapping[str, np.dtype], kept: Mapping[str, Kept]
) -> int:
    """Bytes of a parameter before compression."""
    if row.path in dtypes:
        return math.prod(row.shape(config)) * dtypes[row.path].itemsize
    parts = part_shapes(row, config, kept[row.path]).values()
    return sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)


def _names(rows: Sequence[Parameter], config: LlamaConfig, kept: Mapping[str, Kept]) -> set[str]:
    """The forms of packed matrices."""
    packed = [row for row in rows if row.path in kept]
    return {kept[row.path].name(row, row.inner(row.shape(config))) for row in packed}


def _refuse_wide(dtypes: Mapping[str, np.dtype]) -> None:
    for path, dtype in dtypes.items():
        if dtype == np.float64:
            raise InputError(f"{path} is stored as float64; choose --dtype float32 or bfloat16")


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
@exit_on_input_error()
def main(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="Hugging Face folder (config.json, safetensors or .bin weights), or a GGUF file.",
        ),
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to create; it must not exist.")
    ],
    dtype: Annotated[
        Dtype,
        typer.Option(help="Dtype of the weights that are not packed; **keep** changes no value."),
    ] = Dtype.keep,
    weights: WeightsOption = STORED,
    adapter: AdapterOption = None,
) -> None:
    """Convert a Hugging Face Llama-family checkpoint to Orbax.

    `dca_jax.load(DST)` opens the result, and any Orbax opens its `params/`, on any mesh.
    DST appears only when it is complete. After an interruption, repeat the command.

    Example: `python -m checkpoints_convert.hf_to_orbax ./Llama-2-7b-hf ./llama2-7b`
    """
    prepare_process()
    with told_if_stopped(destination):
        convert(
            source, destination, dtype=dtype.wanted, weights=weights, adapter=adapter, show=True
        )
    print(f"wrote {destination}")


if __name__ == "__main__":
    app()
