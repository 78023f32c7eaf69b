"""`eval few-shot` and `eval l-eval`: scorers, prompts, and runs on the real files."""

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from shared_fixtures import invoke_eval as invoke

import dca_jax
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.evaluation import answers, few_shot, l_eval, scrolls
from dca_jax.evaluation.answers import answer, answer_about
from dca_jax.evaluation.benchmark_files import Document, read_json_lines
from dca_jax.evaluation.l_eval import choice_score, chosen_letters, right_letters, scores_of
from dca_jax.evaluation.results import read_run

# --- scores of SCROLLS -------------------------------------------------------------------------


def test_f1_and_exact_match():
    assert scrolls.normalized("The  cat, on a MAT!") == "cat on mat"
    assert scrolls.exact_match("The cat.", ["dog", "cat"]) == 1.0
    assert scrolls.exact_match("cats", ["dog", "cat"]) == 0.0
    assert scrolls.f1("the black cat", ["a cat", "dog"]) == pytest.approx(2 / 3)
    assert scrolls.f1("", ["cat"]) == 0.0
    assert scrolls.f1("cat cat", ["cat"]) == pytest.approx(2 / 3)


def test_the_example_of_scrolls():
    """The figures of its own documentation."""
    pairs = [
        ("exact match example", ["exact match example"]),
        ("hello there", ["hello", "hi there"]),
        ("general kenobi", ["commander kenobi"]),
    ]
    values = [scrolls.MEASURES["f1"](*pair) for pair in pairs]
    assert scrolls.score("f1", values) == pytest.approx(72.2222, abs=1e-4)
    values = [scrolls.MEASURES["exact_match"](*pair) for pair in pairs]
    assert scrolls.score("exact_match", values) == pytest.approx(33.3333, abs=1e-4)
    pytest.importorskip("rouge_score")
    values = [scrolls.MEASURES["rouge"](*pair) for pair in pairs]
    assert scrolls.score("rouge", values) == pytest.approx(55.8136, abs=1e-4)


# --- scores of L-Eval --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "rows", "scores"),
    [
        (
            "tpo",  # one letter, the first there is
            [
                ("A. to see more of them", "A"),
                ("The answer is C.", "B"),
                ("(C) because", "C"),
                ("D", "(D) No bread is left."),
            ],
            {"exact_match": 75.0},  # 3 of 4
        ),
        (
            "coursera",  # letters; some of them and no other are worth a quarter
            [("C", "C"), ("A, B.", "ABD"), ("A", "B"), ("AC", "AC"), ("A, B, C and D.", "ABD")],
            {"exact_match": 45.0},  # (1 + 1/4 + 0 + 1 + 0) / 5
        ),
        (
            "sci_fi",
            [
                (" True [fact: False. Nobody has flown there]", "True [fact: False]"),
                ("It is false. [fact:  False]", "False [fact: True]"),
                ("No [fact: true]", "True [fact: True]"),
                ("True", "True [fact: False]"),
            ],
            {"exact_match": 62.5, "loyalty": 75.0, "fact": 50.0},  # 3 and 2 of 4
        ),
    ],
)
def test_scores_of_a_file_by_hand(tmp_path, task, rows, scores):
    lines = ({"query": "?", "gt": right, "m_pred": said} for said, right in rows)
    assert l_eval.score_file(write_lines(tmp_path / "m.pred.jsonl", *lines), task) == scores


