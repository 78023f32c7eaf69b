"""Several texts in one row, each attending only to itself, with positions from index 0.

Projections and the MLP process the packed row. For the attention, its texts are separated: texts of
similar length are gathered into the rows of a ragged batch, which every backend supports, and the
outputs are scattered back. A batch has no more tokens than one packed row, so it takes the memory
of a row, and the work is that of the texts: padding attends to no keys.

The widths of these batches are static, but their number is not: a loop runs as often as a row's
texts require. JAX cannot differentiate such a loop in reverse mode, and would save too much if it
could, so the gradient is written out here with the same backward functions.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dca_jax.attention.backend import PLAIN, SAVED, Rows
from dca_jax.attention.bands import Method, PositionMethod, joined, split
from dca_jax.attention.op import BACKENDS, choose_implementation, make_rows, rotate_keys
from dca_jax.attention.softmax import output_delta
from dca_jax.dca import Phase, phases_within
from dca_jax.dtypes import compute_dtype
from dca_jax.errors import InputError
from dca_jax.rope import RopeConfig

NARROWEST, WIDER = 256, 4  # tokens of the narrowest batch; factor between successive widths


def attend_to_packed(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    text_index: Int[Array, "B T"],
    *,
    dca: Method | None,
    rope: RopeConfig,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """`dual_chunk_attention` of every text of every row independently.

    Args:
        query, key, value: unrotated, as in `dual_chunk_attention`.
        text_index: index of each token in its own text, starting at 0; -1 for padding. A text is
            within one row.
        dca, rope: as in `dual_chunk_attention`; temperature and dynamic NTK use each text's length.
        implementation: a flash backend; None picks the best for the device.

    Returns:
        [B, T, N, H] in the dtype of `query`; 0 at padding. It is exactly differentiable in query,
        key and value.

    Raises:
        InputError: an implementation that cannot run, or "reference", which is dense.
    """
    if implementation == "reference":
        raise InputError(
            "implementation 'reference' does not support packed texts; expected one of "
            + ", ".join(BACKENDS)
        )
    form, numbers = split(dca or PLAIN)
    return _attend(form, rope, implementation, numbers, query, key, value, text_index)


class _Texts(NamedTuple):
    """Texts that are processed together, `rows` at a time in rows of `width` tokens."""

    width: int
    rows: int
    starts: Int[Array, " most"]  # start of each text in the concatenated tokens of all rows
    lengths: Int[Array, " most"]
    count: Int[Array, ""]  # number of texts; further entries are unused


def _by_width(text_index: Int[Array, "B T"]) -> list[_Texts]:
    """All texts, grouped by the narrowest width that holds them."""
    batch, length = text_index.shape
    index = text_index.reshape(-1)
    after = jnp.concatenate([index[1:], jnp.zeros((1,), index.dtype)])
    ends = (index >= 0) & (after != index + 1)
    widths = [NARROWEST]
    while widths[-1] < length:
        widths.append(widths[-1] * WIDER)
    widths[-1] = length
    found = []
    for narrower, width in zip([0, *widths], widths, strict=False):
        here = ends & (index >= narrower) & (index < width)  # the last index is the length minus 1
        most = max(1, batch * length // (narrower + 1))
        (last,) = jnp.nonzero(here, size=most, fill_value=0)
        last = last.astype(jnp.int32)
        sizes = jnp.maximum(index[last], 0) + 1
        count = here.sum(dtype=jnp.int32)
        found.append(_Texts(width, length // width, last - sizes + 1, sizes, count))
    return found


def _over_batches(
    texts: _Texts,
    tokens: int,
    work: Callable[[Int[Array, "rows width"], Int[Array, " rows"], tuple], tuple],
    carry: tuple,
) -> tuple:
    """Runs `work` for each batch of texts, with the places of their tokens and their lengths.

    Places of padding are distinct and beyond all `tokens`.
    """

    def batch(number: Array, carry: tuple) -> tuple:
        slots = number * texts.rows + jnp.arange(texts.rows, dtype=jnp.int32)
        starts = texts.starts.at[slots].get(mode="clip")
        lengths = texts.lengths.at[slots].get(mode="clip")  # an empty row repeats a text
        offset = jnp.arange(texts.width, dtype=jnp.int32)[None, :]
        real = (offset < lengths[:, None]) & (slots < texts.count)[:, None]
        nowhere = tokens + jnp.arange(real.size, dtype=jnp.int32).reshape(real.shape)
        return work(jnp.where(real, starts[:, None] + offset, nowhere), lengths, carry)

    batches = (texts.count + (texts.rows - 1)) // texts.rows
    return jax.lax.fori_loop(jnp.int32(0), batches, batch, carry)


def _flat(x: Array) -> Array:
    """[B, T, ...] as [B * T, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _gather(x: Array, places: Int[Array, "rows width"]) -> Array:
    return x.at[places].get(mode="fill", fill_value=0)


def _put(x: Array, places: Int[Array, "rows width"], part: Array) -> Array:
    return x.at[places].set(part.astype(x.dtype), mode="drop", unique_indices=True)


def _backend(
    dca: Method, rope: RopeConfig, implementation: str | None, query: Array, key: Array
) -> tuple[str, tuple[Phase, ...], Callable[[Array], Rows]]:
    """The backend for such a batch: its name, its phases, and the rows of given lengths."""
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key[None])]
    name = choose_implementation(implementation, like[0], like[1], dca)
    phases = () if isinstance(dca, PositionMethod) else phases_within(key.shape[1], dca)
    return name, phases, functools.partial(_rows, query.shape, dca, rope)


