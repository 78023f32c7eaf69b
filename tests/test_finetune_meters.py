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


def records(path: Path) -> list[Any]:
    """What an offline run of wandb has written: LevelDB's log format, behind seven bytes."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    content, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole, at = whole + content[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole in one piece, or its last one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


@pytest.mark.processes
def test_wandb_itself_takes_what_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline: the id of the folder, its settings, and each step with its numbers."""
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "run"
    output.mkdir()
    with Meters(output, settings(output, report=("wandb",)), step=0, steps=3) as meters:
        for step in (1, 2, 3):
            meters.update(step, {"loss": 1.0 / step, "grad_norm": 1.0}, 8, 1.0)
            meters.evaluation(step, 2.0 / step)
    wandb.teardown()  # its own process has written all
    name = (output / "wandb_id.txt").read_text().strip()
    (path,) = output.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb")
    found = records(path)
    (run,) = (one.run for one in found if one.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.run_id, run.project, run.display_name) == (name, "dca_jax", "run")
    assert config["learning_rate"] == 3e-3
    rows: dict[int, dict[str, Any]] = {}
    for history in (one.history for one in found if one.HasField("history")):
        items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in history.item}
        rows.setdefault(int(items["_step"]), {}).update(items)
    assert {n: row["loss"] for n, row in rows.items()} == {n: 1.0 / n for n in (1, 2, 3)}
    assert {n: row["eval_loss"] for n, row in rows.items()} == {n: 2.0 / n for n in (1, 2, 3)}
