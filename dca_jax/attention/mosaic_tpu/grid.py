"""The grids' block specifications: which part of an array a step needs.

Every kernel is given, ahead of its grid, `row_scalars`, and the words and stages of its walk.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_tpu.heads import Heads
from dca_jax.attention.mosaic_tpu.walk import Walk


def row_scalars(layer: Array, rows: Rows, num_queries: int) -> Array:
    """The layer, then each row's offset, length (of these queries' text) and key offset; int32."""
    limit = jnp.minimum(rows.lengths, rows.offset + num_queries)
    each = jnp.stack([rows.offset, limit, rows.key_offset], axis=1).reshape(-1)
    return jnp.concatenate([layer.reshape(1), each]).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryGrid:
    """Blocks of a grid (row, tile of query heads, lane, step)."""

    walk: Walk
    heads: Heads

    def queries(self, block_q: int) -> pl.BlockSpec:
        """Of [B, T, N * H]: queries, outputs, and their gradients."""

        def at(b: Array, h: Array, i: Array, k: Array, rows: Any, words: Any, stages: Any) -> tuple:
            return b, self.walk.read(words, b, i, k).tile, h

        return pl.BlockSpec((None, block_q, self.heads.query_width), at)

    def query_scalars(self, block_q: int) -> pl.BlockSpec:
        """Of [B, N, 1, T]: what belongs to a query of a head."""

        def at(b: Array, h: Array, i: Array, k: Array, rows: Any, words: Any, stages: Any) -> tuple:
            return b, h, 0, self.walk.read(words, b, i, k).tile

        return pl.BlockSpec((None, self.heads.together, 1, block_q), at)

    def turns(self, phases: int, block_q: int) -> pl.BlockSpec:
        """Of [P, B, H, T]."""

        def at(b: Array, h: Array, i: Array, k: Array, rows: Any, words: Any, stages: Any) -> tuple:
            return 0, b, 0, self.walk.read(words, b, i, k).tile

        return pl.BlockSpec((phases, None, self.heads.head_dim, block_q), at)

    def keys(self, block_k: int) -> pl.BlockSpec:
        """Of [L, B, S, K * H]."""

        def at(b: Array, h: Array, i: Array, k: Array, rows: Any, words: Any, stages: Any) -> tuple:
            block = self.walk.read(words, b, i, k).block
            return rows[0], b, block, lax.div(h, jnp.int32(self.heads.group))

        return pl.BlockSpec((None, None, block_k, self.heads.width), at)
