"""How int4 kernels lie in a TPU's memory: as the programs for decoding read them."""

from dataclasses import replace
from typing import Any

import jax
from jax.experimental.layout import Format, Layout

from dca_jax.products.packed import Packed, is_packed
from dca_jax.weights.parameters import Parameter


def laid_out(row: Parameter, leaf: Any) -> Any:
    """A parameter as it is to lie on its devices; only int4 kernels on TPUs are moved.

    Args:
        leaf: the parameter's array or packed matrix; if it is moved, its old values are deleted.
    """
    if not is_packed(leaf) or platform(leaf) != "tpu":
        return leaf
    layout = values_layout(row, leaf)
    if layout is None:
        return leaf
    place = Format(layout, leaf.values.sharding)
    return replace(leaf, values=jax.device_put(leaf.values, place, donate=True))


def values_layout(row: Parameter, matrix: Packed) -> Layout | None:
    """The layout in which XLA reads a packed matrix's values when decoding; None is the default.

    For int4 kernels the last axis of outputs is innermost, as in the scales. With the default
    layout, a program for decoding begins with a copy of the values of all layers (docs/lab/tpu.md).
    The table of embeddings, whose rows are looked up, and the stacks of experts keep the default.
    """
    is_expert = row.path.startswith("layers.experts.")
    if matrix.form != "int4" or is_expert or not row.path.endswith(".kernel"):
        return None
    first = matrix.ndim - matrix.num_inputs  # the first axis of inputs
    return Layout((*range(first - 1), *range(first, matrix.ndim), first - 1))


def platform(matrix: Packed) -> str:
    """The kind of device that it is on."""
    return next(iter(matrix.values.sharding.device_set)).platform
