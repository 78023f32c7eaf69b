"""Several processes as one program: started together, ended together, printing and writing once.

On more than one host every host runs the same program, and JAX joins the devices of all into one
`jax.devices()` (https://docs.jax.dev/en/latest/multi_process.html). A mesh over them is then made
as on one host, and nothing else in this package knows how many processes there are, but that

    every process must ask the devices for the same things in the same order, or all of them wait
    only the primary, process 0, prints results and writes files that are not sharded arrays

Arrays that are cut between processes can be computed with, and cannot be brought to one host.

JAX, which takes seconds to import, is imported only where several processes may be: the command
line's help and its errors do without it.
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

START_TIMEOUT = 300  # seconds that a process waits for the others to come
PEER_TIMEOUT = 60  # seconds without a sign of life after which a process counts as dead
MEETING_SECONDS = 5  # that a process which fails waits for the others to fail alike


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout: int = START_TIMEOUT,
    peer_timeout: int = PEER_TIMEOUT,
) -> None:
    """Joins this process with the others; call it before anything else touches a device.

    What is None comes from the environment, where JAX knows it: SLURM, Open MPI (4, or 5 with
    mpi4py), a TPU pod on Compute Engine or GKE, Kubernetes jobs. There a process takes the one
    device of its number on its host, unless JAX_LOCAL_DEVICE_IDS names more ("0,1,2,3"); TPUs
    excepted. With all three given, each process takes every device of its host that it can see.

    A peer that dies without a word is noticed after `peer_timeout`, and JAX then ends this process
    (SIGABRT), wherever it is; most deaths are noticed at once, by the connection they break.

    Args:
        coordinator: "host:port" of process 0, a port that is free there and open to the others.
        num_processes: of all hosts together. process_id: from 0.
        start_timeout: seconds to wait until all are there; if they are not, the program ends with
            code 1, for JAX cannot begin again in the same process.
        peer_timeout: seconds, the same in all processes.

    Raises:
        InputError: a number that is not given and not found, or out of range; an address that is
            none, or taken; a device was touched before.
    """
    import jax

    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    _check(coordinator, num_processes, process_id, start_timeout, peer_timeout)
    given = None not in (coordinator, num_processes, process_id)
    # It would catch SIGTERM, so that neither `kill` nor a scheduler could end the program kindly.
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
            # JAX's own end of patience is a stack trace: it comes only if ours does not.
            initialization_timeout=start_timeout + 30,
            heartbeat_timeout_seconds=peer_timeout,
        )
        jax.devices()  # here, where all are; later, one that fails alone would wait for the others
    except (ValueError, TypeError) as error:  # something is None that must not be
        raise InputError(
            f"how many processes there are, and where, is not known ({error}): give the "
            "coordinator, the number of processes and the process id, or start them where JAX "
            "finds these (SLURM, Open MPI, Kubernetes, a TPU pod)"
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
    """Whether this is the process that prints and writes: the only one, or process 0."""
    return not several_processes() or _number_of_all()[0] == 0


def several_processes() -> bool:
    """Whether this program runs in several processes; asking touches no device if it does not."""
    return _number_of_all()[1] > 1


def _number_of_all() -> tuple[int, int]:
    """This process' number, and how many there are."""
    if "jax" not in sys.modules:  # then nobody can have joined others
        return 0, 1
    import jax

    if not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


def print_once() -> None:
    """From here on, what others than the primary print is dropped; errors are not."""
    if not is_primary():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 -- as long as the process lives


def from_primary(make: Callable[[], Any]) -> Any:
    """What `make` returns in the primary, which alone calls it: in every process.

    For what only the primary can know, such as what a file of results holds already. All
    processes must call this together.

    Args:
        make: returns what JSON can hold.

    Raises:
        InputError: `make` raised one; then in every process.
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
    """Ends a program of several processes well: the block is the whole program.

    What all processes run into alike, such as a wrong option, is said once, by the primary. What
    one runs into alone it says under its number, and it ends at once, whatever it holds: JAX would
    let it wait for the others, which wait for it. They then end, too (`initialize`).

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
    """What `ending_together` says of an exception; returns if all processes have it, said once."""
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
            "If this speaks of a connection or of a peer, another process ended first; what it "
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
                f"the coordinator is process 0's host and a free port there, such as node1:8476; "
                f"got {coordinator!r}"
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
            f"processes need at least 1 second to start and 10 for a sign of life, got "
            f"{start_timeout} and {peer_timeout}"
        )


def _give_up(coordinator: str | None, process_id: int | None, seconds: int) -> None:
    """Called by a timer while JAX waits, where no exception can reach."""
    place = "the coordinator" if coordinator is None else coordinator
    who = "this process" if process_id is None else f"process {process_id}"
    print(
        f"error: {who} has waited {seconds} s at {place}, and not all processes have come; check "
        "that each was started with the same coordinator and number and an id of its own, and that "
        "it reaches that address",
        file=sys.stderr,
    )
    _leave(1)


def _meet(what: str) -> bool:
    """Whether every process comes here with the same `what`; waits for it a little."""
    import jax
    from orbax.checkpoint import multihost  # slow to import, and needed at a bad end only

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
    """Ends the process now, without the goodbye in which JAX waits for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turns an `InputError` into one message on stderr and exit code 2.

    Decorates a command, or wraps a block with `with`. With several processes it is
    `ending_together` that does so, once for all of them.
    """
    try:
        yield
    except InputError as error:
        if several_processes():
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
