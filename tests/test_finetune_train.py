"""An update beside a float64 dense computation, on one device and on meshes."""

import dataclasses
import functools
import re
from typing import Any

import dense_llama
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_llm import DIVISIBLE

from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.finetune.data import Source, training_rows
from dca_jax.finetune.loss import summed_nll
from dca_jax.finetune.rendered import Rendered
from dca_jax.finetune.rounding import stochastically_rounded
from dca_jax.finetune.settings import DataFile, Settings
from dca_jax.finetune.train import (
    Metrics,
    State,
    learning_rate,
    make_update,
    place,
    start,
    summed_gradients,
)
from dca_jax.model import Llama
from dca_jax.planning.memory import LOSS_TOKENS
from dca_jax.sharding import make_mesh
from dca_jax.weights.placement import parameter_shardings

CONFIG = DIVISIBLE
DCA = DCAConfig(chunk_len=10, max_query_position=14)
ONE_CHUNK = DCAConfig(chunk_len=64, max_query_position=64)  # for these rows: plain attention
LENGTHS = np.array([37, 5, 37, 20], np.int32)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 37)).astype(np.int32)
TRAINED = np.random.default_rng(1).random((4, 37)) < 0.4
TRAINED &= np.arange(37)[None, :] < LENGTHS[:, None]
TRAINED[:, 0] = False
ROWS = {"tokens": TOKENS, "trained": TRAINED, "lengths": LENGTHS}


def settings(**changes: Any) -> Settings:
    return Settings(model="m", output="o", data=(DataFile("d"),), **changes)


@functools.cache
def params() -> dict[str, np.ndarray]:
    model = Llama(CONFIG, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    leaves = flatten_dict(model.params(), sep=".")
    return {k: np.asarray(v) * np.float32(10 if v.ndim > 2 else 1) for k, v in leaves.items()}


def tree(sizes: str | None = None, leaves: dict[str, Any] | None = None) -> dict[str, Any]:
    leaves = params() if leaves is None else leaves
    if sizes is None:
        return unflatten_dict({k: jnp.asarray(v) for k, v in leaves.items()}, sep=".")
    where = parameter_shardings(CONFIG, make_mesh(sizes))
    return unflatten_dict({k: jax.device_put(v, where(k)) for k, v in leaves.items()}, sep=".")


def build(params: dict[str, Any], **options: Any) -> Llama:
    options = {"dca": DCA, "dtype": jnp.float32, "remat": "attention"} | options
    return Llama.from_params(CONFIG, params, **options)


def plain(params: dict[str, Any]) -> Llama:
    """For what is done with gradients, whatever of: it takes a third of the compiling."""
    return build(params, dca=None, remat=None)


# Compiled once for all tests that ask for it.
gradients_of = jax.jit(functools.partial(summed_gradients, build))
plain_gradients_of = jax.jit(functools.partial(summed_gradients, plain))


@functools.cache
def expected(dca: DCAConfig = DCA) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradient of all rows, float64 and dense."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        leaves = unflatten_dict(
            {k: jnp.asarray(v, jnp.float64) for k, v in params().items()}, sep="."
        )
        sizes = CONFIG, dca.chunk_len, dca.max_query_position
        run = jax.jit(lambda leaves: dense_llama.mean_nll(leaves, TOKENS, TRAINED, *sizes))
        loss, gradient = jax.value_and_grad(run)(leaves)
        return float(loss), {k: np.asarray(v) for k, v in flatten_dict(gradient, sep=".").items()}


