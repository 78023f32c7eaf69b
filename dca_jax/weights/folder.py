"""A checkpoint, Hugging Face's folder, a converted one or a GGUF file: weights onto the devices."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dca_jax.config import CONFIG, LlamaConfig
from dca_jax.weights.adapters import with_adapter
from dca_jax.weights.files import copy_companions, is_converted, read_json
from dca_jax.weights.gguf import write_companions
from dca_jax.weights.gguf_file import is_gguf
from dca_jax.weights.huggingface import LONG_CONFIG, QUANTIZATION, open_checkpoint
from dca_jax.weights.parameters import Parameter, Progress, Read, Shardings, load_tree, parameters

log = logging.getLogger(__name__)


def load_weights(
    folder: str | Path,
    config: LlamaConfig,
    *,
    dtype: DTypeLike | None = None,
    sharding: Shardings = None,
    adapter: str | Path | None = None,
    then: Callable[[Parameter, jax.Array], Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The parameters of a Hugging Face or converted folder or a GGUF file, streamed to devices.

    Each device is filled piece by piece with the part that its sharding gives it, so the host
    holds a piece or two and never a parameter, and a process reads its own shards only.

    Args:
        folder: of the checkpoint, or its GGUF file. config: its own (`read_config(folder)`).
        dtype: of the arrays as they are read; None for each as it is stored.
        sharding: one for all, or a function of the path; None is the first local device.
        adapter: folder of a LoRA adapter (PEFT's) to merge into the weights; the sums are float32.
        then: as in `dca_jax.weights.parameters.load_tree`.
        progress: told the path and the bytes placed, after each piece.

    Returns:
        The parameter tree: nested dicts of arrays, layers stacked on a leading axis.

    Raises:
        InputError: what `open_weights` and `load_adapter` refuse, before the weights are read; a
            damaged array, or a weight that is NaN or infinite, when it is met.
    """
    dtypes, read = open_weights(folder, config, dtype=dtype)
    if adapter is not None:
        read = with_adapter(read, adapter, config)
    like = {
        row.path: row.abstract(config, dtypes[row.path], sharding) for row in parameters(config)
    }
    return load_tree(config, like, read, progress, then=then)


def copy_description(source: Path, destination: Path) -> list[Path]:
    """Copies what stands beside a checkpoint's weights, or writes it of a GGUF file.

    The copy's configs do not say that weights are packed: what is written beside them is not.

    Returns:
        The originals.

    Raises:
        InputError: as `copy_companions` and `write_companions`.
    """
    if is_gguf(source):
        write_companions(source, destination)
        return []
    originals = copy_companions(source, destination)
    for name in (CONFIG, LONG_CONFIG):
        if (destination / name).is_file():
            config = read_json(destination, name)
            if config.pop(QUANTIZATION, None):
                text = json.dumps(config, indent=2) + "\n"
                (destination / name).write_text(text, encoding="utf-8")
    return originals


def open_weights(
    folder: str | Path, config: LlamaConfig, *, dtype: DTypeLike | None = None
) -> tuple[dict[str, np.dtype], Read]:
    """The dtype of each parameter, by path, and what reads pieces of them in it.

    Packed weights are unpacked as they are read, which is logged.

    Raises:
        InputError: a checkpoint that is damaged or does not fit its config; when reading, a weight
            that is NaN or infinite.
    """
    if is_converted(Path(folder)):
        from dca_jax.weights.orbax import open_converted  # slow to import, and seldom needed

        return open_converted(folder, config, dtype=dtype)
    checkpoint = open_checkpoint(folder, config)
    dtypes = {
        row.path: checkpoint.dtype(row) if dtype is None else jnp.dtype(dtype)
        for row in parameters(config)
    }
    if checkpoint.packed:
        names = ", ".join(sorted({f"{each}" for each in dtypes.values()}))
        log.warning(
            "the weights of %s are packed (%s); they are unpacked into %s as they are read",
            *(folder, ", ".join(checkpoint.packed), names),
        )
    return dtypes, lambda row, index: checkpoint.read(row, index, dtypes[row.path])
