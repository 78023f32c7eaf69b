"""Answers prompts greedily, scores the answers and logs each of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from dca_jax.evaluation.results import ResultLog, in_batches
from dca_jax.inference import tokenizer
from dca_jax.inference.buckets import new_cache
from dca_jax.inference.generate import check_prompts, generate
from dca_jax.inference.llm import LLM
from dca_jax.inference.methods import method_by_name, reading
from dca_jax.inference.prefix import common_beginning, depends_on_length
from dca_jax.inference.progress import progress, reading_work

TOGETHER = 32_768  # default number of prompt tokens per batch, with at most 8 prompts


class Answer(NamedTuple):
    """A model's answer: its new tokens, including a stop id, and their text without it."""

    tokens: list[int]
    text: str


class Question(NamedTuple):
    """A prompt's ids, and the function that scores its answer."""

    prompt: list[int]
    judge: Callable[[Answer], dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """One sample of a task.

    Attributes:
        key: its unique key, to which the method is added.
        length: approximate number of tokens of its prompt.
        question: function that builds the prompt when it is needed, because prompts are long.
    """

    key: dict[str, Any]
    length: int
    question: Callable[[], Question]


def answer(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_tokens: Callable[[int], None] | None = None,
    *,
    capacity: int = 0,
) -> list[Answer]:
    """The model's greedy answer to each prompt; the prompts are processed together.

    Args:
        on_tokens: function called with the number of prompt tokens read since the last call.
        capacity: minimum capacity of the KV cache in tokens; with the same value, calls share
            compiled programs.
    """
    check_prompts(prompts, llm.model.config.vocab_size)
    longest = max(max(map(len, prompts)) + max_new_tokens, capacity)
    answers = generate(
        llm.model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=llm.stop_ids,
        cache=new_cache(llm.model, len(prompts), longest, llm.cache_dtype),
        on_piece=on_tokens,
    )
    return [Answer(ids, decode(llm, ids)) for ids in answers]


def answer_about(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_tokens: Callable[[int], None] | None = None,
    *,
    capacity: int = 0,
) -> list[Answer]:
    """`answer`, reading a document that the prompts begin with only once.

    This is not done for methods that depend on the length of a prompt (dynamic NTK, a temperature).
    """
    shared = _shared_tokens(prompts)
    alone = len(prompts) == 1 or depends_on_length(llm.model)
    if alone or 2 * shared < max(map(len, prompts)):
        return answer(llm, prompts, max_new_tokens, on_tokens, capacity=capacity)
    prefix = llm.prefill(prompts[0][:shared], room=max_new_tokens, progress=False)
    said = llm.generate(
        [prompt[shared:] for prompt in prompts],
        prefix=prefix,
        max_new_tokens=max_new_tokens,
        progress=False,
    )
    if on_tokens is not None:
        on_tokens(sum(map(len, prompts)))
    return [Answer(list(one.tokens), decode(llm, one.tokens)) for one in said]


def _shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all prompts begin with, excluding at least the last of each."""
    common = min(common_beginning(prompts[0], prompt) for prompt in prompts)
    return min(common, min(map(len, prompts)) - 1)


def decode(llm: LLM, ids: Sequence[int]) -> str:
    """The text of only the new tokens, without special ones."""
    return tokenizer.decode(llm.tokenizer, ids)


def ask(
    llm: LLM,
    samples: Sequence[Sample],
    log: ResultLog,
    *,
    name: str,
    methods: Sequence[str],
    max_new_tokens: int,
    batch: int | None = None,
    capacity: int = 0,
) -> None:
    """Asks every sample with every method, unless it is in the log, and logs the scores.

    A record's value is the result of the question's scoring function, with the answer's text and
    the actual number of prompt tokens.

    Methods that depend on the length (ntk, string ...) use that of prompt and answer, rounded up to
    whole trained lengths, so that few settings are compiled.

    Args:
        llm: the model with its own RoPE, as loaded.
        name: name for the progress bar.
        batch: number of prompts processed together (default: fewer for longer ones).
        capacity: minimum capacity of the KV cache in tokens; with the same value for several
            lengths, they share compiled programs.

    Raises:
        InputError: a method that is unknown or does not work with this model, before anything is
            read.
    """
    config = llm.model.config
    for method in methods:
        longest = max((sample.length for sample in samples), default=1)
        method_by_name(method, config, longest)
    work = {length: reading_work(config, length) for length in {s.length for s in samples}}
    missing = {m: [s for s in samples if {"method": m, **s.key} not in log] for m in methods}
    total = sum(work[sample.length] for some in missing.values() for sample in some)
    with progress(name, total) as advance:
        for method, some in missing.items():

            def run(few: Sequence[Sample], method: str = method) -> None:
                length = few[0].length  # the same for all of them

                def on_tokens(read: int) -> None:
                    advance(work[length] * read / length)

                _ask_together(llm, method, few, log, max_new_tokens, on_tokens, capacity)

            def fail(sample: Sample, error: Exception, method: str = method) -> None:
                log.fail({"method": method, **sample.key}, error, 0.0)

            for length, group in groupby(some, lambda sample: sample.length):
                in_batches(list(group), batch or max(1, min(8, TOGETHER // length)), run, fail)


def _ask_together(
    llm: LLM,
    method: str,
    samples: Sequence[Sample],
    log: ResultLog,
    max_new_tokens: int,
    on_tokens: Callable[[int], None],
    capacity: int,
) -> None:
    """Asks some samples in one batch, and logs each."""
    begin = time.perf_counter()
    questions = [sample.question() for sample in samples]
    length = max(len(question.prompt) for question in questions) + max_new_tokens
    prompts = [question.prompt for question in questions]
    model = reading(llm, method, length)
    answers = answer_about(model, prompts, max_new_tokens, on_tokens, capacity=capacity)
    seconds = (time.perf_counter() - begin) / len(samples)
    for sample, question, said in zip(samples, questions, answers, strict=True):
        value = question.judge(said) | {"answer": said.text, "tokens": len(question.prompt)}
        log.add({"method": method, **sample.key}, value, seconds)
