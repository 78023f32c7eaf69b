"""Blackwell GPUs that are not there, to compile for."""

from pathlib import Path

import jax
from jax.experimental import topologies

CONFIG = (Path(__file__).parent / "b200.txtpb").read_text(encoding="utf-8")
OPTIONS = {"xla_gpu_autotune_level": 0}  # products are chosen by trying them, on a device


def blackwell(minor: int) -> jax.Device:
    """One GPU of compute capability 10.`minor`; compiling needs JAX's CUDA plugin, and no driver.

    Other figures are those of a B200.
    """
    config = CONFIG.replace("{ major: 10 ", f"{{ major: 10 minor: {minor} ")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="b200", topology="1x1x1", target_config=config
    )
    return topology.devices[0]
