"""Packs a model's matrices one after another, on the devices they lie on, while it is loaded."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from dca_jax.config import LlamaConfig
from dca_jax.packed_weights import Packed, block_sizes, check_form, pack
from dca_jax.sharding import Shards
from dca_jax.weights.parameters import Parameter, parameters

ROUTER = "layers.experts.router.kernel"


def matrices(config: LlamaConfig) -> list[Parameter]:
    """What is packed of a model: all its matrices but routers, whose choices rounding changes."""
    return [row for row in parameters(config) if len(row.axes) > 1 and row.path != ROUTER]


def packer(
    rows: Sequence[Parameter], form: str
) -> Callable[[Parameter, Array], dict[str, Array | Packed]]:
    """What packs parameters as they come: `then` of `dca_jax.weights.folder.load_weights`.

    The array is deleted, so that no more than one is held unpacked. On a mesh a packed matrix is
    cut as the array was. All that is not in `rows` stays as it is.

    Args:
        rows: of a model, those to pack: its `matrices`, or `projections`.
        form: a name in `dca_jax.packed_weights.FORMS`.

    Raises:
        InputError: a name that is none.
    """
    check_form(form)
    paths = {row.path for row in rows}

    def packed(row: Parameter, leaf: Array) -> dict[str, Array | Packed]:
        if row.path not in paths:
            return {row.path: leaf}
        found = jax.block_until_ready(packed_stack(leaf, form, row.leading, input_axes(row)))
        leaf.delete()
        return {row.path: found}

    return packed


def input_axes(row: Parameter) -> tuple[int, ...]:
    """The axes of a row's matrix, without those that stack it, that a product sums over."""
    return tuple(row.axes.index(axis) for axis in row.groups[1])


@partial(jax.jit, static_argnums=(1, 2, 3))
def packed_stack(stack: Array, form: str, leading: int, inputs: tuple[int, ...]) -> Packed:
    """Every matrix of a stack, each device its own part."""
    shards = Shards.of(stack)

    def local(own: Array) -> Packed:
        shape = own.shape[leading:]
        one = partial(pack, form=form, blocks=block_sizes(form, shape, inputs), axes=axes)
        if leading == 0:
            return one(own)
        flat = jax.lax.map(one, own.reshape(-1, *shape))
        return jax.tree.map(lambda part: part.reshape(*own.shape[:leading], *part.shape[1:]), flat)

    axes: tuple[str, ...] = ()
    if shards.mesh is None:
        return local(stack)
    spec = shards.specs(stack)
    scale = spec
    if form == "int8":  # one for all inputs, on whichever devices they lie
        cuts: list[Any] = list(spec)
        for axis in inputs:
            entry, cuts[leading + axis] = cuts[leading + axis], None
            axes += () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        scale = PartitionSpec(*cuts)
    offset = scale if form.startswith("int4") else None
    return shards.local(local, (spec,), Packed(spec, scale, offset))(stack)
