"""GGUF files for tests, written by the package `gguf` from the format's description."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from conversion_helpers import random_tensors, tiny_config
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from tokenizers import Tokenizer

PLAIN = ["F32", "F16", "BF16"]
# Formats that `gguf` can pack, and those it can only unpack, whose blocks are made here.
BY_LIBRARY = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
BY_BLOCKS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
# Byte offsets of a block's float16 scales.
SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
OURS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "rope.dimension_count",
}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_exps": "ffn_gate_exps",
    "mlp.up_exps": "ffn_up_exps",
    "mlp.down_exps": "ffn_down_exps",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def packed(values: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """The bytes of a matrix in a format; random ones with small scales for `BY_BLOCKS`."""
    if kind not in BY_BLOCKS:
        return quants.quantize(values.astype(np.float32), GGMLQuantizationType[kind])
    size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (values.size // size, block_bytes)).astype(np.uint8)
    for at in SCALES[kind]:
        scales = (rng.standard_normal(len(blocks)) * 1e-3).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*values.shape[:-1], -1)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    if match := re.fullmatch(r"model.layers.(\d+).mlp.gate.weight", name):
        return f"blk.{match[1]}.ffn_gate_inp.weight"
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, part = name.rpartition(".")
    if module in outer:
        return f"{outer[module]}.{part}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{part}"


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k in llama.cpp's order: halves of a head interleaved."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with a layer's experts merged into one, as in llama.cpp."""
    found: dict[str, list[np.ndarray]] = {}
    for name, value in tensors.items():
        found.setdefault(re.sub(r"experts\.\d+\.(\w+)_proj", r"\1_exps", name), []).append(value)
    return {n: np.stack(each) if "_exps" in n else each[0] for n, each in found.items()}


def write_gguf(
    path: Path,
    config: dict[str, Any],
    kinds: list[str],
    *,
    tokenizer: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """A random model; its matrices take the formats in turn, and vectors are float32.

    Args:
        tokenizer: values by full name ("tokenizer. ...").
        more: values of the architecture by name.
        tensors: additional tensors by llama.cpp's name, in float32.
    """
    rng, arch = np.random.default_rng(1), config["model_type"].replace("_", "")
    writer = GGUFWriter(path, arch)
    values = {f"{arch}.{name}": config[key] for key, name in OURS.items()}
    values[f"{arch}.attention.key_length"] = config["head_dim"]
    values[f"{arch}.rope.freq_base"] = float(config["rope_theta"])
    values[f"{arch}.attention.layer_norm_rms_epsilon"] = config["rms_norm_eps"]
    values |= {f"{arch}.{name}": value for name, value in (more or {}).items()}
    for name, value in {**values, **(tokenizer or {})}.items():
        add_value(writer, name, value)
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    numbers = iter(range(10_000))
    for name, value in stacked(random_tensors(config, dtype=np.dtype(np.float32))).items():
        data = value if value.ndim == 1 else value * 0.1
        module = name.split(".")[-2]
        if arch == "llama" and module in heads:
            data = permuted(data, config[heads[module]])
        if data.ndim == 1:
            writer.add_tensor(gguf_name(name), data)
            continue
        kind = kinds[next(numbers) % len(kinds)]
        raw = GGMLQuantizationType[kind]
        writer.add_tensor(gguf_name(name), packed(data, kind, rng), raw_dtype=raw)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    finish(writer)
    return path


def add_value(writer: GGUFWriter, name: str, value: Any) -> None:
    """Adds a value of metadata in the type that llama.cpp's own converter uses."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def wide_config(**changes: Any) -> dict[str, Any]:
    """Rows of whole blocks of every format."""
    return tiny_config(**{**WIDE, "vocab_size": 300, **changes})


def byte_level(tokenizer: Tokenizer, pre: str, **changes: Any) -> dict[str, Any]:
    """The metadata of a byte-level BPE tokenizer."""
    described = json.loads(tokenizer.to_str())
    vocab = described["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    special = {each["content"] for each in described["added_tokens"]}
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if token in special else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in described["model"]["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (values | changes).items()}


def sentencepiece(tokenizer: Tokenizer, **changes: Any) -> dict[str, Any]:
    """The metadata of a SentencePiece tokenizer; a token's score is the number of its merge."""
    model = json.loads(tokenizer.to_str())["model"]
    vocab = model["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    rank = {left + right: number for number, (left, right) in enumerate(model["merges"])}
    kinds = [2, *[3] * 5, *[1] * (len(tokens) - 262), *[6] * 256]
    values = {
        "model": "llama",
        "tokens": tokens,
        "scores": [-float(rank.get(token, 1000 + n)) for n, token in enumerate(tokens)],
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (values | changes).items()}
