"""The implementations of grouped products, and the choice between them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dca_jax.device import Device
from dca_jax.grouped.blocks import blocks, precision
from dca_jax.grouped.layout import HOPPER_BLOCK, HOPPER_TILE
from dca_jax.products.packed import Packed

HOPPER = (9, 0)
LARGEST = 128  # maximum rows of a block


def ragged(
    x: Array, kernels: Array, layer: Array, sizes: Array, block: int, transposed: bool = False
) -> Array:
    """The product with `jax.lax.ragged_dot`."""
    own = jax.lax.dynamic_index_in_dim(kernels, layer, keepdims=False).astype(x.dtype)
    own = own.swapaxes(1, 2) if transposed else own
    padded = -(-sizes // block) * block
    return jax.lax.ragged_dot(x, own, padded, precision=precision(x))


def mosaic_gpu(
    x: Array, kernels: Array, layer: Array, sizes: Array, block: int, transposed: bool = False
) -> Array:
    """The product with the kernels for Hopper."""
    # JAX's compiler for these kernels takes half a second to import.
    from dca_jax.grouped import hopper

    return hopper.mosaic_gpu(x, kernels, layer, sizes, block, transposed)


PRODUCTS: dict[str, Any] = {"ragged": ragged, "mosaic_gpu": mosaic_gpu, "blocks": blocks}


def grouped_product(
    name: str,
    x: Float[Array, "places inputs"],
    kernels: Float[Array, "L E inputs outputs"] | Packed,
    layer: Int[Array, ""],
    sizes: Int[Array, " E"],
    block: int,
) -> Float[Array, "places outputs"]:
    """Each block of rows times the matrix of its group, in the dtype of x; sums at least float32.

    Args:
        name: name of the implementation in `PRODUCTS`.
        x: rows in the order of `lay_out`, zero at empty places.
        kernels: matrices of any floating dtype, or packed (one layer's are then unpacked); they are
            converted to the dtype of x.
        layer: index in the stack.
        sizes: number of rows of each group, int32.
        block: number of rows of a block.
    """
    if isinstance(kernels, Packed):
        # Not transposed here: XLA would transpose the whole stack, before the loop over layers.
        own = kernels.at(layer).unpack_inner(x.dtype)[None]
        return PRODUCTS[name](x, own, jnp.int32(0), sizes, block, True)
    return PRODUCTS[name](x, kernels, layer, sizes, block)


def choose(device: Device, dtype: Any, matrix: tuple[int, ...]) -> str:
    """The name in `PRODUCTS` of the implementation for a matrix and its transpose."""
    if device.platform == "tpu":
        return "ragged"
    halves = dtype in (jnp.bfloat16, jnp.float16)
    tiles = all(size % HOPPER_TILE == 0 for size in matrix)
    if device.platform == "gpu" and device.capability == HOPPER and halves and tiles:
        return "mosaic_gpu"
    return "blocks"


def block_size(name: str, rows: int, groups: int) -> int:
    """Rows per block: the kernel's, or a power of two near the mean rows per group."""
    if name == "mosaic_gpu":
        return HOPPER_BLOCK
    return min(LARGEST, max(1, 2 ** (max(rows // groups, 1) - 1).bit_length()))
