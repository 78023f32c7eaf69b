"""What a server has compiled: pieces of prompts read, and a token drawn for many texts.

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

from dca_jax.attention.op import common_rows
from dca_jax.attention.pages import Common
from dca_jax.attention.stored import Stored
from dca_jax.inference.buckets import on_device, power_of_two
from dca_jax.inference.compiled import compiler_options
from dca_jax.inference.sampling import Sampler
from dca_jax.inference.steps import FAILED, at_last, whole
from dca_jax.kv_cache import PagedCache, create_pool
from dca_jax.model import Llama
from dca_jax.sharding import Shards, mesh_of, replicated

PIECES = (64, 256, 1024, 2048, 4096)  # tokens of a prompt that are read at once
RESTS = 4  # prompts of which the last tokens, as many as the narrowest piece, are read at once
BATCHES = (1, 4, 16)  # texts that are drawn from at once, besides the most there can be
COMMON = 4  # texts of a step in which beginnings may be read in common, at least; and of a group
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
        common: what texts that are drawn from have in common; None: nothing that is worth it.
    """

    slots: Any
    pages: Any
    lengths: Any
    prompts: Any
    seeds: Any
    choices: Any
    sampler: Sampler
    ranked: Any
    common: Common | None = None


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
    tokens: Int[Array, "b T"],
    count: Int[Array, " b"],
) -> tuple[State, Drawn]:
    """Reads a piece of each prompt, and draws what would follow it."""
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
        common=texts.common,
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
        rests: prompts of which a piece of the narrowest width is read at once.
        batches: the numbers of texts that may be drawn from.
        members: texts that read at once what they have in common; 0: none do.
        table: pages of the longest text.
    """

    def __init__(
        self, model: Llama, *, context: int, rows: int, pages: int, page: int, cache_dtype: Any
    ) -> None:
        self.rows, self.num_pages, self.page, self.table = rows, pages, page, -(-context // page)
        widest = max(PIECES[0], power_of_two(context))
        self.pieces = tuple(width for width in reversed(PIECES) if width <= widest)
        self.rests = min(RESTS, rows)
        self.batches = tuple(sorted({n for n in BATCHES if n < rows} | {rows}))
        self.vocab_size = model.config.vocab_size
        self._model, self._cache_dtype = model, cache_dtype
        self._leaves, self._tree = jax.tree.flatten(model)
        self.members = self._members()
        self._read: dict[tuple[int, int], Any] = {}
        self._draw: dict[tuple[int, bool], Any] = {}
        self._small: dict[Callable[..., Any], Any] = {}
        self.state: State = self._empty()

    def _members(self) -> int:
        config, heads = self._model.config, (self._model.config.head_dim,)
        query = (1, 1, config.num_attention_heads, *heads)
        key = (1, 1, self.table * self.page, config.num_key_value_heads, *heads)
        like = (
            jax.ShapeDtypeStruct(query, self._model.dtype),
            jax.ShapeDtypeStruct(key, self._cache_dtype),
        )
        return common_rows(self._model.implementation, *like, self._model.dca)

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

    @property
    def reads(self) -> list[tuple[int, int]]:
        """How many prompts are read at once, and how many tokens of each: the widest first."""
        rests = [(self.rests, self.pieces[-1])] if self.rests > 1 else []
        return [*((1, width) for width in self.pieces), *rests]

    def compile(self) -> Iterator[str]:
        """Compiles everything, several at once; yields the name of what is waited for next."""
        wanted: list[tuple[str, dict[Any, Any], Any, Callable[..., Any], tuple[Any, ...]]] = []
        for batch, width in self.reads:
            tokens, count = np.zeros((batch, width), np.int32), np.zeros((batch,), np.int32)
            name = f"reading {width} tokens" if batch == 1 else f"reading {batch} times {width}"
            args = self.texts(batch), tokens, count
            wanted.append((name, self._read, (batch, width), read, args))
        for batch in self.batches:
            name, texts = f"drawing {batch} tokens", self.texts(batch)
            wanted.append((name, self._draw, (batch, False), draw, (texts,)))
            if self.members and batch >= COMMON:
                texts = texts._replace(common=self.common(batch, []))
                name += " after common beginnings"
                wanted.append((name, self._draw, (batch, True), draw, (texts,)))
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

    def common(self, batch: int, groups: Sequence[tuple[Sequence[int], int]]) -> Common:
        """What so many texts have in common.

        Args:
            groups: the numbers of texts, at most `members`, and how many pages they share; at most
                `groups_of(batch)`.
        """
        count = groups_of(batch)
        rows = np.full((count, self.members), batch, np.int32)
        tokens, place = np.zeros((count,), np.int32), np.full((batch,), rows.size, np.int32)
        for n, (members, pages) in enumerate(groups):
            rows[n, : len(members)] = members
            tokens[n] = pages * self.page
            place[np.asarray(members)] = n * self.members + np.arange(len(members))
        arrays: Any = rows, tokens, place  # of the host, to travel with the call
        return Common(*arrays)

    def read(self, texts: Texts, tokens: Sequence[Sequence[int]], width: int) -> Drawn:
        """Reads a piece of each text, padded to a width; together they are one of `reads`."""
        padded = np.zeros((len(texts.slots), width), np.int32)
        count = np.zeros((len(texts.slots),), np.int32)
        for n, piece in enumerate(tokens):
            padded[n, : len(piece)], count[n] = piece, len(piece)
        args = self._leaves, self.state, texts, padded, count
        self.state, drawn = self._read[padded.shape](*args)
        return drawn

    def draw(self, texts: Texts) -> Drawn:
        """Draws a token for each text; they are as many as one of `batches`."""
        shape = len(texts.slots), texts.common is not None
        self.state, drawn = self._draw[shape](self._leaves, self.state, texts)
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


def groups_of(batch: int) -> int:
    """Beginnings that may be read in common in a step of so many texts."""
    return max(1, batch // COMMON)
