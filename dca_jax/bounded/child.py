"""The main loop of a child process: it sets its own limits, then answers line by line.

A request is a line of JSON on standard input. The reply, a line on the original standard output, is
{"value": ...}, or {"error": [class, message]} for an exception. A request that takes too long ends
the process by SIGALRM, so it ends even if the parent process is gone.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MESSAGE = 2000  # most characters of an error message


def serve(answer: Callable[[bytes], Any]) -> None:
    """Answers every request until there are no more.

    The program's arguments are the limits: seconds per request, and bytes of memory.

    Args:
        answer: function from a line of JSON to a value that JSON can represent.
    """
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends us
    with contextlib.suppress(OSError, ValueError):  # macOS has no limit on a process's memory
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries' prints must not become replies
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        replies.write(_reply(answer, line) + b"\n")
        replies.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


def _reply(answer: Callable[[bytes], Any], line: bytes) -> bytes:
    try:
        return json.dumps({"value": answer(line)}, ensure_ascii=False).encode()
    except Exception as error:  # libraries can raise anything on untrusted input
        described = [type(error).__name__, str(error)[:MESSAGE]]
    return json.dumps({"error": described}).encode()
