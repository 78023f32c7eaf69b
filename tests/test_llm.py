"""Text in, text out: loading, generating, streaming, prefixes, conversations."""

import importlib.util
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llm import CHAT_TEMPLATE, make_llm, save_tokenizer

import dca_jax
from checkpoints_convert.hf_to_orbax import convert
from dca_jax import DCAConfig, RopeConfig, Sampler
from dca_jax.config import choose_dca
from dca_jax.errors import InputError
from dca_jax.inference import documents, logits, options
from dca_jax.inference import generate as engine
from dca_jax.inference.chat import Conversation
from dca_jax.inference.generate import generate
from dca_jax.inference.options import OptionNames
from dca_jax.inference.prompts import check_messages, each_prompt, token_ids
from dca_jax.inference.requests import Request, answers
from dca_jax.inference.steps import stop_and_decode
from dca_jax.inference.tokenizer import find_stop_ids
from dca_jax.model import Llama

# Short enough that every cache has 128 places, and beyond the chunk of 48: few programs to compile.
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, " * 2
QUESTIONS = ["having little money", "é日本"]
ROOM = 30


# --- loading -----------------------------------------------------------------------------------


def test_load_takes_the_papers_setting_and_the_devices_dtype(llm):
    assert llm.model.dca == DCAConfig.paper(64)
    assert llm.model.dtype == llm.cache_dtype == jnp.float32
    assert llm.model.config.rope == RopeConfig()
    assert llm.stop_ids == {2}


def test_load_takes_what_it_is_told(folder):
    scaled = RopeConfig(rope_type="linear", factor=4.0)
    told = dca_jax.load(
        folder, dca=None, rope=scaled, dtype="bfloat16", cache_dtype="float32", implementation="xla"
    )
    assert told.model.dca is None
    assert told.model.config.rope == scaled
    assert told.model.dtype == jnp.bfloat16
    assert told.cache_dtype == jnp.float32
    assert len(told.generate("Call", max_new_tokens=1)[0].tokens) == 1


def test_a_converted_folder_is_the_same_model(folder, llm, tmp_path):
    convert(folder, tmp_path / "converted")
    again = dca_jax.load(tmp_path / "converted")
    assert again.stop_ids == llm.stop_ids
    jax.tree.map(np.testing.assert_array_equal, again.model.params(), llm.model.params())
    assert again.tokenize(TEXT) == llm.tokenize(TEXT)


@pytest.mark.parametrize(
    ("choice", "setting"),
    [
        (None, None),
        ("none", None),
        ("auto", DCAConfig.paper(64)),
        ("paper", DCAConfig.paper(64)),
        ("chunkllama", DCAConfig.chunkllama(64)),
        ("chunkllama_ppl", DCAConfig.chunkllama_ppl(64)),
        ("chunkllama_flash_decoding", DCAConfig.chunkllama_flash_decoding(64)),
        (
            DCAConfig(chunk_len=5, max_query_position=9),
            DCAConfig(chunk_len=5, max_query_position=9),
        ),
    ],
    ids=str,
)
def test_a_setting_may_be_named(llm, choice, setting):
    assert choose_dca(choice, llm.model.config) == setting


def test_a_checkpoint_that_asks_for_dca_gets_its_own(llm):
    own = DCAConfig(chunk_len=40, max_query_position=60)
    config = replace(llm.model.config, dca=own)
    assert choose_dca("auto", config) == own
    assert choose_dca("paper", config) == DCAConfig.paper(64)


def test_up_to_a_chunk_dca_is_plain_attention(folder, llm):
    plain = dca_jax.load(folder, dca=None)
    tokens = llm.tokenize(TEXT)
    ours, theirs = llm.logits([tokens])[0], plain.logits([tokens])[0]
    chunk = llm.model.dca.chunk_len
    np.testing.assert_allclose(ours[:chunk], theirs[:chunk], rtol=1e-5, atol=1e-5)
    assert not np.allclose(ours[chunk:], theirs[chunk:], atol=0.1)


