"""The command line, `dca-jax ...`: parse, call the library, print.

One file a group of commands; `options.py` has what they share, `launch.py` what comes before them.
"""

import typer

from dca_jax.cli import measure, prepare, run, serve, train
from dca_jax.cli.launch import Commands, launch
from dca_jax.disk import output_written
from dca_jax.distributed import ending_together, exit_on_input_error

RUN, MEASURE, TRAIN, PREPARE = "Run", "Measure", "Train", "Prepare"

app = typer.Typer(
    name="dca-jax",
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
app.callback()(launch)
app.command(rich_help_panel=RUN)(run.generate)
app.command(rich_help_panel=RUN)(run.chat)
app.command(rich_help_panel=RUN)(serve.serve)
app.add_typer(measure.app, rich_help_panel=MEASURE)
app.command(
    "lm-eval",
    rich_help_panel=MEASURE,
    context_settings={"ignore_unknown_options": True},  # they are lm-eval's
)(measure.lm_eval)
app.command(rich_help_panel=TRAIN)(train.finetune)
app.command(rich_help_panel=TRAIN)(train.preview)
app.command(rich_help_panel=PREPARE)(prepare.convert)
app.command(rich_help_panel=PREPARE)(prepare.info)
app.command("plan", rich_help_panel=PREPARE)(prepare.plan_command)
app.command("explain", rich_help_panel=PREPARE)(prepare.explain_command)


def main() -> None:
    """The entry point of the command `dca-jax`."""
    with ending_together(), exit_on_input_error(), output_written():
        app()
