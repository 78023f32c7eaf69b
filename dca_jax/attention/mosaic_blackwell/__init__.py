"""DCA on Blackwell GPUs: a Pallas Mosaic GPU kernel with the tensor memory of `tcgen05`.

Compiled for compute capability 10.0 and 10.3 and run in JAX's GPU interpreter, never run on such a
GPU: so it is chosen by name only. The kernel is a prefill's forward pass; few queries and gradients
use plain XLA.

The modules of the kernel are imported by the function that launches it, as in `mosaic_gpu`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from dca_jax.attention import xla
from dca_jax.attention.backend import KeyBlocks, Rows
from dca_jax.attention.bands import Method, PositionMethod
from dca_jax.attention.mosaic_blackwell.tiles import STAGES, TMEM_COLUMNS, tmem_columns
from dca_jax.attention.pages import unpaged
from dca_jax.attention.stored import Scales, dequantized_layer
from dca_jax.dca import DCAConfig, Phase
from dca_jax.device import Device, describe

__all__ = ["backward", "forward", "unsupported"]

FEWEST = 16  # fewest queries for the kernel, whose tiles have 128


def unsupported(
    device: Device,
    query: jax.ShapeDtypeStruct,
    key: jax.ShapeDtypeStruct,
    dca: Method,
    *,
    listed: bool = False,
    paged: bool = False,
) -> str | None:
    """Why this kernel cannot run with these shapes, dtypes and device; None if it can."""
    if device.capability not in ((10, 0), (10, 3)):
        return (
            "it needs a Blackwell GPU with tensor memory (compute capability 10.0 or 10.3), got "
            f"{describe(device)}"
        )
    if isinstance(dca, PositionMethod):
        return f"it supports only DCA and plain attention, not {type(dca).__name__}"
    if listed:
        return "it does not support lists of key blocks"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, got {query.dtype}"
    head_dim = query.shape[3]
    if (columns := tmem_columns(head_dim)) > TMEM_COLUMNS:
        return (
            f"its tiles for head_dim {head_dim} need {columns} columns of tensor memory per CTA, "
            f"and there are {TMEM_COLUMNS}"
        )
    if head_dim not in STAGES:
        return f"head_dim must be one of {sorted(STAGES)}, got {head_dim}"
    return None


def forward(
    query: Float[Array, "B T N H"],
    key: Num[Array, "L R S K H"],
    value: Num[Array, "L R S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    with_lse: bool,
    scales: Scales | None = None,
    blocks: KeyBlocks | None = None,
    pages: Int[Array, "B pages_per_row"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """As `Backend.forward`; for the kernel, pages are laid out and 8 bits unpacked first."""
    assert blocks is None  # rejected by `unsupported`
    options: Any = {"dca": dca, "phases": phases, "with_lse": with_lse}
    if query.shape[1] < FEWEST:
        options |= {"scales": scales, "pages": pages}
        return xla.forward(query, key, value, layer, rows, **options)
    if pages is not None:
        key, value, scales = unpaged(key, value, scales, layer, pages)
        layer = jnp.int32(0)
    if scales is not None:
        key, value = dequantized_layer(key, value, scales, layer, query.dtype)
        layer = jnp.int32(0)
    from dca_jax.attention.mosaic_blackwell import flash_forward  # see this module's top

    return flash_forward.forward(query, key, value, layer, rows, **options)


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
    dca: DCAConfig,
    phases: tuple[Phase, ...],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """As `Backend.backward`, in plain XLA."""
    arrays = query, key, value, layer, rows, do, lse, delta
    return xla.backward(*arrays, dca=dca, phases=phases)
