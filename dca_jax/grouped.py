"""Products of rows with the matrix of their group: what experts are made of.

Rows stand sorted by group, `sizes[e]` of them for matrix e, in a stack of layers of matrices; those
beyond the last group mean nothing, before and after. Three ways, of which `grouped_product` takes
one by the device and the shapes:

    ragged       `jax.lax.ragged_dot`, for which XLA has a kernel on TPUs; elsewhere it multiplies
                 every row by every matrix
    mosaic_gpu   JAX's own kernels for Hopper (`jax.experimental.pallas.ops.gpu`)
    blocks       a loop over blocks of rows, each of one group; any device, and a matrix is read
                 where it lies

Each is exact (no row is dropped), deterministic and differentiable.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dca_jax.attention.device import Device, current_device
from dca_jax.dtypes import compute_dtype
from dca_jax.packed_weights import Packed

BLOCK = 128  # rows of the largest block
HOPPER = (9, 0)
# Of JAX's kernels: rows and columns of a tile of the result, and what of the sum is taken at once.
TILE, DEPTH = 128, 64
STAGES = 4  # tiles of the inputs under way at once

Product = Callable[
    [
        Float[Array, "rows inputs"],
        Float[Array, "L E inputs outputs"],
        Int[Array, ""],
        Int[Array, " E"],
    ],
    Float[Array, "rows outputs"],
]


def grouped_product(
    x: Float[Array, "rows inputs"],
    kernels: Float[Array, "L E inputs outputs"] | Packed,
    layer: Int[Array, ""],
    sizes: Int[Array, " E"],
) -> Float[Array, "rows outputs"]:
    """Row r of group e times `kernels[layer, e]`, in the dtype of x; sums are float32 at least.

    Args:
        x: rows sorted by group.
        kernels: of any floating dtype, or packed; taken to that of x.
        layer: which of the stack.
        sizes: rows of each group, int32; together at most those of x.
    """
    if isinstance(kernels, Packed):
        kernels, layer = kernels.at(layer).unpack(x.dtype)[None], jnp.int32(0)
    name = choose(current_device(), x.dtype, kernels.shape[2:])
    return PRODUCTS[name](x, kernels, layer, sizes)


def choose(device: Device, dtype: Any, matrix: tuple[int, ...]) -> str:
    """The name in `PRODUCTS` of the way to take."""
    if device.platform == "tpu":
        return "ragged"
    halves = dtype in (jnp.bfloat16, jnp.float16)
    tiles = all(size % TILE == 0 for size in matrix)
    if device.platform == "gpu" and device.capability == HOPPER and halves and tiles:
        return "mosaic_gpu"
    return "blocks"


def _precision(x: Array) -> str | None:
    return "highest" if x.dtype == jnp.float32 else None


def ragged(x: Array, kernels: Array, layer: Array, sizes: Array) -> Array:
    """By `jax.lax.ragged_dot`."""
    own = jax.lax.dynamic_index_in_dim(kernels, layer, keepdims=False).astype(x.dtype)
    return jax.lax.ragged_dot(x, own, sizes, precision=_precision(x))


# --- a loop over blocks --------------------------------------------------------------------------


@jax.custom_vjp
def blocks(x: Array, kernels: Array, layer: Array, sizes: Array) -> Array:
    """By a loop over blocks of rows, as many as there are."""
    return _multiply(x, kernels, layer, sizes, transposed=False)


def _blocks_forward(x: Array, kernels: Array, layer: Array, sizes: Array) -> tuple[Array, tuple]:
    return blocks(x, kernels, layer, sizes), (x, kernels, layer, sizes)


def _blocks_backward(saved: tuple, dy: Array) -> tuple[Array, Array, None, None]:
    x, kernels, layer, sizes = map(jnp.asarray, saved)  # JAX may keep a constant as NumPy's
    dx = _multiply(dy, kernels, layer, sizes, transposed=True)
    return dx, _outer(x, dy, kernels, layer, sizes), None, None


blocks.defvjp(_blocks_forward, _blocks_backward)


def _block_size(rows: int, groups: int) -> int:
    """A power of two near the mean rows of a group."""
    return min(BLOCK, max(1, 2 ** (max(rows // groups, 1) - 1).bit_length()))


def _each_block(
    rows: int, sizes: Array, body: Callable[[Array, Array, Array, Any], Any], start: Any
) -> Any:
    """Folds `body(group, first row, rows of the group from there, value)` over all blocks.

    They come in the rows' order, so what one writes behind its group's end is written over.
    """
    size = _block_size(rows, sizes.shape[0])
    counts = -(-sizes // size)
    ends, row_ends = (jnp.cumsum(n, dtype=jnp.int32) for n in (counts, sizes))

    def step(number: Array, value: Any) -> Any:
        group = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
        done = (number - (ends[group] - counts[group])) * size
        return body(group, row_ends[group] - sizes[group] + done, sizes[group] - done, value)

    return jax.lax.fori_loop(jnp.int32(0), ends[-1], step, start)


def _padded(x: Array, groups: int) -> Array:
    """With so many rows more that every block is whole."""
    return jnp.pad(x, ((0, _block_size(len(x), groups)), (0, 0)))


def _matrix(kernels: Array | Packed, layer: Array, group: Array, dtype: Any) -> Array:
    if isinstance(kernels, Packed):
        return kernels.at(layer).at(group).unpack(dtype)
    shape = (1, 1, *kernels.shape[2:])
    zero = jnp.zeros((), group.dtype)
    start = (layer.astype(group.dtype), group, zero, zero)
    return jax.lax.dynamic_slice(kernels, start, shape)[0, 0].astype(dtype)


def _multiply(x: Array, kernels: Array, layer: Array, sizes: Array, *, transposed: bool) -> Array:
    groups = kernels.shape[1]
    rows, width = len(x), kernels.shape[2 if transposed else 3]
    size = _block_size(rows, groups)
    wide = _padded(x, groups)

    def body(group: Array, first: Array, _: Array, y: Array) -> Array:
        matrix = _matrix(kernels, layer, group, x.dtype)
        block = jax.lax.dynamic_slice_in_dim(wide, first, size)
        product = jnp.dot(block, matrix.T if transposed else matrix, precision=_precision(x))
        return jax.lax.dynamic_update_slice_in_dim(y, product, first, 0)

    zeros = jnp.zeros((rows + size, width), x.dtype)
    return _each_block(rows, sizes, body, zeros)[:rows]


def _outer(x: Array, dy: Array, kernels: Array, layer: Array, sizes: Array) -> Array:
    """The gradient of the kernels: each group's rows of x times those of dy."""
    groups = kernels.shape[1]
    size = _block_size(len(x), groups)
    wide_x, wide_dy = _padded(x, groups), _padded(dy, groups)
    total = compute_dtype(x.dtype)

    def body(group: Array, first: Array, left: Array, sums: Array) -> Array:
        row = jnp.arange(size, dtype=jnp.int32)[:, None]
        own = jnp.where(row < left, jax.lax.dynamic_slice_in_dim(wide_dy, first, size), 0)
        block = jax.lax.dynamic_slice_in_dim(wide_x, first, size)
        product = jnp.dot(block.T, own, precision=_precision(x), preferred_element_type=total)
        return sums.at[group].add(product)

    sums = _each_block(len(x), sizes, body, jnp.zeros(kernels.shape[1:], total))
    zeros = jnp.zeros(kernels.shape, kernels.dtype)
    return jax.lax.dynamic_update_index_in_dim(zeros, sums.astype(kernels.dtype), layer, 0)


