"""Every fast path against the dense oracle, in value and gradient, at the edges.

The tiles of the blockwise backend are made small here, so that short texts cross many of them.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import draw

from dca_jax.attention import (
    attend,
    attention_pass,
    dual_chunk_attention,
    merge_passes,
)
from dca_jax.attention.op import make_rows
from dca_jax.dca import PHASES, DCAConfig
from dca_jax.errors import InputError
from dca_jax.rope import RopeConfig

GOLDEN = Path(__file__).parent / "golden" / "chunkllama"
ROPE = RopeConfig()
# Those that compute in the dtype of their inputs, float64 too. The kernels have tests of their own.
EXACT = ("reference", "xla")


# Compiled as one, as users run it (and much faster to compile than op by op).
attention = jax.jit(dual_chunk_attention, static_argnames=("dca", "rope", "implementation"))


def case_names() -> list[dict]:
    return json.loads((GOLDEN / "attention.json").read_text())


@pytest.mark.parametrize("implementation", [*EXACT, "three_pass"])
@pytest.mark.parametrize("case", case_names(), ids=lambda case: case["name"])
def test_equals_the_original_chunkllama(case: dict, implementation: str) -> None:
    with np.load(GOLDEN / "attention.npz") as arrays:
        q, k, v, expected = (
            jnp.asarray(arrays[f"{case['name']}.{name}"]) for name in ("q", "k", "v", "out")
        )
    # The golden multiplier is m(L) of ChunkLlama's slope; where it is 1, no temperature.
    dca = DCAConfig(
        chunk_len=case["chunk_len"],
        max_query_position=case["max_query_position"],
        trained_length=case["pretraining_length"],
        temperature_slope=0.05 if case["cos_sin_multiplier"] > 1 else 0.0,
    )
    rope = RopeConfig(theta=case["rope_theta"])
    if implementation == "three_pass":
        out = three_passes(q, k, v, dca=dca, rope=rope)
    else:
        out = attention(q, k, v, dca=dca, rope=rope, implementation=implementation)
    np.testing.assert_allclose(out, expected, atol=1e-5, rtol=0)


@functools.partial(jax.jit, static_argnames=("dca", "rope"))
def three_passes(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
    passes = [attention_pass(q, k, v, phase=phase, **options) for phase in PHASES]
    return merge_passes([out for out, _ in passes], [lse for _, lse in passes])[0]


S = 40  # no multiple of the tile
EDGES = [1, S - 1, S, S + 1, 2 * S, 2 * S + 1, 5 * S + 7]


@pytest.mark.parametrize(
    ("largest", "lengths"),
    [
        *((largest, EDGES) for largest in (S, 60, 2 * S - 1)),
        (60, [1]),  # and as the shape itself
        (60, [2 * S + 1]),
    ],
)
@pytest.mark.usefixtures("small_tiles")
def test_edges_in_value(largest: int, lengths: list[int]) -> None:
    """Texts of every length at an edge, as the rows of one batch, the shorter ones padded."""
    dca = DCAConfig(chunk_len=S, max_query_position=largest)
    batch, length = len(lengths), max(lengths)
    with jax.enable_x64(True):
        q, k, v = draw(largest, batch, length, length, 4, 2, 16, jnp.float64)
        expected = oracle.attention(q, k, v, s=S, largest=largest, lengths=lengths)
        for implementation in EXACT:
            out = attention(
                q,
                k,
                v,
                dca=dca,
                rope=ROPE,
                lengths=jnp.asarray(lengths, jnp.int32),
                implementation=implementation,
            )
            # Angles are float32 by design; the oracle's are float64.
            np.testing.assert_allclose(out, expected, atol=3e-5, rtol=0)
            for row, end in enumerate(lengths):
                assert not np.asarray(out[row, end:]).any()


@functools.partial(jax.jit, static_argnames="form")
def edge_gradients(
    q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array, lengths: jax.Array, form: str
) -> tuple[jax.Array, ...]:
    dca = DCAConfig(chunk_len=S, max_query_position=60)
    options: dict[str, Any] = {"dca": dca, "rope": ROPE, "lengths": lengths}

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if form == "three_pass":
            return jnp.sum(three_passes(q, k, v, **options) * weight)
        return jnp.sum(attention(q, k, v, implementation=form, **options) * weight)

    return jax.grad(loss, (0, 1, 2))(q, k, v)


@pytest.mark.usefixtures("small_tiles")
def test_edges_in_gradient_float64() -> None:
    """Fused, and in three passes. Lengths as shapes: test_backends.py."""
    batch, length = len(EDGES), max(EDGES)
    with jax.enable_x64(True):
        q, k, v = draw(length, batch, length, length, 4, 2, 16, jnp.float64)
        weight = draw(1, batch, length, length, 4, 4, 16, jnp.float64)[0]
        inputs = q, k, v, weight, jnp.asarray(EDGES, jnp.int32)
        expected = edge_gradients(*inputs, form="reference")
        for form in ("xla", "three_pass"):
            for ours, theirs in zip(edge_gradients(*inputs, form=form), expected, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-10, rtol=0)
                for row, end in enumerate(EDGES):
                    assert end == 1 or np.abs(theirs[row]).max() > 1e-3


@pytest.mark.parametrize(
    ("dtype", "atol"), [(jnp.float32, 3e-6), (jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)]
)
@pytest.mark.usefixtures("small_tiles")
def test_dtypes_in_value_and_gradient(dtype: Any, atol: float) -> None:
    dca = DCAConfig(chunk_len=24, max_query_position=30)
    q, k, v = draw(0, 1, 101, 101, 4, 2, 64, dtype)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    weight = draw(1, 1, 101, 101, 4, 4, 64)[0]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, name: str) -> jax.Array:
        out = attention(q, k, v, dca=dca, rope=ROPE, implementation=name)
        assert out.dtype == q.dtype
        return jnp.sum(out.astype(jnp.float32) * weight)

    grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
    expected, grads = grad(*wide, "reference")
    value, ours = grad(q, k, v, "xla")
    assert value == pytest.approx(float(expected), abs=100 * atol)
    for a, b in zip(ours, grads, strict=True):
        assert a.dtype == dtype
        error = np.linalg.norm(a.astype(jnp.float32) - b) / np.linalg.norm(b)
        assert error < atol


@pytest.mark.parametrize(
    ("s", "largest", "num_queries"), [(1, 2, 5), (7, 7, 40), (16, 31, 1), (30, 58, 23)]
)
@pytest.mark.usefixtures("small_tiles")
def test_a_piece_anywhere_in_a_longer_cache(s: int, largest: int, num_queries: int) -> None:
    """Two rows at different places, padding in one, a cache longer than either; values and all."""
    num_keys = 128
    q, k, v = (np.asarray(x) for x in draw(s, 2, num_queries, num_keys, 2, 1, 8))
    options: dict[str, Any] = {
        "dca": DCAConfig(chunk_len=s, max_query_position=largest),
        "rope": ROPE,
    }

    @settings(max_examples=8)
    @given(start=st.integers(0, 70), other=st.integers(0, 70), padding=st.integers(0, 20))
    def anywhere(start: int, other: int, padding: int) -> None:
        offset, lengths = [start, other], [start, other + max(num_queries - padding, 1)]
        lengths[0] += num_queries
        # Whatever lies beyond a row's tokens must not be read.
        beyond = np.arange(num_keys)[None, :] >= np.array(lengths)[:, None]
        poisoned = [np.where(beyond[:, :, None, None], np.float32(1e4), x) for x in (k, v)]
        expected = oracle.attention(q, k, v, s=s, largest=largest, offset=offset, lengths=lengths)
        where = {"query_offset": np.array(offset, np.int32), "lengths": np.array(lengths, np.int32)}
        for implementation in EXACT:
            out = attention(q, *poisoned, **where, implementation=implementation, **options)
            np.testing.assert_allclose(out, expected, atol=1e-5, rtol=0)

    anywhere()


@pytest.mark.usefixtures("small_tiles")
def test_up_to_a_chunk_dca_is_plain_attention() -> None:
    q, k, v = draw(0, 1, 64, 64, 4, 2, 32)
    dca = DCAConfig(chunk_len=64, max_query_position=70)
    for implementation in EXACT:
        options: dict[str, Any] = {"rope": ROPE, "implementation": implementation}
        ours = attention(q, k, v, dca=dca, **options)
        plain = attention(q, k, v, dca=None, **options)
        np.testing.assert_array_equal(ours, plain)


def test_plain_attention_equals_jax() -> None:
    """A peer that knows nothing of us: `jax.nn.dot_product_attention` on keys rotated outside."""
    from dca_jax.rope import inverse_frequencies, rotate

    q, k, v = draw(0, 2, 150, 150, 4, 2, 32)
    inv_freq = inverse_frequencies(ROPE, 32)
    index = jnp.arange(150)[None]
    expected = jax.nn.dot_product_attention(
        rotate(q, index, inv_freq), rotate(k, index, inv_freq), v, is_causal=True
    )
    out = attention(q, k, v, dca=None, rope=ROPE, implementation="xla")
    np.testing.assert_allclose(out, expected, atol=3e-6, rtol=0)


@pytest.mark.usefixtures("small_tiles")
def test_log_sum_exp_of_a_pass() -> None:
    """Natural log, float32 [B, N, T], -inf where a query meets no key, and 0 its output."""
    dca = DCAConfig(chunk_len=16, max_query_position=20)
    q, k, v = draw(0, 1, 50, 50, 2, 2, 8)
    run = jax.jit(attention_pass, static_argnames=("phase", "dca", "rope"))
    outs, lses = zip(
        *(run(q, k, v, phase=phase, dca=dca, rope=ROPE) for phase in PHASES), strict=True
    )
    assert all(lse.shape == (1, 2, 50) and lse.dtype == jnp.float32 for lse in lses)
    inter, succ, intra = (np.isfinite(lse[0, 0]) for lse in lses)
    index = np.arange(50)
    np.testing.assert_array_equal(inter, index >= 32)
    np.testing.assert_array_equal(succ, index >= 16)
    assert intra.all()
    assert not np.asarray(outs[0][0, :32]).any()
    merged, total = merge_passes(list(outs), list(lses))
    ones = attention(q, k, jnp.ones_like(v), dca=dca, rope=ROPE)
    np.testing.assert_allclose(ones, 1.0, atol=1e-6)
    expected = attention(q, k, v, dca=dca, rope=ROPE, implementation="reference")
    np.testing.assert_allclose(merged, expected, atol=3e-6)
    np.testing.assert_allclose(total, np.logaddexp.reduce(np.stack(lses)), atol=1e-5)


def test_dropping_the_gradient_of_the_log_sum_exp_is_wrong() -> None:
    """Why the op has a gradient of its own: the released code's detached merge errs by far."""
    dca = DCAConfig(chunk_len=24, max_query_position=30)
    q, k, v = draw(0, 1, 120, 120, 2, 2, 32)

    def detached(q: jax.Array) -> jax.Array:
        passes = [attention_pass(q, k, v, phase=p, dca=dca, rope=ROPE) for p in PHASES]
        lses = [jax.lax.stop_gradient(lse) for _, lse in passes]
        return jnp.sum(merge_passes([out for out, _ in passes], lses)[0] ** 2)

    def exact(q: jax.Array) -> jax.Array:
        return jnp.sum(attention(q, k, v, dca=dca, rope=ROPE) ** 2)

    right, wrong = jax.jit(jax.grad(exact))(q), jax.jit(jax.grad(detached))(q)
    assert float(jnp.linalg.norm(wrong - right) / jnp.linalg.norm(right)) > 0.05


