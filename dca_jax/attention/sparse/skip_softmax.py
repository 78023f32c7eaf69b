"""`skip-softmax`: every key is scored, and blocks whose logits are small are passed by.

The softmax goes through a tile's blocks one after another, and knows the largest logit of each
query so far. Half a tile (64 queries) of a head passes a block by if for each of its queries

    largest logit of the block  <=  largest logit so far + ln(lambda)

so no key that is passed by has more than lambda of the weight of another. That saves the block's
exponentials and its product with V; not that with K, which is half of the work. The blocks come in
the order of the text, but for what a border between chunks cuts, which comes last: with chunks of
whole blocks (all presets from 2,048 trained tokens on) what is passed by depends on the text alone.

Source: BLASST, which TensorRT-LLM and ModelOpt have under the name skip-softmax.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dca_jax.attention.blocks import BLOCK
from dca_jax.attention.sparse.piece import Piece, Selector
from dca_jax.dca import DCAConfig


@dataclass(frozen=True)
class SkipSoftmax(Selector):
    """All blocks, of which those with small logits are passed by.

    Attributes:
        part: lambda, above 0 and below 1.
    """

    part: float

    @property
    def segment(self) -> int:
        """A tile: no other is looked at."""
        return BLOCK

    @property
    def name(self) -> str:
        """As `--sparse` takes it."""
        return f"skip-softmax:{self.part:g}"

    @property
    def rows_of_tile(self) -> int:
        """None stands for it: all are scored."""
        return 0

    @property
    def skip(self) -> float:
        """As `Selector.skip`."""
        return math.log(self.part)

    def counts(self, blocks: int) -> Int[np.ndarray, " blocks"]:
        """As `Selector.counts`: all."""
        return np.arange(1, blocks + 1, dtype=np.int32)

    def kept(
        self, piece: Piece, wanted: Bool[Array, "B tiles"], dca: DCAConfig
    ) -> Bool[Array, "B K tiles blocks"]:
        """As `Selector.kept`: all."""
        shape = len(wanted), piece.key.shape[3], piece.num_tiles, piece.num_blocks
        return jnp.ones(shape, bool)
