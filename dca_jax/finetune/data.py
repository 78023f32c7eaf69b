"""Rendered dialogues as rows of one length, for ever, from any point on.

The stream of rows is a function of the dialogues, their weights, the seed and the place in it;
neither of the mesh nor of the number of processes. Every process builds the same rows.
"""

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from dca_jax.errors import InputError
from dca_jax.finetune.dialogues import Dialogue
from dca_jax.finetune.templates import Rendered, renderer
from dca_jax.inference.progress import progress

Rows = dict[str, np.ndarray]
"""`tokens` int32 and `trained` bool [batch, length], and `lengths` int32 [batch]: tokens of a row
without its padding. `trained[b, p]` says that token p of row b is a target; never at p = 0."""


@dataclass(frozen=True, eq=False)
class Source:
    """Dialogues of one origin.

    Attributes:
        name: for messages.
        dialogues: rendered, none of them empty.
        weight: how many times each of them is seen in an epoch, on average: 2 is twice, 0.5 every
            second one, the others in the next epoch. So a source's part of a mixture is its weight
            times its size.
    """

    name: str
    dialogues: list[Rendered]
    weight: float = 1.0


def render_all(
    name: str,
    dialogues: Sequence[Dialogue],
    tokenizer: Any,
    *,
    template: str = "chat",
    min_tokens: int = 0,
    cut: int | None = None,
) -> tuple[list[Rendered], dict[str, int]]:
    """Renders the dialogues of a file, with a bar on stderr.

    Args:
        name: for the bar and messages.
        template: as for `templates.renderer`.
        min_tokens: dialogues with fewer are dropped; LongChat's data had none that were short.
        cut: the length of a row, if each row holds one dialogue: what is longer loses its end.

    Returns:
        Those kept; and how many were "dropped: ..." and "cut: ...", by reason.

    Raises:
        InputError: as `templates.renderer` does, with the beginning of the dialogue in question.
    """
    write = renderer(tokenizer, template)
    kept, counts = [], Counter[str]()
    with progress(f"rendering {name}", len(dialogues)) as advance:
        for dialogue in dialogues:
            try:
                rendered = write(dialogue)
            except InputError as error:
                start = dialogue.turns[0].text[:60] if dialogue.turns else ""
                raise InputError(f"{name}: the dialogue {start!r}...: {error}") from None
            advance(1)
            length = len(rendered.tokens)
            if length < min_tokens:
                counts[f"dropped: fewer than {min_tokens} tokens"] += 1
                continue
            if cut is not None and length > cut:
                rendered = Rendered(rendered.tokens[:cut].copy(), rendered.trained[:cut].copy())
            if not rendered.trained[1:].any():
                counts["dropped: no token to train on"] += 1
                continue
            if len(rendered.tokens) < length:
                counts[f"cut: the end, beyond {cut} tokens"] += 1
            kept.append(rendered)
    return kept, dict(counts)


def training_rows(
    sources: Sequence[Source], *, length: int, batch: int, seed: int, pack: bool, pad_id: int
) -> grain.IterDataset:
    """Batches of rows (`Rows`), for ever.

    An epoch holds every dialogue `weight` times, all sources shuffled together, each epoch anew.
    An iterator's `get_state` is four small numbers, so JSON can hold it; an iterator over the same
    sources given it by `set_state` goes on with the very next row.

    Args:
        length: tokens of a row.
        batch: rows of a batch, of all devices and processes together.
        pack: dialogues one after the other, cut every `length` tokens wherever that is, as in the
            paper; across epochs too, so no token is lost or seen twice. A row's first token
            cannot be a target. If False a row is one dialogue: longer ones lose their end.
        pad_id: what fills rows up, if not packed.

    Raises:
        InputError: a length, batch, seed or weight that makes no sense; no dialogues, or empty
            ones.
    """
    _check(sources, length)
    if batch < 1 or seed < 0:
        raise InputError(f"expected a batch of at least 1 and a seed from 0, got {batch}, {seed}")
    return _Rows(sources, length=length, seed=seed, pack=pack, pad_id=pad_id).batch(batch)


def rows_per_epoch(sources: Sequence[Source], *, length: int, pack: bool) -> int:
    """Rows of an epoch, on average; rounded up."""
    _check(sources, length)
    total = Fraction(0)
    for source in sources:
        sizes = (len(dialogue.tokens) for dialogue in source.dialogues)
        rows = Fraction(sum(sizes), length) if pack else Fraction(len(source.dialogues))
        total += _exact(source.weight) * rows
    return math.ceil(total)


def evaluation_rows(
    dialogues: Sequence[Rendered], *, length: int, batch: int, pad_id: int
) -> list[Rows]:
    """Every dialogue once, in order, one a row, cut at `length`.

    The last batch is filled up with rows of one token, on which nothing is trained.
    """
    _check([Source("evaluation", list(dialogues))], length)
    nothing = Rendered(np.full(1, pad_id, np.int32), np.zeros(1, np.bool_))
    whole = [*dialogues, *[nothing] * (-len(dialogues) % batch)]
    rows = [_padded(dialogue, length, pad_id) for dialogue in whole]
    groups = (rows[first : first + batch] for first in range(0, len(rows), batch))
    return [{key: np.stack([row[key] for row in group]) for key in group[0]} for group in groups]


def row(rows: Mapping[str, np.ndarray], index: int) -> Rendered:
    """One row of a batch, without its padding."""
    size = rows["lengths"][index]
    return Rendered(rows["tokens"][index, :size], rows["trained"][index, :size])


