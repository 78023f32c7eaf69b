"""A server's compiled programs, which read pieces of prompts and decode a token for many texts.

Everything is compiled before the first request, for a few widths of pieces and batch sizes, and
nothing afterwards: a compiled program rejects other shapes. A step's inputs come from the host, a
few numbers for each text; the cache, the last tokens and the tokens seen stay on the device and are
updated in place.
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

PIECES = (64, 256, 1024, 2048, 4096)  # widths of a prompt's pieces in tokens
RESTS = 4  # prompts whose last tokens, at most the narrowest piece, are read together
BATCHES = (1, 4, 16)  # batch sizes of decoding, besides the maximum
COMMON = 4  # smallest batch whose shared prefixes are read once, and smallest group in it
CLEARED = 64  # pages cleared at once
TOP = 20  # most tokens whose log-probabilities are returned


class State(NamedTuple):
    """The state that stays on the device.

    Attributes:
        stored: the pages of all texts.
        token: the last token of each slot, or `FAILED` if sampling failed.
        seen: the tokens in each slot's text, only for texts with a repetition penalty.
    """

    stored: Stored
    token: Int[Array, " R"]
    seen: Bool[Array, "R V"]


class Texts(NamedTuple):
    """A step's inputs for its b texts: NumPy arrays on the host, int32.

    Attributes:
        slots: [b], slot numbers; a number beyond the last slot marks an absent text.
        pages: [b, n], page tables.
        lengths: [b], tokens in the cache.
        prompts: [b], tokens of the prompts.
        seeds, choices: [b], for sampling: choice r is sampled like row r of a batch in `Run`.
        sampler: the sampler of all texts (`Sampler.of_rows`).
        ranked: [], bool, whether log-probabilities are requested.
        common: shared prefixes of texts in decoding, or None if there are none worth using.
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
    """The results of a step.

    Attributes:
        token: each text's next token, or `FAILED` if the logits are not finite.
        logprob: natural logarithm of its probability, before temperature, filters and penalty.
        top, top_logprobs: the most likely tokens in descending order. All zero unless `ranked`.
        finite: whether the step's results are finite.
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
    """Reads a piece of each prompt and samples the token after it."""
    hidden, cache = model.hidden_states(
        tokens, lengths=count, cache=_paged(state, texts), context_lengths=texts.prompts
    )
    return _draw(model, state, texts, at_last(hidden, count), cache)


def draw(model: Llama, state: State, texts: Texts) -> tuple[State, Drawn]:
    """Feeds each text its last token and samples the next one."""
    token = state.token.at[texts.slots].get(mode="fill", fill_value=0)
    alive = (texts.slots < len(state.token)).astype(jnp.int32)
    hidden, cache = model.hidden_states(
        jnp.maximum(token, 0)[:, None], lengths=alive, cache=_paged(state, texts)
    )
    return _draw(model, state, texts, hidden[:, 0], cache)


def mark(state: State, slot: Int[Array, ""], seen: Bool[Array, " V"]) -> State:
    """Sets the tokens that occur in the text of a slot."""
    return state._replace(seen=state.seen.at[slot].set(seen))


def clear(state: State, pages: Int[Array, " n"]) -> State:
    """Clears pages: a non-finite number would spread even from masked slots."""
    shards = Shards.of(state.stored.key)

    def emptied(x: Array) -> Array:
        spec = shards.specs(x)
        empty = shards.local(
            lambda x, pages: x.at[:, pages].set(0, mode="drop"), (spec, PartitionSpec()), spec
        )
        return empty(x, pages)

    return state._replace(stored=jax.tree.map(emptied, state.stored))


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a program that needs no model as one that takes a model."""
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
    """Log-probabilities of the sampled token and of the most likely ones, if requested."""
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
        context: tokens of the longest text.
        rows: largest number of texts processed together.
        pages, page: number of pages of the cache, and tokens per page.
        cache_dtype: dtype of the cache.

    Attributes:
        pieces: the widths of pieces of a prompt, widest first.
        rests: number of prompts of which a piece of the narrowest width is read together.
        batches: batch sizes of decoding.
        members: number of texts that read a shared prefix together; 0 if this is not supported.
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
        """Resets to an empty cache after a failed step."""
        for array in jax.tree.leaves(self.state):
            array.delete()
        self.state = self._empty()

    @property
    def reads(self) -> list[tuple[int, int]]:
        """(Number of prompts read together, tokens of each) of every read program, widest first."""
        rests = [(self.rests, self.pieces[-1])] if self.rests > 1 else []
        return [*((1, width) for width in self.pieces), *rests]

    def compile(self) -> Iterator[str]:
        """Compiles everything concurrently; yields the name of the next program to wait for."""
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
        """Lowers a program of the model's arrays: flattening the model at every step is slower."""

        def of_leaves(leaves: list[Array], state: State, *args: Any) -> Any:
            return function(jax.tree.unflatten(self._tree, leaves), state, *args)

        options = compiler_options()
        jitted = jax.jit(of_leaves, donate_argnames="state", compiler_options=options)
        return jitted.lower(self._leaves, self.state, *args)

    def texts(self, batch: int) -> Texts:
        """Inputs for a batch of absent texts."""

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
        """The shared prefixes of a batch of texts.

        Args:
            groups: at most `groups_of(batch)` groups, each with the numbers of its texts (at most
                `members`) and the number of pages that they share.
        """
        count = groups_of(batch)
        rows = np.full((count, self.members), batch, np.int32)
        tokens, place = np.zeros((count,), np.int32), np.full((batch,), rows.size, np.int32)
        for n, (members, pages) in enumerate(groups):
            rows[n, : len(members)] = members
            tokens[n] = pages * self.page
            place[np.asarray(members)] = n * self.members + np.arange(len(members))
        arrays: Any = rows, tokens, place  # on the host, transferred with the call
        return Common(*arrays)

    def read(self, texts: Texts, tokens: Sequence[Sequence[int]], width: int) -> Drawn:
        """Reads a piece of each text, padded to `width`; batch and width must be in `reads`."""
        padded = np.zeros((len(texts.slots), width), np.int32)
        count = np.zeros((len(texts.slots),), np.int32)
        for n, piece in enumerate(tokens):
            padded[n, : len(piece)], count[n] = piece, len(piece)
        args = self._leaves, self.state, texts, padded, count
        self.state, drawn = self._read[padded.shape](*args)
        return drawn

    def draw(self, texts: Texts) -> Drawn:
        """Samples a token for each text; the number of texts must be in `batches`."""
        shape = len(texts.slots), texts.common is not None
        self.state, drawn = self._draw[shape](self._leaves, self.state, texts)
        return drawn

    def mark(self, slot: int, tokens: Sequence[int]) -> None:
        """Sets the tokens that occur in the text of a slot."""
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
    """Largest number of shared prefixes in a step with this batch size."""
    return max(1, batch // COMMON)
