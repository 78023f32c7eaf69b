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
