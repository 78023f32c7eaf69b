"""Tiles of the Triton kernels by device and head_dim, and the split of a cache's keys."""

import dataclasses

from jax.experimental import pallas as pl

from dca_jax.device import Device

MAX_PACKED = 64  # most queries per kv head, counting its heads, that are packed into one tile
PROGRAMS = 264  # programs of a packed call: two for each of an H200's 132 multiprocessors
SPLIT_KEYS = 256  # fewest keys worth a separate program
MAX_SPLITS = 128  # the merge holds all splits of one query in registers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """A kernel's tile: queries and keys per block, warps per program, buffers of its loop."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """The four kernels' tiles for one kind of device and one head_dim."""

    forward: Tile
    dq: Tile
    dkv: Tile
    decode: Tile  # block_q counts queries times packed heads


def _tile(block_q: int, block_k: int, num_warps: int, num_stages: int) -> Tile:
    return Tile(block_q=block_q, block_k=block_k, num_warps=num_warps, num_stages=num_stages)


# By head_dim; narrower heads use the tiles for 64.
HOPPER = {
    64: Tiles(
        forward=_tile(128, 128, 8, 3),
        dq=_tile(128, 64, 8, 3),
        dkv=_tile(64, 128, 8, 3),
        decode=_tile(16, 128, 4, 3),
    ),
    128: Tiles(
        forward=_tile(128, 128, 8, 3),
        dq=_tile(128, 64, 8, 3),
        dkv=_tile(64, 128, 8, 3),
        decode=_tile(16, 64, 4, 3),
    ),
    256: Tiles(
        forward=_tile(128, 64, 8, 2),
        dq=_tile(64, 64, 8, 2),
        dkv=_tile(64, 64, 8, 2),
        decode=_tile(16, 32, 4, 3),
    ),
}
# For Ampere and Ada; all fit into 99 KiB, as in their smaller chips.
AMPERE = {
    64: Tiles(
        forward=_tile(128, 64, 4, 3),
        dq=_tile(64, 64, 4, 2),
        dkv=_tile(64, 64, 4, 2),
        decode=_tile(16, 128, 4, 2),
    ),
    128: Tiles(
        forward=_tile(128, 32, 4, 3),
        dq=_tile(64, 32, 4, 2),
        dkv=_tile(32, 64, 4, 2),
        decode=_tile(16, 64, 4, 2),
    ),
    256: Tiles(
        forward=_tile(64, 32, 4, 2),
        dq=_tile(32, 32, 4, 2),
        dkv=_tile(32, 32, 4, 2),
        decode=_tile(16, 32, 4, 2),
    ),
}

# KiB of shared memory per program, by compute capability (CUDA C++ Programming Guide).
SHARED_KIB = {
    (8, 0): 163,
    (8, 6): 99,
    (8, 7): 163,
    (8, 9): 99,
    (9, 0): 227,
    (10, 0): 227,
    (10, 3): 227,
}


def choose_tiles(device: Device, head_dim: int) -> Tiles:
    """The tiles for a device and a head_dim."""
    table = HOPPER if device.capability == (9, 0) else AMPERE
    return table[max(head_dim, 64)]


def shared_bytes(tiles: Tiles, head_dim: int, itemsize: int) -> int:
    """Bytes of shared memory of the largest kernel: its own tile and its loop's buffers.

    dkv's loop also has two float32 numbers per query: log-sum-exp and delta.
    """
    token = head_dim * itemsize  # bytes
    return max(
        token * (tiles.forward.block_q + 2 * tiles.forward.num_stages * tiles.forward.block_k),
        token * (2 * tiles.dq.block_q + 2 * tiles.dq.num_stages * tiles.dq.block_k),
        token * 2 * tiles.dkv.block_k + (2 * token + 8) * tiles.dkv.num_stages * tiles.dkv.block_q,
        token * (MAX_PACKED + 2 * tiles.decode.num_stages * tiles.decode.block_k),
    )


def is_packed(num_queries: int, group: int) -> bool:
    """Whether the queries that share a kv head are few enough to be packed into one tile."""
    return num_queries * pl.next_power_of_2(group) <= MAX_PACKED


def splits_of_keys(programs: int, num_keys: int) -> int:
    """Number of splits of a packed call's keys, given that it has `programs` programs anyway.

    The number depends on capacities only; the part that each split reads depends on the lengths.
    """
    return max(min(pl.cdiv(PROGRAMS, programs), num_keys // SPLIT_KEYS, MAX_SPLITS), 1)
