"""What a selector looks at, and how one is described."""

import abc
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from dca_jax.attention.backend import Rows
from dca_jax.attention.blocks import BLOCK
from dca_jax.attention.stored import Scales
from dca_jax.dca import DCAConfig, Phase, query_position
from dca_jax.dtypes import compute_dtype
from dca_jax.rope import rotate


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

    def keys(self) -> tuple[Num[Array, "B S K H"], Float[Array, "B K S"] | None]:
        """The layer's keys, padded to whole blocks, and their scales if they are in 8 bits."""
        keys, missing = self.key[self.layer], -self.key.shape[2] % BLOCK
        if missing:
            keys = jnp.pad(keys, ((0, 0), (0, missing), (0, 0), (0, 0)))
        if self.scales is None:
            return keys, None
        return keys, jnp.pad(self.scales.key[self.layer], ((0, 0), (0, 0), (0, missing)))

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

    @abc.abstractmethod
    def kept(
        self, piece: Piece, wanted: Bool[Array, "B tiles"], dca: DCAConfig
    ) -> Bool[Array, "B K tiles blocks"]:
        """Which blocks each tile of `wanted` keeps, its own and earlier ones.

        What stands for other tiles, and for later blocks, is not looked at.
        """
