"""How heads share the lanes of a block: a head of 64 fills half of the 128."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """Query heads and kv heads that go through a kernel together.

    With head_dim 128 or 256 a tile has one query head, and a block one kv head. Narrower heads go
    in pairs (or all together, where their number is odd); each query head then lies in the lanes
    of its kv head, the others zero, so that products with the whole block are its own.
    """

    query: int
    kv: int
    head_dim: int

    @property
    def together(self) -> int:
        """Query heads of one tile."""
        return _fill(self.query, self.head_dim)

    @property
    def kv_together(self) -> int:
        """kv heads of one block of lanes."""
        return _fill(self.kv, self.head_dim)

    @property
    def tiles(self) -> int:
        """Tiles that all query heads make."""
        return self.query // self.together

    @property
    def kv_blocks(self) -> int:
        """Blocks that all kv heads make."""
        return self.kv // self.kv_together

    @property
    def group(self) -> int:
        """Tiles of query heads that read one block of kv heads."""
        return self.tiles // self.kv_blocks

    @property
    def width(self) -> int:
        """Lanes of a block of keys."""
        return self.kv_together * self.head_dim

    @property
    def query_width(self) -> int:
        """Lanes of a tile of queries."""
        return self.together * self.head_dim

    def place(self, tile: Array, number: int) -> Any:
        """The lanes, in its block, of the kv head that query head `number` of a tile reads."""
        if self.kv_together == 1:
            return pl.ds(0, self.head_dim)
        head = tile * self.together + number
        kv_head = lax.div(head, jnp.int32(self.query // self.kv))
        lane = lax.rem(kv_head, jnp.int32(self.kv_together)) * self.head_dim
        return pl.ds(pl.multiple_of(lane, self.head_dim), self.head_dim)

    def put(self, ref: Any, x: Array, tile: Array) -> None:
        """Puts a tile's heads [together * H, q] into [together, width, q], each at its place."""
        if self.kv_together > 1:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)
        for number in range(self.together):
            own = x[number * self.head_dim : (number + 1) * self.head_dim]
            ref[number, self.place(tile, number), :] = own.astype(ref.dtype)


def _fill(heads: int, head_dim: int) -> int:
    if head_dim % LANES == 0 or heads == 1:
        return 1
    return 2 if heads % 2 == 0 else heads
