"""L-Eval's closed-ended tasks (An et al., arXiv 2307.11088), for chat models (Table 4).

TOEFL (tpo), QuALITY, Coursera and SFiction (sci_fi), with L-Eval's data files and scorers and the
Llama 2 prompts of ChunkLlama's zero-shot script (L-Eval's own differ in a few words). The document
is truncated on the right to 200 tokens less than fit; decoding is greedy, with at most 512 new
tokens. There are two questions about each statement in SFiction: whether it is true in the document
(loyalty), and, without the document, in the world (fact). The score is the mean of both.

The scorers are those of `Evaluation/auto_eval.py` and `em.py`, with one difference: an empty answer
scores 0. The original gave 0.25, because an empty set of letters is a subset of any (until July
2024, when answers of white space became "None"). The following is kept, because published figures
depend on it:

- an answer that names no letter counts as the guess A;
- in TOEFL and QuALITY the first capital A to D anywhere in an answer is the choice, but an answer
  that is a substring of "ABCD", such as CD, is taken as a whole, and so is wrong;
- in Coursera, some of the right letters without a wrong one score 0.25.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dca_jax.errors import InputError
from dca_jax.evaluation import paper
from dca_jax.evaluation.answers import Answer, Question, Sample, ask
from dca_jax.evaluation.benchmark_files import Document, cached_cut, check_text, read_json_lines
from dca_jax.evaluation.forms import FILLED, Form
from dca_jax.evaluation.results import Record, ResultLog
from dca_jax.evaluation.scrolls import normalized
from dca_jax.evaluation.tables import Outcome, task_table
from dca_jax.inference.llm import LLM

TASKS = ("tpo", "quality", "coursera", "sci_fi")
NEW_TOKENS, MARGIN, MAX_LENGTH = 512, 200, 16_000
FORM = Form(
    key={"method": str, "task": TASKS, "id": str, "part": ("document", "world")},
    value={"answer": str, "reference": FILLED},
)

LONG = (
    "Now you are given a very long document. Please follow the instruction based on this document. "
)
ONE_OPTION = (
    LONG + "For multi-choice questions, there is only a sinlge correct option. Please only provide "
    "the letter corresponding to the answer (like A or B) when answering. For other questions, "
    "please directly give the concise and accurate answer. "
)
SYSTEM = {
    "tpo": ONE_OPTION,
    "quality": ONE_OPTION,
    "coursera": LONG + "For multi-choice questions, there could be a sinlge correct option or "
    "multiple correct options. Please only provide the letter corresponding to the answer (like A "
    "or AB) when answering. ",
    "sci_fi": "Now you are given a scientific fiction. I will ask you some questions and the "
    'answer should be "True" or "False". Notice that you should answer the question based on the '
    "evidence in the document instead of your background knowledge.",
}
ASKED = (
    "Document is as follows. {document} \nQuestion: {question}. Please directly give answer "
    "without any additional output or explanation "
)
IN_DOCUMENT = "based on the world described in the document."
IN_WORLD = "based on the real-world knowledge and facts up until your last training"


# --- prompts -----------------------------------------------------------------------------------


def prompt_text(task: str, document: str, question: str) -> str:
    """ChunkLlama's prompt for Llama 2."""
    asked = ASKED.format(document=document, question=question)
    return f"[INST]<<SYS>>\n{SYSTEM[task]}\n<</SYS>>\n\n{asked}[/INST]\nAnswer:"


def fact_text(question: str) -> str:
    """SFiction's second question, whether a statement is true in the world."""
    return question.replace(IN_DOCUMENT, IN_WORLD) + "\nAnswer:"


# --- scores ------------------------------------------------------------------------------------


def chosen_letters(answer: str, *, several: bool) -> str:
    """The letters chosen by an answer; "" if it is empty.

    Args:
        several: whether several letters may be right, as in Coursera.
    """
    if not answer.strip():
        return ""
    if answer in "ABCD":
        return answer
    if not several:
        first = re.search(r"[ABCD]", answer)
        return first.group() if first else "A"
    leading = re.match(r"[ABCD]*", answer)
    letters = leading.group() if leading else ""
    if len(letters) > 1:
        return "".join(sorted(set(letters)))
    rest = answer[len(letters) :].split("Question")[0]
    # Capitals before a full stop, a bracket or a space.
    options = "".join(re.findall(r"\s*[A-Z](?=[\s.)])", rest))
    letters = "".join(sorted(set(re.sub(r"[^A-D]", "", letters + options))))
    if not letters:
        run = re.search(r"[ABCD]+", rest)
        letters = run.group() if run else "A"
    return letters


