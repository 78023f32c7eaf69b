"""The quickstart does what it says: its Python runs, block after block, as one program."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_quickstart_runs(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    page = (REPOSITORY / "docs/quickstart.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    program = "\n".join(blocks)
    assert program.count("12_000") == 1
    program = program.replace("12_000", "6_000")  # characters of a text that is read four times
    for model in re.findall(r'load\("([^"]+)"', program):
        if not Path(model).is_dir():
            pytest.skip(f"needs {model}")
    exec(compile(program, "quickstart.md", "exec"), {})
    printed = capsys.readouterr().out
    perplexities = [float(number) for number in re.findall(r"perplexity ([\d.]+)", printed)]
    with_dca, without = perplexities
    assert with_dca < 0.5 * without
    assert "the text is empty" in printed
