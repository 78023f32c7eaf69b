"""Hugging Face or GGUF -> Orbax folder: `python -m checkpoints_convert.hf_to_orbax SRC DST`."""

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from flax.traverse_util import unflatten_dict
from rich import print

from checkpoints_convert.common import (
    AdapterOption,
    Dtype,
    prepare_process,
    progress_bar,
    told_if_stopped,
    write_provenance,
)
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.weights.adapters import with_adapter
from dca_jax.weights.files import PARAMS, written_aside
from dca_jax.weights.folder import copy_description
from dca_jax.weights.huggingface import Checkpoint, open_checkpoint, read_config
from dca_jax.weights.orbax import StreamedArray, save
from dca_jax.weights.parameters import Parameter, parameters


def convert(
    source: Path,
    destination: Path,
    *,
    dtype: np.dtype | None = None,
    adapter: Path | None = None,
    show: bool = False,
) -> None:
    """Converts a Hugging Face folder, or a GGUF file, into a folder with Orbax weights.

    `destination` gets `config.json` and the tokenizer's files as they are, or as a GGUF file's
    metadata says them, `params/` (Orbax) and `provenance.json`. It appears when everything is
    written; whatever happens before, it does not. The weights stream through in pieces: no tensor
    is ever whole in memory.

    Args:
        source: folder with config.json and safetensors or `.bin` weights, or a `.gguf` file.
        destination: folder to make.
        dtype: of the converted weights; None keeps each as it is stored, and packed ones in the
            dtype of their values.
        adapter: folder of a LoRA adapter (PEFT's) to merge into the weights.
        show: a progress bar on stderr.

    Raises:
        InputError: `destination` exists, or `source` is not a whole and sound checkpoint, or what
            `dca_jax.weights.adapters.load_adapter` refuses.
    """
    config = read_config(source)
    checkpoint = open_checkpoint(source, config)
    rows = parameters(config)
    dtypes = {row.path: _own_dtype(checkpoint, row) if dtype is None else dtype for row in rows}

    def stored(row: Parameter, index: tuple[slice, ...]) -> np.ndarray:
        return checkpoint.read(row, index, dtypes[row.path])

    read = stored if adapter is None else with_adapter(stored, adapter, config)
    total = sum(math.prod(row.shape(config)) * dtypes[row.path].itemsize for row in rows)
    with written_aside(destination) as aside:
        companions = copy_description(source, aside)
        with progress_bar(total, show) as progress:
            tree = {
                row.path: StreamedArray.of(row, config, read, dtypes[row.path], progress)
                for row in rows
            }
            save(aside / PARAMS, unflatten_dict(tree, sep="."))
        weights = {t.path for tensors in checkpoint.tensors.values() for t in tensors}
        write_provenance(
            aside / "provenance.json",
            source,
            [*companions, *sorted(weights)],
            dtypes.values(),
            adapter=adapter,
        )


def _own_dtype(checkpoint: Checkpoint, row: Parameter) -> np.dtype:
    dtype = checkpoint.dtype(row)
    if dtype == np.float64:
        raise InputError(f"{row.path} is stored as float64; choose --dtype float32 or bfloat16")
    return dtype


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
        Path, typer.Argument(metavar="DST", help="Folder to make; it must not exist.")
    ],
    dtype: Annotated[
        Dtype,
        typer.Option(help="Dtype of the converted weights; **keep** leaves each value as it is."),
    ] = Dtype.keep,
    adapter: AdapterOption = None,
) -> None:
    """Convert a Hugging Face Llama-family checkpoint to Orbax.

    The result opens with `dca_jax.load(DST)`, and its `params/` with any Orbax, on any mesh.
    DST appears only when it is whole: after an interruption just run the command again.

    Example: `python -m checkpoints_convert.hf_to_orbax ./Llama-2-7b-hf ./llama2-7b`
    """
    prepare_process()
    with told_if_stopped(destination):
        convert(source, destination, dtype=dtype.wanted, adapter=adapter, show=True)
    print(f"wrote {destination}")


if __name__ == "__main__":
    app()
