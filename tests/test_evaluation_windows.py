"""`eval perplexity`: its three forms against their definitions, resumption, and the golden NLLs."""

import json
import math
import os
import re
import signal

import golden_llama
import jax
import numpy as np
import pytest
from shared_fixtures import invoke_eval as invoke
from test_moby_dick import ROWS, read_tokens
from tiny_llm import make_llm

from dca_jax.errors import InputError
from dca_jax.evaluation import report, texts, windows
from dca_jax.evaluation.results import ResultLog, read_run
from dca_jax.evaluation.windows import make_windows, mean_nll
from dca_jax.inference import score as perplexity
from dca_jax.inference.methods import with_method
from dca_jax.inference.score import token_nll
from dca_jax.lengths import parse_tokens

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail. "


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 300, 700).astype(np.int32)


# --- where windows are -------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "length", "stride"), [(1000, 100, 7), (357, 100, 256)])
def test_windows_of_the_paper(count, length, stride):
    starts = list(range(0, count - length, stride))
    starts.pop()
    found = make_windows("paper", count, length, stride)
    assert [(w.start, w.stop) for w in found] == [(s, s + length) for s in starts]
    assert all(w.first == w.start + 1 and w.weight == 1 for w in found)
    assert found


def test_strided_windows_count_every_token_once():
    for count, length, stride in [(1000, 100, 30), (130, 100, 30), (50, 100, 30), (1000, 100, 99)]:
        found = make_windows("strided", count, length, stride)
        counted = [t for w in found for t in range(w.first, w.stop)]
        assert counted == list(range(1, count))
        assert all(w.stop - w.start <= length for w in found)
        assert found[-1].stop == count
    disjoint = make_windows("strided", 300, 100, 100)  # then each window's first token is given
    assert [(w.start, w.first, w.weight) for w in disjoint] == [
        *((0, 1, 99), (100, 101, 99), (200, 201, 99))
    ]


def test_rolling_windows_are_those_of_lm_eval():
    utils = pytest.importorskip("lm_eval.utils")
    for count in (1, 99, 100, 101, 250, 300):
        text = list(range(1, count + 1))
        theirs = [
            utils.make_disjoint_window(pair)
            for pair in utils.get_rolling_token_windows(text, 0, max_seq_len=100, context_len=1)
        ]
        prefixed = [0, *text]
        ours = make_windows("rolling", count + 1, 100)
        assert [(prefixed[w.start : w.first], prefixed[w.first : w.stop]) for w in ours] == theirs


@pytest.mark.parametrize(
    ("form", "count", "length", "stride", "message"),
    [
        ("sliding", 100, 10, 5, "expected one of paper, strided, rolling"),
        ("paper", 300, 100, 256, "needs more than 356"),
        ("paper", 300, 1, 5, "a window needs at least 2 tokens"),
        ("strided", 300, 10, 0, "a stride of at least 1"),
        ("rolling", 300, 10, 5, "has no stride"),
        ("rolling", 1, 10, None, "needs at least one token to predict, got 0"),
    ],
)
def test_impossible_windows_are_refused(form, count, length, stride, message):
    with pytest.raises(InputError, match=message):
        make_windows(form, count, length, stride)


# --- their figures -----------------------------------------------------------------------------


def some_nll(rows: np.ndarray) -> np.ndarray:
    """In place of a model's: numbers that depend on all tokens up to the predicted one."""
    weights = np.arange(1, rows.shape[1] + 1)
    return (np.cumsum(rows * weights, axis=1)[:, 1:] % 997).astype(np.float32) / 100


@pytest.fixture
def no_model(monkeypatch):
    """Windows without the time that a model takes; `Reader` has tests of its own."""
    batches: list[int] = []

    def nll(self, rows):
        assert len(rows) <= self.batch
        assert rows.shape[1] <= self.capacity
        batches.append(len(rows))
        return some_nll(rows)

    monkeypatch.setattr(perplexity.Reader, "nll", nll)
    return batches


