"""The compiled steps of generation: reading a piece of a prompt, and generating tokens.

Pure functions that you can also use under `jax.jit` in your own script
(examples/jitted_generation.py):

    read         appends a piece of each row's prompt to the cache: the prefill, piece by piece
    read_row     the same for one row of a batch
    first_token  samples each row's first new token from the result of `read`
    decode       feeds each row its last token and samples the next, many times, on the device

`dca_jax.inference.generate` calls them for prompts of any length.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key

from dca_jax.errors import InputError
from dca_jax.inference.buckets import on_device
from dca_jax.inference.sampling import Sampler
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama
from dca_jax.sharding import Shards, mesh_of, partition

PAD = -1  # returned by `decode` for a row that has ended; no token has this id
FAILED = -2  # returned instead of a token if the logits are not finite; it ends the row
SEGMENT = 64  # maximum number of tokens that are generated before the host looks at them


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class State:
    """The state of a batch during generation: the carry of the loop in `decode`.

    Attributes:
        cache: everything read so far, without the last generated token.
        token: the last generated token of each row; `FAILED` if it failed.
        finished: rows that have reached a stop id, have failed, or were stopped by the caller; they
            do not change any more.
        key: one key per row. It is combined with the position of each token, so that sampling does
            not depend on the other rows or on the segments. None if the sampler `is_greedy`.
        seen: the tokens in each row, for a repetition penalty; None without one.
    """

    cache: KVCache
    token: Int[Array, " B"]
    finished: Bool[Array, " B"]
    key: Key[Array, " B"] | None
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
        hidden: hidden state of each row's last token so far; zeros before the first piece.
        tokens: the pieces, right-padded.
        lengths: number of real tokens of each piece; 0 for a row whose prompt has already ended.
        context_lengths: number of tokens of each row's whole prompt, the same for every piece.

    Returns:
        The hidden state of each row's last token (for `Llama.unembed`), and the cache.
    """
    piece, cache_after = model.hidden_states(
        tokens, lengths=lengths, cache=cache, context_lengths=context_lengths
    )
    assert cache_after is not None
    return jnp.where((lengths > 0)[:, None], at_last(piece, lengths), hidden), cache_after


