"""Published RULER means, shown next to those measured here.

Qwen3's are of the model cards of Qwen3-30B-A3B-Instruct-2507 and Qwen3-235B-A22B-Instruct-2507
(DCA on, 260 samples a length: 13 tasks with 20 each, so each figure carries some two points of
noise); Qwen2.5-1M's of its report (arXiv 2501.15383), as RULER's README has them.
"""

from collections.abc import Mapping
from pathlib import Path

# {model: {setting: {thousands of tokens: mean, per cent}}}
_LENGTHS = (4, 32, 64, 128, 256, 512, 768, 1000)
MEANS: Mapping[str, Mapping[str, Mapping[int, float]]] = {
    "Qwen2.5-7B-Instruct-1M": {
        "report": {4: 96.8, 8: 95.3, 16: 93.0, 32: 91.1, 64: 90.4, 128: 84.4},
    },
    "Qwen2.5-14B-Instruct-1M": {
        "report": {4: 97.5, 8: 97.1, 16: 94.6, 32: 94.9, 64: 94.9, 128: 92.2},
    },
    "Qwen3-30B-A3B": {
        "card, full attention": dict(
            zip(_LENGTHS, (97.1, 92.2, 82.6, 76.9, 66.3, 55.4, 51.5, 50.9), strict=True)
        ),
    },
    "Qwen3-30B-A3B-Instruct-2507": {
        "card, full attention": dict(
            zip(_LENGTHS, (98.0, 97.2, 93.4, 89.1, 82.5, 78.4, 77.6, 72.8), strict=True)
        ),
        "card, sparse attention": dict(
            zip(_LENGTHS, (98.0, 95.1, 93.6, 88.1, 82.9, 80.7, 76.9, 72.2), strict=True)
        ),
    },
    "Qwen3-235B-A22B": {
        "card, full attention": dict(
            zip(_LENGTHS, (97.7, 96.1, 94.2, 88.5, 82.1, 74.4, 71.0, 68.0), strict=True)
        ),
    },
    "Qwen3-235B-A22B-Instruct-2507": {
        "card, full attention": dict(
            zip(_LENGTHS, (98.5, 97.3, 95.8, 93.9, 91.0, 90.9, 84.8, 84.5), strict=True)
        ),
        "card, sparse attention": dict(
            zip(_LENGTHS, (98.5, 97.7, 96.6, 92.8, 90.5, 89.5, 83.6, 82.5), strict=True)
        ),
    },
}


def published(model: str) -> Mapping[str, Mapping[int, float]]:
    """The rows of a model, by its hub id or a folder of that name; empty for other models."""
    names = {part.lower().split("--")[-1] for part in Path(model).parts}
    found = [rows for name, rows in MEANS.items() if name.lower() in names]
    return found[0] if found else {}


def at_length(row: Mapping[int, float], length: int) -> float | None:
    """A row's figure for a length: 128k is from 128,000 to 131,072 tokens."""
    found = [mean for thousands, mean in row.items() if 1000 <= length / thousands <= 1024]
    return found[0] if found else None
