"""Schedules prefill and decoding: plain Python, without arrays or a clock.

A text waits, is read in pieces, and is then decoded. Between two pieces every text in decoding gets
a token, so none waits longer than one piece takes. Pieces alternate between the text that has
waited longest and the one with the fewest tokens left to read: a short question overtakes a book,
and the book makes progress too. Short remainders of several prompts form one piece. Pages that
another text has read in the meantime are shared, even in the middle of a prompt.

A text begins when there is room for its prompt. If room runs out later, the text that began last
is preempted: it returns to the head of the queue and is read again with its decoded tokens, mostly
from pages still in the cache. The text that began first always progresses, so every text finishes.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dca_jax.serving.pages import ROOT, Pages, page_keys

Stage = Literal["waiting", "reading", "drawing", "leaving", "ended"]


class QueueFullError(Exception):
    """The queue is full."""


@dataclass(eq=False, kw_only=True)
class Row:
    """One text.

    Attributes:
        tokens: the prompt, and the decoded tokens that the device has returned.
        prompt: number of tokens of the prompt.
        limit: maximum number of decoded tokens.
        kind: only texts of the same kind share pages.
        shares: number of its tokens in pages that others may share.
        until: number of tokens to read before decoding: the prompt, and the tokens decoded before
            a preemption.
        begun: number of times it has begun.
        promised: number of pages reserved for it.
        slot: its number among the running texts, from 0; -1 while it waits.
        pages: its pages in order.
        read: number of tokens in its pages, including those of the running step.
        drawn: number of decoded tokens, including that of the running step.
        cached: number of tokens of the prompt that were already in the cache.
        changed: index of the first page that has changed since the engine last looked.
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
    keys: list[bytes] = field(default_factory=list)  # keys of full pages
    entered: int = 0  # number of pages in the tree

    @property
    def left(self) -> int:
        """Number of tokens left to read before decoding."""
        return self.until - self.read


