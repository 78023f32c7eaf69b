"""The command line, `dca-jax ...`: parse, call the library, print.

Each group of commands has its own file; `commands.py` lists them by name. `options.py` has the
options that they share, and `launch.py` those given before the command.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from dca_jax.cli.commands import Commands
from dca_jax.cli.launch import launch
from dca_jax.disk import output_written
from dca_jax.distributed import ending_together, exit_on_input_error

app = typer.Typer(
    name="dca-jax",
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
app.callback()(launch)


@contextmanager
def _told_if_ended() -> Iterator[None]:
    """SIGTERM ends the program with a message and exit code 143, as Ctrl-C does with 130.

    Commands that write for a long time replace this handler once they have started, and report
    their progress.
    """
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit:
        if asked:
            print("stopped by SIGTERM", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """The entry point of the command `dca-jax`."""
    with _told_if_ended(), ending_together(), exit_on_input_error(), output_written():
        app()
