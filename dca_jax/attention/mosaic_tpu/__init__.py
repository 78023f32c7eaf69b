"""Attention in Pallas-Mosaic, for TPUs from v4 on.

One flash-attention loop over the keys of every phase: `stages` says which blocks a tile meets under
which rotation of its queries, `walk` writes that down step by step, and the kernels
(`flash_forward`, `dq`, `dkv`, `decode`) follow it. Keys and values are read where they lie,
[L, B, S, K * H] with heads along the lanes; queries are rotated in the kernels (`turns`), once a
tile and stage. `tiles` says how much goes through a kernel at once.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from dca_jax.attention.backend import Rows
from dca_jax.attention.device import Device, current_device
from dca_jax.attention.mosaic_tpu import tiles as tiling
from dca_jax.attention.mosaic_tpu import turns
from dca_jax.attention.mosaic_tpu.decode import decode
from dca_jax.attention.mosaic_tpu.dkv import dkv
from dca_jax.attention.mosaic_tpu.dq import dq
from dca_jax.attention.mosaic_tpu.flash_forward import flash_forward
from dca_jax.attention.mosaic_tpu.heads import Heads
from dca_jax.attention.mosaic_tpu.stages import (
    most_keys,
    most_queries,
    stages_ahead,
    stages_behind,
)
from dca_jax.attention.mosaic_tpu.walk import num_words
from dca_jax.dca import PHASES, DCAConfig, Phase


def unsupported(
    device: "Device", query: jax.ShapeDtypeStruct, key: jax.ShapeDtypeStruct, dca: DCAConfig
) -> str | None:
    """Why these kernels cannot run on these shapes and dtypes on this device; None: they can."""
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
    tiles = tiling.choose_tiles(device, heads, dca, itemsize)
    num_rows = num_queries * num_heads
    if num_rows <= tiling.DECODE_ROWS:
        need = tiling.decode_vmem(num_rows, tiles.decode, heads, itemsize)
        words = most_keys(num_keys, dca, PHASES, (num_queries, tiles.decode)) + tiles.parts
    else:
        need = max(
            tiling.forward_vmem(tiles.forward, heads, itemsize),
            tiling.dq_vmem(tiles.dq, heads, itemsize),
            tiling.dkv_vmem(tiles.dkv, heads, itemsize),
        )
        words = _words(num_queries, num_keys, dca, tiles)
    have = tiling.CHIPS[device.kind].vmem
    if need > have:
        return f"its tiles need {need} bytes of VMEM, and {device.kind} has {have}"
    need = 4 * batch * words
    if need > tiling.SMEM:
        return (
            f"its walk through this text needs {need} bytes of scalar memory, of {tiling.SMEM}; "
            "read the text in smaller pieces, or in a smaller batch"
        )
    return None


def _words(num_queries: int, num_keys: int, dca: DCAConfig, tiles: tiling.Tiles) -> int:
    """Words of scalar memory that the longest of three kernels' walks takes for a row."""
    words = []
    for blocks in (tiles.forward, tiles.dq):
        most = most_keys(num_keys, dca, PHASES, blocks)
        stages = len(stages_behind(blocks[0], PHASES, dca))
        words.append(num_words(pl.cdiv(num_queries, blocks[0]), most, stages))
    most = most_queries(num_queries, dca, PHASES, tiles.dkv)
    stages = len(stages_ahead(tiles.dkv[1], PHASES, dca))
    words.append(num_words(pl.cdiv(num_keys, tiles.dkv[1]), most, stages))
    return max(words)


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "L B S K H"],
    value: Float[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    with_lse: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """Output over the keys of `phases`, and on request their natural log-sum-exp."""
    num_rows = query.shape[1] * query.shape[2]
    heads = Heads(query=query.shape[2], kv=key.shape[3], head_dim=query.shape[3])
    itemsize = query.dtype.itemsize
    device = current_device()
    tiles = tiling.choose_tiles(device, heads, dca, itemsize)
    arguments = query, key, value, layer, rows, heads
    if num_rows <= tiling.DECODE_ROWS:
        return decode(
            *arguments,
            dca=dca,
            phases=phases,
            with_lse=with_lse,
            block_k=tiles.decode,
            parts=tiles.parts,
            vmem_bytes=tiling.vmem_limit(
                device, tiling.decode_vmem(num_rows, tiles.decode, heads, itemsize)
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
    out_bar: Float[Array, "B T N H"],
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
    # In units of log2, and where a query met no key at all so large that its weights vanish.
    lse = jnp.where(jnp.isfinite(lse), lse * turns.LOG2E, 1e30)
    inputs = (
        query.reshape(flat),
        key.reshape(*key.shape[:3], -1),
        value.reshape(*value.shape[:3], -1),
        turns.turns(num_queries, rows, dca, phases),
        out_bar.astype(query.dtype).reshape(flat),
        lse[:, :, None, :],
        delta[:, :, None, :],
    )
    query_bar = dq(
        inputs,
        layer,
        rows,
        heads,
        dca=dca,
        phases=phases,
        tile=tiles.dq,
        vmem_bytes=tiling.vmem_limit(device, tiling.dq_vmem(tiles.dq, heads, itemsize)),
    )
    key_bar, value_bar = dkv(
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
        query_bar.reshape(query.shape),
        key_bar.reshape(key.shape[1:]),
        value_bar.reshape(value.shape[1:]),
    )
