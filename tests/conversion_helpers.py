"""Tiny Hugging Face checkpoints, written from the format's description, not from our table."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,  # not hidden_size / heads, so that no transposition goes unnoticed
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_config(**changes: Any) -> dict[str, Any]:
    return TINY | changes


def random_tensors(
    config: dict[str, Any], *, dtype: np.dtype = BFLOAT16, seed: int = 0
) -> dict[str, np.ndarray]:
    """Every tensor of transformers' model with this config, random."""
    rng = np.random.default_rng(seed)
    vocab, width, ffw = (config[k] for k in ("vocab_size", "hidden_size", "intermediate_size"))
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    kind = config["model_type"]
    linears = {
        "self_attn.q_proj": (query, width),
        "self_attn.k_proj": (key, width),
        "self_attn.v_proj": (key, width),
        "self_attn.o_proj": (width, query),
    }
    mlp = {"gate_proj": (ffw, width), "up_proj": (ffw, width), "down_proj": (width, ffw)}
    inner = ffw if kind == "mixtral" else config.get("moe_intermediate_size")
    experts = {
        "mixtral": ("block_sparse_moe", {"w1": (inner, width), "w2": (width, inner)}, "w3"),
        "qwen3_moe": (
            "mlp",
            {"gate_proj": (inner, width), "down_proj": (width, inner)},
            "up_proj",
        ),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (width,)
        for name, shape in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            biased = config.get("attention_bias", False)
            if biased or (kind == "qwen2" and name[-6] in "qkv"):
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        if kind.startswith("qwen3"):
            for name in ("q_norm", "k_norm"):
                shapes[f"{prefix}self_attn.{name}.weight"] = (config["head_dim"],)
        if kind in experts and layer not in config.get("mlp_only_layers", ()):
            block, matrices, up = experts[kind]
            count = config.get("num_experts", config.get("num_local_experts"))
            shapes[f"{prefix}{block}.gate.weight"] = (count, width)
            for number in range(count):
                for name, shape in (matrices | {up: (inner, width)}).items():
                    shapes[f"{prefix}{block}.experts.{number}.{name}.weight"] = shape
            continue
        for name, shape in mlp.items():
            shapes[f"{prefix}mlp.{name}.weight"] = shape
            if config.get("mlp_bias", False):
                shapes[f"{prefix}mlp.{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    return {
        name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()
    }


def write_checkpoint(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], *, shards: int = 1
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]  # consecutive tensors in different files
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: dict[str, Any]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def read_safetensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the folder's safetensors files, read by the library."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def make_tiny(folder: Path, *, shards: int = 1, dtype: np.dtype = BFLOAT16, **changes: Any) -> Path:
    config = tiny_config(**changes)
    return write_checkpoint(folder, config, random_tensors(config, dtype=dtype), shards=shards)
