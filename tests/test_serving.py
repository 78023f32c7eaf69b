"""The server, by OpenAI's own client: answers are those of `LLM.generate`, whatever else runs."""

import json
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx2
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dca_jax import Sampler
from dca_jax.errors import InputError
from dca_jax.inference.methods import reading
from dca_jax.inference.options import Options
from dca_jax.serving.engine import PAGE, Engine
from dca_jax.serving.http import make_app
from dca_jax.serving.pages import Pages
from dca_jax.serving.scheduler import Scheduler
from dca_jax.serving.server import Server, listen
from dca_jax.serving.sizing import choose_pages

CONTEXT, ROWS, PAGES, QUEUE = 512, 4, 20, 8
KEY = "a key"
BOOK = ("Call me Ishmael. Some years ago, never mind how long precisely, " * 4)[:250]
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def engine(paper_llm):
    engine = Engine(paper_llm, context=CONTEXT, rows=ROWS, pages=PAGES, queue=QUEUE)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def address(engine):
    listening = listen("127.0.0.1", 0)
    server = Server(make_app(engine, "tiny", key=KEY))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def http(address):
    with httpx2.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}) as http:
        yield http


def until(holds, seconds=20):
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def unhurried(engine, monkeypatch):
    """450 tokens take 20 s or more: a row that is free before was freed, not finished."""
    draw = engine.programs.draw

    def later(*args):
        time.sleep(0.05)
        return draw(*args)

    monkeypatch.setattr(engine.programs, "draw", later)


def quiet(engine):
    counts = engine.counts()
    return counts["running"] == counts["waiting"] == counts["pages_used"] == 0


def written(engine, prompts, options, **more):
    """What the engine itself writes of prompts at once: tokens, text, reason, error of each."""
    lines = [queue.SimpleQueue() for _ in range(len(prompts) * more.get("choices", 1))]
    jobs = engine.submit(prompts, options, [line.put for line in lines], **more)
    found = []
    for line in lines:
        deltas = [line.get(timeout=60)]
        while deltas[-1].finish_reason is None:
            deltas.append(line.get(timeout=60))
        tokens = tuple(d.token for d in deltas if d.token is not None)
        end = deltas[-1]
        found.append((tokens, "".join(d.text for d in deltas), end.finish_reason, end.error))
    return jobs, found


def alone(llm, prompt, options, choices=1):
    said = llm.generate([prompt] * choices, options)
    return [(one.tokens, one.text, one.finish_reason, None) for one in said]


# --- what is written ---------------------------------------------------------------------------

SAMPLERS = [
    Sampler(),
    Sampler(temperature=0.8),
    Sampler(temperature=1.2, top_k=7),
    Sampler(temperature=0.9, top_p=0.7, min_p=0.05),
    Sampler(repetition_penalty=1.4),
    Sampler(temperature=0.7, top_p=0.95, repetition_penalty=0.8),
]


def test_texts_are_those_of_generate_whatever_else_runs(engine, paper_llm):
    rng = np.random.default_rng(0)
    book = paper_llm.tokenize(BOOK)
    cases = []
    for number in range(16):
        prompt = [*book[: rng.choice([1, 5, 40, len(book)])], *rng.integers(3, 300, 3).tolist()]
        sampler = SAMPLERS[number % len(SAMPLERS)]
        options = Options(max_new_tokens=int(rng.integers(1, 24)), sampler=sampler, seed=number)
        cases.append((prompt, options))

    def write(case):
        return written(engine, [case[0]], case[1])[1][0]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(write, cases))
    assert together == [alone(paper_llm, *case)[0] for case in cases]
    until(lambda: quiet(engine))


def test_choices_draw_as_rows_of_a_batch_do(engine, paper_llm):
    prompt = paper_llm.tokenize("Call me")
    options = Options(max_new_tokens=8, sampler=Sampler(temperature=1.0), seed=3)
    _, found = written(engine, [prompt], options, choices=3)
    assert found == alone(paper_llm, prompt, options, choices=3)
    assert len({tokens for tokens, *_ in found}) == 3


def test_a_text_ends_where_generate_ends_it(engine, paper_llm):
    prompt = paper_llm.tokenize(BOOK[:40])
    whole = paper_llm.generate(prompt, max_new_tokens=24)[0]
    stop = whole.text[5:8]
    options = Options(max_new_tokens=24, stop=[stop])
    assert written(engine, [prompt], options)[1] == alone(paper_llm, prompt, options)
    options = Options(max_new_tokens=24, stop_ids=[whole.tokens[4]])
    ((tokens, _, reason, _),) = written(engine, [prompt], options)[1]
    assert (tokens, reason) == (whole.tokens[:5], "stop")
    ((longer, _, reason, _),) = written(engine, [prompt], options, ignore_stop_ids=True)[1]
    assert (longer, reason) == (whole.tokens, "length")


