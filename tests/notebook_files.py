"""The notebooks' pairs: each `notebooks/NAME.py`, in jupytext's percent format, and its .ipynb.

    make notebooks

rewrites every .ipynb from its .py, without outputs. jupytext does the same, in both directions, if
you edit the .ipynb (`jupytext --sync notebooks/*.py`).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
CELL = re.compile(r"^# %%(?: \[(markdown)\])?\n", re.MULTILINE)
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def cells(text: str) -> Iterator[tuple[str, str]]:
    """The kind ("code" or "markdown") and the source of each cell of a .py."""
    _, *parts = CELL.split(text)
    for kind, source in zip(parts[::2], parts[1::2], strict=True):
        source = source.strip("\n")
        if kind:
            source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        yield kind or "code", source


def notebook(text: str) -> dict[str, Any]:
    """A .py as a notebook (nbformat 4.5) without outputs."""
    made = []
    for number, (kind, source) in enumerate(cells(text)):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell | {"source": source.splitlines(keepends=True)})
    metadata = {"kernelspec": KERNEL, "jupytext": {"formats": "ipynb,py:percent"}}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def write() -> None:
    for path in FOLDER.glob("*.py"):
        text = json.dumps(notebook(path.read_text(encoding="utf-8")), indent=1, ensure_ascii=False)
        path.with_suffix(".ipynb").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
