"""The engine: prompts of token ids in, tokens out. It knows nothing of text.

A batch goes through pure functions, usable under `jax.jit` in a script of your own:

    read         appends a piece of each row's prompt to the cache: the prefill, piece by piece
    read_row     the same for one row of a batch
    first_token  draws each row's first new token from what `read` leaves
    decode       feeds each row its last token and draws the next, many times, on the device

`Run` compiles them, cuts the prompts, and brings the tokens to the host a segment at a time. Shapes
come in buckets, so that another prompt length seldom compiles anything.
"""

import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key

from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.inference.buckets import SHAPES, SMALLEST, cut, new_cache, on_device, piece_widths
from dca_jax.inference.sampling import Sampler
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama
from dca_jax.sharding import Shards, axis_size, mesh_of, partition

PAD = -1  # what `decode` gives for a row that has ended: no token has this id
FAILED = -2  # what it gives in place of a token where the logits are not finite; the row has ended
STOP_IDS = 64  # for which a program has room; if there are more, it has room for all ids
SEGMENT = 64  # tokens that `Run` lets the device draw before it looks at them, at most
SEGMENT_SECONDS = 0.05  # a segment that took longer is not made longer: text streams smoothly


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class State:
    """A batch in the middle of its generation: what goes round in `decode`.

    Attributes:
        cache: everything read so far, the last token drawn not included.
        token: the last token drawn for each row; `FAILED` where there was none to draw.
        finished: rows that have drawn a stop id, have failed, or were stopped by the caller; they
            stay as they are.
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


def read_row(
    model: Llama,
    cache: KVCache,
    hidden: Float[Array, "B D"],
    row: int | Int[Array, ""],
    tokens: Int[Array, "1 T"],
    lengths: Int[Array, " 1"],
    context_lengths: Int[Array, " 1"],
) -> tuple[Float[Array, "B D"], KVCache]:
    """`read` of one row only: nothing is computed for the others. Not on a mesh.

    Args:
        row: its number. tokens, lengths, context_lengths: of this row.
    """
    layers, batch = cache.key.shape[:2]
    row = jnp.asarray(row, jnp.int32)
    one = KVCache(  # the rows as layers: the same memory
        key=cache.key.reshape(layers * batch, 1, *cache.key.shape[2:]),
        value=cache.value.reshape(layers * batch, 1, *cache.value.shape[2:]),
        lengths=cache.lengths[row][None],
        frequency_lengths=cache.frequency_lengths[row][None],
    )
    piece, after = model.hidden_states(
        tokens,
        lengths=lengths,
        cache=one,
        context_lengths=context_lengths,
        cache_layers=jnp.arange(layers, dtype=jnp.int32) * batch + row,
    )
    assert after is not None
    cache_after = KVCache(
        key=after.key.reshape(cache.key.shape),
        value=after.value.reshape(cache.value.shape),
        lengths=cache.lengths.at[row].set(after.lengths[0]),
        frequency_lengths=cache.frequency_lengths.at[row].set(after.frequency_lengths[0]),
    )
    return hidden.at[row].set(_at_last(piece, lengths)[0]), cache_after


def empty_hidden(model: Llama, batch: int) -> Float[Array, "B D"]:
    """What `read` takes as `hidden` before the first piece."""
    shape, mesh = (batch, model.config.hidden_size), mesh_of(model)
    zeros = np.zeros(shape, model.dtype)
    if mesh is None:
        return on_device(model, zeros)
    return jax.device_put(zeros, NamedSharding(mesh, partition("BD", shape, mesh.shape)))


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

    A row whose logits are not all finite gets `FAILED` in place of a token, and has finished.

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
        last = jnp.maximum(state.token, 0)[:, None]  # a row that failed has none
        hidden, cache = model.hidden_states(last, lengths=grows, cache=state.cache)
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

    It is `FAILED`, and ends the row, where the logits are not all finite. Rows that have finished
    in `state` keep their token.
    """
    token = sampler.sample(logits, jax.vmap(jax.random.fold_in)(key, lengths), seen)
    token = jnp.where(jnp.isfinite(logits).all(axis=1), token, FAILED)
    if state is not None:
        token = jnp.where(state.finished, state.token, token)
    if seen is not None:
        seen = seen.at[jnp.arange(seen.shape[0]), jnp.maximum(token, 0)].set(True)
    ends = jnp.any(token[:, None] == stop_ids[None, :], axis=1) | (token == FAILED)
    return token, ends, seen


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


class Programs(NamedTuple):
    """What is compiled for caches of one shape, each once for each width of a piece."""

    read: Any
    read_row: Any
    read_whole: Any
    decode: Any


