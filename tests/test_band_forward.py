"""The Hopper kernel's bands without a GPU: what it is told, and what it is compiled from.

What a launch is given is followed here in NumPy as the kernel follows it: so all but the kernel
itself is tested against the dense definition. The kernel is tested on a GPU, in test_gpu_bands.py.
"""

from typing import Any

import band_methods
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import draw
from lowering import device, lower_forward, shapes

from dca_jax.attention import attend, mosaic_gpu
from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_gpu import band_forward
from dca_jax.attention.mosaic_gpu.forward_cta import Problem, Refs
from dca_jax.attention.mosaic_gpu.forward_tiles import BLOCK_Q
from dca_jax.attention.mosaic_gpu.ranges import walks_of_band
from dca_jax.attention.op import choose_implementation, make_rows
from dca_jax.errors import InputError
from dca_jax.rope import RopeConfig

DIM, HEADS, KV_HEADS = 64, 4, 2
KERNEL = "stablehlo.custom_call @mosaic_gpu"


def follow(problem: Problem, refs: Refs, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel computes, block by block: full ones without a mask, edges with theirs."""
    batch, _, heads, dim = refs.query[0].shape
    out = np.zeros((batch, num_queries, heads, dim), np.float32)
    lse = np.full((batch, heads, num_queries), -np.inf, np.float32)
    block_k = problem.tiles.block_k
    for b, tile in np.ndindex(batch, refs.band.walks.shape[1]):
        key_row, value_row, offset, length, _ = refs.place[b]
        queries = np.arange(tile * BLOCK_Q, min((tile + 1) * BLOCK_Q, num_queries))
        present = offset + queries < length
        logits, values, seen = [], [], set()
        for kind, (first, count) in enumerate(refs.band.walks[b, tile]):
            for block in range(first, first + count):
                assert block not in seen
                seen.add(block)
                slots = np.arange(block * block_k, (block + 1) * block_k)
                keys, v = (
                    np.repeat(block_of(x[row], slots), problem.group, axis=1)
                    for x, row in ((refs.key, key_row), (refs.value, value_row))
                )
                dots = [np.einsum("tnh,snh->nts", q[b, queries], keys) for q in refs.query]
                chosen = dots[0]
                if refs.band.query_steps is not None:
                    nearer = refs.band.key_steps[b, slots] > refs.band.query_steps[b, queries, None]
                    chosen = np.where(nearer, dots[1], dots[0])
                start, stop = (x[b, queries, None] for x in (refs.band.start, refs.band.stop))
                met = (slots >= start) & (slots < stop)
                assert kind > 0 or met[present].all()
                logits.append(chosen if kind == 0 else np.where(met, chosen, -np.inf))
                values.append(v)
        if not logits:
            continue
        joined = np.concatenate(logits, axis=2)
        largest = np.maximum(joined.max(axis=2, keepdims=True), -1e30)
        p = np.exp2(joined - largest)
        total = p.sum(axis=2)
        is_text = present & (total > 0)
        attended = np.einsum("nts,snh->tnh", p, np.concatenate(values))
        total = np.where(is_text, total, 1)
        attended = np.where(is_text.T[:, :, None], attended / total.T[:, :, None], 0)
        out[b, queries] = attended
        logs = (np.log2(total) + largest[:, :, 0]) * np.log(2)
        lse[b][:, queries] = np.where(is_text, logs, -np.inf)
    return out, lse


def block_of(x: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Rows of x; zeros beyond its end, as the copy engine gives."""
    return np.where((slots < len(x))[:, None, None], x[np.minimum(slots, len(x) - 1)], 0)


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are followed here."""

    def launch(problem: Problem, given: Refs, num_queries: int, with_lse: bool) -> tuple:
        assert with_lse
        batch, _, heads, dim = given.query[0].shape
        like = (
            jax.ShapeDtypeStruct((batch, num_queries, heads, dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, num_queries), jnp.float32),
        )

        def run(refs: Refs) -> tuple[np.ndarray, np.ndarray]:
            return follow(problem, jax.tree.map(np.asarray, refs), num_queries)

        return jax.pure_callback(run, like, given)

    monkeypatch.setattr(band_forward, "launch", launch)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("rerope", "lm-infinite") else pytest.param(name, marks=pytest.mark.slow)
        for name in band_methods.NAMES
    ],
)
@pytest.mark.usefixtures("followed")
def test_what_is_launched_is_the_definition(name: str) -> None:
    """Pieces at different places of texts of different lengths, in one layer of several."""
    method = band_methods.method_for(name, DIM)
    starts, real, num_queries, capacity = [430, 17, 0, 250], [270, 200, 1, 150], 270, 704
    q, k, v = draw(0, 4, num_queries, capacity, HEADS, KV_HEADS, DIM)
    lengths = jnp.asarray([a + b for a, b in zip(starts, real, strict=True)], jnp.int32)
    rows = make_rows(
        q.shape,
        dca=method,
        rope=RopeConfig(),
        lengths=lengths,
        query_offset=jnp.asarray(starts, jnp.int32),
    )
    beyond = (jnp.arange(capacity)[None] >= lengths[:, None])[:, :, None, None]
    k, v = (jnp.where(beyond, 1e4, x) for x in (k, v))
    check(name, q, k, v, rows)
    # Of the text's keys, some only, and no multiple of 8: from the 100th on.
    some = rows._replace(key_offset=jnp.full_like(rows.key_offset, 100))
    check(name, q, k[:, 100:400], v[:, 100:400], some)


def check(name: str, q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows) -> None:
    method = band_methods.method_for(name, DIM)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows) -> Any:
        keys, values = (jnp.stack([x * 0, x]) for x in (k, v))
        ours = band_forward.forward(q, keys, values, jnp.int32(1), rows, method=method)
        options: Any = {"dca": method, "rows": rows}
        expected = attend(q, k, v, implementation="reference", **options)
        _, lse = mosaic_gpu.xla.forward(
            q, k[None], v[None], jnp.int32(0), rows, dca=method, phases=(), with_lse=True
        )
        return ours, (expected, lse)

    (out, lse), (expected, expected_lse) = run(q, k, v, rows)
    np.testing.assert_allclose(out, expected, atol=3e-5, rtol=0)
    np.testing.assert_array_equal(jnp.isneginf(lse), jnp.isneginf(expected_lse))
    met = np.isfinite(lse)
    np.testing.assert_allclose(lse[met], expected_lse[met], atol=3e-5, rtol=0)
    assert met.any()


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([64, 256]), st.booleans())
def test_a_tile_walks_over_each_block_that_it_meets(seed: int, block: int, grow: bool) -> None:
    """Of any ranges: all meet full blocks, the edges hold the rest, and no block is there twice."""
    rng = np.random.default_rng(seed)
    start, stop = rng.integers(0, 1500, (2, 2, 2 * BLOCK_Q))
    if grow:  # as bands do
        start, stop = (np.sort(x, axis=1) // 3 for x in (start, stop))
        stop = stop + rng.integers(0, 900)
    present = np.arange(2 * BLOCK_Q)[None] < rng.integers(0, 2 * BLOCK_Q + 1, 2)[:, None]
    start, stop = (np.where(present, x, 0).astype(np.int32) for x in (start, stop))
    given_start, given_stop, given_present = map(jnp.asarray, (start, stop, present))
    walks = np.asarray(walks_of_band(given_start, given_stop, given_present, block))
    slots = np.arange(walks[..., 0].max() + walks[..., 1].max() + 2) * block
    for b, tile in np.ndindex(2, 2):
        queries = slice(tile * BLOCK_Q, (tile + 1) * BLOCK_Q)
        low, high = (x[b, queries, None] for x in (start, stop))
        any_met = (np.maximum(low, slots) < np.minimum(high, slots + block)).any(axis=0)
        all_met = ((low <= slots) & (slots + block <= high) | ~present[b, queries, None]).all(
            axis=0
        )
        visits = np.zeros((2, len(slots)), int)
        for kind, (first, count) in enumerate(walks[b, tile]):
            assert count >= 0
            visits[min(kind, 1), first : first + count] += 1
        assert (visits.sum(axis=0) <= 1).all()
        assert (visits.sum(axis=0)[any_met] == 1).all()
        assert all_met[visits[0] > 0].all()
        if grow and present[b, queries].all():
            np.testing.assert_array_equal(visits[0] > 0, all_met & any_met)


# --- what runs where ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype"),
    [
        (9, 3, 64, jnp.bfloat16),
        pytest.param(32, 8, 128, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(4, 2, 256, jnp.float16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["rerope", "adagrope", "dpe"])
def test_prompts_lower(name: str, heads: int, kv_heads: int, dim: int, dtype: Any) -> None:
    """Of one rotation, of two in a loop over bands, and with a position for each plane."""
    sizes = (2, 1003, 1005, heads, kv_heads, dim, dtype)
    text = lower_forward(mosaic_gpu, shapes(*sizes), band_methods.method_for(name, dim), ())
    assert text.count(KERNEL) == (1 if name == "adagrope" else 2)


def test_few_queries_need_no_kernel() -> None:
    method = band_methods.method_for("rerope", DIM)
    for num_queries, kernels in ((mosaic_gpu.FEWEST - 1, 0), (mosaic_gpu.FEWEST, 2)):
        sizes = (2, num_queries, 1005, HEADS, KV_HEADS, DIM, jnp.bfloat16)
        assert lower_forward(mosaic_gpu, shapes(*sizes), method, ()).count(KERNEL) == kernels


@pytest.mark.usefixtures("followed")
def test_the_gradient_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward by the kernel's bands, backward in plain XLA from their log-sum-exp."""
    method = band_methods.method_for("lampe", DIM)
    q, k, v = draw(1, 1, 150, 150, HEADS, KV_HEADS, DIM)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str) -> jax.Array:
        rows = make_rows(q.shape, dca=method, rope=RopeConfig())
        out = attend(q, k, v, dca=method, rows=rows, implementation=implementation)
        return jnp.sum(out * (q[:, ::-1] + 0.5))

    grad = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    monkeypatch.setattr(mosaic_gpu, "unsupported", lambda *args, **kinds: None)
    ours = grad(q, k, v, "mosaic_gpu")
    for mine, theirs in zip(ours, grad(q, k, v, "reference"), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=0)
        assert np.abs(theirs).max() > 1e-2


def test_methods_are_read_by_the_best_that_knows_them() -> None:
    query = jax.ShapeDtypeStruct((1, 100, 8, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 1, 100, 2, 128), jnp.bfloat16)
    method = band_methods.method_for("rerope", 128)
    with device("NVIDIA H200"):
        assert choose_implementation(None, query, key, method) == "mosaic_gpu"
        with pytest.raises(InputError, match="'triton' cannot run: it supports only DCA and plain"):
            choose_implementation("triton", query, key, method)
    with device("NVIDIA A100-SXM4-80GB"):
        assert choose_implementation(None, query, key, method) == "xla"
    assert choose_implementation(None, query, key, method) == "xla"
