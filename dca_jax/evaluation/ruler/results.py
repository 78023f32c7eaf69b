"""What comes of RULER's samples: a score a task and length, their means, the effective length.

The effective length of a model is the greatest at which its mean over the thirteen tasks is at
least 85.6 %, what Llama2-7B-Chat has at 4k. Every score has a 95 % interval.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dca_jax.evaluation.grids import mean_by
from dca_jax.evaluation.intervals import mean_interval, wilson
from dca_jax.evaluation.needle import THRESHOLD, effective_length
from dca_jax.evaluation.results import Record
from dca_jax.evaluation.ruler.benchmark import TASKS
from dca_jax.evaluation.ruler.published import at_length, published
from dca_jax.evaluation.tables import Outcome, Table, number, tokens


class Score(NamedTuple):
    """A score in per cent, with its 95 % interval and number of samples."""

    mean: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, *cells: tuple[float, int]) -> "Score":
        """Of the mean and number of samples of one task, or of several tasks."""
        mean = sum(mean for mean, _ in cells) / len(cells)
        low, high = wilson(*cells[0]) if len(cells) == 1 else mean_interval(cells)
        samples = sum(samples for _, samples in cells)
        return cls(100 * mean, 100 * low, 100 * high, samples)

    def __str__(self) -> str:
        return f"{self.mean:.1f} ({self.low:.1f} to {self.high:.1f})"


def outcome(
    settings: Mapping[str, Any], records: Sequence[Record], paper_model: str | None
) -> Outcome:
    """A table a method, one of means, and a picture of each task and length."""
    del paper_model  # the paper has no RULER
    cells = mean_by(records, "score", "method", "task", "length")
    methods = list(dict.fromkeys(record.key["method"] for record in records))
    tasks = [task for task in TASKS if any(task == found for _, found, _ in cells)]
    lengths = sorted({length for _, _, length in cells})
    scores = {
        method: {
            task: {
                length: Score.of(cells[method, task, length])
                for length in lengths
                if (method, task, length) in cells
            }
            for task in tasks
        }
        for method in methods
    }
    means = {method: _means(cells, method, tasks, lengths) for method in methods}
    theirs = published(settings["model"])
    tables = [_task_table(method, rows, lengths) for method, rows in scores.items()]
    if records:
        tables.append(_mean_table(means, tasks, lengths, theirs))
    summary = {
        method: {
            "tasks": {task: _by_length(row) for task, row in scores[method].items()},
            "mean": _by_length(means[method]),
            "effective_length": effective_length({n: s.mean for n, s in means[method].items()}),
        }
        for method in methods
    }
    pictures: dict[str, Callable[[Path], None]] = {}
    if records:
        options = {"lengths": lengths, "trained_length": settings["trained_length"]}
        pictures["tasks.png"] = functools.partial(_draw, scores, tasks, **options)
    return Outcome(scores=summary, tables=tables, pictures=pictures)


def _means(
    cells: Mapping[tuple[Any, ...], tuple[float, int]],
    method: str,
    tasks: Sequence[str],
    lengths: Sequence[int],
) -> dict[int, Score]:
    """By length the mean over the tasks, where every task has been asked."""
    found = {}
    for length in lengths:
        keys = [(method, task, length) for task in tasks]
        if all(key in cells for key in keys):
            found[length] = Score.of(*(cells[key] for key in keys))
    return found


def _by_length(row: Mapping[int, Score]) -> dict[str, dict[str, float]]:
    return {str(length): score._asdict() for length, score in row.items()}


def _task_table(
    method: str, rows: Mapping[str, Mapping[int, Score]], lengths: Sequence[int]
) -> Table:
    samples = {score.samples for row in rows.values() for score in row.values()}
    many = f"{min(samples)}" if len(samples) == 1 else f"{min(samples)} to {max(samples)}"
    return Table(
        title=f"RULER by task: {method} (per cent)",
        header=["task", *map(tokens, lengths)],
        rows=[
            [task, *(str(row[n]) if n in row else "" for n in lengths)]
            for task, row in rows.items()
        ],
        notes=[f"In parentheses: the 95 % interval; {many} samples a cell."],
    )


def _mean_table(
    means: Mapping[str, Mapping[int, Score]],
    tasks: Sequence[str],
    lengths: Sequence[int],
    theirs: Mapping[str, Mapping[int, float]],
) -> Table:
    rows = []
    for method, row in means.items():
        reached = effective_length({length: score.mean for length, score in row.items()})
        cells = [str(row[n]) if n in row else "" for n in lengths]
        rows.append([method, "none" if reached is None else tokens(reached), *cells])
    for name, row in theirs.items():
        rows.append([name, "", *(number(at_length(row, n), 1) for n in lengths)])
    whole = len(tasks) == len(TASKS)
    notes = [f"Effective: the greatest length with at least {THRESHOLD}, as RULER has it."]
    if not whole:
        missing = ", ".join(task for task in TASKS if task not in tasks)
        notes.append(f"Not RULER's own mean, which is over 13 tasks: {missing} are missing.")
    if theirs:
        notes.append("Published figures are over all 13 tasks.")
    return Table(
        title=f"RULER, mean over {len(tasks)} of {len(TASKS)} tasks (per cent)",
        header=["method", "effective length", *map(tokens, lengths)],
        rows=rows,
        notes=notes,
    )


def _draw(
    scores: Mapping[str, Mapping[str, Mapping[int, Score]]],
    tasks: Sequence[str],
    path: Path,
    *,
    lengths: Sequence[int],
    trained_length: int,
) -> None:
    from dca_jax.evaluation.plots import plot_tasks  # matplotlib is slow to import

    grids = {}
    for method, rows in scores.items():
        grid = np.full((len(lengths), len(tasks)), np.nan)
        for column, task in enumerate(tasks):
            for line, length in enumerate(lengths):
                if length in rows[task]:
                    grid[line, column] = rows[task][length].mean / 100
        grids[method] = grid
    plot_tasks(grids, path, tasks=tasks, lengths=lengths, trained_length=trained_length)
