"""A decoder layer's modules, each with the parameters of all layers stacked on a leading axis.

Shapes are those of `dca_jax.model`.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dca_jax.config import LlamaConfig, LoraConfig
from dca_jax.device import current_device
from dca_jax.experts import Experts, Routing
from dca_jax.products.packed import is_packed
from dca_jax.products.packed_product import packed_product, packed_products
from dca_jax.products.row_products import can_multiply, row_products
from dca_jax.sharding import Shards

# From one layer's query [B,T,N,H], key and value [B,T,K,H] to the attention output [B,T,N,H].
Attend = Callable[[Array, Array, Array], Array]

ROWS = 8  # rows to which a product with one row is padded
SMALL = 48 * 2**20  # bytes; cuBLAS reads kernels up to this size far below the memory bandwidth
PRODUCT = "product"  # the name of a `Linear`'s result, for policies of `jax.checkpoint`


class Linear(nnx.Module):
    """y = einsum(x, kernel) + bias, in the dtype of x; batch and tokens stay sharded as in x.

    It is called with the letters of the input's and the output's axes after batch and tokens: ("D",
    "NH") maps [B, T, D] to [B, T, N, H].

    The kernel may be a packed matrix. With LoRA (arXiv 2106.09685), in float32, y = einsum(x,
    kernel) + alpha / rank (x lora_a) lora_b. A kernel that is not trained has no gradient.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        bias: bool = False,
        lora: LoraConfig | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kernel = layers + inputs + outputs
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), kernel, dtype))
        self.bias = nnx.Param(jnp.zeros(layers + outputs, dtype)) if bias else None
        a: Any = None
        b: Any = None
        if lora is not None:
            # The authors' code and PEFT also draw A from this range; with B = 0, y equals the base
            # model's.
            shape, bound = (*layers, *inputs, lora.rank), math.prod(inputs) ** -0.5
            a = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))
            b = nnx.Param(jnp.zeros((*layers, lora.rank, *outputs), jnp.float32))
        self.lora, self.lora_a, self.lora_b = lora, a, b

    def __call__(
        self, x: Array, inputs: str, outputs: str, layer: Int[Array, ""] | None = None
    ) -> Array:
        """Maps [B, T, *inputs] to [B, T, *outputs].

        With `layer`, a kernel that `stays_whole` is the whole stack instead of this layer's slice.
        """
        return project(x, inputs, [(self, outputs)], layer)[0]

    def multiply(self, x: Array, inputs: str, outputs: str) -> Array:
        """x times this layer's kernel."""
        kernel, subscripts = self.kernel[...], f"BT{inputs},{inputs}{outputs}->BT{outputs}"
        if is_packed(kernel):
            return packed_product(subscripts, x, kernel)
        kernel = Shards.of(kernel).gathered(kernel.astype(x.dtype))  # cast before the transfer
        return self._product(subscripts, x, kernel)

    def finished(self, x: Array, y: Array, inputs: str, outputs: str) -> Array:
        """y = einsum(x, kernel) plus LoRA's term and the bias."""
        if self.lora is not None:
            a, b = (Shards.of(w).gathered(w) for w in (self.lora_a[...], self.lora_b[...]))
            low = self._product(f"BT{inputs},{inputs}R->BTR", x, a)
            low = checkpoint_name(low * self.lora.scale, PRODUCT)
            y += self._product(f"BTR,R{outputs}->BT{outputs}", low, b)
        if self.bias is not None:
            bias = self.bias[...].astype(x.dtype)
            y += bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return checkpoint_name(y, PRODUCT)

    def _product(self, subscripts: str, x: Array, kernel: Array) -> Array:
        # A float32 model computes in float32 on every device; bfloat16 products sum in float32
        # anyway.
        precision = "highest" if x.dtype == jnp.float32 else None
        shards = Shards.of(self.kernel[...])
        kernel = kernel.astype(x.dtype)
        place = shards.product(subscripts, x, kernel)
        tokens = x.shape[1]
        if self._is_one_row(x, shards):
            x = jnp.pad(x, ((0, 0), (0, ROWS - 1)) + ((0, 0),) * (x.ndim - 2))
        y = jnp.einsum(subscripts, x, kernel, precision=precision, out_sharding=place)
        return y[:, :tokens]

    @staticmethod
    def _is_one_row(x: Array, shards: Shards) -> bool:
        """Whether to pad one row to eight, on a GPU.

        For one row and a small kernel, XLA writes out all products before it adds them up. For
        eight rows it calls cuBLAS, which reads the kernel once and in place. This does not apply
        where devices sum partial results, because they would transfer eight rows.
        """
        if x.shape[:2] != (1, 1) or current_device().platform != "gpu":
            return False
        return shards.size("tensor") == 1 or not any(jax.typeof(x).sharding.spec[2:])


