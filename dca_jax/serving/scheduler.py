"""Who is read next, and who is drawn: plain Python, no arrays and no clock.

A text waits, is read in pieces, and is drawn from. Between two pieces every text that is drawn from
gets its token, so nobody waits for longer than a piece takes. Pieces go by turns to the text that
has waited longest and to the one with least left to read: so a short question passes a book, and
the book gets on too. What another text has read meanwhile is shared, even halfway.

A text begins when there is room for its prompt and all it may draw, so it always comes to its end.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dca_jax.serving.pages import ROOT, Pages, page_keys

Stage = Literal["waiting", "reading", "drawing", "ended"]


class QueueFullError(Exception):
    """More texts are waiting than the queue takes."""


@dataclass(eq=False, kw_only=True)
class Row:
    """One text.

    Attributes:
        tokens: its prompt, and the tokens drawn that have come back.
        prompt: tokens of the prompt. limit: tokens drawn at most.
        kind: only texts of one kind share pages.
        shares: of its tokens, how many lie in pages that others may share.
        slot: its number among the texts that are read and drawn, from 0; -1 while it waits.
        pages: those that it holds, in order.
        read: tokens in its pages, those of the step that runs included.
        drawn: tokens asked for, likewise.
        cached: tokens that it did not have to read.
        changed: the first of its pages that is not what it was when the engine last looked.
    """

    tokens: list[int]
    prompt: int
    limit: int
    kind: int
    shares: int
    stage: Stage = "waiting"
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    read: int = 0
    drawn: int = 0
    cached: int = 0
    changed: int = 0
    keys: list[bytes] = field(default_factory=list)  # of full pages
    entered: int = 0  # pages that stand in the tree

    @property
    def left(self) -> int:
        """Tokens of the prompt that are to be read."""
        return self.prompt - self.read


@dataclass(frozen=True)
class Read:
    """A piece of a prompt: `count` tokens from `start` on. The last one draws the first token."""

    row: Row
    start: int
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends with this piece."""
        return self.start + self.count == self.row.prompt


@dataclass(frozen=True)
class Draw:
    """One more token for each of these texts."""

    rows: tuple[Row, ...]


