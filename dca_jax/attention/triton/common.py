"""What the Triton kernels share: their arguments, ranges of keys, rotation, loads and products."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from dca_jax.attention.backend import Rows
from dca_jax.dca import DCAConfig, Phase, key_range

INTERPRET = False  # tests set it: the kernels then run on any device, in Pallas' interpreter


def launch_options(name: str, num_warps: int, num_stages: int) -> dict[str, Any]:
    """What `pallas_call` is told besides the kernel and its shapes."""
    params = plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return {"compiler_params": params, "interpret": INTERPRET, "name": name}


def row_arrays(layer: Int[Array, ""], rows: Rows) -> tuple[Array, ...]:
    """Layer, and each row's offset, length, key offset and logit scale: a program's scalars."""
    layer = layer.astype(jnp.int32).reshape(1)
    return layer, rows.offset, rows.lengths, rows.key_offset, rows.scale


def by_kv_head(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """query [B, T, K, N/K, H], key and value [L*R, S, K, H]: free reshapes."""
    batch, num_queries, heads, head_dim = query.shape
    num_layers, num_rows, num_keys, kv_heads, _ = key.shape
    query = query.reshape(batch, num_queries, kv_heads, heads // kv_heads, head_dim)
    stacked = (num_layers * num_rows, num_keys, kv_heads, head_dim)
    return query, key.reshape(stacked), value.reshape(stacked)


def rotation_tables(num_queries: int, rows: Rows, dca: DCAConfig) -> tuple[Array, Array]:
    """cos and sin [B, T + 2, H/2], float32: of P_q(i, intra), of P_q(inter), and of s.

    Every phase's rotation follows from these (`phase_rotation`), so no table per phase is needed.
    """
    batch = rows.offset.shape[0]
    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    constants = jnp.asarray([dca.inter_position, dca.chunk_len], jnp.int32)
    positions = jnp.concatenate(
        [index % dca.chunk_len, jnp.broadcast_to(constants[None, :], (batch, 2))], axis=1
    )
    angle = positions.astype(jnp.float32)[:, :, None] * rows.inv_freq[:, None, :]
    return jnp.cos(angle), jnp.sin(angle)


# --- ranges ------------------------------------------------------------------------------------


def tile_bounds(
    first: Array, block_q: int, num_queries: int, offset: Array, length: Array
) -> tuple[Array, Array]:
    """Index of the tile's first and of its last query that is text (none: last < first)."""
    stop = jnp.minimum(offset + jnp.minimum(first + block_q, num_queries), length)
    return offset + first, stop - 1


def key_bounds(
    bounds: tuple[Array, Array],
    phase: Phase,
    dca: DCAConfig,
    key_offset: Array,
    share: tuple[Array, Array],
) -> tuple[Array, Array, Array, Array]:
    """`for_each_block`'s four bounds, in slots, within a program's share of them.

    Ranges only move forward, so first and last query tell them all.
    """
    (lo, full_hi), (full_lo, hi) = (
        [i - key_offset for i in key_range(query, phase, dca)] for query in bounds
    )
    first, last = share
    lo, full_lo = jnp.maximum(lo, first), jnp.maximum(full_lo, first)
    hi, full_hi = jnp.minimum(hi, last), jnp.minimum(full_hi, last)
    return lo, full_lo, full_hi, jnp.where(bounds[0] <= bounds[1], hi, lo)


def for_each_block(
    lo: Array, full_lo: Array, full_hi: Array, hi: Array, block: int, step: Callable, state: Any
) -> Any:
    """step(at, edge, state) for the blocks that cover [lo, hi), counted from lo.

    Blocks within [full_lo, full_hi) need no mask (edge False) and go first; those at the edges,
    before and after, follow in one loop, so that the kernel holds the code of either only once.
    """
    size = jnp.int32(block)
    blocks = lax.div(jnp.maximum(hi - lo, 0) + (block - 1), size)
    before = jnp.minimum(lax.div(jnp.maximum(full_lo - lo, 0) + (block - 1), size), blocks)
    full = lax.div(jnp.maximum(full_hi - (lo + before * size), 0), size)
    full = jnp.minimum(full, blocks - before)
    state = lax.fori_loop(
        before, before + full, lambda n, state: step(lo + n * size, False, state), state
    )

    def edge(n: Array, state: Any) -> Any:
        return step(lo + (n + jnp.where(n >= before, full, 0)) * size, True, state)

    return lax.fori_loop(jnp.int32(0), blocks - full, edge, state)


