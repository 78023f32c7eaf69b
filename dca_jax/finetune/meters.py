"""What a run tells: a line of JSON for each update, a progress bar, and reporters if asked for."""

import json
import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dca_jax.config import LlamaConfig, LoraConfig
from dca_jax.distributed import is_primary
from dca_jax.errors import InputError
from dca_jax.weights.parameters import lora_parameters, parameters

METRICS = "metrics.jsonl"
AVERAGED = 20  # updates that the bar's speed is taken over

# Dense bfloat16 operations a second of one device, as JAX counts devices; the makers' figures. A
# v7x chip is two devices.
PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153e12,
}

Report = Callable[[int, dict[str, float]], None]


def update_flops(
    config: LlamaConfig, *, length: int, rows: int, lora: LoraConfig | None = None
) -> float:
    """Operations that an update must do: what MFU counts (arXiv 2204.02311, appendix B).

    Each weight that a token is multiplied with costs 2 in the forward pass and 4 in the backward
    pass, of which LoRA's frozen weights need 2. Causal attention reads half the row on average: 4
    operations for each key, query head and element, thrice. What is computed again is not counted.
    """
    table = [row for row in parameters(config) if "embed_tokens" not in row.path]
    weights = sum(math.prod(row.shape(config)) for row in table)
    if config.tie_word_embeddings:
        weights += config.vocab_size * config.hidden_size
    adapters = 0
    if lora is not None:
        adapters = sum(math.prod(row.shape(config)) for row in lora_parameters(config, lora))
    of_weights = (6 if lora is None else 4) * weights + 6 * adapters
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return rows * length * (of_weights + 3 * 4 * width * length / 2)


class Meters:
    """Writes metrics.jsonl, moves the bar, and tells the reporters; use it with `with`.

    Only the primary of several processes does any of it. Lines beyond `step`, of updates that a
    killed run had made since its last checkpoint, are cut off: they are made again.

    Args:
        folder: of the run.
        step: updates made already. steps: of the whole run.
        flops: of an update, on all devices together.
        report: of `settings.REPORTS`, which `check_reports` has found.
    """

    def __init__(
        self, folder: Path, *, step: int, steps: int, flops: float, report: tuple[str, ...]
    ) -> None:
        self.folder, self._step, self._steps, self._flops = folder, step, steps, flops
        self._peak = PEAKS.get(jax.devices()[0].device_kind)
        chosen = report if is_primary() else ()
        self._reports = [_REPORTERS[name][1](folder) for name in chosen]
        self._times = [time.perf_counter()]
        console = Console(stderr=True, quiet=not is_primary())
        columns = (TextColumn("finetuning"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(
            *columns, TimeRemainingColumn(), TextColumn("{task.fields[told]}"), console=console
        )

    def __enter__(self) -> "Meters":
        if is_primary():
            _cut_after(self.folder / METRICS, self._step)
            self._file = (self.folder / METRICS).open("a", encoding="utf-8")
        self._bar.start()
        self._task = self._bar.add_task(
            "", total=self._steps, completed=self._step, told="compiling"
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if is_primary():
            self._file.close()
        self._bar.stop()

    def update(self, step: int, metrics: dict[str, float], tokens: int) -> None:
        """An update has been made, over so many tokens, padding excluded."""
        self._times = [*self._times[-AVERAGED:], time.perf_counter()]
        seconds = self._times[-1] - self._times[-2]
        speed = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        if self._peak is not None:
            speed["mfu"] = self._flops / seconds / self._peak / jax.device_count()
        memory = _peak_memory()
        if memory is not None:
            speed["peak_memory_gb"] = memory / 1e9
        self._write(step, metrics | speed)
        mean = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        told = [f"loss {metrics['loss']:.4f}", f"{tokens / mean:,.0f} tokens/s"]
        if self._peak is not None:
            share = self._flops / mean / self._peak / jax.device_count()
            told.append(f"MFU {share:.1%}")
        if memory is not None:
            told.append(f"{memory / 1e9:.1f} GB")
        self._bar.update(self._task, completed=step, told=", ".join(told))

    def evaluation(self, step: int, loss: float) -> None:
        """The loss on held-out dialogues after so many updates."""
        self._write(step, {"eval_loss": loss})
        self._bar.console.print(f"after {step} updates: held-out loss {loss:.4f}")
        self._times = [time.perf_counter()]

    def say(self, message: str) -> None:
        """A line above the bar."""
        self._bar.console.print(message, highlight=False)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        if not is_primary():
            return
        try:
            self._file.write(json.dumps({"step": step} | metrics) + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{self.folder / METRICS} cannot be written ({error.strerror}); make room on the "
                "disk, and run the same command again to go on from the last checkpoint"
            ) from None
        for report in self._reports:
            report(step, metrics)


def _cut_after(path: Path, step: int) -> None:
    """Drops the lines of later steps, and a half line of a killed process; aside, then renamed.

    A run that begins again has none: what was noted at step 0 is noted again, too.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if 0 < step >= json.loads(line)["step"]:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    aside.replace(path)


def _peak_memory() -> int | None:
    """Bytes of the fullest local device, at the peak so far; None where JAX does not know."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]
    return max(peaks, default=None)


def check_reports(report: tuple[str, ...]) -> None:
    """Raises InputError for a reporter whose package is not installed."""
    for name in report:
        package, _ = _REPORTERS[name]
        if find_spec(package) is None:
            raise InputError(f"report {name} needs {package}: pip install 'dca_jax[{name}]'")


def _tensorboard(folder: Path) -> Report:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def report(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return report


def _wandb(folder: Path) -> Report:
    import wandb  # pyright: ignore[reportMissingImports]

    run: Any = wandb.init(dir=str(folder), name=folder.name, resume="allow", id=folder.name)
    return lambda step, metrics: run.log(metrics, step=step)


# By name: the package, and what makes the reporter of a run's folder.
_REPORTERS: dict[str, tuple[str, Callable[[Path], Report]]] = {
    "tensorboard": ("tensorboardX", _tensorboard),
    "wandb": ("wandb", _wandb),
}
