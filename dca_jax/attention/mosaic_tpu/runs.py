"""Runs of blocks that a kernel processes under one rotation of the queries.

The rotation of a query depends on how many chunks lie between query and key. For a block of queries
whose first query is in chunk n, the blocks of keys fall into these runs: all keys before chunk
n - 1, which are inter to every query; then chunk n - 1; chunk n; and each later chunk that the
block of queries reaches into. Within a run every query is rotated for its own phase, so a block of
queries may span several chunks and still reads each key once.

In this package a tile is a pair (block_q, block_kv).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from dca_jax.attention.backend import Rows
from dca_jax.attention.softmax import FAR
from dca_jax.dca import DCAConfig, Phase

CHUNKS_BEHIND: dict[Phase, int] = {"intra": 0, "succ": 1, "inter": 2}


class Run(NamedTuple):
    """One run of every outer block, [B, outer blocks] each, int32.

    The outer block stays in VMEM while the kernel loops over inner blocks: blocks of keys for an
    outer block of queries, blocks of queries for an outer block of keys.
    """

    begin: Array  # the inner blocks that take part: [begin, end)
    end: Array
    full_begin: Array  # the inner blocks that need no mask: [full_begin, full_end)
    full_end: Array
    key_begin: Array  # slots of the run's keys: [key_begin, key_end)
    key_end: Array
    succ_begin: Array  # queries from this text index on are succ; a chunk later, inter


def kv_runs(
    num_queries: int,
    num_keys: int,
    rows: Rows,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    tile: tuple[int, int],
) -> tuple[list[Run], int]:
    """The runs of blocks of keys for each block of queries.

    `phases` must be adjacent, as those of `PHASES` are.

    Returns:
        The runs, and the most blocks of keys that a block of queries can need.
    """
    block_q, block_kv = tile
    block = jnp.arange(pl.cdiv(num_queries, block_q), dtype=jnp.int32)[None, :]
    offset, key_offset = rows.offset[:, None], rows.key_offset[:, None]
    length = jnp.minimum(rows.lengths[:, None], offset + num_queries)
    first = offset + block * block_q
    last = jnp.minimum(first + block_q, length)
    chunk = first // dca.chunk_len

    def run(behind: int | None) -> Run:
        if behind is None:
            low, high = jnp.zeros_like(first), _chunk_begin(chunk - 1, dca)
            succ_begin = _minus_far(first)
            begin, end = succ_begin, -succ_begin
        else:
            low, high = _chunk_begin(chunk - behind, dca), _chunk_begin(chunk - behind + 1, dca)
            begin, end = query_range(low, high, phases, dca)
            succ_begin = high
        # Keys after the last query in one of the phases are attended by none.
        high = jnp.minimum(high, jnp.minimum(last, end))
        any_query = jnp.maximum(first, begin) < jnp.minimum(last, end)
        all_queries = (begin <= first) & (first + block_q <= jnp.minimum(length, end))
        low, high = (jnp.clip(x - key_offset, 0, num_keys) for x in (low, high))
        high = jnp.where(any_query, high, low)
        full = jnp.where(all_queries, jnp.minimum(high, first + 1 - key_offset), 0)
        return _make_run((low, high), (low, full), block_kv, num_keys, (low, high, succ_begin))

    runs = [run(behind) for behind in kv_run_chunks(block_q, phases, dca)]
    return runs, max_kv_steps(num_keys, dca, phases, tile)


def kv_run_chunks(block_q: int, phases: tuple[Phase, ...], dca: DCAConfig) -> list[int | None]:
    """The chunk of keys of each run, counted back from the chunk of the block's first query.

    None stands for every chunk that is older than all of these.
    """
    reach = pl.cdiv(block_q - 1, dca.chunk_len)  # chunks a block may span beyond its first query's
    runs: list[int | None] = [None] if "inter" in phases else []
    for behind in range(1, -reach - 1, -1):
        present = {min(behind + ahead, 2) for ahead in range(reach + 1) if behind + ahead >= 0}
        if not present.isdisjoint(CHUNKS_BEHIND[phase] for phase in phases):
            runs.append(behind)
    return runs


def max_kv_steps(
    num_keys: int, dca: DCAConfig, phases: tuple[Phase, ...], tile: tuple[int, int]
) -> int:
    """The most blocks of keys that a block of queries needs.

    A block of keys that lies across two runs is processed in both.
    """
    block_q, block_kv = tile
    return pl.cdiv(num_keys, block_kv) + len(kv_run_chunks(block_q, phases, dca)) - 1


def query_runs(
    num_queries: int,
    num_keys: int,
    rows: Rows,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    tile: tuple[int, int],
) -> tuple[list[Run], int]:
    """The runs of blocks of queries for each block of keys.

    A block of keys within one chunk has one run for the queries in the phases intra and succ, and
    one for those in inter. A block across chunks has one run for each of its chunks, and one for
    the queries that are inter to all of them.

    Returns:
        The runs, and the most blocks of queries that a block of keys can need.
    """
    block_q, block_kv = tile
    offset, key_offset = rows.offset[:, None], rows.key_offset[:, None]
    length = jnp.minimum(rows.lengths[:, None], offset + num_queries)
    num_blocks = pl.cdiv(num_keys, block_kv)
    start = key_offset + jnp.arange(num_blocks, dtype=jnp.int32)[None, :] * block_kv
    stop = jnp.minimum(start + block_kv, key_offset + num_keys)
    length = jnp.broadcast_to(length, start.shape)
    first, last = start // dca.chunk_len, (stop - 1) // dca.chunk_len
    # The first query of the first block of queries that is inter to all keys of the block.
    inter = jnp.clip(_chunk_begin(last + 2, dca) - offset, 0, num_queries)
    inter = offset + (inter + (block_q - 1)) // block_q * block_q

    def run(ahead: int | None) -> Run:
        if ahead is None:
            low, high, succ_begin = start, stop, _minus_far(start)
            begin, end, full_begin, full_end = inter, length, inter, length
        else:
            low, succ_begin = _chunk_begin(first + ahead, dca), _chunk_begin(first + ahead + 1, dca)
            begin, end = query_range(low, succ_begin, phases, dca)
            whole = (low <= start) & (stop <= succ_begin)
            low, high = jnp.maximum(low, start), jnp.minimum(succ_begin, stop)
            begin, full_begin = jnp.maximum(begin, low), jnp.maximum(begin, high - 1)
            end = jnp.where(low < high, jnp.minimum(jnp.minimum(end, length), inter), begin)
            full_end = jnp.where(whole, end, begin)
        queries = (begin, end, full_begin, full_end)
        begin, end, full_begin, full_end = (jnp.clip(x - offset, 0, num_queries) for x in queries)
        keys = (low - key_offset, high - key_offset, succ_begin)
        return _make_run((begin, end), (full_begin, full_end), block_q, num_queries, keys)

    runs = [run(ahead) for ahead in query_run_chunks(block_kv, phases, dca)]
    return runs, max_query_steps(num_queries, dca, phases, tile)


def query_run_chunks(block_kv: int, phases: tuple[Phase, ...], dca: DCAConfig) -> list[int | None]:
    """The chunk of keys of each run, counted from the chunk of the block's first key.

    None stands for all chunks of the block.
    """
    chunks = range(pl.cdiv(block_kv - 1, dca.chunk_len) + 1)
    return [*chunks, None] if "inter" in phases else [*chunks]


def max_query_steps(
    num_queries: int, dca: DCAConfig, phases: tuple[Phase, ...], tile: tuple[int, int]
) -> int:
    """The most blocks of queries that a block of keys needs, over all runs.

    The queries of the first chunk's run and those of the inter run are distinct. Each further chunk
    of the block processes the queries near it once more.
    """
    block_q, block_kv = tile
    blocks, chunks = pl.cdiv(num_queries, block_q), pl.cdiv(block_kv - 1, dca.chunk_len) + 1
    near = chunks + 1 if "inter" in phases else len(phases)  # chunks
    again = min(pl.cdiv(near * dca.chunk_len, block_q), blocks) if near > 1 else 0
    return blocks + (chunks - 1) * (again + 1)


def query_range(
    chunk_begin: Array, succ_begin: Array, phases: tuple[Phase, ...], dca: DCAConfig
) -> tuple[Array, Array]:
    """[begin, end) of the queries in `phases` for the chunk of keys [chunk_begin, succ_begin)."""
    inter = inter_begin(succ_begin, dca)
    begin = chunk_begin if "intra" in phases else succ_begin if "succ" in phases else inter
    end = (
        -_minus_far(succ_begin) if "inter" in phases else inter if "succ" in phases else succ_begin
    )
    return begin, end


def inter_begin(succ_begin: Array, dca: DCAConfig) -> Array:
    """The text index from which queries are in phase inter; also for scalars in a kernel."""
    return succ_begin + min(dca.chunk_len, FAR - 1)


def _minus_far(like: Array) -> Array:
    return jnp.full_like(like, -FAR)


def _chunk_begin(chunk: Array, dca: DCAConfig) -> Array:
    """Text index of a chunk's first token, clipped to [-FAR, FAR]."""
    most = FAR // dca.chunk_len
    return jnp.clip(chunk, -most, most) * dca.chunk_len


def _make_run(
    used: tuple[Array, Array],
    full: tuple[Array, Array],
    block: int,
    num: int,
    keys: tuple[Array, Array, Array],
) -> Run:
    """Converts ranges of inner elements (`num` in all) to ranges of inner blocks of `block`."""
    (begin, end), (full_begin, full_end) = used, full
    # An empty run still has to name a block that exists.
    first = jnp.minimum(begin // block, pl.cdiv(num, block) - 1)
    return Run(
        begin=first,
        end=jnp.where(end > begin, (end + (block - 1)) // block, first),
        full_begin=(full_begin + (block - 1)) // block,
        full_end=full_end // block,
        key_begin=keys[0],
        key_end=keys[1],
        succ_begin=keys[2],
    )
