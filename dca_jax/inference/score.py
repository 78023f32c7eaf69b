"""Perplexity of long texts, with the memory of a piece of text: no [T, V] logits, ever.

A text is read as a long prompt is: in pieces, through a KV cache. So activations and logits are
bounded by a piece, the cache is all that grows with the text, and one compilation serves every
window length that fits in it. There is no second path for short texts; they are read several at
once. `dca_jax.evaluation.windows` has the protocols that are built on this.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dca_jax.errors import InputError
from dca_jax.inference.buckets import SHAPES, cut, new_cache, scoring_widths
from dca_jax.inference.steps import compiler_options
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama
from dca_jax.sharding import Shards

# Tokens whose logits are there at once: over a vocabulary of 128k they take 256 MiB.
LOGITS = 512


class Scores(NamedTuple):
    """What a model makes of each token of a text but the first, given those before it.

    Attributes:
        nll: -ln p(token), in nats, float32.
        is_best: whether no other token is likelier.
    """

    nll: Float[np.ndarray, " _"]  # texts of one batch differ in length
    is_best: Bool[np.ndarray, " _"]


class Reader:
    """Reads texts through one KV cache, which is emptied and used again.

    Args:
        model: read with its own attention (`model.dca`), in its own dtype; logits, log-sum-exp
            and result are float32.
        batch: texts read together. Fewer are filled up, so that there is one shape to compile.
        capacity: tokens of the longest text.
        on_piece: called after each piece with the number of tokens read.

    Raises:
        InputError: a cache that does not fit into memory.
    """

    def __init__(
        self,
        model: Llama,
        batch: int,
        capacity: int,
        on_piece: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.batch, self.capacity, self.on_piece = model, batch, capacity, on_piece
        self._cache: KVCache | None = None
        self._cache = self._empty()

    def read(self, texts: Sequence[Sequence[int] | Int[np.ndarray, " _"]]) -> list[Scores]:
        """The scores of at most `batch` texts, each of 1 to `capacity` tokens.

        Raises:
            InputError: plain attention over more than the model's window; an NLL that is not
                finite, named by the first text and token that have one.
        """
        cache = self._empty()
        rows = cache.lengths.shape[0]  # on a mesh, more than the batch
        num_inputs = np.zeros((rows,), np.int32)
        num_inputs[: len(texts)] = [len(text) - 1 for text in texts]  # the last predicts nothing
        inputs = np.zeros((2, rows, int(num_inputs.max())), np.int32)
        for row, (text, count) in enumerate(zip(texts, num_inputs, strict=False)):
            inputs[:, row, :count] = text[:-1], text[1:]
        self.model.check_window(int(num_inputs.max()))
        nlls, bests = [], []
        start, read = 0, _read_piece(rows, cache.capacity)
        for count, width in cut(inputs.shape[2], scoring_widths(rows)):
            lengths = np.clip(num_inputs - start, 0, count)
            piece = np.zeros((2, rows, width), np.int32)
            piece[:, :, :count] = inputs[:, :, start : start + count]
            nll, is_best, cache = read(self.model, cache, *piece, lengths, num_inputs + 1)
            nlls.append(np.asarray(nll)[:, :count])
            bests.append(np.asarray(is_best)[:, :count])
            start += count
            if self.on_piece is not None:
                self.on_piece(int(lengths.sum()))
        if not nlls:
            self._cache = cache
            return [Scores(np.zeros((0,), np.float32), np.zeros((0,), bool)) for _ in texts]
        nll, is_best = np.concatenate(nlls, axis=1), np.concatenate(bests, axis=1)
        counts = num_inputs[: len(texts)].tolist()
        scores = [Scores(nll[row, :n], is_best[row, :n]) for row, n in enumerate(counts)]
        for row, (values, _) in enumerate(scores):
            if not np.isfinite(values).all():  # and the cache goes: such numbers spread in it
                raise InputError(
                    f"the NLL of token {int(np.argmin(np.isfinite(values))) + 1} of text {row} is "
                    f"not finite: the weights overflow {self.model.dtype}, or the checkpoint is "
                    "broken; compute in float32, or check the checkpoint"
                )
        self._cache = cache.rollback([])
        return scores

    def nll(self, tokens: Int[np.ndarray, "b T"]) -> Float[np.ndarray, "b T-1"]:
        """The negative log-likelihoods of at most `batch` texts of one length."""
        return np.stack([scores.nll for scores in self.read(list(tokens))])

    def _empty(self) -> KVCache:
        """The cache, given away to be updated in place: a reading that fails takes it along."""
        cache, self._cache = self._cache, None
        if cache is None:  # every row is computed, so there is none that no text needs
            cache = new_cache(self.model, self.batch, self.capacity, more_rows=False)
        return cache


def token_nll(
    model: Llama, tokens: Int[Array | np.ndarray, "B T"], *, capacity: int | None = None
) -> Float[np.ndarray, "B T-1"]:
    """Negative log-likelihood, in nats, of each token but the first, given those before it.

    Args:
        model: as for `Reader`.
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
    check_ids(tokens, model.config.vocab_size)
    return Reader(model, batch, _capacity(length, capacity)).nll(tokens)


