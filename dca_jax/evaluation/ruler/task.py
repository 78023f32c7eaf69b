"""`eval ruler`: RULER's samples asked and scored as RULER does, by length and method.

Prompts are those of github.com/NVIDIA/RULER's generators for the same seed, tokenizer and length
(`dca_jax.evaluation.ruler.drawing` says why): its base prompts, or with a chat template the same
as a user's message, the answer's beginning put after it. The length holds prompt, chat template and
answer; a special token that the tokenizer puts before a text comes to it, as in RULER. Answers are
greedy, and end where the model ends them.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dca_jax.errors import InputError
from dca_jax.evaluation.answers import Answer, Question, Sample, ask
from dca_jax.evaluation.forms import Form
from dca_jax.evaluation.needle import score
from dca_jax.evaluation.results import ResultLog
from dca_jax.evaluation.ruler import documents, lists, needles, variables
from dca_jax.evaluation.ruler.benchmark import ESSAY_TASKS, NEEDLE_TASKS, SEED, TASKS, WORDINGS
from dca_jax.evaluation.ruler.drawing import Drawn, Draws, Room
from dca_jax.evaluation.ruler.sources import READERS, KeyWords, Sources
from dca_jax.evaluation.texts import encode
from dca_jax.inference.llm import LLM

ROOMY = 16_384  # tokens; every task's smallest prompt has fewer

FORM = Form(
    key={"method": str, "task": TASKS, "length": int, "trial": int},
    value={"score": float, "tokens": int},
    settings={"trained_length": int, "model": str},
)


def possible_tasks(sources: Sources) -> list[str]:
    """The tasks for which all sources are available."""
    missing = set(READERS) - set(sources.questions)
    if sources.essays is None:
        missing |= set(ESSAY_TASKS)
    return [task for task in TASKS if task not in missing]


def score_of(task: str, answer: str, expected: Sequence[str]) -> float:
    """The share of the expected strings in an answer, or for documents, whether any is (0 or 1)."""
    if task not in READERS:
        return score(answer, expected)
    return max(score(answer, [one]) for one in expected)


class Stream:
    """The samples of one task and length, generated one after another on demand.

    Each depends on the earlier ones; requesting an earlier one restarts the stream.

    Args:
        make: function that returns a new iterator over the samples.
    """

    def __init__(self, make: Callable[[], Iterator[Drawn]]) -> None:
        self._make = make
        self._rest: Iterator[Drawn] = iter(())
        self._next: int | None = None  # number of the first of them

    def sample(self, number: int) -> Drawn:
        """The sample with this number, from 0 on.

        Raises:
            InputError: the length is too short for it.
        """
        if self._next is None or number < self._next:
            self._rest, self._next = self._make(), 0
        start, self._next = self._next, None  # unless it succeeds
        found = next(itertools.islice(self._rest, number - start, None))
        self._next = number + 1
        return found


def room_for(llm: LLM, task: str, length: int, *, chat: bool = False) -> Room:
    """The maximum length of a task's samples for a model's tokenizer.

    Args:
        length: tokens of prompt, chat template and answer.
        chat: whether to leave room for the model's chat template.
    """
    template = len(llm.apply_chat_template([{"role": "user", "content": ""}])) if chat else 0
    return Room(length, template, WORDINGS[task].new_tokens, lambda text: len(encode(llm, text)))


def stream(room: Room, sources: Sources, task: str, seed: int = SEED) -> Stream:
    """RULER's samples of a task.

    Args:
        room: `room_for` the task.
        seed: RULER's is 42.
    """

    def make() -> Iterator[Drawn]:
        draws, words = Draws(seed), sources.words
        if task == "vt":
            return variables.samples(room, draws)
        if task == "fwe":
            return lists.coded_words(room, draws)
        if task == "cwe":
            options = {"words": words.all, "more_words": sources.more_words}
            return lists.common_words(room, draws, **options)
        if task in READERS:
            return documents.samples(room, draws, sources.questions[task])
        keys = KeyWords(words.adjectives, words.nouns)
        options = {"words": keys, "essays": sources.essays}
        return needles.samples(NEEDLE_TASKS[task], room, draws, **options)

    return Stream(make)


def check(sources: Sources, *, tasks: Sequence[str], lengths: Sequence[int], trials: int) -> None:
    """Checks the arguments that do not depend on the model.

    Raises:
        InputError: a task is unknown or its file was not given, there is no length or trial, or
            there are fewer questions than trials.
    """
    if not tasks or not lengths or trials < 1:
        raise InputError("RULER needs a task, a length and a trial at least")
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"task {task!r} is not known; expected one of {', '.join(TASKS)}")
        if task in ESSAY_TASKS and sources.essays is None:
            raise InputError(
                f"{task} hides its needles in essays; give --haystack FILE, RULER's "
                "PaulGrahamEssays.json or any long text"
            )
        if task in READERS:
            if task not in sources.questions:
                raise InputError(f"{task} asks questions of a file; give --data {task}=FILE")
            there = len(sources.questions[task].asked)
            if trials > there:
                raise InputError(f"{task}: {trials} trials, but its file has {there} questions")


def check_room(
    llm: LLM,
    sources: Sources,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    seed: int = SEED,
    chat: bool = False,
) -> None:
    """Checks lengths by generating the first samples, which needs no weights.

    Raises:
        InputError: the model has no chat template but `chat` is set, a length is too short for a
            sample, or there are too few words for it.
    """
    for task in tasks:
        some = [min(lengths)] if min(lengths) < ROOMY else []
        if task == "cwe" and sources.more_words is None:
            some = sorted(set(lengths))  # of longer lists there may be too few words
        for length in some:
            stream(room_for(llm, task, length, chat=chat), sources, task, seed).sample(0)


def evaluate(
    llm: LLM,
    sources: Sources,
    log: ResultLog,
    *,
    tasks: Sequence[str],
    methods: Sequence[str],
    lengths: Sequence[int],
    trials: int,
    seed: int = SEED,
    chat: bool = False,
    batch: int | None = None,
    capacity: int = 0,
) -> None:
    """Asks `trials` samples of every task and length with every method, and records the answers.

    Args:
        tasks: names from `possible_tasks`.
        lengths, chat: as in `room_for`.
        seed: as in `stream`.
        batch, capacity: as in `ask`.

    If a length is too short, its samples fail one by one (`check_room` detects this beforehand).

    Raises:
        InputError: `check` or `ask` raises.
    """
    check(sources, tasks=tasks, lengths=lengths, trials=trials)
    for nth, task in enumerate(tasks, start=1):
        samples = []
        for length in lengths:
            drawn = stream(room_for(llm, task, length, chat=chat), sources, task, seed)
            for trial in range(trials):
                key = {"task": task, "length": length, "trial": trial}
                question = functools.partial(_question, llm, task, drawn, trial, chat)
                samples.append(Sample(key, length, question))
        ask(
            llm,
            samples,
            log,
            name=f"ruler: {task} ({nth} of {len(tasks)})",
            methods=methods,
            max_new_tokens=WORDINGS[task].new_tokens,
            batch=batch,
            capacity=capacity,
        )


def _question(llm: LLM, task: str, drawn: Stream, trial: int, chat: bool) -> Question:
    sample = drawn.sample(trial)
    if chat:
        message = llm.apply_chat_template([{"role": "user", "content": sample.question}])
        prompt = [*message, *encode(llm, sample.beginning)]
    else:
        prompt = llm.tokenize(sample.question + sample.beginning)

    def judge(said: Answer) -> dict[str, Any]:
        found = score_of(task, said.text, sample.expected)
        return {"score": found, "expected": sample.expected}

    return Question(prompt, judge)
