"""Uses of Hopper's decode kernel: few queries per row, short pieces, shared prefixes.

The kernel processes about 56 combinations of query and head of a kv head, which read one row's
keys, and splits the keys among all multiprocessors. So it is also used where most of them would
otherwise be idle:

- A piece of up to 128 tokens after many others: the prefill kernel has one CTA for each head and
  128 queries, that is, 32 in total for 32 heads. Here the piece is split into tiles of few queries,
  each a separate row over the same pages; the tiles of a text read a page at about the same time.
- One token of each of many texts with a shared prefix: the shared pages are read once for up to
  `rows_at_once` texts together, then each text reads its own pages, and the results are merged.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_gpu.decode import Columns, attend_columns
from dca_jax.attention.mosaic_gpu.decode_tiles import columns_of, fits
from dca_jax.attention.mosaic_gpu.forward_tiles import BLOCK_Q
from dca_jax.attention.mosaic_gpu.queries import rotated_queries
from dca_jax.attention.pages import Common, own_pages
from dca_jax.attention.stored import Scales
from dca_jax.dca import DCAConfig, Phase


def decode(
    query: Float[Array, "B T N H"],
    key: Num[Array, "L R S K H"],
    value: Num[Array, "L R S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    with_lse: bool,
    scales: Scales | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """`Backend.forward` for shapes that `decode_tiles.fits` accepts."""
    batch, num_queries, num_heads, head_dim = query.shape
    kv_heads = key.shape[3]
    group = num_heads // kv_heads
    seen = _seen(query, rows, scales, options["dca"], options["phases"])
    columns = Columns(_columns(seen, kv_heads), rows.offset, rows.lengths, rows.key_offset)
    options |= {"dtype": query.dtype, "num_queries": num_queries, "group": group}
    out, lse = attend_columns(columns, key, value, layer, scales=scales, **options)
    out = out.reshape(batch, kv_heads, num_queries, group, head_dim)
    out = jnp.swapaxes(out, 1, 2).reshape(query.shape).astype(query.dtype)
    if not with_lse:
        return out, None
    lse = lse.reshape(batch, kv_heads, num_queries, group)
    return out, jnp.swapaxes(lse, 2, 3).reshape(batch, num_heads, num_queries)


# --- pieces of texts ---------------------------------------------------------------------------


def tile_of(query: jax.ShapeDtypeStruct, key: jax.ShapeDtypeStruct) -> int:
    """Queries per tile of a short piece; 0 to use the prefill kernel."""
    num_queries, most = query.shape[1], rows_at_once(query, key)
    if most == 0 or num_queries > BLOCK_Q:
        return 0
    tiles = -(-num_queries // most)
    return -(-num_queries // tiles)  # of about equal size


def decode_piece(
    query: Float[Array, "B T N H"],
    key: Num[Array, "L P page K H"],
    value: Num[Array, "L P page K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    tile: int,
    pages: Int[Array, "B pages_per_row"],
    **options: Any,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """`Backend.forward` for a piece of each text, in tiles of `tile` queries."""
    batch, num_queries, num_heads, head_dim = query.shape
    count = -(-num_queries // tile)
    padded = jnp.pad(query, ((0, 0), (0, count * tile - num_queries), (0, 0), (0, 0)))

    def of_each(x: Array) -> Array:
        return x if x.shape[0] == 1 and batch > 1 else jnp.repeat(x, count, axis=0)

    tiled = Rows(*(of_each(x) for x in rows))
    first = jnp.arange(count, dtype=jnp.int32) * tile
    tiled = tiled._replace(
        offset=(rows.offset[:, None] + first[None, :]).reshape(-1),
        # Padding queries are not part of the text.
        lengths=of_each(jnp.minimum(rows.lengths, rows.offset + num_queries)),
    )
    out, lse = decode(
        padded.reshape(batch * count, tile, num_heads, head_dim),
        *(key, value, layer, tiled),
        pages=of_each(pages),
        **options,
    )
    out = out.reshape(padded.shape)[:, :num_queries]
    if lse is None:
        return out, None
    lse = jnp.swapaxes(lse.reshape(batch, count, num_heads, tile), 1, 2)
    return out, lse.reshape(batch, num_heads, count * tile)[:, :, :num_queries]


# --- shared prefixes ---------------------------------------------------------------------------


def rows_at_once(query: jax.ShapeDtypeStruct, key: jax.ShapeDtypeStruct) -> int:
    """Number of rows whose single queries the kernel can process over the same keys; 0 if none.

    Args:
        query: [B, T, N, H]; T is ignored.
        key: [L, B, S, K, H], as in `Backend.unsupported`.
    """
    group = query.shape[2] // key.shape[3]

    def taken(count: int) -> bool:
        return fits(jax.ShapeDtypeStruct((1, count, *query.shape[2:]), query.dtype), key)

    return max((count for count in range(1, 64 // group + 1) if taken(count)), default=0)


def decode_after_common(
    query: Float[Array, "B 1 N H"],
    key: Num[Array, "L P page K H"],
    value: Num[Array, "L P page K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    pages: Int[Array, "B pages_per_row"],
    common: Common,
    scales: Scales | None = None,
) -> Float[Array, "B 1 N H"]:
    """The output of `Backend.forward` for one query per row, reading shared prefixes once."""
    batch, _, num_heads, _ = query.shape
    kv_heads = key.shape[3]
    group = num_heads // kv_heads
    seen = _seen(query, rows, scales, dca, phases)  # [phases, B, 1, N, H]
    options: dict[str, Any] = {"dtype": query.dtype, "group": group, "scales": scales}
    options |= {"dca": dca, "phases": phases}
    stack = key, value, layer

    groups, members = common.rows.shape
    there = common.rows < batch
    row = jnp.where(there, common.rows, 0)
    index = jnp.where(there, rows.offset[row], -1)
    width = columns_of(members, group)
    of_columns = jnp.repeat(index, group, axis=1)
    room = width - members * group
    of_groups = seen[:, row, 0]  # [phases, groups, members, N, H]
    together = Columns(
        query=_columns(of_groups, kv_heads),
        offset=jnp.min(jnp.where(there, index, jnp.int32(2**30)), axis=1),
        lengths=jnp.max(index, axis=1) + 1,
        key_offset=jnp.zeros((groups,), jnp.int32),
        index=jnp.pad(of_columns, ((0, 0), (0, room)), constant_values=-1),
        end=common.tokens,
    )
    table = pages[row[:, 0]]
    # The queries of a group are within a text's length of each other.
    reach = pages.shape[1] * key.shape[2]
    first, first_lse = attend_columns(
        *(together, *stack), num_queries=members, reach=reach, pages=table, **options
    )

    begun, table = own_pages(common, pages, key.shape[2])
    own = Columns(_columns(seen, kv_heads), rows.offset, rows.lengths, begun)
    rest, rest_lse = attend_columns(*(own, *stack), num_queries=1, pages=table, **options)

    def of_rows(x: Float[Array, "groups K columns *rest"], fill: float) -> Array:
        x = x.reshape(groups, kv_heads, members, group, *x.shape[3:])
        x = jnp.swapaxes(x, 1, 2).reshape(groups * members, kv_heads, group, *x.shape[4:])
        return x.at[common.place].get(mode="fill", fill_value=fill)

    merged = _merged(of_rows(first, 0), of_rows(first_lse, -jnp.inf), rest, rest_lse)
    return merged.reshape(query.shape).astype(query.dtype)


def _merged(
    first: Float[Array, "B K G H"],
    first_lse: Float[Array, "B K G"],
    rest: Float[Array, "B K G H"],
    rest_lse: Float[Array, "B K G"],
) -> Float[Array, "B K G H"]:
    """Merges two softmaxes by their log-sum-exps; 0 without any keys."""
    most = jnp.maximum(first_lse, rest_lse)
    most = jnp.where(jnp.isfinite(most), most, 0)
    weights = jnp.exp(first_lse - most)[..., None], jnp.exp(rest_lse - most)[..., None]
    total = weights[0] + weights[1]
    return (weights[0] * first + weights[1] * rest) / jnp.where(total > 0, total, 1)


# --- queries -----------------------------------------------------------------------------------


def _seen(
    query: Float[Array, "B T N H"],
    rows: Rows,
    scales: Scales | None,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> Float[Array, "P B T N H"]:
    """Queries rotated for each phase, in the kernel's dtype: float16 for 8-bit keys."""
    dtype = query.dtype if scales is None else jnp.dtype(jnp.float16)
    return jnp.stack(rotated_queries(query, rows, dca, phases, dtype))


def _columns(seen: Float[Array, "P B T N H"], kv_heads: int) -> Float[Array, "B P K columns H"]:
    """The queries grouped by kv head, padded with zeros."""
    num_phases, batch, num_queries, num_heads, head_dim = seen.shape
    group = num_heads // kv_heads
    used, columns = num_queries * group, columns_of(num_queries, group)
    seen = seen.reshape(num_phases, batch, num_queries, kv_heads, group, head_dim)
    seen = seen.transpose(1, 0, 3, 2, 4, 5)
    seen = seen.reshape(batch, num_phases, kv_heads, used, head_dim)
    return jnp.pad(seen, ((0, 0), (0, 0), (0, 0), (0, columns - used), (0, 0)))
