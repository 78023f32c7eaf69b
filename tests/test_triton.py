"""What the Pallas-Triton kernels have of their own (see test_backends.py), and lowered for CUDA.

What only a GPU shows (that the compiled kernels agree with the interpreted ones, and their speed)
is tested elsewhere.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.mesh import AbstractDevice
from kernels import QUICK, ROPE, draw

from dca_jax.attention import dual_chunk_attention, op, triton
from dca_jax.attention.triton import tiles
from dca_jax.dca import PHASES, DCAConfig
from dca_jax.device import Device
from dca_jax.errors import InputError

S = 40  # no multiple of the tile
DCA = DCAConfig(chunk_len=S, max_query_position=60)


@pytest.mark.usefixtures("interpreted_triton")
@pytest.mark.parametrize("num_queries", [3, 20])
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


@pytest.mark.usefixtures("interpreted_triton")
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


@pytest.mark.usefixtures("interpreted_triton")
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


# --- lowering for GPUs, without one ------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "head_dim", "dtype"),  # every two of them together
    [
        pytest.param("NVIDIA H200", 64, jnp.bfloat16, marks=pytest.mark.slow),
        ("NVIDIA H200", 128, jnp.float16),
        pytest.param("NVIDIA H200", 256, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("NVIDIA A100", 64, jnp.float16, marks=pytest.mark.slow),
        pytest.param("NVIDIA A100", 128, jnp.bfloat16, marks=pytest.mark.slow),
        ("NVIDIA A100", 256, jnp.float16),
    ],
)
def test_lowers_for_cuda(kind: str, head_dim: int, dtype: Any) -> None:
    """Forward and backward at odd lengths, and decoding from a layer of a cache or from pages."""
    dca = DCAConfig(chunk_len=700, max_query_position=1000)
    device = AbstractDevice(device_kind=kind, num_cores=108, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)

    def train(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = dual_chunk_attention(q, k, v, dca=dca, rope=ROPE, implementation="triton")
        return jnp.sum(out.astype(jnp.float32))

    def decode(q: jax.Array, k: jax.Array, v: jax.Array, at: jax.Array, n: jax.Array) -> jax.Array:
        rows = op.make_rows(q.shape, dca=dca, rope=ROPE, query_offset=at)
        return op.attend(q, k, v, dca=dca, rows=rows, layer=n, implementation="triton")

    def decode_pages(
        q: jax.Array, k: jax.Array, v: jax.Array, at: jax.Array, n: jax.Array, pages: jax.Array
    ) -> jax.Array:
        rows = op.make_rows(q.shape, dca=dca, rope=ROPE, query_offset=at)
        options: Any = {"layer": n, "pages": pages, "implementation": "triton"}
        return op.attend(q, k, v, dca=dca, rows=rows, **options)

    q = jax.ShapeDtypeStruct((1, 2001, 8, head_dim), dtype)
    k = jax.ShapeDtypeStruct((1, 2001, 2, head_dim), dtype)
    new = jax.ShapeDtypeStruct((2, 1, 8, head_dim), dtype)
    cache = jax.ShapeDtypeStruct((3, 2, 4096, 2, head_dim), dtype)
    pool = jax.ShapeDtypeStruct((3, 70, 128, 2, head_dim), dtype)
    pages = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    at, n = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        trained = jax.jit(jax.grad(train, (0, 1, 2))).trace(q, k, k)
        decoded = jax.jit(decode).trace(new, cache, cache, at, n)
        text = trained.lower(lowering_platforms=("cuda",)).as_text()
        for kernel in ("forward", "dq", "dkv"):
            assert f'name = "dca_triton_{kernel}"' in text
        paged = jax.jit(decode_pages).trace(new, pool, pool, at, n, pages)
        for traced in (decoded, paged):
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
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
    assert "capability 7.5" in (why_not(Device("gpu", "Tesla T4", (7, 5))) or "")
    assert "got float32" in (why_not(hopper, dtype=jnp.float32) or "")
    assert "got 96" in (why_not(hopper, head_dim=96) or "")
    monkeypatch.setattr(tiles, "AMPERE", tiles.HOPPER)
    assert "bytes of shared memory" in (why_not(Device("gpu", "L40", (8, 9))) or "")
    with pytest.raises(InputError, match=r"triton.* cannot run: .*compute capability 8\.0"):
        dual_chunk_attention(
            *draw(0, 1, 8, 8, 2, 2, 16), dca=None, rope=ROPE, implementation="triton"
        )
