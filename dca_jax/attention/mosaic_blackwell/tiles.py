"""Sizes of Blackwell's forward kernel, and the memory that they take."""

TILE_Q = 128  # queries per warpgroup: the rows of tensor memory
TILES_PER_CTA = 2  # in ping-pong, each computed by a warpgroup of its own
BLOCK_Q = TILE_Q * TILES_PER_CTA
BLOCK_K = 128  # keys per step: a tile's logits are this many columns of tensor memory
TMEM_COLUMNS = 512  # of 32 bits in each row (PTX ISA, "Tensor Memory")

# Blocks of keys, and of values, in flight, by head_dim. Nobody has timed other numbers: with these,
# queries, keys and values take 192 KiB (128) or 160 KiB (64) of 227.
STAGES = {64: 4, 128: 2}


def tmem_columns(head_dim: int) -> int:
    """Columns of tensor memory per CTA: each tile's logits, whose place weights take, and sum."""
    return TILES_PER_CTA * (BLOCK_K + head_dim)
