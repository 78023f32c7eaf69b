"""config.json, old and new, of every family; and what is refused, by name."""

import pytest

from dca_jax.config import LlamaConfig, choose_dca
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.inference.methods import method_by_name
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


DCA_ALONE = {"chunk_size": 262144, "local_size": 8192}


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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("change", "length"),
    [
        ({}, 4096),
        ({"max_sequence_length": 16384, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 4096),
        ({"max_position_embeddings": 32768, "rope_scaling": YARN}, 8192),
        ({"max_position_embeddings": 8192, "rope_scaling": YARN}, 8192),
        ({"max_position_embeddings": 32768, "rope_scaling": YARN | {"finetuned": True}}, 32768),
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA_3}, 131072),
        # DCA: the length it names; or its largest position, where positions go far beyond it.
        (QWEN_2_5_7B_1M, 262144),
        (QWEN_2_5_7B_1M | {"dual_chunk_attention_config": DCA_ALONE}, 262144),
        ({"dual_chunk_attention_config": {"chunk_size": 3072, "local_size": 512}}, 4096),
        (QWEN_2_5_7B_1M | {"rope_scaling": YARN}, 262144),
    ],
)
def test_trained_length(change: dict, length: int) -> None:
    config = LlamaConfig.from_hf(LLAMA_2_7B | change)
    assert config.trained_length == length
    again = LlamaConfig.from_hf(config.to_hf())
    assert (again, again.trained_length) == (config, length)
    assert choose_dca("chunkllama", config) == DCAConfig.chunkllama(length)


@pytest.mark.parametrize("wrong", [0, True, "16384", 2**31, 1.5])
def test_max_sequence_length_that_is_none(wrong: object) -> None:
    with pytest.raises(InputError, match="max_sequence_length must be an integer from 1"):
        LlamaConfig.from_hf(LLAMA_2_7B | {"max_sequence_length": wrong})


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
        ({"vocab_size": -1}, "vocab_size must be an integer from 1 to"),
        ({"vocab_size": "32000"}, "vocab_size must be an integer from 1 to .* got '32000'"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"num_attention_heads": 0}, "num_attention_heads must be an integer from 1"),
        ({"num_hidden_layers": 10**400}, "got an integer of 1329 bits"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings must be an integer"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a finite number above 0, got '1e-6'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"quantization_config": "awq"}, "quantization_config must be an object"),
        ({"architectures": True}, "architectures must be a list of names"),
        ({"eos_token_id": [[2]]}, "eos_token_id must be a token id"),
        ({"eos_token_id": 2**31}, "eos_token_id must be a token id"),
        ({"bos_token_id": 1.0}, "bos_token_id must be an integer from 0"),
        ({"rope_theta": "10000"}, "rope_theta must be a finite number above 1, got '10000'"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor must be a finite number"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "ramp": 3}}, "has no 'ramp'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0}}, "beta_fast must be"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}},
            "by type of layer",
        ),
        ({"head_dim": 65}, "even"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "lacks local_size"),
    ],
)
def test_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LlamaConfig.from_hf(LLAMA_2_7B | change)


def test_heads_of_one_plane_cannot_be_scaled_apart() -> None:
    dynamic = {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    with pytest.raises(InputError, match="needs a head_dim of at least 4, got 2"):
        LlamaConfig.from_hf(LLAMA_2_7B | dynamic)
    plain = LlamaConfig.from_hf(LLAMA_2_7B | {"head_dim": 2})
    with pytest.raises(InputError, match="a head_dim of 2 has only one"):
        method_by_name("ntk", plain, 9000)


def test_qwen2_with_sliding_layers_is_refused() -> None:
    with pytest.raises(InputError, match="use_sliding_window"):
        LlamaConfig.from_hf(QWEN_2_5_7B_1M | {"use_sliding_window": True, "max_window_layers": 20})


def test_rope_default_is_shared_safely() -> None:
    assert LlamaConfig.from_hf(LLAMA_2_7B).rope == RopeConfig()


@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "Qwen2Config"])
def test_what_a_file_leaves_out_is_as_in_transformers(name: str) -> None:
    import transformers

    theirs = getattr(transformers, name)()
    written = theirs.to_dict()
    sizes = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "max_position_embeddings model_type"
    ).split()
    ours = LlamaConfig.from_hf({key: written[key] for key in sizes})
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    if name == "MistralConfig":
        assert ours.sliding_window == theirs.sliding_window


def test_kv_heads_that_neither_a_file_nor_its_family_gives() -> None:
    few = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_attention_heads": 4}
    sizes = {key: value for key, value in LLAMA_2_7B.items() if key != "num_key_value_heads"}
    assert LlamaConfig.from_hf(sizes | few).num_key_value_heads == 4


def test_a_window_of_no_layer_is_none() -> None:
    read = {"use_sliding_window": True, "max_window_layers": QWEN_2_5_7B_1M["num_hidden_layers"]}
    assert LlamaConfig.from_hf(QWEN_2_5_7B_1M | read).sliding_window is None
