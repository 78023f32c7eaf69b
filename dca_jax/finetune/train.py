"""One update as pure functions: gradients summed over batches and devices, clipping, AdamW.

There are two trees of parameters: the trained ones (all, in float32 or bfloat16, or LoRA's
adapters), and the frozen ones. Both are plain nested dicts, placed by `dca_jax.sharding`. Gradients
and AdamW's moments are sharded like their parameters, so `fsdp` splits all three.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Bool, Float, Int

from dca_jax.finetune.loss import objective, summed_nll
from dca_jax.finetune.rounding import stochastically_rounded, widened
from dca_jax.finetune.settings import Settings
from dca_jax.model import Llama
from dca_jax.sharding import mesh_of

Params = dict[str, Any]
# Builds the model from trained and frozen parameters together.
Build = Callable[[Params], Llama]


class State(NamedTuple):
    """The state that an update changes.

    Attributes:
        params: trained parameters, float32 or, like the moments, bfloat16 (`Settings.state`).
        mean, square: AdamW's moments of the gradient, in the structure of `params`.
        step: number of updates made.
    """

    params: Params
    mean: Params
    square: Params
    step: Int[Array, ""]


class Batch(NamedTuple):
    """The rows of one update: A batches, processed one after another.

    Attributes:
        tokens: token ids, right-padded.
        trained: which tokens are targets.
        lengths: number of real tokens of each row.
        text_index: for rows whose texts do not attend to each other, each token's index in its own
            text.
    """

    tokens: Int[Array, "A B T"]
    trained: Bool[Array, "A B T"]
    lengths: Int[Array, "A B"]
    text_index: Int[Array, "A B T"] | None = None

    def first(self) -> "Batch":
        """The first of the batches, [B, T]."""
        return jax.tree.map(lambda x: x[0], self)


class Metrics(NamedTuple):
    """Metrics of one update, float32.

    Attributes:
        loss: nats per trained token.
        grad_norm: norm of the gradient before clipping.
        tokens: number of trained tokens.
        finite: whether loss and gradient are finite; if not, the update was not made. The new
            parameters are not checked here (see `all_finite`).
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    tokens: Float[Array, ""]
    finite: Bool[Array, ""]


def learning_rate(settings: Settings, steps: int) -> optax.Schedule:
    """Linear warmup over the share `warmup` of the updates, then a cosine to zero at the end.

    As in `transformers`' cosine schedule, the number of warmup updates is rounded up.
    """
    warmup = math.ceil(settings.warmup * steps)
    return optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, warmup, max(steps, warmup + 1)
    )


def optimizer(settings: Settings, steps: int) -> optax.GradientTransformation:
    """Clipping and AdamW (arXiv 1711.05101), without weight decay of norms and biases."""

    def decays(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[-1].key not in ("scale", "bias"), params
        )

    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(
            learning_rate(settings, steps),
            b1=settings.beta1,
            b2=settings.beta2,
            weight_decay=settings.weight_decay,
            mask=decays,
        ),
    )


def start(params: Params) -> State:
    """The state before the first update."""
    # Two copies, because an update donates the memory of both.
    mean, square = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    return State(params, mean, square, jax.device_put(np.int32(0), _step_sharding(params)))


def abstract_state(params: Params) -> State:
    """The result of `start` as `jax.ShapeDtypeStruct`s, for abstract `params`."""
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=_step_sharding(params))
    return State(params, params, params, cast(Any, step))


def _step_sharding(params: Params) -> Sharding:
    # The parameters' own devices, or the second update would recompile.
    mesh, leaf = mesh_of(params), jax.tree.leaves(params)[0]
    return leaf.sharding if mesh is None else NamedSharding(mesh, PartitionSpec())


def make_update(
    build: Build, settings: Settings, steps: int
) -> Callable[[State, Params, Batch], tuple[State, Metrics]]:
    """The function for one of `steps` updates; for `jax.jit`, with the state donated.

    An update with a non-finite loss or gradient changes nothing and reports it, so a run can always
    continue from the state. The arithmetic is float32, whatever the state's dtype.
    """
    rule, seed = optimizer(settings, steps), settings.seed

    def update(state: State, frozen: Params, batch: Batch) -> tuple[State, Metrics]:
        nll, tokens, gradients = summed_gradients(build, state.params, frozen, batch)
        count = jnp.maximum(tokens, 1)  # rows may have no target, if a question fills them
        gradients = jax.tree.map(lambda g: g / count, widened(gradients))
        loss, norm = nll / count, optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        with jax.numpy_dtype_promotion("standard"):  # optax counts updates in integers
            params, mean, square = map(widened, state[:3])
            before = jax.eval_shape(rule.init, params)
            before = optax.tree.set(before, mu=mean, nu=square, count=state.step)
            changes, after = rule.update(gradients, before, params)
        params = jax.tree.map(jnp.add, params, changes)
        mean, square = (optax.tree.get(after, name) for name in ("mu", "nu"))
        new = State(params, mean, square, state.step + 1)
        if jax.tree.leaves(state.params)[0].dtype == jnp.bfloat16:
            new = narrowed(new, jax.random.fold_in(jax.random.key(seed), state.step))
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return new, Metrics(loss, norm, tokens, finite)

    return update


def narrowed(state: State, key: Array) -> State:
    """A float32 state rounded to bfloat16.

    The change of a weight, or of the mean of squares (a thousandth of it), is often less than half
    of bfloat16's last place, and rounding to nearest would always lose it; stochastic rounding
    keeps it on average. The mean of gradients changes by a tenth, so it is rounded to nearest.
    """
    params, square = stochastically_rounded((state.params, state.square), key)
    mean = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.mean)
    return State(params, mean, square, state.step)


@jax.jit
def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every number in a tree of arrays is finite; one pass over them, on their devices."""
    leaves = (x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating))
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def summed_gradients(
    build: Build, params: Params, frozen: Params, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""], Params]:
    """The summed loss of all batches, the number of trained tokens, and the objective's gradient.

    These are sums, so that every token has the same weight in every batch.
    """

    def loss(params: Params, batch: Batch) -> tuple[Array, tuple[Array, Array]]:
        model = build(joined(params, frozen))
        sums = summed_nll(model, *batch)
        return objective(model, sums), (sums.nll, sums.tokens)

    gradient_of = jax.grad(loss, has_aux=True)
    gradients, (nll, tokens) = gradient_of(params, batch.first())
    if len(batch.tokens) == 1:
        return nll, tokens, gradients

    def add(sums: tuple, batch: Batch) -> tuple[tuple, None]:
        gradients, (nll, tokens) = gradient_of(params, batch)
        return jax.tree.map(jnp.add, sums, (nll, tokens, gradients)), None

    rest = jax.tree.map(lambda x: x[1:], batch)
    return jax.lax.scan(add, (nll, tokens, gradients), rest)[0]


def joined(params: Params, frozen: Params) -> Params:
    """Both trees merged; they have no leaf in common."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(frozen))


def place(rows: dict[str, np.ndarray], accumulate: int, mesh: Mesh | None) -> Batch:
    """Places host rows on the devices as a batch; each process has all rows and places its part.

    Args:
        rows: "tokens" and "trained" [A * B, T], "lengths" [A * B], optionally "text_index" [A * B,
            T].
        accumulate: A, the number of batches.
    """

    def put(x: np.ndarray) -> Array:
        x = x.reshape(accumulate, -1, *x.shape[1:])
        if mesh is None:
            return jnp.asarray(x)
        spec = PartitionSpec(None, ("data", "fsdp"))
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])

    return Batch(**{name: put(values) for name, values in rows.items()})
