"""The engine: prompts of token ids in, tokens out. It knows nothing of text.

A batch goes through three pure functions, usable under `jax.jit` in a script of your own:

    read         appends a piece of each row's prompt to the cache: the prefill, piece by piece
    first_token  draws each row's first new token from what `read` leaves
    decode       feeds each row its last token and draws the next, many times, on the device

`Run` compiles them, cuts the prompts, and brings the tokens to the host a segment at a time. Shapes
come in buckets, so that another prompt length seldom compiles anything.
"""

import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from dca_jax.buckets import new_cache, padded_length, piece_length
from dca_jax.errors import InputError
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama
from dca_jax.sampling import Sampler

PAD = -1  # what `decode` gives for a row that has ended: no token has this id
SEGMENT = 64  # tokens that `Run` lets the device draw before it looks at them, at most
SEGMENT_SECONDS = 0.05  # a segment that took longer is not made longer: text streams smoothly


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class State:
    """A batch in the middle of its generation: what goes round in `decode`.

    Attributes:
        cache: everything read so far, the last token drawn not included.
        token: the last token drawn for each row.
        finished: rows that have drawn a stop id (or were stopped by the caller); they stay as
            they are.
        key: one for each row. With the position of the token it makes the key of its draw: so a
            draw depends neither on the other rows nor on where the segments are cut.
        seen: the tokens each row holds, for a repetition penalty; None without one.
    """

    cache: KVCache
    token: Int[Array, " B"]
    finished: Bool[Array, " B"]
    key: Key[Array, " B"]
    seen: Bool[Array, "B V"] | None


