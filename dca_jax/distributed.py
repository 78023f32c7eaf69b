"""Several processes as one program: they start and end together, and print and write once.

On several hosts, every host runs the same program, and JAX combines the devices of all into one
`jax.devices()` (https://docs.jax.dev/en/latest/multi_process.html). A mesh over them is made as on
one host, and the rest of the package does not depend on the number of processes, except for two
rules:

    every process must run the same computations in the same order, or all of them hang
    only the primary, process 0, prints results and writes files that are not sharded arrays

Arrays that are split over processes can be used in computations, but not fetched to one host.

JAX, which takes seconds to import, is imported only where there can be several processes; the
command line's help and its errors do not need it.
"""

import json
import os
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dca_jax.errors import InputError

START_TIMEOUT = 300  # seconds that a process waits for the others to start
PEER_TIMEOUT = 60  # seconds without a heartbeat after which a process counts as dead
MEETING_SECONDS = 5  # that a failing process waits for the same failure in the others


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout: int = START_TIMEOUT,
    peer_timeout: int = PEER_TIMEOUT,
) -> None:
    """Connects this process with the others; call it before any device is used.

    Arguments that are None are detected where JAX can: SLURM, Open MPI (4, or 5 with mpi4py), a TPU
    pod on Compute Engine or GKE, Kubernetes jobs. There a process uses the one device with its
    local number, unless JAX_LOCAL_DEVICE_IDS names more ("0,1,2,3"); TPUs are an exception. If all
    three are given, each process uses every device of its host that it can see.

    A peer that dies silently is noticed after `peer_timeout`, and JAX then aborts this process
    (SIGABRT). Most deaths are noticed at once through the broken connection.

    Args:
        coordinator: "host:port" of process 0; the port must be free there and reachable by the
            others.
        num_processes: total number of processes on all hosts.
        process_id: number of this process, from 0.
        start_timeout: seconds to wait for all processes; after that the program ends with code 1,
            because JAX cannot retry in the same process.
        peer_timeout: seconds without a heartbeat, the same in all processes.

    Raises:
        InputError: a number that is neither given nor detected, or out of range; an invalid address
            or one in use; a device has already been used.
    """
    import jax

    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    _check(coordinator, num_processes, process_id, start_timeout, peer_timeout)
    given = None not in (coordinator, num_processes, process_id)
    # It would catch SIGTERM, so that neither `kill` nor a scheduler could end the program cleanly.
    jax.config.update("jax_enable_preemption_service", False)
    patience = threading.Timer(start_timeout, _give_up, (coordinator, process_id, start_timeout))
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if given else None,
            # JAX's own timeout prints a stack trace, so it is longer than ours.
            initialization_timeout=start_timeout + 30,
            heartbeat_timeout_seconds=peer_timeout,
        )
        jax.devices()  # now, in all processes: one that fails alone later would wait for the others
    except (ValueError, TypeError) as error:  # a required value is None
        raise InputError(
            f"the coordinator or number of processes could not be detected ({error}): give "
            "the coordinator, the number of processes and the process id, or start them where JAX "
            "detects these (SLURM, Open MPI, Kubernetes, a TPU pod)"
        ) from error
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"this process could not join the others ({error}): is the coordinator's port "
            f"{'' if coordinator is None else coordinator.rpartition(':')[2] + ' '}free, and was "
            "no device used before?"
        ) from error
    finally:
        patience.cancel()


def is_primary() -> bool:
    """Whether this process prints and writes: the only one, or process 0."""
    return not several_processes() or _number_of_all()[0] == 0


def several_processes() -> bool:
    """Whether this program runs in several processes; uses no device if it does not."""
    return _number_of_all()[1] > 1


def _number_of_all() -> tuple[int, int]:
    """This process's number, and the number of processes."""
    if "jax" not in sys.modules:  # then no processes can be connected
        return 0, 1
    import jax

    if not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


def print_once() -> None:
    """From here on, discards the standard output of all processes but the primary."""
    if not is_primary():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 -- as long as the process lives


