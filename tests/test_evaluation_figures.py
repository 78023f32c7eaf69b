"""`benchmarks/evaluation_figures.py`: runs of one method each, put together."""

import json
from pathlib import Path

import evaluation_figures
import numpy as np
import pytest
from typer.testing import CliRunner

from dca_jax.evaluation.grids import accuracy_score
from dca_jax.evaluation.results import ResultLog, read_run
from dca_jax.inference.methods import method_by_name
from dca_jax.weights.huggingface import read_config

pytestmark = pytest.mark.benchmarks

MODEL = evaluation_figures.ROOT / evaluation_figures.MODEL
SETTINGS = {"form": "fitted", "trained_length": 512}


def part(folder: Path, method: str, found: list[bool]) -> Path:
    with ResultLog(folder, "passkey", SETTINGS) as log:
        for trial, one in enumerate(found):
            key = {"method": method, "length": 512, "trial": trial}
            log.add(key, {"found": one, "tokens": 500}, 1.0)
        log.fail({"method": method, "length": 1024, "trial": 0}, MemoryError("big"), 0.0)
    facts = {"versions": {}, "device": "abacus", "devices": 1, "platform": "cpu"}
    (folder / "summary.json").write_text(json.dumps(facts))
    return folder


def test_runs_of_many_methods_become_one_and_may_be_joined_again(tmp_path):
    parts = [part(tmp_path / "rope", "rope", [True, False]), tmp_path / "never begun"]
    evaluation_figures.join(parts, tmp_path / "all")
    parts.append(part(tmp_path / "dca", "dca", [True, True]))
    for _ in range(2):
        evaluation_figures.join(parts, tmp_path / "all")
    records = read_run(tmp_path / "all").records
    assert len(records) == len((tmp_path / "all/results.jsonl").read_text().splitlines()) == 4
    summary = json.loads((tmp_path / "all/summary.json").read_text())
    assert summary["device"] == "abacus"
    assert summary["scores"]["dca"]["512"] == accuracy_score((1.0, 2))
    assert "| rope | 50.0 (9.5 to 90.5; 2) |" in (tmp_path / "all/table.md").read_text()


@pytest.fixture
def scripts(monkeypatch):
    """In place of processes: one method that fails, and a long text."""
    started: list[tuple[str, ...]] = []

    def run_script(log, *arguments, **environment):
        words = tuple(map(str, arguments))
        started.append(words)
        if words[1] == "method":
            part(Path(words[3]) / "passkey", words[2], [True])
        else:
            log.write_text("fast\n")
            Path(words[-1]).write_text("{}")
        return "string" not in words

    monkeypatch.setattr(evaluation_figures, "run_script", run_script)
    return started


def test_every_method_is_read_and_what_failed_is_named(tmp_path, scripts):
    out = tmp_path / "out"
    ask = ["measure", "--out", str(out), "--model", str(MODEL)]
    done = CliRunner().invoke(evaluation_figures.app, [*ask, "--methods", "dca:chunkllama,string"])
    assert done.exit_code == 2
    assert "not everything was evaluated" in done.stderr
    assert "string; try again" in done.stderr
    assert {path.name for path in out.iterdir()} == {"passkey", "report.html", "llama-3-8b.json"}
    assert len(np.load(tmp_path / "out.parts/held_out.npy")) > 100_000
    again = CliRunner().invoke(evaluation_figures.app, [*ask, "--methods", "dca"])
    assert again.exit_code == 0
    assert [words[1] for words in scripts].count("--model") == 1  # the long text: once
    assert scripts[-1][2] == "dca"


def test_a_script_is_run_with_its_output_in_a_file(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print(os.environ['X'], sys.argv[1]); sys.exit(sys.argv[1])")
    assert not evaluation_figures.run_script(tmp_path / "a/log.txt", script, "stop", X="1")
    assert (tmp_path / "a/log.txt").read_text() == "1 stop\nstop\n"


def test_all_methods_are_known_and_told_apart():
    names = evaluation_figures.EVERY
    config = read_config(MODEL)
    assert len({method_by_name(name, config, 8192) for name in names}) == len(names)
