"""The demo model's script: its text, its prompts, a short training, and the folder it writes."""

import json
import math
from pathlib import Path

import demo_data
import demo_prompts
import demo_report
import jax
import jax.numpy as jnp
import numpy as np
import pretrain_demo
import pytest
from flax import nnx
from pretrain_demo import Recipe
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from dca_jax.config import LlamaConfig
from dca_jax.errors import InputError
from dca_jax.evaluation import passkey
from dca_jax.model import Llama

pytestmark = pytest.mark.examples

TINY = Recipe(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    context=256,
    batch=4,
    retrieval=2,
    templates=60,
    warmup_steps=3,
    steps_per_call=4,
)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    names = ("dataclasses.py", "functools.py", "shutil.py", "enum.py", "socket.py", "ssl.py")
    return [(demo_data.stdlib() / name).read_text(encoding="utf-8") for name in names]


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> Tokenizer:
    return demo_prompts.train_tokenizer(texts, TINY.vocab_size)


@pytest.fixture(scope="module")
def data(texts: list[str], tokenizer: Tokenizer) -> pretrain_demo.Data:
    return pretrain_demo.prepare(texts, tokenizer, TINY)


def test_held_out_text_is_long_enough_and_never_trained_on():
    text = demo_data.held_out_text()
    assert len(text) >= 250_000
    long_lines = {line.strip() for line in text.splitlines() if len(line.strip()) >= 60}
    seen = 0
    for number, (_, trained) in enumerate(demo_data.training_files(seed=0)):
        lines = {line.strip() for line in trained.splitlines() if len(line.strip()) >= 60}
        shared = lines & long_lines
        assert len(shared) <= max(3, 0.2 * len(lines)), shared
        seen += 1
        if number == 40:
            break
    assert seen == 41


def test_a_copy_of_held_out_source_is_recognized():
    held_out = demo_data._long_lines(demo_data.held_out_text())
    source = demo_data.held_out_files()[0].read_text(encoding="utf-8")
    assert demo_data._copies("# vendored\n" + source[:20_000], held_out)
    other = (demo_data.stdlib() / "functools.py").read_text(encoding="utf-8")
    assert not demo_data._copies(other, held_out)


@pytest.mark.parametrize(
    ("text", "permissive"),
    [
        ("MIT", True),
        ("Apache-2.0", True),
        ("BSD License; BSD-3-Clause", True),
        ("Other/Proprietary License; Apache 2.0", False),
        ("BSD License; GNU General Public License (GPL)", False),
        ("MPL-2.0 AND MIT", False),
        ("", False),
    ],
)
def test_only_permissive_licenses_are_read(text: str, permissive: bool):
    assert demo_data.is_permissive(text) is permissive


def test_tokenizer_round_trips_and_splits_digits(tokenizer: Tokenizer):
    text = "def f(x):\n    return x1234 + 56  # é, 漢字\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("90210").tokens == list("90210")


def test_encoding_in_pieces_equals_encoding_the_prompt(tokenizer: Tokenizer):
    """A template's keys are put between pieces that were tokenized apart."""
    draft = passkey.passkey_text(9, 0.4, demo_prompts.KEYS[0]) + f" {demo_prompts.KEYS[0]}.\n"
    pieces = draft.split(demo_prompts.KEYS[0])
    key = tokenizer.encode("31975").ids
    ids = [tokenizer.encode(piece).ids for piece in pieces]
    joined = [*ids[0], *(token for piece in ids[1:] for token in (*key, *piece))]
    assert joined == tokenizer.encode(draft.replace(demo_prompts.KEYS[0], "31975")).ids


def test_every_template_asks_for_a_key_that_it_states(data: pretrain_demo.Data):
    templates = np.asarray(data.templates).astype(int)
    assert templates.shape[1] == TINY.context + 1
    assert len(templates) >= TINY.templates // 2
    first, again = TINY.vocab_size, TINY.vocab_size + demo_prompts.SLOTS
    for row in templates:
        answer = np.flatnonzero(row >= again)[-demo_prompts.DIGITS :]
        assert (np.diff(answer) == 1).all()
        stated = np.flatnonzero(row == row[answer[0]] - demo_prompts.SLOTS)
        assert len(stated) == 1
        assert stated[0] < answer[0]
        assert row.max() < again + demo_prompts.SLOTS
        assert first <= row[stated[0]] < again


def test_a_batch_repeats_the_key_it_states(data: pretrain_demo.Data, tokenizer: Tokenizer):
    tokens, kind = pretrain_demo.sample_batch(jax.random.key(3), data, TINY)
    assert tokens.shape == kind.shape == (TINY.batch, TINY.context + 1)
    assert int(tokens.max()) < TINY.vocab_size
    assert not np.asarray(kind)[: TINY.batch - TINY.retrieval].any()
    for row, kinds in zip(np.asarray(tokens), np.asarray(kind), strict=True):
        if not kinds.any():
            continue
        stated = tokenizer.decode(row[kinds == 1].tolist())
        answer = tokenizer.decode(row[kinds == 2].tolist()[-demo_prompts.DIGITS :])
        assert answer.isdigit()
        assert answer in {stated[i : i + 5] for i in range(0, len(stated), 5)}
    other, _ = pretrain_demo.sample_batch(jax.random.key(4), data, TINY)
    assert not np.array_equal(tokens, other)


