"""Packing dialogues into rows: best fit, or one per row in batches of similar length."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

PACKS = ("cut", "whole", "segments", "none")
TOGETHER = 16  # batches that are sorted by length together, enough for similar lengths
NARROWEST = 256  # tokens of the shortest rows; each doubling is another program to compile


def best_fit(sizes: Sequence[int] | Int[np.ndarray, " n"], room: int) -> list[list[int]]:
    """Packs items into rows of size `room`, largest first, each where it leaves the least room.

    Best-fit decreasing needs at most 11/9 of the fewest possible rows and one more (Johnson 1973).

    Args:
        sizes: sizes from 1 to `room`. Of equal sizes, the earlier item comes first.

    Returns:
        The numbers of the items of each row.
    """
    sizes = np.asarray(sizes)
    rows: list[list[int]] = []
    rooms: list[int] = []  # the different rooms that rows have left, sorted
    with_room: dict[int, list[int]] = {}
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        at = bisect_left(rooms, size)
        if at == len(rooms):
            left = room - size
            number = len(rows)
            rows.append([item])
        else:
            had = rooms[at]
            number = with_room[had].pop()
            if not with_room[had]:
                del with_room[had], rooms[at]
            rows[number].append(item)
            left = had - size
        if left:
            if left not in with_room:
                insort(rooms, left)
                with_room[left] = []
            with_room[left].append(number)
    return rows


def packed(sizes: Int[np.ndarray, " n"], room: int, random: np.random.Generator) -> list[list[int]]:
    """`best_fit` with its rows, and the items in each row, in random order."""
    rows = best_fit(sizes, room)
    return [random.permutation(rows[n]).tolist() for n in random.permutation(len(rows))]


def alike(
    sizes: Int[np.ndarray, " n"], batch: int, before: int, random: np.random.Generator
) -> list[int]:
    """An order with items of similar size in each batch, and with the batches shuffled.

    Args:
        batch: number of items in a batch.
        before: number of items in earlier epochs, whose last batch is filled up first.
    """
    first = min(-before % batch, len(sizes))
    rest = np.arange(first, len(sizes))
    groups = []
    for start in range(0, len(rest), batch * TOGETHER):
        some = rest[start : start + batch * TOGETHER]
        some = some[np.argsort(-sizes[some], kind="stable")]
        groups += [some[n : n + batch].tolist() for n in range(0, len(some), batch)]
    whole = [group for group in groups if len(group) == batch]
    last = [group for group in groups if len(group) < batch]  # at most one: those of the end
    shuffled = [whole[n] for n in random.permutation(len(whole))]
    return [*range(first), *(item for group in [*shuffled, *last] for item in group)]


def bucket(longest: int, length: int) -> int:
    """The width of a batch with a longest row of `longest` tokens: a power of two, or `length`."""
    width = NARROWEST
    while width < longest:
        width *= 2
    return min(width, length)
