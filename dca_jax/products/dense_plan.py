"""How products of a few rows with dense matrices are divided (`dca_jax.products.dense_rows`)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from dca_jax.device import MULTIPROCESSORS, SHARED_BYTES

ROWS = 8  # columns of WGMMA's right operand, at least
TILES, STEP = (256, 128, 64), 64  # outputs of a tile (of both matrices if gated); inputs of a step
BUSY = 64  # CTAs that keep the memory busy
# Steps that a CTA must keep in flight to do so, and their bytes.
STAGES, IN_FLIGHT = 3, 65536
MARGIN = 16384  # bytes of shared memory for results, barriers and reductions


class Plan(NamedTuple):
    """How a product is divided.

    Attributes:
        tile: outputs of a tile, each of which is a CTA's.
        stages: number of steps in flight.
    """

    tile: int
    stages: int


def choose_plan(inputs: int, widths: Sequence[int], *, gated: bool = False) -> Plan | None:
    """A plan for these sizes; None if no tile divides them or shared memory is too small.

    All CTAs run at once if they can, and there are `BUSY` of them. Of several such plans, the one
    with the widest tile has the longest runs of memory to read (measured on an H200).
    """
    found, each = [], 1 + gated
    for wide in TILES:
        tile, ctas, step = wide // each, sum(widths) // wide, wide * STEP * 2
        stages = min((SHARED_BYTES - MARGIN - inputs * ROWS * 2) // step, inputs // STEP)
        divided = inputs % 128 == 0 and math.gcd(tile, *widths) == tile and tile >= TILES[-1]
        enough = stages >= STAGES and stages * step >= min(IN_FLIGHT, inputs // STEP * step)
        if divided and enough:
            rounds = -(-ctas // MULTIPROCESSORS)
            found.append((rounds, -min(ctas, BUSY), ctas, Plan(tile, stages)))
    return min(found)[-1] if found else None
