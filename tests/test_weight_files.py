"""Which file of a folder holds its weights, and PyTorch's `.bin` files, new and old."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversion_helpers import (
    BFLOAT16,
    make_tiny,
    random_tensors,
    read_safetensors,
    tiny_config,
    write_index,
)
from safetensors.numpy import save_file
from tiny_llm import make_llm

import dca_jax
from dca_jax.errors import InputError
from dca_jax.text_files import read_text_file
from dca_jax.weights.folder import load_weights
from dca_jax.weights.huggingface import open_checkpoint, read_config
from dca_jax.weights.tensor_files import list_tensors

torch = pytest.importorskip("torch")


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_weights(folder, read_config(folder))


# Which file counts -----------------------------------------------------------------------------


SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def put(folder: Path, name: str, config: dict[str, Any], value: float) -> None:
    """The weights of a model whose last norm is `value`, in a file or in shards."""
    tensors = random_tensors(config, dtype=np.dtype(np.float32))
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], value)
    shard = name.removesuffix(".index.json").replace(".", "-1.") if "index" in name else name
    if shard.endswith(".bin"):
        torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, folder / shard)
    else:
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    if shard != name:
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, shard)}
        (folder / name).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ((SAFE, SAFE_INDEX, BIN, BIN_INDEX), None),
        ((SAFE_INDEX, BIN, BIN_INDEX), None),
        ((BIN, BIN_INDEX), None),
        ((BIN_INDEX,), None),
        ((SAFE, "other.safetensors"), "other.safetensors"),
    ],
)
def test_it_is_the_file_that_transformers_takes(tmp_path: Path, names: Any, named: Any) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config(**({"transformers_weights": named} if named else {}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    for n, name in enumerate(names):
        put(tmp_path, name, config, n + 1.0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = theirs.model.norm.weight.detach().numpy()
    ours = load_weights(tmp_path, read_config(tmp_path))["norm"]["scale"]
    np.testing.assert_array_equal(np.asarray(ours), expected)
    assert expected[0] == names.index(named or names[0]) + 1


def test_left_over_shards_and_folders_are_ignored(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, shards=2)
    save_file({"old": np.ones(3, np.float32)}, folder / "model-00003-of-00003.safetensors")
    (folder / SAFE).mkdir()
    (folder / BIN).write_bytes(b"noise")
    assert "old" not in list_tensors(folder)


@pytest.mark.parametrize("named", ["../model.safetensors", "/etc/passwd.safetensors"])
def test_a_name_of_weights_outside_the_folder(tmp_path: Path, named: str) -> None:
    refused(make_tiny(tmp_path, transformers_weights=named), "names a file outside its folder")
    with pytest.raises(InputError, match=r"must name a \.safetensors file or its index, got 'x'"):
        list_tensors(make_tiny(tmp_path, transformers_weights="x"))


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path)
    (folder / SAFE).unlink()
    (folder / SAFE).symlink_to(folder / "gone")
    refused(folder, r"file model\.safetensors is missing")


@pytest.mark.parametrize("name", ["x" * 300, "a/b", "\ud800", "a\0b"])
def test_an_index_of_impossible_names(tmp_path: Path, name: str) -> None:
    folder = make_tiny(tmp_path)
    (folder / SAFE).unlink()
    write_index(folder, {"model.norm.weight": name})
    refused(folder, "is missing|names a file outside its folder")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_a_pointer_of_git_lfs_is_not_the_file(tmp_path: Path, name: str) -> None:
    folder = make_llm(tmp_path / "model")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132\n"
    (folder / name).write_text(pointer)
    with pytest.raises(InputError, match=rf"{name} is a Git LFS pointer .* run `git lfs pull`"):
        dca_jax.load(folder)
    (tmp_path / "model.gguf").write_text(pointer)
    with pytest.raises(InputError, match=r"model\.gguf is a Git LFS pointer"):
        dca_jax.load(tmp_path / "model.gguf")
    (tmp_path / "book.txt").write_text(pointer)
    with pytest.raises(InputError, match=r"book\.txt is a Git LFS pointer"):
        read_text_file(tmp_path / "book.txt")


def test_more_layers_than_there_can_be_names_of(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path)
    (folder / "config.json").write_text(json.dumps(tiny_config(num_hidden_layers=10**9)))
    refused(folder, "it asks for 1000000000 layers, and there are 30 tensors")


# PyTorch files ---------------------------------------------------------------------------------


def to_torch(array: np.ndarray):
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def make_bin(folder: Path, *, shards: int = 1, dtype: np.dtype = BFLOAT16) -> Path:
    make_tiny(folder, dtype=dtype)
    tensors = {name: to_torch(array) for name, array in read_safetensors(folder).items()}
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        names = list(tensors)
        weight_map = {n: f"pytorch_model-{i % shards}.bin" for i, n in enumerate(names)}
        for file in set(weight_map.values()):
            torch.save({n: tensors[n] for n in names if weight_map[n] == file}, folder / file)
        index = json.dumps({"weight_map": weight_map})
        (folder / "pytorch_model.bin.index.json").write_text(index)
    return folder


def bits(folder: Path) -> dict[str, bytes]:
    """Every parameter as it is read, whole."""
    checkpoint = open_checkpoint(folder, read_config(folder))
    return {
        tensor.name: tensor.read(tuple(slice(0, size) for size in tensor.shape)).tobytes()
        for tensors in checkpoint.tensors.values()
        for tensor in tensors
    }


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16, np.float32])
@pytest.mark.parametrize("shards", [1, 2])
def test_pytorch_files(tmp_path, shards, dtype):
    folder = make_bin(tmp_path, shards=shards, dtype=np.dtype(dtype))
    expected = bits(folder)
    (folder / "model.safetensors").unlink()
    assert bits(folder) == expected


def test_pytorch_file_that_would_run_code(tmp_path):

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder = make_tiny(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin is not a PyTorch weights file, or damaged")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a zip", None], ids=["empty", "noise", "truncated"])
def test_damaged_pytorch_file(tmp_path, content):
    folder = make_bin(tmp_path)
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-500] if content is None else content)
    refused(folder, r"pytorch_model\.bin is not a PyTorch weights file, or damaged")


def test_pytorch_file_of_something_else(tmp_path):
    folder = make_tiny(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"step": 3}, folder / "pytorch_model.bin")
    refused(folder, "something other than a dict of tensors")


def test_pytorch_file_without_pytorch(tmp_path, monkeypatch):
    folder = make_tiny(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(folder, r"PyTorch is not installed; install torch, or use the model's safetensors")


@pytest.mark.parametrize("wrapped", [False, True], ids=["tensors", "parameters"])
@pytest.mark.parametrize("zipped", [False, True], ids=["before 1.6", "zip"])
def test_every_form_that_pytorch_has_written(tmp_path: Path, zipped: bool, wrapped: bool) -> None:
    folder = make_tiny(tmp_path)
    expected = bits(folder)
    tensors = {name: to_torch(array) for name, array in read_safetensors(folder).items()}
    if wrapped:
        tensors = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    torch.save(tensors, folder / BIN, _use_new_zipfile_serialization=zipped)
    (folder / SAFE).unlink()
    assert bits(folder) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.float().to_sparse(), r"norm\.weight in .* has no plain data \(torch\.sparse"),
        (lambda x: x.to("meta"), r"norm\.weight in .* has no plain data \(meta\)"),
        (lambda x: x.int(), r"norm\.weight in .* has dtype int32; expected one of"),
    ],
)
def test_tensors_without_floats_to_read(tmp_path: Path, change: Any, message: str) -> None:
    folder = make_bin(tmp_path)
    (folder / SAFE).unlink()
    tensors = torch.load(folder / BIN)
    tensors["model.norm.weight"] = change(tensors["model.norm.weight"])
    torch.save(tensors, folder / BIN)
    refused(folder, message)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", [3, None, ("a", "b")])
def test_names_that_are_no_text(tmp_path: Path, name: Any, zipped: bool) -> None:
    folder = make_tiny(tmp_path)
    (folder / SAFE).unlink()
    content = {name: torch.ones(3)}
    torch.save(content, folder / BIN, _use_new_zipfile_serialization=zipped)
    refused(folder, "a tensor's name must be text, got ")


def test_a_file_that_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    folder = make_tiny(tmp_path)
    monkeypatch.setattr(safetensors, "safe_open", full)
    refused(folder, r"model\.safetensors \(0\.0 GiB\) cannot be mapped into memory")


def test_a_file_that_goes_while_it_is_read(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path)
    config = read_config(folder)
    checkpoint = open_checkpoint(folder, config)
    (folder / SAFE).unlink()
    row = next(iter(checkpoint.tensors.values()))[0]
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read: No such file"):
        row.read((slice(0, 1), slice(0, 1)))
