"""What is compiled of generation: a piece of a prompt read, a token drawn, many more drawn.

Pure functions, usable under `jax.jit` in a script of your own (examples/jitted_generation.py):

    read         appends a piece of each row's prompt to the cache: the prefill, piece by piece
    read_row     the same for one row of a batch
    first_token  draws each row's first new token from what `read` leaves
    decode       feeds each row its last token and draws the next, many times, on the device

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

PAD = -1  # what `decode` gives for a row that has ended: no token has this id
FAILED = -2  # what it gives in place of a token where the logits are not finite; the row has ended
SEGMENT = 64  # tokens that are drawn before the host looks at them, at most


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
    """`read` of one row only: nothing is computed for the others. Not on a mesh.

    Args:
        row: its number. tokens, lengths, context_lengths: of this row.
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
    return at_last(hidden, lengths), cache_after


def at_last(hidden: Float[Array, "B T D"], lengths: Int[Array, " B"]) -> Float[Array, "B D"]:
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

    The cache must have room for them: what does not fit would be lost
    (`dca_jax.inference.generate.Run` checks).

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


def whole(model: Llama, x: Any) -> Any:
    """Logits, or what is drawn from them, whole on every device of the model's mesh."""
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
    """A `State` but for its cache, which need not pass."""
    logits = whole(model, model.unembed(hidden))
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
