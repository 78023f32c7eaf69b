"""`eval needle`: what is hidden where, RULER's scoring and its effective length."""

import json
import re

import numpy as np
import pytest
from shared_fixtures import invoke_eval

from dca_jax.errors import InputError
from dca_jax.evaluation import answers, needle, report
from dca_jax.evaluation.grids import accuracy_score
from dca_jax.evaluation.haystacks import LONGEST, Haystack, largest_fitting
from dca_jax.evaluation.needle import effective_length, hidden_numbers, hidden_variables, score
from dca_jax.evaluation.results import ResultLog, read_run

STORY = 'Call me Ishmael. "Some years ago!" Never mind\n  how long? I thought I would sail. ' * 3


# --- haystacks ---------------------------------------------------------------------------------


def test_a_text_is_cut_where_sentences_end():
    hay = Haystack.of_text(STORY)
    assert hay.units[:4] == [
        *(
            "Call me Ishmael.",
            '"Some years ago!"',
            "Never mind how long?",
            "I thought I would sail.",
        )
    ]
    assert len(hay.units) == 12
    endless = Haystack.of_text("word " * 150)
    assert [len(unit.split()) for unit in endless.units] == [LONGEST, LONGEST, 30]
    with pytest.raises(InputError, match="haystack is empty"):
        Haystack.of_text(" \n ")


def test_needles_stand_between_sentences():
    hay = Haystack.of_text(STORY)
    text = hay.with_needles(16, ["FIRST", "SECOND.", "THIRD"], [0.0, 0.5, 1.0])
    before, between, after = re.split(r"FIRST\. | SECOND\. ", text)
    assert before == ""
    assert between == " ".join(hay.units[:8])
    assert after == " ".join([*hay.units[8:], *hay.units[:4], "THIRD."])  # used over and over
    assert hay.with_needles(0, ["A", "B"], [0.2, 0.9]) == "A. B."
    noise = Haystack.noise().with_needles(2, ["VAR A = 1"], [0.5])
    assert noise.splitlines()[1] == "VAR A = 1"
    assert noise.splitlines()[0] == noise.splitlines()[2]


def test_places_are_drawn_as_ruler_draws_them():
    """Of noise any lines, each alike, never after the last; of a text forty depths."""
    noise = Haystack.noise()
    seen = np.zeros(10, int)
    for seed in range(400):
        depths = noise.places(3, seed)
        text = noise.with_needles(10, ["A", "B", "C"], depths(10)).split("\n")
        at = [text.index(needle) - number for number, needle in enumerate("ABC")]
        assert at == sorted(set(at))  # each before another line
        seen[at] += 1
        assert depths(10) == noise.places(3, seed)(10)
    assert np.all(np.abs(seen - 120) < 45)  # 3 of 10 lines, 400 times; five deviations
    assert noise.with_needles(0, ["A", "B"], noise.places(2, 0)(0)) == "A\nB"
    depths = Haystack.of_text(STORY).places(3, 0)(1000)
    assert depths == sorted(depths)
    assert all(round(100 * depth) in np.linspace(0, 100, 40).round() for depth in depths)


@pytest.mark.parametrize("first_guess", [0, 1, 90, 5000])
@pytest.mark.parametrize("limit", [60, 70, 1000, 40_000])
def test_as_much_as_fits(limit, first_guess):
    sizes = np.random.default_rng(0).integers(1, 12, 10_000).cumsum()
    asked: list[int] = []

    def measure(units: int) -> int:
        asked.append(units)
        return 60 + (
            int(sizes[min(units, 10_000) - 1]) + 9 * max(0, units - 10_000) if units else 0
        )

    found = largest_fitting(measure, limit, first_guess)
    assert measure(found) <= limit
    assert measure(found + 3) > limit  # less than two units of average size are left
    assert len(asked) <= 2 + 9
    with pytest.raises(InputError, match="at least 60 tokens, but the limit is 59"):
        largest_fitting(measure, 59, first_guess)


