"""Rows to train on: nothing lost, nothing twice, and the same again from any point on."""

import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_llm import fast_tokenizer

from dca_jax.errors import InputError
from dca_jax.finetune.data import (
    Source,
    evaluation_rows,
    row,
    rows_per_epoch,
    text_lengths,
    training_rows,
)
from dca_jax.finetune.preview import preview
from dca_jax.finetune.rendered import Rendered
from dca_jax.finetune.rendering import render_all
from dca_jax.finetune.templates import render
from dca_jax.finetune.turns import Dialogue, Text, Turn

PAD = -1
MANY = 1000  # tokens of dialogue d are MANY * d, MANY * d + 1, ...


def numbered(sizes: Sequence[int], *, first: int = 0) -> list[Rendered]:
    """Dialogues whose every token is unlike all others; about half of them trained on."""
    rng = np.random.default_rng(len(sizes))
    return [
        Rendered(
            MANY * number + np.arange(size, dtype=np.int32),
            rng.integers(0, 2, size).astype(np.bool_),
        )
        for number, size in enumerate(sizes, start=first)
    ]


def rows(sources: Sequence[Source], count: int, **settings: Any) -> dict[str, np.ndarray]:
    """The first rows of the stream, batches joined."""
    defaults = {"length": 8, "batch": 1, "seed": 0, "pack": "cut", "pad_id": PAD}
    stream = training_rows(sources, **(defaults | settings))
    found = list(itertools.islice(stream, count))
    return {key: np.concatenate([batch[key] for batch in found]) for key in found[0]}