def evaluated(tmp_path, model, tokens, **options) -> float:
    with ResultLog(tmp_path / options["form"], "perplexity", {}) as log:
        windows.evaluate(model, tokens, log, methods=["rope"], lengths=[150], **options)
        assert all(record.error is None for record in log.records)
        return mean_nll(log.records)


def test_the_papers_form_is_its_definition(tmp_path, plain_llm, tokens, no_model):
    found = evaluated(tmp_path, plain_llm.model, tokens, form="paper", stride=90, batch=4)
    starts = list(range(0, 700 - 150, 90))[:-1]
    means = [some_nll(tokens[None, s : s + 150]).mean(dtype=np.float64) for s in starts]
    assert found == pytest.approx(np.mean(means), rel=1e-9)
    assert no_model == [4, 2]


@pytest.mark.parametrize("stride", [90, 150])
def test_the_strided_form_is_its_definition(tmp_path, plain_llm, tokens, no_model, stride):
    """The loop of transformers' documentation, over a loss that averages what is not masked."""
    found = evaluated(tmp_path, plain_llm.model, tokens, form="strided", stride=stride, batch=2)
    nll_sum, num_tokens, previous = 0.0, 0, 0
    for begin in range(0, 700, stride):
        end = min(begin + 150, 700)
        labels = np.arange(begin, end) >= end - (end - previous)  # not masked
        losses = some_nll(tokens[None, begin:end])[0]  # of labels 1, 2 ...
        weight = int(labels.sum()) - 1
        nll_sum += losses[labels[1:]].mean(dtype=np.float64) * weight
        num_tokens += weight
        previous = end
        if end == 700:
            break
    assert found == pytest.approx(nll_sum / num_tokens, rel=1e-9)


def test_the_rolling_form_counts_every_token_once(tmp_path, plain_llm, tokens, no_model):
    found = evaluated(tmp_path, plain_llm.model, tokens, form="rolling")
    pairs = [(0, 151), (150, 301), (300, 451), (450, 601)]
    whole = [some_nll(tokens[None, a:b])[0] for a, b in pairs]
    last = some_nll(tokens[None, 549:])[0][-99:]
    every = np.concatenate([*whole, last])
    assert len(every) == 699
    assert found == pytest.approx(every.mean(dtype=np.float64), rel=1e-9)


def test_every_method_reads_its_own_way(tmp_path, plain_llm, tokens):
    """With the model: figures by method are those of the model made for it."""
    with ResultLog(tmp_path, "perplexity", {}) as log:
        options = {"methods": ["rope", "dca", "ntk"], "lengths": [150], "stride": 250, "batch": 2}
        windows.evaluate(plain_llm.model, tokens, log, form="paper", **options)
        found = {
            method: mean_nll([r for r in log.records if r.key["method"] == method])
            for method in options["methods"]
        }
    pair = np.stack([tokens[:150], tokens[250:400]])
    for method, nll in found.items():
        direct = token_nll(with_method(plain_llm.model, method, 150), pair)
        assert nll == pytest.approx(direct.mean(dtype=np.float64), abs=1e-5)
    assert len({round(nll, 4) for nll in found.values()}) == 3


def test_a_stopped_run_reads_only_what_is_missing(
    tmp_path, plain_llm, tokens, no_model, monkeypatch
):
    options = {"form": "paper", "methods": ["rope", "dca"], "lengths": [64, 128], "stride": 200}
    nll = perplexity.Reader.nll

    def stopped(self, rows):
        if sum(no_model) >= 4:
            raise KeyboardInterrupt
        return nll(self, rows)

    with ResultLog(tmp_path / "a", "perplexity", {}) as log:
        monkeypatch.setattr(perplexity.Reader, "nll", stopped)
        with pytest.raises(KeyboardInterrupt):
            windows.evaluate(plain_llm.model, tokens, log, batch=2, **options)
        assert len(log.records) == sum(no_model) == 5
        monkeypatch.setattr(perplexity.Reader, "nll", nll)
    whole = ResultLog(tmp_path / "b", "perplexity", {})
    with ResultLog(tmp_path / "a", "perplexity", {}) as log, whole:
        windows.evaluate(plain_llm.model, tokens, log, batch=2, **options)
        assert sum(no_model) == len(log.records) == 2 * (3 + 2)
        windows.evaluate(plain_llm.model, tokens, whole, batch=1, **options)
        ours, theirs = ({str(r.key): r.value for r in some.records} for some in (log, whole))
        assert ours == theirs
        size = (tmp_path / "a/results.jsonl").stat().st_size
        windows.evaluate(plain_llm.model, tokens, log, batch=2, **options)  # nothing is left to do
        assert (tmp_path / "a/results.jsonl").stat().st_size == size


