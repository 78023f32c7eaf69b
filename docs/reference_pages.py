"""Reference pages written from the code at every build: commands, models, finetuning settings."""

import dataclasses
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from dca_jax.cli import app
from dca_jax.cli.commands import COMMANDS
from dca_jax.config import FAMILIES
from dca_jax.finetune.settings import Settings
from dca_jax.planning.shapes import SHAPES
from dca_jax.rope import ROPE_TYPES
from dca_jax.weights.parameters import count_parameters


def write(out: Path) -> None:
    """Writes every page as Markdown into a folder."""
    out.mkdir(exist_ok=True)
    for name, lines in {
        "commands": commands(),
        "families": families(),
        "shapes": shapes(),
        "settings": settings(),
    }.items():
        text = "\n".join(lines) + "\n"
        page = out / f"{name}.md"
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def commands() -> Iterator[str]:
    """Every command with its help, its arguments and its options."""
    root: Any = typer.main.get_command(app)
    for panel, names in COMMANDS.items():
        yield f"## {panel}\n"
        for name in names:
            command = root.commands[name].load()
            yield from _command(f"dca-jax {name}", command, level=3)
            for part, inner in getattr(command, "commands", {}).items():
                yield from _command(f"dca-jax {name} {part}", inner, level=4)


def _command(name: str, command: Any, level: int) -> Iterator[str]:
    context = typer.Context(command, info_name=name)
    yield f"{'#' * level} {name}\n"
    yield textwrap.dedent(command.help or "") + "\n"
    records = [parameter.get_help_record(context) for parameter in command.params]
    rows = [record for record in records if record and not record[0].startswith("--help")]
    if hasattr(command, "commands") or not rows:
        return
    yield f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```\n"
    yield "| | |\n|---|---|"
    for option, text in rows:
        yield f"| {_code(option)} | {_cell(text)} |"
    yield ""


def families() -> Iterator[str]:
    """Model families, as `config.json` names them."""
    yield "| `model_type` | architecture |\n|---|---|"
    for name, family in FAMILIES.items():
        yield f"| `{name}` | `{family.architecture}` |"
    yield f"\nRoPE types: {', '.join(f'`{name}`' for name in ROPE_TYPES)}."


def shapes() -> Iterator[str]:
    """Published models that `plan` knows by name."""
    yield "| name | parameters | trained length |\n|---|---|---|"
    for name, config in SHAPES.items():
        billions = count_parameters(config) / 1e9
        yield f"| `{name}` | {billions:.1f} billion | {config.trained_length:,} |"


def settings() -> Iterator[str]:
    """Every line of a finetuning file."""
    yield "| key | default | |\n|---|---|---|"
    for field in dataclasses.fields(Settings):
        default = _default(field.default)
        yield f"| `{field.name}` | {default} | {_cell(field.metadata['help'])} |"


def _default(value: Any) -> str:
    if value in ("", None, ()):
        return ""
    if isinstance(value, tuple):
        return ", ".join(f"`{part}`" for part in value)
    return f"`{value}`"


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def _cell(text: str) -> str:
    """One table cell of Markdown; options are code, or their dashes would become one long one."""
    text = re.sub(r"(?<![\w`-])--[a-z][a-z-]*", r"`\g<0>`", text)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<").replace("$", "\\$")
