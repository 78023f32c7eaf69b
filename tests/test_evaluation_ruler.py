"""`eval ruler`: prompts against RULER's own generators, its scores, and the command."""

import json
import math
import re
from pathlib import Path
from typing import Any

import golden_ruler
import numpy as np
import pytest
from scipy import stats
from shared_fixtures import invoke_eval as invoke
from tiny_llm import byte_level_tokenizer

from dca_jax.evaluation import answers
from dca_jax.evaluation.intervals import mean_interval, wilson
from dca_jax.evaluation.results import Record, read_run
from dca_jax.evaluation.ruler import results
from dca_jax.evaluation.ruler import task as ruler
from dca_jax.evaluation.ruler.benchmark import WORDINGS
from dca_jax.evaluation.ruler.drawing import Drawn, Room
from dca_jax.evaluation.ruler.published import at_length, published
from dca_jax.evaluation.ruler.sources import (
    Essays,
    KeyWords,
    Sources,
    WordLists,
    read_hotpotqa,
    read_squad,
)

CASES = json.loads(golden_ruler.GOLDEN.read_text())


def case_name(case: dict[str, Any]) -> str:
    return "-".join(str(case[name]) for name in ("task", "length", "seed", "chat"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """The stand-ins of which the golden prompts were made."""
    folder = tmp_path_factory.mktemp("ruler")
    (folder / "squad.json").write_text(json.dumps(golden_ruler.SQUAD))
    (folder / "hotpotqa.json").write_text(json.dumps(golden_ruler.HOTPOTQA))
    return Sources(
        words=WordLists(golden_ruler.NOUNS, golden_ruler.ADJECTIVES, golden_ruler.VERBS),
        more_words=list(golden_ruler.MORE_WORDS.values()),
        essays=Essays(golden_ruler.ESSAYS, golden_ruler.sentences_of),
        questions={
            "qa_1": read_squad(folder / "squad.json"),
            "qa_2": read_hotpotqa(folder / "hotpotqa.json"),
        },
    )


# --- prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_prompts_are_those_of_rulers_own_generator(case: dict[str, Any], sources: Sources):
    room = Room(
        length=case["length"],
        template=len(golden_ruler.tokens_of(golden_ruler.CHAT_TEMPLATE)) if case["chat"] else 0,
        new_tokens=WORDINGS[case["task"]].new_tokens,
        count_tokens=lambda text: len(golden_ruler.tokens_of(text)),
    )
    drawn, found = ruler.stream(room, sources, case["task"], case["seed"]), []
    for number in range(len(case["samples"])):
        sample = drawn.sample(number)
        found.append(golden_ruler.record(*sample, room.tokens(sample) + room.new_tokens))
    assert found == case["samples"]


def test_two_words_make_a_key():
    """The very list of RULER's generators, which is never made whole here."""
    whole = sorted({f"{a}-{n}" for a in golden_ruler.ADJECTIVES for n in golden_ruler.NOUNS})
    keys = KeyWords(golden_ruler.ADJECTIVES, golden_ruler.NOUNS)
    assert [keys[n] for n in range(len(keys))] == whole
    assert len(whole) < len(set(golden_ruler.ADJECTIVES)) * len(golden_ruler.NOUNS)  # some alike


def test_an_earlier_sample_begins_anew():
    made = []

    def make():
        made.append(True)
        return (Drawn(str(n), "", []) for n in range(9))

    drawn = ruler.Stream(make)
    assert [drawn.sample(n).question for n in (1, 2, 5, 0, 3)] == ["1", "2", "5", "0", "3"]
    assert len(made) == 2


# --- scores ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected", "share", "any_of_them"),
    [
        ("They are 1234567, and\t7654321.", ["1234567", "7654321", "x"], 2 / 3, 1.0),
        ("abcdef", ["ABC", "DEF"], 1.0, 1.0),
        ("  in\x00 France\n", ["in\n France"], 1.0, 1.0),  # signs without a form are line feeds
        ("", ["1"], 0.0, 0.0),
        ("12\n34", ["1234", "12"], 0.5, 1.0),
    ],
)
def test_scores_are_those_of_ruler(answer, expected, share, any_of_them):
    """Against `string_match_all` and `string_match_part` after `postprocess_pred`, as written."""
    said = re.sub("[\x00-\x1f]", "\n", answer.strip()).strip().lower()
    hits = [1.0 if one.lower() in said else 0.0 for one in expected]
    assert ruler.score_of("niah_multikey_1", answer, expected) == sum(hits) / len(hits) == share
    assert ruler.score_of("qa_2", answer, expected) == max(hits) == any_of_them


@pytest.mark.parametrize(("right", "samples"), [(0, 5), (5, 5), (13, 20), (499, 500)])
def test_intervals_are_wilsons(right, samples):
    theirs = stats.binomtest(right, samples).proportion_ci(0.95, method="wilson")
    assert wilson(right / samples, samples) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert mean_interval([(right / samples, samples)]) == pytest.approx(
        (theirs.low, theirs.high), abs=1e-12
    )


def test_the_interval_of_a_mean_holds_what_it_promises():
    """Of 2,000 runs with three tasks, 95 % have the true mean in it, give or take."""
    rng, true = np.random.default_rng(0), np.array([0.95, 0.6, 0.3])
    held = 0
    for right in rng.binomial(40, true, (2000, 3)):
        low, high = mean_interval([(n / 40, 40) for n in right])
        held += low <= true.mean() <= high
    assert 0.93 < held / 2000 < 0.98


def test_published_figures_stand_beside():
    card = published("Qwen/Qwen3-30B-A3B-Instruct-2507")
    assert card == published("/models/models--Qwen--Qwen3-30B-A3B-Instruct-2507/snapshots/1")
    assert at_length(card["card, sparse attention"], 131_072) == 88.1
    assert at_length(card["card, sparse attention"], 1_000_000) == 72.2
    assert at_length(card["card, sparse attention"], 8192) is None
    assert not published("Qwen/Qwen3-30B-A3B-Thinking-2507")
    records = [
        Record(
            key={"method": "dca", "task": task, "length": 4096, "trial": trial},
            value={"score": float(trial < 3), "tokens": 4000},
            error=None,
            seconds=1.0,
        )
        for task in ("niah_single_1", "cwe")
        for trial in range(4)
    ]
    settings = {"trained_length": 4096, "model": "Qwen/Qwen3-30B-A3B-Instruct-2507"}
    found = results.outcome(settings, records, None)
    low, high = wilson(0.75, 4)
    assert f"| cwe | 75.0 ({100 * low:.1f} to {100 * high:.1f}) |" in found.tables[0].markdown()
    table = found.tables[1].markdown()
    assert "mean over 2 of 13 tasks" in table
    assert "niah_single_2, niah_single_3" in table  # are missing
    assert "| card, full attention |  | 98.0 |" in table
    assert found.scores["dca"]["effective_length"] is None
    assert math.isclose(found.scores["dca"]["mean"]["4096"]["mean"], 75.0)


# --- the command -------------------------------------------------------------------------------


def test_the_command_asks_and_goes_on(tmp_path: Path, folder: Path, monkeypatch):
    """The model's words are given: its own would be noise, and take seconds to compile."""

    def generate(model, prompts, *, max_new_tokens, stop_ids, cache, on_piece):
        assert max_new_tokens == 50
        prompts_seen.extend(prompts)
        return [byte_level_tokenizer().encode(" the", add_special_tokens=False).ids] * len(prompts)

    prompts_seen: list[list[int]] = []
    monkeypatch.setattr(answers, "generate", generate)
    monkeypatch.setattr(answers, "answer_about", answers.answer)
    words = ["ruler", folder, "--length", "700", "--method", "dca", "--output", tmp_path / "out"]
    words += ["--task", "fwe"]
    done = invoke(*words, "--trials", "1")
    assert done.exit_code == 0, done.stderr
    assert "RULER, mean over 1 of 13 tasks" in done.stdout
    assert (tmp_path / "out" / "tasks.png").is_file()
    (first,) = read_run(tmp_path / "out").records
    assert first.value is not None
    assert 500 < first.value["tokens"] <= 700 - 50 + 1  # and a BOS
    assert len(first.value["expected"]) == 3
    done = invoke(*words, "--trials", "2", "--seed", "7")
    assert done.exit_code == 2
    assert "its seed is 42, not 7" in done.stderr
    done = invoke(*words, "--trials", "2")
    assert done.exit_code == 0, done.stderr
    again = read_run(tmp_path / "out").records
    assert again[0] == first
    assert len(prompts_seen) == 2  # and not asked again
    assert again[1].value is not None
    assert again[1].value["expected"] != first.value["expected"]


def test_a_chat_template_takes_room_of_the_length(llm, sources: Sources):
    plain, chat = (ruler.room_for(llm, "vt", 4096, chat=chat) for chat in (False, True))
    message = llm.apply_chat_template([{"role": "user", "content": "x"}])
    assert plain.prompt - chat.prompt == len(message) - len(llm.tokenizer.encode("x")) + 1
    drawn = ruler.stream(plain, sources, "vt").sample(0)
    question = ruler._question(llm, "vt", ruler.Stream(lambda: iter([drawn])), 0, chat=True)
    text = llm.tokenizer.decode(question.prompt)
    assert text.startswith("<|user|>Memorize and track the chain(s)")
    assert "<|assistant|> Answer: According to the chain(s)" in text
    assert text.endswith("they are: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "hay"], "task 'hay' is not known; expected one of niah_single_1"),
        (["--task", "niah_single_2"], "niah_single_2 hides its needles in essays; give --haystack"),
        (["--task", "qa_1"], "qa_1 asks questions of a file; give --data qa_1=FILE"),
        (["--data", "qa_1={squad}", "--trials", "99"], "99 trials, but its file has 84 questions"),
        (["--data", "fwe={squad}"], "task fwe has no file; those that have: qa_1, qa_2, cwe"),
        (["--data", "qa_2={squad}"], "is not of the form of HotpotQA's hotpot_dev_distractor_v1"),
        (
            ["--data", "cwe={squad}"],
            "is not a JSON object of words like RULER's english_words.json",
        ),
        (["--task", "vt", "--length", "900"], "900 tokens have no room for RULER's smallest"),
        (["--task", "fwe", "--length", "128"], "128 tokens have no room for RULER's smallest"),
        (["--task", "cwe", "--length", "1M"], "give its english_words.json (--data cwe=FILE)"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path: Path, folder: Path, options, message):
    squad = tmp_path / "squad.json"
    squad.write_text(json.dumps(golden_ruler.SQUAD))
    words = [word.format(squad=squad) for word in options]
    done = invoke("ruler", folder, "--output", tmp_path / "out", *words)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
