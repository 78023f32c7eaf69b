"""Renders files of dialogues and texts to tokens, and counts what is dropped, cut or split."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from dca_jax.errors import InputError
from dca_jax.finetune.rendered import NotRenderedError, Rendered
from dca_jax.finetune.templates import renderer
from dca_jax.finetune.turns import Dialogue, Text
from dca_jax.inference.progress import progress

TOGETHER = 256  # dialogues that are rendered at once
REASONS = 8  # maximum number of a template's own reasons that are counted separately


def render_all(
    name: str,
    dialogues: Sequence[Dialogue | Text],
    tokenizer: Any,
    *,
    template: str = "chat",
    min_tokens: int = 0,
    cut: int | None = None,
) -> tuple[list[Rendered], dict[str, int]]:
    """Renders the dialogues of a file, with a bar on stderr.

    Args:
        name: name for the bar and messages.
        template: as in `templates.renderer`.
        min_tokens: dialogues with fewer tokens are dropped; LongChat's data has no short ones.
        cut: the row length, if rows contain whole dialogues: a longer dialogue is truncated, and a
            longer text is split into several.

    Returns:
        The rendered ones, and the numbers of those "dropped: ...", "cut ..." and "split ...", by
        reason. Dialogues that the template refuses are dropped.

    Raises:
        InputError: as in `templates.renderer`, or if the template renders none of them.
    """
    write = renderer(tokenizer, template)
    kept: list[Rendered] = []
    counts, refused = Counter[str](), Counter[str]()
    first: NotRenderedError | None = None
    with progress(f"rendering {name}", len(dialogues)) as advance:
        for some in _groups(dialogues):
            for dialogue, rendered in zip(some, write(some), strict=True):
                advance(1)
                if isinstance(rendered, NotRenderedError):
                    first = first or rendered
                    reason = rendered.reason.replace("this dialogue", "it")
                    known = reason in refused or len(refused) < REASONS
                    refused[reason if known else "other reasons from the template"] += 1
                    continue
                if len(rendered.tokens) < min_tokens:
                    counts[f"dropped: fewer than {min_tokens} tokens"] += 1
                    continue
                pieces = _fitted(rendered, cut, split=isinstance(dialogue, Text))
                trained = [piece for piece in pieces if piece.trained[1:].any()]
                if not trained:
                    counts["dropped: no token to train on"] += 1
                    continue
                if len(pieces) > 1:
                    counts[f"split into pieces of {cut} tokens"] += 1
                elif len(pieces[0].tokens) < len(rendered.tokens):
                    counts[f"cut after {cut} tokens"] += 1
                kept += trained
    if first is not None and refused.total() == len(dialogues):
        raise InputError(f"{name}: none of its {len(dialogues)} dialogues can be written: {first}")
    return kept, dict(counts) | {f"dropped: {reason}": n for reason, n in refused.items()}


def _groups(dialogues: Sequence[Dialogue | Text]) -> Iterator[list[Dialogue | Text]]:
    rest = iter(dialogues)
    while some := list(islice(rest, TOGETHER)):
        yield some


def _fitted(rendered: Rendered, length: int | None, *, split: bool) -> list[Rendered]:
    """The part that fits rows of `length`: its beginning, or (with `split`) all its pieces."""
    tokens, trained = rendered.tokens, rendered.trained
    if length is None or len(tokens) <= length:
        return [rendered]
    starts = range(0, len(tokens), length) if split else [0]
    pieces = ((tokens[n : n + length], trained[n : n + length]) for n in starts)
    return [Rendered(some.copy(), counted.copy()) for some, counted in pieces]