def read_row(
    model: Llama,
    cache: KVCache,
    hidden: Float[Array, "B D"],
    row: int | Int[Array, ""],
    tokens: Int[Array, "1 T"],
    lengths: Int[Array, " 1"],
    context_lengths: Int[Array, " 1"],
) -> tuple[Float[Array, "B D"], KVCache]:
    """`read` for only one row, without computing the others. Not available on a mesh.

    Args:
        row: number of the row.
        tokens, lengths, context_lengths: those of this row.
    """
    layers, batch = cache.key.shape[:2]
    row = jnp.asarray(row, jnp.int32)
    as_layers = jax.tree.map(  # the rows as layers: the same memory
        lambda x: x.reshape(layers * batch, 1, *x.shape[2:]), cache.stored
    )
    one = KVCache(
        **as_layers._asdict(),
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
    stored = jax.tree.map(lambda x, old: x.reshape(old.shape), after.stored, cache.stored)
    cache_after = KVCache(
        **stored._asdict(),
        lengths=cache.lengths.at[row].set(after.lengths[0]),
        frequency_lengths=cache.frequency_lengths.at[row].set(after.frequency_lengths[0]),
    )
    return hidden.at[row].set(at_last(piece, lengths)[0]), cache_after


def empty_hidden(model: Llama, batch: int) -> Float[Array, "B D"]:
    """The `hidden` argument of `read` before the first piece."""
    shape, mesh = (batch, model.config.hidden_size), mesh_of(model)
    zeros = np.zeros(shape, model.dtype)
    if mesh is None:
        return on_device(model, zeros)
    return jax.device_put(zeros, NamedSharding(mesh, partition("BD", shape, mesh.shape)))


def read_whole(
    model: Llama, cache: KVCache, tokens: Int[Array, "B S"], lengths: Int[Array, " B"]
) -> tuple[Float[Array, "B D"], KVCache]:
    """Reads whole prompts at once, split over the devices of `context`; replaces `read` there.

    Args:
        cache: an empty cache; the result replaces it and, if donated, reuses its memory.
        tokens: the prompts, right-padded to the cache's capacity.
        lengths: number of real tokens of each prompt.

    Returns:
        As in `read`.
    """
    if tokens.shape[1] != cache.capacity:
        raise InputError(
            f"whole prompts must be padded to the cache's capacity, {cache.capacity} tokens; "
            f"got {tokens.shape[1]}"
        )
    hidden, cache_after = model.hidden_states(tokens, lengths=lengths, new_cache=cache.key.dtype)
    assert cache_after is not None
    return at_last(hidden, lengths), cache_after


def at_last(hidden: Float[Array, "B T D"], lengths: Int[Array, " B"]) -> Float[Array, "B D"]:
    """Each row's last real token, as a sum with one term, because devices may split T."""
    is_last = jnp.arange(hidden.shape[1], dtype=jnp.int32)[None, :] == lengths[:, None] - 1
    return jnp.where(is_last[:, :, None], hidden, 0).sum(axis=1)


def first_token(
    logits: Float[Array, "B V"],
    cache: KVCache,
    key: Key[Array, " B"] | None,
    sampler: Sampler,
    stop_ids: Int[Array, " n"],
    seen: Bool[Array, "B V"] | None = None,
) -> State:
    """Samples each row's first new token from the logits after its prompt."""
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
    """Generates up to `limit` more tokens for each row, until all rows have finished.

    A row with non-finite logits gets `FAILED` instead of a token and is finished.

    The cache must have room for them, because tokens that do not fit would be lost
    (`dca_jax.inference.generate.Run` checks this).

    Args:
        sampler: the sampler.
        stop_ids: ids that end a row; -1 is ignored.
        limit: at most `max_tokens`; a traced number, so that changing it does not recompile.
        max_tokens: static width of the result.

    Returns:
        The state, and each row's new tokens, including a stop id and followed by `PAD`.
    """

    def unfinished(carry: tuple[Array, State, Array]) -> Array:
        step, state, _ = carry
        return (step < limit) & ~jnp.all(state.finished)

    def step_once(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        step, state, tokens = carry
        grows = (~state.finished).astype(jnp.int32)
        last = jnp.maximum(state.token, 0)[:, None]  # a failed row has no token
        hidden, cache = model.hidden_states(last, lengths=grows, cache=state.cache)
        assert cache is not None
        logits = whole(model, model.unembed(hidden[:, 0]))
        token, ends, seen = _draw(
            logits, state.key, cache.lengths, state.seen, sampler, stop_ids, state
        )
        column = jnp.where(state.finished, PAD, token)
        finished = state.finished | ends
        after = replace(state, cache=cache, token=token, finished=finished, seen=seen)
        return step + 1, after, tokens.at[:, step].set(column)

    tokens = whole(model, jnp.full((state.token.shape[0], max_tokens), PAD, jnp.int32))
    start = (jnp.int32(0), state, tokens)
    _, state, tokens = jax.lax.while_loop(unfinished, step_once, start)
    return state, tokens


def _draw(
    logits: Float[Array, "B V"],
    key: Key[Array, " B"] | None,
    lengths: Int[Array, " B"],
    seen: Bool[Array, "B V"] | None,
    sampler: Sampler,
    stop_ids: Int[Array, " n"],
    state: State | None = None,
) -> tuple[Int[Array, " B"], Bool[Array, " B"], Bool[Array, "B V"] | None]:
    """The token after `lengths` others in each row, whether it ends the row, and `seen`.

    If the logits are not all finite, it is `FAILED` and ends the row. Finished rows in `state` keep
    their token.
    """
    if key is not None:
        key = jax.vmap(jax.random.fold_in)(key, lengths)
    token = sampler.sample(logits, key, seen)
    token = jnp.where(jnp.isfinite(logits).all(axis=1), token, FAILED)
    if state is not None:
        token = jnp.where(state.finished, state.token, token)
    if seen is not None:
        seen = seen.at[jnp.arange(seen.shape[0]), jnp.maximum(token, 0)].set(True)
    ends = jnp.any(token[:, None] == stop_ids[None, :], axis=1) | (token == FAILED)
    return token, ends, seen


def whole(model: Llama, x: Any) -> Any:
    """Logits or tokens, replicated on every device of the model's mesh."""
    shards = Shards.of(model.norm.scale[...])
    return jax.tree.map(lambda leaf: shards.put(leaf, None), x)


def begin(
    model: Llama,
    lengths: Int[Array, " B"],
    hidden: Float[Array, "B D"],
    seed: int | Int[Array, ""],
    sampler: Sampler,
    stop_ids: Int[Array, " n"],
    seen: Bool[Array, "B V"] | None,
) -> dict[str, Any]:
    """A `State` without its cache, which does not need to pass through."""
    logits = whole(model, model.unembed(hidden))
    key = None
    if not sampler.is_greedy:
        rows = jnp.arange(logits.shape[0], dtype=jnp.int32)
        key = whole(model, jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows))
    token, ends, seen = _draw(logits, key, lengths, whole(model, seen), sampler, stop_ids)
    return {"token": token, "finished": ends, "key": key, "seen": seen}


def stop_and_decode(
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
