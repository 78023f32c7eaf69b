"""Accuracy by method, length and depth, for passkey and needle results."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dca_jax.evaluation.intervals import in_per_cent, wilson
from dca_jax.evaluation.results import Record
from dca_jax.evaluation.tables import Outcome, Table, tokens


class AccuracyGrid(NamedTuple):
    """Accuracy from 0 to 1 by ascending length (tokens) and depth (0 to 1); NaN if unknown."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    accuracy: Float[np.ndarray, "lengths depths"]


def mean_by(
    records: Sequence[Record], score: str, *names: str
) -> dict[tuple[Any, ...], tuple[float, int]]:
    """The mean of a score over the records with equal keys, and their number.

    Args:
        score: name of a number or boolean in the records' values.
        names: names of the keys to group by.
    """
    cells: dict[tuple[Any, ...], list[float]] = {}
    for record in records:
        if record.value is not None:
            cell = tuple(record.key[name] for name in names)
            cells.setdefault(cell, []).append(float(record.value[score]))
    return {cell: (math.fsum(values) / len(values), len(values)) for cell, values in cells.items()}


def accuracy_grid(records: Sequence[Record], score: str) -> AccuracyGrid:
    """One method's records as a grid."""
    cells = mean_by(records, score, "length", "depth")
    lengths = tuple(sorted({length for length, _ in cells}))
    depths = tuple(sorted({depth for _, depth in cells}))
    accuracy = np.full((len(lengths), len(depths)), np.nan)
    for (length, depth), (mean, _) in cells.items():
        accuracy[lengths.index(length), depths.index(depth)] = mean
    return AccuracyGrid(lengths, depths, accuracy)


def accuracy_table(
    records: Sequence[Record],
    score: str,
    *,
    title: str,
    trained_length: int,
    notes: Sequence[str] = (),
    depth: str,
) -> Outcome:
    """Scores, a table of methods by length, a curve, and heat maps if keys have depths.

    Column headers have the requested length and the actual mean number of tokens. Every accuracy
    has a 95 % interval (`dca_jax.evaluation.intervals`).
    """
    means = mean_by(records, score, "method", "length")
    methods = list(dict.fromkeys(record.key["method"] for record in records))
    lengths = sorted({record.key["length"] for record in records})
    measured = mean_by(records, "tokens", "length")
    header = [f"{tokens(n)} ({measured[(n,)][0]:,.0f} tokens)" for n in lengths]
    rows = [
        [method, *(_shown(means.get((method, length))) for length in lengths)] for method in methods
    ]
    scores = {
        method: {
            str(length): accuracy_score(means[method, length])
            for length in lengths
            if (method, length) in means
        }
        for method in methods
    }
    curves = {m: {n: means[m, n][0] for n in lengths if (m, n) in means} for m in methods}
    intervals = {m: {n: wilson(*means[m, n]) for n in curve} for m, curve in curves.items()}

    def draw_curves(path: Path) -> None:
        from dca_jax.evaluation.plots import plot_accuracy  # matplotlib is slow to import

        options = {"trained_length": trained_length, "title": title, "intervals": intervals}
        plot_accuracy(curves, path, **options)

    def draw_grids(path: Path) -> None:
        from dca_jax.evaluation.plots import plot_passkey

        grids = {
            method: accuracy_grid([r for r in records if r.key["method"] == method], score)
            for method in methods
        }
        plot_passkey(grids, path, trained_length=trained_length, depth=depth)

    pictures: Mapping[str, Callable[[Path], None]] = {}
    if records:
        pictures = {"accuracy.png": draw_curves}
        if all("depth" in record.key for record in records):
            pictures |= {"heat_map.png": draw_grids}
    notes = ["In parentheses: the 95 % interval and the number of samples.", *notes]
    table = Table(title=f"{title} (per cent)", header=["method", *header], rows=rows, notes=notes)
    return Outcome(scores=scores, tables=[table] if rows else [], pictures=pictures)


def accuracy_score(cell: tuple[float, int]) -> dict[str, Any]:
    """A mean with its number of samples and 95 % interval, for `summary.json`."""
    mean, samples = cell
    return {"accuracy": mean, "samples": samples, "interval": list(wilson(mean, samples))}


def _shown(cell: tuple[float, int] | None) -> str:
    return "" if cell is None else in_per_cent(cell)
