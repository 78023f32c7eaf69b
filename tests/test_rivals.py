"""The methods of 2025 and 2026 against their formulas: double loops in float64."""

import math
from collections.abc import Callable
from fractions import Fraction
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
from dca_jax.inference.distances import LONGEST, scaled
from dca_jax.inference.methods import method_by_name, with_method
from dca_jax.inference.prefix import depends_on_length
from dca_jax.inference.rivals import DPE, AdaGroPE, JetLong, LaMPE
from dca_jax.inference.score import Reader
from dca_jax.model import Llama
from dca_jax.rope import RopeConfig, attention_factor
from dca_jax.sharding import make_mesh
from dca_jax.weights.placement import parameter_shardings

DIM = 16
SCALES = (1, 1, 2, 2, 3, 3, 5, 5)


def jet_long(i: int, j: int, length: int) -> int:
    """w = 20, w0 = 6."""
    group = math.ceil(length / 20)
    return i - j if i - j <= 6 else i // group - j // group


def adagrope(i: int, j: int, length: int) -> int:
    return algorithm_1(length, 20)[i - j]


def algorithm_1(length: int, positions: int) -> list[int]:
    """The paper's pseudocode, for r = 1/4; here from the nearest to the farthest."""
    if length <= positions:
        return list(range(length))
    found: list[int] = []
    largest, longest, used = 1, positions, 0
    while longest < length:
        if math.log2(largest).is_integer():
            kept = math.floor(Fraction(positions, 4 * largest))
            for p in range(used, used + kept):
                found += [p] * largest
            used += kept
        largest, covered = largest + 1, len(found)
        longest = (positions - used) * largest + covered
    more = positions - (longest - length) - used
    for p in range(used, positions - more):
        found += [p] * (largest - 1)
    for p in range(positions - more, positions):
        found += [p] * largest
    return found


def mapped(length: int) -> int:
    """a = 0.04, b = -2, M = 30; s1 = 5, s2 = 3; 13 positions below 25 tokens."""
    if length < 2 * 5:
        return length
    m = 13 if length < 25 else math.floor(30 / (1 + math.exp(-(0.04 * length - 2))))
    return min(max(m, 5 + 3 + 1), length)


def lampe(i: int, j: int, length: int) -> int:
    m, far = mapped(length), i - j
    if m == length or far <= 5:
        return far
    if far >= length - 3:
        return m - length + far
    return math.floor(Fraction(m - 5 - 3, length - 5 - 3) * (far - 5) + 5)