def test_a_stopped_run_goes_on_in_the_batches_of_one_that_was_not(
    tmp_path, plain_llm, tokens, no_model, monkeypatch
):
    """Also from the middle of a batch: how sums are rounded depends on all that is read with it."""
    options = {"form": "paper", "methods": ["rope"], "lengths": [64], "stride": 100, "batch": 3}
    read = []
    nll, add = perplexity.Reader.nll, ResultLog.add

    def noted(self, rows):
        read.append((self.batch, rows.tolist()))
        return nll(self, rows)

    def stopped(self, *record):
        if len(self.records) == 4:
            raise KeyboardInterrupt
        add(self, *record)

    monkeypatch.setattr(perplexity.Reader, "nll", noted)
    with ResultLog(tmp_path / "whole", "perplexity", {}) as log:
        windows.evaluate(plain_llm.model, tokens, log, **options)
        expected = {str(r.key): r.value for r in log.records}
    whole, read[:] = list(read), []
    assert [len(rows) for _, rows in whole] == [3, 3]
    with ResultLog(tmp_path / "stopped", "perplexity", {}) as log, monkeypatch.context() as patch:
        patch.setattr(ResultLog, "add", stopped)
        with pytest.raises(KeyboardInterrupt):
            windows.evaluate(plain_llm.model, tokens, log, **options)
    read.clear()
    with ResultLog(tmp_path / "stopped", "perplexity", {}) as log:
        windows.evaluate(plain_llm.model, tokens, log, **options)
        assert {str(r.key): r.value for r in log.records} == expected
    assert read == whole[1:]
    lines = (tmp_path / "stopped" / "results.jsonl").read_text().splitlines()
    assert len(lines) == len(expected)  # none is noted twice


def test_what_fails_is_noted_and_tried_alone(tmp_path, plain_llm, tokens, no_model, monkeypatch):
    nll = perplexity.Reader.nll
    bad = tokens[200:264]

    def failing(self, rows):
        if (rows == bad).all(axis=1).any():
            raise RuntimeError("RESOURCE_EXHAUSTED: so many bytes")
        return nll(self, rows)

    monkeypatch.setattr(perplexity.Reader, "nll", failing)
    with ResultLog(tmp_path, "perplexity", {}) as log:
        options = {"form": "paper", "methods": ["rope"], "lengths": [64], "stride": 200}
        windows.evaluate(plain_llm.model, tokens, log, batch=3, **options)
        errors = {record.key["start"]: record.error for record in log.records}
    assert errors == {
        0: None,
        200: "RuntimeError: RESOURCE_EXHAUSTED: so many bytes",
        400: None,
    }


def test_a_number_that_is_none_fails_its_own_window(
    tmp_path, plain_llm, tokens, no_model, monkeypatch
):
    nll, bad = perplexity.Reader.nll, tokens[200:264]

    def broken(self, rows):
        found = nll(self, rows)
        found[(rows == bad).all(axis=1), 7] = math.nan
        return found

    monkeypatch.setattr(perplexity.Reader, "nll", broken)
    with ResultLog(tmp_path, "perplexity", {"form": "paper", "trained_length": 64}) as log:
        options = {"form": "paper", "methods": ["rope"], "lengths": [64], "stride": 200}
        windows.evaluate(plain_llm.model, tokens, log, batch=3, **options)
        errors = {record.key["start"]: record.error for record in log.records}
        good = [r.value["nll"] for r in log.records if r.value is not None]
    assert errors[0] is errors[400] is None
    assert "the NLL is not finite" in errors[200]
    scores = report.write_report(tmp_path).scores["rope"]["64"]
    assert scores["perplexity"] == pytest.approx(math.exp(np.mean(good)))


