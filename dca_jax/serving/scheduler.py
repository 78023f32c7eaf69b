"""Who is read next, and who is drawn: plain Python, no arrays and no clock.

A text waits, is read in pieces, and is drawn from. Between two pieces every text that is drawn from
gets its token, so nobody waits for longer than a piece takes. Pieces go by turns to the text that
has waited longest and to the one with least left to read: so a short question passes a book, and
the book gets on too. Short rests of several prompts are one piece. What another text has read
meanwhile is shared, even halfway.

A text begins when there is room for its prompt. Where room runs out later, the text that began last
goes back to the head of the queue, and is read again with what it had drawn: most of it from pages
that are kept. The one that began first always gets on, so all come to their end.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dca_jax.serving.pages import ROOT, Pages, page_keys

Stage = Literal["waiting", "reading", "drawing", "leaving", "ended"]


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
        until: tokens that are read before one is drawn: the prompt, and what was drawn before the
            text went back to the queue.
        begun: how often it has begun.
        promised: pages that are kept free for it.
        slot: its number among the texts that are read and drawn, from 0; -1 while it waits.
        pages: those that it holds, in order.
        read: tokens in its pages, those of the step that runs included.
        drawn: tokens asked for, likewise.
        cached: tokens of the prompt that it did not have to read.
        changed: the first of its pages that is not what it was when the engine last looked.
    """

    tokens: list[int]
    prompt: int
    limit: int
    kind: int
    shares: int
    until: int = 0
    begun: int = 0
    promised: int = 0
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
        """Tokens that are to be read before one is drawn."""
        return self.until - self.read