def test_every_file_that_names_an_end_is_believed(folder, llm, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert find_stop_ids(tmp_path, llm.model.config, llm.tokenizer) == {2, 7, 9}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 11}')
    assert find_stop_ids(tmp_path, llm.model.config, None) == {2, 11}


def test_what_cannot_be_loaded_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="neither a folder nor the name of a model on the"):
        dca_jax.load(tmp_path / "absent")
    with pytest.raises(InputError, match="could not be downloaded from the Hugging Face Hub"):
        dca_jax.load("nobody/nothing-of-that-name")
    with pytest.raises(InputError, match="is a file; give the folder"):
        dca_jax.load(folder / "config.json")
    with pytest.raises(InputError, match="DCA setting 'large' is not known; expected auto, none"):
        dca_jax.load(folder, dca="large")
    with pytest.raises(InputError, match="dtype 'float8' is not supported"):
        dca_jax.load(folder, dtype="float8")
    with pytest.raises(InputError, match="unknown attention implementation 'best'"):
        dca_jax.load(folder, implementation="best")


def test_a_tokenizer_that_runs_code_or_is_damaged_is_refused(tmp_path):
    make_llm(tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w')")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    coded = settings | {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer.json").rename(tmp_path / "kept.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(coded))
    with pytest.raises(InputError, match=r"the tokenizer in .* cannot be read"):
        dca_jax.load(tmp_path)
    assert not marker.exists()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(InputError, match=r"the tokenizer in .* cannot be read"):
        dca_jax.load(tmp_path)


# --- generating --------------------------------------------------------------------------------


def test_text_is_what_the_engine_makes_of_the_tokens(llm):
    prompts = [TEXT, "Call me"]
    generations = llm.generate(prompts, max_new_tokens=20)
    rows = [llm.tokenize(prompt) for prompt in prompts]
    tokens = generate(llm.model, rows, max_new_tokens=20, stop_ids=llm.stop_ids)
    assert [list(g.tokens) for g in generations] == tokens
    assert [g.prompt_tokens for g in generations] == list(map(len, rows))
    for generation, row in zip(generations, tokens, strict=True):
        ended = row[-1] in llm.stop_ids
        assert generation.finish_reason == ("stop" if ended else "length")
        shown = row[:-1] if ended else row
        assert generation.text == llm.tokenizer.decode(shown, skip_special_tokens=True)


def test_one_text_is_a_batch_of_one(llm):
    assert llm.generate("Call me", max_new_tokens=20) == llm.generate(
        [llm.tokenize("Call me")], max_new_tokens=20
    )


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=1.0, top_k=50)], ids=str)
def test_a_stream_joins_to_what_generate_gives(llm, sampler):
    options = {"max_new_tokens": 40, "sampler": sampler, "seed": 5}
    pieces = list(llm.stream(TEXT, **options))
    assert len(pieces) > 1
    assert "".join(pieces) == llm.generate(TEXT, **options)[0].text


def test_seeds_draw_apart_and_are_reproducible(llm):
    def draw(seed):
        options = {"max_new_tokens": 20, "sampler": Sampler(temperature=1.0, top_k=50)}
        return llm.generate(TEXT, seed=seed, **options)[0].tokens

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_stop_string_ends_its_row_only(llm):
    free = llm.generate([TEXT, TEXT[:64]], max_new_tokens=30)
    text = free[0].text
    at = next(n for n in range(8, len(text)) if text[n : n + 2] not in free[1].text)
    stop = text[at : at + 2]
    stopped = llm.generate([TEXT, TEXT[:64]], max_new_tokens=30, stop=[stop])
    assert stopped[0].text == text[: text.index(stop)]
    assert stopped[0].finish_reason == "stop"
    assert free[0].tokens[: len(stopped[0].tokens)] == stopped[0].tokens
    assert stopped[1] == free[1]
    assert "".join(llm.stream(TEXT, max_new_tokens=30, stop=[stop])) == stopped[0].text


