"""What the study of a real model measures: its cells, the most useful first.

A cell is one method with a number of samples of one kind and length. The plan begins with the most
important question (which setting finds a key in twice the trained length?), continues with
perplexity, the ablation that explains the answer, and other prompts and lengths, and ends with
every method on every task. All lengths are fractions or multiples of c, the trained length, so the
plan fits any model.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dca_jax.dca import PRESETS
from dca_jax.evaluation import l_eval, needle
from dca_jax.evaluation.examples import Choice
from dca_jax.inference.methods import METHODS

# Aliases of other methods, and methods that nobody would choose for reading.
LEFT_OUT = ("auto", "none", "dca", "dca-intra", "dca-intra-inter")
QUARTERS = (1, 2, 3, 4)  # of Q + 1, for the chunk length
IN_CONTEXT = "qasper"  # the task of the in-context examples: answers in free words, F1
L_EVAL_FILES = {name: f"{name}.jsonl" for name in l_eval.TASKS}
IN_CONTEXT_FILE = "scientific_qa.jsonl"
PARTS = {  # by folder: its name in `dca_jax.evaluation.report.TASKS`
    "passkey": "passkey",
    "passkey-chat": "passkey",
    "passkey-paper": "passkey",
    "perplexity": "perplexity",
    "needle": "needle",
    "ruler": "ruler",
    "l-eval": "l-eval",
    **{f"few-shot-{choice}": "few-shot" for choice in Choice},
}


class Cell(NamedTuple):
    """One method with `samples` samples of one kind.

    Attributes:
        part: one of `PARTS`.
        task: one of the part's tasks, if it has several; else "".
        method: a name known to `dca_jax.inference.methods`.
        length: maximum tokens of a prompt or window.
        samples: prompts, windows, or questions of a file (at most as many as it has).
    """

    part: str
    task: str
    method: str
    length: int
    samples: int

    @property
    def folder(self) -> Path:
        """Folder of its results, within the study's."""
        name = self.method.replace(":", "-")
        return Path(self.part, *([self.task] if self.task else []), name, str(self.length))

    @property
    def tokens(self) -> int:
        """Approximate number of tokens to read."""
        return self.length * self.samples

    def __str__(self) -> str:
        kind = f"{self.part} {self.task}".rstrip()
        return f"{kind}, {self.method}, {self.length:,} x {self.samples}"


class Extent(NamedTuple):
    """The extent of a study.

    Attributes:
        trained: c, the model's trained length (tokens).
        windows: lengths whose perplexity is measured.
        lengths: lengths of prompts.
        samples, texts: prompts per cell; windows per cell.
        ruler: RULER's tasks for which all files are given.
        methods: methods instead of the plan's own; empty for the plan's.
    """

    trained: int
    windows: Sequence[int]
    lengths: Sequence[int]
    samples: int
    texts: int
    ruler: Sequence[str]
    methods: Sequence[str] = ()


