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
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key

from dca_jax.errors import InputError
from dca_jax.inference.buckets import new_cache, padded_batch, padded_length, piece_length
from dca_jax.inference.sampling import Sampler
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama
from dca_jax.sharding import Shards, axis_size, mesh_of, partition

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
    return jnp.where((lengths > 0)[:, None], _at_last(piece, lengths), hidden), cache_after


def empty_hidden(model: Llama, batch: int) -> Float[Array, "B D"]:
    """What `read` takes as `hidden` before the first piece."""
    shape, mesh = (batch, model.config.hidden_size), mesh_of(model)
    place = None
    if mesh is not None:
        place = NamedSharding(mesh, partition("BD", shape, mesh.shape))
    return jnp.zeros(shape, model.dtype, device=place)


def read_whole(
    model: Llama, cache: KVCache, tokens: Int[Array, "B S"], lengths: Int[Array, " B"]
) -> tuple[Float[Array, "B D"], KVCache]:
    """Reads whole prompts at once, the devices of `context` sharing them: `read` on such a mesh.

    Args:
        cache: an empty one; the result takes its place, and its memory if it is donated.
        tokens: the prompts, right-padded to the cache's capacity. lengths: their real tokens.

    Returns:
        As `read`.
    """
    if tokens.shape[1] != cache.capacity:
        raise InputError(
            f"prompts read at once are padded to the cache's capacity, {cache.capacity} tokens; "
            f"got {tokens.shape[1]}"
        )
    hidden, cache_after = model.hidden_states(tokens, lengths=lengths, new_cache=cache.key.dtype)
    assert cache_after is not None
    return _at_last(hidden, lengths), cache_after


def _at_last(hidden: Float[Array, "B T D"], lengths: Int[Array, " B"]) -> Float[Array, "B D"]:
    """Each row's last real token: a sum with one term, for T may be cut between devices."""
    is_last = jnp.arange(hidden.shape[1], dtype=jnp.int32)[None, :] == lengths[:, None] - 1
    return jnp.where(is_last[:, :, None], hidden, 0).sum(axis=1)


def first_token(
    logits: Float[Array, "B V"],
    cache: KVCache,
    key: Key[Array, " B"],
    sampler: Sampler,
    stop_ids: Int[Array, " n"],
    seen: Bool[Array, "B V"] | None = None,
) -> State:
    """Draws each row's first new token, from the logits after its prompt."""
    token, ends, seen = _draw(logits, key, cache.lengths, seen, sampler, stop_ids)
    return State(cache=cache, token=token, finished=ends, key=key, seen=seen)


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
        logits = _whole(model, model.unembed(hidden[:, 0]))
        token, ends, seen = _draw(
            logits, state.key, cache.lengths, state.seen, sampler, stop_ids, state
        )
        column = jnp.where(state.finished, PAD, token)
        finished = state.finished | ends
        after = replace(state, cache=cache, token=token, finished=finished, seen=seen)
        return step + 1, after, tokens.at[:, step].set(column)

    tokens = _whole(model, jnp.full((state.token.shape[0], max_tokens), PAD, jnp.int32))
    start = (jnp.int32(0), state, tokens)
    _, state, tokens = jax.lax.while_loop(unfinished, step_once, start)
    return state, tokens


def _draw(
    logits: Float[Array, "B V"],
    key: Key[Array, " B"],
    lengths: Int[Array, " B"],
    seen: Bool[Array, "B V"] | None,
    sampler: Sampler,
    stop_ids: Int[Array, " n"],
    state: State | None = None,
) -> tuple[Int[Array, " B"], Bool[Array, " B"], Bool[Array, "B V"] | None]:
    """The token that follows `lengths` others in each row, whether it ends the row, and `seen`.

    Rows that have finished in `state` keep their token.
    """
    token = sampler.sample(logits, jax.vmap(jax.random.fold_in)(key, lengths), seen)
    if state is not None:
        token = jnp.where(state.finished, state.token, token)
    if seen is not None:
        seen = seen.at[jnp.arange(seen.shape[0]), token].set(True)
    return token, jnp.any(token[:, None] == stop_ids[None, :], axis=1), seen


def _whole(model: Llama, x: Any) -> Any:
    """Logits, or what is drawn from them, whole on every device of the model's mesh."""
    shards = Shards.of(model.norm.scale[...])
    return jax.tree.map(lambda leaf: shards.put(leaf, None), x)


GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}


def compiler_options() -> dict[str, Any] | None:
    """What to give `jax.jit(..., compiler_options=)` for a function that calls `read` or `decode`.

    A layer's weights lie in a stack. Left to itself, XLA on a GPU copies them out of it for
    Triton's products, and joins those of q, k and v, which copies them too; cuBLAS reads them where
    they lie. 7B at 32k tokens on an H200: the prompt in 1.24 s instead of 1.34, and a token in 9.6
    ms instead of 15.3.
    """
    return GPU_OPTIONS if jax.default_backend() == "gpu" else None


# Compiled once for each shape, with options that are known when a first call has found the device.
# The cache is donated: it is updated where it lies, never copied.


@functools.cache
def _read() -> Any:
    return jax.jit(read, donate_argnames="cache", compiler_options=compiler_options())


@functools.cache
def _read_whole() -> Any:
    return jax.jit(
        read_whole, donate_argnames="cache", keep_unused=True, compiler_options=compiler_options()
    )


