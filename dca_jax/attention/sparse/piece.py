"""The input of a selector, and its interface."""

import abc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from dca_jax.attention.backend import Rows
from dca_jax.attention.blocks import BLOCK
from dca_jax.attention.stored import Scales
from dca_jax.dca import DCAConfig, Phase, query_position
from dca_jax.dtypes import compute_dtype
from dca_jax.rope import rotate


class Keys(NamedTuple):
    """A layer of keys in a stack, read in place, with scales if they have 8 bits."""

    key: Num[Array, "L B S K H"]
    scale: Float[Array, "L B K S"] | None
    layer: Int[Array, ""]

    @property
    def count(self) -> int:
        """Number of keys in a row, a multiple of 128."""
        return self.key.shape[2]

    def span(self, at: Int[Array, ""], size: int) -> Num[Array, "B size K H"]:
        """`size` keys of the layer, starting at `at`."""
        layers, batch, count, kv_heads, head_dim = self.key.shape
        flat = self.key.reshape(layers, batch, count, kv_heads * head_dim)
        zero, at = jnp.int32(0), jnp.asarray(at, jnp.int32)
        start, shape = (self.layer, zero, at, zero), (1, batch, size, kv_heads * head_dim)
        found = jax.lax.dynamic_slice(flat, start, shape)
        return found.reshape(batch, size, kv_heads, head_dim)

    def scales(self, at: Int[Array, ""], size: int) -> Float[Array, "B K 1 size"]:
        """The scales of the same keys, in the layout of logits."""
        assert self.scale is not None
        _, batch, kv_heads, _ = self.scale.shape
        zero, at = jnp.int32(0), jnp.asarray(at, jnp.int32)
        start, shape = (self.layer, zero, zero, at), (1, batch, kv_heads, size)
        return jax.lax.dynamic_slice(self.scale, start, shape)[0, :, :, None, :]


class Piece(NamedTuple):
    """A piece of each row's text, and the keys up to its end.

    Attributes:
        query: unrotated queries, starting at a multiple of the selector's `segment`
            (`rows.offset`).
        key: rotated keys, a stack of cache layers from the text's first token.
        layer: index of the layer in the stack.
        rows: per-row inputs of the queries.
        whole: number of tokens of each row's prompt.
        scales: scales of 8-bit keys.
        number: number of the model's layer, for a table of patterns.
        head: number of the first query head here, among all heads of the layer.
    """

    query: Float[Array, "B T N H"]
    key: Num[Array, "L B S K H"]
    layer: Int[Array, ""]
    rows: Rows
    whole: Int[Array, " B"]
    scales: Scales | None
    number: Int[Array, ""]
    head: Int[Array, ""]

    @property
    def num_tiles(self) -> int:
        """Number of tiles of 128 queries; the last one may have fewer."""
        return -(-self.query.shape[1] // BLOCK)

    @property
    def num_blocks(self) -> int:
        """Number of blocks of 128 keys; the last one may have fewer."""
        return -(-self.key.shape[2] // BLOCK)

    @property
    def tile(self) -> Int[Array, "B tiles"]:
        """Numbers of the tiles, counted from the start of the text."""
        return self.tiles(self.num_tiles)

    def tiles(self, count: int) -> Int[Array, "B tiles"]:
        """Numbers of the first `count` tiles."""
        own = jnp.arange(count, dtype=jnp.int32)
        return (self.rows.offset // BLOCK)[:, None] + own[None, :]

    def keys(self) -> "Keys":
        """The keys, in whole blocks."""
        missing = -self.key.shape[2] % BLOCK
        scale = None if self.scales is None else self.scales.key
        if not missing:
            return Keys(self.key, scale, self.layer)
        key = jnp.pad(self.key[self.layer], ((0, 0), (0, missing), (0, 0), (0, 0)))[None]
        if scale is not None:
            scale = jnp.pad(scale[self.layer], ((0, 0), (0, 0), (0, missing)))[None]
        return Keys(key, scale, jnp.int32(0))

    def rotated(
        self, query: Float[Array, "B T N H"], index: Int[Array, "B T"], phase: Phase, dca: DCAConfig
    ) -> Float[Array, "B T N H"]:
        """Queries rotated for a phase, times the logit scale; float32, to be rounded only once."""
        wide = query.astype(compute_dtype(query.dtype))
        seen = rotate(wide, query_position(index, phase, dca), self.rows.inv_freq)
        return seen * self.rows.scale[:, None, None, None].astype(wide.dtype)


class Selector(abc.ABC):
    """A method for selecting the blocks that a tile reads. Subclasses are frozen dataclasses.

    The selection for a tile depends only on the text up to the end of the tile's segment, not on
    pieces, padding or other rows.
    """

    @property
    @abc.abstractmethod
    def segment(self) -> int:
        """Number of tokens, a multiple of 128; pieces begin and end at multiples of it."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """As `--sparse` takes it."""

    @property
    @abc.abstractmethod
    def rows_of_tile(self) -> int:
        """Number of queries that represent a tile."""

    @property
    def skip(self) -> float | None:
        """`KeyBlocks.skip`, if blocks in the lists may be skipped."""
        return None

    @abc.abstractmethod
    def counts(self, blocks: int) -> Int[np.ndarray, " blocks"] | None:
        """Number of blocks that each tile of a text keeps; None if it depends on the text."""

    @abc.abstractmethod
    def kept(
        self, piece: Piece, wanted: Bool[Array, "B tiles"], dca: DCAConfig
    ) -> Bool[Array, "B K tiles blocks"]:
        """Mask of the blocks that each tile of `wanted` keeps, among its own and earlier ones.

        Values for other tiles and later blocks are ignored.
        """
