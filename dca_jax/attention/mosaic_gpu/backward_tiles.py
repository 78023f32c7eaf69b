"""Block sizes of the backward kernel on Hopper, and derived sizes."""

from dataclasses import dataclass

from dca_jax.errors import InputError

WARPGROUP_KEYS = 64  # keys a warpgroup multiplies at once: the rows of a WGMMA accumulator
WARPGROUPS = 2  # computing warpgroups; one more moves data


@dataclass(frozen=True)
class BackwardTiles:
    """Block sizes of the backward kernel.

    Attributes:
        block_q: queries per step; a multiple of 64.
        block_kv: keys per CTA. With 128, each computing warpgroup has 64 of them. With 64, both
            have all of them and split the columns of dK and dV, for a head_dim whose dK and dV of
            64 keys do not fit into registers.
        num_stages: number of query tiles in shared memory; at least 2, because a step starts the
            next one's product before it releases its own queries.
        num_do_stages: number of tiles of the output's gradient in shared memory.
    """

    block_q: int
    block_kv: int
    num_stages: int
    num_do_stages: int

    def shared_bytes(self, head_dim: int) -> int:
        """Bytes of shared memory per CTA."""
        keys = 2 * self.block_kv * head_dim * 2
        queries = self.block_q * (
            (self.num_stages + self.num_do_stages) * head_dim * 2 + self.num_stages * 8
        )
        ds = 2 * self.block_kv * self.block_q * 2
        return keys + queries + ds + WARPGROUPS * WARPGROUP_KEYS * 64 * 4 + RESERVED


RESERVED = 2048  # bytes for barriers and alignment

# By head_dim, measured on an H200.
TILES = {
    64: BackwardTiles(block_q=128, block_kv=128, num_stages=2, num_do_stages=2),
    128: BackwardTiles(block_q=64, block_kv=128, num_stages=2, num_do_stages=2),
    256: BackwardTiles(block_q=64, block_kv=64, num_stages=2, num_do_stages=1),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes that are known when the kernel is built."""

    head_dim: int
    group: int  # query heads per kv head
    block_q: int
    block_kv: int
    num_stages: int
    num_do_stages: int
    by_keys: bool  # whether the warpgroups split the keys; else the columns of dK and dV
    columns: int  # columns of dK and dV per warpgroup
    parts: int  # 64 x 64 pieces of a tile of dQ per warpgroup

    @classmethod
    def of(cls, tiles: BackwardTiles, head_dim: int, group: int) -> "Sizes":
        """Derives the sizes from the tiles.

        Raises:
            InputError: the warpgroups cannot split the tiles, or would deadlock.
        """
        by_keys = tiles.block_kv == WARPGROUPS * WARPGROUP_KEYS
        columns = head_dim if by_keys else head_dim // WARPGROUPS
        pieces = tiles.block_q // 64 * (head_dim // 64)
        if tiles.num_stages < 2:
            raise InputError(f"{tiles} must have two stages or more")
        if (
            tiles.block_kv not in (WARPGROUP_KEYS, WARPGROUPS * WARPGROUP_KEYS)
            or columns % 64
            or pieces % WARPGROUPS
        ):
            raise InputError(f"{tiles} cannot be split for head_dim {head_dim}")
        return cls(
            head_dim=head_dim,
            group=group,
            block_q=tiles.block_q,
            block_kv=tiles.block_kv,
            num_stages=tiles.num_stages,
            num_do_stages=tiles.num_do_stages,
            by_keys=by_keys,
            columns=columns,
            parts=pieces // WARPGROUPS,
        )
