"""The pages of the cache, shared by texts with equal prefixes and kept while there is room.

A page has the keys and values of a fixed number of tokens. These depend on all earlier tokens, so
full pages form a tree: a page is found by the page before it and its own tokens, which are compared
directly and not by a hash. Pages that no text holds stay in the tree until their space is needed;
the least recently used are evicted first, and the end of a text before its beginning.

This is plain Python without arrays or clocks.
"""

import itertools
from array import array
from collections import OrderedDict
from collections.abc import Sequence

Node = tuple[int, bytes]  # the number of the parent entry, and the tokens of the page

ROOT = 0  # the number before the first page of every text


class Pages:
    """The pages of a cache.

    Args:
        count: number of pages.
        size: number of tokens per page.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count  # number of texts that hold each page
        self._found: dict[Node, int] = {}  # the tree
        self._node: dict[int, Node] = {}  # the node of each page in the tree
        self._number: dict[int, int] = {}  # the unique number of its entry in the tree
        self._idle: OrderedDict[int, None] = OrderedDict()  # in the tree but not held; oldest first
        self._numbers = itertools.count(ROOT + 1)

    @property
    def available(self) -> int:
        """Number of pages that can be taken: free, or kept and not held."""
        return len(self._free) + len(self._idle)

    @property
    def kept(self) -> int:
        """Number of pages kept for future texts and not held."""
        return len(self._idle)

    def take(self) -> int:
        """Takes an empty page for one holder; one must be available."""
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
        """Adds a holder to a page of the tree."""
        self._idle.pop(page, None)
        self._holders[page] += 1

    def enter(self, page: int, before: int, tokens: bytes) -> int:
        """Puts a full page into the tree; returns the page to use in its place.

        If the same tokens have been entered meanwhile, that is another page, and this one is
        released.
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
        """Releases a text's pages, given in order."""
        for page in reversed(
            pages
        ):  # the beginning, which more texts may share, is most recently used
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
    """Groups of texts with common first pages, chosen so that reading each once saves the most.

    Pages held by several texts are full and in the tree, so if two texts share a page, they also
    share all pages before it.

    Args:
        tables: the pages of each text.
        members: maximum number of texts in a group.
        most: maximum number of groups.

    Returns:
        For each group, the numbers of two or more texts, and their number of common pages.
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
    """Splits rows with `known` common pages into one group, or several with more common pages."""
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
    """The number of pages that all have in common, by bisection."""
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
