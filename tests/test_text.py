"""Text from tokens as they come: whole characters, spaces in place, stop strings never shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llm import byte_level_tokenizer, metaspace_tokenizer
from transformers import PreTrainedTokenizerFast

from dca_jax.inference.text_stream import TextStream

END = 2


def wrapped(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS = {
    "byte-level": wrapped(byte_level_tokenizer()),
    "metaspace": wrapped(metaspace_tokenizer()),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def streamed(tokenizer, prompt, tokens, **options):
    stream = TextStream(tokenizer, prompt, **options)
    pieces = [stream.push(token) for token in tokens if stream.finish_reason is None]
    pieces.append(stream.close())
    assert "".join(pieces) == stream.text
    return stream, pieces


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Call me", " Ishmael. Some years ago"),
        ("the", " watery 🌍🌎 part, 日本語 and ñandú"),
        ("日本", "語の世界"),
        ("money", ", or  two   spaces\n\n\tand lines"),
    ],
)
def test_the_pieces_join_to_the_text_of_the_whole(tokenizer, before, after):
    tokens = tokenizer(before + after, add_special_tokens=False).input_ids
    cuts = 0
    for cut in range(1, len(tokens)):
        prompt, new = tokens[:cut], tokens[cut:]
        stream, pieces = streamed(tokenizer, prompt, new)
        shown = tokenizer.decode(prompt)
        if "\ufffd" not in shown:
            cuts += 1
            assert shown + stream.text == before + after
            assert not any("\ufffd" in piece for piece in pieces)
    assert cuts >= len(after) / 4


def test_a_prompt_that_ends_inside_a_character_is_completed():
    tokenizer = TOKENIZERS["byte-level"]
    text = "a part of 日本語の世界"
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    for cut in range(1, len(tokens)):
        shown = tokenizer.decode(tokens[:cut]).rstrip("\ufffd")
        stream, _ = streamed(tokenizer, tokens[:cut], tokens[cut:])
        assert shown + stream.text == text


@given(st.text(max_size=40), st.text(max_size=8))
def test_any_text_comes_through(text, before):
    tokenizer = TOKENIZERS["byte-level"]
    prompt = tokenizer(before).input_ids
    new = tokenizer(text, add_special_tokens=False).input_ids
    stream, _ = streamed(tokenizer, prompt, new)
    assert stream.text == tokenizer.decode(new)


def test_a_word_keeps_its_space_after_a_prompt_of_sentencepiece():
    tokenizer = TOKENIZERS["metaspace"]
    me = tokenizer("me", add_special_tokens=False).input_ids
    assert tokenizer.decode(me) == "me"
    stream, _ = streamed(tokenizer, tokenizer("Call").input_ids, me)
    assert stream.text == " me"


def test_special_tokens_are_not_text_and_the_space_after_them_stays():
    tokenizer = TOKENIZERS["metaspace"]
    ids = tokenizer("Call me sail", add_special_tokens=False).input_ids
    special = tokenizer.convert_tokens_to_ids("<s>")
    stream, _ = streamed(tokenizer, ids[:1], [*ids[1:2], special, *ids[2:]])
    whole = tokenizer.decode([*ids[:2], special, *ids[2:]], skip_special_tokens=True)
    assert tokenizer.decode(ids[:1]) + stream.text == whole


def test_an_unfinished_character_is_shown_at_the_end_only(tokenizer):
    ids = tokenizer("a🌍", add_special_tokens=False).input_ids
    stream, pieces = streamed(tokenizer, ids[:1], ids[1:-1])
    assert set(pieces[:-1]) <= {"", "a"}
    assert stream.text.strip("a") != ""
    assert set(stream.text.strip("a")) == {"\ufffd"}


def test_a_stop_id_ends_the_text_and_is_none_of_it(tokenizer):
    ids = tokenizer("Call me Ishmael", add_special_tokens=False).input_ids
    stream, _ = streamed(tokenizer, ids[:1], [*ids[1:3], END, *ids[3:]], stop_ids=[END])
    assert stream.finish_reason == "stop"
    assert stream.tokens == [*ids[1:3], END]
    assert stream.text == tokenizer.decode(ids[:3])[len(tokenizer.decode(ids[:1])) :]


def test_a_text_that_ends_nowhere_has_reached_its_length(tokenizer):
    stream, _ = streamed(tokenizer, [7], [8, 9], stop_ids=[END], stop=["never"])
    assert stream.finish_reason == "length"
    assert stream.tokens == [8, 9]


@given(
    st.text("abc🌍", max_size=25),
    st.lists(st.text("abc🌍", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_first_stop_string_to_be_complete_cuts_the_text(text, stops):
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer("x" + text, add_special_tokens=False).input_ids
    stream, _ = streamed(tokenizer, ids[:1], ids[1:], stop=stops)
    # Characters are whole tokens or become complete with one, so ends are reached in order.
    matches = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not matches:
        assert (stream.text, stream.finish_reason) == (text, "length")
        return
    end = min(matches)[0]
    assert stream.text == text[: min(start for stop, start in matches if stop == end)]
    assert stream.finish_reason == "stop"


def test_a_stop_string_over_several_tokens_never_leaks(tokenizer):
    text = "Call me Ishmael. Some years"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    stream, pieces = streamed(tokenizer, ids[:1], ids[1:], stop=["shmael. S"])
    assert len(stream.tokens) < len(ids) - 1
    shown = ""
    for piece in pieces:
        shown += piece
        assert not any(shown.endswith("shmael. S"[:n]) for n in range(2, 10))
    assert tokenizer.decode(ids[:1]) + shown == "Call me I"


def test_what_only_looked_like_a_stop_string_is_shown(tokenizer):
    ids = tokenizer("Call me Ishmael", add_special_tokens=False).input_ids
    stream, _ = streamed(tokenizer, ids[:1], ids[1:], stop=["Ishmaelite"])
    assert tokenizer.decode(ids[:1]) + stream.text == "Call me Ishmael"
    assert stream.finish_reason == "length"


def test_without_a_tokenizer_there_are_tokens_and_no_text():
    stream, _ = streamed(None, [1], [5, 6, END, 7], stop_ids=[END])
    assert (stream.tokens, stream.text, stream.finish_reason) == ([5, 6, END], "", "stop")


def test_a_replacement_character_is_a_character(tokenizer):
    """U+FFFD in a text is no half character: neither echoed from the prompt nor held back."""
    for text in ("a\ufffd", "\ufffd\ufffdb", "\ufffd" * 12):
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        new = tokenizer("xy\ufffdz", add_special_tokens=False).input_ids
        stream, pieces = streamed(tokenizer, prompt, new)
        assert stream.text == tokenizer.decode([*prompt, *new])[len(tokenizer.decode(prompt)) :]
        assert pieces[-1] == ""


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<s>", "abc"),  # a special token's name ends the text at the token
        ("c<s>d", "ab"),
        ("cd", "ab"),  # where one sees no special token, there is none
        ("s>", None),  # a part of its name does not
        ("<s>x", None),
    ],
)
def test_a_stop_string_may_name_special_tokens(stop, text):
    tokenizer = TOKENIZERS["byte-level"]
    before, after = (tokenizer(t, add_special_tokens=False).input_ids for t in ("abc", "de"))
    mark = tokenizer.convert_tokens_to_ids("<s>")
    stream, pieces = streamed(tokenizer, [], [*before, mark, *after], stop=[stop])
    assert stream.text == ("abcde" if text is None else text)
    assert stream.finish_reason == ("length" if text is None else "stop")
    assert not any("<" in piece for piece in pieces)
