"""Sizes of Blackwell's forward kernel, and the memory that they take."""

from dataclasses import dataclass

TILE_Q = 128  # queries per warpgroup: the rows of tensor memory
TILES_PER_CTA = 2  # in ping-pong, each computed by a warpgroup of its own
BLOCK_Q = TILE_Q * TILES_PER_CTA
BLOCK_K = 128  # keys per step: a tile's logits are this many columns of tensor memory

TMEM_COLUMNS = 512  # of 32 bits, in each of 128 rows (PTX ISA, tensor memory)
RESERVED = 3 * 1024  # bytes for log-sum-exp, walks and barriers, each aligned to a KiB


@dataclass(frozen=True)
class ForwardTiles:
    """Sizes of the forward kernel.

    Attributes:
        num_stages: number of blocks of keys, and of values, in flight.
    """

    num_stages: int

    def shared_bytes(self, head_dim: int) -> int:
        """Bytes of shared memory per CTA: one rotation of the queries, and the stages."""
        queries = BLOCK_Q * head_dim * 2
        keys_values = 2 * self.num_stages * BLOCK_K * head_dim * 2
        return queries + keys_values + RESERVED


def tmem_columns(head_dim: int) -> int:
    """Columns of tensor memory per CTA: each tile's logits, over them its weights, and output."""
    return TILES_PER_CTA * (BLOCK_K + head_dim)


# By head_dim. Nobody has timed these: they are the largest numbers of stages that fit (128), or
# that keep as many bytes in flight (64).
TILES = {64: ForwardTiles(num_stages=4), 128: ForwardTiles(num_stages=2)}
