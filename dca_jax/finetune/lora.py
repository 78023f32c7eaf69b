"""LoRA: low-rank adapters over a frozen base (arXiv 2106.09685), bfloat16 or int8.

A projection that has adapters computes y = x W + alpha / rank (x A) B (`dca_jax.model.Linear`).
Adapters are float32 arrays beside the kernel they adapt, `lora_a` [L, inputs, R] and `lora_b`
[L, R, outputs], and lie on a mesh as its inputs and its outputs do. A run is:

    base = quantize_base(params, config)                    # or params as they are
    adapters = init_lora(config, lora, key, sharding)
    model = Llama.from_params(config, join(adapters, base), lora=lora, quantized=True)

with gradients of `adapters` alone. `merge_lora` gives back a plain parameter tree, which can be
saved as a converted folder; `save_adapter` writes what PEFT (https://github.com/huggingface/peft)
reads. int8 is of weights only, a scale for each output of each layer (W8A16); it needs qwix.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int8, Key

from dca_jax.config import LORA_TARGETS, LlamaConfig, LoraConfig
from dca_jax.distributed import from_primary, is_primary
from dca_jax.errors import InputError
from dca_jax.files import member, read_json, refuse_existing, written_aside
from dca_jax.huggingface import Checkpoint, match_tensors
from dca_jax.model import Llama
from dca_jax.parameters import (
    TABLE,
    Shardings,
    load_tree,
    lora_parameters,
    projections,
)
from dca_jax.sharding import Shards, mesh_of
from dca_jax.tensor_files import list_file, write_safetensors

ADAPTERS = ("lora_a", "lora_b")  # names of trainable leaves
# PEFT's names of the files of an adapter's folder.
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Settings of PEFT that are read, or say nothing about what trained adapters compute. Any other one
# that is set makes them something else than plain LoRA.
_KNOWN = set(
    "peft_type r lora_alpha target_modules bias task_type auto_mapping peft_version revision "
    "base_model_name_or_path inference_mode lora_dropout init_lora_weights loftq_config eva_config "
    "corda_config lora_ga_config megatron_core qalora_group_size runtime_config".split()
)


def init_lora(
    config: LlamaConfig, lora: LoraConfig, key: Key[Array, ""], sharding: Shardings = None
) -> dict[str, Any]:
    """New adapters, float32: A uniform in +-1 / sqrt(inputs), B zero, so that nothing changes yet.

    Args:
        config: the model's shape.
        lora: which projections have adapters, and their rank.
        key: of the random numbers; they do not depend on the sharding.
        sharding: one for all, or a function of the path (`parameter_shardings(..., lora=lora)`);
            None is the first local device.

    Returns:
        The adapters' tree, as `split` gives it.
    """
    rows = lora_parameters(config, lora)
    leaves = {row.path: row.abstract(config, jnp.float32, sharding).sharding for row in rows}

    def make(key: Array) -> dict[str, Any]:
        # Of all that the model draws, the compiler keeps the adapters.
        return split(Llama(config, lora=lora, rngs=nnx.Rngs(key)).params())[0]

    return jax.jit(make, out_shardings=unflatten_dict(leaves, sep="."))(key)


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The adapters, which are trained, and the base, which is not: two trees without copies."""
    adapters, base = {}, {}
    for path, leaf in _flat(params).items():
        (adapters if path.rpartition(".")[2] in ADAPTERS else base)[path] = leaf
    return unflatten_dict(adapters, sep="."), unflatten_dict(base, sep=".")