def read(
    model: Llama,
    cache: KVCache,
    hidden: Float[Array, "B D"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    context_lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B D"], KVCache]:
    """Appends a piece of each row's prompt to the cache.

    Args:
        hidden: of each row's last token so far; zeros before the first piece.
        tokens: the pieces, right-padded. lengths: the real tokens of each; 0 for a row whose
            prompt has ended before this piece.
        context_lengths: tokens of each row's whole prompt, the same for every piece.

    Returns:
        The hidden state of each row's last token (what `Llama.unembed` takes), and the cache.
    """
    piece, cache_after = model.hidden_states(
        tokens, lengths=lengths, cache=cache, context_lengths=context_lengths
    )
    assert cache_after is not None
    at = jnp.maximum(lengths - 1, 0)
    last = jnp.take_along_axis(piece, at[:, None, None], axis=1)[:, 0]
    return jnp.where((lengths > 0)[:, None], last, hidden), cache_after


def first_token(
    logits: Float[Array, "B V"],
    cache: KVCache,
    key: Key[Array, " B"],
    sampler: Sampler,
    stop_ids: Int[Array, " n"],
    seen: Bool[Array, "B V"] | None = None,
) -> State:
    """Draws each row's first new token, from the logits after its prompt."""
    finished = jnp.zeros(logits.shape[:1], bool)
    state = State(
        cache=cache,
        token=jnp.zeros(logits.shape[:1], jnp.int32),
        finished=finished,
        key=key,
        seen=seen,
    )
    return _draw(state, cache, logits, sampler, stop_ids)


def decode(
    model: Llama,
    state: State,
    sampler: Sampler,
    stop_ids: Int[Array, " n"],
    limit: int | Int[Array, ""],
    *,
    max_tokens: int = SEGMENT,
) -> tuple[State, Int[Array, "B max_tokens"]]:
    """Draws up to `limit` more tokens for each row, until all rows have finished.

    The cache must have room for them: what does not fit would be lost (`Run` checks).

    Args:
        sampler, stop_ids: how a token is drawn, and which ones end a row. Ids of -1 are inert.
        limit: at most `max_tokens`; a traced number, so that another one does not recompile.
        max_tokens: static, the width of the result.

    Returns:
        The state, and each row's new tokens, a stop id included; `PAD` behind them.
    """

    def unfinished(carry: tuple[Array, State, Array]) -> Array:
        step, state, _ = carry
        return (step < limit) & ~jnp.all(state.finished)

    def step_once(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        step, state, tokens = carry
        grows = (~state.finished).astype(jnp.int32)
        hidden, cache = model.hidden_states(state.token[:, None], lengths=grows, cache=state.cache)
        assert cache is not None
        logits = model.unembed(hidden[:, 0])
        after = _draw(state, cache, logits, sampler, stop_ids)
        column = jnp.where(state.finished, PAD, after.token)
        return step + 1, after, tokens.at[:, step].set(column)

    tokens = jnp.full((state.token.shape[0], max_tokens), PAD, jnp.int32)
    start = (jnp.int32(0), state, tokens)
    _, state, tokens = jax.lax.while_loop(unfinished, step_once, start)
    return state, tokens


def _draw(
    state: State,
    cache: KVCache,
    logits: Float[Array, "B V"],
    sampler: Sampler,
    stop_ids: Int[Array, " n"],
) -> State:
    """The state after each unfinished row has drawn the token that follows `cache`."""
    key = jax.vmap(jax.random.fold_in)(state.key, cache.lengths)
    token = sampler.sample(logits, key, state.seen)
    token = jnp.where(state.finished, state.token, token)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(seen.shape[0]), token].set(True)
    ends = jnp.any(token[:, None] == stop_ids[None, :], axis=1)
    return replace(state, cache=cache, token=token, finished=state.finished | ends, seen=seen)


# Compiled once for each shape. The cache is donated: it is updated where it lies, never copied.
_read = jax.jit(read, donate_argnames=("cache", "hidden"))
_first_token = jax.jit(first_token, donate_argnames=("cache",))


@jax.jit
def _checked_logits(
    model: Llama, hidden: Float[Array, "B D"]
) -> tuple[Float[Array, "B V"], Bool[Array, " B"]]:
    """Logits, and which rows of them are finite throughout."""
    logits = model.unembed(hidden)
    return logits, jnp.isfinite(logits).all(axis=1)


@functools.partial(jax.jit, static_argnames="batch")
def _row_keys(seed: int | Int[Array, ""], *, batch: int) -> Key[Array, " batch"]:
    """A key for each row."""
    rows = jnp.arange(batch, dtype=jnp.int32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)


def decode_compiler_options() -> dict[str, Any] | None:
    """What to give `jax.jit(..., compiler_options=)` for a function that calls `decode`.

    A step of decoding multiplies one row by each weight, out of a stack of layers. Left to itself,
    XLA on a GPU copies every layer's weights out of the stack for Triton's products; cuBLAS reads
    them where they lie. 7B at 32k tokens on an H200: 15.3 ms a token, and 11.3 with cuBLAS. And the
    weights of q, k and v are not to be joined, which copies them too.
    """
    if jax.default_backend() != "gpu":
        return None
    return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}


def _stop_and_decode(
    model: Llama,
    state: State,
    stopped: Bool[Array, " B"],
    sampler: Sampler,
    stop_ids: Int[Array, " n"],
    limit: int | Int[Array, ""],
) -> tuple[State, Int[Array, "B max_tokens"]]:
    """`decode`, after the caller has stopped some rows."""
    state = replace(state, finished=state.finished | stopped)
    return decode(model, state, sampler, stop_ids, limit)


@functools.cache
def _segment() -> Any:
    """`_stop_and_decode` compiled; made when first called, for then the device is known."""
    options = decode_compiler_options()
    return jax.jit(_stop_and_decode, donate_argnames="state", compiler_options=options)


# --- the host's side ---------------------------------------------------------------------------


class Run:
    """One batch of prompts being continued; iterate over it to get the tokens.

    Every prompt is checked at construction; nothing is computed before the first iteration. Each
    iteration gives, for each row, the list of its new tokens, a stop id included. They come in
    segments of one token at first, and of up to `SEGMENT` once that is quick enough to look
    smooth. What a row gets does not depend on the segments, and when greedy not on the other rows.

    Args:
        prompts: token ids; rows may differ in length, and none is empty.
        max_new_tokens: of each row, at least 1.
        seed: of the draws. Row r draws with a key of its own: equal prompts give different samples.
        stop_ids: ids that end a row.
        cache: what has been read before: row b of it must hold the first `lengths[b]` tokens of
            prompts[b], and not all of them. It is used up, its memory being updated in place, and
            the attribute `cache` takes its place. Default: a new one, as large as needed.
        cache_dtype: of a new cache; default: the model's.
        on_piece: called after each piece of the prompts with the number of tokens read, all rows
            together; may be set later, as an attribute.

    Attributes:
        cache: what the rows have read, their last token drawn not included.

    Raises:
        InputError: no prompts, an empty prompt, an id outside the vocabulary, or a prompt and its
            new tokens beyond the capacity of `cache`; while iterating: logits that are not finite.
    """

    def __init__(
        self,
        model: Llama,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampler: Sampler = Sampler(),
        seed: int = 0,
        stop_ids: Collection[int] = (),
        cache: KVCache | None = None,
        cache_dtype: Any = None,
        on_piece: Callable[[int], None] | None = None,
    ) -> None:
        check_numbers(max_new_tokens, seed)
        check_prompts(prompts, model.config.vocab_size)
        if cache is None:
            length = max(map(len, prompts)) + max_new_tokens
            cache = new_cache(model, len(prompts), length, cache_dtype)
        self._model, self._prompts, self._sampler = model, prompts, sampler
        self._start = _check_cache(cache, prompts, max_new_tokens)
        self._max_new_tokens, self._seed = max_new_tokens, seed
        self._stop_ids = frozenset(stop_ids)
        self._finished = np.zeros(len(prompts), bool)
        self.cache, self.on_piece = cache, on_piece

    def __iter__(self) -> Iterator[list[list[int]]]:
        """Reads the prompts, then draws."""
        # Ids of -1 fill up to a multiple of 8, so that a few more stop ids do not recompile.
        ids = sorted(self._stop_ids)
        stop_ids = jnp.asarray(ids + [-1] * (-len(ids) % 8 or 8 * (not ids)), jnp.int32)
        state = self._begin(self.read_prompts(), stop_ids)
        yield self._rows(np.asarray(state.token)[:, None])
        drawn, segment = 1, 1
        while drawn < self._max_new_tokens and not self._finished.all():
            limit = min(segment, self._max_new_tokens - drawn)
            begin = time.perf_counter()
            stopped = jnp.asarray(self._finished)
            state, tokens = _segment()(self._model, state, stopped, self._sampler, stop_ids, limit)
            self.cache = state.cache
            rows = self._rows(np.asarray(tokens))
            if time.perf_counter() - begin < SEGMENT_SECONDS:
                segment = min(2 * segment, SEGMENT)
            drawn += limit
            yield rows

    def finish(self, row: int) -> None:
        """Draws no more for this row; for what a stop id cannot say, such as a stop string."""
        self._finished[row] = True

    def read_prompts(self) -> Float[Array, "B D"]:
        """Reads the prompts into `cache`; returns the hidden state of each one's last token."""
        rest = [p[start:] for p, start in zip(self._prompts, self._start, strict=True)]
        remaining = np.array([len(p) for p in rest], np.int32)
        context_lengths = jnp.asarray([len(p) for p in self._prompts], jnp.int32)
        hidden = jnp.zeros((len(rest), self._model.config.hidden_size), self._model.dtype)
        width = piece_length(len(rest))
        for at in range(0, int(remaining.max()), width):
            lengths = np.clip(remaining - at, 0, width)
            tokens = np.zeros((len(rest), padded_length(int(lengths.max()))), np.int32)
            for row, length in enumerate(lengths):
                tokens[row, :length] = rest[row][at : at + length]
            hidden, self.cache = _read(
                self._model,
                self.cache,
                hidden,
                jnp.asarray(tokens),
                jnp.asarray(lengths),
                context_lengths,
            )
            if self.on_piece is not None:
                jax.block_until_ready(hidden)  # or the bar would run ahead of the device
                self.on_piece(int(lengths.sum()))
        return hidden

    def _begin(self, hidden: Float[Array, "B D"], stop_ids: Int[Array, " n"]) -> State:
        logits, is_finite = _checked_logits(self._model, hidden)
        finite = np.asarray(is_finite)
        if not finite.all():
            raise InputError(
                f"the logits after prompt {int(np.argmin(finite))} are not finite: the weights "
                f"hold NaN or infinity, or overflow {self._model.dtype}; check the checkpoint, or "
                "compute in float32"
            )
        seen = None
        if self._sampler.penalizes:
            mask = np.zeros(logits.shape, bool)
            for row, prompt in enumerate(self._prompts):
                mask[row, np.asarray(prompt)] = True
            seen = jnp.asarray(mask)
        key = _row_keys(self._seed, batch=len(self._prompts))
        state = _first_token(logits, self.cache, key, self._sampler, stop_ids, seen)
        self.cache = state.cache
        return state

    def _rows(self, tokens: Int[np.ndarray, "B n"]) -> list[list[int]]:
        rows = [[int(t) for t in row if t != PAD] for row in tokens]
        for number, row in enumerate(rows):
            self._finished[number] |= bool(row) and row[-1] in self._stop_ids
        return rows


def generate(model: Llama, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """Each prompt's new tokens, a stop id included; `options` are those of `Run`."""
    texts: list[list[int]] = [[] for _ in prompts]
    for segment in Run(model, prompts, **options):
        for text, new in zip(texts, segment, strict=True):
            text += new
    return texts


def check_numbers(max_new_tokens: int, seed: int) -> None:
    """Raises InputError unless there is a token to draw, and a seed to draw it with."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not -(2**31) <= seed < 2**31:
        raise InputError(f"seed must fit into 32 bits, got {seed}")


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises InputError unless there is a prompt, none is empty, and all ids are in range."""
    if len(prompts) == 0:
        raise InputError("there is no prompt; give at least one")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {number} is empty; give at least one token")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"prompt {number} holds token id {low if low < 0 else high}, but the model's "
                f"vocabulary has ids 0 to {vocab_size - 1}; is this the model's own tokenizer?"
            )


def _check_cache(
    cache: KVCache, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[int]:
    """How many tokens of each prompt the cache holds already."""
    start = [int(n) for n in np.asarray(cache.lengths)]
    if len(start) != len(prompts):
        raise InputError(f"the cache has {len(start)} rows, but there are {len(prompts)} prompts")
    for number, (prompt, held) in enumerate(zip(prompts, start, strict=True)):
        if held >= len(prompt):
            raise InputError(
                f"row {number} of the cache holds {held} tokens and prompt {number} has "
                f"{len(prompt)}: at least the last must be left to read"
            )
        if len(prompt) + max_new_tokens > cache.capacity:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens; with {max_new_tokens} new ones that is "
                f"{len(prompt) + max_new_tokens}, and the cache holds {cache.capacity}; "
                "give fewer, or a larger cache"
            )
    return start
