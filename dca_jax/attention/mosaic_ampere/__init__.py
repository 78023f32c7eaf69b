"""DCA on Ampere, Ada and newer NVIDIA GPUs: Pallas Mosaic GPU kernels with `mma.sync`.

They use what every GPU since compute capability 8.0 has: `mma.sync`, `ldmatrix` and `cp.async`.
Hopper's own kernels (`mosaic_gpu`) are faster there.

The modules of the kernels are imported by the functions that launch them: JAX's compiler for them
takes half a second to import, and most processes run elsewhere or only ask `unsupported`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from dca_jax.attention.backend import KeyBlocks, Rows
from dca_jax.attention.bands import Method, PositionMethod
from dca_jax.attention.mosaic_ampere import tiles
from dca_jax.attention.pages import unpaged
from dca_jax.attention.stored import Scales, dequantized_layer
from dca_jax.dca import Phase
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
    if head_dim not in tiles.TILES:
        return f"head_dim must be one of {sorted(tiles.TILES)}, got {head_dim}"
    if tiles.INTERPRET:
        return None
    if device.platform != "gpu" or device.capability is None or device.capability < (8, 0):
        return (
            "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer, got "
            f"{describe(device)}"
        )
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, got {query.dtype}"
    return None


def forward(
    query: Float[Array, "B T N H"],
    key: Num[Array, "L R S K H"],
    value: Num[Array, "L R S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    dca: Any,
    phases: tuple[Phase, ...],
    with_lse: bool,
    scales: Scales | None = None,
    blocks: KeyBlocks | None = None,
    pages: Int[Array, "B pages_per_row"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """As `Backend.forward`; keys and values in 8 bits are unpacked first."""
    assert blocks is None  # rejected by `unsupported`
    from dca_jax.attention.mosaic_ampere import flash_forward  # see this module's top

    if scales is not None:
        if pages is not None:
            key, value, laid_out = unpaged(key, value, scales, layer, pages)
            assert laid_out is not None  # since there are scales
            scales, layer, pages = laid_out, jnp.int32(0), None
        key, value = dequantized_layer(key, value, scales, layer, query.dtype)
        layer = jnp.int32(0)
    options: Any = {"dca": dca, "phases": phases, "pages": pages}
    out, lse = flash_forward.forward(query, key, value, layer, rows, **options)
    return out, lse if with_lse else None


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    do: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    *,
    dca: Any,
    phases: tuple[Phase, ...],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """As `Backend.backward`."""
    from dca_jax.attention.mosaic_ampere import flash_backward  # see this module's top

    arrays = query, key, value, layer, rows, do, lse, delta
    return flash_backward.backward(*arrays, dca=dca, phases=phases)
