"""What the system refuses to write becomes one sentence."""

import errno
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorstore as ts

from dca_jax.disk import writing
from dca_jax.errors import InputError


@pytest.fixture
def no_room() -> Iterator[None]:
    """No file may grow beyond 100 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_refused_write_says_which_path_why_and_what_to_do(tmp_path: Path, no_room: None) -> None:
    path = tmp_path / "out"
    expected = re.escape(f"{path} cannot be written: File too large; raise the limit")
    with pytest.raises(InputError, match=expected), writing(path):
        path.write_bytes(b"x" * 1000)
    # TensorStore raises a ValueError; Orbax may wrap it once more.
    spec = {"driver": "json", "kvstore": f"file://{path}"}
    with pytest.raises(InputError, match=expected), writing(path):
        ts.open(spec).result().write("x" * 1000).result()
    with pytest.raises(InputError, match=expected), writing(path):
        try:
            ts.open(spec).result().write("x" * 1000).result()
        except ValueError as error:
            raise RuntimeError("saving failed") from error


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x" * 300, "File name too long; choose a shorter name"),
        ("absent/out", "No such file or directory; create its folder first"),
        ("file/out", "Not a directory; choose a path that leads through folders only"),
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


def test_other_errors_pass_as_they_are() -> None:
    for error in (ValueError("a bug"), KeyError("x"), InputError("said already")):
        with pytest.raises(type(error)) as caught, writing("out"):
            raise error
        assert caught.value is error