@dataclass(frozen=True)
class Piece:
    """A piece of a prompt: `count` tokens from `start` on. The last one draws a token."""

    row: Row
    start: int
    count: int

    @property
    def end(self) -> int:
        """Tokens of the text that have been read with it."""
        return self.start + self.count

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends with this piece."""
        return self.end == self.row.until


@dataclass(frozen=True)
class Read:
    """Pieces of as many prompts, read at once."""

    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """Whose they are."""
        return tuple(piece.row for piece in self.pieces)


@dataclass(frozen=True)
class Draw:
    """One more token for each of these texts."""

    rows: tuple[Row, ...]


class Scheduler:
    """The texts of a server, from when they come to when they end.

    Args:
        pages: of the cache. rows: texts that are read or drawn at the same time. queue: texts that
            wait, at most.
        again: whether a text may be read again with what it has drawn. If not, it begins when there
            is room for all it may draw, and is never put back.

    Attributes:
        waiting: texts that have not begun, or have been put back. running: those that are read or
            drawn, in the order in which they began.
    """

    def __init__(self, pages: Pages, *, rows: int, queue: int, again: bool = True) -> None:
        self.pages = pages
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self._queue, self._slots, self._again = queue, list(range(rows - 1, -1, -1)), again
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
            )
            for prompt, kind in zip(prompts, kinds or [0] * len(prompts), strict=True)
        ]
        for row in rows:
            assert self._whole(row) <= self.pages.count, "a text that could never end"
            self._wait(row)
        self.waiting.extend(rows)
        return rows

    @property
    def leaving(self) -> bool:
        """Whether a text goes back to the queue, as soon as the step that runs has come back."""
        return any(row.stage == "leaving" for row in self.running)

    def next(self, pieces: Callable[[Sequence[Row]], Sequence[int]]) -> Read | Draw | None:
        """The next step; None if there is nothing to do until the step that runs has come back.

        What the step before the one that runs has given is known by now.

        Args:
            pieces: told the rows that are being read, the one whose turn it is first, says how many
                tokens to read at once of the first of them, of the second, and so on.
        """
        for row in [row for row in self.running if row.stage == "leaving"]:
            self._put_back(row)
        self._admit()
        drawing = [row for row in self.running if row.stage == "drawing" and row.drawn < row.limit]
        if drawing and (self._has_read or not self._reading()):
            self._has_read = False
            if drawn := self._draw(drawing):
                return Draw(drawn)
        reading = self._reading()
        if not reading:
            return None
        self._has_read = True
        for row in reading:
            self._share(row)
        first = reading[0] if self._oldest else min(reading, key=lambda row: row.left)
        self._oldest = not self._oldest
        rows = [first, *sorted((row for row in reading if row is not first), key=lambda r: r.left)]
        counts = pieces(rows)
        return Read(tuple(self._read(*each) for each in zip(rows, counts, strict=False)))

    def has_read(self, row: Row, tokens: int) -> None:
        """The first so many tokens of a row's prompt have been read, and are fit to be shared."""
        if row.stage != "ended":
            self._enter(row, tokens)

    def has_drawn(self, row: Row, token: int) -> None:
        """A token has come back."""
        row.tokens.append(token)
        if row.stage == "ended":
            return
        size, held = self.pages.size, len(row.tokens) - 1  # the last one is not in the cache yet
        if len(row.keys) < held // size:
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
            self._leave(row)
        own, row.pages, row.stage = row.pages[row.entered :], [], "ended"
        return own

    def rows(self) -> Iterator[Row]:
        """Every text that has not ended."""
        yield from self.running
        yield from self.waiting

    # --- room ----------------------------------------------------------------------------------

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.pages.size)

    def _whole(self, row: Row) -> int:
        """Pages of a whole text; the last token drawn is never read."""
        return self._pages(row.prompt + row.limit - 1)

    def _room(self) -> int:
        """Pages that nobody has been promised."""
        promised = sum(max(0, row.promised - len(row.pages)) for row in self.running)
        return self.pages.available - promised

    def _wait(self, row: Row) -> None:
        """Makes a row one that has not begun."""
        row.stage, row.slot, row.until = "waiting", -1, len(row.tokens)
        row.pages, row.read, row.entered, row.changed = [], 0, 0, 0
        row.keys = page_keys(row.tokens, self.pages.size)
        row.promised = self._whole(row)
        if self._again:  # and a token more
            row.promised = min(row.promised, self._pages(row.until + 1))

    def _leave(self, row: Row) -> None:
        self.running.remove(row)
        self._slots.append(row.slot)
        self.pages.release(row.pages)

    def _put_back(self, row: Row) -> None:
        self._leave(row)
        self._wait(row)
        self.waiting.appendleft(row)

    def _admit(self) -> None:
        """Begins the texts that have waited longest, while there is room."""
        while self.waiting and self._slots:
            row = self.waiting[0]
            found = self._shared_pages(row)
            taken = sum(self.pages.is_idle(page) for page in found)
            # Whoever draws will soon want another page.
            others = len(self.running) if self._again else 0
            if self._room() < row.promised - len(found) + taken + others:
                return
            self.waiting.popleft()
            self.running.append(row)
            row.stage, row.slot, row.begun = "reading", self._slots.pop(), row.begun + 1
            self._share(row)

    def _grow(self, row: Row, tokens: int) -> bool:
        """Gives a row pages for so many tokens; False if there are none, and one must leave."""
        while len(row.pages) * self.pages.size < tokens:
            if len(row.pages) >= row.promised and self._room() < 1:
                return False
            row.pages.append(self.pages.take())
        return True

    # --- steps ---------------------------------------------------------------------------------

    def _draw(self, rows: Sequence[Row]) -> tuple[Row, ...]:
        """Those of the rows that have room for one more token; where one has not, the last leaves.

        What has left is known to be finite when the step that runs has come back, and only then
        are its pages another's: until then, who wants one draws nothing.
        """
        drawn = []
        for row in rows:
            if row.stage == "leaving":
                continue
            if not self._grow(row, row.read + 1):
                ending = [row for row in self.running if row.drawn == row.limit]
                if not self.leaving and not ending:
                    self.running[-1].stage = "leaving"
                continue
            row.read, row.drawn = row.read + 1, row.drawn + 1
            drawn.append(row)
        return tuple(drawn)

    def _reading(self) -> list[Row]:
        return [row for row in self.running if row.stage == "reading"]

    def _read(self, row: Row, count: int) -> Piece:
        assert 0 < count <= row.left
        piece = Piece(row, row.read, count)
        assert self._grow(row, piece.end), "a row that reads has been promised its pages"
        row.read += count
        if not row.left:
            row.stage, row.drawn = "drawing", row.drawn + 1
        return piece

    def _shared_pages(self, row: Row) -> list[int]:
        """Pages that stand in the tree and continue a row's; its last token is always read."""
        found, at = [], len(row.pages)
        before = self.pages.number(row.pages[-1]) if row.pages else ROOT - row.kind
        while at + len(found) < (row.until - 1) // self.pages.size:
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
            if row.begun == 1:
                row.cached += self.pages.size

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
