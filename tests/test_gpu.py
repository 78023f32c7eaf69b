"""The GPU kernels on a GPU, against the dense float32 oracle, in value and in gradient.

The yardstick is the same formula computed naively in the inputs' own precision: logits, softmax and
sums rounded to it. Kernels that sum in float32 must err by a fraction of that only.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_moby_dick
from conftest import REPOSITORY
from flax import nnx
from kernels import attend_by_slices, runs_here

import dca_jax
from dca_jax.attention import attend, attention_pass, dual_chunk_attention, merge_passes
from dca_jax.attention.mosaic_gpu import flash_forward
from dca_jax.attention.mosaic_gpu.forward_tiles import PASS_TILES, TILES, ForwardTiles
from dca_jax.attention.op import BACKENDS, make_rows, rotate_keys
from dca_jax.attention.stored import Scales, quantize
from dca_jax.config import LlamaConfig
from dca_jax.dca import PHASES, DCAConfig, Phase, key_range, query_position
from dca_jax.dtypes import CACHE_DTYPES
from dca_jax.evaluation.passkey import passkey_grid
from dca_jax.inference.score import perplexity, token_nll
from dca_jax.model import Llama
from dca_jax.rope import RopeConfig, inverse_frequencies, rotate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

ROPE = RopeConfig()
KERNELS = ("mosaic_gpu", "triton", "mosaic_ampere", "mosaic_blackwell")
FORWARD, BACKWARD = 0.8, 1.0  # of the naive error that ours may reach

# A chunk that is a multiple of every block, one that is of none, and one shorter than a block.
CHUNKS = [(256, 300), (200, 399), (40, 60)]


@pytest.fixture(autouse=True)
def kernels_for_other_gpus_are_skipped(request: pytest.FixtureRequest) -> None:
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "name" in params:
        runs_here(params["name"], params.get("dim", 128))


def config(chunk: tuple[int, int]) -> DCAConfig:
    return DCAConfig(chunk_len=chunk[0], max_query_position=chunk[1])


def draw(
    batch: int, num_queries: int, num_keys: int, heads: int, kv_heads: int, dim: int, dtype: Any
) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(num_queries), 4)
    shapes = (num_queries, heads), (num_keys, kv_heads), (num_keys, kv_heads), (num_queries, heads)
    return [
        jax.random.normal(key, (batch, n, h, dim), jnp.float32).astype(dtype)
        for key, (n, h) in zip(keys, shapes, strict=True)
    ]


def naive(q: jax.Array, k: jax.Array, v: jax.Array, dca: DCAConfig) -> jax.Array:
    """Attention with every intermediate result in the dtype of the inputs."""
    length, heads, dim = q.shape[1:]
    kv_heads = k.shape[2]
    inv_freq = inverse_frequencies(ROPE, dim)
    index = jnp.arange(length, dtype=jnp.int32)
    k = rotate(k, (index % dca.chunk_len)[None], inv_freq)
    grouped = q.reshape(*q.shape[:2], kv_heads, heads // kv_heads, dim)
    logits = jnp.full((q.shape[0], kv_heads, heads // kv_heads, length, length), -jnp.inf, q.dtype)
    for phase in PHASES:
        turned = rotate(grouped, query_position(index, phase, dca)[None], inv_freq)
        turned = turned * jnp.asarray(dim**-0.5, q.dtype)
        start, stop = key_range(index, phase, dca)
        met = (start[:, None] <= index[None]) & (index[None] < stop[:, None])
        dots = jnp.einsum("BTKGH,BSKH->BKGTS", turned, k)
        logits = jnp.where(met[None, None, None], dots, logits)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    weights = weights / weights.sum(axis=-1, keepdims=True, dtype=q.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(q.shape)


def error(ours: jax.Array, theirs: jax.Array) -> float:
    difference = ours.astype(jnp.float32) - theirs.astype(jnp.float32)
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(theirs.astype(jnp.float32)))


def with_gradients(attention: Any) -> Any:
    """A function of (q, k, v, weight) that returns out, dq, dk and dv."""

    def loss(
        q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        out = attention(q, k, v)
        return jnp.sum(out.astype(jnp.float32) * weight.astype(jnp.float32)), out

    def run(*arrays: jax.Array) -> list[jax.Array]:
        grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)
        return [out, *grads]

    return jax.jit(run)


def check(name: str, arrays: list[jax.Array], dca: DCAConfig) -> None:
    """Value and gradients beside the oracle, all rows and the last quarter, and twice the same."""
    options: dict[str, Any] = {"dca": dca, "rope": ROPE}
    oracle = functools.partial(dual_chunk_attention, implementation="reference", **options)
    exact = with_gradients(oracle)(*(x.astype(jnp.float32) for x in arrays))
    rough = with_gradients(functools.partial(naive, dca=dca))(*arrays)
    kernel = with_gradients(functools.partial(dual_chunk_attention, implementation=name, **options))
    tail = arrays[0].shape[1] * 3 // 4
    for what, mine, again, theirs, yardstick in zip(
        ("out", "dq", "dk", "dv"), kernel(*arrays), kernel(*arrays), exact, rough, strict=True
    ):
        share = FORWARD if what == "out" else BACKWARD
        assert mine.dtype == arrays[0].dtype
        assert bool(jnp.isfinite(mine).all()), what
        np.testing.assert_array_equal(mine, again, err_msg=f"{what} is not deterministic")
        if float(jnp.linalg.norm(theirs)) < 1e-3 * float(jnp.linalg.norm(arrays[3])):
            # One key: the gradient is zero. Ours is what rounding the output to 16 bits leaves.
            assert float(jnp.linalg.norm(mine)) < 0.01 * float(jnp.linalg.norm(arrays[3])), what
            continue
        for rows in (slice(None), slice(tail, None)):
            reached = error(mine[:, rows], theirs[:, rows])
            allowed = share * error(yardstick[:, rows], theirs[:, rows]) + 1e-6
            assert reached <= allowed, f"{what}{rows}: {reached:.2e}, allowed {allowed:.2e}"


# On Hopper each of them has kernels of its own: forward, backward, or both.
@pytest.mark.parametrize("extra", ["1", "s-1", "s", "s+1", "2*s", "2*s+1", "3*s+77"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    ("name", "dim"),
    [("mosaic_gpu", 64), ("mosaic_gpu", 256), *((name, 128) for name in KERNELS)],
)
def test_edges(name: str, dim: int, chunk: tuple[int, int], extra: str) -> None:
    length = {"1": 1, "s-1": -1, "s": 0, "s+1": 1, "2*s": chunk[0], "2*s+1": chunk[0] + 1}.get(
        extra, 2 * chunk[0] + 77
    ) + (chunk[0] if extra != "1" else 0)
    check(name, draw(1, length, length, 8, 2, dim, jnp.bfloat16), config(chunk))


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (64, jnp.float16),
        (128, jnp.bfloat16),
        (128, jnp.float16),
        (256, jnp.bfloat16),
        (256, jnp.float16),
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (8, 1), (6, 2)])
@pytest.mark.parametrize("name", KERNELS)
def test_heads(name: str, heads: int, kv_heads: int, dim: int, dtype: Any) -> None:
    check(name, draw(1, 650, 650, heads, kv_heads, dim, dtype), config((200, 250)))


@pytest.mark.parametrize("name", KERNELS)
def test_rows_of_different_texts_in_a_cache(name: str) -> None:
    """Pieces at different places of texts of different lengths, in one layer of several."""
    dca, batch, capacity = config((200, 250)), 3, 1208
    starts, news = [900, 17, 0], [300, 200, 1]
    for num_queries in (300, 1):
        real = [min(n, num_queries) for n in news]
        q, k, v, _ = draw(batch, num_queries, capacity, 8, 2, 128, jnp.bfloat16)
        lengths = jnp.asarray([a + b for a, b in zip(starts, real, strict=True)], jnp.int32)
        rows = make_rows(
            q.shape,
            dca=dca,
            rope=ROPE,
            lengths=lengths,
            query_offset=jnp.asarray(starts, jnp.int32),
        )
        index = jnp.arange(capacity, dtype=jnp.int32)[None]
        k = rotate_keys(k, index, dca=dca, inv_freq=rows.inv_freq)
        beyond = (index >= lengths[:, None])[:, :, None, None]
        k, v = (jnp.where(beyond, jnp.asarray(1e4, x.dtype), x) for x in (k, v))
        stacked = [jnp.stack([x * 0, x, x * 0]) for x in (k, v)]
        run = jax.jit(attend, static_argnames=("dca", "implementation"))
        options: dict[str, Any] = {"dca": dca, "rows": rows}
        out = run(q, *stacked, layer=jnp.int32(1), implementation=name, **options)
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        expected = run(*wide, implementation="reference", **options)
        assert error(out, expected) < 4e-3
        for row, count in enumerate(real):
            assert not np.asarray(out[row, count:]).any()


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "num_queries"),
    [
        (4, 4, 64, 1),
        (8, 2, 128, 1),
        (8, 1, 256, 1),
        (32, 8, 128, 2),
        (8, 1, 64, 5),
        (4, 2, 128, 90),
    ],
)
@pytest.mark.parametrize("name", KERNELS)
def test_long_rows_of_a_cache_in_8_bits(
    name: str, heads: int, kv_heads: int, dim: int, num_queries: int, dtype: str
) -> None:
    """Rows of 1 token and of many blocks; beyond their tokens lies what must not be read."""
    dca, capacity, lengths = DCAConfig.paper(4096), 20_008, [20_001, 1, 5_000, 3_072 + 64]
    q, k, v, _ = draw(len(lengths), num_queries, capacity, heads, kv_heads, dim, jnp.bfloat16)
    told = jnp.asarray(lengths, jnp.int32)
    start = jnp.maximum(told - num_queries, 0)
    rows = make_rows(q.shape, dca=dca, rope=ROPE, lengths=told, query_offset=start)
    beyond = jnp.arange(capacity)[None, :, None] >= told[:, None, None]
    arrays, scales = [], []
    for x in (k, v):
        x, scale = quantize(x, CACHE_DTYPES[dtype])
        arrays.append(jnp.where(beyond[..., None], jnp.asarray(100, x.dtype), x))
        scales.append(jnp.swapaxes(jnp.where(beyond, 1e4, scale), 1, 2))
    stacked = [jnp.stack([x, x * 0]) for x in arrays]
    layers = Scales(*(jnp.stack([x, x + 7]) for x in scales))
    run = jax.jit(attend, static_argnames=("dca", "implementation"))
    options: dict[str, Any] = {"dca": dca, "rows": rows, "layer": jnp.int32(0), "scales": layers}
    out = run(q, *stacked, implementation=name, **options)
    again = run(q, *stacked, implementation=name, **options)
    expected = run(q.astype(jnp.float32), *stacked, implementation="xla", **options)
    np.testing.assert_array_equal(out, again)
    for row in range(len(lengths)):
        assert error(out[row], expected[row]) < 5e-3, row


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", KERNELS)
def test_three_passes_are_the_fused_kernel(name: str, dim: int) -> None:
    """Most tiles have no keys in the last pass, and many none in the one before it."""
    dca = config((256, 300))
    arrays = draw(1, 900, 900, 8, 2, dim, jnp.bfloat16)

    def three_passes(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"dca": dca, "rope": ROPE, "implementation": name}
        passes = [attention_pass(q, k, v, phase=phase, **options) for phase in PHASES]
        return merge_passes([out for out, _ in passes], [lse for _, lse in passes])[0]

    fused = functools.partial(dual_chunk_attention, dca=dca, rope=ROPE, implementation=name)
    runs = (with_gradients(attention)(*arrays) for attention in (three_passes, fused))
    for ours, theirs in zip(*runs, strict=True):
        assert error(ours, theirs) < 6e-3  # each pass's output is rounded to bfloat16


@pytest.mark.parametrize(
    ("dim", "dtype"), [(64, jnp.float16), (128, jnp.bfloat16), (256, jnp.bfloat16)]
)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", KERNELS)
def test_slices_of_the_keys(name: str, chunk: tuple[int, int], dim: int, dtype: Any) -> None:
    """Each slice by itself, with the log-sum-exp of all: merged and summed they are the whole.

    The slices begin anywhere. The last lies beyond the second row's text and beyond most tiles of
    the first's queries: nobody may wait for what nobody writes.
    """
    dca, length = config(chunk), 650
    arrays = draw(2, length, length, 4, 2, dim, dtype)
    lengths = jnp.asarray([length, 300], jnp.int32)
    rows = make_rows(arrays[0].shape, dca=dca, rope=ROPE, lengths=lengths)

    @jax.jit
    def in_slices(*arrays: jax.Array) -> list[jax.Array]:
        return attend_by_slices(BACKENDS[name], *arrays, cuts=(137, 401), dca=dca, rows=rows)

    whole = with_gradients(functools.partial(attend, dca=dca, rows=rows, implementation=name))
    results = in_slices(*arrays), in_slices(*arrays), whole(*arrays)
    for what, ours, again, theirs in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert bool(jnp.isfinite(ours).all()), what
        np.testing.assert_array_equal(ours, again, err_msg=f"{what} is not deterministic")
        assert error(ours, theirs) < 6e-3, what  # a slice's part is rounded to 16 bits


@pytest.mark.parametrize("num_queries", [1, 5, 300])
@pytest.mark.parametrize("name", KERNELS)
def test_a_slice_of_keys_for_each_row(name: str, num_queries: int) -> None:
    """Slices before, around and beyond the queries; where they begin is data."""
    dca, starts = config((200, 250)), jnp.asarray([900, 700, 500, 40], jnp.int32)
    q, k, v, _ = draw(4, num_queries, 696, 8, 2, 128, jnp.bfloat16)
    rows = make_rows(q.shape, dca=dca, rope=ROPE, query_offset=starts)
    rows = rows._replace(key_offset=jnp.asarray([13, 333, 0, 2000], jnp.int32))
    run = jax.jit(attend, static_argnames=("dca", "implementation"))
    out = run(q, k, v, dca=dca, rows=rows, implementation=name)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    expected = run(*wide, dca=dca, rows=rows, implementation="reference")
    assert error(out, expected) < 4e-3
    assert not np.asarray(out[3]).any()
    _, lse = BACKENDS[name].forward(
        q, k[None], v[None], jnp.int32(0), rows, dca=dca, phases=PHASES, with_lse=True
    )
    assert lse is not None
    assert bool(jnp.isneginf(lse[3]).all())
    assert bool(jnp.isfinite(lse[:3]).all())


def dense_pass(
    q: jax.Array, k: jax.Array, v: jax.Array, dca: DCAConfig, phase: Phase
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of the keys of one phase, from all logits in float32."""
    length, heads, dim = q.shape[1:]
    kv_heads = k.shape[2]
    inv_freq = inverse_frequencies(ROPE, dim)
    index = jnp.arange(length, dtype=jnp.int32)
    k = rotate(k, (index % dca.chunk_len)[None], inv_freq)
    grouped = q.reshape(*q.shape[:2], kv_heads, heads // kv_heads, dim)
    turned = rotate(grouped, query_position(index, phase, dca)[None], inv_freq) * dim**-0.5
    start, stop = key_range(index, phase, dca)
    met = (start[:, None] <= index[None]) & (index[None] < stop[:, None])
    some = (start < stop)[:, None]
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", turned, k, precision="highest")
    logits = jnp.where(met | ~some, logits, -jnp.inf)
    weights = jnp.where(some, jax.nn.softmax(logits, axis=-1), 0.0)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v, precision="highest").reshape(q.shape)
    lse = jnp.where(some[:, 0], jax.nn.logsumexp(logits, axis=-1), -jnp.inf)
    return out, lse.reshape(q.shape[0], heads, length)


