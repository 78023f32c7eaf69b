"""Attention in Pallas-Mosaic, for TPUs from v4 on.

A tile of queries meets the key ranges of every phase one after another: the grid's last axis
counts the blocks of these ranges, and small tables in scalar memory, worked out beforehand, say
which phase and which block a step is. The index maps read them: so q's block is that of the
phase's own rotation, and a step beyond a tile's last names the block that is there already and
moves nothing. Blocks of keys that every query of the tile meets skip the mask.

Logits lie transposed, [keys, queries]: what belongs to a query (maximum, sum, range, log-sum-exp)
is then one row of lanes, which VMEM and HBM hold without padding.

Few queries (decoding) form one tile with all their heads, and meet the keys of all kv heads as a
cache holds them, head after head of each token: the weights of other heads' keys are masked. They
would else be padding of the tile, and the cache is read where it lies.

Backward: dq walks as the forward does; dk and dv walk, for a block of keys, the tiles of queries
that meet it, all query heads of the kv head in turn. Bitwise deterministic.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dca_jax.attention.device import current_device
from dca_jax.dca import DCAConfig, Phase, key_range, query_position
from dca_jax.rope import rotate

if TYPE_CHECKING:
    from dca_jax.attention.device import Device
    from dca_jax.attention.op import Rows

INTERPRET: Any = False  # tests set it to pltpu.InterpretParams: then the kernels run on any device
LOG2E = math.log2(math.e)
FAR = 2**30  # beyond every text; twice that would overflow int32
LOWEST = -1e30  # a running maximum to start from: finite, so that no inf - inf appears
LANES = 128
PACKED_ROWS = 256  # up to so many queries, counting all heads, are packed into one tile
ENTRY = 4  # numbers a table holds for one tile and phase: see `_table`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Queries and keys of a block, in each kernel."""

    forward: tuple[int, int]
    dq: tuple[int, int]
    dkv: tuple[int, int]
    decode_keys: int  # counting all heads


LARGE = Tiles(forward=(1024, 1024), dq=(512, 1024), dkv=(512, 1024), decode_keys=4096)
SMALL = Tiles(forward=(512, 512), dq=(512, 512), dkv=(512, 512), decode_keys=1024)

# VMEM of a core in MiB, by the name JAX gives the chip.
VMEM_MIB = {
    "TPU v4": 16,
    "TPU v5 lite": 128,
    "TPU v5e": 128,
    "TPU v5": 64,
    "TPU v5p": 64,
    "TPU v6 lite": 128,
    "TPU v6e": 128,
    "TPU7x": 64,
}
SMEM_BYTES = 512 * 1024  # of the core's 1 MiB, what the tables may take


def choose_tiles(device: "Device", head_dim: int) -> Tiles:
    """The tiles for a chip and a head_dim."""
    return SMALL if VMEM_MIB.get(device.kind, 128) < 32 or head_dim > 128 else LARGE


def vmem_bytes(tiles: Tiles, head_dim: int, itemsize: int) -> int:
    """VMEM that the largest of the kernels needs, from above: what each is allowed to take.

    Blocks lie twice, so that one is fetched while the other is used; a logit passes through at
    most six float32 (logit, mask, weight, its gradient, and copies in the inputs' dtype).
    """
    wide = max(head_dim, LANES)

    def kernel(shape: tuple[int, int], query_rows: int, key_rows: int, float32_rows: int) -> int:
        queries, keys = shape
        moved = 2 * wide * itemsize * (query_rows * queries + key_rows * keys)
        kept = 4 * wide * float32_rows + 2 * 4 * 32 * queries
        return moved + kept + 6 * 4 * queries * keys

    def forward(shape: tuple[int, int]) -> int:
        return kernel(shape, 2, 2, 2 * shape[0])

    return max(
        forward(tiles.forward),
        forward((PACKED_ROWS, tiles.decode_keys)),
        kernel(tiles.dq, 3, 2, (3 + 6 + 2) * tiles.dq[0]),
        kernel(tiles.dkv, 2, 4, 4 * tiles.dkv[1]),
    )