def test_a_text_with_a_number_that_is_none_is_refused(plain_llm, tokens, monkeypatch):
    reader = perplexity.Reader(plain_llm.model, 2, 64)
    piece = (np.ones((2, 64), np.float32), np.ones((2, 64), bool), reader._cache)
    piece[0][1, 5] = math.inf
    monkeypatch.setattr(perplexity, "compiled", lambda *_, **__: lambda *_: piece)
    with pytest.raises(InputError, match="the NLL of token 6 of text 1 is not finite"):
        reader.read([tokens[:32], tokens[:32]])
    scores = reader.read([tokens[:32], tokens[:6]])  # beyond a text's end it counts for nothing
    assert [len(score.nll) for score in scores] == [31, 5]


def test_a_perplexity_beyond_all_numbers_is_said(tmp_path):
    settings = {"form": "strided", "trained_length": 64}
    with ResultLog(tmp_path, "perplexity", settings) as log:
        for length, nll in ((64, 2.0), (128, 800.0)):
            for weight, start in ((5, 0), (0, 1)):
                value = {"nll": nll, "weight": weight, "tokens": 9}
                log.add({"method": "rope", "length": length, "start": start}, value, 1.0)
        # Of a window of one token alone there is no mean.
        key = {"method": "rope", "length": 256, "start": 1}
        log.add(key, {"nll": 1.0, "weight": 0, "tokens": 1}, 1.0)
    found = report.write_report(tmp_path)
    assert list(found.tables[0].rows[0]) == ["rope", "7.39", "> e^700"]
    assert found.scores["rope"]["128"]["perplexity"] is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_says_where_it_stopped_and_how_to_go_on(
    folder, tmp_path, no_model, monkeypatch, number
):
    nll = perplexity.Reader.nll
    # A shell that starts its jobs in the background has them ignore Ctrl-C.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)

    def stopped(self, rows):
        if sum(no_model) == 2:
            os.kill(os.getpid(), number)
        return nll(self, rows)

    monkeypatch.setattr(perplexity.Reader, "nll", stopped)
    np.save(tmp_path / "t.npy", np.arange(300))
    ask = ("perplexity", folder, "--tokens", tmp_path / "t.npy", "--output", tmp_path / "out")
    ask += ("--length", 64, "--stride", 50, "--method", "rope", "--batch", 1)
    before = signal.getsignal(signal.SIGTERM)
    done = invoke(*ask)
    assert done.exit_code == 128 + number
    assert f"stopped: {tmp_path / 'out'} has 2 samples; repeat the command" in done.stderr
    assert signal.getsignal(signal.SIGTERM) == before
    signal.signal(signal.SIGINT, heard)
    no_model.clear()
    monkeypatch.setattr(perplexity.Reader, "nll", nll)
    assert invoke(*ask).exit_code == 0
    assert sum(no_model) == 2  # of four windows


@pytest.mark.slow
def test_few_programs_read_windows_of_all_lengths(
    tmp_path, plain_llm, tokens, compilations, monkeypatch
):
    """Short ones, several at once, by one for each of two widths, and long ones likewise."""
    monkeypatch.setattr(windows, "NARROW", (200,))
    options = {"form": "paper", "stride": 40, "limit": 8, "lengths": (40, 90, 160, 300, 350)}
    with ResultLog(tmp_path, "perplexity", {}) as log:
        windows.evaluate(plain_llm.model, tokens, log, methods=["rerope", "rerope:30"], **options)
        records = log.records
    assert sum("read_piece" in name for name in compilations) <= 4
    found = {tuple(sorted(one.key.items())): one.value["nll"] for one in records}
    for length in options["lengths"]:
        model = with_method(plain_llm.model, "rerope", length)
        key = {"method": "rerope", "length": length, "start": 0}
        alone = float(token_nll(model, tokens[None, :length]).mean())
        assert found[tuple(sorted(key.items()))] == pytest.approx(alone, abs=1e-4)


