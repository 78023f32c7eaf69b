"""Which tiles of queries a CTA of Hopper's persistent forward kernel processes.

The tiles with the most work go first. They are dealt to the workers, which are CTAs or clusters, in
rows: in every other row in the reverse order, so that the workers' sums of work are nearly equal.
Each tile is computed by one worker alone: results do not depend on the order.
"""

from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from dca_jax.attention.mosaic_gpu.forward_cta import CTA, Problem, Refs, Shared


class Worker(NamedTuple):
    """A CTA of a persistent kernel; those of a cluster process the same tiles."""

    problem: Problem
    gmem: Refs
    smem: Shared  # with walks for two tiles
    number: Array  # of the cluster
    pair: Array  # the CTA's number in its cluster
    workers: int  # clusters

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Clusters for a tile of all heads, rows and tiles of a row."""
        batch, num_queries, heads, _ = self.gmem.out.shape
        tiles = pl.cdiv(num_queries, self.problem.tiles.block_q)
        return heads // self.problem.cluster, batch, tiles

    def num_tiles(self) -> Int[Array, ""]:
        """Number of tiles that this worker processes."""
        clusters, batch, tiles = self.sizes
        rows, rest = divmod(clusters * batch * tiles, self.workers)
        return rows + (self._place_in(jnp.int32(rows)) < rest).astype(jnp.int32)

    def _place_in(self, row: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.where(row % 2 == 0, self.number, self.workers - 1 - self.number)

    def cta(self, n: Int[Array, ""], begin: Int[Array, ""]) -> CTA:
        """The worker's tile n, before which it has made `begin` steps."""
        clusters, batch, tiles = self.sizes
        item = n * self.workers + self._place_in(n)
        of_rank = jnp.int32(clusters * batch)
        rank, rest = lax.div(item, of_rank), lax.rem(item, of_rank)
        head = lax.rem(rest, jnp.int32(clusters)) * self.problem.cluster + self.pair
        row, tile = lax.div(rest, jnp.int32(clusters)), ranked_tile(rank, tiles, self.problem)
        smem, at = self.smem, n % 2
        smem = smem._replace(
            walks=smem.walks.at[at], planned=smem.planned.at[at], walked=smem.walked.at[at]
        )
        return CTA(self.problem, self.gmem, smem, row, head, tile, begin)


def ranked_tile(rank: Int[Array, ""], tiles: int, problem: Problem) -> Int[Array, ""]:
    """The tile of this rank by work, the most first; exact if the text begins at a chunk's edge."""
    assert problem.dca is not None
    per_chunk = max(problem.dca.chunk_len // problem.tiles.block_q, 1)
    if problem.phases != ("intra",) or tiles <= per_chunk:
        return tiles - 1 - rank
    # Work grows with the place in the chunk. All chunks have the first `more` places, and all but
    # the last the others, which come first.
    chunks, more = divmod(tiles, per_chunk)
    others = (per_chunk - more) * chunks

    def descending(rank: Array, last: int, chunks: int) -> Array:
        place, chunk = last - lax.div(rank, jnp.int32(chunks)), lax.rem(rank, jnp.int32(chunks))
        return chunk * per_chunk + place

    in_others = descending(rank, per_chunk - 1, chunks)
    return jnp.where(rank < others, in_others, descending(rank - others, more - 1, chunks + 1))
