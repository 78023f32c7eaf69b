"""What a run tells: its file of metrics on a full disk, and Weights & Biases."""

import json
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dca_jax.errors import InputError
from dca_jax.finetune.meters import Meters
from dca_jax.finetune.settings import DataFile, Settings


def settings(output: Path, **changes: Any) -> Settings:
    data = (DataFile("dialogues.json"),)
    return Settings(model="m", output=str(output), data=data, learning_rate=3e-3, **changes)


def test_a_full_disk_under_the_metrics_is_said_and_leaves_them_whole(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    line = {"loss": 1.0, "grad_norm": 1.0}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (0, 1):
        with (
            pytest.raises(InputError, match=r"metrics\.jsonl cannot be written: File too large"),
            Meters(tmp_path, chosen, step=step, steps=9) as meters,
        ):
            meters.update(step + 1, line, 8, 1.0)
            size = (tmp_path / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, limits[1]))
            try:
                meters.update(step + 2, line, 8, 1.0)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with Meters(tmp_path, chosen, step=2, steps=9) as meters:
        meters.update(3, line, 8, 1.0)
    noted = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in noted] == [1, 2, 3]


def test_wandb_has_one_run_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folders of one name are two runs there, and a resumed one tells nothing twice."""
    logged: dict[str, dict[int, dict[str, float]]] = {}

    class Run:
        def __init__(self, name: str) -> None:
            self.rows = logged.setdefault(name, {})
            self.step = max(self.rows, default=-1) + 1  # as wandb's, of a run that is resumed

        def log(self, metrics: dict[str, float], step: int) -> None:
            assert step >= self.step, "wandb would drop it, and warn"
            self.step = step
            self.rows.setdefault(step, {}).update(metrics)

        def finish(self) -> None:
            pass

    asked: list[dict[str, Any]] = []

    def init(**options: Any) -> Run:
        asked.append(options)
        return Run(options["id"])

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))  # pyright: ignore
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for folder, begin, end in (("a/run", 0, 7), ("b/run", 0, 2), ("a/run", 4, 9)):  # killed at 7
        output = tmp_path / folder
        output.mkdir(parents=True, exist_ok=True)
        chosen = settings(output, report=("wandb",))
        with Meters(output, chosen, step=begin, steps=9) as meters:
            for step in range(begin + 1, end + 1):
                meters.update(step, {"loss": 1.0 / step, "grad_norm": 1.0}, 8, 1.0)
                if step == 5:
                    meters.evaluation(step, 2.0)
    assert asked[0]["id"] == asked[2]["id"] != asked[1]["id"]
    assert asked[0]["project"] == "dca_jax"
    assert (asked[0]["name"], asked[0]["config"]["learning_rate"]) == ("run", 3e-3)
    rows = logged[asked[0]["id"]]
    assert [row["loss"] for row in rows.values()] == [1.0 / step for step in range(1, 10)]
    assert rows[5]["eval_loss"] == 2.0
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    with pytest.raises(InputError, match="report wandb does not start"):
        Meters(output, chosen, step=0, steps=9)