@pytest.mark.parametrize(
    ("file", "task", "score", "published"),
    [
        # Published: in ChunkLlama's Table 4, where GPT-3.5 and Claude are L-Eval's figures.
        ("turbo-16k-0613-tpo", "tpo", 78.43866, 78.43),
        ("turbo-16k-0613-quality", "quality", 61.38614, 61.38),
        ("turbo-16k-0613-coursera", "coursera", 63.51744, 63.51),
        # One of 269 answers more than published; every version of L-Eval's scorer gives this.
        ("Claude-100k-tpo", "tpo", 84.01487, 83.64),
        # These two stand in each other's place in the paper.
        ("Claude-100k-quality", "quality", 73.76238, 73.76),
        ("Claude-100k-coursera", "coursera", 60.02907, 60.03),
    ],
)
def test_scores_of_published_predictions(shared, file, task, score, published):
    path = shared / "data/reference-predictions" / f"{file}.pred.jsonl"
    if not path.exists():
        pytest.skip(f"needs {path}")
    found = l_eval.score_file(path, task)
    assert found == {"exact_match": pytest.approx(score, abs=1e-4)}
    assert abs(score - published) < (0.38 if "Claude-100k-tpo" in file else 0.01)


def test_scores_of_chunkllamas_own_predictions(shared):
    path = shared / "data/reference-predictions/chunkllama2-chat-7b-sci_fi.pred.jsonl"
    if not path.exists():
        pytest.skip(f"needs {path}")
    found = l_eval.score_file(path, "sci_fi")
    assert found == {"exact_match": 60.9375, "loyalty": 60.9375, "fact": 60.9375}


@pytest.mark.parametrize(
    ("said", "one", "several"),
    [
        ("B", "B", "B"),
        ("(B) because of A", "B", "B"),  # nothing follows the "A"
        ("The answer is C.", "C", "C"),
        ("Because D", "B", "B"),  # the first capital there is
        ("CD", "CD", "CD"),  # a piece of "ABCD" is taken whole
        ("DA", "D", "AD"),
        ("A, C and D.", "A", "ACD"),
        ("A. C. Question B.", "A", "AC"),
        ("none of these", "A", "A"),  # a guess
        ("", "", ""),
        (" \n", "", ""),
    ],
)
def test_chosen_letters(said, one, several):
    assert chosen_letters(said, several=False) == one
    assert chosen_letters(said, several=True) == several


def test_scores_of_choices():
    assert right_letters("(B) Korvin said so.") == "B"
    assert right_letters("ABD") == "ABD"
    assert [choice_score(c, "ABD") for c in ("ABD", "AB", "ABC", "C", "")] == [1, 0.25, 0, 0, 0]
    assert scores_of("tpo", ["B", "", "A"], ["B", "B", "C"]) == {
        "exact_match": pytest.approx(100 / 3)
    }
    said = ["It is true. [fact: No]", " False [fact: so TRUE]", "[fact: false]"]
    right = ["True [fact: False]", "False [fact: True]", "True [fact: False]"]
    assert scores_of("sci_fi", said, right) == {
        "exact_match": pytest.approx(200 / 3),
        "loyalty": pytest.approx(200 / 3),
        "fact": pytest.approx(200 / 3),
    }


# --- prompts -----------------------------------------------------------------------------------


def test_l_evals_prompts_are_those_of_chunkllama(shared):
    path = shared / "data/reference-predictions/chunkllama2-chat-7b-sci_fi.pred.jsonl"
    if not path.exists():
        pytest.skip(f"needs {path}")
    row = json.loads(path.read_text().splitlines()[0])
    assert l_eval.prompt_text("sci_fi", "{document}", "{inst}") == row["prompt"]
    fact = l_eval.fact_text(row["query"])
    assert "True or False? Answer this question based on the real-world knowledge" in fact
    assert fact.endswith("last training\nAnswer:")


def test_system_prompts_are_those_of_l_eval(shared):
    for file, task in (("quality", "quality"), ("tpo", "tpo"), ("coursera", "coursera")):
        path = shared / "data/reference-predictions" / f"turbo-16k-0613-{file}.pred.jsonl"
        if not path.exists():
            pytest.skip(f"needs {path}")
        assert json.loads(path.read_text().splitlines()[0])["prompt"].startswith(
            l_eval.SYSTEM[task].strip()
        )


