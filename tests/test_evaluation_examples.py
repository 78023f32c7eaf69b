"""Examples from a pool: BM25 beside one written out here in float64, and the command of Table 5."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared_fixtures import invoke_eval as invoke

from dca_jax.errors import InputError
from dca_jax.evaluation import examples, few_shot, paper
from dca_jax.evaluation.examples import Choice, Example, Pool, read_pool
from dca_jax.evaluation.results import read_run

pytest.importorskip("bm25s", reason="needs bm25s (the extra `eval`)")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # bm25s' own

QUERIES = [
    "Where does the captain sail?",
    "Who is the captain of the ship?",
    "What is the name of the ship?",
    "Why is the whale white?",
    "Who is Ishmael?",
    "Where does the captain sail?",
    "Summarize it.",
    "",
]
POOL = [Example(f"p{n}", query, f"answer {n}") for n, query in enumerate(QUERIES)]


def bm25(query: str, texts: Sequence[str]) -> np.ndarray:
    """Robertson and Zaragoza's sum over the words of the query, with Lucene's idf, in float64."""
    documents = [re.findall(r"\w+", text.lower()) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = np.zeros(len(documents))
    for word in re.findall(r"\w+", query.lower()):
        holding = sum(word in words for words in documents)
        idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
        for number, words in enumerate(documents):
            often = words.count(word)
            scores[number] += idf * often / (often + 1.5 * (0.25 + 0.75 * len(words) / mean))
    return scores


def ranked(query: str, pool: Sequence[Example], choice: str) -> list[str]:
    scores = bm25(query, [one.query for one in pool]).round(5)  # bm25s has float32
    sign = -1 if choice == "best" else 1
    return [pool[n].id for n in sorted(range(len(pool)), key=lambda n: (sign * scores[n], n))]


@pytest.mark.parametrize("choice", ["best", "worst"])
def test_examples_are_those_of_an_independent_bm25(choice: str) -> None:
    pool = Pool(POOL, Choice(choice))
    for query in (*QUERIES, "Does the ship sail, and where is the captain's ship?", "zebra", "?!"):
        found = [one.id for one in pool.choose(query, ["none of them"], 5, seed=0)]
        assert found == ranked(query, POOL, choice)[:5], query
    # The question itself is no example, but where another answer was given to it.
    found = [one.id for one in pool.choose(QUERIES[0], ["answer 0"], 7, seed=0)]
    assert found == [name for name in ranked(QUERIES[0], POOL, choice) if name != "p0"]
    with pytest.raises(InputError, match="9 examples are needed, but the pool has only 8"):
        pool.choose("Who?", [], 9, seed=0)


def test_random_examples_differ_by_question_and_repeat() -> None:
    pool = Pool(POOL, Choice.random)
    drawn = [[one.id for one in pool.choose("Who?", [], 3, seed)] for seed in range(200)]
    assert all(len(set(ids)) == 3 for ids in drawn)
    assert drawn[5] == [one.id for one in pool.choose("Who?", [], 3, 5)]
    counts = [sum(example.id in ids for ids in drawn) for example in POOL]
    assert all(40 < count < 110 for count in counts)  # 75 each


def test_pools_of_either_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"query": "q1", "output": "a1", "id": "x"}, {"query": "q2", "output": "a2"}]
    assert read_pool(write(tmp_path / "a", lines)) == [
        Example("x", "q1", "a1"),
        Example("1", "q2", "a2"),
    ]
    documents = [{"instructions": ["q1", "q2"], "outputs": ["a1", "a2"]}]
    assert [one.id for one in read_pool(write(tmp_path / "b", documents))] == ["0-0", "0-1"]
    with pytest.raises(InputError, match="line 1 lacks query, output"):
        read_pool(write(tmp_path / "c", [{"input": "q"}]))
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(InputError, match="examples chosen as best need bm25s"):
        Pool(POOL, Choice.best)


def test_l_evals_own_questions(shared: Path) -> None:
    file = shared / "data/l-eval/scientific_qa.jsonl"
    if not file.exists():
        pytest.skip(f"needs {file}")
    pool = read_pool(file)
    for choice in ("best", "worst"):
        items = few_shot.read_files(
            {"qasper": file}, pools={"qasper": file}, choice=Choice(choice)
        )["qasper"]
        assert len(items) == len(pool)
        for item in items[::9]:
            others = [
                one
                for one in pool
                if not (one.query == item.question and one.output in item.references)
            ]
            # Ranked among all, as the index has them, less the question itself.
            order = ranked(item.question, pool, choice)
            allowed = {one.id for one in others}
            assert item.chosen == [name for name in order if name in allowed][:2]
            named = {one.id: (one.query, one.output) for one in pool}
            assert item.examples == [named[name] for name in item.chosen]


def test_a_pool_serves_a_single_document(tmp_path: Path) -> None:
    """Examples from the document's file would need others beside it."""
    line = {"input": "I sail.", "instructions": ["Who is the captain?"], "outputs": ["Ahab"]}
    data = write(tmp_path / "test.jsonl", [line])
    pool = write(tmp_path / "train.jsonl", [one._asdict() for one in POOL])
    (item,) = few_shot.read_files({"qasper": data}, pools={"qasper": pool}, choice=Choice("best"))[
        "qasper"
    ]
    assert item.chosen == ranked("Who is the captain?", POOL, "best")[:2]
    with pytest.raises(InputError, match="have 0 of the 2 that are needed: give more documents"):
        few_shot.read_files({"qasper": data})


