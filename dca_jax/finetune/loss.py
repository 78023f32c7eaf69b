"""The loss on the assistant's tokens, without ever holding the logits of a whole row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dca_jax.model import Llama
from dca_jax.planning.memory import LOSS_TOKENS
from dca_jax.sharding import Shards


class Sums(NamedTuple):
    """Of rows; float32.

    Attributes:
        nll: over the trained tokens, of -ln p(token | those before it). tokens: their number.
        balance: how unevenly experts were chosen (`Llama.balanced_hidden_states`).
    """

    nll: Float[Array, ""]
    tokens: Float[Array, ""]
    balance: Float[Array, ""]


def objective(model: Llama, sums: Sums) -> Float[Array, ""]:
    """What training minimizes, summed over the trained tokens.

    The loss, and of a mixture of experts `router_aux_loss_coef` times the loss of uneven choices,
    which counts once a batch: so it is given the batch's weight in the mean, its trained tokens.
    """
    mixture = model.config.mixture
    if mixture is None:
        return sums.nll
    return sums.nll + mixture.router_aux_loss_coef * sums.balance * sums.tokens


def summed_nll(
    model: Llama,
    tokens: Int[Array, "B T"],
    trained: Bool[Array, "B T"],
    lengths: Int[Array, " B"],
    text_index: Int[Array, "B T"] | None = None,
) -> Sums:
    """The sum over trained tokens of -ln p(token | those before it), and their number.

    A step's loss is the sum over all its rows divided by the number in all of them: a mean of
    means would give a token of a short answer more weight than one of a long one.

    At 16k tokens and 128k ids the logits alone would be 8 GB. So they are made for `LOSS_TOKENS`
    tokens of each row at a time, and made again in the backward pass.

    Args:
        tokens: whole texts, right-padded, every device holding all tokens of its rows.
        trained: which tokens count; a row's first has nothing to be predicted from, and does not.
        lengths: real tokens of each row.
        text_index: of rows whose texts do not see each other (`Llama.hidden_states`).
    """
    hidden, balance = model.balanced_hidden_states(tokens, lengths, text_index)
    next_token = ((0, 0, 0), (-1, 1, 0))  # the last token of a row has none
    targets = jax.lax.pad(tokens, jnp.int32(0), next_token)
    counts = jax.lax.pad(trained, jnp.bool_(False), next_token)
    kernel = model.unembedding()

    @jax.checkpoint
    def of_piece(_: None, piece: tuple[Array, Array]) -> tuple[None, Array]:
        hidden, targets = piece
        return None, model.nll(hidden, targets, kernel)

    shards = Shards.of(kernel)
    _, nll = jax.lax.scan(of_piece, None, (_pieces(hidden, shards), _pieces(targets, shards)))
    counts = _pieces(counts, shards)
    return Sums(jnp.where(counts, nll, 0).sum(), counts.astype(jnp.float32).sum(), balance)


def _pieces(x: Array, shards: Shards) -> Array:
    """[B, T, ..] as [n, B, C, t, ..]: n pieces of t tokens on each of C `context` devices."""
    batch, length, *rest = x.shape
    context = shards.size("context")
    if length % context:  # then the hidden states are whole on every device
        context = 1
    letters = "B" + ("T" if context > 1 else "x") + "x" * (1 + len(rest))
    share = length // context
    x = jax.lax.reshape(
        shards.put(x, shards.spec(letters[:2] + letters[3:])),
        (batch, context, share, *rest),
        out_sharding=shards.out(letters),
    )
    width = min(LOSS_TOKENS, share)
    count = -(-share // width)
    padding = [(0, 0, 0)] * x.ndim
    padding[2] = (0, count * width - share, 0)
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), padding)
    letters = letters[:2] + "xx" + letters[3:]
    x = jax.lax.reshape(x, (batch, context, count, width, *rest), out_sharding=shards.out(letters))
    return jnp.moveaxis(x, 2, 0)