def test_a_limit_spreads_over_the_text(tmp_path, plain_llm, tokens, no_model):
    with ResultLog(tmp_path, "perplexity", {}) as log:
        options = {"form": "paper", "methods": ["rope"], "lengths": [64], "stride": 30, "limit": 4}
        windows.evaluate(plain_llm.model, tokens, log, **options)
        assert [record.key["start"] for record in log.records] == [0, 150, 300, 450]


def test_bad_requests_fail_before_anything_is_read(tmp_path, plain_llm, tokens):
    with ResultLog(tmp_path, "perplexity", {}) as log:

        def ask(tokens, **options):
            asked = {"form": "paper", "methods": ["rope"], "lengths": [64], **options}
            windows.evaluate(plain_llm.model, tokens, log, **asked)

        with pytest.raises(InputError, match="method 'alibi' is not known"):
            ask(tokens, methods=["rope", "alibi"])
        with pytest.raises(InputError, match="vocabulary of 300"):
            ask(np.full(700, 300, np.int32))
        with pytest.raises(InputError, match="has no window of 680"):
            ask(tokens, lengths=[64, 680])
        assert log.records == []


# --- texts -------------------------------------------------------------------------------------


def test_token_files(tmp_path):
    ids = np.arange(1, 51)
    np.save(tmp_path / "a.npy", ids)
    ids.astype(np.uint16).tofile(tmp_path / "a.bin")
    ids.astype(np.uint32).tofile(tmp_path / "wide.bin")
    for name, vocab in (("a.npy", 60), ("a.bin", 60), ("wide.bin", 100_000)):
        found = texts.read_token_file(tmp_path / name, vocab)
        assert found.tokens.tolist() == ids.tolist()
        assert found.facts["tokens"] == 50
    (tmp_path / "odd.bin").write_bytes(b"abc")
    np.save(tmp_path / "b.npy", ids.astype(np.float32))
    np.save(tmp_path / "c.npy", np.array([{}]), allow_pickle=True)
    for name, vocab, message in (
        ("none.bin", 60, "is not a file"),
        ("a.npy", 50, "no ids of a vocabulary of 50"),
        ("wide.bin", 60, "seems to have 32 bits per token"),
        ("odd.bin", 60, "3 bytes are not a list"),
        ("b.npy", 60, "expected a list of integers"),
        ("c.npy", 60, "not an array of numbers"),
    ):
        with pytest.raises(InputError, match=message):
            texts.read_token_file(tmp_path / name, vocab)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"", "is not an array of numbers"),
        ("a.NPY", b"\x93NUMPY\x01\x00", "is not an array of numbers"),
        ("a.npy", b"\x93NUMPY\x01\x00\xff\x03" + b"(" * 1022 + b"\n", "is not an array of numbers"),
        ("a.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': (1, 2\n", "is not an array of numbers"),
        ("book.bin", b"Call me Ishmael. " * 40, "is text, not raw token ids; give it as --text"),
    ],
)
def test_files_that_are_no_token_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        texts.read_token_file(tmp_path / name, 32_000)


def test_arrays_that_are_no_token_ids(tmp_path):
    np.savez(tmp_path / "z.npz", ids=np.arange(9))
    (tmp_path / "z.npz").rename(tmp_path / "zip.npy")
    np.save(tmp_path / "time.npy", np.arange(9).astype("m8[s]"))
    np.save(tmp_path / "bool.npy", np.ones(9, bool))
    np.save(tmp_path / "wide.npy", np.array([2**40]))
    for name, message in (
        ("zip", r"is a zip file of arrays \(.npz\); save the array of ids alone"),
        ("time", "expected a list of integers"),
        ("bool", "expected a list of integers"),
        ("wide", "no ids of a vocabulary of 60"),
    ):
        with pytest.raises(InputError, match=message):
            texts.read_token_file(tmp_path / f"{name}.npy", 60)


