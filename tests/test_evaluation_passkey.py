"""`eval passkey`: the original's prompts bit for bit, its judgement, tables and heat maps."""

import hashlib
import json
import re

import numpy as np
import pytest
from shared_fixtures import invoke_eval

import dca_jax
from dca_jax.errors import InputError
from dca_jax.evaluation import answers, passkey, report
from dca_jax.evaluation.grids import accuracy_grid
from dca_jax.evaluation.passkey import filler_characters, paper_prompt
from dca_jax.evaluation.results import ResultLog, read_run

# Of ChunkLlama's own generators, run with NumPy's legacy seeding: length, seed, depth (None: drawn,
# as in passkey/test_passkey.py; else needle_in_a_haystack/retrieve_needle.py), the key, the first
# half of the prompt's SHA-256, its characters.
ORIGINAL = [
    (1024, 0, None, "43568", "e7c6aa7c67435192a9cb2fdbe0108852", 3319),
    (1024, 0, 0.0625, "355711", "9b3246352b73568b5cecd97acd2d57db", 3321),
    (1024, 0, 0.5, "355711", "223610a279a8653c4939badef21b73aa", 3321),
    (1024, 0, 1.0, "355711", "e209b13c1bcdad30f65e6ea41d0ec870", 3321),
    (1024, 7, None, "49690", "abc86a70ea1633742504074f94d08fed", 3319),
    (1024, 7, 0.0625, "111615", "07402ecaa40b7e35780ce255cd0f062e", 3321),
    (1024, 7, 0.5, "111615", "6f936c54282afa7c402b158f423218b6", 3321),
    (1024, 7, 1.0, "111615", "8a43bf24a72c29ae1a50d0d1a46a2e42", 3321),
    (4096, 1, None, "33004", "1e5bfc622ad2817fbaa452df589724c1", 15607),
    (4096, 1, 0.0625, "178037", "c44a30013f334f9fc6024bd56d96818a", 15609),
    (4096, 1, 0.5, "178037", "8337f5f9f9cb66f3deb8e8e14bedb7be", 15609),
    (4096, 1, 1.0, "178037", "60ea7bb325c7c7909d2790863c7b63b9", 15609),
    (100000, 49, None, "29097", "935bf7d39c55962004649f05dcaa3590", 375031),
    (100000, 49, 0.0625, "312570", "d5659a57cbc0ee380538faa9ef4bdca1", 375033),
    (100000, 49, 0.5, "312570", "8a906d6cf01f32bdf2da3ef32da8bb8f", 375033),
    (100000, 49, 1.0, "312570", "ab6fd7eb4fb58af3a35d466bd31e2cbb", 375033),
]


@pytest.mark.parametrize(("length", "seed", "depth", "key", "digest", "characters"), ORIGINAL)
def test_prompts_are_the_originals_bit_for_bit(length, seed, depth, key, digest, characters):
    prompt = paper_prompt(filler_characters(length), seed, depth)
    assert prompt.key == key
    assert len(prompt.text) == characters
    assert hashlib.sha256(prompt.text.encode()).hexdigest()[:32] == digest


