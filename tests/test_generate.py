"""The engine: what it generates does not depend on how the work is cut."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_llama import CAPACITY
from hypothesis import given
from hypothesis import strategies as st
from tiny_llm import LEAST

from dca_jax import memory
from dca_jax.errors import InputError
from dca_jax.inference import buckets
from dca_jax.inference import generate as engine
from dca_jax.inference.generate import Run, generate
from dca_jax.inference.pieces import Pieces, prompt_pieces
from dca_jax.inference.sampling import Sampler
from dca_jax.inference.steps import read
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama


@pytest.fixture(scope="module")
def model(golden_model):
    return golden_model


@pytest.fixture(scope="module")
def ragged(golden):
    """One row ends at the edge of a chunk, the other is a single token."""
    first, second = golden["input_ids"].tolist()
    return [first[:200], second[:1]]


def empty_cache(model, batch):
    """Of the capacity that the golden prompts get by default: so all tests share their programs."""
    return KVCache.create(model.config, batch=batch, capacity=CAPACITY, dtype=jnp.float32)


def continued(model, prompts, **options):
    return generate(model, prompts, cache=empty_cache(model, len(prompts)), **options)


# --- correct -----------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_chunkllama(model, golden):
    tokens = generate(model, golden["input_ids"].tolist(), max_new_tokens=24)
    np.testing.assert_array_equal(tokens, golden["greedy_tokens"])


def test_decoding_token_by_token_gives_the_logits_of_the_whole_text(model, golden):
    """From the middle of the first chunk over the edges at 40, 80 and 120."""
    tokens = jnp.asarray(golden["input_ids"][:, :125], jnp.int32)
    whole = jax.jit(Llama.__call__)(model, tokens)
    step = jax.jit(lambda *args: read(model, *args), donate_argnums=0)
    cache = KVCache.create(model.config, batch=2, capacity=125, dtype=jnp.float32)
    hidden = jnp.zeros((2, model.config.hidden_size), jnp.float32)
    unembed = jax.jit(model.unembed)
    for t in range(125):
        lengths = jnp.full((2,), t + 1, jnp.int32)
        one = jnp.ones((2,), jnp.int32)
        hidden, cache = step(cache, hidden, tokens[:, t : t + 1], one, lengths)
        np.testing.assert_allclose(unembed(hidden), whole[:, t], atol=2e-4, err_msg=str(t))


def test_a_ragged_batch_equals_each_row_alone(model, golden):
    """Each row crosses an edge of the chunks (at 40, 80, ...) while it is decoded."""
    lengths = 200, 1, 159, 161, 40, 250
    rows = [golden["input_ids"][n % 2][:length].tolist() for n, length in enumerate(lengths)]
    together = continued(model, rows, max_new_tokens=50)
    assert together == [continued(model, [row], max_new_tokens=50)[0] for row in rows]


@pytest.mark.parametrize(("width", "count"), [pytest.param(7, 11, marks=pytest.mark.slow), (40, 3)])
def test_a_prompt_may_be_read_in_any_pieces(model, ragged, width, count, monkeypatch):
    expected = continued(model, ragged, max_new_tokens=4)
    whole = jax.jit(Llama.__call__)(model, jnp.asarray(ragged[:1], jnp.int32))[:, -1]
    monkeypatch.setattr(engine, "ENDS", width)
    monkeypatch.setattr(engine, "pieces_of", lambda *_: Pieces((3 * width, width), overhead=0))
    pieces = []
    cache = empty_cache(model, 2)
    run = Run(model, ragged, max_new_tokens=4, cache=cache, on_piece=pieces.append)
    logits = model.unembed(run.read_prompts())
    np.testing.assert_allclose(logits[:1], whole, atol=2e-4)
    # The long row's wide pieces, which are all it has; then one of both rows, for the short one.
    assert len(pieces) == count
    assert sum(pieces) == sum(map(len, ragged))
    assert continued(model, ragged, max_new_tokens=4) == expected


@pytest.mark.parametrize("segment", [1, 5])
def test_what_is_drawn_does_not_depend_on_the_segments(model, ragged, segment, monkeypatch):
    sampler = Sampler(temperature=1.5, top_p=0.95, repetition_penalty=1.1)
    options = {"max_new_tokens": 21, "sampler": sampler, "seed": 3}
    expected = continued(model, ragged, **options)
    monkeypatch.setattr(engine, "SEGMENT", segment)
    assert continued(model, ragged, **options) == expected


def test_a_seed_is_reproducible_and_rows_draw_apart(model, golden):
    prompts = [golden["input_ids"][0].tolist()] * 2
    options = {"max_new_tokens": 12, "sampler": Sampler(temperature=1.0)}
    first = generate(model, prompts, seed=1, **options)
    assert generate(model, prompts, seed=1, **options) == first
    assert generate(model, prompts, seed=2, **options) != first
    assert first[0] != first[1]


# --- stopping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [1, 6, 11])
def test_a_row_ends_at_a_stop_id_and_grows_no_more(model, golden, ends, monkeypatch):
    """With the first token, and in the middle of segments of 4 and 8."""
    monkeypatch.setattr(engine, "SEGMENT_SECONDS", 1e9)  # so that they grow on any machine
    prompts = golden["input_ids"].tolist()
    free = golden["greedy_tokens"].tolist()
    stop = free[0][ends - 1]
    assert stop not in free[0][: ends - 1] + free[1]
    run = Run(model, prompts, max_new_tokens=24, stop_ids=[stop])
    rows = [[], []]
    for segment in run:
        for row, new in zip(rows, segment, strict=True):
            row += new
    assert rows == [free[0][:ends], free[1]]
    # The last token drawn is never fed back, so never in the cache.
    assert run.cache.lengths.tolist()[:2] == [300 + ends - 1, 300 + 24 - 1]


def test_all_rows_ended_means_no_more_segments(model, golden):
    free = golden["greedy_tokens"].tolist()
    stop = {free[0][0], free[1][0]}
    segments = list(Run(model, golden["input_ids"].tolist(), max_new_tokens=500, stop_ids=stop))
    assert segments == [[[free[0][0]], [free[1][0]]]]


def test_the_caller_may_end_a_row(model, golden):
    run = Run(model, golden["input_ids"].tolist(), max_new_tokens=24)
    lengths = np.zeros(2, int)
    for segment in run:
        run.finish(1)
        lengths += [len(new) for new in segment]
    assert lengths.tolist() == [24, 1]


# --- the cache ---------------------------------------------------------------------------------


def test_a_prompt_continues_what_the_cache_holds(model, golden):
    prompts = [golden["input_ids"][0, :200].tolist(), golden["input_ids"][1, :270].tolist()]
    expected = continued(model, prompts, max_new_tokens=10)
    first = Run(model, [p[:60] for p in prompts], max_new_tokens=1, cache=empty_cache(model, 2))
    first.read_prompts()
    assert generate(model, prompts, max_new_tokens=10, cache=first.cache) == expected


def test_the_cache_is_updated_in_place(model, golden):
    cache = empty_cache(model, 2)
    generate(model, golden["input_ids"].tolist(), max_new_tokens=4, cache=cache)
    assert cache.key.is_deleted()
    assert cache.value.is_deleted()


def test_copies_continue_as_the_original_does(model, golden):
    prompt = golden["input_ids"][0, :200].tolist()
    expected = continued(model, [prompt], max_new_tokens=10)
    run = Run(model, [prompt[:190]], max_new_tokens=2, cache=empty_cache(model, 1))
    run.read_prompts()
    cache = buckets.copied(model, run.cache, 2, 2 * CAPACITY)
    assert not run.cache.key.is_deleted()
    assert cache.key.shape[1:3] == (8, 1024)
    assert generate(model, [prompt] * 2, max_new_tokens=10, cache=cache) == expected * 2
    with pytest.raises(InputError, match="one row to copy, got 2"):
        buckets.copied(model, empty_cache(model, 2), 2, 256)


def test_an_overflow_is_refused_before_it_happens(model, golden):
    prompts = golden["input_ids"].tolist()
    cache = empty_cache(model, 2)
    message = "prompt 0 has 300 tokens; with 53 new ones that is 353, and the cache holds 352"
    with pytest.raises(InputError, match=message):
        Run(model, prompts, max_new_tokens=53, cache=cache)
    with pytest.raises(InputError, match="prompt 1 has 360 tokens"):
        Run(model, [prompts[0], prompts[1] + prompts[0][:60]], max_new_tokens=1, cache=cache)
    assert len(generate(model, prompts, max_new_tokens=52, cache=cache)[0]) == 52


def test_a_cache_beyond_memory_is_refused(model):
    fits = r"1 x 2000000001 tokens takes .* GiB, but the device .*: 1 x (\d+) tokens fit"
    with pytest.raises(InputError, match=fits) as refused:
        Run(model, [[1]], max_new_tokens=2 * 10**9)
    found = re.search(fits, str(refused.value))
    assert found is not None
    # The figure is one that is not refused, and not much less than what would be.
    free = memory.free_bytes(jax.devices()[0])
    token = empty_cache(model, 1).num_bytes // CAPACITY
    assert 0.5 < int(found[1]) * token / free < 1
    with pytest.raises(InputError, match=r"2 x 1000000000 tokens takes .* GiB, but the dev"):
        buckets.copied(model, empty_cache(model, 1), 2, 10**9)


@pytest.mark.parametrize("new_tokens", [2**31 - 1, 2**31, 10**15])
def test_positions_beyond_int32_are_refused(model, new_tokens):
    with pytest.raises(InputError, match=r"tokens fit|at most 2147483647"):
        Run(model, [[1]], max_new_tokens=new_tokens)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes."),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_went_meanwhile_is_refused_too(model, monkeypatch, error):
    def create(*_, **__):
        raise error

    monkeypatch.setattr(KVCache, "create", create)
    with pytest.raises(InputError, match="1 x 1024 tokens does not fit"):
        Run(model, [[1]], max_new_tokens=2)


# --- shapes ------------------------------------------------------------------------------------


def test_another_prompt_length_in_the_bucket_does_not_compile(model, golden, compilations):
    ids = golden["input_ids"].tolist()
    generate(model, ids, max_new_tokens=24, sampler=Sampler(temperature=0.5), stop_ids=[1])
    compilations.clear()
    for length, temperature, new_tokens in ((299, 0.7, 26), (260, 1.0, 90), (288, 2.0, 33)):
        generate(
            model,
            [row[:length] for row in ids],
            max_new_tokens=new_tokens,
            sampler=Sampler(temperature=temperature),
            stop_ids=range(length % 7),
            seed=length,
        )
    assert compilations == []


@given(st.integers(1, 10**7))
def test_buckets_are_few_and_waste_little(length):
    capacity = buckets.capacity_bucket(length)
    assert capacity >= length
    assert capacity == 128 or capacity - length < length / 8
    assert buckets.capacity_bucket(capacity) == capacity


PLATFORMS = st.sampled_from(["cpu", "gpu", "tpu", "another"])


@given(st.integers(1, 10**5), st.sampled_from([1, 2, 3, 8, 33, 100]), PLATFORMS, st.booleans())
def test_a_text_is_cut_into_pieces_of_few_widths(length, batch, platform, packed):
    pieces = prompt_pieces(LEAST, platform, packed=packed, batch=batch)
    found = list(pieces.cut(length))
    assert sum(count for count, _ in found) == length
    assert all(count <= width for count, width in found)
    assert {width for _, width in found} <= set(pieces.widths)
    assert len(pieces.widths) <= 4
    assert found[0][1] == pieces.widest(length)
    assert pieces.widest(10**5) == pieces.widths[0]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("packed", [False, True])
def test_no_other_pieces_are_much_faster(platform, packed):
    """Beside the fastest pieces of all, by dynamic programming over the length."""
    pieces = prompt_pieces(LEAST, platform, packed=packed)
    costs = {width: width + pieces.overhead for width in pieces.widths}
    best = np.zeros(20_001)
    for length in range(1, len(best)):
        best[length] = min(cost + best[max(0, length - w)] for w, cost in costs.items())
    for length in range(1, len(best), 17):
        assert sum(costs[width] for _, width in pieces.cut(length)) <= 1.25 * best[length]


def test_an_octave_has_eight_capacities():
    assert len({buckets.capacity_bucket(n) for n in range(2**12 + 1, 2**13 + 1)}) == 8


def test_a_piece_is_smaller_for_more_rows():
    batches = (1, 2, 3, 8, 64)
    widest = [prompt_pieces(LEAST, "cpu", packed=False, batch=n).widths[0] for n in batches]
    assert widest == [512, 256, 128, 128, 128]


def test_plain_attention_is_asked_for_what_the_text_needs():
    config = replace(LEAST, max_position_embeddings=300, sliding_window=150, model_type="mistral")
    plain = Llama(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    prompt = [1] * 141
    # The last token drawn is never read. The cache is larger, which is nobody's need.
    assert len(generate(plain, [prompt], max_new_tokens=10)[0]) == 10
    with pytest.raises(
        InputError, match="sliding window of 150 tokens, which is less than the 151 requested"
    ):
        generate(plain, [prompt], max_new_tokens=11)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[]], {}, "prompt 0 is empty"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 257]], {}, "token id 257, but the model's vocabulary has ids 0 to 256"),
        ([[-1, 3]], {}, "token id -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1]], {"seed": 2**40}, "seed must fit into 32 bits"),
    ],
    ids=str,
)
def test_bad_prompts_are_refused_at_once(model, prompts, options, message):
    with pytest.raises(InputError, match=message):
        Run(model, prompts, **{"max_new_tokens": 1} | options)


def test_a_cache_that_does_not_fit_the_prompts_is_refused(model):
    cache = KVCache.create(model.config, batch=2, capacity=16, dtype=jnp.float32)
    with pytest.raises(InputError, match="the cache has 2 rows for 3 prompts"):
        Run(model, [[1]] * 3, max_new_tokens=1, cache=cache)
    full = replace(cache, lengths=jnp.asarray([1, 3], jnp.int32))
    with pytest.raises(InputError, match="any other rows must be empty"):
        Run(model, [[1, 2]], max_new_tokens=1, cache=full)
    with pytest.raises(
        InputError, match="row 1 of the cache holds 3 tokens, but prompt 1 has only 3"
    ):
        Run(model, [[1, 2], [1, 2, 3]], max_new_tokens=1, cache=full)


def test_weights_that_are_nan_are_noticed(model):
    params = model.params()
    params["norm"] = {"scale": params["norm"]["scale"].at[3].set(jnp.nan)}
    broken = Llama.from_params(model.config, params, dca=model.dca, dtype=jnp.float32)
    with pytest.raises(InputError, match="prompt 0: the logits after token 3 are not finite"):
        generate(broken, [[1, 2, 3]], max_new_tokens=4)


def test_a_row_that_fails_ends_alone(model, golden):
    """A token whose embedding is infinite: in a prompt, and drawn in the middle of an answer."""
    first, second = (row[:60].tolist() for row in golden["input_ids"])
    free = generate(model, [first, second], max_new_tokens=12)
    bad = free[0][6]
    assert bad not in first + second + free[0][:6] + free[1]
    params = model.params()
    table = params["embed_tokens"]["embedding"].at[bad].set(jnp.inf)
    params["embed_tokens"] = {"embedding": table}
    broken = Llama.from_params(model.config, params, dca=model.dca, dtype=jnp.float32)

    def texts(prompts):
        run = Run(broken, prompts, max_new_tokens=12)
        rows = [[] for _ in prompts]
        for segment in run:
            for row, new in zip(rows, segment, strict=True):
                row += new
        return rows, run

    rows, run = texts([first, second, [bad, *second]])
    assert rows == [free[0][:7], free[1], []]
    assert run.failed == {0: 67, 2: 61}
    assert run.cache.key.is_deleted()
    rows, run = texts([second])
    assert (rows, run.failed) == ([free[1]], {})
    assert not run.cache.key.is_deleted()
    with pytest.raises(InputError, match="prompt 1: the logits after token 67 are not finite"):
        generate(broken, [second, first], max_new_tokens=12)
