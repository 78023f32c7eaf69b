"""The Pallas-Triton kernels: in Pallas' interpreter against the oracles, and lowered for CUDA.

The tiles are made small here, so that short texts cross many of them. What only a GPU shows (that
the compiled kernels agree with the interpreted ones, and their speed) is tested elsewhere.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax._src.mesh import AbstractDevice

from dca_jax.attention import attention_pass, dual_chunk_attention, merge_passes, op, triton
from dca_jax.attention.device import Device
from dca_jax.dca import PHASES, DCAConfig
from dca_jax.errors import InputError
from dca_jax.rope import RopeConfig

ROPE = RopeConfig()
SMALL = triton.Tile(block_q=16, block_k=16, num_warps=4, num_stages=2)
S = 40  # no multiple of the tile
DCA = DCAConfig(chunk_len=S, max_query_position=60)

# These programs are large and run once: compiling them is what takes the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

attention = jax.jit(dual_chunk_attention, static_argnames=("dca", "rope", "implementation"))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    small = triton.Tiles(forward=SMALL, dq=SMALL, dkv=SMALL, decode=SMALL)
    monkeypatch.setattr(triton, "INTERPRET", True)
    monkeypatch.setattr(triton, "choose_tiles", lambda device, head_dim: small)
    monkeypatch.setattr(triton, "PACKED_ROWS", 16)
    monkeypatch.setattr(triton, "SPLIT_KEYS", 32)


def draw(
    seed: int,
    batch: int,
    num_queries: int,
    num_keys: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = (num_queries, heads), (num_keys, kv_heads), (num_keys, kv_heads)
    q, k, v = (rng.normal(size=(batch, n, h, dim)) for n, h in shapes)
    return jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype)


def check_value_and_gradient(
    inputs: tuple[jax.Array, jax.Array, jax.Array], **options: Any
) -> tuple[jax.Array, ...]:
    """Ours against the dense oracle's, on one random cotangent; returns our four arrays."""
    weight = jnp.asarray(np.random.default_rng(9).normal(size=inputs[0].shape), jnp.float32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
        out = dual_chunk_attention(q, k, v, rope=ROPE, implementation=name, **options)
        return jnp.sum(out * weight), out

    grad = jax.jit(
        jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=3, compiler_options=QUICK
    )
    (_, out), bars = grad(*inputs, "triton")
    (_, expected), expected_bars = grad(*inputs, "reference")
    for ours, theirs in zip((out, *bars), (expected, *expected_bars), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
    assert np.abs(expected_bars[2]).max() > 1e-3
    return out, *bars


@pytest.mark.usefixtures("interpreted")
def test_edges_as_the_rows_of_a_batch() -> None:
    """Texts of 1, s - 1, s, s + 1, 2s, 2s + 1 and 5s + 7 tokens, the shorter ones padded."""
    edges = [1, S - 1, S, S + 1, 2 * S, 2 * S + 1, 5 * S + 7]
    inputs = draw(0, len(edges), edges[-1], edges[-1], 2, 1, 16)
    lengths = jnp.asarray(edges, jnp.int32)
    out, *_ = check_value_and_gradient(inputs, dca=DCA, lengths=lengths)
    for row, length in enumerate(edges):
        assert not np.asarray(out[row, length:]).any()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("length", [1, 7, 2 * S + 1])
def test_edges_as_shapes(length: int) -> None:
    check_value_and_gradient(draw(length, 1, length, length, 2, 2, 16), dca=DCA)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("chunk_len", "largest"),
    [(5, 5), (32, 40)],
    ids=["many chunks a tile", "two tiles a chunk"],
)
def test_chunk_lengths(chunk_len: int, largest: int) -> None:
    dca = DCAConfig(chunk_len=chunk_len, max_query_position=largest)
    inputs = draw(1, 1, 101, 101, 2, 1, 16)
    expected = oracle.attention(*inputs, s=chunk_len, largest=largest)  # pyright: ignore
    out, *_ = check_value_and_gradient(inputs, dca=dca)
    np.testing.assert_allclose(out, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (8, 1)])
def test_heads(heads: int, kv_heads: int) -> None:
    check_value_and_gradient(draw(2, 1, 90, 90, heads, kv_heads, 32), dca=DCA)


@pytest.mark.usefixtures("interpreted")
def test_plain_causal_attention() -> None:
    check_value_and_gradient(draw(3, 1, 70, 70, 2, 1, 16), dca=None)