def test_a_stop_id_may_be_added(llm):
    free = llm.generate(TEXT, max_new_tokens=20)[0]
    stopped = llm.generate(TEXT, max_new_tokens=20, stop_ids=[free.tokens[6]])[0]
    assert stopped.tokens == free.tokens[: free.tokens.index(free.tokens[6]) + 1]
    assert stopped.finish_reason == "stop"


def test_without_a_tokenizer_the_model_reads_tokens(tmp_path):
    make_llm(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    bare = dca_jax.load(tmp_path)
    assert bare.tokenizer is None
    (generation,) = bare.generate([[1, 5, 9]], max_new_tokens=3)
    assert (len(generation.tokens), generation.text) == (3, "")
    for needs_text in (
        lambda: bare.generate("Call"),
        lambda: bare.stream([1, 5]),
        lambda: bare.generate([[1]], stop=["x"]),
        lambda: bare.chat([{"role": "user", "content": "Call"}]),
    ):
        with pytest.raises(InputError, match="has no tokenizer"):
            needs_text()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, "the text is empty"),
        (["Call", ""], {}, "the text is empty"),
        ([], {}, "there is no prompt"),
        ([[]], {}, "a prompt is empty"),
        ([[300]], {}, "token id 300, but the model's vocabulary has ids 0 to 299"),
        ("Call", {"max_new_tokens": 2 * 10**9}, "GiB, but the device has only"),
    ],
    ids=str,
)
def test_what_cannot_be_generated_is_refused(llm, prompts, options, message):
    with pytest.raises(InputError, match=message):
        llm.generate(prompts, **options)


def test_a_stream_refuses_before_it_is_read(llm):
    with pytest.raises(InputError, match="the text is empty"):
        llm.stream("")
    with pytest.raises(InputError, match="stop must contain non-empty strings"):
        llm.stream("Call", stop=[""])


def test_a_progress_bar_may_be_had(llm, capsys):
    llm.generate(TEXT, max_new_tokens=1, progress=True)
    assert "reading" in capsys.readouterr().err
    llm.generate(TEXT, max_new_tokens=1)
    assert capsys.readouterr().err == ""


# --- prefixes ----------------------------------------------------------------------------------


def test_a_prefix_changes_nothing_but_the_time(llm):
    """One after another, in the prefix's own cache, and together, in copies of it."""
    whole = [llm.generate(TEXT + q, max_new_tokens=12)[0] for q in QUESTIONS]
    prefix = llm.prefill(TEXT, room=ROOM)
    assert [llm.generate(q, max_new_tokens=12, prefix=prefix)[0] for q in QUESTIONS] == whole
    assert llm.generate(QUESTIONS, max_new_tokens=12, prefix=prefix) == whole
    assert "".join(llm.stream(QUESTIONS[0], max_new_tokens=12, prefix=prefix)) == whole[0].text


@pytest.mark.slow
def test_a_cache_in_8_bits_is_like_the_exact_one(folder, llm):
    """Rows of a batch, prefixes and scores; it costs little."""
    small = dca_jax.load(folder, cache_dtype="int8")
    assert small.cache_dtype == jnp.int8
    whole = [small.generate(TEXT + q, max_new_tokens=12)[0] for q in QUESTIONS]
    assert small.generate([TEXT + q for q in QUESTIONS], max_new_tokens=12) == whole
    prefix = small.prefill(TEXT, room=ROOM)
    assert [small.generate(q, max_new_tokens=12, prefix=prefix)[0] for q in QUESTIONS] == whole
    assert small.generate(QUESTIONS, max_new_tokens=12, prefix=prefix) == whole
    exact, found = (math.log(reader.perplexity(TEXT)) for reader in (llm, small))
    assert found != exact
    assert found == pytest.approx(exact, rel=1e-2)
    with pytest.raises(InputError, match="cache dtype 'int4' is not supported"):
        dca_jax.load(folder, cache_dtype="int4")


