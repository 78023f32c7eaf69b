"""LongBench v2: questions with four choices about texts of 8k words to two millions.

Bai et al. (arXiv 2412.15204), its file data.json. Prompt, cutting and the way an answer is read are
those of github.com/THUDM/LongBench (prompts/0shot.txt, pred.py, result.py), Copyright (c) 2023
THU-KEG & Zhipu AI, under the MIT License. Two forms:

    answer   that of its leaderboard: the model writes up to 128 tokens, of which "The correct
             answer is (X)" counts. There at a temperature of 0.1; here greedily.
    letter   the likeliest of the four letters after "The correct answer is (": for models that do
             not keep to a form. The text is read once for all four.
"""

import functools
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dca_jax.errors import InputError
from dca_jax.evaluation.answers import Answer, Question, Sample, ask
from dca_jax.evaluation.benchmark_files import check_text, cut_in_the_middle
from dca_jax.evaluation.forms import Form
from dca_jax.evaluation.grids import mean_by
from dca_jax.evaluation.intervals import in_per_cent
from dca_jax.evaluation.results import Record, ResultLog, in_batches
from dca_jax.evaluation.tables import Outcome, Table
from dca_jax.evaluation.texts import encode
from dca_jax.fields import shown
from dca_jax.inference.llm import LLM
from dca_jax.inference.methods import method_by_name, reading
from dca_jax.inference.prefix import common_beginning, depends_on_length
from dca_jax.inference.progress import progress, reading_work
from dca_jax.inference.score import Branches, Reader
from dca_jax.text_files import parse_json, read_text_file

FORMS = ("answer", "letter")
LETTERS = "ABCD"
NEW_TOKENS, MAX_LENGTH = 128, 120_000  # of an answer; the leaderboard's cut for most models
PROMPT = (
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>"
    "\n\nWhat is the correct answer to this question: {question}\nChoices:\n(A) {choice_A}\n"
    "(B) {choice_B}\n(C) {choice_C}\n(D) {choice_D}\n\nFormat your response as follows: "
    '"The correct answer is (insert answer here)".'
)
BEGINNING = "The correct answer is ("
DIFFICULTIES, LENGTHS = ("easy", "hard"), ("short", "medium", "long")
TEXTS = ("context", "question", *(f"choice_{letter}" for letter in LETTERS))
FORM = Form(
    key={"method": str, "id": str},
    value={"right": bool, "tokens": int, "difficulty": DIFFICULTIES, "length": LENGTHS},
    settings={"form": FORMS},
)


def read_file(path: Path) -> list[dict[str, str]]:
    """The questions of LongBench v2's data.json.

    Raises:
        InputError: another file.
    """
    rows = parse_json(read_text_file(path), f"{path}")
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} is {shown(rows)}, expected a list of questions")
    allowed = {"answer": tuple(LETTERS), "difficulty": DIFFICULTIES, "length": LENGTHS}
    for number, row in enumerate(rows, start=1):
        where = f"{path}: question {number}"
        if not isinstance(row, dict):
            raise InputError(f"{where} is {shown(row)}, expected an object")
        for name in ("_id", *TEXTS):
            check_text(row.get(name), f"{where}: {name}")
        for name, values in allowed.items():
            if row.get(name) not in values:
                expected = f"one of {', '.join(values)}"
                raise InputError(f"{where}: {name} is {shown(row.get(name))}, expected {expected}")
    return rows


def prompt_text(row: Mapping[str, str]) -> str:
    """The question of a row, its text in front."""
    return PROMPT.format(**{name: row[name].strip() for name in TEXTS})


def chosen_letter(answer: str) -> str | None:
    """The letter that an answer names, in the form asked for; None if it names none."""
    said = answer.strip().replace("*", "")
    for form in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
        if found := re.search(form, said):
            return found.group(1)
    return None


# --- the task ----------------------------------------------------------------------------------


