"""Bands: a common form for DCA and the other position methods.

A position method determines, for query i and key j, whether the query attends to the key and at
what relative position. The keys of a query fall into a few contiguous ranges, its *bands*. Within a
band the query has one position and each key its own, and there is one softmax over all bands:

    logit(i, j) = tau * <rope(q_i, P_q(i)), rope(k_j, P_k(j))> / sqrt(head_dim)
    for start(i) <= j < stop(i)

ReRoPE with a window of 3, for instance, has two bands (`far` and `near`):

    i\\j  0  1  2  3  4  5
     0   0                        near   i - 3 < j <= i   P_q = i, P_k = j
     1   1  0                     far    j <= i - 3       P_q = 3, P_k = 0
     2   2  1  0
     3   3| 2  1  0               entries: the relative position P_q(i) - P_k(j)
     4   3  3| 2  1  0
     5   3  3  3| 2  1  0

DCA is the case with the same P_k in all bands (its phases), so its keys can be rotated once, when
they are written to a cache. If P_k differs between bands, keys are stored unrotated and rotated in
the attention.

The methods are in `dca_jax.inference.baselines` and `rivals`. `dca_jax.attention.xla` computes them
blockwise; on Hopper GPUs `dca_jax.attention.mosaic_gpu.band_forward` reads prompts.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dca_jax.attention.softmax import FAR
from dca_jax.dca import PHASES, DCAConfig, Phase, key_range, phases_within, query_position
from dca_jax.dtypes import compute_dtype
from dca_jax.rope import rotate

# A number of a method; inside a compiled program, an array.
Number = int | np.integer | Int[Array | np.ndarray, ""]


class Steps(NamedTuple):
    """Positions that are a step function of the distance (`dca_jax.inference.distances`).

    A key whose number is above the query's is one position nearer to the query.

    Attributes:
        query: number of each query.
        key: function from text indices to numbers of keys.
    """

    query: Int[Array, "B T"]
    key: Callable[[Int[Array, "#B S"]], Int[Array, "#B S"]]

    def nearer(self, index: Int[Array, "#B S"]) -> Bool[Array, "B T S"]:
        """Which of the keys at these text indices are one position nearer to each query."""
        return self.key(index)[:, None, :] > self.query[:, :, None]


class Band(NamedTuple):
    """A contiguous range of keys for each query, with the positions of queries and keys in it.

    Attributes:
        start, stop: [start, stop) of the text indices of each query's keys; empty if stop <= start.
            A band ends at or before its query's own index, because attention is causal.
        query_position: position of each query.
        key_position: function from text indices to key positions. None uses the keys as given,
            either already rotated, or unrotated, which is position 0.
        steps: which keys are one position nearer to which queries; None for none.

    A position is the same for all planes of a head, or has one more axis with a value per plane.
    """

    start: Int[Array, "B T"]
    stop: Int[Array, "B T"]
    query_position: Int[Array, "B T ..."]
    key_position: Callable[[Int[Array, "#B S"]], Int[Array, "#B S ..."]] | None
    steps: Steps | None = None

    @property
    def query_positions(self) -> list[Int[Array, "B T ..."]]:
        """Positions of each query: to its keys and, with steps, to keys that are nearer."""
        return [self.query_position - n for n in range(1 if self.steps is None else 2)]


class Series(NamedTuple):
    """A number of bands that depends on the data, computed by a loop in the program.

    Attributes:
        count: number of bands.
        most: upper bound of the count; bands from `count` on are empty.
        band: function from a number below `most` to its band.
    """

    count: Int[Array, ""]
    most: int
    band: Callable[[Int[Array, ""]], Band]


class PositionMethod(abc.ABC):
    """A position method, as bands over unrotated keys. Subclasses are frozen dataclasses.

    A model accepts one in place of a `DCAConfig`: `Llama(..., dca=method)`.

    Its numbers (fields that are an int, a float, or a tuple of ints) may be arrays inside a
    compiled program (`split`), so `bands` and `logit_factor` must not branch on them. One program
    then serves all settings of a method.
    """

    # Whether the positions of a text's tokens depend on its length.
    by_length: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def max_position(self) -> Number | None:
        """The largest relative position that the method uses; None if it grows with the text."""

    @abc.abstractmethod
    def bands(self, index: Int[Array, "B T"], whole: Int[Array, " B"]) -> tuple[Band | Series, ...]:
        """The bands of the queries at these text indices, in the order of their keys.

        Only differences of positions matter, so a band's positions may be counted from any point
        that is the same for all of a row's queries (see `near_band`).

        Args:
            whole: number of tokens of each row's text, as in `Rows.whole`; used only by methods
                with `by_length`.
        """

    def logit_factor(self, index: Int[Array, "B T"]) -> Float[Array, "B T"] | None:
        """Factor on the logits of each query; None for no factor."""
        return None

    def with_fields(self, **values: Any) -> "PositionMethod":
        """The same method with new values in these fields, without checking them."""
        other = object.__new__(type(self))
        for field in _fields(self):
            value = values.get(field.name, getattr(self, field.name))
            object.__setattr__(other, field.name, value)
        return other


Method = DCAConfig | PositionMethod


def split(dca: Method) -> tuple[Method, dict[str, Any]]:
    """The static part of a method, for compilation, and its numbers as arguments; see `joined`.

    DCA's settings are all static: kernels are specialized for them, and they do not depend on the
    length.
    """
    if not isinstance(dca, PositionMethod):
        return dca, {}
    values = {field.name: getattr(dca, field.name) for field in _fields(dca)}
    numbers = {name: _number(value) for name, value in values.items() if _is_numeric(value)}
    return dca.with_fields(**dict.fromkeys(numbers, 0)), numbers


def joined(form: Method, numbers: dict[str, Any]) -> Method:
    """The method rebuilt from the result of `split`; its numbers may be tracers."""
    return form.with_fields(**numbers) if isinstance(form, PositionMethod) else form


def _fields(method: PositionMethod) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(method)  # pyright: ignore[reportArgumentType] -- each is one


def _is_numeric(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return not any(part is None or isinstance(part, bool | DCAConfig) for part in parts)


def _number(value: Any) -> Array:
    if isinstance(value, int | float | tuple):
        is_float = isinstance(value, float)
        return jnp.asarray(value, jnp.float32 if is_float else jnp.int32)
    return value  # already an array


def near_band(index: Int[Array, "B T"], window: Number) -> Band:
    """The last `window` keys of each query, including its own, at their true distance.

    Positions are counted from the first of the given queries of a row (a tile), so they are small
    and their float32 angles are accurate to about the last bit, even a million tokens into a text.
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
    """Keys at these text indices, rotated to the band's positions, in their own dtype."""
    if band.key_position is None:
        return key
    return rotate(key, band.key_position(index), inv_freq)


