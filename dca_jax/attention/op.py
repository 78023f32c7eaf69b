"""The op: argument checks, the choice of a backend, and the exact gradient they all share.

A backend is a module with three functions, described by `Backend`.

Gradient. With the *global* log-sum-exp and delta = rowsum(dO * O), each phase's flash backward is
exact on its own: dS = P * (dP - delta). No gradient flows through a merge, and none is dropped.
(Released code detaches the log-sum-exp of the merge, and so gets dq and dk wrong.)
"""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Num

from dca_jax.attention import (
    mosaic_ampere,
    mosaic_blackwell,
    mosaic_gpu,
    mosaic_tpu,
    triton,
    xla,
)
from dca_jax.attention.backend import PLAIN, SAVED, Backend, KeyBlocks, Rows
from dca_jax.attention.bands import (
    Method,
    PositionMethod,
    dense_method_attention,
    joined,
    split,
)
from dca_jax.attention.blocks import allowed_keys, check_blocks
from dca_jax.attention.pages import Common, check_pages, unpaged
from dca_jax.attention.softmax import output_delta
from dca_jax.attention.stored import Scales, dequantized_layer, is_quantized
from dca_jax.dca import (
    DCAConfig,
    Phase,
    dense_attention,
    key_position,
    phases_within,
    temperature,
)
from dca_jax.device import current_device
from dca_jax.errors import InputError
from dca_jax.fields import LARGEST
from dca_jax.rope import Frequencies, RopeConfig, inverse_frequencies, logit_scale, rotate

log = logging.getLogger(__name__)

# In order of preference: the first that can run is the best one for the device.
BACKENDS: dict[str, Backend] = {
    "mosaic_gpu": mosaic_gpu,
    "triton": triton,
    "mosaic_ampere": mosaic_ampere,
    "mosaic_tpu": mosaic_tpu,
    "xla": xla,
    "mosaic_blackwell": mosaic_blackwell,  # by name only, as xla runs everywhere
}
IMPLEMENTATIONS = ("reference", *BACKENDS)
SKIPPING = "mosaic_gpu", "xla"  # those that support `KeyBlocks.skip`


