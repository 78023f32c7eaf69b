"""The paper's figures: curves over lengths (Table 1), heat maps over lengths and depths (Fig. 5).

Nothing here changes matplotlib's global state: pyplot, styles and backends are not used. Colors can
be distinguished with any color vision, and every curve has its own marker.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from dca_jax.disk import written
from dca_jax.errors import InputError

# Okabe and Ito, "Color Universal Design" (2008), without the yellow, which is invisible on white.
COLORS = ("#000000", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#E69F00")
MARKERS = "osD^vPX"
LINES = ("-", "--", ":")  # for more methods than colors
DPI = 150
CELLS = 120  # heat maps of at most this many cells show their figures


@runtime_checkable
class Grid(Protocol):
    """Accuracy (0 to 1; NaN: unknown) by length (tokens) and depth (0 to 1), both ascending."""

    @property
    def lengths(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def depths(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def accuracy(self) -> Float[np.ndarray, "lengths depths"]: ...  # noqa: D102


class Panel(NamedTuple):
    """A heat map: accuracy, from 0 to 1, by length (tokens) and row label."""

    lengths: Sequence[int]
    rows: Sequence[str]
    accuracy: Float[np.ndarray, "lengths rows"]


def plot_perplexity(
    results: Mapping[str, Mapping[int, float]], path: Path, *, trained_length: int
) -> None:
    """Draws perplexity by context length, one curve per method, and saves it as PNG.

    Args:
        results: {tokens of context: perplexity} for each method, in the order of the legend.
        path: file to write, atomically.
        trained_length: trained length in tokens, marked by a line.

    Raises:
        InputError: there is nothing to draw, there are more methods than line styles, or a value
            is not a perplexity.
    """
    values = [value for curve in results.values() for value in curve.values()]
    if not all(math.isfinite(value) and value >= 1 for value in values):
        raise InputError(f"a perplexity is finite and at least 1, got {values}")
    figure, axes = _curves(results, trained_length)
    axes.set_yscale("log")
    # With ticks at powers of ten only, most of these axes would have no label.
    wide = max(values) > 10 * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(ylabel="perplexity", title="Perplexity by context length")
    _save(figure, path)


def plot_accuracy(
    results: Mapping[str, Mapping[int, float]],
    path: Path,
    *,
    trained_length: int,
    title: str,
    ylabel: str = "accuracy",
    intervals: Mapping[str, Mapping[int, tuple[float, float]]] | None = None,
) -> None:
    """Draws accuracy (0 to 1) by length of the text, one curve per method, and saves it as PNG.

    Args:
        results, path, trained_length: as in `plot_perplexity`.
        intervals: {tokens of the text: (lowest, highest)} for each method, drawn as bars.

    Raises:
        InputError: as in `plot_perplexity`.
    """
    figure, axes = _curves(results, trained_length)
    for line, (method, curve) in zip(axes.lines, results.items(), strict=False):
        if intervals is not None:
            _draw_intervals(axes, curve, intervals[method], line.get_color())
    axes.set(ylim=(-0.03, 1.03), ylabel=ylabel, title=title)
    _save(figure, path)


def plot_passkey(
    grids: Mapping[str, Grid], path: Path, *, trained_length: int, depth: str = "depth of the key"
) -> None:
    """Draws heat maps of accuracy side by side, one per method, and saves them as PNG.

    Args:
        grids: the grid of each method.
        path: file to write, atomically.
        trained_length: trained length in tokens; a line separates longer lengths.
        depth: label of the vertical axis.

    Raises:
        InputError: there is nothing to draw.
    """
    if not grids:
        raise InputError("there is no passkey grid to draw")
    panels = {
        method: Panel(grid.lengths, [f"{depth:.2g}" for depth in grid.depths], grid.accuracy)
        for method, grid in grids.items()
    }
    _heat_maps(panels, path, trained_length=trained_length, rows=f"{depth} (0: beginning)")


def plot_tasks(
    grids: Mapping[str, Float[np.ndarray, "lengths tasks"]],
    path: Path,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    trained_length: int,
) -> None:
    """Draws a heat map of scores (0 to 1; NaN: unknown) by task and length for each method.

    Args:
        grids: the scores of each method.
        path: file to write, atomically.
        tasks: task names from top to bottom.
        lengths: lengths in tokens, ascending.
        trained_length: trained length in tokens; a line separates longer lengths.

    Raises:
        InputError: there is nothing to draw.
    """
    if not grids:
        raise InputError("there is no score to draw")
    panels = {method: Panel(lengths, tasks, grid) for method, grid in grids.items()}
    _heat_maps(panels, path, trained_length=trained_length, rows="")


def plot_speed(
    milliseconds: Mapping[str, Mapping[int, float]],
    gigabytes: Mapping[str, Mapping[int, float]],
    path: Path,
) -> None:
    """Draws time and memory by length side by side, one curve per attention (Figure 3).

    Args:
        milliseconds, gigabytes: {tokens of the prompt: positive figure} for each attention.
        path: file to write, atomically.

    Raises:
        InputError: there is nothing to draw.
    """
    if not any(milliseconds.values()):
        raise InputError("there is no time to draw")
    figure = Figure(figsize=(10, 4), dpi=DPI, layout="constrained")
    panels = zip(
        figure.subplots(1, 2), (milliseconds, gigabytes), ("time (ms)", "memory (GB)"), strict=True
    )
    for axes, curves, label in panels:
        for (name, curve), color, marker in zip(curves.items(), COLORS, MARKERS, strict=False):
            lengths = sorted(curve)
            heights = [curve[length] for length in lengths]
            axes.plot(lengths, heights, color=color, marker=marker, linewidth=2, label=name)
        axes.set_xscale("log", base=2)
        lengths = sorted({length for curve in curves.values() for length in curve})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yscale("log")
        axes.grid(visible=True, axis="y", alpha=0.25)
        axes.set(xlabel="prompt (tokens)", ylabel=label)
    figure.axes[0].legend()
    _save(figure, path)


def _curves(results: Mapping[str, Mapping[int, float]], trained_length: int) -> tuple[Figure, Axes]:
    """Curves over a logarithmic axis of lengths, with a legend beside them."""
    styles = [(line, color) for line in LINES for color in COLORS]
    if not any(results.values()) or len(results) > len(styles):
        raise InputError(f"expected 1 to {len(styles)} methods with values, got {len(results)}")
    figure = Figure(figsize=(7, 4.5), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    markers = itertools.cycle(MARKERS)
    for (method, curve), (line, color), marker in zip(
        results.items(), styles, markers, strict=False
    ):
        lengths = sorted(curve)
        heights = [curve[length] for length in lengths]
        axes.plot(lengths, heights, line, color=color, marker=marker, linewidth=2, label=method)
    axes.axvline(trained_length, color="gray", linestyle="--", linewidth=1)
    axes.annotate(
        "trained length",
        (trained_length, 0.5),  # the curves begin above or below
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        rotation=90,
        va="center",
        color="gray",
        fontsize=8,
    )
    lengths = sorted({length for curve in results.values() for length in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    if len(lengths) > 8:
        axes.tick_params(axis="x", labelrotation=45)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(visible=True, axis="y", alpha=0.25)
    axes.set_xlabel("context (tokens)")
    figure.legend(loc="outside right center", handlelength=4)  # long enough to show dashes
    return figure, axes


def _draw_intervals(
    axes: Axes,
    curve: Mapping[int, float],
    intervals: Mapping[int, tuple[float, float]],
    color: Any,
) -> None:
    lengths = sorted(curve)
    below = [max(curve[n] - intervals[n][0], 0.0) for n in lengths]
    above = [max(intervals[n][1] - curve[n], 0.0) for n in lengths]
    heights = [curve[n] for n in lengths]
    style = {"fmt": "none", "ecolor": color, "elinewidth": 1, "capsize": 3, "alpha": 0.6}
    axes.errorbar(lengths, heights, yerr=[below, above], **style)


def _heat_maps(panels: Mapping[str, Panel], path: Path, *, trained_length: int, rows: str) -> None:
    """One heat map per method, side by side; `rows` is the label of the vertical axes."""
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    size = (1.5 + 3.8 * columns, 0.4 + 3.8 * lines)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    all_axes = figure.subplots(lines, columns, squeeze=False)
    for axes in all_axes.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (method, panel) in zip(all_axes.flat, panels.items(), strict=False):
        image = _heat_map(axes, panel, trained_length)
        mean = panel.accuracy.mean()  # not a number if a cell is missing: no mean to compare
        axes.set_title(method if np.isnan(mean) else f"{method}: {mean:.0%} found")
    for axes in all_axes[:, 0]:
        axes.set_ylabel(rows)
    figure.colorbar(image, ax=list(all_axes.flat), label="accuracy", shrink=0.9)
    _save(figure, path)


def _heat_map(axes: Axes, grid: Panel, trained_length: int) -> AxesImage:
    accuracy = grid.accuracy.T  # depth downwards, length to the right, as in the paper
    image = axes.imshow(accuracy, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    if accuracy.size <= CELLS:
        for row, col in np.argwhere(~np.isnan(accuracy)):
            color = "black" if accuracy[row, col] > 0.5 else "white"
            text = f"{accuracy[row, col]:.0%}"
            axes.text(col, row, text, ha="center", va="center", color=color, fontsize=8)
    crowded = len(grid.lengths) > 6
    labels = [f"{length:,}" for length in grid.lengths]
    axes.set_xticks(range(len(labels)), labels, rotation=45 if crowded else 0)
    axes.set_yticks(range(len(grid.rows)), grid.rows)
    axes.set_xlabel("length (tokens)")
    beyond = [n for n, length in enumerate(grid.lengths) if length > trained_length]
    if beyond and beyond[0] > 0:
        axes.axvline(beyond[0] - 0.5, color="#D55E00", linestyle="--", linewidth=2)
    return image


def _save(figure: Figure, path: Path) -> None:
    """Renders without a display, and writes the file atomically."""
    written(path, FigureCanvasAgg(figure).print_png)
