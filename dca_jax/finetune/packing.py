"""Which dialogues make a row: packed by the best fit, or one a row in batches of like length."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

PACKS = ("cut", "whole", "segments", "none")
TOGETHER = 16  # batches whose rows are sorted by length: so many that they are alike
NARROWEST = 256  # tokens of the shortest rows: each doubling is a program to compile


def best_fit(sizes: Sequence[int] | Int[np.ndarray, " n"], room: int) -> list[list[int]]:
    """Packs items into rows of `room`, the largest first, each where it leaves the least room.

    Best-fit decreasing needs at most 11/9 of the fewest possible rows and one more (Johnson 1973).

    Args:
        sizes: from 1 to `room`. Of equal ones the earlier comes first.

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
    """`best_fit`, its rows and the items of each in a random order."""
    rows = best_fit(sizes, room)
    return [random.permutation(rows[n]).tolist() for n in random.permutation(len(rows))]


def alike(
    sizes: Int[np.ndarray, " n"], batch: int, before: int, random: np.random.Generator
) -> list[int]:
    """An order in which the items of each batch are of about one size, batches shuffled.

    Args:
        batch: items of a batch.
        before: items that earlier epochs have had: their last batch is filled up first.
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
    """The width of a batch whose longest row has so many tokens: a power of two, or `length`."""
    width = NARROWEST
    while width < longest:
        width *= 2
    return min(width, length)
