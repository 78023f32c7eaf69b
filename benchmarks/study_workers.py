"""Reads cells in several processes that share a device, within a time limit.

With a small model most of the time goes into compiling and making prompts, each on one core, so
several processes share the device. Each keeps the model loaded. A free one takes the next cell, if
possible of the method whose programs it has compiled. Their output goes to files.
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

NEAR = 12  # how many cells ahead may be taken for the sake of compiled programs
Read = Callable[[Cell], dict[str, Any]]


class Done(NamedTuple):
    """A worker's report on a cell: its result, or why it failed."""

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
    """Reads the cells, roughly in order; returns whether all were started and finished.

    After `minutes` the workers are stopped. What a cell has read so far is kept in its own file,
    and another run continues from there. SIGTERM and Ctrl-C stop them in the same way.

    Args:
        make: makes the reader in each process (so it is pickled), before its first cell.
        logs: a folder for the workers' output.
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
    """A process and its current cell."""

    def __init__(self, make: Callable[[], Read], log: Path) -> None:
        context = multiprocessing.get_context("spawn")  # forking a process that uses JAX may hang
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(theirs, make, log))
        self.process.start()
        theirs.close()
        self.log = log
        self.cell: Cell | None = None
        self.method: str | None = None
        self._since = 0.0

    def give(self, cell: Cell) -> None:
        """Gives the process a cell to read."""
        self.cell, self.method, self._since = cell, cell.method, time.monotonic()
        self.connection.send(cell)

    def take(self) -> Done:
        """The report on its cell; if the process has died, that."""
        assert self.cell is not None
        cell, self.cell = self.cell, None
        try:
            found, failed = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            found, failed = {}, f"the process ended with code {self.process.exitcode}: {self.log}"
        return Done(cell, found, failed, time.monotonic() - self._since)


def _work(connection: Connection, make: Callable[[], Read], log: Path) -> None:
    """The main function of a worker."""
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
        except Exception as error:  # one cell's failure must not lose the others
            found = {}, reason(error)
        connection.send(found)


def _end_with_parent() -> None:
    """Ends this process with its parent, so that no worker of a killed study keeps writing."""
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
    """In the block, SIGTERM acts like Ctrl-C, with the exit code of a terminated program."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
