"""DCA on Hopper GPUs: Pallas Mosaic GPU kernels with WGMMA and the bulk copy engine.

Other position methods use the forward kernel for prefill, with one launch per band; decoding and
gradients use plain XLA.

The modules of the kernels are imported by the functions that launch them: JAX's compiler for them
takes half a second to import, and most processes run elsewhere or only ask `unsupported`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax._src.lib import cuda_versions
from jaxtyping import Array, Float, Int, Num

from dca_jax.attention import xla
from dca_jax.attention.backend import KeyBlocks, Rows
from dca_jax.attention.bands import Method, PositionMethod
from dca_jax.attention.mosaic_gpu import backward_tiles, decode_tiles, forward_tiles
from dca_jax.attention.pages import Common, unpaged
from dca_jax.attention.stored import Scales, dequantized_layer
from dca_jax.dca import PHASES, Phase
from dca_jax.device import SHARED_BYTES, Device, describe

__all__ = ["backward", "forward", "rows_at_once", "unsupported"]

FEWEST = 64  # fewest queries of other methods for the kernel: those of one warpgroup


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
    if device.capability != (9, 0):
        return f"it needs a Hopper GPU (compute capability 9.0), got {describe(device)}"
    if miscompiling_cuda():
        return (
            "CUDA 12.8.0 to 12.9.0 miscompiles the masks of these kernels; install 12.9.1 or newer "
            "(jax[cuda13] includes it)"
        )
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, got {query.dtype}"
    head_dim = query.shape[3]
    if head_dim not in forward_tiles.TILES:
        return f"head_dim must be one of {sorted(forward_tiles.TILES)}, got {head_dim}"
    needed = max(
        # A few keys may be a slice of a long text and include all phases.
        forward_tiles.TILES[head_dim].shared_bytes(head_dim, len(PHASES)),
        forward_tiles.PASS_TILES[head_dim].shared_bytes(head_dim, len(PHASES) - 1),
        forward_tiles.PAGE_TILES[head_dim].shared_bytes(head_dim, len(PHASES)),
        forward_tiles.LIST_TILES[head_dim].shared_bytes(head_dim, len(PHASES)),
        forward_tiles.BAND_TILES[head_dim].shared_bytes(head_dim, 1),
        forward_tiles.STEP_TILES[head_dim].shared_bytes(head_dim, 2),
        backward_tiles.shared_bytes(head_dim),
    )
    if needed > SHARED_BYTES:
        return (
            f"its tiles for head_dim {head_dim} need {needed} bytes of shared memory per CTA, and "
            f"there are {SHARED_BYTES}"
        )
    return None


def miscompiling_cuda() -> bool:
    """Whether the CUDA in use has a faulty ptxas, which JAX's own causal kernel rejects too."""
    if cuda_versions is None:
        return False  # no GPU here: compiling ahead of time for another machine
    return 12_080 <= cuda_versions.cuda_runtime_get_version() < 12_091


def forward(
    query: Float[Array, "B T N H"],
    key: Num[Array, "L R S K H"],
    value: Num[Array, "L R S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    dca: Method,
    phases: tuple[Phase, ...],
    with_lse: bool,
    scales: Scales | None = None,
    blocks: KeyBlocks | None = None,
    pages: Int[Array, "B pages_per_row"] | None = None,
    common: Common | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """As `Backend.forward`, with the decode kernel for few queries, else the prefill kernel.

    Args:
        common: prefixes shared by rows, for one query per row and pages; then without log-sum-exp.
    """
    if isinstance(dca, PositionMethod):
        return _by_method(query, key, value, layer, rows, dca, with_lse, scales)
    from dca_jax.attention.mosaic_gpu import few_queries, flash_forward  # see this module's top

    options: dict[str, Any] = {"dca": dca, "phases": phases, "with_lse": with_lse}
    shape = key.shape
    if pages is not None:
        shape = (shape[0], pages.shape[0], pages.shape[1] * shape[2], *shape[3:])
    like = (jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct(shape, key.dtype))
    arrays = query, key, value, layer, rows
    if common is not None and pages is not None:
        static: Any = {"dca": dca, "phases": phases}
        paged: Any = {"scales": scales, "pages": pages, "common": common}
        return few_queries.decode_after_common(*arrays, **static, **paged), None
    if blocks is None and decode_tiles.fits(*like):
        return few_queries.decode(*arrays, scales=scales, pages=pages, **options)
    if blocks is None and pages is not None and (tile := few_queries.tile_of(*like)):
        options |= {"tile": tile, "scales": scales, "pages": pages}
        return few_queries.decode_piece(*arrays, **options)
    if scales is not None and pages is not None:
        key, value, scales = unpaged(key, value, scales, layer, pages)
        layer, pages = jnp.int32(0), None
    if scales is not None:
        key, value = dequantized_layer(key, value, scales, layer, query.dtype)
        layer = jnp.int32(0)
    options |= {"blocks": blocks, "pages": pages}
    return flash_forward.forward(query, key, value, layer, rows, **options)


def _by_method(
    query: Float[Array, "B T N H"],
    key: Num[Array, "L B S K H"],
    value: Num[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    method: PositionMethod,
    with_lse: bool,
    scales: Scales | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """`forward` for a method other than DCA, over raw keys."""
    if query.shape[1] < FEWEST:
        options: Any = {"dca": method, "phases": (), "with_lse": with_lse, "scales": scales}
        return xla.forward(query, key, value, layer, rows, **options)
    if scales is not None:
        key, value = dequantized_layer(key, value, scales, layer, query.dtype)
        layer = jnp.int32(0)
    from dca_jax.attention.mosaic_gpu import band_forward  # see this module's top

    out, lse = band_forward.forward(query, key, value, layer, rows, method=method)
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
    dca: Method,
    phases: tuple[Phase, ...],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """As `Backend.backward`."""
    arrays = query, key, value, layer, rows, do, lse, delta
    if isinstance(dca, PositionMethod):
        return xla.backward(*arrays, dca=dca, phases=phases)
    from dca_jax.attention.mosaic_gpu import flash_backward  # see this module's top

    return flash_backward.backward(*arrays, dca=dca, phases=phases)


def rows_at_once(query: jax.ShapeDtypeStruct, key: jax.ShapeDtypeStruct) -> int:
    """As `few_queries.rows_at_once`."""
    from dca_jax.attention.mosaic_gpu import few_queries  # see this module's top

    return few_queries.rows_at_once(query, key)
