"""Text to token ids and back, whatever a tokenizer does on the way.

The tokenizers are Rust behind Python: on an odd file they raise any exception, and where Rust
panics, one that is no `Exception` even.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Int

from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.text_files import check_characters


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The ids of a text.

    Args:
        tokenizer: of `transformers`.
        add_special_tokens: whether the tokenizer puts its special tokens around the text (BOS).

    Raises:
        InputError: the text holds half of a surrogate pair, or the tokenizer has no token for a
            part of it, or fails in another way.
    """
    check_characters(text, "the text")
    with refusing("the tokenizer cannot read this text"):
        return tokenizer(text, verbose=False, add_special_tokens=add_special_tokens).input_ids


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
    with refusing("the tokenizer cannot read this text"):
        found = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
    begins, ends = np.asarray(found.offset_mapping, np.int64).reshape(-1, 2).T
    before = np.concatenate([[0], ends[:-1]])
    return np.asarray(found.input_ids, np.int32), np.minimum(begins, before), ends


def decode(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """The text of ids.

    Raises:
        InputError: the tokenizer fails on them.
    """
    with refusing("the tokenizer cannot write these ids as text"):
        return tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns whatever a tokenizer raises into an InputError that begins with `what`."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic in its Rust code is no Exception
        reason = shown(str(error), quote=False) or type(error).__name__
        raise InputError(f"{what}: {reason}") from error
