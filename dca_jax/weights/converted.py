"""A converted folder: Orbax weights, possibly packed, with the model's config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from dca_jax.config import LlamaConfig
from dca_jax.errors import InputError
from dca_jax.weights.files import PARAMS
from dca_jax.weights.huggingface import Checkpoint
from dca_jax.weights.kept_config import kept_in
from dca_jax.weights.orbax import check_arrays, read_piece
from dca_jax.weights.orbax_packed import PackedArray, packed_arrays, part_shapes
from dca_jax.weights.packer import matrices
from dca_jax.weights.parameters import Parameter, Read, abstract_params, parameters
from dca_jax.weights.tensor_files import cast_weights


class Converted(NamedTuple):
    """A converted folder whose arrays fit its config; no weights have been read.

    Attributes:
        dtypes: dtype of each parameter from `read`, by path.
        read: reads pieces of parameters, unpacked.
        tensors: the matrices of each packed parameter, in Hugging Face's order.
    """

    dtypes: dict[str, np.dtype]
    read: Read
    tensors: dict[str, list[PackedArray]]


def open_converted(
    folder: str | Path,
    config: LlamaConfig,
    *,
    dtype: DTypeLike | None = None,
    unpacked: DTypeLike = jnp.float32,
) -> Converted:
    """Opens the weights of a converted folder, and checks them against its config.json.

    Args:
        dtype: dtype for reading; None keeps the stored dtypes.
        unpacked: dtype for packed weights, if `dtype` is None.

    Raises:
        InputError: as in `check_arrays` and `kept_in`; packed arrays with other dtypes than in
            config.json; or, when reading, a damaged array or a non-finite weight.
    """
    folder = Path(folder)
    path, rows = folder / PARAMS, parameters(config)
    kept = kept_in(folder)
    tensors = packed_arrays(path, matrices(config), config, kept)
    like = flatten_dict(abstract_params(config, dtype=jnp.float32), sep=".")
    parts = {row.path: part_shapes(row, config, kept[row.path]) for row in rows if row.path in kept}
    found = check_arrays(path, unflatten_dict(like | parts, sep="."))
    _check_parts(path, parts, found)
    dtypes = {
        row.path: jnp.dtype(unpacked if row.path in kept else found[row.path])
        if dtype is None
        else jnp.dtype(dtype)
        for row in rows
    }
    packed = Checkpoint(config, tensors)

    def read(row: Parameter, index: tuple[slice, ...]) -> np.ndarray:
        if row.path in tensors:
            return packed.read(row, index, dtypes[row.path])
        return cast_weights(read_piece(path, row.path, index), dtypes[row.path], row.path)

    return Converted(dtypes, read, tensors)


def _check_parts(
    path: Path, parts: Mapping[str, Mapping[str, Any]], found: Mapping[str, np.dtype]
) -> None:
    for name, each in parts.items():
        for part, wanted in each.items():
            dtype = found[f"{name}.{part}"]
            if dtype != wanted.dtype:
                raise InputError(
                    f"parameter {name}.{part} in {path} has dtype {dtype}; config.json says that "
                    f"it is packed with {wanted.dtype}"
                )