def test_a_prefix_of_tokens_is_followed_by_tokens(llm):
    tokens = llm.tokenize(TEXT)
    whole = llm.generate([[*tokens, 50, 60]], max_new_tokens=8)
    prefix = llm.prefill(tokens, room=ROOM)
    assert llm.generate([[50, 60]], max_new_tokens=8, prefix=prefix) == whole
    assert llm.generate([[50, 60]], max_new_tokens=8, prefix=prefix) == whole


def test_what_another_conversation_wrote_over_is_read_again(llm):
    first, other = ([{"role": "user", "content": text}] for text in (TEXT, "x" + TEXT[::-1]))
    whole = llm.chat(first, max_new_tokens=12)
    prefix = llm.prefill(llm.apply_chat_template(first), room=ROOM)
    llm.chat(other, max_new_tokens=12, prefix=prefix)  # shares its first tokens only
    assert llm.chat(first, max_new_tokens=12, prefix=prefix) == whole


def test_only_the_question_is_read(llm, monkeypatch):
    prefix = llm.prefill(TEXT, room=ROOM)
    read = []
    run = dca_jax.inference.llm.Run

    def counted(*args, **options):
        made = run(*args, **options)
        read.append(sum(len(p) - s for p, s in zip(made._prompts, made._start, strict=True)))
        return made

    monkeypatch.setattr("dca_jax.inference.llm.Run", counted)
    for _ in range(3):
        llm.generate(" I thought", max_new_tokens=4, prefix=prefix)
    question = len(llm.tokenize(TEXT + " I thought")) - len(prefix.tokens)
    assert all(question <= n <= question + 3 for n in read)


def test_a_prefix_grows_when_the_room_is_short(llm):
    whole = llm.generate(TEXT + QUESTIONS[0], max_new_tokens=60)
    prefix = llm.prefill(TEXT, room=1)
    assert llm.generate(QUESTIONS[0], max_new_tokens=60, prefix=prefix) == whole
    assert llm.generate(QUESTIONS[0], max_new_tokens=60, prefix=prefix) == whole


def test_a_prefix_may_be_built_upon(llm):
    whole = llm.generate(TEXT + QUESTIONS[0], max_new_tokens=8)
    first = llm.prefill(TEXT[:64], room=ROOM)
    second = llm.prefill(TEXT, reuse=first, room=ROOM)
    assert llm.generate(QUESTIONS[0], max_new_tokens=8, prefix=second) == whole
    assert not first.usable
    with pytest.raises(InputError, match="reused by `prefill`"):
        llm.generate("x", prefix=first)


def test_one_prefix_serves_one_stream_at_a_time(llm):
    prefix = llm.prefill(TEXT, room=ROOM)
    stream = llm.stream(" I", max_new_tokens=40, prefix=prefix)
    assert prefix.usable  # nothing happens before the first piece is asked for
    next(stream)
    with pytest.raises(InputError, match="in use by another generation"):
        llm.generate(" I", prefix=prefix)
    stream.close()
    assert prefix.usable
    whole = llm.generate(TEXT + " I", max_new_tokens=8)
    assert llm.generate(" I", max_new_tokens=8, prefix=prefix) == whole


# --- chat --------------------------------------------------------------------------------------

USER = {"role": "user", "content": "Call me"}


def test_chat_completes_the_template(llm):
    tokens = llm.apply_chat_template([USER])
    assert llm.tokenizer.decode(tokens) == "<|user|>Call me\n<|assistant|>"
    answer = llm.chat([USER], max_new_tokens=12)
    assert answer == llm.generate([tokens], max_new_tokens=12)[0]
    assert "".join(llm.stream_chat([USER], max_new_tokens=12)) == answer.text


