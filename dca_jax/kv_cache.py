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
    """Keys and values of the texts read so far, every row from index 0.

    A key is stored rotated to its own index, and nothing else: so a prefix can be shared, a text
    rolled back (`rollback`) and a prefill split anywhere, exactly.

    Attributes:
        key, value: all layers in one array each, which a `lax.scan` over layers carries along. A
            token's heads lie one behind the other, K * H elements, which is free to take apart
            again, and which a TPU stores without padding.
        key_scale, value_scale: of keys and values in 8 bits (`dca_jax.attention.stored`), what
            each head of a token is to be multiplied by; None if they are exact. Slots come last,
            cut into one block, or into two for each device of `context`.
        lengths: tokens each row holds; what lies beyond is never read.
        frequency_lengths: the text length each row's rotary frequencies were made for. Only
            dynamic NTK depends on it; it is fixed by the first tokens written.
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

        A capacity that is a multiple of 8 is read by the GPU kernels where it lies; any other is
        copied, layer by layer, at every step (`dca_jax.inference.buckets.capacity_bucket` gives a
        good one). It takes 2 * L * B * S * K * H elements of `dtype`, and 2 * L * B * S * K scales
        in float32 if that has 8 bits (`num_bytes` says how many bytes), shared by the devices of
        the model's `mesh`. Where `context` cuts it, its slots lie in zigzag
        (`dca_jax.attention.parallel.zigzag`), and the capacity is a multiple of twice the axis'
        size. Where `tensor` is more than K, each head is kept tensor / K times, once for each
        device.

        Args:
            dtype: also by name (`dca_jax.dtypes.CACHE_DTYPES`): "int8" and "fp8" keep half the
                bytes of bfloat16.

        Raises:
            InputError: a batch or capacity that is not positive, or that the mesh does not divide;
                a dtype that no cache has.
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
                f"capacity that is one of {halves}, got {batch} and {capacity}"
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
        """Tokens a row can hold."""
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
        """The same texts cut to `lengths` tokens (never more than they hold); nothing is copied.

        Rows beyond the `lengths` given, which fill the cache up, are emptied.
        """
        if isinstance(lengths, jax.Array) or isinstance(self.lengths, Tracer):
            return replace(self, lengths=jnp.minimum(jnp.asarray(lengths), self.lengths))
        # On the host, where nothing is compiled for it.
        rest = self.lengths.shape[0] - len(lengths)
        kept = np.minimum(np.asarray([*lengths, *[0] * rest], np.int32), np.asarray(self.lengths))
        return replace(self, lengths=jax.device_put(kept, self.lengths.sharding))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PagedCache:
    """Keys and values in pages of a common pool; a table says which pages a row's text lies in.

    Row b's token i lies in slot i % page of pages[b, i // page]. A page may stand in the tables of
    many rows: a key is stored rotated to its own index, and nothing else, so a common beginning is
    shared exactly. A page to which a row writes must be its own.

    Attributes:
        key, value, key_scale, value_scale: as in `KVCache`, pages in place of rows.
        pages: each row's table. What it says beyond a row's length is never read.
        lengths: as in `KVCache`. frequency_lengths: likewise.
        common: of texts of which one token is read next, what they have in common, if known.
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
    """What a `PagedCache` holds, empty: so many pages of `page` tokens.

    On a mesh its heads are cut by `tensor`, and nothing else is cut.

    Args:
        dtype: as of `KVCache.create`.
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
    """What a cache is made of, by the names of `KVCache`: letters of the axes, shape, and dtype.

    Args:
        sizes: of the mesh.
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
