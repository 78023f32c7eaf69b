"""An update of Llama-2-7B at 16,384 tokens, compiled for H200s without one: kernels, memory."""

import importlib.util
from typing import NamedTuple

import pytest
from abstract import lower_update, summed_whole
from h200 import OPTIONS, h200s

from dca_jax.planning.plan import plan
from dca_jax.planning.shapes import SHAPES
from dca_jax.sharding import make_mesh, parse_mesh

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin"
    ),
    pytest.mark.gpu_aot,
]

MODEL, LENGTH = SHAPES["llama-2-7b"], 16_384


class Case(NamedTuple):
    """A mesh of H200s, the rows of a batch; what is kept of each layer, and its kernels."""

    mesh: str
    rows: int
    remat: str
    kernels: int
    state: str = "float32"


CASES = [
    Case("tensor=1", 1, "attention", 2),
    Case("tensor=1", 1, "attention", 2, "bfloat16"),
    Case("fsdp=4", 4, "layer", 3),
    Case("fsdp=4", 4, "attention", 2),
    Case("fsdp=4", 4, "products", 2),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_an_update_runs_each_kernel_once_and_fits_as_planned(case: Case) -> None:
    sizes = parse_mesh(case.mesh)
    count = sizes["fsdp"]
    mesh = make_mesh(case.mesh, h200s(count))
    options = {"remat": case.remat, "state": case.state}
    lowered = lower_update(MODEL, mesh, rows=case.rows, length=LENGTH, **options)
    program = lowered.compile(OPTIONS)

    hlo, found = program.as_text(), program.memory_analysis()
    usage = plan(
        "llama-2-7b",
        MODEL,
        device="h200",
        mesh=sizes,
        context_length=LENGTH,
        batch=case.rows,
        train=True,
        **options,
    ).usage
    held = usage.weights + usage.optimizer
    working = usage.gradients + usage.copies + usage.activations
    print(
        f"{case}: arguments {found.argument_size_in_bytes / 1e9:.2f} GB (plan {held / 1e9:.2f}), "
        f"temporaries {found.temp_size_in_bytes / 1e9:.2f} GB (plan {working / 1e9:.2f})"
    )
    # The forward kernel and the backward one; again the forward one, if nothing of it is kept.
    assert hlo.count('custom_call_target="mosaic_gpu_v2"') == case.kernels
    if count > 1:
        assert "reduce-scatter" in hlo
        assert not summed_whole(hlo, MODEL.hidden_size**2)
    assert held == pytest.approx(found.argument_size_in_bytes, rel=0.01)
    assert working == pytest.approx(found.temp_size_in_bytes, rel=0.1)
