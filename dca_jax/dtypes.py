"""Dtypes by name, and the dtype in which what matters is computed."""

import jax.numpy as jnp

from dca_jax.errors import InputError

DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}


def parse_dtype(name: str) -> jnp.dtype:
    """The dtype of that name; raises InputError naming the ones there are."""
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not supported; expected one of {', '.join(DTYPES)}")
    return jnp.dtype(DTYPES[name])


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float64 for float64, else float32: angles, softmax, log-sum-exp, norms, loss."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
