"""config.json, old and new, of every family; and what is refused, by name."""

import json
import math
from pathlib import Path

import pytest
from shared_fixtures import invoke
from tiny_llm import make_llm

import dca_jax
from dca_jax.config import LlamaConfig, MixtureConfig, choose_dca
from dca_jax.dca import DCAConfig, SparseConfig
from dca_jax.errors import InputError
from dca_jax.inference.methods import method_by_name
from dca_jax.planning.shapes import SHAPES
from dca_jax.rope import RopeConfig
from dca_jax.weights.parameters import count_parameters

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


QWEN_3_30B_A3B_2507 = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 262144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# What its config_1m.json says besides.
LONG = {
    "dual_chunk_attention_config": {
        "chunk_size": 131072,
        "local_size": 4096,
        "original_max_position_embeddings": 131072,
        "sparse_attention_enabled": True,
    },
    "max_position_embeddings": 1010000,
}
QWEN_3_235B_A22B_2507 = QWEN_3_30B_A3B_2507 | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_hidden_layers": 94,
}
QWEN_2_5_14B_1M = QWEN_2_5_7B_1M | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "max_window_layers": 48,
    "num_attention_heads": 40,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
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


def test_qwen_3_30b_a3b_and_its_second_config() -> None:
    config = LlamaConfig.from_hf(QWEN_3_30B_A3B_2507)
    assert (config.head_dim, config.qk_norm, config.qkv_bias, config.dca) == (
        128,
        True,
        False,
        None,
    )
    assert config.mixture == MixtureConfig(
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768
    )
    assert (config.has_mlp, len(config.sparse_layers)) == (False, 48)
    # The card: 30.5 billion, 3.3 billion of them active.
    assert count_parameters(config) == pytest.approx(30.5e9, rel=0.002)
    assert count_parameters(config, active=True) == pytest.approx(3.3e9, rel=0.02)
    assert config == SHAPES["qwen3-30b-a3b"]
    long = LlamaConfig.from_hf(QWEN_3_30B_A3B_2507 | LONG)
    assert long.dca == DCAConfig(
        chunk_len=126976,
        max_query_position=131072,
        trained_length=131072,
        temperature_slope=0.1,
    )
    assert long.sparse_attention == SparseConfig(enabled=True)
    for one in (config, long):
        assert LlamaConfig.from_hf(one.to_hf()) == one


def test_qwen_3_235b_a22b() -> None:
    config = LlamaConfig.from_hf(QWEN_3_235B_A22B_2507)
    assert count_parameters(config) == pytest.approx(235e9, rel=0.002)
    assert count_parameters(config, active=True) == pytest.approx(22e9, rel=0.02)
    assert config == SHAPES["qwen3-235b-a22b"]


@pytest.mark.parametrize(
    ("change", "dense"),
    [
        ({"decoder_sparse_step": 2}, (0, 2, 4)),
        ({"mlp_only_layers": [1, 4, 9]}, (1, 4)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, (0, 1, 2, 3, 4)),
        ({"num_experts": 0}, None),
    ],
)
def test_which_layers_are_dense(change: dict, dense: tuple[int, ...] | None) -> None:
    """transformers: an MLP where mlp_only_layers says so, and where the step does not fall."""
    config = LlamaConfig.from_hf(QWEN_3_30B_A3B_2507 | {"num_hidden_layers": 6} | change)
    assert tuple(config.dense_layers) == (tuple(range(6)) if dense is None else dense)
    assert (config.mixture is None) == (dense is None)
    assert LlamaConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("table", [None, [{"0": ["vertical_and_slash", 1000, 6096, 0.9]}]])
def test_keys_of_sparse_attention_are_kept(table: object) -> None:
    dca = LONG["dual_chunk_attention_config"] | {
        "sparse_attention_threshold": 4096,
        "sparse_attention_last_q": 32,
        "sparse_attention_config": table,
    }
    config = LlamaConfig.from_hf(QWEN_3_30B_A3B_2507 | LONG | {"dual_chunk_attention_config": dca})
    assert config.sparse_attention is not None
    assert (config.sparse_attention.threshold, config.sparse_attention.wanted) == (4096, True)
    written = config.to_hf()["dual_chunk_attention_config"]
    assert written == {key: value for key, value in dca.items() if value is not None}


