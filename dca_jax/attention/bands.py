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
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dca_jax.dca import PHASES, DCAConfig, Phase, key_range, query_position
from dca_jax.dtypes import compute_dtype
from dca_jax.rope import rotate

# Of a method: an array, or what arithmetic makes of it, inside a compiled program.
Number = int | np.integer | Int[Array | np.ndarray, ""]


class Steps(NamedTuple):
    """Positions that are a step function of the distance (`dca_jax.inference.distances`).

    Where a key's number is above a query's, that key stands one position nearer to the query.

    Attributes:
        query: of each query, a number. key: from text indices to numbers of keys.
    """

    query: Int[Array, "B T"]
    key: Callable[[Int[Array, "#B S"]], Int[Array, "#B S"]]

    def nearer(self, index: Int[Array, "#B S"]) -> Bool[Array, "B T S"]:
        """Which of the keys at these text indices stand one position nearer to each query."""
        return self.key(index)[:, None, :] > self.query[:, :, None]


class Band(NamedTuple):
    """One contiguous range of keys for each of some queries, and where both stand in it.

    Attributes:
        start, stop: text indices of the keys each query meets; none where stop <= start. A band
            lies before its query's own index, or ends with it: attention is causal.
        query_position: where each query stands.
        key_position: from text indices to where those keys stand; None: as the keys come, be it
            rotated already or raw, which is to stand at 0.
        steps: which keys stand one position nearer to which queries; None: none.

    Positions are one for all planes of a head, or have one more axis with one for each plane.
    """

    start: Int[Array, "B T"]
    stop: Int[Array, "B T"]
    query_position: Int[Array, "B T ..."]
    key_position: Callable[[Int[Array, "#B S"]], Int[Array, "#B S ..."]] | None
    steps: Steps | None = None

    @property
    def query_positions(self) -> list[Int[Array, "B T ..."]]:
        """Where each query stands; with steps, then where it stands to keys that are nearer."""
        return [self.query_position - n for n in range(1 if self.steps is None else 2)]


class Series(NamedTuple):
    """As many bands as the data ask for, by their number: a loop of the program.

    Attributes:
        count: how many. most: a bound of it, beyond count there are empty ones.
        band: the band of a number below `most`.
    """

    count: Int[Array, ""]
    most: int
    band: Callable[[Int[Array, ""]], Band]


class PositionMethod(abc.ABC):
    """A way of giving positions, as bands over raw keys. Subclasses are frozen dataclasses.

    A model takes one in place of a `DCAConfig`: `Llama(..., dca=method)`.

    Its numbers (fields that are an int, a float, or a tuple of ints) may be arrays inside a
    compiled program (`split`), so `bands` and `logit_factor` compute with them and never branch on
    them: one program then serves all of a method's settings.
    """

    # Whether the positions of a text's tokens change with its length.
    by_length: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def max_position(self) -> Number | None:
        """The largest relative position it ever uses; None if that grows with the text."""

    @abc.abstractmethod
    def bands(self, index: Int[Array, "B T"], whole: Int[Array, " B"]) -> tuple[Band | Series, ...]:
        """The bands of the queries at these text indices, in the order of their keys.

        Only differences of positions count, so the positions of a band may be counted from
        anywhere that is one place for a row's queries (see `near_band`).

        Args:
            whole: tokens of each row's text, as `Rows.whole`; only methods `by_length` look at it.
        """

    def logit_factor(self, index: Int[Array, "B T"]) -> Float[Array, "B T"] | None:
        """What the logits of each query are multiplied by; None: nothing."""
        return None

    def with_fields(self, **values: Any) -> "PositionMethod":
        """The same method with other values in these fields, which are not checked."""
        other = object.__new__(type(self))
        for field in _fields(self):
            value = values.get(field.name, getattr(self, field.name))
            object.__setattr__(other, field.name, value)
        return other


Method = DCAConfig | PositionMethod


def split(dca: Method) -> tuple[Method, dict[str, Any]]:
    """What a program is compiled for, and the numbers that it is given: see `joined`.

    DCA's settings are part of a program: kernels are made for them, and lengths change nothing.
    """
    if not isinstance(dca, PositionMethod):
        return dca, {}
    values = {field.name: getattr(dca, field.name) for field in _fields(dca)}
    numbers = {name: _number(value) for name, value in values.items() if _is_numeric(value)}
    return dca.with_fields(**dict.fromkeys(numbers, 0)), numbers


def joined(form: Method, numbers: dict[str, Any]) -> Method:
    """The method again, from what `split` made of it; its numbers may be tracers by now."""
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
    return value  # an array already


def near_band(index: Int[Array, "B T"], window: Number) -> Band:
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


def relative_positions(
    length: int, method: PositionMethod, whole: int | None = None
) -> Int[np.ndarray, "length length"]:
    """The matrix P_q(i) - P_k(j) of a text, and -1 where query i does not meet key j; int32.

    As `dca_jax.dca.relative_positions`, for any method. Where the planes of a head stand apart by
    different positions, it is the largest of them.

    Args:
        whole: tokens of the whole text, of which these are the first; by default these are all.
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
    """All of them, one by one; outside of compiled programs."""
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
    # The softmax of nothing is 0/0, and its output is defined as zero.
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
    """The state after `work` on each band in turn; a series is a loop of the program.

    Args:
        differentiable: for JAX's own gradient; the loop is as long as a series may be, then.
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
    """The bands of these queries: DCA's phases, over keys at P_k; or those of another method."""
    if isinstance(dca, PositionMethod):
        return dca.bands(index, whole)
    return phase_bands(index, dca, phases)


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
    """What each query's logits are multiplied by, from what its row's are."""
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
    """Any method by its bands, with its [T, S] matrix; arguments as in `dca_jax.dca`.

    `dca_jax.dca.dense_attention` is DCA written out on its own: the two check each other.
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
