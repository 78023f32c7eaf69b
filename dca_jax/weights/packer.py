"""Packs a model's matrices while loading, on their devices or on the host."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from dca_jax.config import LlamaConfig
from dca_jax.products.packed import (
    FLOAT32,
    SCALE,
    STORED,
    UNPACKED,
    Packed,
    block_sizes,
    check_form,
    pack,
)
from dca_jax.sharding import Shards
from dca_jax.weights.kept import EVERY, Index, Kept, KeptTensor, Scales, integers_of, scale_order
from dca_jax.weights.parameters import Parameter, Read, Then, parameters

ROUTER = "layers.experts.router.kernel"


def matrices(config: LlamaConfig) -> list[Parameter]:
    """The matrices to pack: all except routers, whose choices would change with rounding."""
    return [row for row in parameters(config) if len(row.axes) > 1 and row.path != ROUTER]


def packer(rows: Sequence[Parameter], form: str) -> Then:
    """A `then` function for `dca_jax.weights.parameters.load_tree` that packs parameters.

    It deletes the array. On a mesh the packed matrix has the sharding of the array. Parameters not
    in `rows` stay unchanged.

    Args:
        rows: the parameters to pack: a model's `matrices` or `projections`.
        form: a name in `dca_jax.products.packed.FORMS`.

    Raises:
        InputError: an unknown form.
    """
    check_form(form)
    paths = {row.path for row in rows}

    def packed(row: Parameter, leaf: Array) -> Packed:
        found = jax.block_until_ready(packed_stack(leaf, form, row))
        leaf.delete()
        return found

    return lambda row: partial(packed, row) if row.path in paths else None


def packing(weights: str | None, *, on_cpu: bool) -> tuple[str | None, str | None]:
    """The form for packing weights, and which stay packed (`dca_jax.weights.folder.open_weights`).

    Args:
        weights: as in `dca_jax.load`.

    Raises:
        InputError: an unknown name.
    """
    if weights is None:
        weights = UNPACKED if on_cpu else STORED
    if weights in (STORED, UNPACKED):
        return None, STORED if weights == STORED else None
    check_form(weights)
    return weights, weights


@partial(jax.jit, static_argnames=("form", "row"))
def packed_stack(stack: Array, form: str, row: Parameter) -> Packed:
    """Packs every matrix of a parameter's array; each device packs its part."""
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
    if form == "int8":  # one scale for all inputs, even if they are on several devices
        for entry in inputs:
            axes += () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        inputs = (None,) * num_inputs
    scale = PartitionSpec(*values[:leading], *inputs, *outputs)
    zero = scale if form.startswith("int4") else None
    specs = Packed(values, scale, zero, order, num_inputs)
    return shards.local(local, (spec,), specs)(stack)


# --- on the host --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedOnReading(KeptTensor):
    """A matrix that is packed piece by piece as it is read, bitwise equal to `packer`.

    Attributes:
        name: name of Hugging Face's tensor.
        number: its index among the tensors of the parameter.
        row: the parameter.
        config: the model's shape.
        source: reads pieces of it, in any floating dtype.
        form: a name in `dca_jax.products.packed.FORMS`.
    """

    name: str
    number: int
    row: Parameter
    config: LlamaConfig
    source: Read
    form: str

    @property
    def kept(self) -> Kept:
        """The form in which its weights are packed."""
        kind, blocks = self.form.partition(":")[0], self._blocks
        count = len(self.row.groups[0])
        inputs = EVERY if kind == "int8" else math.prod(blocks[count:])
        scale = SCALE if kind == "int4" else jnp.dtype(FLOAT32)
        return Kept(kind, (math.prod(blocks[:count]), inputs), scale)

    @property
    def _blocks(self) -> tuple[int, ...]:
        shape = self.row.inner(self.row.shape(self.config))
        return block_sizes(self.form, shape, len(self.row.groups[1]))

    def read_packed(self, index: Index, block: tuple[int, int]) -> tuple[np.ndarray, Scales]:
        """A piece of whole rows, heads and blocks, and its scales with the blocks of `kept`."""
        packed, rows = self._packed(index), index[0].stop - index[0].start
        values = np.asarray(packed.values)
        if self.kept.form == "int4":
            values = integers_of(values, self._blocks[-1])
        order = scale_order(0, len(self.row.groups[0]), packed.scale.ndim)

        def turned(part: Array | None) -> np.ndarray | None:
            if part is None:
                return None
            return np.asarray(part).transpose(order).reshape(rows // block[0], -1)

        scale, zero = (turned(part) for part in (packed.scale, packed.zero))
        assert scale is not None
        return values.reshape(rows, -1), Scales(scale, zero)

    def _packed(self, index: Index) -> Packed:
        row = self.row
        first, *rest = row.groups[0]
        head = math.prod(row.sizes(self.config)[axis] for axis in rest)
        place = list(row.place_of(self.config, self.number))
        part = slice(index[0].start // head, index[0].stop // head)
        place[row.leading + row.axes.index(first)] = part
        piece = self.source(row, tuple(place))[(0,) * row.leading]
        return _pack_on_host(piece.transpose(row.inner_order), self.form, len(row.groups[1]))


_pack_on_host = jax.jit(pack, static_argnames=("form", "num_inputs"))


def packed_on_reading(
    row: Parameter, config: LlamaConfig, source: Read, form: str
) -> list[PackedOnReading]:
    """The matrices of a parameter, in Hugging Face's order.

    Raises:
        InputError: int4 with an odd number of inputs.
    """
    check_form(form)
    names = enumerate(row.their_names(config))
    found = [PackedOnReading(name, number, row, config, source, form) for number, name in names]
    block_sizes(form, row.inner(row.shape(config)), len(row.groups[1]))
    return found
