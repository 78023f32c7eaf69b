"""Which blocks a tile meets, in which order: written down before a kernel starts.

A tile rests while blocks move past it: a tile of queries meets blocks of keys (forward, dq,
decoding), a block of keys meets tiles of queries (dkv). A *stage* is a run of blocks under one
rotation of the queries (`stages`). Every step of a grid is one word in scalar memory, which says
which block is met, in which stage, and what begins and ends there; so the index maps, which run at
every step, have one word to read.

A lane of the grid walks a pair of tiles, the first with the last: under causal attention all
lanes then have the same number of steps. Shorter lanes repeat their last block, which moves
nothing, and do nothing.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from dca_jax.attention.mosaic_tpu.stages import Stage

# A step's word: its block, the number of its stage, and flags.
STAGE_BIT, STAGES = 16, 256
# Whether it meets its block at all; needs no mask; is the first of its stage, the last; the first
# of its tile, the last; of the lane's second tile.
LIVE, FULL, ENTERS, LEAVES, BEGINS, ENDS, SECOND = (1 << bit for bit in range(24, 31))
BLOCKS = 1 << STAGE_BIT
IDLE = LIVE | ENTERS | LEAVES  # what an idle step has not

# What the kernels know of a stage: its keys' slots [low, high), and the text index from which on
# queries are one chunk behind them.
LOW, HIGH, NEAR = range(3)


class Step(NamedTuple):
    """A word, read."""

    tile: Array
    block: Array
    stage: Array
    numbers: Array  # where `Tables.stages` has the stage's LOW, HIGH and NEAR
    word: Array

    def has(self, flag: int) -> Array:
        """Whether a flag is set."""
        return (self.word & flag) != 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """A grid's lanes, and how to read their words."""

    tiles: int  # of a row of the batch
    lanes: int
    length: int  # words of a lane
    num_stages: int  # of a tile

    def read(self, words: Any, row: Array, lane: Array, step: Array) -> Step:
        """A step of a lane; scalars, in index maps too."""
        word = words[(row * self.lanes + lane) * self.length + step]
        tile = jnp.int32(0)
        if self.tiles > 1:
            tile = jnp.where((word & SECOND) != 0, self.tiles - 1 - lane, lane)
        stage = (word >> STAGE_BIT) & (STAGES - 1)
        numbers = ((row * self.tiles + tile) * self.num_stages + stage) * 3
        return Step(tile, word & (BLOCKS - 1), stage, numbers, word)


class Tables(NamedTuple):
    """What a kernel is given ahead of its grid, in scalar memory (flat: it pads a last axis)."""

    words: Array
    stages: Array  # LOW, HIGH and NEAR of each stage of each tile of each row
    steps: Array  # of the longest lane: the grid's last axis


def pair_up(stages: list[Stage], most: int) -> tuple[Walk, Tables]:
    """Lanes of two tiles each; of an odd number of tiles, the middle one goes alone.

    A tile meets at most `most` blocks.
    """
    tiles = stages[0].begin.shape[1]
    lanes = (tiles + 1) // 2
    length = min(2, tiles) * most
    first, second = (_Tile.of(stages, flip, lanes) for flip in (False, True))
    alone = jnp.arange(lanes, dtype=jnp.int32) * 2 + 1 == tiles
    at = jnp.arange(length, dtype=jnp.int32)[None, None, :]
    end = first.steps
    total = end + jnp.where(alone[None, :, None], 0, second.steps)
    later = (at >= end) & ~alone[None, :, None]
    words = jnp.where(later, second.words(at - end) | SECOND, first.words(at))
    walk = Walk(tiles=tiles, lanes=lanes, length=length, num_stages=len(stages))
    return walk, _tables(words, jnp.max(total), stages)


def num_words(tiles: int, most: int, num_stages: int) -> int:
    """Words of scalar memory that `pair_up` takes for a row of the batch, its stages included."""
    return (tiles + 1) // 2 * min(2, tiles) * most + 3 * tiles * num_stages


def split(stages: list[Stage], most: int, parts: int) -> tuple[Walk, Tables]:
    """The one tile that there is, its steps cut into `parts` lanes of the same length."""
    tile = _Tile.of(stages, False, 1)
    length = -(-most // parts)
    each = jnp.maximum(-(-tile.steps // parts), 1)
    part = jnp.arange(parts, dtype=jnp.int32)[None, :, None]
    at = jnp.arange(length, dtype=jnp.int32)[None, None, :]
    stop = jnp.minimum((part + 1) * each, tile.steps)
    words = tile.words(jnp.minimum(part * each + at, stop - 1))
    words = jnp.where(part * each + at < stop, words, words & ~IDLE)
    words &= ~(BEGINS | ENDS)
    words |= jnp.where(at == 0, BEGINS | ENTERS, 0) | jnp.where(at == each - 1, ENDS, 0)
    walk = Walk(tiles=1, lanes=parts, length=length, num_stages=len(stages))
    return walk, _tables(words, jnp.max(each), stages)


def _tables(words: Array, steps: Array, stages: list[Stage]) -> Tables:
    numbers = [jnp.stack([stage.low, stage.high, stage.near], axis=-1) for stage in stages]
    return Tables(words.reshape(-1), jnp.stack(numbers, axis=2).reshape(-1), steps)


class _Tile(NamedTuple):
    """A tile of each lane [B, lanes, 1], and its stages [B, lanes, 1, stages]."""

    steps: Array
    begin: Array  # first step of each stage
    end: Array
    shift: Array  # number of a step's block, less that of the step
    full_begin: Array  # blocks that need no mask
    full_end: Array

    @classmethod
    def of(cls, stages: list[Stage], flip: bool, lanes: int) -> "_Tile":
        def stacked(name: str) -> Array:
            x = jnp.stack([getattr(stage, name) for stage in stages], axis=-1)
            return (x[:, ::-1] if flip else x)[:, :lanes, None, :]

        count = stacked("end") - stacked("begin")
        end = jnp.cumsum(count, axis=-1, dtype=jnp.int32)
        return cls(
            steps=jnp.maximum(end[..., -1], 1),
            begin=end - count,
            end=end,
            shift=stacked("begin") - (end - count),
            full_begin=stacked("full_begin"),
            full_end=stacked("full_end"),
        )

    def words(self, at: Array) -> Array:
        """Words of the tile's steps `at` [B, lanes, length]; beyond the last, it again, idle."""
        inside = jnp.clip(at, 0, self.steps - 1)[..., None]
        here = (self.begin <= inside) & (inside < self.end)
        block = inside + self.shift
        full = (self.full_begin <= block) & (block < self.full_end)
        number = jnp.arange(here.shape[-1], dtype=jnp.int32)[None, None, None, :]
        word = block + (number << STAGE_BIT) + jnp.where(full, FULL, 0)
        word += LIVE + jnp.where(inside == self.begin, ENTERS, 0)
        word += jnp.where(inside == self.end - 1, LEAVES, 0)
        word = jnp.sum(jnp.where(here, word, 0), axis=-1, dtype=jnp.int32)
        word += jnp.where(at == 0, BEGINS, 0) + jnp.where(at == self.steps - 1, ENDS, 0)
        return jnp.where(at < self.steps, word, word & ~IDLE)
