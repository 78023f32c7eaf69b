"""Llama with DCA in float64, dense, written from the papers and sharing no code with the package.

A query is turned by exp(i M[i, j] f) towards each key, so there is no rotation of keys, no phase
and no merge; autodiff of it is the exact gradient. For `jax.enable_x64`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from oracle import relative_positions

from dca_jax.config import LlamaConfig

# Of a layer, "key" or "value", and the keys rotated to their own positions, or the values: those
# that are read in their place.
Kept = Callable[[int, str, jax.Array], Any]
# From the weights [B, N, T, T] of a layer's dense attention, which pairs are read.
Chosen = Callable[[jax.Array], Any]


def logits(
    params: dict[str, Any],
    tokens: jax.Array,
    config: LlamaConfig,
    s: int,
    largest: int,
    kept: Kept = lambda layer, name, x: x,
    chosen: Chosen = lambda weights: True,
):
    """[B, T, V] of whole texts; one layer after the other, as the parameters' tree has them."""
    length = tokens.shape[1]
    relative = np.zeros((length, length), int)
    for i in range(length):
        relative[i, : i + 1] = relative_positions(i, s, largest)
    x = params["embed_tokens"]["embedding"][tokens]
    for number in range(config.num_hidden_layers):
        layer = _layer(params, number)
        normed = _norm(x, layer["input_layernorm"]["scale"], config)
        hooks = partial(kept, number), chosen
        x = x + _attention(layer["self_attn"], normed, config, relative, s, *hooks)
        normed = _norm(x, layer["post_attention_layernorm"]["scale"], config)
        gate = normed @ layer["mlp"]["gate_proj"]["kernel"]
        up = normed @ layer["mlp"]["up_proj"]["kernel"]
        x = x + (gate / (1 + jnp.exp(-gate)) * up) @ layer["mlp"]["down_proj"]["kernel"]
    x = _norm(x, params["norm"]["scale"], config)
    tied = config.tie_word_embeddings
    return x @ (params["embed_tokens"]["embedding"].T if tied else params["lm_head"]["kernel"])


def mean_nll(
    params: dict[str, Any],
    tokens: np.ndarray,
    trained: np.ndarray,
    config: LlamaConfig,
    s: int,
    largest: int,
) -> jax.Array:
    """Mean over the trained tokens of -ln p(token | those before)."""
    found = logits(params, jnp.asarray(tokens), config, s, largest)[:, :-1]
    log_p = found - jax.nn.logsumexp(found, axis=-1, keepdims=True)
    nll = -jnp.take_along_axis(log_p, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(trained[:, 1:], nll, 0.0).sum() / trained[:, 1:].sum()


def _layer(params: dict[str, Any], number: int) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: leaf[number], params["layers"])


def _norm(x: jax.Array, scale: jax.Array, config: LlamaConfig) -> jax.Array:
    size = jnp.sqrt((x * x).mean(axis=-1, keepdims=True) + config.rms_norm_eps)
    return x / size * scale[None, None, :]


def _attention(
    layer: dict[str, Any],
    x: jax.Array,
    config: LlamaConfig,
    relative: np.ndarray,
    s: int,
    kept: Callable[[str, jax.Array], Any],
    chosen: Chosen,
) -> jax.Array:
    query, key, value = (
        jnp.einsum("btd,dnh->btnh", x, layer[f"{name}_proj"]["kernel"]) for name in "qkv"
    )
    half = config.head_dim // 2
    frequency = config.rope.theta ** (-2.0 * np.arange(half) / config.head_dim)
    own = np.exp(1j * (np.arange(x.shape[1]) % s)[:, None] * frequency)[None, :, None]
    key = _turned(kept("key", _turned(key, own)), own.conj())
    value = kept("value", value)
    group = config.num_attention_heads // config.num_key_value_heads
    key, value = jnp.repeat(key, group, axis=2), jnp.repeat(value, group, axis=2)
    turn = np.exp(1j * relative[:, :, None] * frequency)
    q = jax.lax.complex(query[..., :half], query[..., half:])
    k = jax.lax.complex(key[..., :half], key[..., half:])
    scores = jnp.einsum("binf,ijf,bjnf->bnij", q, turn, k.conj()).real / np.sqrt(config.head_dim)
    causal = np.tril(np.ones(relative.shape, bool))
    scores = jnp.where(causal[None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = jnp.where(chosen(weights), weights, 0)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    read = jnp.einsum("bnij,bjnh->binh", weights, value)
    return jnp.einsum("btnh,nhd->btd", read, layer["o_proj"]["kernel"])


def _turned(x: Any, turn: np.ndarray) -> jax.Array:
    """Each pair of elements (h, h + H/2) as a complex number, times a number of the token's."""
    first, second = jnp.split(jnp.asarray(x), 2, axis=-1)
    turned = jax.lax.complex(first, second) * turn
    return jnp.concatenate([turned.real, turned.imag], axis=-1)
