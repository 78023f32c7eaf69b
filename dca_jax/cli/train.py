"""Commands that train: `finetune` and `preview`.

The flags of both are generated from the fields of `Settings`, so there is only one list of them.
The code that reads dialogues and trains is imported only when needed: it takes seconds, and it
needs packages that other commands do not.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dca_jax.cli.options import with_signature
from dca_jax.distributed import exit_on_input_error, is_primary
from dca_jax.errors import InputError
from dca_jax.finetune.settings import Files, Settings, read_settings

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

ConfigArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="CONFIG", help="A YAML file of settings; every flag below overrides its line."
    ),
]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Adds a flag for each setting to a command that takes them as `**flags`."""

    @functools.wraps(command)
    def call(**given: Any) -> None:
        command(**given)

    own = [p for p in inspect.signature(command).parameters.values() if p.kind != p.VAR_KEYWORD]
    added = [
        inspect.Parameter(row.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=flag)
        for row in fields(Settings)
        for flag in [_flag(row)]
    ]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    return with_signature(call, [*own, *added])


def _flag(row: Any) -> Any:
    """A setting as a Typer option: a string, except for switches and repeatable options."""
    name = row.name.replace("_", "-")
    default = row.default
    if row.type == Files or row.type == tuple[str, ...]:
        kind, names = list[str] | None, [f"--{name}"]
        default = ", ".join(map(str, default))
    elif row.type is bool:
        kind, names = bool | None, [f"--{name}/--no-{name}"]
        default = "yes" if default else "no"
    else:
        kind, names = str | None, [f"--{name}"]
    shown = "" if default in ("", None) else f" [default: {default}]"
    choices = row.metadata["choices"]
    metavar = None if row.type is bool else "|".join(choices) if choices else _METAVARS[row.type]
    metavar = "TOKENS" if row.metadata["tokens"] else metavar
    help = f"{row.metadata['help']}{shown}"
    return Annotated[kind, typer.Option(*names, help=help, metavar=metavar, show_default=False)]


_METAVARS = {
    str: "TEXT",
    int: "N",
    int | None: "N",
    float: "X",
    Files: "FILE[=WEIGHT]",
    tuple[str, ...]: "NAME",
}


@app.command()
@exit_on_input_error()
@with_settings
def finetune(config: ConfigArgument = None, **flags: Any) -> None:
    """Finetune a model on dialogues with Dual Chunk Attention: all weights, or LoRA.

    The loss is on the assistant's turns only. Every other command can read the trained model in
    OUTPUT/model; `dca-jax convert` turns it into a Hugging Face folder.

    To resume an interrupted run, repeat the command. SIGTERM and Ctrl-C save a checkpoint first;
    after a kill the run continues from its last checkpoint, with the same losses.

    For example:

    - `dca-jax finetune examples/finetune_16k.yaml --model ./Llama-2-7b-chat-hf --mesh fsdp=4`

    - `dca-jax finetune --model ./Llama-2-7b-chat-hf --data sharegpt.json --output ./run`

    - `dca-jax finetune my.yaml --lora-rank 16 --base int8 --learning-rate 2e-4 --output ./lora`
    """
    settings = read_settings(config, flags)
    _need_packages()
    from dca_jax.finetune.run import finetune as run

    folder = run(settings)
    if is_primary():
        print(f"wrote {folder}")


@app.command()
@exit_on_input_error()
@with_settings
def preview(
    config: ConfigArgument = None,
    rows: Annotated[int, typer.Option(help="Number of rows to show.")] = 2,
    **flags: Any,
) -> None:
    """Show the rows that `finetune` would train on, and which tokens have a loss.

    It takes the same settings as `finetune` and does not read the weights.

    For example: `dca-jax preview examples/finetune_16k.yaml --model ./Llama-2-7b-chat-hf`
    """
    if rows < 1:
        raise InputError(f"--rows must be at least 1, got {rows}")
    settings = read_settings(config, flags | {"output": "-"})  # nothing is written
    _need_packages()
    from dca_jax.finetune.run import show_rows

    show_rows(settings, rows, Console())


def _need_packages() -> None:
    """Raises InputError, before anything else, if a package of the extra `train` is missing."""
    for name in ("optax", "grain", "yaml"):
        try:
            __import__(name)
        except ImportError:
            raise InputError(
                f"finetuning needs the package {name}: pip install 'dca_jax[train]'"
            ) from None
