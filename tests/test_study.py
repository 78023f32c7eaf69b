"""`benchmarks/real_model.py`, on a tiny random model: what is read, what is kept, what is shown."""

import dataclasses
import functools
import json
import math
import operator

import numpy as np
import pytest
import real_model
import study_cells
import study_finetune
import study_report
from study_cells import Cell, Extent, plan
from study_reading import Given, Reading, is_done
from study_workers import read_cells

import dca_jax
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.evaluation import answers, plots
from dca_jax.evaluation.intervals import wilson
from dca_jax.evaluation.results import read_run
from dca_jax.evaluation.ruler.sources import Sources, word_lists
from dca_jax.evaluation.windows import make_windows
from dca_jax.inference.methods import METHODS, method_by_name
from dca_jax.inference.score import token_nll

pytestmark = pytest.mark.benchmarks

EXTENT = Extent(
    trained=8192,
    windows=(512, 131_072),
    lengths=(4096, 16_384, 65_536),
    samples=100,
    texts=16,
    ruler=("vt",),
)


def test_the_most_useful_cells_come_first_and_each_once():
    cells = plan(EXTENT)
    assert len(set(cells)) == len(cells)
    first = [cell.method for cell in cells[:6]]
    dca = ["dca:paper", "dca:3072,4095", "dca:1536,2047", "dca:chunkllama"]
    assert first == ["rope", "yarn", *dca]
    assert {(cell.part, cell.length, cell.samples) for cell in cells[:6]} == {
        ("passkey", 16_384, 100)
    }
    assert {cell.method for cell in cells[6:12]} == set(first)
    assert all(cell.part == "perplexity" and cell.length == 512 for cell in cells[6:12])
    long = [n for n, cell in enumerate(cells) if cell.length == 131_072]
    ablation = [n for n, cell in enumerate(cells) if cell.method == "dca:paper@0.1"]
    assert ablation[0] < long[0]
    # Every name, new ones of the library too, has a place in perplexity and in retrieval.
    for part in ("perplexity", "passkey", "needle", "ruler"):
        there = {cell.method for cell in cells if cell.part == part}
        assert set(METHODS) - set(study_cells.LEFT_OUT) <= there
    assert len({cell.folder for cell in cells}) == len(cells)
    some = plan(EXTENT._replace(methods=("string",)))
    assert {cell.method for cell in some} == {"string"}
    few = real_model.chosen(EXTENT, ["l-eval", "few-shot-best"], {"tpo"})
    assert {(cell.part, cell.task) for cell in few} == {("l-eval", "tpo")}
    with pytest.raises(InputError, match="part 'tales' is not known"):
        real_model.chosen(EXTENT, ["tales"], set())


