"""Memory per device for a model, a mesh and a text length, without loading anything.

Only the model's shape is needed. The sizes of parameters and KV cache, split as in
`dca_jax.sharding`, are exact. The temporary memory of a program is a formula for the arrays that
are alive at the same time in one layer; tests compare it with the compiler's figures.

Prefill and decoding (`dca_jax.inference.generate`): parameters and cache in one dtype, or an 8-bit
cache; the prompt is read in pieces, or at once where `context` splits it. Training: parameters,
gradients and AdamW's two moments in float32 (or bfloat16: `state`), activations in the dtype,
recomputation of what is not saved (`remat`), and the loss over `LOSS_TOKENS` tokens of a text at a
time. With LoRA only the adapters are trained; the base is in the dtype, or its layers' kernels are
int8.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dca_jax.attention.blocks import BLOCK
from dca_jax.attention.sparse import Sparse
from dca_jax.config import LlamaConfig, LoraConfig, axis_sizes
from dca_jax.errors import InputError
from dca_jax.experts import PIECE
from dca_jax.inference.buckets import capacity_bucket
from dca_jax.inference.pieces import ENDS, prompt_pieces
from dca_jax.kv_cache import cache_arrays
from dca_jax.memory import GPU_SHARE
from dca_jax.products.packed import packed_bytes
from dca_jax.sharding import partition
from dca_jax.weights.kept import Kept
from dca_jax.weights.packer import matrices
from dca_jax.weights.parameters import Parameter, lora_parameters, parameters, projections
from dca_jax.weights.placement import parameter_partition

GIB = 2**30
F32 = 4  # bytes
FLOAT32 = jnp.dtype(jnp.float32)
LOSS_TOKENS = 1024  # tokens per row whose logits are in memory at once in training
LONGEST = 2**27  # tokens; no text is longer
# JAX's default share of a GPU's memory, without XLA_CLIENT_MEM_FRACTION. Commands use
# `dca_jax.memory.GPU_SHARE`, which is assumed here.
JAX_SHARE = 0.75


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device, as JAX counts devices.

    Attributes:
        platform: as in JAX, such as "gpu" or "tpu".
        memory: bytes available to programs and their data.
        island: number of devices with fast links to each other; `tensor` should stay within it.
        runtime: bytes besides arrays and temporaries, for library workspaces and code.
        links: additional bytes if several devices exchange data.
        share: share of `memory` that JAX uses by default.
        tiles_again: whether XLA copies the weights of the MLP and o_proj of all layers to another
            tiling at the beginning of each program.
        narrows: whether XLA makes narrow copies of float32 weights for all layers at once.
    """

    name: str
    platform: str
    memory: int
    island: int
    runtime: int
    links: int
    share: float = 1.0
    tiles_again: bool = False
    narrows: bool = False


def _gpu(name: str, gib: float) -> DeviceKind:
    # On one H200 with Llama-2-7B, the peak was 0.45 GB (32k tokens) and 0.6 GB (8k) above the
    # arrays and the largest program's temporaries; on two, 1.3 to 1.4 GB more for both 7B and 70B.
    memory = int(GPU_SHARE * gib * GIB)
    return DeviceKind(
        name, "gpu", memory, 8, 600_000_000, 1_300_000_000, share=JAX_SHARE / GPU_SHARE
    )


def _tpu(name: str, gib: float, *, tiles_again: bool = False) -> DeviceKind:
    # The memory that libtpu 0.0.48 compiles for. All chips of a slice have equal links. The
    # runtime's part, for programs and small arrays, is a guess.
    memory = int(gib * GIB)
    return DeviceKind(
        name, "tpu", memory, 256, 200_000_000, 0, tiles_again=tiles_again, narrows=True
    )