def unsupported(
    device: "Device", query: jax.ShapeDtypeStruct, key: jax.ShapeDtypeStruct, dca: DCAConfig
) -> str | None:
    """Why these kernels cannot run on these shapes and dtypes on this device; None: they can."""
    batch, num_queries, _, head_dim = query.shape
    num_keys, kv_heads = key.shape[2:4]
    if head_dim not in (64, 128, 256):
        return f"head_dim must be 64, 128 or 256, got {head_dim}"
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the dtype must be bfloat16 or float32, got {query.dtype}"
    if head_dim == 64 and kv_heads > 1 and kv_heads % 2:
        return (
            "with head_dim 64 two kv heads share the lanes of a block, so their number must be "
            f"even or one, got {kv_heads}"
        )
    if INTERPRET:
        return None
    if device.platform != "tpu" or device.kind not in VMEM_MIB:
        return (
            f"it needs a TPU (one of {', '.join(VMEM_MIB)}), got {device.kind} ({device.platform})"
        )
    tiles = choose_tiles(device, head_dim)
    need, have = vmem_bytes(tiles, head_dim, query.dtype.itemsize), VMEM_MIB[device.kind] * 2**20
    if need > have:
        return f"its tiles need {need} bytes of VMEM, and {device.kind} has {have}"
    rests = max(num_queries / min(tiles.forward[0], tiles.dq[0]), num_keys / tiles.dkv[1])
    table = 4 * 3 * ENTRY * batch * math.ceil(rests)
    if table > SMEM_BYTES:
        return f"its tables for this text need {table} bytes of scalar memory; use a smaller batch"
    return None


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: "Rows",
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Output and natural log-sum-exp over the keys of `phases`; `key` is rotated."""
    batch, num_queries, heads, head_dim = query.shape
    num_layers, _, num_keys, kv_heads, _ = key.shape
    tiles = choose_tiles(current_device(), head_dim)
    turned = _turned(query, rows, dca, phases)
    span = _spans(num_queries, num_keys, rows, dca, phases)
    packed = num_queries * heads <= PACKED_ROWS
    if packed:
        block_q, block_k = num_queries, max(tiles.decode_keys // kv_heads // 16, 1) * 16
        num_rows, num_heads, width, key_rows, heads_a_key = (
            heads * num_queries, 1, head_dim, kv_heads, 1
        )  # fmt: skip
        turned = jnp.stack([jnp.swapaxes(x, 1, 2) for x in turned])
        span = _pack_spans(span, heads, kv_heads)
        stacked = (num_layers * batch, num_keys * kv_heads, head_dim)
        key, value = key.reshape(stacked), value.reshape(stacked)
    else:
        block_q, block_k = tiles.forward
        pair = _pair(head_dim, kv_heads)
        num_rows, num_heads, width, key_rows = num_queries, heads, pair * head_dim, 1
        heads_a_key = pair * heads // kv_heads
        turned = jnp.stack([_widen(x, kv_heads) for x in turned])
        key, value = _lanes(key, layer), _lanes(value, layer)
        layer = jnp.int32(0)
    block_q, block_k = min(block_q, num_queries), min(block_k, num_keys)
    row_block, key_block = num_rows if packed else block_q, block_k * key_rows
    turned = turned.reshape(len(phases), batch, num_rows, num_heads * width)
    table = _key_table(num_queries, num_keys, rows, dca, phases, (block_q, block_k))
    walk = _Walk(
        phases=len(phases),
        tiles=pl.cdiv(num_queries, block_q),
        heads_a_key=heads_a_key,
        cache_rows=batch,
        steps=_most_steps(dca, phases, block_q, num_keys, block_k, dca.chunk_len % block_k == 0),
    )
    out, lse = pl.pallas_call(
        functools.partial(
            _forward_kernel,
            walk=walk,
            num_keys=num_keys * key_rows,
            key_heads=kv_heads if packed else None,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_heads, walk.tiles, walk.steps),
            in_specs=[
                pl.BlockSpec((None, None, row_block, width), walk.turned),
                pl.BlockSpec((None, key_block, width), walk.keys),
                pl.BlockSpec((None, key_block, width), walk.keys),
                pl.BlockSpec((None, None, span.shape[2], row_block), walk.span),
            ],
            out_specs=[
                pl.BlockSpec((None, row_block, width), walk.rows),
                pl.BlockSpec((None, None, 1, row_block), walk.row_scalars),
            ],
            scratch_shapes=[
                pltpu.VMEM((1, row_block), jnp.float32),
                pltpu.VMEM((1, row_block), jnp.float32),
                pltpu.VMEM((width, row_block), jnp.float32),
            ],
        ),
        out_shape=(
            jax.ShapeDtypeStruct((batch, num_rows, num_heads * width), query.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, 1, num_rows), jnp.float32),
        ),
        compiler_params=_compiler_params(tiles, query, 3),
        interpret=INTERPRET,
        name="dca_tpu_decode" if packed else "dca_tpu_forward",
    )(layer.astype(jnp.int32).reshape(1), table, turned, key, value, span)
    lse = lse.reshape(batch, heads, num_queries)
    if packed:
        return jnp.swapaxes(out.reshape(batch, heads, num_queries, head_dim), 1, 2), lse
    return _narrow(out.reshape(batch, num_queries, heads, width), kv_heads, head_dim), lse


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: "Rows",
    out_bar: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of query, key (rotated) and value, from the global `lse` and `delta`."""
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[2:4]
    pair = _pair(head_dim, kv_heads)
    width, kv_blocks = pair * head_dim, kv_heads // pair
    tiles = choose_tiles(current_device(), head_dim)
    turned = jnp.stack([_widen(x, kv_heads) for x in _turned(query, rows, dca, phases)])
    turned = turned.reshape(len(phases), batch, num_queries, heads * width)
    out_bar = _widen(out_bar.astype(query.dtype), kv_heads).reshape(turned.shape[1:])
    # In units of log2, and where a query met no key so large that its weights vanish.
    lse = jnp.where(jnp.isfinite(lse), lse * LOG2E, -LOWEST)[:, :, None, :]
    span = _spans(num_queries, num_keys, rows, dca, phases)
    keys, values = _lanes(key, layer), _lanes(value, layer)
    inputs = (turned, keys, values, span, out_bar, lse, delta[:, :, None, :])
    shape = _Shape(num_queries, num_keys, heads, kv_blocks, width)
    params = functools.partial(_compiler_params, tiles, query)
    layer = jnp.zeros(1, jnp.int32)
    query_bar = _dq(layer, rows, inputs, shape, head_dim, tiles.dq, params(3), dca, phases)
    key_bar, value_bar = _dkv(layer, rows, inputs, shape, tiles.dkv, params(3, 2), dca, phases)
    query_bar = query_bar.reshape(batch, num_queries, heads, width)
    return (
        _narrow(query_bar, kv_heads, head_dim),
        key_bar.reshape(key.shape[1:]),
        value_bar.reshape(value.shape[1:]),
    )


