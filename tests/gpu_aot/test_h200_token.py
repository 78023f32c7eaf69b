"""A token of Llama-3-8B on one H200, compiled without one: how many kernels a layer takes."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from abstract import abstract_cache, abstract_model, abstract_state, unchecked
from h200 import OPTIONS, h200s
from jax.sharding import AxisType, SingleDeviceSharding

from dca_jax.inference import steps
from dca_jax.inference.compiled import GPU_OPTIONS
from dca_jax.inference.sampling import Sampler
from dca_jax.planning.shapes import SHAPES
from dca_jax.sharding import make_mesh

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin"
    ),
    pytest.mark.gpu_aot,
]


@pytest.mark.parametrize("rows", [1, 8])
def test_few_launches_and_no_spills(
    rows: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Norms, gate and residual sums are in the launches of four products."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    config, mesh = SHAPES["llama-3-8b"], make_mesh("tensor=1", h200s(1))
    place = SingleDeviceSharding(h200s(1)[0])
    # Names the device and shards nothing.
    named = mesh.abstract_mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))

    def put(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    with unchecked():
        state = abstract_state(abstract_cache(config, mesh, rows, 32_896, jnp.bfloat16), mesh)
        model = abstract_model(config, mesh, jnp.bfloat16, None)
        numbers = jnp.zeros(8, jnp.int32), jnp.int32(0)
        arguments = jax.tree.map(put, (model, state, Sampler(), *numbers))
    with unchecked(), jax.sharding.use_abstract_mesh(named):
        traced = jax.jit(steps.decode, donate_argnames="state").trace(*arguments)
        program = traced.lower(lowering_platforms=("cuda",)).compile(OPTIONS | GPU_OPTIONS)
    hlo = program.as_text() or ""
    layer = next(  # the body of the scan over layers
        body for body in re.split(r"\n\n", hlo) if body.count("dca_dense_rows") >= 4
    )
    launches = re.findall(r" = .* (fusion|custom-call|copy|dynamic-update-slice)\(", layer)
    with capfd.disabled():
        print(f"{rows} rows: {len(launches)} launches a layer")
    assert layer.count('custom_call_target="mosaic_gpu_v2"') == 5  # and attention
    assert len(launches) <= 13
    spilled = re.findall(r"(\d+) bytes spill stores", "".join(capfd.readouterr()))
    assert len(spilled) >= 5
    assert set(spilled) == {"0"}
