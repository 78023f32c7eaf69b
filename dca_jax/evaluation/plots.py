"""The paper's pictures: perplexity by length (Table 1), passkey accuracy by length and depth.

Nothing here touches matplotlib's global state: no pyplot, no style, no backend is set. Colors are
told apart by people with any color vision, and every curve has a marker of its own.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from dca_jax.errors import InputError
from dca_jax.evaluation.passkey import PasskeyGrid

# Okabe and Ito, "Color Universal Design" (2008), without the yellow that white swallows.
COLORS = ("#000000", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#E69F00")
MARKERS = "osD^vPX"
DPI = 150


def plot_perplexity(
    results: Mapping[str, Mapping[int, float]], path: Path, *, trained_length: int
) -> None:
    """Draws perplexity by length of context, one curve a method, and saves it as PNG.

    Args:
        results: for each method, in the order of the legend: {tokens of context: perplexity}.
        path: file to write; it appears when it is whole.
        trained_length: tokens; marked by a line.

    Raises:
        InputError: nothing to draw, more methods than colors, or a value that is no perplexity.
    """
    values = [value for curve in results.values() for value in curve.values()]
    if not values or len(results) > len(COLORS):
        raise InputError(f"expected 1 to {len(COLORS)} methods with values, got {len(results)}")
    if not all(math.isfinite(value) and value >= 1 for value in values):
        raise InputError(f"a perplexity is finite and at least 1, got {values}")
    figure = Figure(figsize=(7, 4.5), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for (method, curve), color, marker in zip(results.items(), COLORS, MARKERS, strict=False):
        lengths = sorted(curve)
        heights = [curve[length] for length in lengths]
        axes.plot(lengths, heights, color=color, marker=marker, linewidth=2, label=method)
    axes.axvline(trained_length, color="gray", linestyle="--", linewidth=1)
    axes.annotate(
        "trained length",
        (trained_length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -12),
        textcoords="offset points",
        color="gray",
        fontsize=8,
    )
    lengths = sorted({length for curve in results.values() for length in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    # Decades alone would leave most of these axes without a number.
    wide = max(values) > 10 * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, axis="y", alpha=0.25)
    axes.set(xlabel="context (tokens)", ylabel="perplexity", title="Perplexity by context length")
    figure.legend(loc="outside right center")
    _save(figure, path)


def plot_passkey(grids: Mapping[str, PasskeyGrid], path: Path, *, trained_length: int) -> None:
    """Draws one heat map of passkey accuracy a method, side by side, and saves them as PNG.

    Args:
        grids: for each method, its grid.
        path: file to write; it appears when it is whole.
        trained_length: tokens; lengths beyond it are marked off by a line.

    Raises:
        InputError: nothing to draw.
    """
    if not grids:
        raise InputError("there is no passkey grid to draw")
    figure = Figure(figsize=(1.5 + 3.8 * len(grids), 4.2), dpi=DPI, layout="constrained")
    all_axes = figure.subplots(1, len(grids), squeeze=False)[0]
    for axes, (method, grid) in zip(all_axes, grids.items(), strict=True):
        image = _heat_map(axes, grid, trained_length)
        axes.set_title(f"{method}: {grid.accuracy.mean():.0%} found")
    all_axes[0].set_ylabel("depth of the key (0: beginning)")
    figure.colorbar(image, ax=list(all_axes), label="accuracy", shrink=0.9)
    _save(figure, path)


def _heat_map(axes: Axes, grid: PasskeyGrid, trained_length: int) -> AxesImage:
    accuracy = grid.accuracy.T  # depth downwards, length to the right, as in the paper
    image = axes.imshow(accuracy, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for row, col in [(r, c) for r in range(accuracy.shape[0]) for c in range(accuracy.shape[1])]:
        color = "black" if accuracy[row, col] > 0.5 else "white"
        text = f"{accuracy[row, col]:.0%}"
        axes.text(col, row, text, ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(grid.lengths)), [f"{length:,}" for length in grid.lengths])
    axes.set_yticks(range(len(grid.depths)), [f"{depth:.2g}" for depth in grid.depths])
    axes.set_xlabel("length (tokens)")
    beyond = [n for n, length in enumerate(grid.lengths) if length > trained_length]
    if beyond and beyond[0] > 0:
        axes.axvline(beyond[0] - 0.5, color="#D55E00", linestyle="--", linewidth=2)
    return image


def _save(figure: Figure, path: Path) -> None:
    """Renders without a display; written aside and renamed, so that it is whole or not there."""
    aside = path.with_name(f".{path.name}.partial")
    FigureCanvasAgg(figure).print_png(aside)
    aside.replace(path)
