"""How products of a few rows with dense matrices are divided (`dca_jax.products.dense_rows`)."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from dca_jax.device import MULTIPROCESSORS, SHARED_BYTES

ROWS = 8  # columns of WGMMA's right operand, at least
TILES, STEP = (256, 128, 64), 64  # outputs of a tile (of both matrices if gated); inputs of a step
SPLITS = (1, 2, 4)  # CTAs of a cluster
FOURS = 96  # CTAs that run at once in clusters of four, which leave some multiprocessors idle
BUSY = 64  # CTAs that keep the memory busy
# Steps that a CTA must keep in flight to do so, and their bytes.
STAGES, IN_FLIGHT = 3, 65536
MARGIN = 16384  # bytes of shared memory for results, barriers and reductions


class Plan(NamedTuple):
    """How a product is divided.

    Attributes:
        tile: outputs of a tile, in each of its matrices.
        splits: CTAs of a cluster, which share a tile's inputs.
        stages: number of steps in flight.
    """

    tile: int
    splits: int
    stages: int


def choose_plan(
    inputs: int, widths: Sequence[int], *, gated: bool = False, norm: bool = False
) -> Plan | None:
    """A plan for these sizes; None if no tile divides them or shared memory is too small.

    All CTAs run at once if they can, and there are `BUSY` of them. Of several such plans, the one
    with the widest tile has the longest runs of memory to read, and the one with the fewest splits
    the fewest sums to exchange (measured on an H200).
    """
    found, each = [], 1 + gated
    for wide, splits in itertools.product(TILES, SPLITS):
        tile, ctas, part = wide // each, sum(widths) // wide * splits, inputs // splits
        sums = (splits - 1) * wide * ROWS * 4
        room = SHARED_BYTES - MARGIN - sums - (part * ROWS * 2 if norm else 0)
        step = wide * STEP * 2
        stages = min(room // (step + (0 if norm else ROWS * STEP * 2)), part // STEP)
        divided = inputs % 128 == part % STEP == 0 and math.gcd(tile, *widths) == tile
        enough = stages >= STAGES and stages * step >= min(IN_FLIGHT, part // STEP * step)
        if divided and enough and tile >= TILES[-1]:
            rounds = -(-ctas // (MULTIPROCESSORS if splits < 4 else FOURS))
            found.append((rounds, -min(ctas, BUSY), -tile, splits, Plan(tile, splits, stages)))
    return min(found)[-1] if found else None