@jax.jit
def _begin(
    model: Llama,
    lengths: Int[Array, " B"],
    hidden: Float[Array, "B D"],
    seed: int | Int[Array, ""],
    sampler: Sampler,
    stop_ids: Int[Array, " n"],
    seen: Bool[Array, "B V"] | None,
) -> tuple[dict[str, Any], Bool[Array, " B"]]:
    """A `State` but for its cache, which need not pass; and which rows' logits are all finite."""
    logits = _whole(model, model.unembed(hidden))
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)
    key = _whole(model, jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows))
    token, ends, seen = _draw(logits, key, lengths, _whole(model, seen), sampler, stop_ids)
    state = {"token": token, "finished": ends, "key": key, "seen": seen}
    return state, jnp.isfinite(logits).all(axis=1)


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
    return jax.jit(_stop_and_decode, donate_argnames="state", compiler_options=compiler_options())


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
        self._start = _check_cache(cache, prompts, max_new_tokens)
        # Rows that fill up the cache's, where a mesh wants more: one token, and finished.
        self._num_rows, fill = len(prompts), len(self._start) - len(prompts)
        self._prompts = [*prompts, *[[0]] * fill]
        self._model, self._sampler = model, sampler
        self._max_new_tokens, self._seed = max_new_tokens, seed
        self._stop_ids = frozenset(stop_ids)
        self._finished = np.arange(len(self._prompts)) >= self._num_rows
        self.cache, self.on_piece = cache, on_piece

    def __iter__(self) -> Iterator[list[list[int]]]:
        """Reads the prompts, then draws."""
        # Ids of -1 fill up to a multiple of 8, so that a few more stop ids do not recompile.
        ids = sorted(self._stop_ids)
        stop_ids = np.asarray(ids + [-1] * (-len(ids) % 8 or 8 * (not ids)), np.int32)
        state = self._draw_first(self.read_prompts(), stop_ids)
        yield self._rows(np.asarray(state.token)[:, None])
        drawn, segment = 1, 1
        while drawn < self._max_new_tokens and not self._finished.all():
            limit = min(segment, self._max_new_tokens - drawn)
            begin = time.perf_counter()
            stopped = self._finished.copy()
            state, tokens = _segment()(self._model, state, stopped, self._sampler, stop_ids, limit)
            self.cache = state.cache
            rows = self._rows(np.asarray(tokens))
            # Several processes must ask for the same, and their clocks differ.
            if jax.process_count() > 1 or time.perf_counter() - begin < SEGMENT_SECONDS:
                segment = min(2 * segment, SEGMENT)
            drawn += limit
            yield rows

    def finish(self, row: int) -> None:
        """Draws no more for this row; for what a stop id cannot say, such as a stop string."""
        self._finished[row] = True

    def read_prompts(self) -> Float[Array, "B D"]:
        """Reads the prompts into `cache`; returns the hidden state of each one's last token."""
        context_lengths = np.asarray([len(p) for p in self._prompts], np.int32)
        if axis_size(mesh_of(self._model), "context") > 1 and not any(self._start):
            tokens = np.zeros((len(self._prompts), self.cache.capacity), np.int32)
            for row, prompt in enumerate(self._prompts):
                tokens[row, : len(prompt)] = prompt
            hidden, self.cache = _read_whole()(self._model, self.cache, tokens, context_lengths)
            self._tell(hidden, int(context_lengths.sum()))
            return hidden
        rest = [p[start:] for p, start in zip(self._prompts, self._start, strict=True)]
        remaining = np.array([len(p) for p in rest], np.int32)
        # Placed as `read` leaves it, or a second piece would compile once more.
        hidden = empty_hidden(self._model, len(rest))
        width = piece_length(len(rest))
        for at in range(0, int(remaining.max()), width):
            lengths = np.clip(remaining - at, 0, width)
            tokens = np.zeros((len(rest), padded_length(int(lengths.max()))), np.int32)
            for row, length in enumerate(lengths):
                tokens[row, :length] = rest[row][at : at + length]
            hidden, self.cache = _read()(
                self._model, self.cache, hidden, tokens, lengths, context_lengths
            )
            self._tell(hidden, int(lengths.sum()))
        return hidden

    def _tell(self, hidden: Float[Array, "B D"], tokens: int) -> None:
        if self.on_piece is not None:
            jax.block_until_ready(hidden)  # or the bar would run ahead of the device
            self.on_piece(tokens)

    def _draw_first(self, hidden: Float[Array, "B D"], stop_ids: Int[np.ndarray, " n"]) -> State:
        seen = None
        if self._sampler.penalizes:
            seen = np.zeros((len(self._prompts), self._model.config.vocab_size), bool)
            for row, prompt in enumerate(self._prompts):
                seen[row, np.asarray(prompt)] = True
        lengths = self.cache.lengths
        state, is_finite = _begin(
            self._model, lengths, hidden, self._seed, self._sampler, stop_ids, seen
        )
        finite = np.asarray(is_finite)
        if not finite.all():
            raise InputError(
                f"the logits after prompt {int(np.argmin(finite))} are not finite: the weights "
                f"hold NaN or infinity, or overflow {self._model.dtype}; check the checkpoint, or "
                "compute in float32"
            )
        return State(cache=self.cache, **state)

    def _rows(self, tokens: Int[np.ndarray, "B n"]) -> list[list[int]]:
        rows = [[int(t) for t in row if t != PAD] for row in tokens[: self._num_rows]]
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
    """How many tokens of each prompt the cache holds already; 0 for rows that fill a mesh up."""
    start = [int(n) for n in np.asarray(cache.lengths)]
    rows = padded_batch(len(prompts), mesh_of(cache))
    if len(start) != rows:
        raise InputError(f"the cache has {len(start)} rows, but there are {len(prompts)} prompts")
    for number, (prompt, held) in enumerate(zip(prompts, start, strict=False)):
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