@dataclass(frozen=True)
class Piece:
    """A piece of a prompt: `count` tokens from `start` on. The last piece yields a token."""

    row: Row
    start: int
    count: int

    @property
    def end(self) -> int:
        """Number of tokens of the text that have been read after this piece."""
        return self.start + self.count

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends with this piece."""
        return self.end == self.row.until


@dataclass(frozen=True)
class Read:
    """Pieces of different prompts, read together."""

    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """The texts of the pieces."""
        return tuple(piece.row for piece in self.pieces)


@dataclass(frozen=True)
class Draw:
    """One more token for each of these texts."""

    rows: tuple[Row, ...]


class Scheduler:
    """A server's texts, from arrival to completion.

    Args:
        pages: pages of the cache.
        rows: largest number of running texts.
        queue: largest number of waiting texts.
        again: whether a preempted text may be read again with its decoded tokens. If not, a text
            begins only when there is room for all its tokens, and is never preempted.

    Attributes:
        waiting: texts that have not begun or have been preempted.
        running: texts being read or decoded, in the order in which they began.
    """

    def __init__(self, pages: Pages, *, rows: int, queue: int, again: bool = True) -> None:
        self.pages = pages
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self._queue, self._slots, self._again = queue, list(range(rows - 1, -1, -1)), again
        self._has_read = False  # the last step was a piece
        self._oldest = False  # whether the next piece is the oldest text's turn

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        limit: int,
        *,
        kinds: Sequence[int] | None = None,
        drawn_too: bool = True,
    ) -> list[Row]:
        """Adds texts to the end of the queue, either all or none.

        Args:
            limit: maximum number of decoded tokens of each.
            kinds: kind of each text, from 0; texts share pages with others of their kind.
            drawn_too: whether decoded tokens may be shared as well as the prompt's.

        Raises:
            QueueFullError: there are too many.
        """
        if len(self.waiting) + len(prompts) > self._queue:
            raise QueueFullError(
                f"{len(self.waiting)} texts are waiting, and the queue holds at most "
                f"{self._queue}; try again later"
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
        """Whether a text will be preempted as soon as the running step has finished."""
        return any(row.stage == "leaving" for row in self.running)

    def next(self, pieces: Callable[[Sequence[Row]], Sequence[int]]) -> Read | Draw | None:
        """The next step; None if there is nothing to do until the running step has finished.

        The results of the step before the running one must be known.

        Args:
            pieces: function from the rows being read, in order of turn, to the number of tokens to
                read together of the first row, the second, and so on.
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
        """Records that the first `tokens` tokens of a row have been read and can be shared."""
        if row.stage != "ended":
            self._enter(row, tokens)

    def has_drawn(self, row: Row, token: int) -> None:
        """Records a decoded token."""
        row.tokens.append(token)
        if row.stage == "ended":
            return
        size, held = self.pages.size, len(row.tokens) - 1  # the last one is not in the cache yet
        if len(row.keys) < held // size:
            row.keys += page_keys(row.tokens[held - size : held], size)
        self._enter(row, held)

    def end(self, row: Row) -> list[int]:
        """Ends a text that is complete or cancelled, and frees its pages.

        Returns:
            The pages that no other text can find. If they hold non-finite numbers, they must be
            cleared before the next step.
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
        """Pages of a whole text; the last decoded token is never read."""
        return self._pages(row.prompt + row.limit - 1)

    def _room(self) -> int:
        """Number of pages that are not reserved."""
        promised = sum(max(0, row.promised - len(row.pages)) for row in self.running)
        return self.pages.available - promised

    def _wait(self, row: Row) -> None:
        """Resets a row to the state before it began."""
        row.stage, row.slot, row.until = "waiting", -1, len(row.tokens)
        row.pages, row.read, row.entered, row.changed = [], 0, 0, 0
        row.keys = page_keys(row.tokens, self.pages.size)
        row.promised = self._whole(row)
        if self._again:  # and one more token
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
            # Texts in decoding will soon need another page.
            others = len(self.running) if self._again else 0
            if self._room() < row.promised - len(found) + taken + others:
                return
            self.waiting.popleft()
            self.running.append(row)
            row.stage, row.slot, row.begun = "reading", self._slots.pop(), row.begun + 1
            self._share(row)

    def _grow(self, row: Row, tokens: int) -> bool:
        """Gives a row pages for `tokens` tokens; False if there are none and a row must leave."""
        while len(row.pages) * self.pages.size < tokens:
            if len(row.pages) >= row.promised and self._room() < 1:
                return False
            row.pages.append(self.pages.take())
        return True

    # --- steps ---------------------------------------------------------------------------------

    def _draw(self, rows: Sequence[Row]) -> tuple[Row, ...]:
        """The rows with room for one more token; if one has none, the row that began last leaves.

        Only when the running step has finished are the leaving row's numbers known to be finite and
        its pages available. Until then, a row that needs a page is not decoded.
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
        assert self._grow(row, piece.end), "pages are reserved for a row that reads"
        row.read += count
        if not row.left:
            row.stage, row.drawn = "drawing", row.drawn + 1
        return piece

    def _shared_pages(self, row: Row) -> list[int]:
        """Pages in the tree that continue a row; its last token is always read."""
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
        """Takes pages of the same tokens that any other row has read."""
        whole = row.read == len(row.pages) * self.pages.size and row.entered == len(row.pages)
        for page in self._shared_pages(row) if whole else []:
            self.pages.hold(page)
            row.pages.append(page)
            row.entered += 1
            row.read += self.pages.size
            if row.begun == 1:
                row.cached += self.pages.size

    def _enter(self, row: Row, tokens: int) -> None:
        """Adds the pages filled by a row's first `tokens` tokens to the tree."""
        full = min(tokens, row.shares) // self.pages.size
        while row.entered < full:
            at = row.entered
            before = self.pages.number(row.pages[at - 1]) if at else ROOT - row.kind
            page = self.pages.enter(row.pages[at], before, row.keys[at])
            if page != row.pages[at]:
                row.pages[at], row.changed = page, min(row.changed, at)
            row.entered += 1