def _rows(shape: tuple[int, ...], dca: Method, rope: RopeConfig, lengths: Array) -> Rows:
    return make_rows(shape, dca=dca, rope=rope, lengths=lengths)


def _rotated(dca: Method, rows: Rows) -> Callable[[Array], Array]:
    def rotate(key: Array) -> Array:
        positions = jnp.arange(key.shape[1], dtype=jnp.int32)[None, :]
        return rotate_keys(key, positions, dca=dca, inv_freq=rows.inv_freq)

    return rotate


def _read(
    dca: Method,
    rope: RopeConfig,
    implementation: str | None,
    query: Array,
    key: Array,
    value: Array,
    text_index: Array,
) -> tuple[Array, Array]:
    """(out [B, T, N, H], log-sum-exp [B, T, N]) of every text."""
    flat = [_flat(x) for x in (query, key, value)]
    lse = jnp.full(flat[0].shape[:2], -jnp.inf, compute_dtype(query.dtype))
    carry = (jnp.zeros_like(flat[0]), lse)
    for texts in _by_width(text_index):

        def read(places: Array, lengths: Array, carry: tuple) -> tuple:
            q, k, v = (_gather(x, places) for x in flat)
            name, phases, rows_of = _backend(dca, rope, implementation, q, k)
            rows = rows_of(lengths)
            keys = _rotated(dca, rows)(k)
            options: dict[str, Any] = {"dca": dca, "phases": phases, "with_lse": True}
            out, lse = BACKENDS[name].forward(
                *(q, keys[None], v[None], jnp.int32(0), rows),
                **options,
            )
            assert lse is not None  # requested
            parts = (out, jnp.swapaxes(lse, 1, 2))
            return tuple(_put(x, places, part) for x, part in zip(carry, parts, strict=True))

        carry = _over_batches(texts, len(flat[0]), read, carry)
    return carry[0].reshape(query.shape), carry[1].reshape(query.shape[:3])


def _attend_saving(
    form: Method,
    rope: RopeConfig,
    implementation: str | None,
    numbers: dict[str, Any],
    query: Array,
    key: Array,
    value: Array,
    text_index: Array,
) -> tuple[Array, tuple]:
    out, lse = _read(joined(form, numbers), rope, implementation, query, key, value, text_index)
    out, lse = jax.lax.optimization_barrier((out, lse))  # as in `dca_jax.attention.op`
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return out, (numbers, query, key, value, text_index, out, lse)


def _attend_backward(
    form: Method, rope: RopeConfig, implementation: str | None, saved: tuple, do: Array
) -> tuple:
    dca = joined(form, saved[0])
    _, query, key, value, text_index, out, lse = saved
    delta = jnp.swapaxes(output_delta(do, out, lse.dtype), 1, 2)
    flat = [_flat(x) for x in (query, key, value, do, lse, delta)]
    carry = tuple(jnp.zeros_like(x) for x in flat[:3])
    for texts in _by_width(text_index):

        def read(places: Array, lengths: Array, carry: tuple) -> tuple:
            q, k, v, do, lse, delta = (_gather(x, places) for x in flat)
            name, phases, rows_of = _backend(dca, rope, implementation, q, k)
            rows = rows_of(lengths)
            keys, back = jax.vjp(_rotated(dca, rows), k)
            options: dict[str, Any] = {"dca": dca, "phases": phases}
            dq, dk, dv = BACKENDS[name].backward(
                *(q, keys[None], v[None], jnp.int32(0), rows, do),
                *(jnp.swapaxes(x, 1, 2) for x in (lse, delta)),
                **options,
            )
            parts = (dq, *back(dk), dv)
            return tuple(_put(x, places, part) for x, part in zip(carry, parts, strict=True))

        carry = _over_batches(texts, len(flat[0]), read, carry)
    dq, dk, dv = carry
    return None, dq.reshape(query.shape), dk.reshape(key.shape), dv.reshape(value.shape), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    form: Method,
    rope: RopeConfig,
    implementation: str | None,
    numbers: dict[str, Any],
    query: Array,
    key: Array,
    value: Array,
    text_index: Array,
) -> Array:
    return _read(joined(form, numbers), rope, implementation, query, key, value, text_index)[0]


_attend.defvjp(_attend_saving, _attend_backward)
