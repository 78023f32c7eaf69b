"""The ways to multiply groups of rows, and which to take."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dca_jax.device import Device
from dca_jax.grouped.blocks import blocks, precision
from dca_jax.grouped.hopper import BLOCK, TILE, mosaic_gpu
from dca_jax.products.packed import Packed

HOPPER = (9, 0)
LARGEST = 128  # rows of a block


def ragged(x: Array, kernels: Array, layer: Array, sizes: Array, block: int) -> Array:
    """By `jax.lax.ragged_dot`."""
    own = jax.lax.dynamic_index_in_dim(kernels, layer, keepdims=False).astype(x.dtype)
    padded = -(-sizes // block) * block
    return jax.lax.ragged_dot(x, own, padded, precision=precision(x))


PRODUCTS: dict[str, Any] = {"ragged": ragged, "mosaic_gpu": mosaic_gpu, "blocks": blocks}


def grouped_product(
    name: str,
    x: Float[Array, "places inputs"],
    kernels: Float[Array, "L E inputs outputs"] | Packed,
    layer: Int[Array, ""],
    sizes: Int[Array, " E"],
    block: int,
) -> Float[Array, "places outputs"]:
    """Each block of rows times the matrix of its group, in the dtype of x; float32 sums at least.

    Args:
        name: of the way to take, in `PRODUCTS`.
        x: rows as `lay_out` has them, zero where none stands.
        kernels: of any floating dtype, or packed (then one layer's are unpacked); taken to the
            dtype of x. layer: which of the stack.
        sizes: rows of each group, int32. block: rows of a block.
    """
    if isinstance(kernels, Packed):
        kernels, layer = kernels.at(layer).unpack(x.dtype)[None], jnp.int32(0)
    return PRODUCTS[name](x, kernels, layer, sizes, block)


def choose(device: Device, dtype: Any, matrix: tuple[int, ...]) -> str:
    """The name in `PRODUCTS` of the way to take, for a matrix and for its transpose."""
    if device.platform == "tpu":
        return "ragged"
    halves = dtype in (jnp.bfloat16, jnp.float16)
    tiles = all(size % TILE == 0 for size in matrix)
    if device.platform == "gpu" and device.capability == HOPPER and halves and tiles:
        return "mosaic_gpu"
    return "blocks"


def block_size(name: str, rows: int, groups: int) -> int:
    """Rows of a block: the kernel's, or a power of two near the mean rows of a group."""
    if name == "mosaic_gpu":
        return BLOCK
    return min(LARGEST, max(1, 2 ** (max(rows // groups, 1) - 1).bit_length()))
