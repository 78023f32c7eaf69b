"""Weights that stay packed as in their file, if `Packed` can represent them.

The file's integers are rearranged and its scales copied, so weights are bit for bit the same, and
no larger. A tensor in a file is [out, in], and a scale belongs to a tile of it. In `Packed` tiles
may be smaller: groups of inputs are split at the ends of heads, at device borders, and at 128; a
scale is then repeated.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Num

from dca_jax.config import LlamaConfig
from dca_jax.errors import InputError
from dca_jax.products.packed import DTYPES, Packed
from dca_jax.weights.parameters import PIECE_SIZE, Parameter, Progress, new_buffer, placed

EVERY = 2**62  # all rows or columns, in the size of a tile
LARGEST = 128  # most inputs or outputs per scale, unless it is for all
Index = tuple[slice, slice]


@dataclass(frozen=True)
class Kept:
    """How the weights of a tensor [out, in] are packed, as `Packed` can hold them.

    Attributes:
        form: int8, int4 or fp8.
        tile: rows and columns per scale.
        scale: dtype of the scales.
        offset: dtype of the offsets that are added, if any; int4 without them has zeros.
    """

    form: str
    tile: tuple[int, int]
    scale: np.dtype
    offset: np.dtype | None = None

    @property
    def has_zeros(self) -> bool:
        """Whether zeros are subtracted."""
        return self.form == "int4" and self.offset is None

    def blocks(self, row: Parameter, own: Sequence[int]) -> tuple[int, ...] | None:
        """Number of elements per scale along each axis of a matrix in `Packed`.

        Args:
            row: the matrix's parameter.
            own: sizes of the matrix or of a device's part; outputs before inputs.

        Returns:
            None if half groups would not fill whole bytes.
        """
        count = len(row.groups[0])
        outputs = _cut(1 if self.tile[0] == EVERY else self.tile[0], own[:count])
        inputs = tuple(own[count:])
        if self.tile[1] < EVERY or self.form == "int4":
            inputs = _cut(self.tile[1], inputs)
        return None if self.form == "int4" and inputs[-1] % 2 else outputs + inputs

    def blocks_of_part(self, row: Parameter, own: Sequence[int]) -> tuple[int, ...]:
        """As `blocks`, for a matrix that can be kept packed.

        Raises:
            InputError: half groups would not fill whole bytes of a device's part.
        """
        blocks = self.blocks(row, own)
        if blocks is None:
            raise InputError(
                f"{row.path} is packed in int4, and a device would have {tuple(own)} of a matrix, "
                "an odd number of inputs; choose another mesh, or unpacked weights"
            )
        return blocks

    def bytes(self, row: Parameter, own: Sequence[int]) -> int:
        """Bytes of a matrix or of a device's part; arguments and errors as in `blocks_of_part`."""
        blocks = self.blocks_of_part(row, own)
        count = math.prod(size // block for size, block in zip(own, blocks, strict=True))
        offset = self.has_zeros if self.offset is None else self.offset.itemsize
        size = math.prod(own) // (2 if self.form == "int4" else 1)
        return size + count * (self.scale.itemsize + offset)

    def name(self, row: Parameter, own: Sequence[int]) -> str:
        """The form as in `Packed.name`; arguments and errors as in `blocks_of_part`."""
        blocks = self.blocks_of_part(row, own)
        whole = self.form == "fp8" or (self.form == "int8" and self.tile[1] == EVERY)
        return self.form if whole else f"{self.form}:{blocks[-1]}"


def _cut(size: int, axes: Sequence[int]) -> tuple[int, ...]:
    """Splits a block of `size` consecutive elements into sizes along each of the axes."""
    blocks, size = [], math.gcd(size, LARGEST) if size > LARGEST else size
    for axis in reversed(axes):
        block = math.gcd(size, axis)
        blocks.append(block)
        size = size // block if block == axis else 1
    return tuple(reversed(blocks))


class Scales(NamedTuple):
    """The scales, and zeros or offsets, of a piece: one number per block."""

    scale: Num[np.ndarray, "rows columns"]
    zero: Num[np.ndarray, "rows columns"] | None = None
    offset: Num[np.ndarray, "rows columns"] | None = None


class KeptTensor:
    """A tensor of a file whose weights can possibly be kept packed.

    Attributes:
        name: its name in messages.
    """

    name: str

    @property
    def kept(self) -> Kept | None:
        """How the weights are packed; None if they are not, or cannot be kept packed."""
        return None

    def read_packed(self, index: Index, block: tuple[int, int]) -> tuple[np.ndarray, Scales]:
        """A piece of the values, and the scales of its blocks.

        Args:
            block: size of a block, which is within one tile.

        Returns:
            Integers (int4 as one per byte of uint8) or float8, and the scales.
        """
        raise NotImplementedError(self.name)


def corners(index: Index, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The first row and the first column of each block of a piece."""
    rows, columns = (
        np.arange(part.start, part.stop, size) for part, size in zip(index, block, strict=True)
    )
    return rows, columns


def sampled(
    read: Callable[[Index], np.ndarray],
    index: Index,
    block: tuple[int, int],
    tile: tuple[int, int],
    shape: tuple[int, int],
) -> np.ndarray:
    """For each block of a piece, the index of its tile in an array of this shape."""
    numbers = [
        np.minimum(at // size, count - 1)
        for at, size, count in zip(corners(index, block), tile, shape, strict=True)
    ]
    bounds = [slice(int(number[0]), int(number[-1]) + 1) for number in numbers]
    found = read((bounds[0], bounds[1]))
    return found[np.ix_(*(number - number[0] for number in numbers))]


def kept_rows(
    rows: Sequence[Parameter], config: LlamaConfig, tensors: Mapping[str, Sequence[KeptTensor]]
) -> dict[str, Kept]:
    """How parameters can be kept packed, by path, if all their tensors are packed alike."""
    found: dict[str, Kept] = {}
    for row in rows:
        kinds = {tensor.kept for tensor in tensors.get(row.path, [])}
        kept = kinds.pop() if len(kinds) == 1 else None
        if kept is not None and kept.blocks(row, row.inner(row.shape(config))) is not None:
            found[row.path] = kept
    return found


# --- onto devices ------------------------------------------------------------------------------


def load_kept(
    row: Parameter,
    config: LlamaConfig,
    tensors: Sequence[KeptTensor],
    sharding: Sharding,
    progress: Progress | None = None,
) -> Packed:
    """Loads a parameter piece by piece, each device's part as given by the sharding.

    Args:
        tensors: all its tensors in order; they are packed alike.
        sharding: sharding of the unpacked array.

    Raises:
        InputError: a scale is NaN or infinite, or devices would split groups.
    """
    kept = tensors[0].kept
    assert kept is not None
    turned = [*range(row.leading), *(row.leading + axis for axis in row.inner_order)]
    shape = row.shape(config)
    own = sharding.shard_shape(shape)
    blocks = kept.blocks_of_part(row, row.inner(own))
    like = _abstract(row, kept, [shape[axis] for axis in turned], blocks, sharding, turned)
    devices_of: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    placement = sharding.addressable_devices_indices_map(shape)
    for device, index in placement.items():
        bounds = [part.indices(n)[:2] for part, n in zip(index or (), shape, strict=True)]
        devices_of.setdefault(tuple(bounds[axis] for axis in turned), []).append(device)
    shards: dict[Any, Packed] = {}
    for bounds, devices in devices_of.items():
        local = [stop - start for start, stop in bounds]

        def empty(leaf: Any, device: Any) -> jax.Array | np.ndarray:
            return new_buffer(leaf.sharding.shard_shape(leaf.shape), leaf.dtype, device)

        for device in devices:
            shards[device] = jax.tree.map(lambda leaf, d=device: empty(leaf, d), like)
        for corner, piece in _pieces(row, config, kept, tensors, bounds, blocks):
            for device in devices:
                shards[device] = _placed(shards[device], piece, corner, local, device)
            jax.block_until_ready([shards[device] for device in devices])
            if progress is not None:
                progress(row.path, sum(part.nbytes for part in jax.tree.leaves(piece)))
        for device in devices:
            shards[device] = jax.device_put(shards[device], device)

    def whole(leaf: jax.ShapeDtypeStruct, *parts: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, list(parts))

    return jax.tree.map(whole, like, *(shards[device] for device in placement))


def _placed(
    shard: Packed, piece: Packed, corner: Sequence[int], sizes: Sequence[int], device: Any
) -> Packed:
    """A device's part with a piece written to its place."""
    order = scale_order(shard.lead, shard.num_inputs, shard.ndim)

    def place[Buffer: (jax.Array, np.ndarray)](
        buffer: Buffer, part: np.ndarray, axes: Sequence[int]
    ) -> Buffer:
        at = zip(buffer.shape, axes, strict=True)
        return placed(buffer, part, [corner[n] * own // sizes[n] for own, n in at], device)

    values = place(shard.values, piece.values, range(shard.ndim))
    others = (replace(each, values=None) for each in (shard, piece))
    return replace(jax.tree.map(partial(place, axes=order), *others), values=values)


def scale_order(lead: int, num_inputs: int, ndim: int) -> list[int]:
    """The axes of values in the order of scales: inputs before outputs."""
    first = ndim - num_inputs
    return [*range(lead), *range(first, ndim), *range(lead, first)]


def _abstract(
    row: Parameter,
    kept: Kept,
    shape: Sequence[int],
    blocks: Sequence[int],
    sharding: Sharding,
    turned: Sequence[int],
) -> Packed:
    """Shape, dtype and sharding of every part; `shape` and `blocks` have outputs before inputs."""
    leading = row.leading
    blocks = (1,) * leading + tuple(blocks)
    counts = [size // block for size, block in zip(shape, blocks, strict=True)]
    order = scale_order(leading, len(row.groups[1]), len(shape))
    places: tuple[Sharding, ...] = sharding, sharding
    if isinstance(sharding, NamedSharding):
        spec = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
        spec = [spec[axis] for axis in turned]
        scales = list(spec)
        if kept.form != "int4" and kept.tile[1] == EVERY:  # one scale for all inputs
            inputs = len(row.groups[1])
            counts[-inputs:], scales[-inputs:] = [1] * inputs, [None] * inputs
        scales = [scales[axis] for axis in order]
        mesh = sharding.mesh
        places = tuple(NamedSharding(mesh, PartitionSpec(*each)) for each in (spec, scales))
    counts = [counts[axis] for axis in order]

    def abstract(sizes: Sequence[int], dtype: Any, place: Sharding = places[1]) -> Any:
        return jax.ShapeDtypeStruct(tuple(sizes), dtype, sharding=place)

    packed = list(shape)
    packed[-1] //= 2 if kept.form == "int4" else 1
    return Packed(
        values=abstract(packed, DTYPES[kept.form], places[0]),
        scale=abstract(counts, kept.scale),
        zero=abstract(counts, jnp.uint8) if kept.has_zeros else None,
        order=row.inner_order,
        num_inputs=len(row.groups[1]),
        offset=None if kept.offset is None else abstract(counts, kept.offset),
    )


def _pieces(
    row: Parameter,
    config: LlamaConfig,
    kept: Kept,
    tensors: Sequence[KeptTensor],
    bounds: Sequence[tuple[int, int]],
    blocks: Sequence[int],
) -> Iterator[tuple[list[int], Packed]]:
    """Each piece of a device's part, and its begin in the part."""
    leading = row.leading
    counts = row.shape(config)[:leading]
    inner = bounds[leading:]
    sizes = [stop - start for start, stop in inner]
    (first, last), step = inner[0], max(1, PIECE_SIZE // math.prod(sizes[1:]) // blocks[0])
    for number in product(*(range(*part) for part in bounds[:leading])):
        tensor = tensors[int(np.ravel_multi_index(number, counts)) if leading else 0]
        before = [n - part[0] for n, part in zip(number, bounds[:leading], strict=True)]
        for start in range(first, last, step * blocks[0]):
            stop = min(start + step * blocks[0], last)
            part = [(start, stop), *inner[1:]]
            piece = read_piece(tensor, kept, row, config, part, blocks)
            piece = jax.tree.map(lambda x: x[(None,) * leading], piece)
            yield [*before, start - first, *(0,) * (len(inner) - 1)], piece


def read_piece(
    tensor: KeptTensor,
    kept: Kept,
    row: Parameter,
    config: LlamaConfig,
    part: Sequence[tuple[int, int]],
    blocks: Sequence[int],
) -> Packed:
    """A part of a tensor in NumPy; all axes after the first of outputs, and inputs, are complete.

    Raises:
        InputError: a scale is NaN or infinite.
    """
    named = row.sizes(config)
    bounds = dict(zip([axis for group in row.groups for axis in group], part, strict=True))
    index = []
    for axis, *rest in row.groups:
        inner = math.prod(named[each] for each in rest)
        index.append(slice(bounds[axis][0] * inner, bounds[axis][1] * inner))
    count = len(row.groups[0])
    flat = (math.prod(blocks[:count]), math.prod(blocks[count:]))
    where = (index[0], index[1])
    sizes = [stop - start for start, stop in part]
    values, scales = tensor.read_packed(where, flat)
    values = values.reshape(sizes)
    if kept.form == "int4":
        values = halves_in_bytes(values, blocks[-1])
    check_finite(tensor.name, values, scales.scale, scales.offset)
    counts = [size // block for size, block in zip(sizes, blocks, strict=True)]
    order = scale_order(0, len(sizes) - count, len(sizes))
    scale, zero, offset = (
        None if each is None else each.reshape(counts).transpose(order) for each in scales
    )
    return Packed(values, scale, zero, row.inner_order, len(row.groups[1]), offset)


def check_finite(name: str, *parts: np.ndarray | None) -> None:
    """Raises InputError if values or scales of the named tensor are NaN or infinite."""
    if not all(part is None or _all_finite(part) for part in parts):
        raise InputError(f"tensor {name} holds nan or inf, or a scale of it is")


def _all_finite(part: np.ndarray) -> bool:
    if part.dtype == ml_dtypes.float8_e4m3fn:  # it has no infinity; this is five times as fast
        return not ((part.view(np.uint8) & 0x7F) == 0x7F).any()
    return np.issubdtype(part.dtype, np.integer) or bool(np.isfinite(part).all())


def halves_in_bytes(values: np.ndarray, group: int) -> np.ndarray:
    """Packs two int4 per byte: a group's first half is in the lower halves of its bytes."""
    parts = values.reshape(*values.shape[:-1], -1, 2, group // 2)
    packed = parts[..., 0, :] | (parts[..., 1, :] << 4)
    return packed.reshape(*values.shape[:-1], -1).astype(np.uint8)


def integers_of(values: Any, group: int) -> Any:
    """The inverse of `halves_in_bytes`: one int4 per byte."""
    parts = values.reshape(*values.shape[:-1], -1, 1, group // 2)
    both = np.concatenate([parts & 15, parts >> 4], axis=-2)
    return both.reshape(*values.shape[:-1], -1)
