"""Loading weights from a Hugging Face folder, a converted folder or a GGUF file to devices."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dca_jax.config import CONFIG, LlamaConfig
from dca_jax.products.packed import FORMS, STORED, Packed
from dca_jax.weights.adapters import with_adapter
from dca_jax.weights.files import copy_companions, is_converted, read_json
from dca_jax.weights.gguf import write_companions
from dca_jax.weights.gguf_file import is_gguf
from dca_jax.weights.huggingface import LONG_CONFIG, open_checkpoint
from dca_jax.weights.kept import Kept, KeptTensor, kept_rows, load_kept
from dca_jax.weights.kept_config import QUANTIZATION, described, kept_in
from dca_jax.weights.layouts import laid_out
from dca_jax.weights.packer import matrices
from dca_jax.weights.parameters import (
    Parameter,
    Progress,
    Read,
    Shardings,
    Then,
    load_tree,
    parameters,
)
from dca_jax.weights.tensor_files import StoredTensor

log = logging.getLogger(__name__)


def load_weights(
    folder: str | Path,
    config: LlamaConfig,
    *,
    dtype: DTypeLike | None = None,
    sharding: Shardings = None,
    adapter: str | Path | None = None,
    then: Then | None = None,
    keep: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The parameters of a Hugging Face or converted folder or a GGUF file, streamed to devices.

    Each device's part is filled piece by piece, so the host holds only a few pieces and never
    a whole parameter, and a process reads only its own shards.

    Args:
        folder: folder of the checkpoint, or its GGUF file.
        config: its config (`read_config(folder)`).
        dtype: dtype of unpacked arrays; None keeps the stored dtypes.
        sharding: one sharding for all, or a function of the path; None is the first local device.
        adapter: folder of a LoRA adapter (PEFT) to merge into the weights, with float32 sums.
        then: as in `dca_jax.weights.parameters.load_tree`.
        keep: as in `open_weights`; with an adapter, all weights are unpacked for merging.
        progress: function called with the path and the bytes placed, after each piece.

    Returns:
        The parameter tree: nested dicts of arrays or packed matrices, with layers stacked on a
        leading axis.

    Raises:
        InputError: as in `open_weights` and `load_adapter`, before weights are read; a damaged
            array or a non-finite weight, when it is read.
    """
    source = open_weights(folder, config, dtype=dtype, keep=keep if adapter is None else None)
    read = source.read
    if adapter is not None:
        read = with_adapter(read, adapter, config)
    every = {
        row.path: row.abstract(config, source.dtypes[row.path], sharding) for row in source.rows
    }
    like = {path: leaf for path, leaf in every.items() if path not in source.kept}

    def kept(row: Parameter) -> Packed | None:
        if row.path not in source.kept:
            return None
        return load_kept(row, config, source.kept[row.path], every[row.path].sharding, progress)

    return load_tree(config, like, read, progress, then=then, instead=kept, laid=laid_out)


def copy_description(
    source: Path, destination: Path, kept: Mapping[str, Kept] | None = None
) -> list[Path]:
    """Copies the other files of a checkpoint, or writes them for a GGUF file.

    The copied configs omit the quantization of `source`.

    Args:
        kept: forms of packed weights in `destination`, by path, for its config.json; only for a
            converted folder.

    Returns:
        The original files.

    Raises:
        InputError: as in `copy_companions` and `write_companions`.
    """
    originals: list[Path] = []
    if is_gguf(source):
        write_companions(source, destination)
    else:
        originals = copy_companions(source, destination)
    for name in (CONFIG, LONG_CONFIG):
        if (destination / name).is_file():
            config = before = read_json(destination, name)
            config = {key: value for key, value in before.items() if key != QUANTIZATION}
            if kept and name == CONFIG:
                config[QUANTIZATION] = described(kept)
            if config != before:
                text = json.dumps(config, indent=2) + "\n"
                (destination / name).write_text(text, encoding="utf-8")
    return originals


class Source(NamedTuple):
    """A checkpoint's weights, before reading any of them.

    Attributes:
        dtypes: dtype of each parameter that is read unpacked, by path.
        read: reads pieces of those, in their dtype.
        kept: the tensors of each parameter that stays packed.
        rows: all parameters.
        files: the files with the weights; empty for a converted folder.
    """

    dtypes: dict[str, np.dtype]
    read: Read
    kept: dict[str, Sequence[KeptTensor]]
    rows: list[Parameter]
    files: list[Path]