def dual_chunk_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    dca: Method | None,
    rope: RopeConfig,
    lengths: Int[Array, " B"] | None = None,
    query_offset: int | Int[Array, " B"] = 0,
    context_lengths: Int[Array, " B"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Dual Chunk Attention over raw (unrotated) queries and keys; causal, one softmax.

    Args:
        query: queries; those of row b have text indices query_offset[b] + 0 .. T - 1.
        key, value: keys and values of the texts from the first token on, K kv heads; N is a
            multiple of K, and query head n reads kv head n // (N / K). Keys are not repeated in
            memory.
        dca: chunk length and largest query position; None for plain causal RoPE attention, or a
            `PositionMethod` for another assignment of positions.
        rope: parameters of the RoPE frequencies.
        lengths: number of tokens of each row's text, including its queries' own (right-padded
            batches). Default: query_offset + T. Outputs of padding queries are zero.
        query_offset: text index of the first query, one for all rows or one per row.
        context_lengths: the length L, in tokens, used for temperature and dynamic NTK; default
            `lengths`. In a chunked prefill, the length of the whole prompt.
        implementation: one of `IMPLEMENTATIONS`; None picks the best for the device.

    Returns:
        [B, T, N, H] in the dtype of `query`. Logits and softmax are float32 (float64 for float64).
        Exactly differentiable in query, key and value.

    Raises:
        InputError: the shapes do not match, or the implementation cannot run.

    Source: arXiv 2402.17463, section 3; see `dca_jax.dca`.
    """
    _check_ranks(query, key, value)
    num_keys = key.shape[1]
    _check_reach(query.shape[1], num_keys, query_offset)
    rows = make_rows(
        query.shape,
        dca=dca,
        rope=rope,
        lengths=lengths,
        query_offset=query_offset,
        context_lengths=context_lengths,
    )
    positions = jnp.arange(num_keys, dtype=jnp.int32)[None, :]
    rotated = rotate_keys(key, positions, dca=dca, inv_freq=rows.inv_freq)
    return attend(query, rotated, value, dca=dca, rows=rows, implementation=implementation)


def make_rows(
    query_shape: tuple[int, ...],
    *,
    dca: Method | None,
    rope: RopeConfig | Frequencies,
    lengths: Int[Array, " B"] | None = None,
    query_offset: int | Int[Array, " B"] = 0,
    context_lengths: Int[Array, " B"] | None = None,
    frequency_lengths: Int[Array, " B"] | None = None,
) -> Rows:
    """Computes each row's frequencies and logit scale; arguments as in `dual_chunk_attention`.

    `frequency_lengths`, the lengths used for dynamic NTK, differ from `context_lengths` only for a
    growing KV cache, whose keys keep the frequencies with which they were written.
    """
    batch, num_queries, _, head_dim = query_shape
    offset = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (batch,))
    lengths = offset + num_queries if lengths is None else lengths.astype(jnp.int32)
    if context_lengths is None:
        context_lengths = lengths
    if frequency_lengths is None:
        frequency_lengths = context_lengths
    # DCA never uses a position above Q, so its rope never has to cover more than Q + 1 positions.
    largest = None
    if dca is not None:
        is_method = isinstance(dca, PositionMethod)
        largest = dca.max_position if is_method else dca.max_query_position
    if largest is not None:
        frequency_lengths = jnp.minimum(frequency_lengths - 1, largest) + 1
    tau = temperature(context_lengths, dca if isinstance(dca, DCAConfig) else PLAIN)
    return Rows(
        inv_freq=inverse_frequencies(rope, head_dim, frequency_lengths),
        scale=tau * logit_scale(rope, head_dim),
        offset=offset,
        lengths=lengths,
        key_offset=jnp.zeros_like(offset),
        whole=jnp.broadcast_to(context_lengths, (batch,)).astype(jnp.int32),
    )


def rotate_keys(
    key: Float[Array, "B S K H"],
    index: Int[Array, "#B S"],
    *,
    dca: Method | None,
    inv_freq: Float[Array, "#B half"],
) -> Float[Array, "B S K H"]:
    """Rotates keys to P_k of their text index: the only form that a KV cache has to hold.

    A rotated key depends only on its own index, so prefix reuse, rollback and any split of a
    prefill are exact. A `PositionMethod` caches raw keys, because each band has its own P_k.
    """
    if isinstance(dca, PositionMethod):
        return key
    return rotate(key, key_position(index, dca or PLAIN), inv_freq)


def attend(
    query: Float[Array, "B T N H"],
    key: Num[Array, "*L R S K H"],
    value: Num[Array, "*L R S K H"],
    *,
    dca: Method | None,
    rows: Rows,
    layer: Int[Array, ""] | None = None,
    implementation: str | None = None,
    scales: Scales | None = None,
    blocks: KeyBlocks | None = None,
    pages: Int[Array, "B pages_per_row"] | None = None,
    common: Common | None = None,
) -> Float[Array, "B T N H"]:
    """`dual_chunk_attention` with keys already rotated by `rotate_keys` (a KV cache).

    Key and value are [B, S, K, H], or with `layer` all layers of a cache, [L, B, S, K, H], of which
    that layer is read in place. Keys beyond a row's length do not affect the result, unless they
    are NaN (a masked value is multiplied by zero).

    Args:
        scales: scales of 8-bit keys and values (`dca_jax.attention.stored`).
        blocks: the key blocks that each tile of queries reads, edges aside
            (`dca_jax.attention.blocks`); default: all that it attends to.
        pages: the page table of each row (`dca_jax.attention.pages`); key and value are then a pool
            of pages [L, P, page, K, H], and a row's first key is the first of its text.
        common: prefixes shared by rows, for one query per row and a page table. Implementations
            that can (`common_rows`) read them once for all rows; others read them once per row.

    There is no gradient with any of these.

    Raises:
        InputError: the shapes do not match, the implementation cannot run, or a gradient is
            requested where there is none.
    """
    number = jnp.int32(0) if layer is None else layer
    if layer is None:
        key, value = key[None], value[None]
    like = _check_shapes(query, key, value, scales, pages)
    if blocks is not None:
        check_blocks(blocks, query.shape, key.shape[3])
    dca = dca or PLAIN
    if isinstance(dca, PositionMethod) and not (blocks is None and pages is None):
        raise InputError(
            f"lists of key blocks and pages are read with DCA or plain attention, not with "
            f"{type(dca).__name__}"
        )
    kinds = {"listed": blocks is not None, "paged": pages is not None}
    name = choose_implementation(implementation, _like(query), like, dca, **kinds)
    if blocks is not None and blocks.skip is not None and name not in SKIPPING:
        raise InputError(
            f"skip-softmax runs with {' and '.join(SKIPPING)}, and attention is by {name!r} here; "
            "choose another --sparse, or implementation='xla'"
        )
    if name == "reference":
        return _by_definition(query, key, value, number, rows, dca, scales, blocks, pages)
    phases = () if isinstance(dca, PositionMethod) else phases_within(like.shape[2], dca)
    if name != "mosaic_gpu":
        common = None
    extras, (form, numbers) = Extras(scales, blocks, pages, common), split(dca)
    if any(x is not None for x in extras):
        return _read_only(name, form, phases, numbers, query, key, value, number, rows, extras)
    out, _ = _flash(name, form, phases, False, numbers, query, key, value, number, rows)
    return out


class Extras(NamedTuple):
    """Optional arguments of `attend` that accompany the keys; none has a gradient."""

    scales: Scales | None
    blocks: KeyBlocks | None
    pages: Int[Array, "B pages_per_row"] | None
    common: Common | None


def common_rows(
    implementation: str | None,
    query: jax.ShapeDtypeStruct,
    key: jax.ShapeDtypeStruct,
    dca: Method | None,
) -> int:
    """How many rows' queries are processed together over a shared prefix; 0 if none are.

    Arguments as in `choose_implementation`, with a page table.
    """
    name = choose_implementation(implementation, query, key, dca or PLAIN, paged=True)
    return mosaic_gpu.rows_at_once(query, key) if name == "mosaic_gpu" else 0


def _by_definition(
    query: Array,
    key: Array,
    value: Array,
    layer: Array,
    rows: Rows,
    dca: Method,
    scales: Scales | None,
    blocks: KeyBlocks | None,
    pages: Array | None,
) -> Array:
    """Dense attention over one layer's keys, which are first gathered, unpacked and masked."""
    if pages is not None:
        key, value, scales = unpaged(key, value, scales, layer, pages)
        layer = jnp.int32(0)
    if scales is not None:
        key, value = dequantized_layer(key, value, scales, layer, query.dtype)
        layer = jnp.int32(0)
    key, value = key[layer], value[layer]
    if isinstance(dca, PositionMethod):
        return dense_method_attention(query, key, value, dca=dca, **rows._asdict())
    allowed = None
    if blocks is not None:
        sizes = {"num_queries": query.shape[1], "num_keys": key.shape[1]}
        allowed = allowed_keys(blocks, rows, dca, **sizes)
    return dense_attention(query, key, value, dca=dca, allowed=allowed, **rows.of_dca())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _read_only(
    name: str,
    form: Method,
    phases: tuple[Phase, ...],
    numbers: dict[str, Any],
    query: Array,
    key: Array,
    value: Array,
    layer: Array,
    rows: Rows,
    extras: Extras,
) -> Array:
    given = {name: extra for name, extra in extras._asdict().items() if extra is not None}
    options = {"dca": joined(form, numbers), "phases": phases, "with_lse": False, **given}
    return BACKENDS[name].forward(query, key, value, layer, rows, **options)[0]


@_read_only.defjvp
def _refuse_gradient(
    name: str, form: Method, phases: tuple, primals: tuple, tangents: tuple
) -> Any:
    scales, blocks, pages, _ = primals[-1]
    found = [
        what
        for what, extra in (
            ("over lists of key blocks", blocks),
            ("through pages", pages),
            ("over keys and values in 8 bits", scales),
        )
        if extra is not None
    ]
    raise InputError(
        f"attention {' and '.join(found)} has no gradient: it reads a prompt; train with dense "
        "attention over whole texts"
    )


def attention_pass(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    phase: Phase,
    dca: DCAConfig,
    rope: RopeConfig,
    lengths: Int[Array, " B"] | None = None,
    query_offset: int | Int[Array, " B"] = 0,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """One of the paper's three passes: attention over the keys of one phase only.

    Arguments as in `dual_chunk_attention` (raw query and key); `implementation` must be a flash
    backend, not "reference".

    Returns:
        The pass's output, and the natural log-sum-exp of its logits, float32 [B, N, T]; a query
        without keys in this phase has output 0 and log-sum-exp -inf. Both are
        differentiable, so `merge_passes` of three passes has the exact gradient too.
    """
    if implementation == "reference":
        raise InputError(
            "implementation 'reference' has no separate passes; expected one of "
            + ", ".join(BACKENDS)
        )
    _check_ranks(query, key, value)
    _check_shapes(query, key[None], value[None])
    _check_reach(query.shape[1], key.shape[1], query_offset)
    name = choose_implementation(implementation, _like(query), _like(key[None]), dca)
    rows = make_rows(query.shape, dca=dca, rope=rope, lengths=lengths, query_offset=query_offset)
    positions = jnp.arange(key.shape[1], dtype=jnp.int32)[None, :]
    rotated = rotate_keys(key, positions, dca=dca, inv_freq=rows.inv_freq)
    return _flash(
        *(name, dca, (phase,), True, {}, query, rotated[None], value[None], jnp.int32(0), rows)
    )


def choose_implementation(
    implementation: str | None,
    query: jax.ShapeDtypeStruct,
    key: jax.ShapeDtypeStruct,
    dca: Method,
    *,
    listed: bool = False,
    paged: bool = False,
) -> str:
    """Returns the name of the implementation to run: the requested one, or the best if None.

    The query is [B, T, N, H] and the key [L, B, S, K, H], as `Backend` takes them; with a page
    table, S is its capacity in tokens. `listed` and `paged`: with lists of key blocks, with pages.

    Raises:
        InputError: the name is unknown, or the implementation cannot run here (with the reason).
    """
    check_implementation(implementation)
    device, kinds = current_device(), {"listed": listed, "paged": paged}
    if implementation == "reference":
        return implementation
    if implementation is not None:
        reason = BACKENDS[implementation].unsupported(device, query, key, dca, **kinds)
        if reason is not None:
            raise InputError(f"attention implementation {implementation!r} cannot run: {reason}")
        return implementation
    reasons = []
    for name, backend in BACKENDS.items():
        reason = backend.unsupported(device, query, key, dca, **kinds)
        if reason is None:
            if device.platform != "cpu" and name == "xla":
                _log_once(f"attention runs in plain XLA: {'; '.join(reasons)}")
            return name
        reasons.append(f"{name}: {reason}")
    raise InputError("no attention implementation can run: " + "; ".join(reasons))


def check_implementation(implementation: str | None) -> None:
    """Raises InputError unless `implementation` is None, "reference" or a name in `BACKENDS`."""
    known = ("reference", *BACKENDS)
    if implementation is not None and implementation not in known:
        raise InputError(
            f"unknown attention implementation {implementation!r}; expected one of "
            f"{', '.join(known)}, or None to pick the best for the device"
        )


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)


def _check_ranks(query: Array, key: Array, value: Array) -> None:
    for name, array, letters in (
        ("query", query, "batch, tokens, query heads, head_dim"),
        ("key", key, "batch, keys, kv heads, head_dim"),
        ("value", value, "batch, keys, kv heads, head_dim"),
    ):
        if array.ndim != 4:
            raise InputError(f"{name} must have four axes ({letters}), got shape {array.shape}")


def _check_reach(num_queries: int, num_keys: int, offset: int | Array) -> None:
    """Checks that every query's own key is present, where the offset is a Python number."""
    if max(num_queries, num_keys) > LARGEST:
        raise InputError(f"a text has at most {LARGEST} tokens, got {max(num_queries, num_keys)}")
    if isinstance(offset, int) and not 0 <= offset <= num_keys - num_queries:
        raise InputError(
            f"{num_queries} queries from text index {offset} on need at least "
            f"{num_queries + offset} keys and an offset of at least 0, got {num_keys} keys"
        )


def _check_shapes(
    query: Array,
    key: Array,
    value: Array,
    scales: Scales | None = None,
    pages: Array | None = None,
) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of the rows' keys, [L, B, S, K, H]."""
    shape = key.shape
    if pages is not None:
        check_pages(pages, query.shape, shape)
        shape = (shape[0], pages.shape[0], pages.shape[1] * shape[2], *shape[3:])
    if query.shape[0] != shape[1] or query.shape[3] != shape[4]:
        raise InputError(
            f"query {query.shape} and key {key.shape[1:]} must agree in batch and head_dim"
        )
    if key.shape != value.shape:
        raise InputError(f"key {key.shape[1:]} and value {value.shape[1:]} must have one shape")
    if query.shape[2] % key.shape[3]:
        raise InputError(
            f"query heads ({query.shape[2]}) must be a multiple of kv heads ({key.shape[3]})"
        )
    is_8_bit = scales is not None and key.dtype == value.dtype and is_quantized(key.dtype)
    if not is_8_bit and not (query.dtype == key.dtype == value.dtype):
        raise InputError(
            f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and "
            f"{value.dtype}"
        )
    return jax.ShapeDtypeStruct(shape, key.dtype)


# --- the exact gradient ------------------------------------------------------------------------


def _forward(
    name: str,
    form: Method,
    phases: tuple[Phase, ...],
    with_lse: bool,
    numbers: dict[str, Any],
    query: Array,
    key: Array,
    value: Array,
    layer: Array,
    rows: Rows,
) -> tuple[Array, Array | None]:
    """(out [B,T,N,H], lse [B,N,T] if requested) over the keys that `phases` cover."""
    options = {"dca": joined(form, numbers), "phases": phases, "with_lse": with_lse}
    return BACKENDS[name].forward(query, key, value, layer, rows, **options)


def _forward_saving(
    name: str,
    form: Method,
    phases: tuple[Phase, ...],
    with_lse: bool,
    numbers: dict[str, Any],
    query: Array,
    key: Array,
    value: Array,
    layer: Array,
    rows: Rows,
) -> tuple[tuple[Array, Array | None], tuple]:
    out, lse = _forward(name, form, phases, True, numbers, query, key, value, layer, rows)
    # Otherwise XLA's GPU compiler runs the kernel twice in a scan over layers: once for the next
    # layer, and again fused with storing the result for the backward pass (jaxlib 0.11.2).
    out, lse = jax.lax.optimization_barrier((out, lse))
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return (out, lse if with_lse else None), (*(numbers, query, key, value, layer, rows, out, lse),)


def _backward(
    name: str,
    form: Method,
    phases: tuple[Phase, ...],
    with_lse: bool,
    saved: tuple,
    cotangents: tuple,
) -> tuple:
    numbers, query, key, value, layer, rows, out, lse = saved
    do, dlse = cotangents
    delta = output_delta(do, out, lse.dtype)
    if with_lse:
        # d lse / d logit = P, so the cotangent of lse joins delta: dS = P * (dP - delta + dlse).
        delta = delta - jnp.where(jnp.isfinite(lse), dlse, 0)
    options = {"dca": joined(form, numbers), "phases": phases}
    dq, dk, dv = BACKENDS[name].backward(
        query, key, value, jnp.asarray(layer), rows, do, lse, delta, **options
    )
    if key.shape[0] == 1:
        return None, dq, dk[None], dv[None], None, None
    dk = jnp.zeros_like(key).at[layer].set(dk)
    dv = jnp.zeros_like(value).at[layer].set(dv)
    return None, dq, dk, dv, None, None


_flash = jax.custom_vjp(_forward, nondiff_argnums=(0, 1, 2, 3))
_flash.defvjp(_forward_saving, _backward)
