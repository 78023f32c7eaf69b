"""Blockwise attention in plain XLA: any device, any length, any chunk length, O(T) memory.

For each tile of queries, one online softmax runs over the blocks of keys of every band in turn
(`dca_jax.attention.bands`): DCA's phases, or the bands of another method. The blocks visited are
those the tile's queries meet, so the work is that of causal attention, or less.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dca_jax.attention.backend import Rows
from dca_jax.attention.bands import Band, PositionMethod, bands_of, logit_scale, rotated_keys
from dca_jax.dca import DCAConfig, Phase
from dca_jax.device import Device, current_device
from dca_jax.dtypes import compute_dtype
from dca_jax.rope import rotate

TILE = 512  # queries a tile
LOGITS = 512 * 512  # logits a tile may hold per head: few queries take longer blocks of keys
# Keys: those of a block that a short text does not have are computed too. A CPU's caches hold 256,
# which it reads faster than more; to a GPU each block is several kernels to be launched.
LONGEST_BLOCK, LONGEST_CPU_BLOCK = 1024, 256


def unsupported(
    device: "Device",
    query: jax.ShapeDtypeStruct,
    key: jax.ShapeDtypeStruct,
    dca: DCAConfig | PositionMethod,
) -> str | None:
    """Nothing: it runs everywhere."""
    return None


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    dca: DCAConfig | PositionMethod,
    phases: tuple[Phase, ...],
    with_lse: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """Output and natural log-sum-exp over the keys of `phases`; `key` is rotated.

    For a `PositionMethod`, `key` is raw, and it has no phases.
    """
    num_queries, num_keys, kv_heads = query.shape[1], *key.shape[2:4]
    tile, block = _block_sizes(num_queries, num_keys)

    def one_tile(args: tuple[Array, Array]) -> tuple[Array, Array]:
        queries, start = args
        batch, _, _, group, head_dim = queries.shape
        index = rows.offset[:, None] + start + jnp.arange(tile, dtype=jnp.int32)[None, :]
        compute = compute_dtype(queries.dtype)
        state = (
            jnp.full((batch, kv_heads, group, tile), -jnp.inf, compute),  # running maximum
            jnp.zeros((batch, kv_heads, group, tile), compute),  # running sum
            jnp.zeros((batch, kv_heads, group, tile, head_dim), compute),  # running output
        )
        scale = logit_scale(index, dca, rows.scale).astype(compute)
        for band in bands_of(index, dca, phases):
            rotated = _rotated_query(queries, band, scale, rows)
            first, last, span = _blocks(index, band, rows, num_keys, block)

            def step(
                n: Array,
                state: tuple,
                band: Band = band,
                rotated: Array = rotated,
                span: tuple = span,
            ) -> tuple:
                m_i, l_i, acc = state
                at, met = _block(n, num_keys, span, block)
                keys = _rotated_keys(key, layer, at, block, band, rows)
                logits = _dot("BKGTH,BSKH->BKGTS", rotated, keys)
                logits = jnp.where(met, logits, -jnp.inf)
                m_next = jnp.maximum(m_i, logits.max(axis=-1))
                safe = jnp.where(jnp.isfinite(m_next), m_next, 0)  # no key met so far
                decay = jnp.exp(m_i - safe)
                p = jnp.exp(logits - safe[..., None])
                values = _slice(value, layer, at, block)
                update = _dot("BKGTS,BSKH->BKGTH", p.astype(value.dtype), values)
                l_i = l_i * decay + p.sum(axis=-1)
                return m_next, l_i, acc * decay[..., None] + update

            state = jax.lax.fori_loop(first, last, step, state)
        m_i, l_i, acc = state
        met_any = l_i > 0
        out = acc / jnp.where(met_any, l_i, 1)[..., None]
        lse = jnp.where(met_any, m_i + jnp.log(jnp.where(met_any, l_i, 1)), -jnp.inf)
        return jnp.moveaxis(out, 3, 1).astype(queries.dtype), lse

    with jax.named_scope("dca_xla_forward"):
        out, lse = jax.lax.map(one_tile, _split_tiles(query, kv_heads, tile))
    return _join_tiles(out, num_queries), _join_tiles_lse(lse, num_queries) if with_lse else None


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    do: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    *,
    dca: DCAConfig | PositionMethod,
    phases: tuple[Phase, ...],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of query, key (as given) and value, from the global `lse` and `delta`."""
    num_queries, num_keys, kv_heads = query.shape[1], *key.shape[2:4]
    tile, block = _block_sizes(num_queries, num_keys)
    compute = compute_dtype(query.dtype)

    def one_tile(carry: tuple[Array, Array], args: tuple) -> tuple[tuple[Array, Array], Array]:
        (queries, start), (do_tile, _), (lse, delta) = args
        index = rows.offset[:, None] + start + jnp.arange(tile, dtype=jnp.int32)[None, :]
        lse = jnp.where(jnp.isfinite(lse), lse, 0)[..., None]  # rows that met no key: all masked
        do_tile = jnp.moveaxis(do_tile, 1, 3)
        dq = jnp.zeros(queries.shape, compute)
        scale = logit_scale(index, dca, rows.scale).astype(compute)
        for band in bands_of(index, dca, phases):
            rotated = _rotated_query(queries, band, scale, rows)
            first, last, span = _blocks(index, band, rows, num_keys, block)

            def step(
                n: Array,
                state: tuple,
                band: Band = band,
                rotated: Array = rotated,
                span: tuple = span,
            ) -> tuple:
                dk, dv, drotated = state
                at, met = _block(n, num_keys, span, block)
                keys = _rotated_keys(key, layer, at, block, band, rows)
                values = _slice(value, layer, at, block)
                logits = _dot("BKGTH,BSKH->BKGTS", rotated, keys)
                p = jnp.exp(jnp.where(met, logits - lse, -jnp.inf))
                dp = _dot("BKGTH,BSKH->BKGTS", do_tile, values)
                ds = (p * (dp - delta[..., None])).astype(query.dtype)
                p = p.astype(value.dtype)
                drotated = drotated + _dot("BKGTS,BSKH->BKGTH", ds, keys)
                drotated_keys = _dot("BKGTS,BKGTH->BSKH", ds, rotated)
                dk = _add_at(dk, at, _rotated_back(drotated_keys, at, band, rows))
                dv = _add_at(dv, at, _dot("BKGTS,BKGTH->BSKH", p, do_tile))
                return dk, dv, drotated

            init = (*carry, jnp.zeros(rotated.shape, compute))
            dk, dv, drotated = jax.lax.fori_loop(first, last, step, init)
            carry = (dk, dv)
            drotated = jnp.moveaxis(drotated, 3, 1)
            dq = dq + rotate(drotated, -band.query_position, rows.inv_freq)
        dq = dq * scale[:, :, None, None, None]
        return carry, dq.astype(queries.dtype)

    with jax.named_scope("dca_xla_backward"):
        (dk, dv), dq = jax.lax.scan(
            one_tile,
            (jnp.zeros(key.shape[1:], compute), jnp.zeros(value.shape[1:], compute)),
            (
                _split_tiles(query, kv_heads, tile),
                _split_tiles(do, kv_heads, tile),
                (_split_tiles_lse(lse, kv_heads, tile), _split_tiles_lse(delta, kv_heads, tile)),
            ),
        )
    return (
        _join_tiles(dq, num_queries),
        dk.astype(key.dtype),
        dv.astype(value.dtype),
    )


