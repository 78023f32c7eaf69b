"""Mixtures of experts: a router, and for each token the experts that it chooses.

    p = softmax(x W_router)                     float32, over all experts
    chosen, w = top-k of p                      exactly k; w / sum(w) where the model says so
    y = sum over the chosen of w (silu(x W_gate) * (x W_up)) W_down

(arXiv 1701.06538; Mixtral, arXiv 2401.04088; Qwen3.) No token is dropped and no expert has a
capacity: a token's result depends on that token alone. Tokens are sorted by expert, and each
projection is one product of groups of rows (`dca_jax.grouped`); where they are fewer than experts,
as in decoding, only the matrices that are chosen are read, where they lie in the layers' stack.

On a mesh `tensor` cuts each expert's inner dimension and `fsdp` the experts: what moves is tokens,
to all devices of `fsdp` and their sums back, and never an expert.

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

PIECE = 2**14  # tokens that are sorted at once: k copies of each are in memory


class Routing(NamedTuple):
    """What a router says of each token.

    Attributes:
        probabilities: of all experts, float32.
        chosen: the experts that read it, the most likely first.
        weights: theirs, float32.
    """

    probabilities: Float[Array, "B T E"]
    chosen: Int[Array, "B T k"]
    weights: Float[Array, "B T k"]


class Balance(NamedTuple):
    """How evenly experts were chosen, summed over tokens and layers; float32.

    Attributes:
        chosen: how often each was. probabilities: what the router gave each.
        tokens: how many there were.
    """

    chosen: Float[Array, "... E"]
    probabilities: Float[Array, "... E"]
    tokens: Float[Array, "..."]


class Kernel(nnx.Module):
    """One matrix for each layer, or for each expert of each layer."""

    def __init__(self, *shape: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))


class Experts(nnx.Module):
    """The mixtures of experts of all layers that have one, stacked; a slice is one layer's."""

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
        """What the experts make of each token, and how they were chosen.

        Args:
            x: normed hidden states; on a mesh, cut along batch and tokens.
            layer: which of the stack; None if this is one layer's slice of it.
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
        """Which experts read each token: the k most likely, of equal ones those numbered lower."""
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
    """`mix` of up to `PIECE` tokens at a time."""
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
    """The weighted sum of what the chosen ones of these experts make of each token.

    Args:
        own: the chosen, counted from the first of these; a number that is none of theirs is an
            expert of another device, and adds nothing.
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
    # As a sum of products and not as a product of matrices: XLA gathers on the way.
    each = out.reshape(tokens, k, -1).astype(weights.dtype) * weights[..., None]
    return each.sum(axis=1).astype(x.dtype)


def _swiglu(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


# --- how evenly they are chosen ------------------------------------------------------------------


def balance_of(routing: Routing, real: Bool[Array, "B T"]) -> Balance:
    """One layer's sums over the tokens that are real."""
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

    Of all layers together, as `transformers` has it (after arXiv 2101.03961, eqs. 4 to 6): k where
    all are chosen alike.
    """
    count = jnp.maximum(balance.tokens.sum(), 1)
    shares = balance.chosen.sum(axis=0) / count * (balance.probabilities.sum(axis=0) / count)
    return shares.sum() * shares.shape[0]
