"""Dense Llama with DCA in float64, written from the papers without code of the package.

A query is rotated by exp(i M[i, j] f) relative to each key, so there is no rotation of keys, no
phase and no merge; its autodiff is the exact gradient. With `xp=jnp`, use under `jax.enable_x64`;
with `xp=np`, which compiles nothing, give it NumPy's arrays.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from oracle import relative_positions

from dca_jax.config import LlamaConfig

# From a layer, "key" or "value", and the rotated keys or the values, to those that are read
# instead.
Kept = Callable[[int, str, jax.Array], Any]
# From the weights [B, N, T, T] of a layer's dense attention to the pairs that are read.
Chosen = Callable[[jax.Array], Any]


def logits(
    params: dict[str, Any],
    tokens: jax.Array,
    config: LlamaConfig,
    s: int,
    largest: int,
    kept: Kept = lambda layer, name, x: x,
    chosen: Chosen = lambda weights: True,
    xp: Any = jnp,
):
    """Logits [B, T, V] of whole texts, layer by layer in the order of the parameters' tree.

    With `xp=np`, `kept` and `chosen` are given, and return, NumPy's arrays.
    """
    length = tokens.shape[1]
    relative = np.zeros((length, length), int)
    for i in range(length):
        relative[i, : i + 1] = relative_positions(i, s, largest)
    half = config.head_dim // 2
    frequency = config.rope.theta ** (-2.0 * np.arange(half) / config.head_dim)
    own = np.exp(1j * (np.arange(length) % s)[:, None] * frequency)[None, :, None]
    turns = own, np.exp(1j * relative[:, :, None] * frequency)
    x = params["embed_tokens"]["embedding"][tokens]
    for number in range(config.num_hidden_layers):
        layer = _layer(params, number)
        normed = _norm(xp, x, layer["input_layernorm"]["scale"], config)
        hooks = partial(kept, number), chosen
        x = x + _attention(xp, layer["self_attn"], normed, config, turns, *hooks)
        normed = _norm(xp, x, layer["post_attention_layernorm"]["scale"], config)
        gate = normed @ layer["mlp"]["gate_proj"]["kernel"]
        up = normed @ layer["mlp"]["up_proj"]["kernel"]
        x = x + (gate / (1 + xp.exp(-gate)) * up) @ layer["mlp"]["down_proj"]["kernel"]
    x = _norm(xp, x, params["norm"]["scale"], config)
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
    """Mean over the trained tokens of -ln p(token | earlier tokens)."""
    found = logits(params, jnp.asarray(tokens), config, s, largest)[:, :-1]
    log_p = found - jax.nn.logsumexp(found, axis=-1, keepdims=True)
    nll = -jnp.take_along_axis(log_p, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(trained[:, 1:], nll, 0.0).sum() / trained[:, 1:].sum()


def _layer(params: dict[str, Any], number: int) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: leaf[number], params["layers"])


def _norm(xp: Any, x: Any, scale: Any, config: LlamaConfig) -> Any:
    size = xp.sqrt((x * x).mean(axis=-1, keepdims=True) + config.rms_norm_eps)
    return x / size * scale[None, None, :]


def _attention(
    xp: Any,
    layer: dict[str, Any],
    x: Any,
    config: LlamaConfig,
    turns: tuple[np.ndarray, np.ndarray],
    kept: Callable[[str, Any], Any],
    chosen: Chosen,
) -> Any:
    """`turns` are exp(i p f): of each key's own position [1, T, 1, f], and of M [T, T, f]."""
    query, key, value = (
        xp.einsum("btd,dnh->btnh", x, layer[f"{name}_proj"]["kernel"]) for name in "qkv"
    )
    own, turn = turns
    key = _turned(xp, kept("key", _turned(xp, key, own)), own.conj())
    value = kept("value", value)
    group = config.num_attention_heads // config.num_key_value_heads
    key, value = xp.repeat(key, group, axis=2), xp.repeat(value, group, axis=2)
    q, k = _pairs(xp, query), _pairs(xp, key)
    scores = xp.einsum("binf,ijf,bjnf->bnij", q, turn, k.conj()).real / np.sqrt(config.head_dim)
    causal = np.tril(np.ones(turn.shape[:2], bool))
    scores = xp.where(causal[None, None], scores, -np.inf)
    weights = xp.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    weights = xp.where(chosen(weights), weights, 0)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    read = xp.einsum("bnij,bjnh->binh", weights, value)
    return xp.einsum("btnh,nhd->btd", read, layer["o_proj"]["kernel"])


def _pairs(xp: Any, x: Any) -> Any:
    """Each pair (h, h + H/2) as a complex number."""
    first, second = xp.split(xp.asarray(x, complex), 2, axis=-1)
    return first + second * 1j


def _turned(xp: Any, x: Any, turn: np.ndarray) -> Any:
    """Multiplies each pair by one number per token."""
    turned = _pairs(xp, x) * turn
    return xp.concatenate([turned.real, turned.imag], axis=-1)