def test_memory_is_linear_in_length() -> None:
    """What the compiler allocates for 8k and 32k tokens, forward and backward."""
    dca = DCAConfig.paper(4096)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attention(q, k, v, dca=dca, rope=ROPE, implementation="xla"))

    def temporary_bytes(length: int) -> int:
        q = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
        k = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(8192), temporary_bytes(32768)
    print(f"temporary MiB at 8k, 32k: {small / 2**20:.1f}, {large / 2**20:.1f}")
    assert large < 4.4 * small
    assert large < 32768 * 2 * 64 * 4 * 12  # a dozen arrays of q's size; [T, T] would be 512


def test_a_layer_of_a_cache_is_read_where_it_lies() -> None:
    """The same values and gradients as from a copy of the layer; the other layers get none."""
    dca = DCAConfig(chunk_len=24, max_query_position=30)
    q, k, v = draw(0, 1, 70, 70, 4, 2, 16)
    rows = make_rows(q.shape, dca=dca, rope=ROPE)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array | None) -> jax.Array:
        return jnp.sum(attend(q, k, v, dca=dca, rows=rows, layer=layer) ** 2)

    grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    value, (dq, *dkv) = grad(q, k, v, None)
    stacked = [jnp.stack([3 * x, x, 2 * x]) for x in (k, v)]
    ours, (dq_ours, *dkv_ours) = grad(q, *stacked, jnp.int32(1))
    assert ours == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_allclose(dq_ours, dq, atol=1e-5)
    for mine, theirs in zip(dkv_ours, dkv, strict=True):
        np.testing.assert_allclose(mine[1], theirs, atol=1e-5)
        assert not np.asarray(mine[::2]).any()