# --- JAX's kernels for Hopper --------------------------------------------------------------------


@jax.custom_vjp
def mosaic_gpu(x: Array, kernels: Array, layer: Array, sizes: Array) -> Array:
    """By JAX's kernel for Hopper; rows beyond the groups are not written."""
    return _mosaic(x, kernels, layer, sizes, transposed=False)


def _mosaic(x: Array, kernels: Array, layer: Array, sizes: Array, *, transposed: bool) -> Array:
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    own = jax.lax.dynamic_index_in_dim(kernels, layer, keepdims=False).astype(x.dtype)
    return ragged_dot_mgpu.ragged_dot(
        x,
        own,
        group_sizes=sizes,
        block_m=TILE,
        block_n=TILE,
        block_k=DEPTH,
        max_concurrent_steps=STAGES,
        grid_block_n=1,
        transpose_rhs=transposed,
    )


def _mosaic_forward(x: Array, kernels: Array, layer: Array, sizes: Array) -> tuple[Array, tuple]:
    return mosaic_gpu(x, kernels, layer, sizes), (x, kernels, layer, sizes)


def _mosaic_backward(saved: tuple, dy: Array) -> tuple[Array, Array, None, None]:
    x, kernels, layer, sizes = map(jnp.asarray, saved)  # JAX may keep a constant as NumPy's
    dx = _mosaic(dy, kernels, layer, sizes, transposed=True)
    return dx, _outer(x, dy, kernels, layer, sizes), None, None


mosaic_gpu.defvjp(_mosaic_forward, _mosaic_backward)

PRODUCTS: dict[str, Product] = {"ragged": ragged, "mosaic_gpu": mosaic_gpu, "blocks": blocks}


# --- few rows ------------------------------------------------------------------------------------


def are_few(rows: int, groups: int) -> bool:
    """Whether `chosen_product` is the way to take: a loop over blocks is faster on a CPU."""
    return 2 * rows <= groups and current_device().platform != "cpu"


def chosen_product(
    x: Float[Array, "rows inputs"],
    kernels: Float[Array, "L E inputs outputs"] | Packed,
    layer: Int[Array, ""],
    groups: Int[Array, " rows"],
) -> Float[Array, "rows outputs"]:
    """Each row times the matrix of its group, of which no other is read; for few rows.

    Args:
        x: in any order. groups: of each row.
        kernels, layer: as for `grouped_product`.
    """
    if current_device().platform == "gpu":
        # One fusion that gathers, multiplies and sums: XLA would write down what a product reads.
        wide = compute_dtype(x.dtype)
        if isinstance(kernels, Packed):  # outputs before inputs
            matrices = kernels[layer, groups].unpack_inner(wide)
            return jnp.sum(x.astype(wide)[:, None, :] * matrices, axis=2).astype(x.dtype)
        matrices = kernels[layer, groups].astype(wide)
        return jnp.sum(x.astype(wide)[:, :, None] * matrices, axis=1).astype(x.dtype)
    product = partial(jnp.dot, precision=_precision(x))
    rows = (
        product(x[row : row + 1], _matrix(kernels, layer, groups[row], x.dtype))
        for row in range(len(x))
    )
    return jnp.concatenate(list(rows))
