"""Orbax folder -> Hugging Face folder: `python -m checkpoints_convert.orbax_to_hf SRC DST`."""

import json
import math
import re
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import typer
from rich import print

from checkpoints_convert.common import (
    AdapterOption,
    Dtype,
    prepare_process,
    progress_bar,
    told_if_stopped,
)
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.weights.adapters import with_adapter
from dca_jax.weights.files import PARAMS, is_converted, read_json, written_aside
from dca_jax.weights.folder import copy_description, open_weights
from dca_jax.weights.huggingface import read_config
from dca_jax.weights.safetensors_folder import SHARD_BYTES, write_weights


def convert(
    source: Path,
    destination: Path,
    *,
    dtype: np.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    adapter: Path | None = None,
    show: bool = False,
) -> None:
    """Converts a folder with Orbax weights to a Hugging Face one bit for bit; unpacks packed ones.

    `destination` gets `config.json`, the tokenizer's files and the weights as safetensors: one
    `model.safetensors`, or shards with their index. Tied embeddings are written once, as
    `model.embed_tokens.weight`. The folder appears only when it is complete. The weights are
    converted in pieces: no tensor is ever completely in memory.

    Args:
        source: folder written by `hf_to_orbax`.
        destination: folder to create.
        dtype: dtype of the written weights; None keeps each parameter's own, and converts packed
            ones to bfloat16, which is logged.
        shard_bytes: maximum bytes of weights per file (but a tensor is never split).
        adapter: folder of a LoRA adapter (PEFT's) to merge into the weights.
        show: whether to show a progress bar on stderr.

    Raises:
        InputError: `destination` exists, `source` is not a complete and valid checkpoint, or
            `dca_jax.weights.adapters.load_adapter` raises.
    """
    config = read_config(source)
    if not is_converted(source):
        raise InputError(f"{source} is not an Orbax checkpoint (it has no folder {PARAMS})")
    found = open_weights(source, config, dtype=dtype, unpacked=jnp.bfloat16)
    dtypes, read = found.dtypes, found.read
    if adapter is not None:
        read = with_adapter(read, adapter, config)
    total = sum(math.prod(row.shape(config)) * dtypes[row.path].itemsize for row in found.rows)
    with written_aside(destination) as aside:
        copy_description(source, aside)
        _say_dtype(aside, set(dtypes.values()))
        with progress_bar(total, show) as progress:
            write_weights(aside, config, read, dtypes, shard_bytes=shard_bytes, progress=progress)


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
        InputError: the text has another form.
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
        Path, typer.Argument(metavar="DST", help="Folder to create; it must not exist.")
    ],
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Dtype of the written weights; **keep** changes no bit, and unpacks packed ones "
            "into bfloat16."
        ),
    ] = Dtype.keep,
    shard_size: Annotated[
        str, typer.Option(help="Maximum size of a weight file, such as 5GB or 500MB.")
    ] = "5GB",
    adapter: AdapterOption = None,
) -> None:
    """Convert an Orbax checkpoint back to a Hugging Face folder (safetensors).

    `transformers`, `dca_jax.load` and servers of such models open the result.
    DST appears only when it is complete. After an interruption, repeat the command.

    Example: `python -m checkpoints_convert.orbax_to_hf ./llama2-7b ./llama2-7b-hf`
    """
    prepare_process()
    shard_bytes = parse_size(shard_size)
    with told_if_stopped(destination):
        convert(
            source,
            destination,
            dtype=dtype.wanted,
            shard_bytes=shard_bytes,
            adapter=adapter,
            show=True,
        )
    print(f"wrote {destination}")


if __name__ == "__main__":
    app()
