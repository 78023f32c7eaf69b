"""Examples for few-shot prompts, chosen from a pool of questions with answers (Table 5).

The paper takes them from a benchmark's training set: at random, or by BM25 between the questions
(Robertson and Zaragoza, 2009), the most similar ("best") or least similar ones ("worst"). BM25
comes from the package `bm25s`, in Lucene's form with k1 = 1.5 and b = 0.75, on lower-case words.
"""

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dca_jax.errors import InputError
from dca_jax.evaluation.benchmark_files import read_json_lines


class Choice(StrEnum):
    """How examples are chosen."""

    random = "random"
    best = "best"
    worst = "worst"


class Example(NamedTuple):
    """A question with its answer, and its identifier in the file."""

    id: str
    query: str
    output: str


def read_pool(path: Path) -> list[Example]:
    """The questions in a file: lines with `query` and `output`, or L-Eval's format.

    An example without an `id` is identified by its line, L-Eval's by line and number of the
    question, both from 0.

    Raises:
        InputError: a file in neither format.
    """
    rows = read_json_lines(path)
    if all("instructions" in row and "outputs" in row for row in rows):
        rows = read_json_lines(path, "instructions", "outputs")
        return [
            Example(f"{n}-{q}", *pair)
            for n, row in enumerate(rows)
            for q, pair in enumerate(zip(row["instructions"], row["outputs"], strict=True))
        ]
    rows = read_json_lines(path, "query", "output")
    return [
        Example(str(row.get("id", n)), row["query"], row["output"]) for n, row in enumerate(rows)
    ]


class Pool:
    """Examples to choose from.

    Args:
        examples: all available examples.
        choice: how they are chosen.

    Raises:
        InputError: bm25s is needed but not installed.
    """

    def __init__(self, examples: Sequence[Example], choice: Choice) -> None:
        self.examples, self.choice = examples, choice
        self._index: Any = None
        if choice is not Choice.random:
            try:
                import bm25s  # of the extra `eval`
            except ImportError:
                raise InputError(
                    f"examples chosen as {choice} need bm25s, which is not installed; "
                    "pip install 'dca_jax[eval]'"
                ) from None
            self._index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
            self._index.index([words(one.query) for one in examples], show_progress=False)

    def choose(self, query: str, answers: Sequence[str], count: int, seed: int) -> list[Example]:
        """Examples for a question in the order of their rank; ties go to the first in the file.

        The question itself is excluded, if the pool has it with one of its answers.

        Args:
            seed: random seed for a random choice.

        Raises:
            InputError: the pool has too few examples.
        """
        order: Sequence[int] | np.ndarray
        if self.choice is Choice.random:
            order = np.random.default_rng(seed).permutation(len(self.examples))
        else:
            # Only words in the pool: without any, all scores are zero.
            scores = self._index.get_scores(words(query)) if words(query) else self._zeros()
            order = np.argsort(-scores if self.choice is Choice.best else scores, kind="stable")
        found = []
        for number in order:
            one = self.examples[int(number)]
            if len(found) < count and not (one.query == query and one.output in answers):
                found.append(one)
        if len(found) < count:
            raise InputError(f"{count} examples are needed, but the pool has only {len(found)}")
        return found

    def _zeros(self) -> np.ndarray:
        return np.zeros((len(self.examples),), np.float32)


def words(text: str) -> list[str]:
    """The words of a question, as BM25 counts them."""
    return re.findall(r"\w+", text.lower())
