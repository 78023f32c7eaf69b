"""What a converted folder may hold, judged before TensorStore and the devices see it."""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion_helpers import make_tiny

from checkpoints_convert import hf_to_orbax, orbax_to_hf
from dca_jax.errors import InputError
from dca_jax.weights import orbax, parameters
from dca_jax.weights.folder import load_weights
from dca_jax.weights.huggingface import read_config
from dca_jax.weights.parameters import parameters as parameter_rows

NORM = "layers.input_layernorm.scale"  # [3, 12] of bfloat16


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("converted")
    hf_to_orbax.convert(make_tiny(root / "source"), root / "orbax")
    return root / "orbax"


@pytest.fixture
def converted(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "orbax"))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_weights(folder, read_config(folder))
    with pytest.raises(InputError, match=message):
        orbax_to_hf.convert(folder, folder.parent / "back")
    assert not (folder.parent / "back").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunks": [2**40, 12]}, r"chunks of \[1099511627776, 12\] are larger than the array"),
        ({"chunks": [2**62, 2**62]}, "are larger than the array"),
        ({"chunks": [1]}, "chunks must have a positive size for each of 2 axes"),
        ({"chunks": [0, 12]}, "chunks must have a positive size for each of 2 axes"),
        ({"chunks": "all"}, "chunks must be a list of sizes, got 'all'"),
        ({"chunks": [True, 12]}, "chunks must be a list of sizes"),
        ({"shape": [2**40, 2**40], "chunks": [2**40, 2**40]}, "has shape .*, expected"),
        ({"shape": [3, -12]}, "shape must be a list of sizes"),
        ({"shape": [3, 10**400]}, "shape must be a list of sizes"),
        ({"shape": None}, "shape must be a list of sizes, got None"),
        ({"dtype": "<i4"}, "has dtype int32; expected one of bfloat16, float16"),
        ({"dtype": "|b1"}, "has dtype bool; expected one of"),
        ({"dtype": "<c8"}, "has dtype complex64; expected one of"),
        ({"dtype": "nothing"}, "is damaged"),
        ({"dtype": [["a", "<f4"]]}, "dtype must be a string"),
        ({"compressor": {"id": "x" * 2**15}}, r"\.zarray has \d+ bytes, expected at most 16384"),
    ],
    ids=str,
)
def test_descriptions_of_arrays(converted: Path, change: dict[str, Any], message: str) -> None:
    file = converted / "params" / NORM / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(converted, message)


@pytest.mark.parametrize("name", [f"{NORM}/.zarray", "_METADATA"])
def test_nested_without_end(converted: Path, name: str) -> None:
    depth = 8000 if name.endswith(".zarray") else 200_000
    (converted / "params" / name).write_text('{"a":' + "[" * depth + "]" * depth + "}")
    refused(converted, "is not JSON|must be a list of sizes|is damaged")


def test_arrays_that_are_no_weights(converted: Path) -> None:
    config = read_config(converted)
    shutil.rmtree(converted / "params")
    tree = parameters.abstract_params(config, dtype=np.float32)
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.int32), tree)
    orbax.save(converted / "params", ones)
    refused(converted, "has dtype int32; expected one of")


def test_links_out_of_the_folder(converted: Path, tmp_path: Path) -> None:
    chunk = converted / "params" / NORM / "0.0"
    shutil.move(chunk, tmp_path / "secret")
    chunk.symlink_to(tmp_path / "secret")
    refused(converted, r"input_layernorm\.scale/0\.0 is a link that leads out of its folder")
    chunk.unlink()
    shutil.move(tmp_path / "secret", chunk)
    load_weights(converted, read_config(converted))
    shutil.move(converted / "params", tmp_path / "elsewhere")
    (converted / "params").symlink_to(tmp_path / "elsewhere")
    refused(converted, "params is a link that leads out of its folder")


@pytest.mark.parametrize("parts", [[".."], ["", ""], ["a/b"]])
def test_names_that_lead_out(converted: Path, parts: list[str]) -> None:
    file = converted / "params" / "_METADATA"
    listing = json.loads(file.read_text())
    leaf = next(iter(listing["tree_metadata"].values()))
    leaf["key_metadata"] = [{"key": part, "key_type": 2} for part in parts]
    file.write_text(json.dumps(listing))
    refused(converted, "names an array outside its folder|is missing from")


@pytest.mark.parametrize("dtype", [["float32"], 3, {"a": 1}])
def test_a_dtype_of_the_config_that_is_none(converted: Path, tmp_path: Path, dtype: Any) -> None:
    """Nothing here reads it, transformers does: what is written back is right."""
    config = json.loads((converted / "config.json").read_text())
    (converted / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    orbax_to_hf.convert(converted, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
        ValueError("RESOURCE_EXHAUSTED: Out of memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_model_that_does_not_fit(
    whole: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(parameters, "new_buffer", full)
    config = read_config(whole)
    rows = [row.shape(config) for row in parameter_rows(config)]
    gib = sum(4 * int(np.prod(shape)) for shape in rows) / 2**30
    message = rf"the weights take {gib:.1f} GiB in float32, {gib:.1f} GiB of them on each device"
    with pytest.raises(InputError, match=message):
        load_weights(whole, config, dtype=jnp.float32)


def test_a_signal_waits_for_what_is_on_its_way_to_the_disk(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """TensorStore reports each write to the event loop, which must not be closed before."""
    asked, tasks, block = [], [], np.zeros((1, 2**20), np.uint8)

    def pieces() -> Iterator[orbax.Pieces]:
        for index in range(6):
            asked.append(index)
            if index == 2:  # while the event loop waits for the piece before
                asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
            yield {"values": ((slice(index, index + 1),), block)}

    def stop(number: int, _: object) -> None:
        tasks.append(asyncio.current_task())
        raise SystemExit(128 + number)

    array = orbax.StreamedArray(
        shape=(6, 2**20), dtype=block.dtype, chunks=block.shape, pieces=pieces
    )
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(SystemExit, match="143"):
            orbax.save(tmp_path / "out", {"a": array})
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked == [0, 1, 2]
    assert tasks != [None]  # the loop was not waiting, but between two pieces
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in capfd.readouterr().err
