"""Processes that do one kind of work within limits of time and memory.

A chat template may loop forever, and a PDF of a few kilobytes may unpack to gigabytes: neither can
be stopped within one's own process. So they run in another process, which is started on first use,
reused for later requests, and ended with its owner or with the program.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

from dca_jax.fields import shown


class StoppedError(Exception):
    """The work was stopped; the message says why, as in "it takes longer than 10 seconds"."""


class RaisedError(Exception):
    """The work raised an exception; the message is the exception's, shortened to a line.

    Attributes:
        kind: the name of the exception's class.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(shown(message, quote=False))
        self.kind = kind


class Workers:
    """Processes that run one module of this package, one for each concurrent request.

    Threads may share an instance, and a forked process starts its own processes.

    Args:
        module: name of the module, whose `main` calls `dca_jax.bounded.child.serve`.
        seconds: time limit of a request.
        memory: memory limit of a process in bytes, if the system supports one.
    """

    def __init__(self, module: str, *, seconds: float, memory: int) -> None:
        self._module, self._seconds, self._memory = module, seconds, memory
        self._idle: list[tuple[int, subprocess.Popen[bytes]]] = []  # with the starting pid
        self.close = weakref.finalize(self, _end_all, self._idle)

    def ask(self, request: Any) -> Any:
        """The reply to a request; both are values that JSON can represent.

        Raises:
            RaisedError: the work raised an exception.
            StoppedError: it took too long or too much memory, or ended its process.
            TypeError, ValueError, RecursionError: the request is not such a value; a lone
                surrogate is a UnicodeEncodeError.
        """
        line = json.dumps(request, ensure_ascii=False).encode() + b"\n"
        process = self._process()
        try:
            reply = json.loads(_exchange(process, line, self._seconds))
        except BaseException:  # a KeyboardInterrupt too: the reply would be taken for the next one
            _end(os.getpid(), process)
            raise
        self._idle.append((os.getpid(), process))
        if "error" not in reply:
            return reply["value"]
        kind, message = reply["error"]
        if kind == "MemoryError":
            raise StoppedError(f"it needs more than {self._memory / 2**30:.2g} GiB of memory")
        raise RaisedError(kind, message)

    def _process(self) -> subprocess.Popen[bytes]:
        with contextlib.suppress(IndexError):  # another thread may take the last one
            while True:
                owner, process = self._idle.pop()
                if owner == os.getpid() and process.poll() is None:
                    return process
                _end(owner, process)
        # The other process can import the same modules, from the same places.
        places = [str(Path(place).absolute()) for place in sys.path]
        return subprocess.Popen(
            [sys.executable, "-P", "-m", self._module, f"{self._seconds}", f"{self._memory}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        )


def _exchange(process: subprocess.Popen[bytes], line: bytes, seconds: float) -> bytes:
    """Sends a request; returns its reply, a line of JSON.

    Raises:
        StoppedError: the process ended instead.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    reply = b""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line)
        process.stdin.flush()
        reply = process.stdout.readline()
    if reply.endswith(b"\n"):
        return reply
    code = process.wait()
    if code == -signal.SIGALRM:
        raise StoppedError(f"it takes longer than {seconds:g} seconds")
    how = signal.Signals(-code).name if code < 0 else f"code {code}"
    raise StoppedError(f"it ends the process that does it ({how})")


def _end_all(idle: list[tuple[int, subprocess.Popen[bytes]]]) -> None:
    while idle:
        _end(*idle.pop())


def _end(owner: int, process: subprocess.Popen[bytes]) -> None:
    """Ends a process and closes its pipes, unless another process started it."""
    ours = owner == os.getpid()
    if ours:
        process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # unsent data
            if pipe is not None:
                pipe.close()
    if ours:
        process.wait()
