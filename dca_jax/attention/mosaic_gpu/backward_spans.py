"""Tables of which queries attend to which keys, for the backward kernel on Hopper."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_gpu.ranges import Keys
from dca_jax.attention.softmax import FAR
from dca_jax.dca import DCAConfig, Phase, key_range


def key_ranges(
    index: Int[Array, "B T"],
    rows: Rows,
    num_keys: int,
    block_q: int,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> tuple[Int[Array, "B phases padded"], Int[Array, "B phases padded"]]:
    """[low, high) of each query's slots in each phase; padding has low FAR and high 0."""
    padding = ((0, 0), (0, 0), (0, -index.shape[1] % block_q))
    is_text = (index < rows.lengths[:, None])[:, None, :]
    keys = Keys(rows.key_offset[:, None], num_keys)
    ends = [map(keys.slot, key_range(index, phase, dca)) for phase in phases]
    low, high = (jnp.stack(end, axis=1) for end in zip(*ends, strict=True))
    low = jnp.pad(jnp.where(is_text, low, FAR), padding, constant_values=FAR)
    return low, jnp.pad(jnp.where(is_text, high, 0), padding)


def spans_of(
    low: Int[Array, "B phases padded"],
    high: Int[Array, "B phases padded"],
    num_keys: int,
    block_q: int,
    block_kv: int,
) -> Int[Array, "B key_tiles spans"]:
    """The query tiles that attend to each key tile.

    In a phase, the query tiles that attend to a key tile are contiguous, and so are those in their
    middle whose queries all attend to all of its keys, which need no mask. From last to first:

        stop .. full_stop         masked
        full_stop .. full_start   full
        full_start .. start       masked

    Returns:
        Six descending bounds per phase: (start, middle, stop) of a masked span and the full span
        after it, twice, where the second full span is empty.
    """
    tiled = (*low.shape[:2], 1, -1, block_q)
    low, high = low.reshape(tiled), high.reshape(tiled)
    first_low, first_high = low[..., 0], high[..., 0]
    is_text, last_high = first_low < FAR, high.max(axis=-1)
    last_low = jnp.where(low < FAR, low, 0).max(axis=-1)
    num_tiles = -(-num_keys // block_kv)
    begin = jnp.arange(num_tiles, dtype=jnp.int32)[None, None, :, None] * block_kv
    end = jnp.minimum(begin + block_kv, num_keys)

    def count(holds: Array) -> Array:
        # Ranges of keys only move up from query to query. So a condition that holds for the first
        # query tiles holds up to some tile, whose number is the count of tiles where it holds.
        return jnp.sum(holds & is_text, axis=-1, dtype=jnp.int32)

    start = count(last_high <= begin)
    stop = jnp.maximum(start, count(first_low < end))
    # Full only if the key tile is complete: data beyond the last key must be masked.
    full_start = jnp.clip(count(first_high < begin + block_kv), start, stop)
    full_stop = jnp.clip(count(last_low <= begin), full_start, stop)
    spans = jnp.stack([stop, full_stop, full_start, full_start, start, start], axis=-1)
    return jnp.swapaxes(spans, 1, 2).reshape(low.shape[0], num_tiles, -1)
