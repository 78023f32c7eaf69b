"""One layer's attention on any mesh: rotates keys, writes them to the cache, and attends.

On one device these are a few lines around `attend`. On a mesh the same lines run on each device's
part of the arrays (`jax.shard_map`): rows of the batch and heads are independent, and where tokens
are split along `context`, `dca_jax.attention.parallel.context` attends across devices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from dca_jax.attention.backend import PLAIN, KeyBlocks, Rows
from dca_jax.attention.bands import Method, PositionMethod, joined, split
from dca_jax.attention.op import attend, rotate_keys
from dca_jax.attention.packed import attend_to_packed
from dca_jax.attention.pages import Common
from dca_jax.attention.parallel.context import decode_attention
from dca_jax.attention.parallel.ring import ring_attention
from dca_jax.attention.parallel.zigzag import zigzag_positions, zigzag_slots
from dca_jax.attention.sparse import Piece, Sparse
from dca_jax.attention.stored import Scales, Stored, dequantize, is_quantized, quantize
from dca_jax.errors import InputError
from dca_jax.rope import RopeConfig
from dca_jax.sharding import Shards


class SparseText(NamedTuple):
    """Prompts that are read sparsely.

    Attributes:
        how: the sparse setting.
        whole: number of tokens of each row's prompt.
        number: number of the model's layer.
    """

    how: Sparse
    whole: Int[Array, " B"]
    number: Int[Array, ""]


def attend_to_text(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    dca: Method | None,
    rows: Rows,
    implementation: str | None,
    shards: Shards,
    cache_dtype: DTypeLike | None = None,
    sparse: SparseText | None = None,
) -> tuple[Float[Array, "B T N H"], Stored | None]:
    """Attention of whole texts from their first token; returns the output and the cache entries.

    Query and key are unrotated. Where `context` splits the texts, their tokens are in zigzag order.
    With an 8-bit cache, attention uses the quantized keys and values, as if read from the cache.

    Args:
        cache_dtype: dtype of the cache entries to return; None returns none.
        sparse: how the texts are read sparsely; None reads them densely.
    """
    context = _context(dca, shards)
    _refuse_sparse_context(sparse, context)
    key, value = _head_for_each(key, shards), _head_for_each(value, shards)
    form, numbers = split(dca or PLAIN)

    def local(
        query: Array,
        key: Array,
        value: Array,
        rows: Rows,
        numbers: dict[str, Array],
        *of_text: Array,
    ) -> tuple[Array, Stored | None]:
        dca = joined(form, numbers)
        if context > 1:
            index = zigzag_positions(key.shape[1])
        else:
            index = jnp.arange(key.shape[1], dtype=jnp.int32)
        with jax.named_scope("rope"):
            key = rotate_keys(key, index[None], dca=dca, inv_freq=rows.inv_freq)
        kept = None
        if cache_dtype is not None and is_quantized(cache_dtype):
            with jax.named_scope("cache_update"):
                key, value, kept = _quantized_text(key, value, cache_dtype, context)
        elif cache_dtype is not None:
            kept = Stored(*(flat(x).astype(cache_dtype) for x in (key, value)))
        read = attend if context == 1 else ring_attention
        options: dict[str, Any] = {"dca": dca, "implementation": implementation}
        if sparse is not None:
            stack = key[None], jnp.int32(0), rows
            options["blocks"] = _blocks(sparse.how, query, *stack, None, of_text, dca, shards)
        with jax.named_scope("attention"):
            out = read(query, key, value, rows=rows, **options)
        return out, kept

    q, k = shards.spec("BTNH"), shards.spec("BTKH")
    kept = None
    if cache_dtype is not None:
        kept = _stored_specs(shards, is_quantized(cache_dtype), layers="")
    of_text, specs = _of_text(sparse, shards)
    placed = _rows_specs(rows, shards), dict.fromkeys(numbers, PartitionSpec())
    mapped = shards.local(local, (q, k, k, *placed, *specs), (q, kept))
    return mapped(query, key, value, rows, numbers, *of_text)


def _quantized_text(
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    dtype: DTypeLike,
    context: int,
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"], Stored]:
    """Keys and values as they will be read from an 8-bit cache, and the cache entries."""
    batch, length, kv_heads, _ = key.shape
    blocks = 1 if context == 1 else 2
    read, kept, scales = [], [], []
    for x in (key, value):
        q, scale = quantize(x, dtype)
        read.append(dequantize(q, scale, x.dtype))
        kept.append(flat(q))
        scale = scale.reshape(batch, blocks, length // blocks, kv_heads)
        scales.append(jnp.swapaxes(scale, 2, 3))
    return *read, Stored(*kept, *scales)


def attend_to_texts(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    text_index: Int[Array, "B T"],
    *,
    dca: Method | None,
    rope: RopeConfig,
    implementation: str | None,
    shards: Shards,
) -> Float[Array, "B T N H"]:
    """Packed texts that do not attend to each other (`dca_jax.attention.packed`), unrotated."""
    if shards.size("context") > 1:
        raise InputError(
            f"packed texts that do not attend to each other need whole rows on a device, but this "
            f"mesh splits them over {shards.size('context')} along `context`; use fsdp or tensor, "
            "or another way of packing"
        )
    key, value = _head_for_each(key, shards), _head_for_each(value, shards)
    form, numbers = split(dca or PLAIN)

    def local(
        query: Array, key: Array, value: Array, text_index: Array, numbers: dict[str, Array]
    ) -> Array:
        dca = joined(form, numbers)
        options = {"dca": dca, "rope": rope, "implementation": implementation}
        with jax.named_scope("attention"):
            return attend_to_packed(query, key, value, text_index, **options)

    q, k = shards.spec("BTNH"), shards.spec("BTKH")
    placed = shards.spec("BT"), dict.fromkeys(numbers, PartitionSpec())
    mapped = shards.local(local, (q, k, k, *placed), q)
    return mapped(query, key, value, text_index, numbers)


def attend_to_cache(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    cache: Stored,
    layer: Int[Array, ""],
    *,
    dca: Method | None,
    rows: Rows,
    implementation: str | None,
    shards: Shards,
    sparse: SparseText | None = None,
    pages: Int[Array, "B n"] | None = None,
    common: Common | None = None,
) -> tuple[Float[Array, "B T N H"], Stored]:
    """Writes new keys and values to a layer of the cache and attends; returns output and cache.

    The new tokens follow those already in the rows (`rows.offset`); padding is never written. Where
    `context` splits the cache, its slots are in zigzag order and every device has all new tokens.

    Args:
        sparse: how the tokens, which are pieces of prompts, are read sparsely; None reads them
            densely.
        pages: each row's page table for a paged cache (`dca_jax.kv_cache.PagedCache`), which
            `context` does not split.
        common: beginnings that rows of a paged cache have in common, as in `attend`.
    """
    context = _context(dca, shards)
    _refuse_sparse_context(sparse, context)
    if sparse is not None and pages is not None:
        raise InputError("a paged cache cannot be read sparsely; load with sparse='off'")
    key, value = _head_for_each(key, shards), _head_for_each(value, shards)
    form, numbers = split(dca or PLAIN)

    def local(
        query: Array,
        key: Array,
        value: Array,
        cache: Stored,
        layer: Array,
        rows: Rows,
        numbers: dict[str, Array],
        pages: Array | None,
        common: Common | None,
        *of_text: Array,
    ) -> tuple[Array, Stored]:
        dca = joined(form, numbers)
        index = rows.offset[:, None] + jnp.arange(key.shape[1], dtype=jnp.int32)[None, :]
        with jax.named_scope("rope"):
            key = rotate_keys(key, index, dca=dca, inv_freq=rows.inv_freq)
        capacity = cache.key.shape[2]
        row = jnp.arange(len(index), dtype=jnp.int32)[:, None]
        slots = index if context == 1 else zigzag_slots(index, capacity)
        if pages is not None:
            row = jnp.take_along_axis(pages, index // capacity, axis=1, mode="clip")
            slots = index % capacity
        slots = jnp.where(index < rows.lengths[:, None], slots, capacity)  # out of range: dropped
        with jax.named_scope("cache_update"):
            cache = write(cache, layer, row, slots, key, value)
        heads = key.shape[2:]
        keys, values = (x.reshape(*x.shape[:3], *heads) for x in (cache.key, cache.value))
        scales = cache.scales
        if scales is None and keys.dtype != query.dtype:  # converted one layer at a time
            keys, values = (x[layer][None].astype(query.dtype) for x in (keys, values))
            layer = jnp.int32(0)
        options: dict[str, Any] = {"dca": dca, "implementation": implementation, "scales": scales}
        if sparse is not None:
            stack = keys, layer, rows
            options["blocks"] = _blocks(sparse.how, query, *stack, scales, of_text, dca, shards)
        with jax.named_scope("attention"):
            if context == 1:
                options |= {"pages": pages, "common": common}
                out = attend(query, keys, values, rows=rows, layer=layer, **options)
            else:
                out = decode_attention(query, keys, values, layer, rows, **options)
        return out, cache

    q, k = shards.spec("BTNH", whole="T"), shards.spec("BTKH", whole="T")
    kept = _stored_specs(shards, cache.scales is not None, layers="L")
    of_text, more = _of_text(sparse, shards)
    table: Any = None if pages is None else shards.spec("BS", whole="S")
    everywhere: Any = PartitionSpec()
    of_all = None if common is None else Common(everywhere, everywhere, everywhere)
    of_method = dict.fromkeys(numbers, everywhere)
    placed = everywhere, _rows_specs(rows, shards), of_method, table, of_all
    mapped = shards.local(local, (q, k, k, kept, *placed, *more), (q, kept))
    return mapped(query, key, value, cache, layer, rows, numbers, pages, common, *of_text)


def _of_text(sparse: SparseText | None, shards: Shards) -> tuple[tuple, tuple]:
    """The arrays of a sparse text, and their partition specs."""
    if sparse is None:
        return (), ()
    return (sparse.whole, sparse.number), (shards.spec("B"), PartitionSpec())


def _blocks(
    how: Sparse,
    query: Float[Array, "B T N H"],
    key: Num[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    scales: Scales | None,
    of_text: tuple[Array, ...],
    dca: Method | None,
    shards: Shards,
) -> KeyBlocks:
    """The key blocks that the heads on one device read."""
    if isinstance(dca, PositionMethod):
        raise InputError(
            f"{type(dca).__name__} does not support sparse prefill; use DCA or plain attention, "
            "or --sparse off"
        )
    whole, number = of_text
    head = jnp.int32(0)
    if shards.size("tensor") > 1:
        head = jax.lax.axis_index("tensor") * query.shape[2]
    with jax.named_scope("select_blocks"):
        piece = Piece(query, key, layer, rows, whole, scales, number, head)
        return how.blocks(piece, dca or PLAIN)


def _refuse_sparse_context(sparse: SparseText | None, context: int) -> None:
    if sparse is not None and context > 1:
        raise InputError(
            f"sparse prefill needs the whole prompt on one device, but this mesh splits it over "
            f"{context} along `context`; use tensor or data, or dense prefill (--sparse off)"
        )


def _context(dca: Method | None, shards: Shards) -> int:
    """Number of devices that share a text; 1 for methods other than DCA, which cache raw keys."""
    context = shards.size("context")
    if context > 1 and isinstance(dca, PositionMethod):
        raise InputError(
            f"{type(dca).__name__} needs the whole text on one device, but this mesh splits it "
            f"over {context} along `context`; use DCA, or a mesh with context=1"
        )
    return context


def _head_for_each(x: Float[Array, "B T K H"], shards: Shards) -> Float[Array, "B T heads H"]:
    """Keys or values, with heads repeated if `tensor` has more devices than there are kv heads.

    Every device then has the one head that its query heads attend to.
    """
    batch, tokens, kv_heads, head_dim = x.shape
    copies = shards.size("tensor") // kv_heads
    if copies <= 1:
        return x
    wide = jnp.broadcast_to(x[:, :, :, None, :], (batch, tokens, kv_heads, copies, head_dim))
    return wide.reshape(batch, tokens, kv_heads * copies, head_dim)


def _rows_specs(rows: Rows, shards: Shards) -> Rows:
    """Specs of `Rows`: each row's numbers are with the row, common frequencies on every device."""
    batch = rows.lengths.shape[0]
    cut, whole = shards.spec("B"), PartitionSpec()
    return Rows._make(cut if leaf.shape[0] == batch else whole for leaf in rows)


