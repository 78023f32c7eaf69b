"""Few-shot questions about long documents, for base models (Table 3).

As in ChunkLlama's `few-shot/test_few_shot.py`, a prompt has the document, examples and the
question, each after an empty line, in the form "Question: ... \\nAnswer:...". The document is
truncated on the left to 200 tokens less than the room for it. (So long examples can make a prompt
longer than the limit, as there. Its "16k" is 16,000 tokens of prompt and answer; the paper says
16,384.) Anything that a model writes after its answer, starting with another "Question:", is cut
off. Scores are those of SCROLLS (`dca_jax.evaluation.scrolls`).

A file has ChunkLlama's format, whose lines include their examples (`query`, `output`,
`query_examples`, `output_examples`, `id`), or L-Eval's, whose lines are documents with
`instructions` and `outputs`; then examples are drawn from the other documents. With a pool, such as
the task's training set, they are chosen from it at random or by BM25
(`dca_jax.evaluation.examples`, Table 5). L-Eval's questions are a selection, so scores on them are
not comparable with the paper's tables. In ChunkLlama's files, lines with the same id are one
question with several answers; its script asks all of them and keeps the answer to the last, so only
the last is asked here.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dca_jax.errors import InputError
from dca_jax.evaluation import paper, scrolls
from dca_jax.evaluation.answers import Answer, Question, Sample, ask
from dca_jax.evaluation.benchmark_files import Document, cached_cut, read_json_lines
from dca_jax.evaluation.examples import Choice, Pool, read_pool
from dca_jax.evaluation.forms import Form
from dca_jax.evaluation.results import Record, ResultLog
from dca_jax.evaluation.tables import Outcome, task_table
from dca_jax.inference.llm import LLM

MARGIN = 200  # tokens that ChunkLlama leaves for examples and question
MAX_LENGTH = 16_000  # tokens of prompt and answer


class Task(NamedTuple):
    """A task of Table 3: number of examples, number of new tokens, and measure."""

    shots: int
    new_tokens: int
    measure: str


TASKS = {
    "narrativeqa": Task(0, 64, "f1"),
    "qasper": Task(2, 64, "f1"),
    "quality": Task(2, 64, "exact_match"),
    "qmsum": Task(1, 128, "rouge"),
}


FORM = Form(
    key={"method": str, "task": tuple(TASKS), "id": str},
    value=lambda key: dict.fromkeys(scrolls.names_of(TASKS[key["task"]].measure), float),
)


class Item(NamedTuple):
    """A question about a document, its examples, and all right answers.

    `chosen` identifies the examples, if they did not come with the question.
    """

    id: str
    document: str
    question: str
    examples: list[tuple[str, str]]
    references: list[str]
    chosen: list[str] | None = None


def read_items(path: Path, task: str, *, pooled: bool = False) -> list[Item]:
    """The questions in a file, in order.

    Args:
        path: the file.
        task: one of `TASKS`.
        pooled: whether a pool will give the examples, so that other documents need not.

    Raises:
        InputError: a file in neither ChunkLlama's nor L-Eval's format.
    """
    rows = read_json_lines(path, "input")
    if all("instructions" in row and "outputs" in row for row in rows):
        rows = read_json_lines(path, "input", "instructions", "outputs")
        return _l_eval_items(rows, 0 if pooled else TASKS[task].shots)
    items: dict[str, Item] = {}
    names = ("query", "output", "query_examples", "output_examples", "id")
    for row in read_json_lines(path, "input", *names):
        examples = list(zip(row["query_examples"], row["output_examples"], strict=True))
        item = Item(str(row["id"]), row["input"], row["query"], examples, [])
        before = items[item.id].references if item.id in items else []
        item.references.extend([*before, row["output"]])
        items[item.id] = item
    return list(items.values())


def _l_eval_items(rows: Sequence[Mapping[str, Any]], shots: int) -> list[Item]:
    items = []
    for n, row in enumerate(rows):
        others = [
            (f"{m}-{k}", pair)
            for m, other in enumerate(rows)
            if m != n
            for k, pair in enumerate(zip(other["instructions"], other["outputs"], strict=True))
        ]
        if len(others) < shots:
            raise InputError(
                f"examples are drawn from the other documents, which have {len(others)} of the "
                f"{shots} that are needed: give more documents, or --pool"
            )
        for q, pair in enumerate(zip(row["instructions"], row["outputs"], strict=True)):
            drawn = np.random.default_rng([n, q]).choice(len(others), shots, replace=False)
            chosen, examples = zip(*(others[i] for i in drawn), strict=True) if shots else ((), ())
            item = Item(f"{n}-{q}", row["input"], pair[0], list(examples), [pair[1]])
            items.append(item._replace(chosen=list(chosen)))
    return items


def read_files(
    files: Mapping[str, Path],
    max_length: int = MAX_LENGTH,
    *,
    pools: Mapping[str, Path] | None = None,
    choice: Choice = Choice.random,
) -> dict[str, list[Item]]:
    """The questions of each task, from its file.

    Args:
        pools: files to choose the examples from, for some tasks.
        choice: how to choose them.

    Raises:
        InputError: an unknown task; an invalid file, or one without questions; a pool with too few
            examples, or for a task without examples; or a length without room for a document.
    """
    pools = pools or {}
    for task in files:
        if task not in TASKS:
            raise InputError(f"task {task!r} is not known; expected one of {', '.join(TASKS)}")
        if max_length - TASKS[task].new_tokens <= MARGIN:
            raise InputError(f"--max-length must be more than {MARGIN + TASKS[task].new_tokens}")
    for task in pools:
        if task not in files or not TASKS[task].shots:
            with_examples = ", ".join(t for t in files if TASKS[t].shots) or "none of those asked"
            raise InputError(f"--pool {task}: a pool is for a task with examples: {with_examples}")
    items = {task: read_items(path, task, pooled=task in pools) for task, path in files.items()}
    for task, some in items.items():
        if not some:
            raise InputError(f"{files[task]} has no question")
    for task, path in pools.items():
        pool = Pool(read_pool(path), choice)
        items[task] = [
            _with_examples(item, pool, TASKS[task].shots, seed)
            for seed, item in enumerate(items[task])
        ]
    return items


def _with_examples(item: Item, pool: Pool, shots: int, seed: int) -> Item:
    chosen = pool.choose(item.question, item.references, shots, seed)
    return item._replace(
        examples=[(one.query, one.output) for one in chosen], chosen=[one.id for one in chosen]
    )


def prompt_text(item: Item, document: str) -> str:
    """The prompt, with the truncated document."""
    shots = "".join(f"\n\nQuestion: {q} \nAnswer:{a}" for q, a in item.examples)
    return f"{document}{shots}\n\nQuestion: {item.question} \nAnswer:"


def first_answer(text: str) -> str:
    """The first part before another "Question:" that has more than one character."""
    parts = text.split("Question:")
    return next((part for part in parts if len(part.replace("\n", "")) > 1), text)


def evaluate(
    llm: LLM,
    log: ResultLog,
    *,
    files: Mapping[str, Path],
    methods: Sequence[str],
    max_length: int = MAX_LENGTH,
    pools: Mapping[str, Path] | None = None,
    choice: Choice = Choice.random,
    limit: int | None = None,
    batch: int | None = None,
) -> None:
    """Asks the questions of some tasks, and logs answers and scores.

    Args:
        files: the file of each task, by its name in `TASKS`.
        pools, choice: as in `read_files`.
        max_length: approximate number of tokens of prompt and answer.
        limit: maximum number of questions per task.

    Raises:
        InputError: an unknown task, an invalid file, or no room for a document; also as in `ask`.
    """
    found = read_files(files, max_length, pools=pools, choice=choice)
    items = {task: some[:limit] for task, some in found.items()}
    for nth, (task, some) in enumerate(items.items(), start=1):
        room = max_length - TASKS[task].new_tokens
        if TASKS[task].measure == "rouge":
            scrolls.rouge("a", ["a"])  # refuses now if it is not installed
        cuts: dict[str, Callable[[], str]] = {}
        samples = []
        for item in some:
            if item.document not in cuts:
                document = Document(item.document, room - MARGIN, room, "left")
                cuts[item.document] = cached_cut(document, lambda text: len(llm.tokenize(text)))
            question = functools.partial(_question, llm, task, item, cuts[item.document])
            length = min(len(item.document) // 4 + MARGIN, max_length)
            samples.append(Sample({"task": task, "id": item.id}, length, question))
        ask(
            llm,
            samples,
            log,
            name=f"few-shot: {task} ({nth} of {len(items)})",
            methods=methods,
            max_new_tokens=TASKS[task].new_tokens,
            batch=batch,
        )


def _question(llm: LLM, task: str, item: Item, document: Callable[[], str]) -> Question:
    measure = scrolls.MEASURES[TASKS[task].measure]

    def judge(said: Answer) -> dict[str, Any]:
        given = first_answer(said.text)
        noted = {} if item.chosen is None else {"examples": item.chosen}
        scores = measure(given, item.references)
        return {"given": given, "references": item.references, **noted, **scores}

    return Question(llm.tokenize(prompt_text(item, document())), judge)


def outcome(
    settings: Mapping[str, Any], records: Sequence[Record], paper_model: str | None
) -> Outcome:
    """Scores by task and method, in per cent, and their average, next to the paper's.

    The paper's are from Table 3 or, if examples were chosen from a pool, from Table 5.
    """
    choice = settings.get("examples")
    values: dict[str, dict[str, list[Any]]] = {}
    for record in records:
        methods = values.setdefault(record.key["method"], {})
        methods.setdefault(record.key["task"], []).append(record.value)
    scores = {
        method: {task: scrolls.score(TASKS[task].measure, some) for task, some in row.items()}
        for method, row in values.items()
    }
    published = paper.FEW_SHOT if choice is None else paper.IN_CONTEXT.get(choice, {})
    theirs = {method: paper.row(published, paper_model, method) for method in scores}
    counts = {m: {task: len(some) for task, some in row.items()} for m, row in values.items()}
    title = "Few-shot scores" + (f", examples: {choice}" if choice else "")
    table = task_table(title, list(TASKS), scores, theirs, counts)
    return Outcome(scores=scores, tables=[table] if scores else [])