# A v4 or v5p chip is one device, a v7x chip two.
DEVICES: dict[str, DeviceKind] = {
    "h200": _gpu("NVIDIA H200", 139.8),
    "a100-80g": _gpu("NVIDIA A100 80 GB", 79.2),
    "v4": _tpu("TPU v4", 30.75),
    "v5e": _tpu("TPU v5e", 15.75),
    "v5p": _tpu("TPU v5p", 95.73),
    "v6e": _tpu("TPU v6e", 31.24),
    "v7x": _tpu("half a TPU v7x", 94.74, tiles_again=True),
}


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Bytes of one device's memory, at the peak.

    Attributes:
        weights: the parameters.
        copies: copies of parameters that are not used in their stored form.
        cache: keys and values.
        activations: activations of the largest program.
        gradients, optimizer: gradients and AdamW's moments.
        runtime: the device's own part (`DeviceKind`).
    """

    weights: int
    cache: int
    activations: int
    copies: int
    gradients: int
    optimizer: int
    runtime: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model and its task; attributes as in `dca_jax.planning.plan.plan`."""

    config: LlamaConfig
    device: DeviceKind
    context_length: int
    batch: int
    train: bool
    dtype: jnp.dtype
    lora: LoraConfig | None = None
    weights: str | None = None
    kept: Mapping[str, Kept] = field(default_factory=dict)
    remat: str = "attention"
    state: jnp.dtype = FLOAT32
    cache_dtype: jnp.dtype | None = None  # None: `dtype`
    sparse: Sparse | None = None

    @property
    def width(self) -> int:
        """Bytes per element of activations and of weights that are not trained."""
        return self.dtype.itemsize

    @property
    def trained(self) -> list[Parameter]:
        """The parameters with gradients and moments, all in the dtype `state`."""
        if not self.train:
            return []
        if self.lora is None:
            return parameters(self.config)
        return lora_parameters(self.config, self.lora)

    @property
    def frozen(self) -> list[Parameter]:
        """The other parameters."""
        return [] if self.train and self.lora is None else parameters(self.config)

    @property
    def packed(self) -> list[Parameter]:
        """The frozen parameters that are packed."""
        if self.weights is None:
            return [row for row in matrices(self.config) if row.path in self.kept]
        return projections(self.config) if self.train else matrices(self.config)

    def held(self, row: Parameter, sizes: Mapping[str, int]) -> int:
        """Bytes on one device of a parameter that is not trained."""
        spec, shape, _ = _placed(row, self.config, sizes)
        kept = self.kept.get(row.path)
        if kept is None and (self.weights is None or row not in self.packed):
            return self.width * _share(spec, shape, sizes)
        own = [_share(PartitionSpec(cut), (n,), sizes) for cut, n in zip(spec, shape, strict=True)]
        matrix = row.inner(own)
        if kept is not None:
            size = kept.bytes(row, matrix)
        else:
            assert self.weights is not None
            size = packed_bytes(self.weights, matrix, len(row.groups[1]))
        return math.prod(own[: row.leading]) * size

    def usage(self, sizes: Mapping[str, int]) -> Usage:
        """The usage of one device of a mesh that the model can be split over."""
        trained = self.state.itemsize * sum(
            _share(*_placed(row, self.config, sizes)) for row in self.trained
        )
        links = self.device.links if math.prod(sizes.values()) > 1 else 0
        return Usage(
            weights=trained + frozen_bytes(self, sizes),
            cache=0 if self.train else cache_bytes(self, sizes),
            activations=training_bytes(self, sizes) if self.train else prompt_bytes(self, sizes),
            copies=copied_bytes(self, sizes),
            gradients=trained,
            optimizer=2 * trained,
            runtime=self.device.runtime + links,
        )

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether it fits into a device's memory, and its part can be packed."""
        try:
            return self.usage(sizes).total <= self.device.memory
        except InputError:  # int4 with an odd number of inputs
            return False

    def longest(self, sizes: Mapping[str, int]) -> int:
        """The largest `context_length` that fits; 0 if none does."""
        low, high = 0, LONGEST
        while low < high:  # more tokens never take less
            middle = (low + high + 1) // 2
            fits = replace(self, context_length=middle).fits(sizes)
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


# --- bytes of one device -----------------------------------------------------------------------


def frozen_bytes(job: Job, sizes: Mapping[str, int]) -> int:
    """Bytes of weights that are not trained."""
    return sum(job.held(row, sizes) for row in job.frozen)


def active_bytes(job: Job, sizes: Mapping[str, int]) -> int:
    """Bytes of untrained weights that generating one token of one text reads on this device."""
    total, mixture = 0, job.config.mixture
    for row in job.frozen:
        share = job.held(row, sizes)
        if row.path == "embed_tokens.embedding" and not job.config.tie_word_embeddings:
            share //= job.config.vocab_size  # only a row of it
        if mixture is not None and "{expert}" in row.name:
            most = mixture.num_experts_per_tok * sizes["fsdp"]  # all may lie on one device
            share = share * min(most, mixture.num_experts) // mixture.num_experts
        total += share
    return total


def cache_bytes(job: Job, sizes: Mapping[str, int]) -> int:
    """Bytes of keys and values as in `KVCache.create`, with exactly the slots that texts need.

    This includes the scales of an 8-bit cache. If memory is free, `inference.buckets` may round the
    cache up to 1/16 of it.
    """
    capacity = capacity_bucket(job.context_length, sizes["context"])
    batch = _rows(job, sizes) * sizes["data"] * sizes["fsdp"]
    dtype = job.cache_dtype or job.dtype
    arrays = cache_arrays(job.config, batch=batch, capacity=capacity, dtype=dtype, sizes=sizes)
    return sum(
        each.itemsize * _share(partition(letters, shape, sizes), shape, sizes)
        for letters, shape, each in arrays.values()
    )