@pytest.mark.parametrize(
    ("made", "published"),  # SHA-256 of what stands in the published files
    [
        (
            l_eval.prompt_text("sci_fi", "{document}", "{inst}"),
            "9a42a1154f086c7cece6b09a8304612db98d6e4bf2910dfacc9281c83f49e7c6",
        ),
        (
            l_eval.SYSTEM["quality"].strip(),
            "03e2975df3d80280ffe89360cf3582aa39f05584d79096e434546180be5ce694",
        ),
        (
            l_eval.SYSTEM["tpo"].strip(),
            "03e2975df3d80280ffe89360cf3582aa39f05584d79096e434546180be5ce694",
        ),
        (
            l_eval.SYSTEM["coursera"].strip(),
            "e12f5919b35bf7ceb223cd98a915adfbc9272856ecd379511682d873d49f0bf8",
        ),
    ],
    ids=["chunkllama-sci_fi", "quality", "tpo", "coursera"],
)
def test_prompts_are_the_published_ones_to_the_letter(made, published):
    assert hashlib.sha256(made.encode()).hexdigest() == published


def test_few_shot_prompts():
    item = few_shot.Item("1", "", "Who?", [("Where?", " There."), ("When?", " Then.")], ["Me"])
    assert few_shot.prompt_text(item, "Text.") == (
        "Text.\n\nQuestion: Where? \nAnswer: There.\n\nQuestion: When? \nAnswer: Then."
        "\n\nQuestion: Who? \nAnswer:"
    )
    for said, given in [
        (" Ahab.\n\nQuestion: Why?", " Ahab.\n\n"),
        ("\nQuestion: x\nQuestion: yes", " x\n"),
        ("7", "7"),
        ("", ""),
    ]:
        assert few_shot.first_answer(said) == given


@pytest.mark.parametrize("side", ["left", "right"])
def test_documents_are_cut_as_the_original_cuts_them(side):
    """Against the loop of ChunkLlama's scripts, with a count of tokens that is not one a word."""
    words = [f"w{n}" for n in range(1000)]

    def count(text: str) -> int:
        return sum(1 + (word[-1] in "369") for word in text.split(" ") if word) + 1

    room = 700
    text, cnt = " ".join(words), 0
    while count(text) > room - 200:
        parts = text.split(" ")
        text = " ".join(parts[cnt - room :] if side == "left" else parts[: room - cnt])
        cnt += 100
    assert Document(" ".join(words), room - 200, room, side).cut(count) == text
    assert ("w999" in text.split()) == (side == "left")
    assert Document("short", room - 200, room, side).cut(count) == "short"
    with pytest.raises(InputError, match="are no room for a document"):
        Document("a b c", 0, room, side).cut(count)


# --- one document, many questions --------------------------------------------------------------


def test_a_document_is_read_once_for_all_its_questions(paper_llm, monkeypatch):
    rng = np.random.default_rng(0)
    document = rng.integers(6, 300, 150).tolist()
    prompts = [[*document, *rng.integers(6, 300, n).tolist()] for n in (3, 20, 1)]
    alone = [answer(paper_llm, [prompt], 12, capacity=200)[0] for prompt in prompts]
    read: list[int] = []
    assert answer_about(paper_llm, prompts, 12, read.append) == alone
    assert sum(read) == sum(map(len, prompts))
    assert answers._shared_tokens(prompts) == 150
    assert answers._shared_tokens([[1, 2, 3], [1, 2, 3]]) == 2
    assert answers._shared_tokens([[1, 2], [2, 2]]) == 0
    # Nothing is shared where the reading depends on a prompt's own length.
    hot = DCAConfig.paper(64, temperature_slope=0.1)
    model = paper_llm.model.from_params(
        paper_llm.model.config, paper_llm.model.params(), dca=hot, dtype="float32"
    )
    hot_llm = dataclasses.replace(paper_llm, model=model)
    monkeypatch.setattr(dca_jax.LLM, "prefill", lambda *_, **__: pytest.fail("was read apart"))
    assert len(answer_about(hot_llm, prompts[:2], 2)) == 2


