"""The report of a study: results.json, report.md and plots of what has been read so far."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

from common import say
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from study_cells import PARTS, ablation, by_interest, every_method
from study_reading import SCORES

from dca_jax.disk import written
from dca_jax.errors import InputError
from dca_jax.evaluation import l_eval, report
from dca_jax.evaluation.intervals import Z, in_per_cent, wilson
from dca_jax.evaluation.plots import COLORS, LINES
from dca_jax.evaluation.results import RUN, Record, Run, read_run, write_json, write_text
from dca_jax.evaluation.tables import Table
from dca_jax.evaluation.tables import tokens as tokens_text

BESIDE = "dca:paper"  # perplexities are compared with this method's, window by window
DRAWN = len(COLORS) * len(LINES)  # maximum number of distinguishable curves in a plot


class Log:
    """Reads or makes study.json, which describes the study and its runs.

    Raises:
        InputError: the folder holds the study of another model, text or device.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.path = out / "study.json"
        now = json.loads(json.dumps(identity))
        if self.path.is_file():
            self._facts = json.loads(self.path.read_text())
            then = self._facts["identity"]
            changed = [name for name in now if then.get(name) != now[name]]
            if changed:
                raise InputError(
                    f"{out} holds a study with another {', '.join(changed)}; give another --out"
                )
        else:
            out.mkdir(parents=True, exist_ok=True)
            self._facts = {"identity": now, "runs": []}
            write_json(self._facts, self.path)

    def add(self, run: Mapping[str, Any]) -> None:
        """Records a run: device, versions, minutes, and the number of cells left."""
        self._facts["runs"].append(dict(run))
        write_json(self._facts, self.path)


def write(out: Path) -> None:
    """Writes the report of a study's folder, and prints its tables.

    Raises:
        InputError: there is no study in it, or nothing has been read.
    """
    path = out / "study.json"
    if not path.is_file():
        raise InputError(f"{out} has no study.json; measure writes it")
    facts = json.loads(path.read_text())
    trained = facts["identity"]["trained_length"]
    found = {part: read_cells(out / part, trained) for part in PARTS}
    cells = {part: runs for part, runs in found.items() if runs}
    if not cells:
        raise InputError(f"{out} has no results yet")
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    rows = [row for runs in cells.values() for row in map(row_of, runs) if row]
    write_json({**facts, "rows": rows}, folder / "results.json")
    tables = [best_table(rows)] if any("accuracy" in row for row in rows) else []
    tables += compared(cells.get("perplexity", []))
    for part, runs in cells.items():
        whole = merged(runs)
        tables += [titled(part, table) for table in report.outcome(whole).tables]
        for group, some in grouped(whole).items():
            for name, draw in report.outcome(some).pictures.items():
                draw(folder / f"{part}-{group}-{name}")
    if (figure := settings_figure(rows, trained)) is not None:
        written(folder / "settings.png", FigureCanvasAgg(figure).print_png)
    text = "\n".join([headline(facts), *(table.markdown() for table in tables)])
    write_text(text, folder / "report.md")
    say(text)
    say(f"wrote {folder}")


def headline(facts: Mapping[str, Any]) -> str:
    """A description of the study for readers."""
    what, last = facts["identity"], facts["runs"][-1] if facts["runs"] else {}
    versions = ", ".join(f"{name} {v}" for name, v in last.get("versions", {}).items())
    texts = ", ".join(what["texts"])
    return (
        f"{what['model']} ({what['trained_length']:,} tokens trained), {what['dtype']}, on "
        f"{what['device']}; texts: {texts}; {versions}; {len(facts['runs'])} runs, "
        f"{sum(run['minutes'] for run in facts['runs']):.0f} minutes.\n"
    )


# --- cells -------------------------------------------------------------------------------------


def read_cells(folder: Path, trained: int) -> list[Run]:
    """A part's cells with a result, by the plan's order of methods, then by length."""
    names = dict.fromkeys([*every_method(trained), *ablation(trained)])
    order = {name: n for n, name in enumerate(names)}
    runs = [read_run(path.parent) for path in folder.rglob(RUN)]
    runs = [run._replace(records=[r for r in run.records if r.value is not None]) for run in runs]
    runs = [run for run in runs if run.records]
    return sorted(runs, key=lambda run: (order.get(method(run), len(order)), length(run)))


def method(run: Run) -> str:
    """The method of a cell."""
    return run.records[0].key["method"]


def length(run: Run) -> int:
    """Tokens of a cell's prompts or windows."""
    return int(run.folder.name)


def row_of(run: Run) -> dict[str, Any]:
    """A cell's figures; of SFiction's questions only those asked in both forms."""
    task = run.records[0].key.get("task", "")
    place = run.folder.parts[-4] if task else run.folder.parts[-3]
    row = {"part": place, "task": task, "method": method(run), "tokens": length(run)}
    row["seconds"] = round(sum(record.seconds for record in run.records), 1)
    if run.task == "perplexity":
        nlls = [record.value["nll"] for record in run.records if record.value]
        return row | {"samples": len(nlls), "nll": mean(nlls), "nll_standard_error": error(nlls)}
    if run.task == "l-eval":
        found = l_eval.outcome(run.settings, run.records, None)
        if not found.scores:
            return {}
        samples = len({record.key["id"] for record in run.records})
        return row | accuracy(found.scores[method(run)][task]["exact_match"] / 100, samples)
    scores = [float(r.value[SCORES[run.task]]) for r in run.records if r.value is not None]
    return row | accuracy(mean(scores), len(scores))


def name_of(row: Mapping[str, Any]) -> str:
    """The task of a cell."""
    return f"{row['part']} {row['task']}".strip()


