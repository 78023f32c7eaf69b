"""The commands by name, each imported only when it is used.

This way `--help`, `--version` and a misspelt name do not import JAX, which takes seconds.
"""

import importlib
from typing import Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from dca_jax.cli.launch import PROCESSES
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.text_files import check_characters

# By panel and name: the file in `dca_jax/cli/` whose `app` has the command, and the first paragraph
# of its help.
COMMANDS = {
    "Run": {
        "generate": (
            "run",
            "Continue a prompt, a file or many prompts, or answer a question about a document.",
        ),
        "chat": ("run", "Talk to a chat model; each turn reads only the new tokens."),
        "serve": (
            "serve",
            "Serve a model over OpenAI's protocol, with continuous batching.",
        ),
    },
    "Measure": {
        "eval": (
            "measure",
            "Evaluate a model on long texts: each of the paper's tables and figures is one "
            "command.",
        ),
        "lm-eval": (
            "harness",
            "Run lm-evaluation-harness: LongBench, RULER, SCROLLS and all its other tasks.",
        ),
    },
    "Train": {
        "finetune": (
            "train",
            "Finetune a model on dialogues with Dual Chunk Attention: all weights, or LoRA.",
        ),
        "preview": (
            "train",
            "Show the rows that `finetune` would train on, and which tokens have a loss.",
        ),
    },
    "Prepare": {
        "convert": (
            "prepare",
            "Convert a Hugging Face folder or a GGUF file to Orbax, or a converted folder back.",
        ),
        "info": ("prepare", "Describe a checkpoint without reading its weights."),
        "plan": ("prepare", "Estimate memory per device before loading anything."),
        "explain": (
            "prepare",
            "Show the positions that a method assigns: chunks, distances, temperature.",
        ),
    },
}

# Names that other programs use for an option, and the name here.
ELSEWHERE = {
    "--api-key": "DCA_JAX_API_KEY in the environment",
    "--ctx-size": "--context",
    "--do-sample": "--temperature above 0",
    "--gpu-memory-utilization": "XLA_CLIENT_MEM_FRACTION in the environment",
    "--kv-cache-dtype": "--cache-dtype",
    "--load-in-4bit": "--weights int4",
    "--load-in-8bit": "--weights int8",
    "--lora": "--adapter",
    "--max-length": "--max-new-tokens, which counts only new tokens",
    "--max-model-len": "--context",
    "--max-num-seqs": "--rows",
    "--max-tokens": "--max-new-tokens",
    "--n-predict": "--max-new-tokens",
    "--quantization": "--weights",
    "--served-model-name": "--name",
    "--tensor-parallel-size": "--mesh tensor=N",
    "--torch-dtype": "--dtype",
}


class Later(TyperCommand):
    """A command that is imported only when its own arguments are parsed."""

    def __init__(self, name: str, panel: str, file: str, summary: str) -> None:
        super().__init__(name, help=summary, rich_help_panel=panel)
        self.file = file

    def load(self) -> Any:
        """The actual command or group of commands."""
        module = importlib.import_module(f"dca_jax.cli.{self.file}")
        found: Any = typer.main.get_command(module.app)
        return found if found.name == self.name else found.commands[self.name]

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        """The context of the loaded command; its `command` is not this placeholder."""
        command = self.load()
        with exit_on_input_error():
            try:
                return command.make_context(info_name, args, *rest, **extra)
            except Exception as error:  # Typer's exception for an unknown option is private
                asked = getattr(error, "option_name", None)
                meant = ELSEWHERE.get(asked or "", "")
                own = {name for param in getattr(command, "params", ()) for name in param.opts}
                name = meant.partition(" ")[0].rstrip(",")
                if not meant or (name.startswith("--") and name not in own):
                    raise
                raise InputError(f"there is no option {asked}; here it is {meant}") from None


class Commands(TyperGroup):
    """All commands; help shows the options for several processes last."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        for panel, commands in COMMANDS.items():
            for name, (file, summary) in commands.items():
                self.add_command(Later(name, panel, file, summary))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Click's own, after checking that every argument is valid text."""
        with exit_on_input_error():
            for number, word in enumerate(args, start=1):
                check_characters(word, f"argument {number} of dca-jax")
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Typer's help without the options for several processes, then those options."""
        last = [p for p in self.params if getattr(p, "rich_help_panel", None) == PROCESSES]
        table = Table.grid(padding=(0, 2))
        for option in last:
            table.add_row(*(option.get_help_record(ctx) or ()))
        kept, self.params = self.params, [p for p in self.params if p not in last]
        try:
            super().format_help(ctx, formatter)
        finally:
            self.params = kept
        Console().print(Panel(table, title=PROCESSES, title_align="left", border_style="dim"))
