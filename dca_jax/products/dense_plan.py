"""How products of a few rows with dense matrices are divided (`dca_jax.products.dense_rows`)."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from dca_jax.device import MULTIPROCESSORS, SHARED_BYTES

ROWS = 8  # columns of WGMMA's right operand, at least
TILES, STEP = (256, 128, 64), 64  # outputs of a tile (of both matrices if gated); inputs of a step
SPLITS = (1, 2, 4, 8)  # CTAs of a cluster
STAGES = 3  # steps in flight, at least
BUSY, SHARE = 64, 2**19  # CTAs that keep the memory busy; bytes for which one more is worth while
MARGIN = 16384  # bytes of shared memory for sums, barriers and reductions


class Plan(NamedTuple):
    """How a product is divided.

    Attributes:
        tile: outputs of a tile.
        splits: CTAs that share a tile's inputs.
        stages: number of steps in flight.
    """

    tile: int
    splits: int
    stages: int


def choose_plan(inputs: int, widths: Sequence[int], *, gated: bool = False) -> Plan | None:
    """A plan for these sizes; None if no tile divides them or shared memory is too small.

    All CTAs run at once if they can. There are `BUSY` of them, or more if each still reads `SHARE`
    bytes: the sums of a cluster cost time too. Of as many CTAs, those with the widest tiles have
    the longest runs of memory to read (measured on an H200).
    """
    found, each = [], 1 + gated
    useful = max(BUSY, 2 * inputs * sum(widths) // SHARE)
    for wide, splits in itertools.product(TILES, SPLITS):
        tile, part = wide // each, inputs // splits
        ctas = sum(widths) // wide * splits
        stages = min((SHARED_BYTES - MARGIN - part * ROWS * 2) // (wide * STEP * 2), part // STEP)
        divided = inputs % math.lcm(splits * STEP, 128) == 0 and math.gcd(tile, *widths) == tile
        if divided and tile >= TILES[-1] and stages >= STAGES:
            rounds = -(-ctas // MULTIPROCESSORS)
            found.append((rounds, -min(ctas, useful), ctas, -tile, Plan(tile, splits, stages)))
    return min(found)[-1] if found else None
