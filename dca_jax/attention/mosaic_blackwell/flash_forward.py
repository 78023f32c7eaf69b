"""The forward pass on Blackwell: one flash-attention kernel for any of DCA's phases together.

A CTA processes 256 queries of one head in two tiles of 128. Two warpgroups compute the tiles'
weights (`softmax.py`); of a third, one warp copies queries, keys and values, and one issues the
products of the tensor cores (`warps.py`), whose results lie in tensor memory. Three rotations of
the queries do not fit in shared memory, so they are rotated before the kernel, and a tile's queries
are read again where the phase changes.

Two tiles in ping-pong and weights in the place of logits are FlashAttention-4's; warps of their own
for copies and products are also openxla/tokamax's. Compiled for Blackwell, never run on one.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_blackwell.cta import CTA, Problem, Refs, Shared
from dca_jax.attention.mosaic_blackwell.softmax import attend
from dca_jax.attention.mosaic_blackwell.tiles import BLOCK_Q, STAGES, TILES_PER_CTA
from dca_jax.attention.mosaic_blackwell.warps import feed
from dca_jax.attention.mosaic_gpu.queries import pad_tokens, rotated_queries
from dca_jax.dca import DCAConfig, Phase


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
    """Output and natural log-sum-exp over the keys of `phases`; as `Backend.forward`."""
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[2:4]
    if num_keys % 8:  # needs padding: take only one layer
        key, value, layer = key[layer][None], value[layer][None], jnp.int32(0)
    key, value = (pad_tokens(x.reshape(-1, *x.shape[2:]), 1) for x in (key, value))
    rotated = tuple(rotated_queries(pad_tokens(query, 1), rows, dca, phases))
    row = layer * batch + jnp.arange(batch, dtype=jnp.int32)
    place = jnp.stack([row, rows.offset, rows.lengths, rows.key_offset], axis=1)
    problem = Problem(num_keys, heads // kv_heads, dca, phases, STAGES[head_dim])
    num_ctas = -(-num_queries // BLOCK_Q)
    out = jax.ShapeDtypeStruct(rotated[0].shape, query.dtype)
    # Whole tiles: a copy from a row of an array does not stop at the row's end.
    lse = jax.ShapeDtypeStruct((batch, heads, num_ctas * BLOCK_Q), jnp.float32)
    given = Refs(rotated, key, value, place, None, None)
    refs = given._replace(out=out, lse=lse if with_lse else None)
    out, *lse = plgpu.kernel(
        functools.partial(_kernel, problem, jax.tree.structure(refs)),
        out_type=(out, lse) if with_lse else (out,),
        grid=(heads, num_ctas, batch),
        grid_names=("heads", "cta", "batch"),
        num_threads=TILES_PER_CTA + 1,
        thread_name="warpgroup",
        kernel_name="dca_forward_blackwell",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,  # maxima and sums are computed within a thread
        ),
    )(*jax.tree.leaves(given))
    return out[:, :num_queries], lse[0][:, :, :num_queries] if with_lse else None


def _kernel(problem: Problem, tree: Any, *refs: Any) -> None:
    gmem: Refs = jax.tree.unflatten(tree, refs)
    num_queries, _, head_dim = gmem.out.shape[1:]
    batch, head = lax.axis_index("batch"), lax.axis_index("heads")
    # CTAs with the most work go first, so that the last ones are short.
    first = (pl.cdiv(num_queries, BLOCK_Q) - 1 - lax.axis_index("cta")) * BLOCK_Q

    def body(smem: Shared) -> None:
        cta = CTA(problem, gmem, smem, batch, head, first)
        # The tiles' code is apart, as their places in tensor memory are static.
        compute = [functools.partial(attend, cta, tile) for tile in range(TILES_PER_CTA)]
        lax.switch(lax.axis_index("warpgroup"), [*compute, functools.partial(feed, cta)])

    shared = Shared.types(problem, gmem.out.dtype, head_dim)
    pl.run_scoped(body, shared, collective_axes="warpgroup")
