"""Perplexity of long texts, with the memory of a piece of text: no [T, V] logits, ever.

A text is read as a long prompt is: in pieces of `PIECE` tokens through a KV cache. So activations
and logits are bounded by a piece, the cache is all that grows with the text, and one compilation
serves every window length that fits in it. There is no second path for short texts.
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dca_jax.errors import InputError
from dca_jax.generate import new_cache
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama

# Tokens a piece: large enough to keep the matrix products busy, small enough that a piece's
# logits over a vocabulary of 128k take 256 MiB.
PIECE = 512


def token_nll(
    model: Llama, tokens: Int[Array | np.ndarray, "B T"], *, capacity: int | None = None
) -> Float[np.ndarray, "B T-1"]:
    """Negative log-likelihood, in nats, of each token but the first, given those before it.

    Args:
        model: read with its own attention (`model.dca`), in its own dtype; logits, log-sum-exp
            and result are float32.
        tokens: texts of T >= 2 tokens, ids below the vocabulary size.
        capacity: tokens the KV cache holds, at least T; by default T. Give the longest of several
            lengths, and one compilation serves them all.

    Returns:
        [B, T - 1] float32: entry t is -ln p(tokens[:, t + 1] | tokens[:, : t + 1]). Its mean over
        a row is the row's NLL, and exp of that its perplexity.

    Raises:
        InputError: texts of fewer than two tokens, an id out of range, a capacity below T, or a
            cache that does not fit into memory.
    """
    tokens = np.asarray(tokens)
    batch, length = tokens.shape
    if length < 2:
        raise InputError(f"perplexity needs texts of at least 2 tokens, got {length}")
    _check_ids(tokens, model.config.vocab_size)
    nll, _ = _read(model, tokens, _empty_cache(model, batch, length, capacity))
    return nll


def window_nlls(
    model: Llama,
    tokens: Int[Array | np.ndarray, " N"],
    *,
    window: int,
    stride: int | None = None,
    capacity: int | None = None,
) -> Iterator[float]:
    """Yields the mean NLL, in nats a token, of each window of `tokens`, in order.

    Every window is a text of its own: its first token is given, the `window - 1` others are
    predicted from the window alone. Windows start at 0, stride, 2 * stride ... and lie wholly in
    `tokens`.

    Args:
        window: tokens a window, at least 2.
        stride: tokens from one window's start to the next; by default `window` (no overlap).
        capacity: as in `token_nll`.

    Raises:
        InputError: fewer tokens than one window, a stride below 1, and as in `token_nll`.
    """
    tokens = np.asarray(tokens)
    stride = window if stride is None else stride
    if window < 2:
        raise InputError(f"a window needs at least 2 tokens, got {window}")
    if stride < 1:
        raise InputError(f"the stride between windows must be at least 1 token, got {stride}")
    if len(tokens) < window:
        raise InputError(f"got {len(tokens)} tokens, fewer than one window of {window}")
    _check_ids(tokens, model.config.vocab_size)
    cache = _empty_cache(model, 1, window, capacity)
    return _window_nlls(model, tokens, cache, window, stride)


def perplexity(
    model: Llama,
    tokens: Int[Array | np.ndarray, " N"],
    *,
    window: int,
    stride: int | None = None,
    capacity: int | None = None,
) -> float:
    """exp of the mean of `window_nlls` (same arguments): the figure of the paper's Table 1."""
    nlls = list(window_nlls(model, tokens, window=window, stride=stride, capacity=capacity))
    return math.exp(sum(nlls) / len(nlls))


def _window_nlls(
    model: Llama, tokens: np.ndarray, cache: KVCache, window: int, stride: int
) -> Iterator[float]:
    """The generator behind `window_nlls`, which checks its arguments when called, not later."""
    for start in range(0, len(tokens) - window + 1, stride):
        nll, cache = _read(model, tokens[None, start : start + window], cache)
        yield float(nll.mean(dtype=np.float64))


def _read(model: Llama, tokens: np.ndarray, cache: KVCache) -> tuple[np.ndarray, KVCache]:
    """NLL [B, T - 1] of whole texts, and the emptied cache, for the next ones."""
    batch, length = tokens.shape
    num_inputs = length - 1  # nothing is predicted from the last token
    inputs = np.zeros((2, batch, -(-num_inputs // PIECE) * PIECE), np.int32)
    inputs[:, :, :num_inputs] = tokens[:, :-1], tokens[:, 1:]
    context_lengths = jnp.full((batch,), length, jnp.int32)
    nlls = []
    for start in range(0, num_inputs, PIECE):
        piece, targets = inputs[:, :, start : start + PIECE]
        lengths = jnp.full((batch,), min(PIECE, num_inputs - start), jnp.int32)
        nll, cache = _read_piece(model, cache, piece, targets, lengths, context_lengths)
        nlls.append(nll)
    nll = np.concatenate([np.asarray(nll) for nll in nlls], axis=1)[:, :num_inputs]
    return nll, cache.rollback(jnp.zeros((batch,), jnp.int32))


@functools.partial(jax.jit, donate_argnames="cache")
def _read_piece(
    model: Llama,
    cache: KVCache,
    tokens: Int[Array, "B P"],
    targets: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    context_lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B P"], KVCache | None]:
    """NLL of `targets` after each of the next `tokens`, of which `lengths` are real."""
    hidden, cache_after = model.hidden_states(
        tokens, lengths=lengths, cache=cache, context_lengths=context_lengths
    )

    def row_nll(row: tuple[Array, Array]) -> Array:  # one row's logits at a time: [P, V]
        hidden, targets = row
        logits = model.unembed(hidden)
        target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - target

    return jax.lax.map(row_nll, (hidden, targets)), cache_after


def _empty_cache(model: Llama, batch: int, length: int, capacity: int | None) -> KVCache:
    capacity = length if capacity is None else capacity
    if capacity < length:
        raise InputError(f"a KV cache of {capacity} tokens cannot hold a text of {length}")
    return new_cache(model, batch, capacity)


def _check_ids(tokens: np.ndarray, vocab_size: int) -> None:
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        raise InputError(
            f"token ids from {tokens.min()} to {tokens.max()} do not fit the model's vocabulary "
            f"of {vocab_size}; was the text tokenized for another model?"
        )
