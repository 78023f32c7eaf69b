"""An update of Llama-2-7B at 16,384 tokens, compiled for real TPUs: it fits, as `plan` says."""

import importlib.util
from typing import Any, NamedTuple

import pytest
from abstract import lower_update, summed_whole
from jax.experimental import topologies

from dca_jax.planning.memory import DEVICES
from dca_jax.planning.plan import plan
from dca_jax.planning.shapes import SHAPES
from dca_jax.sharding import make_mesh, parse_mesh

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
    pytest.mark.timeout(3600),
    pytest.mark.tpu_aot,
]

MODEL, LENGTH = SHAPES["llama-2-7b"], 16_384


class Case(NamedTuple):
    """Chips, a mesh of them, the rows of a batch; and what is kept of each layer."""

    chip: str
    topology: str
    mesh: str
    batch: int
    remat: str = "attention"


CASES = [
    Case("v5p", "2x2x1", "fsdp=4", 4),
    Case("v5p", "2x2x1", "fsdp=4", 4, remat="layer"),
    Case("v5p", "2x2x1", "fsdp=4", 4, remat="products"),
    Case("v5p", "2x2x1", "context=2,fsdp=2", 2),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_an_update_fits_as_planned(case: Case) -> None:
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{case.chip}:{case.topology}"
    )
    mesh = make_mesh(case.mesh, topology.devices)
    options: dict[str, Any] = {"rows": case.batch, "length": LENGTH, "remat": case.remat}
    program = lower_update(MODEL, mesh, **options).compile()
    found = program.memory_analysis()
    usage = plan(
        "llama-2-7b",
        MODEL,
        device=case.chip,
        mesh=parse_mesh(case.mesh),
        context_length=LENGTH,
        batch=case.batch,
        train=True,
        remat=case.remat,
    ).usage
    held = usage.weights + usage.optimizer
    working = usage.gradients + usage.copies + usage.activations
    at_peak = found.peak_memory_in_bytes - found.argument_size_in_bytes
    hlo = program.as_text()
    kernels = hlo.count('custom_call_target="tpu_custom_call"')
    print(
        f"{case}: arguments {found.argument_size_in_bytes / 1e9:.2f} GB (plan {held / 1e9:.2f}), "
        f"beside them at the peak {at_peak / 1e9:.2f} GB (plan {working / 1e9:.2f}), "
        f"{kernels} attention kernels"
    )
    assert found.peak_memory_in_bytes < DEVICES[case.chip].memory
    # The forward kernel, and two of the backward pass; again the forward one, if nothing of it is
    # kept. A ring has each in several places, and gradients are summed over more than `fsdp`.
    if "context" not in case.mesh:
        assert kernels == 3 + (case.remat == "layer")
        assert "all-reduce-scatter" in hlo
        assert not summed_whole(hlo, MODEL.hidden_size**2)
    assert held == pytest.approx(found.argument_size_in_bytes, rel=0.01)
    assert working == pytest.approx(at_peak, rel=0.15)
