"""Sparse prefill of long prompts with key-block selectors (see `.selector`)."""

from dca_jax.attention.sparse.piece import Keys, Piece, Selector
from dca_jax.attention.sparse.pooled import PooledQueries
from dca_jax.attention.sparse.qwen_1m import VerticalSlash
from dca_jax.attention.sparse.rows import SampledRows
from dca_jax.attention.sparse.selector import NAMES, THRESHOLD, Sparse, choose_sparse
from dca_jax.attention.sparse.skip_softmax import SkipSoftmax

__all__ = [
    "NAMES",
    "THRESHOLD",
    "Keys",
    "Piece",
    "PooledQueries",
    "SampledRows",
    "Selector",
    "SkipSoftmax",
    "Sparse",
    "VerticalSlash",
    "choose_sparse",
]
