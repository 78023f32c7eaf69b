"""The KV cache: preallocated, donated to each step and updated in place."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dca_jax.config import LlamaConfig
from dca_jax.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of the texts read so far, every row from index 0.

    A key is stored rotated to its own index, and nothing else: so a prefix can be shared, a text
    rolled back (`rollback`) and a prefill split anywhere, exactly.

    Attributes:
        key, value: all layers in one array each, which a `lax.scan` over layers carries along.
        lengths: tokens each row holds; what lies beyond is never read.
        frequency_lengths: the text length each row's rotary frequencies were made for. Only
            dynamic NTK depends on it; it is fixed by the first tokens written.
    """

    key: Float[Array, "L B S K H"]
    value: Float[Array, "L B S K H"]
    lengths: Int[Array, " B"]
    frequency_lengths: Int[Array, " B"]

    @classmethod
    def create(
        cls, config: LlamaConfig, *, batch: int, capacity: int, dtype: DTypeLike = jnp.bfloat16
    ) -> "KVCache":
        """An empty cache for `batch` texts of up to `capacity` tokens each.

        A capacity that is a multiple of 8 is read by the GPU kernels where it lies; any other is
        copied, layer by layer, at every step (`dca_jax.buckets.capacity_bucket` gives a good one).
        It takes 2 * L * B * S * K * H elements of `dtype` (`num_bytes` says how many bytes).
        """
        if batch < 1 or capacity < 1:
            raise InputError(
                f"a KV cache needs a batch and a capacity of at least 1, got {batch} and {capacity}"
            )
        shape = (
            config.num_hidden_layers,
            batch,
            capacity,
            config.num_key_value_heads,
            config.head_dim,
        )
        return cls(
            key=jnp.zeros(shape, dtype),
            value=jnp.zeros(shape, dtype),
            lengths=jnp.zeros((batch,), jnp.int32),
            frequency_lengths=jnp.zeros((batch,), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.key.shape[2]

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.key.nbytes + self.value.nbytes

    def rollback(self, lengths: Int[Array, " B"]) -> "KVCache":
        """The same texts cut to `lengths` tokens (never more than they hold); nothing is copied."""
        return replace(self, lengths=jnp.minimum(lengths, self.lengths))


def write(
    cache: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    index: Int[Array, "B T"],
    is_text: Bool[Array, "B T"],
    new: Float[Array, "B T K H"],
) -> Float[Array, "L B S K H"]:
    """Writes token t of row b at `index[b, t]` of a layer; padding is dropped, never written."""
    batch, capacity = index.shape[0], cache.shape[2]
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    at = jnp.where(is_text, index, capacity)  # out of bounds: dropped
    return cache.at[layer, row, at].set(new.astype(cache.dtype), mode="drop")