def test_a_beginning_is_read_once(engine, paper_llm):
    rng = np.random.default_rng(7)
    book = rng.integers(3, 300, 300).tolist()
    options = Options(max_new_tokens=6)
    for number, cached in enumerate([0, 256, 256]):
        prompt = [*book, 10 + number]
        (job,), found = written(engine, [prompt], options)
        assert job.cached_tokens == cached
        assert found == alone(paper_llm, prompt, options)
    # An answer is shared with the next turn, too.
    (job,), ((tokens, *_),) = written(
        engine, [book], Options(max_new_tokens=100), ignore_stop_ids=True
    )
    (later,), found = written(engine, [[*book, *tokens, 5]], options)
    assert later.cached_tokens == 384
    assert found == alone(paper_llm, [*book, *tokens, 5], options)


def test_pages_are_used_again_and_nothing_is_compiled(engine, paper_llm, compilations):
    """More texts than the cache has pages for, all different: what was kept makes room."""
    rng = np.random.default_rng(8)
    prompts = [rng.integers(3, 300, 260).tolist() for _ in range(QUEUE)] * 2
    options = Options(max_new_tokens=4)
    found = [
        written(engine, prompts[:QUEUE], options)[1],
        written(engine, prompts[QUEUE:], options)[1],
    ]
    assert compilations == []
    assert found[0] == found[1]
    assert found[0][:2] == [alone(paper_llm, one, options)[0] for one in prompts[:2]]


@pytest.fixture
def five_pages(engine):
    """The engine with room for five pages; what it had kept in others is forgotten."""
    few = engine._scheduler = Scheduler(Pages(5, PAGE), rows=ROWS, queue=QUEUE)
    yield few
    engine._scheduler = engine._new_scheduler()


def test_texts_that_are_put_back_are_those_of_generate(engine, paper_llm, five_pages):
    """Four texts of two pages each in the end, and room for five pages."""
    rng = np.random.default_rng(11)
    prompts = [rng.integers(3, 300, 90).tolist() for _ in SAMPLERS]
    begun = []

    def write(number):
        options = Options(max_new_tokens=100, sampler=SAMPLERS[number], seed=number)
        (job,), (found,) = written(engine, [prompts[number]], options, ignore_stop_ids=True)
        begun.append(job.row.begun)
        assert (job.prompt_tokens, job.cached_tokens) == (90, 0)
        return found

    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(write, range(len(prompts))))
    assert max(begun) > 1
    assert five_pages.pages.available == 5
    for number, found in enumerate(together):
        options = Options(max_new_tokens=100, sampler=SAMPLERS[number], seed=number)
        whole = alone(paper_llm, prompts[number], options)[0][0]
        assert found[0][: len(whole)] == whole


