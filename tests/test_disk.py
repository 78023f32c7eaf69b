"""What the system refuses to write becomes one sentence."""

import errno
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore as ts
from safetensors.numpy import save_file
from shared_fixtures import invoke

from dca_jax.disk import append, writing
from dca_jax.errors import InputError


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 100 bytes; nor may the one pytest reports into, so no fixture."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_refused_write_says_which_path_why_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "out"
    expected = re.escape(f"{path} cannot be written: File too large; raise the limit")
    with pytest.raises(InputError, match=expected), full_disk(), writing(path):
        path.write_bytes(b"x" * 1000)
    # TensorStore raises a ValueError; Orbax may wrap it once more.
    spec = {"driver": "json", "kvstore": f"file://{path}"}
    with pytest.raises(InputError, match=expected), full_disk(), writing(path):
        ts.open(spec).result().write("x" * 1000).result()
    with pytest.raises(InputError, match=expected), full_disk(), writing(path):
        try:
            ts.open(spec).result().write("x" * 1000).result()
        except ValueError as error:
            raise RuntimeError("saving failed") from error
    # Libraries in Rust have exceptions of their own.
    with pytest.raises(InputError, match=expected), full_disk(), writing(path):
        save_file({"x": np.zeros(1000)}, path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x" * 300, "File name too long; choose a shorter name"),
        ("absent/out", "No such file or directory; create its folder first"),
        ("file/out", "Not a directory; choose a path whose parents are all folders"),
        ("folder", "Is a directory; choose another name"),
    ],
)
def test_paths_that_cannot_be(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=says), writing(tmp_path / name):
        (tmp_path / name).write_text("x")


@pytest.mark.parametrize(
    ("code", "says"),
    [(errno.ENOSPC, "No space left on device; make room"), (errno.EROFS, "Read-only file system")],
)
def test_a_full_and_a_read_only_disk(code: int, says: str) -> None:
    with pytest.raises(InputError, match=f"out cannot be written: {says}"), writing("out"):
        raise OSError(code, "of a disk")


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with path.open("ab", buffering=0) as file, full_disk():
        append(file, b"x" * 60, path)
        with pytest.raises(InputError, match="File too large"):
            append(file, b"y" * 60, path)
        append(file, b"z" * 40, path, sync=True)
    assert path.read_bytes() == b"x" * 60 + b"z" * 40


def test_other_errors_pass_as_they_are() -> None:
    for error in (ValueError("a bug"), KeyError("x"), InputError("said already")):
        with pytest.raises(type(error)) as caught, writing("out"):
            raise error
        assert caught.value is error


# --- every command that writes -------------------------------------------------------------------

COMMANDS = {
    "convert": "convert {model} {out}",
    "generate": "generate {model} --input {inputs}/prompts.jsonl --output {out} --max-new-tokens 1",
    "explain": "explain --trained-length 64 --plot {out}",
    "eval": "eval perplexity {model} --text {inputs}/text.txt --length 32 --form strided "
    "--method rope --limit 1 --output {out}",
    "finetune": "finetune --model {model} --data {inputs}/texts.jsonl --output {out} --length 32 "
    "--steps 1 --dtype float32",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inputs")
    (place / "prompts.jsonl").write_text(json.dumps({"prompt": "Call me", "note": "x" * 100}))
    (place / "text.txt").write_text("Call me Ishmael. " * 20)
    (place / "texts.jsonl").write_text(json.dumps({"text": "Call me Ishmael. " * 20}))
    return place


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_standard_output_on_a_full_disk() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dca_jax", "explain", "--trained-length", "64"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == (
        "error: standard output cannot be written: No space left on device; make room on the disk, "
        "then run the same command again\n"
    )


# `finetune` on a disk that fills up while it trains: tests/test_finetune_run.py.
@pytest.mark.parametrize("name", ["convert", "generate", "explain", "eval"])
def test_a_command_says_that_the_disk_is_full(
    name: str, folder: Path, inputs: Path, tmp_path: Path
) -> None:
    words = COMMANDS[name].format(model=folder, inputs=inputs, out=tmp_path / "out").split()
    with full_disk():
        full = invoke(*words)
    assert full.exit_code == 2, full.output
    assert re.search("error: .*out.* cannot be written: File too large; raise the", full.stderr)
    whole = [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size]
    assert whole == []
    again = invoke(*words)
    assert again.exit_code == 0, again.output
    if name == "eval":
        (tmp_path / "out" / "report.html").unlink(missing_ok=True)
        with full_disk():
            full = invoke("eval", "report", tmp_path)
        assert full.exit_code == 2
        assert "cannot be written: File too large" in full.stderr
        assert invoke("eval", "report", tmp_path).exit_code == 0
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_command_says_that_its_path_leads_nowhere(
    command: str, folder: Path, inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "out"
    refused = invoke(*command.format(model=folder, inputs=inputs, out=out).split())
    assert refused.exit_code == 2, refused.output
    assert re.search("^error: .*file.*(not a folder|is a file)|all folders", refused.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_where_compiled_programs_cannot_be_kept_it_is_said_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache is no reason to refuse; JAX would speak of it at every program."""
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    kept = jax.config.jax_compilation_cache_dir
    try:
        for home, reason in (("file/home", "Not a directory"), ("home", "File too large")):
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home))
            caplog.clear()
            with full_disk():
                assert invoke("info", folder).exit_code == 0
            xla = tmp_path / home / "dca_jax" / "xla"
            expected = f"{xla} cannot be written ({reason}): compiled programs are not cached"
            assert caplog.messages == [expected]
            assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)
