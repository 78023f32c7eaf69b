"""Our model for lm-evaluation-harness beside its own for transformers, on tiny checkpoints."""

import logging
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conversion_helpers import make_tiny
from tiny_llm import CHAT_TEMPLATE, make_llm, metaspace_tokenizer, save_tokenizer

from dca_jax.errors import InputError
from dca_jax.inference import score
from dca_jax.lm_eval import beginnings
from dca_jax.lm_eval.arguments import (
    check_arguments,
    check_device,
    read_generation_kwargs,
    take_mesh,
    truth,
)

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra `eval`)")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

PAIRS = [
    ("Call me", " Ishmael"),
    ("Call me ", "Ishmael"),  # the space belongs to the continuation
    ("", "Some years ago"),
    ("<s>Some years", " ago"),  # no second BOS
    ("Some years ago, never mind how long precisely", ","),
    ("never mind", " how long"),
]
CHAT = [
    {"role": "user", "content": "Call me"},
    {"role": "assistant", "content": "Ishmael"},
    {"role": "user", "content": "Some years ago"},
]


@pytest.fixture(scope="module", params=["byte-level", "metaspace"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """(ours, theirs, their folder), of one checkpoint."""
    from lm_eval.models.huggingface import HFLM

    from dca_jax.lm_eval import DcaJaxLM

    folder = make_llm(tmp_path_factory.mktemp("lm"), chat=True)
    if request.param == "metaspace":
        folder, tokenizer = tmp_path_factory.mktemp("lm"), metaspace_tokenizer()
        make_tiny(folder, dtype=np.dtype(np.float32), vocab_size=tokenizer.get_vocab_size())
        save_tokenizer(folder, tokenizer, chat_template=CHAT_TEMPLATE)
    # Its cache of logits (0.4.13) confuses requests that split one text in two ways, as PAIRS does.
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=1, logits_cache=False)
    return DcaJaxLM(str(folder), method="rope", dtype="float32", batch_size=2), theirs, folder


@pytest.fixture(autouse=True)
def quiet() -> Any:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def instances(kind: str, arguments: list[tuple]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def loglikelihoods(model: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)


def answers(model: Any, contexts: list[str], **kwargs: Any) -> list[str]:
    requests = instances("generate_until", [(context, kwargs) for context in contexts])
    return model.generate_until(requests, disable_tqdm=True)


def agree(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    assert [value for value, _ in ours] == pytest.approx([v for v, _ in theirs], abs=2e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


@pytest.mark.parametrize("batch", [1, 4, None])
def test_loglikelihood(pair: tuple, monkeypatch: pytest.MonkeyPatch, batch: int | None) -> None:
    ours, theirs, _ = pair
    monkeypatch.setattr(ours, "batch_size", batch)
    agree(loglikelihoods(ours, PAIRS), loglikelihoods(theirs, PAIRS))


DOCUMENT = "Some years ago, never mind how long precisely, I thought I would sail. " * 4
QUESTIONS = ["Who sails?", "How long ago was it, and why?", "What is precise?"]


def test_a_context_of_several_choices_is_read_once(
    pair: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QuALITY's form: two documents, questions about each, choices of each question."""
    ours, theirs, _ = pair
    spm = "▁I" in ours.tokenizer.get_vocab()
    monkeypatch.setattr(ours, "batch_size", 1 if spm else 2)
    monkeypatch.setattr(theirs, "_max_length", 4096)  # or it would cut
    monkeypatch.setattr(beginnings, "LONG", 100)
    documents = (DOCUMENT, f"Never mind. {DOCUMENT}")
    choices = [" Ishmael", " I thought I would sail", "\n", " a", " a little money"]
    pairs = [
        (f"{document}\nQuestion: {question}\nAnswer:", choice)
        for document in documents
        for question in QUESTIONS
        for choice in choices
    ]
    random.Random(0).shuffle(pairs)
    read = []
    once = score.Reader._append
    monkeypatch.setattr(
        score.Reader,
        "_append",
        lambda self, cache, inputs, *rest: (
            read.append(sum(map(len, inputs))) or once(self, cache, inputs, *rest)
        ),
    )
    agree(loglikelihoods(ours, pairs), loglikelihoods(theirs, pairs))
    once_each = sum(len(ours.tok_encode(document)) for document in documents)
    assert sum(read) < once_each + 45 * len(pairs)  # and not 15 times each


def test_families_begin_alike() -> None:
    """Of texts with all sorts of common beginnings; each is in one group, and shares no more."""
    rng = np.random.default_rng(0)
    stems = [rng.integers(0, 9, n).astype(np.int32) for n in (3, 70, 200, 2500, 3000)]
    stems += [np.concatenate([stems[3][:2400], stem]) for stem in stems[:3]]
    texts, contexts = [], []
    for number in rng.permutation(np.resize(np.arange(len(stems)), 64)):
        middle, end = (rng.integers(0, 9, n).astype(np.int32) for n in rng.integers(1, 5, 2))
        texts.append(np.concatenate([stems[number], middle, end]))
        contexts.append(len(stems[number]) + len(middle))
    groups = beginnings.families(texts, contexts)
    assert sorted(n for group in groups for n in group.members) == list(range(64))
    for shared, members in groups:
        assert all(shared < contexts[n] for n in members)
        assert len({texts[n][:shared].tobytes() for n in members}) == 1
        assert len(members) > 1 or not shared
    # Of the two long stems, and of the short one of 200, everything is shared.
    assert sum(shared > 2300 for shared, _ in groups) == 2
    assert sum(2300 > shared > 150 for shared, _ in groups) == 1
    total = sum(map(len, texts))
    read = sum(g.shared + sum(len(texts[n]) - g.shared for n in g.members) for g in groups)
    assert read < total / 5
    alone = beginnings.families(texts, contexts, share=False)
    assert [group.shared for group in alone] == [0] * 64


def test_too_long_requests_are_cut_as_theirs_or_refused_before_work(
    pair: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, _ = pair
    monkeypatch.setattr(theirs, "_max_length", 24)
    monkeypatch.setattr(ours, "max_length", 24)
    pairs = [("Some years ago, " * 8, "never"), ("Call", " me")]
    with pytest.raises(InputError, match=r"max_length is 24.* or overlong=left to cut"):
        loglikelihoods(ours, pairs)
    with pytest.raises(InputError, match=r"a request needs .* tokens, and max_length is 24"):
        answers(ours, [pairs[1][0], pairs[0][0]], until=[], max_gen_toks=5)
    monkeypatch.setattr(ours, "cuts", True)
    agree(loglikelihoods(ours, pairs), loglikelihoods(theirs, pairs))
    kwargs = {"until": [], "do_sample": False, "max_gen_toks": 5}
    contexts = [context for context, _ in pairs]
    assert answers(ours, contexts, **kwargs) == answers(theirs, contexts, **kwargs)
    # A text of one token more than max_length can be read: its last is only predicted.
    monkeypatch.setattr(ours, "cuts", False)
    ids = ours.tok_encode("Some years ago, never mind how long precisely, " * 3)[:25]
    assert len(ids) == 25
    exact = [(("x", "y"), ids[:20], ids[20:])]
    agree(ours._loglikelihood_tokens(exact, disable_tqdm=True), theirs._loglikelihood_tokens(exact))
    monkeypatch.setattr(ours, "cuts", True)
    with pytest.raises(InputError, match="max_length is 24"):  # nothing of it would be left
        answers(ours, ["Call"], until=[], max_gen_toks=24)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"until": []},
        {"until": "e"},
        {"until": ["</s>", " th", "a"]},
        {"until": ["<s>", "<|user|>"]},
        {"until": ["\n\n"], "repetition_penalty": 1.7},
        {"until": [], "num_beams": 1, "temperature": 0.0},
    ],
    ids=str,
)
def test_generation(pair: tuple, kwargs: dict[str, Any]) -> None:
    ours, theirs, _ = pair
    contexts = ["Call me", "Some years ago, never", "how long precisely, I "]
    wanted = {"do_sample": False, "max_gen_toks": 8, **kwargs}
    assert answers(ours, contexts, **wanted) == answers(theirs, contexts, **wanted)


def test_what_an_answer_begins_after(pair: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, _ = pair
    (text,) = answers(theirs, ["Call me"], until=[], do_sample=False, max_gen_toks=12)
    ids = theirs.tok_encode("Call me")
    mark = ours.llm.generate([ids], max_new_tokens=12)[0].tokens[4]
    for think in (int(mark), text[3]):
        for model in (ours, theirs):
            monkeypatch.setattr(model, "think_end_token", think)
        found, expected = (
            answers(model, ["Call me"], until=[], do_sample=False, max_gen_toks=12)
            for model in (ours, theirs)
        )
        assert found == expected != [text]


def test_chat_templates(pair: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, _ = pair
    for history in (CHAT, CHAT[:1]):
        text = theirs.apply_chat_template(history)
        assert ours.apply_chat_template(history) == text
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    begun = CHAT[:2]
    assert ours.apply_chat_template(begun, add_generation_prompt=False) == (
        theirs.apply_chat_template(begun, add_generation_prompt=False)
    )
    # A template without system messages: both leave it out.
    template = theirs.tokenizer.chat_template.replace("'system', ", "")
    for model in (ours, theirs):
        monkeypatch.setattr(model.tokenizer, "chat_template", template)
    system = [{"role": "system", "content": "Be brief"}, *CHAT]
    assert ours.apply_chat_template(system) == theirs.apply_chat_template(system)
    with pytest.raises(InputError, match="refuses"):
        ours.apply_chat_template([{"role": "tool", "content": "x"}])
    # What the user gives to the template.
    for model, name in ((ours, "_template_args"), (theirs, "chat_template_args")):
        monkeypatch.setattr(model.tokenizer, "chat_template", "{{ enable_thinking }}{{ level }}")
        monkeypatch.setattr(model, name, {"enable_thinking": False, "level": 3})
    assert ours.apply_chat_template(CHAT) == theirs.apply_chat_template(CHAT) == "False3"


def test_bos_as_asked(pair: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, _ = pair
    for wanted in (True, False, None):
        monkeypatch.setattr(ours, "_add_bos", wanted)
        monkeypatch.setattr(theirs, "add_bos_token", wanted)
        for text in ("Call me", "<s>Call me", ""):
            assert ours.tok_encode(text) == theirs.tok_encode(text), (wanted, text)
            plain = ours.tok_encode(text, add_special_tokens=False)
            assert plain == theirs.tok_encode(text, add_special_tokens=False)
    assert ours.tok_encode("Call me", left_truncate_len=1) == (
        theirs.tok_encode("Call me", left_truncate_len=1)
    )
    assert ours.prefix_token_id == theirs.prefix_token_id


def test_repeats_of_a_draw_differ_and_a_run_is_repeated_by_its_seed(pair: tuple) -> None:
    ours, _, _ = pair
    kwargs = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    for batch in (1, 2):
        ours.batch_size = batch
        drawn = answers(ours, ["Call me"] * 6, **kwargs)
        assert len(set(drawn)) == 6
        assert answers(ours, ["Call me"] * 6, **kwargs) == drawn
    ours.seed = 100
    assert not set(answers(ours, ["Call me"] * 6, **kwargs)) & set(drawn)
    ours.seed = 0


def test_continuations_that_merge_or_are_empty(pair: tuple) -> None:
    """A continuation that is part of the context's last token is scored from that token on."""
    ours, _, _ = pair
    words = ["Call me", "Call years"]
    merged = next(
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if len(ours.tok_encode(word)) <= len(ours.tok_encode(word[:cut]))
        and ours.tok_encode(word)[:1] == ours.tok_encode(word[:cut])[:1]
    )
    (found, _), *_ = loglikelihoods(ours, [merged])
    context, continuation = ours._encode_pair(*merged)
    whole = ours.tok_encode("".join(merged))
    assert [*context, *continuation] == whole
    assert continuation
    assert context == ours.tok_encode(merged[0])[: len(context)]
    scored = ours._loglikelihood_tokens([(merged, context, continuation)], disable_tqdm=True)
    assert found == scored[0][0] < -0.01
    for empty in (("Call me", ""), ("", "")):
        with pytest.raises(InputError, match="an empty continuation"):
            loglikelihoods(ours, [("Call me", " Ishmael"), empty])


def test_batches_have_few_sizes(pair: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _, _ = pair
    monkeypatch.setattr(ours, "batch_size", None)
    sizes = {ours._batch_of(length) for length in range(1, 40_000)}
    assert sizes == {1, 2, 4, 8, 16, 32, 64}
    monkeypatch.setattr(ours, "_most_rows", 6)
    assert ours._batch_of(10) == 4


def test_a_cache_belongs_to_one_model_and_method(
    pair: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.model import CacheHook, CachingLM

    ours, theirs, _ = pair
    monkeypatch.setattr(ours, "cache_hook", ours.cache_hook)
    cached = CachingLM(ours, str(tmp_path / "a.db"))
    cached.dbdict["an answer"] = 1
    CachingLM(ours, str(tmp_path / "a.db"))
    CachingLM(theirs, str(tmp_path / "b.db")).dbdict["an answer"] = 1
    theirs.set_cache_hook(CacheHook(None))
    with pytest.raises(
        InputError, match=r"another model.*\(different: model, dtype, method, max_length"
    ):
        CachingLM(ours, str(tmp_path / "b.db"))
    monkeypatch.setattr(ours, "method", "dca")
    with pytest.raises(InputError, match=r"in another way \(different: method\); give another"):
        CachingLM(ours, str(tmp_path / "a.db"))


def test_arguments(pair: tuple, caplog: pytest.LogCaptureFixture) -> None:
    from dca_jax.lm_eval import DcaJaxLM

    _, _, folder = pair
    here = jax.default_backend()
    for given, message in (
        ({"trust_remote_code": True}, "code from a checkpoint is never run"),
        ({"delta": "x"}, "delta=x is not supported: add"),
        ({"peft": "/nowhere"}, "/nowhere is not a folder"),
        ({"parallelize": "True"}, "mesh=tensor=4"),
        ({"revision": "v2"}, "give its folder"),
        ({"max_lenght": 5}, "did you mean max_length"),
        ({"overlong": "right"}, "overlong must be error or left"),
        ({"truncation": "maybe"}, "truncation must be True or False"),
        ({"batch_size": "automatic"}, "batch_size must be a positive number"),
        ({"batch_size": 0}, "batch_size must be a positive number"),
        ({"device": "tpu:0"}, f"device=tpu:0 was asked for, and JAX computes on {here}"),
        ({"device": "mps"}, "set JAX_PLATFORMS before the program starts"),
        ({"device": f"{here}:1"}, "a model takes the first device"),
    ):
        with pytest.raises(InputError, match=message):
            DcaJaxLM(str(folder), **given)
    for device in (None, here, f"{here}:0"):
        check_device(device)
    with caplog.at_level("WARNING"):
        check_device("cuda:0")  # what lm-eval passes where nobody asked
    assert (here == "gpu") or f"lm-eval's default; JAX computes on {here}" in caplog.text
    off = {"trust_remote_code": False, "delta": None, "revision": "main", "parallelize": "False"}
    check_arguments(off, ["method"])
    others = {"tensor": 4, "data": "2"}
    assert take_mesh("context=2", others) == "context=2,data=2,tensor=4"
    assert others == {}
    assert [truth("x", v) for v in ("True", False, None)] == [True, False, None]


def test_generation_options() -> None:
    base = {"until": [], "max_gen_toks": 5}

    def read(checkpoint: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        return read_generation_kwargs(base | kwargs, checkpoint).sampler

    assert read(do_sample=False, temperature=0.0).is_greedy
    assert read(do_sample=True, temperature=0.0).is_greedy
    assert read(do_sample="false", temperature=0.5).is_greedy
    with pytest.raises(InputError, match="do_sample must be True or False, got 'perhaps'"):
        read(do_sample="perhaps", temperature=0.5)
    assert read({"repetition_penalty": 1.1}).repetition_penalty == 1.1  # as transformers does
    assert read({"top_k": 20}, do_sample=True, temperature=0.5).top_k == 20
    assert read(do_sample=True, temperature=0.5).top_k == 50
    assert read(do_sample=True, temperature=0.5, top_k=0).top_k is None
    assert read({"top_p": 0.8}, do_sample=True, temperature=0.5, top_p=0.9).top_p == 0.9
    assert read({"temperature": 0.6}, do_sample=True).temperature == 0.6
    for given, message in (
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"repetition_penality": 1.5}, "did you mean repetition_penalty"),
        ({"typical_p": 0.9}, "typical_p=0.9 is not supported"),
        ({"until": [3]}, "until must hold strings"),
    ):
        with pytest.raises(InputError, match=message):
            read(**given)
