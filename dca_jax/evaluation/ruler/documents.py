"""RULER's questions about documents (qa_1: SQuAD, qa_2: HotpotQA), hidden among others."""

import functools
from collections.abc import Iterator

from dca_jax.evaluation.ruler.benchmark import DOCUMENTS
from dca_jax.evaluation.ruler.drawing import (
    Drawn,
    Draws,
    NoPlaceError,
    Room,
    drawn_until_fitting,
    most_units,
    upper_bound,
)
from dca_jax.evaluation.ruler.sources import Questions

STEP = 10  # documents
ONE = "Document {number}:\n{text}"


def samples(room: Room, draws: Draws, questions: Questions) -> Iterator[Drawn]:
    """Yields a sample for each question in order, with as many documents as fit."""
    first = functools.partial(_draw, draws, questions, 0)
    high = upper_bound(room.tokens(first(STEP)), STEP, room.length - room.template)
    units = most_units(lambda n: room.tokens(first(n)) <= room.prompt, STEP, high)
    for index in range(len(questions.asked)):
        draw = functools.partial(_draw, draws, questions, index)
        yield next(drawn_until_fitting(draw, room, units, STEP))


def _draw(draws: Draws, questions: Questions, index: int, count: int) -> Drawn:
    """A question and `count` documents, including its own.

    Raises:
        NoPlaceError: it has more documents of its own.
    """
    asked, documents = questions.asked[index], questions.documents
    if count >= len(documents):
        repeats = -(-count // len(documents))
        chosen = (documents * repeats)[:count]
    else:
        missing = count - len(asked.own)
        if missing < 0:
            raise NoPlaceError
        if missing > len(asked.near):
            taken = {*asked.own, *asked.near}
            others = [n for n in range(len(documents)) if n not in taken]
            more = draws.random.sample(others, missing - len(asked.near))
            numbers = [*asked.own, *asked.near, *more]
        else:
            numbers = [*asked.own, *draws.random.sample(asked.near, missing)]
        chosen = [documents[n] for n in numbers]
    draws.shuffle(chosen)
    texts = [ONE.format(number=n, text=text) for n, text in enumerate(chosen, start=1)]
    return Drawn(
        DOCUMENTS.question.format(context="\n\n".join(texts), query=asked.question),
        DOCUMENTS.beginning,
        asked.answers,
    )
