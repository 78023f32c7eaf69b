"""How RULER draws its samples: one stream of random numbers, and texts made to fit a length.

A sample depends on all that were drawn before it, of the same task, length and seed: on the search
for the largest size that fits, too. So everything here draws in the order in which
github.com/NVIDIA/RULER's generators do, from Python's Mersenne Twister and NumPy's old one, and
the samples of a seed are RULER's own.
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from dca_jax.errors import InputError

TRIES = 20  # of the smallest size, where RULER's generator goes on without end


class NoPlaceError(Exception):
    """A size at which there are fewer places than there is to put into them."""


class Drawn(NamedTuple):
    """A question with the beginning of its answer, and the strings that the answer should have."""

    question: str
    beginning: str
    expected: list[str]


class Draws:
    """The random numbers of one task and length.

    Attributes:
        seed: of both, and of the shuffles, each of which begins anew.
        random: Python's.
        legacy: NumPy's.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.legacy = np.random.RandomState(seed)

    def shuffle(self, items: list[str]) -> None:
        """Shuffles in place: all lists of one length alike, whatever was drawn before."""
        random.Random(self.seed).shuffle(items)

    def places(self, count: int, size: int) -> list[int]:
        """Different numbers below `size`, rising.

        Raises:
            NoPlaceError: there are not so many.
        """
        if count > size:
            raise NoPlaceError
        return sorted(self.random.sample(range(size), count))

    def letters(self, alphabet: str, count: int) -> str:
        """A word of so many letters."""
        return "".join(self.random.choices(alphabet, k=count))


class Room(NamedTuple):
    """How long a sample may be.

    Attributes:
        length: tokens of prompt and answer, as asked for.
        template: of them, those that a chat template takes.
        new_tokens: and those of the answer.
        count_tokens: of a text, without special tokens.
    """

    length: int
    template: int
    new_tokens: int
    count_tokens: Callable[[str], int]

    @property
    def prompt(self) -> int:
        """Tokens of question and beginning at most."""
        return self.length - self.template - self.new_tokens

    def tokens(self, drawn: Drawn) -> int:
        """Tokens of a sample's question and beginning."""
        return self.count_tokens(drawn.question + drawn.beginning)


def upper_bound(tokens: int, step: int, limit: int) -> int:
    """Where RULER's search begins: three times the units that fit by a sample of `step` units."""
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
    """Samples without end; each begins with `units` units, and has `step` fewer until it fits.

    Raises:
        InputError: not even one of the smallest size fits.
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
    """What to say of a length without room for the smallest prompt, which has so many tokens."""
    least = "" if tokens is None else f", {tokens + room.template + room.new_tokens} or more"
    return InputError(
        f"{room.length} tokens have no room for RULER's smallest prompt of this task and its "
        f"answer; give a greater length{least}"
    )
