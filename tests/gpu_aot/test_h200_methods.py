"""Position methods' reading of a piece of a prompt, compiled for an H200 without one."""

import importlib.util
from functools import partial

import band_methods
import jax
import jax.numpy as jnp
import lowering
import pytest
from h200 import OPTIONS, h200s
from jax.sharding import SingleDeviceSharding

from dca_jax.attention import mosaic_gpu

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin"
    ),
    pytest.mark.gpu_aot,
]

SHAPES = {"smollm2-135m": (9, 3, 64), "llama-3-8b": (32, 8, 128), "heads-of-256": (8, 4, 256)}
TOKENS, CAPACITY = 4096, 65_536


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", band_methods.NAMES)
def test_a_piece_is_read_by_a_kernel_for_each_band(name: str, shape: str) -> None:
    """Nothing of the size of a block of logits is kept, and no layer of the cache but this one."""
    heads, kv_heads, dim = SHAPES[shape]
    where = SingleDeviceSharding(h200s(1)[0])
    arrays = lowering.shapes(1, TOKENS, CAPACITY, heads, kv_heads, dim, jnp.bfloat16)
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arrays)
    method = band_methods.method_for(name, dim)
    forward = partial(mosaic_gpu.forward, dca=method, phases=(), with_lse=False)
    program = jax.jit(forward).lower(*arrays).compile(OPTIONS)
    bands = {"dca-intra": 1, "adagrope": 1, "lampe": 3}.get(name, 2)
    assert program.as_text().count('custom_call_target="mosaic_gpu_v2"') == bands
    working = program.memory_analysis().temp_size_in_bytes
    query, keys = TOKENS * heads * dim * 2, CAPACITY * kv_heads * dim * 2
    print(f"{name}, {shape}: {working / 1e6:.0f} MB, {query / 1e6:.0f} of queries")
    # Of a band two rotations of the queries, an output and the keys; the merge is in float32.
    assert working < bands * (3 * query + keys) + 8 * query