@pytest.mark.usefixtures("interpreted")
def test_offset_lengths_and_temperature() -> None:
    """Two rows at different places of their texts, one padded; whatever lies beyond is not read."""
    dca = DCAConfig(chunk_len=S, max_query_position=60, trained_length=64, temperature_slope=0.1)
    offset, lengths, num_keys = [33, 80], [83, 121], 150
    q, k, v = draw(4, 2, 50, num_keys, 4, 2, 16)
    beyond = np.arange(num_keys)[None, :, None, None] >= np.array(lengths)[:, None, None, None]
    k, v = jnp.where(beyond, 1e4, k), jnp.where(beyond, jnp.nan, v)
    options: dict[str, Any] = {
        "query_offset": jnp.asarray(offset, jnp.int32),
        "lengths": jnp.asarray(lengths, jnp.int32),
        "context_lengths": jnp.asarray([200, 121], jnp.int32),
    }
    out = attention(q, k, v, dca=dca, rope=ROPE, implementation="triton", **options)
    for row, length in enumerate([200, 121]):
        tau = (1 + 0.1 * np.log(length / 64)) ** 2
        one = slice(row, row + 1)
        expected = oracle.attention(
            *(np.asarray(x[one]) for x in (q, k, v)),
            s=S,
            largest=60,
            offset=offset[one],
            lengths=lengths[one],
            temperature=tau,
        )
        np.testing.assert_allclose(out[one], expected, atol=1e-5, rtol=0)
    clean = q, jnp.where(beyond, 0, k), jnp.where(beyond, 0, v)
    check_value_and_gradient(clean, dca=dca, **options)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("num_queries", [1, 3, 20])
def test_a_layer_of_a_cache_while_it_grows(num_queries: int) -> None:
    """One compilation for every length and layer; 20 queries are more than are packed."""
    layers, batch, capacity = 3, 2, 150
    q, _, _ = draw(5, batch, num_queries, 1, 6, 2, 16)
    _, k, v = draw(6, layers * batch, 1, capacity, 6, 2, 16)
    k, v = (x.reshape(layers, batch, *x.shape[1:]) for x in (k, v))

    def run(offset: jax.Array, layer: jax.Array, name: str) -> jax.Array:
        rows = op.make_rows(q.shape, dca=DCA, rope=ROPE, query_offset=offset)
        return op.attend(q, k, v, dca=DCA, rows=rows, layer=layer, implementation=name)

    ours = jax.jit(lambda offset, layer: run(offset, layer, "triton"))
    theirs = jax.jit(lambda offset, layer: run(offset, layer, "reference"))
    for first, second, layer in [(0, 1, 0), (38, 39, 1), (40, 41, 2), (79, 100, 1), (129, 5, 2)]:
        where = jnp.asarray([first, second], jnp.int32), jnp.int32(layer)
        np.testing.assert_allclose(ours(*where), theirs(*where), atol=1e-5, rtol=0)
    assert ours._cache_size() == 1