def dpe(i: int, j: int, length: int) -> list[int]:
    """w = 7."""
    if i - j < 7:
        return [i - j] * len(SCALES)
    return [i // s - j // s + 7 - 7 // s for s in SCALES]


class Case(NamedTuple):
    """A method, its formula, and the longest text that is read as by plain RoPE."""

    method: PositionMethod
    relative: Callable[[int, int, int], int | list[int]]
    identity: int


CASES = {
    "jet-long": Case(JetLong(trained_length=20, window=6), jet_long, 20),
    "adagrope": Case(AdaGroPE(positions=20), adagrope, 20),
    "lampe": Case(
        LaMPE(slope=0.04, shift=-2.0, most=30.0, head=5, tail=3, short=25, short_mapped=13),
        lampe,
        13,
    ),
    "dpe": Case(DPE(window=7, scales=SCALES), dpe, 7),
}


def published(
    case: Case,
    query: np.ndarray,  # [B, T, N, H]
    key: np.ndarray,  # [B, S, K, H]
    value: np.ndarray,
    *,
    offset: list[int],
    lengths: list[int],
    whole: list[int] | None = None,
    first_key: int = 0,
) -> np.ndarray:
    """One softmax over all keys up to each query, at the formula's positions."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    half, repeats = query.shape[3] // 2, query.shape[2] // key.shape[2]
    frequency = 10_000.0 ** (-2.0 * np.arange(half) / (2 * half))
    out = np.zeros_like(query)
    for b, t, n in np.ndindex(query.shape[:3]):
        i = offset[b] + t
        seen = [j for j in range(first_key, first_key + key.shape[1]) if j <= i < lengths[b]]
        if not seen:
            continue
        length = (whole or lengths)[b]
        far = np.array([np.broadcast_to(case.relative(i, j, length), half) for j in seen])
        rows = np.array(seen) - first_key
        k, v = (x[b, rows, n // repeats] for x in (key, value))
        q = query[b, t, n, :half] + 1j * query[b, t, n, half:]
        turned = q * np.exp(1j * far * frequency)
        logits = (turned * np.conj(k[:, :half] + 1j * k[:, half:])).real.sum(axis=1)
        weights = np.exp((logits - logits.max()) / math.sqrt(2 * half))
        out[b, t, n] = weights @ v / weights.sum()
    return out


def draw(batch: int, num_queries: int, num_keys: int, dtype: Any = jnp.float32) -> list[jax.Array]:
    """Queries of 4 heads, keys and values of 2."""
    rng = np.random.default_rng(0)
    shapes = (num_queries, 4), (num_keys, 2), (num_keys, 2)
    return [jnp.asarray(rng.normal(size=(batch, n, h, DIM)), dtype) for n, h in shapes]


attention = jax.jit(dual_chunk_attention, static_argnames=("dca", "rope", "implementation"))


# --- positions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_relative_positions_are_the_formula(name: str) -> None:
    """Of texts as long as the exact range, one token longer, and many times as long."""
    case = CASES[name]
    for length in (1, 9, 10, case.identity, case.identity + 1, 26, 41, 150):
        matrix = relative_positions(150, case.method, length)[:length, :length]
        expected = np.full((length, length), -1)
        for i in range(length):
            for j in range(i + 1):
                expected[i, j] = np.max(case.relative(i, j, length))
        np.testing.assert_array_equal(matrix, expected, err_msg=f"{length} tokens")
        if case.method.max_position is not None:
            assert matrix.max() <= case.method.max_position
        if length == case.identity:
            i, j = np.indices(matrix.shape)
            np.testing.assert_array_equal(matrix[j <= i], (i - j)[j <= i])


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 150))
def test_adagrope_of_any_size(positions: int, length: int) -> None:
    """As the algorithm has it, whose principles hold: all positions, none shared more than need."""
    expected = algorithm_1(length, positions)
    assert expected == sorted(expected)
    counts = np.bincount(expected)
    assert (np.diff(counts) >= 0).all()
    assert len(expected) == length
    matrix = relative_positions(150, AdaGroPE(positions=positions), length)
    np.testing.assert_array_equal(matrix[length - 1, :length][::-1], expected)


def test_adagrope_is_figure_1() -> None:
    """P = 16: the longest texts that positions shared by 1, 2, 3 and 4 tokens reach to."""
    for length, largest in [(16, 1), (17, 2), (28, 2), (29, 3), (38, 3), (39, 4), (48, 4), (49, 5)]:
        last = relative_positions(150, AdaGroPE(positions=16), length)[length - 1, :length]
        assert np.bincount(last).max() == largest


def test_products_that_do_not_overflow() -> None:
    rng = np.random.default_rng(0)
    q = np.append(rng.integers(1, LONGEST, 400), [1, LONGEST - 1, LONGEST - 1])
    p = np.append(rng.integers(0, q[:400] + 1), [1, LONGEST - 1, 1])
    x = np.append(rng.integers(0, LONGEST, 400), [LONGEST, LONGEST, LONGEST])
    whole, rest = jax.jit(scaled)(*(jnp.asarray(n, jnp.int32)[:, None] for n in (x, p, q)))
    found = zip(whole[:, 0].tolist(), rest[:, 0].tolist(), strict=True)
    expected = [divmod(int(a) * int(b), int(c)) for a, b, c in zip(x, p, q, strict=True)]
    assert list(found) == expected


@pytest.mark.parametrize(
    ("method", "length", "rows"),
    [
        (JetLong(trained_length=4, window=2), 8, {4: "2 2 2 1 0", 7: "3 3 2 2 1 2 1 0"}),
        (AdaGroPE(positions=8), 10, {7: "6 6 5 4 3 2 1 0", 9: "7 7 6 6 5 4 3 2 1 0"}),
        (
            LaMPE(slope=1.0, shift=0.0, most=6.0, head=2, tail=1),
            9,
            {7: "4 4 3 3 2 2 1 0", 8: "5 4 4 3 3 2 2 1 0"},
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_drawings(method: PositionMethod, length: int, rows: dict[int, str]) -> None:
    if isinstance(method, LaMPE):  # 6 / (1 + e^-9) is 5.999
        method = method.with_fields(most=6.001)
    matrix = relative_positions(length, method)
    for i, drawn in rows.items():
        assert " ".join(map(str, matrix[i, : i + 1])) == drawn


# --- attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("small_tiles")
def test_attention_is_the_formula(name: str) -> None:
    """Rows of different lengths, each with positions of its own; two query heads a key."""
    case = CASES[name]
    lengths = [1, case.identity, case.identity + 1, 34, 71]
    with jax.enable_x64(True):
        q, k, v = draw(5, 71, 71, jnp.float64)
        expected = published(case, q, k, v, offset=[0] * 5, lengths=lengths)
        told = jnp.asarray(lengths, jnp.int32)
        options = {"dca": case.method, "rope": RopeConfig(), "lengths": told}
        for implementation in ("reference", "xla"):
            out = attention(q, k, v, implementation=implementation, **options)
            np.testing.assert_allclose(out, expected, atol=1e-5, rtol=0)
        plain = attention(q, k, v, **options | {"dca": None})
        exact = [row for row, length in enumerate(lengths) if length <= case.identity]
        np.testing.assert_allclose(out[jnp.array(exact)], plain[jnp.array(exact)], atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("small_tiles")
def test_pieces_of_a_prompt_and_drawn_tokens(name: str) -> None:
    """Pieces are read with the whole prompt's positions, a drawn token with the text's so far."""
    case, prompt, num_keys = CASES[name], [52, 31], 60
    q, k, v = draw(2, num_keys, num_keys)
    run = jax.jit(
        lambda q, k, v, offset, lengths, whole: dual_chunk_attention(
            *(q, k, v),
            dca=case.method,
            rope=RopeConfig(),
            query_offset=offset,
            lengths=lengths,
            context_lengths=whole,
        )
    )

    def check(start: list[int], count: int, whole: list[int], lengths: list[int]) -> None:
        some = jnp.stack([q[b, i : i + count] for b, i in enumerate(start)])
        numbers = (jnp.asarray(x, jnp.int32) for x in (start, lengths, whole))
        beyond = jnp.arange(num_keys)[None] >= jnp.asarray(lengths)[:, None]
        poisoned = (jnp.where(beyond[:, :, None, None], 1e4, x) for x in (k, v))
        out = run(some, *poisoned, *numbers)
        expected = published(case, some, k, v, offset=start, lengths=lengths, whole=whole)
        np.testing.assert_allclose(out, expected, atol=1e-5, rtol=0)

    for at in (0, 19, 38):
        check([at, at // 2], 19, prompt, [min(at + 19, 52), min(at // 2 + 19, 31)])
    for drawn in range(3):
        text = [n + drawn + 1 for n in prompt]
        check([n - 1 for n in text], 1, text, text)


@pytest.mark.parametrize("name", ["adagrope", "dpe"])
@pytest.mark.usefixtures("small_tiles")
def test_gradient(name: str) -> None:
    with jax.enable_x64(True):
        q, k, v = draw(2, 30, 30, jnp.float64)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str) -> jax.Array:
            out = attention(
                *(q, k, v),
                dca=CASES[name].method,
                rope=RopeConfig(),
                lengths=jnp.asarray([30, 23], jnp.int32),
                implementation=implementation,
            )
            return jnp.sum(out * (q[::-1] + 0.5))

        grad = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
        for ours, theirs in zip(grad(q, k, v, "xla"), grad(q, k, v, "reference"), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
            assert np.abs(theirs).max() > 1e-2


@pytest.mark.parametrize("name", ["jet-long", "adagrope", "lampe"])
def test_a_million_tokens_into_a_text(name: str) -> None:
    case, start = CASES[name], 1_000_000
    if name == "lampe":
        case = case._replace(
            method=LaMPE(slope=1e-5, shift=-2.0, most=30.0, head=5, tail=3),
            relative=lambda i, j, length: (
                i - j if i - j <= 5 else math.floor(Fraction(29 - 8, length - 8) * (i - j - 5) + 5)
            ),
        )
    if name == "adagrope":  # not over every distance, which are a million
        steps = algorithm_1(start + 6, 20)
        case = case._replace(relative=lambda i, j, length: steps[i - j])
    q, k, v = draw(1, 6, 80)
    rows = make_rows(q.shape, dca=case.method, rope=RopeConfig(), query_offset=start)
    rows = rows._replace(key_offset=rows.offset - 74)
    expected = published(case, q, k, v, offset=[start], lengths=[start + 6], first_key=start - 74)
    run = jax.jit(attend, static_argnames=("dca", "implementation"))
    for implementation in ("reference", "xla"):
        out = run(q, k, v, dca=case.method, rows=rows, implementation=implementation)
        np.testing.assert_allclose(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: JetLong(trained_length=8, window=8), "must be below the trained length"),
        (lambda: AdaGroPE(positions=0), "positions must be a positive"),
        (
            lambda: LaMPE(slope=0.1, shift=0.0, most=8.0, head=5, tail=3),
            r"more than head \+ tail = 8 positions",
        ),
        (lambda: DPE(window=3, scales=(1, 0)), "scales must be positive"),
        (lambda: DPE(window=0, scales=(1,)), "window must be a positive"),
    ],
)
def test_refused(build: Callable[[], PositionMethod], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()


# --- names -------------------------------------------------------------------------------------


def shape(trained: int = 8192, theta: float = 5e5, **fields: Any) -> LlamaConfig:
    """Of Llama-3-8B, or near it."""
    options: dict[str, Any] = {"hidden_size": 4096, "head_dim": 128} | fields
    return LlamaConfig(
        vocab_size=128256,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=trained,
        rope=RopeConfig(theta=theta),
        **options,
    )


def test_jet_long_and_adagrope_by_name() -> None:
    qwen = shape(32768, 1e6)
    found = method_by_name("jet-long", qwen, 100_000).dca
    assert found == JetLong(trained_length=32768, window=2048)  # as published
    assert found == method_by_name("jet-long", qwen, 9).dca  # the length is a text's own
    assert method_by_name("jet-long:1k", qwen, 9).dca == JetLong(trained_length=32768, window=1024)
    assert method_by_name("adagrope", qwen, 9).dca == AdaGroPE(positions=32768)
    assert method_by_name("adagrope:16k", qwen, 9).dca == AdaGroPE(positions=16384)


def test_dpe_by_name() -> None:
    """The published scales for the model they were measured on; others must be given."""
    found = method_by_name("dpe", shape(), 100_000).dca
    assert isinstance(found, DPE)
    assert found.window == 1024
    assert found.scales[::8] == (4, 4, 2, 16, 32, 32, 16, 128)
    assert found.scales[7::8] == found.scales[::8]
    assert len(found.scales) == 64
    given = method_by_name("dpe:512,1,2", shape(head_dim=8), 9).dca
    assert given == DPE(window=512, scales=(1, 1, 2, 2))
    with pytest.raises(InputError, match=r"none are .*4096 wide, 32 layers, 9000 tr"):
        method_by_name("dpe", shape(9000), 9)
    with pytest.raises(InputError, match="3 scales do not divide a head's 64 planes"):
        method_by_name("dpe:512,1,2,3", shape(), 9)
    with pytest.raises(InputError, match=r"is not 'dpe:W,S1,S2,\.\.\.'"):
        method_by_name("dpe:512,x", shape(), 9)


def test_lampe_by_name() -> None:
    """The published curves; elsewhere Llama 3's in units of the trained length."""
    found = method_by_name("lampe", shape(), 100_000)
    assert isinstance(found.dca, LaMPE)
    assert attention_factor(found.rope) == pytest.approx(0.1 * math.log(2) + 1)
    lengths = [4096, 8191, 8192, 16384, 65536, 131072]
    curve = [
        int(6204.409324666837 / (1 + math.exp(-(0.00010493097327094324 * n - 2.466638011138158))))
        for n in lengths
    ]
    ours = found.dca.mapped(jnp.asarray(lengths, jnp.int32))
    np.testing.assert_array_equal(ours, [1536, 1536, *curve[2:]])
    assert int(found.dca.mapped(jnp.asarray([1000], jnp.int32))[0]) == 1000
    half = method_by_name("lampe", shape(4096), 9).dca
    assert isinstance(half, LaMPE)
    assert (half.head, half.tail, half.short, half.short_mapped) == (256, 100, 4096, 768)
    scaled_curve = half.mapped(jnp.asarray([n // 2 for n in lengths], jnp.int32))
    np.testing.assert_allclose(scaled_curve, np.asarray(ours) / 2, atol=1)
    given = method_by_name("lampe:1e-4,-2.5,6000,512,64", shape(), 9).dca
    assert given == LaMPE(slope=1e-4, shift=-2.5, most=6000.0, head=512, tail=64)
    with pytest.raises(InputError, match="is not 'lampe:A,B,M,S1,S2'"):
        method_by_name("lampe:1,2", shape(), 9)
    with pytest.raises(InputError, match="at most 2097152 tokens"):
        method_by_name("lampe", shape(), 2**22)


def test_qwens_dca() -> None:
    """s and Q of the checkpoint, else Qwen's share of the trained length; and the temperature."""
    own = DCAConfig.from_hf({"chunk_size": 262144, "local_size": 8192})
    found = DCAConfig(
        chunk_len=253952, max_query_position=262144, trained_length=262144, temperature_slope=0.1
    )
    assert method_by_name("dca:qwen", shape(262144), 9).dca == found
    assert method_by_name("dca:qwen", shape(262144, dca=own), 9).dca == found
    other = DCAConfig(chunk_len=3000, max_query_position=5000)
    kept = method_by_name("dca:qwen", shape(8192, dca=other), 9).dca
    assert kept == DCAConfig(
        chunk_len=3000, max_query_position=5000, trained_length=8192, temperature_slope=0.1
    )
    assert method_by_name("dca:qwen+ntk:2", shape(8192, dca=other), 9).dca == DCAConfig.qwen(16384)
    assert DCAConfig.qwen(16384).chunk_len == 15872


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
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x if "norm" in str(path) else 15 * x, model.params()
    )
    return Llama.from_params(config, params, dtype=jnp.float32)


TOKENS = np.random.default_rng(0).integers(0, 64, (2, 80)).astype(np.int32)


@pytest.mark.slow
def test_one_program_serves_all_settings_and_lengths(tiny: Llama, compilations: list[str]) -> None:
    """Of a method, and of plain attention with any rope: what differs is data."""
    kinds = {
        "pi": ["rope", "ntk", "yarn", "rope+pi:5", "pi"],
        "self-extend:3,9": ["self-extend", "self-extend:3,9"],
        "adagrope:16": ["adagrope", "adagrope:16"],
    }
    for last, names in kinds.items():
        compilations.clear()
        found = [
            Reader(with_method(tiny, name, length), 2, 80).nll(TOKENS[:, :length])
            for name in names
            for length in (40, 80)
        ]
        assert sum("read_piece" in name for name in compilations) == 1, names
        means = {round(float(nll.mean()), 4) for nll in found[1::2]}
        assert len(means) == len(names)
        model = with_method(tiny, last, 80)
        nll = -jax.nn.log_softmax(jax.jit(model)(jnp.asarray(TOKENS)))[:, :-1]
        nll = np.take_along_axis(np.asarray(nll), TOKENS[:, 1:, None], axis=2)[..., 0]
        np.testing.assert_allclose(found[-1], nll, atol=1e-3, rtol=0, err_msg=last)


def test_numbers_are_given_to_programs_on_a_mesh(tiny: Llama) -> None:
    mesh = make_mesh("tensor=2", jax.devices()[:2])
    place = parameter_shardings(tiny.config, mesh)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(x, place(".".join(key.key for key in path))), tiny.params()
    )
    shared = Llama.from_params(tiny.config, params, dtype=jnp.float32)
    ours, theirs = (
        Reader(with_method(model, "jet-long", 80), 2, 80).nll(TOKENS) for model in (shared, tiny)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_a_prefix_is_a_text_of_its_own(tiny: Llama) -> None:
    for name in ("jet-long", "adagrope", "lampe"):
        assert depends_on_length(with_method(tiny, name, 80))
    assert not depends_on_length(with_method(tiny, "rerope", 80))