def test_what_texts_have_in_common_is_told_to_the_device(engine, paper_llm, monkeypatch):
    """As on a GPU that reads it once; here the program that reads it for each stands in for it."""
    seen = []

    def together(leaves, state, texts):
        common = texts.common
        for group, tokens in zip(common.rows, common.tokens, strict=True):
            members = group[group < len(texts.slots)]
            assert (tokens > 0) == (len(members) > 1)
            shared = texts.pages[members, : tokens // PAGE]
            assert (shared == shared[:1]).all()
            assert (texts.lengths[members] >= tokens).all()
            seen.append((len(members), tokens))
            assert (common.rows.reshape(-1)[common.place[members]] == members).all()
        return engine.programs._draw[ROWS, False](leaves, state, texts._replace(common=None))

    monkeypatch.setattr("dca_jax.serving.engine.WORTH", 1)
    monkeypatch.setattr(engine.programs, "members", 3)
    monkeypatch.setitem(engine.programs._draw, (ROWS, True), together)
    rng = np.random.default_rng(12)
    book, options = rng.integers(3, 300, 300).tolist(), Options(max_new_tokens=8)
    prompts = [[*book, n + 5] for n in range(3)] + [[7, 8, 9]]
    written(engine, [book], Options(max_new_tokens=1))
    _, found = written(engine, prompts, options, ignore_stop_ids=True)
    assert (3, 256) in seen
    for prompt, text in zip(prompts, found, strict=True):
        whole = alone(paper_llm, prompt, options)[0][0]
        assert text[0][: len(whole)] == whole


def test_numbers_that_are_not_finite_end_one_text_and_stay_in_none(engine, paper_llm, monkeypatch):
    params = paper_llm.model.params()
    table = params["embed_tokens"]["embedding"]
    leaves = [
        leaf.at[299].set(jnp.nan) if leaf is table else leaf for leaf in engine.programs._leaves
    ]
    assert sum(a is not b for a, b in zip(leaves, engine.programs._leaves, strict=True)) == 1
    good = paper_llm.tokenize(BOOK)
    options = Options(max_new_tokens=6)
    with monkeypatch.context() as patched:
        patched.setattr(engine.programs, "_leaves", leaves)
        _, found = written(engine, [good, [*good[:40], 299, 5], good, [*[9] * 140, 299]], options)
    expected = alone(paper_llm, good, options)[0]
    assert [found[0], found[2]] == [expected] * 2
    for tokens, text, reason, error in (found[1], found[3]):
        assert (tokens, text, reason) == ((), "", "error")
        assert re.search(r"logits after token \d+ are not finite", error)
    rng = np.random.default_rng(9)  # every page is used again, those that held NaN too
    prompts = [rng.integers(3, 299, 300).tolist() for _ in range(QUEUE)]
    assert all(error is None for *_, error in written(engine, prompts, options)[1])


def test_a_step_that_fails_ends_its_texts_and_not_the_server(engine, paper_llm, monkeypatch):
    prompt, options = paper_llm.tokenize(BOOK), Options(max_new_tokens=4)

    def fail(*_):
        raise RuntimeError("a kernel failed")

    with monkeypatch.context() as patched:
        patched.setattr(engine.programs, "draw", fail)
        ((_, _, reason, error),) = written(engine, [prompt], options)[1]
    assert reason == "error"
    assert "ask again" in error
    assert engine.alive
    assert written(engine, [prompt], options)[1] == alone(paper_llm, prompt, options)


# --- the protocol ------------------------------------------------------------------------------


def test_a_completion_is_that_of_generate_streamed_or_not(client, paper_llm):
    expected = paper_llm.generate(BOOK, max_new_tokens=12)[0]
    asked = {"model": "tiny", "prompt": BOOK, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    counted = (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert counted == (expected.prompt_tokens, len(expected.tokens))
    *chunks, last = client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason
    assert last.choices == []
    assert last.usage.completion_tokens == len(expected.tokens)
    cached = last.usage.prompt_tokens_details.cached_tokens
    assert cached == 128 * ((expected.prompt_tokens - 1) // 128) > 0


def test_a_conversation_is_that_of_chat(client, paper_llm):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who is Ahab?\nAnswer me."},
    ]
    parts = [{"type": "text", "text": line} for line in messages[1]["content"].split("\n")]
    asked = {"model": "tiny", "max_completion_tokens": 10, "temperature": 0.9, "seed": 11}
    options = Options(max_new_tokens=10, sampler=Sampler(temperature=0.9), seed=11)
    expected = paper_llm.chat(messages, options)
    said = client.chat.completions.create(messages=messages, **asked).choices[0]
    assert (said.message.role, said.message.content) == ("assistant", expected.text)
    assert said.finish_reason == expected.finish_reason
    streamed = client.chat.completions.create(
        messages=[messages[0], {"role": "user", "content": parts}], stream=True, **asked
    )
    first, *rest = (chunk.choices[0] for chunk in streamed)
    assert (first.delta.role, first.delta.content) == ("assistant", "")
    assert "".join(one.delta.content for one in rest) == expected.text
    assert rest[-1].finish_reason == expected.finish_reason


def test_several_prompts_and_choices_come_in_order(client, paper_llm):
    prompts = [paper_llm.tokenize("Call me"), paper_llm.tokenize("Some years ago")]
    asked = {"model": "tiny", "max_tokens": 5, "temperature": 1.0, "seed": 5, "n": 2}
    found = client.completions.create(prompt=prompts, **asked)
    options = Options(max_new_tokens=5, sampler=Sampler(temperature=1.0), seed=5)
    expected = [one for prompt in prompts for one in paper_llm.generate([prompt] * 2, options)]
    assert [choice.text for choice in found.choices] == [one.text for one in expected]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage.prompt_tokens == sum(map(len, prompts))


def test_log_probabilities_are_those_of_the_model(client, paper_llm):
    prompt = paper_llm.tokenize("Call me Ishmael")
    asked = {"model": "tiny", "max_tokens": 6, **GREEDY}
    options = Options(max_new_tokens=6)
    tokens = list(paper_llm.generate(prompt, options)[0].tokens)
    logits = paper_llm.logits([[*prompt, *tokens]])[0, len(prompt) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    told = client.completions.create(prompt=prompt, logprobs=3, **asked).choices[0]
    own = [expected[n, token] for n, token in enumerate(tokens)]
    np.testing.assert_allclose(told.logprobs.token_logprobs, own, atol=1e-4)
    for row, top in zip(expected, told.logprobs.top_logprobs, strict=True):
        assert math.isclose(max(top.values()), row.max(), abs_tol=1e-4)
    messages = [{"role": "user", "content": "Hi"}]
    chat = client.chat.completions.create(
        messages=messages, logprobs=True, top_logprobs=2, stream=True, **asked
    )
    choices = [chunk.choices[0] for chunk in chat]
    seen = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
    assert len(seen) == 6
    logits = paper_llm.logits([paper_llm.apply_chat_template(messages)])[0, -1].astype(np.float64)
    likely = np.sort(logits - np.log(np.exp(logits).sum()))[::-1][:2]
    told = [one.logprob for one in seen[0].top_logprobs]
    np.testing.assert_allclose(told, likely, atol=1e-4)
    for one in seen:  # greedy: the one drawn is the most likely
        assert one.logprob == one.top_logprobs[0].logprob < 0
        assert bytes(one.bytes).decode(errors="replace") == one.token == one.top_logprobs[0].token
        assert len(one.top_logprobs) == 2
    text = b"".join(bytes(one.bytes) for one in seen).decode(errors="replace")
    assert text == "".join(choice.delta.content for choice in choices)


def test_what_is_no_request_is_refused_with_a_sentence(client, http):
    good = {"prompt": "Call me", "max_tokens": 2}
    refused = {
        b"{": "not JSON",
        b"[" * 100_000: "parsing the body",
        b'"text"': "dictionary",
    }
    for body, said in refused.items():
        answer = http.post(
            "/v1/completions", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]
    wrong = [
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "1 to 128 prompts"),
        ({"prompt": [1, 300]}, "vocabulary"),
        ({"prompt": [1, 2.5]}, "prompt: of a kind"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": None}, "prompt: Field required"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "2"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n:"),
        ({"n": 100}, "the queue holds at most 8"),
        ({"seed": 2**40}, "seed"),
        ({"stop": ["a", ""]}, "empty"),
        ({"stop": ["\udc00"]}, "surrogate"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"chat_template": "{{ 7 * 7 }}"}, "chat_template is not supported"),
        ({"cache_salt\ud800": 1}, "no field"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"best_of": 2}, "best_of is not supported"),
        ({"suffix": "x"}, "suffix is not supported"),
        ({"echo": True}, "echo is not supported"),
        ({"min_tokens": 3}, "min_tokens is not supported"),
        ({"prompt_logprobs": 1}, "prompt_logprobs is not supported"),
        ({"skip_special_tokens": False}, "skip_special_tokens is not supported"),
        ({"max_completion_tokens": 5}, "no field 'max_completion_tokens'"),
        ({"prompt": ["a", [1]]}, "prompt: of a kind"),
        ({"stream_options": {"include_usage": True}}, "stream_options need a stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options: there is no field 'x'"),
        ({"messages": []}, "no field 'messages'"),
        ({"max_tokens": CONTEXT}, f"reads {CONTEXT}: give a prompt of at most 0 tokens"),
    ]
    for change, said in wrong:
        body = json.dumps(good | change).encode()
        answer = http.post(
            "/v1/completions", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400, change
        assert said in answer.json()["error"]["message"], change
    with pytest.raises(
        openai.BadRequestError, match=f"has {CONTEXT} tokens.*at most {CONTEXT - 1} fit"
    ):
        client.completions.create(model="tiny", prompt=[5] * CONTEXT)
    with pytest.raises(openai.NotFoundError, match="has the model tiny"):
        client.completions.create(model="gpt", prompt="Call")
    ignored = {
        "user": "me",
        "frequency_penalty": 0,
        "tools": [],
        "response_format": {"type": "text"},
        "logit_bias": {},
        "best_of": 1,
        "echo": False,
        "suffix": None,
        "min_tokens": 0,
        "skip_special_tokens": True,
        "stop_token_ids": [],
        "logprobs": 0,
        "top_k": -1,
    }
    assert http.post("/v1/completions", json=good | ignored).status_code == 200


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages"),
        ([{"role": "user"}], "must have content"),
        ([{"content": "Hi"}], "must have a role"),
        ([{"role": "robot", "content": "Hi"}], "unknown role robot"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "text only"),
        ([{"role": "user", "content": "Hi", "tool_calls": [1]}], "tool_calls"),
        ([{"role": "assistant", "content": "Hi", "reasoning_content": "?"}], "reasoning_content"),
    ],
    ids=str,
)
def test_messages_that_are_none_are_refused(client, messages, said):
    with pytest.raises(openai.BadRequestError, match=said):
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"top_logprobs": 2}, "set logprobs, too"),
        ({"logprobs": 5}, "logprobs"),
        ({"extra_body": {"chat_template_kwargs": {"thinking": True}}}, "no field 'thinking'"),
        ({"tool_choice": "required"}, "tool_choice is not supported"),
        ({"reasoning_effort": "low"}, "reasoning_effort is not supported"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
    ids=str,
)
def test_what_a_conversation_cannot_ask_for_is_refused(client, more, said):
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(openai.BadRequestError, match=said):
        client.chat.completions.create(model="tiny", messages=messages, **more)


