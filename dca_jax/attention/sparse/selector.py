"""Sparse prefill of long prompts: which key blocks a tile of queries reads, and when.

During prefill, a tile of 128 queries reads some of the key blocks before it instead of all
(`dca_jax.attention.blocks`). A *selector* chooses them:

    rows          what eight exact query rows of each tile attend to most (the default)
    pooled        what the mean query of each tile attends to most: cheaper, but misses what only
                  few queries look for
    qwen-1m       vertical and slash lines, from a table in the checkpoint
    skip-softmax  scores all blocks, but skips the values of those with small logits

    text    0 ........................................................ L
    read      each tile: first block, selected blocks, the one before, its own      | densely
                                                            the last 128 tokens' tiles

The selection for a tile depends only on the text. Prompts up to a threshold are read densely,
decoding is always dense, and there is no gradient.
"""

import re
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from dca_jax.attention.bands import PositionMethod
from dca_jax.attention.blocks import BLOCK, KeyBlocks, key_blocks, num_tiles
from dca_jax.attention.sparse.best import always_kept
from dca_jax.attention.sparse.piece import Piece, Selector
from dca_jax.attention.sparse.pooled import PooledQueries
from dca_jax.attention.sparse.qwen_1m import has_table, read_table
from dca_jax.attention.sparse.rows import SampledRows
from dca_jax.attention.sparse.skip_softmax import SkipSoftmax
from dca_jax.dca import DCAConfig, SparseConfig
from dca_jax.errors import InputError
from dca_jax.fields import shown