def test_a_conversation_is_the_chat_of_its_messages_and_reads_nothing_twice(llm, monkeypatch):
    monkeypatch.setattr("dca_jax.inference.chat.ROOM", ROOM)
    conversation = Conversation(llm, system="Be brief")
    read = []
    read_prompts = engine.Run.read_prompts

    def watched(run):
        (start,) = np.asarray(run.cache.lengths)
        read.append((int(start), len(run._prompts[0])))
        return read_prompts(run)

    for question in ("Call me", "Some years ago", "never mind"):
        messages = [*conversation.messages, {"role": "user", "content": question}]
        expected = llm.chat(messages, max_new_tokens=10)
        with monkeypatch.context() as patch:
            patch.setattr(engine.Run, "read_prompts", watched)
            assert "".join(conversation.ask(question, max_new_tokens=10)) == expected.text
        assert conversation.messages == [*messages, {"role": "assistant", "content": expected.text}]
        # What the next turn has in common with this one's prompt and answer is in the cache: all
        # but the last token drawn, which was not read.
        turn = [*llm.apply_chat_template(messages), *expected.tokens[:-1]]
        follow = llm.apply_chat_template([*conversation.messages, USER])
        common = next(n for n in range(len(turn) + 1) if turn[: n + 1] != follow[: n + 1])
        read.append(min(common, len(turn)))
    assert read[0][0] == 0
    for kept, (start, _) in zip(read[1::2], read[2::2], strict=False):
        assert start == kept
    # Answers were kept, not only the prompts before them: as far as the template's text of one has
    # the tokens that it was drawn as, which this model's, random bytes, seldom has.
    gained = [kept - length for (_, length), kept in zip(read[::2], read[1::2], strict=True)]
    assert min(gained) >= 0
    assert max(gained) > 0
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief"}]


def test_a_conversation_gives_one_answer_at_a_time(llm):
    conversation = Conversation(llm)
    first, second = conversation.ask("Call me"), conversation.ask("Some years ago")
    next(first)
    for again in (lambda: next(second), lambda: conversation.ask("never mind")):
        with pytest.raises(InputError, match="the last answer is still being generated"):
            again()
    first.close()
    with pytest.raises(InputError, match="its own prefix"):
        conversation.ask("Call me", prefix=llm.prefill("Call me"))


def test_an_answer_cut_short_stays_as_far_as_it_came(llm, monkeypatch):
    monkeypatch.setattr("dca_jax.inference.chat.ROOM", ROOM)
    conversation = Conversation(llm)
    answer = conversation.ask("Call me", max_new_tokens=40)
    begun = next(answer)
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": begun}
    expected = llm.chat([*conversation.messages, USER], max_new_tokens=6).text
    assert "".join(conversation.ask("Call me", max_new_tokens=6)) == expected