# --- files -------------------------------------------------------------------------------------


def write_lines(path: Path, *rows: dict) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def chunkllama_row(**changes) -> dict:
    row = {"input": "A long text. " * 9, "query": "Who?", "output": "Ahab", "id": "7", "pid": "7_0"}
    return row | {"query_examples": ["Where?"], "output_examples": [" Here."]} | changes


def test_files_of_either_form(tmp_path):
    path = write_lines(tmp_path / "a", chunkllama_row(), chunkllama_row(output="The captain"))
    (item,) = few_shot.read_items(path, "qasper")
    assert item.references == ["Ahab", "The captain"]  # lines of one id are one question
    assert item.examples == [("Where?", " Here.")]
    rows = [
        {"input": f"Text {n}", "instructions": ["q1", "q2"], "outputs": ["a", "b"]}
        for n in range(3)
    ]
    items = few_shot.read_items(write_lines(tmp_path / "b", *rows), "qasper")
    assert [item.id for item in items] == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]
    assert all(len(item.examples) == 2 for item in items)
    assert few_shot.read_items(tmp_path / "b", "qasper") == items  # the same draw
    with pytest.raises(InputError, match="examples are drawn from the other documents"):
        few_shot.read_items(write_lines(tmp_path / "c", rows[0]), "qasper")
    (tmp_path / "d").write_text("{}\n")
    with pytest.raises(InputError, match="line 1 lacks input"):
        few_shot.read_items(tmp_path / "d", "qasper")
    (tmp_path / "e").write_text("no\n")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        read_json_lines(tmp_path / "e")
    (tmp_path / "f").write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        read_json_lines(tmp_path / "f")


# --- the commands ------------------------------------------------------------------------------


def test_few_shot_runs_scores_and_goes_on(folder, tmp_path):
    rows = [chunkllama_row(id=str(n), input=f"I {n} " * 300) for n in range(3)]
    path = write_lines(tmp_path / "a.jsonl", *rows)
    ask = ("few-shot", folder, "--data", f"qasper={path}", "--output", tmp_path / "out")
    ask += ("--max-length", 464, "--dtype", "float32")
    done = invoke(*ask, "--limit", 2)
    assert done.exit_code == 0, done.output
    lines = (tmp_path / "out/results.jsonl").read_text()
    more = invoke(*ask, "--paper", "llama2-7b")
    assert more.exit_code == 0, more.output
    assert (tmp_path / "out/results.jsonl").read_text().startswith(lines)
    records = read_run(tmp_path / "out").records
    assert [r.key["id"] for r in records] == ["0", "1", "2"]
    assert all(r.value["references"] == ["Ahab"] for r in records)
    score = 100 * sum(r.value["f1"] for r in records) / 3
    assert "| method | qasper | paper | average | paper |" in more.stdout
    assert f"| dca:chunkllama | {score:.2f} | 28.20 | {score:.2f} | 28.20 |" in more.stdout
    assert "Questions: 3 of qasper (dca:chunkllama)." in more.stdout
    assert all(150 < r.value["tokens"] <= 464 - 64 for r in records)


@pytest.fixture
def short_answers(monkeypatch):
    """Of models that find no end: a token takes long as the tests compile."""
    monkeypatch.setattr(l_eval, "NEW_TOKENS", 16)