def _stored_specs(shards: Shards, quantized: bool, *, layers: str) -> Stored:
    """Specs of a cache on the mesh; scales are split like their heads and slots."""
    kept: Any = shards.spec(layers + "BSK")
    scale: Any = shards.spec(layers + "BSKH") if quantized else None
    return Stored(kept, kept, scale, scale)


def _put_one(
    all_slots: Num[Array, "L R S KH"],
    place: tuple[Array, Array, Array],
    new: Num[Array, "1 1 KH"],
) -> Num[Array, "L R S KH"]:
    """Writes `new` at a layer, row and slot; writes nothing if the slot is at or beyond S.

    It updates a slice, which takes one kernel. XLA's GPU compiler turns a scatter into three, one
    of which only checks bounds.
    """
    layer, row, slot = place
    last = all_slots.shape[2] - 1
    at = layer, row, jnp.minimum(slot, last), jnp.zeros_like(slot)
    before = jax.lax.dynamic_slice(all_slots, at, (1, *new.shape))
    new = jnp.where(slot <= last, new[None], before)
    return jax.lax.dynamic_update_slice(all_slots, new, at)


def write(
    cache: Stored,
    layer: Int[Array, ""],
    row: Int[Array, "B #T"],
    slots: Int[Array, "B T"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
) -> Stored:
    """Writes token t of text b to slot `slots[b, t]` of a layer; drops slots at or beyond S.

    Args:
        row: row or page of each text, or of each token.
    """

    def put(all_slots: Array, new: Array) -> Array:
        new = new.astype(all_slots.dtype)
        if slots.size == 1:
            return _put_one(all_slots, (layer, row[0, 0], slots[0, 0]), new)
        return all_slots.at[layer, row, slots].set(new, mode="drop")

    if cache.key_scale is None or cache.value_scale is None:
        return Stored(put(cache.key, flat(key)), put(cache.value, flat(value)))
    (key, key_scale), (value, value_scale) = (quantize(x, cache.key.dtype) for x in (key, value))

    def put_scale(all_slots: Array, new: Array) -> Array:
        block, slot = jnp.divmod(slots, all_slots.shape[-1])
        return all_slots.at[layer, row, block, :, slot].set(new, mode="drop")

    return Stored(
        put(cache.key, flat(key)),
        put(cache.value, flat(value)),
        put_scale(cache.key_scale, key_scale),
        put_scale(cache.value_scale, value_scale),
    )


def flat(heads: Num[Array, "*rest K H"]) -> Num[Array, "*rest KH"]:
    """The heads of a token concatenated, as in the cache."""
    return heads.reshape(*heads.shape[:-2], heads.shape[-2] * heads.shape[-1])