# --- the grid's walk ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Walk:
    """Index maps over the grid (batch, query head, tile of queries, step)."""

    phases: int
    tiles: int
    heads_a_key: int
    cache_rows: int  # of one layer
    steps: int

    def at(self, b: Array, i: Array, k: Array, table: Any) -> tuple[Array, Array]:
        return _locate(table, b * self.tiles + i, k, self.phases)

    def turned(self, b: Array, h: Array, i: Array, k: Array, layer: Any, table: Any) -> tuple:
        return self.at(b, i, k, table)[0], b, i, h

    def span(self, b: Array, h: Array, i: Array, k: Array, layer: Any, table: Any) -> tuple:
        return self.at(b, i, k, table)[0], b, 0, i

    def keys(self, b: Array, h: Array, i: Array, k: Array, layer: Any, table: Any) -> tuple:
        kv_head = lax.div(h, jnp.int32(self.heads_a_key))
        return layer[0] * self.cache_rows + b, self.at(b, i, k, table)[1], kv_head

    def rows(self, b: Array, h: Array, i: Array, k: Array, layer: Any, table: Any) -> tuple:
        return b, i, h

    def row_scalars(self, b: Array, h: Array, i: Array, k: Array, layer: Any, table: Any) -> tuple:
        return b, h, 0, i

    def turns(self, b: Array, h: Array, i: Array, k: Array, layer: Any, table: Any) -> tuple:
        return 0, b, 0, i


@dataclasses.dataclass(frozen=True, kw_only=True)
class _KeyWalk:
    """Index maps over the grid (batch, kv head, block of keys, query head of it, step)."""

    phases: int
    tiles: int  # blocks of keys
    group: int
    cache_rows: int
    steps: int

    def at(self, b: Array, j: Array, k: Array, table: Any) -> tuple[Array, Array]:
        return _locate(table, b * self.tiles + j, k, self.phases)

    def turned(self, b: Array, n: Array, j: Array, g: Array, k: Array, _: Any, table: Any) -> tuple:
        phase, tile = self.at(b, j, k, table)
        return phase, b, tile, n * self.group + g

    def span(self, b: Array, n: Array, j: Array, g: Array, k: Array, _: Any, table: Any) -> tuple:
        phase, tile = self.at(b, j, k, table)
        return phase, b, 0, tile

    def keys(self, b: Array, n: Array, j: Array, g: Array, k: Array, layer: Any, _: Any) -> tuple:
        return layer[0] * self.cache_rows + b, j, n

    def rows(self, b: Array, n: Array, j: Array, g: Array, k: Array, _: Any, table: Any) -> tuple:
        return b, self.at(b, j, k, table)[1], n * self.group + g

    def row_scalars(
        self, b: Array, n: Array, j: Array, g: Array, k: Array, _: Any, table: Any
    ) -> tuple:
        return b, n * self.group + g, 0, self.at(b, j, k, table)[1]

    def key_bars(self, b: Array, n: Array, j: Array, g: Array, k: Array, *_: Any) -> tuple:
        return b, j, n


