"""How heads share the 128 lanes of a vector register: heads of 64 are packed in pairs."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """The query and kv heads of an attention, and the packs in which a kernel processes them.

    With head_dim 128 or 256 a pack is a single head. Narrower heads are packed in pairs (or all of
    them, where their number is odd). Each query head then occupies the lanes of its kv head in a
    block as wide as the pack of kv heads, with zeros in the other lanes, so that products with the
    whole pack involve its own kv head only.
    """

    query: int
    kv: int
    head_dim: int

    @property
    def q_per_pack(self) -> int:
        """Query heads in a pack."""
        return _pack_size(self.query, self.head_dim)

    @property
    def kv_per_pack(self) -> int:
        """kv heads in a pack."""
        return _pack_size(self.kv, self.head_dim)

    @property
    def q_packs(self) -> int:
        """Packs of query heads."""
        return self.query // self.q_per_pack

    @property
    def kv_packs(self) -> int:
        """Packs of kv heads."""
        return self.kv // self.kv_per_pack

    @property
    def q_packs_per_kv_pack(self) -> int:
        """Packs of query heads that read the same pack of kv heads."""
        return self.q_packs // self.kv_packs

    @property
    def kv_width(self) -> int:
        """Lanes of a pack of kv heads."""
        return self.kv_per_pack * self.head_dim

    @property
    def q_width(self) -> int:
        """Lanes of a pack of query heads."""
        return self.q_per_pack * self.head_dim

    def kv_lanes(self, q_pack: Array, head: int) -> Any:
        """The lanes, in its pack, of the kv head that query head `head` of `q_pack` reads."""
        if self.kv_per_pack == 1:
            return pl.ds(0, self.head_dim)
        query_head = q_pack * self.q_per_pack + head
        kv_head = lax.div(query_head, jnp.int32(self.query // self.kv))
        lane = lax.rem(kv_head, jnp.int32(self.kv_per_pack)) * self.head_dim
        return pl.ds(pl.multiple_of(lane, self.head_dim), self.head_dim)

    def store_expanded(self, ref: Any, x: Array, q_pack: Array) -> None:
        """Stores x [q_width, q] in ref [q_per_pack, kv_width, q], each head at its `kv_lanes`."""
        if self.kv_per_pack > 1:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)
        for head in range(self.q_per_pack):
            own = x[head * self.head_dim : (head + 1) * self.head_dim]
            ref[head, self.kv_lanes(q_pack, head), :] = own.astype(ref.dtype)


def _pack_size(heads: int, head_dim: int) -> int:
    if head_dim % LANES == 0 or heads == 1:
        return 1
    return 2 if heads % 2 == 0 else heads