def test_a_conversation_survives_an_interruption_that_takes_its_cache(llm, monkeypatch):
    """Ctrl-C while the device holds the donated cache: what was read is lost, and read again."""
    monkeypatch.setattr("dca_jax.inference.chat.ROOM", ROOM)
    conversation = Conversation(llm)
    compiled = engine.compiled

    def interrupted(function, *shape, **donated):
        def decode(*args):
            compiled(function, *shape, **donated)(*args)
            raise KeyboardInterrupt

        return decode if function is stop_and_decode else compiled(function, *shape, **donated)

    monkeypatch.setattr(engine, "compiled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(conversation.ask("Call me", max_new_tokens=40))
    monkeypatch.setattr(engine, "compiled", compiled)
    begun = conversation.messages[-1]["content"]
    assert conversation.messages == [USER, {"role": "assistant", "content": begun}]
    expected = llm.chat([*conversation.messages, USER], max_new_tokens=6).text
    assert "".join(conversation.ask("Call me", max_new_tokens=6)) == expected


def test_chat_needs_a_template_and_messages_that_fit_it(llm, folder, tmp_path):
    with pytest.raises(InputError, match="the chat template refuses these messages: unknown role"):
        llm.chat([{"role": "tool", "content": "x"}])
    with pytest.raises(InputError, match="there is no message"):
        llm.chat([])
    plain = replace(llm, tokenizer=dca_jax.load(make_llm(tmp_path, chat=False)).tokenizer)
    with pytest.raises(InputError, match="has no chat template"):
        plain.chat([USER])
    with pytest.raises(InputError, match="has no chat template"):
        Conversation(plain)


def test_a_template_without_system_messages_says_so_at_once(llm, tmp_path):
    make_llm(tmp_path)
    tokenizer = llm.tokenizer.backend_tokenizer
    template = CHAT_TEMPLATE.replace("'system', ", "")
    save_tokenizer(tmp_path, tokenizer, chat_template=template)
    with pytest.raises(InputError, match="unknown role system"):
        Conversation(dca_jax.load(tmp_path), system="Be brief")


# --- scoring -----------------------------------------------------------------------------------


def test_logits_are_those_of_the_model(llm):
    ids = llm.tokenize(TEXT)
    tokens = [ids[:60], ids[2:62]]
    found = llm.logits(tokens)
    assert found.shape == (2, 60, 300)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(
        found, llm.model(jnp.asarray(tokens, jnp.int32)), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(InputError, match=r"all rows must have the same length, got \[1, 2\]"):
        llm.logits([[1], [1, 2]])


DYNAMIC = RopeConfig(rope_type="dynamic", factor=2.0, original_max_position_embeddings=64)


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"dca": DCAConfig.paper(64)}, [(1, 63), (1, 65), (3, 64), (9, 100), (1, 1), (2, 2)]),
        ({"sliding_window": 100}, [(9, 100), (1, 70)]),  # the window is narrower than the padding
        ({"rope": DYNAMIC}, [(1, 100)]),  # which sees the length of a text
    ],
    ids=["dca", "window", "dynamic"],
)
def test_logits_of_any_length_and_batch_in_few_programs(llm, changes, sizes, compilations):
    config = replace(llm.model.config, **{k: v for k, v in changes.items() if k != "dca"})
    model = Llama.from_params(config, llm.model.params(), dca=changes.get("dca"), dtype=jnp.float32)
    ids = np.random.default_rng(0).integers(0, 300, (9, 100)).astype(np.int32)
    expected = np.asarray(jax.jit(Llama.__call__)(model, ids))
    compilations.clear()
    for batch, length in sizes:
        found = replace(llm, model=model).logits(ids[:batch, :length])
        np.testing.assert_allclose(found, expected[:batch, :length], rtol=1e-4, atol=1e-3)
    assert len(compilations) <= 3  # 1 and 8 rows of 64 tokens, and one of 256


def test_logits_that_the_host_cannot_hold_are_refused(llm, monkeypatch):
    monkeypatch.setattr(logits, "free_bytes", lambda device: 1200 * 59)
    with pytest.raises(InputError, match=r"the logits of 1 x 60 tokens take .*; give fewer tokens"):
        llm.logits([[1] * 60])


