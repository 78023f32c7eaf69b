"""The parameter tree, and its one mapping to Hugging Face tensors and back.

Hugging Face keeps one tensor per layer and a linear weight as [out, in]; we stack the layers on a
leading axis and write a kernel as [inputs, outputs] with the heads apart. `TABLE` says both for
every parameter; everything else here follows from it. Parameters are read and written in pieces of
about `PIECE_SIZE` elements, so that the host needs little memory however large the model.
"""

import itertools
import math
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from dca_jax.config import LlamaConfig, LoraConfig, axis_sizes, lora_targets
from dca_jax.errors import InputError, is_out_of_memory
from dca_jax.memory import free_bytes

PIECE_SIZE = 2**24  # elements: 32 MiB of bfloat16
READERS = 2  # threads that read pieces
ALIGNED = 64  # bytes: at a multiple of them JAX takes over a host's array without copying it

# Called after each piece with the parameter's path and the bytes processed.
Progress = Callable[[str, int], None]
# Shardings of arrays: one for all, or a function of the path ("layers.mlp.up_proj.kernel").
Shardings = Sharding | Callable[[str], Sharding] | None
# A function that converts a row's array, keeping the leading axes, and deletes it.
Then = Callable[["Parameter"], Callable[[jax.Array], Any] | None]
# A function that returns a row's array or what replaces it, as it is to lie in memory.
Laid = Callable[["Parameter", Any], Any]


