"""DCA's forward pass on Hopper: one flash-attention kernel for any of the three phases together.

A block of threads takes 128 queries of one head: two warpgroups compute, 64 queries each, and a
third feeds them keys and values through the bulk copy engine. The query is rotated once for each
phase, in the kernel, and all its rotations stay in shared memory where they fit; so walking from
one phase's keys to the next costs nothing, and DCA does the work of plain causal attention.

Two query heads of one kv head form a cluster, which reads every block of keys once for both.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_gpu.ranges import (
    Keys,
    Walk,
    full_and_edge_walks,
    locate,
    ranges_of_rows,
    recall,
    remember,
    steps,
)
from dca_jax.attention.mosaic_gpu.vote import any_in_warp
from dca_jax.dca import DCAConfig, Phase, query_position
from dca_jax.errors import InputError
from dca_jax.rope import rotate

ROWS = 64  # queries a warpgroup: the rows of one WGMMA
WARPGROUPS = 2  # that compute
BLOCK_Q = ROWS * WARPGROUPS
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
LOG2E = math.log2(math.e)
NEVER = -1e30  # below every logit, and finite: so no inf - inf arises
# A row's maximum may lag behind by this much, in log2 units, before the accumulator is rescaled:
# weights stay below 2^8, which float16 holds and float32 sums exactly enough.
SLACK = 8.0


@dataclass(frozen=True)
class ForwardTiles:
    """Block sizes of the forward kernel.

    Attributes:
        block_k: keys a step; a multiple of 64.
        stages: blocks of keys and values in flight.
        resident: the query is rotated in the kernel, once for each phase, and all of it stays in
            shared memory; else it is rotated outside, and each phase's is fetched when needed.
        registers: columns of the query that are multiplied from registers where no mask is needed,
            a multiple of 64; the rest, and all where there is a mask, from shared memory.
        cluster: query heads of one kv head that share what they read (1 or 2).
    """

    block_k: int
    stages: int
    resident: bool
    registers: int
    cluster: int

    def shared_bytes(self, head_dim: int, phases: int) -> int:
        """Shared memory a block of threads needs, in bytes."""
        queries = (phases if self.resident else 1) * BLOCK_Q * head_dim * 2
        keys_values = 2 * self.stages * self.block_k * head_dim * 2
        return queries + keys_values + RESERVED


RESERVED = 3 * 1024  # for the log-sum-exp, the walks and the barriers: each begins a KiB

# By head_dim, the fastest of a few tried by hand on an H200; 256: the first that fits.
TILES = {
    64: ForwardTiles(block_k=256, stages=2, resident=True, registers=0, cluster=2),
    128: ForwardTiles(block_k=128, stages=2, resident=True, registers=128, cluster=2),
    256: ForwardTiles(block_k=64, stages=2, resident=False, registers=0, cluster=2),
}


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    with_lse: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """Output and natural log-sum-exp over the keys of `phases`; as `op.Backend.forward`."""
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[2:4]
    num_tiles = -(-num_queries // BLOCK_Q)
    tiles = TILES[head_dim]
    if tiles.registers % 64 or tiles.registers > head_dim:
        raise InputError(f"{tiles} must hold a multiple of 64 of the {head_dim} columns")
    cluster = tiles.cluster if (heads // kv_heads) % tiles.cluster == 0 else 1
    if key.shape[2] % 8:  # to be padded: then at least of one layer only
        key, value, layer = key[layer][None], value[layer][None], jnp.int32(0)
    key, value = (pad_tokens(x.reshape(-1, *x.shape[2:]), 1) for x in (key, value))
    if tiles.resident:
        tables = rotation_tables(rows, dca, num_tiles * BLOCK_Q)
    else:
        tables, query = (), jnp.stack(rotated_queries(query, rows, dca, phases))
    query = pad_tokens(query, query.ndim - 3)
    cache_row = layer * batch + jnp.arange(batch, dtype=jnp.int32)
    place = jnp.stack([cache_row, rows.offset, rows.lengths, rows.key_offset], axis=1)
    out = jax.ShapeDtypeStruct(query.shape[-4:], query.dtype)
    # Whole tiles: a copy out of one row of an array is not cut off at the row's end.
    lse = jax.ShapeDtypeStruct((batch, heads, num_tiles * BLOCK_Q), jnp.float32)
    out, *lse = plgpu.kernel(
        functools.partial(
            _kernel, num_keys=num_keys, dca=dca, phases=phases, tiles=tiles, cluster=cluster
        ),
        out_type=(out, lse) if with_lse else (out,),
        grid=(heads // cluster, num_tiles, batch),
        grid_names=("heads", "tile", "batch"),
        cluster=(cluster,),
        cluster_names=("pair",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        kernel_name="dca_forward",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,  # rows are reduced within a warp
        ),
    )(query, key, value, place, *tables)
    return out[:, :num_queries], lse[0][:, :, :num_queries] if with_lse else None


def pad_tokens(x: Array, axis: int) -> Array:
    """`x` with `axis` padded to a multiple of 8: the copy engine takes rows of tokens by eights."""
    missing = -x.shape[axis] % 8
    if missing == 0:
        return x
    return jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)])


def rotated_queries(
    query: Float[Array, "B T N H"], rows: Rows, dca: DCAConfig, phases: tuple[Phase, ...]
) -> list[Float[Array, "B T N H"]]:
    """The query as each phase sees it, times the logit scale in log2 units; rounded once."""
    index = rows.offset[:, None] + jnp.arange(query.shape[1], dtype=jnp.int32)[None, :]
    scale = (rows.scale * jnp.float32(LOG2E))[:, None, None, None]
    wide = query.astype(jnp.float32)
    seen = [rotate(wide, query_position(index, phase, dca), rows.inv_freq) for phase in phases]
    return [(x * scale).astype(query.dtype) for x in seen]


def rotation_tables(
    rows: Rows, dca: DCAConfig, tokens: int
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"], Float[Array, "B 4 half"]]:
    """cos and sin of each query's intra position, and of the two rotations that are constant.

    The logit scale, in log2 units, is part of cos, sin and the first constant rotation, R(Q'), with
    Q' = min(2s - 1, Q): that of inter. The second, R(s), takes intra to succ; where the position
    would pass Q', succ is inter.
    """
    s, furthest = dca.chunk_len, dca.inter_position
    scale = rows.scale[:, None, None] * jnp.float32(LOG2E)
    index = rows.offset[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None, :]
    angle = (index % s).astype(jnp.float32)[:, :, None] * rows.inv_freq[:, None, :]
    far, step = (jnp.float32(p) * rows.inv_freq[:, None, :] for p in (furthest, s))
    shape = (rows.offset.shape[0], 1, rows.inv_freq.shape[1])
    fixed = [jnp.cos(far) * scale, jnp.sin(far) * scale, jnp.cos(step), jnp.sin(step)]
    fixed = jnp.concatenate([jnp.broadcast_to(x, shape) for x in fixed], axis=1)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale, fixed


def _kernel(
    q_gmem: Any,
    k_gmem: Any,
    v_gmem: Any,
    place_gmem: Any,
    *tables_and_outputs: Any,
    num_keys: int,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    tiles: ForwardTiles,
    cluster: int,
) -> None:
    tables = 3 if tiles.resident else 0
    tables_gmem, (out_gmem, *lse_gmem) = tables_and_outputs[:tables], tables_and_outputs[tables:]
    num_queries, heads, head_dim = q_gmem.shape[-3:]
    group = heads // k_gmem.shape[2]
    dtype, block_k, stages = q_gmem.dtype, tiles.block_k, tiles.stages
    rotations = len(phases) if tiles.resident else 1

    batch = lax.axis_index("batch")
    head = lax.axis_index("heads") * cluster + lax.axis_index("pair")
    # The longest rows of work first: what is left at the end is short.
    tile = pl.cdiv(num_queries, BLOCK_Q) - 1 - lax.axis_index("tile")

    def body(scratch: tuple, loaded: tuple, consumed: tuple, turn: Any) -> None:
        q_smem, k_smem, v_smem, lse_smem, walks_smem = scratch
        q_loaded, k_loaded, v_loaded, planned = loaded
        k_consumed, v_consumed = consumed
        wg = lax.axis_index("wg")

        def switch_turn() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(wg < WARPGROUPS)
        def _compute() -> None:
            plgpu.set_max_registers(232, action="increase")
            start = tile * BLOCK_Q + wg * ROWS
            queries = pl.ds(start, ROWS)

            def indices() -> Int[Array, " rows"]:
                return place_gmem[batch, 1] + start + _row_iota()

            if tiles.resident:
                raw = q_smem.at[wg, rotations - 1]
                plgpu.copy_gmem_to_smem(q_gmem.at[batch, queries, head], raw, q_loaded.at[wg])
                *per_query, fixed = tables_gmem
                per_query = [table.at[batch, queries] for table in per_query]
                tables = _load_tables(phases, per_query, fixed.at[batch])
                plgpu.barrier_wait(q_loaded.at[wg])
                q = plgpu.load(raw, layout=plgpu.Layout.WGMMA)
                rotated = _rotations(q, phases, tables, indices, dca)
                plgpu.commit_smem()  # every thread has read the raw query
                for number, q in enumerate(rotated):
                    q_smem[wg, number] = q.astype(dtype)
                plgpu.commit_smem()

            plgpu.barrier_wait(planned)
            full, edges = recall(walks_smem)
            num_full, num_steps = steps(full), steps(full + edges)

            @pl.when(num_steps > 0)
            def _wait_for_first() -> None:
                plgpu.barrier_wait(k_loaded.at[0])

            pl.when(wg == 1)(switch_turn)

            def step(
                n: Array,
                carry: tuple,
                *,
                parts: list[tuple[Any, Any]],
                mask: Callable[[Array], Array] | None,
            ) -> tuple:
                acc, peak, total = carry
                slot = lax.rem(n, jnp.int32(stages))

                def logits_of(acc_ref: Any) -> Array:
                    for columns, q in parts:
                        keys = k_smem.at[slot, :, columns].transpose((1, 0))
                        plgpu.wgmma(acc_ref, q, keys)
                    switch_turn()
                    return acc_ref[...]

                logits = pl.run_scoped(
                    logits_of, plgpu.WGMMAAccumulatorRef((ROWS, block_k), jnp.float32)
                )
                plgpu.barrier_arrive(k_consumed.at[slot])
                if mask is not None:
                    logits = mask(logits)
                new_peak = jnp.maximum(peak, logits.max(axis=1))

                def rescale(acc: Array, peak: Array, total: Array) -> tuple:
                    decay = jnp.exp2(peak - new_peak)
                    acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
                    return acc, new_peak, total * decay

                acc, peak, total = lax.cond(
                    any_in_warp(new_peak - peak, SLACK),
                    rescale,
                    lambda *state: state,
                    acc,
                    peak,
                    total,
                )
                weights = jnp.exp2(logits - _along_keys(peak, block_k))
                narrow = weights.astype(dtype)
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_loaded.at[slot])
                plgpu.barrier_wait(turn)  # the tensor cores are ours

                def weighted_values(acc_ref: Any) -> tuple:
                    acc_ref[...] = acc
                    plgpu.wgmma(acc_ref, narrow, v_smem.at[slot])

                    @pl.when(n + 1 < num_steps)
                    def _wait_for_next() -> None:
                        plgpu.barrier_wait(k_loaded.at[lax.rem(n + 1, jnp.int32(stages))])

                    new_total = total + weights.sum(axis=1)  # while the product runs
                    return acc_ref[...], new_total

                acc, total = pl.run_scoped(
                    weighted_values, plgpu.WGMMAAccumulatorRef((ROWS, head_dim), jnp.float32)
                )
                plgpu.barrier_arrive(v_consumed.at[slot])
                return acc, peak, total

            carry = (
                _splat((ROWS, head_dim), 0.0, plgpu.Layout.WGMMA),
                _splat((ROWS,), NEVER, PER_ROW),
                _splat((ROWS,), 0.0, PER_ROW),
            )

            def fetch(phase: int | Array) -> None:
                """Where only one rotation of the query fits: brings this phase's."""
                rotated = q_gmem.at[phase, batch, queries, head]
                plgpu.copy_gmem_to_smem(rotated, q_smem.at[wg, 0], q_loaded.at[wg])
                plgpu.barrier_wait(q_loaded.at[wg])

            done = jnp.int32(0)
            for walk in full:
                q = q_smem.at[wg, walk.phase if tiles.resident else 0]
                if not tiles.resident:
                    pl.when(walk.count > 0)(functools.partial(fetch, walk.phase))
                unmasked = functools.partial(step, parts=_parts(q, tiles.registers), mask=None)
                carry = lax.fori_loop(done, done + walk.count, unmasked, carry)
                done = done + walk.count

            _, edges = recall(walks_smem)

            def edge(n: Array, carry: tuple) -> tuple:
                phase, block = locate(n, edges, num_full)
                if not tiles.resident:
                    fetch(phase)

                def mask(logits: Array) -> Array:
                    length, keys = place_gmem[batch, 2], Keys(place_gmem[batch, 3], num_keys)
                    lower, upper = ranges_of_rows(indices(), length, phase, phases, dca, keys)
                    j = block * block_k + _iota((ROWS, block_k), 1)
                    met = (j >= _along_keys(lower, block_k)) & (j < _along_keys(upper, block_k))
                    return jnp.where(met, logits, -jnp.inf)

                q = q_smem.at[wg, phase if tiles.resident else 0]
                return step(n, carry, parts=_parts(q, 0), mask=mask)

            acc, peak, total = lax.fori_loop(num_full, num_steps, edge, carry)
            pl.when(wg == 0)(switch_turn)

            is_text = (indices() < place_gmem[batch, 2]) & (total > 0)
            inverse = jnp.where(is_text, 1 / jnp.where(total > 0, total, 1.0), 0.0)
            out = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
            q_smem[wg, 0] = out.astype(dtype)
            if lse_gmem:
                log2_total = jnp.log(jnp.where(total > 0, total, 1.0)) * LOG2E
                lse_smem[wg] = jnp.where(is_text, (peak + log2_total) / LOG2E, -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[wg, 0], out_gmem.at[batch, queries, head])
            if lse_gmem:
                plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_gmem[0].at[batch, head, queries])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WARPGROUPS)
        def _feed() -> None:
            plgpu.set_max_registers(40, action="decrease")
            kv_head = lax.div(head, jnp.int32(group))
            axes = "pair" if cluster > 1 else None
            kv_batch, offset, length, key_offset = (place_gmem[batch, n] for n in range(4))
            first = offset + tile * BLOCK_Q
            last = jnp.minimum(jnp.minimum(first + BLOCK_Q, length), offset + num_queries) - 1
            keys = Keys(key_offset, num_keys)
            full, edges = full_and_edge_walks(first, last, phases, dca, keys, block_k)
            # Here, so that those who compute rotate meanwhile, and have the registers for it.
            remember(full, edges, walks_smem)
            plgpu.barrier_arrive(planned)
            num_full, num_steps = steps(full), steps(full + edges)

            def feed(n: Array, _: Any, *, walks: list[Walk], done: Array) -> None:
                slot = lax.rem(n, jnp.int32(stages))
                _, block = locate(n, walks, done)
                keys = (kv_batch, pl.ds(block * block_k, block_k), kv_head)
                for gmem, smem, filled, emptied in (
                    (k_gmem, k_smem, k_loaded, k_consumed),
                    (v_gmem, v_smem, v_loaded, v_consumed),
                ):
                    pl.when(n >= stages)(functools.partial(plgpu.barrier_wait, emptied.at[slot]))
                    plgpu.copy_gmem_to_smem(
                        gmem.at[keys], smem.at[slot], filled.at[slot], collective_axes=axes
                    )

            feed_full = functools.partial(feed, walks=full, done=jnp.int32(0))
            feed_edges = functools.partial(feed, walks=edges, done=num_full)
            lax.fori_loop(0, num_full, feed_full, None)
            lax.fori_loop(num_full, num_steps, feed_edges, None)
            if cluster > 1:
                # The other block of the cluster still signals here: stay until it is done.
                for slot in range(stages):

                    @pl.when(slot < num_steps)
                    def _drain() -> None:
                        plgpu.barrier_wait(k_consumed.at[slot])  # noqa: B023
                        plgpu.barrier_wait(v_consumed.at[slot])  # noqa: B023

    def consumed() -> Any:
        if cluster == 1:
            return plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
        return plgpu.ClusterBarrier(
            collective_axes=("pair",), num_arrivals=WARPGROUPS, num_barriers=stages
        )

    pl.run_scoped(
        body,
        (
            plgpu.SMEM((WARPGROUPS, rotations, ROWS, head_dim), dtype),
            plgpu.SMEM((stages, block_k, head_dim), dtype),
            plgpu.SMEM((stages, block_k, head_dim), dtype),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.SMEM((3 * len(phases), 2), jnp.int32),
        ),
        (
            plgpu.Barrier(num_barriers=WARPGROUPS),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(),
        ),
        (consumed(), consumed()),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
        collective_axes="wg",
    )