def test_perplexity_is_that_of_the_logits(llm):
    tokens = llm.tokenize(TEXT)
    log_probabilities = jax.nn.log_softmax(llm.logits([tokens])[0], axis=-1)
    nll = [-float(log_probabilities[t, after]) for t, (_, after) in enumerate(pairwise(tokens))]
    expected = math.exp(sum(nll) / len(nll))
    assert llm.perplexity(TEXT) == pytest.approx(expected, rel=1e-4)
    assert llm.perplexity(tokens) == llm.perplexity(TEXT)
    windows = [llm.perplexity(tokens[:30]), llm.perplexity(tokens[30:60])]
    both = math.exp(sum(map(math.log, windows)) / 2)
    assert llm.perplexity(tokens[:60], window=30) == pytest.approx(both, rel=1e-4)
    with pytest.raises(InputError, match="the text is empty"):
        llm.perplexity("")


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.9}, r"belongs to the sampler: sampler=Sampler\(temperature=0.9\)"),
        ({"top_k": 5}, r"sampler=Sampler\(top_k=5\)"),
        ({"topp": 0.5}, r"did you mean sampler=Sampler\(top_p=...\)"),
        ({"do_sample": True}, r"sampler=Sampler\(temperature="),
        ({"max_tokens": 3}, "did you mean max_new_tokens"),
        ({"max_length": 3}, "did you mean max_new_tokens"),
        ({"max_new_token": 3}, "did you mean max_new_tokens"),
        ({"stop_strings": ["x"]}, "did you mean stop"),
        ({"eos_token_id": 2}, "did you mean stop_ids"),
        ({"num_beams": 4}, "the options are max_new_tokens, sampler, seed"),
    ],
)
def test_no_option_is_swallowed(llm, given, message):
    conversation = Conversation(llm)
    for door in (
        lambda: llm.generate("x", **given),
        lambda: llm.stream("x", **given),
        lambda: llm.chat([USER], **given),
        lambda: llm.stream_chat([USER], **given),
        lambda: conversation.ask("x", **given),
        lambda: documents.ask(llm, "x", "y", **given),
        lambda: dca_jax.Options.of(dca_jax.Options(seed=3), given),
    ):
        with pytest.raises(InputError, match=message):
            door()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "an integer from 1 to .*, got 0"),
        ({"max_new_tokens": True}, "got True"),
        ({"max_new_tokens": 2.0}, "got 2.0"),
        ({"max_new_tokens": 10**15}, "an integer from 1 to"),
        ({"max_new_tokens": None}, "got None"),
        ({"seed": 2**31}, "seed must be an integer from"),
        ({"stop": [""]}, "non-empty strings, got ''"),
        ({"stop": [3]}, "for ids, use stop_ids"),
        ({"stop_ids": ["</s>"]}, "stop_ids must be an integer"),
        ({"stop_ids": 2}, "stop_ids must be a list, got 2"),
        ({"stop_ids": [-1]}, "got -1"),
        ({"sampler": {"temperature": 1}}, r"sampler must be a dca_jax.Sampler such .* got {'temp"),
        ({"prefix": "Call me"}, "prefix must be a result of LLM.prefill"),
        ({"progress": 1}, "progress must be True, False or None"),
    ],
)
def test_option_values_are_checked(given, message):
    # A module of its own: the checks of annotations that tests have would be before it.
    spec = importlib.util.spec_from_file_location("plain_options", options.__file__)
    assert spec is not None
    assert spec.loader is not None
    plain = importlib.util.module_from_spec(spec)
    sys.modules["plain_options"] = plain  # where dataclasses look
    spec.loader.exec_module(plain)
    assert plain.Options(max_new_tokens=np.int64(5)).max_new_tokens == 5
    with pytest.raises(InputError, match=message):
        plain.Options(**given)
    with pytest.raises(InputError, match=message):
        plain.Options.of(plain.Options(seed=3), given)


def test_options_are_an_object_or_its_fields(llm):
    chosen = dca_jax.Options(max_new_tokens=5, stop="zz", stop_ids={7})
    assert (chosen.max_new_tokens, chosen.stop, chosen.stop_ids) == (5, ("zz",), (7,))
    expected = llm.generate("Call me", max_new_tokens=5, stop=["zz"], stop_ids=[7])
    assert llm.generate("Call me", chosen) == expected
    assert llm.generate("Call me", chosen, max_new_tokens=2)[0].tokens == expected[0].tokens[:2]
    names = set(OptionNames.__annotations__)
    assert names == {field.name for field in fields(dca_jax.Options)}


