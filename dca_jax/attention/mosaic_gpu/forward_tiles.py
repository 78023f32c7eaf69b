"""Block sizes of Hopper's forward kernel."""

from dataclasses import dataclass

WARPGROUP_Q = 64  # queries a warpgroup: what one WGMMA multiplies at once
WARPGROUPS = 2  # that compute; one more feeds them
BLOCK_Q = WARPGROUP_Q * WARPGROUPS


@dataclass(frozen=True)
class ForwardTiles:
    """Block sizes of the forward kernel.

    Attributes:
        block_k: keys a step; a multiple of 64.
        num_stages: blocks of keys and values in flight.
        resident: all rotations of the query stay in shared memory, those for DCA's phases made in
            the kernel; else it is rotated outside, and each phase's is fetched when needed.
        registers: columns of the query that are multiplied from registers where no mask is needed,
            a multiple of 64; the rest, and all where there is a mask, from shared memory.
        cluster: query heads of one kv head that share what they read (1 or 2).
    """

    block_k: int
    num_stages: int
    resident: bool
    registers: int
    cluster: int

    def shared_bytes(self, head_dim: int, rotations: int) -> int:
        """Shared memory a CTA needs, in bytes."""
        queries = (rotations if self.resident else 1) * BLOCK_Q * head_dim * 2
        keys_values = 2 * self.num_stages * self.block_k * head_dim * 2
        return queries + keys_values + RESERVED


RESERVED = 3 * 1024  # for the log-sum-exp, the walks and the barriers: each begins a KiB

# By head_dim, the fastest of a few tried by hand on an H200; 256: the first that fits.
TILES = {
    64: ForwardTiles(block_k=256, num_stages=2, resident=True, registers=0, cluster=2),
    128: ForwardTiles(block_k=128, num_stages=2, resident=True, registers=128, cluster=2),
    256: ForwardTiles(block_k=64, num_stages=2, resident=False, registers=0, cluster=2),
}
# Over lists and through pages: blocks that divide 128 keys.
LIST_TILES = TILES | {
    64: ForwardTiles(block_k=128, num_stages=4, resident=True, registers=0, cluster=2)
}
# Of a band of another method than DCA: the queries have one rotation, and all stay.
BAND_TILES = TILES | {
    256: ForwardTiles(block_k=64, num_stages=2, resident=True, registers=0, cluster=2)
}
# Of a band whose positions go by steps: two rotations, and logits at both.
STEP_TILES = {
    64: ForwardTiles(block_k=128, num_stages=4, resident=True, registers=0, cluster=2),
    128: ForwardTiles(block_k=128, num_stages=2, resident=True, registers=0, cluster=2),
    256: ForwardTiles(block_k=64, num_stages=1, resident=True, registers=0, cluster=2),
}
