"""Reading and checking the config and weights of Hugging Face folders and GGUF files."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dca_jax import fields
from dca_jax.config import CONFIG, LlamaConfig
from dca_jax.dca import SparseConfig
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.text_files import parse_json, read_text_file
from dca_jax.weights.files import is_converted, member, read_json
from dca_jax.weights.gguf import list_gguf_tensors, read_gguf_config
from dca_jax.weights.gguf_file import is_gguf
from dca_jax.weights.kept_config import QUANTIZATION, read_kept
from dca_jax.weights.parameters import (
    PIECE_SIZE,
    Parameter,
    contiguous,
    parameters,
)
from dca_jax.weights.quantized import read_scheme, unpack
from dca_jax.weights.tensor_files import StoredTensor, cast_weights, list_tensors

LONG_CONFIG = "config_1m.json"  # the second config in Qwen's checkpoints, for a million tokens
SPARSE_TABLE = "sparse_attention_config.json"
# Old checkpoints include the rotary frequencies, which follow from the config.
IGNORED = ".rotary_emb.inv_freq"


def read_config(
    folder: str | Path, *, context: int | None = None, file: str | Path | None = None
) -> LlamaConfig:
    """The model's shape, from a folder's `config.json` or another of its configs, or a GGUF file.

    A table of sparse attention next to it, as in some folders, is read too.

    Args:
        folder: folder of the checkpoint, or its GGUF file.
        context, file: as in `config_file`.

    Raises:
        InputError: a missing folder or file, not UTF-8, not JSON, or an unsupported model.
    """
    folder = Path(folder)
    path = config_file(folder, context=context, file=file)
    if is_gguf(path):
        return read_gguf_config(path)
    found = read_json(path.parent, path.name)
    if quantization := _quantization(found):
        if is_converted(folder):
            read_kept(quantization, f"{path}")
        else:
            read_scheme(quantization)
        del found[QUANTIZATION]
    config = LlamaConfig.from_hf(found)
    if config.dca is None or not (folder / SPARSE_TABLE).is_file():
        return config
    # Other models have a file with this name and an object instead of a list in it.
    path = member(folder, SPARSE_TABLE)
    table = parse_json(read_text_file(path), f"{path}")
    if not isinstance(table, list):
        return config
    sparse = config.sparse_attention or SparseConfig()
    return replace(config, sparse_attention=replace(sparse, patterns=json.dumps(table)))


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return fields.mapping(config, QUANTIZATION, CONFIG) or {}


def config_file(
    folder: str | Path, *, context: int | None = None, file: str | Path | None = None
) -> Path:
    """The config file in a folder for a text of a given length; a GGUF file is its own config.

    Args:
        folder: folder of the checkpoint.
        context: number of tokens of the text. If it exceeds the `max_position_embeddings` of
            `config.json`, `config_1m.json` is used if present.
        file: a config to use in any case.

    Raises:
        InputError: a missing folder or file.
    """
    folder = Path(folder)
    if file is not None:  # named by the user: may be anywhere, also behind a link
        if not Path(file).is_file():
            raise InputError(f"{Path(file).parent}: file {shown(Path(file).name)} is missing")
        return Path(file)
    if is_gguf(folder):
        return folder
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    if context is not None and (folder / LONG_CONFIG).is_file():
        most = read_json(folder, CONFIG).get("max_position_embeddings")
        if isinstance(most, int) and context > most:
            return member(folder, LONG_CONFIG)
    return member(folder, CONFIG)


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder or GGUF file that fits its config, before reading any weights.

    Attributes:
        config: the model's shape.
        tensors: for each path of our tree, its stored tensors in order.
    """

    config: LlamaConfig
    tensors: Mapping[str, Sequence[StoredTensor]]

    @property
    def packed(self) -> list[str]:
        """The names of the packed forms of its weights."""
        return sorted({t.packed for each in self.tensors.values() for t in each if t.packed})

    def dtype(self, row: Parameter) -> np.dtype:
        """The stored dtype of a parameter; for packed weights, the dtype of their values.

        Raises:
            InputError: its layers have different dtypes, so they cannot be stacked.
        """
        dtypes = {tensor.dtype for tensor in self.tensors[row.path]}
        if len(dtypes) > 1:
            names = ", ".join(sorted(map(str, dtypes)))
            raise InputError(f"the layers of {row.path} have different dtypes ({names}): name one")
        return dtypes.pop()

    def read(self, row: Parameter, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """The piece `[index]` of our array, within one stored tensor; contiguous, in `dtype`.

        Raises:
            InputError: a weight that is not finite, or not finite in `dtype`.
        """
        tensor = self.tensors[row.path][row.tensor_at(self.config, index)]
        axes = row.axes
        sizes = row.sizes(self.config)
        wanted = dict(zip(axes, index[len(index) - len(axes) :], strict=True))
        # Only the first of flattened axes is sliced in the file; the others are sliced afterwards.
        in_file, piece_sizes = [], dict(sizes)
        for first, *rest in row.groups:
            inner = math.prod(sizes[axis] for axis in rest)
            in_file.append(slice(wanted[first].start * inner, wanted[first].stop * inner))
            piece_sizes[first] = wanted[first].stop - wanted[first].start
        piece = cast_weights(tensor.read(tuple(in_file)), dtype, tensor.name)
        if row.transposed:  # transposed once here, so that the views below have our layout
            piece = contiguous(piece.T).T
        inner_axes = {axis for group in row.groups for axis in group[1:]}
        cut = tuple(wanted[axis] if axis in inner_axes else slice(None) for axis in axes)
        ours = row.to_ours(piece, piece_sizes)[cut]
        return np.ascontiguousarray(ours[(None,) * row.leading])


def open_checkpoint(folder: str | Path, config: LlamaConfig) -> Checkpoint:
    """Opens the weights of a folder or GGUF file; checks names, shapes and dtypes.

    Tied embeddings may be stored under either name, or under both if they are equal.

    Raises:
        InputError: as in `list_tensors`; a missing or extra tensor; a wrong shape; tied embeddings
            that differ.
    """
    folder = Path(folder)
    found = list_gguf_tensors(folder, config) if is_gguf(folder) else _list_folder(folder)
    stored: dict[str, StoredTensor] = {k: v for k, v in found.items() if not k.endswith(IGNORED)}
    head = stored.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    if head is not None:
        stored.setdefault("model.embed_tokens.weight", head)
    tensors = match_tensors(folder, config, parameters(config), stored)
    if head is not None:
        _check_tied(tensors["embed_tokens.embedding"][0], head)
    return Checkpoint(config, tensors)


def _list_folder(folder: Path) -> dict[str, StoredTensor]:
    quantization = _quantization(read_json(folder, CONFIG))
    if not quantization:
        return list_tensors(folder)
    return unpack(list_tensors(folder, packed=True), read_scheme(quantization))


def match_tensors(
    folder: Path,
    config: LlamaConfig,
    rows: Sequence[Parameter],
    stored: dict[str, StoredTensor],
) -> dict[str, list[StoredTensor]]:
    """For each path of `rows`, its tensors in `folder`, in order.

    Raises:
        InputError: a missing or extra tensor, or a wrong shape.
    """
    described = "metadata" if is_gguf(folder) else "config.json"
    counts = {"layers": config.num_hidden_layers}
    if config.mixture is not None:
        counts["experts in each layer"] = config.mixture.num_experts
    for what, count in counts.items():
        if count > len(stored):  # checked before so many names are built
            raise InputError(
                f"the weights in {folder} are not those of the model in its {described}: it asks "
                f"for {count} {what}, and there are {len(stored)} tensors"
            )
    stored, missing = dict(stored), []
    tensors: dict[str, list[StoredTensor]] = {}
    for row in rows:
        names = row.their_names(config)
        missing += [name for name in names if name not in stored]
        tensors[row.path] = [stored.pop(name) for name in names if name in stored]
        for tensor in tensors[row.path]:
            if tensor.shape != row.their_shape(config):
                raise InputError(
                    f"tensor {tensor.name} in {tensor.path.name} has shape {tensor.shape}; "
                    f"{described} asks for {row.their_shape(config)}"
                )
    problems = [f"{len(missing)} tensors are missing ({_some(missing)})"] if missing else []
    problems += [f"{len(stored)} have no place in it ({_some(list(stored))})"] if stored else []
    if problems:
        raise InputError(
            f"the weights in {folder} are not those of the model in its {described}: "
            + "; ".join(problems)
        )
    return tensors


def _check_tied(embedding: StoredTensor, head: StoredTensor) -> None:
    num_rows, width = embedding.shape
    step = max(1, PIECE_SIZE // width)
    same = embedding.shape == head.shape and all(
        np.array_equal(embedding.read(index), head.read(index))
        for start in range(0, num_rows, step)
        for index in [(slice(start, min(start + step, num_rows)), slice(0, width))]
    )
    if not same:
        raise InputError(
            f"config.json ties the embeddings, but {embedding.name} and {head.name} differ; set "
            "tie_word_embeddings to false, or remove one of them"
        )


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name, quote=False) for name in names[:most]) + more