def prompt_bytes(job: Job, sizes: Mapping[str, int]) -> int:
    """Activations for reading a prompt (a piece, or a share of the whole), or for decoding.

    This includes a layer's keys and values in the dtype for reading, if the cache has another.
    """
    rows, context = _rows(job, sizes), sizes["context"]
    pieces = partial(
        prompt_pieces, job.config, job.device.platform, packed=bool(job.weights or job.kept)
    )
    if context > 1:
        tokens = rows * capacity_bucket(job.context_length, context) // context
    elif math.prod(sizes.values()) > 1:
        batch = rows * sizes["data"] * sizes["fsdp"]
        tokens = rows * pieces(batch=batch).widest(job.context_length)
    else:  # one row at a time, then the ends of all rows
        tokens = max(pieces().widest(job.context_length), rows * ENDS)
    layer = job.width * tokens * max(_mlp(job.config, sizes), _attention(job.config, sizes))
    layer = max(layer, _experts(job, sizes, tokens, *EXPERTS_FORWARD))
    if context == 1 and job.cache_dtype not in (None, job.dtype):
        read = rows if math.prod(sizes.values()) > 1 else 1
        slots = read * capacity_bucket(job.context_length)
        layer += 2 * job.width * slots * _head_sizes(job.config, sizes)[1]
    logits = 2 * F32 * job.batch * job.config.vocab_size  # of one token, on every device
    return max(layer + choosing_bytes(job, sizes, tokens), logits)


