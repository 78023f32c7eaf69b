"""Every method against its published formula, written once more here: plain loops in float64."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dca_jax.attention import attend, dual_chunk_attention
from dca_jax.attention.bands import PositionMethod, relative_positions
from dca_jax.attention.op import make_rows
from dca_jax.config import LlamaConfig
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.inference.baselines import (
    DCAAblation,
    LMInfinite,
    ReRoPE,
    SelfExtend,
    ShiftedRoPE,
    StreamingLLM,
)
from dca_jax.inference.methods import (
    METHODS,
    describe_methods,
    method_by_name,
    whole_length,
    with_method,
)
from dca_jax.kv_cache import KVCache
from dca_jax.lengths import parse_tokens
from dca_jax.model import Llama
from dca_jax.rope import RopeConfig, attention_factor, inverse_frequencies
from dca_jax.sharding import make_mesh
from dca_jax.weights.placement import parameter_shardings

ROPE = RopeConfig()
EXACT = ("reference", "xla")


class Case(NamedTuple):
    """A method, and its formula: relative position of query i and key j, None where masked."""

    method: PositionMethod
    relative: Callable[[int, int], int | None]
    identity: int  # texts of so many tokens are read as by plain RoPE, and of one more are not
    factor: Callable[[int], float] = lambda i: 1.0


def self_extend(i: int, j: int) -> int:
    return (
        i - j if i - j < 10 else math.floor(i / 3) + (10 - math.floor(10 / 3)) - math.floor(j / 3)
    )


def streaming_llm(i: int, j: int) -> int | None:
    if i - j <= 11:
        return i - j
    return min(i, 4 + 11) - j if j < 4 else None


def lm_infinite(i: int, j: int) -> int | None:
    if i - j < 13:
        return i - j
    return min(i - j, 13) if j < 5 else None


def intra_inter(i: int, j: int) -> int:
    return i % 12 - j % 12 if i // 12 == j // 12 else 15 - j % 12


ABLATED = DCAConfig(chunk_len=12, max_query_position=15)
CASES = {
    "rerope": Case(ReRoPE(window=13), lambda i, j: min(i - j, 13), 14),
    "rerope-log": Case(
        ReRoPE(window=13, trained_length=20),
        lambda i, j: min(i - j, 13),
        14,
        lambda i: max(1.0, math.log(i + 1, 20)),
    ),
    "self-extend": Case(SelfExtend(group=3, window=10), self_extend, 11),
    "streaming-llm": Case(StreamingLLM(sinks=4, recent=11), streaming_llm, 16),
    "lm-infinite": Case(LMInfinite(sinks=5, window=13), lm_infinite, 14),
    "string": Case(
        ShiftedRoPE(shift=14, local_window=3),
        lambda i, j: i - j if i - j < 14 else i - j - 14 + 3,
        14,
    ),
    "dca-intra": Case(
        DCAAblation(dca=ABLATED, inter=False),
        lambda i, j: i - j if i // 12 == j // 12 else None,
        12,
    ),
    "dca-intra-inter": Case(DCAAblation(dca=ABLATED, inter=True), intra_inter, 12),
}


def published(
    case: Case,
    query: np.ndarray,  # [B, T, N, H]
    key: np.ndarray,  # [B, S, K, H]
    value: np.ndarray,
    *,
    offset: list[int],
    lengths: list[int],
    first_key: int = 0,
) -> np.ndarray:
    """One softmax over the keys that the formula lets each query meet; zeros for padding."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, half = key.shape[1], head_dim // 2
    frequency = 10_000.0 ** (-2.0 * np.arange(half) / head_dim)
    out = np.zeros_like(query)
    for b in range(batch):
        for t in range(num_queries):
            i = offset[b] + t
            seen = [j for j in range(first_key, first_key + num_keys) if j <= i < lengths[b]]
            seen = [j for j in seen if case.relative(i, j) is not None]
            if not seen:
                continue
            far = np.array([case.relative(i, j) for j in seen])
            turn = np.exp(1j * far[:, None] * frequency[None, :])
            rows = np.array(seen) - first_key
            for n in range(num_heads):
                k, v = (x[b, rows, n // (num_heads // key.shape[2])] for x in (key, value))
                q = query[b, t, n, :half] + 1j * query[b, t, n, half:]
                logits = (q * turn * np.conj(k[:, :half] + 1j * k[:, half:])).real.sum(axis=1)
                logits *= case.factor(i) / math.sqrt(head_dim)
                weights = np.exp(logits - logits.max())
                out[b, t, n] = weights @ v / weights.sum()
    return out


def draw(
    batch: int, num_queries: int, num_keys: int, dtype: Any = jnp.float32, dim: int = 16
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries of 4 heads, keys and values of 2."""
    rng = np.random.default_rng(0)
    shapes = (num_queries, 4), (num_keys, 2), (num_keys, 2)
    q, k, v = (rng.normal(size=(batch, n, h, dim)) for n, h in shapes)
    return jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype)


attention = jax.jit(dual_chunk_attention, static_argnames=("dca", "rope", "implementation"))


# --- the maps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_relative_positions_are_the_formula(name: str) -> None:
    matrix = relative_positions(61, CASES[name].method)
    for i, j in np.ndindex(matrix.shape):
        relative = CASES[name].relative(i, j) if j <= i else None
        assert matrix[i, j] == (-1 if relative is None else relative), (i, j)


@pytest.mark.parametrize("name", CASES)
def test_identity_and_largest_position(name: str) -> None:
    case = CASES[name]
    matrix = relative_positions(200, case.method)
    i, j = np.indices(matrix.shape)
    same = ((matrix == i - j) | (j > i)).all(axis=1)
    assert same[: case.identity].all()
    assert not same[case.identity]
    if case.method.max_position is not None:
        assert matrix.max() <= case.method.max_position


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(1, 12))
def test_maps_of_any_size(a: int, b: int) -> None:
    """Windows of 1 and the like: no key is met twice, and none at a negative distance."""
    length = 40
    for method in (
        ReRoPE(window=a),
        SelfExtend(group=a, window=b),
        StreamingLLM(sinks=a, recent=b),
        LMInfinite(sinks=a, window=b),
        ShiftedRoPE(shift=max(a, b), local_window=min(a, b)),
    ):
        index = jnp.arange(length, dtype=jnp.int32)[None]
        met = np.zeros((length, length), int)
        for band in method.bands(index, jnp.full((1,), length, jnp.int32)):
            start, stop = (np.asarray(x)[0, :, None] for x in band[:2])
            met += (start <= np.arange(length)) & (np.arange(length) < stop)
        assert met.max() == 1
        np.testing.assert_array_equal(met == 1, relative_positions(length, method) >= 0)
        assert (met.diagonal() == 1).all()
        assert not np.triu(met, 1).any()


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        (ReRoPE(window=3), {5: "3 3 3 2 1 0"}),
        (SelfExtend(group=2, window=4), {5: "4 4 3 2 1 0", 7: "5 5 4 4 3 2 1 0"}),
        (StreamingLLM(sinks=2, recent=3), {6: "5 4 . 3 2 1 0", 8: "5 4 . . . 3 2 1 0"}),
        (LMInfinite(sinks=2, window=4), {4: "4 3 2 1 0", 7: "4 4 . . 3 2 1 0"}),
        (ShiftedRoPE(shift=4, local_window=2), {6: "4 3 2 3 2 1 0"}),
        (
            DCAAblation(dca=DCAConfig(chunk_len=3, max_query_position=5), inter=True),
            {4: "5 4 3 1 0"},
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_drawings(method: PositionMethod, rows: dict[int, str]) -> None:
    matrix = relative_positions(9, method)
    for i, drawn in rows.items():
        assert " ".join("." if x < 0 else str(x) for x in matrix[i, : i + 1]) == drawn


# --- attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("small_tiles")
def test_attention_is_the_formula(name: str) -> None:
    """Rows of 1 token, of one less, as many and one more than a window, and many windows."""
    case = CASES[name]
    lengths = [1, case.identity - 1, case.identity, case.identity + 1, 71]
    with jax.enable_x64(True):
        q, k, v = draw(5, 71, 71, jnp.float64)
        expected = published(case, q, k, v, offset=[0] * 5, lengths=lengths)
        for implementation in EXACT:
            out = attention(
                q,
                k,
                v,
                dca=case.method,
                rope=ROPE,
                lengths=jnp.asarray(lengths, jnp.int32),
                implementation=implementation,
            )
            # Angles are float32 by design; the formula's are float64.
            np.testing.assert_allclose(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["rerope-log", "self-extend", "streaming-llm", "dca-intra-inter"])
@pytest.mark.usefixtures("small_tiles")
def test_gradient(name: str) -> None:
    """The blockwise backward against autodiff of the dense definition, in float64."""
    with jax.enable_x64(True):
        q, k, v = draw(2, 50, 50, jnp.float64)
        weight = q[::-1] + 0.5

        def loss(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str) -> jax.Array:
            out = attention(
                q,
                k,
                v,
                dca=CASES[name].method,
                rope=ROPE,
                lengths=jnp.asarray([50, 37], jnp.int32),
                implementation=implementation,
            )
            return jnp.sum(out * weight)

        grad = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
        for ours, theirs in zip(grad(q, k, v, "xla"), grad(q, k, v, "reference"), strict=True):
            # Tiles count positions from their own first query, with float32 angles.
            np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
            assert np.abs(theirs).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "num_queries"),
    [*((name, 19) for name in CASES), ("rerope-log", 1), ("streaming-llm", 1), ("dca-intra", 1)],
)
@pytest.mark.usefixtures("small_tiles")
def test_a_piece_anywhere_in_a_longer_cache(name: str, num_queries: int) -> None:
    case = CASES[name]
    num_keys = 90
    q, k, v = draw(2, num_queries, num_keys)
    run = jax.jit(
        lambda q, k, v, offset, lengths: dual_chunk_attention(
            q, k, v, dca=case.method, rope=ROPE, query_offset=offset, lengths=lengths
        )
    )

    @settings(max_examples=6)
    @given(st.integers(0, 70), st.integers(0, 70), st.integers(0, 18))
    def anywhere(start: int, other: int, padding: int) -> None:
        lengths = [start + num_queries, other + max(num_queries - padding, 1)]
        # Whatever lies beyond a row's tokens must not be read.
        beyond = jnp.arange(num_keys)[None] >= jnp.asarray(lengths)[:, None]
        poisoned = (jnp.where(beyond[:, :, None, None], 1e4, x) for x in (k, v))
        out = run(
            q,
            *poisoned,
            jnp.asarray([start, other], jnp.int32),
            jnp.asarray(lengths, jnp.int32),
        )
        expected = published(case, q, k, v, offset=[start, other], lengths=lengths)
        np.testing.assert_allclose(out, expected, atol=1e-5, rtol=0)

    anywhere()


@pytest.mark.parametrize("name", ["streaming-llm", "lm-infinite", "rerope", "dca-intra-inter"])
def test_a_slice_of_the_keys_a_million_tokens_into_a_text(name: str) -> None:
    """Positions count from nearby, so they keep their precision; and keys know where they lie."""
    case, start = CASES[name], 1_000_000
    q, k, v = draw(1, 6, 80)
    rows = make_rows(q.shape, dca=case.method, rope=ROPE, query_offset=start)
    rows = rows._replace(key_offset=rows.offset - 74)
    expected = published(case, q, k, v, offset=[start], lengths=[start + 6], first_key=start - 74)
    run = jax.jit(attend, static_argnames=("dca", "implementation"))
    for implementation in EXACT:
        out = run(q, k, v, dca=case.method, rows=rows, implementation=implementation)
        np.testing.assert_allclose(out, expected, atol=1e-5, rtol=0)


def test_streaming_llm_is_a_rolling_cache() -> None:
    """Token by token, as the original reads: keep 4 + 11, number the places, rotate, attend."""
    q, k, v = (np.asarray(x, np.float64)[0, :, 0] for x in draw(1, 60, 60))
    frequency = 10_000.0 ** (-2.0 * np.arange(8) / 16)

    def turned(x: np.ndarray, place: np.ndarray) -> np.ndarray:
        return (x[:, :8] + 1j * x[:, 8:]) * np.exp(1j * place[:, None] * frequency)

    kept: list[int] = []
    expected = np.zeros((60, 16))
    for i in range(60):
        kept.append(i)
        places = np.arange(len(kept))
        query = turned(q[i : i + 1], places[-1:])
        logits = (query * np.conj(turned(k[kept], places))).real.sum(axis=1) / 4
        weights = np.exp(logits - logits.max())
        expected[i] = weights @ v[kept] / weights.sum()
        if len(kept) > 4 + 11:
            kept = kept[:4] + kept[-11:]
    out = attention(*draw(1, 60, 60), dca=StreamingLLM(sinks=4, recent=11), rope=ROPE)
    np.testing.assert_allclose(out[0, :, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "atol"), [(jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)])
@pytest.mark.usefixtures("small_tiles")
def test_dtypes(dtype: Any, atol: float) -> None:
    method = SelfExtend(group=3, window=10)
    q, k, v = draw(1, 70, 70, dtype)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    expected = attention(*wide, dca=method, rope=ROPE, implementation="reference")
    out = attention(q, k, v, dca=method, rope=ROPE)
    assert out.dtype == dtype
    error = np.linalg.norm(out.astype(jnp.float32) - expected) / np.linalg.norm(expected)
    assert error < atol


def test_kernels_are_refused() -> None:
    q, k, v = draw(1, 8, 8)
    with pytest.raises(InputError, match="it knows DCA and plain attention only, not ReRoPE"):
        dual_chunk_attention(q, k, v, dca=ReRoPE(window=3), rope=ROPE, implementation="triton")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ReRoPE(window=0), "window must be a positive integer"),
        (lambda: ReRoPE(window=3, trained_length=1), "at least 2"),
        (lambda: SelfExtend(group=0, window=3), "group must be a positive"),
        (lambda: StreamingLLM(sinks=4, recent=-1), "recent must be a positive"),
        (lambda: LMInfinite(sinks=4, window=True), "window must be a positive"),
        (lambda: ShiftedRoPE(shift=4, local_window=5), "must not exceed shift"),
    ],
)
def test_refused(build: Callable[[], PositionMethod], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()


# --- models ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Llama:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
    )
    model = Llama(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    # The usual initialization gives logits too small to tell anything.
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x if "norm" in str(path) else 15 * x, model.params()
    )
    return Llama.from_params(config, params, dtype=jnp.float32)


run = jax.jit(lambda model, tokens: model(tokens))


@jax.jit
def step(
    model: Llama, tokens: jax.Array, lengths: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache | None]:
    """As pieces of texts of 80 tokens, which is what some methods go by."""
    whole = jnp.full_like(lengths, 80)
    hidden, cache_after = model.hidden_states(
        tokens, lengths=lengths, cache=cache, context_lengths=whole
    )
    return model.unembed(hidden), cache_after


TESTED_ELSEWHERE = "auto none rope pi ntk yarn dca".split()
MEASURED = {"dpe": "dpe:8,1,2,3,5"}  # whose settings are published for a few models only
NAMES = [MEASURED.get(name, name) for name in METHODS if name not in TESTED_ELSEWHERE]


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decoding_through_a_cache_are_the_whole_text(name: str, tiny: Llama) -> None:
    """Two rows, one ahead of the other; pieces of 16, then token by token, then rolled back."""
    model = with_method(tiny, name, 80)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 80)), jnp.int32)
    expected = np.asarray(run(model, tokens))
    assert expected.std() > 0.5
    cache = KVCache.create(model.config, batch=2, capacity=88, dtype=jnp.float32)
    at = np.zeros(2, int)
    pieces = [(16, 16)] * 3 + [(16, 3)] + [(1, 1)] * 5
    for number, lengths in enumerate(pieces):
        piece = np.zeros((2, 16), np.int32)
        for b, length in enumerate(lengths):
            piece[b, :length] = tokens[b, at[b] : at[b] + length]
        logits, cache = step(model, jnp.asarray(piece), jnp.asarray(lengths, jnp.int32), cache)
        for b, length in enumerate(lengths):
            ours, theirs = logits[b, :length], expected[b, at[b] : at[b] + length]
            np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=0)
        at += lengths
        if number == 6:
            at = np.array([60, 50])
            cache = cache.rollback(jnp.asarray(at, jnp.int32))
    assert cache.lengths.tolist() == at.tolist()


@pytest.mark.parametrize("axes", ["data=2,tensor=2", "context=2"])
def test_on_a_mesh(axes: str, tiny: Llama) -> None:
    """Rows and heads may be shared by devices; a text may not, and that is said."""
    mesh = make_mesh(axes, jax.devices()[: 2 if "context" in axes else 4])
    place = parameter_shardings(tiny.config, mesh)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(x, place(".".join(key.key for key in path))), tiny.params()
    )
    shared = Llama.from_params(tiny.config, params, dtype=jnp.float32)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 40)), jnp.int32)
    if "context" in axes:
        with pytest.raises(InputError, match="SelfExtend needs the whole text on one device"):
            run(with_method(shared, "self-extend", 40), tokens)
        return
    ours = run(with_method(shared, "self-extend", 40), tokens)
    expected = run(with_method(tiny, "self-extend", 40), tokens)
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


def test_short_texts_are_read_as_by_plain_rope(tiny: Llama) -> None:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (1, 5)), jnp.int32)
    expected = run(tiny, tokens)
    for name in ("rope", "pi", "ntk", "yarn", "dca", "rerope"):
        logits = run(with_method(tiny, name, 5), tokens)
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0, err_msg=name)


def test_dynamic_ntk_stretches_for_what_is_used_only(tiny: Llama) -> None:
    """A window's rope need not reach farther than the window, however long the text is."""
    rope = RopeConfig(rope_type="dynamic", factor=2.0, original_max_position_embeddings=32)
    shape, lengths = (1, 100, 4, 8), jnp.asarray([100], jnp.int32)
    bounded = make_rows(shape, dca=ReRoPE(window=16), rope=rope, lengths=lengths)
    growing = make_rows(shape, dca=SelfExtend(group=2, window=8), rope=rope, lengths=lengths)
    np.testing.assert_array_equal(bounded.inv_freq, inverse_frequencies(rope, 8, lengths // 4))
    np.testing.assert_array_equal(growing.inv_freq, inverse_frequencies(rope, 8, lengths))


# --- names -------------------------------------------------------------------------------------

LLAMA_2 = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
)


@pytest.mark.parametrize(
    ("name", "length", "method"),
    [
        ("rope", 16384, None),
        ("rerope", 16384, ReRoPE(window=512, trained_length=4096)),
        ("rerope:1024", 16384, ReRoPE(window=1024, trained_length=4096)),
        ("self-extend", 4096, SelfExtend(group=1, window=1024)),
        ("self-extend", 16384, SelfExtend(group=10, window=1024)),
        ("self-extend:8,512", 16384, SelfExtend(group=8, window=512)),
        ("streaming-llm", 16384, StreamingLLM(sinks=4, recent=4092)),
        ("streaming-llm:4,2044", 16384, StreamingLLM(sinks=4, recent=2044)),
        ("lm-infinite", 16384, LMInfinite(sinks=10, window=4096)),
        ("lm-infinite:100", 16384, LMInfinite(sinks=100, window=4096)),
        ("string", 4096, ShiftedRoPE(shift=1351, local_window=128)),
        ("string:2000,512", 4096, ShiftedRoPE(shift=2000, local_window=512)),
        ("dca", 16384, DCAConfig.paper(4096)),
        ("dca:chunkllama_ppl", 16384, DCAConfig.chunkllama_ppl(4096)),
        ("dca:auto", 16384, DCAConfig.paper(4096)),
        ("dca:20,30", 16384, DCAConfig(chunk_len=20, max_query_position=30)),
        ("dca:paper@0.1", 16384, DCAConfig.paper(4096, temperature_slope=0.1)),
        ("dca:auto@0.05", 16384, DCAConfig.paper(4096, temperature_slope=0.05)),
        (
            "dca:20,30@0.1",
            16384,
            DCAConfig(
                chunk_len=20, max_query_position=30, trained_length=4096, temperature_slope=0.1
            ),
        ),
        ("dca-intra", 16384, DCAAblation(dca=DCAConfig.paper(4096), inter=False)),
        (
            "dca-intra-inter:chunkllama",
            16384,
            DCAAblation(dca=DCAConfig.chunkllama(4096), inter=True),
        ),
    ],
)
def test_methods_by_name(name: str, length: int, method: Any) -> None:
    chosen = method_by_name(name, LLAMA_2, length)
    assert chosen.dca == method
    assert hash(chosen.dca) == hash(method)
    if not name.startswith("string"):
        assert chosen.rope == LLAMA_2.rope


def test_every_published_preset_has_a_name() -> None:
    for preset in ("paper", "chunkllama", "chunkllama_ppl", "chunkllama_flash_decoding", "qwen"):
        chosen = method_by_name(f"dca:{preset}", LLAMA_2, 9000).dca
        assert chosen == getattr(DCAConfig, preset)(4096)
        assert preset in describe_methods()


@pytest.mark.parametrize(
    ("length", "factor"), [(1, 1), (4096, 1), (4097, 2), (8192, 2), (16384, 4), (16385, 5)]
)
def test_frequencies(length: int, factor: int) -> None:
    """pi, ntk and yarn by their formulas, with the factor ceil(L / c)."""
    d, p = 128, np.arange(64, dtype=np.float64)
    plain = 10_000.0 ** (-2 * p / d)

    def frequencies(name: str) -> np.ndarray:
        chosen = method_by_name(name, LLAMA_2, length)
        assert chosen.dca is None
        return np.asarray(inverse_frequencies(chosen.rope, d))[0]

    np.testing.assert_allclose(frequencies("pi"), plain / factor, rtol=1e-6)
    theta = 10_000.0 * factor ** (d / (d - 2))
    np.testing.assert_allclose(frequencies("ntk"), theta ** (-2 * p / d), rtol=1e-6)
    # Equal to pi in the slowest plane, and to plain RoPE in the fastest: what NTK is made for.
    np.testing.assert_allclose(frequencies("ntk")[[0, -1]], plain[[0, -1]] / [1, factor], rtol=1e-5)
    turns = 4096 * plain / (2 * math.pi)  # rotations of each plane in training: r of the paper
    by_parts = frequencies("yarn")
    np.testing.assert_allclose(by_parts[turns > 33], plain[turns > 33], rtol=1e-6)
    np.testing.assert_allclose(by_parts[turns < 0.9], plain[turns < 0.9] / factor, rtol=1e-6)
    yarn = method_by_name("yarn", LLAMA_2, length).rope
    assert attention_factor(yarn) == pytest.approx(0.1 * math.log(factor) + 1)


def test_scaling_under_a_method() -> None:
    """`+ntk:2` makes the window twice as long, and the method is made for that."""
    chosen = method_by_name("dca+ntk:2", LLAMA_2, 100_000)
    assert chosen.dca == DCAConfig.paper(8192)
    assert chosen.rope == method_by_name("ntk", LLAMA_2, 8192).rope
    assert method_by_name("rope+pi:4", LLAMA_2, 9) == method_by_name("pi", LLAMA_2, 16384)
    assert method_by_name("rerope+yarn:4", LLAMA_2, 9).rope.original_max_position_embeddings == 4096
    # A model that was trained with PI: its own rope stays, and DCA is over it.
    together = replace(
        LLAMA_2,
        rope=RopeConfig(rope_type="linear", factor=8.0),
        max_position_embeddings=32768,
    )
    assert method_by_name("dca", together, 100_000) == (DCAConfig.paper(32768), together.rope)
    assert method_by_name("pi", together, 65536).rope.factor == 16.0
    assert method_by_name("dca", together, 9, trained_length=4096).dca == DCAConfig.paper(4096)


def test_string_multiplies_cos_and_sin() -> None:
    rope = method_by_name("string", LLAMA_2, 4096).rope
    assert attention_factor(rope) == pytest.approx(0.1 * math.log(2) + 1)


def test_self_extend_stays_within_two_thirds_of_the_trained_length() -> None:
    for length in (4097, 8192, 10_000, 65_536, 200_000):
        method = method_by_name("self-extend", LLAMA_2, length).dca
        assert isinstance(method, SelfExtend)

        def largest(group: int, length: int = length) -> float:
            return 1024 + (length - 1024) / group

        assert largest(method.group) < 2 * 4096 / 3 + 1
        assert largest(method.group - 1) >= 2 * 4096 // 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "flash",
            r"method 'flash' is not known; expected one of\n  auto  .*\n(.*\n)*  lm-infinite",
        ),
        ("", "is not known"),
        ("rope:3", "takes no arguments"),
        ("rerope:x", "'x' is not 'rerope:W'"),
        ("self-extend:8", "is not 'self-extend:G,W'"),
        ("streaming-llm:4,-1", "is not 'streaming-llm:SINKS,RECENT'"),
        ("dca:fast", "DCA setting 'fast' is not known; expected one of paper, .*auto"),
        ("dca:1,2,3", "is not 'dca:S,Q'"),
        ("dca:paper@hot", "the slope of the temperature, a number of at least 0"),
        ("dca:paper@-1", "the slope of the temperature, a number of at least 0"),
        ("dca:paper@nan", "the slope of the temperature, a number of at least 0"),
        ("dca:30,20", "must not exceed max_query_position"),
        ("dca+ntk", r"expected \+pi:F"),
        ("dca+flash:2", r"expected \+pi:F"),
        ("dca+pi:0", r"expected \+pi:F"),
        ("dca+pi:1" + "0" * 6, "window of 4096000000 tokens; a text has at most 2147483647"),
        ("dca+pi:1" + "0" * 5000, r"expected \+pi:F"),
        ("rerope:9999999999", "in tokens of at most 2147483647"),
    ],
)
def test_names_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        method_by_name(name, LLAMA_2, 9000)


@pytest.mark.parametrize(("scaling", "rope_type"), [("pi", "dynamic"), ("yarn", "linear")])
def test_scalings_that_cannot_be_laid_over_one_another(scaling: str, rope_type: str) -> None:
    rope = RopeConfig(rope_type=rope_type, factor=2.0, original_max_position_embeddings=4096)
    config = replace(LLAMA_2, rope=rope)
    with pytest.raises(InputError, match=f"{scaling} cannot be combined with .*'{rope_type}'"):
        method_by_name(scaling, config, 9000)
    assert method_by_name(scaling, config, 4096).rope == rope


def test_lengths_refused() -> None:
    with pytest.raises(InputError, match="must be positive"):
        method_by_name("rope", LLAMA_2, 0)


def test_the_help_names_every_method() -> None:
    lines = describe_methods().splitlines()
    assert [line.split()[0] for line in lines[: len(METHODS)]] == list(METHODS)
    assert max(map(len, lines)) <= 100


def test_auto_is_what_the_checkpoint_asks_for_or_else_the_papers() -> None:
    own = DCAConfig(chunk_len=3000, max_query_position=3500)
    assert method_by_name("auto", LLAMA_2, 9000).dca == DCAConfig.paper(4096)
    assert method_by_name("auto", replace(LLAMA_2, dca=own), 9000).dca == own
    assert method_by_name("none", LLAMA_2, 9000) == method_by_name("rope", LLAMA_2, 9000)
    with pytest.raises(InputError, match="takes no arguments"):
        method_by_name("auto:paper", LLAMA_2, 9000)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_made_for_the_trained_length(name: str) -> None:
    """4,096 tokens, though the config has positions for 16 times as many: as Qwen2.5-1M's."""
    own = DCAConfig(chunk_len=3072, max_query_position=4000, trained_length=4096)
    name = MEASURED.get(name, name)
    capable = replace(LLAMA_2, max_position_embeddings=65536, dca=own)
    asked = replace(LLAMA_2, dca=own)
    assert method_by_name(name, capable, 20_000) == method_by_name(name, asked, 20_000)
    if name in ("auto", "dca"):
        assert method_by_name(name, capable, 20_000).dca == own
    if name == "dca":
        assert method_by_name("dca:paper", capable, 20_000).dca == DCAConfig.paper(4096)
        assert method_by_name("dca+ntk:2", capable, 20_000).dca == DCAConfig.paper(8192)
    assert whole_length(capable, 5000) == 8192


def test_arguments_are_lengths() -> None:
    setting = DCAConfig(chunk_len=3072, max_query_position=4000)
    assert method_by_name("dca:3k,4000", LLAMA_2, 9000).dca == setting


@pytest.mark.parametrize("tokens", ["2147483648", "2048M", "9" * 5000])
def test_more_tokens_than_a_text_can_have(tokens: str) -> None:
    with pytest.raises(InputError, match="tokens are too many; a text has at most 2147483647"):
        parse_tokens(tokens)
    assert parse_tokens("2147483647") == 2**31 - 1
