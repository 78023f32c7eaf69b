"""LoRA adapters beside a checkpoint: PEFT's folders, and merging them into the weights.

An adapter is a pair of float32 arrays beside the kernel it adapts (`dca_jax.model.Linear`):
`lora_a` [L, inputs, R] and `lora_b` [L, R, outputs]. Folders are those of PEFT
(https://github.com/huggingface/peft), read and written.
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
# PEFT's names of the files of an adapter's folder.
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Settings of PEFT that are read, or say nothing about what trained adapters compute. Any other one
# that is set makes them something else than low-rank matrices beside whole kernels.
_KNOWN = set(
    "peft_type r lora_alpha target_modules exclude_modules bias use_rslora task_type auto_mapping "
    "peft_version revision base_model_name_or_path inference_mode lora_dropout init_lora_weights "
    "loftq_config eva_config corda_config lora_ga_config megatron_core qalora_group_size "
    "runtime_config".split()
)
_TENSOR = re.compile(r"\.(\w+)\.lora_[AB]\.weight")  # the end of a tensor's name


def merge_lora(read: Read, adapters: Mapping[str, Any], lora: LoraConfig) -> Read:
    """Reads a base with its adapters merged into it: each kernel as W + scale A B.

    The sum is in float32, rounded once to the dtype of what `read` gives. A piece is merged when
    it is read, so a base of any size needs no more memory than `load_tree` or a `StreamedArray`
    takes for it. With several processes, all call it.

    Args:
        read: of the base, as it was before any quantization
            (`dca_jax.weights.folder.open_weights`).
        adapters: as `load_adapter` gives them.
        lora: what they were made with.
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
    """`merge_lora` of the adapter in a folder.

    Raises:
        InputError: as `load_adapter`.
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
    """Writes adapters as a folder that PEFT loads: its config, and safetensors in float32.

    `path` appears when everything is written. With several processes, all call it.

    Args:
        path: the folder to make.
        adapters: their tree, whole or cut.
        config: the base model's shape.
        lora: what they were made with.
        base_model: name or folder of the base, for PEFT to load by itself.

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
    """The setting and the adapters of a folder that `save_adapter` or PEFT wrote, in float32.

    Args:
        path: the folder.
        config: the base model's shape.
        sharding: as in `init_lora`.

    Raises:
        InputError: no such folder or files; a variant of LoRA that is not computed here; tensors
            that do not fit the model, or are NaN or infinite.
    """
    lora, checkpoint = open_adapter(path, config)
    rows, dtype = lora_parameters(config, lora), np.dtype(np.float32)
    like = {row.path: row.abstract(config, dtype, sharding) for row in rows}
    return lora, load_tree(
        config, like, lambda row, index: checkpoint.read(row, index, dtype), rows=rows
    )


def open_adapter(path: str | Path, config: LlamaConfig) -> tuple[LoraConfig, Checkpoint]:
    """The setting of an adapter's folder, and its tensors, which are not read yet.

    Raises:
        InputError: as `load_adapter`, but for what the tensors hold.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; expected one with {CONFIG_FILE}")
    found = read_json(folder, CONFIG_FILE)
    stored = {tensor.name: tensor for tensor in list_file(member(folder, WEIGHTS_FILE))}
    lora = _setting(found, folder / CONFIG_FILE, stored)
    rows = lora_parameters(config, lora)
    return lora, Checkpoint(config, match_tensors(folder, config, rows, stored))


def _setting(found: Mapping[str, Any], path: Path, tensors: Collection[str]) -> LoraConfig:
    """What the tensors of these names were made with, by the settings in the file `path`."""
    kind = found.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path} is of peft_type {shown(kind)}; expected 'LORA'")
    others = [name for name, value in found.items() if value and name not in _KNOWN]
    if found.get("bias") not in ("none", None):
        others.append("bias")
    if others:
        named = ", ".join(f"{shown(k, quote=False)} {shown(found[k])}" for k in others)
        raise InputError(
            f"{path} sets {named}, which is not computed here; merge the adapter with PEFT's "
            "merge_and_unload, and load the result"
        )
    rank, alpha, rslora = (found.get(name) for name in ("r", "lora_alpha", "use_rslora"))
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise InputError(
            f"{path} has r {shown(rank)} and lora_alpha {shown(alpha)}; expected numbers"
        )
    targets = found.get("target_modules")
    if isinstance(targets, str) or found.get("exclude_modules"):
        # A pattern: the tensors tell what it has matched.
        targets = [match[1] for match in map(_TENSOR.search, tensors) if match]
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise InputError(
            f"{path} has target_modules {shown(targets)}; expected a list of "
            f"{', '.join(LORA_TARGETS)}"
        )
    # PEFT takes paths as well as names, and writes a set, in any order. Names that are not known
    # come last, and are refused.
    names = sorted(
        {name.rpartition(".")[2] for name in targets},
        key=lambda name: ([*LORA_TARGETS, name].index(name), name),
    )
    return LoraConfig(rank=rank, alpha=alpha, targets=tuple(names), rslora=bool(rslora))


def on_host(leaf: Array) -> np.ndarray:
    """The whole of an array that may be cut, also between processes."""
    mesh = mesh_of(leaf)
    if mesh is not None:
        whole = NamedSharding(mesh, PartitionSpec())
        leaf = jax.jit(lambda x: x, out_shardings=whole)(leaf)
    return np.asarray(leaf)


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a tree of parameters by path."""
    return cast(dict[str, Any], flatten_dict(dict(tree), sep="."))
