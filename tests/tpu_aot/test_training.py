"""An update of Llama-2-7B at 16,384 tokens, compiled for real TPUs: it fits, as `plan` says."""

import importlib.util
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from abstract import unchecked
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from dca_jax.dca import DCAConfig
from dca_jax.finetune.settings import DataFile, Settings
from dca_jax.finetune.train import Batch, abstract_state, make_update
from dca_jax.memory import DEVICES
from dca_jax.model import Llama
from dca_jax.parameters import abstract_params
from dca_jax.plan import plan
from dca_jax.shapes import SHAPES
from dca_jax.sharding import make_mesh, parameter_shardings, parse_mesh

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


def compiled(case: Case) -> Any:
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{case.chip}:{case.topology}"
    )
    mesh = make_mesh(case.mesh, topology.devices)
    where = parameter_shardings(MODEL, mesh)
    params = abstract_params(MODEL, dtype=jnp.float32, sharding=where)

    def build(params: Any) -> Llama:
        dca = DCAConfig.paper(MODEL.max_position_embeddings)
        return Llama.from_params(MODEL, params, dca=dca, remat=case.remat)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    rows = 1, case.batch, LENGTH
    batch = Batch(array(jnp.int32, *rows), array(jnp.bool_, *rows), array(jnp.int32, *rows[:2]))
    state = abstract_state(params)
    settings = Settings(model="m", output="o", data=(DataFile("d"),))
    update = jax.jit(make_update(build, settings, 1000), donate_argnums=0)
    with unchecked(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return update.lower(state, {}, batch).compile()


def summed_whole(hlo: str) -> list[str]:
    """What is summed over devices and then whole on each, of a size that only gradients have.

    What each device gets a part of is a fused computation, `all-reduce-scatter`, to TPUs' compiler.
    """
    found, computation = [], ""
    for line in hlo.splitlines():
        if not line.startswith(" "):
            computation = line
        summed = re.search(r" = (.*) all-reduce(?:-start)?\(", line)  # of one array, or of several
        if summed and "all-reduce-scatter" not in computation:
            shapes = (sizes.split(",") for sizes in re.findall(r"\w\[([\d,]+)\]", summed[1]))
            largest = max((math.prod(map(int, sizes)) for sizes in shapes), default=0)
            found += [line.strip()[:120]] if largest >= MODEL.hidden_size**2 else []
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_an_update_fits_as_planned(case: Case) -> None:
    program = compiled(case)
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
        assert not summed_whole(hlo)
    assert held == pytest.approx(found.argument_size_in_bytes, rel=0.01)
    assert working == pytest.approx(at_peak, rel=0.15)