def accuracy(share: float, samples: int) -> dict[str, Any]:
    """A share with its 95 % interval."""
    low, high = wilson(share, samples)
    return {"accuracy": share, "low": low, "high": high, "samples": samples}


def merged(runs: Sequence[Run]) -> Run:
    """All cells of a part merged into one run."""
    records = [record for run in runs for record in run.records]
    return runs[0]._replace(folder=runs[0].folder.parent, records=records)


def grouped(run: Run) -> dict[str, Run]:
    """Groups of methods for one plot each: DCA with other methods, and DCA's settings."""
    names = list(dict.fromkeys(record.key["method"] for record in run.records))
    methods = [name for name in names if name == BESIDE or not name.startswith("dca:")]
    settings = [name for name in names if name.startswith("dca:")]
    groups = {"methods": methods[:DRAWN], "settings": settings[:DRAWN]}
    return {
        group: run._replace(records=[r for r in run.records if r.key["method"] in some])
        for group, some in groups.items()
        if len(some) > (group == "settings")
    }


# --- tables ------------------------------------------------------------------------------------


def titled(part: str, table: Table) -> Table:
    """The library's table, with the part's name where its title lacks it."""
    return Table(
        title=f"{part}: {table.title}", header=table.header, rows=table.rows, notes=table.notes
    )


def best_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The best method for each task and length, and those not distinguishable from it."""
    cells: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "accuracy" in row:
            cells.setdefault((name_of(row), row["tokens"]), []).append(row)
    shown = []
    for (name, tokens), some in sorted(cells.items()):
        best = max(some, key=lambda row: row["accuracy"])
        alike = [row["method"] for row in some if row is not best and row["high"] >= best["low"]]
        figure = in_per_cent((best["accuracy"], best["samples"]))
        shown.append([name, tokens_text(tokens), best["method"], figure, ", ".join(alike)])
    return Table(
        title="Best by task",
        header=["task", "tokens", "best", "per cent", "not distinguishable from it"],
        rows=shown,
        notes=["Not distinguishable: the 95 % interval overlaps the best one's."],
    )


def compared(runs: Sequence[Run]) -> list[Table]:
    """Perplexity relative to one method's over the same windows, in per cent."""
    nlls = {(method(run), length(run)): by_start(run.records) for run in runs}
    lengths = sorted({n for name, n in nlls if name == BESIDE})
    rows = []
    for name in dict.fromkeys(name for name, _ in nlls if name != BESIDE):
        cells = []
        for n in lengths:
            ours, theirs = nlls.get((name, n), {}), nlls[BESIDE, n]
            moved = [ours[start] - theirs[start] for start in ours if start in theirs]
            cells.append(change(moved))
        rows.append([name, *cells])
    if not lengths or not rows:
        return []
    table = Table(
        title=f"Perplexity relative to {BESIDE} over the same windows (per cent more)",
        header=["method", *map(tokens_text, lengths)],
        rows=rows,
        notes=[
            "After the sign: 1.96 standard errors of the mean over windows. Windows of long texts "
            "overlap, so for the longest it is an underestimate."
        ],
    )
    return [table]


def by_start(records: Iterable[Record]) -> dict[int, float]:
    """Mean NLL of each window."""
    return {r.key["start"]: r.value["nll"] for r in records if r.value is not None}


def change(moved: Sequence[float]) -> str:
    """Relative growth of a perplexity, from the differences of mean NLLs."""
    if not moved:
        return ""
    center = mean(moved)
    if center > 5:
        return f"x {math.exp(min(center, 700)):,.0f}"
    spread = "" if len(moved) < 2 else f" ± {100 * math.exp(center) * Z * error(moved):.1f}"
    return f"{100 * math.expm1(center):+.1f}{spread}"


def mean(values: Sequence[float]) -> float:
    """Mean of at least one value."""
    return math.fsum(values) / len(values)


def error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 of a single value."""
    center, count = mean(values), len(values)
    variance = math.fsum((value - center) ** 2 for value in values) / max(count - 1, 1)
    return math.sqrt(variance / count)


# --- the plot of settings ----------------------------------------------------------------------


def settings_figure(rows: Sequence[Mapping[str, Any]], trained: int) -> Figure | None:
    """Each method's share, with its interval, at the length nearest to 2c; a panel per task."""
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "accuracy" in row:
            panels.setdefault(name_of(row), []).append(row)
    for name, some in panels.items():
        nearest = by_interest([row["tokens"] for row in some], trained)[0]
        panels[name] = [row for row in some if row["tokens"] == nearest]
    if not panels:
        return None
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    heights = [0.8 + 0.2 * max(map(len, some)) for some in batched(panels.values(), columns)]
    figure = Figure(figsize=(1 + 3.6 * columns, sum(heights)), dpi=150, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, height_ratios=heights)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, some) in zip(grid.flat, panels.items(), strict=False):
        draw_panel(axes, f"{name}, {tokens_text(some[0]['tokens'])}", some)
    return figure


def draw_panel(axes: Axes, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws the shares of one task, with DCA's in another color."""
    for place, row in enumerate(rows):
        color = COLORS[4] if row["method"].startswith("dca") else COLORS[0]
        below, above = row["accuracy"] - row["low"], row["high"] - row["accuracy"]
        bars = [[max(below, 0)], [max(above, 0)]]
        axes.errorbar(row["accuracy"], place, xerr=bars, fmt="o", color=color, capsize=2)
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows], fontsize=7)
    axes.set(xlim=(-0.03, 1.03), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(visible=True, axis="x", alpha=0.25)
    axes.set_title(title, fontsize=9)
