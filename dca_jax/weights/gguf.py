"""GGUF checkpoints: a model's shape and weights under Hugging Face's names.

One file contains everything: the contents of `config.json` and the tokenizer
(`dca_jax.weights.gguf_tokenizer`) in its metadata, and the weights under llama.cpp's names, which
the package `gguf` maps to Hugging Face's.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from dca_jax import fields
from dca_jax.config import CONFIG, FAMILIES, LlamaConfig
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.rope import RopeConfig, inverse_frequencies
from dca_jax.weights.gguf_file import ARCHITECTURE, GGUF, GGUFTensor, read_gguf
from dca_jax.weights.gguf_tokenizer import end_ids, tokenizer_files
from dca_jax.weights.parameters import parameters

# By `general.architecture`: Hugging Face's model_type, and whether llama.cpp rotates pairs of
# neighbours, for which it permutes the rows of q and k.
ARCHITECTURES = {
    "llama": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "qwen3moe": ("qwen3_moe", False),
}

# The metadata that is read, and metadata without effect. Any other name may change what the model
# computes, so it is an error.
SHAPE = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
READ = {
    *SHAPE,
    *"attention.head_count_kv attention.layer_norm_rms_epsilon attention.key_length".split(),
    *"attention.value_length vocab_size tensor_data_layout".split(),
    *"rope.dimension_count rope.freq_base rope.scale_linear rope.scaling.type".split(),
    *"rope.scaling.factor rope.scaling.original_context_length rope.scaling.finetuned".split(),
    *"rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow".split(),
}
# For mixtures of experts; llama.cpp always normalizes the weights of the selected ones.
MIXTURE = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
EXPERT = re.compile(r"\.experts\.(\d+)\.")

ROPE_FACTORS = "rope_freqs.weight"
# The setting of every published Llama 3.1 to 3.3, apart from the factor, which is 8 or 32.
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Qwen2.5-7B-Instruct-1M and its variants: the only model with this context length. GGUF has no
# metadata for its DCA setting.
QWEN_1M, QWEN_1M_DCA = (
    1_010_000,
    {"chunk_size": 262_144, "local_size": 8192, "original_max_position_embeddings": 262_144},
)


def read_gguf_config(path: str | Path) -> LlamaConfig:
    """The model's shape, from a GGUF file's metadata.

    Raises:
        InputError: `read_gguf` or `LlamaConfig.from_hf` raises; the architecture is not supported,
            or metadata is missing, of the wrong type, or unknown.
    """
    return LlamaConfig.from_hf(hf_config(read_gguf(path)))


def hf_config(file: GGUF) -> dict[str, Any]:
    """The contents of Hugging Face's `config.json` for this model.

    Raises:
        InputError: as in `read_gguf_config`.
    """
    where, metadata = f"{file.path}", file.metadata
    name = fields.text(metadata, ARCHITECTURE, where)
    if name not in ARCHITECTURES:
        raise InputError(
            f"{where}: {ARCHITECTURE} is {shown(name)}, which is not supported; expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    own = {k.removeprefix(f"{name}."): v for k, v in metadata.items() if k.startswith(f"{name}.")}
    known = READ | MIXTURE.keys() if name == "qwen3moe" else READ
    unknown = sorted(k for k in own.keys() - known if not (k in MIXTURE and own[k] == 0))
    if unknown:
        raise InputError(
            f"{where}: {name}.{shown(unknown[0], quote=False)} = {shown(own[unknown[0]])} is not "
            "known: it may change what the model computes, so it is not ignored"
        )
    sizes = {theirs: _integer(own, ours, where, name) for ours, theirs in SHAPE.items()}
    heads = sizes["num_attention_heads"]
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"{where} has no tensor token_embd.weight of two axes")
    epsilon = fields.number(own, "attention.layer_norm_rms_epsilon", where, above=0)
    if epsilon is None:
        raise InputError(f"{where} lacks {name}.attention.layer_norm_rms_epsilon")
    head_dim = fields.integer(own, "attention.key_length", where)
    head_dim = head_dim or max(1, sizes["hidden_size"] // heads)
    for same in ("attention.value_length", "rope.dimension_count"):
        if own.get(same, head_dim) != head_dim:
            raise InputError(
                f"{where}: {name}.{same} is {shown(own[same])}, and heads of {head_dim} are "
                "supported only where it is the same"
            )
    biases = {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    model_type = ARCHITECTURES[name][0]
    ids = {
        "bos_token_id": fields.integer(metadata, "tokenizer.ggml.bos_token_id", where, least=0),
        "eos_token_id": end_ids(file),
        "pad_token_id": fields.integer(metadata, "tokenizer.ggml.padding_token_id", where, least=0),
    }
    config = {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        **sizes,
        "vocab_size": embedding.shape[0],
        "num_key_value_heads": _integer(own, "attention.head_count_kv", where, name, heads),
        "head_dim": head_dim,
        "rms_norm_eps": epsilon,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **({} if model_type == "qwen2" else biases),
        **(_mixture(file, own, where, name) if name == "qwen3moe" else {}),
        "rope_theta": fields.number(own, "rope.freq_base", where, default=10_000.0, above=1),
        "rope_scaling": _rope_scaling(own, where),
        **{key: value for key, value in ids.items() if value not in (None, [])},
    }
    if ROPE_FACTORS in file.tensors:
        config["rope_scaling"] = _llama3_scaling(config, file.tensors[ROPE_FACTORS])
    if config["max_position_embeddings"] == QWEN_1M and model_type == "qwen2":
        config["dual_chunk_attention_config"] = QWEN_1M_DCA
    return config


def _mixture(file: GGUF, own: Mapping[str, Any], where: str, name: str) -> dict[str, Any]:
    sizes = {theirs: _integer(own, ours, where, name) for ours, theirs in MIXTURE.items()}
    for tensor in file.tensors.values():  # before creating names for this many experts
        if "_exps." in tensor.name and tensor.shape[0] != sizes["num_experts"]:
            raise InputError(
                f"tensor {shown(tensor.name)} in {tensor.path} has {tensor.shape[0]} experts; "
                f"{name}.expert_count says {sizes['num_experts']}"
            )
    return {**sizes, "norm_topk_prob": True}


def _integer(
    own: Mapping[str, Any], key: str, where: str, name: str, default: int | None = None
) -> int:
    value = own.get(key, default)
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
        value = value[0].item()  # one per layer, all equal
    if isinstance(value, np.ndarray):
        raise InputError(f"{where}: {name}.{key} differs between layers, which is not supported")
    if value is None:
        raise InputError(f"{where} lacks {name}.{key}")
    return cast(int, fields.integer({key: value}, key, where))


def _rope_scaling(own: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    linear = fields.number(own, "rope.scale_linear", where, default=1.0, above=0)
    kind = fields.text(own, "rope.scaling.type", where, default="none")
    factor = fields.number(own, "rope.scaling.factor", where, default=linear, above=0)
    if kind == "none" and linear != 1.0:
        kind = "linear"  # as in old files
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise InputError(
            f"{where}: rope.scaling.type is {shown(kind)}, which is not supported; expected none, "
            "linear or yarn"
        )
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling |= {
            "original_max_position_embeddings": fields.integer(
                own, "rope.scaling.original_context_length", where
            ),
            "finetuned": fields.boolean(own, "rope.scaling.finetuned", where),
            "beta_fast": fields.number(own, "rope.scaling.yarn_beta_fast", where, above=0),
            "beta_slow": fields.number(own, "rope.scaling.yarn_beta_slow", where, above=0),
        }
    return {key: value for key, value in scaling.items() if value is not None}


def _llama3_scaling(config: Mapping[str, Any], factors: GGUFTensor) -> dict[str, Any] | None:
    """The rope scaling whose frequencies are the plain ones divided by `factors`.

    llama.cpp stores the result of Llama 3's scaling instead of its parameters.
    """
    half = config["head_dim"] // 2
    if factors.shape != (half,) or factors.dtype != np.float32 or factors.packed:
        raise InputError(
            f"tensor {ROPE_FACTORS} in {factors.path} has shape {shown(factors.shape)} and dtype "
            f"{factors.packed or factors.dtype}; expected ({half},) and float32"
        )
    found = factors.read((slice(0, half),))
    largest = float(found.max())
    if np.isfinite(largest) and largest >= 1:
        scaling = None if largest == 1 else {**LLAMA3, "factor": largest}
        plain, scaled = (
            np.asarray(
                inverse_frequencies(
                    RopeConfig.from_hf({**config, "rope_scaling": each}), config["head_dim"]
                )
            )[0]
            for each in (None, scaling)
        )
        if np.allclose(plain / scaled, found, rtol=1e-4, atol=0):
            return scaling
    raise InputError(
        f"tensor {ROPE_FACTORS} in {factors.path} scales the rotary frequencies differently from "
        "Llama 3; it is not ignored, because the model would use wrong positions"
    )


def list_gguf_tensors(path: str | Path, config: LlamaConfig) -> dict[str, GGUFTensor]:
    """Every tensor of a GGUF file, by Hugging Face's name, or its own name if there is none.

    Raises:
        InputError: `read_gguf` raises.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    file = read_gguf(path)
    name = fields.text(file.metadata, ARCHITECTURE, f"{file.path}")
    permuted = ARCHITECTURES[name][1]
    arch = next(arch for arch, known in MODEL_ARCH_NAMES.items() if known == name)
    tensors = {k: v for k, v in file.tensors.items() if k != ROPE_FACTORS}
    if config.num_hidden_layers > len(tensors):  # before creating that many names
        raise InputError(
            f"{file.path} says that it has {config.num_hidden_layers} layers, and it has "
            f"{len(tensors)} tensors"
        )
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    found: dict[str, GGUFTensor] = {}
    used: set[str] = set()
    for theirs in _hf_names(config):
        own = names.get_name(EXPERT.sub(".experts.", theirs), (".weight", ".bias"))
        if own not in tensors:
            continue
        tensor, expert = tensors[own], EXPERT.search(theirs)
        used.add(own)
        if expert is not None:
            tensor = tensor.part(int(expert[1]))
        elif permuted and (".attn_q." in own or ".attn_k." in own):
            tensor = replace(tensor, head_dim=config.head_dim)
        found[theirs] = tensor
    return {**found, **{name: tensor for name, tensor in tensors.items() if name not in used}}


def _hf_names(config: LlamaConfig) -> Iterator[str]:
    for row in parameters(config):
        yield from row.their_names(config)


def write_companions(path: Path, folder: Path) -> None:
    """Writes the files next to the weights in a Hugging Face folder: config.json and tokenizer.

    Raises:
        InputError: as in `read_gguf_config` and `tokenizer_files`.
    """
    file = read_gguf(path)
    for name, value in {CONFIG: hf_config(file), **tokenizer_files(file)}.items():
        # Writing a tokenizer's merges indented would take a second, as json's C encoder cannot.
        text = json.dumps(value, ensure_ascii=False, indent=1 if name == CONFIG else None) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
