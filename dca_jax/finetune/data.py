"""An endless stream of fixed-length rows from rendered dialogues, resumable at any point.

The stream depends only on the dialogues, their weights, the seed and the position, not on the mesh
or the number of processes. Every process builds the same rows.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from dca_jax.errors import InputError
from dca_jax.finetune.packing import alike, best_fit, bucket, packed
from dca_jax.finetune.rendered import Rendered

Rows = dict[str, np.ndarray]
"""`tokens` int32 and `trained` bool [batch, width], and `lengths` int32 [batch]: tokens of a row
without its padding. `trained[b, p]` says that token p of row b is a target; never at p = 0. Where
texts of a row do not see each other, also `text_index` int32 [batch, width]: each token's index in
its own text, -1 for padding."""


@dataclass(frozen=True, eq=False)
class Source:
    """Dialogues from one source.

    Attributes:
        name: name for messages.
        dialogues: rendered dialogues, none of them empty.
        weight: average number of times that each is used per epoch: 2 is twice, 0.5 every second
            one, with the others in the next epoch. So a source's share of a mixture is its weight
            times its size.
    """

    name: str
    dialogues: list[Rendered]
    weight: float = 1.0


def training_rows(
    sources: Sequence[Source], *, length: int, batch: int, seed: int, pack: str, pad_id: int
) -> grain.IterDataset:
    """Endless batches of rows (`Rows`).

    An epoch has every dialogue `weight` times, with all sources shuffled together, anew for each
    epoch. An iterator's `get_state` is four small numbers that fit into JSON; with `set_state`, an
    iterator over the same sources continues with the next row.

    Args:
        length: number of tokens per row.
        batch: number of rows per batch, over all devices and processes.
        pack: contents of a row, one of `packing.PACKS`.
            "cut": consecutive dialogues, cut every `length` tokens, as in the paper; also across
            epochs, so no token is lost or repeated. A row's first token cannot be a target.
            "whole": whole dialogues of one epoch, as many as fit (`packing.best_fit`). A token
            attends to everything before it in its row.
            "segments": the same rows, with a `text_index` so that each dialogue attends only to
            itself.
            "none": one dialogue. Batches have similar lengths and are padded to the smallest power
            of two (at most `length`) that holds them.
        pad_id: token id for padding.

    Raises:
        InputError: an invalid length, batch, seed or weight; no dialogues, empty ones, or, unless
            they are cut, ones longer than `length`.
    """
    _check(sources, length, pack)
    if batch < 1 or seed < 0:
        raise InputError(f"expected a batch of at least 1 and a seed from 0, got {batch}, {seed}")

    def stacked(rows: Sequence[dict[str, np.ndarray]]) -> Rows:
        longest = max(len(row["tokens"]) for row in rows)
        return _stacked(rows, bucket(longest, length) if pack == "none" else length, pad_id)

    found = _Rows(sources, length=length, batch=batch, seed=seed, pack=pack)
    return found.batch(batch, batch_fn=stacked)


def longest_row(sources: Sequence[Source], length: int) -> int:
    """Tokens of the longest row with one dialogue per row, padded as in `training_rows`."""
    dialogues = (dialogue for source in sources for dialogue in source.dialogues)
    return bucket(max(len(dialogue.tokens) for dialogue in dialogues), length)


def rows_per_epoch(sources: Sequence[Source], *, length: int, pack: str, seed: int = 0) -> int:
    """Rows per epoch: the average, rounded up; for whole dialogues, those of the first epoch."""
    _check(sources, length, pack)
    if pack in ("whole", "segments"):
        order = _order(sources, seed, 0)
        return len(best_fit(_sizes(sources, order), length))
    total = Fraction(0)
    for source in sources:
        sizes = (len(dialogue.tokens) for dialogue in source.dialogues)
        rows = Fraction(sum(sizes), length) if pack == "cut" else Fraction(len(source.dialogues))
        total += _exact(source.weight) * rows
    return math.ceil(total)


def evaluation_rows(
    dialogues: Sequence[Rendered], *, length: int, batch: int, pad_id: int
) -> list[Rows]:
    """Every dialogue once, one per row, truncated to `length`; longest first, for similar batches.

    The last batch is padded with rows of one token without targets.
    """
    _check([Source("evaluation", list(dialogues))], length, "cut")
    nothing = Rendered(np.full(1, pad_id, np.int32), np.zeros(1, np.bool_))
    longest_first = sorted(dialogues, key=lambda dialogue: -len(dialogue.tokens))
    whole = [*longest_first, *[nothing] * (-len(dialogues) % batch)]
    rows = [_joined([Rendered(d.tokens[:length], d.trained[:length])]) for d in whole]
    groups = (rows[first : first + batch] for first in range(0, len(rows), batch))
    return [
        _stacked(group, bucket(len(group[0]["tokens"]), length), pad_id)  # its first is the longest
        for group in groups
    ]


def row(rows: Mapping[str, np.ndarray], index: int) -> Rendered:
    """One row of a batch, without its padding."""
    size = rows["lengths"][index]
    return Rendered(rows["tokens"][index, :size], rows["trained"][index, :size])


def text_lengths(rows: Rows) -> Int[np.ndarray, " texts"]:
    """Tokens of each text of a batch: its rows, or the separate texts in them."""
    if "text_index" not in rows:
        return rows["lengths"]
    index = rows["text_index"].reshape(-1)
    ends = (index >= 0) & (np.append(index[1:], 0) != index + 1)
    return index[ends] + 1


class _Rows(grain.IterDataset):
    """Single unpadded rows.

    grain's ConcatThenSplitIterDataset does the same, but its state does not survive JSON: it
    compares tuples, and JSON returns lists.
    """

    def __init__(
        self, sources: Sequence[Source], *, length: int, batch: int, seed: int, pack: str
    ) -> None:
        super().__init__()
        self.sources, self.length, self.shuffle_seed = tuple(sources), length, seed
        self.rows_of_batch, self.pack = batch, pack
        self.checksum = _checksum(sources, f"{seed} {pack}")

    def __iter__(self) -> grain.DatasetIterator:
        return _CutRows(self) if self.pack == "cut" else _WholeRows(self)

    def __str__(self) -> str:
        return f"rows of {self.length} tokens from {', '.join(s.name for s in self.sources)}"


class _Place(grain.DatasetIterator):
    """A position in the stream: epoch, dialogue or row, and token."""

    def __init__(self, rows: _Rows) -> None:
        super().__init__()
        self._rows = rows
        self._go_to(epoch=0, place=0, token=0)

    def get_state(self) -> dict[str, Any]:
        """The position in the stream, and a checksum of its data."""
        return {
            "epoch": self._epoch,
            "place": self._place,
            "token": self._token,
            "checksum": self._rows.checksum,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position from `get_state`.

        Raises:
            InputError: the state belongs to a stream of other data.
        """
        if state["checksum"] != self._rows.checksum:
            raise InputError(
                "the data is not what this run began with: its dialogues, template, weights, seed "
                "or packing have changed. Resume with the old ones, or start a new run"
            )
        self._go_to(epoch=state["epoch"], place=state["place"], token=state["token"])

    def _go_to(self, *, epoch: int, place: int, token: int) -> None:
        self._epoch, self._place, self._token = epoch, place, token
        self._order = _order(self._rows.sources, self._rows.shuffle_seed, epoch)

    def _dialogue(self, number: int) -> Rendered:
        """The dialogue at a position in the epoch's order."""
        source, index = self._order[number]
        return self._rows.sources[source].dialogues[index]


