"""Which page of the cache holds what: shared by equal beginnings, kept while there is room.

A page holds the keys and values of a fixed number of tokens. What they are depends on all tokens
before them, so full pages form a tree: a page is found by the page before it and its own tokens,
compared one by one and not by a hash. Pages that no text holds stay in the tree until their room is
needed; those longest unused go first, and the end of a text before its beginning.

Plain Python: no arrays and no clock.
"""

import itertools
from array import array
from collections import OrderedDict
from collections.abc import Sequence

Node = tuple[int, bytes]  # the number of the entry before it, and the tokens of the page

ROOT = 0  # the number before the first page of every text


class Pages:
    """The pages of a cache.

    Args:
        count: how many there are. size: tokens of each.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count  # texts that hold each page
        self._found: dict[Node, int] = {}  # the tree
        self._node: dict[int, Node] = {}  # of each page that is in it
        self._number: dict[int, int] = {}  # of its entry there, which no other ever has
        self._idle: OrderedDict[int, None] = (
            OrderedDict()
        )  # in the tree, held by none; oldest first
        self._numbers = itertools.count(ROOT + 1)

    @property
    def available(self) -> int:
        """Pages that can be taken: free, or kept and held by no text."""
        return len(self._free) + len(self._idle)

    @property
    def kept(self) -> int:
        """Pages that are kept for texts to come, and held by none."""
        return len(self._idle)

    def take(self) -> int:
        """An empty page for one holder; there must be one available."""
        if not self._free:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            self._free.append(page)
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def find(self, before: int, tokens: bytes) -> int | None:
        """The page in the tree with these tokens after that entry; None if there is none."""
        return self._found.get((before, tokens))

    def is_idle(self, page: int) -> bool:
        """Whether the page is kept and held by no text."""
        return page in self._idle

    def number(self, page: int) -> int:
        """The number of a page's entry in the tree."""
        return self._number[page]

    def hold(self, page: int) -> None:
        """One more text holds a page of the tree."""
        self._idle.pop(page, None)
        self._holders[page] += 1

    def enter(self, page: int, before: int, tokens: bytes) -> int:
        """Puts a full page into the tree; returns the page to use in its place.

        It is another one where the same tokens were entered meanwhile; then this one is let go.
        """
        twin = self._found.get((before, tokens))
        if twin is not None:
            self.hold(twin)
            self.release([page])
            return twin
        self._found[before, tokens] = page
        self._node[page], self._number[page] = (before, tokens), next(self._numbers)
        return page

    def release(self, pages: Sequence[int]) -> None:
        """A text lets go of its pages, which are given in its order."""
        for page in reversed(pages):  # the beginning, which more texts may share, is used last
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._node:
                self._idle[page] = None
            else:
                self._free.append(page)

    def _forget(self, page: int) -> None:
        del self._found[self._node.pop(page)], self._number[page]


def page_keys(tokens: Sequence[int], size: int) -> list[bytes]:
    """The tokens of each full page of a text, as `Pages` compares them."""
    data = array("i", tokens).tobytes()
    width = size * array("i").itemsize
    return [data[at : at + width] for at in range(0, len(data) // width * width, width)]


def common_beginnings(
    tables: Sequence[Sequence[int]], *, members: int, most: int
) -> list[tuple[list[int], int]]:
    """Groups of texts whose beginnings lie in the same pages, so that reading each once saves most.

    Pages that several texts hold are full, and stand in the tree: where two texts have the same
    page, they have the same ones before it.

    Args:
        tables: of each text, its pages. members: texts of a group, at most. most: groups.

    Returns:
        Of each group, the texts' numbers, two or more, and how many pages they have in common.
    """
    found = [
        (part, pages)
        for rows, pages in _best_groups(tables, list(range(len(tables))), 0)
        for part in _parts(rows, members)
        if len(part) > 1
    ]
    found.sort(key=lambda group: (1 - len(group[0])) * group[1])
    return found[:most]


def _best_groups(
    tables: Sequence[Sequence[int]], rows: list[int], known: int
) -> list[tuple[list[int], int]]:
    """Of rows that have `known` pages in common: all as one group, or several that have more."""
    common = _common_pages([tables[row] for row in rows], known)
    after: dict[int, list[int]] = {}
    for row in rows:
        if len(tables[row]) > common:
            after.setdefault(tables[row][common], []).append(row)
    several = [
        group
        for part in after.values()
        if 1 < len(part) < len(rows)
        for group in _best_groups(tables, part, common + 1)
    ]
    saved = sum((len(part) - 1) * pages for part, pages in several)
    if (len(rows) - 1) * common >= saved:
        return [(rows, common)] if common else []
    return several


def _common_pages(tables: Sequence[Sequence[int]], known: int) -> int:
    """How many pages all have in common, by bisection."""
    low, high = known, min(map(len, tables))
    while low < high:
        middle = (low + high + 1) // 2
        page = tables[0][middle - 1]
        if all(table[middle - 1] == page for table in tables):
            low = middle
        else:
            high = middle - 1
    return low


def _parts(rows: list[int], most: int) -> list[list[int]]:
    """Rows in parts of about equal size."""
    count = -(-len(rows) // most)
    return [rows[n::count] for n in range(count)]