class _Rows(grain.IterDataset):
    """Single rows, packed or not.

    grain's ConcatThenSplitIterDataset packs alike, but its state does not survive JSON: it compares
    tuples, and JSON returns lists.
    """

    def __init__(
        self, sources: Sequence[Source], *, length: int, seed: int, pack: bool, pad_id: int
    ) -> None:
        super().__init__()
        self.sources, self.length, self.shuffle_seed = tuple(sources), length, seed
        self.pack, self.pad_id = pack, pad_id
        self.checksum = _checksum(sources, f"{seed} {pack}")

    def __iter__(self) -> "_RowIterator":
        return _RowIterator(self)

    def __str__(self) -> str:
        return f"rows of {self.length} tokens from {', '.join(s.name for s in self.sources)}"


class _RowIterator(grain.DatasetIterator):
    """Where the stream is: in which epoch, at which of its dialogues, at which token of that."""

    def __init__(self, rows: _Rows) -> None:
        super().__init__()
        self._rows = rows
        self._go_to(epoch=0, place=0, token=0)

    def __next__(self) -> dict[str, Any]:
        if not self._rows.pack:
            row = _padded(self._dialogue(), self._rows.length, self._rows.pad_id)
            self._place += 1
            return row
        length = self._rows.length
        tokens, trained = np.zeros(length, np.int32), np.zeros(length, np.bool_)
        filled = 0
        while filled < length:
            dialogue = self._dialogue()
            taken = min(length - filled, len(dialogue.tokens) - self._token)
            piece = slice(self._token, self._token + taken)
            tokens[filled : filled + taken] = dialogue.tokens[piece]
            trained[filled : filled + taken] = dialogue.trained[piece]
            filled += taken
            self._token += taken
            if self._token == len(dialogue.tokens):
                self._place, self._token = self._place + 1, 0
        trained[0] = False
        return {"tokens": tokens, "trained": trained, "lengths": np.int32(length)}

    def get_state(self) -> dict[str, Any]:
        """A place in the stream, and a checksum of what the stream is of."""
        return {
            "epoch": self._epoch,
            "dialogue": self._place,
            "token": self._token,
            "checksum": self._rows.checksum,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place of `get_state`.

        Raises:
            InputError: the state is of a stream of other data.
        """
        if state["checksum"] != self._rows.checksum:
            raise InputError(
                "the data is not what this run began with: its dialogues, template, weights, seed "
                "or packing have changed since. Go on with the old ones, or begin a new run"
            )
        self._go_to(epoch=state["epoch"], place=state["dialogue"], token=state["token"])

    def _dialogue(self) -> Rendered:
        """The one whose turn it is, in the next epoch if this one is over."""
        while self._place == len(self._order):
            self._go_to(epoch=self._epoch + 1, place=0, token=0)
        source, index = self._order[self._place]
        return self._rows.sources[source].dialogues[index]

    def _go_to(self, *, epoch: int, place: int, token: int) -> None:
        self._epoch, self._place, self._token = epoch, place, token
        self._order = _order(self._rows.sources, self._rows.shuffle_seed, epoch)


def _order(sources: Sequence[Source], seed: int, epoch: int) -> Int[np.ndarray, "dialogues 2"]:
    """What an epoch reads: for each place, the number of the source and that of its dialogue.

    A source's dialogues are read in shuffled rounds, of which an epoch takes the next
    weight × size; so at every point none has been seen twice more often than another.
    """
    parts = []
    for number, source in enumerate(sources):
        size = len(source.dialogues)
        first, last = (math.floor(_exact(source.weight) * size * n) for n in (epoch, epoch + 1))
        for turn in range(first // size, -(-last // size)):
            shuffled = np.random.default_rng([seed, number + 1, turn]).permutation(size)
            taken = shuffled[max(first - turn * size, 0) : last - turn * size]
            parts.append(np.stack([np.full_like(taken, number), taken], axis=1))
    everything = np.concatenate([np.zeros((0, 2), np.int64), *parts])
    return np.random.default_rng([seed, 0, epoch]).permutation(everything)


def _padded(dialogue: Rendered, length: int, pad_id: int) -> dict[str, Any]:
    size = min(len(dialogue.tokens), length)
    tokens, trained = np.full(length, pad_id, np.int32), np.zeros(length, np.bool_)
    tokens[:size], trained[:size] = dialogue.tokens[:size], dialogue.trained[:size]
    trained[0] = False
    return {"tokens": tokens, "trained": trained, "lengths": np.int32(size)}


def _exact(weight: float) -> Fraction:
    """0.1 as one tenth, not as the binary number next to it."""
    return Fraction(repr(float(weight)))


def _checksum(sources: Sequence[Source], settings: str) -> int:
    value = zlib.crc32(settings.encode())
    for source in sources:
        value = zlib.crc32(f"{source.weight} {len(source.dialogues)}".encode(), value)
        for dialogue in source.dialogues:
            value = zlib.crc32(f"{len(dialogue.tokens)}".encode(), value)
            value = zlib.crc32(np.ascontiguousarray(dialogue.tokens), value)
            value = zlib.crc32(np.ascontiguousarray(dialogue.trained), value)
    return value


def _check(sources: Sequence[Source], length: int) -> None:
    if length < 2:
        raise InputError(f"a row needs at least 2 tokens, for one to predict; got {length}")
    if not sources:
        raise InputError("there is no data; give at least one file of dialogues")
    for source in sources:
        if not source.dialogues:
            raise InputError(
                f"{source.name}: no dialogue is left of it; see what was dropped, and why"
            )
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise InputError(f"{source.name}: its weight must be above 0, got {source.weight}")
        if any(len(dialogue.tokens) == 0 for dialogue in source.dialogues):
            raise InputError(f"{source.name}: a dialogue has no tokens")