def test_the_command_of_table_5(folder: Path, tmp_path: Path) -> None:
    texts = {"input": "I sail. " * 40, "query_examples": ["Old?"], "output_examples": [" Old."]}
    rows = [
        texts | {"query": query, "output": "Ahab", "id": str(n)}
        for n, query in enumerate(("Who is the captain?", "Where is the ship?"))
    ]
    data = write(tmp_path / "test.jsonl", rows)
    pool = write(tmp_path / "train.jsonl", [one._asdict() for one in POOL])
    ask = ("few-shot", folder, "--data", f"qasper={data}", "--output", tmp_path / "out")
    ask += ("--max-length", 700, "--dtype", "float32", "--pool", f"qasper={pool}")
    done = invoke(*ask, "--examples", "best", "--paper", "llama2-7b")
    assert done.exit_code == 0, done.output
    run = read_run(tmp_path / "out")
    for record, row in zip(run.records, rows, strict=True):
        assert record.value["examples"] == ranked(row["query"], POOL, "best")[:2]
    assert run.settings["examples"] == "best"
    assert set(run.files) == {"qasper", "qasper (pool)"}
    assert "### Few-shot scores, examples: best" in done.stdout
    assert "| 27.30 |" in done.stdout  # the paper's
    for changes, message in (
        ((*ask, "--examples", "worst"), "its examples is 'best', not 'worst'"),
        ((*ask[:-2], "--examples", "best"), "--examples needs --pool"),
        ((*ask[:-1], f"narrativeqa={pool}"), "a pool is for a task with examples: qasper"),
        ((*ask[:-1], "qasper"), "--pool takes TASK=FILE"),
    ):
        bad = invoke(*changes)
        assert bad.exit_code == 2
        assert message in bad.stderr
    pool.write_text(pool.read_text() + json.dumps({"query": "More?", "output": "Yes"}) + "\n")
    bad = invoke(*ask, "--examples", "best")
    assert "on other data: the contents of train.jsonl are not those" in bad.stderr


def test_table_5_holds_together() -> None:
    """Random examples are those of Table 3."""
    for model in ("llama2-7b", "llama2-13b"):
        random = paper.IN_CONTEXT["random"][model]["dca"]
        assert random == {task: paper.FEW_SHOT[model]["dca"][task] for task in random}
    assert set(paper.IN_CONTEXT) == set(examples.Choice)


def write(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
