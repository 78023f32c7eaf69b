"""Block sizes of the decode kernel on Hopper, and the shapes that it supports."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from dca_jax.attention.stored import is_quantized
from dca_jax.device import MULTIPROCESSORS, SHARED_BYTES

RESERVED = 4096  # bytes of shared memory, for reductions across warps, barriers and alignment


@dataclass(frozen=True)
class DecodeTiles:
    """The division of the work.

    Attributes:
        block: keys per step; a multiple of 64.
        num_stages: blocks of keys, and of values, in flight; fewer if queries need the memory.
        ctas: total number of CTAs for all kv heads: one for each multiprocessor of the device.
        max_shares: most CTAs per kv head: each one makes the merge longer.
    """

    block: int
    num_stages: int
    ctas: int = MULTIPROCESSORS
    max_shares: int = 64

    def shared_bytes(self, columns: int, head_dim: int, phases: int, *, quantized: bool) -> int:
        """Bytes of shared memory per CTA."""
        queries = phases * columns * (head_dim * 2 + 2 * 4)
        token = 2 * (head_dim + 4 if quantized else head_dim * 2)
        keys_values = self.num_stages * self.block * token
        results = columns * (self.block * 2 + head_dim * 4 + 2 * 4)
        return queries + keys_values + results + RESERVED


# By head_dim, measured on an H200.
TILES = {
    64: DecodeTiles(block=128, num_stages=6),
    128: DecodeTiles(block=128, num_stages=3),
    256: DecodeTiles(block=64, num_stages=3),
}
# For 8-bit keys and values.
QUANTIZED_TILES = {
    64: DecodeTiles(block=128, num_stages=4, ctas=2 * MULTIPROCESSORS),
    128: DecodeTiles(block=64, num_stages=4, ctas=2 * MULTIPROCESSORS),
    256: DecodeTiles(block=64, num_stages=4),
}


def fits(query: jax.ShapeDtypeStruct, key: jax.ShapeDtypeStruct) -> bool:
    """Whether `decode` supports these shapes: few queries per row, and a capacity TMA can tile."""
    num_queries, num_heads, head_dim = query.shape[1:]
    capacity, kv_heads = key.shape[2:4]
    columns, quantized = columns_of(num_queries, num_heads // kv_heads), is_quantized(key.dtype)
    tiles = (QUANTIZED_TILES if quantized else TILES).get(head_dim)
    return (
        query.dtype in (jnp.bfloat16, jnp.float16)
        and capacity % 8 == 0
        and columns <= 64
        and tiles is not None
        and fitting(tiles, columns, head_dim, phases=3, quantized=quantized) is not None
    )


def columns_of(num_queries: int, group: int) -> int:
    """Number of queries that share a kv head, rounded up to WGMMA's steps of 8."""
    return -(-num_queries * group // 8) * 8


def fitting(
    tiles: DecodeTiles, columns: int, head_dim: int, phases: int, *, quantized: bool
) -> DecodeTiles | None:
    """`tiles` with as many stages as fit into shared memory; None if not even two fit."""
    for num_stages in range(tiles.num_stages, 1, -1):
        fewer = replace(tiles, num_stages=num_stages)
        needed = fewer.shared_bytes(columns, head_dim, phases, quantized=quantized)
        if needed <= SHARED_BYTES:
            return fewer
    return None
