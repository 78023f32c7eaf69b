"""Frequencies and attention factors equal transformers' own, from old and new config files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dca_jax.config import LlamaConfig
from dca_jax.errors import InputError
from dca_jax.rope import RopeConfig, attention_factor, inverse_frequencies, rotate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn_betas": {
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn_mscale": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.707,
        "mscale_all_dim": 1.2,
    },
    "yarn_factor_given": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.5,
    },
    "yarn_default_length": {"factor": 4.0},
    "llama3": LLAMA3,
}


def hf_config(name: str, form: str, theta: float) -> dict:
    """A config.json dict in the old form (rope_scaling, by "type" or "rope_type") or the new."""
    rope_type = name.split("_")[0]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "vocab_size": 32,
        "max_position_embeddings": 128,
    }
    if form == "new":
        return config | {
            "rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **SCALINGS[name]}
        }
    scaling = None if rope_type == "default" else {form: rope_type, **SCALINGS[name]}
    return config | {"rope_theta": theta, "rope_scaling": scaling}


THETAS = [10_000.0, 500_000.0, 1_000_000.0]


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [16, 128, 300])
def test_equals_transformers(name: str, length: int) -> None:
    """Every scaling below, at and beyond the trained length, the thetas in turn."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = hf_config(name, "new", THETAS[(list(SCALINGS).index(name) + length) % 3])
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**config))
    theirs(torch.zeros(1, 1, 1), torch.arange(length)[None])  # dynamic NTK looks at the length
    ours = LlamaConfig.from_hf(config)
    inv_freq = inverse_frequencies(ours.rope, ours.head_dim, jnp.asarray([length], jnp.int32))
    np.testing.assert_allclose(inv_freq[0], theirs.inv_freq.numpy(), rtol=3e-7)
    assert attention_factor(ours.rope) == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", THETAS)
def test_every_spelling_says_the_same(name: str, theta: float) -> None:
    """Old and new config files give one config, and so does the file written from it."""
    ours = LlamaConfig.from_hf(hf_config(name, "new", theta))
    assert ours.rope.theta == theta
    for form in ("type", "rope_type"):
        assert LlamaConfig.from_hf(hf_config(name, form, theta)) == ours
    if name != "dynamic":
        assert LlamaConfig.from_hf(json.loads(json.dumps(ours.to_hf()))) == ours


def test_rotation_equals_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 37, 4, 64)).astype(np.float32)
    key = rng.normal(size=(2, 37, 2, 64)).astype(np.float32)
    config = hf_config("yarn", "new", 10_000.0)
    positions = torch.arange(37)[None].repeat(2, 1)
    cos, sin = LlamaRotaryEmbedding(transformers.LlamaConfig(**config))(
        torch.zeros(1, 1, 1), positions
    )
    theirs = apply_rotary_pos_emb(
        torch.tensor(query).transpose(1, 2), torch.tensor(key).transpose(1, 2), cos, sin
    )
    rope = LlamaConfig.from_hf(config).rope
    inv_freq = inverse_frequencies(rope, 64)
    for x, expected in zip((query, key), theirs, strict=True):
        ours = rotate(jnp.asarray(x), jnp.arange(37)[None], inv_freq) * attention_factor(rope)
        np.testing.assert_allclose(ours, expected.transpose(1, 2), atol=2e-6)


def test_rotation_back_is_the_identity() -> None:
    x = jax.random.normal(jax.random.key(0), (1, 9, 3, 16))
    inv_freq = inverse_frequencies(RopeConfig(), 16)
    positions = jnp.arange(9)[None] * 1000
    back = rotate(rotate(x, positions, inv_freq), -positions, inv_freq)
    np.testing.assert_allclose(back, x, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "su"),
        ({"rope_scaling": {"rope_type": "exotic", "factor": 2.0}}, "'exotic' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs a factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "at least 1"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": float("nan")}, "theta"),
    ],
)
def test_refused(config: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RopeConfig.from_hf({"max_position_embeddings": 128, **config})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "dynamic", "factor": 2.0**31}, r"factor must be at most 1e\+06"),
        ({"type": "yarn", "factor": 2.0, "beta_slow": 1e-320}, "beta_slow must be a finite number"),
        ({"type": "yarn", "factor": 2.0, "finetuned": "yes"}, "finetuned must be true or false"),
    ],
)
def test_numbers_without_a_frequency_in_float32(scaling: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RopeConfig.from_hf({"max_position_embeddings": 128, "rope_scaling": scaling})
