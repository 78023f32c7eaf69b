"""Compiles the kernels for Ampere and Ada for a card that is not there: CARD, and a folder.

In a process of its own: JAX's plugin compiles Mosaic's kernels for the first architecture of a
process.
"""

import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lowering
from h200 import OPTIONS
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from dca_jax.attention import mosaic_ampere
from dca_jax.dca import PHASES, DCAConfig

DCA = DCAConfig(chunk_len=1000, max_query_position=1500)
STEPS = ("prefill", "decode", "gradient")
SHAPES = [*((dim, jnp.bfloat16) for dim in (16, 32, 64, 128, 256)), (128, jnp.float16)]


def gpu(card: str) -> jax.Device:
    """The one that `card`.txtpb beside this file describes."""
    config = (Path(__file__).parent / f"{card}.txtpb").read_text(encoding="utf-8")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=card, topology="1x1x1", target_config=config
    )
    return topology.devices[0]


def compile_for(device: jax.Device, step: str, dim: int, dtype: Any) -> None:
    tokens = 1 if step == "decode" else 4096
    arrays = lowering.shapes(1, tokens, 8192, 8, 2, dim, dtype)
    if step == "gradient":
        lse = jax.ShapeDtypeStruct((1, 8, tokens), jnp.float32)
        arrays = *arrays, arrays[0], lse, lse
    where = SingleDeviceSharding(device)
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arrays)

    def run(*arrays: Any) -> Any:
        if step == "gradient":
            return mosaic_ampere.backward(*arrays, dca=DCA, phases=PHASES)
        return mosaic_ampere.forward(*arrays, dca=DCA, phases=PHASES, with_lse=True)

    with jax.default_device(device):  # from which Mosaic knows the architecture
        jax.jit(run).lower(*arrays).compile(OPTIONS)


if __name__ == "__main__":
    for step in STEPS:
        for dim, dtype in SHAPES:
            folder = Path(sys.argv[2]) / f"{step} {dim} {jnp.dtype(dtype)}"
            folder.mkdir()
            os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
            compile_for(gpu(sys.argv[1]), step, dim, dtype)