@dataclass(frozen=True)
class Parameter:
    """One row of the table.

    Attributes:
        path: dotted path in our tree.
        name: name of the Hugging Face tensor; "{layer}" and "{expert}" stand for their numbers.
        theirs: axes of the Hugging Face tensor; parentheses mark two of our axes flattened to one.
        ours: axes of our array, without the leading L of the layers; those of experts begin with E,
            along which their tensors are stacked too.
        when: the config's flag that the parameter requires.
        rank: size of the axis R of an adapter.
    """

    path: str
    name: str
    theirs: str
    ours: str
    when: str | None = None
    rank: int = 0

    @property
    def stacked(self) -> bool:
        """Whether our array has a leading axis of layers."""
        return "{layer}" in self.name

    @property
    def leading(self) -> int:
        """Number of leading axes of our array that Hugging Face lacks: L, or L and E."""
        return self.stacked + ("{expert}" in self.name)

    @property
    def axes(self) -> list[str]:
        """The axes of our array that a Hugging Face tensor also has."""
        return self.ours.split()["{expert}" in self.name :]

    @property
    def transposed(self) -> bool:
        """Whether ours is [in, out] where theirs is [out, in]."""
        return self.axes[0] != self.groups[0][0]

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """`theirs`, parsed: "(N H) D" is (("N", "H"), ("D",))."""
        tokens = re.findall(r"\(([^)]*)\)|(\w+)", self.theirs)
        return tuple(tuple((group or single).split()) for group, single in tokens)

    @property
    def inner_order(self) -> tuple[int, ...]:
        """Its axes without leading ones, outputs before inputs, as in Hugging Face."""
        return tuple(self.axes.index(axis) for group in self.groups for axis in group)

    def inner(self, shape: Sequence[int]) -> list[int]:
        """The sizes of one matrix in that order, from the shape of our array or a part of it."""
        return [shape[self.leading + axis] for axis in self.inner_order]

    def sizes(self, config: LlamaConfig) -> dict[str, int]:
        """The size of each of its axis letters."""
        return axis_sizes(config) | {"R": self.rank}

    def shape(self, config: LlamaConfig) -> tuple[int, ...]:
        """Shape of our array, including a leading axis of layers if there is one."""
        sizes = self.sizes(config)
        layers = (len(self.layers(config)),) if self.stacked else ()
        return layers + tuple(sizes[axis] for axis in self.ours.split())

    def layers(self, config: LlamaConfig) -> Sequence[int]:
        """Numbers of the layers that have it, in stacking order."""
        if self.path.startswith("layers.mlp."):
            return config.dense_layers
        if self.path.startswith("layers.experts."):
            return config.sparse_layers
        return range(config.num_hidden_layers)

    def their_shape(self, config: LlamaConfig) -> tuple[int, ...]:
        """Shape of one Hugging Face tensor."""
        sizes = self.sizes(config)
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.groups)

    def abstract(
        self, config: LlamaConfig, dtype: DTypeLike, sharding: Shardings
    ) -> jax.ShapeDtypeStruct:
        """Our array's shape, dtype and sharding; `sharding` None is the first local device."""
        if sharding is None:
            sharding = SingleDeviceSharding(jax.local_devices()[0])
        if not isinstance(sharding, Sharding):
            sharding = sharding(self.path)
        return jax.ShapeDtypeStruct(self.shape(config), jnp.dtype(dtype), sharding=sharding)

    def their_names(self, config: LlamaConfig) -> list[str]:
        """The Hugging Face tensors of our array, by layer, and by expert in each layer."""
        layers = self.layers(config) if self.stacked else (0,)
        experts = range(self.sizes(config)["E"] if "{expert}" in self.name else 1)
        return [self.name.format(layer=n, expert=e) for n in layers for e in experts]

    def tensor_at(self, config: LlamaConfig, index: tuple[slice, ...]) -> int:
        """Which of `their_names` contains the piece at `index` of our array."""
        counts = self.shape(config)[: self.leading]
        number = 0
        for part, count in zip(index[: self.leading], counts, strict=True):
            number = number * count + part.start
        return number

    def place_of(self, config: LlamaConfig, number: int) -> tuple[slice, ...]:
        """The inverse of `tensor_at`: the index of a whole tensor in our array."""
        shape = self.shape(config)
        corner = np.unravel_index(number, shape[: self.leading]) if self.leading else ()
        return (
            *(slice(int(at), int(at) + 1) for at in corner),
            *(slice(0, size) for size in shape[self.leading :]),
        )

    def to_ours(self, theirs: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Our array without its leading axes (a view), from a tensor or a piece of one.

        `sizes` are those of the piece.
        """
        axes = [axis for group in self.groups for axis in group]
        apart = theirs.reshape([sizes[axis] for axis in axes])
        return apart.transpose([axes.index(axis) for axis in self.axes])

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`: our array without leading axes in Hugging Face's layout."""
        own = self.axes
        sizes = dict(zip(own, ours.shape, strict=True))
        flat = [math.prod(sizes[axis] for axis in group) for group in self.groups]
        axes = [axis for group in self.groups for axis in group]
        return ours.transpose([own.index(axis) for axis in axes]).reshape(flat)


# Reads the piece of an array at an index from `pieces`, within one Hugging Face tensor.
Read = Callable[[Parameter, tuple[slice, ...]], np.ndarray]


def _layer(
    module: str, ours: str, theirs: str, their_axes: str, our_axes: str, when: str | None = None
) -> Parameter:
    path, name = f"layers.{module}.{ours}", f"model.layers.{{layer}}.{module}.{theirs}"
    return Parameter(path, name, their_axes, our_axes, when)


def _experts(block: str, gate: str, up: str, down: str, when: str) -> tuple[Parameter, ...]:
    """A family's rows of a mixture; `block` is its module, the others those of an expert."""

    def row(module: str, theirs: str, their_axes: str, our_axes: str) -> Parameter:
        name = f"model.layers.{{layer}}.{block}.{theirs}.weight"
        return Parameter(f"layers.experts.{module}.kernel", name, their_axes, our_axes, when)

    return (
        row("router", "gate", "E D", "D E"),
        row("gate_proj", f"experts.{{expert}}.{gate}", "M D", "E D M"),
        row("up_proj", f"experts.{{expert}}.{up}", "M D", "E D M"),
        row("down_proj", f"experts.{{expert}}.{down}", "D M", "E M D"),
    )


# Hugging Face's axes come before ours.
TABLE = (
    Parameter("embed_tokens.embedding", "model.embed_tokens.weight", "V D", "V D"),
    _layer("input_layernorm", "scale", "weight", "D", "D"),
    _layer("self_attn.q_proj", "kernel", "weight", "(N H) D", "D N H"),
    _layer("self_attn.q_proj", "bias", "bias", "(N H)", "N H", when="qkv_bias"),
    _layer("self_attn.k_proj", "kernel", "weight", "(K H) D", "D K H"),
    _layer("self_attn.k_proj", "bias", "bias", "(K H)", "K H", when="qkv_bias"),
    _layer("self_attn.v_proj", "kernel", "weight", "(K H) D", "D K H"),
    _layer("self_attn.v_proj", "bias", "bias", "(K H)", "K H", when="qkv_bias"),
    _layer("self_attn.o_proj", "kernel", "weight", "D (N H)", "N H D"),
    _layer("self_attn.o_proj", "bias", "bias", "D", "D", when="o_bias"),
    _layer("self_attn.q_norm", "scale", "weight", "H", "H", when="qk_norm"),
    _layer("self_attn.k_norm", "scale", "weight", "H", "H", when="qk_norm"),
    _layer("post_attention_layernorm", "scale", "weight", "D", "D"),
    _layer("mlp.gate_proj", "kernel", "weight", "F D", "D F", when="has_mlp"),
    _layer("mlp.gate_proj", "bias", "bias", "F", "F", when="mlp_bias"),
    _layer("mlp.up_proj", "kernel", "weight", "F D", "D F", when="has_mlp"),
    _layer("mlp.up_proj", "bias", "bias", "F", "F", when="mlp_bias"),
    _layer("mlp.down_proj", "kernel", "weight", "D F", "F D", when="has_mlp"),
    _layer("mlp.down_proj", "bias", "bias", "D", "D", when="mlp_bias"),
    *_experts("mlp", "gate_proj", "up_proj", "down_proj", when="qwen_experts"),
    *_experts("block_sparse_moe", "w1", "w3", "w2", when="mixtral_experts"),
    Parameter("norm.scale", "model.norm.weight", "D", "D"),
    Parameter("lm_head.kernel", "lm_head.weight", "V D", "D V", when="untied"),
)


def parameters(config: LlamaConfig) -> list[Parameter]:
    """The rows of `TABLE` that a model of this config has."""
    return [row for row in TABLE if row.when is None or getattr(config, row.when)]


def count_parameters(config: LlamaConfig, *, active: bool = False) -> int:
    """The number of parameters; with `active`, only those used for one token.

    For a mixture of experts, the latter include only the chosen experts.
    """
    total = 0
    for row in parameters(config):
        count = math.prod(row.shape(config))
        if active and config.mixture is not None and "{expert}" in row.name:
            count = count // config.mixture.num_experts * config.mixture.num_experts_per_tok
        total += count
    return total


def projections(config: LlamaConfig) -> list[Parameter]:
    """A layer's kernels except those of experts; LoRA can adapt these."""
    dense = ("layers.self_attn.", "layers.mlp.")
    kernels = [row for row in parameters(config) if row.path.endswith(".kernel")]
    return [row for row in kernels if row.path.startswith(dense)]


def lora_parameters(config: LlamaConfig, lora: LoraConfig) -> list[Parameter]:
    """A and B of each projection that LoRA adapts, with PEFT's names.

    A has a kernel's inputs and R as axes, B has R and its outputs, each sharded like the kernel.

    Raises:
        InputError: a target that no layer of this model has.
    """
    rows: list[Parameter] = []
    possible = lora_targets(config)
    absent = [name for name in lora.targets if name not in possible]
    if absent:
        raise InputError(
            f"LoRA cannot adapt {', '.join(absent)} of this model, whose layers have experts in "
            f"their place; choose its targets of {', '.join(possible)}"
        )
    for row in projections(config):
        module = row.path.removesuffix(".kernel")
        if module.rpartition(".")[2] not in lora.targets:
            continue
        outs, ins = (" ".join(group) for group in row.groups)
        for ours, theirs, axes, their_axes in (
            ("lora_a", "lora_A", f"{ins} R", f"R ({ins})"),
            ("lora_b", "lora_B", f"R {outs}", f"({outs}) R"),
        ):
            name = f"base_model.model.{row.name.replace('weight', f'{theirs}.weight')}"
            rows.append(Parameter(f"{module}.{ours}", name, their_axes, axes, rank=lora.rank))
    return rows


def pieces(
    row: Parameter, config: LlamaConfig, index: tuple[slice, ...] | None = None
) -> Iterator[tuple[slice, ...]]:
    """Splits our array, or the part `index` of it, into pieces of about `PIECE_SIZE` elements.

    Each is a range of whole rows of one Hugging Face tensor, in order.
    """
    shape = row.shape(config)
    index = index or tuple(slice(0, size) for size in shape)
    bounds = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    steps = piece_shape(row, config)
    starts = [
        range(bound.start, bound.stop, step) for bound, step in zip(bounds, steps, strict=True)
    ]
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, min(start + step, bound.stop))
            for start, step, bound in zip(corner, steps, bounds, strict=True)
        )