@pytest.mark.slow
@pytest.mark.usefixtures("short_answers")
def test_l_eval_on_the_real_files(shared, tmp_path):
    """Scores of a model of 656k parameters are noise; the run, its files and resumption count."""
    data, model = shared / "data/l-eval", shared / "models/tinystories-656k"
    if not (data.exists() and model.exists()):
        pytest.skip(f"needs {data} and {model}")
    ask = ("l-eval", model, "--data", f"sci_fi={data}/sci_fi.jsonl", "--method", "dca")
    ask += ("--data", f"tpo={data}/tpo.jsonl", "--max-length", 1400, "--dtype", "float32")
    done = invoke(*ask, "--limit", 1, "--output", tmp_path / "out", "--paper", "llama2-7b-chat")
    assert done.exit_code == 0, done.output
    records = read_run(tmp_path / "out").records
    parts = [(r.key["task"], r.key["part"]) for r in records]
    assert parts == [("sci_fi", "document"), ("sci_fi", "world"), ("tpo", "document")]
    scores = json.loads((tmp_path / "out/summary.json").read_text())["scores"]["dca"]
    assert set(scores["sci_fi"]) == {"exact_match", "loyalty", "fact"}
    assert "| 57.62 |" in done.stdout  # the paper's
    assert "Questions: 1 of tpo, 1 of sci_fi (dca)." in done.stdout
    size = (tmp_path / "out/results.jsonl").stat().st_size
    assert invoke(*ask, "--limit", 1, "--output", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out/results.jsonl").stat().st_size == size


def test_few_shot_on_the_real_files(shared, tmp_path):
    pytest.importorskip("rouge_score")
    data, model = shared / "data/l-eval", shared / "models/tinystories-656k"
    if not (data.exists() and model.exists()):
        pytest.skip(f"needs {data} and {model}")
    files = {"qasper": "scientific_qa", "qmsum": "meeting_summ"}
    done = invoke(
        *("few-shot", model, "--limit", 1, "--max-length", 700, "--output", tmp_path / "out"),
        *(a for t, f in files.items() for a in ("--data", f"{t}={data}/{f}.jsonl")),
    )
    assert done.exit_code == 0, done.output
    values = {r.key["task"]: r.value for r in read_run(tmp_path / "out").records}
    assert {name for value in values.values() for name in value} >= {"f1", "rougeL"}
    scores = json.loads((tmp_path / "out/summary.json").read_text())["scores"]["dca:chunkllama"]
    assert all(math.isfinite(score) for score in scores.values())


@pytest.mark.slow
@pytest.mark.usefixtures("short_answers")
def test_l_eval_by_a_chat_template(folder, tmp_path):
    rows = [{"input": "Text. " * 90, "instructions": ["A or B?\nA. a\nB. b"], "outputs": ["A"]}]
    path = write_lines(tmp_path / "a.jsonl", *rows)
    ask = ("l-eval", folder, "--data", f"tpo={path}", "--max-length", 1400)
    done = invoke(*ask, "--chat", "--output", tmp_path / "chat")
    assert done.exit_code == 0, done.output
    plain = invoke(*ask, "--output", tmp_path / "plain")
    assert plain.exit_code == 0, plain.output
    (chat,), (llama,) = (read_run(tmp_path / name).records for name in ("chat", "plain"))
    assert chat.value["tokens"] != llama.value["tokens"]
    assert chat.value["reference"] == "A"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["few-shot", "--data", "qasper"], "--data takes TASK=FILE"),
        (["few-shot", "--data", "qasper=none"], "none is not a file"),
        (["few-shot", "--data", "news={file}"], "task 'news' is not known; expected one of narr"),
        (["few-shot", "--data", "qasper={file}", "--max-length", "264"], "must be more than 264"),
        (["l-eval", "--data", "news={file}"], "task 'news' is not known; expected one of tpo"),
        (["l-eval", "--data", "tpo={file}"], "line 1 lacks instructions, outputs"),
        (["l-eval", "--data", "tpo={file}", "--max-length", "512"], "must be more than 712"),
    ],
)
def test_bad_commands_are_one_message(folder, tmp_path, arguments, message):
    path = write_lines(tmp_path / "a.jsonl", chunkllama_row())
    command, *rest = (argument.format(file=path) for argument in arguments)
    done = invoke(command, folder, *rest, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert message in done.stderr


# --- files of other types ----------------------------------------------------------------------

PAIR = {"input": "A text.", "instructions": ["Who?"], "outputs": ["A"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": ["A text."]}, "line 2: input is ['A text.'], expected a string"),
        ({"input": None}, "line 2: input is None, expected a string"),
        ({"input": "\ud83d"}, "line 2: input contains half of a surrogate pair"),
        ({"instructions": "Who?"}, "line 2: instructions is 'Who?', expected a list of strings"),
        ({"outputs": "A"}, "line 2: outputs is 'A', expected a list of strings"),
        ({"instructions": [5]}, "line 2: instructions, item 1, is 5, expected a string"),
        ({"outputs": [["A"]]}, "line 2: outputs, item 1, is ['A'], expected a string"),
        ({"outputs": [" "]}, "line 2: outputs, item 1, is empty, expected an answer"),
        ({"outputs": ["A", "B"]}, "line 2: there are 1 instructions and 2 outputs"),
    ],
)
@pytest.mark.parametrize("command", ["l-eval", "few-shot"])
def test_other_types_in_l_evals_files_are_refused_before_the_model_is_read(
    tmp_path, command, changes, message
):
    path = write_lines(tmp_path / "a.jsonl", PAIR, PAIR | changes, PAIR)
    done = invoke(command, tmp_path / "no model", "--data", f"quality={path}")
    assert done.exit_code == 2
    assert f"{path}: {message}" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": {"text": "Who?"}}, "line 1: query is {'text': 'Who?'}, expected a string"),
        ({"output": ["Ahab"]}, "line 1: output is ['Ahab'], expected a string"),
        ({"output": ""}, "line 1: output is empty, expected an answer"),
        ({"id": True}, "line 1: id is True, expected a string"),
        ({"id": [1]}, "line 1: id is [1], expected a string"),
        ({"query_examples": "Where?"}, "line 1: query_examples is 'Where?', expected a list"),
        ({"query_examples": []}, "line 1: there are 0 query_examples and 1 output_examples"),
    ],
)
def test_other_types_in_chunkllamas_files_are_refused(tmp_path, changes, message):
    path = write_lines(tmp_path / "a.jsonl", chunkllama_row(**changes))
    with pytest.raises(InputError, match=re.escape(f"{path}: {message}")):
        few_shot.read_items(path, "qasper")


