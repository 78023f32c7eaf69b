"""The scores for `rows` on Hopper GPUs: a Pallas Mosaic GPU kernel that stores no logits.

A CTA processes four *units* of 64 rows each (a tile's sampled queries of all heads of a kv head)
and a span of key blocks. Four warpgroups compute one unit each, and a fifth feeds them keys, so
each block of keys is read once for all. For each row and block the kernel writes one number, the
log-sum-exp of the logits, from which XLA computes probabilities.

Chunks begin at multiples of 128 here, so a block is in one phase of a tile, and only a tile's own
block has keys that are masked for some of its rows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from dca_jax.attention.blocks import BLOCK
from dca_jax.attention.mosaic_gpu.queries import pad_tokens
from dca_jax.attention.softmax import LOG2E
from dca_jax.attention.sparse.piece import Piece
from dca_jax.attention.stored import dequantized_layer
from dca_jax.dca import DCAConfig, Phase, phases_within

UNIT = 64  # rows of one WGMMA
WARPGROUPS = 4  # computing warpgroups, with one unit each; one more feeds them
SPAN = 64  # blocks of keys per CTA
STAGES = 3  # blocks of keys in flight: 96 KiB, besides 64 for queries and 64 for results
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
Rotated = Mapping[Phase, Float[Array, "B tiles R N H"]]


def block_scores(
    rotated: Rotated, piece: Piece, dca: DCAConfig, of_maximum: float
) -> Float[Array, "B K tiles blocks"]:
    """As `dca_jax.attention.sparse.masses.block_scores`, for evenly spaced rows of every tile."""
    batch, tiles, count, heads, _ = next(iter(rotated.values())).shape
    kv_heads, blocks = piece.key.shape[3], piece.num_blocks
    group = heads // kv_heads
    rows = count * group
    parts = -(-rows // UNIT)
    key, layer = piece.key, piece.layer
    if piece.scales is not None:
        key, _ = dequantized_layer(key, key, piece.scales, layer, piece.query.dtype)
        layer = jnp.int32(0)
    if key.shape[2] % 8:
        key, layer = key[layer][None], jnp.int32(0)
    phases = phases_within(key.shape[2], dca)
    key = pad_tokens(key.reshape(-1, *key.shape[2:]), 1)
    units = -(-tiles * parts // WARPGROUPS) * WARPGROUPS
    queries = [_units(rotated[phase], kv_heads, parts, units) for phase in phases]
    place = jnp.stack(
        [layer * batch + jnp.arange(batch, dtype=jnp.int32), piece.rows.offset // BLOCK], axis=1
    )
    # The end of each row's keys in its own block.
    stop = np.full((parts * UNIT,), BLOCK, np.int32)
    stop[:rows] = np.repeat((np.arange(count) + 1) * (BLOCK // count), group)
    masses = _log2_masses(
        jnp.stack(queries).astype(piece.query.dtype),
        key,
        place,
        jnp.asarray(stop.reshape(parts, UNIT)),
        problem=_Problem(parts, blocks, dca.chunk_len // BLOCK, phases),
    )
    masses = masses[:, :, : tiles * parts, :blocks]
    masses = masses.reshape(batch, kv_heads, tiles, parts, blocks, UNIT)
    met = jnp.arange(blocks, dtype=jnp.int32)[None, None, :] <= piece.tile[:, :, None]
    masses = jnp.where(met[:, None, :, None, :, None], masses, -jnp.inf)
    largest = masses.max(axis=4, keepdims=True)
    p = jnp.exp2(masses - largest)
    p = p / p.sum(axis=4, keepdims=True)
    is_row = jnp.arange(parts * UNIT, dtype=jnp.int32).reshape(1, 1, 1, parts, 1, UNIT) < rows
    p = jnp.where(is_row, p, 0)
    return p.sum(axis=(3, 5)) / rows + of_maximum * p.max(axis=(3, 5))


def _units(
    query: Float[Array, "B tiles R N H"], kv_heads: int, parts: int, units: int
) -> Float[Array, "B K units 64 H"]:
    """The rows of each tile and kv head in units of 64, padded with zeros."""
    batch, tiles, count, heads, head_dim = query.shape
    query = query * jnp.asarray(LOG2E, query.dtype)
    query = query.reshape(batch, tiles, count, kv_heads, heads // kv_heads, head_dim)
    query = query.transpose(0, 3, 1, 2, 4, 5).reshape(batch, kv_heads, tiles, -1, head_dim)
    missing = parts * UNIT - query.shape[3]
    query = jnp.pad(query, ((0, 0), (0, 0), (0, 0), (0, missing), (0, 0)))
    query = query.reshape(batch, kv_heads, tiles * parts, UNIT, head_dim)
    return jnp.pad(query, ((0, 0), (0, 0), (0, units - tiles * parts), (0, 0), (0, 0)))


# --- the kernel --------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """The static parameters of a call."""

    parts: int  # units per tile
    blocks: int  # blocks of keys in a row of the cache
    per_chunk: int  # blocks per chunk
    phases: tuple[Phase, ...]


class _Refs(NamedTuple):
    """The kernel's arguments and result, in global memory."""

    query: Any  # [phases, B, K, units, 64, H]
    key: Any  # [L * B, S, K, H]
    place: Any  # [B, 2]: row of the cache, the first tile's number
    stop: Any  # [parts, 64]
    masses: Any  # [B, K, units, blocks, 64]


