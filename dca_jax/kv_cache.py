"""The KV cache: preallocated, donated to each step and updated in place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from dca_jax.attention.pages import Common
from dca_jax.attention.stored import Stored, is_quantized
from dca_jax.config import LlamaConfig
from dca_jax.dtypes import parse_cache_dtype
from dca_jax.errors import InputError
from dca_jax.sharding import AXES, axis_size, partition, replicated


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of the texts read so far; every row starts at index 0.

    A stored key is rotated to its own index and depends on nothing else. So sharing a prefix,
    rolling back a text (`rollback`) and splitting a prefill anywhere are exact.

    Attributes:
        key, value: all layers in one array each, the carry of a `lax.scan` over layers. The heads
            of a token are concatenated to K * H elements. Splitting them again is free, and a TPU
            stores them without padding.
        key_scale, value_scale: for keys and values in 8 bits (`dca_jax.attention.stored`), the
            factor of each head of a token; None for unquantized ones. Slots are the last axis,
            split into one block, or into two for each device of `context`.
        lengths: number of tokens in each row; slots beyond are never read.
        frequency_lengths: text length for each row's rotary frequencies. Only dynamic NTK depends
            on it; it is fixed when the first tokens are written.
    """

    key: Num[Array, "L B S KH"]
    value: Num[Array, "L B S KH"]
    key_scale: Float[Array, "L B P K w"] | None = None
    value_scale: Float[Array, "L B P K w"] | None = None
    lengths: Int[Array, " B"]
    frequency_lengths: Int[Array, " B"]

    @classmethod
    def create(
        cls,
        config: LlamaConfig,
        *,
        batch: int,
        capacity: int,
        dtype: DTypeLike = jnp.bfloat16,
        mesh: Mesh | None = None,
    ) -> "KVCache":
        """An empty cache for `batch` texts of up to `capacity` tokens each.

        GPU kernels read a cache in place if its capacity is a multiple of 8; otherwise it is
        copied, layer by layer, at every step (`dca_jax.inference.buckets.capacity_bucket` returns
        a suitable one). The cache has 2 * L * B * S * K * H elements of `dtype` and, if that has 8
        bits, 2 * L * B * S * K float32 scales (see `num_bytes`), split over the devices of the
        model's `mesh`. If `context` splits it, its slots are in zigzag order
        (`dca_jax.attention.parallel.zigzag`), and the capacity must be a multiple of twice the
        axis size. If `tensor` exceeds K, each head is stored tensor / K times, once per device.

        Args:
            dtype: a dtype or its name (`dca_jax.dtypes.CACHE_DTYPES`); "int8" and "fp8" take half
                the bytes of bfloat16.

        Raises:
            InputError: a batch or capacity that is not positive or not divisible over the mesh, or
                a dtype that the cache does not support.
        """
        dtype = parse_cache_dtype(dtype)
        if batch < 1 or capacity < 1:
            raise InputError(
                f"a KV cache needs a batch and a capacity of at least 1, got {batch} and {capacity}"
            )
        rows, halves = axis_size(mesh, "data", "fsdp"), 2 * axis_size(mesh, "context")
        if batch % rows or (halves > 2 and capacity % halves):
            raise InputError(
                f"a KV cache on this mesh needs a batch that is a multiple of {rows} and a "
                f"capacity that is a multiple of {halves}, got {batch} and {capacity}"
            )
        sizes = {axis: axis_size(mesh, axis) for axis in AXES}
        arrays = cache_arrays(config, batch=batch, capacity=capacity, dtype=dtype, sizes=sizes)
        none = np.zeros((batch,), np.int32)
        return cls(
            **{name: _zeros(mesh, *array) for name, array in arrays.items()},
            lengths=replicated(none, mesh),
            frequency_lengths=replicated(none, mesh),
        )

    @property
    def capacity(self) -> int:
        """Maximum number of tokens in a row."""
        return self.key.shape[2]

    @property
    def stored(self) -> Stored:
        """Keys, values and scales."""
        return Stored(self.key, self.value, self.key_scale, self.value_scale)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values and scales."""
        return sum(array.nbytes for array in jax.tree.leaves(self.stored))

    def rollback(self, lengths: Int[Array, " n"] | Sequence[int]) -> "KVCache":
        """The same texts truncated to `lengths` tokens (at most what they have), without a copy.

        Rows beyond the given `lengths`, which only fill up the batch, are emptied.
        """
        if isinstance(lengths, jax.Array) or isinstance(self.lengths, Tracer):
            return replace(self, lengths=jnp.minimum(jnp.asarray(lengths), self.lengths))
        # On the host, so nothing is compiled for it.
        rest = self.lengths.shape[0] - len(lengths)
        kept = np.minimum(np.asarray([*lengths, *[0] * rest], np.int32), np.asarray(self.lengths))
        return replace(self, lengths=jax.device_put(kept, self.lengths.sharding))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PagedCache:
    """Keys and values in pages of a common pool; a table lists the pages of each row's text.

    Token i of row b is in slot i % page of pages[b, i // page]. A page may be in the tables of
    several rows: a stored key is rotated to its own index and depends on nothing else, so sharing a
    common prefix is exact. A page that a row writes to must belong to that row only.

    Attributes:
        key, value, key_scale, value_scale: as in `KVCache`, with pages instead of rows.
        pages: the page table of each row. Entries beyond a row's length are never read.
        lengths, frequency_lengths: as in `KVCache`.
        common: for decoding, the prefixes that rows have in common, if known.
    """

    key: Num[Array, "L P page KH"]
    value: Num[Array, "L P page KH"]
    key_scale: Float[Array, "L P 1 K page"] | None = None
    value_scale: Float[Array, "L P 1 K page"] | None = None
    pages: Int[Array, "B n"]
    lengths: Int[Array, " B"]
    frequency_lengths: Int[Array, " B"]
    common: Common | None = None

    @property
    def stored(self) -> Stored:
        """Keys, values and scales."""
        return Stored(self.key, self.value, self.key_scale, self.value_scale)


def create_pool(
    config: LlamaConfig, *, pages: int, page: int, dtype: DTypeLike, mesh: Mesh | None = None
) -> Stored:
    """An empty pool for a `PagedCache`, with the given number of pages of `page` tokens.

    On a mesh, `tensor` splits its heads; nothing else is split.

    Args:
        dtype: as in `KVCache.create`.
    """
    sizes = {axis: axis_size(mesh, axis) for axis in AXES}
    dtype = parse_cache_dtype(dtype)
    arrays = cache_arrays(config, batch=pages, capacity=page, dtype=dtype, sizes=sizes)
    return Stored(**{name: _zeros(mesh, *array) for name, array in arrays.items()})


def _zeros(mesh: Mesh | None, letters: str, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """An array of zeros, laid out on the mesh."""
    place = None
    if mesh is not None:
        place = NamedSharding(mesh, partition(letters, shape, mesh.shape))
    return jnp.zeros(shape, dtype, device=place)


def cache_arrays(
    config: LlamaConfig, *, batch: int, capacity: int, dtype: jnp.dtype, sizes: Mapping[str, int]
) -> dict[str, tuple[str, tuple[int, ...], jnp.dtype]]:
    """The arrays of a cache by their names in `KVCache`: axis letters, shape and dtype.

    Args:
        sizes: axis sizes of the mesh.
    """
    heads = max(config.num_key_value_heads, sizes["tensor"])
    first = config.num_hidden_layers, batch
    whole = "LBSK", (*first, capacity, heads * config.head_dim), jnp.dtype(dtype)
    arrays: dict[str, tuple[str, tuple[int, ...], jnp.dtype]] = {"key": whole, "value": whole}
    if is_quantized(dtype):
        blocks = 1 if sizes["context"] == 1 else 2 * sizes["context"]
        scale = "LBSKH", (*first, blocks, heads, capacity // blocks), jnp.dtype(jnp.float32)
        arrays |= {"key_scale": scale, "value_scale": scale}
    return arrays