def test_texts_and_what_stands_before_them(tmp_path, plain_llm):
    (tmp_path / "a.txt").write_text(TEXT)
    found = texts.read_text(plain_llm, tmp_path / "a.txt")
    assert plain_llm.tokenizer.decode(found.tokens) == TEXT
    assert (found.facts["bytes"], found.facts["words"]) == (len(TEXT), len(re.split(r"\s+", TEXT)))
    assert texts.special_prefix(plain_llm) == [1]  # <s>
    assert texts.prefix_token(plain_llm) == 1


def test_numbers_of_tokens():
    assert [parse_tokens(n) for n in ("512", "4k", "1M")] == [512, 4096, 2**20]
    for bad in ("", "k", "0", "-4k", "4.5k", "many", "9" * 5000, "٤"):
        with pytest.raises(InputError, match=r"not a number of tokens|too many"):
            parse_tokens(bad)


# --- the command -------------------------------------------------------------------------------


def test_the_command_writes_prints_and_goes_on(folder, plain_llm, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 12)
    ask = ("perplexity", folder, "--text", tmp_path / "a.txt", "--output", tmp_path / "out")
    ask += ("--length", 64, "--length", 128, "--stride", 96, "--dtype", "float32")
    first = invoke(*ask, "--method", "rope")
    assert first.exit_code == 0, first.output
    lines = (tmp_path / "out/results.jsonl").read_text().splitlines()
    both = invoke(*ask, "--method", "rope", "--method", "dca", "--paper", "llama2-7b")
    assert both.exit_code == 0, both.output
    assert (tmp_path / "out/results.jsonl").read_text().splitlines()[: len(lines)] == lines
    assert "| method | 64 | 128 |" in both.stdout
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert set(summary["scores"]) == {"rope", "dca"}
    assert (
        summary["settings"]["config"]["num_hidden_layers"]
        == plain_llm.model.config.num_hidden_layers
    )
    assert summary["versions"]["jax"]
    assert summary["settings"]["stride"] == 96
    tokens = texts.read_text(plain_llm, tmp_path / "a.txt").tokens
    cell = summary["scores"]["dca"]["128"]
    starts = list(range(0, len(tokens) - 128, 96))[:-1]
    model = with_method(plain_llm.model, "dca", 128)
    direct = [token_nll(model, tokens[None, s : s + 128]).mean(dtype=np.float64) for s in starts]
    assert cell["windows"] == len(starts)
    assert cell["perplexity"] == pytest.approx(math.exp(np.mean(direct)), rel=1e-4)
    page = invoke("report", tmp_path / "out")
    assert page.stdout.strip() == str(tmp_path / "out/report.html")
    other = invoke(*ask, "--method", "rope", "--form", "strided")
    assert other.exit_code == 2
    assert "give another folder" in other.stderr


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_a_mesh_changes_no_figure(folder, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 12)
    ask = ("perplexity", folder, "--text", tmp_path / "a.txt", "--length", 128, "--stride", 96)
    ask += ("--method", "dca", "--dtype", "float32", "--limit", 3)
    for name, mesh in (("one", ()), ("four", ("--mesh", "data=2,tensor=2"))):
        done = invoke(*ask, *mesh, "--output", tmp_path / name)
        assert done.exit_code == 0, done.output
    one, four = (
        [record.value["nll"] for record in read_run(tmp_path / name).records]
        for name in ("one", "four")
    )
    assert len(one) == 3
    assert four == pytest.approx(one, rel=1e-4)


def test_the_rolling_form_has_lm_evals_measures(folder, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 4)
    result = invoke(
        *("perplexity", folder, "--text", tmp_path / "a.txt", "--output", tmp_path / "out"),
        *("--length", 100, "--method", "rope", "--form", "rolling"),
    )
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    cell, facts = summary["scores"]["rope"]["100"], summary["settings"]
    total = cell["nll"] * facts["tokens"]
    assert facts["prefix"] == [1]
    assert cell["bits_per_byte"] == pytest.approx(total / len(TEXT * 4) / math.log(2))
    words = len(re.split(r"\s+", TEXT * 4))
    assert math.log(cell["word_perplexity"]) == pytest.approx(total / words)
    assert math.log(cell["byte_perplexity"]) == pytest.approx(total / len(TEXT * 4))


