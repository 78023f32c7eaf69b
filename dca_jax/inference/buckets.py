"""Shapes in buckets, so that another prompt length seldom compiles anything; and caches of them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from dca_jax.attention.parallel.zigzag import natural_order, zigzag_order
from dca_jax.errors import InputError
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama
from dca_jax.sharding import Shards, axis_size, mesh_of


def piece_length(batch: int) -> int:
    """Tokens of each row that are read at once: 4096 in all, and at least 128 of each row.

    It bounds the memory of the activations, whatever the length of the prompt.
    """
    return max(128, 4096 // _power_of_two(batch))


def padded_batch(batch: int, mesh: Mesh | None) -> int:
    """Rows of a cache for so many texts: the next multiple of the mesh's `data` times `fsdp`."""
    devices = axis_size(mesh, "data", "fsdp")
    return -(-batch // devices) * devices


def padded_length(length: int) -> int:
    """The width that a prompt's last piece is padded to: a power of two, at least 16."""
    return max(16, _power_of_two(length))


def capacity_bucket(length: int, context: int = 1) -> int:
    """The capacity of a cache for `length` tokens: a multiple of 1/8 of a power of two.

    So at most an eighth is wasted, and an octave of lengths has 8 shapes. At least 128; and 16
    tokens or a multiple in each of the two blocks that a device has of a text shared by `context`.
    """
    step = max(16, _power_of_two(length) // 16)
    if context > 1:
        step = -(-step // (32 * context)) * 32 * context
    return -(-max(length, 128) // step) * step


def cache_capacity(model: Llama, length: int) -> int:
    """`capacity_bucket`, kept within the sliding window of a model whose attention has one."""
    window = model.config.sliding_window if model.dca is None else None
    context = axis_size(mesh_of(model), "context")
    capacity = capacity_bucket(length, context)
    if window is None or length > window:
        return capacity
    return min(capacity, window // (2 * context) * 2 * context if context > 1 else window)


def new_cache(model: Llama, batch: int, length: int, dtype: Any = None) -> KVCache:
    """An empty cache with room for `length` tokens in each row; `dtype` is by default the model's.

    On a mesh it has `padded_batch` rows.

    Raises:
        InputError: it does not fit into memory.
    """
    config, capacity, mesh = model.config, cache_capacity(model, length), mesh_of(model)
    dtype, batch = jnp.dtype(model.dtype if dtype is None else dtype), padded_batch(batch, mesh)
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    with _refused_if_too_large(batch, capacity, heads * config.head_dim * dtype.itemsize):
        return KVCache.create(config, batch=batch, capacity=capacity, dtype=dtype, mesh=mesh)


def copied(cache: KVCache, batch: int, capacity: int) -> KVCache:
    """A cache of `batch` rows, each the one row of `cache`, with room for `capacity` tokens.

    Raises:
        InputError: `cache` has more than one row, or the copies do not fit into memory.
    """
    mesh, rows = mesh_of(cache), cache.key.shape[1]
    if rows != padded_batch(1, mesh):
        raise InputError(f"expected a cache of one row to copy, got {rows} rows")
    batch = padded_batch(batch, mesh)
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
    shards = Shards.of(cache.key)
    context = shards.size("context")

    def widened(layer: Array) -> Array:
        """A layer at a time: on a mesh, its one row is on every device while it is copied."""
        row = shards.put(layer, shards.spec("BSK", whole="BS"))[:1]
        if context > 1:
            row = row[:, natural_order(cache.capacity, context)]
        row = jnp.pad(row[:, :kept], ((0, 0), (0, capacity - kept), (0, 0)))
        if context > 1:
            row = row[:, zigzag_order(capacity, context)]
        return shards.put(jnp.broadcast_to(row, (batch, *row.shape[1:])), shards.spec("BSK"))

    return KVCache(
        key=jax.lax.map(widened, cache.key),
        value=jax.lax.map(widened, cache.value),
        lengths=jnp.broadcast_to(jnp.minimum(cache.lengths[:1], kept), (batch,)),
        frequency_lengths=jnp.broadcast_to(cache.frequency_lengths[:1], (batch,)),
    )


_copied = jax.jit(_copy_rows, static_argnames=("batch", "capacity"))


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