def piece_shape(row: Parameter, config: LlamaConfig) -> tuple[int, ...]:
    """Shape of a full piece: as many rows of one Hugging Face tensor as fit."""
    sizes = row.sizes(config)
    rows = row.groups[0][0]
    row_size = math.prod(sizes[axis] for axis in row.axes if axis != rows)
    sizes[rows] = min(sizes[rows], max(1, PIECE_SIZE // row_size))
    return (1,) * row.leading + tuple(sizes[axis] for axis in row.axes)


def abstract_params(
    config: LlamaConfig, *, dtype: DTypeLike, sharding: Shardings = None
) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`s with shardings; nothing is allocated.

    `sharding` None is the first local device.
    """
    leaves = {row.path: row.abstract(config, dtype, sharding) for row in parameters(config)}
    return unflatten_dict(leaves, sep=".")


def contiguous(matrix: np.ndarray) -> np.ndarray:
    """A C-contiguous copy of a transposed matrix, two to four times as fast as NumPy's own.

    It copies 16 columns at a time, so that the data stays in the CPU cache until it is used up.
    """
    copy = np.empty(matrix.shape, matrix.dtype)
    for start in range(0, matrix.shape[1], 16):
        copy[:, start : start + 16] = matrix[:, start : start + 16]
    return copy


def load_tree(
    config: LlamaConfig,
    like: Mapping[str, jax.ShapeDtypeStruct],
    read: Read,
    progress: Progress | None = None,
    *,
    rows: Sequence[Parameter] | None = None,
    then: Then | None = None,
    instead: Callable[[Parameter], Any] | None = None,
    laid: Laid | None = None,
) -> dict[str, Any]:
    """Fills the parameter tree; every device receives the pieces of its own shards.

    Args:
        config: the model's shape.
        like: shape, dtype and sharding of every array, by path.
        read: reads pieces, in the array's dtype.
        progress: function called for every piece.
        rows: the rows of the tree; None for those of `parameters`.
        then: converts an array once it is filled and replaces it, layer by layer for a stack. It
            may apply to some rows only and return None for the others.
        instead: returns a replacement for an array, which is then not read; or None.
        laid: is given each parameter once it is complete, and returns what takes its place.

    Raises:
        InputError: the arrays do not fit into the devices' memory; raised before any is read,
            unless `then` makes them smaller.
    """
    if then is None and not _fits(like):
        raise InputError(_too_large(like))
    leaves: dict[str, Any] = {}
    try:
        for row in parameters(config) if rows is None else rows:
            found = None if instead is None else instead(row)
            if found is None:
                change = None if then is None else then(row)
                load = partial(_load_leaf, row, config, progress=progress)
                if change is None:
                    found = load(like[row.path], read)
                else:
                    found = _load_changed(row, like[row.path], read, load, change)
            leaves[row.path] = found if laid is None else laid(row, found)
    except (MemoryError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError) or not is_out_of_memory(error):
            raise
        raise InputError(_too_large(like)) from error
    return unflatten_dict(leaves, sep=".")


def _fits(like: Mapping[str, jax.ShapeDtypeStruct]) -> bool:
    """Whether the devices of this process have room for their parts, as far as known."""
    needed: Counter[Any] = Counter()
    for leaf in like.values():
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        needed.update(dict.fromkeys(leaf.sharding.addressable_devices, size))
    for device, size in needed.items():
        free = free_bytes(device)
        # The devices of a CPU are one machine.
        if free is not None and (needed.total() if device.platform == "cpu" else size) > free:
            return False
    return True


def _too_large(like: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    leaves = list(like.values())
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    own = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )
    dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
    return (
        f"the weights take {whole / 2**30:.1f} GiB in {dtypes}, {own / 2**30:.1f} GiB of them on "
        "each device, which is more than it has free; choose bfloat16, a mesh of more devices, or "
        "a smaller model"
    )


def _load_changed(
    row: Parameter,
    leaf: jax.ShapeDtypeStruct,
    read: Read,
    load: Callable[[jax.ShapeDtypeStruct, Read], jax.Array],
    change: Callable[[jax.Array], Any],
) -> Any:
    """Loads and converts an array, with at most one layer of the original in memory at a time."""
    if not row.stacked:
        return change(load(leaf, read))
    count, *shape = leaf.shape
    one = jax.ShapeDtypeStruct((1, *shape), leaf.dtype, sharding=leaf.sharding)
    stack: Any = None
    for number in range(count):

        def read_layer(row: Parameter, index: tuple[slice, ...], n: int = number) -> np.ndarray:
            return read(row, (slice(n, n + 1), *index[1:]))

        layer = change(load(one, read_layer))
        if stack is None:
            stack = jax.tree.map(
                lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype, device=x.sharding), layer
            )
        stack = _place_layer(stack, layer, np.int32(number))
        jax.block_until_ready(stack)
    return stack


@partial(jax.jit, donate_argnums=0)
def _place_layer(stack: Any, layer: Any, number: jax.Array) -> Any:
    return jax.tree.map(
        lambda s, x: jax.lax.dynamic_update_slice_in_dim(s, x, number, axis=0), stack, layer
    )


def _load_leaf(
    row: Parameter,
    config: LlamaConfig,
    leaf: jax.ShapeDtypeStruct,
    read: Read,
    progress: Progress | None,
) -> jax.Array:
    # Devices with the same part (replicas) are filled from one read of it.
    devices_of: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    placement = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    for device, index in placement.items():
        parts = zip(index or (), leaf.shape, strict=True)
        bounds = tuple(part.indices(size)[:2] for part, size in parts)
        devices_of.setdefault(bounds, []).append(device)
    shards: dict[Any, Any] = {}
    for bounds, devices in devices_of.items():
        local_shape = tuple(stop - start for start, stop in bounds)
        for device in devices:
            shards[device] = new_buffer(local_shape, leaf.dtype, device)
        part = tuple(slice(start, stop) for start, stop in bounds)
        for index, piece in _read_ahead(partial(read, row), pieces(row, config, part)):
            corner = [own.start - whole.start for own, whole in zip(index, part, strict=True)]
            for device in devices:
                shards[device] = placed(shards[device], piece, corner, device)
            # Without this, pieces would pile up on the host faster than they are transferred.
            jax.block_until_ready([shards[device] for device in devices])
            if progress is not None:
                progress(row.path, piece.nbytes)
        for device in devices:
            shards[device] = jax.device_put(shards[device], device)
    return jax.make_array_from_single_device_arrays(
        leaf.shape, leaf.sharding, [shards[device] for device in placement]
    )


def _read_ahead(
    read: Callable[[tuple[slice, ...]], np.ndarray], indices: Iterable[tuple[slice, ...]]
) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Each index with its piece, in order; the next pieces are read in threads meanwhile."""
    reading: deque[tuple[tuple[slice, ...], Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for index in indices:
            reading.append((index, pool.submit(read, index)))
            if len(reading) > READERS:
                first, piece = reading.popleft()
                yield first, piece.result()
        for rest, piece in reading:
            yield rest, piece.result()


def new_buffer(shape: tuple[int, ...], dtype: Any, device: Any) -> jax.Array | np.ndarray:
    """For pieces to be placed in; a CPU's is an array of the host, which needs no program."""
    if device.platform != "cpu":
        return jnp.zeros(shape, dtype, device=device)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNED, np.uint8)
    first = -memory.ctypes.data % ALIGNED
    return memory[first : first + size].view(dtype).reshape(shape)


def placed[Buffer: (jax.Array, np.ndarray)](
    buffer: Buffer, piece: np.ndarray, corner: Sequence[int], device: Any
) -> Buffer:
    """A device's buffer with a piece written at a corner; the buffer is donated."""
    if isinstance(buffer, np.ndarray):
        buffer[tuple(slice(n, n + size) for n, size in zip(corner, piece.shape, strict=True))] = (
            piece
        )
        return buffer
    # A caller may be inside `jax.set_mesh` of all devices; this concerns one of them.
    with jax.set_mesh(Mesh(np.array([device]), ("device",))):
        return _place(buffer, jax.device_put(piece, device), np.array(corner, np.int32))


@partial(jax.jit, donate_argnums=0)
def _place(buffer: jax.Array, piece: jax.Array, corner: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, piece, list(corner))
