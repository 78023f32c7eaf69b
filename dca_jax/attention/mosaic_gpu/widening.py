"""Widens 8-bit keys and values in shared memory to 16 bits as the left operand of a product.

A WGMMA takes its left operand from registers as pairs of elements that are adjacent in the sum. The
order of the sum is free as long as the right operand has the same order, so every thread loads four
adjacent bytes, and threads exchange no data.

- K q^T sums over a head's elements, which are adjacent in a key. The product sums them in a
  different order, to which the queries are permuted (`ordered_for_keys`).
- V^T P^T sums over keys; two words contain a pair of bytes for each of four rows. The rows of the
  result are a head's elements in a different order, which `in_order_of_head` reverts.

Both are exact: float16 and, times 2^120, bfloat16 represent all int8 and float8 numbers.
"""

from collections.abc import Callable
from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float

ROWS = 64  # rows of a WGMMA: keys in K q^T, head elements in V^T P^T; a step sums over 16


def key_words() -> Any:
    """Layout for loading keys [64, H]: each thread has two rows, and 4 adjacent of 16 elements."""
    return plgpu.Layout.WGMMA_UPCAST_2X


def value_words(head_dim: int) -> Any:
    """Layout for loading values [keys, H]: each thread has the 4 of 16 keys of its step.

    Of each key it has 4 adjacent elements, or 2 with head_dim 64: the number of its rows.
    """
    width = min(head_dim, 128)
    word = width // 32
    tiling = Tiling(((16, width), (8, 8 * word), (2, word)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -4), vector_dim=-1)


def ordered_for_keys(query: Float[Array, "*rest H"]) -> Float[Array, "*rest H"]:
    """Queries with their elements in the order of `widened_keys`."""
    *rest, head_dim = query.shape
    # Index within 16 elements: half, word, half of the word, element of a pair.
    parts = query.reshape(*rest, head_dim // 16, 2, 2, 2, 2)
    half, word, pair, one = (parts.ndim - 4 + n for n in range(4))
    order = (*range(parts.ndim - 4), pair, word, half, one)
    return parts.transpose(order).reshape(query.shape)


def in_order_of_head(out: Float[Array, "*rest H"]) -> Float[Array, "*rest H"]:
    """Results in the order of the head's elements, from the order of the rows of V^T P^T."""
    *rest, head_dim = out.shape
    tiles = min(head_dim, 128) // 64
    # Index of a row: group of 128, WGMMA, warp, half of its 16 rows, row among 8.
    parts = out.reshape(*rest, -1, tiles, 4, 2, 8)
    first = parts.ndim - 5
    order = (*range(first + 1), first + 2, first + 4, first + 1, first + 3)
    return parts.transpose(order).reshape(out.shape)


def widened_keys(ref: Any, dtype: jnp.dtype) -> Float[Array, "64 H"]:
    """64 keys in shared memory as the left operand of K q^T."""
    x = plgpu.load(ref, layout=key_words())
    return _widened(x, key_words(), x.shape, dtype, key_pairs)


def widened_values(ref: Any, dtype: jnp.dtype) -> Float[Array, "H 64"]:
    """64 values in shared memory as the left operand of V^T P^T."""
    keys, head_dim = ref.shape
    layout = value_words(head_dim)
    x = plgpu.load(ref, layout=layout)
    return _widened(x, layout, (head_dim, keys), dtype, value_pairs)


# Widens a pair: two registers, and a byte of each.
Widen = Callable[[Any, Any, int, int], Any]


def key_pairs(words: np.ndarray, wide: np.ndarray, widen: Widen) -> None:
    """Fills a thread's registers of WGMMA's left operand from those with `key_words`."""
    words = words.reshape(-1, 2)  # steps, rows of a thread
    out = wide.reshape(-1, 2, 2)  # steps, their halves, and rows
    for (step, row), word in np.ndenumerate(words):
        for half in range(2):
            out[step, half, row] = widen(word, word, 2 * half, 2 * half + 1)


def value_pairs(words: np.ndarray, wide: np.ndarray, widen: Widen) -> None:
    """As `key_pairs`, from `value_words`."""
    words = words.reshape(*words.shape[:2], 2, 2)  # steps, 128s of the head, halves, keys of a pair
    steps, parts = words.shape[:2]
    out = wide.reshape(parts, -1, steps, 2, 2)  # .., WGMMAs, steps, their halves, and rows
    for part, tile, step, half, row in np.ndindex(out.shape):
        first, second = words[step, part, half]
        byte = 2 * tile + row
        out[part, tile, step, half, row] = widen(first, second, byte, byte)


def _widened(
    x: Array, layout: Any, shape: tuple[int, ...], dtype: jnp.dtype, pairs_of: Callable
) -> Array:
    """Converts x from 8 bits to WGMMA's left operand of this shape, with `pairs_of`."""
    ptx = _PTX[jnp.dtype(x.dtype), jnp.dtype(dtype)]

    def convert(ctx: Any, x: Any) -> Any:
        del ctx
        i32, i16 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(16)
        out_type = ir.F16Type.get() if dtype == jnp.float16 else ir.BF16Type.get()
        to = mgpu.WGMMA_LAYOUT

        def as_word(register: Any) -> Any:
            size = ir.VectorType(register.type).shape[0]
            whole = i32 if size == 4 else i16
            word = vector.bitcast(ir.VectorType.get((1,), whole), register)
            word = vector.extract(word, [], [0])
            return word if size == 4 else arith.extui(i32, word)

        def widen(first: Any, second: Any, byte: int, other: int) -> Any:
            selected = f"{4 + other}{4 + other}{byte}{byte}"
            pair = llvm.inline_asm(i32, [first, second], ptx.format(bytes=selected), "=r,r,r")
            one = ir.VectorType.get((1,), i32)
            return vector.bitcast(ir.VectorType.get((2,), out_type), vector.broadcast(one, pair))

        words = np.empty_like(x.registers)
        for at, register in np.ndenumerate(x.registers):
            words[at] = as_word(register)
        wide = np.empty(to.registers_shape(shape), dtype=object)
        pairs_of(words, wide, widen)
        return mgpu.FragmentedArray(_registers=wide, _layout=to, _is_signed=None)

    inline = plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.WGMMA),
    )
    return inline(convert)(x)


