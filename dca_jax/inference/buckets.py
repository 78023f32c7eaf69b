"""Shape buckets, so that a process compiles few programs, and creation of caches.

A program is compiled for the rows and the capacity of a KV cache, and for the number of tokens it
reads at once. If a cache is small relative to the device's memory, it has one of a few shapes: 1,
8, 16, 32 ... rows of 1024, 4096, 16384 ... tokens. A larger one has powers of two, and if memory is
short, exactly the size that the texts need. Unused slots take memory, but are never read.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jaxtyping import Array

from dca_jax.attention.parallel.zigzag import natural_order, zigzag_order
from dca_jax.config import LlamaConfig
from dca_jax.dtypes import parse_cache_dtype
from dca_jax.errors import InputError, is_out_of_memory
from dca_jax.fields import LARGEST
from dca_jax.inference.compiled import compiled
from dca_jax.inference.pieces import Pieces, prompt_pieces
from dca_jax.kv_cache import KVCache, cache_arrays
from dca_jax.memory import free_bytes, total_bytes
from dca_jax.model import Llama
from dca_jax.products.packed import packed_forms
from dca_jax.sharding import AXES, Shards, axis_size, mesh_of, partition

# Shares of a device's memory: a cache up to the first has one of a few shapes, up to the second one
# of several.
FEW, SEVERAL = 1 / 32, 1 / 16
OF_MANY = 2**34  # bytes assumed as memory if there are several processes, which must agree

# --- caches ------------------------------------------------------------------------------------


def padded_batch(batch: int, mesh: Mesh | None) -> int:
    """Number of rows for a batch: the next multiple of the mesh's `data` times `fsdp`."""
    return multiple(batch, axis_size(mesh, "data", "fsdp"))


