"""The quickstart's Python runs, block after block, and every command that is printed is one."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from dca_jax.cli import app

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*/*.md"))]


def commands() -> list[list[str]]:
    """The words of each line of the pages' shell blocks, without comments."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_commands_have_the_options_they_are_printed_with():
    """Parsed and not run: their models are not here."""
    found = set()
    for words in commands():
        if "dca-jax" not in words:
            continue
        words = words[words.index("dca-jax") + 1 :]
        if "<" in words:
            words = words[: words.index("<")]
        command = typer.main.get_command(app)
        context = command.make_context("dca-jax", list(words))
        while hasattr(command, "commands"):
            words = [*context._protected_args, *context.args]
            name, command, rest = command.resolve_command(context, words)
            context = command.make_context(name, rest, parent=context)
            command = context.command  # `command` itself may be one that is imported later
            found.add(name)
    assert {"generate", "chat", "convert", "passkey", "finetune", "lm-eval", "plan"} <= found


def test_scripts_and_targets_that_are_named_are_there():
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for words in commands():
        if words[0] == "make":
            assert words[1] in targets, words
        for word in words:
            if re.fullmatch(r"(examples|benchmarks|tests)/.*", word):
                assert (REPOSITORY / word).exists(), words


@pytest.mark.slow
def test_quickstart_runs(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    page = (REPOSITORY / "docs/guides/generate.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    program = "\n".join(blocks)
    assert program.count("12_000") == 1
    program = program.replace("12_000", "4_000")  # characters of a text that is read four times
    # A token takes a quarter of a second as the tests compile; 120 show no more than 12.
    program, count = re.subn(r"max_new_tokens=\d+", "max_new_tokens=3", program)
    assert count == 3
    for model in re.findall(r'load\("([^"]+)"', program):
        if not Path(model).is_dir():
            pytest.skip(f"needs {model}")
    exec(compile(program, "quickstart.md", "exec"), {})
    printed = capsys.readouterr().out
    perplexities = [float(number) for number in re.findall(r"perplexity ([\d.]+)", printed)]
    with_dca, without = perplexities
    assert with_dca < 0.5 * without
    assert "the text is empty" in printed
