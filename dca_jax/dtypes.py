"""Dtypes by name, and the dtype in which what matters is computed."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from dca_jax.errors import InputError

DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
# Of a KV cache. In 8 bits it has scales (`dca_jax.attention.stored`).
CACHE_DTYPES = DTYPES | {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def parse_dtype(name: str) -> jnp.dtype:
    """The dtype of that name; raises InputError naming the ones there are."""
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not supported; expected one of {', '.join(DTYPES)}")
    return jnp.dtype(DTYPES[name])


def parse_cache_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of a KV cache, by name or as it is.

    Raises:
        InputError: one that no cache has, naming those there are.
    """
    if isinstance(dtype, str):
        found = CACHE_DTYPES.get(dtype)
    else:
        known = {jnp.dtype(each) for each in (*CACHE_DTYPES.values(), jnp.float64)}
        found = dtype if jnp.dtype(dtype) in known else None
    if found is None:
        name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
        raise InputError(
            f"cache dtype {name!r} is not supported; expected one of {', '.join(CACHE_DTYPES)}"
        )
    return jnp.dtype(found)


def cache_dtype_name(dtype: jnp.dtype) -> str:
    """The name by which `parse_cache_dtype` finds it."""
    names = {jnp.dtype(each): name for name, each in CACHE_DTYPES.items()}
    return names.get(dtype, dtype.name)


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float64 for float64, else float32: angles, softmax, log-sum-exp, norms, loss."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
