"""Who is read and drawn, and what pages hold: simulated, with no model and no cache."""

import random

import pytest

from dca_jax.serving.pages import Pages, common_beginnings
from dca_jax.serving.scheduler import Draw, QueueFullError, Read, Scheduler

SIZE = 4


class Device:
    """What a cache would hold: of each slot of each page, the text up to its token.

    A key depends on all the tokens before it; what stands where is worked out here from the steps
    alone, and compared with what a row is about to read.
    """

    def __init__(self, scheduler, seed):
        self.scheduler, self.random = scheduler, random.Random(seed)
        self.slots = {}
        self.pending = None
        self.texts = {}  # what each row's tokens are, those included that have not come back

    def step(self, largest):
        """One step of the server; False if there was none."""
        scheduler = self.scheduler
        waiting = [
            row for row in scheduler.running if row.stage == "drawing" and row.drawn < row.limit
        ]
        had_read = scheduler._has_read

        def pieces(rows):
            count = self.random.randint(1, len(rows))
            return [min(row.left, self.random.randint(1, largest)) for row in rows[:count]]

        step = scheduler.next(pieces)
        before, self.pending = self.pending, None
        drawn = step.rows if isinstance(step, Draw) else ()
        # Nobody who draws is passed over but where room has run out, and a text is about to go.
        short = [row for row in waiting if row in scheduler.running and row not in drawn]
        if short and (isinstance(step, Draw) or had_read):
            going = [row for row in scheduler.running if row.stage == "leaving"]
            assert going or any(row.drawn == row.limit for row in scheduler.running)
            assert all(row in going or len(row.pages) * SIZE == row.read for row in short)
        if isinstance(step, Read):
            for piece in step.pieces:
                self.write(piece.row, piece.start, piece.count)
                if piece.is_last:
                    self.texts[piece.row] = [*piece.row.tokens, self.random.randint(0, 2)]
        elif isinstance(step, Draw):
            for row in step.rows:
                self.write(row, row.read - 1, 1)
                self.texts[row].append(self.random.randint(0, 2))
            self.pending = [(row, self.texts[row][-1]) for row in step.rows]
        for row, token in before or []:
            self.came(row, token)
        for piece in step.pieces if isinstance(step, Read) else ():
            scheduler.has_read(piece.row, piece.end)
            if piece.is_last:
                self.came(piece.row, self.texts[piece.row][-1])
        return step is not None or before is not None or scheduler.leaving

    def came(self, row, token):
        if row.stage == "ended":  # a step too many, after a stop token or a cancellation
            return
        assert row.stage in ("drawing", "leaving"), "a token of a text that has been put back"
        self.scheduler.has_drawn(row, token)
        drawn = len(row.tokens) - row.prompt
        if drawn == row.limit or self.random.random() < 0.05:
            self.scheduler.end(row)

    def write(self, row, start, count):
        text = self.texts.get(row, row.tokens)
        kind = row.kind
        for at in range(start):  # all that it is about to read
            page = row.pages[at // SIZE]
            assert self.slots[page, at % SIZE] == (kind, tuple(text[: at + 1]))
        for at in range(start, start + count):
            page = row.pages[at // SIZE]
            assert not self.others(row, page), "a page that another text holds is written"
            self.slots[page, at % SIZE] = (kind, tuple(text[: at + 1]))

    def others(self, row, page):
        return [one for one in self.scheduler.running if one is not row and page in one.pages]


@pytest.mark.parametrize("seed", range(30))
def test_pages_hold_what_their_texts_say_and_all_come_back(seed):
    rng = random.Random(seed)
    pages = Pages(rng.randint(6, 40), SIZE)
    again = seed % 3 > 0
    scheduler = Scheduler(pages, rows=rng.randint(1, 6), queue=12, again=again)
    device = Device(scheduler, seed)
    roots = [[rng.randint(0, 2) for _ in range(30)] for _ in range(3)]
    rows, refused, cached = [], 0, 0
    for _ in range(150):
        if rng.random() < 0.3:
            start = roots[rng.randrange(3)][: rng.randint(0, 30)]
            prompt = [*start, *(rng.randint(0, 2) for _ in range(rng.randint(1, 6)))]
            limit = rng.randint(1, 8)
            if -(-(len(prompt) + limit - 1) // SIZE) <= pages.count:
                count, kind, drawn_too = rng.randint(1, 3), rng.randint(0, 1), rng.random() < 0.5
                options = {"kinds": [kind] * count, "drawn_too": drawn_too}
                try:
                    rows += scheduler.submit([prompt] * count, limit, **options)
                except QueueFullError:
                    refused += 1
        if rng.random() < 0.05 and (alive := list(scheduler.rows())):
            scheduler.end(rng.choice(alive))
        device.step(largest=rng.choice([3, 8, 100]))
    while device.step(largest=8):
        pass
    assert not list(scheduler.rows())
    assert all(row.stage == "ended" for row in rows)
    assert scheduler._room() == pages.count
    assert again or all(row.begun < 2 for row in rows)
    assert sorted(scheduler._slots) == list(range(len(scheduler._slots)))
    assert pages.available == pages.count
    assert not any(pages._holders)
    cached = sum(row.cached for row in rows)
    if pages.count > 20 and len(rows) > 40:
        assert cached, "equal beginnings and much room, and nothing was shared"


def read_to_the_end(scheduler):
    """Every row read and drawn; the pieces read, as (row, start, count)."""
    pieces = []
    while (step := scheduler.next(lambda rows: [min(rows[0].left, 8)])) or scheduler.leaving:
        drawn = step.rows if isinstance(step, Draw) else []
        if isinstance(step, Read):
            (piece,) = step.pieces
            pieces.append((piece.row, piece.start, piece.count))
            scheduler.has_read(piece.row, piece.end)
            drawn = [piece.row] if piece.is_last else []
        for row in drawn:
            scheduler.has_drawn(row, 7)
            if row.drawn == row.limit:
                scheduler.end(row)
    return pieces


def test_a_prompt_is_read_once_for_all_who_ask_at_once():
    scheduler = Scheduler(Pages(100, SIZE), rows=8, queue=50)
    book = list(range(40))
    rows = [scheduler.submit([[*book, 100 + n]], 2)[0] for n in range(20)]
    read = sum(count for _, _, count in read_to_the_end(scheduler))
    assert read == 41 + 19
    assert [row.cached for row in rows] != [40] * 20  # some began it together, and went on by turns
    assert sum(row.cached for row in rows) == 20 * 41 - read


def test_the_last_token_of_a_prompt_is_always_read():
    scheduler = Scheduler(Pages(100, SIZE), rows=8, queue=50)
    for _ in range(2):
        (row,) = scheduler.submit([list(range(16))], 1)
        pieces = read_to_the_end(scheduler)
    assert row.cached == 12
    assert pieces == [(row, 12, 4)]


def test_an_answer_is_shared_with_the_next_turn():
    scheduler = Scheduler(Pages(100, SIZE), rows=8, queue=50)
    (row,) = scheduler.submit([[1, 2, 3]], 10)
    read_to_the_end(scheduler)
    assert len(row.tokens) == 13
    (later,) = scheduler.submit([[*row.tokens, 5, 5]], 1)
    read_to_the_end(scheduler)
    assert later.cached == 12


def test_kinds_share_nothing():
    scheduler = Scheduler(Pages(100, SIZE), rows=8, queue=50)
    scheduler.submit([list(range(16))], 1, kinds=[16])
    read_to_the_end(scheduler)
    (other,) = scheduler.submit([list(range(17))], 1, kinds=[17])
    (same,) = scheduler.submit([list(range(16))], 1, kinds=[16])
    read_to_the_end(scheduler)
    assert (other.cached, same.cached) == (0, 12)


def test_what_was_longest_unused_makes_room_and_the_end_of_a_text_before_its_beginning():
    scheduler = Scheduler(Pages(10, SIZE), rows=1, queue=50)

    def cached(first, length=17):
        (row,) = scheduler.submit([[first, *range(1, length)]], 1)
        read_to_the_end(scheduler)
        return row.cached

    assert [cached(50), cached(60), cached(50)] == [0, 0, 16]  # four pages each are kept
    assert cached(70) == 0  # takes the two free ones, and three of the four of 60
    assert cached(50) == 16
    assert cached(60, length=5) == 4


def test_a_short_prompt_passes_a_long_one_which_gets_on_too():
    scheduler = Scheduler(Pages(100, SIZE), rows=8, queue=50)
    (long,) = scheduler.submit([list(range(200))], 1)
    short = [scheduler.submit([[300 + n, 1, 2]], 1)[0] for n in range(4)]
    order = [row for row, _, _ in read_to_the_end(scheduler)]
    assert max(order.index(row) for row in short) <= 7
    assert long in order[:2]


def all_of_the_first(rows):
    return [rows[0].left]


def test_no_row_begins_that_could_not_end_where_none_is_read_again():
    scheduler = Scheduler(Pages(10, SIZE), rows=8, queue=50, again=False)
    (large,) = scheduler.submit([[1] * 20], 12)  # 8 pages
    (larger,) = scheduler.submit([[2] * 20], 17)  # 9
    (small,) = scheduler.submit([[3]], 1)
    scheduler.next(all_of_the_first)
    assert [row.stage for row in (large, larger, small)] == ["drawing", "waiting", "waiting"]
    scheduler.end(large)
    scheduler.next(all_of_the_first)
    assert larger.stage == "drawing"


def test_where_room_runs_out_the_last_goes_back_and_is_read_again_with_what_it_drew():
    scheduler = Scheduler(Pages(10, SIZE), rows=8, queue=50)
    rows = [scheduler.submit([[first] * 8], 24)[0] for first in (1, 2)]  # 8 pages each in the end
    pieces = read_to_the_end(scheduler)
    assert [len(row.tokens) for row in rows] == [32, 32]
    assert [row.begun for row in rows] == [1, 2]
    *_, (row, start, count) = pieces
    assert row is rows[1]
    assert start + count == row.until > row.prompt
    assert row.cached == 0  # of its prompt: it was read when it first came
    # Most of what it had written was still there.
    again = sum(n for one, _, n in pieces if one is row) - row.prompt
    assert again < row.until


def test_several_short_rests_are_one_piece_and_a_long_one_is_not_joined():
    scheduler = Scheduler(Pages(100, SIZE), rows=8, queue=50)
    (long,) = scheduler.submit([list(range(40))], 2)
    short = [scheduler.submit([[50 + n] * 3], 2)[0] for n in range(3)]

    def pieces(rows):
        return [row.left for row in rows if row.left < 5] or [min(rows[0].left, 16)]

    step = scheduler.next(pieces)
    assert step.rows == tuple(short)
    assert all(piece.is_last for piece in step.pieces)
    for piece in step.pieces:
        scheduler.has_read(piece.row, piece.end)
        scheduler.has_drawn(piece.row, 7)
    assert scheduler.next(pieces).rows == tuple(short)  # each gets its token before more is read
    assert scheduler.next(pieces).rows == (long,)


@pytest.mark.parametrize("seed", range(5))
def test_beginnings_in_common_are_of_the_same_pages_and_save_most(seed):
    rng = random.Random(seed)
    tree = [list(range(100 * n, 100 * n + rng.randint(5, 30))) for n in range(4)]
    tables = [
        [1, 2, 3, *rng.choice(tree), *(1000 + 100 * n + m for m in range(rng.randint(1, 4)))]
        for n in range(12)
    ] + [[7]]
    groups = common_beginnings(tables, members=5, most=4)
    assert len(groups) <= 4
    rows = [row for members, _ in groups for row in members]
    assert len(set(rows)) == len(rows)
    for members, pages in groups:
        assert 2 <= len(members) <= 5
        assert len({tuple(tables[row][:pages]) for row in members}) == 1
        assert pages < min(len(tables[row]) for row in members)
    # The four books are worth more than what all begin with.
    assert max(pages for _, pages in groups) > 3
    assert common_beginnings([[1], [2]], members=5, most=4) == []


def test_the_queue_has_a_bound_for_all_of_a_request():
    scheduler = Scheduler(Pages(10, SIZE), rows=1, queue=3)
    scheduler.submit([[1], [2]], 1)
    with pytest.raises(QueueFullError):
        scheduler.submit([[1], [2]], 1)
    assert len(scheduler.waiting) == 2


def test_a_row_that_waits_no_longer_leaves_the_queue():
    scheduler = Scheduler(Pages(10, SIZE), rows=1, queue=3)
    first, second = (scheduler.submit([[1, 2, 3]], 4)[0] for _ in range(2))
    scheduler.next(all_of_the_first)
    assert scheduler.end(second) == []
    own = scheduler.end(first)
    assert len(own) == 1  # what it read has not been said to be fit to be shared
    assert scheduler.next(all_of_the_first) is None
    assert scheduler.pages.available == 10