def right_letters(reference: str) -> str:
    """The letters of a non-empty reference, such as (B) Because ..."""
    return re.sub(r"[^A-D]", "", reference.split()[0]) or "A"


def choice_score(chosen: str, right: str) -> float:
    """1 for the right letters, 0.25 for a proper subset of them, else 0."""
    chosen, right = normalized(chosen, lower=False), normalized(right, lower=False)
    if chosen == right:
        return 1.0
    return 0.25 if chosen and set(chosen) <= set(right) else 0.0


def true_or_false(answer: str) -> str:
    """The first word that contains either "true" or "false", reduced to that; "" if none does."""
    for word in answer.lower().split():
        for said in ("true", "false"):
            if said in word:
                return said
    return ""


def scores_of(task: str, answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The scores of a task, in per cent, from all its answers.

    Args:
        answers: the answers; for sci_fi both in one string as in L-Eval: "True [fact: False]".
        references: as in L-Eval's files.

    Returns:
        {"exact_match": ...}; for sci_fi this is the mean of "loyalty" and "fact".
    """
    if task != "sci_fi":
        several = task == "coursera"
        pairs = zip(answers, references, strict=True)
        found = [
            choice_score(chosen_letters(a, several=several), right_letters(r)) for a, r in pairs
        ]
        return {"exact_match": 100 * sum(found) / len(found)}
    right = [
        [true_or_false(said) == is_so for said, is_so in zip(_parts(a), _parts(r), strict=True)]
        for a, r in zip(answers, references, strict=True)
    ]
    loyalty, fact = (100 * sum(one[n] for one in right) / len(right) for n in (0, 1))
    return {"exact_match": (loyalty + fact) / 2, "loyalty": loyalty, "fact": fact}


def _joined(answers: Sequence[str]) -> str:
    """A single answer unchanged; SFiction's two answers combined as in L-Eval."""
    return answers[0] if len(answers) == 1 else f"{answers[0]} [fact: {answers[1]}]"


def _parts(text: str) -> tuple[str, str]:
    """The two answers of "True [fact: False]" in lower case; the second is empty if absent."""
    first, *others = text.lower().split("[fact:")
    return first.strip(), others[0][:-1].strip() if others else ""  # without the bracket


def score_file(path: Path, task: str) -> dict[str, float]:
    """The scores of a predictions file in L-Eval's format (`gt`, and a field ending in `_pred`).

    Raises:
        InputError: the task is unknown, or the file has another format.
    """
    _check_task(task)
    rows = read_json_lines(path, "gt")
    names = [name for name in rows[0] if "_pred" in name]
    if not names:
        raise InputError(f"{path} has no predictions: no field name ends in _pred")
    for number, row in enumerate(rows, start=1):
        check_text(row.get(names[0]), f"{path}: prediction {number}: {names[0]}")
    return scores_of(task, [row[names[0]] for row in rows], [row["gt"] for row in rows])


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise InputError(f"task {task!r} is not known; expected one of {', '.join(TASKS)}")


# --- the task ----------------------------------------------------------------------------------


def read_files(
    files: Mapping[str, Path], max_length: int = MAX_LENGTH
) -> dict[str, list[dict[str, Any]]]:
    """Reads the documents of each task, with their questions and answers.

    Raises:
        InputError: a task is unknown, a file is invalid or has no questions, or the length leaves
            no room for a document.
    """
    if max_length - NEW_TOKENS <= MARGIN:
        raise InputError(f"--max-length must be more than {MARGIN + NEW_TOKENS}, got {max_length}")
    for task in files:
        _check_task(task)
    rows = {
        task: read_json_lines(path, "input", "instructions", "outputs")
        for task, path in files.items()
    }
    for task, documents in rows.items():
        if not any(row["instructions"] for row in documents):
            raise InputError(f"{files[task]} has no question")
    return rows


def evaluate(
    llm: LLM,
    log: ResultLog,
    *,
    files: Mapping[str, Path],
    methods: Sequence[str],
    max_length: int = MAX_LENGTH,
    chat: bool = False,
    limit: int | None = None,
    batch: int | None = None,
) -> None:
    """Asks the questions of the given tasks, and records answers and references.

    Args:
        files: file of each task; keys are names in `TASKS`.
        max_length: approximate number of tokens of prompt and answer.
        chat: whether to use the model's own chat template instead of Llama 2's prompt.
        limit: largest number of questions of each task.

    Raises:
        InputError: a task is unknown, a file is invalid, there is no room for a document, or `ask`
            raises.
    """
    rows, room = read_files(files, max_length), max_length - NEW_TOKENS
    if chat:
        llm.apply_chat_template([{"role": "user", "content": "?"}])  # raises without a template
    for nth, (task, documents) in enumerate(rows.items(), start=1):
        samples, facts = [], []
        for n, row in enumerate(documents):
            document = Document(row["input"], room - MARGIN, room, "right")
            cut = cached_cut(document, lambda text: len(llm.tokenize(text)))
            length = min(len(row["input"]) // 4 + MARGIN, max_length)
            for q, pair in enumerate(zip(row["instructions"], row["outputs"], strict=True)):
                key = {"task": task, "id": f"{n}-{q}"}
                asked = functools.partial(_question, llm, task, cut, *pair, chat)
                samples.append(Sample(key | {"part": "document"}, length, asked))
                asked = functools.partial(_fact_question, llm, *pair, chat)
                facts.append(Sample(key | {"part": "world"}, MARGIN, asked))
        for some in (samples[:limit], facts[:limit] if task == "sci_fi" else []):
            ask(
                llm,
                some,
                log,
                name=f"l-eval: {task} ({nth} of {len(rows)})",
                methods=methods,
                max_new_tokens=NEW_TOKENS,
                batch=batch,
            )


def _question(
    llm: LLM, task: str, document: Callable[[], str], question: str, reference: str, chat: bool
) -> Question:
    if chat:
        asked = ASKED.format(document=document(), question=question)
        messages = [
            {"role": "system", "content": SYSTEM[task]},
            {"role": "user", "content": asked},
        ]
        prompt = llm.apply_chat_template(messages)
    else:
        prompt = llm.tokenize(prompt_text(task, document(), question))
    return Question(prompt, functools.partial(_judge, reference))


def _fact_question(llm: LLM, question: str, reference: str, chat: bool) -> Question:
    text = fact_text(question)
    if chat:
        prompt = llm.apply_chat_template([{"role": "user", "content": text}])
    else:
        prompt = llm.tokenize(text)
    return Question(prompt, functools.partial(_judge, reference))


def _judge(reference: str, said: Answer) -> dict[str, Any]:
    del said  # it is in the record; scores are computed from all answers together
    return {"reference": reference}


def outcome(
    settings: Mapping[str, Any], records: Sequence[Record], paper_model: str | None
) -> Outcome:
    """Exact match by task and method in per cent, and the average."""
    del settings
    answers: dict[tuple[str, str], dict[str, dict[str, dict[str, Any]]]] = {}
    for record in records:
        cell = answers.setdefault((record.key["method"], record.key["task"]), {})
        cell.setdefault(record.key["id"], {})[record.key["part"]] = record.value or {}
    details: dict[str, dict[str, dict[str, float]]] = {}
    counts: dict[str, dict[str, int]] = {}
    for (method, task), some in answers.items():
        parts = ("document", "world") if task == "sci_fi" else ("document",)
        whole = [found for found in some.values() if set(found) == set(parts)]
        if whole:
            texts = [_joined([found[part]["answer"] for part in parts]) for found in whole]
            references = [found["document"]["reference"] for found in whole]
            details.setdefault(method, {})[task] = scores_of(task, texts, references)
            counts.setdefault(method, {})[task] = len(whole)
    scores = {m: {t: s["exact_match"] for t, s in row.items()} for m, row in details.items()}
    theirs = {method: paper.row(paper.L_EVAL, paper_model, method) for method in scores}
    table = task_table("L-Eval, exact match", list(TASKS), scores, theirs, counts)
    return Outcome(scores=details, tables=[table] if scores else [])
