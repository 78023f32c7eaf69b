"""The sampler against transformers' logits processors, and its behavior under jit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dca_jax.errors import InputError
from dca_jax.inference.sampling import Sampler, penalized


def random_logits(rows=3, vocab=50, seed=0):
    return 3.0 * jax.random.normal(jax.random.key(seed), (rows, vocab), jnp.float32)


def keys(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


def transformers_filtered(logits, *, temperature=1.0, top_k=None, top_p=None, min_p=None):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    chain = [hf.TemperatureLogitsWarper(temperature)]
    chain += [hf.TopKLogitsWarper(top_k)] if top_k is not None else []
    chain += [hf.TopPLogitsWarper(top_p)] if top_p is not None else []
    chain += [hf.MinPLogitsWarper(min_p)] if min_p is not None else []
    ids = torch.zeros((len(logits), 1), dtype=torch.long)
    return np.asarray(hf.LogitsProcessorList(chain)(ids, torch.tensor(np.asarray(logits))))


@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 0.7},
        {"temperature": 2.5, "top_k": 5},
        {"top_k": 1},
        {"top_k": 500},
        {"top_p": 0.9},
        {"top_p": 0.05},
        {"top_p": 1.0},
        {"min_p": 0.1},
        {"min_p": 0.0},
        {"min_p": 1.0},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0.4, "top_k": 3, "top_p": 0.99},
    ],
    ids=str,
)
def test_filters_equal_those_of_transformers(filters):
    logits = random_logits()
    ours = Sampler(**{"temperature": 1.0} | filters).filtered(logits)
    np.testing.assert_allclose(ours, transformers_filtered(logits, **filters), rtol=1e-6)


def test_top_k_keeps_ties_as_transformers_does():
    logits = jnp.asarray([[1.0, 2.0, 2.0, 0.0]], jnp.float32)
    ours = Sampler(temperature=1.0, top_k=1).filtered(logits)
    np.testing.assert_array_equal(ours, transformers_filtered(logits, top_k=1))
    assert np.isfinite(ours).sum() == 2


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_equals_that_of_transformers(penalty):
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = random_logits()
    ids = np.random.default_rng(0).integers(0, 50, (3, 17))
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor(ids), torch.tensor(np.asarray(logits))
    )
    seen = jnp.zeros((3, 50), bool).at[jnp.arange(3)[:, None], ids].set(True)
    np.testing.assert_allclose(penalized(logits, seen, penalty), np.asarray(theirs), rtol=1e-6)


def test_greedy_takes_the_most_likely_and_the_penalty_still_counts():
    logits = jnp.asarray([[1.0, 3.0, 2.5]], jnp.float32)
    assert Sampler().sample(logits, keys(1)) == 1
    seen = jnp.asarray([[False, True, False]])
    assert Sampler(repetition_penalty=1.5).sample(logits, keys(1), seen) == 2


def test_draws_follow_the_filtered_distribution():
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.1]], jnp.float32))
    sampler = Sampler(temperature=1.0, top_k=3)
    draws = 20_000
    tokens = sampler.sample(jnp.broadcast_to(logits, (draws, 4)), keys(draws))
    share = np.bincount(np.asarray(tokens), minlength=4) / draws
    # Three standard errors of a share are at most 3 * sqrt(0.25 / 20000) = 0.0106.
    np.testing.assert_allclose(share, np.array([50, 25, 15, 0]) / 90, atol=0.0107)
    assert share[3] == 0


def test_a_row_is_drawn_alone():
    logits, key = random_logits(rows=4), keys(4)
    sampler = Sampler(temperature=1.5, top_p=0.9)
    together = sampler.sample(logits, key)
    alone = [sampler.sample(logits[r : r + 1], key[r : r + 1])[0] for r in range(4)]
    np.testing.assert_array_equal(together, jnp.stack(alone))


def test_another_number_does_not_recompile_and_another_filter_does():
    @jax.jit
    def draw(sampler, logits, key):
        return sampler.sample(logits, key)

    logits, key = random_logits(), keys(3)
    for temperature in (0.5, 1, 2.0):
        draw(Sampler(temperature=temperature, top_k=5), logits, key)
    draw(Sampler(temperature=0.5, top_k=7), logits, key)
    assert draw._cache_size() == 1
    draw(Sampler(temperature=0.5), logits, key)
    draw(Sampler(), logits, key)
    assert draw._cache_size() == 3


def test_jit_computes_what_is_computed_without():
    logits, key = random_logits(), keys(3)
    sampler = Sampler(temperature=0.9, top_k=10, top_p=0.7, min_p=0.01, repetition_penalty=1.2)
    seen = logits > 1
    expected = sampler.sample(logits, key, seen)
    np.testing.assert_array_equal(jax.jit(Sampler.sample)(sampler, logits, key, seen), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.2, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 0.9},
    ],
    ids=str,
)
def test_one_program_serves_every_sampler_and_draws_what_each_draws(settings):
    logits, key = random_logits(), keys(3)
    seen = logits > 1
    expected = Sampler(**settings).sample(logits, key, seen)
    np.testing.assert_array_equal(
        _draw_traced(Sampler(**settings).traced(), logits, key, seen), expected
    )
    assert _draw_traced._cache_size() == 1


_draw_traced = jax.jit(lambda *args: Sampler.sample(*args))  # with a cache of its own


def test_is_a_pytree_that_comes_back_whole():
    for sampler in (Sampler(), Sampler(temperature=0.5, top_k=3, repetition_penalty=2)):
        leaves, treedef = jax.tree.flatten(sampler)
        assert jax.tree.unflatten(treedef, leaves) == sampler
    assert jax.tree.leaves(Sampler()) == []
    assert {Sampler(temperature=1): "hashable"}[Sampler(temperature=1.0)] == "hashable"


@pytest.mark.parametrize(
    ("wrong", "allowed"),
    [
        ({"temperature": -1}, "temperature must be 0 .greedy. or at least 0.0001, got -1"),
        ({"temperature": -1.0}, "got -1.0"),
        ({"temperature": math.nan}, "got nan"),
        ({"temperature": math.inf}, "got inf"),
        ({"temperature": 1e-9}, "got 1e-09"),
        ({"top_k": 0}, "top_k must be a positive integer"),
        ({"top_k": -3}, "top_k must be a positive integer"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1"),
        ({"min_p": 2.0}, "min_p must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a positive number"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong, allowed):
    with pytest.raises(InputError, match=allowed):
        Sampler(**wrong)
