"""`rows`: a few exact query rows of each tile select the blocks for the whole tile.

For tile I (queries 128 I to 128 I + 127) and a kv head with its query heads n, with R = 8 rows:

    rows i      128 I + 16 r + 15, r = 0 .. 7
    p(n, i, b)  attention of row i of head n on block b: the sum over its keys of one softmax over
                all keys j <= i, with the model's own positions and scale
    score(b)    mean of p over n and i, plus 1/8 of its maximum

The maximum covers rows that look for something the others do not. For a comparison of selectors on
a real model, see docs/lab/sparse.md.
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
OF_MAXIMUM = 1 / 8


@dataclass(frozen=True)
class SampledRows(Selector):
    """The blocks that a tile's sampled rows attend to most.

    Attributes:
        share: share of the blocks up to a tile's own that is kept.
        count: number of sampled rows per tile, a divisor of 128.
    """

    share: float = SHARE
    count: int = 8

    @property
    def segment(self) -> int:
        """A tile: no other is looked at."""
        return BLOCK

    @property
    def name(self) -> str:
        """As `--sparse` takes it."""
        return f"rows{'' if self.count == 8 else self.count}:{self.share:g}"

    @property
    def rows_of_tile(self) -> int:
        """Queries that stand for a tile."""
        return self.count

    def counts(self, blocks: int) -> Int[np.ndarray, " blocks"]:
        """As `Selector.counts`."""
        return blocks_to_keep(self.share, blocks)

    def kept(
        self, piece: Piece, wanted: Bool[Array, "B tiles"], dca: DCAConfig
    ) -> Bool[Array, "B K tiles blocks"]:
        """As `Selector.kept`."""
        scores = self.scores(piece, wanted, dca)
        return best_blocks(scores, piece.tile, self.counts(piece.num_blocks))

    def scores(
        self, piece: Piece, wanted: Bool[Array, "B tiles"], dca: DCAConfig
    ) -> Float[Array, "B K tiles blocks"]:
        """Scores of each block up to the tile's own from the sampled rows."""
        query, index = sampled(piece, self.count)
        flat = query.reshape(query.shape[0], -1, *query.shape[3:]), index.reshape(len(index), -1)
        rotated: dict[Phase, Array] = {
            phase: piece.rotated(*flat, phase, dca).reshape(query.shape) for phase in PHASES
        }
        return block_scores(rotated, index, wanted, piece, dca, of_maximum=OF_MAXIMUM)


def sampled(
    piece: Piece, count: int
) -> tuple[Float[Array, "B tiles R N H"], Int[Array, "B tiles R"]]:
    """The last query of each of `count` equal parts of every tile, and its text index."""
    batch, num_queries, heads, head_dim = piece.query.shape
    apart = BLOCK // count
    missing = ((0, 0), (0, -num_queries % BLOCK), (0, 0), (0, 0))
    parts = jnp.pad(piece.query, missing).reshape(batch, -1, count, apart, heads, head_dim)
    rows = (jnp.arange(count, dtype=jnp.int32) + 1) * apart - 1
    return parts[:, :, :, -1], piece.tile[:, :, None] * BLOCK + rows[None, None, :]
