"""The weights of a checkpoint's folder, Hugging Face's or converted, onto the devices."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dca_jax.config import LlamaConfig
from dca_jax.weights.huggingface import open_checkpoint
from dca_jax.weights.orbax import is_converted, open_converted
from dca_jax.weights.parameters import Parameter, Read, Shardings, load_tree, parameters


def load_weights(
    folder: str | Path,
    config: LlamaConfig,
    *,
    dtype: DTypeLike,
    sharding: Shardings = None,
    then: Callable[[Parameter, jax.Array], Mapping[str, jax.Array]] | None = None,
) -> dict[str, Any]:
    """The parameters of a Hugging Face or a converted folder, each device its own part.

    Args:
        folder: of the checkpoint. config: its own.
        dtype: of the arrays as they are read.
        sharding: one for all, or a function of the path; None is the first local device.
        then: as in `dca_jax.weights.parameters.load_tree`.

    Raises:
        InputError: as `dca_jax.weights.huggingface.load_params` and
            `dca_jax.weights.orbax.load_converted`.
    """
    like = {row.path: row.abstract(config, dtype, sharding) for row in parameters(config)}
    return load_tree(config, like, open_weights(folder, config, dtype=dtype), then=then)


def open_weights(folder: str | Path, config: LlamaConfig, *, dtype: DTypeLike) -> Read:
    """What reads pieces of the weights of a Hugging Face or a converted folder, in `dtype`.

    Raises:
        InputError: a checkpoint that is damaged or does not fit its config; when reading, a weight
            that is NaN or infinite.
    """
    if is_converted(Path(folder)):
        return open_converted(folder, config, dtype=dtype)[1]
    return partial(open_checkpoint(folder, config).read, dtype=jnp.dtype(dtype))