def test_a_string_may_hold_any_character_and_a_file_may_begin_with_a_mark(tmp_path):
    """RFC 8259: only line feeds end a line of JSON lines."""
    row = PAIR | {"input": "one\u2028two\u0085three"}
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for _ in range(2))
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8-sig")
    assert l_eval.read_files({"tpo": tmp_path / "a.jsonl"})["tpo"] == [row, row]
    (tmp_path / "b.jsonl").write_bytes('{"input": "caf\xe9"}\n'.encode("latin1"))
    with pytest.raises(InputError, match="is not UTF-8 text"):
        l_eval.read_files({"tpo": tmp_path / "b.jsonl"})
    empty = write_lines(tmp_path / "c.jsonl", PAIR | {"instructions": [], "outputs": []})
    for read in (l_eval.read_files, few_shot.read_files):
        with pytest.raises(InputError, match=r"has no question|examples are drawn"):
            read({"quality": empty})
    predictions = write_lines(tmp_path / "p.jsonl", {"gt": "A", "m_pred": 5})
    with pytest.raises(InputError, match="prediction 1: m_pred is 5, expected a string"):
        l_eval.score_file(predictions, "tpo")


def test_of_lines_with_one_id_the_last_is_asked(tmp_path):
    """ChunkLlama's script asks all and keeps what it said to the last."""
    rows = [
        chunkllama_row(output=said, input=f"Text {n}.", query_examples=[f"Example {n}?"])
        for n, said in enumerate(("Ahab", "The captain", "He"))
    ]
    other = chunkllama_row(id=8)
    path = write_lines(tmp_path / "a", rows[0], other, *rows[1:])
    first, second = few_shot.read_items(path, "qasper")
    assert (first.document, first.examples) == ("Text 2.", [("Example 2?", " Here.")])
    assert first.references == ["Ahab", "The captain", "He"]
    assert second.id == "8"
