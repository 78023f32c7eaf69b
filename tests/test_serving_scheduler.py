"""Who is read and drawn, and what pages hold: simulated, with no model and no cache."""

import random

import pytest

from dca_jax.serving.pages import Pages
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
        step = scheduler.next(lambda row: min(row.left, self.random.randint(1, largest)))
        before, self.pending = self.pending, None
        if isinstance(step, Read):
            assert not (had_read and waiting), "a row that draws waits for two pieces"
            self.write(step.row, step.start, step.count)
            if step.is_last:
                self.texts[step.row] = [*step.row.tokens, self.random.randint(0, 2)]
        elif isinstance(step, Draw):
            assert set(waiting) <= set(step.rows)
            for row in step.rows:
                self.write(row, row.read - 1, 1)
                self.texts[row].append(self.random.randint(0, 2))
            self.pending = [(row, self.texts[row][-1]) for row in step.rows]
        for row, token in before or []:
            self.came(row, token)
        if isinstance(step, Read):
            scheduler.has_read(step.row, step.start + step.count)
            if step.is_last:
                self.came(step.row, self.texts[step.row][-1])
        return step is not None or before is not None

    def came(self, row, token):
        if row.stage == "ended":  # a step too many, after a stop token or a cancellation
            return
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
    scheduler = Scheduler(pages, rows=rng.randint(1, 6), queue=12)
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
    assert scheduler._reserved == 0
    assert sorted(scheduler._slots) == list(range(len(scheduler._slots)))
    assert pages.available == pages.count
    assert not any(pages._holders)
    cached = sum(row.cached for row in rows)
    if pages.count > 20 and len(rows) > 40:
        assert cached, "equal beginnings and much room, and nothing was shared"


def read_to_the_end(scheduler):
    """Every row read and drawn; the pieces read, as (row, start, count)."""
    pieces = []
    while (step := scheduler.next(lambda row: min(row.left, 8))) is not None:
        if isinstance(step, Read):
            pieces.append((step.row, step.start, step.count))
            scheduler.has_read(step.row, step.start + step.count)
        for row in step.rows if isinstance(step, Draw) else [step.row] if step.is_last else []:
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


def test_no_row_begins_that_could_not_end_and_none_is_passed_over():
    scheduler = Scheduler(Pages(10, SIZE), rows=8, queue=50)
    (large,) = scheduler.submit([[1] * 20], 12)  # 8 pages
    (larger,) = scheduler.submit([[2] * 20], 17)  # 9
    (small,) = scheduler.submit([[3]], 1)
    scheduler.next(lambda row: row.left)
    assert [row.stage for row in (large, larger, small)] == ["drawing", "waiting", "waiting"]
    scheduler.end(large)
    scheduler.next(lambda row: row.left)
    assert larger.stage == "drawing"


def test_the_queue_has_a_bound_for_all_of_a_request():
    scheduler = Scheduler(Pages(10, SIZE), rows=1, queue=3)
    scheduler.submit([[1], [2]], 1)
    with pytest.raises(QueueFullError):
        scheduler.submit([[1], [2]], 1)
    assert len(scheduler.waiting) == 2


def test_a_row_that_waits_no_longer_leaves_the_queue():
    scheduler = Scheduler(Pages(10, SIZE), rows=1, queue=3)
    first, second = (scheduler.submit([[1, 2, 3]], 4)[0] for _ in range(2))
    scheduler.next(lambda row: row.left)
    assert scheduler.end(second) == []
    own = scheduler.end(first)
    assert len(own) == 1  # what it read has not been said to be fit to be shared
    assert scheduler.next(lambda row: row.left) is None
    assert scheduler.pages.available == 10