# Takes one byte of each of two words ($1 and $2), twice side by side, for a pair of elements.
_SELECT = """
{{
.reg .b32 pair, a, b, c;
prmt.b32 pair, $1, $2, 0x{bytes};
"""
# 0x4300 with 7 mantissa bits is 128 + m; with the sign in the lowest bit of the exponent, 0x4300 is
# 128 and 0x4380 is 256: x = (128 + m) - (128 or 256).
_INT8_TO_BF16 = """
lop3.b32 a, pair, 0x007f007f, 0x43004300, 0xea;
lop3.b32 b, pair, 0x00800080, 0x43004300, 0xea;
sub.rn.bf16x2 $0, a, b;
}}
"""
# 0x6400 with 8 mantissa bits is 1024 + u, where u = x + 128; 0x6480 is 1152.
_INT8_TO_F16 = """
lop3.b32 a, pair, 0x00ff00ff, 0x64806480, 0x6a;
mov.b32 b, 0x64806480;
sub.rn.f16x2 $0, a, b;
}}
"""
# Sign, exponent and mantissa are moved to their places. The exponent's bias then differs, which a
# product by 2^120 (0x7b80) or 2^8 (0x5c00) corrects, except for NaN.
_FP8 = """
and.b32 a, pair, 0x80008000;
shr.b32 b, pair, {shift};
lop3.b32 b, b, {mask}, a, 0xea;
mov.b32 c, {up};
mul.rn.{type} $0, b, c;
}}}}
"""
_PTX = {
    (jnp.dtype(jnp.int8), jnp.dtype(jnp.bfloat16)): _SELECT + _INT8_TO_BF16,
    (jnp.dtype(jnp.int8), jnp.dtype(jnp.float16)): _SELECT + _INT8_TO_F16,
    (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.bfloat16)): _SELECT
    + _FP8.format(shift=4, mask="0x07f007f0", up="0x7b807b80", type="bf16x2"),
    (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float16)): _SELECT
    + _FP8.format(shift=1, mask="0x3f803f80", up="0x5c005c00", type="f16x2"),
}