def setting(largest: int, quarters: int = 3, slope: float | None = None) -> str:
    """A DCA setting by name: Q = `largest` - 1, s in quarters of `largest`, a temperature."""
    chunk_len = min(max(quarters * largest // 4, 1), largest - 1)
    return f"dca:{chunk_len},{largest - 1}" + ("" if slope is None else f"@{slope:g}")


def main_methods(trained: int) -> list[str]:
    """First in every part: plain RoPE, the strongest rival, and DCA with three sizes."""
    half, quarter = setting(trained // 2), setting(trained // 4)
    return ["rope", "yarn", "dca:paper", half, quarter, "dca:chunkllama"]


def ablation(trained: int) -> list[str]:
    """Settings that differ in one parameter from the paper's, or from the paper's for c/2."""
    sizes = [setting(trained * eighths // 8) for eighths in (6, 4, 3, 2, 1)]
    strides = [
        setting(largest, quarters)
        for largest in (trained, trained // 2)
        for quarters in QUARTERS
        if (largest, quarters) != (trained, 3)  # the paper's own
    ]
    warm = [f"dca:paper@{slope:g}" for slope in (0.05, 0.1)]
    return [*sizes, *strides, *warm, setting(trained // 2, slope=0.1), "dca:chunkllama@0.05"]


def every_method(trained: int) -> list[str]:
    """All methods of the library, including any added later."""
    presets = [f"dca:{name}" for name in PRESETS]
    named = [name for name in METHODS if name not in LEFT_OUT]
    return list(dict.fromkeys([*main_methods(trained), *presets, *named]))


def plan(extent: Extent) -> list[Cell]:
    """All cells, each once, the most useful first."""
    return list(dict.fromkeys(_cells(extent)))


def _cells(extent: Extent) -> Iterator[Cell]:
    c = extent.trained
    main, more, all_of_them = main_methods(c), ablation(c), every_method(c)
    if extent.methods:
        main = more = all_of_them = list(extent.methods)
    lengths = by_interest(extent.lengths, c)
    first, others = lengths[:1], lengths[1:]
    document = min(l_eval.MAX_LENGTH, max(extent.lengths))

    def asked(
        part: str, methods: Iterable[str], lengths: Iterable[int], tasks: Iterable[str] = ("",)
    ) -> Iterator[Cell]:
        for length in lengths:
            for task in tasks:
                for method in methods:
                    yield Cell(part, task, method, length, extent.samples)

    def read(methods: Iterable[str], windows: Iterable[int]) -> Iterator[Cell]:
        for method in methods:
            for length in sorted(windows):
                yield Cell("perplexity", "", method, length, extent.texts)

    def documents(methods: Sequence[str]) -> Iterator[Cell]:
        yield from asked("l-eval", methods, [document], l_eval.TASKS)
        for choice in (Choice.best, Choice.worst, Choice.random):
            yield from asked(f"few-shot-{choice}", methods, [document], [IN_CONTEXT])

    one, several = list(needle.TASKS)[:1], list(needle.TASKS)[1:]
    yield from asked("passkey", main, first)
    yield from read(main, [n for n in extent.windows if n <= 4 * c])
    yield from asked("passkey", more, first)
    yield from asked("needle", main, first, one)
    yield from asked("passkey-chat", main, first)
    yield from asked("passkey", main, others)
    yield from asked("needle", main, others, one)
    yield from asked("passkey-paper", main, first)
    yield from read(main, extent.windows)
    yield from documents(main)
    yield from asked("needle", main, first, several)
    yield from asked("ruler", main, first, extent.ruler)
    yield from read([*all_of_them, *more], extent.windows)
    yield from asked("passkey", all_of_them, first)
    yield from asked("needle", [*all_of_them, *more], first, one)
    for length in others:
        yield from asked("passkey-chat", main, [length])
        yield from asked("needle", main, [length], several)
        yield from asked("ruler", main, [length], extent.ruler)
    yield from documents(all_of_them)
    for length in lengths:
        yield from asked("passkey", [*all_of_them, *more], [length])
        yield from asked("passkey-chat", all_of_them, [length])
        yield from asked("passkey-paper", all_of_them, [length])
        yield from asked("needle", all_of_them, [length], needle.TASKS)
        yield from asked("ruler", all_of_them, [length], extent.ruler)


def by_interest(lengths: Sequence[int], trained: int) -> list[int]:
    """Lengths sorted by distance from twice the trained length, where methods differ most."""
    return sorted(lengths, key=lambda n: (abs(math.log2(n / (2 * trained))), -n))


def files_of(folder: Path | None) -> dict[str, Path]:
    """The files present in L-Eval's folder, by task name."""
    if folder is None:
        return {}
    named = L_EVAL_FILES | {IN_CONTEXT: IN_CONTEXT_FILE}
    paths = {task: folder / name for task, name in named.items()}
    return {task: path for task, path in paths.items() if path.is_file()}
