"""Block sizes of the fused backward kernel on Hopper, and derived sizes."""

from dataclasses import dataclass

from dca_jax.errors import InputError

WARPGROUP_KEYS = 64  # keys a warpgroup multiplies at once: the rows of a WGMMA accumulator
WARPGROUPS = 2  # computing warpgroups; one more moves data
BLOCK_KV = WARPGROUPS * WARPGROUP_KEYS  # keys per CTA of the fused kernel


@dataclass(frozen=True)
class BackwardTiles:
    """Block sizes of the fused kernel.

    Attributes:
        block_q: queries per step; a multiple of 64.
        num_stages: number of query tiles in shared memory; at least 2, because a step starts the
            next one's product before it releases its own queries.
        num_do_stages: number of tiles of the output's gradient in shared memory.
    """

    block_q: int
    num_stages: int
    num_do_stages: int

    def shared_bytes(self, head_dim: int) -> int:
        """Bytes of shared memory per CTA."""
        keys = 2 * BLOCK_KV * head_dim * 2
        queries = self.block_q * (
            (self.num_stages + self.num_do_stages) * head_dim * 2 + self.num_stages * 8
        )
        ds = 2 * BLOCK_KV * self.block_q * 2
        return keys + queries + ds + WARPGROUPS * WARPGROUP_KEYS * 64 * 4 + RESERVED


RESERVED = 2048  # bytes for barriers, alignment

# By head_dim, measured on an H200.
TILES = {
    64: BackwardTiles(block_q=128, num_stages=2, num_do_stages=2),
    128: BackwardTiles(block_q=64, num_stages=2, num_do_stages=2),
}


def shared_bytes(head_dim: int) -> int:
    """Bytes of shared memory per CTA of the backward kernels."""
    if head_dim in TILES:
        return TILES[head_dim].shared_bytes(head_dim)
    # K and V, two stages of queries and output gradients, and P twice; or 128 queries and output
    # gradients, two stages of keys and one of values.
    return max(6 * head_dim + 2 * 64, 7 * head_dim) * 64 * 2 + RESERVED


@dataclass(frozen=True)
class Sizes:
    """Sizes that are known when the fused kernel is built."""

    head_dim: int
    group: int  # query heads per kv head
    block_q: int
    num_stages: int
    num_do_stages: int
    parts: int  # 64 x 64 pieces of a tile of dQ per warpgroup

    @classmethod
    def of(cls, tiles: BackwardTiles, head_dim: int, group: int) -> "Sizes":
        """Derives the sizes from the tiles.

        Raises:
            InputError: the warpgroups cannot split the tiles, or would deadlock.
        """
        pieces = tiles.block_q // 64 * (head_dim // 64)
        if tiles.num_stages < 2:
            raise InputError(f"{tiles} must have two stages or more")
        if pieces % WARPGROUPS:
            raise InputError(f"{tiles} cannot be split for head_dim {head_dim}")
        return cls(
            head_dim=head_dim,
            group=group,
            block_q=tiles.block_q,
            num_stages=tiles.num_stages,
            num_do_stages=tiles.num_do_stages,
            parts=pieces // WARPGROUPS,
        )