def test_the_ablation_differs_in_one_thing_each(plain_llm):
    config = plain_llm.model.config
    c = 8192
    settings = {
        name: method_by_name(name, config, 2 * c, trained_length=c).dca
        for name in study_cells.ablation(c)
    }
    assert len(set(settings)) == len(settings)
    found = {(s.max_query_position, s.chunk_len, s.temperature_slope) for s in settings.values()}
    sizes = {(q - 1, 3 * q // 4, 0) for q in (6144, 4096, 3072, 2048, 1024)}
    strides = {(8191, s, 0) for s in (2048, 4096, 8191)} | {
        (4095, s, 0) for s in (1024, 2048, 3072, 4095)
    }
    warm = {(8191, 6144, 0.05), (8191, 6144, 0.1), (4095, 3072, 0.1), (6144, 5120, 0.05)}
    assert found == sizes | strides | warm


def test_a_method_that_the_model_does_not_take_is_left_out_unless_it_was_asked_for(
    plain_llm, capsys
):
    cells = [Cell("passkey", "", name, 512, 1) for name in ("rope", "dca:99,9", "yarn")]
    config = plain_llm.model.config
    assert real_model.readable(cells, config, ()) == [cells[0], cells[2]]
    assert "without dca:99,9: chunk_len (99) must not exceed" in capsys.readouterr().out
    with pytest.raises(InputError, match="must not exceed"):
        real_model.readable(cells, config, ["dca:99,9"])


@pytest.fixture
def given(folder, tmp_path):
    text = tmp_path / "book.txt"
    words = np.random.default_rng(0).choice(["whale", "sea", "ship", "me"], 3000)
    text.write_text(" ".join(words) + ".")
    return Given(
        model=str(folder),
        text=text,
        haystack=text,
        questions=None,
        out=tmp_path / "study",
        identity={
            "model": "tiny",
            "trained_length": 64,
            "dtype": "float32",
            "device": "cpu",
            "texts": {"book.txt": "0"},
        },
        dtype="float32",
        rows=2,
        longest=512,
    )


@pytest.fixture
def letter_b(plain_llm, monkeypatch):
    """In place of a model's answer: the letter B, whatever is asked."""

    def generate(model, prompts, **options):
        return [plain_llm.tokenizer("B.", add_special_tokens=False).input_ids for _ in prompts]

    monkeypatch.setattr(answers, "generate", generate)
    monkeypatch.setattr(answers, "answer_about", answers.answer)


@pytest.mark.usefixtures("letter_b")
def test_cells_are_read_once_and_reported(given, capsys):
    study = Reading(given)
    cells = [Cell("perplexity", "", name, 256, 2) for name in ("rope", "dca:paper")]
    cells.append(Cell("passkey-chat", "", "dca:paper", 400, 2))
    log = study_report.Log(given.out, given.identity)
    with pytest.raises(InputError, match="no results yet"):
        study_report.write(given.out)
    for cell in cells:
        assert not is_done(given.out, cell)
        study.read(cell)
        assert is_done(given.out, cell)
        assert not is_done(given.out, cell._replace(samples=3))
    before = (given.out / cells[-1].folder / "results.jsonl").read_text()
    study.read(cells[-1])
    assert (given.out / cells[-1].folder / "results.jsonl").read_text() == before
    log.add({"versions": {"jax": "0"}, "minutes": 1.0})
    study_report.write(given.out)
    shown = capsys.readouterr().out
    assert "Best by task" in shown
    assert "jax 0; 1 runs, 1 minutes" in shown
    found = json.loads((given.out / "report/results.json").read_text())
    rows = {(row["part"], row["method"]): row for row in found["rows"]}
    # The same windows, read by the function that knows no study.
    records = read_run(given.out / cells[0].folder).records
    windows = make_windows("paper", len(study.tokens), 256)
    starts = [windows[0].start, windows[len(windows) // 2].start]
    assert [record.key["start"] for record in records] == starts
    expected = [
        float(token_nll(study.llm.model, study.tokens[None, r.key["start"] :][:, :256]).mean())
        for r in records
    ]
    row = rows["perplexity", "rope"]
    assert row["nll"] == pytest.approx(np.mean(expected), abs=1e-4)
    half = abs(expected[0] - expected[1]) / 2  # two values: their error of the mean
    assert row["nll_standard_error"] == pytest.approx(half, abs=1e-4)
    row = rows["passkey-chat", "dca:paper"]
    assert (row["accuracy"], row["samples"], row["low"]) == (0, 2, 0)
    assert row["high"] == pytest.approx(1.959964**2 / (2 + 1.959964**2))
    pictures = {path.name for path in (given.out / "report").glob("*.png")}
    assert pictures == {
        "settings.png",
        "perplexity-methods-perplexity.png",
        "passkey-chat-methods-accuracy.png",
    }
    with pytest.raises(InputError, match="another dtype, device"):
        study_report.Log(given.out, given.identity | {"device": "H200", "dtype": "bfloat16"})


@pytest.mark.usefixtures("letter_b")
def test_every_part_is_asked_and_shown(given, tmp_path, monkeypatch):
    questions = tmp_path / "l-eval"
    questions.mkdir()
    lines = [
        {"input": "A ship. " * 400, "instructions": [f"Who {n}?", "Which?"], "outputs": ["B", "A"]}
        for n in range(2)
    ]
    for name in ("tpo", "scientific_qa"):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (questions / f"{name}.jsonl").write_text(text)
    study = Reading(dataclasses.replace(given, questions=questions))
    study.sources = Sources(words=word_lists(), essays=None, more_words=None, questions={})
    monkeypatch.setattr(plots, "_save", lambda figure, path: None)  # it takes most of the time
    study_report.Log(given.out, given.identity)
    wanted = {
        ("passkey", ""): 0,
        ("passkey-paper", ""): 0,
        ("needle", "single"): 0,
        ("ruler", "niah_single_1"): 0,
        ("l-eval", "tpo"): 0.5,
        ("few-shot-best", "qasper"): 0.5,
        ("few-shot-random", "qasper"): 0.5,
    }
    for part, task in wanted:
        for method in ("rope", "dca:24,40"):
            study.read(Cell(part, task, method, 4096, 4))
    study_report.write(given.out)
    rows = json.loads((given.out / "report/results.json").read_text())["rows"]
    assert len(rows) == 2 * len(wanted)
    for row in rows:
        assert row["accuracy"] == wanted[row["part"], row["task"]]
        assert (row["samples"], row["tokens"]) == (4, 4096)
        low, high = wilson(row["accuracy"], 4)
        assert (row["low"], row["high"]) == (low, high)
    figure = study_report.settings_figure(rows, given.identity["trained_length"])
    titles = [axes.get_title() for axes in figure.axes if axes.axison]
    assert titles == [f"{part} {task}".strip() + ", 4k" for part, task in sorted_as_parts(wanted)]
    for axes in figure.axes[: len(wanted)]:
        assert [text.get_text() for text in axes.get_yticklabels()] == ["rope", "dca:24,40"]
        assert len(axes.containers) == 2


def sorted_as_parts(kinds):
    return sorted(kinds, key=lambda kind: list(study_cells.PARTS).index(kind[0]))


def test_a_cell_that_fails_is_not_done(given):
    study = Reading(given)
    cell = Cell("passkey", "", "rope", 40, 1)
    with pytest.raises(InputError, match=r"1 of 1 samples failed: .*at least"):
        study.read(cell)
    assert not is_done(given.out, cell)


def test_changes_of_perplexity():
    assert study_report.change([]) == ""
    assert study_report.change([math.log(1.5)]) == "+50.0"
    # Differences 0 and 0.02: mean 0.01, standard error 0.01.
    assert (
        study_report.change([0.0, 0.02]) == f"+1.0 ± {100 * math.exp(0.01) * 1.959964 * 0.01:.1f}"
    )
    assert study_report.change([6.0]) == "x 403"


@pytest.mark.processes
def test_workers_read_all_and_end_with_the_time(tmp_path):
    cells = [Cell("passkey", "", name, n, 1) for name in ("a", "b") for n in (1, 2)]
    cells.insert(1, Cell("passkey", "", 0, 3, 1))  # a name that is no text
    done = []
    options = {"logs": tmp_path, "on_done": done.append}
    make = functools.partial(operator.attrgetter, "folder")  # in place of a model
    assert read_cells(cells, make, minutes=5, workers=2, **options)
    assert {one.cell for one in done} == set(cells)
    for one in done:
        if one.cell.method == 0:
            assert "has no attribute 'replace'" in one.failed
        else:
            assert (one.found, one.failed) == (one.cell.folder, None)
    done.clear()
    assert not read_cells(cells, make, minutes=0, workers=1, **options)
    assert done == []


@pytest.mark.slow
def test_finetuning_by_both_gradients(folder, tmp_path):
    """On rows of several chunks the detached gradient is another; what is written can be read."""
    words = "The whale swam. The ship sank. " * 40
    for name in ("book", "apart"):
        (tmp_path / f"{name}.txt").write_text(words)
    talk = [{"instruction": "Who swam?", "input": "", "output": "The whale, I think."}] * 3
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    out = tmp_path / "out"
    options = {"length": "256", "method": "dca:24,40", "steps": 2, "batch": 1, "dtype": "float32"}
    texts = {"book": [tmp_path / "book.txt"], "held_out": tmp_path / "apart.txt"}
    study_finetune.run(str(folder), data=[tmp_path / "talk.json"], out=out, **texts, **options)
    found = json.loads((out / "results.json").read_text())
    errors = found["gradient_error"]
    assert errors["q_proj"] > 1e-3
    assert errors["k_proj"] > 1e-3
    exact, detached = found["runs"]["exact"], found["runs"]["detached"]
    assert exact["held_out_before"] == detached["held_out_before"]
    assert exact["held_out_after"] < exact["held_out_before"]
    tuned = dca_jax.load(out / "exact/model")
    assert tuned.model.dca == DCAConfig(chunk_len=24, max_query_position=40)
    assert tuned.model.config.trained_length == dca_jax.load(folder).model.config.trained_length
