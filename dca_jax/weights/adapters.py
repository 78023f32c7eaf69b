"""LoRA adapters: reading and writing PEFT folders, and merging adapters into the weights.

An adapter is a pair of float32 arrays next to the kernel it adapts (`dca_jax.layers.Linear`):
`lora_a` [L, inputs, R] and `lora_b` [L, R, outputs]. Folders have the format of PEFT
(https://github.com/huggingface/peft).
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from dca_jax.config import LORA_TARGETS, LlamaConfig, LoraConfig
from dca_jax.distributed import from_primary, is_primary
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.sharding import mesh_of
from dca_jax.weights.files import member, read_json, refuse_existing, written_aside
from dca_jax.weights.huggingface import Checkpoint, match_tensors
from dca_jax.weights.parameters import (
    Parameter,
    Read,
    Shardings,
    load_tree,
    lora_parameters,
)
from dca_jax.weights.tensor_files import list_file, write_safetensors

ADAPTERS = ("lora_a", "lora_b")  # names of trainable leaves
# PEFT's file names in an adapter folder.
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# PEFT settings that are read, or do not affect what trained adapters compute. Any other one, if
# set, means something else than low-rank matrices added to whole kernels.
_KNOWN = set(
    "peft_type r lora_alpha target_modules exclude_modules bias use_rslora task_type auto_mapping "
    "peft_version revision base_model_name_or_path inference_mode lora_dropout init_lora_weights "
    "loftq_config eva_config corda_config lora_ga_config megatron_core qalora_group_size "
    "runtime_config".split()
)
_TENSOR = re.compile(r"\.(\w+)\.lora_[AB]\.weight")  # the end of a tensor's name


def merge_lora(read: Read, adapters: Mapping[str, Any], lora: LoraConfig) -> Read:
    """A `read` for the base with merged adapters: each kernel is W + scale A B.

    The sum is computed in float32 and rounded once to the dtype of `read`. Pieces are merged as
    they are read, so this needs no more memory than `load_tree` or a `StreamedArray`. With several
    processes, all must call it.

    Args:
        read: reads pieces of the base, unquantized (`dca_jax.weights.folder.open_weights`).
        adapters: the adapters from `load_adapter`.
        lora: their setting.
    """
    leaves = {path: on_host(leaf) for path, leaf in flat(adapters).items()}

    def read_merged(row: Parameter, index: tuple[slice, ...]) -> np.ndarray:
        piece = read(row, index)
        module, _, name = row.path.rpartition(".")
        a, b = (leaves.get(f"{module}.{part}") for part in ADAPTERS)
        if name != "kernel" or a is None or b is None:
            return piece
        layer, ins = index[0].start, index[1 : a.ndim - 1]
        outs = index[a.ndim - 1 :]
        delta = np.tensordot(a[layer][ins], b[layer][:, *outs], 1)[None]
        with np.errstate(over="ignore"):
            merged = piece.astype(np.float32) + np.float32(lora.scale) * delta
            merged = merged.astype(piece.dtype)
        if not np.isfinite(merged).all():
            raise InputError(
                f"{row.path} with its adapter merged is not finite in {piece.dtype}: the adapter "
                "is too large"
            )
        return merged

    return read_merged


def with_adapter(read: Read, path: str | Path, config: LlamaConfig) -> Read:
    """`merge_lora` with the adapter in a folder.

    Raises:
        InputError: as in `load_adapter`.
    """
    lora, adapters = load_adapter(path, config)
    return merge_lora(read, adapters, lora)


# --- PEFT's folders ----------------------------------------------------------------------------


def save_adapter(
    path: str | Path,
    adapters: Mapping[str, Any],
    config: LlamaConfig,
    lora: LoraConfig,
    *,
    base_model: str | None = None,
) -> None:
    """Writes adapters as a folder that PEFT can load: its config, and safetensors in float32.

    `path` appears only when everything is written. With several processes, all must call it.

    Args:
        path: the folder to create.
        adapters: their tree, replicated or sharded.
        config: the base model's shape.
        lora: their setting.
        base_model: name or folder of the base model, from which PEFT can load it.

    Raises:
        InputError: `path` exists, or its parent does not.
    """
    path = Path(path).absolute()
    from_primary(lambda: refuse_existing(path))
    leaves = {name: on_host(leaf) for name, leaf in flat(adapters).items()}
    if not is_primary():
        return
    rows = lora_parameters(config, lora)
    tensors = [
        (name, np.dtype(np.float32), row.their_shape(config))
        for row in rows
        for name in row.their_names(config)
    ]
    data = (
        np.ascontiguousarray(row.to_theirs(layer), np.float32).tobytes()
        for row in rows
        for layer in leaves[row.path]
    )
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "target_modules": list(lora.targets),
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    with written_aside(path) as aside:
        text = json.dumps(settings, indent=2) + "\n"
        (aside / CONFIG_FILE).write_text(text, encoding="utf-8")
        write_safetensors(aside / WEIGHTS_FILE, tensors, data)


def load_adapter(
    path: str | Path, config: LlamaConfig, *, sharding: Shardings = None
) -> tuple[LoraConfig, dict[str, Any]]:
    """The setting and the float32 adapters in a folder written by `save_adapter` or PEFT.

    Args:
        path: the folder.
        config: the base model's shape.
        sharding: as in `init_lora`.

    Raises:
        InputError: a missing folder or file, an unsupported variant of LoRA, or tensors that do not
            fit the model or are not finite.
    """
    lora, checkpoint = open_adapter(path, config)
    rows, dtype = lora_parameters(config, lora), np.dtype(np.float32)
    like = {row.path: row.abstract(config, dtype, sharding) for row in rows}
    return lora, load_tree(
        config, like, lambda row, index: checkpoint.read(row, index, dtype), rows=rows
    )


def open_adapter(path: str | Path, config: LlamaConfig) -> tuple[LoraConfig, Checkpoint]:
    """The setting of an adapter folder, and its tensors without reading them.

    Raises:
        InputError: as in `load_adapter`, except for the tensors' values.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one with {CONFIG_FILE}")
    found = read_json(folder, CONFIG_FILE)
    stored = {tensor.name: tensor for tensor in list_file(member(folder, WEIGHTS_FILE))}
    lora = _setting(found, folder / CONFIG_FILE, stored)
    rows = lora_parameters(config, lora)
    return lora, Checkpoint(config, match_tensors(folder, config, rows, stored))