# --- a tile of queries against a block of keys -------------------------------------------------


def _block_sizes(num_queries: int, num_keys: int) -> tuple[int, int]:
    tile = min(TILE, num_queries)
    longest = LONGEST_CPU_BLOCK if current_device().platform == "cpu" else LONGEST_BLOCK
    return tile, min(num_keys, longest, LOGITS // tile)


def _rotated_query(
    queries: Float[Array, "B t K G H"], band: Band, scale: Float[Array, "B #t"], rows: Rows
) -> Float[Array, "B K G t H"]:
    """The tile's queries where the band puts them, times the logit scale; rounded once.

    Heads come first: so they are transposed once a tile, and not once a block.
    """
    rotated = rotate(queries.astype(scale.dtype), band.query_position, rows.inv_freq)
    rotated = rotated * scale[:, :, None, None, None]
    return jnp.moveaxis(rotated.astype(queries.dtype), 1, 3)


def _blocks(
    index: Int[Array, "B t"], band: Band, rows: Rows, num_keys: int, block: int
) -> tuple[Array, Array, tuple[Array, Array]]:
    """[first, last) of the blocks that any of the tile's queries meets; each query's key range."""
    start = band.start
    stop = jnp.where(index < rows.lengths[:, None], band.stop, start)  # padding meets nothing
    slots = (text - rows.key_offset[:, None] for text in (start, stop))
    start, stop = (jnp.clip(slot, 0, num_keys) for slot in slots)
    meets = start < stop
    first = jnp.min(jnp.where(meets, start, jnp.int32(2**31 - 1))) // block
    last = (jnp.max(jnp.where(meets, stop, 0)) + (block - 1)) // block
    return first, last, (start, stop)


def _block(
    n: Int[Array, ""], num_keys: int, span: tuple[Array, Array], block: int
) -> tuple[Array, Array]:
    """Where block n starts, and which of its keys each query meets [B, 1, 1, t, block].

    The last block of a cache whose length is no multiple of `block` starts early and masks what
    the block before has had: nothing is padded or copied.
    """
    at = jnp.minimum(n * block, num_keys - block)
    j = at + jnp.arange(block, dtype=jnp.int32)[None, None, :]
    start, stop = span
    met = (j >= jnp.maximum(start, n * block)[:, :, None]) & (j < stop[:, :, None])
    return at, met[:, None, None, :, :]


def _rotated_keys(
    cache: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    at: Int[Array, ""],
    block: int,
    band: Band,
    rows: Rows,
) -> Float[Array, "B block K H"]:
    """`block` keys of a layer where the band puts them: DCA's come so, others are rotated here."""
    keys = _slice(cache, layer, at, block)
    return rotated_keys(keys, _text_index(at, block, rows), band, rows.inv_freq)


def _rotated_back(
    dkeys: Float[Array, "B block K H"], at: Int[Array, ""], band: Band, rows: Rows
) -> Float[Array, "B block K H"]:
    """From the gradient of `_rotated_keys` to that of the keys as they came."""
    if band.key_position is None:
        return dkeys
    position = band.key_position(_text_index(at, dkeys.shape[1], rows))
    return rotate(dkeys, -position, rows.inv_freq)


def _text_index(at: Int[Array, ""], block: int, rows: Rows) -> Int[Array, "B block"]:
    """Text indices of the `block` keys from slot `at`."""
    slot = at.astype(jnp.int32) + jnp.arange(block, dtype=jnp.int32)[None, :]
    return rows.key_offset[:, None] + slot


def _slice(
    cache: Float[Array, "L B S K H"], layer: Int[Array, ""], at: Int[Array, ""], block: int
) -> Float[Array, "B block K H"]:
    """`block` keys or values of a layer, read where they lie."""
    _, batch, num_keys, kv_heads, head_dim = cache.shape
    zero = jnp.zeros_like(at)
    layer = layer.astype(at.dtype)
    flat = cache.reshape(-1, batch, num_keys, kv_heads * head_dim)
    start, size = (layer, zero, at, zero), (1, batch, block, kv_heads * head_dim)
    return jax.lax.dynamic_slice(flat, start, size).reshape(batch, block, kv_heads, head_dim)


def _dot(subscripts: str, a: Array, b: Array) -> Array:
    """einsum with products summed in float32 (float64 for float64); float32 inputs unrounded."""
    compute = compute_dtype(a.dtype)
    precision = None if a.dtype.itemsize < 4 else "highest"
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=compute)