def window_nlls(
    model: Llama,
    tokens: Int[Array | np.ndarray, " N"],
    *,
    window: int,
    stride: int | None = None,
    capacity: int | None = None,
    batch: int = 1,
) -> Iterator[float]:
    """Yields the mean NLL, in nats a token, of each window of `tokens`, in order.

    Every window is a text of its own: its first token is given, the `window - 1` others are
    predicted from the window alone. Windows start at 0, stride, 2 * stride ... and lie wholly in
    `tokens`.

    Args:
        window: tokens a window, at least 2.
        stride: tokens from one window's start to the next; by default `window` (no overlap).
        capacity: as in `token_nll`.
        batch: windows read together.

    Raises:
        InputError: fewer tokens than one window, a stride or batch below 1, and as in `token_nll`.
    """
    tokens = np.asarray(tokens)
    stride = window if stride is None else stride
    if window < 2:
        raise InputError(f"a window needs at least 2 tokens, got {window}")
    if stride < 1 or batch < 1:
        raise InputError(
            f"the stride between windows (in tokens) and the batch must be at least 1, "
            f"got {stride} and {batch}"
        )
    if len(tokens) < window:
        raise InputError(f"got {len(tokens)} tokens, fewer than one window of {window}")
    check_ids(tokens, model.config.vocab_size)
    starts = range(0, len(tokens) - window + 1, stride)
    reader = Reader(model, min(batch, len(starts)), _capacity(window, capacity))
    return _window_nlls(reader, tokens, window, starts)


def perplexity(
    model: Llama,
    tokens: Int[Array | np.ndarray, " N"],
    *,
    window: int,
    stride: int | None = None,
    capacity: int | None = None,
    batch: int = 1,
) -> float:
    """exp of the mean of `window_nlls` (same arguments): the figure of the paper's Table 1."""
    options = {"window": window, "stride": stride, "capacity": capacity, "batch": batch}
    nlls = list(window_nlls(model, tokens, **options))
    return math.exp(sum(nlls) / len(nlls))


def check_ids(tokens: Int[np.ndarray, "..."], vocab_size: int) -> None:
    """Raises InputError unless all ids are in the vocabulary."""
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        raise InputError(
            f"token ids from {tokens.min()} to {tokens.max()} do not fit the model's vocabulary "
            f"of {vocab_size}; was the text tokenized for another model?"
        )


def _window_nlls(reader: Reader, tokens: np.ndarray, window: int, starts: range) -> Iterator[float]:
    """The generator behind `window_nlls`, which checks its arguments when called, not later."""
    for first in range(0, len(starts), reader.batch):
        some = starts[first : first + reader.batch]
        nll = reader.nll(np.stack([tokens[start : start + window] for start in some]))
        yield from nll.mean(axis=1, dtype=np.float64).tolist()


def read_piece(
    model: Llama,
    cache: KVCache,
    tokens: Int[Array, "B P"],
    targets: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    context_lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B P"], Bool[Array, "B P"], KVCache]:
    """NLL of `targets` after each of the next `tokens`, of which `lengths` are real.

    And whether each is the likeliest one; and the cache with the tokens appended.
    """
    hidden, cache_after = model.hidden_states(
        tokens, lengths=lengths, cache=cache, context_lengths=context_lengths
    )
    assert cache_after is not None
    rows, width = tokens.shape
    block = max(1, min(width, LOGITS // rows))  # logits of so many tokens of each row at once
    while width % block:
        block -= 1

    def score(some: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = some
        logits = model.unembed(hidden)  # the compiler makes them once, here and for the NLL
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        target = jnp.where(ids == targets[..., None], logits, -jnp.inf).max(axis=-1)
        return model.nll(hidden, targets), target >= logits.max(axis=-1)

    blocks = hidden.reshape(rows, -1, block, hidden.shape[-1]), targets.reshape(rows, -1, block)
    scores = jax.lax.map(score, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), blocks))
    nll, is_best = (jnp.moveaxis(x, 0, 1).reshape(rows, width) for x in scores)
    shards = Shards.of(model.norm.scale[...])  # every process is to see all of them
    return shards.put(nll, None), shards.put(is_best, None), cache_after


@functools.lru_cache(maxsize=SHAPES)
def _read_piece(rows: int, capacity: int) -> Any:
    """`read_piece` compiled for caches of this shape; those longest unused are dropped."""
    read = functools.partial(read_piece)  # what is compiled for it goes when it goes
    return jax.jit(read, donate_argnames="cache", compiler_options=compiler_options())


def _capacity(length: int, capacity: int | None) -> int:
    capacity = length if capacity is None else capacity
    if capacity < length:
        raise InputError(f"a KV cache of {capacity} tokens cannot hold a text of {length}")
    return capacity
