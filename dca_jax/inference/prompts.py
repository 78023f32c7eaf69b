"""Checks prompts and messages from users, in all supported forms."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Int

from dca_jax.errors import InputError
from dca_jax.fields import shown

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}
Prompt = str | Sequence[int] | Int[np.ndarray | Array, " _"]
Prompts = Prompt | Sequence[Prompt] | Int[np.ndarray | Array, "_ _"]


def each_prompt(prompts: Any) -> list[Any]:
    """The prompts of a call; a string or a list of integers is a single prompt.

    Raises:
        InputError: neither a prompt nor a list of prompts.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping | bytes) or not isinstance(prompts, Iterable):
        raise InputError(
            "a prompt must be a string or a list of token ids (the input_ids of a tokenizer's "
            f"result), got {shown(prompts)}"
        )
    several = list(prompts)
    alone = bool(several) and np.ndim(several[0]) == 0 and not isinstance(several[0], str)
    return [prompts] if alone else several


def token_ids(prompt: Any) -> list[int]:
    """The ids of a prompt given as a list or an array of integers.

    Raises:
        InputError: anything else, or an empty list.
    """
    try:
        ids = np.asarray(prompt)
    except ValueError:  # rows of several lengths
        ids = np.asarray(None)
    if ids.shape == (0,):
        raise InputError("a prompt is empty; give at least one token")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(
            f"a prompt must be one string or one list of token ids, got {shown(prompt)}"
        )
    return ids.tolist()


def check_messages(messages: Any) -> None:
    """Raises InputError unless this is a list of messages; the template checks their contents."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError(
            'messages must be a list such as [{"role": "user", "content": "Hello"}], got '
            f"{shown(messages)}"
        )
    if not messages:
        raise InputError("there is no message; give at least one")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(
                f'a message must be {{"role": ..., "content": ...}}, got {shown(message)}'
            )
