"""`eval infinite-bench` and `eval longbench-v2`: prompts, scorers, and the commands."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shared_fixtures import invoke_eval as invoke
from tiny_llm import byte_level_tokenizer
from transformers import AutoModelForCausalLM

import dca_jax
from dca_jax.errors import InputError
from dca_jax.evaluation import answers, infinite_bench, longbench_v2
from dca_jax.evaluation.benchmark_files import cut_in_the_middle
from dca_jax.evaluation.results import Record, read_run


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch):
    """Puts words into the model's mouth, which would write noise and take seconds to compile."""

    def say(text: str) -> None:
        ids = byte_level_tokenizer().encode(text, add_special_tokens=False).ids

        def generate(model, prompts, *, max_new_tokens, stop_ids, cache, on_piece):
            return [ids[:max_new_tokens] for _ in prompts]

        monkeypatch.setattr(answers, "generate", generate)
        monkeypatch.setattr(answers, "answer_about", answers.answer)

    return say


# --- InfiniteBench -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "answer", "expected", "right"),
    [
        ("passkey", " 71432.", "71432", True),
        ("passkey", "714321", "71432", False),
        ("passkey", "It is 12, no: 71432", "71432", False),  # the first number counts
        ("passkey", "none", "71432", False),
        ("number_string", "30000\nThe grass is green. 30000", "3000077442", False),
        ("number_string", "the digits are 3000077442!", "3000077442", True),
        ("kv_retrieval", '"5e6b-90": x', "5e6b-90", True),
        ("kv_retrieval", "{'5e6b-90'}\n", "5e6b-90", True),
        ("kv_retrieval", "x5e6b-90", "5e6b-90", False),
        ("kv_retrieval", "", "5e6b-90", False),
    ],
)
def test_scores_are_those_of_infinite_bench(task, answer, expected, right):
    """Against its `first_int_match` and `get_score_one_kv_retrieval`, as written."""
    if task == "kv_retrieval":
        spaced = answer
        for sign in ["\n", ":", '"', "'", ".", ",", "?", "!", "{", "}"]:
            spaced = spaced.replace(sign, " ")
        theirs = expected in spaced.split()
    else:
        theirs = next((part for part in re.split("[^0-9]", answer) if part), "") == expected
    assert infinite_bench.is_right(task, answer, expected) == theirs == right


@pytest.mark.parametrize("task", list(infinite_bench.TASKS))
def test_made_questions_have_their_answer_once(task: str):
    asked = infinite_bench.made(task, np.random.default_rng(3))
    short, long = asked(5), asked(50)
    assert asked(50) == long  # and nothing else is drawn
    if task == "kv_retrieval":
        pairs = json.loads(long.context.removeprefix("JSON data:\n"))
        assert len(pairs) == 50
        (key,) = re.findall(r'\nKey: "(.*)"\nThe value', long.question)
        assert pairs[key] == long.answer
    else:
        assert short.answer == long.answer
        assert long.context.count(infinite_bench.NOISE) == 50
        assert long.context.count(long.answer) == 2
        assert len(long.answer) == (5 if task == "passkey" else 10)
        assert re.findall("[0-9]+", long.context) == [long.answer] * 2


def test_questions_are_made_and_read(tmp_path: Path, folder: Path, says):
    says(" 12.")
    rows = [
        {"id": n, "context": "word " * 300, "input": "What?", "answer": ["12"], "options": []}
        for n in range(2)
    ]
    path = tmp_path / "passkey.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["infinite-bench", folder, "--method", "dca", "--output", tmp_path / "out"]
    words += ["--data", f"passkey={path}", "--limit", "1", "--max-length", "400"]
    done = invoke(*words, "--task", "passkey", "--length", "400", "--trials", "1")
    assert done.exit_code == 0, done.stderr
    read, made = read_run(tmp_path / "out").records
    assert (read.key["id"], made.key["length"]) == ("0", 400)
    assert read.value is not None
    assert made.value is not None
    assert 390 <= read.value["tokens"] <= 400 - 6 + 1  # and a BOS
    assert 300 < made.value["tokens"] <= 400 - 6
    assert (read.value["found"], made.value["found"]) == (True, False)
    assert "| dca | 100.0 (20.7 to 100.0; 1) |" in done.stdout
    assert "InfiniteBench's files" in done.stdout
    assert "InfiniteBench, made: passkey" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give question files (--data TASK=FILE), or --length to generate questions"),
        (["--length", "1k", "--task", "code_run"], "task 'code_run' is not known; expected one of"),
        (["--data", "passkey={bad}"], "line 1: answer is empty, expected an answer"),
    ],
)
def test_what_infinite_bench_has_not_is_refused(tmp_path: Path, folder: Path, options, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"context": "c", "input": "i", "answer": []}\n')
    done = invoke("infinite-bench", folder, *[word.format(bad=bad) for word in options])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


