"""Text to token ids and back, whatever a tokenizer does on the way.

The tokenizers are Rust behind Python: on a damaged or odd file they raise any exception, and where
Rust panics, one that is no `Exception` even.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Int

from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.text_files import check_characters


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """The ids of a text.

    Args:
        tokenizer: of `transformers`.
        special: whether the tokenizer puts its special tokens around the text (BOS).

    Raises:
        InputError: half of a surrogate pair, or a text that the tokenizer fails on.
    """
    check_characters(text, "the text")
    with _failures_told("encode this text"):
        return list(tokenizer(text, verbose=False, add_special_tokens=special).input_ids)


def encode_with_places(
    tokenizer: Any, text: str
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The ids of a text, none put around it, and from which character to which each goes.

    Some tokenizers leave spaces out of the places: a token then begins where the one before ended.

    Args:
        tokenizer: a fast one.

    Raises:
        InputError: as `encode`.
    """
    check_characters(text, "the text")
    with _failures_told("encode this text"):
        found = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
    begins, ends = np.asarray(found.offset_mapping, np.int64).reshape(-1, 2).T
    before = np.concatenate([[0], ends[:-1]])
    return np.asarray(found.input_ids, np.int32), np.minimum(begins, before), ends


def decode(tokenizer: Any, ids: Sequence[int], *, special: bool = False) -> str:
    """The text of ids; special tokens are part of it on request.

    Raises:
        InputError: ids that the tokenizer fails on.
    """
    with _failures_told("decode these ids"):
        return tokenizer.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )


@contextmanager
def _failures_told(what: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        name = type(error).__name__
        if not isinstance(error, Exception) and name != "PanicException":
            raise  # Ctrl-C
        raise InputError(
            f"the model's tokenizer cannot {what} ({name}: {shown(str(error), quote=False)}); "
            "its tokenizer.json is damaged or does not fit its other files"
        ) from None