def assert_expected(nll: Any, count: Any, gradients: Any, dca: DCAConfig = DCA) -> None:
    loss, gradient = expected(dca)
    assert float(count) == TRAINED.sum()
    np.testing.assert_allclose(float(nll) / float(count), loss, rtol=1e-6)
    for name, leaf in flatten_dict(gradients, sep=".").items():
        scale = np.abs(gradient[name]).max()
        found = np.asarray(leaf) / float(count)
        np.testing.assert_allclose(found, gradient[name], atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_loss_and_gradient_are_those_of_a_dense_float64_computation(accumulate: int) -> None:
    """Also in batches one after another: a token counts alike in whichever it stands."""
    batch = place(ROWS, accumulate, None)
    assert_expected(*gradients_of(tree(), {}, batch))


def test_a_tied_head_trains_the_embedding() -> None:
    """Its gradient is the table's plus that of a head of its own that holds the same."""
    table, head = "embed_tokens.embedding", "lm_head.kernel"
    batch, gradients = place(ROWS, 1, None), {}
    for tied in (False, True):
        config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
        leaves = params() | {head: params()[table].T}
        if tied:
            del leaves[head]
        make = functools.partial(Llama.from_params, config, dca=DCA, dtype=jnp.float32)
        run = jax.jit(functools.partial(summed_gradients, make))
        gradients[tied] = flatten_dict(run(tree(leaves=leaves), {}, batch)[2], sep=".")
    expected = gradients[False][table] + gradients[False][head].T
    scale = np.abs(expected).max()
    np.testing.assert_allclose(gradients[True][table], expected, atol=1e-5 * scale)
    assert np.abs(gradients[False][head]).max() > 0.1 * scale  # so both parts are seen


@pytest.mark.parametrize(
    ("sizes", "accumulate"),
    [("data=4", 1), pytest.param("context=2,fsdp=2,tensor=2", 2, marks=pytest.mark.slow)],
)
def test_loss_and_gradient_on_meshes(sizes: str, accumulate: int) -> None:
    """Plain attention: DCA on a mesh is test_sharding.py's."""
    batch = place(ROWS, accumulate, make_mesh(sizes))
    leaves = tree(sizes)
    nll, count, gradients = plain_gradients_of(leaves, {}, batch)
    assert_expected(nll, count, gradients, ONE_CHUNK)
    for name, leaf in flatten_dict(gradients, sep=".").items():
        there = flatten_dict(leaves, sep=".")[name].sharding
        assert leaf.sharding.is_equivalent_to(there, leaf.ndim), name


@pytest.mark.slow
def test_packed_dialogues_are_trained_as_each_alone() -> None:
    """Of the rows above, end to end in packed ones: loss and gradient of each dialogue alone."""
    texts = [
        Rendered(TOKENS[n, :size], TRAINED[n, :size]) for n, size in enumerate(LENGTHS.tolist())
    ]
    stream = training_rows(
        [Source("a", texts)], length=64, batch=2, seed=0, pack="segments", pad_id=7
    )
    rows = next(iter(stream))
    assert rows["lengths"].sum() == LENGTHS.sum()  # two rows hold all four
    batch = place(rows, 1, None)
    assert_expected(*gradients_of(tree(), {}, batch))
    batch = place(rows, 1, make_mesh("fsdp=2,tensor=2"))
    assert_expected(*plain_gradients_of(tree("fsdp=2,tensor=2"), {}, batch), dca=ONE_CHUNK)
    with pytest.raises(InputError, match="this mesh splits them over 2 along `context`"):
        summed_gradients(build, tree("context=2"), {}, place(rows, 1, make_mesh("context=2")))


def test_what_is_padding_or_not_trained_has_no_effect() -> None:
    other = TOKENS.copy()
    other[1, 5:] = 3
    sums = jax.jit(lambda p, b: summed_nll(build(p), *b.first())[:2])
    here = sums(tree(), place(ROWS, 1, None))
    np.testing.assert_array_equal(here, sums(tree(), place(ROWS | {"tokens": other}, 1, None)))
    nothing = np.zeros_like(TRAINED)
    nll, count = sums(tree(), place(ROWS | {"trained": nothing}, 1, None))
    assert (float(nll), float(count)) == (0.0, 0.0)


def test_no_array_holds_the_logits_of_a_whole_row() -> None:
    length = 3 * LOSS_TOKENS + 5
    shapes = (1, 1, length), (1, 1, length), (1, 1)
    batch = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, "i4 ? i4".split(), strict=True)]
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree())

    def gradients(params: Any, *batch: Any) -> Any:
        return jax.grad(lambda p: summed_nll(build(p), *(x[0] for x in batch))[0])(params)

    text = jax.jit(gradients).lower(like, *batch).compile().as_text()
    sizes = [
        int(np.prod([int(n) for n in shape.split(",")]))
        for shape in re.findall(rf"f32\[([\d,]*\b{CONFIG.vocab_size}\b[\d,]*)\]", text)
    ]
    assert max(sizes) == LOSS_TOKENS * CONFIG.vocab_size