def test_loss_is_cross_entropy_with_foreseeable_digits_weighted(data: pretrain_demo.Data):
    model = Llama(TINY.config(), param_dtype=jnp.float32, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    tokens, kind = pretrain_demo.sample_batch(jax.random.key(0), data, TINY)
    loss_fn = jax.jit(pretrain_demo.loss_fn, static_argnums=3)
    loss, parts = loss_fn(model.params(), tokens, kind, TINY)
    logits = np.asarray(jax.jit(model)(tokens[:, :-1]), np.float64)
    peak = logits.max(-1, keepdims=True)
    log_z = peak[..., 0] + np.log(np.exp(logits - peak).sum(-1))
    targets, kinds = np.asarray(tokens)[:, 1:], np.asarray(kind)[:, 1:]
    nll = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    weight = np.array([1.0, 0.0, TINY.answer_weight])[kinds]
    np.testing.assert_allclose(float(loss), (nll * weight).sum() / weight.sum(), rtol=1e-5)
    np.testing.assert_allclose(float(parts["key"]), nll[kinds == 2].mean(), rtol=1e-5)
    np.testing.assert_allclose(float(parts["text"]), nll[:2].mean(), rtol=1e-5)


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [
        float(pretrain_demo.learning_rate(jnp.int32(step), jnp.int32(100), TINY))
        for step in range(101)
    ]
    assert rates[0] == pytest.approx(TINY.peak_learning_rate / 3)
    assert max(rates) == pytest.approx(TINY.peak_learning_rate, rel=0.01)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)
    assert rates[50] == pytest.approx(TINY.peak_learning_rate / 2, rel=1e-3)


def test_script_writes_a_folder_that_every_reader_reads(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        demo_data, "training_files", lambda seed: (("python", text) for text in texts)
    )
    monkeypatch.setattr(demo_report, "PROMPTS_PER_DEPTH", 1)
    monkeypatch.setattr(demo_report, "DEPTHS", (0.0, 1.0))
    monkeypatch.setattr(demo_report, "READ", (1, 4))
    monkeypatch.setattr(demo_report, "SEARCHED", (4,))
    folder = tmp_path / "models" / "tiny"
    # optax's Adam raises a Python float to an int32 power.
    with jax.numpy_dtype_promotion("standard"):
        log = pretrain_demo.pretrain(
            folder,
            TINY,
            minutes=0.02,
            corpus_mb=1,
            held_out_text=demo_data.held_out_text()[:5_000],
        )
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.json",
    ]
    assert json.loads((folder / "training_log.json").read_text()) == json.loads(json.dumps(log))
    curve = log["training"]["curve"]
    assert curve[-1]["text"] < curve[0]["text"] < 1.1 * math.log(TINY.vocab_size)
    assert (
        f"{log['evaluation']['perplexity']['DCA 1024']:.2f}" in (folder / "README.md").read_text()
    )

    config = LlamaConfig.from_hf(json.loads((folder / "config.json").read_text()))
    assert config == TINY.config()
    reader = AutoTokenizer.from_pretrained(folder)
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "def main():\n    return 12345\n"
    assert reader(text)["input_ids"] == saved.encode(text).ids
    assert reader.decode(reader(text)["input_ids"]) == text
    assert reader.eos_token_id == config.eos_token_ids[0] == 0

    with pytest.raises(InputError, match="exists"):
        pretrain_demo.pretrain(folder, TINY, minutes=1, corpus_mb=1, held_out_text="")


def test_saved_weights_are_what_transformers_computes(tmp_path: Path, tokenizer: Tokenizer):
    torch = pytest.importorskip("torch")
    model = Llama(TINY.config(), param_dtype=jnp.float32, dtype=jnp.float32, rngs=nnx.Rngs(1))
    tensors = demo_report.to_hugging_face(TINY.config(), model.params())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(TINY.config().to_hf()))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = tokenizer.encode("import os\nprint(os.getcwd())\n").ids
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(jax.jit(model)(jnp.asarray([ids], jnp.int32)), expected, atol=1e-4)


def test_perplexity_is_that_of_each_window_alone(data: pretrain_demo.Data):
    model = Llama(TINY.config(), param_dtype=jnp.float32, dtype=jnp.float32, rngs=nnx.Rngs(0))
    tokens = np.asarray(data.text[: 4 * 64])
    windows = jnp.asarray(tokens.reshape(4, 64), jnp.int32)
    chosen = jax.nn.log_softmax(jax.jit(model)(windows[:, :-1]))
    nll = -np.take_along_axis(np.asarray(chosen), np.asarray(windows[:, 1:, None]), -1).mean()
    assert demo_report.perplexity(model, tokens, 64) == pytest.approx(math.exp(nll), rel=1e-4)


def test_passkey_prompt_is_as_long_as_fits(tokenizer: Tokenizer):
    def count(text: str) -> int:
        return demo_prompts.count_tokens(tokenizer, text)

    rng = np.random.default_rng(0)
    longest = max(count(" " + sentence) for sentence in passkey.FILLER)
    for depth in (0.0, 0.37, 1.0):
        prompt = passkey.passkey_prompt(count, 700, depth, rng)
        assert 700 - longest < count(prompt.text) <= 700
        assert prompt.text.count(f"The pass key is {prompt.key}.") == 1
        before, _, after = prompt.text.partition(passkey.NEEDLE.format(key=prompt.key))
        share = before.count("grass") / (before.count("grass") + after.count("grass"))
        assert share == pytest.approx(depth, abs=0.05)
        assert prompt.text.endswith(passkey.QUESTION)
        assert len(prompt.key) == 5
    with pytest.raises(InputError, match="at least"):
        passkey.passkey_prompt(count, 20, 0.5, rng)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="depth"):
            passkey.passkey_prompt(count, 700, bad, rng)
