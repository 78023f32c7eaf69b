"""The Mosaic GPU kernels without a GPU: every variant lowers for an H200; the choice of backend.

What they compute is tested on a GPU, in test_gpu.py: WGMMA has no interpreter.
"""

import logging
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import device, lower, lower_backward, lower_forward, shapes

from dca_jax.attention import dual_chunk_attention, mosaic_gpu
from dca_jax.attention.mosaic_gpu.ranges import full_and_edge_walks, locate
from dca_jax.attention.op import PLAIN, choose_implementation
from dca_jax.dca import PHASES, DCAConfig, Phase, key_range
from dca_jax.errors import InputError
from dca_jax.rope import RopeConfig

DCA = DCAConfig.paper(4096)

VARIANTS = [
    pytest.param((1, 4096, 4096, 32, 8, 128, jnp.bfloat16), DCA, PHASES, id="gqa"),
    pytest.param((1, 4096, 4096, 8, 8, 128, jnp.bfloat16), DCA, PHASES, id="mha"),
    pytest.param((2, 1003, 1005, 6, 2, 128, jnp.float16), DCA, PHASES, id="ragged"),
    pytest.param((1, 1024, 1024, 8, 1, 64, jnp.bfloat16), DCA, PHASES, id="head_dim 64"),
    pytest.param((1, 1024, 1024, 4, 2, 256, jnp.float16), DCA, PHASES, id="head_dim 256"),
    pytest.param((1, 4096, 4096, 4, 4, 128, jnp.bfloat16), PLAIN, ("intra",), id="plain"),
    *(
        pytest.param((1, 4096, 4096, 4, 4, 128, jnp.bfloat16), DCA, (phase,), id=phase)
        for phase in PHASES
    ),
    pytest.param((1, 4096, 4096, 4, 4, 128, jnp.bfloat16), DCA, PHASES[1:], id="two phases"),
]


@pytest.mark.parametrize(("sizes", "dca", "phases"), VARIANTS)
def test_forward_lowers(sizes: tuple, dca: DCAConfig, phases: tuple[Phase, ...]) -> None:
    assert "mosaic_gpu" in lower_forward(mosaic_gpu, shapes(*sizes), dca, phases)


@pytest.mark.parametrize(("sizes", "dca", "phases"), VARIANTS)
def test_backward_lowers(sizes: tuple, dca: DCAConfig, phases: tuple[Phase, ...]) -> None:
    assert "mosaic_gpu" in lower_backward(mosaic_gpu, shapes(*sizes), dca, phases)


def test_the_gradient_lowers_under_vmap_as_one_launch_after_another() -> None:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        options: Any = {"dca": DCA, "rope": RopeConfig(), "implementation": "mosaic_gpu"}
        return jnp.sum(dual_chunk_attention(q, k, v, **options).astype(jnp.float32))

    query = jax.ShapeDtypeStruct((3, 1, 256, 4, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((3, 1, 256, 2, 128), jnp.bfloat16)
    text = lower(jax.vmap(jax.grad(loss, (0, 1, 2))), query, key, key)
    assert "stablehlo.while" in text
    assert "dca_backward" in text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (32, 8), (8, 1)])
def test_decoding_lowers(heads: int, kv_heads: int, dim: int, dtype: Any) -> None:
    sizes = (2, 1, 4096, heads, kv_heads, dim, dtype)
    assert "mosaic_gpu" in lower_forward(mosaic_gpu, shapes(*sizes), DCA, PHASES)