class _Shared(NamedTuple):
    """Shared memory: tiles, then barriers."""

    query: Any  # [WARPGROUPS, 64, H]
    key: Any  # [STAGES, 128, H]
    masses: Any  # [WARPGROUPS, SPAN, 64]
    query_loaded: Any
    key_loaded: Any
    key_consumed: Any


class _CTA(NamedTuple):
    """A CTA's work: some units of a row and kv head, and blocks first .. last - 1."""

    problem: _Problem
    gmem: _Refs
    smem: _Shared
    batch: Array
    head: Array
    unit: Array  # the first unit
    first: Array
    last: Array

    def tile(self, unit: Array) -> Array:
        """The tile number of a unit."""
        return self.gmem.place[self.batch, 1] + lax.div(unit, jnp.int32(self.problem.parts))


def _log2_masses(
    query: Float[Array, "P B K units 64 H"],
    key: Float[Array, "LB S K H"],
    place: Int[Array, "B 2"],
    stop: Int[Array, "parts 64"],
    *,
    problem: _Problem,
) -> Float[Array, "B K units padded 64"]:
    """Each row's log-sum-exp over each block of keys, in log2 units.

    Values for blocks after a unit's tile are arbitrary.
    """
    _, batch, kv_heads, units, _, head_dim = query.shape
    spans = -(-problem.blocks // SPAN)
    shared = _Shared(
        query=plgpu.SMEM((WARPGROUPS, UNIT, head_dim), query.dtype),
        key=plgpu.SMEM((STAGES, BLOCK, head_dim), key.dtype),
        masses=plgpu.SMEM((WARPGROUPS, SPAN, UNIT), jnp.float32),
        query_loaded=plgpu.Barrier(num_barriers=WARPGROUPS),
        key_loaded=plgpu.Barrier(num_barriers=STAGES),
        key_consumed=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
    )

    def kernel(*refs: Any) -> None:
        gmem = _Refs(*refs)
        batch, unit = lax.axis_index("batch"), lax.axis_index("units") * WARPGROUPS
        first = lax.axis_index("span") * SPAN

        def body(smem: _Shared) -> None:
            cta = _CTA(problem, gmem, smem, batch, lax.axis_index("head"), unit, first, first)
            end = jnp.minimum(cta.tile(unit + (WARPGROUPS - 1)) + 1, problem.blocks)
            last = jnp.maximum(jnp.minimum(first + SPAN, end), first)
            cta = cta._replace(last=last)
            warpgroup = lax.axis_index("warpgroup")
            pl.when(warpgroup < WARPGROUPS)(lambda: _compute(cta, warpgroup))
            pl.when(warpgroup == WARPGROUPS)(lambda: _feed(cta))

        pl.run_scoped(body, shared, collective_axes="warpgroup")

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, kv_heads, units, spans * SPAN, UNIT), jnp.float32),
        grid=(units // WARPGROUPS, kv_heads, spans, batch),
        grid_names=("units", "head", "span", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="dca_block_masses",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,  # maxima and sums are computed within a warp
        ),
    )(query, key, place, stop)


