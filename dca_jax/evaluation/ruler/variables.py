"""RULER's variable tracking (vt): a chain of assignments in noise, after a worked example."""

import functools
import itertools
import string
from collections.abc import Iterator

from dca_jax.evaluation.ruler.benchmark import NOISE, VARIABLES
from dca_jax.evaluation.ruler.drawing import (
    Drawn,
    Draws,
    Room,
    drawn_until_fitting,
    most_units,
    upper_bound,
)

HOPS = 4
LETTERS, EXAMPLE_LETTERS = 5, 3  # of a name
EXAMPLE_VALUE = "12345"
EXAMPLE_TOKENS, EXAMPLE_STEP = 500, 5
STEP, SMALL, SMALL_STEP = 10, 4096, 5


def samples(room: Room, draws: Draws) -> Iterator[Drawn]:
    """Yields samples, each after the same worked example with other names and another number."""
    example = _example(room, draws)
    taken = room.count_tokens(example)
    step = SMALL_STEP if room.length < SMALL else STEP
    draw = functools.partial(_draw, draws, LETTERS)
    high = upper_bound(room.tokens(draw(step)), step, room.length - room.template)
    units = most_units(lambda n: room.tokens(draw(n)) + taken <= room.prompt, step, high)

    def draw_with_example(lines: int) -> Drawn:
        drawn = draw(lines)
        return drawn._replace(question=_renamed(example, draws) + "\n" + drawn.question)

    yield from drawn_until_fitting(draw_with_example, room, units, step)


def _draw(draws: Draws, letters: int, lines: int) -> Drawn:
    """A chain in this many lines of noise."""
    names: list[str] = []
    while len(set(names)) <= HOPS:  # once, as a rule; RULER's generator stops where names are alike
        names = [draws.letters(string.ascii_uppercase, letters) for _ in range(HOPS + 1)]
    example = letters == EXAMPLE_LETTERS
    value = EXAMPLE_VALUE if example else str(draws.legacy.randint(10_000, 99_999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {last} " for last, name in itertools.pairwise(names)]
    context = [NOISE] * lines
    places = draws.places(len(chain), lines)
    for before, (place, assignment) in enumerate(zip(places, chain, strict=True)):
        context.insert(place + before, assignment)
    return Drawn(
        VARIABLES.question.format(context="\n".join(context), query=value),
        VARIABLES.beginning.format(count=len(names), query=value),
        names,
    )


def _example(room: Room, draws: Draws) -> str:
    """The worked example with its answer, of at most 500 tokens.

    If the smallest example has more tokens, RULER's generator never ends; here it is used anyway.
    """
    room = room._replace(length=EXAMPLE_TOKENS, new_tokens=0)
    draw = functools.partial(_draw, draws, EXAMPLE_LETTERS)
    drawn = draw(EXAMPLE_STEP)
    if room.tokens(drawn) <= room.prompt:
        high = upper_bound(room.tokens(drawn), EXAMPLE_STEP, room.prompt)
        units = most_units(lambda n: room.tokens(draw(n)) <= room.prompt, EXAMPLE_STEP, high)
        drawn = next(drawn_until_fitting(draw, room, units, EXAMPLE_STEP))
    return f"{drawn.question}{drawn.beginning} {' '.join(drawn.expected)}\n"


def _renamed(example: str, draws: Draws) -> str:
    """The example with other names for its variables, and another number."""
    for name in example.split()[-HOPS - 1 :]:
        new = draws.letters(string.ascii_uppercase, len(name))
        example = example.replace(name, new)
    return example.replace(EXAMPLE_VALUE, str(draws.legacy.randint(10_000, 99_999)))
