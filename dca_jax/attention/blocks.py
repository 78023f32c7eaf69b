"""Lists of key blocks: the keys that a tile of queries reads in sparse attention.

Tiles of queries and blocks of keys have 128 tokens (`BLOCK`) and start at multiples of 128 in the
text, however a prompt is split into pieces. In a phase of DCA, a block is *full* for a tile if all
its queries attend to all its keys, and an *edge* if only some do: on the diagonal, or where a chunk
border cuts the block. Edges are always read, with a mask for each query. A list names the full
blocks that are kept. With s = 300, for tile 8 (queries 1024 to 1151, all in chunk 3):

    block    0    1    2    3     4     5    6     7     8
            [        inter      600)[  succ     900)[ intra ..
            full full full full  edge  full full  edge  edge
    kept     x              x           x

    counts[b, k, t]     2     1     0            blocks of inter, of succ and of intra
    numbers[b, k, t]    0  3  5  .  .  .         the rest is unused

A row has one list for each kv head and tile, shared by all query heads of the kv head. The keys
that a query reads depend only on its tile's list and its own index, not on pieces, padding or the
other rows of the batch.

A tile cut by a chunk border belongs to two chunks, and keys that are intra for one are succ for the
other. So it has no full blocks there and reads its last two chunks whole. If s is a multiple of
128, no tile is cut.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from dca_jax.attention.backend import KeyBlocks, Rows
from dca_jax.dca import PHASES, DCAConfig, Phase, key_range
from dca_jax.errors import InputError

BLOCK = 128  # queries per tile, and keys per block
SKIPPING = 64  # queries of a head that skip a block together (`KeyBlocks.skip`)
Range = tuple[Int[Array, "..."], Int[Array, "..."]]


def num_tiles(num_queries: int) -> int:
    """Maximum number of tiles that `num_queries` queries can span; some of them may be empty."""
    return (num_queries + BLOCK - 2) // BLOCK + 1


def full_blocks(tile: Int[Array, "..."], phase: Phase, dca: DCAConfig) -> Range:
    """[begin, end) of the blocks that are full for a tile of 128 queries in a phase.

    Args:
        tile: number of the tile, counted from the text's first query.
    """
    first = tile * BLOCK
    # Both ends of a phase's keys grow with the query.
    start, _ = key_range(first + (BLOCK - 1), phase, dca)
    _, stop = key_range(first, phase, dca)
    begin = lax.div(start + (BLOCK - 1), jnp.int32(BLOCK))
    return begin, jnp.maximum(lax.div(stop, jnp.int32(BLOCK)), begin)


def edge_blocks(
    start: Int[Array, "..."], stop: Int[Array, "..."], full: Range
) -> tuple[Range, Range]:
    """(first, count) of the edges before a phase's full blocks, and of those after them.

    Args:
        start, stop: [start, stop) of the keys that any query of the tile attends to in the phase.
        full: the result of `full_blocks`.
    """
    full_begin, full_end = full
    size = jnp.int32(BLOCK)
    begin, end = lax.div(start, size), lax.div(stop + (BLOCK - 1), size)
    met, any_full = stop > start, full_end > full_begin
    before = jnp.where(met, jnp.where(any_full, full_begin, end) - begin, 0)
    after = jnp.where(met & any_full, end - full_end, 0)
    return (begin, before), (full_end, after)


def key_blocks(
    kept: Bool[Array, "B K tiles blocks"], *, rows: Rows, dca: DCAConfig, most: int
) -> KeyBlocks:
    """Lists of the blocks that a selector keeps, without edges and blocks that no query attends to.

    Args:
        kept: for each tile (see `KeyBlocks`), whether each block of the row's text is kept, counted
            from its first key.
        rows: per-row inputs of the queries.
        dca: `dca_jax.attention.backend.PLAIN` for plain attention.
        most: capacity of a list. It must hold all blocks that a tile keeps; further blocks are not
            read.

    Raises:
        InputError: a capacity that is not positive.
    """
    if most < 1:
        raise InputError(f"a list of key blocks needs a capacity of at least 1, got {most}")
    tile = _tiles(rows, kept.shape[2])
    number = jnp.arange(kept.shape[3], dtype=jnp.int32)
    full = [_inside(number, *full_blocks(tile, phase, dca)) for phase in PHASES]
    listed = [kept & met[:, None] for met in full]
    # The phases' full blocks are consecutive, so ascending numbers are in the order of phases.
    room = jnp.int32(most)
    counts = jnp.cumsum(jnp.stack([jnp.sum(x, axis=3, dtype=jnp.int32) for x in listed], 3), axis=3)
    counts = jnp.diff(jnp.minimum(counts, room), axis=3, prepend=0)
    place = jnp.cumsum(listed[0] | listed[1] | listed[2], axis=3, dtype=jnp.int32)
    wanted = jnp.arange(1, most + 1, dtype=jnp.int32)

    def numbers(place: Int[Array, " blocks"]) -> Int[Array, " most"]:
        return jnp.searchsorted(place, wanted).astype(jnp.int32)

    flat = jax.vmap(numbers)(place.reshape(-1, place.shape[3]))
    return KeyBlocks(counts, flat.reshape(*kept.shape[:3], most))


def allowed_keys(
    blocks: KeyBlocks, rows: Rows, dca: DCAConfig, *, num_queries: int, num_keys: int
) -> Bool[Array, "B K T S"]:
    """The lists as a mask of the keys that each query may read, for the oracle.

    Edges are allowed as a whole; the mask does not include the causal mask.
    """
    tile = _tiles(rows, blocks.counts.shape[2])
    index = rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    number = jnp.arange(-(-num_keys // BLOCK), dtype=jnp.int32)
    full = [_inside(number, *full_blocks(tile, phase, dca)) for phase in PHASES]
    edges = ~(full[0] | full[1] | full[2])
    used = jnp.arange(blocks.numbers.shape[3], dtype=jnp.int32)[None, None, None, :]
    used = used < jnp.sum(blocks.counts, axis=3, keepdims=True, dtype=jnp.int32)
    listed = blocks.numbers[..., None] == number[None, None, None, None, :]
    of_tile = (listed & used[..., None]).any(axis=3) | edges[:, None]
    tile_of_query = index // BLOCK - (rows.offset // BLOCK)[:, None]
    of_query = jnp.take_along_axis(of_tile, tile_of_query[:, None, :, None], axis=2)
    return jnp.repeat(of_query, BLOCK, axis=3)[..., :num_keys]


def check_blocks(blocks: KeyBlocks, query_shape: tuple[int, ...], kv_heads: int) -> None:
    """Checks that the shapes of lists fit the queries and keys.

    Raises:
        InputError: they do not fit.
    """
    batch, num_queries = query_shape[:2]
    expected = batch, kv_heads, num_tiles(num_queries)
    for name, array in (("counts", blocks.counts), ("numbers", blocks.numbers)):
        if array.dtype != jnp.int32:
            raise InputError(f"key blocks must be int32, got {name} of {array.dtype}")
    if blocks.counts.shape != (*expected, len(PHASES)) or blocks.numbers.shape[:3] != expected:
        raise InputError(
            f"key blocks for {num_queries} queries, {kv_heads} kv heads and {batch} rows must have "
            f"counts {[*expected, len(PHASES)]} and numbers {[*expected, 'most']}, got "
            f"{list(blocks.counts.shape)} and {list(blocks.numbers.shape)}"
        )
    if blocks.skip is not None and blocks.skip.shape != (batch,):
        raise InputError(
            f"skip must have one number for each of {batch} rows, got shape {blocks.skip.shape}"
        )


def _tiles(rows: Rows, count: int) -> Int[Array, "B tiles"]:
    """Numbers of the rows' tiles, counted from the start of their texts."""
    return (rows.offset // BLOCK)[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]


def _inside(
    number: Int[Array, " blocks"], begin: Int[Array, "B tiles"], end: Int[Array, "B tiles"]
) -> Bool[Array, "B tiles blocks"]:
    number = number[None, None, :]
    return (begin[..., None] <= number) & (number < end[..., None])
