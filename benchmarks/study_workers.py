"""Cells read by several processes of one device, as far as the time goes.

Most of the time of a small model goes into compiling and into making prompts, which a core each
does: so several processes share the device. Each keeps the model; a free one takes the next cell,
if it can one of the method whose programs it has. What they say goes into files.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from common import reason, say
from study_cells import Cell

NEAR = 12  # cells that may be taken out of turn, for their method's programs
Read = Callable[[Cell], dict[str, Any]]


class Done(NamedTuple):
    """What a worker says of a cell: what came out, or why nothing did."""

    cell: Cell
    found: dict[str, Any]
    failed: str | None
    seconds: float


def read_cells(
    cells: Sequence[Cell],
    make: Callable[[], Read],
    *,
    workers: int,
    minutes: float,
    logs: Path,
    on_done: Callable[[Done], None],
) -> bool:
    """Reads the cells, in about their order; returns whether all have been taken and ended.

    After `minutes` the workers are ended where they are: what a cell has read so far is kept in its
    own file, and another run goes on from there. SIGTERM and Ctrl-C end them likewise.

    Args:
        make: made anew in each process (so it is pickled), before its first cell.
        logs: a folder for what the workers print.
    """
    end = time.monotonic() + 60 * minutes
    left = list(cells)
    logs.mkdir(parents=True, exist_ok=True)
    with _workers(min(workers, len(left)), make, logs) as pool, _terminable():
        while pool and (left or any(worker.cell for worker in pool)):
            for worker in pool:
                if left and worker.cell is None:
                    worker.give(left.pop(_nearest(left, worker.method)))
            patience = end - time.monotonic()
            if patience <= 0:
                return False
            busy = [worker for worker in pool if worker.cell is not None]
            ready = wait([worker.connection for worker in busy], min(patience, 3600))
            for worker in (worker for worker in busy if worker.connection in ready):
                done = worker.take()
                on_done(done)
                if not worker.process.is_alive():
                    pool.remove(worker)
        return not left


def _nearest(cells: Sequence[Cell], method: str | None) -> int:
    same = (n for n, cell in enumerate(cells[:NEAR]) if cell.method == method)
    return next(same, 0)


class _Worker:
    """A process, and the cell that it has."""

    def __init__(self, make: Callable[[], Read], log: Path) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with JAX may hang
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(theirs, make, log))
        self.process.start()
        theirs.close()
        self.log = log
        self.cell: Cell | None = None
        self.method: str | None = None
        self._since = 0.0

    def give(self, cell: Cell) -> None:
        """A cell to read."""
        self.cell, self.method, self._since = cell, cell.method, time.monotonic()
        self.connection.send(cell)

    def take(self) -> Done:
        """What came of its cell; of a process that has died, that."""
        assert self.cell is not None
        cell, self.cell = self.cell, None
        try:
            found, failed = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            found, failed = {}, f"the process ended with code {self.process.exitcode}: {self.log}"
        return Done(cell, found, failed, time.monotonic() - self._since)


def _work(connection: Connection, make: Callable[[], Read], log: Path) -> None:
    """What a worker does."""
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    read = make()
    while True:
        try:
            cell = connection.recv()
        except EOFError:
            return
        say(f"--- {cell}")
        try:
            found = read(cell), None
        except Exception as error:  # one cell's failure loses no other
            found = {}, reason(error)
        connection.send(found)


def _end_with_parent() -> None:
    """So that no worker of a study that was killed goes on writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _workers(count: int, make: Callable[[], Read], logs: Path) -> Iterator[list[_Worker]]:
    pool = [_Worker(make, logs / f"{n}.log") for n in range(count)]
    try:
        yield pool
    finally:
        for worker in pool:
            worker.process.terminate()
        for worker in pool:
            worker.process.join()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, with the code of a program that it has ended."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