@settings(max_examples=60)
@given(
    s=st.integers(1, 90),
    block=st.sampled_from([8, 16, 64]),
    first=st.integers(0, 300),
    rows=st.integers(0, 32),
    number=st.integers(1, 3),
)
def test_a_tile_of_queries_walks_over_each_key_once(
    s: int, block: int, first: int, rows: int, number: int
) -> None:
    """All meet full blocks, edges are masked by row; together each key, once, in its phase."""
    dca, phases = DCAConfig(chunk_len=s, max_query_position=s + 3), PHASES[-number:]
    index = jnp.arange(first, first + rows, dtype=jnp.int32)
    met = np.zeros((number, rows, 512), int)
    full, edges = full_and_edge_walks(
        jnp.int32(first), jnp.int32(first + rows - 1), phases, dca, block
    )
    for walks, masked in ((full, False), (edges, True)):
        for n in range(sum(int(walk.count) for walk in walks)):
            phase, at = (int(x) for x in locate(jnp.int32(n), walks, jnp.int32(0)))
            keys = np.arange(at * block, (at + 1) * block)
            start, stop = (np.asarray(x) for x in key_range(index, phases[phase], dca))
            mask = (keys >= start[:, None]) & (keys < stop[:, None])
            assert masked or mask.all()
            met[phase][:, keys] += mask
    for phase, name in enumerate(phases):
        start, stop = (np.asarray(x) for x in key_range(index, name, dca))
        keys = np.arange(512)
        expected = (keys >= start[:, None]) & (keys < stop[:, None])
        np.testing.assert_array_equal(met[phase], expected)


def like(dim: int = 128, dtype: Any = jnp.bfloat16) -> tuple[Any, Any]:
    query = jax.ShapeDtypeStruct((1, 100, 8, dim), dtype)
    return query, jax.ShapeDtypeStruct((1, 1, 100, 2, dim), dtype)


@pytest.mark.parametrize(
    ("kind", "dim", "dtype", "chosen"),
    [
        ("NVIDIA H200", 128, jnp.bfloat16, "mosaic_gpu"),
        ("NVIDIA H100 80GB HBM3", 64, jnp.float16, "mosaic_gpu"),
        ("NVIDIA H200", 32, jnp.bfloat16, "triton"),
        ("NVIDIA A100-SXM4-80GB", 128, jnp.bfloat16, "triton"),
        ("NVIDIA H200", 80, jnp.bfloat16, "xla"),
        ("NVIDIA H200", 128, jnp.float32, "xla"),
    ],
)
def test_the_best_that_can_run_is_chosen(kind: str, dim: int, dtype: Any, chosen: str) -> None:
    with device(kind):
        assert choose_implementation(None, *like(dim, dtype), DCA) == chosen


def test_falling_back_on_a_gpu_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with device("NVIDIA H200"), caplog.at_level(logging.WARNING, logger="dca_jax"):
        for _ in range(3):
            assert choose_implementation(None, *like(96), DCA) == "xla"
    assert len(caplog.records) == 1
    assert "head_dim" in caplog.text


def test_a_named_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(InputError, match="Hopper"):
        choose_implementation("mosaic_gpu", *like(), DCA)
    with device("NVIDIA H200"), pytest.raises(InputError, match="bfloat16 or float16"):
        choose_implementation("mosaic_gpu", *like(dtype=jnp.float32), DCA)
    with device("NVIDIA H200"), pytest.raises(InputError, match="head_dim"):
        choose_implementation("mosaic_gpu", *like(96), DCA)


def test_shared_memory_is_checked_before_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = mosaic_gpu.prefill.ForwardTiles(
        block_k=128, stages=4, resident=True, registers=True, cluster=2
    )
    monkeypatch.setitem(mosaic_gpu.prefill.TILES, 128, tiles)
    with device("NVIDIA H200"), pytest.raises(InputError, match="bytes of shared memory"):
        choose_implementation("mosaic_gpu", *like(), DCAConfig(chunk_len=8, max_query_position=9))


def test_a_cuda_that_miscompiles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, refused in ((12_060, False), (12_080, True), (12_090, True), (12_091, False)):
        versions = types.SimpleNamespace(cuda_runtime_get_version=lambda version=version: version)
        monkeypatch.setattr(mosaic_gpu, "cuda_versions", versions)
        with device("NVIDIA H200"):
            chosen = choose_implementation(None, *like(), DCA)
        assert chosen == ("triton" if refused else "mosaic_gpu")
