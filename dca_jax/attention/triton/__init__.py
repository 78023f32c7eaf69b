"""Attention in Pallas-Triton, for NVIDIA GPUs from Ampere on. JAX deprecates Pallas-Triton (0.11).

One program processes the key ranges of all phases for a tile of queries, with one online softmax,
and changes the tile's rotation between phases. Blocks of keys to which every query of the tile
attends fully skip the mask. Few queries (decoding) are packed with the query heads that share their
keys, and the keys are split over programs, whose outputs are merged by their log-sum-exp.

In the backward pass, dq uses the same ranges. For dk and dv, a program loops over the queries that
attend to a block of keys in each phase, for all query heads of the kv head in turn: without
atomics, so it is bitwise deterministic.
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
    """Why these kernels cannot run with these shapes, dtypes and device; None if they can."""
    if isinstance(dca, PositionMethod):
        return f"it supports only DCA and plain attention, not {type(dca).__name__}"
    if listed:
        return "it does not support lists of key blocks"
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
            f"the dtype must be bfloat16 or float16, got {query.dtype}: tensor cores round wider "
            "dtypes"
        )
    need = shared_bytes(choose_tiles(device, head_dim), head_dim, query.dtype.itemsize)
    have = 1024 * SHARED_KIB.get(device.capability, 99)
    if need > have:
        return (
            f"its tiles for head_dim {head_dim} need {need} bytes of shared memory, and "
            f"{device.kind} has {have} per program"
        )
    return None