# --- rotation ----------------------------------------------------------------------------------


def phase_rotation(
    cos_ref: Any,
    sin_ref: Any,
    batch: Array,
    first: Array,
    block_q: int,
    phase: Phase,
    dca: DCAConfig,
    index: Array,
    num_queries: int,
) -> tuple[Array, Array]:
    """cos and sin [block_q, 1, H/2] of the tile's query positions in a phase.

    With Q' = min(2s - 1, Q): intra is read; inter is a constant; succ is inter where
    i mod s + s >= Q', else intra rotated on by s.
    """

    def constant(row: int) -> tuple[Array, Array]:
        return cos_ref[batch, row, :][None, None, :], sin_ref[batch, row, :][None, None, :]

    inter_cos, inter_sin = constant(num_queries)
    if phase == "inter":
        return inter_cos, inter_sin
    tokens = pl.ds(first, block_q)
    mask = ((first + jnp.arange(block_q, dtype=jnp.int32)) < num_queries)[:, None]
    cos = plgpu.load(cos_ref.at[batch, tokens, :], mask=mask, other=0.0)[:, None, :]
    sin = plgpu.load(sin_ref.at[batch, tokens, :], mask=mask, other=0.0)[:, None, :]
    if phase == "intra":
        return cos, sin
    far_cos, far_sin = constant(num_queries + 1)
    held = (index % dca.chunk_len >= dca.inter_position - dca.chunk_len)[:, None, None]
    return (
        jnp.where(held, inter_cos, cos * far_cos - sin * far_sin),
        jnp.where(held, inter_sin, sin * far_cos + cos * far_sin),
    )


