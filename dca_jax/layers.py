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
from dca_jax.products import dense_rows
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

    def added(
        self,
        before: Float[Array, "B T D"],
        x: Array,
        inputs: str,
        layer: Int[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """before + y, where y is x with its inputs mapped to D; `layer` as in `project`."""
        if self.is_plain and self.is_stack(inputs, "D"):
            rows, stack = _rows(x), self.matrices(inputs)
            if dense_rows.can_multiply(rows, [stack]):
                assert layer is not None  # stacks exist only with a layer number
                residual = before.reshape(len(rows), -1)
                (y,) = dense_rows.multiply(rows, [stack], layer, residual=residual)
                return y.reshape(before.shape)
        return before + project(x, inputs, [(self, "D")], layer)[0]

    @property
    def is_plain(self) -> bool:
        """Whether y is the product with the kernel and nothing more."""
        return self.lora is None and self.bias is None

    def is_stack(self, inputs: str, outputs: str) -> bool:
        """Whether the kernel, which is not packed, is the whole stack."""
        kernel = self.kernel[...]
        return not is_packed(kernel) and kernel.ndim > len(inputs + outputs)

    def matrices(self, inputs: str) -> Float[Array, "L inputs outputs"]:
        """The stack, with one axis of inputs and one of outputs."""
        kernel = self.kernel[...]
        return kernel.reshape(len(kernel), math.prod(kernel.shape[1 : 1 + len(inputs)]), -1)

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
    norm: "NormOfLayer | None" = None,
) -> list[Array]:
    """Applies several `Linear`s to the same x, in one kernel launch if that is faster.

    The axes B and T of x stay, and those of its inputs become those of the outputs.

    Args:
        linears: the modules with the letters of their outputs.
        layer: with it, kernels that `stays_whole` are whole stacks instead of this layer's slices.
        norm: normalizes x first.
    """
    normed = x if norm is None else norm(x)
    products: dict[int, Array] = {}
    kernels = {number: linear.kernel[...] for number, (linear, _) in enumerate(linears)}
    packed = {n: k for n, k in kernels.items() if is_packed(k)}
    if packed and layer is not None:
        subscripts = [f"BT{inputs},{inputs}{linears[n][1]}->BT{linears[n][1]}" for n in packed]
        found = packed_products(subscripts, normed, list(packed.values()), layer)
        products |= zip(packed, found, strict=True)
    stacks = {n: lin for n, (lin, out) in enumerate(linears) if lin.is_stack(inputs, out)}
    if stacks:
        assert layer is not None  # stacks exist only with a layer number
        rows, matrices = _rows(x), [linear.matrices(inputs) for linear in stacks.values()]
        if dense_rows.can_multiply(rows, matrices, norm=norm is not None):
            found = dense_rows.multiply(rows, matrices, layer, norm=norm and norm.of_rows)
        else:
            found = row_products(_rows(normed), matrices, layer[None])
        for (n, linear), y in zip(stacks.items(), found, strict=True):
            shape = linear.kernel.shape[1 + len(inputs) :]
            products[n] = y.astype(x.dtype).reshape(*x.shape[:2], *shape)
    for n, (linear, outputs) in enumerate(linears):
        if n not in products:
            products[n] = linear.multiply(normed, inputs, outputs)
    return [
        linear.finished(normed, products[n], inputs, outputs)
        for n, (linear, outputs) in enumerate(linears)
    ]


def _rows(x: Array) -> Float[Array, "BT inputs"]:
    return x.reshape(x.shape[0] * x.shape[1], -1)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis; the mean square is float32 (arXiv 1910.07467)."""

    def __init__(self, shape: tuple[int, ...], epsilon: float, *, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones(shape, dtype))
        self.epsilon = epsilon

    def __call__(
        self, x: Float[Array, "*rest D"], layer: Int[Array, ""] | None = None
    ) -> Float[Array, "*rest D"]:
        """Normalizes x; the result has the dtype of x. With `layer`, the scale may be a stack."""
        full = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(full), axis=-1, keepdims=True)
        normed = (full * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
        scale = self.scale[...]
        if layer is not None and scale.ndim > 1:
            scale = jax.lax.dynamic_index_in_dim(scale, layer, keepdims=False)
        scale = scale.astype(x.dtype)
        return normed * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


class NormOfLayer(NamedTuple):
    """The RMSNorm of one layer; `layer` as in `RMSNorm`."""

    norm: RMSNorm
    layer: Int[Array, ""] | None

    def __call__(self, x: Float[Array, "*rest D"]) -> Float[Array, "*rest D"]:
        """Normalizes x."""
        return self.norm(x, self.layer)

    @property
    def of_rows(self) -> dense_rows.Norm:
        """For a product that normalizes its rows itself."""
        assert self.layer is not None  # as with stacks of kernels
        return dense_rows.Norm(self.norm.scale[...], self.layer, self.norm.epsilon)


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
        self,
        x: Float[Array, "B T D"],
        norm: NormOfLayer,
        attend: Attend,
        layer: Int[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """x plus the attention of its norm; `layer` as in `project`."""
        projections = (self.q_proj, "NH"), (self.k_proj, "KH"), (self.v_proj, "KH")
        query, key, value = project(x, "D", projections, layer, norm)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return self.o_proj.added(x, attend(query, key, value), "NH", layer)


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, linear: Callable[..., Linear]) -> None:
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = linear("gate_proj", (D,), (F,), bias=config.mlp_bias)
        self.up_proj = linear("up_proj", (D,), (F,), bias=config.mlp_bias)
        self.down_proj = linear("down_proj", (F,), (D,), bias=config.mlp_bias)

    def __call__(
        self, x: Float[Array, "B T D"], norm: NormOfLayer, layer: Int[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """x plus the MLP of its norm, token by token; `layer` as in `project`."""
        return self.down_proj.added(x, self._hidden(x, norm, layer), "F", layer)

    def _hidden(
        self, x: Float[Array, "B T D"], norm: NormOfLayer, layer: Int[Array, ""] | None
    ) -> Float[Array, "B T F"]:
        """silu(gate) * up."""
        both = self.gate_proj, self.up_proj
        if all(linear.is_plain and linear.is_stack("D", "F") for linear in both):
            rows, stacks = _rows(x), [linear.matrices("D") for linear in both]
            if dense_rows.can_multiply(rows, stacks, gated=True, norm=True):
                assert layer is not None  # stacks exist only with a layer number
                options = {"norm": norm.of_rows, "gated": True}
                (y,) = dense_rows.multiply(rows, stacks, layer, **options)
                return y.reshape(*x.shape[:2], -1)
        gate, up = project(x, "D", [(linear, "F") for linear in both], layer, norm)
        return jax.nn.silu(gate) * up


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

        With `place`, experts and what `stays_whole` are whole stacks instead of this layer's
        slices, and `place` has the layer's indices in them.
        """
        attention, number = (None, None) if place is None else place
        with jax.named_scope("self_attn"):
            x = self.self_attn(x, NormOfLayer(self.input_layernorm, attention), attend, attention)
        norm = NormOfLayer(self.post_attention_layernorm, attention)
        if isinstance(self.feed_forward, Experts):
            with jax.named_scope("experts"):
                y, routing = self.feed_forward(norm(x), number)
                return x + y, routing
        assert self.feed_forward is not None
        with jax.named_scope("mlp"):
            return self.feed_forward(x, norm, number), None


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

    def sliced(self, x: Array) -> Block:
        """`block` without parts that are read in place in a stack: experts, and `stays_whole`."""
        block = self._common if isinstance(self.whole.feed_forward, Experts) else self.block

        def part(path: Any, leaf: Any) -> Any:
            return None if stays_whole(path, leaf, x) else leaf

        return jax.tree_util.tree_map_with_path(part, block, is_leaf=is_packed)

    def with_stacks(self, sliced: Block, x: Array) -> Block:
        """A slice of `sliced`, with whole stacks in place of the parts that it lacks."""
        block = self.whole
        if isinstance(block.feed_forward, Experts):
            sliced = sliced._replace(feed_forward=block.feed_forward)

        def part(path: Any, whole: Any, own: Any) -> Any:
            return whole if stays_whole(path, whole, x) else own

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


def stays_whole(path: Any, stack: Any, x: Float[Array, "B T D"]) -> bool:
    """Whether this parameter is read in place in its stack, without slicing, for these rows.

    This is true for packed kernels. With few rows, it is true for norms' scales and for kernels on
    GPUs of the Hopper generation; with one row, for small kernels on other GPUs and for all on a
    CPU.
    """
    if is_packed(stack):
        return True
    *_, module, name, _ = (getattr(key, "name", None) for key in path)
    rows = x.shape[0] * x.shape[1]
    if rows > dense_rows.ROWS or Shards.of(stack).mesh is not None:
        return False
    if name == "scale":
        return module in ("input_layernorm", "post_attention_layernorm")
    if name != "kernel":
        return False
    # The inputs of o_proj are heads and their elements, those of all others the model or MLP width.
    inputs = math.prod(stack.shape[1 : 3 if module == "o_proj" else 2])
    outputs = math.prod(stack.shape[1:]) // inputs
    matrices = [jax.ShapeDtypeStruct((len(stack), inputs, outputs), stack.dtype)]
    few, norm = jax.ShapeDtypeStruct((rows, inputs), x.dtype), module not in ("o_proj", "down_proj")
    if dense_rows.can_multiply(few, matrices, norm=norm):
        return True
    is_small = inputs * outputs * stack.dtype.itemsize <= SMALL
    with_one = rows == 1 and (is_small or current_device().platform == "cpu")
    return with_one and can_multiply(few, matrices)


def _part(stack: Any, start: int, stop: int) -> Any:
    """Layers [start, stop) of a stacked module; the module itself if these are all layers."""
    return jax.tree.map(lambda w: w if stop - start == len(w) else w[start:stop], stack)
