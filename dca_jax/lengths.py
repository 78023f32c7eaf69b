"""Lengths in tokens, as people write them."""

from dca_jax.errors import InputError
from dca_jax.fields import LARGEST, shown

UNITS = {"k": 1024, "m": 1024**2}


def parse_tokens(text: str) -> int:
    """Parses a number of tokens: 8192, or 8k for the same number; 1M is 1024k.

    Raises:
        InputError: something else, 0, or more than a text can have (2^31 - 1).
    """
    digits, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in UNITS else (text, "")
    if not (digits.isascii() and digits.isdecimal()) or not digits.strip("0"):
        raise InputError(
            f"{shown(text)} is not a number of tokens; expected one such as 8192, 8k or 1M"
        )
    tokens = int(digits) * UNITS.get(unit, 1) if len(digits.lstrip("0")) < 20 else LARGEST + 1
    if tokens > LARGEST:
        raise InputError(f"{shown(text)} tokens are too many; a text has at most {LARGEST}")
    return tokens
