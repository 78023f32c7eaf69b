"""The weights of a checkpoint's folder, Hugging Face's or converted, onto the devices."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dca_jax.config import LlamaConfig
from dca_jax.weights.adapters import with_adapter
from dca_jax.weights.huggingface import open_checkpoint
from dca_jax.weights.orbax import is_converted, open_converted
from dca_jax.weights.parameters import Parameter, Progress, Read, Shardings, load_tree, parameters


def load_weights(
    folder: str | Path,
    config: LlamaConfig,
    *,
    dtype: DTypeLike | None = None,
    sharding: Shardings = None,
    adapter: str | Path | None = None,
    then: Callable[[Parameter, jax.Array], Mapping[str, jax.Array]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The parameters of a Hugging Face or a converted folder, streamed into device arrays.

    Each device is filled piece by piece with the part that its sharding gives it, so the host
    holds a piece or two and never a parameter, and a process reads its own shards only.

    Args:
        folder: of the checkpoint. config: its own (`read_config(folder)`).
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


def open_weights(
    folder: str | Path, config: LlamaConfig, *, dtype: DTypeLike | None = None
) -> tuple[dict[str, np.dtype], Read]:
    """The dtype of each parameter, by path, and what reads pieces of them in it.

    Raises:
        InputError: a checkpoint that is damaged or does not fit its config; when reading, a weight
            that is NaN or infinite.
    """
    if is_converted(Path(folder)):
        return open_converted(folder, config, dtype=dtype)
    checkpoint = open_checkpoint(folder, config)
    dtypes = {
        row.path: checkpoint.dtype(row) if dtype is None else jnp.dtype(dtype)
        for row in parameters(config)
    }
    return dtypes, lambda row, index: checkpoint.read(row, index, dtypes[row.path])