def test_a_body_may_have_so_many_bytes(http):
    for content in (b" " * 2**21, (b" " * 2**16 for _ in range(64))):
        answer = http.post(
            "/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400
        assert f"at most {2**20 + 32 * CONTEXT}" in answer.json()["error"]["message"]


def test_a_key_is_asked_for(address):
    with httpx2.Client(base_url=address) as http:
        assert http.get("/health").status_code == 200
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
            answer = http.get("/v1/models", headers=given)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"


def test_models_tokens_and_health_are_told(client, http, paper_llm):
    (model,) = client.models.list()
    assert (model.id, model.max_model_len) == ("tiny", CONTEXT)
    assert client.models.retrieve("tiny").id == "tiny"
    told = http.post("/tokenize", json={"prompt": "Call me"}).json()
    assert told["tokens"] == paper_llm.tokenize("Call me")
    messages = [{"role": "user", "content": "Hi"}]
    told = http.post("/tokenize", json={"messages": messages}).json()
    assert told["tokens"] == paper_llm.apply_chat_template(messages)
    assert told["count"] == len(told["tokens"])
    assert http.post("/tokenize", json={}).status_code == 400
    assert http.get("/nothing").status_code == 404


def test_metrics_count(client, http):
    def told():
        families = text_string_to_metric_families(http.get("/metrics").text)
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
        }

    before = told()
    client.completions.create(model="tiny", prompt="Call me", max_tokens=5, **GREEDY)
    after = told()
    answered = ("dca_jax_requests_total", "/v1/completions", "200")
    assert after[answered] - before.get(answered, 0) == 1
    for name, more in {
        "dca_jax_generated_tokens_total": 5,
        "dca_jax_time_to_first_token_seconds_count": 1,
        "dca_jax_time_between_tokens_seconds_count": 4,
    }.items():
        assert after[name,] - before[name,] == more
    assert after["dca_jax_running",] == 0
    assert after["dca_jax_pages_kept",] + after["dca_jax_pages_free",] == PAGES


