"""Llama-2-70B at 100k tokens, compiled for four H200s without one: what moves, and memory."""

import importlib.util
import re

import jax.numpy as jnp
import pytest
from abstract import collective_sizes, lower
from h200 import OPTIONS, h200s

from dca_jax.attention.sparse import SampledRows, Sparse
from dca_jax.inference.buckets import capacity_bucket
from dca_jax.inference.compiled import GPU_OPTIONS
from dca_jax.inference.pieces import WIDE, WIDEST
from dca_jax.planning.plan import plan
from dca_jax.planning.shapes import SHAPES
from dca_jax.sharding import make_mesh, parse_mesh

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin"
    ),
    pytest.mark.gpu_aot,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

MODEL, MESH, LENGTH = SHAPES["llama-2-70b"], "tensor=4", 102_400


@pytest.mark.parametrize(("step", "tokens"), [("read", WIDE[0]), ("decode", 1)])
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


@pytest.mark.parametrize(("step", "tokens"), [("read", WIDEST[0]), ("decode", 1)])
def test_experts_stay_where_they_are(step: str, tokens: int) -> None:
    """Qwen3-30B-A3B on two H200s: tokens move, and the experts' products are our kernels."""
    config = SHAPES["qwen3-30b-a3b"]
    mesh, capacity = make_mesh("tensor=2", h200s(2)), capacity_bucket(131_072, 1)
    lowered = lower(step, config, mesh, capacity=capacity, tokens=tokens, dtype=jnp.bfloat16)
    program = lowered.compile(OPTIONS | GPU_OPTIONS)
    hlo, found = program.as_text(), program.memory_analysis()
    usage = plan(
        "qwen3-30b-a3b", config, device="h200", mesh=parse_mesh("tensor=2"), context_length=131_072
    ).usage
    held, working = found.argument_size_in_bytes, found.temp_size_in_bytes
    print(
        f"{step}: {held / 1e9:.2f} GB held (plan {(usage.weights + usage.cache) / 1e9:.2f}), "
        f"{working / 1e9:.2f} while it runs (plan {usage.activations / 1e9:.2f})"
    )
    # One for attention; gate, up and down.
    assert hlo.count('custom_call_target="mosaic_gpu_v2"') == (4 if step == "read" else 1)
    assert 0 < max(collective_sizes(hlo)) <= max(tokens * config.hidden_size, config.vocab_size)
    assert held + working < usage.total


@pytest.mark.parametrize("form", ["int4:128", "fp8"])
def test_packed_experts_are_unpacked_a_layer_at_a_time(form: str) -> None:
    """XLA would transpose the stacks of all layers before the loop: 14 and 29 GB."""
    config, mesh = SHAPES["qwen3-30b-a3b"], make_mesh("tensor=1", h200s(1))
    capacity = capacity_bucket(32_768, 1)
    lowered = lower("read", config, mesh, capacity=capacity, tokens=WIDEST[0], weights=form)
    found = lowered.compile(OPTIONS | GPU_OPTIONS).memory_analysis()
    print(f"{form}: {found.temp_size_in_bytes / 1e9:.2f} GB while it runs")
    assert found.temp_size_in_bytes < 3.5e9


def test_the_largest_model_in_fp8_fits_four_devices() -> None:
    """Qwen3-235B-A22B at 256k tokens."""
    name, length, mesh = "qwen3-235b-a22b", 262_144, make_mesh("tensor=4", h200s(4))
    options = {"capacity": capacity_bucket(length, 1), "tokens": WIDEST[0], "weights": "fp8"}
    found = lower("read", SHAPES[name], mesh, **options).compile(OPTIONS | GPU_OPTIONS)
    memory, four = found.memory_analysis(), parse_mesh("tensor=4")
    usage = plan(
        name, SHAPES[name], device="h200", mesh=four, context_length=length, weights="fp8"
    ).usage
    held, working = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    print(f"{held / 1e9:.2f} GB held, {working / 1e9:.2f} while it runs")
    assert held + working < usage.total


def test_a_row_is_multiplied_where_its_kernels_lie() -> None:
    """Drawing a token of Llama-3-8B on one H200: no product is written down before it is summed."""
    config, mesh = SHAPES["llama-3-8b"], make_mesh("tensor=1", h200s(1))
    lowered = lower("decode", config, mesh, capacity=32_896, dtype=jnp.bfloat16)
    program = lowered.compile(OPTIONS | GPU_OPTIONS)
    assert program.memory_analysis().temp_size_in_bytes < 100e6


@pytest.mark.parametrize(("step", "tokens"), [("read", WIDEST[0]), ("decode", 1)])
def test_seventy_billion_in_int4_fit_one_device(step: str, tokens: int) -> None:
    """No more than a layer is unpacked at a time; large matrices have the kernel for one row."""
    mesh, capacity = make_mesh("tensor=1", h200s(1)), capacity_bucket(32_768, 1)
    options = {"capacity": capacity, "tokens": tokens, "weights": "int4:128"}
    program = lower(step, MODEL, mesh, **options).compile(OPTIONS | GPU_OPTIONS)
    found, one = program.memory_analysis(), parse_mesh("tensor=1")
    usage = plan(
        *("llama-2-70b", MODEL), device="h200", mesh=one, context_length=32_768, weights="int4:128"
    ).usage
    held, working = found.argument_size_in_bytes, found.temp_size_in_bytes
    print(
        f"{step}: {held / 1e9:.2f} GB held (plan {(usage.weights + usage.cache) / 1e9:.2f}), "
        f"{working / 1e9:.2f} while it runs"
    )
    assert held + working < usage.total
    assert working < 4e9  # activations of 16,384 tokens, and a layer of 1.7 GB
    assert ("dca_packed_row" in program.as_text()) == (step == "decode")


def test_a_million_tokens_are_read_sparsely() -> None:
    """A piece of Qwen2.5-7B's prompt on one H200: blocks are scored and read by our two kernels."""
    config, mesh, length = SHAPES["qwen2.5-7b"], make_mesh("tensor=1", h200s(1)), 1_048_576
    sparse = Sparse(selector=SampledRows(0.05))
    capacity = capacity_bucket(length, 1)
    lowered = lower("read", config, mesh, capacity=capacity, tokens=WIDE[0], sparse=sparse)
    program = lowered.compile(OPTIONS | GPU_OPTIONS)
    hlo, found = program.as_text(), program.memory_analysis()
    one = parse_mesh("tensor=1")
    usage = plan(
        "qwen2.5-7b", config, device="h200", mesh=one, context_length=length, sparse=sparse
    ).usage
    held, working = found.argument_size_in_bytes, found.temp_size_in_bytes
    print(f"{held / 1e9:.2f} GB held, {working / 1e9:.2f} while it runs")
    kernels = [line for line in hlo.splitlines() if 'custom_call_target="mosaic_gpu_v2"' in line]
    names = set(re.findall("dca_block_masses|dca_forward", "".join(kernels)))
    assert names == {"dca_block_masses", "dca_forward"}
    assert held + working < usage.total