@pytest.mark.parametrize("phases", [PHASES, PHASES[1:], *((phase,) for phase in PHASES)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(32, 8, 64), (32, 8, 128), (33, 11, 128), (16, 4, 256)]
)
def test_a_cta_computes_many_tiles(
    heads: int, kv_heads: int, dim: int, phases: tuple[Phase, ...]
) -> None:
    """As CTAs that compute one tile each, to the bit, in rows with much text, little and none."""
    runs_here("mosaic_gpu", dim)
    dca, length, told = config((200, 250)), 2101, [2101, 0, 1, 1300]
    q, k, v, _ = draw(len(told), length, length, heads, kv_heads, dim, jnp.bfloat16)
    rows = make_rows(q.shape, dca=dca, rope=ROPE, lengths=jnp.asarray(told, jnp.int32))
    tiles = (TILES if phases == PHASES else PASS_TILES)[dim]
    assert tiles.persistent

    @functools.partial(jax.jit, static_argnums=0)
    def run(tiles: ForwardTiles, k: jax.Array, v: jax.Array) -> Any:
        options: dict[str, Any] = {"dca": dca, "phases": phases, "with_lse": True, "tiles": tiles}
        return flash_forward.forward(q, k[None], v[None], jnp.int32(0), rows, **options)

    alone = run(dataclasses.replace(tiles, persistent=False), k, v)
    for _ in range(2):
        for one, other in zip(run(tiles, k, v), alone, strict=True):
            np.testing.assert_array_equal(one, other)
    if phases == PHASES:
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        expected = attend(*wide, dca=dca, rows=rows, implementation="reference")
        assert error(alone[0], expected) < 4e-3


