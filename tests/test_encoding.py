"""Text to token ids and back: what a tokenizer cannot do is said in a sentence."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_llm import byte_level_tokenizer, metaspace_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dca_jax.errors import InputError
from dca_jax.inference.text_stream import TextStream
from dca_jax.inference.tokenizer import decode, encode, encode_with_places

TEXT = "Call me  Ishmaël, 海 🌊.\n"


def fast(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("make", [byte_level_tokenizer, metaspace_tokenizer])
def test_ids_are_those_of_tokenizers(make: Any) -> None:
    theirs = make()
    tokenizer = fast(theirs)
    for special in (True, False):
        wanted = theirs.encode(TEXT, add_special_tokens=special)
        assert encode(tokenizer, TEXT, add_special_tokens=special) == wanted.ids
    _, (ids, begins, ends) = encode_with_places(tokenizer, ["more", TEXT])
    assert ids.tolist() == wanted.ids
    assert all(begins <= ends)
    assert (begins[0], ends[-1]) == (0, len(TEXT))
    assert decode(tokenizer, wanted.ids) == theirs.decode(wanted.ids)
    np.testing.assert_array_equal(
        begins[1:], np.minimum([b for b, _ in wanted.offsets[1:]], ends[:-1])
    )


class PanicException(BaseException):
    """As Rust's panics come out in Python: no Exception."""


@pytest.mark.parametrize("error", [PanicException("index out of bounds"), TypeError("no\nlist")])
def test_whatever_a_tokenizer_raises_is_one_sentence(error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    tokenizer = SimpleNamespace(decode=fail)
    message = " ".join(str(error).split())
    with pytest.raises(InputError, match=f"cannot decode these ids: {message}"):
        decode(tokenizer, [1])
    for function in (encode, encode_with_places):
        with pytest.raises(InputError, match=f"cannot encode this text: {message}"):
            function(fail, "a")


def test_an_interruption_is_none_of_a_tokenizers_failures() -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(interrupt, "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a \ud800", r"the text contains half of a surrogate pair \(U\+D800 at character 2\)"),
        ("\ude00\ud83d", r"half of a surrogate pair \(U\+DE00 at character 0\)"),
        ("caf\udce9", r"the text is not UTF-8 text \(byte 0xe9 at character 3\); give it in UTF-8"),
    ],
)
def test_half_a_character_is_refused_wherever_text_enters(
    llm: Any, text: str, message: str, tmp_path: Path
) -> None:
    for call in (
        lambda: encode(llm.tokenizer, text),
        lambda: encode_with_places(llm.tokenizer, ["a", text]),
        lambda: llm.tokenize(text),
        lambda: llm.generate(text, max_new_tokens=1),
        lambda: llm.stream(text, max_new_tokens=1),
        lambda: llm.prefill(text),
        lambda: llm.perplexity(text),
    ):
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(InputError, match="half of a surrogate pair"):
        llm.chat([{"role": "user", "content": text}], max_new_tokens=1)
    with pytest.raises(InputError, match=message.replace("the text", "a stop string")):
        llm.generate("a", stop=[text], max_new_tokens=1)
    with pytest.raises(InputError, match=message.replace("the text", "a stop string")):
        TextStream(llm.tokenizer, [1], stop=(text,))
