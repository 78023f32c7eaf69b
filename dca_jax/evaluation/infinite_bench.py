"""InfiniteBench's synthetic retrieval tasks: a passkey, a string of digits, a value of JSON.

Zhang et al. (arXiv 2402.13718). Questions come from its files (lines with `context`, `input` and
`answer`), read whole or cut in the middle as its scripts do, or are made here at any length, of its
sentences: then seeds are ours, and the UUIDs of kv_retrieval new (its own are of a file of "Lost in
the middle"). Prompts, numbers of new tokens and scorers are those of github.com/OpenBMB/
InfiniteBench (src/prompt.py, eval_utils.py, compute_scores.py, and the sentences of
data/construct_synthetic_dataset.py), Copyright (c) 2023 OpenBMB, under the MIT License: for base
models those it gives YaRN-Mistral, with a chat template GPT-4's. One thing differs: an answer that
stands in a list is taken out of it, which its scorer forgets in kv_retrieval.
"""

import functools
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dca_jax.errors import InputError
from dca_jax.evaluation.answers import Answer, Question, Sample, ask
from dca_jax.evaluation.benchmark_files import cut_in_the_middle, read_json_lines
from dca_jax.evaluation.forms import Form
from dca_jax.evaluation.grids import accuracy_score, accuracy_table, mean_by
from dca_jax.evaluation.haystacks import largest_fitting
from dca_jax.evaluation.intervals import in_per_cent
from dca_jax.evaluation.passkey import FILLER, first_number
from dca_jax.evaluation.results import Record, ResultLog
from dca_jax.evaluation.tables import Outcome, Table
from dca_jax.inference.llm import LLM

QUOTED = "There is an important info hidden inside a lot of irrelevant text. Find it"
QUIZ = "I will quiz you about the important information"
NOISE = " ".join(FILLER) + "\n"
MAX_LENGTH = 131_072  # tokens of prompt and answer, beyond which InfiniteBench cuts
CHAT_TOKENS = 128  # of an answer by chat, a sentence; GPT-4's had no limit
SAMPLE = 40  # lines or pairs, to see how many tokens they have
SIGNS = re.compile(r"[\n:\"'.,?!{}]")  # that the scorer of kv_retrieval takes as spaces


class Task(NamedTuple):
    """A task's prompts, with {context} and {input}, and how many new tokens a base model gets."""

    base: str
    chat: str
    new_tokens: int


TASKS = {
    "passkey": Task(
        f"{QUOTED} and memorize it. {QUIZ}.\n\n{{context}}\n\n{{input}}\n\nThe pass key is",
        f"{QUOTED} and memorize them. {QUIZ} there.\n\n{{context}}\n\n{{input}}",
        6,
    ),
    "number_string": Task(
        f"{QUOTED}. {QUIZ} there.\n\n{{context}}\n\n{{input}}\n\nThe sequence of digits is",
        f"{QUOTED}. {QUIZ} there.\n\n{{context}}\n\n{{input}}",
        12,
    ),
    "kv_retrieval": Task(
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        "{context}\n\n{input}",
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        "{context}\n\n{input}",
        50,
    ),
}
FORM = Form(
    key={"method": str, "task": tuple(TASKS), "length": int, "trial": int, "id": str},
    value={"found": bool, "tokens": int},
    settings={"trained_length": int},
    optional=frozenset({"length", "trial", "id"}),
)


def new_tokens(task: str, chat: bool) -> int:
    """How many tokens an answer may have."""
    return CHAT_TOKENS if chat else TASKS[task].new_tokens


def is_right(task: str, answer: str, expected: str) -> bool:
    """Whether the first number is the one expected; of JSON, whether any word is."""
    if task == "kv_retrieval":
        return expected in SIGNS.sub(" ", answer).split()
    return first_number(answer) == expected


# --- questions ---------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A text, the question after it, and its answer."""

    context: str
    question: str
    answer: str


def made(task: str, rng: np.random.Generator) -> Callable[[int], Asked]:
    """A question whose text has any number of units, lines or pairs; drawn for all alike."""
    depth, digits = rng.random(), [str(digit) for digit in rng.integers(0, 10, 5)]
    if task == "kv_retrieval":
        seed = int(rng.integers(2**32))
        return lambda pairs: _made_pairs(pairs, depth, seed)
    name = "pass key"
    if task == "number_string":
        name = "sequence of digits"
        for more in range(5):  # each doubles a digit
            place = int(rng.integers(0, 5 + more))
            digits.insert(place, digits[place])
    key = "".join(digits)
    said = f"The {name} is {key}. Remember it. {key} is the {name}.\n"

    def lines(count: int) -> Asked:
        before = round(depth * count)
        context = NOISE * before + said + NOISE * (count - before)
        return Asked(context, f"What is the {name}?", key)

    return lines


def _made_pairs(pairs: int, depth: float, seed: int) -> Asked:
    rng = np.random.default_rng(seed)
    some = [
        [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(2)]
        for _ in range(max(pairs, 1))
    ]
    text = ", ".join(f'"{key}": "{value}"' for key, value in some)
    key, value = some[int(depth * len(some))]
    asked = f'\nKey: "{key}"\nThe value associated with the specified key is: '
    return Asked(f"JSON data:\n{{{text}}}", asked, value)