# --- those who go, and those who wait ----------------------------------------------------------


def test_whoever_goes_away_frees_the_row(client, http, engine, unhurried):
    long = {"model": "tiny", "max_tokens": 450, **GREEDY}
    messages = [{"role": "user", "content": "Hi"}]
    for ask in (
        lambda: client.completions.create(prompt="Call me", stream=True, **long),
        lambda: client.chat.completions.create(messages=messages, stream=True, **long),
    ):
        stream = ask()
        next(iter(stream))  # a chat's first piece, of its role alone, may come before it is read
        until(lambda: engine.counts()["running"] == 1)
        stream.close()
        until(lambda: quiet(engine), 10)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(prompt="Call me", **long)
    until(lambda: quiet(engine), 10)


def test_a_full_queue_says_when_to_come_again(client, engine, unhurried):
    asked = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0}
    options = Options(max_new_tokens=500)
    jobs = []
    for count, kind in ((ROWS, "running"), (QUEUE, "waiting")):
        ignore = [lambda delta: None] * count
        jobs += engine.submit([[5, 6, 7]] * count, options, ignore, ignore_stop_ids=True)
        until(lambda kind=kind, count=count: engine.counts()[kind] == count)
    with pytest.raises(openai.RateLimitError, match="queue holds at most 8") as caught:
        client.completions.create(**asked)
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    engine.cancel(jobs)
    until(lambda: quiet(engine))
    assert client.completions.create(**asked).choices


