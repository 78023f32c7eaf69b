"""`pooled`: the mean query of each tile selects the blocks for the whole tile.

It costs an eighth of `rows` and keeps about the same mass, but it misses what only a few queries of
a tile look for. For tile I and a kv head with its query heads n:

    q(n)     the mean of the tile's 128 queries, rotated for a phase
    p(n, b)  its attention on block b: one softmax over all keys j <= 128 I + 127, each in the
             phase of the tile's last query
    score(b) mean of p over n
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dca_jax.attention.blocks import BLOCK
from dca_jax.attention.sparse.best import best_blocks, blocks_to_keep
from dca_jax.attention.sparse.masses import block_scores
from dca_jax.attention.sparse.piece import Piece, Selector
from dca_jax.dca import PHASES, DCAConfig, Phase

SHARE = 0.1  # of a text's blocks


@dataclass(frozen=True)
class PooledQueries(Selector):
    """The blocks that a tile's mean query attends to most.

    Attributes:
        share: share of the blocks up to a tile's own that is kept.
    """

    share: float = SHARE

    @property
    def segment(self) -> int:
        """A tile: no other is looked at."""
        return BLOCK

    @property
    def name(self) -> str:
        """As `--sparse` takes it."""
        return f"pooled:{self.share:g}"

    @property
    def rows_of_tile(self) -> int:
        """Queries that stand for a tile."""
        return 1

    def counts(self, blocks: int) -> Int[np.ndarray, " blocks"]:
        """As `Selector.counts`."""
        return blocks_to_keep(self.share, blocks)

    def kept(
        self, piece: Piece, wanted: Bool[Array, "B tiles"], dca: DCAConfig
    ) -> Bool[Array, "B K tiles blocks"]:
        """As `Selector.kept`."""
        batch, num_queries, heads, head_dim = piece.query.shape
        index = piece.rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]

        def pooled(query: Float[Array, "B T N H"]) -> Float[Array, "B tiles 1 N H"]:
            # Meaningless for a tile with fewer queries, which is read densely.
            query = jnp.pad(query, ((0, 0), (0, -num_queries % BLOCK), (0, 0), (0, 0)))
            tiles = query.reshape(batch, -1, BLOCK, heads, head_dim)
            return tiles.mean(axis=2, keepdims=True)

        rotated: dict[Phase, Array] = {
            phase: pooled(piece.rotated(piece.query, index, phase, dca)) for phase in PHASES
        }
        last = piece.tile[:, :, None] * BLOCK + (BLOCK - 1)
        scores = block_scores(rotated, last, wanted, piece, dca, of_maximum=0.0)
        return best_blocks(scores, piece.tile, self.counts(piece.num_blocks))