def read_files(files: Mapping[str, Path]) -> dict[str, list[Asked]]:
    """The questions of InfiniteBench's files, by task.

    Raises:
        InputError: an unknown task or a bad file.
    """
    check_tasks(files)
    found = {}
    for task, path in files.items():
        rows = read_json_lines(path, "context", "input", "answer")
        found[task] = [Asked(row["context"], row["input"], _first(row["answer"])) for row in rows]
    return found


def _first(answer: str | list[str]) -> str:
    return answer if isinstance(answer, str) else answer[0]


def check_tasks(tasks: Sequence[str] | Mapping[str, Any]) -> None:
    """Raises InputError for a task that is not known."""
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"task {task!r} is not known; expected one of {', '.join(TASKS)}")


# --- the task ----------------------------------------------------------------------------------


def evaluate(
    llm: LLM,
    log: ResultLog,
    *,
    files: Mapping[str, Sequence[Asked]],
    tasks: Sequence[str],
    methods: Sequence[str],
    lengths: Sequence[int],
    trials: int,
    max_length: int = MAX_LENGTH,
    limit: int | None = None,
    chat: bool = False,
    batch: int | None = None,
) -> None:
    """Asks the questions of files, and made ones of each length, by every method.

    Args:
        files: questions by task.
        tasks: of the made ones.
        lengths: tokens of a made prompt and its answer at most, special ones included.
        trials: made questions of each task and length.
        max_length: tokens of a file's prompt and its answer; longer ones are cut in the middle.
        limit: only so many questions of each file.
        chat: the prompt is a user's message.

    Raises:
        InputError: an unknown task, or what `ask` refuses.
    """
    check_tasks([*files, *tasks])
    if chat:
        llm.apply_chat_template([{"role": "user", "content": "?"}])  # refuses a model without one
    for task in TASKS:
        samples = []
        for number, asked in enumerate(files.get(task, [])[:limit]):
            length = min(len(asked.context) // 4, max_length)
            question = functools.partial(_question, llm, task, asked, max_length, chat)
            samples.append(Sample({"task": task, "id": str(number)}, length, question))
        for length in lengths if task in tasks else []:
            for trial in range(trials):
                key = {"task": task, "length": length, "trial": trial}
                question = functools.partial(_made_question, llm, task, length, trial, chat)
                samples.append(Sample(key, length, question))
        ask(
            llm,
            samples,
            log,
            name=f"infinite-bench: {task}",
            methods=methods,
            max_new_tokens=new_tokens(task, chat),
            batch=batch,
        )


def _prompt(llm: LLM, task: str, asked: Asked, max_length: int | None, chat: bool) -> list[int]:
    words = TASKS[task].chat if chat else TASKS[task].base
    text = words.format(context=asked.context, input=asked.question)
    if max_length is not None:
        text = cut_in_the_middle(llm, text, max_length - new_tokens(task, chat))
    if chat:
        return llm.apply_chat_template([{"role": "user", "content": text}])
    return llm.tokenize(text)


def _question(llm: LLM, task: str, asked: Asked, max_length: int | None, chat: bool) -> Question:
    def judge(said: Answer) -> dict[str, Any]:
        return {"found": is_right(task, said.text, asked.answer), "expected": asked.answer}

    return Question(_prompt(llm, task, asked, max_length, chat), judge)


def _made_question(llm: LLM, task: str, length: int, trial: int, chat: bool) -> Question:
    asked = made(task, np.random.default_rng([list(TASKS).index(task), length, trial]))
    room = length - new_tokens(task, chat)

    def tokens(units: int) -> int:
        return len(_prompt(llm, task, asked(units), None, chat))

    guess = SAMPLE * room // tokens(SAMPLE)
    return _question(llm, task, asked(largest_fitting(tokens, room, guess)), None, chat)


def outcome(
    settings: Mapping[str, Any], records: Sequence[Record], paper_model: str | None
) -> Outcome:
    """Made questions by task, method and length; files by method and task."""
    del paper_model  # the paper has no InfiniteBench
    scores: dict[str, Any] = {}
    tables: list[Table] = []
    pictures: dict[str, Callable[[Path], None]] = {}
    for task in TASKS:
        some = [r for r in records if r.key["task"] == task and "length" in r.key]
        if some:
            part = accuracy_table(
                some,
                "found",
                title=f"InfiniteBench, made: {task}",
                trained_length=settings["trained_length"],
                depth="depth",
            )
            scores[task] = part.scores
            tables += part.tables
            pictures |= {f"{task}_{name}": draw for name, draw in part.pictures.items()}
    of_files = [record for record in records if "id" in record.key]
    if of_files:
        cells = mean_by(of_files, "found", "method", "task")
        methods = list(dict.fromkeys(method for method, _ in cells))
        tasks = [task for task in TASKS if any(task == found for _, found in cells)]
        scores["files"] = {
            method: {
                task: accuracy_score(cells[method, task])
                for task in tasks
                if (method, task) in cells
            }
            for method in methods
        }
        rows = [
            [m, *(in_per_cent(cells[m, t]) if (m, t) in cells else "" for t in tasks)]
            for m in methods
        ]
        tables.append(
            Table(
                title="InfiniteBench's files (per cent)",
                header=["method", *tasks],
                rows=rows,
                notes=["In parentheses: the 95 % interval, and the number of questions."],
            )
        )
    return Outcome(scores=scores, tables=tables, pictures=pictures)
