"""Attention in Pallas-Mosaic, for TPUs from v4 on.

`lists` reads lists of key blocks. Each other kernel (`flash_forward`, `dq`, `dkv`, `decode`) is one
flash-attention loop over the blocks of all phases. `runs` finds the blocks to process under each
rotation of the queries, and `steps` encodes them as one word for each step of the grid. Keys and
values are read in place, [L, B, S, K * H], with heads along the lanes; pages too when decoding,
while a prefill copies a layer of them out. The kernels rotate the
queries themselves (`rotation`), once for each run. `tiles` chooses block_q and block_kv.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Num

from dca_jax.attention.backend import KeyBlocks, Rows
from dca_jax.attention.bands import Method, PositionMethod
from dca_jax.attention.blocks import BLOCK
from dca_jax.attention.mosaic_tpu import lists
from dca_jax.attention.mosaic_tpu import tiles as tiling
from dca_jax.attention.mosaic_tpu.decode import decode
from dca_jax.attention.mosaic_tpu.dkv import dkv
from dca_jax.attention.mosaic_tpu.dq import dq
from dca_jax.attention.mosaic_tpu.flash_forward import flash_forward
from dca_jax.attention.mosaic_tpu.heads import Heads
from dca_jax.attention.mosaic_tpu.rotation import rotation_tables
from dca_jax.attention.mosaic_tpu.runs import (
    kv_run_chunks,
    max_kv_steps,
    max_query_steps,
    query_run_chunks,
)
from dca_jax.attention.mosaic_tpu.steps import num_words
from dca_jax.attention.pages import unpaged
from dca_jax.attention.softmax import LOG2E, MASKED
from dca_jax.attention.stored import Scales, dequantized_layer, is_quantized
from dca_jax.dca import PHASES, DCAConfig, Phase
from dca_jax.device import Device, current_device


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
    if listed and paged:
        return "it reads lists of key blocks, or pages, not both"
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[2:4]
    if head_dim not in (64, 128, 256):
        return f"head_dim must be 64, 128 or 256, got {head_dim}"
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the dtype must be bfloat16 or float32, got {query.dtype}"
    if device.platform != "tpu" or device.kind not in tiling.CHIPS:
        names = ", ".join(tiling.CHIPS)
        return f"it needs a TPU (one of {names}), got {device.kind} ({device.platform})"
    heads = Heads(query=num_heads, kv=kv_heads, head_dim=head_dim)
    itemsize = query.dtype.itemsize
    if listed:
        need = lists.vmem_bytes(heads, itemsize)
        words = lists.words_of_tile(num_keys, kv_heads, batch, dca)
        return _too_much(device, need, 4 * words)
    tiles = tiling.choose_tiles(device, heads, dca, itemsize)
    num_head_queries = num_queries * num_heads
    if num_head_queries <= tiling.DECODE_QUERIES:
        block = tiling.whole_lanes(tiles.decode) if is_quantized(key.dtype) else tiles.decode
        need = tiling.decode_vmem(num_head_queries, block, heads, itemsize)
        # Through pages, at most: with one block a page, and pages as small as they may be.
        block_kv = BLOCK if paged else tiles.decode
        words = max_kv_steps(num_keys, dca, PHASES, (num_queries, block_kv))
        words += tiles.decode_splits + (num_keys // BLOCK if paged else 0)
    else:
        need = max(
            tiling.forward_vmem(tiles.forward, heads, itemsize),
            tiling.dq_vmem(tiles.dq, heads, itemsize),
            tiling.dkv_vmem(tiles.dkv, heads, itemsize),
        )
        words = _words(num_queries, num_keys, dca, tiles)
    return _too_much(device, need, 4 * batch * words)


def _too_much(device: Device, vmem: int, smem: int) -> str | None:
    """Which memory of a chip is too small, if one is; bytes."""
    have = tiling.CHIPS[device.kind].vmem
    if vmem > have:
        return f"its tiles need {vmem} bytes of VMEM, and {device.kind} has {have}"
    if smem > tiling.SMEM:
        return (
            f"its steps for this text need {smem} bytes of scalar memory, of {tiling.SMEM}; "
            "read the text in smaller pieces, or in a smaller batch"
        )
    return None


def _words(num_queries: int, num_keys: int, dca: DCAConfig, tiles: tiling.Tiles) -> int:
    """The most words of scalar memory that one of the three kernels takes for a row."""
    words = []
    for tile in (tiles.forward, tiles.dq):
        max_steps = max_kv_steps(num_keys, dca, PHASES, tile)
        num_runs = len(kv_run_chunks(tile[0], PHASES, dca))
        words.append(num_words(pl.cdiv(num_queries, tile[0]), max_steps, num_runs))
    max_steps = max_query_steps(num_queries, dca, PHASES, tiles.dkv)
    num_runs = len(query_run_chunks(tiles.dkv[1], PHASES, dca))
    words.append(num_words(pl.cdiv(num_keys, tiles.dkv[1]), max_steps, num_runs))
    return max(words)


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
    """Output over the keys of `phases`, and on request their natural log-sum-exp."""
    num_head_queries = query.shape[1] * query.shape[2]
    heads = Heads(query=query.shape[2], kv=key.shape[3], head_dim=query.shape[3])
    itemsize = query.dtype.itemsize
    device = current_device()
    if blocks is not None:
        assert pages is None  # `unsupported` has refused both
        if scales is not None:
            key, value = dequantized_layer(key, value, scales, layer, query.dtype)
            layer = jnp.int32(0)
        limit = tiling.vmem_limit(device, lists.vmem_bytes(heads, itemsize))
        options = {"dca": dca, "phases": phases, "vmem_limit": limit}
        return lists.attend_to_blocks(query, key, value, layer, rows, heads, blocks, **options)
    tiles = tiling.choose_tiles(device, heads, dca, itemsize)
    few = num_head_queries <= tiling.DECODE_QUERIES
    if pages is not None and not few:
        key, value, scales = unpaged(key, value, scales, layer, pages)
        layer, pages = jnp.int32(0), None
    if scales is not None and not few:
        key, value = dequantized_layer(key, value, scales, layer, query.dtype)
        layer, scales = jnp.int32(0), None
    arguments = query, key, value, layer, rows, heads
    if few:
        block_kv = tiles.decode if scales is None else tiling.whole_lanes(tiles.decode)
        if pages is not None:
            block_kv = tiling.block_of_page(key.shape[2], block_kv)
        return decode(
            *arguments,
            scales=scales,
            pages=pages,
            dca=dca,
            phases=phases,
            with_lse=with_lse,
            block_kv=block_kv,
            num_splits=tiles.decode_splits,
            vmem_bytes=tiling.vmem_limit(
                device, tiling.decode_vmem(num_head_queries, block_kv, heads, itemsize)
            ),
        )
    return flash_forward(
        *arguments,
        dca=dca,
        phases=phases,
        with_lse=with_lse,
        tile=tiles.forward,
        vmem_bytes=tiling.vmem_limit(device, tiling.forward_vmem(tiles.forward, heads, itemsize)),
    )


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
    """Gradients of query, key (rotated) and value, from the global `lse` and `delta`."""
    batch, num_queries, num_heads, head_dim = query.shape
    heads = Heads(query=num_heads, kv=key.shape[3], head_dim=head_dim)
    itemsize = query.dtype.itemsize
    device = current_device()
    tiles = tiling.choose_tiles(device, heads, dca, itemsize)
    flat = (batch, num_queries, num_heads * head_dim)
    # In units of log2. A query that attends to no key gets so large a value that p vanishes.
    lse = jnp.where(jnp.isfinite(lse), lse * LOG2E, -MASKED)
    inputs = (
        query.reshape(flat),
        key.reshape(*key.shape[:3], -1),
        value.reshape(*value.shape[:3], -1),
        rotation_tables(num_queries, rows, dca, phases),
        do.astype(query.dtype).reshape(flat),
        lse[:, :, None, :],
        delta[:, :, None, :],
    )
    grad_query = dq(
        inputs,
        layer,
        rows,
        heads,
        dca=dca,
        phases=phases,
        tile=tiles.dq,
        vmem_bytes=tiling.vmem_limit(device, tiling.dq_vmem(tiles.dq, heads, itemsize)),
    )
    dk, dv = dkv(
        inputs,
        layer,
        rows,
        heads,
        dca=dca,
        phases=phases,
        tile=tiles.dkv,
        vmem_bytes=tiling.vmem_limit(device, tiling.dkv_vmem(tiles.dkv, heads, itemsize)),
    )
    return (
        grad_query.reshape(query.shape),
        dk.reshape(key.shape[1:]),
        dv.reshape(value.shape[1:]),
    )