class _CutRows(_Place):
    """Consecutive dialogues; a position is a dialogue and a token in it."""

    def __next__(self) -> dict[str, np.ndarray]:
        parts, missing = [], self._rows.length
        while missing:
            while self._place == len(self._order):
                self._go_to(epoch=self._epoch + 1, place=0, token=0)
            dialogue = self._dialogue(self._place)
            piece = slice(self._token, self._token + missing)
            parts.append(Rendered(dialogue.tokens[piece], dialogue.trained[piece]))
            missing -= len(parts[-1].tokens)
            self._token += len(parts[-1].tokens)
            if self._token == len(dialogue.tokens):
                self._place, self._token = self._place + 1, 0
        return _joined(parts)


class _WholeRows(_Place):
    """Rows of whole dialogues; a position is a row in the epoch's list of rows."""

    def __next__(self) -> dict[str, np.ndarray]:
        while self._place == len(self._of_rows):
            self._go_to(epoch=self._epoch + 1, place=0, token=0)
        dialogues = [self._dialogue(number) for number in self._of_rows[self._place]]
        self._place += 1
        found = _joined(dialogues)
        if self._rows.pack == "segments":
            indices = [np.arange(len(dialogue.tokens), dtype=np.int32) for dialogue in dialogues]
            found["text_index"] = np.concatenate(indices)
        return found

    def _go_to(self, *, epoch: int, place: int, token: int) -> None:
        super()._go_to(epoch=epoch, place=place, token=token)
        rows = self._rows
        sizes = _sizes(rows.sources, self._order)
        random = np.random.default_rng([rows.shuffle_seed, 0, epoch, 1])
        if rows.pack == "none":
            before = sum(_taken(source, epoch) for source in rows.sources)
            self._of_rows = [[n] for n in alike(sizes, rows.rows_of_batch, before, random)]
        else:
            self._of_rows = packed(sizes, rows.length, random)


