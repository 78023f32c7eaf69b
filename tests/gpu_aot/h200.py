"""H200s that are not there, to compile for."""

from pathlib import Path

import jax
from jax.experimental import topologies

CONFIG = (Path(__file__).parent / "h200.txtpb").read_text(encoding="utf-8")
OPTIONS = {"xla_gpu_autotune_level": 0}  # products are chosen by trying them, on a device


def h200s(count: int) -> list[jax.Device]:
    """So many of one host; compiling for them needs JAX's CUDA plugin, and no driver."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology=f"1x1x{count}", target_config=CONFIG
    )
    return topology.devices