def relative_positions(
    length: int, method: PositionMethod, whole: int | None = None
) -> Int[np.ndarray, "length length"]:
    """The matrix P_q(i) - P_k(j) of a text, and -1 where query i does not see key j; int32.

    Like `dca_jax.dca.relative_positions`, for any method. If the planes of a head have different
    relative positions, it contains the largest.

    Args:
        whole: number of tokens of the whole text, if `length` covers only its beginning (default:
            `length`).
    """
    told = jnp.asarray([length if whole is None else whole], jnp.int32)
    form, numbers = split(method)
    return np.asarray(_relative_positions(form, length, numbers, told))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _relative_positions(
    form: PositionMethod, length: int, numbers: dict[str, Array], whole: Int[Array, " 1"]
) -> Int[Array, "length length"]:
    index = jnp.arange(length, dtype=jnp.int32)[None, :]

    def with_band(matrix: Array, band: Band) -> Array:
        key = jnp.zeros_like(index) if band.key_position is None else band.key_position(index)
        planes = band.query_position.ndim == 3
        relative = jnp.expand_dims(band.query_position, 2) - jnp.expand_dims(key, 1)
        relative = relative.max(axis=-1) if planes else relative
        if band.steps is not None:
            relative -= band.steps.nearer(index).astype(jnp.int32)
        met = (band.start[:, :, None] <= index[:, None]) & (index[:, None] < band.stop[:, :, None])
        return jnp.where(met, relative, matrix)

    none = jnp.full((1, length, length), -1, jnp.int32)
    return over_bands(bands_of(index, joined(form, numbers), whole), with_band, none)[0]


def each_band(bands: Sequence[Band | Series]) -> Iterator[Band]:
    """Iterates over all bands, including those of series; for use outside compiled programs."""
    for one in bands:
        if isinstance(one, Band):
            yield one
        else:
            yield from (one.band(jnp.int32(n)) for n in range(int(one.count)))


