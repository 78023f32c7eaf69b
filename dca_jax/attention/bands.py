"""Bands: what DCA and every other way of giving positions have in common.

Such a method says, for query i and key j, whether they meet and how far apart they stand. The keys
of a query fall into a few contiguous ranges, its *bands*; within a band the query stands at one
position and each key at its own, and one softmax runs over all of them:

    logit(i, j) = tau * <rope(q_i, P_q(i)), rope(k_j, P_k(j))> / sqrt(head_dim)
    for start(i) <= j < stop(i)

ReRoPE with a window of 3, for instance, has two bands (`far` and `near`):

    i\\j  0  1  2  3  4  5
     0   0                        near   i - 3 < j <= i   P_q = i, P_k = j
     1   1  0                     far    j <= i - 3       P_q = 3, P_k = 0
     2   2  1  0
     3   3| 2  1  0               written: the relative position P_q(i) - P_k(j)
     4   3  3| 2  1  0
     5   3  3  3| 2  1  0

DCA is the case with one P_k for all bands (its phases): so its keys can be rotated once, when they
are written to a cache. Where P_k differs from band to band, keys are kept raw and rotated inside.

The methods are in `dca_jax.inference.baselines`; `dca_jax.attention.xla` computes them by blocks.
"""

import abc
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dca_jax.dca import PHASES, DCAConfig, Phase, key_range, query_position
from dca_jax.dtypes import compute_dtype
from dca_jax.rope import rotate


class Band(NamedTuple):
    """One contiguous range of keys for each of some queries, and where both stand in it.

    Attributes:
        start, stop: text indices of the keys each query meets; none where stop <= start. A band
            lies before its query's own index, or ends with it: attention is causal.
        query_position: where each query stands.
        key_position: from text indices to where those keys stand; None: as the keys come, be it
            rotated already or raw, which is to stand at 0.
    """

    start: Int[Array, "B T"]
    stop: Int[Array, "B T"]
    query_position: Int[Array, "B T"]
    key_position: Callable[[Int[Array, "#B S"]], Int[Array, "#B S"]] | None


class PositionMethod(abc.ABC):
    """A way of giving positions, as bands over raw keys. Subclasses are frozen dataclasses.

    A model takes one in place of a `DCAConfig`: `Llama(..., dca=method)`.
    """

    @property
    @abc.abstractmethod
    def max_position(self) -> int | None:
        """The largest relative position it ever uses; None if that grows with the text."""

    @abc.abstractmethod
    def bands(self, index: Int[Array, "B T"]) -> tuple[Band, ...]:
        """The bands of the queries at these text indices, in the order of their keys.

        Only differences of positions count, so the positions of a band may be counted from
        anywhere that is one place for a row's queries (see `near_band`).
        """

    def logit_factor(self, index: Int[Array, "B T"]) -> Float[Array, "B T"] | None:
        """What the logits of each query are multiplied by; None: nothing."""
        return None


def near_band(index: Int[Array, "B T"], window: int) -> Band:
    """The last `window` keys of each query, its own included, at their true distance.

    Positions count from the row's first query of those given (a tile of them): so they are small,
    and their float32 angles exact to the last bit or so, a million tokens into a text too.
    """
    origin = index[:, :1]
    start = jnp.maximum(index - (window - 1), 0)
    return Band(start, index + 1, index - origin, lambda j: j - origin)


def rotated_keys(
    key: Float[Array, "B S K H"],
    index: Int[Array, "B S"],
    band: Band,
    inv_freq: Float[Array, "#B half"],
) -> Float[Array, "B S K H"]:
    """Keys of these text indices where the band puts them, in their dtype."""
    if band.key_position is None:
        return key
    return rotate(key, band.key_position(index), inv_freq)


def relative_positions(length: int, method: PositionMethod) -> Int[np.ndarray, "length length"]:
    """The matrix P_q(i) - P_k(j) of a text, and -1 where query i does not meet key j; int32.

    As `dca_jax.dca.relative_positions`, for any method.
    """
    index = jnp.arange(length, dtype=jnp.int32)[None, :]
    matrix = np.full((length, length), -1, np.int32)
    j = np.arange(length)[None, :]
    for band in method.bands(index):
        start, stop, query = (np.asarray(x)[0, :, None] for x in band[:3])
        key = 0 if band.key_position is None else np.asarray(band.key_position(index))
        matrix = np.where((start <= j) & (j < stop), query - key, matrix)
    return matrix.astype(np.int32)