def rotate_halves(first: Array, second: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """The two halves of a vector, each pair of their elements rotated by its angle."""
    return first * cos - second * sin, second * cos + first * sin


def load_halves(
    query_ref: Any,
    batch: Array,
    first: Array,
    block_q: int,
    kv_head: Array,
    first_head: Array,
    pack: int,
    is_query: Array,
) -> tuple[Array, Array]:
    """The tile's queries as the two halves that rotation pairs, float32 [block_q, pack, H/2].

    Volatile, or one load would serve all phases, and hold its registers through every loop.
    """
    half = query_ref.shape[-1] // 2
    tile = (batch, pl.ds(first, block_q), kv_head, pl.ds(first_head, pack))
    load = functools.partial(plgpu.load, mask=is_query[:, :, None], other=0.0, volatile=True)
    return (
        load(query_ref.at[*tile, pl.ds(0, half)]).astype(jnp.float32),
        load(query_ref.at[*tile, pl.ds(half, half)]).astype(jnp.float32),
    )


def through_memory(ref: Any, at: tuple, halves: tuple[Array, Array], mask: Array) -> Array:
    """Two halves [block_q, 1, H/2] as one [block_q, H], by way of `ref`, memory of the tile's own.

    Triton lets a product read its left side from shared memory if that was loaded, and else makes
    every step of the loop copy it to registers.
    """
    half = halves[0].shape[-1]
    for number, part in enumerate(halves):
        part = part[:, 0, :].astype(ref.dtype)
        plgpu.store(ref.at[*at, pl.ds(number * half, half)], part, mask=mask)
    if not INTERPRET:
        plgpu.debug_barrier()
    joined = plgpu.load(ref.at[*at, :], mask=mask, other=0.0, volatile=True)
    if not INTERPRET:
        plgpu.debug_barrier()
    return joined


def join_halves(first: Array, second: Array, dtype: jnp.dtype) -> Array:
    """Two halves [block_q, pack, H/2] as one [block_q * pack, H] of `dtype`."""
    block_q, pack, half = first.shape
    both = jnp.stack([first.astype(dtype), second.astype(dtype)], axis=-1)
    return jnp.swapaxes(both, 2, 3).reshape(block_q * pack, 2 * half)


def split_halves(joined: Array) -> tuple[Array, Array]:
    """[block_q, H] as two halves [block_q, 1, H/2]."""
    first, second = jnp.split(joined, 2, axis=-1)
    return first[:, None, :], second[:, None, :]


def per_head(index: Array, pack: int) -> Array:
    """A value for each query as one for each query and head, as they are packed."""
    return jnp.broadcast_to(index[:, None], (*index.shape, pack)).reshape(-1)


# --- what Triton is told -----------------------------------------------------------------------


class Slots(NamedTuple):
    """Where the keys and values that a program reads lie.

    Attributes:
        row: row of the cache; with pages, the layer's first page in the pool.
        pages: page tables of the batch [B, pages_per_row], or None.
        batch: row of the page tables.
        page: tokens of a page.
    """

    row: Array
    pages: Any = None
    batch: Array | int = 0
    page: int = 0

    @classmethod
    def of_row(
        cls, layer: Array, batch: Array, rows_of_layer: int, pages: Any = None, page: int = 0
    ) -> "Slots":
        """A row's keys, in a cache or pool of so many rows or pages a layer."""
        if pages is None:
            return cls(layer * rows_of_layer + batch)
        return cls(layer * rows_of_layer, pages, batch, page)

    def of(self, at: Array, block: int, limit: Array | int | None) -> tuple[Any, Any]:
        """Row and slot of `block` keys from index `at` on; with a limit, some may lie beyond it."""
        if self.pages is None:
            return self.row, pl.ds(at, block)
        j = at + jnp.arange(block, dtype=jnp.int32)
        mask = {} if limit is None else {"mask": j < limit, "other": 0}
        number = plgpu.load(self.pages.at[self.batch, lax.div(j, jnp.int32(self.page))], **mask)
        return self.row + number, lax.rem(j, jnp.int32(self.page))


def load_keys(
    ref: Any, slots: Slots, at: Array, block: int, kv_head: Array, edge: bool, limit: Array | int
) -> Array:
    """`block` keys or values of a head from index `at`; at an edge, zeros from `limit` on."""
    rows, where = slots.of(at, block, limit if edge else None)
    if slots.pages is None:
        keys = ref.at[rows, where, kv_head, :]
    else:  # each key by its number, and so all indices are numbers
        column = jnp.arange(ref.shape[-1], dtype=jnp.int32)
        keys = ref.at[rows[:, None], where[:, None], kv_head, column[None, :]]
    if not edge:
        return plgpu.load(keys)
    j = at + jnp.arange(block, dtype=jnp.int32)
    return plgpu.load(keys, mask=(j < limit)[:, None], other=ref.dtype.type(0))


def scaled(
    x: Array, ref: Any, slots: Slots, at: Array, kv_head: Array, edge: bool, limit: Array | int
) -> Array:
    """x [rows, block] times the scales of the same keys or values; x where there are none."""
    if ref is None:
        return x
    rows, where = slots.of(at, x.shape[1], limit if edge else None)
    j = at + jnp.arange(x.shape[1], dtype=jnp.int32)
    mask = {"mask": j < limit, "other": 0.0} if edge else {}
    return x * plgpu.load(ref.at[rows, kv_head, where], **mask)[None, :]


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Products summed in float32; float32 inputs (the interpreter's) unrounded."""
    precision = "highest" if a.dtype == jnp.float32 else None
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def exp2(x: Array) -> Array:
    """2^x. One instruction on the GPU, where libdevice's keeps denormal results with three more."""
    if INTERPRET:
        return jnp.exp2(x)
    (result,) = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return result