def test_the_amount_of_filler():
    assert [filler_characters(n) for n in (512, 1024, 4096, 12_288, 200_000)] == [
        *(1024, 3072, 15_360, 46_080, 749_568)
    ]


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("length", [80, 300, 2000])
def test_the_fitted_prompt_is_the_longest_that_fits(length, uneven):
    """Found in a few measurements where filler is even, and found all the same where it is not."""
    measured: list[str] = []

    def count(text: str) -> int:
        measured.append(text)
        words = len(text.split())
        return words + (words // 100) ** 2 if uneven else words

    prompt = passkey.passkey_prompt(count, length, 0.4, np.random.default_rng(0))
    assert uneven or len(measured) <= 7
    sentences = sum(prompt.text.count(sentence) for sentence in passkey.FILLER)
    assert prompt.text == passkey.passkey_text(sentences, 0.4, prompt.key)
    one_more = passkey.passkey_text(sentences + 1, 0.4, prompt.key)
    assert count(prompt.text) <= length < count(one_more)


@pytest.fixture
def replies(plain_llm, monkeypatch):
    """In place of the model: one that finds keys in the first half of a prompt only."""
    asked: list[int] = []

    def generate(model, prompts, *, max_new_tokens, stop_ids, cache, on_piece):
        asked.append(len(prompts))
        found = []
        for prompt in prompts:
            text = plain_llm.tokenizer.decode(prompt, skip_special_tokens=True)
            assert text.startswith(passkey.TASK)
            assert text.endswith(passkey.QUESTION)
            key = re.search(r"The pass key is ([0-9]+)\.", text)
            on_piece(len(prompt))
            said = key.group(1) if key.start() < len(text) / 2 else "7"
            ids = plain_llm.tokenizer(f" {said}.", add_special_tokens=False).input_ids
            found.append(ids[:max_new_tokens])
        return found

    monkeypatch.setattr(answers, "generate", generate)
    monkeypatch.setattr(answers, "answer_about", answers.answer)
    return asked


def test_a_grid_of_depths(tmp_path, plain_llm, replies):
    with ResultLog(tmp_path, "passkey", {"form": "paper", "trained_length": 512}) as log:
        options = {"form": "paper", "methods": ["rope", "dca"], "lengths": [512, 1024]}
        depths = [0.25, 0.5, 1.0]
        passkey.evaluate(plain_llm, log, depths=depths, trials=2, batch=4, **options)
        assert replies == [4, 2] * 4  # batches of one length and method
        assert len(log.records) == 2 * 2 * 3 * 2
        by_depth = {
            depth: [r.value["found"] for r in log.records if r.key["depth"] == depth]
            for depth in depths
        }
        grid = accuracy_grid([r for r in log.records if r.key["method"] == "dca"], "found")
    assert by_depth == {0.25: [True] * 8, 0.5: by_depth[0.5], 1.0: [False] * 8}
    assert (grid.lengths, grid.depths) == ((512, 1024), (0.25, 0.5, 1.0))
    np.testing.assert_array_equal(grid.accuracy[:, [0, 2]], [[1, 0], [1, 0]])
    record = read_run(tmp_path).records[0]
    prompt = paper_prompt(1024, 0, 0.25)
    assert record.value["key"] == prompt.key
    assert record.value["answer"] == f" {prompt.key}."
    assert record.value["tokens"] == len(plain_llm.tokenize(prompt.text))  # measured
    found = report.write_report(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy.png", "heat_map.png"}
    measured = np.mean([r.value["tokens"] for r in read_run(tmp_path).records][:6])
    assert found.tables[0].header[1] == f"512 ({measured:,.0f} tokens)"
    assert "In the paper" not in found.tables[0].markdown()


@pytest.mark.parametrize("form", ["paper", "fitted"])
def test_by_chat_the_answers_beginning_follows_the_users_message(plain_llm, form):
    asked = passkey._question(plain_llm, form, 900, 0.5, 3, True)
    text = plain_llm.tokenizer.decode(asked.prompt)
    first, said = text.split("<|user|>")[1].split("<|assistant|>")
    assert first.startswith(passkey.TASK)
    assert first.rstrip().endswith("What is the pass key?")
    assert said.strip() == "The pass key is"
    if form == "fitted":
        assert 850 < len(asked.prompt) <= 900
        raw = passkey._question(plain_llm, form, 900, 0.5, 3, False)
        right = answers.Answer([], "")
        assert asked.judge(right)["key"] == raw.judge(right)["key"]
    else:
        assert len(asked.prompt) > len(plain_llm.tokenize(paper_prompt(3072, 3, 0.5).text))


def test_lengths_share_a_cache_of_the_capacity_asked_for(tmp_path, plain_llm, monkeypatch):
    capacities = []

    def generate(model, prompts, *, cache, **options):
        capacities.append(cache.capacity)
        return [[1] for _ in prompts]

    monkeypatch.setattr(answers, "generate", generate)
    with ResultLog(tmp_path, "passkey", {}) as log:
        asked = {"form": "fitted", "methods": ["rope"], "lengths": [300, 5000], "depths": None}
        passkey.evaluate(plain_llm, log, trials=1, **asked)
        assert capacities[0] < capacities[1]
        passkey.evaluate(plain_llm, log, trials=2, capacity=5100, **asked)
    assert capacities[2] == capacities[3] >= 5100


def test_random_depths_have_no_heat_map(tmp_path, plain_llm, replies):
    settings = {"form": "fitted", "trained_length": 512}
    with ResultLog(tmp_path, "passkey", settings, paper="llama2-13b") as log:
        options = {"form": "fitted", "methods": ["rope"], "lengths": [900], "depths": None}
        passkey.evaluate(plain_llm, log, trials=6, **options)
        assert all(850 < r.value["tokens"] <= 900 for r in log.records)
        assert 0 < sum(r.value["found"] for r in log.records) < 6
        assert len({r.value["key"] for r in log.records}) == 6
    found = report.write_report(tmp_path)
    assert list(found.pictures) == ["accuracy.png"]
    assert "18k tokens" in found.tables[0].markdown()
    other = passkey.outcome(settings, read_run(tmp_path).records, "llama2-70b")
    assert "In the paper" not in other.tables[0].markdown()  # which has no such figure of it


def test_a_key_is_found_token_by_token(plain_llm):
    expected = passkey.key_tokens(plain_llm, "4711")
    said = plain_llm.tokenizer(" 4711.", add_special_tokens=False).input_ids
    assert passkey.is_found(said, expected)
    assert passkey.is_found(said[1:], expected)  # without the space: another tokenizer's way
    assert not passkey.is_found(said[:-2], expected)
    assert not passkey.is_found([*said[:1], *said[:1], *said[1:]], expected)


def test_a_prompt_that_cannot_be_made_costs_no_other(tmp_path, plain_llm, replies):
    with ResultLog(tmp_path, "passkey", {"form": "fitted", "trained_length": 64}) as log:
        options = {"form": "fitted", "methods": ["rope"], "lengths": [40, 900], "depths": [0.1]}
        passkey.evaluate(plain_llm, log, trials=1, **options)
        errors = {record.key["length"]: record.error for record in log.records}
    assert errors[900] is None
    assert re.search("a passkey prompt has at least", errors[40])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "long"}, "expected one of paper, fitted"),
        ({"lengths": []}, "needs at least one length"),
        ({"lengths": [512, 200]}, "for 274 tokens or more; got 200"),
        ({"depths": []}, "needs at least one length, one depth"),
        ({"depths": [1.5]}, "depth must be between 0 and 1"),
        ({"trials": 0}, "and one trial"),
        ({"methods": ["alibi"]}, "method 'alibi' is not known"),
    ],
)
def test_bad_requests_are_refused(tmp_path, plain_llm, options, message):
    asked = {"form": "paper", "methods": ["rope"], "lengths": [512], "depths": None, "trials": 1}
    with (
        ResultLog(tmp_path, "passkey", {}) as log,
        pytest.raises(InputError, match=message),
    ):
        passkey.evaluate(plain_llm, log, **(asked | options))


def test_the_command(folder, plain_llm, tmp_path):
    """A random model finds nothing; the run, the files and the answers are what counts."""
    arguments = ["passkey", folder, "--form", "fitted", "--length", "600", "--grid", 2]
    arguments += ["--trials", 1, "--method", "dca", "--output", tmp_path / "out", "--batch", 2]
    done = invoke_eval(*arguments)
    assert done.exit_code == 0, done.output
    assert "| dca | 0.0 (0.0 to 65.8; 2) |" in done.stdout
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["scores"]["dca"]["600"] == {
        "accuracy": 0.0,
        "samples": 2,
        "interval": [0.0, pytest.approx(0.6576, abs=1e-4)],  # Z^2 / (n + Z^2)
    }
    record = read_run(tmp_path / "out").records[1]
    assert record.key == {"method": "dca", "length": 600, "depth": 1.0, "trial": 0}
    prompt = passkey._cell_prompt(plain_llm, 600, 1.0, 0, seed=0)
    reading = dca_jax.load(folder, dca="paper", dtype="float32")
    alone = reading.generate(prompt.text, max_new_tokens=passkey.ANSWER_TOKENS)[0]
    assert record.value["answer"] == answers.decode(plain_llm, alone.tokens)
