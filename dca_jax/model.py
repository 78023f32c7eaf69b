"""Llama, from top to bottom: Llama 2 and 3, CodeLlama, Vicuna, Mistral, Qwen2.

Shapes: B batch, T query, S key, N query heads, K kv heads, H head_dim, D model, F ffw, V vocab,
L layers. The layers are stacked on a leading axis and run by one `lax.scan`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dca_jax.attention import attend, rotate_keys
from dca_jax.attention.op import make_rows
from dca_jax.config import LlamaConfig
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.kv_cache import KVCache, write

# Given one layer's query [B,T,N,H], key and value [B,T,K,H]: what the queries read, [B,T,N,H].
Attend = Callable[[Array, Array, Array], Array]


class Linear(nnx.Module):
    """y = einsum(x, kernel) + bias, in the dtype of x."""

    def __init__(
        self,
        shape: tuple[int, ...],
        bias_shape: tuple[int, ...] | None,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))
        self.bias = None if bias_shape is None else nnx.Param(jnp.zeros(bias_shape, dtype))

    def __call__(self, x: Array, subscripts: str) -> Array:
        # A float32 model means float32 on every device; bfloat16 sums in float32 by itself.
        precision = "highest" if x.dtype == jnp.float32 else None
        y = jnp.einsum(subscripts, x, self.kernel[...].astype(x.dtype), precision=precision)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(x.dtype)
        return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale; the mean of squares in float32 (arXiv 1910.07467)."""

    def __init__(self, shape: tuple[int, ...], epsilon: float, *, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones(shape, dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        full = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(full), axis=-1, keepdims=True)
        normed = (full * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
        return normed * self.scale[...].astype(x.dtype)[None, None, :]


class Attention(nnx.Module):
    """Projections around attention; what is attended to is the caller's affair."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        L, D, H = config.num_hidden_layers, config.hidden_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads

        def linear(shape: tuple[int, ...], bias: tuple[int, ...] | None) -> Linear:
            return Linear((L, *shape), bias and (L, *bias), dtype=dtype, rngs=rngs)

        self.q_proj = linear((D, N, H), (N, H) if config.qkv_bias else None)
        self.k_proj = linear((D, K, H), (K, H) if config.qkv_bias else None)
        self.v_proj = linear((D, K, H), (K, H) if config.qkv_bias else None)
        self.o_proj = linear((N, H, D), (D,) if config.o_bias else None)

    def __call__(self, x: Float[Array, "B T D"], attend: Attend) -> Float[Array, "B T D"]:
        query = self.q_proj(x, "BTD,DNH->BTNH")
        key = self.k_proj(x, "BTD,DKH->BTKH")
        value = self.v_proj(x, "BTD,DKH->BTKH")
        return self.o_proj(attend(query, key, value), "BTNH,NHD->BTD")


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        L, D, F = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        wide, narrow = ((L, F), (L, D)) if config.mlp_bias else (None, None)
        self.gate_proj = Linear((L, D, F), wide, dtype=dtype, rngs=rngs)
        self.up_proj = Linear((L, D, F), wide, dtype=dtype, rngs=rngs)
        self.down_proj = Linear((L, F, D), narrow, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = jax.nn.silu(self.gate_proj(x, "BTD,DF->BTF"))
        return self.down_proj(gate * self.up_proj(x, "BTD,DF->BTF"), "BTF,FD->BTD")


class Layer(nnx.Module):
    """All layers, stacked; one slice of it, inside the scan, is one pre-norm decoder layer."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        L, D, epsilon = config.num_hidden_layers, config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm((L, D), epsilon, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm((L, D), epsilon, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], attend: Attend) -> Float[Array, "B T D"]:
        with jax.named_scope("self_attn"):
            x = x + self.self_attn(self.input_layernorm(x), attend)
        with jax.named_scope("mlp"):
            return x + self.mlp(self.post_attention_layernorm(x))


class Embed(nnx.Module):
    """The token table, [V, D]."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))


class Llama(nnx.Module):
    """A Llama-family decoder whose attention is DCA (or plain, with `dca=None`).

    A pytree: pass it through `jax.jit`, `jax.grad` and `jax.tree.map` as it is.

    Args:
        config: the model's shape.
        dca: Dual Chunk Attention's setting; None is the model's own plain causal attention.
        param_dtype: of the parameters. dtype: of activations and matrix products.
        remat: recompute each layer in the backward pass instead of keeping its activations.
        implementation: of the attention (`dca_jax.attention.IMPLEMENTATIONS`), None for the best.
        rngs: initialization (normal, 0.02).
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dca: DCAConfig | None = None,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike = jnp.bfloat16,
        remat: bool = False,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        param_dtype = jnp.dtype(param_dtype)
        self.config, self.dca = config, dca
        self.dtype, self.remat, self.implementation = jnp.dtype(dtype), remat, implementation
        self.embed_tokens = Embed(config, dtype=param_dtype, rngs=rngs)
        self.layers = Layer(config, dtype=param_dtype, rngs=rngs)
        self.norm = RMSNorm((config.hidden_size,), config.rms_norm_eps, dtype=param_dtype)
        unembed = (config.hidden_size, config.vocab_size)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(unembed, None, dtype=param_dtype, rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of whole texts, float32: row b's token t predicts token t + 1.

        Args:
            tokens: ids below V; right-padded, each row from index 0.
            lengths: real tokens in each row (default: all T). Logits of padding mean nothing.
        """
        hidden, _ = self.hidden_states(tokens, lengths=lengths)
        return self.unembed(hidden)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        *,
        lengths: Int[Array, " B"] | None = None,
        cache: KVCache | None = None,
        context_lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Normed hidden states of `tokens`, and the cache with them appended.

        Args:
            tokens: new tokens of each row, right-padded; without a cache, whole texts.
            lengths: how many of the T tokens are real in each row (default: all). Padding is not
                written to the cache.
            cache: what the rows have read so far; `tokens` follow it, at cache.lengths[b]. Tokens
                beyond the capacity would be lost: check before calling (`dca_jax.generate` does).
            context_lengths: length of the row's whole prompt, for temperature and dynamic NTK
                (default: the row's length after this call).

        Raises:
            InputError: plain attention over more keys than the model's sliding window.
        """
        config = self.config
        batch, num_new = tokens.shape
        start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.lengths
        new = jnp.full((batch,), num_new, jnp.int32) if lengths is None else lengths
        after = start + new.astype(jnp.int32)
        self._check_window(num_new if cache is None else cache.capacity)
        if context_lengths is None:
            context_lengths = after
        frequency_lengths = context_lengths
        if cache is not None:
            frequency_lengths = jnp.where(start == 0, context_lengths, cache.frequency_lengths)
        rows = make_rows(
            (batch, num_new, config.num_attention_heads, config.head_dim),
            dca=self.dca,
            rope=config.rope,
            lengths=after,
            query_offset=start,
            context_lengths=context_lengths,
            frequency_lengths=frequency_lengths,
        )
        index = start[:, None] + jnp.arange(num_new, dtype=jnp.int32)[None, :]
        is_text: Bool[Array, "B T"] = index < after[:, None]

        def read(query: Array, key: Array, value: Array, layer: Array | None = None) -> Array:
            return attend(
                query,
                key,
                value,
                dca=self.dca,
                rows=rows,
                layer=layer,
                implementation=self.implementation,
            )

        def rotated(key: Array) -> Array:
            return rotate_keys(key, index, dca=self.dca, inv_freq=rows.inv_freq)

        def whole_texts(x: Array, layer: Layer) -> tuple[Array, None]:
            return layer(x, lambda q, k, v: read(q, rotated(k), v)), None

        def with_cache(
            carry: tuple[Array, Array, Array], xs: tuple[Layer, Array]
        ) -> tuple[tuple[Array, Array, Array], None]:
            x, keys, values = carry
            layer, number = xs

            def attend_to_cache(q: Array, k: Array, v: Array) -> Array:
                nonlocal keys, values
                keys = write(keys, number, index, is_text, rotated(k))
                values = write(values, number, index, is_text, v)
                if keys.dtype == q.dtype:
                    return read(q, keys, values, number)
                return read(q, keys[number].astype(q.dtype), values[number].astype(q.dtype))

            x = layer(x, attend_to_cache)
            return (x, keys, values), None

        x = self.embed_tokens.embedding[...][tokens].astype(self.dtype)
        if cache is None:
            body = jax.checkpoint(whole_texts) if self.remat else whole_texts
            x, _ = jax.lax.scan(body, x, self.layers)
            return self.norm(x), None
        numbers = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
        carry = (x, cache.key, cache.value)
        (x, keys, values), _ = jax.lax.scan(with_cache, carry, (self.layers, numbers))
        cache = KVCache(key=keys, value=values, lengths=after, frequency_lengths=frequency_lengths)
        return self.norm(x), cache

    def unembed(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits, float32, of normed hidden states."""
        if self.lm_head is None:
            kernel = self.embed_tokens.embedding[...].T
        else:
            kernel = self.lm_head.kernel[...]
        return jnp.einsum(
            "...D,DV->...V",
            hidden,
            kernel.astype(hidden.dtype),
            precision="highest" if hidden.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    def params(self) -> dict[str, Any]:
        """The parameters as a nested dict of arrays with stable names, layers stacked."""
        tree: dict[str, Any] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(self):
            *parents, name = _names(path)
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = leaf
        return tree

    @classmethod
    def from_params(cls, config: LlamaConfig, params: Mapping[str, Any], **options: Any) -> "Llama":
        """A model around existing arrays (no copy); `options` as in `Llama(...)`.

        Raises:
            InputError: a missing or extra name, or a wrong shape.
        """
        abstract = jax.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), **options))
        expected, treedef = jax.tree_util.tree_flatten_with_path(abstract)
        given = {
            tuple(key.key for key in path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(dict(params))
        }
        leaves = []
        for path, leaf in expected:
            name = _names(path)
            if name not in given:
                raise InputError(f"parameter {'.'.join(name)} is missing")
            found = given.pop(name)
            if tuple(found.shape) != tuple(leaf.shape):
                raise InputError(
                    f"parameter {'.'.join(name)} has shape {tuple(found.shape)}, expected "
                    f"{tuple(leaf.shape)} from the config"
                )
            leaves.append(found)
        if given:
            extra = ", ".join(".".join(name) for name in sorted(given))
            raise InputError(f"unexpected parameters: {extra}")
        return jax.tree_util.tree_unflatten(treedef, leaves)

    def _check_window(self, num_keys: int) -> None:
        window = self.config.sliding_window
        if self.dca is None and window is not None and num_keys > window:
            raise InputError(
                f"this model's plain attention slides over {window} tokens, and {num_keys} were "
                "asked for; use DCA (dca=...), which reads texts of any length"
            )


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """('layers', 'mlp', 'up_proj', 'kernel') from a leaf's path, which ends in Param.value."""
    return tuple(key.name for key in path[:-1])
