"""The contract of a backend: at the edges, every one of them says what the definition says.

In value beside the oracle in NumPy float64, in gradient beside the dense attention's own, and the
dense attention's beside the oracle's differences. A backend that needs a device that is not here
runs in its interpreter, with tiles so small that short texts cross many of them
(shared_fixtures.py). What
only one backend has (its tiles, its walks, what it lowers to) is tested in a file of its own.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from kernels import (
    QUICK,
    ROPE,
    attend_by_slices,
    draw,
    runs_here,
    weight_of,
    with_gradients,
)

from dca_jax.attention import attention_pass, dual_chunk_attention, merge_passes, op
from dca_jax.attention.stored import Scales
from dca_jax.dca import PHASES, DCAConfig, dense_attention

S = 22  # no tile's edge is one of the first five chunks'
DCA = DCAConfig(chunk_len=S, max_query_position=36)
H = 1e-4  # of the differences
Inputs = tuple[jax.Array, jax.Array, jax.Array]


class Bench(NamedTuple):
    """A backend, and what it computes with here."""

    name: str
    dim: int  # the smallest head_dim it takes
    dtype: Any = jnp.float32
    atol: float = 1e-5
    largest: int = 256  # the largest head_dim

    def agrees(self, ours: Any, theirs: Any) -> None:
        ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
        if self.dtype == jnp.float32:
            np.testing.assert_allclose(ours, theirs, atol=self.atol, rtol=0)
        else:  # by row: no short text hides behind a long one
            error = np.linalg.norm((ours - theirs).reshape(len(ours), -1), axis=1)
            size = np.linalg.norm(theirs.reshape(len(theirs), -1), axis=1)
            assert (error <= 1e-2 * np.maximum(size, 1)).all(), error / size

    def draw(self, seed: int, *sizes: int, dim: int | None = None) -> Inputs:
        return draw(seed, *sizes, min(dim or self.dim, self.largest), self.dtype)  # pyright: ignore


BENCHES = {
    "reference": Bench("reference", dim=16),
    "xla": Bench("xla", dim=16),
    "triton": Bench("triton", dim=16),
    "mosaic_ampere": Bench("mosaic_ampere", dim=16),
    "mosaic_tpu": Bench("mosaic_tpu", dim=64, atol=2e-5),
    "mosaic_gpu": Bench("mosaic_gpu", dim=64, dtype=jnp.bfloat16),
    "mosaic_blackwell": Bench("mosaic_blackwell", dim=64, dtype=jnp.bfloat16, largest=128),
}
INTERPRETED = {
    "xla": "small_tiles",
    "triton": "interpreted_triton",
    "mosaic_ampere": "interpreted_mosaic_ampere",
    "mosaic_tpu": "interpreted_mosaic_tpu",
    "mosaic_blackwell": "interpreted_mosaic_blackwell",
}


# Kernels take seconds in their interpreters.
MARKS = {
    "triton": pytest.mark.slow,
    "mosaic_ampere": pytest.mark.by_name,
    "mosaic_tpu": pytest.mark.slow,
    "mosaic_gpu": pytest.mark.gpu,
    "mosaic_blackwell": pytest.mark.by_name,
}


def backends(marks: dict[str, pytest.MarkDecorator]) -> list[Any]:
    on_its_gpu = {"marks": pytest.mark.gpu, "id": "mosaic_blackwell, on its GPU"}
    return [
        *(pytest.param(name, marks=marks.get(name, ())) for name in BENCHES),
        pytest.param("mosaic_blackwell", **on_its_gpu),  # pyright: ignore
    ]


@pytest.fixture(params=backends(MARKS))
def bench(request: pytest.FixtureRequest) -> Bench:
    name = request.param
    if request.node.get_closest_marker("gpu"):
        runs_here(name, 64)
    elif name in INTERPRETED:
        request.getfixturevalue(INTERPRETED[name])
    return BENCHES[name]


@pytest.fixture
def kernel(bench: Bench) -> Bench:
    """A backend with passes and gradients of its own, which the dense attention has not."""
    if bench.name == "reference":
        pytest.skip("the dense attention is one pass over all keys")
    return bench


def test_every_backend_has_a_bench() -> None:
    assert set(BENCHES) == set(op.IMPLEMENTATIONS)


def check(bench: Bench, inputs: Inputs, dca: DCAConfig | None, **options: Any) -> list[jax.Array]:
    """Value and gradients beside the definition; returns them."""

    def attention(name: str) -> Any:
        options_ = {"dca": dca, "rope": ROPE, "implementation": name} | options
        return partial(dual_chunk_attention, **options_)

    wide = [x.astype(jnp.float32) for x in inputs]
    expected = by_the_oracle(wide, dca, **options)
    ours = with_gradients(attention(bench.name))(*inputs)
    assert all(x.dtype == bench.dtype for x in ours)
    bench.agrees(ours[0], expected)
    if bench.name != "reference":
        theirs = with_gradients(attention("reference"))(*wide)
        for mine, other in zip(ours[1:], theirs[1:], strict=True):
            bench.agrees(mine, other)
        assert np.abs(theirs[3]).max() > 1e-3
        return ours
    # Along one direction, the oracle's central difference.
    rng = np.random.default_rng(8)
    steps = [rng.normal(size=x.shape) for x in inputs]
    moved = ([np.float64(x) + h * d for x, d in zip(wide, steps, strict=True)] for h in (-H, H))
    weight = np.asarray(weight_of(inputs[0]))
    behind, ahead = ((by_the_oracle(x, dca, **options) * weight).sum() for x in moved)
    slope = sum((np.float64(x) * d).sum() for x, d in zip(ours[1:], steps, strict=True))
    assert slope == pytest.approx((ahead - behind) / (2 * H), rel=1e-4, abs=1e-3)
    return ours


def by_the_oracle(
    inputs: Any,
    dca: DCAConfig | None,
    *,
    query_offset: Any = None,
    lengths: Any = None,
    context_lengths: Any = None,
) -> np.ndarray:
    """Row by row: each has a temperature of its own."""
    inputs, rows = [np.asarray(x, np.float64) for x in inputs], []
    num_queries, num_keys = inputs[0].shape[1], inputs[1].shape[1]
    for row in range(len(inputs[0])):
        start = 0 if query_offset is None else int(query_offset[row])
        length = start + num_queries if lengths is None else int(lengths[row])
        told = length if context_lengths is None else int(context_lengths[row])
        tau, s, largest = 1.0, num_keys, num_keys
        if dca is not None:
            s, largest = dca.chunk_len, dca.max_query_position
            if dca.temperature_slope:
                tau = max(1, 1 + dca.temperature_slope * np.log(told / dca.trained_length)) ** 2
        one = [x[row : row + 1] for x in inputs]
        options: dict[str, Any] = {"offset": [start], "lengths": [length], "temperature": tau}
        rows.append(oracle.attention(*one, s=s, largest=largest, **options))
    return np.concatenate(rows)


# --- edges -------------------------------------------------------------------------------------


# The one test that every change runs of backends that are chosen by name only.
@pytest.mark.parametrize(
    "bench",
    backends(MARKS | dict.fromkeys(("mosaic_ampere", "mosaic_blackwell"), pytest.mark.slow)),
    indirect=True,
)
def test_texts_that_end_at_an_edge(bench: Bench) -> None:
    """1, s - 1, s, s + 1, 2s and 2s + 1 tokens, the shorter ones padded; Q = 2s - 1.

    5s + 7 tokens are among the shapes: here, an interpreter would walk 6 * 8 * 8 tiles.
    """
    edges = [1, S - 1, S, S + 1, 2 * S, 2 * S + 1]
    inputs = bench.draw(0, len(edges), edges[-1], edges[-1], 1, 1)
    dca = DCAConfig(chunk_len=S, max_query_position=2 * S - 1)
    out, *bars = check(bench, inputs, dca, lengths=jnp.asarray(edges, jnp.int32))
    for row, length in enumerate(edges):
        for x in (out, *bars):
            assert not np.asarray(x[row, length:]).any()


# Most of what a case takes is compiling it, so each has two things to show.
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "dim", "chunk_len", "largest"),
    [
        pytest.param(1, 8, 2, 64, S, 36, id="1"),
        pytest.param(7, 8, 1, 128, S, 36, id="7"),
        pytest.param(5 * 5 + 7, 3, 1, None, 5, 5, id="32"),  # many chunks a tile, Q = s
        pytest.param(2 * 32 + 1, 1, 1, 256, 32, 33, id="65"),  # two tiles a chunk, Q = s + 1
    ],
)
def test_edges_as_shapes(
    bench: Bench,
    length: int,
    heads: int,
    kv_heads: int,
    dim: int | None,
    chunk_len: int,
    largest: int,
) -> None:
    """One token, less than a block, one more than two chunks, and chunks of other lengths.

    And groups of 4, 8, 3 and 1, and every head_dim that the kernels know. An interpreter walks
    each head: those that meet many tiles are few.
    """
    inputs = bench.draw(length, 1, length, length, heads, kv_heads, dim=dim)
    check(bench, inputs, DCAConfig(chunk_len=chunk_len, max_query_position=largest))


def test_plain_causal_attention(bench: Bench) -> None:
    check(bench, bench.draw(3, 1, 24, 24, 2, 1), None)


def test_offset_lengths_and_temperature(bench: Bench) -> None:
    """Rows that begin in the middle of a chunk and at its edge, one padded, with room behind."""
    dca = DCAConfig(chunk_len=S, max_query_position=36, trained_length=40, temperature_slope=0.1)
    options = {
        "query_offset": jnp.asarray([13, 2 * S], jnp.int32),
        "lengths": jnp.asarray([31, 3 * S + 3], jnp.int32),
        "context_lengths": jnp.asarray([120, 3 * S + 3], jnp.int32),
    }
    check(bench, bench.draw(4, 2, 25, 75, 2, 1), dca, **options)


# --- a cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_queries", "heads"), [(1, 4), (3, 4), (20, 2)], ids=["1", "3", "20"])
def test_a_layer_of_a_ragged_cache(bench: Bench, num_queries: int, heads: int) -> None:
    """Few queries, and more than are packed. Beyond a row's tokens lies what must not be read."""
    offset = jnp.asarray([0, S - 1, 2 * S, 3 * S + 5], jnp.int32)
    q, raw, value = bench.draw(5, 4, num_queries, 100, heads, heads // 2)
    rows = op.make_rows(q.shape, dca=DCA, rope=ROPE, query_offset=offset)
    index = jnp.arange(100, dtype=jnp.int32)[None]
    key = op.rotate_keys(raw, index, dca=DCA, inv_freq=rows.inv_freq)
    beyond = (index >= (offset + num_queries)[:, None])[:, :, None, None]
    key, value = (jnp.where(beyond, jnp.asarray(1e4, x.dtype), x) for x in (key, value))
    caches = [jnp.stack([x + 1, x, x - 1]) for x in (key, value)]
    read = jax.jit(partial(op.attend, dca=DCA, implementation=bench.name), compiler_options=QUICK)
    out = read(q, *caches, rows=rows, layer=jnp.int32(1))
    bench.agrees(out, by_the_oracle([q, raw, value], DCA, query_offset=offset))


@pytest.mark.parametrize(
    ("num_queries", "heads", "kv_heads", "dim", "num_keys", "dtype"),
    [
        pytest.param(1, 8, 2, 64, 104, np.int8, id="decode, int8"),
        pytest.param(2, 8, 1, 128, 96, np.int8, id="decode, groups of 8, int8"),
        pytest.param(1, 2, 2, 256, 104, ml_dtypes.float8_e4m3fn, id="decode, no groups, fp8"),
        pytest.param(9, 4, 1, 64, 100, ml_dtypes.float8_e4m3fn, id="prefill, fp8"),
    ],
)
def test_a_layer_of_a_cache_in_8_bits(
    bench: Bench, num_queries: int, heads: int, kv_heads: int, dim: int, num_keys: int, dtype: Any
) -> None:
    """As the oracle reads the numbers that it stands for; rows of 1 token and of 3 chunks.

    What lies beyond a row's tokens must not be read, and other layers hold other scales.
    """
    offset, dim = np.array([0, S - 1, 2 * S, 3 * S + 4], np.int32), min(dim, bench.largest)
    rng = np.random.default_rng(5)
    q = jnp.asarray(rng.normal(size=(4, num_queries, heads, dim)), bench.dtype)
    shape = (4, num_keys, kv_heads, dim)
    numbers = [rng.normal(size=shape) * 127 / 3 for _ in range(2)]
    numbers = [np.clip(np.rint(x), -127, 127).astype(dtype) for x in numbers]
    scales = [np.float32(rng.lognormal(-4.5, 0.5, size=shape[:3])) for _ in range(2)]
    key, value = (
        np.float64(x) * scale[..., None] for x, scale in zip(numbers, scales, strict=True)
    )
    beyond = np.arange(num_keys) >= (offset + num_queries)[:, None]
    for x, scale in zip(numbers, scales, strict=True):
        x[beyond] = 100
        scale[beyond] = 1e4
    caches = [jnp.stack([jnp.zeros_like(x), jnp.asarray(x)]) for x in numbers]
    scales = [np.stack([9 + x, x]).swapaxes(2, 3) for x in scales]
    rows = op.make_rows(q.shape, dca=DCA, rope=ROPE, query_offset=jnp.asarray(offset))
    read = jax.jit(partial(op.attend, dca=DCA, implementation=bench.name), compiler_options=QUICK)
    out = read(q, *caches, rows=rows, layer=jnp.int32(1), scales=Scales(*map(jnp.asarray, scales)))
    # The oracle rotates keys itself: it is given them as they were before.
    raw = rotated_back(key, np.arange(num_keys) % S)
    bench.agrees(out, by_the_oracle([q, raw, value], DCA, query_offset=offset))


def rotated_back(key: np.ndarray, position: np.ndarray) -> np.ndarray:
    half = key.shape[-1] // 2
    angle = position[:, None] * 10_000.0 ** (-np.arange(half) / half)
    turned = (key[..., :half] + 1j * key[..., half:]) * np.exp(-1j * angle)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


# --- parts -------------------------------------------------------------------------------------


def test_passes_merge_into_the_whole_and_have_its_gradient(kernel: Bench) -> None:
    """Natural log-sum-exp, float32 [B, N, T]; -inf and an output of 0 where no key is met."""
    s = 14  # or an interpreter would walk three tiles by three, thrice
    length = 2 * s + 2
    inputs = kernel.draw(6, 1, length, length, 1, 1)
    dca = DCAConfig(chunk_len=s, max_query_position=22)
    options: dict[str, Any] = {"dca": dca, "rope": ROPE}

    def passes(*inputs: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        return [
            attention_pass(*inputs, phase=phase, implementation=kernel.name, **options)
            for phase in PHASES
        ]

    @partial(jax.jit, compiler_options=QUICK)
    def merged(*inputs: jax.Array) -> tuple[list[jax.Array], list]:
        def merge(*inputs: jax.Array) -> tuple[jax.Array, list]:
            found = passes(*inputs)
            return merge_passes(*(list(x) for x in zip(*found, strict=True)))[0], found  # pyright: ignore

        out, pull_back, found = jax.vjp(merge, *inputs, has_aux=True)
        return [out, *pull_back(weight_of(out).astype(out.dtype))], found

    wide = [x.astype(jnp.float32) for x in inputs]
    whole = partial(dual_chunk_attention, implementation="reference", **options)
    expected = with_gradients(whole)(*wide)
    ours, found = merged(*inputs)
    for mine, theirs in zip(ours, expected, strict=True):
        kernel.agrees(mine, theirs)

    index = np.arange(length)
    for (out, lse), met in zip(found, (index >= 2 * s, index >= s, index >= 0), strict=True):
        assert (lse.shape, lse.dtype) == ((1, 1, length), jnp.float32)
        np.testing.assert_array_equal(np.isfinite(lse[0, 0]), met)
        assert not np.asarray(out[0, ~met]).any()
    # A text's first query of a chunk meets itself alone in it: its log-sum-exp is its logit.
    q, k, _ = (np.asarray(x, np.float64) for x in inputs)
    own = (q[0, 0, 0] * k[0, 0, 0]).sum() / np.sqrt(kernel.dim)
    assert float(lse[0, 0, 0]) == pytest.approx(own, abs=100 * kernel.atol)


def test_slices_of_the_keys(kernel: Bench) -> None:
    """Met one by one with the whole's log-sum-exp; one lies beyond every query of the first row."""
    q, k, v = kernel.draw(7, 2, 25, 47, 2, 1)
    offset = jnp.asarray([2, 22], jnp.int32)
    rows = op.make_rows(q.shape, dca=DCA, rope=ROPE, query_offset=offset)

    @partial(jax.jit, compiler_options=QUICK)
    def in_slices(*arrays: jax.Array) -> list[jax.Array]:
        backend = op.BACKENDS[kernel.name]
        return attend_by_slices(backend, *arrays, cuts=[29], dca=DCA, rows=rows)

    def whole(*inputs: jax.Array) -> jax.Array:
        return dense_attention(*inputs, dca=DCA, **rows.of_dca())

    weight = weight_of(q).astype(q.dtype)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    for ours, theirs in zip(in_slices(q, k, v, weight), with_gradients(whole)(*wide), strict=True):
        kernel.agrees(ours, theirs)


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_and_twice_the_same_bits(kernel: Bench, dtype: Any) -> None:
    """Two query heads of one kv head; relative errors of value and gradients."""
    if kernel.name == "mosaic_tpu" and dtype == jnp.float16:
        pytest.skip("a TPU has no float16")
    inputs = [x.astype(dtype) for x in kernel.draw(3, 1, S + 9, S + 9, 2, 1, dim=64)]
    wide = [x.astype(jnp.float32) for x in inputs]

    def compiled(name: str) -> Any:
        options: dict[str, Any] = {"dca": DCA, "rope": ROPE, "implementation": name}
        return with_gradients(partial(dual_chunk_attention, **options))

    run = compiled(kernel.name)
    results = run(*inputs), run(*inputs), compiled("reference")(*wide)
    for ours, twice, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours, twice)
        error = np.linalg.norm(ours.astype(jnp.float32) - theirs) / np.linalg.norm(theirs)
        assert error < 6e-3