# --- the update --------------------------------------------------------------------------------

SHARED = "fsdp=2"  # an update by two devices, where its state lies in halves


def adamw(gradients: list[dict[str, np.ndarray]], chosen: Settings, rates: list[float]) -> dict:
    """AdamW as arXiv 1711.05101 has it, in NumPy: the parameters after these gradients."""
    found = {k: v.astype(np.float64) for k, v in params().items()}
    mean, square = ({k: 0.0 * v for k, v in found.items()} for _ in range(2))
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = g * min(1.0, chosen.clip / norm)
            mean[name] = chosen.beta1 * mean[name] + (1 - chosen.beta1) * g
            square[name] = chosen.beta2 * square[name] + (1 - chosen.beta2) * g * g
            m = mean[name] / (1 - chosen.beta1**t)
            v = square[name] / (1 - chosen.beta2**t)
            decay = 0.0 if name.endswith("scale") else chosen.weight_decay
            found[name] = found[name] - rate * (m / (np.sqrt(v) + 1e-8) + decay * found[name])
    return found


def test_updates_are_adamw() -> None:
    """Of two updates: gradients of the package, arithmetic of the paper."""
    chosen = settings(warmup=0.0, learning_rate=1e-3, weight_decay=0.1, clip=0.7)
    steps, batch = 3, place(ROWS, 1, make_mesh(SHARED))
    update = jax.jit(make_update(plain, chosen, steps))
    state, gradients = start(tree(SHARED)), []
    for _ in range(2):
        _, count, found = plain_gradients_of(state.params, {}, batch)
        gradients.append({
            k: np.asarray(v, np.float64) / float(count)
            for k, v in flatten_dict(found, sep=".").items()
        })  # fmt: skip
        state, metrics = update(state, {}, batch)
        norm = np.sqrt(sum((g**2).sum() for g in gradients[-1].values()))
        np.testing.assert_allclose(float(metrics.grad_norm), norm, rtol=1e-5)
    assert update._cache_size() == 1  # from weights that are bound to their devices
    assert int(state.step) == 2
    rates = [float(learning_rate(chosen, steps)(n)) for n in range(2)]
    want = adamw(gradients, chosen, rates)
    for name, leaf in flatten_dict(state.params, sep=".").items():
        np.testing.assert_allclose(leaf, want[name], atol=2e-6, err_msg=name)
    for part in state[:3]:  # fsdp cuts the moments too
        for name, leaf in flatten_dict(part, sep=".").items():
            there = flatten_dict(tree(SHARED), sep=".")[name].sharding
            assert leaf.sharding.is_equivalent_to(there, leaf.ndim), name


# It learns from the first update on.
update = jax.jit(make_update(plain, settings(warmup=0.0), 10))


def test_an_update_that_is_not_finite_changes_nothing_and_says_so() -> None:
    broken = dict(params())
    broken["norm.scale"] = broken["norm.scale"] * np.float32(np.inf)
    state = start(tree(leaves=broken))
    before = jax.tree.map(np.asarray, state)
    after, metrics = update(state, {}, place(ROWS, 1, None))
    assert not bool(metrics.finite)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, after), before)


def test_rows_of_which_nothing_is_trained_are_no_failure() -> None:
    """A question longer than the rows of an update: its gradient is 0, and its loss."""
    nothing = ROWS | {"trained": np.zeros_like(TRAINED)}
    before = start(tree())
    after, metrics = update(before, {}, place(nothing, 1, None))
    assert bool(metrics.finite)
    assert (float(metrics.loss), float(metrics.grad_norm), float(metrics.tokens)) == (0, 0, 0)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert int(after.step) == 1


def test_a_second_update_compiles_nothing() -> None:
    """From weights that are bound to their device, as loaded ones are; on a mesh: above."""
    leaves = jax.tree.map(lambda x: jax.device_put(x, x.sharding), tree())
    batch = place(ROWS, 1, None)
    own = jax.jit(make_update(plain, settings(warmup=0.0), 10))
    state, _ = own(start(leaves), {}, batch)
    own(state, {}, batch)
    assert own._cache_size() == 1