@pytest.mark.parametrize("length", [1, 256, 257, 845])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 64), (9, 3, 128), (4, 2, 256)])
@pytest.mark.parametrize("name", KERNELS)
def test_a_single_pass(
    name: str, heads: int, kv_heads: int, dim: int, chunk: tuple[int, int], length: int
) -> None:
    """Output, log-sum-exp and the gradient of both beside dense attention to the phase's keys.

    In the last phases most tiles of queries have no keys.
    """
    dca = config(chunk)
    *arrays, weight = draw(1, length, length, heads, kv_heads, dim, jnp.bfloat16)
    of_lse = jax.random.normal(jax.random.key(9), (1, heads, length))

    def with_gradient(attention: Any) -> Any:
        def loss(*arrays: jax.Array) -> tuple[jax.Array, Any]:
            out, lse = attention(*arrays)
            finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
            of_out = out.astype(jnp.float32) * weight.astype(jnp.float32)
            return jnp.sum(of_out) + jnp.sum(finite * of_lse), (out, lse)

        def run(*arrays: jax.Array) -> list[jax.Array]:
            gradients, found = jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)
            return [*found, *gradients]

        return jax.jit(run)

    for phase in PHASES:
        options: dict[str, Any] = {"phase": phase, "dca": dca}
        ours = functools.partial(attention_pass, implementation=name, rope=ROPE, **options)
        ours, exact = (with_gradient(x) for x in (ours, functools.partial(dense_pass, **options)))
        theirs = exact(*(x.astype(jnp.float32) for x in arrays))
        found, again = ours(*arrays), ours(*arrays)
        for what, one, other in zip(("out", "lse", "dq", "dk", "dv"), found, again, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=f"{phase} {what} changes")
        lse, expected = found.pop(1), theirs.pop(1)
        assert lse.dtype == jnp.float32
        np.testing.assert_array_equal(jnp.isneginf(lse), jnp.isneginf(expected))
        met = jnp.isfinite(expected)
        np.testing.assert_allclose(lse[met], expected[met], atol=0.02)
        for what, one, other in zip(("out", "dq", "dk", "dv"), found, theirs, strict=True):
            assert bool(jnp.isfinite(one).all()), (phase, what)
            if float(jnp.linalg.norm(other)) < 1e-3 * float(jnp.linalg.norm(weight)):
                assert float(jnp.linalg.norm(one)) < 0.01 * float(jnp.linalg.norm(weight)), what
                continue
            assert error(one, other) < 6e-3, (phase, what)  # weights are rounded to bfloat16


