"""What a server has compiled: a piece of one prompt read, and a token drawn for many texts.

Everything is compiled before the first request, for a few widths of pieces and numbers of texts,
and nothing afterwards: a compiled program refuses other shapes. What a step is told of its texts
comes from the host, a few numbers each; the cache, the last tokens and the tokens seen stay on the
device, and are updated where they lie.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dca_jax.attention.stored import Stored
from dca_jax.inference.buckets import on_device, power_of_two
from dca_jax.inference.compiled import compiler_options
from dca_jax.inference.sampling import Sampler
from dca_jax.inference.steps import FAILED, at_last, whole
from dca_jax.kv_cache import PagedCache, create_pool
from dca_jax.model import Llama
from dca_jax.sharding import Shards, mesh_of, replicated

PIECES = (64, 256, 1024, 2048, 4096)  # tokens of a prompt that are read at once
BATCHES = (1, 4, 16)  # texts that are drawn from at once, besides the most there can be
CLEARED = 64  # pages emptied at once
TOP = 20  # tokens whose log-probabilities are told, at most


class State(NamedTuple):
    """What stays on the device.

    Attributes:
        stored: the pages of all texts.
        token: the last token of each slot, `FAILED` where none could be drawn.
        seen: the tokens that each slot's text holds; of those with a repetition penalty only.
    """

    stored: Stored
    token: Int[Array, " R"]
    seen: Bool[Array, "R V"]


class Texts(NamedTuple):
    """What a step is told of its texts, b of them: of NumPy on the host, int32.

    Attributes:
        slots: [b], their numbers; one beyond the last is a text that is not there.
        pages: [b, n], their tables. lengths: [b], tokens in the cache. prompts: [b], tokens of the
            prompts.
        seeds, choices: [b], of their draws: choice r draws as row r of a batch does in `Run`.
        sampler: of all (`Sampler.of_rows`).
        ranked: [], bool, whether log-probabilities are asked for.
    """

    slots: Any
    pages: Any
    lengths: Any
    prompts: Any
    seeds: Any
    choices: Any
    sampler: Sampler
    ranked: Any


class Drawn(NamedTuple):
    """What a step has drawn.

    Attributes:
        token: of each text; `FAILED` where the logits are not finite.
        logprob: natural logarithm of its probability, before temperature, filters and penalty.
        top, top_logprobs: the most likely tokens, the first one first. All zero unless `ranked`.
        finite: whether what was read is.
    """

    token: Int[Array, " b"]
    logprob: Float[Array, " b"]
    top: Int[Array, "b k"]
    top_logprobs: Float[Array, "b k"]
    finite: Bool[Array, " b"]


def read(
    model: Llama,
    state: State,
    texts: Texts,
    tokens: Int[Array, "1 T"],
    count: Int[Array, " 1"],
) -> tuple[State, Drawn]:
    """Reads a piece of one prompt, and draws what would follow it."""
    hidden, cache = model.hidden_states(
        tokens, lengths=count, cache=_paged(state, texts), context_lengths=texts.prompts
    )
    return _draw(model, state, texts, at_last(hidden, count), cache)


def draw(model: Llama, state: State, texts: Texts) -> tuple[State, Drawn]:
    """Feeds each text its last token, and draws the next."""
    token = state.token.at[texts.slots].get(mode="fill", fill_value=0)
    alive = (texts.slots < len(state.token)).astype(jnp.int32)
    hidden, cache = model.hidden_states(
        jnp.maximum(token, 0)[:, None], lengths=alive, cache=_paged(state, texts)
    )
    return _draw(model, state, texts, hidden[:, 0], cache)


def mark(state: State, slot: Int[Array, ""], seen: Bool[Array, " V"]) -> State:
    """Says which tokens the text of a slot holds."""
    return state._replace(seen=state.seen.at[slot].set(seen))


def clear(state: State, pages: Int[Array, " n"]) -> State:
    """Empties pages: a number that is not finite would spread even from where nothing is read."""
    shards = Shards.of(state.stored.key)

    def emptied(x: Array) -> Array:
        spec = shards.specs(x)
        empty = shards.local(
            lambda x, pages: x.at[:, pages].set(0, mode="drop"), (spec, PartitionSpec()), spec
        )
        return empty(x, pages)

    return state._replace(stored=jax.tree.map(emptied, state.stored))


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """A program that needs no model as one that is given it."""
    return lambda model, *args: function(*args)


def _paged(state: State, texts: Texts) -> PagedCache:
    return PagedCache(
        **state.stored._asdict(),
        pages=texts.pages,
        lengths=texts.lengths,
        frequency_lengths=texts.prompts,
    )


def _draw(
    model: Llama, state: State, texts: Texts, hidden: Float[Array, "b D"], cache: PagedCache
) -> tuple[State, Drawn]:
    logits = whole(model, model.unembed(hidden))

    def key(seed: Array, choice: Array, length: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), choice), length)

    keys = jax.vmap(key)(texts.seeds, texts.choices, whole(model, cache.lengths))
    seen = state.seen.at[texts.slots].get(mode="fill", fill_value=False)
    token = texts.sampler.sample(logits, keys, seen)
    token = jnp.where(jnp.isfinite(logits).all(axis=1), token, FAILED)
    kept = State(
        stored=cache.stored,
        token=state.token.at[texts.slots].set(token, mode="drop"),
        seen=state.seen.at[texts.slots, jnp.maximum(token, 0)].set(True, mode="drop"),
    )
    finite = jnp.isfinite(whole(model, hidden)).all(axis=1)
    return kept, Drawn(token, *_ranked(logits, token, texts.ranked), finite)


def _ranked(
    logits: Float[Array, "b V"], token: Int[Array, " b"], wanted: Bool[Array, ""]
) -> tuple[Float[Array, " b"], Int[Array, "b k"], Float[Array, "b k"]]:
    """Log-probabilities of the token drawn and of the most likely ones, where they are wanted."""
    count = min(TOP, logits.shape[1])

    def ranked(logits: Array) -> tuple[Array, Array, Array]:
        logprobs = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(logprobs, jnp.maximum(token, 0)[:, None], axis=1)[:, 0]
        top_logprobs, top = jax.lax.top_k(logprobs, count)
        return own, top, top_logprobs

    def nothing(logits: Array) -> tuple[Array, Array, Array]:
        zero = jnp.zeros_like(logits[:, :count])
        return zero[:, 0], zero.astype(jnp.int32), zero

    return jax.lax.cond(wanted, ranked, nothing, logits)


class Programs:
    """The compiled programs of one model, and their state.

    Args:
        context: tokens of the longest text. rows: texts at once. pages, page: of the cache.
        cache_dtype: of the cache.

    Attributes:
        pieces: the widths a piece of a prompt may have, the widest first.
        batches: the numbers of texts that may be drawn from.
        table: pages of the longest text.
    """

    def __init__(
        self, model: Llama, *, context: int, rows: int, pages: int, page: int, cache_dtype: Any
    ) -> None:
        self.rows, self.num_pages, self.page, self.table = rows, pages, page, -(-context // page)
        widest = max(PIECES[0], power_of_two(context))
        self.pieces = tuple(width for width in reversed(PIECES) if width <= widest)
        self.batches = tuple(sorted({n for n in BATCHES if n < rows} | {rows}))
        self.vocab_size = model.config.vocab_size
        self._model, self._cache_dtype = model, cache_dtype
        self._leaves, self._tree = jax.tree.flatten(model)
        self._read: dict[int, Any] = {}
        self._draw: dict[int, Any] = {}
        self._small: dict[Callable[..., Any], Any] = {}
        self.state: State = self._empty()

    def _empty(self) -> State:
        mesh = mesh_of(self._model)
        sizes = {"pages": self.num_pages, "page": self.page}
        stored = create_pool(self._model.config, **sizes, dtype=self._cache_dtype, mesh=mesh)
        small = np.zeros((self.rows,), np.int32), np.zeros((self.rows, self.vocab_size), bool)
        return on_device(self._model, State(stored, *replicated(small, mesh)))

    def reset(self) -> None:
        """Begins anew with an empty cache, after a step that did not come to its end."""
        for array in jax.tree.leaves(self.state):
            array.delete()
        self.state = self._empty()

    def compile(self) -> Iterator[str]:
        """Compiles everything, several at once; yields the name of what is waited for next."""
        one = np.zeros((1,), np.int32)
        wanted: list[tuple[str, dict[Any, Any], Any, Callable[..., Any], tuple[Any, ...]]] = []
        for width in self.pieces:
            args = self.texts(1), np.zeros((1, width), np.int32), one
            wanted.append((f"reading {width} tokens", self._read, width, read, args))
        for batch in self.batches:
            args = (self.texts(batch),)
            wanted.append((f"drawing {batch} tokens", self._draw, batch, draw, args))
        seen, some = np.zeros((self.vocab_size,), bool), np.zeros((CLEARED,), np.int32)
        for function, args in ((mark, (np.int32(0), seen)), (clear, (some,))):
            wanted.append((function.__name__, self._small, function, _alone(function), args))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            started = [
                (name, table, key, pool.submit(self._lowered(function, args).compile))
                for name, table, key, function, args in wanted
            ]
            for name, table, key, compiling in started:
                yield name
                table[key] = compiling.result()

    def _lowered(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """A program of the model's arrays: to take the model apart at every step takes longer."""

        def of_leaves(leaves: list[Array], state: State, *args: Any) -> Any:
            return function(jax.tree.unflatten(self._tree, leaves), state, *args)

        options = compiler_options()
        jitted = jax.jit(of_leaves, donate_argnames="state", compiler_options=options)
        return jitted.lower(self._leaves, self.state, *args)

    def texts(self, batch: int) -> Texts:
        """So many texts that are not there."""

        def zeros() -> np.ndarray:
            return np.zeros((batch,), np.int32)

        return Texts(
            slots=np.full((batch,), self.rows, np.int32),
            pages=np.zeros((batch, self.table), np.int32),
            lengths=zeros(),
            prompts=zeros(),
            seeds=zeros(),
            choices=zeros(),
            sampler=Sampler.of_rows([Sampler()] * batch),
            ranked=np.asarray(False),
        )

    def read(self, texts: Texts, tokens: Sequence[int], width: int) -> Drawn:
        """Reads a piece of one prompt, padded to one of `pieces`."""
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(tokens)] = tokens
        count = np.asarray([len(tokens)], np.int32)
        args = self._leaves, self.state, texts, padded, count
        self.state, drawn = self._read[width](*args)
        return drawn

    def draw(self, texts: Texts) -> Drawn:
        """Draws a token for each text; they are as many as one of `batches`."""
        self.state, drawn = self._draw[len(texts.slots)](self._leaves, self.state, texts)
        return drawn

    def mark(self, slot: int, tokens: Sequence[int]) -> None:
        """Says which tokens the text of a slot holds."""
        seen = np.zeros((self.vocab_size,), bool)
        seen[np.asarray(tokens)] = True
        self.state = self._small[mark](self._leaves, self.state, np.int32(slot), seen)

    def clear(self, pages: Sequence[int]) -> None:
        """Empties pages."""
        for start in range(0, len(pages), CLEARED):
            some = np.full((CLEARED,), self.num_pages, np.int32)
            some[: len(pages[start : start + CLEARED])] = pages[start : start + CLEARED]
            self.state = self._small[clear](self._leaves, self.state, some)
