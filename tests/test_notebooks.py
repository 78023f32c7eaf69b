"""The notebooks run from top to bottom, at a smaller scale, and their pairs agree."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import notebook_files as notebooks
import numpy as np
import pytest

SCRIPTS = sorted(notebooks.FOLDER.glob("*.py"))
# Numbers of a notebook that are smaller here; each is there once.
SMALLER = {
    "first_steps": {
        "max_new_tokens=40": "max_new_tokens=3",
        "CHARACTERS = 14_000": "CHARACTERS = 3_000",
        "SENTENCES = 600": "SENTENCES = 120",
    },
    "positions_and_attention": {"LENGTH = 4096": "LENGTH = 1024"},
    "finetune_and_compare": {
        "TESTED = 4096": "TESTED = 512",
        "PASSKEYS = [1024, 4096]": "PASSKEYS = [512]",
        "[0.25, 0.75], trials=2": "[0.5], batch=1",
        "MODULES = [argparse, ast, doctest, inspect, mailbox, subprocess, tarfile, typing]": (
            "MODULES = [doctest, mailbox]"
        ),
        "length=2048": "length=256",
        "steps=30": "steps=2",
    },
}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_pair_agrees(path: Path):
    made = notebooks.notebook(path.read_text(encoding="utf-8"))
    kept = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert kept == made, "run `make notebooks`"


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs a notebook's cells beside a link to the demo model; returns its names."""
    (folder / "models").symlink_to(notebooks.FOLDER.parent / "models")
    (folder / "notebooks").mkdir()
    monkeypatch.chdir(folder / "notebooks")
    text = (notebooks.FOLDER / f"{name}.py").read_text(encoding="utf-8")
    for large, small in SMALLER[name].items():
        assert text.count(large) == 1, large
        text = text.replace(large, small)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as readers do
        exec(compile(text, f"{name}.py", "exec"), names := {"__name__": "__main__"})
    plt.close("all")
    return names


@pytest.mark.examples
def test_first_steps(tmp_path, monkeypatch, capsys):
    run("first_steps", tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    with_dca, without = re.findall(r"([\d.]+) with DCA, ([\d.]+) without", printed)[0]
    assert float(with_dca) < 0.7 * float(without)
    with_dca, without = printed.split("without DCA:")
    assert "48213" in with_dca
    assert "48213" not in without
    assert "weights" in without  # of the plan


@pytest.mark.examples
def test_positions_and_attention(tmp_path, monkeypatch, capsys):
    names = run("positions_and_attention", tmp_path, monkeypatch)
    i, j = np.indices(names["phase"].shape)
    drawn = np.where(j > i, np.nan, np.minimum(i // 6 - j // 6, 2))
    np.testing.assert_array_equal(names["phase"], drawn)
    printed = capsys.readouterr().out
    assert "the true one: True" in printed
    differences = [float(x) for x in re.findall(r"largest difference.*: (\S+)", printed)]
    assert len(differences) == 2
    assert max(differences) < 1e-3
    with_dca, without = (float(x) for x in re.findall(r"with .*: ([\d.]+)", printed))
    assert with_dca < 0.6 * without


@pytest.mark.examples
def test_finetune_and_compare(tmp_path, monkeypatch, capsys):
    run("finetune_and_compare", tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    before, after = (float(x) for x in re.findall(r"tokens: ([\d.]+)\n", printed))
    assert after != before
    assert after < 1.2 * before
    assert printed.count("passkeys found in 512 tokens") == 2