def choosing_bytes(job: Job, sizes: Mapping[str, int], tokens: int) -> int:
    """Bytes for block selection in sparse prefill: a number for each row and block.

    It counts the rows that represent a tile, for all heads, in units of 64 as in Hopper's kernel.
    """
    if job.sparse is None or job.context_length <= job.sparse.threshold:
        return 0
    query, key = (size // job.config.head_dim for size in _head_sizes(job.config, sizes))
    tiles, blocks = -(-tokens // BLOCK), -(-capacity_bucket(job.context_length) // BLOCK)
    units = -(-job.sparse.selector.rows_of_tile * (query // key) // 64)
    return F32 * tiles * key * units * 64 * blocks


def training_bytes(job: Job, sizes: Mapping[str, int]) -> int:
    """Activations of a training step: saved values per layer, one layer's backward, the loss.

    Or the random bits for rounding the largest array of a bfloat16 state, if those are larger.
    """
    config, rows, context = job.config, _rows(job, sizes), sizes["context"]
    length = -(-job.context_length // (2 * context)) * 2
    hidden = job.width * rows * length * config.hidden_size
    backward = job.width * rows * length * _backward(config, sizes)
    if config.mixture is not None:
        experts = _experts(job, sizes, rows * length, *EXPERTS_BACKWARD)
        backward = max(backward, experts + F32 * _largest_expert_share(job, sizes))
    logits = 2 * F32 * rows * min(length, LOSS_TOKENS) * config.vocab_size // sizes["tensor"]
    query, key = _head_sizes(config, sizes)
    kept = hidden  # the layer's input
    if job.remat != "layer":  # the attention output, with the log-sum-exp
        kept += rows * length * (job.width * query + F32 * query // config.head_dim)
    if job.remat == "products":  # the outputs of q, k, v and o_proj
        kept += hidden + job.width * rows * length * (query + 2 * key)
    products = 0
    if job.remat == "products" and config.has_mlp:  # and of gate and up, but not of experts
        wide = 2 * config.intermediate_size // sizes["tensor"]
        products = len(config.dense_layers) * job.width * rows * length * wide
    bits = 0
    if job.state.itemsize < F32:
        bits = F32 * max(_share(*_placed(row, config, sizes)) for row in job.trained)
    layers = config.num_hidden_layers * kept + products
    return max(layers + max(backward, logits + 2 * hidden), bits)


def copied_bytes(job: Job, sizes: Mapping[str, int]) -> int:
    """Bytes of a layer's weights, or of a table, in the form used for multiplication.

    It differs from the stored form if `fsdp` splits them, or if they are float32 or packed.
    """
    layer, tables, tiled, narrow = 0, [0], 0, 0
    whole = dict(sizes) | {"fsdp": 1}
    # In the stored form, and in the form for multiplication.
    state = job.state.itemsize
    multiplied = job.width if state == job.width else 2 * job.width  # including gradients
    packed = job.packed
    if not job.config.tie_word_embeddings:  # of the embedding table only rows are unpacked
        packed = [row for row in packed if row.path != "embed_tokens.embedding"]
    stored = [
        (row, state * _share(*_placed(row, job.config, whole)), multiplied) for row in job.trained
    ]
    stored += [(row, job.held(row, whole), job.width * (row in packed)) for row in job.frozen]
    if job.device.narrows and job.width < state:
        stacked = (row for row in job.trained if row.stacked)
        narrow = job.width * sum(_share(*_placed(row, job.config, sizes)) for row in stacked)
    for row, held, multiplied in stored:
        if "{expert}" in row.name:  # never gathered; a layer's experts are copied out of the stack
            share = _share(*_placed(row, job.config, sizes))
            layer += share * (multiplied or job.width) // len(row.layers(job.config))
            continue
        share = _share(*_placed(row, job.config, whole))
        size = share * multiplied + (held if sizes["fsdp"] > 1 else 0)  # gathered
        if row.stacked:
            layer += size // len(row.layers(job.config))
        else:
            tables.append(size)
        moved = "mlp" in row.path or "o_proj" in row.path
        if job.device.tiles_again and moved and not multiplied:
            tiled += held // sizes["fsdp"]
    return max(layer, *tables) + tiled + narrow


def _mlp(config: LlamaConfig, sizes: Mapping[str, int]) -> int:
    """Elements per token: the residual stream, its norm, gate, up and their product."""
    wide = config.intermediate_size if config.has_mlp else 0
    return 2 * config.hidden_size + 3 * wide // sizes["tensor"]


# Arrays per chosen expert, in D and in M: its row, its result, and the result in token order; gate,
# up and their product. In the backward pass also their gradients.
EXPERTS_FORWARD, EXPERTS_BACKWARD = (3, 3), (6, 8)


def _experts(job: Job, sizes: Mapping[str, int], tokens: int, rows: int, inner: int) -> int:
    """Bytes of a mixture: the residual stream and its norm; all choices of `PIECE` tokens."""
    config, mixture = job.config, job.config.mixture
    if mixture is None:
        return 0
    tokens *= sizes["fsdp"]  # every device of fsdp has the tokens of all
    inner *= mixture.moe_intermediate_size // sizes["tensor"]
    choices = mixture.num_experts_per_tok * min(tokens, PIECE)
    stream = 3 * config.hidden_size * tokens
    return job.width * (stream + choices * (rows * config.hidden_size + inner))


def _largest_expert_share(job: Job, sizes: Mapping[str, int]) -> int:
    """Elements of one projection of one layer's experts on a device."""
    rows = (row for row in parameters(job.config) if "{expert}" in row.name)
    return max(
        _share(*_placed(row, job.config, sizes)) // len(row.layers(job.config)) for row in rows
    )


def _attention(config: LlamaConfig, sizes: Mapping[str, int]) -> int:
    """Elements per token: residual stream, queries in three rotations, keys, values, output."""
    query, key = _head_sizes(config, sizes)
    held = config.hidden_size + 4 * query + 2 * key
    # In ring attention: keys and values twice in transit, float32 sums, and a block's sums to
    # merge.
    return held if sizes["context"] == 1 else held + 4 * key + 3 * query


def _backward(config: LlamaConfig, sizes: Mapping[str, int]) -> int:
    """Elements per token in the backward pass of an MLP: recomputed values and gradients."""
    query, key = _head_sizes(config, sizes)
    # The residual stream twice, its norms and gradient; gate, silu, up, their product and four
    # gradients.
    inner = config.intermediate_size if config.has_mlp else 0
    stream, wide = 5 * config.hidden_size, 8 * inner // sizes["tensor"]
    return stream + 2 * query + 2 * key + wide


def _head_sizes(config: LlamaConfig, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Elements per token of a device's query heads, and of its kv heads."""
    tensor, found = sizes["tensor"], axis_sizes(config)
    return found["N"] * found["H"] // tensor, max(found["K"], tensor) * found["H"] // tensor


def _rows(job: Job, sizes: Mapping[str, int]) -> int:
    """Number of texts of the batch on a device, including padding rows."""
    return -(-job.batch // (sizes["data"] * sizes["fsdp"]))


def _placed(
    row: Parameter, config: LlamaConfig, sizes: Mapping[str, int]
) -> tuple[PartitionSpec, tuple[int, ...], Mapping[str, int]]:
    return parameter_partition(row, config, sizes), row.shape(config), sizes


def _share(spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> int:
    """Elements of an array on one device."""
    entries = (axes if isinstance(axes, tuple) else (axes,) for axes in spec if axes is not None)
    return math.prod(shape) // math.prod(sizes[axis] for axes in entries for axis in axes)
