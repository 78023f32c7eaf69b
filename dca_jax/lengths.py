"""Lengths in tokens, as people write them."""

from dca_jax.errors import InputError
from dca_jax.fields import shown

UNITS = {"k": 1024, "m": 1024**2}


def parse_tokens(text: str) -> int:
    """A number of tokens: 8192, or 8k for that; 1M is 1024k.

    Raises:
        InputError: something else, or 0.
    """
    digits, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in UNITS else (text, "")
    number = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 20 else 0
    if number == 0:
        raise InputError(
            f"{shown(text)} is no number of tokens; expected one such as 8192, 8k or 1M"
        )
    return number * UNITS.get(unit, 1)
