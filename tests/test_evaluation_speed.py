"""`eval speed`: three attentions, timed and with the memory they plan for."""

import json

import jax
import numpy as np
import pytest
from shared_fixtures import invoke_eval

import dca_jax
from dca_jax.errors import InputError
from dca_jax.evaluation import speed
from dca_jax.evaluation.results import ResultLog, read_run


def test_the_command(folder, tmp_path):
    arguments = ["speed", folder, "--length", 512, "--trials", 2]
    arguments += ["--output", tmp_path / "out", "--dtype", "float32"]
    done = invoke_eval(*arguments)
    assert done.exit_code == 0, done.output
    records = read_run(tmp_path / "out").records
    assert [r.key["attention"] for r in records] == ["dense", "flash", "dca"]
    values = {tuple(r.key.values()): r.value for r in records}
    assert all(v["fastest"] <= v["seconds"] <= v["slowest"] for v in values.values())
    assert all(v["trials"] == 2 for v in values.values())
    # The matrix of logits, 4 heads of 512 x 512 float32, is the dense attention's alone.
    planned = {name: values[name, 512]["planned_bytes"] for name in speed.ATTENTIONS}
    assert planned["dense"] > planned["flash"] + 4 * 512 * 512 * 4 / 2
    assert planned["dca"] == pytest.approx(planned["flash"], rel=0.2)
    scores = json.loads((tmp_path / "out/summary.json").read_text())["scores"]
    assert set(scores) == {"dense", "flash", "dca"}
    assert "| attention | 512 |" in done.stdout
    assert (tmp_path / "out/speed.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_noted(folder, tmp_path, monkeypatch):
    model = dca_jax.load(folder, dca=None, dtype="float32").model
    monkeypatch.setattr(speed, "_planned_bytes", lambda program, *arguments: 1)

    def exhausted(model, tokens):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(speed, "last_logits", exhausted)
    with ResultLog(tmp_path, "speed", {}) as log:
        speed.evaluate(model, log, attentions=["dense", "flash"], lengths=[64], trials=1)
        errors = {record.key["attention"]: record.error for record in log.records}
    assert errors["flash"] is None
    assert "RESOURCE_EXHAUSTED" in errors["dense"]
    assert np.isfinite(read_run(tmp_path).records[1].value["tokens_per_second"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attentions": ["linear"]}, "is not one of dense, flash, dca"),
        ({"trials": 0}, "at least one trial"),
        ({"setting": "alibi"}, "method 'alibi' is not known"),
    ],
)
def test_bad_requests_are_refused(folder, tmp_path, options, message):
    model = dca_jax.load(folder, dca=None, dtype="float32").model
    with ResultLog(tmp_path, "speed", {}) as log, pytest.raises(InputError, match=message):
        speed.evaluate(model, log, **({"attentions": ["flash"], "lengths": [64]} | options))