def capacity_bucket(length: int, context: int = 1) -> int:
    """The smallest capacity for `length` tokens that is a multiple of 1/8 of a power of two.

    So at most an eighth is wasted, and there are 8 shapes per octave of lengths. The capacity is at
    least 128, and each of the two blocks per device of `context` has a multiple of 16 tokens.
    """
    step = max(16, power_of_two(length) // 16)
    if context > 1:
        step = multiple(step, 32 * context)
    return multiple(max(length, 128), step)


def cache_shape(
    model: Llama, batch: int, length: int, dtype: Any = None, *, more_rows: bool = True
) -> tuple[int, int]:
    """Rows and capacity of a cache for `batch` texts of up to `length` tokens.

    Args:
        dtype: dtype of the cache or its name (default: the model's).
        more_rows: whether the result may have more rows than the batch needs.
    """
    mesh, dtype = mesh_of(model), parse_cache_dtype(model.dtype if dtype is None else dtype)
    context = axis_size(mesh, "context")
    total, free = device_memory(model)
    shapes = (
        (1 if batch == 1 else max(8, power_of_two(batch)), _power_of_four(length), FEW),
        (power_of_two(batch), max(1024, power_of_two(length)), SEVERAL),
    )
    for rows, capacity, share in shapes:
        rows = padded_batch(rows if more_rows else batch, mesh)
        capacity = multiple(capacity, max(1, 32 * context))
        if cache_bytes(model.config, rows, capacity, dtype, mesh) <= min(share * total, free / 2):
            return rows, capacity
    return padded_batch(batch, mesh), capacity_bucket(length, context)


def new_cache(
    model: Llama, batch: int, length: int, dtype: Any = None, *, more_rows: bool = True
) -> KVCache:
    """An empty cache for `batch` texts of up to `length` tokens, with the shape of `cache_shape`.

    The arguments are those of `cache_shape`.

    Raises:
        InputError: the cache and the activations do not fit into memory.
    """
    mesh, dtype = mesh_of(model), parse_cache_dtype(model.dtype if dtype is None else dtype)
    rows, capacity = _fitting(model, batch, length, dtype, more_rows)
    with _refused_if_too_large(rows, capacity):
        cache = KVCache.create(model.config, batch=rows, capacity=capacity, dtype=dtype, mesh=mesh)
    return on_device(model, cache)


def on_device(model: Llama, tree: Any) -> Any:
    """Arrays committed to the model's device like results of programs, to avoid recompilation.

    On a mesh they already are.
    """
    if mesh_of(model) is not None:
        return tree
    return jax.device_put(tree, SingleDeviceSharding(_device(model)))


def copied(model: Llama, cache: KVCache, batch: int, length: int) -> KVCache:
    """A cache like that of `new_cache`, with `batch` copies of the only row of `cache`.

    Raises:
        InputError: `cache` has more than one row, or the copies do not fit into memory.
    """
    rows = cache.lengths.shape[0]
    if rows != padded_batch(1, mesh_of(cache)):
        raise InputError(f"expected a cache of one row to copy, got {rows} rows")
    shape = _Shape(*_fitting(model, batch, length, cache.key.dtype))
    with _refused_if_too_large(shape.rows, shape.capacity):
        copy = compiled(_copy_rows, shape, rows, cache.capacity)
        copies = jax.block_until_ready(copy(cache))
    return copies.rollback([copies.capacity] * batch)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Shape:
    """The shape of a cache, for compilation."""

    rows: int
    capacity: int


def _copy_rows(shape: _Shape, cache: KVCache) -> KVCache:
    batch, capacity = shape.rows, shape.capacity
    kept = min(cache.capacity, capacity)
    shards = Shards.of(cache.key)
    context = shards.size("context")

    def widened(row: Array) -> Array:
        if context > 1:
            row = row[:, natural_order(cache.capacity, context)]
        row = jnp.pad(row[:, :kept], ((0, 0), (0, capacity - kept), (0, 0)))
        if context > 1:
            row = row[:, zigzag_order(capacity, context)]
        return jnp.broadcast_to(row, (batch, *row.shape[1:]))

    # One layer at a time: on a mesh, the row is on every device while it is copied.
    def of_tokens(layer: Array) -> Array:
        row = shards.put(layer, shards.spec("BSK", whole="BS"))[:1]
        return shards.put(widened(row), shards.spec("BSK"))

    def of_scales(layer: Array) -> Array:
        row = jnp.swapaxes(shards.put(layer, shards.spec("BSKH", whole="BS"))[:1], 2, 3)
        _, blocks, _, heads = row.shape
        wide = widened(row.reshape(1, cache.capacity, heads)).reshape(batch, blocks, -1, heads)
        return shards.put(jnp.swapaxes(wide, 2, 3), shards.spec("BSKH"))

    copies: dict[str, Any] = {
        name: None if array is None else jax.lax.map(way, array)
        for way, (name, array) in zip(
            (of_tokens, of_tokens, of_scales, of_scales),
            cache.stored._asdict().items(),
            strict=True,
        )
    }
    return KVCache(
        **copies,
        lengths=jnp.broadcast_to(jnp.minimum(cache.lengths[:1], kept), (batch,)),
        frequency_lengths=jnp.broadcast_to(cache.frequency_lengths[:1], (batch,)),
    )


# --- memory ------------------------------------------------------------------------------------


def _fitting(
    model: Llama, batch: int, length: int, dtype: np.dtype, more_rows: bool = True
) -> tuple[int, int]:
    """`cache_shape`; raises InputError if even the exact size does not fit."""
    config, mesh = model.config, mesh_of(model)
    rows, capacity = cache_shape(model, batch, length, dtype, more_rows=more_rows)
    _, free = device_memory(model)
    tokens = min(pieces_of(model).widths[0], batch * length)
    room = free - reading_bytes(config, batch, tokens, model.dtype)
    needed = cache_bytes(config, rows, capacity, dtype, mesh)
    if needed > room:
        token = needed / capacity
        longest = min(LARGEST, max(0, int(room / token) // 128 * 128))
        raise InputError(
            f"a KV cache for {batch} x {length} tokens takes {needed / 2**30:.1f} GiB, but the "
            f"device has only {max(0, room) / 2**30:.1f} GiB left for it: "
            f"{batch} x {longest} tokens fit, new ones included; give shorter prompts, fewer rows, "
            "or fewer new tokens"
        )
    if length > LARGEST:
        raise InputError(
            f"prompt and new tokens are {length} together, and a text has at most {LARGEST}; give "
            "fewer"
        )
    return rows, capacity


@contextlib.contextmanager
def _refused_if_too_large(rows: int, capacity: int) -> Iterator[None]:
    """Reports an allocation failure despite enough free memory (fragmentation, other programs)."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"a KV cache for {rows} x {capacity} tokens does not fit into the device's remaining "
            "memory; give shorter prompts, fewer rows, or fewer new tokens"
        ) from None


def cache_bytes(
    config: LlamaConfig, rows: int, capacity: int, dtype: np.dtype, mesh: Mesh | None
) -> int:
    """Bytes of keys, values and scales on one device."""
    sizes = {axis: axis_size(mesh, axis) for axis in AXES}
    total = 0
    arrays = cache_arrays(config, batch=rows, capacity=capacity, dtype=dtype, sizes=sizes)
    for letters, shape, each in arrays.values():
        if mesh is not None:
            shape = NamedSharding(mesh, partition(letters, shape, sizes)).shard_shape(shape)
        total += math.prod(shape) * each.itemsize
    return total


def reading_bytes(config: LlamaConfig, batch: int, tokens: int, dtype: Any) -> int:
    """Approximate bytes for reading a piece of `tokens` tokens in all rows, besides the cache."""
    layer = 2 * config.hidden_size + 3 * config.intermediate_size
    if config.mixture is not None:
        inner = config.hidden_size + config.mixture.moe_intermediate_size
        layer = max(layer, 3 * config.mixture.num_experts_per_tok * inner)
    return tokens * layer * jnp.dtype(dtype).itemsize + 8 * batch * config.vocab_size


def pieces_of(model: Llama, rows: int = 1) -> Pieces:
    """How prompts are read, in `rows` rows at once."""
    return prompt_pieces(
        model.config,
        _device(model).platform,
        packed=bool(packed_forms(model)),
        batch=rows,
        segment=1 if model.sparse is None else model.sparse.segment,
    )


def device_memory(model: Llama) -> tuple[float, float]:
    """Total and free bytes of the memory of a model's device; inf if unknown."""
    if jax.process_count() > 1:
        return OF_MANY, math.inf
    device, mesh = _device(model), mesh_of(model)
    # All CPU devices share one machine.
    shared = mesh.size if mesh is not None and device.platform == "cpu" else 1
    total, free = total_bytes(device), free_bytes(device)
    return (
        OF_MANY if total is None else total / shared,
        math.inf if free is None else free / shared,
    )


def _device(model: Llama) -> Any:
    """The model's device; on a mesh, one of its devices."""
    return next(iter(jax.tree.leaves(model)[0].devices()))


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _power_of_four(n: int) -> int:
    """The smallest of 1024, 4096, 16384 ... that is at least n."""
    power = max(1024, power_of_two(n))
    return power if power.bit_length() % 2 else 2 * power


def multiple(n: int, step: int) -> int:
    """The smallest multiple of `step` that is at least n."""
    return -(-n // step) * step
