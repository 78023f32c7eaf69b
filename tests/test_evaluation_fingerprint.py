"""A result knows its model and its data by what they hold, not by their names."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from shared_fixtures import invoke_eval as invoke

from checkpoints_convert import hf_to_orbax
from dca_jax.evaluation import answers, fingerprint
from dca_jax.evaluation.answers import Answer
from dca_jax.evaluation.results import read_run
from dca_jax.inference import score


def flip(path: Path, at: int) -> None:
    """One bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("converted", [False, True])
def test_one_bit_of_any_file_is_another_model(tmp_path, folder, monkeypatch, converted):
    monkeypatch.setattr(fingerprint, "PIECE", 1000)  # many pieces, one short
    monkeypatch.setattr(fingerprint, "BLOCK", 300)
    home = tmp_path / "a/model"
    if converted:
        home.parent.mkdir()
        hf_to_orbax.convert(folder, home)
    else:
        shutil.copytree(folder, home)
    before = fingerprint.fingerprint(home)
    shutil.copytree(home, tmp_path / "b/model")
    assert fingerprint.fingerprint(tmp_path / "b/model") == before
    weights = [p for p in fingerprint._weight_files(home) if p.stat().st_size > 2000]
    for path, at in [(weights[0], -1), (weights[-1], 1500), (weights[0], 1000)]:
        flip(path, at)
        after = fingerprint.fingerprint(home)
        assert {name for name in after if after[name] != before[name]} == {"weights"}
        assert fingerprint.short_name(after) != fingerprint.short_name(before)
        flip(path, at)
    for name in ("config.json", "tokenizer.json"):
        (home / name).write_bytes((home / name).read_bytes() + b"\n")
        after = fingerprint.fingerprint(home)
        assert [other for other in after if after[other] != before.get(other)] == [name]
        (home / name).write_bytes((home / name).read_bytes()[:-1])
    (home / "additional_chat_templates").mkdir()
    (home / "additional_chat_templates/tool_use.jinja").write_text("x")
    assert fingerprint.fingerprint(home).keys() - before.keys() == {"additional_chat_templates"}


@pytest.fixture
def no_model(monkeypatch):
    """Windows without the time that a model takes."""
    monkeypatch.setattr(
        score.Reader, "nll", lambda self, rows: np.ones((len(rows), rows.shape[1] - 1), np.float32)
    )


def ask(model: Path, tokens: Path, *options: object) -> tuple[object, ...]:
    return ("perplexity", model, "--tokens", tokens, "--length", 64, "--method", "rope", *options)


def test_two_models_of_one_name_do_not_share_results(tmp_path, folder, monkeypatch, no_model):
    """`finetune` calls every model `model`; outer.md B1."""
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "t.npy", np.arange(400) % 90)
    for at, name in ((-4, "run-a"), (-8, "run-b")):
        shutil.copytree(folder, tmp_path / name / "model")
        flip(tmp_path / name / "model/model.safetensors", at)  # the last bit of one weight
        done = invoke(*ask(tmp_path / name / "model", tmp_path / "t.npy"))
        assert done.exit_code == 0, done.output
    one, other = sorted((tmp_path / "outputs").iterdir())
    assert one.name.startswith("perplexity-model-")
    assert {read_run(run).settings["model"] for run in (one, other)} == {
        str(tmp_path / name / "model") for name in ("run-a", "run-b")
    }
    # Trained further and saved at the same path: another model, and a clear refusal.
    lines = (one / "results.jsonl").read_bytes()
    flip(tmp_path / "run-a/model/model.safetensors", -12)
    for output in (one, other):
        done = invoke(*ask(tmp_path / "run-a/model", tmp_path / "t.npy", "--output", output))
        assert done.exit_code == 2
        assert "another model, or of this one before its files changed (different: weights)" in (
            done.stderr
        )
    assert (one / "results.jsonl").read_bytes() == lines


def test_data_is_known_by_its_content_and_a_task_may_be_added(folder, tmp_path, monkeypatch):
    """outer.md B20, and docs/guides/evaluate.md: asking for more in the same folder adds to it."""
    monkeypatch.setattr(
        answers,
        "answer_about",
        lambda llm, prompts, *_, **__: [Answer([1], "Ahab") for _ in prompts],
    )
    row = {"input": "A text.", "query": "Who?", "output": "Ahab", "id": 7}
    row |= {"query_examples": [], "output_examples": []}
    for name, changes in (("a", {}), ("b", {"query": "Where?"}), ("copy", {})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row | changes) + "\n")

    def few_shot(*data: str):
        pairs = (word for one in data for word in ("--data", one.format(tmp_path)))
        return invoke("few-shot", folder, *pairs, "--output", tmp_path / "out", "--method", "rope")

    assert few_shot("qasper={}/a.jsonl").exit_code == 0
    other = few_shot("qasper={}/b.jsonl")
    assert other.exit_code == 2
    assert "results of qasper on other data: the contents of b.jsonl are not those of" in (
        other.stderr
    )
    assert few_shot("qasper={}/copy.jsonl", "quality={}/b.jsonl").exit_code == 0
    assert few_shot("narrativeqa={}/b.jsonl").exit_code == 0
    run = read_run(tmp_path / "out")
    assert [record.key["task"] for record in run.records] == ["qasper", "quality", "narrativeqa"]
    assert set(run.files) == {"qasper", "quality", "narrativeqa"}
    assert few_shot("quality={}/a.jsonl").exit_code == 2
