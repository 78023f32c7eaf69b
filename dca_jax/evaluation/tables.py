"""The outcome of a run: scores, tables (Markdown and HTML) and plots."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text.

    Attributes:
        title: a title of one line.
        header: the names of the columns; the first one names the rows.
        rows: the rows, each with a cell per column.
        notes: sentences with notes for readers.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The table in GitHub's Markdown, with right-aligned numbers."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        table = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
        notes = "".join(f"\n- {note}" for note in self.notes)
        return f"### {self.title}\n\n{table}\n" + (f"{notes}\n" if notes else "")

    def html(self) -> str:
        """A `<table>` under its title."""

        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

        rows = "\n".join(line(row, "td") for row in self.rows)
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        return (
            f"<h3>{escape(self.title)}</h3>\n<table>\n{line(self.header, 'th')}\n{rows}\n</table>\n"
            + (f"<ul>{notes}</ul>\n" if notes else "")
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        scores: scores for `summary.json`.
        tables: tables for readers.
        pictures: functions that draw a plot to a path, by file name.
    """

    scores: dict[str, Any]
    tables: Sequence[Table]
    pictures: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)


def task_table(
    title: str,
    tasks: Sequence[str],
    scores: Mapping[str, Mapping[str, float]],
    theirs: Mapping[str, Mapping[Any, float]],
    counts: Mapping[str, Mapping[str, int]],
) -> Table:
    """Scores of methods by task in per cent, next to the paper's, and averages over all tasks.

    Args:
        tasks: tasks in the paper's order; those without results are omitted.
        scores, theirs: {method: {task: score}}; the paper's may lack methods and tasks.
        counts: number of questions for each score.
    """
    asked = [task for task in tasks if any(task in row for row in scores.values())]
    shown = {task for row in theirs.values() for task in row}
    header = ["method"]
    for task in asked:
        header += [task, *(["paper"] if task in shown else [])]
    rows = []
    for method, row in scores.items():
        cells = [method]
        for task in asked:
            cells.append(number(row.get(task)))
            if task in shown:
                cells.append(number(theirs[method].get(task)))
        for figures in (row, theirs[method]) if shown else (row,):
            whole = all(task in figures for task in asked)
            cells.append(number(sum(figures[t] for t in asked) / len(asked)) if whole else "")
        rows.append(cells)
    header += ["average", *(["paper"] if shown else [])]
    asked_of: dict[str, list[str]] = {}
    for method, row in counts.items():
        said = ", ".join(f"{row[task]} of {task}" for task in asked if task in row)
        asked_of.setdefault(said, []).append(method)
    notes = [f"Questions: {said} ({', '.join(of)})." for said, of in asked_of.items()]
    return Table(title=title, header=header, rows=rows, notes=notes)


def number(value: float | None, digits: int = 2) -> str:
    """A figure as printed; empty for None."""
    return "" if value is None else f"{value:,.{digits}f}"


def tokens(count: int) -> str:
    """A number of tokens: 4096 is 4k, as in the paper; other numbers are written out."""
    if count >= 1024 and count % 1024 == 0:
        return f"{count // 1024}k"
    return f"{count:,}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
