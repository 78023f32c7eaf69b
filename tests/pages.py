"""The code blocks of README.md, CONTRIBUTING.md and docs/, and the commands that they print."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer
import typer.main
from markdown_it import MarkdownIt

from dca_jax.cli import app

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = sorted((REPOSITORY / "docs").rglob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += [
    str(f.relative_to(REPOSITORY)) for f in FOLDER if not {"_build", "_generated"} & {*f.parts}
]
# The languages of blocks that are run or parsed, and of those that are not.
LANGUAGES = ["python", "sh"]
OTHERS = ["text", "bibtex", "json"]
PROGRAMS = (
    "bash curl dca-jax echo export git make pip python unzip .venv/bin/pip .venv/bin/python".split()
)


@dataclass(frozen=True)
class Block:
    """A block of code, and the line of its page after which it begins."""

    page: str
    line: int
    language: str
    text: str

    def commands(self) -> Iterator[list[str]]:
        """The words of each line of a shell block, without comments."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """All code blocks of a page, fenced or indented, except directives (`{toctree}`)."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    found = []
    for token in MarkdownIt().parse(text):
        if token.type == "fence" and not token.info.startswith("{"):
            language = token.info.strip()
        elif token.type == "code_block":  # a drawing, a formula, or commands
            language = "sh" if _is_shell(token.content) else "text"
        else:
            continue
        found.append(Block(page, (token.map or [0])[0] + 1, language, token.content))
    return tuple(found)


def _is_shell(text: str) -> bool:
    words = [word for word in text.split(maxsplit=2) if "=" not in word]
    return bool(words) and words[0] in PROGRAMS


def simple(words: list[str]) -> Iterator[tuple[list[str], str]]:
    """A line's commands without assignments and redirections, each with its terminator."""
    command: list[str] = []
    words = [*words, ";"]
    while words:
        word = words.pop(0)
        if word in ("|", "&&", ";"):
            yield command, word
            command = []
        elif word in ("<", ">"):
            words.pop(0)
        elif command or not re.match(r"[A-Z0-9_]+=", word):
            command.append(word)


def parse(words: list[str], command: Any = None, name: str = "dca-jax") -> Any:
    """Click's context of `dca-jax WORDS`; a mistake raises Click's own error."""
    command = command or typer.main.get_command(app)
    context = command.make_context(name, list(words))
    while hasattr(command, "commands"):
        words = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, words)
        context = command.make_context(name, rest, parent=context)
        command = context.command  # `command` itself may be a placeholder that imports it
    return context
