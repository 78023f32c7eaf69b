"""`make demo`, end to end on a tiny model and short texts, and its parts."""

import json
import logging
from pathlib import Path

import demo
import demo_data
import demo_prompts
import demo_report
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import save_file
from typer.testing import CliRunner

import dca_jax
from dca_jax.config import LlamaConfig
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.inference.score import perplexity
from dca_jax.model import Llama
from dca_jax.rope import RopeConfig

pytestmark = pytest.mark.examples

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
    params = jax.tree.map(lambda x: 6 * x, params)  # sharp, so that positions matter
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


@pytest.fixture(autouse=True)
def process_settings(monkeypatch):
    """What the demo sets for its whole process; the other tests go on without."""
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    level = logging.getLogger("absl").level
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    logging.getLogger("absl").setLevel(level)


def test_the_demo_runs(folder, tmp_path, app, monkeypatch):
    monkeypatch.setattr(demo, "TIMES", (1, 8))
    monkeypatch.setattr(demo, "TEXTS", 1)
    monkeypatch.setattr(demo, "DEPTHS", (0.0, 1.0))
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text("{}")  # of an earlier run
    done = CliRunner().invoke(app, [str(folder), "--output", str(out)])
    assert done.exit_code == 0, done.output
    names = {path.name for path in out.iterdir()}
    assert names - {"compilation_cache"} == {"results.json", "perplexity.png", "passkey.png"}
    saved = json.loads((out / "results.json").read_text())
    assert list(saved["perplexity"]) == ["RoPE", "PI", "NTK", "YaRN", "DCA"]
    at_trained, far = (
        {curve[n] for curve in saved["perplexity"].values()} for n in ("256", "2048")
    )
    # A factor of 1 is plain RoPE, and so is DCA within Q; beyond, five methods give five figures.
    assert list(at_trained) == pytest.approx([min(at_trained)] * len(at_trained), rel=1e-5)
    assert len({float(f"{value:.4g}") for value in far}) == 5
    assert saved["passkey"]["DCA"]["lengths"] == [256, 2048]
    assert np.shape(saved["passkey"]["RoPE"]["found"]) == (2, 2)
    document = saved["document"]
    assert 1500 < document["tokens"] <= 2048
    assert list(document["notes"]) == list(demo.NOTES)
    assert all({"value", "tokens_ago", "RoPE", "DCA"} == set(n) for n in document["notes"].values())
    assert all(document["continuations"][method] for method in ("RoPE", "DCA"))
    assert set(saved["seconds"]) == {"conversion", "perplexity", "passkey", "document", "total"}
    for picture in ("perplexity.png", "passkey.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert "YaRN" in done.output
    assert "archive_size" in done.output


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
    results = demo.perplexities(llm, tokens, lengths)
    model = demo.with_method(llm, "YaRN", lengths[1]).model
    for length in lengths:
        plain = perplexity(llm.model, tokens, window=length)
        assert results["RoPE"][length] == pytest.approx(plain, rel=1e-5)
    scaled = perplexity(model, tokens, window=lengths[1])
    assert results["YaRN"][lengths[1]] == pytest.approx(scaled, rel=1e-5)


def test_the_document_is_the_modules_beginning_with_notes_spread_over_it():
    source = (demo_data.stdlib() / demo.DOCUMENT).read_text(encoding="utf-8")

    def count(text: str) -> int:
        return len(text.split())

    document = demo.annotated_document(count, source, 2000)
    assert 1700 < document.tokens == count(document.text) <= 2000
    notes = [line for line in document.text.splitlines() if "keep this in mind" in line]
    assert notes == [f"# {name} is {v}, keep this in mind" for name, v in demo.NOTES.items()]
    rest = [line for line in document.text.splitlines() if line and line not in notes]
    lines = [line for line in source.splitlines() if line]
    assert rest == lines[: len(rest)]
    assert document.next_line == lines[len(rest)]
    assert document.next_line.lstrip().startswith("def ")
    ago = list(document.tokens_ago.values())
    assert ago == sorted(ago, reverse=True)
    assert ago[0] > 1700
    parts = [ago[n] / document.tokens for n in range(4)]
    assert parts == pytest.approx([1, 0.75, 0.5, 0.25], abs=0.1)
    for value, tokens_ago in zip(demo.NOTES.values(), ago, strict=True):
        assert document.text.split()[-tokens_ago] == f"{value},"


def test_too_short_a_document_is_refused():
    with pytest.raises(InputError, match="too few"):
        demo.annotated_document(len, "import os\n\n\ndef f():\n    pass\n", 5)


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
    assert "is not a folder" in done.output
    assert "Traceback" not in done.output
