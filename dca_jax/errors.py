"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input from a person: a file, a config, a prompt, a flag.

    The message says what was got, what was expected and what to do. The command line prints it
    and exits with code 2; any other exception is a bug and keeps its traceback.
    """


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turns an `InputError` into one message on stderr and exit code 2.

    Decorates a command, or wraps a block with `with`. With several processes it is
    `dca_jax.distributed.ending_together` that does so, once for all of them.
    """
    try:
        yield
    except InputError as error:
        from dca_jax.distributed import several_processes  # which imports this

        if several_processes():
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