@functools.lru_cache(maxsize=SHAPES)
def programs(rows: int, capacity: int) -> Programs:
    """Those for caches of so many rows of `capacity` tokens; the ones longest unused are dropped.

    The cache is donated: it is updated where it lies, never copied.
    """

    def compiled(function: Callable[..., Any], **options: Any) -> Any:
        # A function of its own: what is compiled for it goes when it goes.
        whole = functools.partial(function)
        return jax.jit(whole, compiler_options=compiler_options(), **options)

    return Programs(
        read=compiled(read, donate_argnames="cache"),
        read_row=compiled(read_row, donate_argnames="cache"),
        read_whole=compiled(read_whole, donate_argnames="cache", keep_unused=True),
        decode=compiled(_stop_and_decode, donate_argnames="state"),
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
) -> dict[str, Any]:
    """A `State` but for its cache, which need not pass."""
    logits = _whole(model, model.unembed(hidden))
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)
    key = _whole(model, jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows))
    token, ends, seen = _draw(logits, key, lengths, _whole(model, seen), sampler, stop_ids)
    return {"token": token, "finished": ends, "key": key, "seen": seen}


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


# --- the host's side ---------------------------------------------------------------------------


class Run:
    """One batch of prompts being continued; iterate over it to get the tokens.

    Every prompt is checked at construction; nothing is computed before the first iteration. Each
    iteration gives, for each row, the list of its new tokens, a stop id included. They come in
    segments of one token at first, and of up to `SEGMENT` once that is quick enough to look
    smooth. What a row gets does not depend on the segments, and when greedy not on the other rows.

    A row whose logits are not all finite ends there, and the others go on: `failed` says so.

    Args:
        prompts: token ids; rows may differ in length, and none is empty.
        max_new_tokens: of each row, at least 1.
        seed: of the draws. Row r draws with a key of its own: equal prompts give different samples.
        stop_ids: ids that end a row.
        cache: what has been read before: row b of it must hold the first `lengths[b]` tokens of
            prompts[b], and not all of them; rows beyond the prompts hold nothing. It is used up,
            its memory being updated in place, and the attribute `cache` takes its place. Default:
            a new one, as large as needed.
        cache_dtype: of a new cache; default: the model's.
        on_piece: called after each piece of the prompts with the number of tokens read, all rows
            together; may be set later, as an attribute.

    Attributes:
        cache: what the rows have read, their last token drawn not included. After a row has failed
            it is deleted when the iteration ends, for numbers that are not finite spread.
        failed: for each row that has failed, how many tokens of its text, those drawn included,
            stand before the one that could not be drawn.

    Raises:
        InputError: no prompts, an empty prompt, an id outside the vocabulary, or a prompt and its
            new tokens beyond the capacity of `cache` or the window of plain attention.
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
        longest = max(map(len, prompts))
        model.check_window(longest + max_new_tokens - 1)  # the last one drawn is never read
        if cache is None:
            cache = new_cache(model, len(prompts), longest + max_new_tokens, cache_dtype)
        self._start = _check_cache(cache, prompts, max_new_tokens)
        # Rows that fill up the cache's: one token that is not read, and finished.
        self._num_rows, fill = len(prompts), cache.lengths.shape[0] - len(prompts)
        self._prompts = [*prompts, *[[0]] * fill]
        self._start += [1] * fill
        self._model, self._sampler = model, sampler.traced()
        self._max_new_tokens, self._seed = max_new_tokens, seed
        # Of those that can be drawn; filled up, so that another number of them does not recompile.
        ids = sorted({int(n) for n in stop_ids if 0 <= n < model.config.vocab_size})
        width = STOP_IDS if len(ids) <= STOP_IDS else model.config.vocab_size
        self._stop_ids = np.asarray(ids + [-1] * (width - len(ids)), np.int32)
        self._finished = np.arange(len(self._prompts)) >= self._num_rows
        self.cache, self.on_piece = cache, on_piece
        self.failed: dict[int, int] = {}

    def __iter__(self) -> Iterator[list[list[int]]]:
        """Reads the prompts, then draws."""
        try:
            yield from self._segments()
        finally:
            if self.failed:
                self.cache.key.delete()
                self.cache.value.delete()

    def _segments(self) -> Iterator[list[list[int]]]:
        state = self._draw_first(self.read_prompts())
        decode = self._programs.decode
        lengths = [len(prompt) for prompt in self._prompts]
        yield self._rows(np.asarray(state.token)[:, None], lengths)
        drawn, segment = 1, 1
        while drawn < self._max_new_tokens and not self._finished.all():
            limit = min(segment, self._max_new_tokens - drawn)
            begin = time.perf_counter()
            stopped = self._finished.copy()
            state, tokens = decode(
                self._model, state, stopped, self._sampler, self._stop_ids, limit
            )
            self.cache = state.cache
            rows = self._rows(np.asarray(tokens), lengths)
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
        mesh = mesh_of(self._model)
        if axis_size(mesh, "context") > 1 and not any(self._start[: self._num_rows]):
            return self._read_whole(context_lengths)
        # Placed as `read` leaves it, or a second piece would compile once more.
        hidden, at = empty_hidden(self._model, len(self._prompts)), np.asarray(self._start)
        *wide, smallest = piece_widths(1 if mesh is None else len(self._prompts))
        if mesh is None and len(self._prompts) > 1:
            # Long pieces row by row, for rows differ in length; what is left, all rows together.
            for row in range(self._num_rows):
                hidden = self._read_row(row, at, hidden, wide)
            wide, smallest = [], SMALLEST
        for count, width in cut(int((context_lengths - at).max()), (*wide, smallest)):
            lengths = np.clip(context_lengths - at, 0, count).astype(np.int32)
            tokens = np.zeros((len(at), width), np.int32)
            for row, length in enumerate(lengths):
                tokens[row, :length] = self._prompts[row][at[row] : at[row] + length]
            hidden, self.cache = self._programs.read(
                self._model, self.cache, hidden, tokens, lengths, context_lengths
            )
            at = at + lengths
            self._tell(hidden, int(lengths.sum()))
        return hidden

    def _read_row(
        self,
        row: int,
        at: Int[np.ndarray, " B"],
        hidden: Float[Array, "B D"],
        widths: Sequence[int],
    ) -> Float[Array, "B D"]:
        """Reads what fills pieces of these widths of one row; moves `at`, where each row stands."""
        prompt = self._prompts[row]
        for count, width in cut(len(prompt) - int(at[row]), (*widths, SMALLEST)):
            if width == SMALLEST:
                break
            tokens = np.zeros((1, width), np.int32)
            tokens[0, :count] = prompt[at[row] : at[row] + count]
            lengths, whole = np.asarray([count], np.int32), np.asarray([len(prompt)], np.int32)
            hidden, self.cache = self._programs.read_row(
                self._model, self.cache, hidden, row, tokens, lengths, whole
            )
            at[row] += count
            self._tell(hidden, count)
        return hidden

    def _read_whole(self, lengths: Int[np.ndarray, " B"]) -> Float[Array, "B D"]:
        tokens = np.zeros((len(self._prompts), self.cache.capacity), np.int32)
        for row, prompt in enumerate(self._prompts):
            tokens[row, : len(prompt)] = prompt
        hidden, self.cache = self._programs.read_whole(self._model, self.cache, tokens, lengths)
        self._tell(hidden, int(lengths.sum()))
        return hidden

    @property
    def _programs(self) -> Programs:
        return programs(len(self._prompts), self.cache.capacity)

    def _tell(self, hidden: Float[Array, "B D"], tokens: int) -> None:
        if self.on_piece is not None:
            jax.block_until_ready(hidden)  # or the bar would run ahead of the device
            self.on_piece(tokens)

    def _draw_first(self, hidden: Float[Array, "B D"]) -> State:
        seen = np.zeros((len(self._prompts), self._model.config.vocab_size), bool)
        if self._sampler.repetition_penalty != 1:
            for row, prompt in enumerate(self._prompts):
                seen[row, np.asarray(prompt)] = True
        lengths = self.cache.lengths
        state = _begin(
            self._model, lengths, hidden, self._seed, self._sampler, self._stop_ids, seen
        )
        return State(cache=self.cache, **state)

    def _rows(self, tokens: Int[np.ndarray, "B n"], lengths: list[int]) -> list[list[int]]:
        """Each row's new tokens; notes what has ended, and the `lengths` of the texts."""
        rows = []
        for number, row in enumerate(tokens[: self._num_rows].tolist()):
            new = [token for token in row if token >= 0]
            if new and not self._finished[number]:
                self._finished[number] = new[-1] in self._stop_ids
            if FAILED in row and number not in self.failed:
                self.failed[number] = lengths[number] + len(new)
                self._finished[number] = True
            lengths[number] += len(new)
            rows.append(new)
        return rows