# --- what is hidden ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "needles", "expected"),
    [
        ({}, 1, 1),
        ({"keys": 4}, 4, 1),
        ({"values": 4}, 4, 4),
        ({"keys": 4, "queries": 4}, 4, 4),
    ],
)
def test_hidden_numbers(options, needles, expected):
    hidden = hidden_numbers(np.random.default_rng(3), **options)
    assert len(hidden.needles) == needles
    pattern = r"One of the special magic numbers for ([a-z]+-[a-z]+) is: ([1-9][0-9]{6})\."
    pairs = [re.fullmatch(pattern, text).groups() for text in hidden.needles]
    queries = re.split(", and |, ", hidden.query)
    assert {key for key, _ in pairs} >= set(queries)
    assert set(hidden.expected) == {value for key, value in pairs if key in queries}
    assert len(set(hidden.expected)) == expected
    question, beginning = (part.format(context="...", query="red-fox") for part in hidden.template)
    if expected == 1:
        assert question.startswith("A special magic number is hidden within")
        assert beginning.endswith("for red-fox mentioned in the provided text is")
    else:
        assert question.startswith("Some special magic numbers are hidden within")
        assert beginning.endswith("for red-fox mentioned in the provided text are")


def test_hidden_variables_are_a_chain():
    hidden = hidden_variables(np.random.default_rng(3))
    assert len(hidden.needles) == len(set(hidden.expected)) == 5
    source = hidden.query
    for text, name in zip(hidden.needles, hidden.expected, strict=True):
        assert text == f"VAR {name} = {source}"
        source = f"VAR {name}"
    beginning = hidden.template[1].format(query=hidden.query)
    assert f"5 variables are assigned the value {hidden.query}, they are: " in beginning


def test_scores_are_those_of_ruler():
    assert score("They are 1111111, and\t2222222.", ["1111111", "2222222", "3", "4444444"]) == 0.5
    assert score("abcde", ["ABCDE"]) == 1.0
    assert score("", ["1"]) == 0.0
    assert score("12\n34", ["1234"]) == 0.0


def test_the_effective_length_is_the_greatest_with_enough():
    scores = {4096: 96.0, 8192: 85.6, 16_384: 85.5, 32_768: 3.0}
    assert effective_length(scores) == 8192
    assert effective_length(scores | {32_768: 86.0}) == 32_768
    assert effective_length({4096: 50.0}) is None


# --- the task ----------------------------------------------------------------------------------


@pytest.fixture
def replies(plain_llm, monkeypatch):
    """In place of the model: one that reads numbers, and no variables."""
    prompts_seen: list[str] = []

    def generate(model, prompts, *, max_new_tokens, stop_ids, cache, on_piece):
        found = []
        for prompt in prompts:
            assert len(prompt) + max_new_tokens <= 1500
            text = plain_llm.tokenizer.decode(prompt, skip_special_tokens=True)
            prompts_seen.append(text)
            on_piece(len(prompt))
            numbers = re.findall(r"is: ([0-9]{7})\.", text)
            ids = plain_llm.tokenizer(" " + ", ".join(numbers), add_special_tokens=False).input_ids
            found.append(ids[:max_new_tokens])
        return found

    monkeypatch.setattr(answers, "generate", generate)
    monkeypatch.setattr(answers, "answer_about", answers.answer)
    return prompts_seen