# --- what cannot be served ---------------------------------------------------------------------


def test_what_pages_do_not_serve_is_refused_by_name(paper_llm, plain_llm):
    options = {"context": 128, "rows": 2, "pages": 2}
    other = reading(plain_llm, "self-extend", 128)
    with pytest.raises(InputError, match="not by SelfExtend"):
        Engine(other, **options)
    with pytest.raises(InputError, match="float32, or in int8 or fp8, not in float16"):
        Engine(replace(paper_llm, cache_dtype=jnp.dtype(jnp.float16)), **options)
    with pytest.raises(InputError, match="257 tokens does not fit into a cache of 256"):
        Engine(paper_llm, **options | {"context": 257})


def test_pages_are_what_fits(paper_llm):
    assert choose_pages(paper_llm, context=500, rows=3) == 12
    assert choose_pages(paper_llm, context=500, rows=3, tokens=1000) == 8
    with pytest.raises(InputError, match="would have 384"):
        choose_pages(paper_llm, context=500, rows=3, tokens=300)
    with pytest.raises(InputError, match="fit beside the weights"):
        choose_pages(paper_llm, context=500, rows=3, tokens=2**50)


def test_an_address_that_is_taken_is_said_so():
    with listen("127.0.0.1", 0) as taken, pytest.raises(InputError, match="Address already in use"):
        listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8, temperature", "tensor"])
def test_other_caches_temperatures_and_meshes_serve_what_they_generate(form, folder):
    import dca_jax

    warm = dca_jax.DCAConfig.paper(64, temperature_slope=0.1)
    changes = {"cache_dtype": "int8", "dca": warm} if "int8" in form else {"mesh": "tensor=2"}
    llm = dca_jax.load(folder, **changes)
    engine = Engine(llm, context=256, rows=2, pages=8)
    engine.start()
    book = np.random.default_rng(1).integers(3, 300, 200).tolist()
    options = Options(max_new_tokens=8)
    cached = []
    for prompt in ([*book, 7], [*book, 8, 9], [*book, 8], [*book, 7]):
        (job,), found = written(engine, [prompt], options)
        assert found == alone(llm, prompt, options)
        cached.append(job.cached_tokens)
    # With a temperature a text of another length is another text.
    assert cached == ([0, 0, 128, 128] if "temperature" in form else [0, 128, 128, 128])
    engine.stop()


# --- the process -------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_signal_lets_answers_end(folder):
    options = "--port 0 --context 1k --rows 2 --cache 2k --name tiny --dtype float32".split()
    command = [sys.executable, "-m", "dca_jax", "serve", str(folder), *options]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
        cwd=Path(__file__).parents[1],
    ) as process:
        try:
            lines = iter(process.stderr.readline, "")
            address = next(filter(None, (re.search(r"http://\S+/v1", x) for x in lines)))[0]
            with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
                stream = _beginning(client, 300)
                process.send_signal(signal.SIGTERM)
                until(lambda: _refuses(client))
                *_, last = stream
            assert last.choices[0].finish_reason == "length"
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.mark.usefixtures("unhurried")
def test_a_second_signal_ends_the_process_at_once(engine, monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    listening = listen("127.0.0.1", 0)
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    server = Server(make_app(engine, "tiny"))

    def ask():
        try:
            with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
                stream = _beginning(client, 40)
                os.kill(os.getpid(), signal.SIGTERM)
                until(lambda: _refuses(client))
                os.kill(os.getpid(), signal.SIGTERM)
                until(lambda: codes)
                list(stream)  # which ends here, where nothing ended the process
        finally:
            server.should_exit = True

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        server.run(sockets=[listening])  # in the main thread, which has the signals
        asking.result()
    assert codes == [128 + signal.SIGTERM]


def _beginning(client, max_tokens):
    """A stream of an answer, whose first part has come."""
    asked = {"model": "tiny", "prompt": "Call me", "stream": True, **GREEDY}
    stream = iter(client.completions.create(max_tokens=max_tokens, **asked))
    next(stream)
    return stream


def _refuses(client):
    try:
        client.models.list()
    except openai.APIConnectionError:
        return True
    return False
