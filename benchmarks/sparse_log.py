"""What `sparse_quality.py` has read, a line per reading, and its summary by selector."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import machine

from dca_jax.attention.sparse.best import blocks_to_keep
from dca_jax.errors import InputError

BLOCK = 128
DENSE, SKIP = "off", "skip-softmax"


class Cell(NamedTuple):
    """A selector by name, its share, and a text length."""

    tokens: int
    selector: str
    share: float

    @property
    def sparse(self) -> str:
        """Its name for `--sparse`."""
        return DENSE if self.selector == DENSE else f"{self.selector}:{self.share:g}"


class Log:
    """Readings by cell, text and kind: one line each, appended immediately.

    Args:
        facts: facts that hold for all of them; None reads them from the file, which must exist.
    """

    def __init__(self, path: Path, facts: dict[str, Any] | None) -> None:
        self.path, self.rows = path, {}
        if facts is not None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(machine() | facts) + "\n")
        if not path.exists():
            raise InputError(f"{path} does not exist; measure writes it")
        head, *lines = path.read_text().splitlines()
        self.facts = json.loads(head)
        noted = {name: self.facts.get(name) for name in facts or {}}
        if facts is not None and noted != facts:
            raise InputError(f"{path} is of {noted}, and not of {facts}; give another --out")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, row: dict[str, Any]) -> None:
        key = *(row[name] for name in Cell._fields), row["text"], row["kind"]
        self.rows[key] = row

    def add(self, row: dict[str, Any]) -> None:
        """Records a reading."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._take(row)

    def summary(self) -> list[dict[str, Any]]:
        """A row per cell, over the texts that were also read densely."""
        groups: dict[tuple[Cell, str], list[dict[str, Any]]] = {}
        for row in self.rows.values():
            if row["kind"] != "masses":
                cell = Cell(*(row[name] for name in Cell._fields))
                groups.setdefault((cell, row["kind"]), []).append(row)
        found = []
        for (cell, kind), rows in sorted(groups.items(), key=lambda item: item[0]):
            dense = {
                row["text"]: row for row in groups.get((Cell(cell.tokens, DENSE, 1.0), kind), ())
            }
            pairs = [(row, dense[row["text"]]) for row in rows if row["text"] in dense]
            if pairs:
                found.append(_summary(cell, pairs))
        return found


def _summary(cell: Cell, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Pairs a cell's texts with their dense readings."""
    nll, dense = (np.asarray([row["nll"] for row in column]) for column in zip(*pairs, strict=True))
    moved = nll - dense
    error = float(moved.std(ddof=1) / math.sqrt(len(moved))) if len(moved) > 1 else None
    met = np.arange(1, -(-cell.tokens // BLOCK) + 1)
    kept = met if cell.selector == SKIP else blocks_to_keep(cell.share, len(met))
    share = np.minimum(kept, met).sum() / met.sum()
    row: dict[str, Any] = {
        "tokens": cell.tokens,
        "sparse": cell.sparse,
        "share": float(share),
        "texts": len(pairs),
        "perplexity": math.exp(nll.mean()),
        "loss": math.expm1(moved.mean()),
        "error": error,
    }
    if "found" in pairs[0][0]:
        ours, theirs = (
            np.concatenate([row["found"] for row in x]) for x in zip(*pairs, strict=True)
        )
        row |= {"needles": len(ours), "found": float(ours.mean())}
        row |= {"missed": int((theirs & ~ours).sum()), "gained": int((ours & ~theirs).sum())}
        row["answer"] = float(np.mean([row["answers"] for row, _ in pairs]))
    return row