def _load_tables(
    phases: tuple[Phase, ...], intra: list[Any], fixed: Any
) -> tuple[list[Array], list[Array]]:
    """(cos and sin of intra positions, the constant rotations) that `phases` need, in registers."""

    def constant(number: int) -> Array:
        layout = plgpu.Layout.WGMMA.reduce(0)
        return plgpu.load(fixed.at[number], layout=layout, optimized=False)

    per_query, constants = [], []
    if "intra" in phases or "succ" in phases:
        per_query = [plgpu.load(x, layout=plgpu.Layout.WGMMA, optimized=False) for x in intra]
    if "inter" in phases or "succ" in phases:
        constants = [constant(number) for number in range(4 if "succ" in phases else 2)]
    return per_query, constants


def _rotations(
    q: Float[Array, "rows H"],
    phases: tuple[Phase, ...],
    tables: tuple[list[Array], list[Array]],
    indices: Callable[[], Int[Array, " rows"]],
    dca: DCAConfig,
) -> list[Float[Array, "rows H"]]:
    """The query as each phase sees it, float32, scaled: logits come out in log2 units."""
    half = q.shape[1] // 2
    q = q.astype(jnp.float32)
    halves = q[:, :half], q[:, half:]
    per_query, constants = tables
    constants = [lax.broadcast_in_dim(x, (ROWS, half), [1]) for x in constants]

    def turned(halves: tuple[Array, Array], cos: Array, sin: Array) -> tuple[Array, Array]:
        first, second = halves
        return first * cos - second * sin, second * cos + first * sin

    seen = {}
    if "inter" in phases or "succ" in phases:
        seen["inter"] = turned(halves, *constants[:2])
    if "intra" in phases or "succ" in phases:
        seen["intra"] = turned(halves, *per_query)
    if "succ" in phases:
        s, furthest = dca.chunk_len, dca.inter_position
        near = turned(seen["intra"], *constants[2:])
        is_far = lax.rem(indices(), jnp.int32(s)) + s >= furthest
        is_far = lax.broadcast_in_dim(is_far.astype(jnp.float32), (ROWS, half), [0])
        seen["succ"] = tuple(a + (b - a) * is_far for a, b in zip(near, seen["inter"], strict=True))
    return [jnp.concatenate(seen[phase], axis=1) for phase in phases]


def _parts(q_smem: Any, registers: int) -> list[tuple[Any, Any]]:
    """Columns of the query and where they are multiplied from: registers, then shared memory."""
    columns = q_smem.shape[1]
    held, rest = pl.ds(0, registers), pl.ds(registers, columns - registers)
    parts = []
    if held.size:
        parts.append((held, plgpu.load(q_smem.at[:, held], layout=plgpu.Layout.WGMMA)))
    if rest.size:
        parts.append((rest, q_smem.at[:, rest]))
    return parts


def _iota(shape: tuple[int, ...], axis: int) -> Int[Array, "..."]:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _row_iota() -> Int[Array, " rows"]:
    return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW)


def _along_keys(x: Array, block_k: int) -> Array:
    return lax.broadcast_in_dim(x, (ROWS, block_k), [0])


def _splat(shape: tuple[int, ...], value: float, layout: Any) -> Float[Array, "..."]:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
