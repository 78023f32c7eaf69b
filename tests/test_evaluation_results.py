"""The log of a run, what is made of it, and the page of many runs."""

import json
import math
import re
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
from shared_fixtures import invoke_eval
from typer.testing import CliRunner

from dca_jax.cli.measure import app
from dca_jax.errors import InputError
from dca_jax.evaluation import paper, report, windows
from dca_jax.evaluation.results import ResultLog, in_batches, read_run
from dca_jax.evaluation.tables import Table, number, tokens
from dca_jax.inference import progress

SETTINGS = {"model": "tiny", "form": "paper", "trained_length": 64, "tokens": 99}


def key(start: int, method: str = "rope") -> dict:
    return {"method": method, "length": 128, "start": start}


def test_a_run_goes_on_where_it_was(tmp_path):
    with ResultLog(tmp_path / "a", "perplexity", SETTINGS) as log:
        log.add(key(0), {"nll": 1.5, "weight": 1, "tokens": 9}, seconds=0.25)
        log.fail(key(1), ValueError("too long"), seconds=0.0)
        # What is said is on the disk already, a line each.
        lines = (tmp_path / "a/results.jsonl").read_text().splitlines()
        assert [json.loads(line)["key"]["start"] for line in lines] == [0, 1]
        assert json.loads(lines[1])["error"] == "ValueError: too long"
    with (tmp_path / "a/results.jsonl").open("ab") as file:  # killed while it wrote
        file.write(b'{"key": {"method": "rope", "len')
    assert len(read_run(tmp_path / "a").records) == 2
    with ResultLog(tmp_path / "a", "perplexity", SETTINGS) as log:
        assert key(0) in log
        assert dict(reversed(key(0).items())) in log
        assert key(1) not in log  # what failed is tried again
        assert key(2) not in log
        log.add(key(1), {"nll": 2.0, "weight": 1, "tokens": 9}, seconds=1.0)
    run = read_run(tmp_path / "a")
    assert (run.task, run.settings, run.paper) == ("perplexity", SETTINGS, None)
    assert [record.error for record in run.records] == [None, None]
    assert (tmp_path / "a/results.jsonl").read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("perplexity", SETTINGS | {"form": "rolling"}, "its form is 'paper', not 'rolling'"),
        ("perplexity", SETTINGS | {"seed": 1}, "its seed is None, not 1"),
        ("passkey", SETTINGS, "its task is 'perplexity'"),
    ],
)
def test_another_run_is_not_mixed_in(tmp_path, task, settings, message):
    ResultLog(tmp_path, "perplexity", SETTINGS).__exit__(None, None, None)
    with pytest.raises(InputError, match=message):
        ResultLog(tmp_path, task, settings)
    with ResultLog(tmp_path, "perplexity", SETTINGS):  # the refused one let go of it
        pass


def test_two_processes_do_not_write_one_folder(tmp_path):
    with (
        ResultLog(tmp_path, "perplexity", SETTINGS),
        pytest.raises(InputError, match="another process is writing"),
    ):
        ResultLog(tmp_path, "perplexity", SETTINGS)


def test_the_papers_model_may_be_named_later(tmp_path):
    for asked, kept in [(None, None), ("llama2-7b", "llama2-7b"), (None, "llama2-7b")]:
        ResultLog(tmp_path, "perplexity", SETTINGS, paper=asked).__exit__(None, None, None)
        assert read_run(tmp_path).paper == kept


def test_damaged_results_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no run\.json"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged: 'task'"):
        read_run(tmp_path)
    ResultLog(tmp_path / "b", "perplexity", SETTINGS).__exit__(None, None, None)
    (tmp_path / "b/results.jsonl").write_text('{"key": {}, "value": {}, "seconds": 1}\nno\n')
    with pytest.raises(InputError, match="line 2 is damaged"):
        read_run(tmp_path / "b")


