"""Block sizes of Hopper's forward kernel."""

from dataclasses import dataclass

WARPGROUP_Q = 64  # queries per warpgroup: the rows of one WGMMA
WARPGROUPS = 2  # computing warpgroups; one more feeds them
BLOCK_Q = WARPGROUP_Q * WARPGROUPS


@dataclass(frozen=True)
class ForwardTiles:
    """Block sizes of the forward kernel.

    Attributes:
        block_k: keys per step; a multiple of 64.
        num_stages: number of blocks of keys and values in flight.
        resident: whether all rotations of the query stay in shared memory, and the kernel computes
            those for DCA's phases; else they are computed outside and loaded phase by phase.
        registers: number of columns of the query, a multiple of 64, that are multiplied from
            registers if no mask is needed; the others, and all with a mask, from shared memory.
        cluster: number of query heads of one kv head that share their reads (1 or 2).
    """

    block_k: int
    num_stages: int
    resident: bool
    registers: int
    cluster: int

    def shared_bytes(self, head_dim: int, rotations: int) -> int:
        """Bytes of shared memory per CTA."""
        queries = (rotations if self.resident else 1) * BLOCK_Q * head_dim * 2
        keys_values = 2 * self.num_stages * self.block_k * head_dim * 2
        return queries + keys_values + RESERVED


RESERVED = 3 * 1024  # for log-sum-exp, walks and barriers, each aligned to a KiB

# By head_dim, the fastest of a few tried by hand on an H200; 256: the first that fits.
TILES = {
    64: ForwardTiles(block_k=256, num_stages=2, resident=True, registers=0, cluster=2),
    128: ForwardTiles(block_k=128, num_stages=2, resident=True, registers=128, cluster=2),
    256: ForwardTiles(block_k=64, num_stages=2, resident=False, registers=0, cluster=2),
}
# For lists and pages: blocks that divide 128 keys.
LIST_TILES = TILES | {
    64: ForwardTiles(block_k=128, num_stages=4, resident=True, registers=0, cluster=2)
}
# For a band of a method other than DCA: queries have one rotation, which is resident.
BAND_TILES = TILES | {
    256: ForwardTiles(block_k=64, num_stages=2, resident=True, registers=0, cluster=2)
}
# For a band with positions in steps: two rotations, and logits for both.
STEP_TILES = {
    64: ForwardTiles(block_k=128, num_stages=4, resident=True, registers=0, cluster=2),
    128: ForwardTiles(block_k=128, num_stages=2, resident=True, registers=0, cluster=2),
    256: ForwardTiles(block_k=64, num_stages=1, resident=True, registers=0, cluster=2),
}
