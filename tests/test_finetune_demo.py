"""The finetuning experiment: the gradient it compares with, its rows, and all of it once, tiny."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import demo_data
import demo_prompts
import demo_report
import finetune_demo
import finetune_report
import jax
import jax.numpy as jnp
import numpy as np
import pretrain_demo
import pytest
from detached_merge import DetachedMerge, gradient_error
from flax import nnx

from dca_jax.attention import attention_pass, dual_chunk_attention, merge_passes
from dca_jax.attention.op import BACKENDS, check_implementation
from dca_jax.dca import PHASES, DCAConfig
from dca_jax.errors import InputError
from dca_jax.finetune.train import Batch, Metrics, State
from dca_jax.inference.llm import LLM
from dca_jax.inference.load import load
from dca_jax.inference.score import window_nlls
from dca_jax.model import Llama
from dca_jax.rope import RopeConfig

pytestmark = pytest.mark.examples

DCA = DCAConfig(chunk_len=24, max_query_position=30)
TINY = pretrain_demo.Recipe(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    context=256,
)
PLAN = finetune_demo.Plan(
    times=1,
    tokens=512,
    updates=2,
    retrieval_every=2,
    seeds=1,
    corpus_mb=1.0,
    long_file=1000,
    windows=1,
    depths=2,
    trials=1,
    batch=8,  # texts are then read in pieces of two widths: few compilations
)


@pytest.fixture
def detached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "detached", DetachedMerge())


def draw(length: int, dtype: Any) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, 16) for heads in (4, 2, 2, 4)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def gradients(form: str, length: int, dtype: Any) -> tuple[jax.Array, ...]:
    """Of query, key and value, of a loss that weighs every output."""
    *arrays, weight = draw(length, dtype)
    lengths = jnp.asarray([length, max(1, length - 9)], jnp.int32)
    options: dict[str, Any] = {"dca": DCA, "rope": RopeConfig(), "lengths": lengths}

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if form == "passes":
            passes = [attention_pass(q, k, v, phase=phase, **options) for phase in PHASES]
            lses = [jax.lax.stop_gradient(lse) for _, lse in passes]
            out = merge_passes([out for out, _ in passes], lses)[0]
        else:
            out = dual_chunk_attention(q, k, v, implementation=form, **options)
        return jnp.sum(out * weight)

    return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)


@pytest.mark.usefixtures("detached")
def test_gradient_is_that_of_passes_merged_by_a_detached_log_sum_exp():
    with jax.enable_x64(True):
        ours = gradients("detached", 101, jnp.float64)
        for found, expected in zip(ours, gradients("passes", 101, jnp.float64), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-12, rtol=0)
        exact = gradients("xla", 101, jnp.float64)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, exact, strict=True)]
    assert min(errors[:2]) > 0.1  # of query and key
    assert errors[2] < 1e-12  # of value


@pytest.mark.usefixtures("detached")
def test_value_is_the_best_backends():
    *arrays, _ = draw(101, jnp.bfloat16)
    attention = jax.jit(dual_chunk_attention, static_argnames=("dca", "rope", "implementation"))
    options: dict[str, Any] = {"dca": DCA, "rope": RopeConfig()}
    ours = attention(*arrays, implementation="detached", **options)
    assert np.array_equal(ours, attention(*arrays, implementation="xla", **options))


def test_a_registered_backend_is_a_known_implementation(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="unknown attention implementation 'detached'"):
        check_implementation("detached")
    monkeypatch.setitem(BACKENDS, "detached", DetachedMerge())
    check_implementation("detached")


def test_gradient_error_is_relative_by_kind_and_in_all():
    exact = {"q_proj": {"kernel": np.array([3.0, 4.0])}, "norm": {"scale": np.array([12.0])}}
    other = {"q_proj": {"kernel": np.array([3.0, 6.5])}, "norm": {"scale": np.array([12.0])}}
    expected = {"all": 2.5 / 13, "q_proj": 0.5, "norm": 0.0}
    assert gradient_error(exact, other) == pytest.approx(expected)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    names = ("dataclasses.py", "functools.py", "enum.py", "socket.py")
    return [(demo_data.stdlib() / name).read_text(encoding="utf-8") for name in names]


@pytest.fixture(scope="module")
def model(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    params = Llama(TINY.config(), param_dtype=jnp.float32, rngs=nnx.Rngs(0)).params()
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, params)
    tokenizer = demo_prompts.train_tokenizer(texts, TINY.vocab_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_report, "card", lambda name, log: "")
        demo_report.save(folder, TINY.config(), params, tokenizer, {})
    return folder


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return load(model, dca="paper", dtype="float32")


def test_rows_are_text_or_prompts_of_which_the_known_digits_count(texts: list[str], model: Path):
    tokenizer = pretrain_demo.Tokenizer.from_file(str(model / "tokenizer.json"))
    recipe = finetune_demo.row_recipe(PLAN, TINY.vocab_size, 256)
    data = pretrain_demo.prepare(texts, tokenizer, recipe)
    text, prompts = finetune_demo.draw_batches(data, recipe, PLAN, seed=3)
    again, _ = finetune_demo.draw_batches(data, recipe, PLAN, seed=3)
    other, _ = finetune_demo.draw_batches(data, recipe, PLAN, seed=4)
    assert np.array_equal(text.tokens, again.tokens)
    assert not np.array_equal(text.tokens, other.tokens)
    for batch in (text, prompts):
        assert batch.tokens.shape == batch.trained.shape == (1, 2, 256)
        assert int(batch.tokens.max()) < TINY.vocab_size
        assert np.array_equal(batch.lengths, [[256, 256]])
    assert np.asarray(text.trained).all()
    for tokens, trained in zip(
        np.asarray(prompts.tokens[0]), np.asarray(prompts.trained[0]), strict=True
    ):
        answers = tokenizer.decode(tokens[trained].tolist())
        keys = {answers[i : i + 5] for i in range(0, len(answers), 5)}
        first = tokenizer.decode(tokens[~trained].tolist())
        assert len(keys) == 1
        assert answers.isdigit()
        assert keys.pop() in first


def test_updates_are_by_the_named_attention(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    built = []
    monkeypatch.setattr(finetune_demo, "make_update", lambda *given: built.append(given))
    monkeypatch.setattr(jax, "jit", lambda function, **_: function)
    for name in (None, "detached"):
        finetune_demo.compiled_update(llm, PLAN, name)
        build, settings, steps = built[-1]
        made = build(llm.model.params())
        assert (made.implementation, made.dca, made.dtype) == (name, llm.model.dca, jnp.float32)
        assert (settings.learning_rate, steps) == (PLAN.learning_rate, PLAN.updates)


def quick_update(llm: LLM, plan: finetune_demo.Plan, implementation: str | None) -> Any:
    """In place of a real update, whose compilation takes longer than all that is tested here."""
    wrong = 1.0 if implementation is None else 1.1

    def update(state: State, frozen: dict, batch: Batch) -> tuple[State, Metrics]:
        params = jax.tree.map(lambda x: 1.01 * x, state.params)
        mean = jax.tree.map(lambda x: wrong * x, state.params)
        tokens = batch.trained[..., 1:].sum().astype(jnp.float32)
        told = Metrics(jnp.float32(3), jnp.float32(0.5), tokens, jnp.bool_(True))
        return state._replace(params=params, mean=mean, step=state.step + 1), told

    return update


def test_the_whole_experiment(
    texts: list[str],
    model: Path,
    llm: LLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    detached: None,
):
    monkeypatch.setattr(finetune_demo, "compiled_update", quick_update)
    evaluate, found = finetune_report.evaluate, []

    def evaluate_once(*given: Any, **options: Any) -> dict[str, Any]:
        found.append(found[0] if found else evaluate(*given, **options))
        return found[-1]

    monkeypatch.setattr(finetune_report, "evaluate", evaluate_once)
    monkeypatch.setattr(
        demo_data, "training_files", lambda seed: (("python", text) for text in texts)
    )
    held_out = demo_data.held_out_text()[:5000]
    out = tmp_path / "outputs" / "run"
    results = finetune_demo.compare(out, model, PLAN, held_out)
    assert sorted(path.name for path in out.iterdir()) == [
        "finetuning.png",
        "passkey.png",
        "results.json",
    ]
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["plan"] == dataclasses.asdict(PLAN)
    tested = [(found["name"], found["seed"]) for found in results["models"]]
    assert tested == [
        ("training-free", 0),
        *(("exact", 0), ("detached", 0), ("short", 0)),
    ]

    ids = np.asarray(llm.tokenize(held_out)[:1024], np.int32)
    for window, loss in results["models"][0]["loss"].items():
        nlls = window_nlls(llm.model, ids, window=window, capacity=1040, batch=8)
        assert loss == pytest.approx(np.mean(list(nlls)), rel=1e-5)
    positions = results["models"][0]["loss_by_position"]
    counts = np.diff([0, *positions])
    counts[-1] -= 1  # the last token predicts nothing
    mean = np.dot(list(positions.values()), counts) / counts.sum()
    assert mean == pytest.approx(results["models"][0]["loss"][1024], rel=1e-6)

    logs = {m["name"]: m["training"] for m in results["models"][1:]}
    assert logs["exact"]["trained"] == logs["detached"]["trained"]
    assert logs["exact"]["trained"][0] == 2 * 255
    names = ("all", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names += ("embed_tokens", "input_layernorm", "post_attention_layernorm", "norm")
    assert results["gradient_error"] == [pytest.approx(dict.fromkeys(names, 0.1), rel=1e-5)]

    lines = finetune_report.table(results).splitlines()
    assert lines[0].startswith("| model | seeds | loss, 256 | loss, 512 |")
    assert [line.split(" | ")[0] for line in lines[2:7]] == [
        "| training-free",
        "| finetuned at the trained length",
        "| finetuned, detached gradient",
        "| finetuned, exact gradient",
        "| detached - exact, seed 0",
    ]
    with pytest.raises(InputError, match="exists"):
        finetune_demo.compare(out, model, PLAN, held_out)