class Scheduler:
    """The texts of a server, from when they come to when they end.

    Args:
        pages: of the cache. rows: texts that are read or drawn at the same time. queue: texts that
            wait, at most.
    """

    def __init__(self, pages: Pages, *, rows: int, queue: int) -> None:
        self.pages = pages
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []  # read or drawn, in the order in which they came
        self._queue, self._slots = queue, list(range(rows - 1, -1, -1))
        self._reserved = 0  # pages promised to running texts which they do not hold yet
        self._has_read = False  # the last step was a piece
        self._oldest = False  # whose turn the next piece is

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        limit: int,
        *,
        kinds: Sequence[int] | None = None,
        drawn_too: bool = True,
    ) -> list[Row]:
        """New texts, all or none of them, at the end of the queue.

        Args:
            limit: tokens drawn of each, at most.
            kinds: of each, a number from 0; texts share pages with others of their kind.
            drawn_too: whether the tokens drawn may be shared, besides the prompt's.

        Raises:
            QueueFullError: they are too many.
        """
        if len(self.waiting) + len(prompts) > self._queue:
            raise QueueFullError(
                f"{len(self.waiting)} texts are waiting, and the queue takes {self._queue}; try "
                "again later"
            )
        rows = [
            Row(
                tokens=list(prompt),
                prompt=len(prompt),
                limit=limit,
                kind=kind,
                shares=len(prompt) + limit if drawn_too else len(prompt),
                keys=page_keys(prompt, self.pages.size),
            )
            for prompt, kind in zip(prompts, kinds or [0] * len(prompts), strict=True)
        ]
        for row in rows:
            assert self._needed(row) <= self.pages.count, "a text that could never begin"
        self.waiting.extend(rows)
        return rows

    def next(self, piece: Callable[[Row], int]) -> Read | Draw | None:
        """The next step; None if there is nothing to do.

        Args:
            piece: how many tokens of a row's prompt to read at once, of `left`.
        """
        self._admit()
        drawing = tuple(
            row for row in self.running if row.stage == "drawing" and row.drawn < row.limit
        )
        reading = [row for row in self.running if row.stage == "reading"]
        if drawing and (self._has_read or not reading):
            self._has_read = False
            for row in drawing:
                self._grow(row, row.read + 1)
                row.read, row.drawn = row.read + 1, row.drawn + 1
            return Draw(drawing)
        if not reading:
            return None
        self._has_read = True
        for row in reading:
            self._share(row)
        row = reading[0] if self._oldest else min(reading, key=lambda row: row.left)
        self._oldest = not self._oldest
        count, start = piece(row), row.read
        assert 0 < count <= row.left
        self._grow(row, start + count)
        row.read += count
        if not row.left:
            row.stage, row.drawn = "drawing", 1
        return Read(row, start, count)

    def has_read(self, row: Row, tokens: int) -> None:
        """The first so many tokens of a row's prompt have been read, and are fit to be shared."""
        if row.stage != "ended":
            self._enter(row, tokens)

    def has_drawn(self, row: Row, token: int) -> None:
        """A token has come back."""
        row.tokens.append(token)
        if row.stage == "ended" or len(row.tokens) == row.prompt + 1:
            return
        size, held = self.pages.size, len(row.tokens) - 1  # the last one is not in the cache yet
        if held % size == 0:
            row.keys += page_keys(row.tokens[held - size : held], size)
        self._enter(row, held)

    def end(self, row: Row) -> list[int]:
        """A text has ended, or is no longer wanted; its pages are let go.

        Returns:
            Those that no other text will find: where their numbers are not finite, they are to be
            emptied before the next step.
        """
        if row.stage == "waiting":
            self.waiting.remove(row)
        elif row.stage != "ended":
            self.running.remove(row)
            self._reserved -= self._needed(row) - len(row.pages)
            self._slots.append(row.slot)
            self.pages.release(row.pages)
        own, row.pages, row.stage = row.pages[row.entered :], [], "ended"
        return own

    def rows(self) -> Iterator[Row]:
        """Every text that has not ended."""
        yield from self.running
        yield from self.waiting

    def _needed(self, row: Row) -> int:
        """Pages of a whole text; the last token drawn is never read."""
        return -(-(row.prompt + row.limit - 1) // self.pages.size)

    def _admit(self) -> None:
        """Begins the texts that have waited longest, while there is room."""
        while self.waiting and self._slots:
            row = self.waiting[0]
            found = self._shared_pages(row)
            taken = sum(self.pages.is_idle(page) for page in found)
            needed = self._needed(row)
            if self.pages.available - self._reserved < needed - len(found) + taken:
                return
            self.waiting.popleft()
            self.running.append(row)
            self._reserved += needed
            row.stage, row.slot = "reading", self._slots.pop()
            self._share(row)

    def _shared_pages(self, row: Row) -> list[int]:
        """Pages that stand in the tree and continue a row's; its last token is always read."""
        found, at = [], len(row.pages)
        before = self.pages.number(row.pages[-1]) if row.pages else ROOT - row.kind
        while at + len(found) < (row.prompt - 1) // self.pages.size:
            page = self.pages.find(before, row.keys[at + len(found)])
            if page is None:
                break
            found.append(page)
            before = self.pages.number(page)
        return found

    def _share(self, row: Row) -> None:
        """Takes what has been read of the same text, by whomever."""
        whole = row.read == len(row.pages) * self.pages.size and row.entered == len(row.pages)
        for page in self._shared_pages(row) if whole else []:
            self.pages.hold(page)
            row.pages.append(page)
            row.entered += 1
            row.read += self.pages.size
            row.cached += self.pages.size
            self._reserved -= 1

    def _grow(self, row: Row, tokens: int) -> None:
        """Gives a row pages for so many tokens."""
        while len(row.pages) * self.pages.size < tokens:
            row.pages.append(self.pages.take())
            self._reserved -= 1

    def _enter(self, row: Row, tokens: int) -> None:
        """Puts a row's pages into the tree that its first so many tokens fill."""
        full = min(tokens, row.shares) // self.pages.size
        while row.entered < full:
            at = row.entered
            before = self.pages.number(row.pages[at - 1]) if at else ROOT - row.kind
            page = self.pages.enter(row.pages[at], before, row.keys[at])
            if page != row.pages[at]:
                row.pages[at], row.changed = page, min(row.changed, at)
            row.entered += 1
