"""A vote among the 32 threads of a warp, which Pallas has no word for."""

import functools
from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Bool, Float


def any_in_warp(x: Float[Array, " queries"], threshold: float) -> Bool[Array, ""]:
    """Whether any of a warp's queries exceeds `threshold`; x is laid out as WGMMA's rows are.

    The answer differs from warp to warp: what depends on it must not synchronize a warpgroup.
    """

    def vote(ctx: Any, x: Any) -> Any:
        del ctx
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        zero = arith.constant(i32, 0)
        values = [llvm.extractelement(register, zero) for register in x.registers.flat]
        largest = functools.reduce(arith.maximumf, values)
        limit = arith.constant(f32, threshold)
        exceeds = arith.extui(i32, arith.cmpf(arith.CmpFPredicate.OGT, largest, limit))
        result = llvm.inline_asm(
            i32,
            [exceeds],
            "{ .reg .pred p, q; setp.ne.s32 p, $1, 0;"
            " vote.sync.any.pred q, p, 0xffffffff; selp.s32 $0, 1, 0, q; }",
            "=r,r",
            has_side_effects=True,
        )
        return mgpu.FragmentedArray.splat(result, (), is_signed=True)

    inline = plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA.reduce(1),),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())),
    )
    return inline(vote)(x) != 0