def test_samples_that_fail_are_told_at_the_end(tmp_path):
    """A model whose plain attention slides over 64 tokens refuses longer texts; DCA reads them."""
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    folder = make_llm(tmp_path / "mistral", sliding_window=64, **mistral)
    (tmp_path / "a.txt").write_text(TEXT * 8)
    result = invoke(
        *("perplexity", folder, "--text", tmp_path / "a.txt", "--output", tmp_path / "out"),
        *("--length", 150, "--stride", 100, "--method", "rope", "--method", "dca"),
    )
    assert result.exit_code == 1
    assert "sliding window of 64 tokens" in result.stderr
    assert "samples failed; the first, {'method': 'rope'" in result.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert set(summary["scores"]) == {"dca"}
    assert summary["failed"] == summary["samples"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --text or --tokens"),
        (["--text", "a", "--tokens", "b"], "give either --text or --tokens"),
        (["--text", "nothing.txt"], "is not a file"),
        (["--text", "a", "--length", "much"], "not a number of tokens"),
        (["--text", "{text}", "--paper", "gpt-5"], "--paper takes one of llama2-7b"),
        (["--text", "{text}", "--method", "alibi"], "method 'alibi' is not known"),
    ],
)
def test_bad_commands_are_one_message(folder, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT * 8)
    arguments = [a.format(text=tmp_path / "a.txt") for a in arguments]
    result = invoke("perplexity", folder, "--length", 64, "--stride", 64, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")


# --- the golden figures ------------------------------------------------------------------------


def test_golden_nll_of_chunkllamas_logits_through_the_command(golden, tmp_path):
    """Of its own tiny model, read with its own setting: by the logits that ChunkLlama gives."""
    ids, logits = golden["input_ids"], golden["logits"].astype(np.float64)
    peak = logits.max(axis=-1, keepdims=True)
    log_p = logits - peak - np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))
    theirs = -np.take_along_axis(log_p[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    dca = golden_llama.load_setting()
    for row, nll in zip(ids, theirs, strict=True):
        np.save(tmp_path / "ids.npy", row)
        out = tmp_path / f"out-{row[0]}-{row[1]}"
        result = invoke(
            *("perplexity", golden_llama.FOLDER / "tiny_llama", "--tokens", tmp_path / "ids.npy"),
            *("--method", f"dca:{dca.chunk_len},{dca.max_query_position}", "--dtype", "float32"),
            *("--length", 300, "--length", 100, "--limit", 1, "--form", "strided"),
            *("--output", out),
        )
        assert result.exit_code == 0, result.output
        run = read_run(out)
        assert run.settings["prefix"] == []  # no BOS before a window
        ours = {r.key["length"]: r.value["nll"] for r in run.records}
        assert ours == pytest.approx({n: nll[: n - 1].mean() for n in (300, 100)}, abs=1e-5)


@pytest.mark.slow
def test_golden_nll_of_moby_dick_through_the_command(shared, tmp_path):
    """What ChunkLlama itself computes of the windows [0, L) of a real book (nats a token)."""
    np.save(tmp_path / "moby.npy", read_tokens(shared))
    names = {"plain_rope": "rope", "chunkllama_ppl": "dca:chunkllama_ppl"}
    lengths = (300, 2048)
    result = invoke(
        *("perplexity", shared / "models/tinystories-656k", "--tokens", tmp_path / "moby.npy"),
        *(part for method in names.values() for part in ("--method", method)),
        *(part for length in lengths for part in ("--length", length)),
        *("--limit", 1, "--dtype", "float32", "--output", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.output
    run = read_run(tmp_path / "out")
    assert run.settings["prefix"] == []  # no BOS before a window
    ours = {(r.key["method"], r.key["length"]): r.value["nll"] for r in run.records}
    theirs = {
        (names[row["setting"]], row["L"]): row["nll"]
        for row in ROWS
        if row["L"] in lengths and row["setting"] in names
    }
    assert len(theirs) == 4
    assert ours == pytest.approx(theirs, abs=1e-3)
