"""Dual Chunk Attention as one op with several backends; the definition is in `dca_jax.dca`.

`dual_chunk_attention` is the op. `attend` is the same for keys that are already rotated (a KV
cache). `attention_pass` and `merge_passes` compute the paper's three passes separately. A backend
is one file with a `forward` and a `backward`, named in `dca_jax.attention.op.BACKENDS`.
"""

from dca_jax.attention.op import (
    IMPLEMENTATIONS,
    attend,
    attention_pass,
    dual_chunk_attention,
    rotate_keys,
)
from dca_jax.attention.softmax import merge_passes

__all__ = [
    "IMPLEMENTATIONS",
    "attend",
    "attention_pass",
    "dual_chunk_attention",
    "merge_passes",
    "rotate_keys",
]
