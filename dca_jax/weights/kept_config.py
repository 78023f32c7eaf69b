"""The description of packed matrices in the config.json of a converted folder.

It is the config's `quantization_config`, as in Hugging Face's configs:

    {"quant_method": "dca_jax", "version": 1, "matrices": {
        "layers.mlp.up_proj.kernel": {"form": "int4", "tile": [1, 32], "scale": "float16"}}}

A tile is a number of rows and columns of Hugging Face's matrix, null for all of them; `offset` is
the dtype of offsets, if there are any. `dca_jax.weights.orbax_packed` describes the arrays.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dca_jax import fields
from dca_jax.config import CONFIG
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.products.packed import DTYPES
from dca_jax.weights.files import read_json
from dca_jax.weights.kept import EVERY, Kept
from dca_jax.weights.tensor_files import FLOATS

QUANTIZATION = "quantization_config"
METHOD, VERSION = "dca_jax", 1
SCALES = {dtype.name: dtype for name, dtype in FLOATS.items() if name != "F64"}
KEYS = frozenset({"form", "tile", "scale", "offset"})


def described(kept: Mapping[str, Kept]) -> dict[str, Any]:
    """The `quantization_config` for packed matrices, by path of the parameter."""

    def one(kept: Kept) -> dict[str, Any]:
        tile = [None if size == EVERY else size for size in kept.tile]
        found = {"form": kept.form, "tile": tile, "scale": kept.scale.name}
        return found if kept.offset is None else found | {"offset": kept.offset.name}

    matrices = {path: one(each) for path, each in kept.items()}
    return {"quant_method": METHOD, "version": VERSION, "matrices": matrices}


def kept_in(folder: Path) -> dict[str, Kept]:
    """How the matrices of a converted folder are packed, by path; empty without a description.

    Raises:
        InputError: as in `read_kept`.
    """
    if not (folder / CONFIG).is_file():
        return {}
    where = f"{folder / CONFIG}"
    quantization = fields.mapping(read_json(folder, CONFIG), QUANTIZATION, where)
    return read_kept(quantization, where) if quantization else {}


def read_kept(quantization: Mapping[str, Any], where: str) -> dict[str, Kept]:
    """The inverse of `described`.

    Args:
        quantization: the config's `quantization_config`.
        where: the file, for messages.

    Raises:
        InputError: the method or version is another one, or a form or value is invalid.
    """
    where = f"{where}, {QUANTIZATION}"
    method = fields.text(quantization, "quant_method", where)
    if method != METHOD:
        raise InputError(
            f"{where}: quant_method is {shown(method)}, and a converted folder's is {METHOD}; "
            "convert the checkpoint again"
        )
    version = fields.integer(quantization, "version", where)
    if version != VERSION:
        raise InputError(
            f"{where}: version is {shown(version)}, and this dca_jax reads {VERSION}; install a "
            "newer dca_jax, or convert the checkpoint again"
        )
    matrices = fields.mapping(quantization, "matrices", where) or {}
    return {path: _read_one(matrices, path, where) for path in matrices}


def _read_one(matrices: Mapping[str, Any], path: str, where: str) -> Kept:
    found = fields.mapping(matrices, path, where) or {}
    where = f"{where}, {shown(path, quote=False)}"
    unknown = sorted(found.keys() - KEYS)
    if unknown:
        raise InputError(
            f"{where}: {shown(unknown[0], quote=False)} is not known; expected "
            f"{', '.join(sorted(KEYS))}"
        )
    form = fields.text(found, "form", where)
    if form not in DTYPES:
        raise InputError(
            f"{where}: form is {shown(form)}, which is not supported; expected one of "
            f"{', '.join(DTYPES)}, or a newer dca_jax"
        )
    tile = found.get("tile")
    if not isinstance(tile, list) or len(tile) != 2 or not all(map(_is_size, tile)):
        raise InputError(f"{where}: tile must be two sizes, or null for all, got {shown(tile)}")
    rows, columns = (EVERY if size is None else size for size in tile)
    offset = _dtype(found, "offset", where) if found.get("offset") is not None else None
    return Kept(form, (rows, columns), _dtype(found, "scale", where), offset)


def _is_size(value: Any) -> bool:
    return value is None or (type(value) is int and 1 <= value <= fields.LARGEST)


def _dtype(found: Mapping[str, Any], key: str, where: str) -> np.dtype:
    name = fields.text(found, key, where)
    if name not in SCALES:
        raise InputError(f"{where}: {key} is {shown(name)}; expected one of {', '.join(SCALES)}")
    return SCALES[name]
