"""The steps of a kernel's grid, written to scalar memory before the kernel starts.

A kernel keeps an outer block in VMEM and loops over inner blocks: an outer block of queries loops
over blocks of keys (forward, dq, decoding), an outer block of keys over blocks of queries (dkv).
Each step of the grid is one int32 word: which inner block it loads, in which run (see `runs`), and
flags for the work at the ends of runs and of outer blocks. An index map, which is evaluated at
every step, reads just this word.

The grid has an axis of workers and, last, an axis of steps. A worker processes two outer blocks,
the first block paired with the last and so on: under causal attention all workers then have the
same number of steps. Workers with fewer steps end with idle ones, which name the last block again,
so that nothing is loaded.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from dca_jax.attention.mosaic_tpu.runs import Run

# A word: bits 0 to 15 are the inner block, 16 to 23 the number of its run, the rest flags.
RUN_BIT, MAX_RUNS = 16, 256
MAX_BLOCKS = 1 << RUN_BIT
(
    ACTIVE,  # computes something; else the step is idle
    FULL,  # needs no mask
    RUN_BEGIN,  # the first step of a run
    RUN_END,
    BLOCK_BEGIN,  # the first step of an outer block
    BLOCK_END,
    SECOND,  # works on the second outer block of its worker
) = (1 << bit for bit in range(24, 31))
_NOT_IDLE = ACTIVE | RUN_BEGIN | RUN_END

# What the kernels read about a run; see `Run`.
KEY_BEGIN, KEY_END, SUCC_BEGIN = range(3)


class Step(NamedTuple):
    """A decoded step; scalars."""

    outer: Array  # number of the outer block
    inner: Array  # number of the inner block
    run: Array
    run_index: Array  # where `Tables.runs` has the run's KEY_BEGIN, KEY_END and SUCC_BEGIN
    word: Array

    def has(self, flag: int) -> Array:
        """Whether a flag is set."""
        return (self.word & flag) != 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """The static sizes of a grid's steps, and how to decode their words."""

    num_outer: int  # outer blocks of a row of the batch
    num_workers: int
    max_steps: int  # words for each worker
    num_runs: int  # for each outer block

    def read(self, words: Any, row: Array, worker: Array, step: Array) -> Step:
        """Decodes a step of a worker; also inside index maps."""
        word = words[(row * self.num_workers + worker) * self.max_steps + step]
        outer = jnp.int32(0)
        if self.num_outer > 1:
            outer = jnp.where((word & SECOND) != 0, self.num_outer - 1 - worker, worker)
        run = (word >> RUN_BIT) & (MAX_RUNS - 1)
        run_index = ((row * self.num_outer + outer) * self.num_runs + run) * 3
        return Step(outer, word & (MAX_BLOCKS - 1), run, run_index, word)


class Tables(NamedTuple):
    """The scalar-prefetch arguments (flat, as a last axis would be padded), and the grid's size."""

    words: Array
    runs: Array  # KEY_BEGIN, KEY_END and SUCC_BEGIN of each run of each outer block of each row
    num_steps: Array  # of the worker with most: the grid's last axis


def pair_blocks(runs: list[Run], max_steps: int) -> tuple[Steps, Tables]:
    """Steps for workers of two outer blocks each; of an odd number, the middle one is alone.

    Args:
        runs: the runs of each outer block.
        max_steps: the most inner blocks that an outer block needs.
    """
    num_outer = runs[0].begin.shape[1]
    num_workers = (num_outer + 1) // 2
    length = min(2, num_outer) * max_steps
    first, second = (_make_outer(runs, flip, num_workers) for flip in (False, True))
    alone = jnp.arange(num_workers, dtype=jnp.int32) * 2 + 1 == num_outer
    step = jnp.arange(length, dtype=jnp.int32)[None, None, :]
    end = first.num_steps
    total = end + jnp.where(alone[None, :, None], 0, second.num_steps)
    in_second = (step >= end) & ~alone[None, :, None]
    words = jnp.where(in_second, second.words(step - end) | SECOND, first.words(step))
    steps = Steps(
        num_outer=num_outer, num_workers=num_workers, max_steps=length, num_runs=len(runs)
    )
    return steps, _make_tables(words, jnp.max(total), runs)


