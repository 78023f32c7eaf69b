"""What runs in the process apart: it bounds itself, then answers line by line.

A request is a line of JSON on standard input; its reply, a line on what was standard output, is
{"value": ...}, or {"error": [class, message]} of what was raised. A request that takes too long
ends the process by SIGALRM: so it ends even where the process that asked is gone.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MESSAGE = 2000  # characters of an error that are worth sending


def serve(answer: Callable[[bytes], Any]) -> None:
    """Answers every request until there are no more.

    The program's arguments are the limits: seconds for a request, bytes of memory.

    Args:
        answer: from a line of JSON to a value that JSON can hold.
    """
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; we are told
    with contextlib.suppress(OSError, ValueError):  # macOS has no limit on a process's memory
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no reply
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        replies.write(_reply(answer, line) + b"\n")
        replies.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


def _reply(answer: Callable[[bytes], Any], line: bytes) -> bytes:
    try:
        return json.dumps({"value": answer(line)}, ensure_ascii=False).encode()
    except Exception as error:  # of a library, on other people's input: it may be any
        described = [type(error).__name__, str(error)[:MESSAGE]]
    return json.dumps({"error": described}).encode()