@pytest.mark.parametrize(
    "checkpoint",
    [QWEN_2_5_7B_1M, QWEN_2_5_14B_1M, QWEN_3_30B_A3B_2507, QWEN_3_235B_A22B_2507],
    ids=["7b", "14b", "30b", "235b"],
)
def test_the_checkpoints_that_ask_for_dca_through_the_commands(
    checkpoint: dict, tmp_path: Path
) -> None:
    """From config files alone, written from the keys that are known."""
    (tmp_path / "config.json").write_text(json.dumps(checkpoint))
    is_new = checkpoint["model_type"] == "qwen3_moe"
    if is_new:
        (tmp_path / "config_1m.json").write_text(json.dumps(checkpoint | LONG))
    s, largest = (126976, 131072) if is_new else (253952, 262144)
    info = " ".join(invoke("info", tmp_path).stdout.replace("│", " ").split())
    assert f"s = {s}, Q = {largest}, temperature from {largest} tokens" in info
    assert "up to 1010000 tokens" in info
    assert ("up to 262144 tokens" in info) == is_new
    shown = " ".join(invoke("explain", tmp_path, "--length", "1M").stdout.split())
    tau = (1 + 0.1 * math.log(2**20 / largest)) ** 2  # m^2, as those servers have it
    assert f"chunk length s {s} tokens" in shown
    assert f"logits x {tau:.4f} (slope 0.1)" in shown
    options = ("--device", "h200", "--context-length", "1M", "--json")
    found = json.loads(invoke("plan", tmp_path, *options).stdout)
    assert found["fits"]
    assert (found["active_weights"] is not None) == is_new
    short = invoke("explain", tmp_path, "--length", "64k").stdout
    assert ("196608 tokens" if is_new else f"{s} tokens") in short  # 3/4 of 262,144


def test_mixtral() -> None:
    """Also what its first config.json left out."""
    raw = LLAMA_2_7B | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "router_aux_loss_coef": 0.02,
        "max_position_embeddings": 32768,
    }
    config = LlamaConfig.from_hf(raw)
    assert count_parameters(config) == pytest.approx(46.7e9, rel=0.001)
    assert count_parameters(config, active=True) == pytest.approx(12.9e9, rel=0.002)
    assert config.rope.theta == 1_000_000.0
    assert config.mixture is not None
    assert config.mixture.router_aux_loss_coef == 0.02
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
        ({"n_shared_experts": 1}, r"sets n_shared_experts \(1\), which changes the"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "has layer_types"),
        ({"layer_types": 5}, "has layer_types 5"),
        ({"layer_types": "full_attention"}, "has layer_types 'full_attention'"),
        ({"final_logit_softcapping": 30.0}, "sets final_logit_softcapping"),
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


@pytest.mark.parametrize(
    "name",
    [
        *("LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config", "Qwen3MoeConfig"),
        "MixtralConfig",
    ],
)
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
    if name == "Qwen3Config":
        assert ours.head_dim == theirs.head_dim
    if ours.mixture is not None:
        assert ours.mixture.num_experts == theirs.num_local_experts
        assert ours.mixture.num_experts_per_tok == theirs.num_experts_per_tok
        assert ours.mixture.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)
        assert ours.mixture.router_aux_loss_coef == theirs.router_aux_loss_coef
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


def test_the_second_config_and_thinking_through_load_and_the_command(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_llm(tmp_path / "model")
    template = "{% if enable_thinking is false %}in short: {% endif %}{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(template)
    asked = {"chunk_size": 40, "local_size": 8, "original_max_position_embeddings": 40}
    config = json.loads((folder / "config.json").read_text())
    long = {"max_position_embeddings": 4096, "dual_chunk_attention_config": asked}
    (folder / "config_1m.json").write_text(json.dumps(config | long))
    assert dca_jax.load(folder, context=64).model.config.dca is None
    with caplog.at_level("WARNING"):
        llm = dca_jax.load(folder, context="1k")
    assert "is loaded with its config_1m.json, for a text of 1024 tokens" in caplog.text
    assert llm.model.dca == DCAConfig.from_hf(asked)
    assert dca_jax.load(folder, config=folder / "config_1m.json").model.dca == llm.model.dca
    messages = [{"role": "user", "content": "Call me " * 40}]  # longer than a chunk
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": messages}))
    command = ("generate", folder, "--input", tmp_path / "in.jsonl", "--context", "1k")
    options = ("--max-new-tokens", 6, "--temperature", 0)
    for flag, thinking in (("--thinking", True), ("--no-thinking", False)):
        out = tmp_path / f"{flag}.jsonl"
        done = invoke(*command, *options, flag, "--output", out)
        assert done.exit_code == 0, done.output
        wanted = llm.chat(messages, max_new_tokens=6, thinking=thinking)
        found = json.loads(out.read_text())
        assert (found["text"], found["prompt_tokens"]) == (wanted.text, wanted.prompt_tokens)
    done = invoke("generate", folder, "Call me", "--thinking")
    assert done.exit_code == 2
    assert "--thinking needs a conversation" in done.stderr