def _locate(table: Any, tile: Array, step: Array, phases: int) -> tuple[Array, Array]:
    """Phase number and block of a step; a step beyond the tile's last is the last again."""
    base = tile * (ENTRY * phases)
    last = table[base + ENTRY * (phases - 1)] - 1
    step = jnp.clip(step, 0, jnp.maximum(last, 0))
    phase = jnp.int32(0)
    for number in range(1, phases):
        phase = jnp.where(step >= table[base + ENTRY * (number - 1)], jnp.int32(number), phase)
    return phase, step + table[base + ENTRY * phase + 1]


def _visit(table: Any, tile: Array, step: Array, phases: int) -> tuple[Array, Array, Array, Array]:
    """`_locate`'s phase and block, whether to visit it at all, and whether without a mask."""
    phase, block = _locate(table, tile, step, phases)
    base = tile * (ENTRY * phases)
    live = step < table[base + ENTRY * (phases - 1)]
    entry = base + ENTRY * phase
    return phase, block, live, (table[entry + 2] <= block) & (block < table[entry + 3])


def _table(bounds: tuple[Array, Array, Array, Array], block: int, num_blocks: int) -> Array:
    """Tables of all tiles, int32, flat: scalar memory pads the last of several dimensions.

    From bounds [B, tiles, P], each phase's (lo, full_lo, full_hi, hi): [lo, hi) is met by some of
    the tile, [full_lo, full_hi) by all. Of each tile and phase, in this order: the step at which
    the phase ends, what makes a step a block, and the blocks from and before which none needs a
    mask.
    """
    lo, full_lo, full_hi, hi = bounds
    first = jnp.clip(lo // block, 0, num_blocks - 1)
    count = jnp.where(hi > lo, (hi + (block - 1)) // block - first, 0)
    end = jnp.cumsum(count, axis=-1, dtype=jnp.int32)
    entry = (end, first - (end - count), (full_lo + (block - 1)) // block, full_hi // block)
    return jnp.stack(entry, axis=-1).astype(jnp.int32).reshape(-1)


def _key_table(
    num_queries: int,
    num_keys: int,
    rows: "Rows",
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    blocks: tuple[int, int],
) -> Array:
    """Which blocks of keys each tile of queries meets.

    Key ranges only move forward, so a tile's first and last query tell them all.
    """
    block_q, block_k = blocks
    first = jnp.arange(pl.cdiv(num_queries, block_q), dtype=jnp.int32)[None, :] * block_q
    offset, lengths = rows.offset[:, None], rows.lengths[:, None]
    stop = jnp.minimum(offset + jnp.minimum(first + block_q, num_queries), lengths)
    first = offset + first
    some, whole = first < stop, first + block_q == stop
    bounds = []
    for phase in phases:
        lo, full_hi = key_range(first, phase, dca)
        full_lo, hi = key_range(stop - 1, phase, dca)
        hi, full_hi = (jnp.clip(x, 0, num_keys) for x in (hi, full_hi))
        bounds.append((lo, full_lo, jnp.where(whole, full_hi, 0), jnp.where(some, hi, lo)))
    lo, full_lo, full_hi, hi = (jnp.stack(x, axis=-1) for x in zip(*bounds, strict=True))
    return _table((lo, full_lo, full_hi, hi), block_k, pl.cdiv(num_keys, block_k))


def _query_table(
    num_queries: int,
    num_keys: int,
    rows: "Rows",
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    blocks: tuple[int, int],
) -> Array:
    """Which tiles of queries each block of keys meets."""
    block_q, block_k = blocks
    first = jnp.arange(pl.cdiv(num_keys, block_k), dtype=jnp.int32)[None, :] * block_k
    last = jnp.minimum(first + block_k, num_keys) - 1
    offset = rows.offset[:, None]
    limit = jnp.clip(rows.lengths[:, None] - offset, 0, num_queries)
    bounds = []
    for phase in phases:
        lo, full_hi = (jnp.clip(i - offset, 0, limit) for i in _query_range(first, phase, dca))
        full_lo, hi = (jnp.clip(i - offset, 0, limit) for i in _query_range(last, phase, dca))
        bounds.append((lo, full_lo, full_hi, hi))
    lo, full_lo, full_hi, hi = (jnp.stack(x, axis=-1) for x in zip(*bounds, strict=True))
    return _table((lo, full_lo, full_hi, hi), block_q, pl.cdiv(num_queries, block_q))


def _query_range(j: Array, phase: Phase, dca: DCAConfig) -> tuple[Array, Array]:
    """[start, stop) of the queries that meet key j in a phase, as text indices.

    The inverse of `key_range`; clipped to FAR, so that no chunk length overflows int32.
    """
    chunk = j - j % dca.chunk_len
    one, two = min(dca.chunk_len, FAR), min(2 * dca.chunk_len, FAR)
    if phase == "intra":
        return j, chunk + one
    if phase == "succ":
        return chunk + one, chunk + two
    return chunk + two, jnp.full_like(j, FAR)


def _most_steps(
    dca: DCAConfig, phases: tuple[Phase, ...], resting: int, num: int, block: int, aligned: bool
) -> int:
    """Most blocks of `num` that a tile of `resting` queries (or keys) can meet, over all phases.

    Where the tile lies across chunks, its ranges overlap by as much as these chunks lie apart;
    ranges that do not start where a block does (not `aligned`) may cut one block more.
    """
    apart = pl.cdiv(resting - 1, dca.chunk_len) * dca.chunk_len
    longest = {"inter": num, "succ": dca.chunk_len + apart, "intra": dca.chunk_len + resting}
    loose = 0 if aligned else 1
    each = (min(pl.cdiv(longest[p], block) + loose, pl.cdiv(num, block)) for p in phases)
    together = pl.cdiv(num + 2 * apart, block) + 2 * loose * len(phases)
    return max(min(sum(each), together), 1)


# --- forward -----------------------------------------------------------------------------------


def _forward_kernel(
    layer_ref: Any,  # [1]
    table_ref: Any,
    query_ref: Any,  # [q, H], turned and scaled, as the step's phase has it
    key_ref: Any,  # [k, H]
    value_ref: Any,
    span_ref: Any,  # [2, q]: the keys each query meets in the phase; packed, its kv head too
    out_ref: Any,  # [q, H]
    lse_ref: Any,  # [1, q]
    peak_ref: Any,  # [1, q], running maximum
    total_ref: Any,  # [1, q], running sum
    acc_ref: Any,  # [H, q], running output
    *,
    walk: _Walk,
    num_keys: int,
    key_heads: int | None,
) -> None:
    """Grid: (batch, query head, tile of queries, step).

    With `key_heads`, queries and keys of all heads are packed, and `num_keys` counts them so.
    """
    del layer_ref
    step = pl.program_id(3)
    tile = pl.program_id(0) * walk.tiles + pl.program_id(2)
    _, block, live, full = _visit(table_ref, tile, step, walk.phases)
    at = block * key_ref.shape[0]

    @pl.when(step == 0)
    def start() -> None:
        peak_ref[...] = jnp.full(peak_ref.shape, LOWEST, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def meet(masked: bool) -> None:
        logits = _dot(key_ref[...], query_ref[...], 1, 1)
        value = value_ref[...]
        if masked:
            met = _met(span_ref, at, logits.shape)
            if key_heads is not None:
                head = lax.rem(lax.broadcasted_iota(jnp.int32, logits.shape, 0), key_heads)
                met &= head == span_ref[pl.ds(2, 1), :]
            logits = jnp.where(met, logits, -jnp.inf)
            value = _within(value, at, num_keys)
        peak = peak_ref[...]
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=0, keepdims=True))
        decay = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(logits - new_peak)
        peak_ref[...] = new_peak
        total_ref[...] = total_ref[...] * decay + jnp.sum(weights, axis=0, keepdims=True)
        acc_ref[...] = acc_ref[...] * decay + _dot(value, weights.astype(value.dtype), 0, 0)

    if key_heads is None:
        pl.when(live & full)(functools.partial(meet, False))
        pl.when(live & ~full)(functools.partial(meet, True))
    else:
        pl.when(live)(functools.partial(meet, True))

    @pl.when(step == walk.steps - 1)
    def finish() -> None:
        total = total_ref[...]
        met_any = total > 0
        total = jnp.where(met_any, total, 1.0)
        out_ref[...] = (acc_ref[...] / total).T.astype(out_ref.dtype)
        lse = peak_ref[...] / LOG2E + jnp.log(total)
        lse_ref[...] = jnp.where(met_any, lse, -jnp.inf)


# --- backward ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Shape:
    num_queries: int
    num_keys: int
    heads: int
    kv_blocks: int  # kv heads, or pairs of them
    width: int  # lanes of one


def _dq(
    layer: Array,
    rows: "Rows",
    inputs: tuple[Array, ...],
    shape: _Shape,
    head_dim: int,
    blocks: tuple[int, int],
    params: pltpu.CompilerParams,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> Array:
    """Gradient of the raw query [B, T, N * width]."""
    batch = rows.offset.shape[0]
    block_q, block_k = min(blocks[0], shape.num_queries), min(blocks[1], shape.num_keys)
    table = _key_table(shape.num_queries, shape.num_keys, rows, dca, phases, (block_q, block_k))
    aligned = dca.chunk_len % block_k == 0
    walk = _Walk(
        phases=len(phases),
        tiles=pl.cdiv(shape.num_queries, block_q),
        heads_a_key=shape.heads // shape.kv_blocks,
        cache_rows=batch,
        steps=_most_steps(dca, phases, block_q, shape.num_keys, block_k, aligned),
    )
    turns = (len(phases), None, head_dim // 2, block_q)
    return pl.pallas_call(
        functools.partial(_dq_kernel, walk=walk, num_keys=shape.num_keys),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, shape.heads, walk.tiles, walk.steps),
            in_specs=[
                pl.BlockSpec((None, None, block_q, shape.width), walk.turned),
                pl.BlockSpec((None, block_k, shape.width), walk.keys),
                pl.BlockSpec((None, block_k, shape.width), walk.keys),
                pl.BlockSpec((None, None, 2, block_q), walk.span),
                pl.BlockSpec((None, block_q, shape.width), walk.rows),
                pl.BlockSpec((None, None, 1, block_q), walk.row_scalars),
                pl.BlockSpec((None, None, 1, block_q), walk.row_scalars),
                pl.BlockSpec(turns, walk.turns),
                pl.BlockSpec(turns, walk.turns),
            ],
            out_specs=pl.BlockSpec((None, block_q, shape.width), walk.rows),
            scratch_shapes=[pltpu.VMEM((len(phases), shape.width, block_q), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(inputs[0].shape[1:], inputs[0].dtype),
        compiler_params=params,
        interpret=INTERPRET,
        name="dca_tpu_dq",
    )(layer, table, *inputs, *_turns(shape.num_queries, rows, dca, phases))


def _dq_kernel(
    layer_ref: Any,  # [1]
    table_ref: Any,
    query_ref: Any,  # [q, H]
    key_ref: Any,  # [k, H]
    value_ref: Any,
    span_ref: Any,  # [2, q]
    out_bar_ref: Any,  # [q, H]
    lse_ref: Any,  # [1, q], in units of log2
    delta_ref: Any,  # [1, q]
    cos_ref: Any,  # [P, head_dim / 2, q], times the logit scale
    sin_ref: Any,
    query_bar_ref: Any,  # [q, H]
    acc_ref: Any,  # [P, H, q], each phase in the frame of its own rotation
    *,
    walk: _Walk,
    num_keys: int,
) -> None:
    """Grid: (batch, query head, tile of queries, step)."""
    del layer_ref
    step = pl.program_id(3)
    tile = pl.program_id(0) * walk.tiles + pl.program_id(2)
    phase, block, live, full = _visit(table_ref, tile, step, walk.phases)
    at = block * key_ref.shape[0]

    @pl.when(step == 0)
    def start() -> None:
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def meet(masked: bool) -> None:
        key = key_ref[...]
        weights = jnp.exp2(_dot(key, query_ref[...], 1, 1) - lse_ref[...])
        weights_bar = _dot(value_ref[...], out_bar_ref[...], 1, 1)
        logits_bar = weights * (weights_bar - delta_ref[...])
        if masked:
            logits_bar = jnp.where(_met(span_ref, at, logits_bar.shape), logits_bar, 0.0)
            key = _within(key, at, num_keys)
        acc_ref[phase] += _dot(key, logits_bar.astype(key.dtype), 0, 0)

    pl.when(live & full)(functools.partial(meet, False))
    pl.when(live & ~full)(functools.partial(meet, True))

    @pl.when(step == walk.steps - 1)
    def finish() -> None:
        half = cos_ref.shape[1]
        for head in range(0, acc_ref.shape[1], 2 * half):  # of a pair, one is nobody's
            first, second = 0.0, 0.0
            for p in range(walk.phases):
                cos, sin = cos_ref[p], sin_ref[p]
                one, two = acc_ref[p, pl.ds(head, half)], acc_ref[p, pl.ds(head + half, half)]
                first += one * cos + two * sin
                second += two * cos - one * sin
            acc_ref[0, pl.ds(head, half)] = first
            acc_ref[0, pl.ds(head + half, half)] = second
        query_bar_ref[...] = acc_ref[0].T.astype(query_bar_ref.dtype)


def _dkv(
    layer: Array,
    rows: "Rows",
    inputs: tuple[Array, ...],
    shape: _Shape,
    blocks: tuple[int, int],
    params: pltpu.CompilerParams,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> tuple[Array, Array]:
    """Gradients of key and value [B, S, K * head_dim]."""
    batch = rows.offset.shape[0]
    block_q, block_k = min(blocks[0], shape.num_queries), min(blocks[1], shape.num_keys)
    table = _query_table(shape.num_queries, shape.num_keys, rows, dca, phases, (block_q, block_k))
    walk = _KeyWalk(
        phases=len(phases),
        tiles=pl.cdiv(shape.num_keys, block_k),
        group=shape.heads // shape.kv_blocks,
        cache_rows=batch,
        steps=_most_steps(dca, phases, block_k, shape.num_queries, block_q, False),
    )
    bar = jax.ShapeDtypeStruct(
        (batch, shape.num_keys, shape.kv_blocks * shape.width), inputs[1].dtype
    )
    return pl.pallas_call(
        functools.partial(_dkv_kernel, walk=walk, num_queries=shape.num_queries),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, shape.kv_blocks, walk.tiles, walk.group, walk.steps),
            in_specs=[
                pl.BlockSpec((None, None, block_q, shape.width), walk.turned),
                pl.BlockSpec((None, block_k, shape.width), walk.keys),
                pl.BlockSpec((None, block_k, shape.width), walk.keys),
                pl.BlockSpec((None, None, 2, block_q), walk.span),
                pl.BlockSpec((None, block_q, shape.width), walk.rows),
                pl.BlockSpec((None, None, 1, block_q), walk.row_scalars),
                pl.BlockSpec((None, None, 1, block_q), walk.row_scalars),
            ],
            out_specs=[pl.BlockSpec((None, block_k, shape.width), walk.key_bars)] * 2,
            scratch_shapes=[pltpu.VMEM((block_k, shape.width), jnp.float32)] * 2,
        ),
        out_shape=(bar, bar),
        compiler_params=params,
        interpret=INTERPRET,
        name="dca_tpu_dkv",
    )(layer, table, *inputs)


def _dkv_kernel(
    layer_ref: Any,  # [1]
    table_ref: Any,
    query_ref: Any,  # [q, H]
    key_ref: Any,  # [k, H]
    value_ref: Any,
    span_ref: Any,  # [2, q]
    out_bar_ref: Any,  # [q, H]
    lse_ref: Any,  # [1, q], in units of log2
    delta_ref: Any,  # [1, q]
    key_bar_ref: Any,  # [k, H]
    value_bar_ref: Any,
    key_acc_ref: Any,  # [k, H] float32
    value_acc_ref: Any,
    *,
    walk: _KeyWalk,
    num_queries: int,
) -> None:
    """Grid: (batch, kv head, block of keys, query head of it, step)."""
    del layer_ref
    head, step = pl.program_id(3), pl.program_id(4)
    tile = pl.program_id(0) * walk.tiles + pl.program_id(2)
    _, block, live, full = _visit(table_ref, tile, step, walk.phases)
    at = pl.program_id(2) * key_ref.shape[0]

    @pl.when((head == 0) & (step == 0))
    def start() -> None:
        key_acc_ref[...] = jnp.zeros(key_acc_ref.shape, jnp.float32)
        value_acc_ref[...] = jnp.zeros(value_acc_ref.shape, jnp.float32)

    def meet(masked: bool) -> None:
        query, out_bar = query_ref[...], out_bar_ref[...]
        if masked:
            query = _within(query, block * query.shape[0], num_queries)
            out_bar = _within(out_bar, block * query.shape[0], num_queries)
        weights = jnp.exp2(_dot(key_ref[...], query, 1, 1) - lse_ref[...])
        weights_bar = _dot(value_ref[...], out_bar, 1, 1)
        logits_bar = weights * (weights_bar - delta_ref[...])
        if masked:
            met = _met(span_ref, at, weights.shape)
            inside = _within_lanes(met, block * query.shape[0], num_queries)
            weights = jnp.where(inside, weights, 0.0)
            logits_bar = jnp.where(inside, logits_bar, 0.0)
        value_acc_ref[...] += _dot(weights.astype(out_bar.dtype), out_bar, 1, 0)
        key_acc_ref[...] += _dot(logits_bar.astype(query.dtype), query, 1, 0)

    pl.when(live & full)(functools.partial(meet, False))
    pl.when(live & ~full)(functools.partial(meet, True))

    @pl.when((head == walk.group - 1) & (step == walk.steps - 1))
    def finish() -> None:
        # The turned queries carry log2(e), and their factor is the logits' own derivative.
        key_bar_ref[...] = (key_acc_ref[...] / LOG2E).astype(key_bar_ref.dtype)
        value_bar_ref[...] = value_acc_ref[...].astype(value_bar_ref.dtype)


# --- in the kernels ----------------------------------------------------------------------------


def _met(span_ref: Any, at: Array, shape: tuple[int, ...]) -> Array:
    """Which keys, counted from `at`, each query meets [keys, queries]."""
    j = at + lax.broadcasted_iota(jnp.int32, shape, 0)
    return (span_ref[pl.ds(0, 1), :] <= j) & (j < span_ref[pl.ds(1, 1), :])


def _within(x: Array, at: Array, limit: int) -> Array:
    """Rows of a block that starts at `at`, zero from `limit` on: what lies there is no number."""
    if limit % x.shape[0] == 0:
        return x
    row = at + lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < limit, x, jnp.zeros_like(x))


def _within_lanes(met: Array, at: Array, limit: int) -> Array:
    """`met` without the queries from `limit` on, whose span lies beyond its array too."""
    if limit % met.shape[1] == 0:
        return met
    return met & (at + lax.broadcasted_iota(jnp.int32, met.shape, 1) < limit)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Products summed in float32; float32 inputs unrounded."""
    precision = "highest" if a.dtype == jnp.float32 else None
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


# --- what the kernels are given ----------------------------------------------------------------


def _compiler_params(
    tiles: Tiles, query: Array, parallel: int, in_order: int = 1
) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",) * parallel + ("arbitrary",) * in_order,
        vmem_limit_bytes=vmem_bytes(tiles, query.shape[-1], query.dtype.itemsize),
    )


def _lanes(cache: Array, layer: Array) -> Array:
    """A layer's keys or values [B, S, K*H], where a head is a block of lanes.

    On a TPU that is not how [S, K, H] lies in memory, so XLA copies it: one layer, not all.
    """
    _, batch, num_keys, kv_heads, head_dim = cache.shape
    return cache[layer].reshape(batch, num_keys, kv_heads * head_dim)


def _turned(query: Array, rows: "Rows", dca: DCAConfig, phases: tuple[Phase, ...]) -> list[Array]:
    """The queries [B, T, N, H] where each phase puts them, scaled for exp2; rounded once."""
    index = rows.offset[:, None] + jnp.arange(query.shape[1], dtype=jnp.int32)[None, :]
    wide = query.astype(jnp.float32) * (rows.scale * LOG2E)[:, None, None, None]
    return [
        rotate(wide, query_position(index, phase, dca), rows.inv_freq).astype(query.dtype)
        for phase in phases
    ]


def _turns(
    num_queries: int, rows: "Rows", dca: DCAConfig, phases: tuple[Phase, ...]
) -> tuple[Array, Array]:
    """cos and sin [P, B, H/2, T] of the phases' query positions, times the logit scale."""
    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    positions = jnp.stack([query_position(index, phase, dca) for phase in phases])
    angle = positions.astype(jnp.float32)[:, :, None, :] * rows.inv_freq[None, :, :, None]
    scale = rows.scale[None, :, None, None]
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def _spans(
    num_queries: int, num_keys: int, rows: "Rows", dca: DCAConfig, phases: tuple[Phase, ...]
) -> Array:
    """[start, stop) of the keys each query meets in each phase, int32 [P, B, 2, T]."""
    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    spans = []
    for phase in phases:
        start, stop = key_range(index, phase, dca)
        stop = jnp.where(index < rows.lengths[:, None], jnp.minimum(stop, num_keys), 0)
        spans.append(jnp.stack([start, stop], axis=1))
    return jnp.stack(spans)


def _pack_spans(span: Array, heads: int, kv_heads: int) -> Array:
    """Spans of all heads' queries, counting the keys of all heads, and kv heads [P, B, 3, N*T]."""
    phases, batch, _, num_queries = span.shape
    kv_head = jnp.repeat(jnp.arange(kv_heads, dtype=jnp.int32), heads // kv_heads * num_queries)
    kv_head = jnp.broadcast_to(kv_head, (phases, batch, 1, heads * num_queries))
    return jnp.concatenate([jnp.tile(span * kv_heads, (1, 1, 1, heads)), kv_head], axis=2)


def _pair(head_dim: int, kv_heads: int) -> int:
    """Kv heads a block of lanes holds: two of 64 fill it."""
    return 2 if head_dim < LANES and kv_heads > 1 else 1


def _widen(x: Array, kv_heads: int) -> Array:
    """[B, T, N, H] with zeros where the lanes belong to the other kv head of a pair.

    Products with a pair's keys and values are then those with the query's own kv head.
    """
    batch, length, heads, head_dim = x.shape
    if _pair(head_dim, kv_heads) == 1:
        return x
    x = x.reshape(batch, length, kv_heads // 2, 2, heads // kv_heads, head_dim)
    none = jnp.zeros_like(x[:, :, :, 0])
    first = jnp.concatenate([x[:, :, :, 0], none], axis=-1)
    second = jnp.concatenate([none, x[:, :, :, 1]], axis=-1)
    return jnp.stack([first, second], axis=3).reshape(batch, length, heads, 2 * head_dim)


def _narrow(x: Array, kv_heads: int, head_dim: int) -> Array:
    """[B, T, N, H]: of a pair's lanes, the head's own."""
    batch, length, heads, width = x.shape
    if width == head_dim:
        return x
    x = x.reshape(batch, length, kv_heads // 2, 2, heads // kv_heads, width)
    first, second = x[:, :, :, 0, :, :head_dim], x[:, :, :, 1, :, head_dim:]
    return jnp.stack([first, second], axis=3).reshape(batch, length, heads, head_dim)