def join(adapters: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split`: what `Llama.from_params(..., lora=lora)` takes."""
    return unflatten_dict(_flat(base) | _flat(adapters), sep=".")


def quantize_base(params: Mapping[str, Any], config: LlamaConfig) -> dict[str, Any]:
    """The layers' kernels as int8 `kernel` and float32 `kernel_scale`, all else as it is.

    A kernel is about kernel * kernel_scale; the scale has size 1 along the inputs, and no weight is
    off by more than half of it. Each leaf stays on its devices. `params` is used up: a kernel is
    deleted as soon as it is quantized, so that the memory of one leaf is all that is needed.

    Returns:
        The tree for `Llama.from_params(..., quantized=True)`.

    Raises:
        InputError: qwix is not installed.
    """
    try:
        import qwix  # of the extra `train`
    except ImportError:
        raise InputError(
            "int8 weights need qwix, which is not installed; pip install 'dca_jax[train]'"
        ) from None

    @partial(jax.jit, static_argnames="channels")
    def quantize(
        kernel: Float[Array, "L ..."], channels: tuple[int, ...]
    ) -> tuple[Int8[Array, "L ..."], Float[Array, "L ..."]]:
        # In bfloat16 it would divide, and keep the scale, with 8 bits: too few to round to 8 bits.
        found = qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=channels)
        return found.qvalue, found.scale

    leaves = _flat(params)
    for row in projections(config):
        kernel, num_inputs = leaves[row.path], len(row.groups[1])
        channels = (0, *range(1 + num_inputs, kernel.ndim))
        quantized, scale = jax.block_until_ready(quantize(kernel, channels))
        leaves |= {row.path: quantized, f"{row.path}_scale": scale}
        kernel.delete()
    return unflatten_dict(leaves, sep=".")


def merge_lora(params: Mapping[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """A plain tree in which each kernel is W + alpha / rank A B: as `parameters(config)` has it.

    The sum is in float32, and rounded once to the kernel's dtype; int8 kernels come out in the
    dtype of the norms. What int8 lost stays lost: to export a model that was trained over an int8
    base, join its adapters with the base as it was before. `params` is used up like that of
    `quantize_base`; the adapters are kept.
    """
    leaves = _flat(params)
    merged = {}
    for path, leaf in leaves.items():
        module, _, name = path.rpartition(".")
        if name == "kernel":
            parts = [leaves.get(f"{module}.{part}") for part in ("kernel_scale", *ADAPTERS)]
            if any(part is not None for part in parts):
                dtype = leaf.dtype if parts[0] is None else leaves["norm.scale"].dtype
                whole = _merge(leaf, *parts, lora.scale, path, jnp.dtype(dtype))
                merged[path] = jax.block_until_ready(whole)
                leaf.delete()
                continue
        if name not in (*ADAPTERS, "kernel_scale"):
            merged[path] = leaf
    return unflatten_dict(merged, sep=".")


@partial(jax.jit, static_argnames=("path", "dtype"))
def _merge(
    kernel: Array,
    kernel_scale: Array | None,
    lora_a: Array | None,
    lora_b: Array | None,
    strength: float | Array,
    path: str,
    dtype: np.dtype,
) -> Array:
    whole = kernel.astype(jnp.float32)
    if kernel_scale is not None:
        whole *= kernel_scale
    if lora_a is not None and lora_b is not None:
        row = next(row for row in TABLE if row.path == path)
        outs, ins = ("".join(group) for group in row.groups)
        subscripts = f"L{ins}R,LR{outs}->L{ins}{outs}"
        place = Shards.of(kernel).product(subscripts, lora_a, lora_b)
        delta = jnp.einsum(subscripts, lora_a, lora_b, precision="highest", out_sharding=place)
        whole += strength * delta
    return whole.astype(dtype)


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
        adapters: as `split` gives them.
        config: the base model's shape.
        lora: what they were made with.
        base_model: name or folder of the base, for PEFT to load by itself.

    Raises:
        InputError: `path` exists, or its parent does not.
    """
    path = Path(path).absolute()
    from_primary(lambda: refuse_existing(path))
    leaves = {name: _on_host(leaf) for name, leaf in _flat(adapters).items()}
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
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
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
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; expected one with {CONFIG_FILE}")
    lora = _read_setting(folder)
    rows = lora_parameters(config, lora)
    stored = {tensor.name: tensor for tensor in list_file(member(folder, WEIGHTS_FILE))}
    checkpoint = Checkpoint(config, match_tensors(folder, config, rows, stored))
    dtype = np.dtype(np.float32)
    like = {row.path: row.abstract(config, dtype, sharding) for row in rows}
    return lora, load_tree(
        config, like, lambda row, index: checkpoint.read(row, index, dtype), rows=rows
    )


def _read_setting(folder: Path) -> LoraConfig:
    found, path = read_json(folder, CONFIG_FILE), folder / CONFIG_FILE
    kind, bias, targets = (found.get(name) for name in ("peft_type", "bias", "target_modules"))
    others = [name for name, value in found.items() if value and name not in _KNOWN]
    if kind != "LORA" or bias not in ("none", None) or others:
        set_too = f", and sets {', '.join(others)}" if others else ""
        raise InputError(
            f"{path} is of peft_type {kind!r} with bias {bias!r}{set_too}; expected 'LORA' with "
            "bias 'none' and no variant of it"
        )
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise InputError(
            f"{path} has target_modules {targets!r}; expected a list, of {', '.join(LORA_TARGETS)}"
        )
    rank, alpha = found.get("r"), found.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise InputError(f"{path} has r {rank!r} and lora_alpha {alpha!r}; expected numbers")
    # PEFT writes a set, in any order; names that are not known come last, and are refused.
    targets.sort(key=lambda name: (*LORA_TARGETS, name).index(name))
    return LoraConfig(rank=rank, alpha=alpha, targets=tuple(targets))


def _on_host(leaf: Array) -> np.ndarray:
    """The whole of an array that may be cut, also between processes."""
    mesh = mesh_of(leaf)
    if mesh is not None:
        whole = NamedSharding(mesh, PartitionSpec())
        leaf = jax.jit(lambda x: x, out_shardings=whole)(leaf)
    return np.asarray(leaf)


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return cast(dict[str, Any], flatten_dict(dict(tree), sep="."))
