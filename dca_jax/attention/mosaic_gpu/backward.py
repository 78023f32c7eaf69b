"""DCA's backward pass on Hopper: one kernel, five matmuls a step, the same bits every time.

A block of threads owns a tile of keys and walks over the queries that meet it, phase by phase:

    S^T = K Q^T - lse      P^T = exp2(S^T)      dP^T = V dO^T - delta      dS^T = P^T * dP^T
    dV += P^T dO           dK += dS^T Q         dQ_phase[tile of queries] += dS K

dK and dV stay in registers; query heads of one kv head are walked one after another, so they add up
there. dQ is added up in global memory, in float32, by the copy engine: key tile after key tile, in
ascending order, each waiting for its turn, so the sums do not depend on who is faster. Every key
tile walks from the last query to the first: so a tile that starts later finds its turn come.
Key tiles are launched in ascending order too, and a GPU starts blocks in the order of their index:
whoever is waited for is running, or done.

A query is rotated differently in each phase, and so is its gradient: every phase has a dQ of its
own, and a last pass turns them back and sums them. Memory: for each phase the rotated query, and
dQ in float32.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_gpu.flash_forward import (
    LOG2E,
    NEVER,
    pad_tokens,
    rotated_queries,
)
from dca_jax.attention.mosaic_gpu.hopper import MULTIPROCESSORS
from dca_jax.attention.mosaic_gpu.ranges import Keys
from dca_jax.dca import DCAConfig, Phase, key_range, query_position
from dca_jax.errors import InputError
from dca_jax.rope import rotate

ROWS = 64  # of a WGMMA accumulator: keys a warpgroup multiplies at once
WARPGROUPS = 2  # that compute; one more moves data
REGISTERS = 240, 24  # of a thread that computes, and of one that moves data
FAR = 2**30  # beyond every key


@dataclass(frozen=True)
class BackwardTiles:
    """Block sizes of the backward kernel.

    Attributes:
        block_q: queries a step; a multiple of 64.
        block_kv: keys of a block of threads. With 128, each computing warpgroup has 64 of them.
            With 64, both have all of them, and share dK and dV by columns: for a head_dim whose
            64 rows of dK and dV do not fit into registers.
        stages: tiles of queries in shared memory; at least 2, for a step begins the next one's
            product before it lets its own queries go.
        out_stages: tiles of the output's gradient in shared memory.
    """

    block_q: int
    block_kv: int
    stages: int
    out_stages: int

    def shared_bytes(self, head_dim: int) -> int:
        """Shared memory a block of threads needs, in bytes."""
        keys = 2 * self.block_kv * head_dim * 2
        queries = self.block_q * ((self.stages + self.out_stages) * head_dim * 2 + self.stages * 8)
        scores = 2 * self.block_kv * self.block_q * 2
        return keys + queries + scores + WARPGROUPS * ROWS * 64 * 4 + RESERVED


RESERVED = 2048  # for the barriers, and lost to alignment

# By head_dim, measured on an H200.
TILES = {
    64: BackwardTiles(block_q=128, block_kv=128, stages=2, out_stages=2),
    128: BackwardTiles(block_q=64, block_kv=128, stages=2, out_stages=2),
    256: BackwardTiles(block_q=64, block_kv=64, stages=2, out_stages=1),
}


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    out_bar: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of query, key (rotated) and value; as `op.Backend.backward`."""
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[2:4]
    sizes = Sizes.of(TILES[head_dim], head_dim, heads // kv_heads)
    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    key, value = (pad_tokens(x.reshape(-1, *x.shape[2:]), 1) for x in (key, value))
    low, high = _key_ranges(index, rows, num_keys, sizes.block_q, dca, phases)
    spans, met = _spans(low, high, num_keys, sizes)
    padding = ((0, 0), (0, 0), (0, low.shape[2] - num_queries))
    # A query that meets no key has log-sum-exp -inf; its weights are exp2(NEVER) = 0.
    minus_lse = jnp.where(jnp.isfinite(lse), lse * jnp.float32(-LOG2E), NEVER)
    inputs = Inputs(
        queries=tuple(pad_tokens(x, 1) for x in rotated_queries(query, rows, dca, phases)),
        out_bar=pad_tokens(out_bar, 1),
        key=key,
        value=value,
        minus_lse=jnp.pad(minus_lse, padding, constant_values=NEVER),
        minus_delta=jnp.pad(-delta, padding),
        low=low,
        high=high,
        spans=spans,
        cache_rows=layer.astype(jnp.int32) * batch + jnp.arange(batch, dtype=jnp.int32),
    )
    # Turns are counted in one launch: under `jax.vmap`, one launch follows another.
    run = jax.custom_batching.sequential_vmap(functools.partial(_run, sizes=sizes))
    query_bars, key_bar, value_bar = run(inputs)

    query_bar = jnp.zeros(query.shape, jnp.float32)
    for number, phase in enumerate(phases):
        # Where a phase has no keys nothing was written, and anything may stand.
        is_met = jnp.repeat(met[:, number], sizes.block_q, axis=1)[:, :num_queries, None, None]
        turned = jnp.where(is_met, query_bars[number][:, :num_queries], jnp.float32(0))
        query_bar += rotate(turned, -query_position(index, phase, dca), rows.inv_freq)
    query_bar = (query_bar * rows.scale[:, None, None, None]).astype(query.dtype)
    return query_bar, key_bar[:, :num_keys], value_bar[:, :num_keys]


# --- which queries meet which keys -------------------------------------------------------------


def _key_ranges(
    index: Int[Array, "B T"],
    rows: Rows,
    num_keys: int,
    block_q: int,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> tuple[Int[Array, "B phases padded"], Int[Array, "B phases padded"]]:
    """[low, high) of the slots each query meets in each phase; padding has low FAR and high 0."""
    padding = ((0, 0), (0, 0), (0, -index.shape[1] % block_q))
    is_text = (index < rows.lengths[:, None])[:, None, :]
    keys = Keys(rows.key_offset[:, None], num_keys)
    ends = [map(keys.slot, key_range(index, phase, dca)) for phase in phases]
    low, high = (jnp.stack(end, axis=1) for end in zip(*ends, strict=True))
    low = jnp.pad(jnp.where(is_text, low, FAR), padding, constant_values=FAR)
    return low, jnp.pad(jnp.where(is_text, high, 0), padding)


def _spans(
    low: Int[Array, "B phases padded"],
    high: Int[Array, "B phases padded"],
    num_keys: int,
    sizes: "Sizes",
) -> tuple[Int[Array, "B key_tiles spans"], Bool[Array, "B phases query_tiles"]]:
    """Which tiles of queries a tile of keys meets, and which tiles of queries meet any.

    In a phase, those that a tile of keys meets follow one another; and so do those in the middle
    all of whose queries meet all of the keys, where nothing is masked. From the last to the first:

        stop .. full_stop         masked
        full_stop .. full_start   in full
        full_start .. start       masked

    Returns:
        For each phase six ends, descending: (start, turn, stop) of a masked span and the full one
        after it, twice, the second full one empty. And whether a tile's queries meet any key.
    """
    tiled = (*low.shape[:2], 1, -1, sizes.block_q)
    low, high = low.reshape(tiled), high.reshape(tiled)
    first_low, first_high = low[..., 0], high[..., 0]
    is_text, last_high = first_low < FAR, high.max(axis=-1)
    last_low = jnp.where(low < FAR, low, 0).max(axis=-1)
    num_tiles = -(-num_keys // sizes.block_kv)
    begin = jnp.arange(num_tiles, dtype=jnp.int32)[None, None, :, None] * sizes.block_kv
    end = jnp.minimum(begin + sizes.block_kv, num_keys)

    def count(holds: Array) -> Array:
        # Ranges of keys only move up from query to query. So what holds of the first tiles of
        # queries holds up to some tile, and its number is how often it holds.
        return jnp.sum(holds & is_text, axis=-1, dtype=jnp.int32)

    start = count(last_high <= begin)
    stop = jnp.maximum(start, count(first_low < end))
    # All of a whole tile of keys: what is read beyond the last key must be masked.
    full_start = jnp.clip(count(first_high < begin + sizes.block_kv), start, stop)
    full_stop = jnp.clip(count(last_low <= begin), full_start, stop)
    spans = jnp.stack([stop, full_stop, full_start, full_start, start, start], axis=-1)
    spans = jnp.swapaxes(spans, 1, 2).reshape(low.shape[0], num_tiles, -1)
    return spans, (is_text & (last_high > first_low))[:, :, 0]


# --- the kernel --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What of the work is known when the kernel is made."""

    head_dim: int
    group: int  # query heads of a kv head
    block_q: int
    block_kv: int
    stages: int
    out_stages: int
    by_keys: bool  # the warpgroups share the keys; else the columns of dK and dV
    columns: int  # of dK and dV that a warpgroup has
    parts: int  # pieces of 64 x 64 of a tile of dQ that a warpgroup computes

    @classmethod
    def of(cls, tiles: BackwardTiles, head_dim: int, group: int) -> "Sizes":
        """What follows from the tiles.

        Raises:
            InputError: the warpgroups cannot share them out, or would wait for one another forever.
        """
        by_keys = tiles.block_kv == WARPGROUPS * ROWS
        columns = head_dim if by_keys else head_dim // WARPGROUPS
        pieces = tiles.block_q // 64 * (head_dim // 64)
        if tiles.stages < 2:
            raise InputError(f"{tiles} must have two stages or more")
        if tiles.block_kv not in (ROWS, WARPGROUPS * ROWS) or columns % 64 or pieces % WARPGROUPS:
            raise InputError(f"{tiles} cannot be shared out for head_dim {head_dim}")
        return cls(
            head_dim=head_dim,
            group=group,
            block_q=tiles.block_q,
            block_kv=tiles.block_kv,
            stages=tiles.stages,
            out_stages=tiles.out_stages,
            by_keys=by_keys,
            columns=columns,
            parts=pieces // WARPGROUPS,
        )


class Inputs(NamedTuple):
    """Arrays the kernel reads, or their references."""

    queries: tuple[Any, ...]  # for each phase [B, T, N, H], rotated, T a multiple of 8
    out_bar: Any  # [B, T, N, H]
    key: Any  # [L * B, S, K, H]
    value: Any
    minus_lse: Any  # [B, N, padded], log2 units
    minus_delta: Any
    low: Any  # [B, phases, padded]
    high: Any
    spans: Any  # [B, key tiles, 6 * phases]
    cache_rows: Any  # [B]: which of the L * B rows


class Outputs(NamedTuple):
    """Arrays the kernel writes, or their references."""

    dqs: tuple[Any, ...]  # for each phase float32 [B, padded, N, H], before the logit scale
    dk: Any  # [B, S, K, H]
    dv: Any


class Shared(NamedTuple):
    """What lies in shared memory."""

    k: Any
    v: Any
    q: Any
    out_bar: Any
    minus_lse: Any
    minus_delta: Any
    ds: Any
    dq: Any


class Barriers(NamedTuple):
    """Filled or emptied: what lies in shared memory."""

    keys_full: Any
    q_full: Any
    q_free: Any
    out_bar_full: Any
    out_bar_free: Any
    ds_full: Any
    dq_full: Any
    dq_free: Any


@dataclass(frozen=True)
class Block:
    """A block of threads: what it works on, and where its data is."""

    sizes: Sizes
    inputs: Inputs
    outputs: Outputs
    shared: Shared
    barriers: Barriers
    turns: Any  # how many tiles of keys have added to dQ [phases, B, N, query tiles, warpgroups]
    batch: Array
    tile: Array
    kv_head: Array

    def span(self, n: int | Array) -> Array:
        """The n-th end of this tile's spans."""
        return self.inputs.spans[self.batch, self.tile, n]

    def descend(
        self, start: Array, stop: Array, step: Array, visit: "Callable[[Array, Array, Array], None]"
    ) -> Array:
        """visit(step, query tile, query head) for the tiles start - 1 .. stop; the next step."""
        group = jnp.int32(self.sizes.group)

        def one(n: Array, _: None) -> None:
            visit(step + n, start - 1 - lax.div(n, group), self.kv_head * group + lax.rem(n, group))

        steps = (start - stop) * group
        lax.fori_loop(0, steps, one, None)
        return step + steps

    def piece(self, warpgroup: Array, part: int) -> tuple[Array, Array]:
        """First row and column of a 64 x 64 piece that a warpgroup computes of a tile of dQ."""
        n, across = warpgroup * self.sizes.parts + part, jnp.int32(self.sizes.head_dim // 64)
        return lax.div(n, across) * 64, lax.rem(n, across) * 64


def _run(inputs: Inputs, sizes: Sizes) -> Outputs:
    """Launches the kernel."""
    batch, _, heads, head_dim = inputs.queries[0].shape
    kv_heads, num_tiles, padded = inputs.key.shape[2], inputs.spans.shape[1], inputs.low.shape[2]
    num_phases, dtype = len(inputs.queries), inputs.key.dtype
    turns = (num_phases, batch, heads, padded // sizes.block_q, WARPGROUPS)
    together = _heads_together(kv_heads, num_tiles)

    def body(
        inputs: Inputs, dqs: Any, dk: Any, dv: Any, shared: Shared, barriers: Barriers
    ) -> None:
        block = Block(
            sizes=sizes,
            inputs=inputs,
            outputs=Outputs(dqs, dk, dv),
            shared=shared,
            barriers=barriers,
            turns=pl.get_global(plgpu.SemaphoreType.REGULAR(turns)),
            batch=lax.axis_index("batch"),
            tile=lax.axis_index("tile"),
            kv_head=lax.axis_index("heads") * together + lax.axis_index("head"),
        )
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < WARPGROUPS)
        def _compute_gradients() -> None:
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            _compute(block, warpgroup)

        @pl.when(warpgroup == WARPGROUPS)
        def _move_data() -> None:
            plgpu.set_max_registers(REGISTERS[1], action="decrease")

            def one_warp(warp: Array) -> None:
                pl.when(warp == 0)(lambda: _load(block))
                pl.when((warp > 0) & (warp <= WARPGROUPS))(lambda: _add_up(block, warp - 1))

            plgpu.warp_map(one_warp)

    dq = jax.ShapeDtypeStruct((batch, padded, heads, head_dim), jnp.float32)
    dkv = jax.ShapeDtypeStruct((batch, *inputs.key.shape[1:]), dtype)
    return Outputs(
        *plgpu.kernel(
            body,
            out_type=((dq,) * num_phases, dkv, dkv),
            grid=(batch, kv_heads // together, num_tiles, together),
            grid_names=("batch", "heads", "tile", "head"),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            kernel_name="dca_backward",
            scratch_types=(_shared(sizes, dtype), _barriers(sizes)),
            compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        )(inputs)
    )


def _heads_together(kv_heads: int, num_tiles: int) -> int:
    """kv heads whose tiles of keys are launched in turn, the longest first.

    With one, the queries and sums being read stay in the L2 cache. But the last head's long tiles
    should start while there is other work left: two tiles a multiprocessor are enough.
    """
    wanted = min(kv_heads, round(2 * MULTIPROCESSORS / num_tiles))
    return next(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n >= wanted)


def _shared(sizes: Sizes, dtype: Any) -> Shared:
    keys, queries = (sizes.block_kv, sizes.head_dim), (sizes.block_q, sizes.head_dim)
    # dS of this step and of the last, by both warpgroups; or dS of each, for itself.
    scores = (2, sizes.block_kv, sizes.block_q)
    return Shared(
        k=plgpu.SMEM(keys, dtype),
        v=plgpu.SMEM(keys, dtype),
        q=plgpu.SMEM((sizes.stages, *queries), dtype),
        out_bar=plgpu.SMEM((sizes.out_stages, *queries), dtype),
        minus_lse=plgpu.SMEM((sizes.stages, sizes.block_q), jnp.float32),
        minus_delta=plgpu.SMEM((sizes.stages, sizes.block_q), jnp.float32),
        ds=plgpu.SMEM(scores, dtype),
        dq=plgpu.SMEM((WARPGROUPS, 64, 64), jnp.float32),
    )


def _barriers(sizes: Sizes) -> Barriers:
    return Barriers(
        keys_full=plgpu.Barrier(num_arrivals=2),  # K and V
        q_full=plgpu.Barrier(num_arrivals=3, num_barriers=sizes.stages),  # with lse and delta
        q_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=sizes.stages),
        out_bar_full=plgpu.Barrier(num_barriers=sizes.out_stages),
        out_bar_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=sizes.out_stages),
        ds_full=plgpu.Barrier(num_arrivals=WARPGROUPS),
        dq_full=plgpu.Barrier(num_barriers=WARPGROUPS),
        dq_free=plgpu.Barrier(num_barriers=WARPGROUPS),
    )


# --- the warps that move data ------------------------------------------------------------------


def _load(block: Block) -> None:
    """Brings the keys and values, then tile after tile of queries and their output's gradients."""
    sizes, inputs, shared, barriers = block.sizes, block.inputs, block.shared, block.barriers
    batch, step = block.batch, jnp.int32(0)
    keys = inputs.cache_rows[batch], pl.ds(block.tile * sizes.block_kv, sizes.block_kv)
    keys = *keys, block.kv_head
    plgpu.copy_gmem_to_smem(inputs.key.at[keys], shared.k, barriers.keys_full)
    plgpu.copy_gmem_to_smem(inputs.value.at[keys], shared.v, barriers.keys_full)

    def load_query(step: Array, query: Any, queries: Any, head: Array) -> None:
        slot = lax.rem(step, jnp.int32(sizes.stages))
        full = barriers.q_full.at[slot]
        pl.when(step >= sizes.stages)(lambda: plgpu.barrier_wait(barriers.q_free.at[slot]))
        plgpu.copy_gmem_to_smem(query.at[batch, queries, head], shared.q.at[slot], full)
        for gmem, smem in (
            (inputs.minus_lse, shared.minus_lse),
            (inputs.minus_delta, shared.minus_delta),
        ):
            plgpu.copy_gmem_to_smem(gmem.at[batch, head, queries], smem.at[slot], full)

    for number, query in enumerate(inputs.queries):

        def visit(step: Array, m: Array, head: Array, query: Any = query) -> None:
            queries = pl.ds(m * sizes.block_q, sizes.block_q)
            load_query(step, query, queries, head)
            slot = lax.rem(step, jnp.int32(sizes.out_stages))
            free = barriers.out_bar_free.at[slot]
            pl.when(step >= sizes.out_stages)(lambda: plgpu.barrier_wait(free))
            plgpu.copy_gmem_to_smem(
                inputs.out_bar.at[batch, queries, head],
                shared.out_bar.at[slot],
                barriers.out_bar_full.at[slot],
            )

        step = block.descend(block.span(6 * number), block.span(6 * number + 5), step, visit)
    # What computes is a step ahead: one more is begun, of no matter what, and comes to nothing.
    head = block.kv_head * sizes.group
    load_query(step, inputs.queries[0], pl.ds(0, sizes.block_q), head)


def _add_up(block: Block, warpgroup: Array) -> None:
    """Adds what a warpgroup computes of dQ to the sums, each when its turn has come."""
    sizes, barriers, step = block.sizes, block.barriers, jnp.int32(0)
    smem, full, free = (
        x.at[warpgroup] for x in (block.shared.dq, barriers.dq_full, barriers.dq_free)
    )
    for number, dq in enumerate(block.outputs.dqs):

        def visit(step: Array, m: Array, head: Array, number: int = number, dq: Any = dq) -> None:
            first_key = block.inputs.low[block.batch, number, m * sizes.block_q]
            turn = block.tile - lax.div(first_key, jnp.int32(sizes.block_kv))
            passed = block.turns.at[number, block.batch, head, m, warpgroup]
            plgpu.semaphore_wait(passed, turn, decrement=False, memory_scope="gpu")
            for part in range(sizes.parts):
                row, column = block.piece(warpgroup, part)
                queries, columns = pl.ds(m * sizes.block_q + row, 64), pl.ds(column, 64)
                target = dq.at[block.batch, queries, head, columns]
                plgpu.barrier_wait(full)
                # The first to come writes: so nobody has to clear the sums.
                write = functools.partial(plgpu.copy_smem_to_gmem, smem, target)
                pl.when(turn == 0)(write)
                pl.when(turn > 0)(functools.partial(write, reduction_op="add"))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(free)
            plgpu.wait_smem_to_gmem(0)
            plgpu.semaphore_signal(passed, 1, memory_scope="gpu")

        step = block.descend(block.span(6 * number), block.span(6 * number + 5), step, visit)


# --- the warpgroups that compute ---------------------------------------------------------------


class Accumulators(NamedTuple):
    """A warpgroup's WGMMA accumulators, float32."""

    s: Any  # [64, block_q]
    dp: Any  # [64, block_q]
    dq: Any  # [64, 64]
    dk: Any  # [64, columns]
    dv: Any  # [64, columns]


def _compute(block: Block, warpgroup: Array) -> None:
    """dK and dV of a warpgroup's keys or columns, and its pieces of every dQ."""
    sizes, shared = block.sizes, block.shared
    first = warpgroup * ROWS if sizes.by_keys else 0
    keys = pl.ds(first, ROWS)
    columns = (
        pl.ds(0, sizes.columns)
        if sizes.by_keys
        else pl.ds(warpgroup * sizes.columns, sizes.columns)
    )

    def walk(accumulators: Accumulators) -> None:
        begin = functools.partial(_begin, block, accumulators, keys)
        step_of = functools.partial(_step, block, accumulators, warpgroup, keys, columns)

        def pair(n: Array, step: Array) -> Array:
            phase = lax.div(n, jnp.int32(2))
            start, turn, stop = (block.span(3 * n + end) for end in range(3))

            def masked(step: Array, m: Array, head: Array) -> None:
                del head
                mask = functools.partial(_mask, block, phase, m, first)
                step_of(step, mask)

            def full(step: Array, m: Array, head: Array) -> None:
                del m, head
                step_of(step, None)

            return block.descend(turn, stop, block.descend(start, turn, step, masked), full)

        plgpu.barrier_wait(block.barriers.keys_full)
        begin(jnp.int32(0))
        plgpu.wgmma_wait(0)
        lax.fori_loop(0, 2 * len(block.inputs.queries), pair, jnp.int32(0))

    def zeros(*shape: int) -> Any:
        return plgpu.WGMMAAccumulatorRef.init(_zeros(*shape))

    done = pl.run_state(walk)(
        Accumulators(
            s=zeros(ROWS, sizes.block_q),
            dp=zeros(ROWS, sizes.block_q),
            dq=zeros(ROWS, 64),
            dk=zeros(ROWS, sizes.columns),
            dv=zeros(ROWS, sizes.columns),
        )
    )
    # The keys and values have been read for the last time: their gradients take their place.
    _meet(block.barriers.ds_full)
    # P is in units of log2, and with it dS.
    shared.k[keys, columns] = (done.dk * math.log(2)).astype(shared.k.dtype)
    shared.v[keys, columns] = done.dv.astype(shared.v.dtype)
    plgpu.commit_smem()
    _meet(block.barriers.ds_full)
    target = block.batch, pl.ds(block.tile * sizes.block_kv, sizes.block_kv), block.kv_head
    pl.when(warpgroup == 0)(lambda: plgpu.copy_smem_to_gmem(shared.k, block.outputs.dk.at[target]))
    pl.when(warpgroup == 1)(lambda: plgpu.copy_smem_to_gmem(shared.v, block.outputs.dv.at[target]))
    plgpu.wait_smem_to_gmem(0)


def _begin(block: Block, accumulators: Accumulators, keys: Any, step: Array) -> None:
    """Starts a step's S^T, from -lse on: P^T is exp2 of the sum."""
    slot = lax.rem(step, jnp.int32(block.sizes.stages))
    plgpu.barrier_wait(block.barriers.q_full.at[slot])
    accumulators.s[...] = _of_queries(block.shared.minus_lse.at[slot])
    queries = block.shared.q.at[slot].transpose((1, 0))
    plgpu.wgmma(accumulators.s, block.shared.k.at[keys], queries)


def _step(
    block: Block,
    accumulators: Accumulators,
    warpgroup: Array,
    keys: Any,
    columns: Any,
    step: Array,
    mask: "Callable[[Array], Array] | None",
) -> None:
    """One tile of queries of one head; S^T is there already, and so is the next one's at the end.

    Products run while the next ones' operands are made: `wgmma_wait(n)` and `wait_n` wait for all
    but the last n started.
    """
    sizes, shared, barriers = block.sizes, block.shared, block.barriers
    s, dp, dq, dk, dv = accumulators
    slot, out_slot = (lax.rem(step, jnp.int32(n)) for n in (sizes.stages, sizes.out_stages))
    q, out_bar = shared.q.at[slot], shared.out_bar.at[out_slot]

    dp[...] = _of_queries(shared.minus_delta.at[slot])
    plgpu.barrier_wait(barriers.out_bar_full.at[out_slot])
    plgpu.wgmma(dp, shared.v.at[keys], out_bar.transpose((1, 0)))
    logits = plgpu.wgmma_accumulator_load(s, wait_n=None)
    weights = jnp.exp2(logits if mask is None else mask(logits))
    plgpu.wgmma(dv, weights.astype(q.dtype), out_bar.at[:, columns])
    scores = (weights * plgpu.wgmma_accumulator_load(dp, wait_n=1)).astype(q.dtype)
    # Two buffers: a warpgroup that is ahead does not overwrite what the other still reads.
    ds = shared.ds.at[lax.rem(step, jnp.int32(2)) if sizes.by_keys else warpgroup]
    ds[keys, :] = scores
    plgpu.commit_smem()
    if sizes.by_keys:
        _meet(barriers.ds_full)

    for part in range(sizes.parts):
        row, column = block.piece(warpgroup, part)
        dq[...] = _zeros(64, 64)
        rows = ds.at[:, pl.ds(row, 64)].transpose((1, 0))
        plgpu.wgmma(dq, rows, shared.k.at[:, pl.ds(column, 64)])
        if part == 0:
            plgpu.wgmma_wait(1)
            plgpu.barrier_arrive(barriers.out_bar_free.at[out_slot])
            plgpu.wgmma(dk, scores, q.at[:, columns])
            _begin(block, accumulators, keys, step + 1)
        piece = plgpu.wgmma_accumulator_load(dq, wait_n=2 if part == 0 else 0)
        free = barriers.dq_free.at[warpgroup]
        pl.when(step + part > 0)(lambda free=free: plgpu.barrier_wait(free))
        shared.dq[warpgroup] = piece
        plgpu.commit_smem()
        plgpu.barrier_arrive(barriers.dq_full.at[warpgroup])
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(barriers.q_free.at[slot])


def _mask(
    block: Block, phase: Array, m: Array, first: Array | int, logits: Float[Array, "64 block_q"]
) -> Float[Array, "64 block_q"]:
    """-inf where a query of tile m does not meet a key in this phase."""
    queries = pl.ds(m * block.sizes.block_q, block.sizes.block_q)
    low, high = (
        lax.broadcast_in_dim(
            plgpu.load(
                ends.at[block.batch, phase, queries],
                layout=plgpu.Layout.WGMMA.reduce(0),
                optimized=False,
            ),
            logits.shape,
            [1],
        )
        for ends in (block.inputs.low, block.inputs.high)
    )
    j = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=plgpu.Layout.WGMMA)
    j = j + (block.tile * block.sizes.block_kv + first)
    return jnp.where((low <= j) & (j < high), logits, jnp.full_like(logits, -jnp.inf))


def _of_queries(smem: Any) -> Float[Array, "64 block_q"]:
    """A number a query, for every key."""
    x = plgpu.load(smem, layout=plgpu.Layout.WGMMA.reduce(0))
    return lax.broadcast_in_dim(x, (ROWS, x.shape[0]), [1])


def _zeros(*shape: int) -> Float[Array, "rows columns"]:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _meet(barrier: Any) -> None:
    """Waits until both computing warpgroups are here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