def test_the_learning_rate_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers import get_cosine_schedule_with_warmup

    steps, chosen = 50, settings(learning_rate=2e-5, warmup=0.03)
    dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=chosen.learning_rate)
    theirs = get_cosine_schedule_with_warmup(dummy, 2, steps)  # HF rounds 1.5 updates up
    ours = learning_rate(chosen, steps)
    for step in range(steps):
        np.testing.assert_allclose(float(ours(step)), theirs.get_last_lr()[0], atol=1e-11)
        dummy.step()
        theirs.step()


def test_the_state_is_a_tree_of_plain_arrays() -> None:
    state = start(tree())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert set(flatten_dict(state._asdict()["params"], sep=".")) == set(params())
    assert isinstance(state, State)
    assert Metrics._fields == ("loss", "grad_norm", "tokens", "finite")
    assert optax.tree.size(state.mean) == optax.tree.size(state.params)


# --- a state of half the memory ----------------------------------------------------------------


def test_stochastic_rounding_is_right_on_average_and_never_far() -> None:
    """Of numbers between two of bfloat16's: one of the two, and their mean is the number."""
    low, high = np.float32(1.0), np.float32(1.0078125)  # bfloat16's next one
    for share in (0.0, 0.1, 0.5, 0.97):
        x = jnp.full((40_000,), low + share * (high - low), jnp.float32)
        a, b = stochastically_rounded(({"x": x}, {"x": -x}), jax.random.key(3))
        for found in (np.asarray(a["x"], np.float32), -np.asarray(b["x"], np.float32)):
            assert set(np.unique(found)) <= {low, high}
            assert abs((found == high).mean() - share) < 4 * np.sqrt(0.25 / x.size)
    far = jnp.array([np.inf, -np.inf, np.nan, 0.0, 1e-30], jnp.float32)
    (found, _) = stochastically_rounded((far, far), jax.random.key(0))
    np.testing.assert_allclose(np.asarray(found, np.float32), far, rtol=2**-7)


@pytest.mark.slow
def test_updates_of_a_narrow_state_are_adamw_rounded() -> None:
    """Every number is one of the two of bfloat16 around what float32 arithmetic gives."""
    chosen = settings(warmup=0.0, learning_rate=1e-3, weight_decay=0.1, state="bfloat16")
    narrow = {k: np.asarray(jnp.asarray(v, jnp.bfloat16), np.float32) for k, v in params().items()}
    leaves = {k: jnp.asarray(v, jnp.bfloat16) for k, v in narrow.items()}
    before, batch = start(tree(SHARED, leaves)), place(ROWS, 1, make_mesh(SHARED))
    wide = make_update(plain, settings(warmup=0.0, learning_rate=1e-3, weight_decay=0.1), 10)
    wanted, _ = jax.jit(wide)(start(tree(SHARED, narrow)), {}, batch)
    found, metrics = jax.jit(make_update(plain, chosen, 10))(before, {}, batch)
    assert bool(metrics.finite)
    for part, want, like in zip(found[:3], wanted[:3], ("params", "mean", "square"), strict=True):
        ours, theirs = flatten_dict(part, sep="."), flatten_dict(want, sep=".")
        for name, leaf in ours.items():
            assert leaf.dtype == jnp.bfloat16
            x, y = np.asarray(leaf, np.float32), np.asarray(theirs[name])
            # The gradient itself is of bfloat16: 2^-7 of the largest is what it may be off by.
            scale = np.abs(y).max() if like != "params" else 0.0
            assert (np.abs(x - y) <= 2**-7 * np.abs(y) + 2**-5 * scale + 1e-12).all(), (like, name)


def test_small_steps_are_not_lost_in_a_narrow_state() -> None:
    """A hundred of 1e-3 of a last place each: rounded to nearest, none of them would be seen."""
    x = jnp.full((20_000,), 1.0, jnp.bfloat16)
    for step in range(100):
        wide = x.astype(jnp.float32) + np.float32(1e-3 * 2**-7)
        x, _ = stochastically_rounded((wide, wide), jax.random.key(step))
    gained = float(x.astype(jnp.float32).mean()) - 1
    np.testing.assert_allclose(gained, 0.1 * 2**-7, rtol=0.1)
