"""config.json, old and new, of every family; and what is refused, by name."""

import pytest

from dca_jax.config import LlamaConfig
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.rope import RopeConfig

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN_2_5_7B_1M = {
    "architectures": ["Qwen2ForCausalLM"],
    "dual_chunk_attention_config": {
        "chunk_size": 262144,
        "local_size": 8192,
        "original_max_position_embeddings": 262144,
    },
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 1010000,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
    "bos_token_id": 151643,
    "eos_token_id": [151645, 151643],
}


def test_llama_2_7b() -> None:
    config = LlamaConfig.from_hf(LLAMA_2_7B)
    assert (config.head_dim, config.num_key_value_heads, config.rope.theta) == (128, 32, 10_000.0)
    assert not any([config.qkv_bias, config.o_bias, config.mlp_bias, config.dca])
    assert config.eos_token_ids == (2,)
    assert LlamaConfig.from_hf(config.to_hf()) == config


def test_qwen_2_5_7b_1m() -> None:
    config = LlamaConfig.from_hf(QWEN_2_5_7B_1M)
    assert config.qkv_bias
    assert not config.o_bias
    assert config.sliding_window is None
    assert config.eos_token_ids == (151645, 151643)
    assert config.dca == DCAConfig(
        chunk_len=253952,
        max_query_position=262144,
        trained_length=262144,
        temperature_slope=0.1,
    )
    assert LlamaConfig.from_hf(config.to_hf()) == config


def test_mistral_sliding_window() -> None:
    mistral = LLAMA_2_7B | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 4096,
    }
    config = LlamaConfig.from_hf(mistral)
    assert config.sliding_window == 4096
    assert LlamaConfig.from_hf(config.to_hf()) == config
    assert LlamaConfig.from_hf(mistral | {"sliding_window": None}).sliding_window is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "mamba"}, "'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "longrope"),
        ({"rope_scaling": {"type": "spiral", "factor": 4.0}}, "'spiral'"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": 4095}, "not a multiple"),
        ({"num_key_value_heads": 5}, "multiple of num_key_value_heads"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer"),
        ({"head_dim": 65}, "even"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "lacks local_size"),
    ],
)
def test_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LlamaConfig.from_hf(LLAMA_2_7B | change)


def test_qwen2_with_sliding_layers_is_refused() -> None:
    with pytest.raises(InputError, match="use_sliding_window"):
        LlamaConfig.from_hf(QWEN_2_5_7B_1M | {"use_sliding_window": True})


def test_rope_default_is_shared_safely() -> None:
    assert LlamaConfig.from_hf(LLAMA_2_7B).rope == RopeConfig()