def _setting(found: Mapping[str, Any], path: Path, tensors: Collection[str]) -> LoraConfig:
    """The setting for tensors with these names, from the config file `path`."""
    kind = found.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path} is of peft_type {shown(kind)}; expected 'LORA'")
    others = [name for name, value in found.items() if value and name not in _KNOWN]
    if found.get("bias") not in ("none", None):
        others.append("bias")
    if others:
        named = ", ".join(f"{shown(k, quote=False)} {shown(found[k])}" for k in others)
        raise InputError(
            f"{path} sets {named}, which is not supported; merge the adapter with PEFT's "
            "merge_and_unload, and load the result"
        )
    rank, alpha, rslora = (found.get(name) for name in ("r", "lora_alpha", "use_rslora"))
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise InputError(
            f"{path} has r {shown(rank)} and lora_alpha {shown(alpha)}; expected numbers"
        )
    targets = found.get("target_modules")
    if isinstance(targets, str) or found.get("exclude_modules"):
        # A pattern: the tensors show what it matched.
        targets = [match[1] for match in map(_TENSOR.search, tensors) if match]
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise InputError(
            f"{path} has target_modules {shown(targets)}; expected a list of "
            f"{', '.join(LORA_TARGETS)}"
        )
    # PEFT accepts paths as well as names, and writes a set in any order. Unknown names come last
    # and are refused.
    names = sorted(
        {name.rpartition(".")[2] for name in targets},
        key=lambda name: ([*LORA_TARGETS, name].index(name), name),
    )
    return LoraConfig(rank=rank, alpha=alpha, targets=tuple(names), rslora=bool(rslora))


def on_host(leaf: Array) -> np.ndarray:
    """The whole of an array that may be sharded, also over processes."""
    mesh = mesh_of(leaf)
    if mesh is not None:
        whole = NamedSharding(mesh, PartitionSpec())
        leaf = jax.jit(lambda x: x, out_shardings=whole)(leaf)
    return np.asarray(leaf)


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a parameter tree, by path."""
    return cast(dict[str, Any], flatten_dict(dict(tree), sep="."))