GOOD = {"key": key(0), "value": {"nll": 1.5, "weight": 1, "tokens": 9}, "seconds": 1.0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (GOOD, None),
        ([GOOD], "line 1 is damaged: it has no key"),
        (GOOD | {"key": "rope"}, "line 1 is damaged: it has no key of strings and numbers"),
        (GOOD | {"key": {"method": ["rope"]}}, "line 1 is damaged: it has no key of strings"),
        (GOOD | {"value": [1]}, "line 1 is damaged: it: value must be an object"),
        (GOOD | {"value": None}, "has neither a value nor an error"),
        (GOOD | {"error": 5}, "error must be a string, got 5"),
        (GOOD | {"seconds": "1"}, "seconds must be a finite number"),
        (GOOD | {"seconds": None}, "has no seconds"),
        (GOOD | {"value": {"nll": math.nan, "weight": 1, "tokens": 9}}, "its nll is nan"),
        (
            GOOD | {"value": {"nll": "1.5", "weight": 1, "tokens": 9}},
            "its nll is '1.5', expected",
        ),
        (GOOD | {"value": {"nll": True, "weight": 1, "tokens": 9}}, "its nll is True, expected"),
        (GOOD | {"value": {"nll": 1.5, "tokens": 9}}, "its weight is None, expected an integer"),
        (GOOD | {"value": {"nll": 1.5, "weight": -1, "tokens": 9}}, "its weight is -1"),
        (GOOD | {"key": key(0) | {"length": "4k"}}, "its length is '4k', expected an integer"),
        (GOOD | {"key": {"length": 4, "start": 0}}, "its method is None, expected a string"),
    ],
)
def test_a_line_of_other_types_is_refused_in_a_sentence(tmp_path, line, message):
    with ResultLog(tmp_path, "perplexity", SETTINGS):
        pass
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    if message is None:
        report.write_report(tmp_path)
        return
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        report.write_report(tmp_path)
    assert "results.jsonl" in str(refused.value)
    assert invoke_eval("report", tmp_path).exit_code == 2


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ([], "is damaged: a JSON list, expected an object"),
        ({"task": 5}, "is damaged: it: task must be a string, got 5"),
        ({"settings": "paper"}, "settings must be an object, got 'paper'"),
        ({"settings": None}, "is damaged: 'settings' is missing"),
        ({"paper": ["llama2-7b"]}, "paper must be a string"),
        ({"files": {"qasper": "a.jsonl"}}, "'qasper' has no sha256, got 'a.jsonl'"),
        ({"settings": SETTINGS | {"form": "x"}}, "its form is 'x', expected one of paper, strided"),
        ({"settings": SETTINGS | {"trained_length": "64"}}, "its trained_length is '64'"),
    ],
)
def test_a_run_of_other_types_is_refused_in_a_sentence(tmp_path, run, message):
    asked = {"task": "perplexity", "settings": SETTINGS, "paper": None}
    run = asked | run if isinstance(run, dict) else run
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match=re.escape(message)):
        report.write_report(tmp_path)
    for text in ("[" * 100_000, '{"task": ' + "9" * 5000 + "}", "\0", ""):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(InputError, match="is damaged"):
            read_run(tmp_path)


@pytest.mark.parametrize(
    ("task", "key", "value", "message"),
    [
        ("passkey", {"trial": "x"}, {}, "its trial is 'x'"),
        ("passkey", {"depth": "0.5"}, {}, "its depth is '0.5', expected a finite number"),
        ("passkey", {}, {"found": 1}, "its found is 1, expected true or false"),
        ("needle", {"task": "hay"}, {}, "its task is 'hay', expected one of single"),
        ("needle", {"task": "single"}, {"score": None}, "its score is None"),
        ("few-shot", {"task": "qmsum"}, {"f1": 1.0}, "its rouge1 is None, expected a finite"),
        ("l-eval", {"task": "tpo", "part": "all"}, {}, "its part is 'all', expected one of doc"),
        ("l-eval", {"task": "tpo"}, {"answer": 5}, "its answer is 5, expected a string"),
        ("l-eval", {"task": "tpo"}, {"reference": " "}, "its reference is ' ', expected"),
        ("speed", {"attention": "fast"}, {}, "its attention is 'fast', expected one of dense"),
        ("speed", {"attention": "dca"}, {"planned_bytes": -1}, "its planned_bytes is -1"),
    ],
)
def test_every_task_knows_its_records(tmp_path, task, key, value, message):
    whole = {"method": "rope", "length": 8, "trial": 0, "id": "0", "part": "document"}
    found = {"found": True, "tokens": 8, "score": 1.0, "answer": "A", "reference": "A"}
    with ResultLog(tmp_path, task, {"form": "paper", "trained_length": 8}) as log:
        log.add(whole | key, found | {"seconds": 1.0, "planned_bytes": 1} | value, 1.0)
    with pytest.raises(InputError, match=re.escape(message)):
        report.write_report(tmp_path)


# --- what cannot be written --------------------------------------------------------------------


