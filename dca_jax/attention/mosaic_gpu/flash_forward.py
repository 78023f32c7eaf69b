"""The forward pass on Hopper: one flash-attention kernel for any of DCA's phases together.

A CTA processes 128 or 192 queries of one head: two or three warpgroups compute 64 queries each, and
another one feeds them keys and values through the bulk copy engine. The kernel rotates the query
once for each phase, and all rotations stay in shared memory if they fit. So going from one phase's
keys to the next costs nothing, and DCA does the same work as plain causal attention.

Two query heads of one kv head form a cluster, which reads every block of keys once for both.

It also computes one band of another method (`band_forward`), with rotated queries and keys.
"""

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from dca_jax.attention.backend import KeyBlocks, Rows
from dca_jax.attention.blocks import BLOCK
from dca_jax.attention.mosaic_gpu.forward_compute import compute, compute_tiles
from dca_jax.attention.mosaic_gpu.forward_cta import CTA, Problem, Refs, Shared
from dca_jax.attention.mosaic_gpu.forward_feed import feed, feed_tiles
from dca_jax.attention.mosaic_gpu.forward_schedule import Worker
from dca_jax.attention.mosaic_gpu.forward_tiles import (
    LIST_TILES,
    PAGE_TILES,
    PASS_TILES,
    TILES,
    ForwardTiles,
)
from dca_jax.attention.mosaic_gpu.queries import pad_tokens, rotated_queries, rotation_tables
from dca_jax.dca import PHASES, DCAConfig, Phase
from dca_jax.device import SHARED_BYTES, multiprocessors
from dca_jax.errors import InputError


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L R S K H"],
    value: Float[Array, "L R S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    with_lse: bool,
    blocks: KeyBlocks | None = None,
    pages: Int[Array, "B pages_per_row"] | None = None,
    tiles: ForwardTiles | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """Output and natural log-sum-exp over the keys of `phases`; as `Backend.forward`."""
    if blocks is not None:
        if blocks.skip is not None and LIST_TILES[query.shape[3]].block_k != BLOCK:
            raise InputError(
                f"skip-softmax on a Hopper GPU needs head_dim 64 or 128, got {query.shape[3]}; "
                "choose another --sparse"
            )
        options = {"dca": dca, "phases": phases, "with_lse": with_lse, "pages": pages}
        return _by_tiles_of_the_text(query, key, value, layer, rows, blocks, tiles, **options)
    tiles = tiles or _tiles_for(query.shape[3], phases, None if pages is None else key.shape[2])
    return _launch(query, key, value, layer, rows, dca, phases, with_lse, None, pages, tiles)


def _tiles_for(head_dim: int, phases: tuple[Phase, ...], page: int | None) -> ForwardTiles:
    """The tiles of the dense kernel; with pages, tiles whose blocks do not cross pages."""
    if page is None:
        return (TILES if len(phases) == len(PHASES) else PASS_TILES)[head_dim]
    tiles = PAGE_TILES[head_dim]
    return tiles if page % tiles.block_k == 0 else LIST_TILES[head_dim]


def _by_tiles_of_the_text(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L R S K H"],
    value: Float[Array, "L R S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    blocks: KeyBlocks,
    tiles: ForwardTiles | None,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    with_lse: bool,
    pages: Int[Array, "B pages_per_row"] | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """`forward` over lists; shifts queries so that tiles begin at multiples of 128 of the text."""
    num_queries, num_tiles = query.shape[1], blocks.counts.shape[2]
    shift = rows.offset % BLOCK
    moved = jnp.pad(query, ((0, 0), (BLOCK, num_tiles * BLOCK), (0, 0), (0, 0)))
    moved = _cut(moved, BLOCK - shift, num_tiles * BLOCK)
    lengths = jnp.minimum(rows.lengths, rows.offset + num_queries)
    at = rows._replace(offset=rows.offset - shift, lengths=lengths)
    tiles = tiles or LIST_TILES[query.shape[3]]
    out, lse = _launch(moved, key, value, layer, at, dca, phases, with_lse, blocks, pages, tiles)
    if lse is not None:
        lse = jnp.swapaxes(_cut(jnp.swapaxes(lse, 1, 2), shift, num_queries), 1, 2)
    return _cut(out, shift, num_queries), lse


def _cut(x: Num[Array, "B S ..."], start: Int[Array, " B"], size: int) -> Num[Array, "B T ..."]:
    """`size` tokens of each row from `start` on."""
    return jax.vmap(lambda row, at: lax.dynamic_slice_in_dim(row, at, size))(x, start)


def _launch(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L R S K H"],
    value: Float[Array, "L R S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    with_lse: bool,
    blocks: KeyBlocks | None,
    pages: Int[Array, "B pages_per_row"] | None,
    tiles: ForwardTiles,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    batch, num_queries, heads, head_dim = query.shape
    num_rows, num_keys, kv_heads = key.shape[1:4]
    num_tiles = -(-num_queries // tiles.block_q)
    if tiles.registers % 64 or tiles.registers > head_dim:
        raise InputError(f"{tiles} must hold a multiple of 64 of the {head_dim} columns")
    if tiles.warpgroups != 2 and not (tiles.ahead and tiles.warpgroups == 3):
        raise InputError(f"{tiles} must have two warpgroups, or three that run ahead")
    if tiles.ahead and not tiles.resident:  # see `fetch`
        raise InputError(f"{tiles} must keep all rotations in shared memory to run ahead")
    cluster = tiles.cluster if (heads // kv_heads) % tiles.cluster == 0 else 1
    if key.shape[2] % 8:  # needs padding: take only one layer
        key, value, layer = key[layer][None], value[layer][None], jnp.int32(0)
    key, value = (pad_tokens(x.reshape(-1, *x.shape[2:]), 1) for x in (key, value))
    tables: Any = ()
    rotated: Any = query
    if tiles.resident:
        tables = rotation_tables(rows, dca, num_tiles * tiles.block_q)
    else:
        rotated = rotated_queries(query, rows, dca, phases)
        if blocks is not None or pages is not None:
            rotated = jnp.stack(rotated)
    queries = jax.tree.map(lambda x: pad_tokens(x, x.ndim - 3), rotated)
    cache_row = layer * num_rows + jnp.arange(batch, dtype=jnp.int32)
    page = None
    if pages is not None:
        cache_row, page = jnp.full_like(cache_row, layer * num_rows), num_keys
        num_keys = pages.shape[1] * page
    place = jnp.stack([cache_row, cache_row, rows.offset, rows.lengths, rows.key_offset], axis=1)
    rotations = len(phases) if tiles.resident else 1
    room = tiles.shared_bytes(head_dim, rotations + 1) <= SHARED_BYTES
    spare = int(tiles.persistent and tiles.resident and room)
    if tiles.persistent and tiles.resident and rotations + spare == 1:
        raise InputError(f"{tiles} leave no room for the next queries, needed to be persistent")
    group = heads // kv_heads
    problem = Problem(num_keys, group, cluster, dca, phases, tiles, page, rotations, spare)
    given = Refs(queries, key, value, place, tables, blocks, pages, None, None, None)
    return launch(problem, given, num_queries, with_lse)


def launch(
    problem: Problem, given: Refs, num_queries: int, with_lse: bool
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """Runs the kernel on the given references, adding its results; as `Backend.forward`."""
    query = jax.tree.leaves(given)[0]
    batch, _, heads, _ = query.shape[-4:]
    block_q, cluster = problem.tiles.block_q, problem.cluster
    num_tiles = -(-num_queries // block_q)
    clusters = heads // cluster
    out = jax.ShapeDtypeStruct(query.shape[-4:], query.dtype)
    # Whole tiles: a copy from a row of an array does not stop at the row's end.
    lse = jax.ShapeDtypeStruct((batch, heads, num_tiles * block_q), jnp.float32)
    out_type = (out, lse) if with_lse else (out,)
    # None arguments are omitted.
    refs = given._replace(out=out, lse=lse if with_lse else None)
    grid, names = (clusters, num_tiles, batch), ("heads", "tile", "batch")
    kernel = functools.partial(_kernel, problem)
    if problem.tiles.persistent:
        workers = min(multiprocessors() // cluster, math.prod(grid))
        grid, names = (workers,), ("worker",)
        kernel = functools.partial(_persistent_kernel, problem, workers)
    out, *lse = plgpu.kernel(
        functools.partial(kernel, jax.tree.structure(refs)),
        out_type=out_type,
        grid=grid,
        grid_names=names,
        cluster=(cluster,),
        cluster_names=("pair",),
        num_threads=problem.tiles.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="dca_forward",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,  # maxima and sums are computed within a warp
        ),
    )(*jax.tree.leaves(given))
    return out[:, :num_queries], lse[0][:, :, :num_queries] if with_lse else None


# --- the kernel --------------------------------------------------------------------------------


def _kernel(problem: Problem, tree: Any, *refs: Any) -> None:
    gmem: Refs = jax.tree.unflatten(tree, refs)
    num_queries, _, head_dim = gmem.out.shape[1:]
    batch = lax.axis_index("batch")
    head = lax.axis_index("heads") * problem.cluster + lax.axis_index("pair")
    # Tiles with the most work go first, so that the last ones are short.
    tile = pl.cdiv(num_queries, problem.tiles.block_q) - 1 - lax.axis_index("tile")

    def body(smem: Shared) -> None:
        cta = CTA(problem, gmem, smem, batch, head, tile, jnp.int32(0))
        warpgroup = lax.axis_index("warpgroup")
        computing = problem.tiles.warpgroups
        pl.when(warpgroup < computing)(lambda: compute(cta, warpgroup))
        pl.when(warpgroup == computing)(lambda: feed(cta))

    shared = Shared.types(problem, gmem.out.dtype, head_dim)
    pl.run_scoped(body, shared, collective_axes="warpgroup")


def _persistent_kernel(problem: Problem, workers: int, tree: Any, *refs: Any) -> None:
    gmem: Refs = jax.tree.unflatten(tree, refs)

    def body(smem: Shared) -> None:
        numbers = lax.axis_index("worker"), lax.axis_index("pair")
        worker = Worker(problem, gmem, smem, *numbers, workers)
        warpgroup = lax.axis_index("warpgroup")
        computing = problem.tiles.warpgroups
        pl.when(warpgroup < computing)(lambda: compute_tiles(worker, warpgroup))
        pl.when(warpgroup == computing)(lambda: feed_tiles(worker))

    shared = Shared.types(problem, gmem.out.dtype, gmem.out.shape[3])
    pl.run_scoped(body, shared, collective_axes="warpgroup")
