"""Products of few rows with chosen matrices, reading only those, as in decoding.

The time is that of reading the matrices, with the kernels of `dca_jax.products` on NVIDIA GPUs from
Ampere on; XLA would write out the gathered matrices and read them again.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dca_jax.device import current_device
from dca_jax.dtypes import compute_dtype
from dca_jax.grouped.blocks import matrix_of, precision
from dca_jax.products import few_rows
from dca_jax.products.packed import Packed
from dca_jax.products.row_products import can_multiply, row_products


def are_few(rows: int, groups: int) -> bool:
    """Whether to use `chosen_products`; on a CPU a loop over blocks is faster."""
    return 2 * rows <= groups and current_device().platform != "cpu"


def chosen_products(
    x: Float[Array, "rows inputs"],
    stacks: tuple[Float[Array, "L E inputs outputs"] | Packed, ...],
    layer: Int[Array, ""],
    groups: Int[Array, " rows"],
) -> tuple[Float[Array, "rows outputs"], ...]:
    """Each row times the matrix of its group in each stack; sums are at least float32.

    Args:
        x: rows in any order.
        groups: the group of each row.
        stacks: stacks of equal shape, packed or not.
        layer: index in each stack.
    """
    flat = [_flat(kernels) for kernels in stacks]
    numbers = layer * stacks[0].shape[1] + groups
    packed = [kernels for kernels in flat if isinstance(kernels, Packed)]
    found = None
    if len(packed) == len(flat):
        found = _packed_rows(x, packed, numbers)
    elif not packed and can_multiply(x, flat):
        found = row_products(x, flat, numbers)
    if found is not None:
        return tuple(sums.astype(x.dtype) for sums in found)
    product = functools.partial(jnp.dot, precision=precision(x))

    def by_row(kernels: Array | Packed) -> Array:
        rows = (
            product(x[row : row + 1], matrix_of(kernels, layer, groups[row], x.dtype))
            for row in range(len(x))
        )
        return jnp.concatenate(list(rows))

    return tuple(map(by_row, stacks))


def _flat(kernels: Any) -> Any:
    """A stack of the matrices of all layers and groups."""
    return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), kernels)


def _packed_rows(
    x: Array, stacks: list[Packed], numbers: Int[Array, " rows"]
) -> tuple[Array, ...] | None:
    """The products with packed matrices on a GPU, as sums; None elsewhere."""
    if few_rows.has_kernel(x.dtype):
        launches = [stacks] if few_rows.alike(stacks) else [[stack] for stack in stacks]
        tiled = [(some, few_rows.choose_tile(some, len(x))) for some in launches]
        found = [few_rows.multiply_chosen(x, some, numbers, tile) for some, tile in tiled if tile]
        if len(found) == len(launches):
            return tuple(itertools.chain(*found))
    if current_device().platform == "gpu":
        return tuple(_unpacked_sums(x, stack, numbers) for stack in stacks)
    return None


def _unpacked_sums(x: Array, stack: Packed, numbers: Array) -> Array:
    """The sums from one fusion that gathers, unpacks, multiplies and sums."""
    wide = compute_dtype(x.dtype)
    matrices = stack[numbers].unpack_inner(wide)  # outputs before inputs
    return jnp.sum(x.astype(wide)[:, None, :] * matrices, axis=2)