def test_bitwise_deterministic() -> None:
    q, k, v = draw(0, 1, 700, 700, 2, 1, 32)
    run = jax.jit(lambda q, k, v: attention(q, k, v, dca=DCAConfig.paper(256), rope=ROPE))
    np.testing.assert_array_equal(run(q, k, v), run(q, k, v))


@pytest.mark.parametrize(
    ("shapes", "implementation", "message"),
    [
        (((1, 8, 3, 8), (1, 8, 2, 8), (1, 8, 2, 8)), None, "multiple of kv heads"),
        (((1, 8, 2, 8), (1, 8, 2, 8), (1, 8, 2, 8)), "fast", "unknown attention implementation"),
    ],
)
def test_refused(shapes: tuple, implementation: str | None, message: str) -> None:
    q, k, v = (jnp.ones(shape) for shape in shapes)
    with pytest.raises(InputError, match=message):
        dual_chunk_attention(q, k, v, dca=None, rope=ROPE, implementation=implementation)


def test_mixed_dtypes_are_refused() -> None:
    q, k, v = draw(0, 1, 8, 8, 2, 2, 8)
    with pytest.raises(InputError, match="one dtype"):
        dual_chunk_attention(q.astype(jnp.bfloat16), k, v, dca=None, rope=ROPE)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "keys", "offset", "fits"),
    [(8, 8, 0, True), (8, 5, 0, False), (2, 8, 6, True), (2, 8, 7, False), (2, 8, -1, False)],
)
def test_every_query_needs_its_own_key(queries, keys, offset, fits):
    q, k = (jnp.ones((1, n, 2, 8), jnp.float32) for n in (queries, keys))
    dca = DCAConfig(chunk_len=4, max_query_position=7)
    if fits:
        out = dual_chunk_attention(q, k, k, dca=dca, rope=ROPE, query_offset=offset)
        assert out.shape == q.shape
        return
    for call in (dual_chunk_attention, functools.partial(attention_pass, phase=PHASES[0])):
        with pytest.raises(InputError, match=f"^{queries} queries from text index {offset} on"):
            call(q, k, k, dca=dca, rope=ROPE, query_offset=offset)


@pytest.mark.parametrize("implementation", EXACT)
def test_a_chunk_as_long_as_int32_allows_is_plain_attention(implementation):
    x = jax.random.normal(jax.random.key(0), (1, 8, 2, 8), jnp.float32)
    longest = DCAConfig(chunk_len=2**31 - 1, max_query_position=2**31 - 1)
    options = {"rope": ROPE, "implementation": implementation}
    expected = attention(x, x, x, dca=None, **options)
    np.testing.assert_allclose(attention(x, x, x, dca=longest, **options), expected, atol=1e-6)