@contextmanager
def small_files(size: int):
    """No file grows beyond `size` bytes: as on a full disk, a write is cut short, then refused."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_a_run_and_leaves_whole_lines(tmp_path):
    value = {"nll": 1.5, "weight": 1, "tokens": 9}
    noted: list[int] = []
    with ResultLog(tmp_path / "a", "perplexity", SETTINGS) as log:
        log.add(key(0), value, 0.1)
        size = (tmp_path / "a/results.jsonl").stat().st_size

        def run(batch):
            for start in batch:
                noted.append(start)
                log.add(key(start), value, 0.1)

        with (
            small_files(size + 20),
            pytest.raises(InputError, match=r"jsonl cannot be wri"),
        ):
            in_batches([1, 2, 3], 3, run, lambda item, error: pytest.fail("no sample's fault"))
        assert noted == [1]  # what comes later could not be noted, either
        assert (tmp_path / "a/results.jsonl").stat().st_size == size
        in_batches([1, 2, 3], 3, run, lambda item, error: pytest.fail(str(error)))
    assert [r.key["start"] for r in read_run(tmp_path / "a").records] == [0, 1, 2, 3]
    for name in ("summary.json", "table.md", "perplexity.png"):
        with small_files(20), pytest.raises(InputError, match=r"cannot be written: File too large"):
            report.write_report(tmp_path / "a")
        assert not list(tmp_path.rglob(".*.partial")), name
    report.write_report(tmp_path / "a")
    with small_files(20), pytest.raises(InputError, match=r"report\.html cannot be written"):
        report.write_page(tmp_path / "a")


@pytest.mark.parametrize("place", ["file", "file/inner"])
def test_a_place_that_is_no_folder_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"cannot be written: (File exists|Not a directory)"):
        ResultLog(tmp_path / place, "perplexity", SETTINGS)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_a_model_says_may_be_half_a_character(tmp_path):
    with ResultLog(tmp_path, "passkey", {"form": "paper", "trained_length": 8}) as log:
        log.add({"method": "rope"}, {"answer": "\ud83d"}, 0.1)
        with pytest.raises(ValueError, match="not JSON compliant"):
            log.add({"method": "dca"}, {"score": math.inf}, 0.1)
    assert [record.value for record in read_run(tmp_path).records] == [{"answer": "?"}]


def test_one_bad_sample_costs_no_other():
    done: list[int] = []
    failed: dict[int, str] = {}

    def run(batch):
        if 3 in batch:
            raise ValueError("three")
        done.extend(batch)

    in_batches(range(6), 4, run, lambda item, error: failed.update({item: str(error)}))
    assert done == [0, 1, 2, 4, 5]
    assert failed == {3: "three"}


def test_an_interruption_is_no_failure():
    def run(batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_batches([1, 2], 2, run, lambda item, error: pytest.fail("noted"))


def test_in_a_file_progress_is_a_line_a_minute(monkeypatch, capsys):
    clock = iter([0.0, 30.0, 90.0, 100.0, 240.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress("needle", 100.0) as advance:
        for units in (10.0, 20.0, 5.0, 25.0):
            advance(units)
    assert capsys.readouterr().err.splitlines() == [
        "needle: 30% after 0:01:30, about 0:03:30 left",
        "needle: 60% after 0:04:00, about 0:02:40 left",
    ]


# --- what is made of it ------------------------------------------------------------------------


def test_tables_in_both_languages():
    table = Table(title="A < B", header=["x", "1k"], rows=[["a|b", "> 100"]], notes=["so it is"])
    assert table.markdown() == (
        "### A < B\n\n| x | 1k |\n| --- | ---: |\n| a\\|b | > 100 |\n\n- so it is\n"
    )
    assert "<h3>A &lt; B</h3>" in table.html()
    assert "<td>&gt; 100</td>" in table.html()
    assert [tokens(n) for n in (512, 1000, 4096, 196_608, 1_048_576)] == [
        *("512", "1,000", "4k", "192k", "1024k")
    ]
    assert [number(None), number(1234.5)] == ["", "1,234.50"]


@pytest.fixture
def two_runs(tmp_path):
    for name, form in (("a", "paper"), ("b", "strided")):
        settings = SETTINGS | {"form": form}
        with ResultLog(tmp_path / name, "perplexity", settings, paper="llama2-7b") as log:
            for method, nll in (("rope", 3.0), ("dca:chunkllama_ppl", 2.0)):
                for length in (4096, 8192):
                    value = {"nll": nll + length / 8192, "weight": 1, "tokens": length - 1}
                    log.add({"method": method, "length": length, "start": 0}, value, 0.5)
            if name == "b":
                log.fail(key(7), ValueError("no <memory>"), 0.0)
    return tmp_path


def test_a_report_has_scores_tables_and_pictures(two_runs):
    found = report.write_report(two_runs / "a", {"device": "abacus"})
    summary = json.loads((two_runs / "a/summary.json").read_text())
    assert summary["device"] == "abacus"
    assert (summary["samples"], summary["failed"], summary["seconds"]) == (4, 0, 2.0)
    assert summary["scores"]["rope"]["8192"]["perplexity"] == pytest.approx(math.exp(4))
    # The paper's column stands beside ours; any setting of DCA is the paper's DCA.
    assert list(found.tables[0].header) == ["method", "4k", "paper", "8k", "paper"]
    assert list(found.tables[0].rows[0]) == ["rope", "33.12", "7.87", "54.60", "> 100"]
    assert list(found.tables[0].rows[1])[-2:] == ["20.09", "7.67"]
    assert (two_runs / "a/table.md").read_text() == found.tables[0].markdown()
    assert (two_runs / "a/perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert not list(two_runs.rglob(".*.partial"))


def test_the_page_needs_nothing_else(two_runs):
    for name in ("a", "b"):
        report.write_report(two_runs / name)
    page = report.write_page(two_runs).read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<h2>perplexity: a</h2>" in page
    assert "4 samples in 2 s, 1 more failed." in page
    alone = report.write_page(two_runs / "a").read_text()
    assert "<h2>perplexity: a</h2>" in alone  # not ".", its place below itself
    (two_runs / "a/summary.json").unlink()
    assert "4 samples in 2 s, not finished." in report.write_page(two_runs / "a").read_text()
    assert "Failed: 1 of 5" in page
    assert "no &lt;memory&gt;" in page
    assert "http" not in page
    with pytest.raises(InputError, match="has no results"):
        report.write_page(two_runs / "nothing")


def test_a_run_without_results_has_a_report(tmp_path):
    ResultLog(tmp_path, "perplexity", SETTINGS).__exit__(None, None, None)
    found = report.write_report(tmp_path)
    assert (found.tables, found.pictures) == ([], {})
    assert "perplexity" in report.write_page(tmp_path).read_text()
    with pytest.raises(InputError, match="task 'x' is not known"):
        report.outcome(read_run(tmp_path)._replace(task="x"))


def test_machine_says_what_ran():
    facts = report.machine()
    assert facts["versions"]["jax"]
    assert facts["versions"]["dca_jax"]
    assert facts["host_peak_bytes"] > 2**26
    assert facts["devices"] >= 1


# --- the paper's figures -----------------------------------------------------------------------


def test_the_papers_tables_hold_together():
    """What its text says of them, and the averages that it prints."""
    llama, dca = (paper.row(paper.PERPLEXITY, "llama2-70b", m) for m in ("rope", "dca"))
    assert llama[4096] == dca[4096]  # within the trained length DCA is the model's own attention
    assert dca[65_536] == 5.59  # "only marginally rises from 5.18 to 5.59"
    assert round(dca[98_304] - dca[4096], 2) == 0.56
    averages = {
        name: sum(row["dca"].values()) / 4
        for name, row in paper.FEW_SHOT.items()
        if name.startswith("llama2-") and "dca" in row
    }
    assert {n: round(a, 1) for n, a in averages.items()} == {
        "llama2-7b": 24.6,
        "llama2-13b": 29.7,
        "llama2-70b": 37.8,
    }
    printed = {"llama2-7b-chat": 46.64, "llama2-13b-chat": 52.04, "llama2-70b-chat": 63.20}
    printed |= {"llama2-7b-sft": 51.85}
    for name, average in printed.items():
        assert sum(paper.L_EVAL[name]["dca"].values()) / 4 == pytest.approx(average, abs=0.011)
    for name, method, average in [  # those that do not add up
        ("llama2-7b-chat", "rope", 48.74),
        ("llama2-13b-chat", "rope", 48.99),
        ("llama2-13b-sft", "dca", 57.94),
    ]:
        assert abs(sum(paper.L_EVAL[name][method].values()) / 4 - average) > 0.4


def test_rows_of_the_paper():
    assert paper.row(paper.PERPLEXITY, "llama2-7b", "dca:3072,4095")[8192] == 7.67
    assert paper.row(paper.PERPLEXITY, "llama2-7b", "dca-intra") == {}
    assert paper.row(paper.PERPLEXITY, "llama2-7b", "string") == {}
    assert paper.row(paper.PERPLEXITY, None, "dca") == {}
    assert [paper.figure(x) for x in (None, 7.9, math.inf)] == ["", "7.90", "> 100"]
    assert set(paper.PERPLEXITY) <= set(paper.MODELS)
    assert windows.FORMS[0] == "paper"


# --- the commands ------------------------------------------------------------------------------


def test_every_command_explains_itself_with_an_example():
    overview = CliRunner().invoke(app, ["--help"], terminal_width=200)
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert sorted(names) == [
        *("few-shot", "infinite-bench", "l-eval", "longbench-v2", "needle", "passkey"),
        *("perplexity", "report", "ruler", "speed"),
    ]
    for name in names:
        assert name in overview.output
        own = CliRunner().invoke(app, [name, "--help"], terminal_width=200)
        assert own.exit_code == 0
        assert f"dca-jax eval {name}" in own.output


def test_the_commands_start_without_what_few_of_them_need():
    code = (
        "import sys, dca_jax.cli; "
        "print(not {'matplotlib', 'pypdf', 'rouge_score', 'lm_eval'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
