"""The engine agrees with transformers, with a user's own loop, and with the model read whole."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import golden_llama
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dca_jax.inference import generate as engine
from dca_jax.inference.generate import Run, generate
from dca_jax.inference.pieces import Pieces
from dca_jax.inference.sampling import Sampler
from dca_jax.inference.steps import PAD
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama
from dca_jax.rope import RopeConfig


@pytest.fixture(scope="module")
def model(golden_model):
    return golden_model


def test_every_piece_knows_the_length_of_the_whole_prompt(model, golden, monkeypatch):
    """Temperature and dynamic NTK depend on it."""
    rope = RopeConfig(rope_type="dynamic", factor=2.0, original_max_position_embeddings=32)
    config = replace(model.config, rope=rope)
    hot = replace(model.dca, trained_length=64, temperature_slope=0.1)
    model = Llama.from_params(config, model.params(), dca=hot, dtype=jnp.float32)
    monkeypatch.setattr(engine, "pieces_of", lambda *_: Pieces((96, 64), overhead=16))
    tokens = golden["input_ids"][:, :200]
    run = Run(
        model,
        tokens.tolist(),
        max_new_tokens=1,
        cache=KVCache.create(config, batch=2, capacity=golden_llama.CAPACITY, dtype=jnp.float32),
    )
    whole = jax.jit(Llama.__call__)(model, jnp.asarray(tokens, jnp.int32))[:, -1]
    np.testing.assert_allclose(model.unembed(run.read_prompts()), whole, atol=2e-4)


def test_greedy_with_a_repetition_penalty_equals_transformers(golden):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(
        golden_llama.FOLDER / "tiny_llama", dtype=torch.float32
    )
    reference.generation_config.eos_token_id = None
    prompt = golden["input_ids"][:1, :30]
    theirs = reference.generate(
        torch.tensor(prompt),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        max_new_tokens=30,
        do_sample=False,
        repetition_penalty=1.4,
        pad_token_id=0,
    )
    plain = golden_llama.load_model(None)
    sampler = Sampler(repetition_penalty=1.4)
    ours = generate(plain, prompt.tolist(), max_new_tokens=30, sampler=sampler)
    np.testing.assert_array_equal(ours, theirs[:, 30:])


def test_a_users_own_jitted_loop_gives_the_same(model, golden):
    path = Path(__file__).resolve().parent.parent / "examples" / "jitted_generation.py"
    spec = importlib.util.spec_from_file_location("jitted_generation", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rows = golden["input_ids"][:, :90]
    expected = generate(model, [rows[0].tolist(), rows[1, :50].tolist()], max_new_tokens=9)
    stop = jnp.asarray([expected[1][3]], jnp.int32)
    tokens = example.complete(
        model,
        jnp.asarray(rows, jnp.int32),
        jnp.asarray([90, 50], jnp.int32),
        stop,
        Sampler(),
        0,
        new_tokens=9,
    )
    assert tokens[0].tolist() == _until(expected[0], stop) + [PAD] * (
        9 - len(_until(expected[0], stop))
    )
    assert tokens[1].tolist() == expected[1][:4] + [PAD] * 5


def _until(tokens, stop):
    stop = int(stop[0])
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
