"""One layer's attention on any mesh: keys rotated, written to the cache, and read.

On one device these are a few lines around `attend`. On a mesh the same lines run on every device's
own part of the arrays (`jax.shard_map`): rows of the batch and heads need nothing of each other,
and where tokens are shared along `context`, `dca_jax.attention.parallel.context` reads across
devices.
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
        how: the setting.
        whole: tokens of each row's prompt.
        number: of the model's layer.
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
    """Whole texts from their first token: what the queries read; and what a cache keeps of them.

    Query and key are raw. Where `context` cuts the texts, their tokens lie in zigzag. A text that
    is kept in 8 bits is read so, as if it came from the cache.

    Args:
        cache_dtype: of the cache; None keeps nothing.
        sparse: how the texts are read; None: densely.
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
    """Keys and values as they will be read from a cache, and the cache of them."""
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
    """Packed texts, each on its own (`dca_jax.attention.packed`); query and key are raw."""
    if shards.size("context") > 1:
        raise InputError(
            f"packed texts that do not attend to each other are read on one device, and this mesh "
            f"shares rows among {shards.size('context')} along `context`; use fsdp or tensor, or "
            "another way of packing"
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
    """Writes new keys and values to a layer of the cache, then reads it: output, and the cache.

    The new tokens follow what the rows hold (`rows.offset`); padding is dropped, never written.
    Where `context` cuts the cache, its slots lie in zigzag and every device has all new tokens.

    Args:
        sparse: how the tokens, pieces of prompts, are read; None: densely.
        pages: of a cache in pages, each row's table (`dca_jax.kv_cache.PagedCache`); `context` does
            not cut it. common: what rows have in common there, as of `attend`.
    """
    context = _context(dca, shards)
    _refuse_sparse_context(sparse, context)
    if sparse is not None and pages is not None:
        raise InputError("a cache in pages is read densely; load with sparse='off'")
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
        slots = jnp.where(index < rows.lengths[:, None], slots, capacity)  # dropped
        with jax.named_scope("cache_update"):
            cache = write(cache, layer, row, slots, key, value)
        heads = key.shape[2:]
        keys, values = (x.reshape(*x.shape[:3], *heads) for x in (cache.key, cache.value))
        scales = cache.scales
        if scales is None and keys.dtype != query.dtype:  # converted a layer at a time
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
    """The arrays that a sparse text comes with, and how they lie."""
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
    """Which blocks of keys a device's own heads read."""
    if isinstance(dca, PositionMethod):
        raise InputError(
            f"{type(dca).__name__} reads texts densely; sparse reading takes DCA or plain attention"
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
            f"a prompt is read sparsely on one device, and this mesh shares it among {context} "
            "along `context`; use tensor or data, or read densely (--sparse off)"
        )


def _context(dca: Method | None, shards: Shards) -> int:
    """How many devices share a text; other methods than DCA cannot, for their keys lie raw."""
    context = shards.size("context")
    if context > 1 and isinstance(dca, PositionMethod):
        raise InputError(
            f"{type(dca).__name__} reads a text on one device, and this mesh shares it among "
            f"{context} along `context`; use DCA, or a mesh whose context is 1"
        )
    return context


def _head_for_each(x: Float[Array, "B T K H"], shards: Shards) -> Float[Array, "B T heads H"]:
    """Keys or values with each head repeated where `tensor` has more devices than there are heads.

    Then every device has one, that which its query heads read.
    """
    batch, tokens, kv_heads, head_dim = x.shape
    copies = shards.size("tensor") // kv_heads
    if copies <= 1:
        return x
    wide = jnp.broadcast_to(x[:, :, :, None, :], (batch, tokens, kv_heads, copies, head_dim))
    return wide.reshape(batch, tokens, kv_heads * copies, head_dim)


def _rows_specs(rows: Rows, shards: Shards) -> Rows:
    """Each row's numbers lie where the row does; frequencies common to a batch are everywhere."""
    batch = rows.lengths.shape[0]
    cut, whole = shards.spec("B"), PartitionSpec()
    return Rows._make(cut if leaf.shape[0] == batch else whole for leaf in rows)


def _stored_specs(shards: Shards, quantized: bool, *, layers: str) -> Stored:
    """How a cache lies on the mesh: the scales as their heads and slots do."""
    kept: Any = shards.spec(layers + "BSK")
    scale: Any = shards.spec(layers + "BSKH") if quantized else None
    return Stored(kept, kept, scale, scale)


def _put_one(
    all_slots: Num[Array, "L R S KH"],
    place: tuple[Array, Array, Array],
    new: Num[Array, "1 1 KH"],
) -> Num[Array, "L R S KH"]:
    """`new` in a layer's, row's and slot's place; nothing if the slot is beyond S.

    A slice, for one kernel: of a scatter XLA's GPU compiler makes three, one of which only asks
    whether it stays inside.
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
    """Writes token t of text b into slot `slots[b, t]` of a layer; slots beyond S are dropped.

    Args:
        row: of each text, or of each token, its row or page.
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
    """A token's heads one behind the other, as the cache keeps them."""
    return heads.reshape(*heads.shape[:-2], heads.shape[-2] * heads.shape[-1])
