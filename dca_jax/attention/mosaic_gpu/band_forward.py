"""Other position methods' forward pass on Hopper: a launch of the kernel for each of their bands.

In a band every query stands at one position and every key at one, so both are rotated before the
launch, and the keys that a query meets are told as numbers. Positions by steps of the distance have
two rotations of the queries, of which a comparison of two numbers takes one (`bands.Steps`). The
bands' outputs are merged by their log-sum-exp.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dca_jax.attention.backend import Rows
from dca_jax.attention.bands import Band, PositionMethod, Series, logit_scale, rotated_keys
from dca_jax.attention.mosaic_gpu.flash_forward import launch
from dca_jax.attention.mosaic_gpu.forward_cta import OfBand, Problem, Refs
from dca_jax.attention.mosaic_gpu.forward_tiles import (
    BAND_TILES,
    BLOCK_Q,
    STEP_TILES,
    ForwardTiles,
)
from dca_jax.attention.mosaic_gpu.queries import pad_tokens
from dca_jax.attention.mosaic_gpu.ranges import Keys, walks_of_band
from dca_jax.attention.softmax import LOG2E, merge_passes
from dca_jax.rope import rotate

_Part = tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    method: PositionMethod,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Output and natural log-sum-exp over raw keys; as `Backend.forward`."""
    index = rows.offset[:, None] + jnp.arange(query.shape[1], dtype=jnp.int32)[None, :]
    scale = logit_scale(index, method, rows.scale) * jnp.float32(LOG2E)

    def of_band(band: Band) -> _Part:
        with jax.named_scope("band"):
            return _attend_to_band(query, key, value, layer, rows, band, index, scale)

    parts = []
    for one in method.bands(index, rows.whole):
        part = of_band(one) if isinstance(one, Band) else _attend_to_series(one, of_band, query)
        parts.append(part)
    if len(parts) == 1:
        out, lse = parts[0]
    else:
        outs, lses = zip(*parts, strict=True)
        out, lse = merge_passes([x.astype(jnp.float32) for x in outs], list(lses))
    return out.astype(query.dtype), lse


def _attend_to_series(
    series: Series, of_band: Callable[[Band], _Part], query: Float[Array, "B T N H"]
) -> _Part:
    """All bands of a series, one after another; float32, for it is rounded after each of them."""

    def step(n: Array, so_far: _Part) -> _Part:
        out, lse = of_band(series.band(n))
        return merge_passes([so_far[0], out.astype(jnp.float32)], [so_far[1], lse])

    batch, num_queries, heads, _ = query.shape
    nothing = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.full((batch, heads, num_queries), -jnp.inf, jnp.float32),
    )
    return jax.lax.fori_loop(jnp.int32(0), series.count, step, nothing)


def _attend_to_band(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    band: Band,
    index: Int[Array, "B T"],
    scale: Float[Array, "B #T"],
) -> _Part:
    """Output in the query's dtype, and log-sum-exp.

    Args:
        index: text index of each query. scale: what its logits are multiplied by, in log2 units.
    """
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[2:4]
    stepped = band.steps is not None
    tiles = (STEP_TILES if stepped else BAND_TILES)[head_dim]
    if num_keys % 8:  # to be padded: then of one layer only
        key, value, layer = key[layer][None], value[layer][None], jnp.int32(0)
    row = jnp.arange(batch, dtype=jnp.int32)
    value_row = layer * batch + row
    text = rows.key_offset[:, None] + jnp.arange(num_keys, dtype=jnp.int32)[None, :]
    if band.key_position is None:
        key_row, keys = value_row, key.reshape(-1, *key.shape[2:])
    else:
        key_row, keys = row, rotated_keys(key[layer], text, band, rows.inv_freq)
    keys, values = (pad_tokens(x, 1) for x in (keys, value.reshape(-1, *value.shape[2:])))

    wide = query.astype(jnp.float32)
    seen = [rotate(wide, position, rows.inv_freq) for position in band.query_positions]
    seen = [(x * scale[:, :, None, None]).astype(query.dtype) for x in seen]
    queries = [pad_tokens(x, 1) for x in seen]

    place = jnp.stack([key_row, value_row, rows.offset, rows.lengths, rows.key_offset], axis=1)
    told = _tell(band, index, rows, text, tiles)
    group = heads // kv_heads
    cluster = tiles.cluster if group % tiles.cluster == 0 else 1
    problem = Problem(num_keys, group, cluster, None, (), tiles, None, len(queries))
    given = Refs(queries, keys, values, place, (), None, None, told, None, None)
    out, lse = launch(problem, given, num_queries, True)
    assert lse is not None  # asked for
    return out, lse


def _tell(
    band: Band, index: Int[Array, "B T"], rows: Rows, text: Int[Array, "B S"], tiles: ForwardTiles
) -> OfBand:
    """The band in numbers: slots, of whole tiles of queries and whole blocks of keys."""
    present = index < rows.lengths[:, None]
    keys = Keys(rows.key_offset[:, None], text.shape[1])
    start, stop = (
        pad_tokens(jnp.where(present, keys.slot(x), 0), 1, BLOCK_Q) for x in (band.start, band.stop)
    )
    walks = walks_of_band(start, stop, pad_tokens(present, 1, BLOCK_Q), tiles.block_k)
    if band.steps is None:
        return OfBand(walks, start, stop, None, None)
    of_queries = pad_tokens(jnp.broadcast_to(band.steps.query, index.shape), 1, BLOCK_Q)
    of_keys = pad_tokens(jnp.broadcast_to(band.steps.key(text), text.shape), 1, tiles.block_k)
    return OfBand(walks, start, stop, of_queries, of_keys)
