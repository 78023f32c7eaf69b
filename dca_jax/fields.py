"""Values from untrusted files, with their types and ranges checked as they are read."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any, overload

from dca_jax.errors import InputError

LARGEST = 2**31 - 1  # positions, ids and sizes are int32 on the devices


class _Shown(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 256:
            return f"an integer of {x.bit_length()} bits"
        return super().repr_int(x, level)


_SHOWN = _Shown(maxlevel=3, maxdict=4, maxlist=6, maxtuple=6, maxset=6, maxstring=80, maxother=80)


def shown(value: Any, *, quote: bool = True) -> str:
    """A value for a message: one line of at most about 200 characters, however large it is."""
    text = _SHOWN.repr(value) if quote or not isinstance(value, str) else value
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:197]}..."


@overload
def integer(
    fields: Mapping[str, Any], name: str, where: str, *, default: int, least: int = 1
) -> int: ...
@overload
def integer(
    fields: Mapping[str, Any], name: str, where: str, *, default: None = None, least: int = 1
) -> int | None: ...
def integer(
    fields: Mapping[str, Any],
    name: str,
    where: str,
    *,
    default: int | None = None,
    least: int = 1,
) -> int | None:
    """An integer from `least` to `LARGEST`; `default` if the field is absent or null.

    Raises:
        InputError: anything else; true and 1.0 are not integers.
    """
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
        raise InputError(
            f"{where}: {name} must be an integer from {least} to {LARGEST}, got {shown(value)}"
        )
    return value


@overload
def number(
    fields: Mapping[str, Any],
    name: str,
    where: str,
    *,
    default: float,
    least: float = ...,
    above: float = ...,
) -> float: ...
@overload
def number(
    fields: Mapping[str, Any],
    name: str,
    where: str,
    *,
    default: None = None,
    least: float = ...,
    above: float = ...,
) -> float | None: ...
def number(
    fields: Mapping[str, Any],
    name: str,
    where: str,
    *,
    default: float | None = None,
    least: float = -math.inf,
    above: float = -math.inf,
) -> float | None:
    """A finite number of at least `least` and greater than `above`; `default` if absent or null.

    Raises:
        InputError: anything else; true and "1" are not numbers.
    """
    value = fields.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    finite = is_number and abs(value) < 1e300 and math.isfinite(value)
    if not (finite and value >= least and value > above):
        bound = f" above {above:g}" if above > -math.inf else ""
        bound = f" of at least {least:g}" if least > -math.inf else bound
        raise InputError(f"{where}: {name} must be a finite number{bound}, got {shown(value)}")
    return float(value)


def boolean(fields: Mapping[str, Any], name: str, where: str, *, default: bool = False) -> bool:
    """True or false; `default` where the field is absent or null.

    Raises:
        InputError: anything else, such as "false" or 0.
    """
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InputError(f"{where}: {name} must be true or false, got {shown(value)}")
    return value


def text(fields: Mapping[str, Any], name: str, where: str, *, default: str = "") -> str:
    """A string; `default` where the field is absent or null.

    Raises:
        InputError: anything else.
    """
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} must be a string, got {shown(value)}")
    return value


def mapping(fields: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any] | None:
    """An object; None where the field is absent or null.

    Raises:
        InputError: anything else.
    """
    value = fields.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"{where}: {name} must be an object, got {shown(value)}")
    return value


def token_ids(fields: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
    """Token ids from an integer, a list of integers, or null.

    Raises:
        InputError: anything else.
    """
    value = fields.get(name)
    found = value if isinstance(value, list) else [] if value is None else [value]
    for item in found:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item <= LARGEST:
            raise InputError(
                f"{where}: {name} must be a token id (an integer from 0 to {LARGEST}) or a list of "
                f"them, got {shown(value)}"
            )
    return tuple(found)