def _joined(parts: Sequence[Rendered]) -> dict[str, np.ndarray]:
    """A row of concatenated dialogues; its first token cannot be a target."""
    tokens = np.concatenate([part.tokens for part in parts])
    trained = np.concatenate([part.trained for part in parts])
    trained[0] = False
    return {"tokens": tokens, "trained": trained}


def _stacked(rows: Sequence[dict[str, np.ndarray]], width: int, pad_id: int) -> Rows:
    """Rows as a batch, padded to `width`."""
    fill = {"tokens": pad_id, "trained": False, "text_index": -1}
    batch = {name: np.full((len(rows), width), fill[name], rows[0][name].dtype) for name in rows[0]}
    for number, row in enumerate(rows):
        for name, values in row.items():
            batch[name][number, : len(values)] = values
    return batch | {"lengths": np.array([len(row["tokens"]) for row in rows], np.int32)}


def _order(sources: Sequence[Source], seed: int, epoch: int) -> Int[np.ndarray, "dialogues 2"]:
    """The order of an epoch: for each position, the numbers of the source and the dialogue.

    A source's dialogues come in shuffled rounds, and an epoch takes the next weight × size of them.
    So at any point no dialogue has been used two times more often than another.
    """
    parts = []
    for number, source in enumerate(sources):
        size = len(source.dialogues)
        first, last = _taken(source, epoch), _taken(source, epoch + 1)
        for turn in range(first // size, -(-last // size)):
            shuffled = np.random.default_rng([seed, number + 1, turn]).permutation(size)
            taken = shuffled[max(first - turn * size, 0) : last - turn * size]
            parts.append(np.stack([np.full_like(taken, number), taken], axis=1))
    everything = np.concatenate([np.zeros((0, 2), np.int64), *parts])
    return np.random.default_rng([seed, 0, epoch]).permutation(everything)


def _taken(source: Source, epochs: int) -> int:
    """Number of dialogues of a source in the first `epochs` epochs."""
    return math.floor(_exact(source.weight) * len(source.dialogues) * epochs)


def _sizes(sources: Sequence[Source], order: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, " n"]:
    """Tokens of the dialogue at each position."""
    sizes = np.zeros(len(order), np.int64)
    for number, source in enumerate(sources):
        here = order[:, 0] == number
        lengths = np.array([len(dialogue.tokens) for dialogue in source.dialogues], np.int64)
        sizes[here] = lengths[order[here, 1]]
    return sizes


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


def _check(sources: Sequence[Source], length: int, pack: str) -> None:
    if length < 2:
        raise InputError(f"a row needs at least 2 tokens, for one to predict; got {length}")
    if not sources:
        raise InputError("there is no data; give at least one file of dialogues")
    for source in sources:
        if not source.dialogues:
            raise InputError(f"{source.name}: no dialogue is left; see which were dropped, and why")
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise InputError(f"{source.name}: its weight must be above 0, got {source.weight}")
        if any(len(dialogue.tokens) == 0 for dialogue in source.dialogues):
            raise InputError(f"{source.name}: a dialogue has no tokens")
        if pack != "cut" and any(len(dialogue.tokens) > length for dialogue in source.dialogues):
            raise InputError(f"{source.name}: a dialogue is longer than a row of {length}")
