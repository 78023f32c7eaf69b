"""The Pallas-Triton kernels: in Pallas' interpreter against the oracles, and lowered for CUDA.

The tiles are made small here, so that short texts cross many of them. What only a GPU shows (that
the compiled kernels agree with the interpreted ones, and their speed) is tested elsewhere.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax._src.mesh import AbstractDevice
from kernels import QUICK, ROPE, attend_by_slices, check_value_and_gradient, draw, with_gradients

from dca_jax.attention import attention_pass, dual_chunk_attention, merge_passes, op, triton
from dca_jax.attention.device import Device
from dca_jax.attention.triton import common, tiles
from dca_jax.dca import PHASES, DCAConfig, dense_attention
from dca_jax.errors import InputError

SMALL = tiles.Tile(block_q=16, block_k=16, num_warps=4, num_stages=2)
S = 40  # no multiple of the tile
DCA = DCAConfig(chunk_len=S, max_query_position=60)

attention = jax.jit(dual_chunk_attention, static_argnames=("dca", "rope", "implementation"))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    small = tiles.Tiles(forward=SMALL, dq=SMALL, dkv=SMALL, decode=SMALL)
    monkeypatch.setattr(common, "INTERPRET", True)
    for table in (tiles.AMPERE, tiles.HOPPER):
        monkeypatch.setitem(table, 64, small)  # narrower heads have it too
    monkeypatch.setattr(tiles, "MAX_PACKED", 16)
    monkeypatch.setattr(tiles, "SPLIT_KEYS", 32)


def check(inputs: tuple[jax.Array, jax.Array, jax.Array], **options: Any) -> list[jax.Array]:
    return check_value_and_gradient("triton", inputs, atol=1e-5, **options)


@pytest.mark.usefixtures("interpreted")
def test_edges_as_the_rows_of_a_batch() -> None:
    """Texts of 1, s - 1, s, s + 1, 2s, 2s + 1 and 5s + 7 tokens, the shorter ones padded."""
    edges = [1, S - 1, S, S + 1, 2 * S, 2 * S + 1, 5 * S + 7]
    inputs = draw(0, len(edges), edges[-1], edges[-1], 2, 1, 16)
    lengths = jnp.asarray(edges, jnp.int32)
    out, *_ = check(inputs, dca=DCA, lengths=lengths)
    for row, length in enumerate(edges):
        assert not np.asarray(out[row, length:]).any()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("length", [1, 7, 2 * S + 1])
def test_edges_as_shapes(length: int) -> None:
    check(draw(length, 1, length, length, 2, 2, 16), dca=DCA)


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
    out, *_ = check(inputs, dca=dca)
    np.testing.assert_allclose(out, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (8, 1)])
def test_heads(heads: int, kv_heads: int) -> None:
    check(draw(2, 1, 90, 90, heads, kv_heads, 32), dca=DCA)


@pytest.mark.usefixtures("interpreted")
def test_plain_causal_attention() -> None:
    check(draw(3, 1, 70, 70, 2, 1, 16), dca=None)


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
    check(clean, dca=dca, **options)


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
        (_, ours), gradients = grad(q, k, v, phase, "triton")
        (_, theirs), expected = grad(q, k, v, phase, "xla")
        for a, b in zip((*ours, *gradients), (*theirs, *expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
        outs.append(ours[0])
        lses.append(ours[1])
    merged, _ = merge_passes(outs, lses)
    fused = attention(q, k, v, dca=DCA, rope=ROPE, implementation="triton")
    np.testing.assert_allclose(merged, fused, atol=1e-5, rtol=0)


# The second row is short: its third slice lies beyond it, and beyond all of its queries.
SLICED_LENGTHS, CUTS = [131, 77], (37, 90)


@pytest.mark.usefixtures("interpreted")
def test_slices_of_the_keys() -> None:
    """Cut anywhere, each slice met by itself with the whole's log-sum-exp: together the whole."""
    q, k, v = draw(12, 2, 131, 131, 2, 1, 16)
    rows = op.make_rows(q.shape, dca=DCA, rope=ROPE, lengths=jnp.asarray(SLICED_LENGTHS, jnp.int32))

    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return dense_attention(q, k, v, dca=DCA, **rows._asdict())

    @partial(jax.jit, compiler_options=QUICK)
    def in_slices(*arrays: jax.Array) -> list[jax.Array]:
        return attend_by_slices(triton, *arrays, cuts=CUTS, dca=DCA, rows=rows)

    weight = jnp.asarray(np.random.default_rng(9).normal(size=q.shape), jnp.float32)
    for ours, theirs in zip(
        in_slices(q, k, v, weight), with_gradients(whole, q, k, v), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("num_queries", [2, 20])
def test_slices_of_a_cache_that_differ_from_row_to_row(num_queries: int) -> None:
    """Few queries, packed and split, and many; slices before, around and beyond their own places.

    One compilation serves them all: where the slices begin is data.
    """
    offset = jnp.asarray([100, 7, 118], jnp.int32)
    q, k, v = draw(13, 3, num_queries, 96, 6, 2, 16)

    def run(begin: jax.Array, name: str) -> jax.Array:
        rows = op.make_rows(q.shape, dca=DCA, rope=ROPE, query_offset=offset)
        rows = rows._replace(key_offset=begin)
        return op.attend(q, k, v, dca=DCA, rows=rows, implementation=name)

    ours, theirs = (jax.jit(partial(run, name=name)) for name in ("triton", "reference"))
    for begins in ([0, 0, 0], [33, 3, 26], [99, 200, 1], [102, 8, 119]):
        begin = jnp.asarray(begins, jnp.int32)
        np.testing.assert_allclose(ours(begin), theirs(begin), atol=1e-5, rtol=0)
    assert not np.asarray(ours(jnp.asarray([200, 200, 200], jnp.int32))).any()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("num_queries", [1, 20])
def test_the_log_sum_exp_is_given_on_request(num_queries: int) -> None:
    q, k, v = draw(14, 1, num_queries, 96, 2, 1, 16)
    rows = op.make_rows(q.shape, dca=DCA, rope=ROPE, query_offset=70)

    @partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def run(with_lse: bool) -> tuple[jax.Array, jax.Array | None]:
        options: dict[str, Any] = {"dca": DCA, "phases": PHASES, "with_lse": with_lse}
        return triton.forward(q, k[None], v[None], jnp.int32(0), rows, **options)

    (out, lse), (same, nothing) = run(True), run(False)
    assert lse is not None
    assert nothing is None
    np.testing.assert_allclose(out, same, atol=1e-6, rtol=0)


@pytest.mark.usefixtures("interpreted")
def test_half_precision_and_determinism() -> None:
    """Relative errors of value and gradients; and the same bits twice."""
    inputs = draw(10, 1, 101, 101, 4, 2, 64, jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in inputs]

    def run(name: str, inputs: Any) -> list[jax.Array]:
        options: dict[str, Any] = {"dca": DCA, "rope": ROPE, "implementation": name}
        return with_gradients(partial(dual_chunk_attention, **options), *inputs)

    results = run("triton", inputs), run("triton", inputs), run("reference", wide)
    for ours, twice, theirs in zip(*results, strict=True):
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
    monkeypatch.setattr(tiles, "AMPERE", tiles.HOPPER)
    assert "bytes of shared memory" in (why_not(Device("gpu", "L40", (8, 9))) or "")
    with pytest.raises(InputError, match=r"triton.* cannot run: .*compute capability 8\.0"):
        dual_chunk_attention(
            *draw(0, 1, 8, 8, 2, 2, 16), dca=None, rope=ROPE, implementation="triton"
        )
