"""GPUs that are not there, to compile for."""

from pathlib import Path

import jax
from jax.experimental import topologies

OPTIONS = {"xla_gpu_autotune_level": 0}  # products are chosen by trying them, on a device


def gpus(name: str, count: int = 1) -> list[jax.Device]:
    """So many GPUs of one host, of the kind that `name`.txtpb beside this file describes.

    Compiling for them needs JAX's CUDA plugin, and no driver.
    """
    config = (Path(__file__).parent / f"{name}.txtpb").read_text(encoding="utf-8")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=name, topology=f"1x1x{count}", target_config=config
    )
    return topology.devices


def h200s(count: int) -> list[jax.Device]:
    """So many H200s of one host."""
    return gpus("h200", count)
