"""`skip-softmax`: scores every key and skips blocks with small logits.

The softmax visits a tile's blocks one after another and tracks the largest logit of each query.
Half a tile (64 queries) of a head skips a block if, for each of its queries,

    largest logit of the block  <=  largest logit so far + ln(lambda)

so a skipped key has at most lambda times the weight of another key. Skipping saves the block's
exponentials and its product with V, but not the product with K, which is half of the work. Blocks
come in the order of the text, except for those cut by a chunk border, which come last. With chunks
of whole blocks (all presets from 2,048 trained tokens on), skipping depends only on the text.

Source: BLASST, implemented in TensorRT-LLM and ModelOpt under the name skip-softmax.
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
    """Reads all blocks, but skips those with small logits.

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
        """0: all queries are scored."""
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
