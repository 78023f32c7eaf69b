"""Files around a conversion: what comes along, and disks and signals that end it."""

import errno
import gc
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conversion_helpers import make_tiny
from shared_fixtures import invoke

from checkpoints_convert import hf_to_orbax, orbax_to_hf
from checkpoints_convert.common import told_if_stopped
from dca_jax.errors import InputError
from dca_jax.weights.files import written_aside

REPOSITORY = Path(__file__).resolve().parent.parent
CONVERT = {"hf_to_orbax": hf_to_orbax.convert, "orbax_to_hf": orbax_to_hf.convert}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each conversion is made from: the same model in either form, weights of 100 kB."""
    root = tmp_path_factory.mktemp("forms")
    source = make_tiny(root / "source", vocab_size=2000)
    hf_to_orbax.convert(source, root / "orbax")
    return {"hf_to_orbax": source, "orbax_to_hf": root / "orbax"}


def names(folder: Path) -> list[str]:
    return sorted(f"{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file())


# What comes along ------------------------------------------------------------------------------


def test_all_but_the_weights_comes_along_in_both_directions(tmp_path: Path) -> None:
    source = make_tiny(tmp_path / "source")
    kept = {
        "LICENSE": "licence",
        "README.md": "card",
        "USE_POLICY.md": "policy",
        "additional_chat_templates/tool_use.jinja": "tools",
        "chat_template.jinja": "chat",
        "chat_template.json": "{}",
        "preprocessor_config.json": "{}",
        "tekken.json": "{}",
        "tokenizer.model": "\0binary",
    }
    left = (
        "adapter_config.json consolidated.00.pth flax_model.msgpack model.gguf modeling.py "
        "model.safetensors.index.fp16.json optimizer.pt original/params.json provenance.json "
        "pytorch_model.bin pytorch_model.bin.index.json training_args.bin .gitattributes "
        "additional_chat_templates/code.py"
    ).split()
    for name in (*kept, *left):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(kept.get(name, "{}"))
    (source / "dangling.gguf").symlink_to(tmp_path / "gone")
    os.mkfifo(source / "pipe")
    hf_to_orbax.convert(source, tmp_path / "orbax")
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "back")
    always = ["config.json", "generation_config.json", "tokenizer.json"]
    assert names(tmp_path / "back") == sorted([*kept, *always, "model.safetensors"])
    for name, content in kept.items():
        assert (tmp_path / "back" / name).read_text() == content


@pytest.mark.parametrize("name", ["README.md", "additional_chat_templates/tool.jinja"])
def test_a_link_out_of_the_folder_does_not_come_along(tmp_path: Path, name: str) -> None:
    source = make_tiny(tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="is a link that leads out of its folder"):
        hf_to_orbax.convert(source, tmp_path / "orbax")
    assert not (tmp_path / "orbax").exists()


def test_a_snapshot_of_the_hugging_face_cache_comes_along(tmp_path: Path) -> None:
    """There every file is a link into the cache's own blobs, those of inner folders too."""
    files, snapshot = make_tiny(tmp_path / "files"), tmp_path / "hub" / "snapshots" / "1"
    (files / "additional_chat_templates").mkdir()
    (files / "additional_chat_templates" / "tool.jinja").write_text("tools")
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "hub" / "blobs").mkdir()
    for n, name in enumerate(names(files)):
        (files / name).rename(tmp_path / "hub" / "blobs" / str(n))
        (snapshot / name).symlink_to(tmp_path / "hub" / "blobs" / str(n))
    hf_to_orbax.convert(snapshot, tmp_path / "orbax")
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "back")
    assert names(tmp_path / "back") == names(snapshot)


# Disks -----------------------------------------------------------------------------------------


@pytest.fixture
def room() -> Iterator[Callable[[int], None]]:
    """Lets no file grow beyond so many bytes, as on a disk that is full; 0 is as before."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size or before[0], before[1]))

    yield limit
    limit(0)


@pytest.mark.parametrize("size", [1, 100, 20_000])
@pytest.mark.parametrize("kind", CONVERT)
def test_a_full_disk_leaves_nothing_and_is_one_sentence(
    both: dict[str, Path], tmp_path: Path, room: Callable[[int], None], kind: str, size: int
) -> None:
    destination = tmp_path / "out"
    room(size)
    with pytest.raises(InputError, match=f"{destination} cannot be written: File too large; raise"):
        CONVERT[kind](both[kind], destination)
    room(0)
    assert list(tmp_path.iterdir()) == []
    CONVERT[kind](both[kind], destination)
    assert list(tmp_path.iterdir()) == [destination]


@pytest.mark.parametrize("kind", CONVERT)
def test_destinations_that_cannot_be(
    both: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "file").write_text("mine")
    for name, message in (
        ("file", "exists already; remove it or choose another name"),
        ("file/out", "file is a file; expected a folder"),
        ("no/such/out", "no/such is not a folder; create it first"),
        ("x" * 300, "cannot be written: File name too long; choose a shorter name"),
        (".", "exists already"),
    ):
        result = invoke("convert", both[kind], tmp_path / name)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ")
        assert message in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "of a disk")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(InputError, match="cannot be written: Read-only file system; choose a"):
        CONVERT[kind](both[kind], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_source_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_tiny(tmp_path / "source")
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **named: Any) -> object:
        if path.name == "tokenizer.json" and arguments == ("rb",) and path.parent == source:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read: Permission denied"):
        hf_to_orbax.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bug_in_a_writer_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bug"), written_aside(tmp_path / "out"):
        raise ValueError("a bug")
    assert list(tmp_path.iterdir()) == []


# Signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", CONVERT)
def test_a_signal_says_that_nothing_was_written(
    both: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    number: signal.Signals,
) -> None:
    module, name = {
        "hf_to_orbax": (hf_to_orbax, "copy_description"),
        "orbax_to_hf": (orbax_to_hf, "copy_description"),
    }[kind]
    copy = getattr(module, name)

    def then_stop(*arguments: Path) -> object:
        copied = copy(*arguments)
        os.kill(os.getpid(), number)
        threading.Event().wait(5)  # the handler runs before this ends
        return copied

    monkeypatch.setattr(module, name, then_stop)
    before = signal.getsignal(number)
    result = invoke("convert", both[kind], tmp_path / "out")
    assert (result.exit_code, result.stdout) == (128 + number, "")
    assert f"stopped; {tmp_path / 'out'} was not written: run the same" in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_can_be_sent_again_where_python_dropped_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:  # as one that comes while JAX's own callback runs
        gc.callbacks.remove(stop)
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(5)

    with pytest.raises(SystemExit) as stopped, told_if_stopped(tmp_path / "out"):
        gc.callbacks.append(stop)
        gc.collect()
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(5)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "was not written: run the same command again" in capsys.readouterr().err
