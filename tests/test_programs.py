"""What a process compiles: few programs, whatever it is asked, and those that it keeps."""

import functools
import gc
import random

import jax
import numpy as np
import pytest

from dca_jax import Sampler
from dca_jax.inference import compiled as compiled_module
from dca_jax.inference import generate as engine
from dca_jax.inference.chat import Conversation
from dca_jax.inference.compiled import PROGRAMS, compiled
from dca_jax.inference.steps import stop_and_decode

LENGTHS = (1, 5, 63, 200, 512)


@pytest.mark.slow
def test_a_process_settles_on_few_programs(llm, compilations):
    """Through every door: what was asked after the first requests compiles nothing."""
    draw = random.Random(0)

    def text(length):
        return [draw.randrange(3, 300) for _ in range(length)]

    def options(number):
        top_k, top_p, min_p = draw.choice([(None, None, None), (5, 0.9, None), (None, None, 0.1)])
        penalty = draw.choice([1.0, 1.3])
        return {
            "max_new_tokens": number % 3 + 1,
            "seed": number,
            "stop_ids": range(3, 3 + number % 40),
            "sampler": Sampler(
                temperature=draw.choice([0, 0.7]),
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=penalty,
            ),
        }

    conversation = Conversation(llm)

    def ask(number, lengths):
        llm.generate([text(n) for n in lengths], **options(number))
        prefix = llm.prefill(text(lengths[0]), room=draw.choice([9, 400]))
        llm.generate([text(n % 64 + 1) for n in lengths], prefix=prefix, **options(number))
        list(conversation.ask("Call me Ishmael. " * (number % 4 + 1), **options(number)))
        llm.logits([text(lengths[0])] * (number % 2 + 1))
        llm.perplexity(text(lengths[0] + 1), window=draw.choice([None, 2]))

    for number, lengths in enumerate([(512,), (1,), (200, 1, 512), (60,), (1, 63)]):
        ask(number, lengths)
    assert len(compilations) <= 26
    compilations.clear()
    for number in range(5, 13):
        ask(number, draw.choices(LENGTHS, k=draw.choice([1, 1, 2, 8])))
    assert compilations == []


def _doubled(model, x):
    return 2 * x


@pytest.mark.slow
def test_programs_longest_unused_are_dropped(monkeypatch):
    """And what they took is free: the process holds no more of them.

    Of these programs alone: others, of earlier tests, may be dropped meanwhile.
    """
    few = functools.lru_cache(maxsize=4)(compiled_module._program.__wrapped__)
    assert compiled_module._program.cache_info().maxsize == PROGRAMS
    monkeypatch.setattr(compiled_module, "_program", few)

    def alive(sizes):
        for n in sizes:
            x = np.arange(n, dtype=np.int32)
            np.testing.assert_array_equal(compiled(_doubled, None, n)(x), 2 * x)
        gc.collect()
        alive = jax.devices()[0].client.live_executables()
        return sum("_doubled" in one.hlo_modules()[0].name for one in alive)

    assert alive(range(20, 24)) == 4
    assert alive(range(24, 40)) == 4


def test_what_a_run_draws_by_is_handed_over_once(llm, monkeypatch):
    """At every call it took longer than a token of a small model."""
    given = []

    def spied(function, *shape, **donated):
        program = compiled(function, *shape, **donated)

        def decode(state, stopped, sampler, stop_ids, limit):
            given.append(jax.tree.leaves((sampler, stop_ids)))
            return program(state, stopped, sampler, stop_ids, limit)

        return decode if function is stop_and_decode else program

    monkeypatch.setattr(engine, "compiled", spied)
    llm.generate([[5, 6]], max_new_tokens=12, sampler=Sampler(temperature=0.5), stop_ids=[7])
    assert len(given) > 2
    assert all(isinstance(leaf, jax.Array) for leaf in given[0])
    assert all(a is b for call in given[1:] for a, b in zip(given[0], call, strict=True))