def test_prompts_in_every_form(llm):
    ids = llm.tokenize("Call me")
    (expected,) = llm.generate("Call me", max_new_tokens=3)
    for prompt in (["Call me"], ids, [ids], np.asarray(ids), jnp.asarray([ids]), (tuple(ids),)):
        assert llm.generate(prompt, max_new_tokens=3) == [expected]
    assert "".join(llm.stream(np.asarray(ids), max_new_tokens=3)) == expected.text
    for prompt in (7, None, b"x", {"input_ids": ids}):
        with pytest.raises(InputError, match="a prompt must be"):
            each_prompt(prompt)
    for prompt in ([1.5], [1.5, 2], [None], [[1]], [[1], [2, 3]], ["x"], [2**70], None):
        with pytest.raises(InputError, match="a prompt must be"):
            token_ids(prompt)
    for prompt in ([[]], [np.zeros((0,), int)]):
        with pytest.raises(InputError, match="a prompt is empty"):
            llm.generate(prompt)
    with pytest.raises(InputError, match="there is no prompt"):
        llm.generate([])
    for messages in ("Call me", USER, 3, [3], ["x"], [{"content": "x"}], [{"role": 3}]):
        with pytest.raises(InputError, match=r"messages? must be"):
            check_messages(messages)
    with pytest.raises(InputError, match="room must be a number of tokens"):
        llm.prefill("Call me", room=-1)


def test_threads_share_a_model_and_a_prefix_or_are_refused(llm):
    """Two threads on one prefix: each answer is right, or refused; never half of each."""
    expected = llm.generate("Call me", max_new_tokens=4)
    prefix = llm.prefill("Call")

    def ask(number):
        try:
            return llm.generate(" me", max_new_tokens=4, prefix=prefix)
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(24)))
        alone = list(pool.map(lambda _: llm.generate("Call me", max_new_tokens=4), range(8)))
    assert alone == [expected] * 8
    assert expected in answers
    assert all(a == expected or "in use by another generation" in a for a in answers)
    assert llm.generate(" me", max_new_tokens=4, prefix=prefix) == expected


def test_numbers_that_are_not_finite_end_a_text_and_no_other(llm):
    """The embedding of one token, which one prompt holds, is infinite."""
    sound, broken = "Call me", "Call me #"
    bad = llm.tokenize(broken)[-1]
    assert bad not in llm.tokenize(sound)
    params = llm.model.params()
    table = params["embed_tokens"]["embedding"].at[bad].set(jnp.inf)
    params["embed_tokens"] = {"embedding": table}
    model = llm.model
    model = Llama.from_params(model.config, params, dca=model.dca, dtype=model.dtype)
    bent = replace(llm, model=model)
    first, second = bent.generate([broken, sound], max_new_tokens=4)
    position = len(llm.tokenize(broken))
    assert (first.text, first.tokens, first.finish_reason) == ("", (), "error")
    assert first.error is not None
    assert f"prompt 0: the logits after token {position} are not finite" in first.error
    (expected,) = llm.generate([sound], max_new_tokens=4)
    assert second == expected
    assert second.error is None
    for call in (bent.generate, lambda *a, **o: list(bent.stream(*a, **o))):
        with pytest.raises(InputError, match="are not finite"):
            call(broken, max_new_tokens=4)
    prefix = bent.prefill("Call me")
    with pytest.raises(InputError, match="are not finite"):
        bent.generate(" #", max_new_tokens=4, prefix=prefix)
    assert not prefix.usable  # what was written to its cache would spread
    lines = [Request({"n": n}, llm.tokenize(text)) for n, text in enumerate([sound, broken])]
    settings = options.Options(max_new_tokens=4)
    answered = [
        line
        for some in answers(bent, lines, method="auto", batch=1, options=settings)
        for line in some
    ]
    assert [line["finish_reason"] for line in answered] == [expected.finish_reason, "error"]
    assert answered[1] | {"error": ""} == {
        "n": 1,
        "text": "",
        "finish_reason": "error",
        "prompt_tokens": position,
        "completion_tokens": 0,
        "error": "",
    }
