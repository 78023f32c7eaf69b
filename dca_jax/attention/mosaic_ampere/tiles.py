"""Tiles of these kernels by device and head_dim, and the split of a cache's keys."""

import dataclasses

from dca_jax.device import Device

INTERPRET = False  # set by tests to run the kernels on any device, in Pallas' GPU interpreter
MAX_PACKED = 64  # most queries per kv head, counting its heads, that are packed into one tile
CTAS = 264  # of a packed call: two for each of an H200's 132 multiprocessors
SPLIT_KEYS = 256  # fewest keys worth a separate CTA
MAX_SPLITS = 128  # the merge reads all splits of a query


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries and keys that a kernel multiplies at once.

    The rows of a product are a multiple of 64: queries, or keys in the kernel for dk and dv.
    """

    block_q: int
    block_k: int

    def columns(self, head_dim: int) -> int:
        """Columns of dk and dv per CTA: those of 256 do not fit into registers."""
        return min(head_dim, 128)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The kernels' tiles for one kind of device and one head_dim."""

    forward: Tile
    decode: Tile  # block_q counts queries times packed heads
    dq: Tile
    dkv: Tile


# By head_dim: what compiles without spilling registers. None has been timed on such a chip.
TILES = {
    16: Tiles(Tile(128, 64), Tile(64, 128), Tile(64, 64), Tile(64, 64)),
    32: Tiles(Tile(128, 64), Tile(64, 128), Tile(64, 64), Tile(64, 64)),
    64: Tiles(Tile(128, 64), Tile(64, 128), Tile(64, 64), Tile(64, 64)),
    128: Tiles(Tile(128, 32), Tile(64, 64), Tile(64, 32), Tile(32, 64)),
    256: Tiles(Tile(64, 32), Tile(64, 32), Tile(64, 16), Tile(16, 64)),
}
# For Ada and the smaller chips of Ampere, whose multiprocessors have 100 KiB of shared memory.
SMALL_TILES = TILES | {
    64: dataclasses.replace(TILES[64], forward=Tile(128, 32)),
    128: dataclasses.replace(TILES[128], forward=Tile(64, 32)),
}


def choose_tiles(device: Device, head_dim: int) -> Tiles:
    """The tiles for a device and a head_dim."""
    small = device.capability in ((8, 6), (8, 9), (12, 0))
    return (SMALL_TILES if small else TILES)[head_dim]


def is_packed(num_queries: int, group: int) -> bool:
    """Whether the queries that share a kv head are few enough to be packed into one tile."""
    return num_queries * group <= MAX_PACKED


def splits_of_keys(ctas: int, num_keys: int) -> int:
    """Number of splits of a packed call's keys, given that it has `ctas` CTAs anyway.

    The number depends on capacities only; the part that each split reads depends on the lengths.
    """
    return max(min(-(-CTAS // ctas), num_keys // SPLIT_KEYS, MAX_SPLITS), 1)
