"""Shapes of published models by name, for planning without a checkpoint."""

from pathlib import Path
from typing import Any

from dca_jax.config import LlamaConfig, MixtureConfig
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.rope import RopeConfig
from dca_jax.weights.hub import find_folder
from dca_jax.weights.huggingface import read_config


def find_shape(model: str, *, context: int | None = None, file: Path | None = None) -> LlamaConfig:
    """The shape of a checkpoint (a folder, or a name on the Hugging Face Hub), or one of `SHAPES`.

    Only the checkpoint's configuration is read: the one for a text of `context` tokens, or `file`
    (`dca_jax.weights.huggingface.config_file`).

    Raises:
        InputError: there is neither a checkpoint nor a shape of this name.
    """
    try:
        is_there = Path(model).exists()
    except OSError:  # not a valid name for the file system
        is_there = False
    if not is_there and "/" not in model:
        if model.lower() in SHAPES:
            return SHAPES[model.lower()]
        raise InputError(
            f"{shown(model, quote=False)} is not a folder, a name on the Hugging Face Hub "
            f"('owner/name') or one of {', '.join(SHAPES)}"
        )
    return read_config(find_folder(model, weights=False), context=context, file=file)


def _llama_2(**sizes: Any) -> LlamaConfig:
    common = {"vocab_size": 32_000, "head_dim": 128, "max_position_embeddings": 4096}
    return LlamaConfig(**common, rms_norm_eps=1e-5, **sizes)


def _llama_3(**sizes: Any) -> LlamaConfig:
    common = {"vocab_size": 128_256, "head_dim": 128, "max_position_embeddings": 8192}
    rope = RopeConfig(theta=500_000.0)
    return LlamaConfig(**common, num_key_value_heads=8, rms_norm_eps=1e-5, rope=rope, **sizes)


def _qwen_2_5(**sizes: Any) -> LlamaConfig:
    common = {"vocab_size": 152_064, "head_dim": 128, "max_position_embeddings": 32_768}
    rope = RopeConfig(theta=1_000_000.0)
    return LlamaConfig(**common, model_type="qwen2", qkv_bias=True, rope=rope, **sizes)


def _qwen_3_moe(*, moe_intermediate_size: int, **sizes: Any) -> LlamaConfig:
    common = {"vocab_size": 151_936, "head_dim": 128, "max_position_embeddings": 262_144}
    mixture = MixtureConfig(
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=moe_intermediate_size
    )
    rope = RopeConfig(theta=10_000_000.0)
    family = {"model_type": "qwen3_moe", "qk_norm": True, "mixture": mixture, "rope": rope}
    return LlamaConfig(**common, **family, num_key_value_heads=4, **sizes)


# From their `config.json` on the Hugging Face Hub.
SHAPES: dict[str, LlamaConfig] = {
    "llama-2-7b": _llama_2(
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "llama-2-13b": _llama_2(
        hidden_size=5120,
        intermediate_size=13_824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    ),
    "llama-2-70b": _llama_2(
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "llama-3-8b": _llama_3(
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    "llama-3-70b": _llama_3(
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
    ),
    "qwen2.5-7b": _qwen_2_5(
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "qwen2.5-14b": _qwen_2_5(
        hidden_size=5120,
        intermediate_size=13_824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
    ),
    # Those of July 2025 (2507).
    "qwen3-30b-a3b": _qwen_3_moe(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        moe_intermediate_size=768,
    ),
    "qwen3-235b-a22b": _qwen_3_moe(
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=94,
        num_attention_heads=64,
        moe_intermediate_size=1536,
    ),
    "mixtral-8x7b": LlamaConfig(
        vocab_size=32_000,
        head_dim=128,
        max_position_embeddings=32_768,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        model_type="mixtral",
        rope=RopeConfig(theta=1_000_000.0),
        mixture=MixtureConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=14_336),
    ),
}
