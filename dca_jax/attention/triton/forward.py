"""The forward pass in Pallas-Triton: prefill; and decoding, packed, and split over the keys."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, Num

from dca_jax.attention.backend import KeyBlocks, Rows
from dca_jax.attention.pages import unpaged
from dca_jax.attention.softmax import LOG2E, MASKED
from dca_jax.attention.stored import Scales, dequantized_layer
from dca_jax.attention.triton.common import (
    Slots,
    by_kv_head,
    dot,
    exp2,
    for_each_block,
    join_halves,
    key_bounds,
    launch_options,
    load_halves,
    load_keys,
    per_head,
    phase_rotation,
    rotate_halves,
    rotation_tables,
    row_arrays,
    scaled,
    through_memory,
    tile_bounds,
)
from dca_jax.attention.triton.tiles import choose_tiles, is_packed, splits_of_keys
from dca_jax.dca import DCAConfig, Phase, key_range
from dca_jax.device import current_device


def forward(
    query: Float[Array, "B T N H"],
    key: Num[Array, "L R S K H"],
    value: Num[Array, "L R S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    with_lse: bool,
    scales: Scales | None = None,
    blocks: KeyBlocks | None = None,
    pages: Int[Array, "B pages_per_row"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """Output over the keys of `phases`, and on request its natural log-sum-exp; as `op.Backend`."""
    assert blocks is None  # `unsupported` has refused them
    batch, num_queries, heads, head_dim = query.shape
    kv_heads = key.shape[3]
    num_keys = key.shape[2] if pages is None else key.shape[2] * pages.shape[1]
    group = heads // kv_heads
    tiles = choose_tiles(current_device(), head_dim)
    packed = is_packed(num_queries, group)
    if scales is not None and not (packed and key.dtype == jnp.int8):
        if pages is not None:
            key, value, laid_out = unpaged(key, value, scales, layer, pages)
            assert laid_out is not None  # as there are scales
            scales, layer, pages = laid_out, jnp.int32(0), None
        key, value = dequantized_layer(key, value, scales, layer, query.dtype)
        layer, scales = jnp.int32(0), None
    if packed:
        tile, pack = tiles.decode, pl.next_power_of_2(group)
        block_q = max(pl.next_power_of_2(num_queries), pl.cdiv(tile.block_q, pack))
        splits = splits_of_keys(batch * kv_heads, num_keys)
        grid = (kv_heads, splits, batch)
    else:
        tile, pack, splits = tiles.forward, 1, 1
        block_q = tile.block_q
        grid = (heads, pl.cdiv(num_queries, block_q), batch)
    kernel = functools.partial(
        _forward_kernel,
        dca=dca,
        phases=phases,
        rows_of_layer=key.shape[1],
        num_keys=num_keys,
        block_q=block_q,
        block_k=tile.block_k,
        pack=pack,
        splits=splits,
        staged=not packed,
    )
    dtype = query.dtype if splits == 1 else jnp.dtype(jnp.float32)
    out = jax.ShapeDtypeStruct((splits, batch, num_queries, kv_heads, group, head_dim), dtype)
    lse = jax.ShapeDtypeStruct((splits, batch, kv_heads, group, num_queries), jnp.float32)
    out, *lse = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=(out, lse) if with_lse or splits > 1 else (out,),
        **launch_options("dca_triton_forward", tile.num_warps, tile.num_stages),
    )(
        *row_arrays(layer, rows),
        *rotation_tables(num_queries, rows, dca),
        *by_kv_head(query, key, value),
        (None, None) if scales is None else tuple(x.reshape(-1, *x.shape[2:]) for x in scales),
        pages,
    )
    if splits > 1:
        lses = lse[0].reshape(splits, batch, heads, num_queries)
        out, *lse = _merge(out.reshape(splits, *query.shape), lses, query.dtype, with_lse)
    return out.reshape(query.shape), lse[0].reshape(batch, heads, num_queries) if lse else None


# --- the kernel ----------------------------------------------------------------------------------


def _forward_kernel(
    layer_ref: Any,  # [1]
    offset_ref: Any,  # [B]
    lengths_ref: Any,  # [B]
    key_offset_ref: Any,  # [B]
    scale_ref: Any,  # [B]
    cos_ref: Any,  # [B, T + 2, H/2]
    sin_ref: Any,
    query_ref: Any,  # [B, T, K, G, H]
    key_ref: Any,  # [L*B, S, K, H], or pages [L*P, page, K, H]
    value_ref: Any,
    scale_refs: tuple[Any, Any],  # of keys and values [L*B, K, S], or None and None
    pages_ref: Any,  # [B, pages_per_row], or None
    out_ref: Any,  # [splits, B, T, K, G, H]
    lse_ref: Any = None,  # [splits, B, K, G, T]
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    rows_of_layer: int,
    num_keys: int,
    block_q: int,
    block_k: int,
    pack: int,
    splits: int,
    staged: bool,
) -> None:
    """Grid: (kv heads, splits, batch) if heads are packed, else (query heads, tiles, batch).

    The tile is `block_q` queries of each of `pack` heads, query by query. With `staged`
    (one head, one split) the rotated queries pass through the tile's own place in `out_ref`.
    """
    _, num_queries, _, group, head_dim = query_ref.shape
    batch, page = pl.program_id(2), key_ref.shape[1]
    slots = Slots.of_row(layer_ref[0], batch, rows_of_layer, pages_ref, page)
    if pack > 1 or group == 1:
        kv_head, first_head = pl.program_id(0), jnp.int32(0)
    else:
        kv_head = lax.div(pl.program_id(0), jnp.int32(group))
        first_head = lax.rem(pl.program_id(0), jnp.int32(group))
    # The longest tiles go first, so that the last programs to finish are short.
    split = pl.program_id(1) if splits > 1 else jnp.int32(0)
    first = jnp.int32(0) if splits > 1 else (pl.num_programs(1) - 1 - pl.program_id(1)) * block_q

    token = first + jnp.arange(block_q, dtype=jnp.int32)
    index = offset_ref[batch] + token
    head = first_head + jnp.arange(pack, dtype=jnp.int32)
    is_query = (token < num_queries)[:, None] & (head < group)[None, :]
    is_text = is_query & (index < lengths_ref[batch])[:, None]
    span = per_head(index, pack)
    bounds = tile_bounds(first, block_q, num_queries, offset_ref[batch], lengths_ref[batch])

    factor, (key_scale, value_scale) = scale_ref[batch] * LOG2E, scale_refs
    key_offset = key_offset_ref[batch]
    share = _share(jnp.minimum(bounds[1] + 1 - key_offset, num_keys), split, splits, block_k)

    state = (
        jnp.full((block_q * pack,), MASKED, jnp.float32),  # running maximum
        jnp.zeros((block_q * pack,), jnp.float32),  # running sum
        jnp.zeros((block_q * pack, head_dim), jnp.float32),  # running output
    )
    for phase in phases:
        cos, sin = phase_rotation(
            cos_ref, sin_ref, batch, first, block_q, phase, dca, index, num_queries
        )
        halves = load_halves(query_ref, batch, first, block_q, kv_head, first_head, pack, is_query)
        rotated = rotate_halves(*halves, cos * factor, sin * factor)
        if staged:
            query = through_memory(
                out_ref,
                (split, batch, pl.ds(first, block_q), kv_head, first_head),
                rotated,
                is_query,
            )
        else:
            query = join_halves(*rotated, query_ref.dtype)
        start, stop = (i - key_offset for i in key_range(span, phase, dca))
        ranges = key_bounds(bounds, phase, dca, key_offset, share)
        stop = jnp.minimum(stop, ranges[3])

        def step(
            at: Array,
            edge: bool,
            state: tuple,
            query: Array = query,
            start: Array = start,
            stop: Array = stop,
            limit: Array = ranges[3],
        ) -> tuple:
            m_i, l_i, acc = state
            key = load_keys(key_ref, slots, at, block_k, kv_head, edge, limit)
            logits = dot(query, key.astype(query.dtype), 1, 1)
            logits = scaled(logits, key_scale, slots, at, kv_head, edge, limit)
            if edge:
                j = (at + jnp.arange(block_k, dtype=jnp.int32))[None, :]
                met = (start[:, None] <= j) & (j < stop[:, None])
                logits = jnp.where(met, logits, -jnp.inf)
            m_next = jnp.maximum(m_i, jnp.max(logits, axis=1))
            p = exp2(logits - m_next[:, None])
            decay = exp2(m_i - m_next)
            l_i = l_i * decay + jnp.sum(p, axis=1)
            value = load_keys(value_ref, slots, at, block_k, kv_head, edge, limit)
            p = scaled(p, value_scale, slots, at, kv_head, edge, limit)
            update = dot(p.astype(query.dtype), value.astype(query.dtype), 1, 0)
            return m_next, l_i, acc * decay[:, None] + update

        state = for_each_block(*ranges, block_k, step, state)

    m_i, l_i, acc = state
    met_any = (l_i > 0) & is_text.reshape(l_i.shape)
    l_i = jnp.where(met_any, l_i, 1.0)
    out = jnp.where(met_any[:, None], acc / l_i[:, None], 0.0)
    heads = pl.ds(first_head, pack)
    plgpu.store(
        out_ref.at[split, batch, pl.ds(first, block_q), kv_head, heads, :],
        out.reshape(block_q, pack, head_dim).astype(out_ref.dtype),
        mask=is_query[:, :, None],
    )
    if lse_ref is not None:
        lse = jnp.where(met_any, m_i / LOG2E + jnp.log(l_i), -jnp.inf)
        plgpu.store(
            lse_ref.at[split, batch, kv_head, heads, pl.ds(first, block_q)],
            lse.reshape(block_q, pack).T,
            mask=is_query.T,
        )


def _share(total: Array, split: Array, splits: int, block_k: int) -> tuple[Array, Array]:
    """[first, last) of the slots that a program of a split call reads: equal shares of `total`.

    The shares follow the text's length, which is dynamic; their number does not.
    """
    if splits == 1:
        return jnp.int32(0), total
    size = lax.div(jnp.maximum(total, 0) + (splits * block_k - 1), jnp.int32(splits * block_k))
    size = size * block_k
    return split * size, jnp.minimum((split + 1) * size, total)


def _merge(
    outs: Float[Array, "splits B T N H"],
    lses: Float[Array, "splits B N T"],
    dtype: jnp.dtype,
    with_lse: bool,
) -> tuple[Array, ...]:
    """The splits' outputs merged by their log-sum-exp; one program a query and head."""
    _, batch, num_queries, heads, head_dim = outs.shape
    out = jax.ShapeDtypeStruct((batch, num_queries, heads, head_dim), dtype)
    lse = jax.ShapeDtypeStruct((batch, heads, num_queries), jnp.float32)
    return pl.pallas_call(
        _merge_kernel,
        grid=(heads, num_queries, batch),
        out_shape=(out, lse) if with_lse else (out,),
        **launch_options("dca_triton_merge", num_warps=4, num_stages=1),
    )(outs, lses)


def _merge_kernel(outs_ref: Any, lses_ref: Any, out_ref: Any, lse_ref: Any = None) -> None:
    splits = outs_ref.shape[0]
    head, token, batch = (pl.program_id(axis) for axis in range(3))
    every = pl.ds(0, pl.next_power_of_2(splits))
    is_split = jnp.arange(every.size, dtype=jnp.int32) < splits
    lses = plgpu.load(lses_ref.at[every, batch, head, token], mask=is_split, other=-jnp.inf)
    outs = plgpu.load(outs_ref.at[every, batch, token, head, :], mask=is_split[:, None], other=0.0)
    m_i = jnp.maximum(jnp.max(lses, axis=0), MASKED)
    p = jnp.exp(lses - m_i)
    l_i = jnp.sum(p, axis=0)
    met_any = l_i > 0
    l_i = jnp.where(met_any, l_i, 1.0)
    out = jnp.sum(p[:, None] * outs, axis=0) / l_i
    out_ref[batch, token, head, :] = out.astype(out_ref.dtype)
    if lse_ref is not None:
        lse_ref[batch, head, token] = jnp.where(met_any, m_i + jnp.log(l_i), -jnp.inf)
