"""Packs a model's matrices one after another, on the devices they lie on, while it is loaded."""

from collections.abc import Sequence
from functools import partial

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from dca_jax.config import LlamaConfig
from dca_jax.products.packed import STORED, UNPACKED, Packed, check_form, pack
from dca_jax.sharding import Shards
from dca_jax.weights.parameters import Parameter, Then, parameters

ROUTER = "layers.experts.router.kernel"


def matrices(config: LlamaConfig) -> list[Parameter]:
    """What is packed of a model: all its matrices but routers, whose choices rounding changes."""
    return [row for row in parameters(config) if len(row.axes) > 1 and row.path != ROUTER]


def packer(rows: Sequence[Parameter], form: str) -> Then:
    """What packs parameters as they come: `then` of `dca_jax.weights.parameters.load_tree`.

    The array is deleted. On a mesh a packed matrix is cut as the array was. All that is not in
    `rows` stays as it is.

    Args:
        rows: of a model, those to pack: its `matrices`, or `projections`.
        form: a name in `dca_jax.products.packed.FORMS`.

    Raises:
        InputError: a name that is none.
    """
    check_form(form)
    paths = {row.path for row in rows}

    def packed(row: Parameter, leaf: Array) -> Packed:
        found = jax.block_until_ready(packed_stack(leaf, form, row))
        leaf.delete()
        return found

    return lambda row: partial(packed, row) if row.path in paths else None


def packing(weights: str | None, *, on_cpu: bool) -> tuple[str | None, str | None]:
    """The form to pack weights in, and which are kept (`dca_jax.weights.folder.open_weights`).

    Args:
        weights: as `dca_jax.load` takes it.

    Raises:
        InputError: a name that is none.
    """
    if weights is None:
        weights = UNPACKED if on_cpu else STORED
    if weights in (STORED, UNPACKED):
        return None, STORED if weights == STORED else None
    check_form(weights)
    return weights, weights


@partial(jax.jit, static_argnames=("form", "row"))
def packed_stack(stack: Array, form: str, row: Parameter) -> Packed:
    """Every matrix of a row's array, packed, each device its own part."""
    shards, leading, order = Shards.of(stack), row.leading, row.inner_order
    turned = [*range(leading), *(leading + axis for axis in order)]
    num_inputs = len(row.groups[1])

    def local(own: Array) -> Packed:
        own = own.transpose(turned)
        shape = own.shape[leading:]
        one = partial(pack, form=form, num_inputs=num_inputs, order=order, axes=axes)
        if leading == 0:
            return one(own)
        flat = jax.lax.map(one, own.reshape(-1, *shape))
        return jax.tree.map(lambda part: part.reshape(*own.shape[:leading], *part.shape[1:]), flat)

    axes: tuple[str, ...] = ()
    if shards.mesh is None:
        return local(stack)
    spec = shards.specs(stack)
    values = PartitionSpec(*(spec[axis] for axis in turned))
    inputs, outputs = values[-num_inputs:], values[leading:-num_inputs]
    if form == "int8":  # one scale for all inputs, on whichever devices they lie
        for entry in inputs:
            axes += () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        inputs = (None,) * num_inputs
    scale = PartitionSpec(*values[:leading], *inputs, *outputs)
    zero = scale if form.startswith("int4") else None
    specs = Packed(values, scale, zero, order, num_inputs)
    return shards.local(local, (spec,), specs)(stack)
