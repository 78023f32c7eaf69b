"""Attention in Pallas-Triton, for NVIDIA GPUs from Ampere on. JAX deprecates Pallas-Triton (0.11).

One program takes a tile of queries through the key ranges of every phase in turn, with one online
softmax; the tile's rotation changes where the phase does. Blocks of keys that every query of the
tile meets skip the mask. Few queries (decoding) are packed with the query heads that share their
keys, and the keys are split over programs, whose outputs are merged by their log-sum-exp.

Backward: dq walks the same ranges; dk and dv walk, for a block of keys, the ranges of queries that
meet it in each phase, all query heads of the kv head in turn: no atomics, so bitwise deterministic.
"""

import jax
import jax.numpy as jnp

from dca_jax.attention.bands import Method, PositionMethod
from dca_jax.attention.triton import common
from dca_jax.attention.triton.backward import backward
from dca_jax.attention.triton.forward import forward
from dca_jax.attention.triton.tiles import SHARED_KIB, choose_tiles, shared_bytes
from dca_jax.device import Device, describe

__all__ = ["backward", "forward", "unsupported"]


def unsupported(
    device: Device,
    query: jax.ShapeDtypeStruct,
    key: jax.ShapeDtypeStruct,
    dca: Method,
    *,
    listed: bool = False,
    paged: bool = False,
) -> str | None:
    """Why these kernels cannot run on these shapes and dtypes on this device; None: they can."""
    if isinstance(dca, PositionMethod):
        return f"it knows DCA and plain attention only, not {type(dca).__name__}"
    if listed:
        return "it does not read lists of key blocks"
    head_dim = query.shape[-1]
    if head_dim not in (16, 32, 64, 128, 256):
        return f"head_dim must be 16, 32, 64, 128 or 256, got {head_dim}"
    if common.INTERPRET:
        return None
    if device.platform != "gpu" or device.capability is None or device.capability < (8, 0):
        return (
            "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer, got "
            f"{describe(device)}"
        )
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return (
            f"the dtype must be bfloat16 or float16, got {query.dtype}: tensor cores multiply "
            "nothing wider without rounding it"
        )
    need = shared_bytes(choose_tiles(device, head_dim), head_dim, query.dtype.itemsize)
    have = 1024 * SHARED_KIB.get(device.capability, 99)
    if need > have:
        return (
            f"its tiles for head_dim {head_dim} need {need} bytes of shared memory, and "
            f"{device.kind} has {have} a program"
        )
    return None
