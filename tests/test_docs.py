"""Every command that a page prints is one: its options, scripts, extras and targets are there."""

import importlib
import re
import tomllib
from pathlib import Path

import pages
import pytest
import typer.main
from pages import REPOSITORY

TARGETS = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
# Programs of other people, whose options are theirs.
OTHERS = [".", "curl", "echo", "export", "git", "mv", "unzip"]


def check(words: list[str]) -> None:
    """Fails unless the command could be given as it is printed."""
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "dca-jax":
        if rest[-1] == "...":  # what several processes are told alike
            rest = [*rest[:-1], "model", "prompt"]
        pages.parse(rest)
    elif program == "make":
        (target,) = (word for word in rest if "=" not in word)
        assert target in TARGETS
    elif program == "pip":
        for names in re.findall(r"(?:^|dca_jax|\.)\[(.+?)\]", " ".join(rest)):
            assert set(names.split(",")) <= set(EXTRAS)
    elif program == "bash":
        script, _name, _zone, *command = rest
        assert (REPOSITORY / script).is_file()
        pages.parse(command)
    elif program in ("python", "python3"):
        check_python(rest)
    else:
        assert program in OTHERS


def check_python(words: list[str]) -> None:
    """`python -m MODULE` and `python FOLDER/SCRIPT.py`, by the script's own command line."""
    if words[:2] == ["-m", "pytest"]:
        files = [word.partition("::")[0] for word in words if word.startswith("tests/")]
        assert all((REPOSITORY / file).exists() for file in files)
        return
    if words[0] == "-m":
        name, words = words[1], words[2:]
    else:
        path, *words = words
        assert (REPOSITORY / path).is_file()
        name = path.removesuffix(".py").rpartition("/")[2]
    if "--help" in words or name in ("mutations", "kills", "venv"):  # without options of ours
        return
    module = importlib.import_module(name)
    app = getattr(module, "app", None)
    if app is None and hasattr(module, "argparse"):
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))
        return
    if app is None:
        app = typer.Typer()
        app.command()(module.main)
    pages.parse(words, typer.main.get_command(app), name)


@pytest.mark.parametrize("page", pages.PAGES)
def test_commands_are_as_they_are_printed(page):
    for block in pages.blocks(page):
        assert block.language in pages.LANGUAGES + pages.OTHERS, f"{page}:{block.line}"
        if block.language != "sh":
            continue
        for line in block.commands():
            for words, _ in pages.simple(line):
                try:
                    check(words)
                except Exception as error:
                    raise AssertionError(f"{page}:{block.line}: {' '.join(words)}") from error


def test_the_pages_show_every_group_of_commands():
    shown = {
        words[1]
        for page in pages.PAGES
        for block in pages.blocks(page)
        if block.language == "sh"
        for line in block.commands()
        for words, _ in pages.simple(line)
        if words[0] == "dca-jax"
    }
    named = "generate chat serve eval lm-eval finetune preview convert info plan explain"
    assert set(named.split()) <= shown
