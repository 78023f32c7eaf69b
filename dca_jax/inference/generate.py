"""The engine: from prompts of token ids to new token ids; it does not handle text.

`Run` compiles the functions of `dca_jax.inference.steps`, splits the prompts into pieces, and
fetches the tokens to the host one segment at a time. Shapes are rounded up to buckets, so that a
new prompt length seldom requires compilation.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.inference.buckets import (
    new_cache,
    on_device,
    pieces_of,
)
from dca_jax.inference.compiled import compiled
from dca_jax.inference.pieces import ENDS
from dca_jax.inference.sampling import Sampler
from dca_jax.inference.steps import (
    FAILED,
    SEGMENT,
    State,
    begin,
    empty_hidden,
    read,
    read_row,
    read_whole,
    stop_and_decode,
)
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama
from dca_jax.sharding import axis_size, mesh_of, replicated

STOP_IDS = 64  # capacity of a program for stop ids; with more of them, it has one for all ids
SEGMENT_SECONDS = 0.05  # segments slower than this do not grow, so that text streams smoothly


class Run:
    """Generation for a batch of prompts; iterate over it to get the tokens.

    All prompts are checked at construction; nothing is computed before the first iteration. Each
    iteration yields a list of new tokens for each row, including a stop id. Segments have one token
    at first and grow up to `SEGMENT` as long as they are fast enough to stream smoothly. A row's
    tokens do not depend on the segments and, with greedy decoding, not on the other rows.

    A row with non-finite logits ends there, and the others continue; see `failed`.

    Args:
        prompts: token ids; rows may differ in length, and none may be empty.
        max_new_tokens: maximum number of new tokens per row, at least 1.
        seed: random seed of the sampling. Each row has its own key, so equal prompts give different
            samples.
        stop_ids: ids that end a row.
        cache: an earlier cache, whose row b holds the first `lengths[b]` tokens of prompts[b], but
            not all of them; rows beyond the prompts must be empty. It is updated in place and
            cannot be used afterwards; the attribute `cache` replaces it. Default: a new cache of
            sufficient size.
        cache_dtype: dtype of a new cache (default: the model's).
        on_piece: function called after each piece of the prompts with the number of tokens read in
            all rows; may be set later as an attribute.

    Attributes:
        cache: the cache of the rows, without their last generated token. If a row has failed, it is
            deleted when the iteration ends, because non-finite numbers spread.
        failed: for each failed row, the number of tokens of its text, generated ones included,
            before the one that could not be generated.

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
        model.check_window(longest + max_new_tokens - 1)  # the last generated token is never read
        if cache is None:
            cache = new_cache(model, len(prompts), longest + max_new_tokens, cache_dtype)
        self._start = _check_cache(cache, prompts, max_new_tokens)
        # Padding rows of the cache: finished, with one token that is not read.
        self._num_rows, fill = len(prompts), cache.lengths.shape[0] - len(prompts)
        self._prompts = [*prompts, *[[0]] * fill]
        self._start += [1] * fill
        self._model, self._sampler = model, sampler.of_programs()
        self._max_new_tokens, self._seed = max_new_tokens, seed
        # Only ids that can be generated; padded, so that another number of them does not recompile.
        ids = sorted({int(n) for n in stop_ids if 0 <= n < model.config.vocab_size})
        width = STOP_IDS if len(ids) <= STOP_IDS else model.config.vocab_size
        self._stop_ids = np.asarray(ids + [-1] * (width - len(ids)), np.int32)
        self._finished = np.arange(len(self._prompts)) >= self._num_rows
        self.cache, self.on_piece = cache, on_piece
        self.failed: dict[int, int] = {}

    def __iter__(self) -> Iterator[list[list[int]]]:
        """Reads the prompts, then generates."""
        try:
            yield from self._segments()
        finally:
            if self.failed:
                for array in jax.tree.leaves(self.cache.stored):
                    array.delete()

    def _segments(self) -> Iterator[list[list[int]]]:
        hidden = self.read_prompts()
        # Once: passing them at every call takes longer than a token of a small model.
        numbers = replicated((self._sampler, self._stop_ids), mesh_of(self._model))
        sampler, stop_ids = on_device(self._model, numbers)
        state = self._draw_first(hidden, sampler, stop_ids)
        widths = len(stop_ids), int(self._sampler.is_greedy)
        decode = self._compiled(stop_and_decode, self._model, *widths)
        lengths = [len(prompt) for prompt in self._prompts]
        yield self._rows(np.asarray(state.token)[:, None], lengths)
        drawn, segment = 1, 1
        while drawn < self._max_new_tokens and not self._finished.all():
            limit = min(segment, self._max_new_tokens - drawn)
            start = time.perf_counter()
            stopped = self._finished.copy()
            state, tokens = decode(state, stopped, sampler, stop_ids, limit)
            self.cache = state.cache
            rows = self._rows(np.asarray(tokens), lengths)
            # Several processes must run the same segments, but their clocks differ.
            if jax.process_count() > 1 or time.perf_counter() - start < SEGMENT_SECONDS:
                segment = min(2 * segment, SEGMENT)
            drawn += limit
            yield rows

    def finish(self, row: int) -> None:
        """Stops this row, for conditions other than stop ids, such as a stop string."""
        self._finished[row] = True

    def read_prompts(self) -> Float[Array, "B D"]:
        """Reads the prompts into `cache`; returns the hidden state of each one's last token."""
        context_lengths = np.asarray([len(p) for p in self._prompts], np.int32)
        mesh = mesh_of(self._model)
        if axis_size(mesh, "context") > 1 and not any(self._start[: self._num_rows]):
            return self._read_whole(context_lengths)
        # Placed like the result of `read`, or a second piece would recompile.
        hidden, at = empty_hidden(self._model, len(self._prompts)), np.asarray(self._start)
        rows = 1 if mesh is None else len(self._prompts)
        model = self._model.reading(max(map(len, self._prompts)))
        pieces = pieces_of(model, rows)
        if mesh is None and len(self._prompts) > 1:
            # Long pieces row by row, because rows differ in length; the rest with all rows
            # together.
            for row in range(self._num_rows):
                hidden = self._read_row(row, at, hidden)
            model, pieces = model.reading(0), pieces._replace(widths=(ENDS,))
        for count, width in pieces.cut(int((context_lengths - at).max())):
            lengths = np.clip(context_lengths - at, 0, count).astype(np.int32)
            tokens = np.zeros((len(at), width), np.int32)
            for row, length in enumerate(lengths):
                tokens[row, :length] = self._prompts[row][at[row] : at[row] + length]
            program = self._compiled(read, model, width)
            hidden, self.cache = program(self.cache, hidden, tokens, lengths, context_lengths)
            at = at + lengths
            self._tell(hidden, int(lengths.sum()))
        return hidden

    def _read_row(
        self, row: int, at: Int[np.ndarray, " B"], hidden: Float[Array, "B D"]
    ) -> Float[Array, "B D"]:
        """Reads the part of one row that fills wide pieces; advances `at`, the rows' positions.

        A row with sparse prefill is read to its end.
        """
        prompt = self._prompts[row]
        model = self._model.reading(len(prompt))
        for count, width in pieces_of(model).cut(len(prompt) - int(at[row])):
            if model.sparse is None and width == ENDS:
                break
            tokens = np.zeros((1, width), np.int32)
            tokens[0, :count] = prompt[at[row] : at[row] + count]
            lengths, whole = np.asarray([count], np.int32), np.asarray([len(prompt)], np.int32)
            program = self._compiled(read_row, model, width)
            hidden, self.cache = program(self.cache, hidden, row, tokens, lengths, whole)
            at[row] += count
            self._tell(hidden, count)
        return hidden

    def _read_whole(self, lengths: Int[np.ndarray, " B"]) -> Float[Array, "B D"]:
        tokens = np.zeros((len(self._prompts), self.cache.capacity), np.int32)
        for row, prompt in enumerate(self._prompts):
            tokens[row, : len(prompt)] = prompt
        program = self._compiled(read_whole, self._model)
        hidden, self.cache = program(self.cache, tokens, lengths)
        self._tell(hidden, int(lengths.sum()))
        return hidden

    def _compiled(
        self, function: Callable[..., Any], model: Llama, *widths: int
    ) -> Callable[..., Any]:
        """One of the steps, compiled for this batch; it donates its second argument."""
        shape = len(self._prompts), self.cache.capacity, *widths
        return compiled(function, model, *shape, donated=1)

    def _tell(self, hidden: Float[Array, "B D"], tokens: int) -> None:
        if self.on_piece is not None:
            jax.block_until_ready(hidden)  # so that the bar does not run ahead of the device
            self.on_piece(tokens)

    def _draw_first(
        self, hidden: Float[Array, "B D"], sampler: Sampler, stop_ids: Int[Array, " n"]
    ) -> State:
        seen = None
        if self._sampler.penalizes:
            seen = np.zeros((len(self._prompts), self._model.config.vocab_size), bool)
        if seen is not None and self._sampler.repetition_penalty != 1:
            for row, prompt in enumerate(self._prompts):
                seen[row, np.asarray(prompt)] = True
        widths = len(stop_ids), int(self._sampler.is_greedy)
        program = compiled(begin, self._model, len(self._prompts), *widths)
        state = program(self.cache.lengths, hidden, self._seed, sampler, stop_ids, seen)
        return State(cache=self.cache, **state)

    def _rows(self, tokens: Int[np.ndarray, "B n"], lengths: list[int]) -> list[list[int]]:
        """Each row's new tokens; records which rows have ended, and the `lengths` of the texts."""
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
    """Non-finite logits, after which a text cannot be continued."""

    def __init__(self, model: Llama, row: int, position: int) -> None:
        super().__init__(
            f"prompt {row}: the logits after token {position} are not finite: the weights have NaN "
            f"or infinity, or overflow {model.dtype}; check the checkpoint, or compute in float32"
        )


def generate(model: Llama, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """Each prompt's new tokens, including a stop id; `options` are those of `Run`.

    Raises:
        InputError: as in `Run`; a `NotFiniteError` is raised after the other rows have ended.
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
    """Raises InputError unless max_new_tokens is at least 1 and the seed has 32 bits."""
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
                f"prompt {number} has token id {low if low < 0 else high}, but the model's "
                f"vocabulary has ids 0 to {vocab_size - 1}; is this the model's own tokenizer?"
            )


def _check_cache(
    cache: KVCache, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[int]:
    """The number of tokens of each prompt that are already in the cache."""
    start = [int(n) for n in np.asarray(cache.lengths)]
    if len(start) < len(prompts) or any(start[len(prompts) :]):
        raise InputError(
            f"the cache has {len(start)} rows for {len(prompts)} prompts; it must have a row for "
            "each prompt, and any other rows must be empty"
        )
    for number, (prompt, held) in enumerate(zip(prompts, start, strict=False)):
        if held >= len(prompt):
            raise InputError(
                f"row {number} of the cache holds {held} tokens, but prompt {number} has only "
                f"{len(prompt)}; at least the last token must remain to be read"
            )
        if len(prompt) + max_new_tokens > cache.capacity:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens; with {max_new_tokens} new ones that is "
                f"{len(prompt) + max_new_tokens}, and the cache holds {cache.capacity}; "
                "give fewer, or a larger cache"
            )
    return start[: len(prompts)]