def evaluate(
    llm: LLM,
    log: ResultLog,
    rows: Sequence[Mapping[str, str]],
    *,
    form: str,
    methods: Sequence[str],
    max_length: int = MAX_LENGTH,
    chat: bool = False,
    limit: int | None = None,
    batch: int | None = None,
) -> None:
    """Asks the questions of a file by every method.

    Args:
        form: one of `FORMS`.
        max_length: tokens of a prompt; longer ones are cut in the middle.
        chat: the prompt is a user's message.
        limit: only so many questions.
        batch: prompts read together, in the form "answer".

    Raises:
        InputError: an unknown form, a model without a chat template, or what `ask` refuses.
    """
    if form not in FORMS:
        raise InputError(f"form {form!r} is not known; expected one of {', '.join(FORMS)}")
    if chat:
        llm.apply_chat_template([{"role": "user", "content": "?"}])  # refuses a model without one
    rows = rows[:limit]
    if form == "letter":
        _compare_letters(llm, log, rows, methods, max_length, chat)
        return
    samples = [
        Sample(
            {"id": row["_id"]},
            min(len(row["context"]) // 4, max_length),
            functools.partial(_question, llm, row, max_length, chat),
        )
        for row in rows
    ]
    options = {"methods": methods, "max_new_tokens": NEW_TOKENS, "batch": batch}
    ask(llm, samples, log, name="longbench-v2", **options)


def _prompt(llm: LLM, row: Mapping[str, str], max_length: int, chat: bool) -> list[int]:
    text = cut_in_the_middle(llm, prompt_text(row), max_length)
    if chat:
        return llm.apply_chat_template([{"role": "user", "content": text}])
    return llm.tokenize(text)


def _about(row: Mapping[str, str], chosen: str | None) -> dict[str, Any]:
    facts = {name: row[name] for name in ("difficulty", "length")}
    return {"chosen": chosen or "", "right": chosen == row["answer"], **facts}


def _question(llm: LLM, row: Mapping[str, str], max_length: int, chat: bool) -> Question:
    def judge(said: Answer) -> dict[str, Any]:
        return _about(row, chosen_letter(said.text))

    return Question(_prompt(llm, row, max_length, chat), judge)


def _compare_letters(
    llm: LLM,
    log: ResultLog,
    rows: Sequence[Mapping[str, str]],
    methods: Sequence[str],
    max_length: int,
    chat: bool,
) -> None:
    """Notes which letter is the likeliest."""
    config = llm.model.config
    for method in methods:
        method_by_name(method, config, max_length)
    missing = {m: [r for r in rows if {"method": m, "id": r["_id"]} not in log] for m in methods}

    def work(row: Mapping[str, str]) -> float:
        return reading_work(config, min(len(row["context"]) // 4, max_length))

    with progress("longbench-v2", sum(work(r) for some in missing.values() for r in some)) as done:
        for method, some in missing.items():

            def run(few: Sequence[Mapping[str, str]], method: str = method) -> None:
                (row,) = few
                begin = time.perf_counter()
                prompt = _prompt(llm, row, max_length, chat)
                likelihoods = letter_likelihoods(llm, method, prompt, before="" if chat else "\n")
                value = _about(row, max(likelihoods, key=likelihoods.__getitem__))
                value |= {"likelihoods": likelihoods, "tokens": len(prompt)}
                log.add({"method": method, "id": row["_id"]}, value, time.perf_counter() - begin)
                done(work(row))

            def fail(row: Mapping[str, str], error: Exception, method: str = method) -> None:
                log.fail({"method": method, "id": row["_id"]}, error, 0.0)

            in_batches(some, 1, run, fail)


def letter_likelihoods(
    llm: LLM, method: str, prompt: Sequence[int], *, before: str = ""
) -> dict[str, float]:
    """The log-likelihood of each letter after a prompt and the beginning of an answer.

    Args:
        prompt: ids.
        before: what stands between the two.
    """
    texts = [
        np.asarray([*prompt, *encode(llm, f"{before}{BEGINNING}{letter}")], np.int32)
        for letter in LETTERS
    ]
    longest = max(map(len, texts))
    llm = reading(llm, method, longest)
    shared = min(common_beginning(texts[0], text) for text in texts) - 1  # whose last is given
    once = 0 if depends_on_length(llm.model) or llm.model.sparse is not None else shared
    reader = Reader(llm.model, 1, longest, cache_dtype=llm.cache_dtype)
    (scores,) = reader.read_branches([Branches(texts[0][:once], [text[once:] for text in texts])])
    return {
        letter: -float(one.nll[shared - once :].sum(dtype=np.float64))
        for letter, one in zip(LETTERS, scores, strict=True)
    }


def outcome(
    settings: Mapping[str, Any], records: Sequence[Record], paper_model: str | None
) -> Outcome:
    """The share of right answers, of all and by difficulty and length, as on the leaderboard."""
    del paper_model  # the paper has no LongBench v2
    methods = list(dict.fromkeys(record.key["method"] for record in records))
    columns = ("overall", *DIFFICULTIES, *LENGTHS)
    cells: dict[tuple[str, str], tuple[float, int]] = {}
    for column in columns:
        some = [r for r in records if column in ("overall", *_kinds(r))]
        found = mean_by(some, "right", "method")
        cells |= {(method, column): cell for (method,), cell in found.items()}
    scores = {
        method: {
            column: {"accuracy": cells[method, column][0], "samples": cells[method, column][1]}
            for column in columns
            if (method, column) in cells
        }
        for method in methods
    }
    rows = [
        [m, *(in_per_cent(cells[m, c]) if (m, c) in cells else "" for c in columns)]
        for m in methods
    ]
    table = Table(
        title=f"LongBench v2, by {settings['form']} (per cent)",
        header=["method", *columns],
        rows=rows,
        notes=[
            "In parentheses: the 95 % interval, and the number of questions. A guess is right in "
            "25 % of them."
        ],
    )
    return Outcome(scores=scores, tables=[table] if rows else [])


def _kinds(record: Record) -> tuple[str, ...]:
    return tuple((record.value or {})[name] for name in ("difficulty", "length"))