def _add_at(acc: Array, at: Array, update: Array) -> Array:
    """Adds `update` to acc[:, at : at + len(update)], in place inside a loop."""
    old = jax.lax.dynamic_slice_in_dim(acc, at, update.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(acc, old + update, at, axis=1)


# --- tiles -------------------------------------------------------------------------------------


def _split_tiles(x: Float[Array, "B T N H"], kv_heads: int, tile: int) -> tuple[Array, Array]:
    """[tiles, B, t, K, G, H] with the last tile zero-padded, and each tile's first index."""
    batch, length, heads, head_dim = x.shape
    tiles = -(-length // tile)
    x = jnp.pad(x, ((0, 0), (0, tiles * tile - length), (0, 0), (0, 0)))
    x = x.reshape(batch, tiles, tile, kv_heads, heads // kv_heads, head_dim)
    return jnp.moveaxis(x, 1, 0), jnp.arange(tiles, dtype=jnp.int32) * tile


def _split_tiles_lse(x: Float[Array, "B N T"], kv_heads: int, tile: int) -> Array:
    """[tiles, B, K, G, t]."""
    batch, heads, length = x.shape
    tiles = -(-length // tile)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, tiles * tile - length)))
    return jnp.moveaxis(x.reshape(batch, kv_heads, heads // kv_heads, tiles, tile), 3, 0)


def _join_tiles(x: Float[Array, "tiles B t K G H"], length: int) -> Float[Array, "B T N H"]:
    x = jnp.moveaxis(x, 0, 1)
    batch, tiles, tile, kv_heads, group, head_dim = x.shape
    return x.reshape(batch, tiles * tile, kv_heads * group, head_dim)[:, :length]


def _join_tiles_lse(x: Float[Array, "tiles B K G t"], length: int) -> Float[Array, "B N T"]:
    x = jnp.moveaxis(x, 0, 3)
    batch, kv_heads, group, tiles, tile = x.shape
    return x.reshape(batch, kv_heads * group, tiles * tile)[:, :, :length]
