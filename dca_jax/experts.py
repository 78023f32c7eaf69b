"""Mixtures of experts: a router chooses a few experts for each token.

    p = softmax(x W_router)                     float32, over all experts
    chosen, w = top-k of p                      exactly k; w / sum(w) if the model normalizes y =
    sum over the chosen of w (silu(x W_gate) * (x W_up)) W_down

(arXiv 1701.06538; Mixtral, arXiv 2401.04088; Qwen3.) Experts have no
capacity limit and no token is dropped, so a token's result depends only on that token. Tokens are
sorted by expert, and each projection is one grouped product (`dca_jax.grouped`). If there are fewer
tokens than experts, as in decoding, only the matrices of chosen experts are read, in place in the
layers' stack.

On a mesh, `tensor` splits each expert's inner dimension and `fsdp` the experts. Tokens are sent to
all devices of `fsdp` and their sums back; experts are never moved.

Shapes: E experts, k chosen, M an expert's inner dimension; others as in `dca_jax.model`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dca_jax.config import LlamaConfig
from dca_jax.device import current_device
from dca_jax.dtypes import compute_dtype
from dca_jax.grouped import (
    are_few,
    block_size,
    choose,
    chosen_products,
    collect,
    grouped_product,
    lay_out,
    spread,
)
from dca_jax.products.packed import Packed
from dca_jax.products.row_products import can_multiply, row_products
from dca_jax.sharding import Shards

PIECE = 2**14  # tokens sorted at once; k copies of each are in memory


class Routing(NamedTuple):
    """A router's result for each token.

    Attributes:
        probabilities: probabilities of all experts, float32.
        chosen: the chosen experts, most likely first.
        weights: their weights, float32.
    """

    probabilities: Float[Array, "B T E"]
    chosen: Int[Array, "B T k"]
    weights: Float[Array, "B T k"]


class Balance(NamedTuple):
    """How evenly experts were chosen, summed over tokens and layers; float32.

    Attributes:
        chosen: how often each expert was chosen.
        probabilities: sum of the router's probabilities for each expert.
        tokens: number of tokens.
    """

    chosen: Float[Array, "... E"]
    probabilities: Float[Array, "... E"]
    tokens: Float[Array, "..."]


class Kernel(nnx.Module):
    """One matrix for each layer, or for each expert of each layer."""

    def __init__(self, *shape: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))


class Experts(nnx.Module):
    """The stacked mixtures of experts of all layers that have one; a slice is one layer's."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        mixture = config.mixture
        assert mixture is not None
        L, D = len(config.sparse_layers), config.hidden_size
        E, M = mixture.num_experts, mixture.moe_intermediate_size
        self.mixture = mixture
        self.router = Kernel(L, D, E, dtype=dtype, rngs=rngs)
        self.gate_proj = Kernel(L, E, D, M, dtype=dtype, rngs=rngs)
        self.up_proj = Kernel(L, E, D, M, dtype=dtype, rngs=rngs)
        self.down_proj = Kernel(L, E, M, D, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], layer: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """The experts' output for each token, and the routing.

        Args:
            x: normalized hidden states; on a mesh, split along batch and tokens.
            layer: index in the stack; None if this is already one layer's slice.
        """
        router, gate, up, down = (
            module.kernel[...]
            for module in (self.router, self.gate_proj, self.up_proj, self.down_proj)
        )
        shards = Shards.of(gate)
        if layer is None:
            router, gate, up, down = (kernel[None] for kernel in (router, gate, up, down))
            layer = jnp.int32(0)
        router = shards.gathered(router)

        def local(
            x: Array, router: Array, gate: Any, up: Any, down: Any, layer: Array
        ) -> tuple[Array, Routing]:
            with jax.named_scope("router"):
                routing = self.route(x, router, layer)
            chosen, weights = routing.chosen, routing.weights
            first = jnp.int32(0)
            if shards.size("fsdp") > 1:
                gather = partial(jax.lax.all_gather, axis_name="fsdp", axis=0, tiled=True)
                x, chosen, weights = gather(x), gather(chosen), gather(weights)
                first = jax.lax.axis_index("fsdp").astype(jnp.int32) * gate.shape[1]
            own = chosen - first
            y = _in_pieces(x, own, weights, gate, up, down, layer)
            if shards.size("tensor") > 1:
                y = jax.lax.psum(y, "tensor")
            if shards.size("fsdp") > 1:
                y = jax.lax.psum_scatter(y, "fsdp", scatter_dimension=0, tiled=True)
            return y, routing

        tokens = PartitionSpec(*jax.typeof(x).sharding.spec)
        stacks = shards.specs((gate, up, down)) if shards.mesh else (PartitionSpec(),) * 3
        whole = PartitionSpec()
        mapped = shards.local(
            local, (tokens, whole, *stacks, whole), (tokens, Routing._make([tokens] * 3))
        )
        return mapped(x, router, gate, up, down, layer)

    def route(
        self, x: Float[Array, "B T D"], routers: Float[Array, "L D E"], layer: Int[Array, ""]
    ) -> Routing:
        """The k most likely experts for each token; ties go to the lower number."""
        wide = compute_dtype(x.dtype)
        row = x.reshape(-1, x.shape[-1])
        if len(row) == 1 and can_multiply(row, [routers]):
            (logits,) = row_products(row, [routers], layer[None])
            logits = logits.reshape(*x.shape[:2], -1)
        else:
            router = jax.lax.dynamic_index_in_dim(routers, layer, keepdims=False)
            logits = jnp.matmul(x.astype(wide), router.astype(wide), precision="highest")
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, self.mixture.num_experts_per_tok)
        if self.mixture.norm_topk_prob:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return Routing(probabilities, chosen.astype(jnp.int32), weights)