THRESHOLD = 32_768  # prompts of up to this many tokens are read densely
TAIL = (
    128  # the tiles of a prompt's last tokens are read densely: without this, no selector answered
)
NAMES = (
    "auto, off, rows, rows:SHARE, rows4 or rows16, pooled, pooled:SHARE, qwen-1m, "
    "skip-softmax:LAMBDA"
)


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """The setting of sparse prefill.

    Attributes:
        selector: selects the blocks of each tile.
        threshold: number of tokens up to which a prompt is read densely.
        by_checkpoint: whether the setting comes from the checkpoint only.
    """

    selector: Selector
    threshold: int = THRESHOLD
    by_checkpoint: bool = False

    @property
    def segment(self) -> int:
        """Number of tokens; pieces of a prompt begin and end at multiples of it."""
        return self.selector.segment

    @property
    def described(self) -> str:
        """A description for users and for records of measurements."""
        return f"{self.selector.name} beyond {self.threshold} tokens"

    def share(self, length: int) -> float | None:
        """The share of key blocks that a prompt's tiles read.

        It is 1 for a prompt that is read densely, and None if it depends on the text.
        """
        blocks = -(-length // BLOCK)
        counts = self.selector.counts(blocks)
        if length <= self.threshold:
            return 1.0
        if counts is None:
            return None
        met = np.arange(1, blocks + 1)
        dense = met * BLOCK > length - TAIL
        return float(np.where(dense, met, np.minimum(counts, met)).sum() / met.sum())

    def told(self, length: int) -> str:
        """A short description of how a prompt of `length` tokens is read."""
        share = self.share(length)
        if self.selector.skip is not None and length > self.threshold:
            return f"{self.selector.name}, all keys scored"
        if share is None:
            return f"{self.selector.name}, lines depend on the text"
        if share == 1:
            return "all keys"
        return f"{self.selector.name}, {100 * share:.1f} % of the blocks of keys"

    def dense_from(self, length: int) -> int:
        """The token from which a prompt of `length` tokens is read densely; 0 if all of it is."""
        return 0 if length <= self.threshold else max(0, length - TAIL) // BLOCK * BLOCK

    def shared(self, common: int, one: int, other: int) -> int:
        """Number of first tokens that two prompts read in the same way.

        Args:
            common: number of tokens at the beginning that they have in common.
            one, other: number of tokens of each prompt.
        """
        dense = self.dense_from(one), self.dense_from(other)
        if not any(dense):
            return common
        return min(common, *dense) // self.segment * self.segment

    def for_method(self, dca: DCAConfig | PositionMethod | None) -> "Sparse | None":
        """This setting if the method supports sparse prefill, else None.

        Raises:
            InputError: an unsupported method, if sparse prefill was requested explicitly.
        """
        if not isinstance(dca, PositionMethod):
            return self
        if self.by_checkpoint:
            return None
        raise InputError(
            f"{type(dca).__name__} does not support sparse prefill ({self.selector.name}); use DCA "
            "or plain attention, or sparse='off'"
        )

    def blocks(self, piece: Piece, dca: DCAConfig) -> KeyBlocks:
        """The lists for a piece: the blocks that the selector keeps, or all for dense prefill."""
        # A short prompt may continue from anywhere and then span one more tile.
        more = num_tiles(piece.query.shape[1]) - piece.num_tiles
        tile = piece.tiles(piece.num_tiles + more)
        whole = piece.whole[:, None]
        dense = (whole <= self.threshold) | ((tile + 1) * BLOCK > whole - TAIL)
        wanted = ~dense & (tile * BLOCK < piece.rows.lengths[:, None])
        kept = self.selector.kept(piece, wanted[:, : piece.num_tiles], dca)
        kept = jnp.pad(kept, ((0, 0), (0, 0), (0, more), (0, 0)))
        always = always_kept(tile, piece.num_blocks) | dense[:, :, None]
        kept = kept | always[:, None]
        blocks = key_blocks(kept, rows=piece.rows, dca=dca, most=piece.num_blocks)
        if self.selector.skip is None:
            return blocks
        short = piece.whole <= self.threshold
        return blocks._replace(skip=jnp.where(short, -jnp.inf, jnp.float32(self.selector.skip)))

    def check_piece(self, num_queries: int) -> None:
        """Raises InputError for a piece of a prompt that ends within a segment."""
        if num_queries % self.segment:
            raise InputError(
                f"sparse prefill ({self.selector.name}) needs pieces of a multiple of "
                f"{self.segment} tokens, padding included; got {num_queries}"
            )


def choose_sparse(
    asked: "Sparse | str | None", wish: SparseConfig | None, *, layers: int, heads: int
) -> Sparse | None:
    """A model's setting of sparse prefill; None for dense prefill.

    Args:
        asked: a name (`NAMES`), where a number after a colon is the share of blocks to keep; "auto"
            follows the checkpoint; None means "off".
        wish: the checkpoint's own setting.
        layers, heads: numbers of layers and heads of the model.

    Raises:
        InputError: an unknown name, an invalid share, or `qwen-1m` without its table.
    """
    if isinstance(asked, Sparse):
        return asked
    if asked is None or asked == "off":
        return None
    if not isinstance(asked, str):
        raise InputError(f"sparse must be a string such as rows:0.05, or None, got {shown(asked)}")
    wish = wish or SparseConfig()
    threshold = wish.threshold
    if asked == "auto":
        if not wish.wanted:
            return None
        name = "qwen-1m" if has_table(wish.patterns) else "rows"
        selector = _by_name(name, wish, layers, heads)
        return Sparse(selector=selector, threshold=threshold, by_checkpoint=True)
    return Sparse(selector=_by_name(asked, wish, layers, heads), threshold=threshold)


def _by_name(name: str, wish: SparseConfig, layers: int, heads: int) -> Selector:
    if name == "qwen-1m":
        if wish.patterns is None or not has_table(wish.patterns):
            raise InputError(
                "--sparse qwen-1m needs the checkpoint's table of heads (sparse_attention_config."
                "json beside its config), but there is none; rows needs no table"
            )
        return read_table(wish.patterns, layers=layers, heads=heads, last_q=wish.last_q)
    known, _, share = name.partition(":")
    if known == "skip-softmax":
        return SkipSoftmax(_lambda(share, name))
    options = {} if not share else {"share": _share(share, name)}
    if known == "pooled":
        return PooledQueries(**options)
    found = re.fullmatch(r"rows(4|16)?", known)
    if found is None or name.endswith(":"):
        raise InputError(f"sparse reading {shown(name)} is not known; expected one of {NAMES}")
    return SampledRows(**options, count=int(found[1] or 8))


def _lambda(text: str, name: str) -> float:
    try:
        part = float(text)
    except ValueError:
        part = 0.0
    if not 0 < part < 1:
        raise InputError(
            f"sparse reading {shown(name)} must have a fraction of the largest weight, above 0 and "
            "below 1, below which keys are skipped, such as skip-softmax:0.001"
        )
    return part


def _share(text: str, name: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(
            f"sparse reading {shown(name)} must name a share of the blocks above 0 and up to 1, as "
            "rows:0.05"
        )
    return share
