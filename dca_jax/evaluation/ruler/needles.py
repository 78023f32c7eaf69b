"""RULER's eight needle tasks (niah_*)."""

import functools
import uuid
from collections.abc import Iterator, Sequence

import numpy as np

from dca_jax.evaluation.ruler.benchmark import HIDDEN, NOISE, NeedleSetting
from dca_jax.evaluation.ruler.drawing import (
    Drawn,
    Draws,
    Room,
    drawn_until_fitting,
    most_units,
    upper_bound,
)
from dca_jax.evaluation.ruler.sources import Essays

DEPTHS = np.round(np.linspace(0, 100, num=40)).astype(int).tolist()  # per cent of the sentences
STEP = {"essays": 500, "noise": 25, "needles": 25}  # words, or lines
SMALL, SMALL_STEP = 4096, 5  # lines, below so many tokens


def samples(
    setting: NeedleSetting,
    room: Room,
    draws: Draws,
    *,
    words: Sequence[str],
    essays: Essays | None,
) -> Iterator[Drawn]:
    """Yields samples, each with as much haystack as fits.

    Args:
        words: words for keys (`dca_jax.evaluation.ruler.sources.KeyWords`).
        essays: the haystack of settings with essays.
    """
    draw = functools.partial(_draw, setting, draws, words, essays)
    small = setting.haystack != "essays" and room.length < SMALL
    step = SMALL_STEP if small else STEP[setting.haystack]
    high = upper_bound(room.tokens(draw(step)), step, room.length - room.template)
    units = most_units(lambda n: room.tokens(draw(n)) <= room.prompt, step, high)
    yield from drawn_until_fitting(draw, room, units, step)


def _draw(
    setting: NeedleSetting,
    draws: Draws,
    words: Sequence[str],
    essays: Essays | None,
    units: int,
) -> Drawn:
    """A sample with this many lines of haystack, or words of essays."""
    keys: list[str] = []
    values: list[list[str]] = []
    needles: list[str] = []
    for _ in range(setting.keys):
        keys.append(_random(setting.key, draws, words))
        values.append([_random(setting.value, draws, words) for _ in range(setting.values)])
        needles += [HIDDEN.format(kind=setting.value, key=keys[-1], value=v) for v in values[-1]]
    draws.shuffle(needles)
    if setting.haystack == "essays":
        assert essays is not None
        context = _between_sentences(essays.sentences(units), needles, draws)
    else:
        lines = [NOISE] * units
        if setting.haystack == "needles":
            lines = [
                HIDDEN.format(
                    kind=setting.value,
                    key=_random(setting.key, draws, words),
                    value=_random(setting.value, draws, words),
                )
                for _ in range(units)
            ]
        places = draws.places(len(needles), units)
        for place, needle in zip(reversed(places), needles, strict=True):
            lines.insert(place, needle)
        context = "\n".join(lines)
    asked = draws.random.sample(range(setting.keys), setting.queries)
    names = [keys[n] for n in asked]
    query = ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]
    expected = [value for n in asked for value in values[n]]
    kind = setting.value.removesuffix("s") if len(expected) == 1 else setting.value
    question, beginning, _ = setting.wording
    return Drawn(
        question.format(kind=kind, context=context, query=query),
        beginning.format(kind=kind, query=query),
        expected,
    )


def _random(kind: str, draws: Draws, words: Sequence[str]) -> str:
    """A number of seven digits, a UUID, or two words."""
    if kind == "numbers":
        return str(draws.random.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(uuid.UUID(int=draws.random.getrandbits(128), version=4))
    return draws.random.choice(words)


def _between_sentences(sentences: Sequence[str], needles: Sequence[str], draws: Draws) -> str:
    """Needles at some of forty even depths of a text."""
    depths = draws.random.sample(DEPTHS, len(needles))
    places = sorted(int(len(sentences) * (depth / 100)) for depth in depths)
    parts, start = [], 0
    for place, needle in zip(places, needles, strict=True):
        parts += [" ".join(sentences[start:place]), needle]
        start = place
    return " ".join([*parts, " ".join(sentences[start:])])
