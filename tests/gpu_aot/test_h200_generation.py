"""Llama-2-70B at 100k tokens, compiled for four H200s without one: what moves, and memory."""

import importlib.util

import jax.numpy as jnp
import pytest
from abstract import collective_sizes, lower
from h200 import OPTIONS, h200s

from dca_jax.inference.buckets import capacity_bucket
from dca_jax.inference.steps import GPU_OPTIONS
from dca_jax.planning.plan import plan
from dca_jax.planning.shapes import SHAPES
from dca_jax.sharding import make_mesh, parse_mesh

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin"
    ),
    pytest.mark.gpu_aot,
]

MODEL, MESH, LENGTH = SHAPES["llama-2-70b"], "tensor=4", 102_400


@pytest.mark.parametrize(("step", "tokens"), [("read", 4096), ("decode", 1)])
def test_activations_move_and_nothing_else(step: str, tokens: int) -> None:
    """No weights, no keys, and of the table of tokens only the rows that are read."""
    mesh = make_mesh(MESH, h200s(4))
    capacity = capacity_bucket(LENGTH, 1)
    lowered = lower(step, MODEL, mesh, capacity=capacity, tokens=tokens, dtype=jnp.bfloat16)
    program = lowered.compile(OPTIONS | GPU_OPTIONS)
    hlo, found = program.as_text(), program.memory_analysis()
    usage = plan(
        "llama-2-70b", MODEL, device="h200", mesh=parse_mesh(MESH), context_length=LENGTH
    ).usage
    held, working = found.argument_size_in_bytes, found.temp_size_in_bytes
    print(
        f"{step}: {held / 1e9:.2f} GB held (plan {(usage.weights + usage.cache) / 1e9:.2f}), "
        f"{working / 1e9:.2f} while it runs (plan {usage.activations / 1e9:.2f})"
    )
    assert hlo.count('custom_call_target="mosaic_gpu_v2"') == 1  # in the scan over layers
    assert (
        f"f32[{MODEL.hidden_size},{MODEL.vocab_size // 4}]" not in hlo
    )  # the unembedding's kernel
    assert 0 < max(collective_sizes(hlo)) <= max(tokens * MODEL.hidden_size, MODEL.vocab_size)
    assert held + working < usage.total