def dense_band_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    bands: Sequence[Band | Series],
    is_text: Bool[Array, "B T"],
    key_index: Int[Array, "B S"],
    inv_freq: Float[Array, "#B half"],
    scale: Float[Array, "B #T"],
) -> Float[Array, "B T N H"]:
    """The definition, with the full [T, S] matrix; every fast path is tested against it.

    Computation is in float32, or in float64 for float64 inputs.

    Args:
        query: unrotated queries; query head n attends to kv head n // (N / K).
        key: keys in the form that the bands expect.
        bands: the bands of these queries.
        is_text: False for padding queries, whose output is zero, like that of queries without keys.
        key_index: text index of each key.
        inv_freq: radians per position (`dca_jax.rope.inverse_frequencies`).
        scale: factor on the logits of each query.

    Returns:
        The output, in the dtype of `query`.
    """
    compute = compute_dtype(query.dtype)
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1], key.shape[2]
    group = num_heads // kv_heads
    key, value = key.astype(compute), value.astype(compute)
    grouped = query.astype(compute).reshape(batch, num_queries, kv_heads, group, head_dim)
    logits = jnp.full((batch, kv_heads, group, num_queries, num_keys), -jnp.inf, compute)
    j = key_index[:, None, :]

    def with_band(logits: Array, band: Band) -> Array:
        keys = rotated_keys(key, key_index, band, inv_freq)

        def dots_at(position: Array) -> Array:
            rotated = rotate(grouped, position, inv_freq)
            rotated = rotated * scale.astype(compute)[:, :, None, None, None]
            return jnp.einsum("BTKGH,BSKH->BKGTS", rotated, keys, precision="highest")

        dots, *nearer = map(dots_at, band.query_positions)
        if band.steps is not None:
            dots = jnp.where(band.steps.nearer(key_index)[:, None, None], nearer[0], dots)
        met = (band.start[:, :, None] <= j) & (j < band.stop[:, :, None]) & is_text[:, :, None]
        return jnp.where(met[:, None, None, :, :], dots, logits)

    logits = over_bands(bands, with_band, logits, differentiable=True)
    # A softmax over no keys is 0/0; its output is defined as zero.
    met_any = jnp.isfinite(logits).any(axis=-1, keepdims=True)
    weights = jnp.where(met_any, jax.nn.softmax(jnp.where(met_any, logits, 0), axis=-1), 0)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, value, precision="highest")
    return out.reshape(query.shape).astype(query.dtype)


def over_bands(
    bands: Sequence[Band | Series],
    work: Callable[[Any, Band], Any],
    state: Any,
    *,
    differentiable: bool = False,
) -> Any:
    """The state after `work` on each band in turn; a series becomes a loop in the program.

    Args:
        differentiable: whether JAX must differentiate it; a series then loops up to its bound.
    """
    for one in bands:
        if isinstance(one, Band):
            state = work(state, one)
            continue

        def step(n: Array, state: Any, series: Series = one) -> Any:
            return work(state, series.band(n))

        first, last = (0, one.most) if differentiable else (jnp.int32(0), one.count)
        state = jax.lax.fori_loop(first, last, step, state)
    return state


def bands_of(
    index: Int[Array, "B T"],
    dca: Method,
    whole: Int[Array, " B"],
    phases: tuple[Phase, ...] = PHASES,
) -> tuple[Band | Series, ...]:
    """The bands of these queries: DCA's phases, over keys rotated to P_k, or a method's bands.

    Plain attention is DCA with a single chunk and so has one band.
    """
    if isinstance(dca, PositionMethod):
        return dca.bands(index, whole)
    met = phases_within(FAR, dca)
    return phase_bands(index, dca, tuple(phase for phase in phases if phase in met))


def phase_bands(
    index: Int[Array, "B T"], dca: DCAConfig, phases: tuple[Phase, ...]
) -> tuple[Band, ...]:
    """DCA's phases."""
    return tuple(
        Band(*key_range(index, phase, dca), query_position(index, phase, dca), None)
        for phase in phases
    )


def logit_scale(
    index: Int[Array, "B T"], dca: Method, scale: Float[Array, " B"]
) -> Float[Array, "B #T"]:
    """Factor on each query's logits, from the factor of its row."""
    factor = dca.logit_factor(index) if isinstance(dca, PositionMethod) else None
    return scale[:, None] if factor is None else scale[:, None] * factor


def dense_method_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    dca: Method,
    inv_freq: Float[Array, "#B half"],
    scale: Float[Array, " B"],
    offset: Int[Array, " B"],
    lengths: Int[Array, " B"],
    key_offset: Int[Array, " B"],
    whole: Int[Array, " B"],
) -> Float[Array, "B T N H"]:
    """Dense attention with any method's bands; arguments as in `dca_jax.dca.dense_attention`.

    `dca_jax.dca.dense_attention` implements DCA independently, so the two check each other.
    """
    i = offset[:, None] + jnp.arange(query.shape[1], dtype=jnp.int32)[None, :]
    return dense_band_attention(
        query,
        key,
        value,
        bands=bands_of(i, dca, whole),
        is_text=i < lengths[:, None],
        key_index=key_offset[:, None] + jnp.arange(key.shape[1], dtype=jnp.int32)[None, :],
        inv_freq=inv_freq,
        scale=logit_scale(i, dca, scale),
    )