@pytest.mark.usefixtures("interpreted")
def test_passes_and_their_gradients() -> None:
    """Each phase alone: output, natural log-sum-exp, and gradients through both."""
    q, k, v = draw(7, 1, 101, 101, 2, 1, 16)
    weight, lse_weight = draw(8, 1, 101, 101, 2, 1, 16)[0], draw(9, 1, 2, 101, 1, 1, 1)[1]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, phase: Any, name: str) -> Any:
        out, lse = attention_pass(q, k, v, phase=phase, dca=DCA, rope=ROPE, implementation=name)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        total = jnp.sum(out * weight) + jnp.sum(finite * lse_weight[:, :, 0, 0][:, None, :])
        return total, (out, lse)

    grad = jax.jit(
        jax.value_and_grad(loss, (0, 1, 2), has_aux=True),
        static_argnums=(3, 4),
        compiler_options=QUICK,
    )
    outs, lses = [], []
    for phase in PHASES:
        (_, ours), bars = grad(q, k, v, phase, "triton")
        (_, theirs), expected_bars = grad(q, k, v, phase, "xla")
        for a, b in zip((*ours, *bars), (*theirs, *expected_bars), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
        outs.append(ours[0])
        lses.append(ours[1])
    merged, _ = merge_passes(outs, lses)
    fused = attention(q, k, v, dca=DCA, rope=ROPE, implementation="triton")
    np.testing.assert_allclose(merged, fused, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("interpreted")
def test_half_precision_and_determinism() -> None:
    """Relative errors of value and gradients; and the same bits twice."""
    inputs = draw(10, 1, 101, 101, 4, 2, 64, jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in inputs]
    weight = draw(11, 1, 101, 101, 4, 4, 64)[0]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
        out = dual_chunk_attention(q, k, v, dca=DCA, rope=ROPE, implementation=name)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    grad = jax.jit(
        jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=3, compiler_options=QUICK
    )
    (_, out), bars = grad(*inputs, "triton")
    (_, again), bars_again = grad(*inputs, "triton")
    (_, expected), expected_bars = grad(*wide, "reference")
    for ours, twice, theirs in zip(
        (out, *bars), (again, *bars_again), (expected, *expected_bars), strict=True
    ):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, twice)
        error = np.linalg.norm(ours.astype(jnp.float32) - theirs) / np.linalg.norm(theirs)
        assert error < 6e-3


# --- lowering for GPUs, without one ------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("NVIDIA H200", jnp.bfloat16), ("NVIDIA H200", jnp.float16), ("NVIDIA A100", jnp.bfloat16)],
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_lowers_for_cuda(kind: str, head_dim: int, dtype: Any) -> None:
    """Forward and backward at odd lengths, and decoding from a layer of a cache: every kernel."""
    dca = DCAConfig(chunk_len=700, max_query_position=1000)
    device = AbstractDevice(device_kind=kind, num_cores=108, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)

    def train(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = dual_chunk_attention(q, k, v, dca=dca, rope=ROPE, implementation="triton")
        return jnp.sum(out.astype(jnp.float32))

    def decode(q: jax.Array, k: jax.Array, v: jax.Array, at: jax.Array, n: jax.Array) -> jax.Array:
        rows = op.make_rows(q.shape, dca=dca, rope=ROPE, query_offset=at)
        return op.attend(q, k, v, dca=dca, rows=rows, layer=n, implementation="triton")

    q = jax.ShapeDtypeStruct((1, 2001, 8, head_dim), dtype)
    k = jax.ShapeDtypeStruct((1, 2001, 2, head_dim), dtype)
    new = jax.ShapeDtypeStruct((2, 1, 8, head_dim), dtype)
    cache = jax.ShapeDtypeStruct((3, 2, 4096, 2, head_dim), dtype)
    at, n = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        trained = jax.jit(jax.grad(train, (0, 1, 2))).trace(q, k, k)
        decoded = jax.jit(decode).trace(new, cache, cache, at, n)
        text = trained.lower(lowering_platforms=("cuda",)).as_text()
        for kernel in ("forward", "dq", "dkv"):
            assert f'name = "dca_triton_{kernel}"' in text
        text = decoded.lower(lowering_platforms=("cuda",)).as_text()
        for kernel in ("forward", "merge"):
            assert f'name = "dca_triton_{kernel}"' in text


def why_not(device: Device, head_dim: int = 128, dtype: Any = jnp.bfloat16) -> str | None:
    q = jax.ShapeDtypeStruct((1, 64, 8, head_dim), dtype)
    k = jax.ShapeDtypeStruct((1, 1, 64, 2, head_dim), dtype)
    return triton.unsupported(device, q, k, DCA)


def test_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = Device("gpu", "NVIDIA H200", (9, 0))
    for device in (hopper, Device("gpu", "NVIDIA A100", (8, 0)), Device("gpu", "L40", (8, 9))):
        assert [why_not(device, dim) for dim in (64, 128, 256)] == [None] * 3
    assert "got cpu (cpu)" in (why_not(Device("cpu", "cpu", None)) or "")
    assert "capability (7, 5)" in (why_not(Device("gpu", "Tesla T4", (7, 5))) or "")
    assert "got float32" in (why_not(hopper, dtype=jnp.float32) or "")
    assert "got 96" in (why_not(hopper, head_dim=96) or "")
    monkeypatch.setattr(triton, "AMPERE", triton.HOPPER)
    assert "bytes of shared memory" in (why_not(Device("gpu", "L40", (8, 9))) or "")
    with pytest.raises(InputError, match=r"triton.* cannot run: .*compute capability 8\.0"):
        dual_chunk_attention(
            *draw(0, 1, 8, 8, 2, 2, 16), dca=None, rope=ROPE, implementation="triton"
        )