def _feed(cta: _CTA) -> None:
    """Keeps blocks of keys in flight."""
    plgpu.set_max_registers(24, action="decrease")
    gmem, smem = cta.gmem, cta.smem
    cache_row = gmem.place[cta.batch, 0]

    def load(n: Array, _: Any) -> None:
        done = n - cta.first
        slot = lax.rem(done, jnp.int32(STAGES))
        pl.when(done >= STAGES)(lambda: plgpu.barrier_wait(smem.key_consumed.at[slot]))
        keys = gmem.key.at[cache_row, pl.ds(n * BLOCK, BLOCK), cta.head]
        plgpu.copy_gmem_to_smem(keys, smem.key.at[slot], smem.key_loaded.at[slot])

    lax.fori_loop(cta.first, cta.last, load, None)


def _compute(cta: _CTA, warpgroup: Array) -> None:
    """One unit against the span: phase by phase, then its tile's own block."""
    plgpu.set_max_registers(112, action="increase")
    problem, gmem, smem = cta.problem, cta.gmem, cta.smem
    unit = cta.unit + warpgroup
    tile = cta.tile(unit)
    per_chunk = jnp.int32(problem.per_chunk)
    chunk = lax.div(tile, per_chunk) * per_chunk  # its first block
    borders = {"inter": (0, chunk - per_chunk), "succ": (chunk - per_chunk, chunk)}
    borders["intra"] = (chunk, tile + 1)
    own_last = jnp.maximum(jnp.minimum(cta.last, tile + 1), cta.first)
    for number, phase in enumerate(problem.phases):
        low, high = borders[phase]
        begin, end = jnp.maximum(cta.first, low), jnp.minimum(own_last, high)

        def of_phase(number: int = number, begin: Array = begin, end: Array = end) -> None:
            source = gmem.query.at[number, cta.batch, cta.head, unit]
            loaded = smem.query_loaded.at[warpgroup]
            plgpu.copy_gmem_to_smem(source, smem.query.at[warpgroup], loaded)
            plgpu.barrier_wait(loaded)
            full_end = jnp.minimum(end, tile)
            lax.fori_loop(begin, full_end, lambda n, _: _block(cta, warpgroup, n, None), None)
            part = lax.rem(unit, jnp.int32(problem.parts))
            pl.when(end > tile)(lambda: _block(cta, warpgroup, tile, gmem.stop.at[part]))

        pl.when(end > begin)(of_phase)

    def pass_by(n: Array, _: Any) -> None:  # needed by a later unit only
        slot = lax.rem(n - cta.first, jnp.int32(STAGES))
        plgpu.barrier_wait(smem.key_loaded.at[slot])
        plgpu.barrier_arrive(smem.key_consumed.at[slot])

    lax.fori_loop(own_last, cta.last, pass_by, None)
    plgpu.commit_smem()

    @pl.when(own_last > cta.first)
    def _write() -> None:
        target = gmem.masses.at[cta.batch, cta.head, unit, pl.ds(cta.first, SPAN)]
        plgpu.copy_smem_to_gmem(smem.masses.at[warpgroup], target)
        plgpu.wait_smem_to_gmem(0)


def _block(cta: _CTA, warpgroup: Array, n: Array, stop: Any) -> None:
    """Stores the log-sum-exp of a unit's logits over block n, or its keys before `stop`, if set."""
    smem = cta.smem
    slot = lax.rem(n - cta.first, jnp.int32(STAGES))
    plgpu.barrier_wait(smem.key_loaded.at[slot])

    def logits_of(acc: Any) -> Array:
        plgpu.wgmma(acc, smem.query.at[warpgroup], smem.key.at[slot].transpose((1, 0)))
        return acc[...]

    shape = (UNIT, BLOCK)
    logits = pl.run_scoped(logits_of, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    plgpu.barrier_arrive(smem.key_consumed.at[slot])
    if stop is not None:
        limit = plgpu.load(stop, layout=PER_ROW, optimized=False)
        j = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        logits = jnp.where(j < lax.broadcast_in_dim(limit, shape, [0]), logits, -jnp.inf)
    largest = logits.max(axis=1)
    total = jnp.exp2(logits - lax.broadcast_in_dim(largest, shape, [0])).sum(axis=1)
    smem.masses[warpgroup, n - cta.first] = largest + jnp.log(total) * jnp.float32(LOG2E)