def dense_band_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    bands: Sequence[Band],
    is_text: Bool[Array, "B T"],
    key_index: Int[Array, "B S"],
    inv_freq: Float[Array, "#B half"],
    scale: Float[Array, "B #T"],
) -> Float[Array, "B T N H"]:
    """The definition, with its [T, S] matrix: what every fast path is tested against.

    Args:
        query: not rotated. key: as the bands want it. Both are taken to float32 (float64 stays),
            and so is the softmax. Query head n reads kv head n // (N / K).
        bands: of these queries.
        is_text: False for padding queries, which get zeros; so does a query that meets no key.
        key_index: text index of each key.
        inv_freq: radians per position (`dca_jax.rope.inverse_frequencies`).
        scale: what the logits of each query are multiplied by.

    Returns:
        In the dtype of `query`.
    """
    compute = compute_dtype(query.dtype)
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1], key.shape[2]
    group = num_heads // kv_heads
    key, value = key.astype(compute), value.astype(compute)
    grouped = query.astype(compute).reshape(batch, num_queries, kv_heads, group, head_dim)
    logits = jnp.full((batch, kv_heads, group, num_queries, num_keys), -jnp.inf, compute)
    j = key_index[:, None, :]
    for band in bands:
        rotated = rotate(grouped, band.query_position, inv_freq)
        rotated = rotated * scale.astype(compute)[:, :, None, None, None]
        keys = rotated_keys(key, key_index, band, inv_freq)
        dots = jnp.einsum("BTKGH,BSKH->BKGTS", rotated, keys, precision="highest")
        met = (band.start[:, :, None] <= j) & (j < band.stop[:, :, None]) & is_text[:, :, None]
        logits = jnp.where(met[:, None, None, :, :], dots, logits)
    # The softmax of nothing is 0/0, and its output is defined as zero.
    met_any = jnp.isfinite(logits).any(axis=-1, keepdims=True)
    weights = jnp.where(met_any, jax.nn.softmax(jnp.where(met_any, logits, 0), axis=-1), 0)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, value, precision="highest")
    return out.reshape(query.shape).astype(query.dtype)


def bands_of(
    index: Int[Array, "B T"], dca: DCAConfig | PositionMethod, phases: tuple[Phase, ...] = PHASES
) -> tuple[Band, ...]:
    """The bands of these queries: DCA's phases, over keys at P_k; or those of another method."""
    if isinstance(dca, PositionMethod):
        return dca.bands(index)
    return tuple(
        Band(*key_range(index, phase, dca), query_position(index, phase, dca), None)
        for phase in phases
    )


def logit_scale(
    index: Int[Array, "B T"], dca: DCAConfig | PositionMethod, scale: Float[Array, " B"]
) -> Float[Array, "B #T"]:
    """What each query's logits are multiplied by, from what its row's are."""
    factor = dca.logit_factor(index) if isinstance(dca, PositionMethod) else None
    return scale[:, None] if factor is None else scale[:, None] * factor


def dense_method_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    dca: DCAConfig | PositionMethod,
    inv_freq: Float[Array, "#B half"],
    scale: Float[Array, " B"],
    offset: Int[Array, " B"],
    lengths: Int[Array, " B"],
    key_offset: Int[Array, " B"],
) -> Float[Array, "B T N H"]:
    """Any method by its bands, with its [T, S] matrix; arguments as in `dca_jax.dca`.

    `dca_jax.dca.dense_attention` is DCA written out on its own: the two check each other.
    """
    i = offset[:, None] + jnp.arange(query.shape[1], dtype=jnp.int32)[None, :]
    return dense_band_attention(
        query,
        key,
        value,
        bands=bands_of(i, dca),
        is_text=i < lengths[:, None],
        key_index=key_offset[:, None] + jnp.arange(key.shape[1], dtype=jnp.int32)[None, :],
        inv_freq=inv_freq,
        scale=logit_scale(i, dca, scale),
    )
