"""What attention by blocks is made of in plain XLA: tiles of queries, products, a softmax."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dca_jax.attention.backend import Rows
from dca_jax.dtypes import compute_dtype
from dca_jax.rope import rotate


class Softmax(NamedTuple):
    """The state of an online softmax over blocks of keys."""

    m_i: Float[Array, "B K G t"]  # running maximum
    l_i: Float[Array, "B K G t"]  # running sum
    acc: Float[Array, "B K G t H"]  # running output

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> "Softmax":
        """Of no keys yet; `shape` is that of the output."""
        none = jnp.full(shape[:-1], -jnp.inf, dtype)
        return cls(none, jnp.zeros(shape[:-1], dtype), jnp.zeros(shape, dtype))

    def add(
        self, logits: Float[Array, "B K G t S"], weighted: Callable[[Array], Array]
    ) -> "Softmax":
        """With one block of keys more.

        Args:
            logits: -inf where masked.
            weighted: from the weights, like the logits, to the sum of the values [B, K, G, t, H].
        """
        m_next = jnp.maximum(self.m_i, logits.max(axis=-1))
        safe = jnp.where(jnp.isfinite(m_next), m_next, 0)  # no key met so far
        decay = jnp.exp(self.m_i - safe)
        p = jnp.exp(logits - safe[..., None])
        l_i = self.l_i * decay + p.sum(axis=-1)
        return Softmax(m_next, l_i, self.acc * decay[..., None] + weighted(p))

    def result(self, dtype: jnp.dtype) -> tuple[Float[Array, "B t K G H"], Float[Array, "B K G t"]]:
        """Output, and natural log-sum-exp; 0 and -inf for a query that met no key."""
        met_any = self.l_i > 0
        out = self.acc / jnp.where(met_any, self.l_i, 1)[..., None]
        lse = self.m_i + jnp.log(jnp.where(met_any, self.l_i, 1))
        return jnp.moveaxis(out, 3, 1).astype(dtype), jnp.where(met_any, lse, -jnp.inf)


def rotated_query(
    queries: Float[Array, "B t K G H"],
    position: Int[Array, "B t ..."],
    scale: Float[Array, "B #t"],
    rows: Rows,
) -> Float[Array, "B K G t H"]:
    """The tile's queries at these positions, times the logit scale; rounded once.

    Heads come first: so they are transposed once a tile, and not once a block.
    """
    rotated = rotate(queries.astype(scale.dtype), position, rows.inv_freq)
    rotated = rotated * scale[:, :, None, None, None]
    return jnp.moveaxis(rotated.astype(queries.dtype), 1, 3)


def dot(subscripts: str, a: Array, b: Array) -> Array:
    """einsum with products summed in float32 (float64 for float64); float32 inputs unrounded."""
    compute = compute_dtype(a.dtype)
    precision = None if a.dtype.itemsize < 4 else "highest"
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=compute)


def split_tiles(x: Float[Array, "B T N H"], kv_heads: int, tile: int) -> tuple[Array, Array]:
    """[tiles, B, t, K, G, H] with the last tile zero-padded, and each tile's first index."""
    batch, length, heads, head_dim = x.shape
    tiles = -(-length // tile)
    x = jnp.pad(x, ((0, 0), (0, tiles * tile - length), (0, 0), (0, 0)))
    x = x.reshape(batch, tiles, tile, kv_heads, heads // kv_heads, head_dim)
    return jnp.moveaxis(x, 1, 0), jnp.arange(tiles, dtype=jnp.int32) * tile


def split_tiles_lse(x: Float[Array, "B N T"], kv_heads: int, tile: int) -> Array:
    """[tiles, B, K, G, t]."""
    batch, heads, length = x.shape
    tiles = -(-length // tile)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, tiles * tile - length)))
    return jnp.moveaxis(x.reshape(batch, kv_heads, heads // kv_heads, tiles, tile), 3, 0)


def join_tiles(x: Float[Array, "tiles B t K G H"], length: int) -> Float[Array, "B T N H"]:
    """[B, T, N, H] of tiles of queries."""
    x = jnp.moveaxis(x, 0, 1)
    batch, tiles, tile, kv_heads, group, head_dim = x.shape
    return x.reshape(batch, tiles * tile, kv_heads * group, head_dim)[:, :length]


def join_tiles_lse(x: Float[Array, "tiles B K G t"], length: int) -> Float[Array, "B N T"]:
    """[B, N, T] of tiles of queries."""
    x = jnp.moveaxis(x, 0, 3)
    batch, kv_heads, group, tiles, tile = x.shape
    return x.reshape(batch, kv_heads * group, tiles * tile)[:, :, :length]
