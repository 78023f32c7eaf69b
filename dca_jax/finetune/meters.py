"""Reports of a run: a JSON line per update, a progress bar, and optional reporters."""

import json
import math
import os
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dca_jax.config import LlamaConfig, LoraConfig
from dca_jax.disk import append, writing, written
from dca_jax.distributed import is_primary
from dca_jax.errors import InputError
from dca_jax.finetune.settings import Settings
from dca_jax.weights.parameters import count_parameters, lora_parameters

METRICS = "metrics.jsonl"
AVERAGED = 20  # updates over which the bar's speed is averaged

# Dense bfloat16 operations per second and JAX device, from the vendors' specifications. A v7x chip
# is two devices.
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


class Reporter(NamedTuple):
    """A destination for a run's metrics: functions to report a step, and to close it."""

    report: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


def update_flops(
    config: LlamaConfig, lengths: Sequence[int] | np.ndarray, *, lora: LoraConfig | None = None
) -> float:
    """Necessary operations of an update, as counted by MFU (arXiv 2204.02311, appendix B).

    Per token, each weight takes 2 operations in the forward pass and 4 in the backward pass (frozen
    weights with LoRA: 2). Causal attention reads half the text on average, with 4 operations for
    each key, query head and element in the forward pass and twice that in the backward pass.
    Padding and recomputation are not counted.

    Args:
        lengths: number of tokens of each text of the update: its rows, or the dialogues in them if
            they do not attend to each other.
    """
    weights = count_parameters(config, active=True)
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size  # the table of tokens
    adapters = 0
    if lora is not None:
        adapters = sum(math.prod(row.shape(config)) for row in lora_parameters(config, lora))
    of_weights = (6 if lora is None else 4) * weights + 6 * adapters
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    of_texts = np.asarray(lengths, np.float64)
    pairs = float((of_texts**2).sum()) / 2
    return float(of_texts.sum()) * of_weights + 3 * 4 * width * pairs


class Meters:
    """Writes metrics.jsonl, updates the bar, and calls the reporters; use it with `with`.

    Of several processes, only the primary does this. Lines beyond `step`, from updates of a killed
    run after its last checkpoint, are removed, because those updates are repeated.

    Args:
        folder: folder of the run.
        settings: settings of the run; call `check_reports` first.
        step: number of updates already made.
        steps: number of updates of the whole run.

    Raises:
        InputError: a reporter that does not start, or, during the run, a full disk.
    """

    def __init__(self, folder: Path, settings: Settings, *, step: int, steps: int) -> None:
        self.folder, self._step, self._steps = folder, step, steps
        self._peak = PEAKS.get(jax.devices()[0].device_kind)
        chosen = settings.report if is_primary() else ()
        self._reporters = [_started(name, folder, settings, step) for name in chosen]
        self._times = [time.perf_counter()]
        console = Console(stderr=True, quiet=not is_primary())
        columns = (TextColumn("finetuning"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(
            *columns, TimeRemainingColumn(), TextColumn("{task.fields[told]}"), console=console
        )

    def __enter__(self) -> "Meters":
        if is_primary():
            with writing(self.folder / METRICS):
                _cut_after(self.folder / METRICS, self._step)
                self._file = (self.folder / METRICS).open("ab", buffering=0)
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
        for reporter in self._reporters:
            with suppress(OSError):  # of a full disk, which has been said
                reporter.close()
        self._bar.stop()

    def update(self, step: int, metrics: dict[str, float], tokens: int, flops: float) -> None:
        """Reports an update with its number of tokens without padding and its `update_flops`."""
        self._times = [*self._times[-AVERAGED:], time.perf_counter()]
        seconds = self._times[-1] - self._times[-2]
        speed = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        if self._peak is not None:
            speed["mfu"] = flops / seconds / self._peak / jax.device_count()
        memory = _peak_memory()
        if memory is not None:
            speed["peak_memory_gb"] = memory / 1e9
        self._write(step, metrics | speed)
        mean = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        told = [f"loss {metrics['loss']:.4f}", f"{tokens / mean:,.0f} tokens/s"]
        if self._peak is not None:
            share = flops / mean / self._peak / jax.device_count()
            told.append(f"MFU {share:.1%}")
        if memory is not None:
            told.append(f"{memory / 1e9:.1f} GB")
        self._bar.update(self._task, completed=step, told=", ".join(told))

    def evaluation(self, step: int, loss: float) -> None:
        """Reports the loss on held-out dialogues after `step` updates."""
        self._write(step, {"eval_loss": loss})
        self._bar.console.print(f"after {step} updates: held-out loss {loss:.4f}")
        self._times = [time.perf_counter()]

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        self._bar.console.print(message, highlight=False)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        if not is_primary():
            return
        line = json.dumps({"step": step} | metrics).encode() + b"\n"
        append(self._file, line, self.folder / METRICS)
        for reporter in self._reporters:
            with writing(self.folder):
                reporter.report(step, metrics)


def _cut_after(path: Path, step: int) -> None:
    """Removes the lines of later steps and an incomplete line of a killed process.

    The new file is written under a temporary name and renamed. A run that restarts from the
    beginning keeps no lines, because those of step 0 are written again.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if 0 < step >= json.loads(line)["step"]:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    text = "".join(f"{line}\n" for line in kept)
    written(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def _peak_memory() -> int | None:
    """Peak bytes so far of the fullest local device; None if JAX does not know them."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]
    return max(peaks, default=None)


def check_reports(report: tuple[str, ...]) -> None:
    """Raises InputError for a reporter whose package is not installed."""
    for name in report:
        package, _ = _REPORTERS[name]
        if find_spec(package) is None:
            raise InputError(f"report {name} needs {package}: pip install 'dca_jax[{name}]'")


def _started(name: str, folder: Path, settings: Settings, step: int) -> Reporter:
    try:
        with writing(folder):
            return _REPORTERS[name][1](folder, settings, step)
    except InputError:
        raise
    except Exception as error:  # an account or a network problem, outside this program
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"report {name} does not start: {reason}") from error


def _tensorboard(folder: Path, settings: Settings, step: int) -> Reporter:
    from tensorboardX import SummaryWriter

    # Later steps of a killed run are not shown, because they are repeated.
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def report(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Reporter(report, writer.close)


def _wandb(folder: Path, settings: Settings, step: int) -> Reporter:
    """One Weights & Biases run per folder, even if the run is resumed or moved."""
    import wandb  # pyright: ignore[reportMissingImports]

    path, new = folder / "wandb_id.txt", f"{uuid.uuid4().hex}\n"
    if not path.exists():
        written(path, lambda aside: aside.write_text(new, encoding="utf-8"))
    run: Any = wandb.init(
        dir=str(folder),
        project=os.environ.get("WANDB_PROJECT", "dca_jax"),
        name=folder.resolve().name,
        id=path.read_text(encoding="utf-8").strip(),
        resume="allow",
        config=settings.as_yaml(),
        allow_val_change=True,  # for a run that is lengthened
    )

    def report(step: int, metrics: dict[str, float]) -> None:
        # Steps already reported by a killed run are repeated with the same numbers, so they are
        # skipped.
        if step >= run.step:
            run.log(metrics, step=step)

    return Reporter(report, run.finish)


# By name: the package, and the function that creates a reporter from the run's folder, its settings
# and the number of updates already made.
_REPORTERS: dict[str, tuple[str, Callable[[Path, Settings, int], Reporter]]] = {
    "tensorboard": ("tensorboardX", _tensorboard),
    "wandb": ("wandb", _wandb),
}