class NotFiniteError(InputError):
    """Logits that are not finite, after which a text cannot go on."""

    def __init__(self, model: Llama, row: int, position: int) -> None:
        super().__init__(
            f"prompt {row}: the logits after token {position} are not finite: the weights hold NaN "
            f"or infinity, or overflow {model.dtype}; check the checkpoint, or compute in float32"
        )


def generate(model: Llama, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """Each prompt's new tokens, a stop id included; `options` are those of `Run`.

    Raises:
        InputError: as `Run`; `NotFiniteError`, when the other rows have ended.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    run = Run(model, prompts, **options)
    for segment in run:
        for text, new in zip(texts, segment, strict=True):
            text += new
    if run.failed:
        raise NotFiniteError(model, *next(iter(run.failed.items())))
    return texts


def check_numbers(max_new_tokens: int, seed: int) -> None:
    """Raises InputError unless there is a token to draw, and a seed to draw it with."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not -(2**31) <= seed < 2**31:
        raise InputError(f"seed must fit into 32 bits, got {shown(seed)}")


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
    if len(start) < len(prompts) or any(start[len(prompts) :]):
        raise InputError(
            f"the cache has {len(start)} rows, but there are {len(prompts)} prompts; it must have "
            "a row for each, and any others must be empty"
        )
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
    return start[: len(prompts)]
