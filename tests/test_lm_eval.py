"""The model for lm-evaluation-harness: local tasks, offline, against figures computed directly."""

import json
import logging
import math
import runpy
import sqlite3
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dca_jax.cli import app
from dca_jax.errors import InputError
from dca_jax.evaluation.texts import encode
from dca_jax.inference.methods import with_method
from dca_jax.inference.score import token_nll

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra `eval`)")
# Of other people's packages, on the way to their figures.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CHOICES = [
    {"context": "Call me Ishmael. Some years", "choices": [" ago", " never mind", " x"], "gold": 0},
    {"context": "never mind how long" * 4, "choices": [" precisely", " I thought"], "gold": 1},
]
QUESTIONS = [{"question": f"Some {n} years ago", "answer": "x"} for n in ("two", "seven thousand")]
TEXTS = [{"text": "Call me Ishmael. Some years ago, never mind how long. " * n} for n in (1, 6)]
TASKS = {
    "local_choice": (
        CHOICES,
        "output_type: multiple_choice\ndoc_to_text: '{{context}}'\ntarget_delimiter: ''\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{gold}}'\n"
        "metric_list:\n  - metric: acc\n",
    ),
    "local_text": (
        TEXTS,
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n  - metric: word_perplexity\n",
    ),
    "local_answer": (
        QUESTIONS,
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs:\n  until: ['e']\n  max_gen_toks: 9\n"
        "metric_list:\n  - metric: exact_match\n",
    ),
}


@pytest.fixture(scope="module")
def model(folder):
    from dca_jax.lm_eval import DcaJaxLM

    return DcaJaxLM(str(folder), method="dca", dtype="float32", batch_size=2)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, (rows, definition) in TASKS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
            f"    test: {folder}/{name}.jsonl\n  cache_dir: {folder}/cache\n"
            f"test_split: test\n{definition}"
        )
    return folder


def evaluate(model, task_folder: Path, **options):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    options = {"bootstrap_iters": 0, "log_samples": True, "task_manager": manager, **options}
    return simple_evaluate(model, tasks=list(TASKS), **options)


