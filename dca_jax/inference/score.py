"""Perplexity of long texts with bounded memory, without [T, V] logits.

A text is read like a long prompt, in pieces through a KV cache. So the memory of activations and
logits is bounded by a piece, only the cache grows with the text, and one compilation works for
every window length that fits into the cache. Short texts use the same code, several at once.
`dca_jax.evaluation.windows` has the evaluation protocols that use this.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dca_jax.device import current_device
from dca_jax.errors import InputError
from dca_jax.inference.buckets import new_cache
from dca_jax.inference.compiled import compiled
from dca_jax.inference.pieces import scored_pieces
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama
from dca_jax.products.packed import packed_forms
from dca_jax.sharding import Shards

# Tokens whose logits are in memory at once; with a vocabulary of 128k they take 256 MiB.
LOGITS = 512


class Scores(NamedTuple):
    """Scores of each token of a text except the first, given the tokens before it.

    Attributes:
        nll: -ln p(token), in nats, float32.
        is_best: whether no other token is more likely.
    """

    nll: Float[np.ndarray, " _"]  # texts of one batch differ in length
    is_best: Bool[np.ndarray, " _"]


class Branches(NamedTuple):
    """Texts with a common beginning.

    Attributes:
        prefix: the common beginning; may be empty.
        ends: the rest of each text, at least one token; its first token is not scored.
    """

    prefix: Sequence[int] | Int[np.ndarray, " _"]
    ends: Sequence[Sequence[int] | Int[np.ndarray, " _"]]


class Reader:
    """Reads texts through one KV cache, which is emptied and reused.

    Args:
        model: the model, with its own attention (`model.dca`) and dtype; logits, log-sum-exp and
            result are float32.
        batch: number of texts read together. Smaller batches are padded, so that only one shape is
            compiled.
        capacity: number of tokens of the longest text.
        on_piece: function called after each piece with the number of tokens read.
        cache_dtype: dtype of the cache, or its name (default: the model's).

    Raises:
        InputError: a cache that does not fit into memory.
    """

    def __init__(
        self,
        model: Llama,
        batch: int,
        capacity: int,
        on_piece: Callable[[int], None] | None = None,
        cache_dtype: Any = None,
    ) -> None:
        self.model, self.batch, self.capacity, self.on_piece = model, batch, capacity, on_piece
        self._cache_dtype = cache_dtype
        self._cache: KVCache | None = None
        self._cache = self._empty()

    def read(self, texts: Sequence[Sequence[int] | Int[np.ndarray, " _"]]) -> list[Scores]:
        """The scores of at most `batch` texts, each of 1 to `capacity` tokens.

        Raises:
            InputError: as `read_branches`.
        """
        found = self.read_branches([Branches((), [text]) for text in texts])
        return [scores for (scores,) in found]

    def read_branches(self, texts: Sequence[Branches]) -> list[list[Scores]]:
        """Scores at most `batch` groups of texts with a common beginning, each prefix read once.

        Unless the prefixes are empty, this does not work for models that depend on the length of a
        text (`dca_jax.inference.prefix.depends_on_length`), nor with sparse prefill.

        Returns:
            For each end, the scores of its tokens except the first.

        Raises:
            InputError: plain attention over more than the model's sliding window, or a non-finite
                NLL; the message names the first text and token with one.
        """
        cache, shared = self._empty(), [len(one.prefix) for one in texts]
        longest = max(len(one.prefix) + len(end) for one in texts for end in one.ends)
        self.model.check_window(longest - 1)
        if any(shared):
            prefixes = [one.prefix for one in texts]
            _, _, cache = self._append(cache, prefixes, prefixes, shared)
        found: list[list[Scores]] = [[] for _ in texts]
        for turn in range(max(len(one.ends) for one in texts)):
            cache = cache.rollback(shared)
            ends = [one.ends[turn] if turn < len(one.ends) else () for one in texts]
            whole = [n + len(end) for n, end in zip(shared, ends, strict=True)]
            inputs, targets = [end[:-1] for end in ends], [end[1:] for end in ends]
            nll, is_best, cache = self._append(cache, inputs, targets, whole)
            for row, end in enumerate(ends):
                if len(end):
                    last = len(end) - 1
                    found[row].append(Scores(nll[row, :last], is_best[row, :last]))
                    self._check(nll[row, :last], row, shared[row])
        self._cache = cache.rollback([])
        return found

    def _append(
        self,
        cache: KVCache,
        inputs: Sequence[Sequence[int] | Int[np.ndarray, " _"]],
        targets: Sequence[Sequence[int] | Int[np.ndarray, " _"]],
        whole: Sequence[int],
    ) -> tuple[Float[np.ndarray, "B T"], Bool[np.ndarray, "B T"], KVCache]:
        """Continues reading each row; returns the targets' NLL, and whether each is the best.

        Args:
            whole: number of tokens of each row's text.
        """
        rows = cache.lengths.shape[0]  # on a mesh, more than the batch
        counts, context_lengths = np.zeros((rows,), np.int32), np.ones((rows,), np.int32)
        counts[: len(inputs)] = [len(one) for one in inputs]
        context_lengths[: len(whole)] = np.maximum(whole, 1)
        tokens = np.zeros((2, rows, int(counts.max())), np.int32)
        for row, (given, wanted) in enumerate(zip(inputs, targets, strict=True)):
            tokens[:, row, : len(given)] = given, wanted
        nlls = [np.zeros((rows, 0), np.float32)]
        bests = [np.zeros((rows, 0), bool)]
        start, model = 0, self.model.reading(max(whole))
        segment = 1 if model.sparse is None else model.sparse.segment
        pieces = scored_pieces(
            model.config,
            current_device().platform,
            packed=bool(packed_forms(model)),
            batch=rows,
            segment=segment,
        )
        for count, width in pieces.cut(tokens.shape[2]):
            lengths = np.clip(counts - start, 0, count)
            piece = np.zeros((2, rows, width), np.int32)
            piece[:, :, :count] = tokens[:, :, start : start + count]
            read = compiled(read_piece, model, rows, cache.capacity, width, donated=1)
            nll, is_best, cache = read(cache, *piece, lengths, context_lengths)
            nlls.append(np.asarray(nll)[:, :count])
            bests.append(np.asarray(is_best)[:, :count])
            start += count
            if self.on_piece is not None:
                self.on_piece(int(lengths.sum()))
        return np.concatenate(nlls, axis=1), np.concatenate(bests, axis=1), cache

    def _check(self, nll: Float[np.ndarray, " _"], row: int, start: int) -> None:
        """Raises InputError for non-finite scores, and drops the cache, in which they spread."""
        if not np.isfinite(nll).all():
            raise InputError(
                f"the NLL of token {start + int(np.argmin(np.isfinite(nll))) + 1} of text {row} is "
                f"not finite: the weights overflow {self.model.dtype}, or the checkpoint is "
                "broken; compute in float32, or check the checkpoint"
            )

    def nll(self, tokens: Int[np.ndarray, "b T"]) -> Float[np.ndarray, "b T-1"]:
        """The negative log-likelihoods of at most `batch` texts of equal length."""
        return np.stack([scores.nll for scores in self.read(list(tokens))])

    def _empty(self) -> KVCache:
        """The cache, for updating in place; it is lost if reading fails."""
        cache, self._cache = self._cache, None
        if cache is None:  # all rows are computed, so there are no unused ones
            shape = self.batch, self.capacity, self._cache_dtype
            cache = new_cache(self.model, *shape, more_rows=False)
        return cache


def token_nll(
    model: Llama,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    capacity: int | None = None,
    cache_dtype: Any = None,
) -> Float[np.ndarray, "B T-1"]:
    """Negative log-likelihood, in nats, of each token except the first, given those before it.

    Args:
        model: as in `Reader`.
        tokens: texts of T >= 2 tokens, with ids below the vocabulary size.
        capacity: capacity of the KV cache in tokens, at least T (default: T). With the longest of
            several lengths, one compilation works for all of them.
        cache_dtype: dtype of the cache, or its name (default: the model's).

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
    reader = Reader(model, batch, _capacity(length, capacity), cache_dtype=cache_dtype)
    return reader.nll(tokens)


def window_nlls(
    model: Llama,
    tokens: Int[Array | np.ndarray, " N"],
    *,
    window: int,
    stride: int | None = None,
    capacity: int | None = None,
    batch: int = 1,
    cache_dtype: Any = None,
) -> Iterator[float]:
    """Yields the mean NLL, in nats per token, of each window of `tokens`, in order.

    Every window is an independent text: its first token is given, and the other `window - 1` tokens
    are predicted from the window only. Windows start at 0, stride, 2 * stride ... and lie
    completely within `tokens`.

    Args:
        window: tokens per window, at least 2.
        stride: tokens from one window's start to the next (default: `window`, no overlap).
        capacity, cache_dtype: as in `token_nll`.
        batch: number of windows read together.

    Raises:
        InputError: fewer tokens than one window, or a stride or batch below 1; also as in
            `token_nll`.
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
    shape = min(batch, len(starts)), _capacity(window, capacity)
    reader = Reader(model, *shape, cache_dtype=cache_dtype)
    return _window_nlls(reader, tokens, window, starts)


def perplexity(
    model: Llama,
    tokens: Int[Array | np.ndarray, " N"],
    *,
    window: int,
    stride: int | None = None,
    capacity: int | None = None,
    batch: int = 1,
    cache_dtype: Any = None,
) -> float:
    """exp of the mean of `window_nlls` (same arguments), as in the paper's Table 1."""
    options = {"window": window, "stride": stride, "capacity": capacity, "batch": batch}
    nlls = list(window_nlls(model, tokens, cache_dtype=cache_dtype, **options))
    return math.exp(sum(nlls) / len(nlls))


def check_ids(tokens: Int[np.ndarray, "..."], vocab_size: int) -> None:
    """Raises InputError unless all ids are in the vocabulary."""
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        raise InputError(
            f"token ids from {tokens.min()} to {tokens.max()} do not fit the model's vocabulary "
            f"of {vocab_size}; was the text tokenized for another model?"
        )


def _window_nlls(reader: Reader, tokens: np.ndarray, window: int, starts: range) -> Iterator[float]:
    """The generator behind `window_nlls`, which itself checks its arguments at the call."""
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

    Also returns whether each target is the most likely token, and the updated cache.
    """
    hidden, cache_after = model.hidden_states(
        tokens, lengths=lengths, cache=cache, context_lengths=context_lengths
    )
    assert cache_after is not None
    rows, width = tokens.shape
    block = max(1, min(width, LOGITS // rows))  # tokens per row with logits at the same time
    while width % block:
        block -= 1

    def score(some: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = some
        logits = model.unembed(hidden)  # the compiler computes them once for both uses
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        target = jnp.where(ids == targets[..., None], logits, -jnp.inf).max(axis=-1)
        return model.nll(hidden, targets), target >= logits.max(axis=-1)

    blocks = hidden.reshape(rows, -1, block, hidden.shape[-1]), targets.reshape(rows, -1, block)
    scores = jax.lax.map(score, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), blocks))
    nll, is_best = (jnp.moveaxis(x, 0, 1).reshape(rows, width) for x in scores)
    shards = Shards.of(model.norm.scale[...])  # every process needs all of them
    return shards.put(nll, None), shards.put(is_best, None), cache_after


def _capacity(length: int, capacity: int | None) -> int:
    capacity = length if capacity is None else capacity
    if capacity < length:
        raise InputError(f"a KV cache of {capacity} tokens cannot hold a text of {length}")
    return capacity