@pytest.mark.parametrize("name", KERNELS)
def test_weights_that_leave_the_range_of_the_first_block(name: str) -> None:
    """Logits that grow by far from block to block, which a lagging maximum must follow."""
    dca = config((256, 300))
    q, k, v, weight = draw(1, 800, 800, 4, 4, 128, jnp.bfloat16)
    ramp = jnp.linspace(0.1, 6.0, 800, dtype=jnp.float32).astype(jnp.bfloat16)
    k = k * ramp[None, :, None, None]
    check(name, [q, k, v, weight], dca)


# --- whole models ------------------------------------------------------------------------------

DEMO = REPOSITORY / "models" / "demo-python-7m"


@pytest.mark.parametrize("name", KERNELS)
def test_the_demo_model_has_one_perplexity(name: str) -> None:
    def perplexity_by(implementation: str) -> float:
        llm = dca_jax.load(DEMO, dca="paper", dtype="bfloat16", implementation=implementation)
        files = sorted((REPOSITORY / "dca_jax").glob("*.py"))
        code = "\n".join(file.read_text(encoding="utf-8") for file in files)
        ids = llm.tokenizer(code)["input_ids"][:4096]
        return perplexity(llm.model, np.asarray(ids, np.int32), window=len(ids))

    runs_here(name, 64)
    assert perplexity_by(name) == pytest.approx(perplexity_by("xla"), rel=5e-3)