def project(
    x: Array,
    inputs: str,
    linears: Sequence[tuple[Linear, str]],
    layer: Int[Array, ""] | None = None,
) -> list[Array]:
    """Applies several `Linear`s to the same x, in one kernel launch if that is faster.

    Args:
        linears: the modules with the letters of their outputs.
        layer: as in `Linear`.
    """
    products: dict[int, Array] = {}
    kernels = {number: linear.kernel[...] for number, (linear, _) in enumerate(linears)}
    stacks = {n: k for n, k in kernels.items() if is_packed(k)}
    if stacks and layer is not None:
        subscripts = [f"BT{inputs},{inputs}{linears[n][1]}->BT{linears[n][1]}" for n in stacks]
        found = packed_products(subscripts, x, list(stacks.values()), layer)
        products |= zip(stacks, found, strict=True)
    rows = {
        n: kernel
        for n, kernel in kernels.items()
        if n not in products and kernel.ndim > len(inputs + linears[n][1])
    }
    if rows:
        assert layer is not None  # stacks exist only with a layer number
        flat = [kernel.reshape(len(kernel), x[0, 0].size, -1) for kernel in rows.values()]
        found = row_products(x.reshape(1, -1), flat, layer[None])
        for (n, kernel), y in zip(rows.items(), found, strict=True):
            shape = kernel.shape[1 + len(inputs) :]
            products[n] = y.astype(x.dtype).reshape(1, 1, *shape)
    for n, (linear, outputs) in enumerate(linears):
        if n not in products:
            products[n] = linear.multiply(x, inputs, outputs)
    return [
        linear.finished(x, products[n], inputs, outputs)
        for n, (linear, outputs) in enumerate(linears)
    ]


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis; the mean square is float32 (arXiv 1910.07467)."""

    def __init__(self, shape: tuple[int, ...], epsilon: float, *, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones(shape, dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rest D"]) -> Float[Array, "*rest D"]:
        """Normalizes x; the result has the dtype of x."""
        full = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(full), axis=-1, keepdims=True)
        normed = (full * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
        scale = self.scale[...].astype(x.dtype)
        return normed * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


class Attention(nnx.Module):
    """The projections around attention; the caller supplies the attention function.

    In families with QK norm, queries and keys are normalized here, before they are rotated.
    """

    def __init__(
        self, config: LlamaConfig, linear: Callable[..., Linear], norm: Callable[..., RMSNorm]
    ) -> None:
        D, H = config.hidden_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = linear("q_proj", (D,), (N, H), bias=config.qkv_bias)
        self.k_proj = linear("k_proj", (D,), (K, H), bias=config.qkv_bias)
        self.v_proj = linear("v_proj", (D,), (K, H), bias=config.qkv_bias)
        self.o_proj = linear("o_proj", (N, H), (D,), bias=config.o_bias)
        self.q_norm = norm(H) if config.qk_norm else None
        self.k_norm = norm(H) if config.qk_norm else None

    def __call__(
        self, x: Float[Array, "B T D"], attend: Attend, layer: Int[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """The attention block's output; `layer` as in `Linear`."""
        projections = (self.q_proj, "NH"), (self.k_proj, "KH"), (self.v_proj, "KH")
        query, key, value = project(x, "D", projections, layer)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return self.o_proj(attend(query, key, value), "NH", "D", layer)


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, linear: Callable[..., Linear]) -> None:
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = linear("gate_proj", (D,), (F,), bias=config.mlp_bias)
        self.up_proj = linear("up_proj", (D,), (F,), bias=config.mlp_bias)
        self.down_proj = linear("down_proj", (F,), (D,), bias=config.mlp_bias)

    def __call__(
        self, x: Float[Array, "B T D"], layer: Int[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """Applies the MLP to each token; `layer` as in `Linear`."""
        gate, up = project(x, "D", [(self.gate_proj, "F"), (self.up_proj, "F")], layer)
        return self.down_proj(jax.nn.silu(gate) * up, "F", "D", layer)


class Place(NamedTuple):
    """A layer's index in the stacks of attention, and its index in those of the MLP or experts."""

    attention: Int[Array, ""]
    feed_forward: Int[Array, ""]


class Block(NamedTuple):
    """Stacked layers of one kind; inside the scan, a slice of it is one decoder layer."""

    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    feed_forward: MLP | Experts | None

    def __call__(
        self, x: Float[Array, "B T D"], attend: Attend, place: Place | None = None
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """The layer's output, and the result of its router if it has one.

        With `place`, packed kernels and experts are whole stacks instead of this layer's slices,
        and `place` has the layer's indices in them.
        """
        attention, number = (None, None) if place is None else place
        with jax.named_scope("self_attn"):
            x = x + self.self_attn(self.input_layernorm(x), attend, attention)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.feed_forward, Experts):
            with jax.named_scope("experts"):
                y, routing = self.feed_forward(normed, number)
                return x + y, routing
        assert self.feed_forward is not None
        with jax.named_scope("mlp"):
            return x + self.feed_forward(normed, number), None


class Run(NamedTuple):
    """Layers [start, stop), all of one kind.

    Attributes:
        whole: the stacks of all layers.
        start, stop: the range of layer numbers.
        first: index of the first one in the stack of MLPs or experts.
    """

    whole: Block
    start: int
    stop: int
    first: int

    @property
    def numbers(self) -> Int[Array, " n"]:
        """The numbers of these layers among all layers."""
        return jnp.arange(self.start, self.stop, dtype=jnp.int32)

    def place(self, number: Int[Array, ""]) -> Place:
        """A layer's numbers."""
        return Place(number, number + (self.first - self.start))

    @property
    def block(self) -> Block:
        """The stacks of only these layers."""
        last = self.first + self.stop - self.start
        return self._common._replace(feed_forward=_part(self.whole.feed_forward, self.first, last))

    def sliced(self, rows: int) -> Block:
        """`block` without parts that are read in place in a stack: experts, and `stays_whole`."""
        block = self._common if isinstance(self.whole.feed_forward, Experts) else self.block

        def part(path: Any, leaf: Any) -> Any:
            return None if stays_whole(path, leaf, rows) else leaf

        return jax.tree_util.tree_map_with_path(part, block, is_leaf=is_packed)

    def with_stacks(self, sliced: Block, rows: int) -> Block:
        """A slice of `sliced`, with whole stacks in place of the parts that it lacks."""
        block = self.whole
        if isinstance(block.feed_forward, Experts):
            sliced = sliced._replace(feed_forward=block.feed_forward)

        def part(path: Any, whole: Any, own: Any) -> Any:
            return whole if stays_whole(path, whole, rows) else own

        return jax.tree_util.tree_map_with_path(part, block, sliced, is_leaf=is_packed)

    @property
    def _common(self) -> Block:
        return _part(self.whole._replace(feed_forward=None), self.start, self.stop)


class Layers(nnx.Module):
    """All pre-norm decoder layers: attention, and an MLP or a mixture of experts."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        lora: LoraConfig | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        L, D = config.num_hidden_layers, config.hidden_size

        def linear(name: str, *shape: Any, layers: int = L, bias: bool = False) -> Linear:
            adapter = lora if lora is not None and name in lora.targets else None
            options = {"lora": adapter, "dtype": dtype, "rngs": rngs}
            return Linear((layers,), *shape, bias=bias, **options)

        def norm(width: int) -> RMSNorm:
            return RMSNorm((L, width), config.rms_norm_eps, dtype=dtype)

        self.sparse = config.sparse_layers
        self.input_layernorm = norm(D)
        self.self_attn = Attention(config, linear, norm)
        self.post_attention_layernorm = norm(D)
        dense = partial(linear, layers=len(config.dense_layers))
        self.mlp = MLP(config, dense) if config.has_mlp else None
        self.experts = Experts(config, dtype=dtype, rngs=rngs) if self.sparse else None

    def runs(self) -> Iterator[Run]:
        """The layers in order, grouped into runs of one kind; most models have a single run."""
        count = self.input_layernorm.scale[...].shape[0]
        common = self.input_layernorm, self.self_attn, self.post_attention_layernorm
        for sparse, group in itertools.groupby(range(count), lambda n: n in self.sparse):
            numbers = list(group)
            start, stop = numbers[0], numbers[-1] + 1
            before = sum(n < start for n in self.sparse)  # layers with experts, not an MLP
            first = before if sparse else start - before
            feed_forward = self.experts if sparse else self.mlp
            assert feed_forward is not None
            yield Run(Block(*common, feed_forward), start, stop, first)


def stays_whole(path: Any, stack: Any, rows: int) -> bool:
    """Whether this parameter is read in place in its stack, without slicing, for so many rows.

    This is true for packed kernels and, with one row, for small kernels on a GPU and for float32
    kernels on a CPU.
    """
    if is_packed(stack):
        return True
    *_, linear, name, _ = (getattr(key, "name", None) for key in path)
    if rows != 1 or name != "kernel" or Shards.of(stack).mesh is not None:
        return False
    # The inputs of o_proj are heads and their elements, those of all others the model or MLP width.
    inputs = math.prod(stack.shape[1 : 3 if linear == "o_proj" else 2])
    outputs = math.prod(stack.shape[1:]) // inputs
    row = jax.ShapeDtypeStruct((1, inputs), stack.dtype)
    matrices = jax.ShapeDtypeStruct((len(stack), inputs, outputs), stack.dtype)
    is_small = inputs * outputs * stack.dtype.itemsize <= SMALL
    return (is_small or current_device().platform == "cpu") and can_multiply(row, [matrices])


def _part(stack: Any, start: int, stop: int) -> Any:
    """Layers [start, stop) of a stacked module; the module itself if these are all layers."""
    return jax.tree.map(lambda w: w if stop - start == len(w) else w[start:stop], stack)