def open_weights(
    folder: str | Path,
    config: LlamaConfig,
    *,
    dtype: DTypeLike | None = None,
    unpacked: DTypeLike = jnp.float32,
    keep: str | None = None,
) -> Source:
    """The weights of a Hugging Face or converted folder or a GGUF file.

    If weights are packed, a log message says how they are loaded.

    Args:
        dtype: dtype of weights that do not stay packed; None keeps the stored dtypes.
        unpacked: without `dtype`, the dtype for packed weights of a converted folder that do not
            stay packed.
        keep: which weights stay packed as stored: "stored" for all that can, a name in
            `dca_jax.products.packed.FORMS` for those in this form, None for none.

    Raises:
        InputError: a checkpoint that is damaged or does not fit its config, or, when reading, a
            non-finite weight.
    """
    rows, tensors = parameters(config), dict[str, Sequence[StoredTensor]]()
    if is_converted(Path(folder)):
        from dca_jax.weights.converted import open_converted  # slow to import, and rarely needed

        converted = open_converted(folder, config, dtype=dtype, unpacked=unpacked)
        dtypes, read, files = converted.dtypes, converted.read, []
        tensors |= converted.tensors
    else:
        checkpoint = open_checkpoint(folder, config)
        tensors, own = checkpoint.tensors, None if dtype is None else jnp.dtype(dtype)
        dtypes = {row.path: own or checkpoint.dtype(row) for row in rows}
        files = sorted({tensor.path for each in tensors.values() for tensor in each})

        def read_stored(row: Parameter, index: tuple[slice, ...]) -> np.ndarray:
            return checkpoint.read(row, index, dtypes[row.path])

        read = read_stored
    forms = _kept_names(config, kept_rows(matrices(config), config, tensors), keep)
    _say_how(folder, rows, tensors, dtypes, forms)
    return Source(dtypes, read, {path: tensors[path] for path in forms}, rows, files)


def kept_forms(folder: Path, config: LlamaConfig, keep: str | None) -> dict[str, Kept]:
    """The forms of weights that `open_weights` would keep packed, by path; logs nothing.

    Raises:
        InputError: as in `open_weights`; for a converted folder only config.json is checked.
    """
    if keep is None:
        return {}
    if is_converted(folder):
        kept = kept_in(folder)
        kept = {row.path: kept[row.path] for row in matrices(config) if row.path in kept}
    elif not is_gguf(folder) and QUANTIZATION not in read_json(folder, CONFIG):
        return {}
    else:
        tensors = open_checkpoint(folder, config).tensors
        kept = kept_rows(matrices(config), config, tensors)
    return {path: kept[path] for path in _kept_names(config, kept, keep)}


def _kept_names(config: LlamaConfig, kept: Mapping[str, Kept], keep: str | None) -> dict[str, str]:
    """The form of each parameter that can and should stay packed, by path."""
    if keep is None:
        return {}
    names, asked = {}, {}
    for row in matrices(config):
        if row.path in kept:
            sizes = row.inner(row.shape(config))
            names[row.path], asked[row.path] = kept[row.path].name(row, sizes), keep
            if keep.startswith("int4"):  # in groups that divide its inputs
                asked[row.path] = f"int4:{math.gcd(FORMS[keep], sizes[-1])}"
    return {path: name for path, name in names.items() if keep == STORED or name == asked[path]}


def _say_how(
    folder: str | Path,
    rows: Sequence[Parameter],
    tensors: Mapping[str, Sequence[StoredTensor]],
    dtypes: Mapping[str, np.dtype],
    forms: Mapping[str, str],
) -> None:
    packed = {row.path: {t.packed for t in tensors.get(row.path, []) if t.packed} for row in rows}
    packed = {path: names for path, names in packed.items() if names}
    if not packed:
        return
    others = [path for path in packed if path not in forms]
    kinds = ", ".join(sorted(set().union(*packed.values())))
    dtype = ", ".join(sorted({f"{dtypes[path]}" for path in others}))
    kept = ", ".join(sorted(set(forms.values())))
    if not forms:
        how = f"they are unpacked to {dtype} while loading"
    elif not others:
        how = f"they stay so ({kept})"
    else:
        names = ", ".join(path.removesuffix(".kernel").rpartition(".")[2] for path in others)
        how = f"they stay so ({kept}), except {names}: unpacked to {dtype} while loading"
    log.warning("the weights of %s are packed (%s); %s", folder, kinds, how)
