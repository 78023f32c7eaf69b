"""Shapes in buckets, so that another prompt length seldom compiles anything; and caches of them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dca_jax.errors import InputError
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama


def piece_length(batch: int) -> int:
    """Tokens of each row that are read at once: 2048 in all, and at least 128 of each row.

    It bounds the memory of the activations, whatever the length of the prompt.
    """
    return max(128, 2048 // _power_of_two(batch))


def padded_length(length: int) -> int:
    """The width that a prompt's last piece is padded to: a power of two, at least 16."""
    return max(16, _power_of_two(length))


def capacity_bucket(length: int) -> int:
    """The capacity of a cache for `length` tokens: a multiple of 1/8 of a power of two.

    So at most an eighth is wasted, and an octave of lengths has 8 shapes. At least 128.
    """
    step = max(16, _power_of_two(length) // 16)
    return max(128, -(-length // step) * step)


def cache_capacity(model: Llama, length: int) -> int:
    """`capacity_bucket`, kept within the sliding window of a model whose attention has one."""
    window = model.config.sliding_window if model.dca is None else None
    capacity = capacity_bucket(length)
    return capacity if window is None or length > window else min(capacity, window)


def new_cache(model: Llama, batch: int, length: int, dtype: Any = None) -> KVCache:
    """An empty cache with room for `length` tokens in each row; `dtype` is by default the model's.

    Raises:
        InputError: it does not fit into memory.
    """
    config, capacity = model.config, cache_capacity(model, length)
    dtype = jnp.dtype(model.dtype if dtype is None else dtype)
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    with _refused_if_too_large(batch, capacity, heads * config.head_dim * dtype.itemsize):
        return KVCache.create(config, batch=batch, capacity=capacity, dtype=dtype)


def copied(cache: KVCache, batch: int, capacity: int) -> KVCache:
    """A cache of `batch` rows, each the one row of `cache`, with room for `capacity` tokens.

    Raises:
        InputError: `cache` has more than one row, or the copies do not fit into memory.
    """
    if cache.key.shape[1] != 1:
        raise InputError(f"expected a cache of one row to copy, got {cache.key.shape[1]} rows")
    with _refused_if_too_large(batch, capacity, cache.num_bytes // cache.capacity):
        return _copied(cache, batch, capacity)


@contextlib.contextmanager
def _refused_if_too_large(batch: int, capacity: int, token_bytes: int) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"a KV cache for {batch} x {capacity} tokens takes "
            f"{batch * capacity * token_bytes / 2**30:.1f} GiB, which the device does not have; "
            "give shorter prompts, fewer rows, or fewer new tokens"
        ) from None


def _copy_rows(cache: KVCache, batch: int, capacity: int) -> KVCache:
    kept = min(cache.capacity, capacity)

    def widened(x: Array) -> Array:
        layers, _, _, heads, head_dim = x.shape
        rows = jnp.broadcast_to(x[:, :, :kept], (layers, batch, kept, heads, head_dim))
        return jnp.pad(rows, ((0, 0), (0, 0), (0, capacity - kept), (0, 0), (0, 0)))

    return KVCache(
        key=widened(cache.key),
        value=widened(cache.value),
        lengths=jnp.broadcast_to(jnp.minimum(cache.lengths, kept), (batch,)),
        frequency_lengths=jnp.broadcast_to(cache.frequency_lengths, (batch,)),
    )


_copied = jax.jit(_copy_rows, static_argnames=("batch", "capacity"))


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
