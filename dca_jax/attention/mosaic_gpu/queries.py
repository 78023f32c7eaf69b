"""How Hopper's kernels get their queries: rotated for each phase, or with the tables to do so.

The rotation of a phase carries the logit scale in log2 units, so that softmaxes take exp2.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dca_jax.attention.backend import Rows
from dca_jax.attention.softmax import LOG2E
from dca_jax.dca import DCAConfig, Phase, query_position
from dca_jax.rope import rotate


def pad_tokens(x: Array, axis: int, multiple: int = 8) -> Array:
    """`x` with `axis` padded to a multiple: the copy engine takes rows of tokens by eights."""
    missing = -x.shape[axis] % multiple
    if missing == 0:
        return x
    return jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)])


def rotated_queries(
    query: Float[Array, "B T N H"],
    rows: Rows,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    dtype: jnp.dtype | None = None,
) -> list[Float[Array, "B T N H"]]:
    """The query as each phase sees it, times the logit scale in log2 units; rounded once.

    To `dtype`; by default the query's own.
    """
    index = rows.offset[:, None] + jnp.arange(query.shape[1], dtype=jnp.int32)[None, :]
    scale = (rows.scale * jnp.float32(LOG2E))[:, None, None, None]
    wide = query.astype(jnp.float32)
    seen = [rotate(wide, query_position(index, phase, dca), rows.inv_freq) for phase in phases]
    return [(x * scale).astype(dtype or query.dtype) for x in seen]


def rotation_tables(
    rows: Rows, dca: DCAConfig, tokens: int
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"], Float[Array, "B 4 half"]]:
    """cos and sin of each query's intra position, and of the two rotations that are constant.

    The logit scale, in log2 units, is part of cos, sin and the first constant rotation, R(Q'), with
    Q' = min(2s - 1, Q): that of inter. The second, R(s), takes intra to succ; where the position
    would pass Q', succ is inter.
    """
    s, furthest = dca.chunk_len, dca.inter_position
    scale = rows.scale[:, None, None] * jnp.float32(LOG2E)
    index = rows.offset[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None, :]
    angle = (index % s).astype(jnp.float32)[:, :, None] * rows.inv_freq[:, None, :]
    far, step = (jnp.float32(p) * rows.inv_freq[:, None, :] for p in (furthest, s))
    shape = (rows.offset.shape[0], 1, rows.inv_freq.shape[1])
    fixed = [jnp.cos(far) * scale, jnp.sin(far) * scale, jnp.cos(step), jnp.sin(step)]
    fixed = jnp.concatenate([jnp.broadcast_to(x, shape) for x in fixed], axis=1)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale, fixed