def direct_logprobs(paper_llm, ids: list[int]) -> np.ndarray:
    """ln p of every token but the first, from the logits of a whole forward pass."""
    padded = [*ids, *[0] * (200 - len(ids))]  # which no earlier token sees
    logits = np.asarray(paper_llm.logits([padded]), np.float64)[0, : len(ids) - 1]
    logits -= logits.max(axis=-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.take_along_axis(logprobs, np.asarray(ids[1:])[:, None], axis=-1)[:, 0]


@pytest.mark.slow
def test_the_figures_of_local_tasks_are_those_computed_directly(model, paper_llm, task_folder):
    results = evaluate(model, task_folder)
    samples = results["samples"]
    for row, sample in zip(CHOICES, samples["local_choice"], strict=True):
        context = paper_llm.tokenize(row["context"])
        for choice, (found, _) in zip(row["choices"], sample["filtered_resps"], strict=True):
            ids = paper_llm.tokenize(row["context"] + choice)
            assert ids[: len(context)] == context
            expected = direct_logprobs(paper_llm, ids)[len(context) - 1 :].sum()
            assert float(found) == pytest.approx(expected, abs=1e-3)
    total, size, words = 0.0, 0, 0
    for row in TEXTS:
        ids = [1, *encode(paper_llm, row["text"])]  # one BOS, and not two
        total -= direct_logprobs(paper_llm, ids).sum()
        size, words = size + len(row["text"].encode()), words + len(row["text"].split(" "))
    measured = results["results"]["local_text"]
    assert measured["bits_per_byte,none"] == pytest.approx(total / size / math.log(2), rel=1e-4)
    assert math.log(measured["word_perplexity,none"]) == pytest.approx(total / words, rel=1e-4)
    for row, sample in zip(QUESTIONS, samples["local_answer"], strict=True):
        (found,) = sample["filtered_resps"]
        (alone,) = paper_llm.generate(row["question"], max_new_tokens=9, stop=["e"])
        assert found == paper_llm.tokenizer.decode(alone.tokens).split("e")[0]


def test_whether_greedy_decoding_gives_the_continuation(model, paper_llm):
    prompt = paper_llm.tokenize("Call me Ishmael")
    best = list(paper_llm.generate([prompt], max_new_tokens=3)[0].tokens)
    other = [*best[:2], (best[2] + 1) % 300]
    requests = [(("", ""), prompt, continuation) for continuation in (best, other)]
    assert [greedy for _, greedy in model._loglikelihood_tokens(requests, disable_tqdm=True)] == [
        True,
        False,
    ]


def test_rolling_windows_are_of_max_length(folder, paper_llm):
    from lm_eval.api.instance import Instance

    from dca_jax.lm_eval import DcaJaxLM

    text = TEXTS[1]["text"]
    model = DcaJaxLM(str(folder), method="rope", dtype="float32", max_length="50")
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (found,) = model.loglikelihood_rolling([request], disable_tqdm=True)
    ids = np.asarray([1, *encode(paper_llm, text)])
    plain = with_method(paper_llm.model, "rope", 50)
    total, first = 0.0, 1
    while first < len(ids):
        stop = min(first + 50, len(ids))
        nll = token_nll(plain, ids[None, max(0, stop - 51) : stop])[0]
        total -= nll[-(stop - first) :].sum(dtype=np.float64)
        first = stop
    assert found == pytest.approx(total, rel=1e-5)
    assert len(ids) > 150


def test_nothing_is_cut_in_silence(folder):
    from lm_eval.api.instance import Instance

    from dca_jax.lm_eval import DcaJaxLM

    model = DcaJaxLM(str(folder), method="dca", dtype="float32", max_length=60)
    assert model.max_length == 60  # the model was trained on 64
    long = Instance("generate_until", {}, ("word " * 60, {"max_gen_toks": 4}), 0)
    with pytest.raises(InputError, match="max_length is 60; give a larger one"):
        model.generate_until([long], disable_tqdm=True)
    with pytest.raises(InputError, match="max_length is 60"):
        model._loglikelihood_tokens([(("", ""), [1] * 61, [2])], disable_tqdm=True)
    with pytest.raises(InputError, match="no context to begin with"):
        model._loglikelihood_tokens([(("", "x"), [], [2])], disable_tqdm=True)


def test_chat_templates_and_special_tokens(folder, paper_llm, task_folder):
    from dca_jax.lm_eval import DcaJaxLM

    model = DcaJaxLM(str(folder), method="dca", dtype="float32", batch_size=2)
    assert model.tok_encode("a") == paper_llm.tokenize("a")
    assert model.tok_encode("<s>a") == paper_llm.tokenize("a")  # no second BOS
    assert model.tok_encode("a", add_special_tokens=False) == paper_llm.tokenize("a")[1:]
    assert (model.prefix_token_id, model.eot_token_id) == (1, 2)
    history = [{"role": "user", "content": "Some years ago"}]
    text = model.apply_chat_template(history)
    assert text == "<|user|>Some years ago\n<|assistant|>"
    # As lm-eval's own model: this template has no BOS, so one is put before it.
    assert model.tok_encode(text) == [1, *paper_llm.apply_chat_template(history)]
    open_end = [*history, {"role": "assistant", "content": "I thought"}]
    text = model.apply_chat_template(open_end, add_generation_prompt=False)
    assert text.rstrip().endswith("I thought")
    results = evaluate(model, task_folder, apply_chat_template=True, fewshot_as_multiturn=True)
    (found,) = results["samples"]["local_answer"][0]["filtered_resps"]
    message = [{"role": "user", "content": QUESTIONS[0]["question"]}]
    prompt = [1, *paper_llm.apply_chat_template(message)]
    (said,) = paper_llm.generate([prompt], max_new_tokens=9, stop=["e"])
    assert found == paper_llm.tokenizer.decode(said.tokens).split("e")[0]


def test_a_bad_method_is_refused_before_the_tasks_are_built(folder):
    from dca_jax.lm_eval import DcaJaxLM

    with pytest.raises(InputError, match="method 'alibi' is not known"):
        DcaJaxLM(str(folder), method="alibi")


@pytest.fixture
def only_local_tasks(monkeypatch):
    """Without lm-eval's own 14,000 files of tasks, which take it long."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


@pytest.mark.slow
@pytest.mark.usefixtures("only_local_tasks")
def test_as_a_user_runs_it(folder, task_folder, tmp_path, monkeypatch, capsys):
    """`python -m dca_jax.lm_eval`: lm-eval's own command, with this model in its list."""
    arguments = ["run", "--model", "dca_jax", "--tasks", "local_answer", "--batch_size", "2"]
    arguments += ["--model_args", f"pretrained={folder},method=dca,max_length=4096,dtype=float32"]
    arguments += ["--include_path", task_folder, "--output_path", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["lm-eval", *map(str, arguments)])
    runpy.run_module("dca_jax.lm_eval", run_name="__main__", alter_sys=True)
    assert "|local_answer|" in capsys.readouterr().out
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert "exact_match,none" in json.loads(results.read_text())["results"]["local_answer"]


@pytest.mark.slow
@pytest.mark.usefixtures("only_local_tasks")
def test_by_our_own_command(folder, task_folder, tmp_path, monkeypatch):
    """`dca-jax lm-eval`: our options, and lm-eval's for the rest."""
    arguments = ["lm-eval", folder, "--method", "dca:40,60", "--max-length", "4k"]
    arguments += ["--dtype", "float32", "--tasks", "local_answer", "--batch_size", "2"]
    arguments += ["--include_path", task_folder, "--output_path", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["dca-jax"])  # lm-eval reads it
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert "|local_answer|" in done.stdout
    (results,) = (tmp_path / "out").rglob("results_*.json")
    asked = json.loads(results.read_text())["config"]["model_args"]
    assert (asked["method"], asked["max_length"]) == ("dca:40,60", 4096)
    arguments[3] = "alibi"
    bad = CliRunner().invoke(app, list(map(str, arguments)))
    assert bad.exit_code == 2
    assert "method 'alibi' is not known" in bad.stderr


def test_what_lm_eval_could_not_write_is_said(tmp_path: Path) -> None:
    """It answers a full disk with a warning, and ends as if all were well."""
    from dca_jax.lm_eval.output import output_checked

    out = tmp_path / "out" / "model"

    def evaluate(written: dict[str, str], *arguments: str) -> None:
        given = arguments or ("run", "--tasks", "x", "--output_path", str(tmp_path / "out"))
        with output_checked(given):
            out.mkdir(parents=True, exist_ok=True)
            for name, text in written.items():
                (out / name).write_text(text)

    earlier = {"results_1.json": "{}", "samples_x_1.jsonl": '{"a": "\u2028"}\n{}\n'}
    evaluate(earlier)
    for arguments in (
        (),
        ("-o", str(tmp_path / "out")),
        (f"--output_path={tmp_path}/out/all.json",),
    ):
        with pytest.raises(InputError, match=r"lm-eval could not write its results to .*out "):
            evaluate({}, *arguments)
    for half in ({"results_2.json": '{"a": 1'}, {"results_2.json": ""}):
        with pytest.raises(InputError, match=r"could not write results_2\.json"):
            evaluate(half)
    with pytest.raises(InputError, match=r"could not write samples_x_2\.jsonl"):
        evaluate({"results_2.json": "{}", "samples_x_2.jsonl": '{}\n{"a'})
    assert {file.name for file in out.iterdir()} == {*earlier, "results_2.json"}
    evaluate({}, "run", "--tasks", "x")  # which asks for no files
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/out cannot be written: Not a directory"):
        evaluate({}, "--output_path", str(tmp_path / "file" / "out"))
    message = "database or disk is full"
    with pytest.raises(InputError, match=f"cache cannot be written: {message}"), output_checked([]):
        raise sqlite3.OperationalError(message)


@pytest.fixture(autouse=True)
def quiet():
    """lm-eval's logger belongs to the process; the other tests go on without its lines."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)