def dialogues_of(tokens: np.ndarray) -> list[int]:
    """Which dialogues a stream of tokens is made of; each has to be there whole, but the last."""
    starts = np.flatnonzero(tokens % MANY == 0)
    assert starts[0] == 0
    for start, end in itertools.pairwise([*starts, len(tokens)]):
        np.testing.assert_array_equal(tokens[start:end], tokens[start] + np.arange(end - start))
    return (tokens[starts] // MANY).tolist()


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    length=st.integers(2, 12),
    seed=st.integers(0, 2**40),
)
def test_packed_rows_are_all_dialogues_one_after_the_other(
    sizes: list[int], length: int, seed: int
) -> None:
    dialogues = numbered(sizes)
    epochs = 3
    count = -(-epochs * sum(sizes) // length)
    found = rows([Source("a", dialogues)], count, length=length, seed=seed)
    assert found["lengths"].tolist() == [length] * count
    stream = found["tokens"].reshape(-1)[: epochs * sum(sizes)]
    order = dialogues_of(stream)
    every = np.tile(np.arange(len(sizes)), (epochs, 1))
    np.testing.assert_array_equal(np.sort(np.reshape(order, (epochs, -1))), every)
    wanted = np.concatenate([dialogues[number].tokens for number in order])
    np.testing.assert_array_equal(stream, wanted)
    trained = np.concatenate([dialogues[number].trained for number in order])
    trained[::length] = False  # nothing stands before a row's first token
    np.testing.assert_array_equal(found["trained"].reshape(-1)[: len(trained)], trained)


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8), length=st.integers(2, 10))
def test_padded_rows_hold_one_dialogue(sizes: list[int], length: int) -> None:
    dialogues = numbered(sizes)
    dialogues = [Rendered(d.tokens[:length], d.trained[:length]) for d in dialogues]
    found = rows([Source("a", dialogues)], 2 * len(sizes), length=length, pack="none")
    order = (found["tokens"][:, 0] // MANY).tolist()
    assert sorted(order) == sorted([*range(len(sizes))] * 2)
    for n, number in enumerate(order):
        one, size = row(found, n), min(sizes[number], length)
        np.testing.assert_array_equal(one.tokens, dialogues[number].tokens[:size])
        np.testing.assert_array_equal(one.trained[1:], dialogues[number].trained[1:size])
        assert not one.trained[0]
        assert found["tokens"][n, size:].tolist() == [PAD] * (length - size)
        assert not found["trained"][n, size:].any()


@pytest.mark.parametrize("pack", ["cut", "segments", "none"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_stream_goes_on_from_every_point(pack: str, batch: int) -> None:
    sources = [
        Source("a", numbered([3, 8, 40 if pack == "cut" else 6, 1, 2])),
        Source("b", numbered([7, 5], first=5), 1.5),
    ]
    stream = training_rows(sources, length=8, batch=batch, seed=5, pack=pack, pad_id=PAD)
    iterator, states, wanted = iter(stream), [], []
    for _ in range(40 // batch):
        states.append(json.dumps(iterator.get_state()))
        wanted.append(next(iterator))
    assert max(map(len, states)) < 100
    if pack == "cut":
        assert any(json.loads(state)["token"] > 0 for state in states)
    assert json.loads(states[-1])["epoch"] > 2
    used = iter(stream)  # one that stands elsewhere, as well as a new one
    for start, state in enumerate(states):
        for again in (iter(stream), used):
            again.set_state(json.loads(state))
            assert again.get_state() == json.loads(state)
            for batch_ in wanted[start : start + 3]:
                found = next(again)
                assert found.keys() == batch_.keys()
                for key in found:
                    assert found[key].dtype == batch_[key].dtype
                    np.testing.assert_array_equal(found[key], batch_[key])


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    length=st.integers(12, 30),
    seed=st.integers(0, 2**40),
)
def test_whole_rows_hold_every_dialogue_uncut(sizes: list[int], length: int, seed: int) -> None:
    dialogues = numbered(sizes)
    sources = [Source("a", dialogues)]
    count = rows_per_epoch(sources, length=length, pack="whole", seed=seed)
    found = rows(sources, count, length=length, seed=seed, pack="segments")
    whole = rows(sources, count, length=length, seed=seed, pack="whole")
    seen = []
    for number in range(count):
        one = row(found, number)
        order = dialogues_of(one.tokens)
        seen += order
        index = found["text_index"][number]
        starts = np.cumsum([0, *(sizes[n] for n in order)])
        np.testing.assert_array_equal(
            index[: starts[-1]], np.concatenate([np.arange(sizes[n]) for n in order])
        )
        assert (index[starts[-1] :] == -1).all()
        for n, start in zip(order, starts, strict=False):
            want = dialogues[n].trained.copy()
            want[0] &= start > 0
            np.testing.assert_array_equal(one.trained[start : start + sizes[n]], want)
    assert sorted(seen) == list(range(len(sizes)))
    if count > 1:  # what does not fit into any row before it begins a new one
        assert np.sort(found["lengths"])[:2].sum() > length
    lengths = text_lengths(found)
    assert sorted(lengths.tolist()) == sorted(sizes)
    for key in ("tokens", "trained", "lengths"):
        np.testing.assert_array_equal(found[key], whole[key])
    assert text_lengths(whole).tolist() == whole["lengths"].tolist()


def test_rows_of_one_dialogue_come_in_batches_of_like_lengths() -> None:
    """Padded to a power of two; so short dialogues do not cost what long ones do."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(20), np.log(16_000), 200)).astype(int)
    sources = [Source("a", [Rendered(np.zeros(n, np.int32), np.ones(n, np.bool_)) for n in sizes])]
    options: dict[str, Any] = {"length": 16_384, "batch": 8, "seed": 0, "pad_id": PAD}
    batches = list(itertools.islice(training_rows(sources, pack="none", **options), 50))
    widths = {batch["tokens"].shape[1] for batch in batches}
    assert widths <= {2**n for n in range(8, 15)}
    assert len(widths) > 3
    padded = sum(batch["tokens"].size for batch in batches)
    assert padded < 2 * 2 * sizes.sum()  # of two epochs
    assert sorted(np.concatenate([batch["lengths"] for batch in batches])) == sorted([*sizes] * 2)


def test_a_state_of_other_data_is_refused() -> None:
    dialogues = numbered([3, 8, 4])
    settings: dict[str, Any] = {"length": 8, "batch": 1, "pad_id": PAD}
    stream = training_rows([Source("a", dialogues)], seed=0, pack="cut", **settings)
    state = iter(stream).get_state()
    other = Rendered(dialogues[2].tokens, ~dialogues[2].trained)
    for changed in (
        training_rows([Source("a", [*dialogues[:2], other])], seed=0, pack="cut", **settings),
        training_rows([Source("a", dialogues[:2])], seed=0, pack="cut", **settings),
        training_rows([Source("a", dialogues, 2.0)], seed=0, pack="cut", **settings),
        training_rows([Source("a", dialogues)], seed=1, pack="cut", **settings),
        training_rows([Source("a", dialogues)], seed=0, pack="none", **settings),
    ):
        with pytest.raises(InputError, match="the data is not what this run began with"):
            iter(changed).set_state(state)


def test_batches_are_of_the_same_rows_and_types() -> None:
    sources = [Source("a", numbered([5, 8, 2, 7]))]
    for pack in ("cut", "whole"):
        single, joined = rows(sources, 24, pack=pack), rows(sources, 6, pack=pack, batch=4)
        for key, dtype in {"tokens": np.int32, "trained": np.bool_, "lengths": np.int32}.items():
            np.testing.assert_array_equal(single[key], joined[key])
            assert single[key].dtype == dtype


def test_the_seed_decides_and_every_epoch_differs() -> None:
    sources = [Source("a", numbered([1] * 20), 1.0)]
    order = rows(sources, 60, pack="none")["tokens"][:, 0].tolist()
    assert order == rows(sources, 60, pack="none")["tokens"][:, 0].tolist()
    assert order != rows(sources, 60, pack="none", seed=1)["tokens"][:, 0].tolist()
    epochs = [order[:20], order[20:40], order[40:]]
    assert all(one != other for one, other in itertools.combinations(epochs, 2))


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0, 1.5, 2.0])
def test_a_weight_is_how_often_a_dialogue_is_seen(weight: float) -> None:
    plain, weighted = numbered([1] * 7), numbered([1] * 13, first=7)
    sources = [Source("a", plain), Source("b", weighted, weight)]
    per_epoch = 7 + 13 * weight
    assert rows_per_epoch(sources, length=8, pack="none") == -(-per_epoch // 1)
    seen: Counter[int] = Counter()
    tokens = rows(sources, round(20 * per_epoch), pack="none")["tokens"][:, 0] // MANY
    seen.update(tokens.tolist())
    assert [seen[number] for number in range(7)] == [20] * 7
    assert [seen[number] for number in range(7, 20)] == [20 * weight] * 13
    first = Counter(tokens[: int(7 + 13 * weight)].tolist())  # an epoch is of all the sources
    assert [first[number] for number in range(7)] == [1] * 7
    assert max(seen.values()) - min(seen.values()) == abs(20 - 20 * weight)


def test_rows_of_an_epoch() -> None:
    sources = [Source("a", numbered([10, 6])), Source("b", numbered([5]), 0.2)]
    assert rows_per_epoch(sources, length=8, pack="cut") == 3  # 17 tokens
    assert rows_per_epoch(sources, length=17, pack="cut") == 1
    assert rows_per_epoch(sources, length=10, pack="none") == 3  # 2.2


def test_rows_to_evaluate_on() -> None:
    dialogues = numbered([3, 8, 12, 1, 5])
    batches = evaluation_rows(dialogues, length=8, batch=2, pad_id=PAD)
    assert [batch["lengths"].tolist() for batch in batches] == [[8, 8], [5, 3], [1, 1]]
    assert all(batch["tokens"].shape == batch["trained"].shape == (2, 8) for batch in batches)
    longest_first = [dialogues[n] for n in (2, 1, 4, 0, 3)]
    for number, dialogue in enumerate(longest_first):
        one = row(batches[number // 2], number % 2)
        np.testing.assert_array_equal(one.tokens, dialogue.tokens[:8])
        np.testing.assert_array_equal(one.trained[1:], dialogue.trained[1:8])
    assert not batches[-1]["trained"][1].any()
    assert batches[-1]["tokens"][1].tolist() == [PAD] * 8
    assert len(evaluation_rows(dialogues[:4], length=8, batch=2, pad_id=PAD)) == 2


@pytest.mark.parametrize(
    ("sources", "settings", "message"),
    [
        ([], {}, "there is no data"),
        ([Source("empty.json", [])], {}, r"empty\.json: no dialogue is left"),
        ([Source("a", numbered([3]), 0.0)], {}, "weight must be above 0, got 0"),
        ([Source("a", numbered([3]), float("nan"))], {}, "weight must be above 0, got nan"),
        ([Source("a", numbered([3, 0]))], {}, "has no tokens"),
        ([Source("a", numbered([9]))], {"pack": "whole"}, "is longer than a row of 8"),
        ([Source("a", numbered([3]))], {"length": 1}, "at least 2 tokens"),
        ([Source("a", numbered([3]))], {"batch": 0}, "a batch of at least 1"),
        ([Source("a", numbered([3]))], {"seed": -1}, "a seed from 0"),
    ],
)
def test_what_makes_no_sense(sources: list[Source], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rows(sources, 1, **settings)


# From dialogues to rows


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return fast_tokenizer()


def said(question: str, answer: str) -> Dialogue:
    return Dialogue((Turn("user", question, False), Turn("assistant", answer, True)))


def test_all_are_rendered_and_what_is_dropped_is_counted(
    tokenizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    masked = Dialogue((Turn("user", "x" * 30, False), Turn("assistant", "a", False)))
    given_dialogues = [
        said("Call me", "Ishmael"),
        said("a", "b"),
        masked,
        said("z" * 50, "beyond"),
        said("y" * 30, "w" * 50),
    ]
    whole = [render(one, tokenizer, "llama-2") for one in given_dialogues]
    options = {"template": "llama-2", "min_tokens": len(whole[1].tokens) + 1}
    kept, counts = render_all("x.json", given_dialogues, tokenizer, **options)
    for found, number in zip(kept, (0, 3, 4), strict=True):
        np.testing.assert_array_equal(found.tokens, whole[number].tokens)
        np.testing.assert_array_equal(found.trained, whole[number].trained)
    fewer = f"dropped: fewer than {options['min_tokens']} tokens"
    assert counts == {fewer: 1, "dropped: no token to train on": 1}
    printed = capsys.readouterr()
    assert "rendering x.json" in printed.err
    assert printed.out == ""
    kept, counts = render_all("x.json", given_dialogues, tokenizer, **options, cut=60)
    assert [len(one.tokens) for one in kept] == [len(whole[0].tokens), 60]
    assert counts == {
        fewer: 1,
        "dropped: no token to train on": 2,
        "cut after 60 tokens": 1,
    }


WRONG = Dialogue((Turn("user", "And so?", False), Turn("user", "Hm?", False), *said("", "").turns))


def test_what_a_template_refuses_is_dropped_and_counted(tokenizer: Any) -> None:
    dialogues = [said("a", "b"), WRONG, said("c", "d"), WRONG]
    kept, counts = render_all("x.json", dialogues, tokenizer, template="llama-2")
    assert len(kept) == 2
    reason = "the chat template refuses it: user and assistant must alternate"
    assert counts == {f"dropped: {reason}": 2}
    with pytest.raises(InputError, match=r"x\.json: none of its 2 dialogues can be written"):
        render_all("x.json", [WRONG, WRONG], tokenizer, template="llama-2")


def test_a_text_is_split_where_a_dialogue_is_cut(tokenizer: Any) -> None:
    """Between what the tokenizer puts before texts, and EOS; no token of it is lost."""
    whole = render(Text("x" * 30), tokenizer, "llama-2")
    assert whole.tokens[-1] == tokenizer.eos_token_id
    assert whole.trained.tolist() == [False] + [True] * (len(whole.tokens) - 1)
    kept, counts = render_all("x.txt", [Text("x" * 30)], tokenizer, template="llama-2", cut=8)
    assert counts == {"split into pieces of 8 tokens": 1}
    np.testing.assert_array_equal(np.concatenate([one.tokens for one in kept]), whole.tokens)
    asked = render(Text(" are", prompt="they"), tokenizer, "llama-2")
    bare = render(Text("they are"), tokenizer, "llama-2")
    np.testing.assert_array_equal(asked.tokens, bare.tokens)
    trained = [int(n) for n in asked.tokens[asked.trained]]
    assert tokenizer.decode(trained).strip() == "are</s>"


def previewed(rendered: Rendered, tokenizer: Any, **options: Any) -> str:
    out = io.StringIO()
    preview(rendered, tokenizer, Console(file=out, width=40, **options))
    return out.getvalue()


def test_a_preview_without_colour(tokenizer: Any) -> None:
    rendered = render(said("Wie weit? 海", "Zehn Meilen 🌊 [b]\x1b[2J"), tokenizer, "llama-2")
    shown = previewed(rendered, tokenizer)
    text, legend = shown.rsplit("\n", 2)[:2]
    assert text == "<s>[INST] Wie weit? 海 [/INST]⟦ Zehn Meilen 🌊 [b]\\x1b[2J </s>⟧"
    trained, size = int(rendered.trained.sum()), len(rendered.tokens)
    assert legend == f"{trained} of {size} tokens are trained on: ⟦these⟧, not these"


def test_a_preview_in_colour(tokenizer: Any) -> None:
    rendered = render(said("far?", "Ten miles"), tokenizer, "llama-2")
    shown = previewed(
        rendered, tokenizer, force_terminal=True, color_system="standard", no_color=False
    )
    assert "⟦" not in shown
    assert "\x1b[1;32m Ten miles </s>\x1b[0m" in shown
    assert "\x1b[2m<s>[INST] far? [/INST]\x1b[0m" in shown
    assert "⟦ Ten" in previewed(rendered, tokenizer, force_terminal=True, no_color=True)


def test_a_preview_of_a_row_that_begins_and_changes_inside_a_character(tokenizer: Any) -> None:
    tokens = np.asarray(tokenizer("🌊 海", add_special_tokens=False).input_ids, np.int32)
    for change in range(len(tokens) + 1):
        trained = np.arange(len(tokens)) >= change
        text = previewed(Rendered(tokens, trained), tokenizer).rsplit("\n", 2)[0]
        assert re.sub("[⟦⟧]", "", text) == "🌊 海"
    assert previewed(Rendered(tokens[1:], trained[1:]), tokenizer).split("\n")[0].endswith(" 海")


def test_large_counts_are_readable(tokenizer: Any) -> None:
    rendered = Rendered(np.full(1024, 5, np.int32), np.arange(1024) >= 612)
    assert "412 of 1,024 tokens are trained on" in previewed(rendered, tokenizer)
