"""What is downloaded of a repository: what is read of it, and nothing twice."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from dca_jax.errors import InputError
from dca_jax.weights.hub import find_folder

ALWAYS = {
    "LICENSE",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
}
NEVER = {
    ".gitattributes",
    "README.md",
    "consolidated.00.pth",
    "consolidated.safetensors",
    "model.gguf",
    "modeling_llama.py",
    "onnx/model.safetensors",
    "original/params.json",
    "original/tokenizer.model",
    "training_args.bin",
    "flax_model.msgpack",
    "optimizer.bin",
    "runs/notes.txt",
}
SAFE = {
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
}
BIN = {
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model-00002-of-00002.bin",
    "pytorch_model.bin.index.json",
}
INDEXES = {"model.safetensors.index.json", "pytorch_model.bin.index.json"}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The files of the model owner/name on a Hub of this test: fill it."""
    files: set[str] = set()

    def snapshot_download(name: str, *, allow_patterns: Any, ignore_patterns: Any) -> str:
        assert name == "owner/name"
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for file in filter_repo_objects(sorted(files), **patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return files


def fetched(**options: Any) -> set[str]:
    folder = find_folder("owner/name", **options)
    return {f"{p.relative_to(folder)}" for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        (SAFE, SAFE),
        (SAFE | BIN, SAFE | INDEXES),
        (BIN, BIN),
        ({"pytorch_model.bin"}, {"pytorch_model.bin"}),
        ({"model.safetensors", "pytorch_model.bin"}, {"model.safetensors"}),
        (set(), set()),
    ],
)
def test_weights_are_downloaded_once(
    repository: set[str], weights: set[str], wanted: set[str]
) -> None:
    repository |= ALWAYS | NEVER | weights
    assert fetched() == ALWAYS | wanted


def test_without_weights(repository: set[str]) -> None:
    repository |= ALWAYS | NEVER | SAFE | BIN
    assert fetched(weights=False) == ALWAYS | INDEXES


def test_what_a_download_raises_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route\nto host " + "x" * 10_000)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"could not be downloaded .* no route to host") as caught:
        find_folder("owner/name")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["x" * 300, "owner/" + "x" * 300 + "/y", "a\0b"])
def test_names_that_no_file_system_takes(name: str) -> None:
    with pytest.raises(InputError, match="is neither a folder nor the name of a model"):
        find_folder(name)