def from_primary(make: Callable[[], Any]) -> Any:
    """Calls `make` in the primary only, and returns its result in every process.

    Use it for values that only the primary can know, such as the contents of a results file. All
    processes must call it together.

    Args:
        make: function with a JSON-serializable result.

    Raises:
        InputError: in every process, if `make` raised one.
    """
    if not several_processes():
        return make()
    import numpy as np
    from jax.experimental import multihost_utils

    reply = b""
    if is_primary():
        try:
            reply = json.dumps({"value": make()}).encode()
        except InputError as error:
            reply = json.dumps({"error": str(error)}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(reply))))
    padded = np.zeros(size, np.uint8)
    padded[: len(reply)] = np.frombuffer(reply, np.uint8)
    received = json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())
    if "error" in received:
        raise InputError(received["error"])
    return received["value"]


@contextmanager
def ending_together() -> Iterator[None]:
    """Ends a program of several processes cleanly; the block is the whole program.

    An error that occurs in all processes, such as a wrong option, is printed once by the primary. A
    process that fails alone prints the error with its number and exits at once, because JAX would
    make it wait for the others, which wait for it. The others then end too (`initialize`).

    The exit code is 2 for an `InputError`, 1 for any other exception, and that of `SystemExit`.
    With one process it does nothing.
    """
    try:
        yield
    except BaseException as error:
        if several_processes():
            _end(error)
        raise


def _end(error: BaseException) -> None:
    """Prints an exception for `ending_together`; returns only if all processes had the same."""
    import jax

    if isinstance(error, SystemExit):
        if error.code not in (None, 0) and not _meet(f"exit {error.code}"):
            _leave(error.code if isinstance(error.code, int) else 1)
    elif isinstance(error, InputError):
        if not _meet(f"error: {error}"):
            _say(str(error))
            _leave(2)
        if is_primary():
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    elif isinstance(error, jax.errors.JaxRuntimeError):
        _say(
            f"a computation shared with the other processes failed: {str(error)[:2000]}\n"
            "If this mentions a connection or a peer, another process ended first; what it "
            "said before tells why"
        )
        _leave(1)
    else:
        traceback.print_exception(error)
        _say(f"ended by {type(error).__name__}")
        _leave(130 if isinstance(error, KeyboardInterrupt) else 1)


def _check(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    start_timeout: int,
    peer_timeout: int,
) -> None:
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError(
                f"the coordinator must be process 0's host and a free port on it, such as "
                f"node1:8476; got {coordinator!r}"
            )
    if num_processes is not None and num_processes < 1:
        raise InputError(f"the number of processes must be at least 1, got {num_processes}")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        raise InputError(
            f"the process id must be from 0 to one less than the number of processes, "
            f"{num_processes}; got {process_id}"
        )
    if start_timeout < 1 or peer_timeout < 10:
        raise InputError(
            f"the start timeout must be at least 1 second and the peer timeout at least 10, got "
            f"{start_timeout} and {peer_timeout}"
        )


def _give_up(coordinator: str | None, process_id: int | None, seconds: int) -> None:
    """Called by a timer while JAX waits, where no exception could be raised."""
    place = "the coordinator" if coordinator is None else coordinator
    who = "this process" if process_id is None else f"process {process_id}"
    print(
        f"error: {who} has waited {seconds} s at {place}, but not all processes have started; "
        "check that each was started with the same coordinator and number of processes and its own "
        "id, and that it can reach that address",
        file=sys.stderr,
    )
    _leave(1)


def _meet(what: str) -> bool:
    """Whether every process calls this with the same `what`; waits for them for a short time."""
    import jax
    from orbax.checkpoint import multihost  # slow to import, and needed only after an error

    everyone = set(range(jax.process_count()))
    name = f"dca_jax.{zlib.crc32(what.encode())}"
    try:
        multihost.sync_global_processes(name, timeout=MEETING_SECONDS, processes=everyone)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _say(message: str) -> None:
    number, processes = _number_of_all()
    print(f"error: process {number} of {processes}: {message}", file=sys.stderr)


def _leave(code: int) -> NoReturn:
    """Ends the process at once, without JAX's shutdown, which waits for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turns an `InputError` into one message on stderr and exit code 2.

    Decorates a command, or wraps a block with `with`. With several processes, `ending_together`
    does this once for all of them.
    """
    try:
        yield
    except InputError as error:
        if several_processes():
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
