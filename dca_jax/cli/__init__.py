"""The command line, `dca-jax ...`: parse, call the library, print.

One file a group of commands (`commands.py` has their names); `options.py` has what they share,
`launch.py` what comes before them.
"""

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


def main() -> None:
    """The entry point of the command `dca-jax`."""
    with ending_together(), exit_on_input_error(), output_written():
        app()