def test_the_demo_model_finds_the_passkey() -> None:
    llm = dca_jax.load(DEMO, dca="paper", dtype="bfloat16")
    grid = passkey_grid(llm, [2048, 4096], [0.0, 0.5, 1.0], trials=2)
    assert (grid.found == grid.trials).all()


@pytest.mark.parametrize(("remat", "kernels"), [("layer", 3), ("attention", 2), ("products", 2)])
def test_no_kernel_of_an_update_runs_twice(remat: str, kernels: int) -> None:
    """A layer's forward and backward kernel; the forward one again only if nothing of it is kept.

    XLA would run it once more to write what is kept of it down: the compiled program tells.
    """
    runs_here("mosaic_gpu", 128)
    model = training_model(remat)
    tokens = jnp.zeros((1, 1024), jnp.int32)
    gradient = jax.jit(jax.grad(lambda model: model(tokens).sum()))
    text = gradient.lower(model).compile().as_text()
    assert text is not None
    assert text.count("mosaic_gpu_v2") == kernels


def training_model(remat: str) -> Llama:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=256,
    )
    options: dict[str, Any] = {"dca": DCAConfig.paper(256), "implementation": "mosaic_gpu"}
    return Llama(config, remat=remat, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("setting", test_moby_dick.SETTINGS)
@pytest.mark.parametrize("name", KERNELS)
def test_golden_nll_of_moby_dick(name: str, setting: str, shared: Path) -> None:
    runs_here(name, test_moby_dick.HEAD_DIM)
    model = test_moby_dick.load(shared, test_moby_dick.SETTINGS[setting], jnp.bfloat16, name)
    nll = token_nll(model, test_moby_dick.read_tokens(shared)[None])[0]
    for row in test_moby_dick.ROWS:
        if row["setting"] == setting:
            assert float(nll[: row["L"] - 1].mean()) == pytest.approx(row["nll"], abs=0.02)
