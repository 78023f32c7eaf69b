"""RULER's sampling: one stream of random numbers, and texts that fit a length.

A sample depends on all earlier samples of the same task, length and seed, and on the search for the
largest size that fits. So everything here draws in the same order as github.com/NVIDIA/RULER's
generators, from Python's Mersenne Twister and NumPy's legacy one, and the samples of a seed are
RULER's own.
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from dca_jax.errors import InputError

TRIES = 20  # of the smallest size, where RULER's generator goes on without end


class NoPlaceError(Exception):
    """A size has fewer places than items to place."""


class Drawn(NamedTuple):
    """A question, the beginning of its answer, and the strings that the answer should contain."""

    question: str
    beginning: str
    expected: list[str]


class Draws:
    """The random numbers of one task and length.

    Attributes:
        seed: seed of both generators, and of each shuffle.
        random: Python's generator.
        legacy: NumPy's legacy generator.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.legacy = np.random.RandomState(seed)

    def shuffle(self, items: list[str]) -> None:
        """Shuffles in place: equally for all lists of one length, regardless of earlier draws."""
        random.Random(self.seed).shuffle(items)

    def places(self, count: int, size: int) -> list[int]:
        """`count` distinct numbers below `size`, ascending.

        Raises:
            NoPlaceError: there are too few.
        """
        if count > size:
            raise NoPlaceError
        return sorted(self.random.sample(range(size), count))

    def letters(self, alphabet: str, count: int) -> str:
        """A word of `count` letters."""
        return "".join(self.random.choices(alphabet, k=count))


class Room(NamedTuple):
    """The maximum length of a sample.

    Attributes:
        length: requested number of tokens of prompt and answer.
        template: tokens of the chat template, as part of the length.
        new_tokens: tokens of the answer, as part of the length.
        count_tokens: function that returns a text's number of tokens, without special ones.
    """

    length: int
    template: int
    new_tokens: int
    count_tokens: Callable[[str], int]

    @property
    def prompt(self) -> int:
        """Maximum tokens of question and beginning."""
        return self.length - self.template - self.new_tokens

    def tokens(self, drawn: Drawn) -> int:
        """Tokens of a sample's question and beginning."""
        return self.count_tokens(drawn.question + drawn.beginning)


def upper_bound(tokens: int, step: int, limit: int) -> int:
    """RULER's upper bound: three times the units that fit, estimated from `step` units."""
    return max(int((limit / (tokens / step)) * 3), step * 2)


def most_units(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The most units from `low` to `high` that fit, by bisection; `low` if none do."""
    found, lowest = None, low
    while low <= high:
        middle = (low + high) // 2
        if fits(middle):
            found, low = middle, middle + 1
        else:
            high = middle - 1
    return lowest if found is None else found


def drawn_until_fitting(
    draw: Callable[[int], Drawn], room: Room, units: int, step: int
) -> Iterator[Drawn]:
    """Yields samples forever; each starts with `units` units, and has `step` fewer until it fits.

    Raises:
        InputError: even the smallest size does not fit.
    """
    while True:
        now, tries, tokens = units, 0, None
        while tries < TRIES:
            try:
                sample = draw(now)
            except NoPlaceError:
                pass
            else:
                tokens = room.tokens(sample)
                if tokens <= room.prompt:
                    yield sample
                    break
            now, tries = (now - step, tries) if now > step else (now, tries + 1)
        else:
            raise too_short(room, tokens)


def too_short(room: Room, tokens: int | None = None) -> InputError:
    """The error for a length that is too short for the smallest prompt, of `tokens` tokens."""
    least = "" if tokens is None else f", {tokens + room.template + room.new_tokens} or more"
    return InputError(
        f"{room.length} tokens have no room for RULER's smallest prompt of this task and its "
        f"answer; give a greater length{least}"
    )
