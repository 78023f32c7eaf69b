"""Votes among the threads of a warp or a warpgroup, which Pallas does not provide."""

import functools
from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Bool, Float

_IN_WARP = (
    "{ .reg .pred p, q; setp.ne.s32 p, $1, 0;"
    " vote.sync.any.pred q, p, 0xffffffff; selp.s32 $0, 1, 0, q; }"
)
# With one hardware barrier per warpgroup, from 8 on; Mosaic uses those from 0 on.
_IN_WARPGROUP = (
    "{ .reg .pred p, q; .reg .u32 b; setp.ne.s32 p, $1, 0;"
    " mov.u32 b, %tid.x; shr.u32 b, b, 7; add.u32 b, b, 8;"
    " bar.red.or.pred q, b, 128, p; selp.s32 $0, 1, 0, q; }"
)

_OF_WGMMA = plgpu.Layout.WGMMA.reduce(1)


def any_in_warp(x: Float[Array, " queries"], threshold: float) -> Bool[Array, ""]:
    """Whether any of a warp's queries exceeds `threshold`; x has the layout of WGMMA's rows.

    The result may differ between warps, so code that depends on it must not synchronize a
    warpgroup.
    """
    return _vote(x, threshold, _IN_WARP, _OF_WGMMA)


def any_in_warpgroup(x: Float[Array, " queries"], layout: Any = _OF_WGMMA) -> Bool[Array, ""]:
    """Whether any of a warpgroup's queries is positive; the same for all of its threads."""
    return _vote(x, 0.0, _IN_WARPGROUP, layout)


def _vote(
    x: Float[Array, " queries"], threshold: float, assembly: str, layout: Any
) -> Bool[Array, ""]:
    def vote(ctx: Any, x: Any) -> Any:
        del ctx
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        zero = arith.constant(i32, 0)
        values = [llvm.extractelement(register, zero) for register in x.registers.flat]
        largest = functools.reduce(arith.maximumf, values)
        limit = arith.constant(f32, threshold)
        exceeds = arith.extui(i32, arith.cmpf(arith.CmpFPredicate.OGT, largest, limit))
        result = llvm.inline_asm(i32, [exceeds], assembly, "=r,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(result, (), is_signed=True)

    inline = plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())),
    )
    return inline(vote)(x) != 0
