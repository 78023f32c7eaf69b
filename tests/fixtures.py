"""What several test files are given: one tiny model on disk and in memory, and the command line.

A session's fixtures are made once a worker; no test writes into them.
"""

from pathlib import Path
from typing import Any

import golden_llama
import numpy as np
import pytest
from tiny_llm import make_llm
from typer.testing import CliRunner

import dca_jax
from dca_jax.attention import xla
from dca_jax.cli import app
from dca_jax.evaluation import cli as evaluation
from dca_jax.model import Llama


def invoke(*arguments: object, **options: Any) -> Any:
    """`dca-jax` with these arguments, in this process; unforeseen errors are raised."""
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, words, catch_exceptions=False, **options)


def invoke_eval(*arguments: object) -> Any:
    """`dca-jax eval` alone; whatever is raised is its result's."""
    return CliRunner().invoke(evaluation.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer and a chat template, as Hugging Face keeps one."""
    return make_llm(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def llm(folder: Path) -> dca_jax.LLM:
    """`folder` as a user loads it who asks for nothing."""
    return dca_jax.load(folder)


@pytest.fixture(scope="session")
def paper_llm(folder: Path) -> dca_jax.LLM:
    return dca_jax.load(folder, dca="paper", dtype="float32")


@pytest.fixture(scope="session")
def plain_llm(folder: Path) -> dca_jax.LLM:
    """`folder` without DCA."""
    return dca_jax.load(folder, dca=None, dtype="float32")


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """What the released ChunkLlama drew and computed of `golden_model`."""
    return golden_llama.load_outputs()


@pytest.fixture(scope="session")
def golden_model() -> Llama:
    return golden_llama.load_model(golden_llama.load_setting())


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of the blockwise backend so small that short texts cross many of them."""
    monkeypatch.setattr(xla, "TILE", 16)
    monkeypatch.setattr(xla, "LOGITS", 16 * 24)
