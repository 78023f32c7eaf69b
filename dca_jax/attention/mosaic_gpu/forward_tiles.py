"""Block sizes of Hopper's forward kernel."""

from dataclasses import dataclass

WARPGROUP_Q = 64  # queries per warpgroup: the rows of one WGMMA
WARPGROUPS = 2  # computing warpgroups of most tiles; one more feeds them
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
        warpgroups: number of computing warpgroups: 2, or 3 if they run ahead; with lists, pages and
            bands 2.
        ahead: whether a block's logits are computed with the previous block's values, and the
            warpgroups run freely; else two warpgroups take turns. Only if resident, and not with
            lists, pages and bands.
        persistent: whether there are as many CTAs as run at once, each of which processes several
            tiles of queries: the next one's keys are in flight while the last one's output is
            written. Not with lists, pages and bands.
    """

    block_k: int
    num_stages: int
    resident: bool
    registers: int
    cluster: int
    warpgroups: int = 2
    ahead: bool = False
    persistent: bool = False

    @property
    def block_q(self) -> int:
        """Queries per CTA."""
        return WARPGROUP_Q * self.warpgroups

    @property
    def registers_per_thread(self) -> tuple[int, int]:
        """Of a computing thread, and of one that feeds; all must fit into the CTA's at launch."""
        return (232, 40) if self.warpgroups == 2 else (160, 32)

    def shared_bytes(self, head_dim: int, rotations: int) -> int:
        """Bytes of shared memory per CTA."""
        queries = (rotations if self.resident else 1) * self.block_q * head_dim * 2
        keys_values = 2 * self.num_stages * self.block_k * head_dim * 2
        return queries + keys_values + RESERVED


RESERVED = 3 * 1024  # for log-sum-exp, walks and barriers, each aligned to a KiB

# By head_dim, for all phases, the fastest of a few tried by hand on an H200.
TILES = {
    64: ForwardTiles(
        block_k=128,
        num_stages=3,
        resident=True,
        registers=0,
        cluster=2,
        warpgroups=3,
        ahead=True,
        persistent=True,
    ),
    128: ForwardTiles(
        block_k=128,
        num_stages=2,
        resident=True,
        registers=128,
        cluster=2,
        ahead=True,
        persistent=True,
    ),
    256: ForwardTiles(
        block_k=64, num_stages=2, resident=False, registers=64, cluster=2, persistent=True
    ),
}
# For one or two of the phases.
PASS_TILES = TILES | {
    256: ForwardTiles(
        block_k=64, num_stages=2, resident=False, registers=0, cluster=2, persistent=True
    )
}
# For pages that the blocks divide.
PAGE_TILES = {
    64: ForwardTiles(block_k=256, num_stages=2, resident=True, registers=0, cluster=2),
    128: ForwardTiles(block_k=128, num_stages=2, resident=True, registers=128, cluster=2),
    256: ForwardTiles(block_k=64, num_stages=2, resident=False, registers=0, cluster=2),
}
# For lists and pages: blocks that divide 128 keys.
LIST_TILES = PAGE_TILES | {
    64: ForwardTiles(block_k=128, num_stages=4, resident=True, registers=0, cluster=2)
}
# For a band of a method other than DCA: queries have one rotation, which is resident.
BAND_TILES = PAGE_TILES | {
    256: ForwardTiles(block_k=64, num_stages=2, resident=True, registers=0, cluster=2)
}
# For a band with positions in steps: two rotations, and logits for both.
STEP_TILES = {
    64: ForwardTiles(block_k=128, num_stages=4, resident=True, registers=0, cluster=2),
    128: ForwardTiles(block_k=128, num_stages=2, resident=True, registers=0, cluster=2),
    256: ForwardTiles(block_k=64, num_stages=1, resident=True, registers=0, cluster=2),
}
