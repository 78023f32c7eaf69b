"""What people type who know other libraries, and values of the wrong type: one sentence each.

Annotations are not checked here, as they are not where a user calls.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from abstract import unchecked
from tiny_llm import make_llm

import dca_jax
from dca_jax import LLM, InputError, Sampler
from dca_jax.dtypes import parse_cache_dtype, parse_dtype
from dca_jax.inference import documents

USER = [{"role": "user", "content": "Call me"}]


@pytest.fixture(autouse=True)
def _as_a_user_calls() -> Iterator[None]:
    with unchecked():
        yield


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"torch_dtype": "float16"}, "load has no argument 'torch_dtype'; here it is dtype"),
        ({"load_in_8bit": True}, "here it is weights='int8'"),
        ({"device_map": "auto"}, "here it is mesh, as 'tensor=4'"),
        ({"trust_remote_code": True}, "here it is not needed: code from a checkpoint is never run"),
        ({"max_model_len": 4096}, "here it is context"),
        ({"adaptor": "x"}, "here it is adapter"),
        ({"zzz": 1}, "there are path, dca, rope, dtype"),
        ({"dtype": 5}, "dtype 5 is not supported; expected one of bfloat16"),
        ({"dtype": np.int8}, "dtype .*int8.* is not supported"),
        ({"dtype": "half"}, "dtype 'half' is not supported"),
        ({"cache_dtype": "q8_0"}, "cache dtype 'q8_0' is not supported"),
        ({"mesh": 4}, "mesh must be a string such as tensor=4, or a jax Mesh, got 4"),
        ({"sparse": True}, "sparse must be a string such as rows:0.05, or None, got True"),
        ({"context": 0}, "'0' is not a number of tokens"),
        ({"context": -5}, "'-5' is not a number of tokens"),
        ({"dca": True}, "DCA setting True is not known"),
    ],
)
def test_arguments_of_load(folder: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dca_jax.load(folder, **given)


@pytest.mark.parametrize("path", [None, 5, "", " "])
def test_a_model_that_is_no_name(path: Any) -> None:
    with pytest.raises(InputError, match="a model must be a folder, a file or a name on the Hub"):
        dca_jax.load(path)


def test_dtypes_as_other_libraries_have_them() -> None:
    assert parse_dtype(np.float32) == parse_dtype("float32") == np.dtype("float32")
    assert parse_dtype(np.dtype("float64")) == np.dtype("float64")
    assert parse_cache_dtype(np.int8) == parse_cache_dtype("int8")


def test_numbers_of_numpy_are_numbers() -> None:
    given: dict[str, Any] = {
        "temperature": np.float32(0.5),
        "top_k": np.int64(3),
        "top_p": np.float64(0.25),
    }
    assert Sampler(**given) == Sampler(temperature=0.5, top_k=3, top_p=0.25)
    refused: list[dict[str, Any]] = [{"top_k": np.float32(3)}, {"top_p": np.bool_(True)}]
    for wrong in (*refused, {"top_k": np.int64(0)}):
        with pytest.raises(InputError, match="top_"):
            Sampler(**wrong)


@pytest.mark.parametrize(
    ("method", "argument", "message"),
    [
        ("tokenize", 5, "a text must be a string, got 5"),
        ("tokenize", None, "a text must be a string, got None"),
        ("logits", [1, 2, 3], "one list of token ids, got 1"),
        ("logits", "Call me", "tokens must be rows of token ids, got 'Call me'"),
        ("logits", 3, "tokens must be rows of token ids, got 3"),
        ("logits", [[1.5, 2.0]], r"one list of token ids, got \[1.5, 2.0\]"),
        ("logits", [[]], "a prompt is empty"),
        ("logits", [], "all rows must have the same length"),
        ("perplexity", [1.5, 2.5], r"one list of token ids, got \[1.5, 2.5\]"),
        ("perplexity", [1, 2**40], "token id 1099511627776, but the model's vocabulary"),
        ("perplexity", [1, -5], "token id -5, but the model's vocabulary"),
        ("perplexity", [], "a prompt is empty"),
    ],
)
def test_what_is_no_text(llm: LLM, method: str, argument: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        getattr(llm, method)(argument)


@pytest.mark.parametrize("given", [{"window": 2.5}, {"window": True}, {"stride": "3"}])
def test_windows_are_whole_tokens(llm: LLM, given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"(window|stride) must be a number of tokens, got"):
        llm.perplexity("Call me Ishmael.", **given)


def test_thinking_is_of_conversations(llm: LLM) -> None:
    """It was dropped where nothing asks for it."""
    for door in (llm.generate, llm.stream):
        with pytest.raises(InputError, match="use it with `chat`"):
            door("Call me", thinking=True)
    assert llm.chat(USER, max_new_tokens=1, thinking=True).tokens
    assert "".join(documents.ask(llm, "Call me", "?", max_new_tokens=1, thinking=False))


def test_a_prefix_belongs_to_its_model(llm: LLM, tmp_path: Path) -> None:
    """Another model's keys would be read as one's own, whatever their shapes."""
    prefix = llm.prefill("Call me")
    twin = dca_jax.load(make_llm(tmp_path / "twin"))
    smaller = dca_jax.load(make_llm(tmp_path / "smaller", num_hidden_layers=2))
    plain = dca_jax.load(tmp_path / "twin", dca=None)
    for other in (twin, smaller, plain):
        for prompts in (" Ishmael", [" Ishmael", " a"]):
            with pytest.raises(InputError, match="read with another model or method"):
                other.generate(prompts, max_new_tokens=2, prefix=prefix)
        with pytest.raises(InputError, match="read with another model"):
            other.prefill("Call me Ishmael", reuse=prefix)
    again = llm.generate("Call me Ishmael", max_new_tokens=2)
    assert llm.generate(" Ishmael", max_new_tokens=2, prefix=prefix) == again
