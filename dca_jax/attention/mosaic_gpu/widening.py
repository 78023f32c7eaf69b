"""Keys and values in 8 bits as a warpgroup's registers hold them in 16."""

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float

LAYOUT = plgpu.Layout.WGMMA_UPCAST_2X  # four elements a thread, which fill a register in 8 bits


def widened(ref: Any, dtype: jnp.dtype) -> Float[Array, "rows columns"]:
    """What `ref`, in shared memory, holds, exactly, in `dtype`: bfloat16 or float16."""
    x = plgpu.load(ref, layout=LAYOUT)
    if x.dtype == jnp.float8_e4m3fn and dtype == jnp.bfloat16:
        return _bfloat16_of_fp8(x)
    return x.astype(dtype)


# Two elements of a register, as the sign, and the exponent and mantissa of bfloat16s: which counts
# exponents from -127, and not from -7. A zero exponent stays one: these numbers are subnormal, and
# a product takes them in. 0x7b80 is 2^120.
_PTX = """
{{
.reg .b32 pair, sign, rest, up;
prmt.b32 pair, $1, 0, 0x{bytes};
and.b32 sign, pair, 0x80008000;
shr.b32 rest, pair, 4;
lop3.b32 rest, rest, 0x07f007f0, sign, 0xea;
mov.b32 up, 0x7b807b80;
mul.rn.bf16x2 $0, rest, up;
}}
"""


def _bfloat16_of_fp8(x: Float[Array, "rows columns"]) -> Float[Array, "rows columns"]:
    """As jnp.astype, for which Hopper has no instruction; E4M3, NaN excepted."""

    def convert(ctx: Any, x: Any) -> Any:
        del ctx
        i32, bf16 = ir.IntegerType.get_signless(32), ir.BF16Type.get()
        wide = np.empty_like(x.registers)
        for at, register in np.ndenumerate(x.registers):
            word = vector.bitcast(ir.VectorType.get((1,), i32), register)
            word = vector.extract(word, [], [0])
            both = llvm.mlir_undef(ir.VectorType.get((2,), i32))
            for number, selected in enumerate(("1404", "3424")):
                pair = llvm.inline_asm(i32, [word], _PTX.format(bytes=selected), "=r,r")
                both = llvm.insertelement(both, pair, arith.constant(i32, number))
            wide[at] = vector.bitcast(ir.VectorType.get((4,), bf16), both)
        return mgpu.FragmentedArray(_registers=wide, _layout=x.layout, _is_signed=None)

    inline = plgpu.inline_mgpu(
        arg_types=(LAYOUT,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.bfloat16, layout=LAYOUT),
    )
    return inline(convert)(x)
