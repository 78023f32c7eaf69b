"""`make demo`, end to end on a tiny model and short texts, and its parts."""

import ast
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from typer.testing import CliRunner

import dca_jax
from dca_jax.config import LlamaConfig
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.evaluation.perplexity import perplexity
from dca_jax.model import Llama
from dca_jax.rope import RopeConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import demo
import demo_data
import demo_prompts
import demo_report
import typer
from safetensors.numpy import save_file

TRAINED = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random model in Hugging Face format, with a tokenizer of code."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=TRAINED,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(0,),
    )
    params = Llama(config, param_dtype=jnp.float32, rngs=nnx.Rngs(0)).params()
    params = jax.tree.map(lambda x: 20 * x, params)  # sharp, so that positions matter
    save_file(demo_report.to_hugging_face(config, params), folder / "model.safetensors")
    text = (demo_data.stdlib() / "unittest/mock.py").read_text(encoding="utf-8")
    demo_prompts.train_tokenizer([text], 600).save(str(folder / "tokenizer.json"))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return folder


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(demo.main)
    return app


@pytest.fixture
def cache_dir():
    """The demo turns JAX's compilation cache on; the other tests go on without."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_demo_runs(folder, tmp_path, app, monkeypatch, cache_dir):
    monkeypatch.setattr(demo, "TIMES", (1, 8))
    monkeypatch.setattr(demo, "TEXTS", 1)
    monkeypatch.setattr(demo, "DEPTHS", (0.0, 1.0))
    monkeypatch.setattr(demo, "BATCH", 2)
    for _ in range(2):  # the second run replaces the first one's files
        done = CliRunner().invoke(app, [str(folder), "--output", str(tmp_path / "out")])
        assert done.exit_code == 0, done.output
    saved = json.loads((tmp_path / "out/results.json").read_text())
    assert list(saved["perplexity"]) == ["RoPE", "PI", "NTK", "YaRN", "DCA"]
    at_trained, far = (
        {curve[n] for curve in saved["perplexity"].values()} for n in ("128", "2048")
    )
    assert len(at_trained) == 1  # a factor of 1 is plain RoPE, and so is DCA within Q
    assert len(far) == 5  # and beyond, five methods give five figures
    assert saved["passkey"]["DCA"]["lengths"] == [256, 2048]
    assert np.shape(saved["passkey"]["RoPE"]["found"]) == (2, 2)
    completion = saved["completion"]
    assert 1900 < completion["tokens"] <= 2048
    assert set(completion["completions"]) == {"RoPE", "DCA"}
    assert all(completion["completions"].values())
    assert set(saved["seconds"]) >= {"conversion", "perplexity", "passkey", "completion", "total"}
    for picture in ("perplexity.png", "passkey.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    assert "YaRN" in done.output
    assert "characters right" in done.output


def test_methods_are_what_their_names_say(folder):
    llm = dca_jax.load(folder, dca=None, dtype="float32")
    read = {name: demo.with_method(llm, name, 8 * TRAINED).model for name in demo.METHODS}
    assert read["RoPE"].config == read["DCA"].config == llm.model.config
    assert read["RoPE"].dca is None
    assert read["DCA"].dca == DCAConfig.paper(TRAINED)
    ropes = {name: read[name].config.rope for name in demo.SCALINGS}
    assert {name: rope.rope_type for name, rope in ropes.items()} == demo.SCALINGS
    assert {rope.factor for rope in ropes.values()} == {8.0}
    assert {rope.original_max_position_embeddings for rope in ropes.values()} == {TRAINED}
    for name in demo.SCALINGS:
        assert demo.with_method(llm, name, TRAINED).model.config.rope == RopeConfig()


def test_perplexities_are_those_of_each_configuration(folder, monkeypatch):
    monkeypatch.setattr(demo, "TEXTS", 2)
    llm = dca_jax.load(folder, dca=None, dtype="float32")
    lengths = [TRAINED, 4 * TRAINED]
    tokens = demo.held_out_tokens(llm, lengths[-1])
    assert tokens.shape == (8 * TRAINED,)
    results = demo.perplexities(llm, lengths)
    model = demo.with_method(llm, "YaRN", lengths[1]).model
    for length in lengths:
        plain = perplexity(llm.model, tokens, window=length)
        assert results["RoPE"][length] == pytest.approx(plain, rel=1e-5)
    scaled = perplexity(model, tokens, window=lengths[1])
    assert results["YaRN"][lengths[1]] == pytest.approx(scaled, rel=1e-5)


def test_recall_task_asks_for_a_function_of_the_beginning():
    source = (demo_data.stdlib() / demo.DOCUMENT).read_text(encoding="utf-8")
    task = demo.recall_task(lambda text: len(text.split()), source, 2000)
    assert task.prompt.endswith("\n\n\n" + task.cue)
    assert 1980 < task.tokens <= 2000
    assert task.tokens == len(task.prompt.split())
    assert task.distance > 1500
    function = task.cue + task.rest
    assert source.count(function) == 1
    assert task.prompt.startswith(source[: source.index(function) + len(function)])
    assert isinstance(ast.parse(function).body[0], ast.FunctionDef)
    assert len(task.cue.splitlines()) == 2
    assert 4 <= len(task.rest.splitlines()) <= 14


def test_which_model(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "REPOSITORY", tmp_path)
    with pytest.raises(InputError, match="found none"):
        demo.find_model()
    for name in ("one", "two"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
        if name == "one":
            assert demo.find_model() == tmp_path / "models/one"
    with pytest.raises(InputError, match="found one, two"):
        demo.find_model()


def test_a_missing_model_is_one_message(tmp_path, app):
    done = CliRunner().invoke(app, [str(tmp_path / "none"), "--output", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "is no folder" in done.output
    assert "Traceback" not in done.output
