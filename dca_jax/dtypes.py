"""Dtypes by name, and the dtype for precision-critical computations."""

import reprlib
from collections.abc import Mapping
from contextlib import suppress

import jax.numpy as jnp
from jax.typing import DTypeLike

from dca_jax.errors import InputError

DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
# Dtypes of a KV cache. With 8 bits it has scales (`dca_jax.attention.stored`).
CACHE_DTYPES = DTYPES | {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def parse_dtype(dtype: DTypeLike) -> jnp.dtype:
    """A dtype from a name or a dtype.

    Raises:
        InputError: an unsupported dtype; the message lists the supported ones.
    """
    return _known("dtype", dtype, DTYPES)


def parse_cache_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of a KV cache, from a name or a dtype.

    Raises:
        InputError: an unsupported dtype; the message lists the supported ones.
    """
    return _known("cache dtype", dtype, CACHE_DTYPES)


def _known(what: str, dtype: DTypeLike, names: Mapping[str, DTypeLike]) -> jnp.dtype:
    """One of `names`, or float64, which is unnamed because it is only for comparisons."""
    known = {name: jnp.dtype(each) for name, each in names.items()}
    given = dtype
    with suppress(TypeError):  # not a dtype at all
        if isinstance(dtype, str):
            found = known.get(dtype)
        else:
            given = jnp.dtype(dtype).name  # its usual name: jnp.float16 is a class
            found = jnp.dtype(dtype)
            found = found if found in (*known.values(), jnp.float64) else None
        if found is not None:
            return found
    raise InputError(
        f"{what} {reprlib.repr(given)} is not supported; expected one of {', '.join(names)}"
    )


def cache_dtype_name(dtype: jnp.dtype) -> str:
    """The name by which `parse_cache_dtype` finds it."""
    names = {jnp.dtype(each): name for name, each in CACHE_DTYPES.items()}
    return names.get(dtype, dtype.name)


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float64 for float64, else float32; for angles, softmax, log-sum-exp, norms and loss."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
