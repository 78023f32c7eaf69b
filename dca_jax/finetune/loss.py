"""The loss on the assistant's tokens, without materializing the logits of a whole row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dca_jax.model import Llama
from dca_jax.planning.memory import LOSS_TOKENS
from dca_jax.sharding import Shards


class Sums(NamedTuple):
    """Sums over rows, float32.

    Attributes:
        nll: sum of -ln p(token | earlier tokens) over the trained tokens.
        tokens: number of trained tokens.
        balance: load-balancing loss of the experts (`Llama.balanced_hidden_states`).
    """

    nll: Float[Array, ""]
    tokens: Float[Array, ""]
    balance: Float[Array, ""]


def objective(model: Llama, sums: Sums) -> Float[Array, ""]:
    """The training objective, summed over the trained tokens.

    It is the loss plus, for a mixture of experts, `router_aux_loss_coef` times the load-balancing
    loss. The latter has one value per batch, so it is weighted with the batch's number of trained
    tokens.
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
    """The sum of -ln p(token | earlier tokens) over trained tokens, and their number.

    A step's loss is the sum over all its rows divided by their number of trained tokens. A mean of
    means would give a token in a short answer more weight than one in a long answer.

    With 16k tokens and 128k ids the logits alone would take 8 GB. So they are computed for
    `LOSS_TOKENS` tokens of each row at a time, and recomputed in the backward pass.

    Args:
        tokens: whole texts, right-padded; every device has all tokens of its rows.
        trained: which tokens are targets; a row's first token is never one.
        lengths: number of real tokens of each row.
        text_index: for rows whose texts do not attend to each other (`Llama.hidden_states`).
    """
    hidden, balance = model.balanced_hidden_states(tokens, lengths, text_index)
    next_token = ((0, 0, 0), (-1, 1, 0))  # a row's last token has no next token
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
    if length % context:  # then the hidden states are replicated
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
