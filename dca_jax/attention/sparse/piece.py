"""What a selector looks at, and how one is described."""

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
    """A layer of keys in a stack of them, read where it lies; scales if they are in 8 bits."""

    key: Num[Array, "L B S K H"]
    scale: Float[Array, "L B K S"] | None
    layer: Int[Array, ""]

    @property
    def count(self) -> int:
        """Keys of a row, a multiple of 128."""
        return self.key.shape[2]

    def span(self, at: Int[Array, ""], size: int) -> Num[Array, "B size K H"]:
        """`size` keys of the layer, from `at` on."""
        layers, batch, count, kv_heads, head_dim = self.key.shape
        flat = self.key.reshape(layers, batch, count, kv_heads * head_dim)
        zero, at = jnp.int32(0), jnp.asarray(at, jnp.int32)
        start, shape = (self.layer, zero, at, zero), (1, batch, size, kv_heads * head_dim)
        found = jax.lax.dynamic_slice(flat, start, shape)
        return found.reshape(batch, size, kv_heads, head_dim)

    def scales(self, at: Int[Array, ""], size: int) -> Float[Array, "B K 1 size"]:
        """The scales of the same keys, as logits are laid out."""
        assert self.scale is not None
        _, batch, kv_heads, _ = self.scale.shape
        zero, at = jnp.int32(0), jnp.asarray(at, jnp.int32)
        start, shape = (self.layer, zero, zero, at), (1, batch, kv_heads, size)
        return jax.lax.dynamic_slice(self.scale, start, shape)[0, :, :, None, :]


class Piece(NamedTuple):
    """A piece of each row's text, and the keys up to its end.

    Attributes:
        query: raw, from a multiple of the selector's `segment` on (`rows.offset`).
        key: rotated, a stack of layers of a cache from the text's first token on.
        layer: which of the stack is read.
        rows: of the queries.
        whole: tokens of each row's prompt.
        scales: of keys in 8 bits.
        number: of the model's layer, which a table of patterns goes by.
        head: number of the first query head here, of all heads of the layer.
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
        """Tiles of 128 queries, the last of them perhaps with fewer."""
        return -(-self.query.shape[1] // BLOCK)

    @property
    def num_blocks(self) -> int:
        """Blocks of 128 keys, the last of them perhaps with fewer."""
        return -(-self.key.shape[2] // BLOCK)

    @property
    def tile(self) -> Int[Array, "B tiles"]:
        """Numbers of the tiles, counted from the text's first."""
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
        """Queries as a phase sees them, times the logit scale; float32, to be rounded once."""
        wide = query.astype(compute_dtype(query.dtype))
        seen = rotate(wide, query_position(index, phase, dca), self.rows.inv_freq)
        return seen * self.rows.scale[:, None, None, None].astype(wide.dtype)


class Selector(abc.ABC):
    """A way of choosing the blocks that a tile reads. Subclasses are frozen dataclasses.

    What it chooses for a tile depends on the text, up to the end of the tile's segment, and on
    nothing else: not on pieces, padding, or other rows.
    """

    @property
    @abc.abstractmethod
    def segment(self) -> int:
        """Tokens, a multiple of 128: pieces begin and end at multiples of it."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """As `--sparse` takes it."""

    @property
    @abc.abstractmethod
    def rows_of_tile(self) -> int:
        """Queries that stand for a tile."""

    @property
    def skip(self) -> float | None:
        """As in `KeyBlocks`, if blocks that are read may be passed by."""
        return None

    @abc.abstractmethod
    def counts(self, blocks: int) -> Int[np.ndarray, " blocks"] | None:
        """How many blocks each tile of a text keeps, if there are so many; None: the text tells."""

    @abc.abstractmethod
    def kept(
        self, piece: Piece, wanted: Bool[Array, "B tiles"], dca: DCAConfig
    ) -> Bool[Array, "B K tiles blocks"]:
        """Which blocks each tile of `wanted` keeps, its own and earlier ones.

        What stands for other tiles, and for later blocks, is not looked at.
        """