def _in_pieces(
    x: Float[Array, "B T D"],
    own: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    *kernels: Any,
) -> Float[Array, "B T D"]:
    """`mix` on up to `PIECE` tokens at a time."""
    k = own.shape[-1]
    flat = x.reshape(-1, x.shape[-1]), own.reshape(-1, k), weights.reshape(-1, k)
    count = -(-len(flat[0]) // PIECE)
    if count == 1:
        return mix(*flat, *kernels).reshape(x.shape)
    size = -(-len(flat[0]) // count)
    padded = (jnp.pad(a, ((0, count * size - len(a)), (0, 0))) for a in flat)
    pieces = tuple(a.reshape(count, size, -1) for a in padded)
    y = jax.lax.map(jax.checkpoint(lambda piece: mix(*piece, *kernels)), pieces)
    return y.reshape(count * size, -1)[: len(flat[0])].reshape(x.shape)


def mix(
    x: Float[Array, "T D"],
    own: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    gate: Float[Array, "L E D M"] | Packed,
    up: Float[Array, "L E D M"] | Packed,
    down: Float[Array, "L E M D"] | Packed,
    layer: Int[Array, ""],
) -> Float[Array, "T D"]:
    """The weighted sum of the outputs of each token's chosen experts, among these experts.

    Args:
        own: chosen experts, counted from the first of these. A number outside their range is an
            expert on another device and adds nothing.
    """
    tokens, k = own.shape
    experts = gate.shape[1]
    here = (own >= 0) & (own < experts)
    if are_few(tokens * k, experts):
        groups = jnp.where(here, own, 0).reshape(-1)
        product = partial(chosen_products, layer=layer, groups=groups)
        inner = _swiglu(*product(jnp.repeat(x, k, axis=0), (gate, up)))
        (out,) = product(inner, (down,))
        out = jnp.where(here.reshape(-1, 1), out, 0)
    else:
        name = choose(current_device(), x.dtype, gate.shape[2:])
        block = block_size(name, tokens * k, experts)
        layout = lay_out(jnp.where(here, own, experts).reshape(-1), experts, block)
        product = partial(grouped_product, name, layer=layer, sizes=layout.sizes, block=block)
        rows = spread(x, layout)
        inner = _swiglu(product(rows, gate), product(rows, up))
        out = collect(product(inner, down), layout)
    # A sum of products instead of a matrix product, so that XLA fuses the gather.
    each = out.reshape(tokens, k, -1).astype(weights.dtype) * weights[..., None]
    return each.sum(axis=1).astype(x.dtype)


def _swiglu(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


# --- load balancing --------------------------------------------------------------------------


def balance_of(routing: Routing, real: Bool[Array, "B T"]) -> Balance:
    """One layer's sums over the real tokens."""
    experts = routing.probabilities.shape[-1]
    numbers = jnp.arange(experts, dtype=jnp.int32)[None, None, None]
    counted = real[..., None, None] & (routing.chosen[..., None] == numbers)
    probabilities = jnp.where(real[..., None], routing.probabilities, 0)
    return Balance(
        counted.astype(jnp.float32).sum(axis=(0, 1, 2)),
        probabilities.astype(jnp.float32).sum(axis=(0, 1)),
        real.astype(jnp.float32).sum(),
    )


def load_balancing_loss(balance: Balance) -> Float[Array, ""]:
    """E times the sum over experts of how often each was chosen times its mean probability.

    It is computed over all layers together, as in `transformers` (after arXiv 2101.03961, eqs. 4 to
    6). Its value is k if all experts are chosen equally often.
    """
    count = jnp.maximum(balance.tokens.sum(), 1)
    shares = balance.chosen.sum(axis=0) / count * (balance.probabilities.sum(axis=0) / count)
    return shares.sum() * shares.shape[0]