def test_every_task_is_asked_and_scored(tmp_path, plain_llm, replies):
    hay = Haystack.of_text(STORY)
    settings = {"trained_length": 64}
    with ResultLog(tmp_path, "needle", settings) as log:
        tasks = ["single", "multi-query", "variables"]
        options = {"methods": ["dca"], "lengths": [1400, 1500], "depths": [0.0, 1.0], "trials": 1}
        needle.evaluate(plain_llm, hay, log, tasks=tasks, **options)
        assert len(log.records) == 2 * (2 + 1 + 1)
        assert all(1200 < r.value["tokens"] <= r.key["length"] - 30 for r in log.records)
    first, last = replies[0], replies[1]  # the single needle at depth 0 and 1
    assert first.splitlines()[1].startswith("One of the special magic numbers for")
    assert re.fullmatch(r".* is: [0-9]{7}\.", last.splitlines()[1])
    found = report.write_report(tmp_path)
    scores = json.loads((tmp_path / "summary.json").read_text())["scores"]
    assert scores["single"]["dca"]["1500"] == accuracy_score((1.0, 2))
    assert scores["variables"]["dca"]["1500"]["accuracy"] == 0.0
    assert scores["mean"]["dca"]["per_cent"] == {"1400": pytest.approx(200 / 3), "1500": 200 / 3}
    assert scores["mean"]["dca"]["effective_length"] is None
    assert (tmp_path / "single_heat_map.png").exists()
    assert not (tmp_path / "variables_heat_map.png").exists()
    assert len(found.tables) == 4
    assert "| dca | none | 66.7 | 66.7 |" in found.tables[-1].markdown()


def test_variables_come_after_a_worked_example(tmp_path, plain_llm, replies):
    """As RULER has it: a chain of names of three letters in noise, with its answer."""
    with ResultLog(tmp_path, "needle", {"trained_length": 64}) as log:
        options = {"tasks": ["variables"], "methods": ["dca"], "lengths": [1500], "trials": 2}
        needle.evaluate(plain_llm, Haystack.of_text(STORY), log, **options)
        expected = [r.value["expected"] for r in log.records]
    for prompt, names in zip(replies, expected, strict=True):
        example, asked = prompt.split("\n\nMemorize and track the chain(s)")
        shown = re.findall(r"VAR ([A-Z]{3}) = ", example)
        assert len(shown) == len(set(shown)) == 5
        assert example.endswith("they are: " + " ".join(shown))
        assert example.count("The grass is green.") == 5  # more would have over 500 tokens here
        assert re.findall(r"VAR ([A-Z]{5}) = ", asked) == names
        assert not set(names) & set(re.findall(r"[A-Z]{5}", example))
    assert replies[0].split("\n\n")[1] != replies[1].split("\n\n")[1]


def test_a_chat_model_is_asked_as_a_user_would(tmp_path, plain_llm, replies):
    with ResultLog(tmp_path, "needle", {}) as log:
        options = {"tasks": ["single"], "methods": ["dca"], "lengths": [1500], "trials": 1}
        needle.evaluate(plain_llm, Haystack.noise(), log, chat=True, **options)
    (prompt,) = replies  # decoded without the special tokens of its template
    assert prompt.startswith("A special magic number is hidden")
    assert prompt.endswith("mentioned in the provided text is")
    assert read_run(tmp_path).records[0].value["score"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["hay"]}, "task 'hay' is not known; expected one of single, multi-key"),
        ({"tasks": []}, "needles need a task"),
        ({"lengths": []}, "needles need a task, a length"),
        ({"depths": [-0.1]}, "depths between 0 and 1"),
        ({"trials": 0}, "a trial"),
    ],
)
def test_bad_requests_are_refused(tmp_path, plain_llm, options, message):
    asked = {"tasks": ["single"], "methods": ["rope"], "lengths": [512], "trials": 1}
    with ResultLog(tmp_path, "needle", {}) as log, pytest.raises(InputError, match=message):
        needle.evaluate(plain_llm, Haystack.noise(), log, **(asked | options))


def test_the_command(folder, tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    arguments = ["needle", folder, "--haystack", tmp_path / "a.txt", "--length", 700]
    arguments += ["--trials", 2, "--method", "dca", "--output", tmp_path / "out", "--batch", 2]
    done = invoke_eval(*arguments)
    assert done.exit_code == 0, done.output
    run = read_run(tmp_path / "out")
    assert run.settings["haystack"] == "a.txt"
    assert [record.value["score"] for record in run.records] == [0.0, 0.0]
