"""What comes of a run: scores, tables (as Markdown and HTML) and pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text.

    Attributes:
        title: one line.
        header: the names of the columns; the first one names the rows.
        rows: as many cells each.
        notes: what a reader must know, a sentence each.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """GitHub's Markdown; numbers to the right."""
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
    """What came of a run.

    Attributes:
        scores: for `summary.json`.
        tables: for people.
        pictures: by file name, what draws each to a path.
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
    """Scores (per cent) of methods by task, the paper's beside them, and averages over all tasks.

    Args:
        tasks: in the paper's order; those that nobody was asked are left out.
        scores, theirs: {method: {task: score}}; the paper's may lack methods and tasks.
        counts: the questions that each score is of.
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
    """A figure as it is printed; nothing where there is none."""
    return "" if value is None else f"{value:,.{digits}f}"


def tokens(count: int) -> str:
    """A number of tokens: 4096 is 4k, as in the paper; what is no whole k is written out."""
    if count >= 1024 and count % 1024 == 0:
        return f"{count // 1024}k"
    return f"{count:,}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
