"""Texts to hide needles in: sentences of your own text, or RULER's noise."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dca_jax.errors import InputError
from dca_jax.evaluation.passkey import FILLER

LONGEST = 60  # maximum words of a unit, for text without full stops
PLACES = np.round(np.linspace(0, 100, 40)) / 100  # where RULER puts needles in essays
ROUNDS = 8  # rounds of tokenizing to find out how much fits; each comes closer


@dataclass(frozen=True)
class Haystack:
    """Pieces of text, repeated as needed, between which needles can be inserted.

    Attributes:
        units: whole sentences, or lines.
        joiner: separator between two of them.
    """

    units: Sequence[str]
    joiner: str

    @classmethod
    def of_text(cls, text: str) -> "Haystack":
        """The sentences of a text, with line breaks and indentation as spaces, as in RULER.

        Raises:
            InputError: a text without words.
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
        """RULER's noise: one line, repeated."""
        return cls([" ".join(FILLER)], "\n")

    def places(self, needles: int, seed: int) -> Callable[[int], list[float]]:
        """A function from the number of units to ascending, distinct depths of needles.

        They are drawn as in RULER: any lines of noise, or some of forty even depths of a text.
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
            needles: needles in order; between sentences, each becomes a sentence.
            depths: ascending depths of the needles, from 0 (beginning) to 1 (end).
        """
        units = list(itertools.islice(itertools.cycle(self.units), count))
        stop = "" if self.joiner == "\n" else "."
        for needle, depth in reversed(list(zip(needles, depths, strict=True))):
            units.insert(int(count * depth), needle.removesuffix(stop) + stop)
        return self.joiner.join(units)


def sentences_of(text: str) -> list[str]:
    """A text split at spaces after full stops, question marks and exclamation marks."""
    return re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"”’)\]])\s+", text)


def largest_fitting(measure: Callable[[int], int], limit: int, first_guess: int) -> int:
    """Nearly the largest number of units whose prompt has at most `limit` tokens.

    Long prompts take seconds to tokenize, so each round extrapolates from the last number of tokens
    per unit, until less than two units of room are left.

    Args:
        measure: function from the number of units to the tokens of the prompt.

    Raises:
        InputError: even the prompt without units does not fit.
    """
    bare = measure(0)
    if bare > limit:
        raise InputError(f"the prompt has at least {bare} tokens, but the limit is {limit}")
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
