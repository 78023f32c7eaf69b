"""Texts to hide things in: sentences of a text of one's own, or RULER's noise."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dca_jax.errors import InputError
from dca_jax.evaluation.passkey import FILLER

LONGEST = 60  # words of a unit: what has no full stops is cut after so many
PLACES = np.round(np.linspace(0, 100, 40)) / 100  # where RULER puts needles in essays
ROUNDS = 8  # prompts tokenized to find out how much fits; each comes closer


@dataclass(frozen=True)
class Haystack:
    """Pieces of text, used over and over, between which something can be put.

    Attributes:
        units: whole sentences, or lines.
        joiner: what stands between two of them.
    """

    units: Sequence[str]
    joiner: str

    @classmethod
    def of_text(cls, text: str) -> "Haystack":
        """The sentences of a text, its line breaks and indentation taken as spaces, as RULER does.

        Raises:
            InputError: a text without a word.
        """
        flat = " ".join(text.split())
        if not flat:
            raise InputError("the haystack is empty; give a text")
        units = [
            " ".join(words[start : start + LONGEST])
            for words in map(str.split, sentences_of(flat))
            for start in range(0, len(words), LONGEST)
        ]
        return cls(units, " ")

    @classmethod
    def noise(cls) -> "Haystack":
        """RULER's: one dull line, again and again."""
        return cls([" ".join(FILLER)], "\n")

    def places(self, needles: int, seed: int) -> Callable[[int], list[float]]:
        """Where needles go, by the number of units: depths that rise, each at another place.

        As RULER draws them: of noise any lines, of a text some of forty even depths.
        """

        def depths(count: int) -> list[float]:
            rng = np.random.default_rng(seed)
            if self.joiner != "\n":
                return np.sort(rng.choice(PLACES, needles, replace=False)).tolist()
            count = max(count, needles)
            before = np.sort(rng.choice(count, needles, replace=False))  # lines before each
            return ((before + 0.5) / count).tolist()

        return depths

    def with_needles(self, count: int, needles: Sequence[str], depths: Sequence[float]) -> str:
        """The first `count` units, with needles between them.

        Args:
            needles: in the order in which they come; between sentences, each is made one.
            depths: of each, from 0 (before all) to 1 (after it), rising.
        """
        units = list(itertools.islice(itertools.cycle(self.units), count))
        stop = "" if self.joiner == "\n" else "."
        for needle, depth in reversed(list(zip(needles, depths, strict=True))):
            units.insert(int(count * depth), needle.removesuffix(stop) + stop)
        return self.joiner.join(units)


def sentences_of(text: str) -> list[str]:
    """A text cut at the spaces after full stops, question and exclamation marks."""
    return re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"”’)\]])\s+", text)


def largest_fitting(measure: Callable[[int], int], limit: int, first_guess: int) -> int:
    """The most units (nearly) whose prompt has at most `limit` tokens.

    Long prompts take seconds to tokenize, so it is not searched one by one: each round goes on from
    the tokens a unit that the last ones had, until less than two units of room are left.

    Args:
        measure: the tokens of the prompt with so many units; grows with them.

    Raises:
        InputError: not even the prompt without any fits.
    """
    bare = measure(0)
    if bare > limit:
        raise InputError(f"the prompt has at least {bare} tokens, and {limit} is the limit")
    fits, too_many, guess = 0, math.inf, max(1, first_guess)
    for _ in range(ROUNDS):
        tokens = measure(guess)
        each = (tokens - bare) / guess
        if tokens <= limit:
            fits = guess
        else:
            too_many = guess
        if too_many - fits <= 1 or limit - 2 * each < tokens <= limit:
            break
        wanted = guess + (limit - tokens) // each
        guess = int(min(max(wanted, fits + 1), too_many - 1))
    return fits
