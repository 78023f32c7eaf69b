"""The stages of a tile: runs of blocks that it meets under one rotation of the queries.

The rotation depends on how many chunks lie between query and key. So a tile of queries whose first
one is in chunk n has these stages: all keys before chunk n - 1, to which every query of it is
inter; then chunk n - 1, chunk n, and the chunks after it that the tile reaches into. In each, every
query takes the rotation of its own phase; so a tile may lie across chunks, and still meets each key
once.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from dca_jax.attention.backend import Rows
from dca_jax.dca import DCAConfig, Phase

FAR = 2**30  # beyond every text; twice that would overflow int32
BEHIND: dict[Phase, int] = {"intra": 0, "succ": 1, "inter": 2}  # chunks


class Stage(NamedTuple):
    """One stage of every tile [B, tiles], int32."""

    begin: Array  # blocks that any of the tile meets
    end: Array
    full_begin: Array  # blocks of which all is met by all of the tile
    full_end: Array
    low: Array  # slots of its keys
    high: Array
    near: Array  # text index from which on queries are one chunk behind; two, a chunk later


def stages_of_queries(
    num_queries: int,
    num_keys: int,
    rows: Rows,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    blocks: tuple[int, int],
) -> tuple[list[Stage], int]:
    """Stages of each tile of queries, whose blocks are of keys, and the most blocks that one meets.

    `phases` follow one another, as those of `PHASES` do.
    """
    block_q, block_k = blocks
    tile = jnp.arange(pl.cdiv(num_queries, block_q), dtype=jnp.int32)[None, :]
    offset, shift = rows.offset[:, None], rows.key_offset[:, None]
    limit = jnp.minimum(rows.lengths[:, None], offset + num_queries)
    first = offset + tile * block_q
    last = jnp.minimum(first + block_q, limit)
    chunk = first // dca.chunk_len

    def stage(behind: int | None) -> Stage:
        if behind is None:
            low, high, near = jnp.zeros_like(first), _start(chunk - 1, dca), _nowhere(first)
            begin, end = near, -near
        else:
            low, high = _start(chunk - behind, dca), _start(chunk - behind + 1, dca)
            begin, end = query_range(low, high, phases, dca)
            near = high
        # Keys after the last query that is in one of the phases are met by none.
        high = jnp.minimum(high, jnp.minimum(last, end))
        some = jnp.maximum(first, begin) < jnp.minimum(last, end)
        every = (begin <= first) & (first + block_q <= jnp.minimum(limit, end))
        low, high = (jnp.clip(x - shift, 0, num_keys) for x in (low, high))
        high = jnp.where(some, high, low)
        full = jnp.where(every, jnp.minimum(high, first + 1 - shift), 0)
        return _stage((low, high), (low, full), block_k, num_keys, (low, high, near))

    stages = [stage(behind) for behind in stages_behind(block_q, phases, dca)]
    return stages, most_keys(num_keys, dca, phases, blocks)


def stages_behind(block_q: int, phases: tuple[Phase, ...], dca: DCAConfig) -> list[int | None]:
    """The keys' chunk in each stage, counted back from that of a tile's first query.

    None: every chunk that is older than any of these.
    """
    reach = pl.cdiv(block_q - 1, dca.chunk_len)  # chunks a tile may lie beyond its first query's
    stages: list[int | None] = [None] if "inter" in phases else []
    for behind in range(1, -reach - 1, -1):
        met = {min(behind + beyond, 2) for beyond in range(reach + 1) if behind + beyond >= 0}
        if not met.isdisjoint(BEHIND[phase] for phase in phases):
            stages.append(behind)
    return stages


def most_keys(
    num_keys: int, dca: DCAConfig, phases: tuple[Phase, ...], blocks: tuple[int, int]
) -> int:
    """The most blocks of keys that a tile meets: one across two stages is met in both."""
    block_q, block_k = blocks
    return pl.cdiv(num_keys, block_k) + len(stages_behind(block_q, phases, dca)) - 1


def stages_of_keys(
    num_queries: int,
    num_keys: int,
    rows: Rows,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    blocks: tuple[int, int],
) -> tuple[list[Stage], int]:
    """Stages of each block of keys, whose blocks are tiles of queries, and the most that one meets.

    A block within one chunk has a stage towards the queries near it, and one towards those that are
    inter to it. A block across chunks has one for each of its chunks, and one towards the queries
    that are inter to all of them.
    """
    block_q, block_k = blocks
    offset, shift = rows.offset[:, None], rows.key_offset[:, None]
    limit = jnp.minimum(rows.lengths[:, None], offset + num_queries)
    start = shift + jnp.arange(pl.cdiv(num_keys, block_k), dtype=jnp.int32)[None, :] * block_k
    stop = jnp.minimum(start + block_k, shift + num_keys)
    limit = jnp.broadcast_to(limit, start.shape)
    first, last = start // dca.chunk_len, (stop - 1) // dca.chunk_len
    # The first query of the first tile that is inter to all keys.
    inter = jnp.clip(_start(last + 2, dca) - offset, 0, num_queries)
    inter = offset + (inter + (block_q - 1)) // block_q * block_q

    def stage(ahead: int | None) -> Stage:
        if ahead is None:
            low, high, near = start, stop, _nowhere(start)
            begin, end, full_begin, full_end = inter, limit, inter, limit
        else:
            low, near = _start(first + ahead, dca), _start(first + ahead + 1, dca)
            begin, end = query_range(low, near, phases, dca)
            whole = (low <= start) & (stop <= near)
            low, high = jnp.maximum(low, start), jnp.minimum(near, stop)
            begin, full_begin = jnp.maximum(begin, low), jnp.maximum(begin, high - 1)
            end = jnp.where(low < high, jnp.minimum(jnp.minimum(end, limit), inter), begin)
            full_end = jnp.where(whole, end, begin)
        queries = (begin, end, full_begin, full_end)
        begin, end, full_begin, full_end = (jnp.clip(x - offset, 0, num_queries) for x in queries)
        keys = (low - shift, high - shift, near)
        return _stage((begin, end), (full_begin, full_end), block_q, num_queries, keys)

    stages = [stage(ahead) for ahead in stages_ahead(block_k, phases, dca)]
    return stages, most_queries(num_queries, dca, phases, blocks)


def stages_ahead(block_k: int, phases: tuple[Phase, ...], dca: DCAConfig) -> list[int | None]:
    """Which of the chunks that a block of keys may lie in each stage is of; None: of all."""
    chunks = range(pl.cdiv(block_k - 1, dca.chunk_len) + 1)
    return [*chunks, None] if "inter" in phases else [*chunks]


def most_queries(
    num_queries: int, dca: DCAConfig, phases: tuple[Phase, ...], blocks: tuple[int, int]
) -> int:
    """The most tiles of queries that a block of keys meets, over all stages.

    The tiles of its first chunk and those of the inter stage are distinct; so are those of all
    chunks, where there is but one phase. Else those near a chunk are met again for each further
    one.
    """
    block_q, block_k = blocks
    tiles, chunks = pl.cdiv(num_queries, block_q), pl.cdiv(block_k - 1, dca.chunk_len) + 1
    near = chunks + 1 if "inter" in phases else len(phases)  # chunks
    again = min(pl.cdiv(near * dca.chunk_len, block_q), tiles) if near > 1 else 0
    return tiles + (chunks - 1) * (again + 1)


def query_range(
    low: Array, near: Array, phases: tuple[Phase, ...], dca: DCAConfig
) -> tuple[Array, Array]:
    """[begin, end) of the queries that meet the chunk [low, near) in one of `phases`."""
    far = far_from(near, dca)
    begin = low if "intra" in phases else near if "succ" in phases else far
    end = -_nowhere(near) if "inter" in phases else far if "succ" in phases else near
    return begin, end


def far_from(near: Array, dca: DCAConfig) -> Array:
    """Text index from which on queries are two chunks behind; scalars, in kernels too."""
    return near + min(dca.chunk_len, FAR - 1)


def _nowhere(like: Array) -> Array:
    return jnp.full_like(like, -FAR)


def _start(chunk: Array, dca: DCAConfig) -> Array:
    """Text index of a chunk's first token, at most FAR either way."""
    most = FAR // dca.chunk_len
    return jnp.clip(chunk, -most, most) * dca.chunk_len


def _stage(
    met: tuple[Array, Array],
    full: tuple[Array, Array],
    block: int,
    num: int,
    keys: tuple[Array, Array, Array],
) -> Stage:
    """From elements of what moves, `num` of them in blocks, to their blocks."""
    (begin, end), (full_begin, full_end) = met, full
    # A stage without blocks still names one that there is.
    first = jnp.minimum(begin // block, pl.cdiv(num, block) - 1)
    return Stage(
        begin=first,
        end=jnp.where(end > begin, (end + (block - 1)) // block, first),
        full_begin=(full_begin + (block - 1)) // block,
        full_end=full_end // block,
        low=keys[0],
        high=keys[1],
        near=keys[2],
    )
