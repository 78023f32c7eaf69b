"""The block specifications of the kernels' grids, and the scalars that every kernel is given.

The scalar-prefetch arguments of a kernel are `row_scalars` and the words and runs of its steps.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_tpu.heads import Heads
from dca_jax.attention.mosaic_tpu.steps import Steps


def row_scalars(layer: Array, rows: Rows, num_queries: int) -> Array:
    """The layer, then each row's offset, length (up to these queries) and key offset; int32."""
    length = jnp.minimum(rows.lengths, rows.offset + num_queries)
    each = jnp.stack([rows.offset, length, rows.key_offset], axis=1).reshape(-1)
    return jnp.concatenate([layer.reshape(1), each]).astype(jnp.int32)


def read_row_scalars(rows_ref: Any, row: Array) -> tuple[Array, Array, Array]:
    """A row's offset, length and key offset."""
    offset, length, key_offset = (rows_ref[1 + 3 * row + number] for number in range(3))
    return offset, length, key_offset


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuerySpecs:
    """Specifications for a grid (row, pack of query heads, worker, step) over blocks of queries."""

    steps: Steps
    heads: Heads

    def queries(self, block_q: int) -> pl.BlockSpec:
        """For [B, T, N * H]: queries, outputs, and their gradients."""

        def index(b: Array, h: Array, w: Array, i: Array, rows: Any, words: Any, _: Any) -> tuple:
            return b, self.steps.read(words, b, w, i).outer, h

        return pl.BlockSpec((None, block_q, self.heads.q_width), index)

    def query_scalars(self, block_q: int) -> pl.BlockSpec:
        """For [B, N, 1, T]: one number for each query and head."""

        def index(b: Array, h: Array, w: Array, i: Array, rows: Any, words: Any, _: Any) -> tuple:
            return b, h, 0, self.steps.read(words, b, w, i).outer

        return pl.BlockSpec((None, self.heads.q_per_pack, 1, block_q), index)

    def rotation_tables(self, phases: int, block_q: int) -> pl.BlockSpec:
        """For [P, B, H, T]."""

        def index(b: Array, h: Array, w: Array, i: Array, rows: Any, words: Any, _: Any) -> tuple:
            return 0, b, 0, self.steps.read(words, b, w, i).outer

        return pl.BlockSpec((phases, None, self.heads.head_dim, block_q), index)

    def keys(self, block_kv: int) -> pl.BlockSpec:
        """For [L, B, S, K * H]: keys and values."""

        def index(b: Array, h: Array, w: Array, i: Array, rows: Any, words: Any, _: Any) -> tuple:
            block = self.steps.read(words, b, w, i).inner
            return rows[0], b, block, lax.div(h, jnp.int32(self.heads.q_packs_per_kv_pack))

        return pl.BlockSpec((None, None, block_kv, self.heads.kv_width), index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeySpecs:
    """Specifications for a grid over blocks of keys.

    Its axes: row, pack of kv heads, worker, step, pack of query heads that reads the kv heads.
    """

    steps: Steps
    heads: Heads

    def queries(self, block_q: int) -> pl.BlockSpec:
        """For [B, T, N * H]: queries and the gradient of the output."""

        def index(b: Array, n: Array, w: Array, i: Array, g: Array, rows: Any, words: Any, _: Any):
            block = self.steps.read(words, b, w, i).inner
            return b, block, n * self.heads.q_packs_per_kv_pack + g

        return pl.BlockSpec((None, block_q, self.heads.q_width), index)

    def query_scalars(self, block_q: int) -> pl.BlockSpec:
        """For [B, N, 1, T]: one number for each query and head."""

        def index(b: Array, n: Array, w: Array, i: Array, g: Array, rows: Any, words: Any, _: Any):
            q_pack = n * self.heads.q_packs_per_kv_pack + g
            return b, q_pack, 0, self.steps.read(words, b, w, i).inner

        return pl.BlockSpec((None, self.heads.q_per_pack, 1, block_q), index)

    def rotation_tables(self, phases: int, block_q: int) -> pl.BlockSpec:
        """For [P, B, H, T]."""

        def index(b: Array, n: Array, w: Array, i: Array, g: Array, rows: Any, words: Any, _: Any):
            return 0, b, 0, self.steps.read(words, b, w, i).inner

        return pl.BlockSpec((phases, None, self.heads.head_dim, block_q), index)

    def keys(self, block_kv: int) -> pl.BlockSpec:
        """For [L, B, S, K * H]: keys and values."""

        def index(b: Array, n: Array, w: Array, i: Array, g: Array, rows: Any, words: Any, _: Any):
            return rows[0], b, self.steps.read(words, b, w, i).outer, n

        return pl.BlockSpec((None, None, block_kv, self.heads.kv_width), index)

    def key_gradients(self, block_kv: int) -> pl.BlockSpec:
        """For [B, S, K * H]: dk and dv."""

        def index(b: Array, n: Array, w: Array, i: Array, g: Array, rows: Any, words: Any, _: Any):
            return b, self.steps.read(words, b, w, i).outer, n

        return pl.BlockSpec((None, block_kv, self.heads.kv_width), index)