def num_words(num_outer: int, max_steps: int, num_runs: int) -> int:
    """Words of scalar memory that the tables of `pair_blocks` take for a row of the batch."""
    return (num_outer + 1) // 2 * min(2, num_outer) * max_steps + 3 * num_outer * num_runs


def split_block(runs: list[Run], max_steps: int, num_splits: int) -> tuple[Steps, Tables]:
    """Steps for workers that share the one outer block there is, in splits of equal length."""
    outer = _make_outer(runs, False, 1)
    length = -(-max_steps // num_splits)
    each = jnp.maximum(-(-outer.num_steps // num_splits), 1)
    split = jnp.arange(num_splits, dtype=jnp.int32)[None, :, None]
    step = jnp.arange(length, dtype=jnp.int32)[None, None, :]
    stop = jnp.minimum((split + 1) * each, outer.num_steps)
    words = outer.words(jnp.minimum(split * each + step, stop - 1))
    words = jnp.where(split * each + step < stop, words, words & ~_NOT_IDLE)
    words &= ~(BLOCK_BEGIN | BLOCK_END)
    begin = jnp.where(step == 0, BLOCK_BEGIN | RUN_BEGIN, 0)
    words |= begin | jnp.where(step == each - 1, BLOCK_END, 0)
    steps = Steps(num_outer=1, num_workers=num_splits, max_steps=length, num_runs=len(runs))
    return steps, _make_tables(words, jnp.max(each), runs)


def _make_tables(words: Array, num_steps: Array, runs: list[Run]) -> Tables:
    numbers = [jnp.stack([run.key_begin, run.key_end, run.succ_begin], axis=-1) for run in runs]
    return Tables(words.reshape(-1), jnp.stack(numbers, axis=2).reshape(-1), num_steps)


class _Outer(NamedTuple):
    """An outer block of each worker, [B, workers, 1], and its runs, [B, workers, 1, runs]."""

    num_steps: Array
    begin: Array  # the steps of each run: [begin, end)
    end: Array
    shift: Array  # the number of a step's inner block minus that of the step
    full_begin: Array  # inner blocks that need no mask
    full_end: Array

    def words(self, step: Array) -> Array:
        """The words of the block's steps [B, workers, length]; after the last step, idle ones."""
        inside = jnp.clip(step, 0, self.num_steps - 1)[..., None]
        in_run = (self.begin <= inside) & (inside < self.end)
        block = inside + self.shift
        full = (self.full_begin <= block) & (block < self.full_end)
        run = jnp.arange(in_run.shape[-1], dtype=jnp.int32)[None, None, None, :]
        word = block + (run << RUN_BIT) + jnp.where(full, FULL, 0)
        word += ACTIVE + jnp.where(inside == self.begin, RUN_BEGIN, 0)
        word += jnp.where(inside == self.end - 1, RUN_END, 0)
        word = jnp.sum(jnp.where(in_run, word, 0), axis=-1, dtype=jnp.int32)
        begin = jnp.where(step == 0, BLOCK_BEGIN, 0)
        word += begin + jnp.where(step == self.num_steps - 1, BLOCK_END, 0)
        return jnp.where(step < self.num_steps, word, word & ~_NOT_IDLE)


def _make_outer(runs: list[Run], flip: bool, num_workers: int) -> _Outer:
    """The first outer block of each worker, or with `flip` the second."""

    def stacked(name: str) -> Array:
        x = jnp.stack([getattr(run, name) for run in runs], axis=-1)
        return (x[:, ::-1] if flip else x)[:, :num_workers, None, :]

    count = stacked("end") - stacked("begin")
    end = jnp.cumsum(count, axis=-1, dtype=jnp.int32)
    return _Outer(
        num_steps=jnp.maximum(end[..., -1], 1),
        begin=end - count,
        end=end,
        shift=stacked("begin") - (end - count),
        full_begin=stacked("full_begin"),
        full_end=stacked("full_end"),
    )
