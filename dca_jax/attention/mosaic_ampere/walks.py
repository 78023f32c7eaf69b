"""What a CTA of these kernels visits, step by step: spans of consecutive blocks in one phase.

A CTA has one table of spans: first those of blocks that need no mask, then those that do. Step n is
in the first span whose end is beyond n. The table is made outside the kernels and stays in global
memory: a CTA looks into it when a span ends, and keeps three numbers of the current one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from dca_jax.attention.mosaic_gpu.ranges import Walk


class Plan(NamedTuple):
    """The spans of all CTAs.

    Attributes:
        spans: each span's first block less the number of steps before it, and the number of steps
            up to its end.
        phases: the phase of each span.
        full: number of spans whose blocks need no mask, which come first.
    """

    spans: Int[Array, "B ctas spans 2"]
    phases: tuple[int, ...]
    full: int

    @classmethod
    def of(cls, full: Sequence[Walk], edges: Sequence[Walk]) -> "Plan":
        """The plan of walks whose numbers are [B, ctas]."""
        walks = [*full, *edges]
        counts = jnp.stack([walk.count for walk in walks], axis=2)
        ends = jnp.cumsum(counts, axis=2, dtype=jnp.int32)
        starts = jnp.stack([walk.start for walk in walks], axis=2) - (ends - counts)
        phases = tuple(walk.phase for walk in walks)
        return cls(jnp.stack([starts, ends], axis=-1), phases, len(full))


class Steps(NamedTuple):
    """The steps of one CTA."""

    spans: Any  # its part of `Plan.spans`, in global memory
    phases: tuple[int, ...]
    full: int

    def count(self) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """Number of steps that need no mask, and of all steps."""
        full = self.spans[self.full - 1, 1] if self.full else jnp.int32(0)
        return full, self.spans[len(self.phases) - 1, 1]


class Place(NamedTuple):
    """The span of a step."""

    phase: Int[Array, ""]
    shift: Int[Array, ""]  # step n is block n + shift
    until: Int[Array, ""]  # the step after its last one

    @classmethod
    def of(cls, n: Int[Array, ""], steps: Steps) -> "Place":
        """Looks up step n."""
        phase, shift, until = jnp.int32(0), jnp.int32(0), jnp.int32(0)
        for number, of_span in reversed(list(enumerate(steps.phases))):
            end = steps.spans[number, 1]
            here = n < end
            phase = jnp.where(here, jnp.int32(of_span), phase)
            shift = jnp.where(here, steps.spans[number, 0], shift)
            until = jnp.where(here, end, until)
        return cls(phase, shift, until)

    def next(self, n: Int[Array, ""], steps: Steps) -> "Place":
        """The place of step n, which follows a step of this one."""
        return lax.cond(n < self.until, lambda: self, lambda: Place.of(n, steps))
