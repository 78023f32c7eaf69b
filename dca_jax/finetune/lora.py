"""LoRA: low-rank adapters over a frozen base (arXiv 2106.09685), bfloat16 or int8.

A projection that has adapters computes y = x W + alpha / rank (x A) B (`dca_jax.model.Linear`).
Adapters are float32 arrays beside the kernel they adapt, `lora_a` [L, inputs, R] and `lora_b`
[L, R, outputs], and lie on a mesh as its inputs and its outputs do. A run is:

    base = load_weights(folder, config, ..., then=quantizer(config))    # or without `then`
    adapters = init_lora(config, lora, key, sharding)
    model = Llama.from_params(config, join(adapters, base), lora=lora, quantized=True)

with gradients of `adapters` alone. `merge_lora` reads the base and the adapters as plain weights;
`save_adapter` writes what PEFT (https://github.com/huggingface/peft) reads. int8 is of weights
only, a scale for each output of each layer (W8A16); it needs qwix.
"""

import json
from collections.abc import Callable, Mapping
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
from dca_jax.model import Llama
from dca_jax.sharding import mesh_of
from dca_jax.weights.files import member, read_json, refuse_existing, written_aside
from dca_jax.weights.huggingface import Checkpoint, match_tensors
from dca_jax.weights.parameters import (
    Parameter,
    Read,
    Shardings,
    load_tree,
    lora_parameters,
    projections,
)
from dca_jax.weights.tensor_files import list_file, write_safetensors

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


def quantizer(config: LlamaConfig) -> Callable[[Parameter, Array], dict[str, Array]]:
    """What makes int8 weights of a model's: `then` of `dca_jax.weights.folder.load_weights`.

    A layer's kernel becomes int8 `kernel` and float32 `kernel_scale`, on the devices it lies on; it
    is about their product, and no weight is off by more than half its scale, which has size 1 along
    the inputs. The kernel is deleted, so that no more than one is held. All else stays as it is.

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
        def one_layer(kernel: Float[Array, "..."]) -> tuple[Array, Array]:
            # In bfloat16 it would divide, and keep the scale, with 8 bits: too few to round to 8.
            found = qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=channels)
            return found.qvalue, found.scale

        return jax.lax.map(one_layer, kernel)

    kernels = {row.path for row in projections(config)}

    def quantized(row: Parameter, kernel: Array) -> dict[str, Array]:
        if row.path not in kernels:
            return {row.path: kernel}
        channels = tuple(range(len(row.groups[1]), kernel.ndim - 1))
        values, scale = jax.block_until_ready(quantize(kernel, channels))
        kernel.delete()
        return {row.path: values, f"{row.path}_scale": scale}

    return quantized


def merge_lora(read: Read, adapters: Mapping[str, Any], lora: LoraConfig) -> Read:
    """Reads a base with its adapters merged into it: each kernel as W + alpha / rank A B.

    The sum is in float32, rounded once to the dtype of what `read` gives. A piece is merged when
    it is read, so a base of any size needs no more memory than `load_tree` or a `StreamedArray`
    takes for it. With several processes, all call it.

    Args:
        read: of the base, as it was before any quantization
            (`dca_jax.weights.folder.open_weights`).
        adapters: as `split` and `load_adapter` give them.
        lora: what they were made with.
    """
    leaves = {path: _on_host(leaf) for path, leaf in _flat(adapters).items()}

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
