"""RULER's common words (cwe) and frequent coded words (fwe)."""

import functools
import math
import string
from collections.abc import Iterator, Sequence

import numpy as np

from dca_jax.errors import InputError
from dca_jax.evaluation.ruler.benchmark import CODED_WORDS, COMMON_WORDS
from dca_jax.evaluation.ruler.drawing import (
    Drawn,
    Draws,
    Room,
    drawn_until_fitting,
    most_units,
    too_short,
)

# --- common words ------------------------------------------------------------------------------

COMMON = 10
STEP, SAMPLE = 10, 4096  # words
SMALL = 4096  # tokens; below them words are repeated less often
# Of the list and of the example: how often common and other words come; and the example's words.
REPEATS, EXAMPLE_REPEATS, EXAMPLE_WORDS = (30, 3), (10, 3), 40
SMALL_REPEATS, SMALL_EXAMPLE_REPEATS, SMALL_EXAMPLE_WORDS = (6, 1), (3, 1), 20


def common_words(
    room: Room, draws: Draws, *, words: Sequence[str], more_words: Sequence[str] | None
) -> Iterator[Drawn]:
    """Yields samples: a list of words, ten of which come more often than the others.

    Args:
        words: words for lists.
        more_words: words for longer lists, or None.

    Raises:
        InputError: there are too few words for a list.
    """
    words = list(words)
    draws.shuffle(words)
    draw = functools.partial(_draw_list, room, draws, words, more_words)
    each = room.tokens(draw(SAMPLE)) / SAMPLE
    limit = room.length - room.template
    high = max(int(limit // each) * 2, STEP * 2)
    units = most_units(lambda n: room.tokens(draw(n)) <= room.prompt, STEP, high)
    yield from drawn_until_fitting(draw, room, units, STEP)


def _draw_list(
    room: Room, draws: Draws, words: Sequence[str], more_words: Sequence[str] | None, count: int
) -> Drawn:
    small = room.length < SMALL
    repeats, example_repeats, example_words = (
        (SMALL_REPEATS, SMALL_EXAMPLE_REPEATS, SMALL_EXAMPLE_WORDS)
        if small
        else (REPEATS, EXAMPLE_REPEATS, EXAMPLE_WORDS)
    )
    shown, common = _numbered(draws, words, more_words, example_words, example_repeats)
    example = COMMON_WORDS.question.format(context=shown) + COMMON_WORDS.beginning
    answer = " ".join(f"{n}. {word}" for n, word in enumerate(common, start=1))
    context, expected = _numbered(draws, words, more_words, count, repeats)
    question = COMMON_WORDS.question.format(context=context)
    return Drawn(f"{example} {answer}\n{question}", COMMON_WORDS.beginning, expected)


def _numbered(
    draws: Draws,
    words: Sequence[str],
    more_words: Sequence[str] | None,
    count: int,
    repeats: tuple[int, int],
) -> tuple[str, list[str]]:
    """A numbered list of `count` words, ten of which are more frequent, and those ten."""
    source = words if count <= len(words) else more_words
    if source is None or count > len(source):
        there = len(words) if source is None else len(source)
        raise InputError(
            f"RULER's task cwe looks at a list of {count:,} words for this length, and there are "
            f"{there:,}; give its english_words.json (--data cwe=FILE), or ask for a shorter length"
        )
    drawn = draws.random.sample(source, count)
    common, others = drawn[:COMMON], drawn[COMMON:]
    written = common * repeats[0] + others * repeats[1]
    draws.shuffle(written)
    return " ".join(f"{n}. {word}" for n, word in enumerate(written, start=1)), common


# --- coded words -------------------------------------------------------------------------------

LETTERS, ASKED = 6, 3
ALPHA, ZETA = 2.0, math.pi**2 / 6  # of the distribution, and the zeta function there
TOKENS_A_WORD = 50  # of the length, for each word of the vocabulary
PARTS = 32  # of the length, by which the number of words grows until it is too large


def coded_words(room: Room, draws: Draws) -> Iterator[Drawn]:
    """Yields samples: words of six letters with frequencies of a zeta distribution.

    The most frequent word is dots, which are to be ignored; the next three are the answer.
    """
    limit = room.prompt
    size, step = limit // TOKENS_A_WORD, limit // PARTS
    if size <= ASKED:
        raise too_short(room)
    count = limit // LETTERS
    draw = functools.partial(_draw_coded, draws, _vocabulary(draws, size))
    while room.tokens(draw(count)) < limit:
        count += step
    count -= step
    while True:
        draw, now = functools.partial(_draw_coded, draws, _vocabulary(draws, size)), count
        while room.tokens(drawn := draw(now)) > limit:
            now -= step
            if now <= 0:
                raise too_short(room)
        yield drawn


def _vocabulary(draws: Draws, size: int) -> list[str]:
    alphabet = string.ascii_lowercase
    words = [draws.letters(alphabet, LETTERS) for _ in range(size)]
    different = set(words)
    while len(different) < size:
        different.add(draws.letters(alphabet, LETTERS))
    vocabulary = sorted(different)
    draws.shuffle(vocabulary)
    return ["...", *vocabulary[1:]]


def _draw_coded(draws: Draws, vocabulary: Sequence[str], count: int) -> Drawn:
    ranks = np.arange(1, len(vocabulary) + 1)
    counts = (count * (ranks**-ALPHA) / ZETA).astype(int)
    words = [w for word, often in zip(vocabulary, counts, strict=True) for w in [word] * often]
    draws.shuffle(words)
    question = CODED_WORDS.question.format(context=" ".join(words))
    return Drawn(question, CODED_WORDS.beginning, list(vocabulary[1 : 1 + ASKED]))