def test_what_is_too_long_loses_its_middle(plain_llm: dca_jax.LLM):
    text = "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail."
    ids = plain_llm.tokenizer.encode(text, add_special_tokens=False)
    cut = cut_in_the_middle(plain_llm, text, 11)
    assert cut == plain_llm.tokenizer.decode([*ids[:5], *ids[-5:]])
    assert cut_in_the_middle(plain_llm, text, len(ids)) == text
    with pytest.raises(InputError, match="1 tokens are no room"):
        cut_in_the_middle(plain_llm, text, 1)


# --- LongBench v2 ------------------------------------------------------------------------------


def row(number: int, **changed: Any) -> dict[str, Any]:
    return {
        "_id": f"id{number}",
        "domain": "Single-Document QA",
        "difficulty": ("easy", "hard")[number % 2],
        "length": ("short", "medium", "long")[number % 3],
        "question": " Who sails? ",
        **{f"choice_{letter}": f"{letter} does" for letter in "ABCD"},
        "answer": "ABCD"[number % 4],
        "context": "Call me Ishmael. Some years ago I thought I would sail. " * 12,
    } | changed


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The correct answer is (B).", "B"),
        ("**The correct answer is (D)**", "D"),
        ("I think so. The correct answer is C because", "C"),
        ("The correct answer is A. No: The correct answer is (B)", "B"),  # brackets come first
        ("The correct answer is (E)", None),
        ("B", None),
        ("", None),
    ],
)
def test_answers_are_read_as_on_the_leaderboard(answer, letter):
    assert longbench_v2.chosen_letter(answer) == letter


def test_the_prompt_is_that_of_longbench_v2():
    asked = longbench_v2.prompt_text(row(0, context=" The {text}. "))
    assert asked == (
        "Please read the following text and answer the question below.\n\n<text>\nThe {text}.\n"
        "</text>\n\nWhat is the correct answer to this question: Who sails?\nChoices:\n(A) A does\n"
        "(B) B does\n(C) C does\n(D) D does\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )


def test_letters_are_as_likely_as_transformers_has_them(plain_llm: dca_jax.LLM, folder: Path):
    prompt = plain_llm.tokenize("Call me Ishmael. Who sails? " * 3)
    found = longbench_v2.letter_likelihoods(plain_llm, "rope", prompt, before="\n")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    beginning = plain_llm.tokenizer.encode("\nThe correct answer is (", add_special_tokens=False)
    with torch.no_grad():
        logits = theirs(torch.tensor([[*prompt, *beginning]])).logits[0, -1]
    likelihoods = torch.log_softmax(logits, -1)
    for letter in "ABCD":
        (token,) = plain_llm.tokenizer.encode(letter, add_special_tokens=False)
        assert found[letter] == pytest.approx(likelihoods[token].item(), abs=1e-4)


@pytest.mark.parametrize("form", ["answer", "letter"])
def test_questions_of_longbench_are_asked(tmp_path: Path, folder: Path, says, monkeypatch, form):
    says("The correct answer is (A).")
    given = {"A": -1.0, "B": -2.0, "C": -3.0, "D": -4.0}
    monkeypatch.setattr(longbench_v2, "letter_likelihoods", lambda *_, **__: given)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([row(n) for n in range(4)]))
    words = ["longbench-v2", folder, "--data", path, "--form", form, "--max-length", "300"]
    done = invoke(*words, "--limit", "3", "--batch", "2", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    records = read_run(tmp_path / "out").records
    assert [r.key["id"] for r in records] == ["id0", "id1", "id2"]
    values = [r.value for r in records if r.value is not None]
    assert all(290 <= value["tokens"] <= 303 for value in values)
    assert [value["chosen"] for value in values] == ["A", "A", "A"]
    assert [value["right"] for value in values] == [True, False, False]
    assert "| dca | 33.3 (6.1 to 79.2; 3) | 50.0" in done.stdout


def test_longbench_is_told_by_difficulty_and_length():
    def record(number: int, right: bool) -> Record:
        of = {name: row(number)[name] for name in ("difficulty", "length")}
        value = {"right": right, "tokens": 9, "answer": "easy", **of}
        return Record(key={"method": "dca", "id": str(number)}, value=value, error=None, seconds=1)

    records = [record(n, right) for n, right in enumerate([True, False, True, True, False, False])]
    scores = longbench_v2.outcome({"form": "answer"}, records, None).scores["dca"]
    found = {name: (cell["accuracy"], cell["samples"]) for name, cell in scores.items()}
    assert found == {
        "overall": (0.5, 6),
        "easy": (2 / 3, 3),
        "hard": (1 / 3, 3),
        "short": (1.0, 2),
        "medium": (0.0, 2),
        "long": (0.5, 2),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "expected a list of questions"),
        ("[]", "expected a list of questions"),
        ("[3]", "question 1 is 3, expected an object"),
        (json.dumps([row(0), row(1, answer="E")]), "question 2: answer is 'E', expected one of A"),
        (json.dumps([row(0, context=None)]), "question 1: context is None, expected a string"),
        (json.dumps([row(0, length="8k")]), "length is '8k', expected one of short, medium, long"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, message: str):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        longbench_v2.read_file(path)
