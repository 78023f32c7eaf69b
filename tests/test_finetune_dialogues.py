"""Dialogues from files of every form, and which of their tokens are trained on."""

import hashlib
import json
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm import byte_level_tokenizer, metaspace_tokenizer
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dca_jax.errors import InputError
from dca_jax.finetune.chunkllama import CHUNKLLAMA_SYSTEM
from dca_jax.finetune.dialogues import read_dialogues
from dca_jax.finetune.rendered import Rendered
from dca_jax.finetune.templates import render, renderer
from dca_jax.finetune.turns import Dialogue, Text, Turn

MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MARKS += ["<start_of_turn>", "<end_of_turn>"]
DEMO = Path(__file__).parent.parent / "models" / "demo-python-7m"


def dialogue(*texts: str, system: str | None = None) -> Dialogue:
    head = () if system is None else (Turn("system", system, False),)
    roles = ("user", "assistant")
    turns = (Turn(roles[n % 2], text, n % 2 == 1) for n, text in enumerate(texts))
    return Dialogue((*head, *turns))


TWO_ROUNDS = dialogue("How far is the sea?", "Ten miles; ça va, 海 🌊.", "And back?", "Ten more.")


def wrapped(tokenizer: Tokenizer) -> Any:
    """Like Llama's: a BOS before every text, and the marks of all templates special."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=MARKS,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def byte_level() -> Any:
    return wrapped(byte_level_tokenizer())


@pytest.fixture(scope="module")
def metaspace() -> Any:
    return wrapped(metaspace_tokenizer())


@pytest.fixture(scope="module", params=["byte_level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def spelled(tokenizer: Any, tokens: np.ndarray) -> str:
    """What tokens stand for, spaces at the beginning included, which `decode` may leave out."""
    names = tokenizer.convert_ids_to_tokens(tokens.tolist())
    if "Ġ" in tokenizer.get_vocab():
        return tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)
    parts = [
        bytes([int(name[3:5], 16)]) if name.startswith("<0x") else name.replace("▁", " ").encode()
        for name in names
    ]
    return b"".join(parts).decode()


def spans(rendered: Rendered, tokenizer: Any) -> list[str]:
    """The text of every run of trained tokens."""
    runs = groupby(range(len(rendered.tokens)), key=lambda at: bool(rendered.trained[at]))
    return [spelled(tokenizer, rendered.tokens[list(run)]) for trained, run in runs if trained]


# Files


def write(folder: Path, entries: Any, name: str = "data.json") -> Path:
    path = folder / name
    if name.endswith("l"):
        path.write_text("\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries))
    else:
        path.write_text(json.dumps(entries))
    return path


def in_form(form: str, texts: tuple[str, ...]) -> dict[str, Any]:
    """Texts of user and assistant, by turns, as a file has them."""
    if form in ("conversations", "items"):
        names = [("human", "user"), ("gpt", "Assistant", "chatgpt", "bing", "bard")]
        turns = [(names[n % 2][n // 2 % len(names[n % 2])], t) for n, t in enumerate(texts)]
        return {"id": "x", form: [{"from": name, "value": text} for name, text in turns]}
    if form == "messages":
        roles = ("user", "assistant")
        turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
        return {"messages": turns}
    if form == "alpaca":
        return {"instruction": texts[0], "input": "", "output": texts[1]}
    if form == "plain":
        names = ("USER", "ASSISTANT")
        return {"conversation": " \n ".join(f"{names[n % 2]}: {t}" for n, t in enumerate(texts))}
    lists = {"inputs": list(texts[::2]), "outputs": list(texts[1::2])}
    return lists if form == "lists" else {"conversations": lists}


FORMS = ["conversations", "items", "messages", "alpaca", "lists", "lists inside", "plain"]
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=10)
@given(data=st.data())
def test_every_form_is_read(
    tmp_path_factory: pytest.TempPathFactory, form: str, name: str, data: st.DataObject
) -> None:
    round_ = st.lists(words, min_size=2, max_size=2)
    rounds = st.lists(round_, min_size=1, max_size=1 if form == "alpaca" else 4)
    given_dialogues = data.draw(st.lists(rounds, min_size=1, max_size=3))
    wanted = [tuple(text for both in rounds for text in both) for rounds in given_dialogues]
    if form == "plain":  # spaces around a turn are the form's own
        wanted = [tuple(text.strip() for text in texts) for texts in wanted]
    folder = tmp_path_factory.mktemp("form")
    path = write(folder, [in_form(form, texts) for texts in wanted], name)
    found, counts = read_dialogues(path)
    assert found == [dialogue(*texts) for texts in wanted]
    assert counts == {}


def test_alpaca_joins_instruction_and_input(tmp_path: Path) -> None:
    entry = {"instruction": "Translate.", "input": "le chat", "output": "the cat"}
    (found,), _ = read_dialogues(write(tmp_path, [entry]))
    assert found == dialogue("Translate.\n\nle chat", "the cat")


def test_text_before_the_first_marker_is_the_system_prompt(tmp_path: Path) -> None:
    entry = {
        "conversation": "A chat. USER: Hi ASSISTANT: Hello USER: A USER'S: question ASSISTANT:b"
    }
    (found,), counts = read_dialogues(write(tmp_path, [entry]))
    assert found == dialogue("Hi", "Hello", system="A chat.")
    assert counts == {"cut: a last turn of the user": 1}


SAID = {"human": "q", "gpt": "a", "system": "s"}


@pytest.mark.parametrize(
    ("names", "kept", "reason"),
    [
        ("gpt human gpt", "qa", "cut: a first turn of the assistant"),
        ("human gpt human", "qa", "cut: a last turn of the user"),
        ("system human gpt", "sqa", None),
        ("", None, "dropped: fewer than two turns"),
        ("human", None, "dropped: fewer than two turns"),
        ("gpt human", None, "dropped: fewer than two turns"),
        ("gpt gpt human gpt", None, "dropped: roles that do not alternate"),
        ("human human gpt", None, "dropped: roles that do not alternate"),
        ("human gpt system human gpt", None, "dropped: roles that do not alternate"),
        ("human gpt function human gpt", None, "dropped: roles that do not alternate"),
        ("human gpt narrator human gpt", None, "dropped: a turn of neither"),
    ],
)
def test_turns_that_do_not_fit(
    tmp_path: Path, names: str, kept: str | None, reason: str | None
) -> None:
    turns = [{"from": name, "value": SAID.get(name, "f")} for name in names.split()]
    found, counts = read_dialogues(write(tmp_path, [{"conversations": turns}]))
    assert ["".join(t.text for t in d.turns) for d in found] == ([kept] if kept else [])
    assert list(counts.values()) == ([1] if reason else [])
    assert all(key.startswith(reason or "?") for key in counts)


@pytest.mark.parametrize("empty", ["", " \n", None])
def test_an_empty_turn_drops_the_dialogue_and_an_empty_system_prompt_only_itself(
    tmp_path: Path, empty: str | None
) -> None:
    entries = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": empty}]},
        {
            "messages": [
                {"role": "system", "content": empty},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ]
        },
    ]
    assert read_dialogues(write(tmp_path, entries)) == (
        [dialogue("q", "a")],
        {"dropped: an empty turn": 1},
    )


def test_half_a_character_drops_the_dialogue(tmp_path: Path) -> None:
    entries = [in_form("messages", ("q", "\ud83d")), in_form("messages", ("q", "\U0001f600"))]
    found, counts = read_dialogues(write(tmp_path, entries))
    assert (found, counts) == ([dialogue("q", "\U0001f600")], {"dropped: half a character": 1})


def test_only_gpt4_where_a_model_is_named(tmp_path: Path) -> None:
    names = ["Model: GPT-4", "gpt4", "gpt-4-0314", "Model: Default (GPT-3.5)", "gpt-3.5-turbo"]
    entries = [in_form("items", ("q", "a")) | {"model": name} for name in names]
    entries.append(in_form("items", ("q", "a")))
    by_turn = in_form("messages", ("q", "a", "r", "b"))
    by_turn["messages"][1]["model"] = "gpt-3.5-turbo"
    path = write(tmp_path, [*entries, by_turn])
    assert len(read_dialogues(path)[0]) == 7
    found, counts = read_dialogues(path, gpt4_only=True)
    assert counts == {"dropped: no reply by GPT-4": 2}
    assert found[:4] == [dialogue("q", "a")] * 4
    assert [turn.trained for turn in found[4].turns] == [False, False, False, True]


def test_replies_of_weight_0_are_not_trained_on(tmp_path: Path) -> None:
    entry = in_form("messages", ("q", "a", "r", "b"))
    entry["messages"][1]["weight"] = 0
    (found,), _ = read_dialogues(write(tmp_path, [entry]))
    assert [turn.trained for turn in found.turns] == [False, False, False, True]
    entry["messages"][3]["weight"] = 0
    assert read_dialogues(write(tmp_path, [entry])) == ([], {"dropped: no reply to train on": 1})
    for weight in ("0", False, 0.5, [], float("nan")):  # none of which says what it means
        entry["messages"][3]["weight"] = weight
        with pytest.raises(InputError, match=r"has a turn 4 of weight .*, where 0 "):
            read_dialogues(write(tmp_path, [entry]))


@pytest.mark.parametrize(("inputs", "outputs"), [("qr", "a"), ("q", "ab"), ("qrs", "ab")])
def test_lists_of_different_lengths_keep_their_first_round(
    tmp_path: Path, inputs: str, outputs: str
) -> None:
    path = write(tmp_path, [{"inputs": list(inputs), "outputs": list(outputs)}])
    found, counts = read_dialogues(path)
    assert found == [dialogue("q", "a")]
    ((reason, number),) = counts.items()
    assert reason.startswith("cut: all rounds but the first")
    assert number == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"[]\xff", "not UTF-8"),
        (b"[{]", "is not JSON"),
        (b'{"inputs": []', "line 1 is not JSON"),
        (b'{"instruction": "q", "output": "a"}\n{oops', "line 2 is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "entry 1 is a JSON int"),
        (b'[{"body": "a"}]', r"entry 1 has the keys \['body'\]; expected one of"),
        (b'[{"instruction": "q", "output": "a"}, {"conversations": []}]', "entry 2 lacks"),
        (b'[{"messages": []}, {"a": 1}]', "entry 2 has no list of turns; expected"),
        (b'[{"messages": [{"role": "user"}]}]', "turn 1 that is not an object with role and"),
        (b'[{"messages": ["Hi"]}]', "turn 1 that is not an object"),
        (b'[{"items": [{"from": "human", "value": [1]}]}]', "entry 1 has a part 1 in turn 1"),
        (b'[{"items": [{"from": "human", "value": 1}]}]', "entry 1 has a JSON int where"),
        (b'[{"inputs": [1], "outputs": [2]}]', "entry 1 has a JSON int where"),
        (b'[{"conversation": "Hello"}]', 'without "USER:"'),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read_dialogues(path)
    assert str(path) in str(raised.value)


def test_an_entry_that_is_no_object_among_others(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"entry 2 is a JSON str"):
        read_dialogues(write(tmp_path, [in_form("lists", ("q", "a")), "oops"]))
    with pytest.raises(InputError, match=r"is not a file; give"):
        read_dialogues(tmp_path)


def test_line_breaks_of_other_kinds_do_not_end_a_line(tmp_path: Path) -> None:
    texts = ("q\u2028q", "a\u0085\x0c a")
    assert read_dialogues(write(tmp_path, [in_form("messages", texts)], "d.jsonl"))[0] == [
        dialogue(*texts)
    ]


# Templates

HEADERS = (
    "{{% for m in messages %}}"
    "{{{{ '{0}' + m.role + '{1}' + m.content | trim + '{2}' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '{0}assistant{1}' }}}}{{% endif %}}"
)
CHATML = HEADERS.format("<|im_start|>", "\\n", "<|im_end|>\\n")
TEMPLATES = {  # each with what is trained on of an answer
    "llama-3": (
        "{{ bos_token }}"
        + HEADERS.format("<|start_header_id|>", "<|end_header_id|>\\n\\n", "<|eot_id|>"),
        "{}<|eot_id|>",
    ),
    "chatml": (CHATML, "{}<|im_end|>"),
    "chatml without a generation prompt": (
        CHATML.split("{% if")[0],
        "<|im_start|>assistant\n{}<|im_end|>",
    ),
    "gemma": (
        "{{ bos_token }}" + HEADERS.format("<start_of_turn>", "\\n", "<end_of_turn>\\n"),
        "{}<end_of_turn>",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
        " {}</s>",
    ),
    "vicuna": (
        "A chat. {% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + '</s>' }}"
        "{% else %}{{ 'USER: ' + m.content + ' ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        " {}</s>",
    ),
    "a space before the answer is the prompt's": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A: ' + m.content + '</s>' }}"
        "{% else %}{{ 'Q: ' + m.content + '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}",
        "{}</s>",
    ),
    "alpaca, without an end marker": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + '\\n\\n' }}"
        "{% else %}{{ '### Instruction:\\n' + m.content + '\\n\\n### Response:\\n' }}{% endif %}"
        "{% endfor %}",
        "{}\n\n",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_end_markers_are_trained_on(
    name: str, byte_level: Any, tmp_path: Path
) -> None:
    template, trained = TEMPLATES[name]
    path = tmp_path / "template.jinja"
    path.write_text(template)
    rendered = render(TWO_ROUNDS, byte_level, str(path))
    answers = [turn.text for turn in TWO_ROUNDS.turns if turn.trained]
    found = spans(rendered, byte_level)
    if "space" in name:  # " Ten" is one token: the model has to write it, and so its space
        found = [text.removeprefix(" ") for text in found]
    assert found == [trained.format(answer) for answer in answers]
    messages = [{"role": turn.role, "content": turn.text} for turn in TWO_ROUNDS.turns]
    whole = byte_level.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=False
    )
    assert rendered.tokens.tolist() == whole


@pytest.mark.parametrize("name", ["mistral", "vicuna"])
def test_tokens_that_hold_a_words_space(name: str, metaspace: Any, tmp_path: Path) -> None:
    template, trained = TEMPLATES[name]
    path = tmp_path / "template.jinja"
    path.write_text(template)
    answers = [turn.text for turn in TWO_ROUNDS.turns if turn.trained]
    found = spans(render(TWO_ROUNDS, metaspace, str(path)), metaspace)
    assert found == [trained.format(answer) for answer in answers]


def test_the_tokenizers_own_template(byte_level: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no chat template"):
        render(TWO_ROUNDS, byte_level)
    assert render(Text("a text needs none"), byte_level).trained[1:].any()
    path = tmp_path / "t.jinja"
    path.write_text(CHATML)
    byte_level.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = CHATML
    ours, theirs = render(TWO_ROUNDS, tokenizer), render(TWO_ROUNDS, byte_level, str(path))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.trained, theirs.trained)


def test_llama_2_is_as_published(tokenizer: Any) -> None:
    rendered = render(dialogue("q r", "a b", "c", "d", system="be brief"), tokenizer, "llama-2")
    text = "<s>[INST] <<SYS>>\nbe brief\n<</SYS>>\n\nq r [/INST] a b </s><s>[INST] c [/INST] d </s>"
    assert rendered.tokens.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    assert spans(rendered, tokenizer) == [" a b </s>", " d </s>"]
    bare = render(dialogue("q r", "a b"), tokenizer, "llama-2")
    text = "<s>[INST] q r [/INST] a b </s>"
    assert bare.tokens.tolist() == tokenizer(text, add_special_tokens=False).input_ids


@settings(max_examples=25)
@given(texts=st.lists(words, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_masks_of_any_text(byte_level: Any, texts: list[str]) -> None:
    rendered = render(dialogue(*texts), byte_level, "llama-2")
    wanted = [f" {text.strip()} </s>" for text in texts[1::2]]
    assert spans(rendered, byte_level) == wanted


def test_turns_that_are_not_trained_on_are_masked(byte_level: Any) -> None:
    turns = list(TWO_ROUNDS.turns)
    turns[1] = Turn("assistant", turns[1].text, False)
    rendered = render(Dialogue(tuple(turns)), byte_level, "llama-2")
    assert spans(rendered, byte_level) == [" Ten more. </s>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ messages[-1].content }}",
            "writes the beginning of a dialogue otherwise than the whole",
        ),
        ("{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}", "!"),
        ("{% if %}", "refuses this dialogue"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ 'a' + none }}", r"fails on this dialogue \(TypeError"),
        ("{{ messages.__class__.__mro__ }}", "refuses this dialogue"),
    ],
)
def test_templates_that_cannot_be_used(
    byte_level: Any, tmp_path: Path, template: str, message: str
) -> None:
    path = tmp_path / "bad.jinja"
    path.write_text(template)
    with pytest.raises(InputError, match=message):
        render(TWO_ROUNDS, byte_level, str(path))


def test_no_such_template_and_no_such_tokenizer(byte_level: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected one of chat, llama-2, chunkllama or the path"):
        renderer(byte_level, "alpaca")
    with pytest.raises(InputError, match="is not a file"):
        renderer(byte_level, str(tmp_path / "missing.jinja"))
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        renderer(byte_level, str(tmp_path / "latin.jinja"))
    with pytest.raises(InputError, match=r"put a tokenizer\.json"):
        renderer(SimpleNamespace(is_fast=False, chat_template="x"))
    no_bos = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), eos_token="</s>")
    with pytest.raises(InputError, match="BOS and EOS"):
        renderer(no_bos, "llama-2")
    with pytest.raises(InputError, match="not BOS and EOS of"):
        renderer(no_bos, "chunkllama")


# ChunkLlama's script


def script(inputs: list[str], outputs: list[str], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """What `train_chunkllama_16k.py` does to one dialogue, step by step; -100 is its mask."""
    b_inst, e_inst, bos, eos = "[INST]", "[/INST]", "<s>", "</s>"
    b_sys, e_sys = "<<SYS>>\n", "\n<</SYS>>\n\n"
    head = f"{bos}{b_inst} {b_sys} {CHUNKLLAMA_SYSTEM} {e_sys} "
    whole = f"{head}{inputs[0]} {e_inst} {outputs[0]} {eos}"
    if len(inputs) > 1 and len(outputs) > 1 and len(inputs) == len(outputs):
        for i in range(1, len(inputs)):
            whole += f"{bos}{b_inst} {inputs[i]} {e_inst} {outputs[i]} {eos}"
    ids = tokenizer(whole).input_ids
    target = np.array(ids)
    position = 1
    for part in whole.split(eos):
        if part == "":
            break
        halves = part.split(e_inst)
        if len(halves) != 2:
            break
        size = len(tokenizer(part).input_ids)
        instruction = len(tokenizer(halves[0] + e_inst).input_ids) - 2
        target[position : position + instruction] = -100
        position += size
    target[position:] = -100
    return ids, [bool(kept) for kept in target != -100]


def same_as_script(texts: list[str], tokenizer: Any) -> None:
    ids, kept = script(texts[::2], texts[1::2], tokenizer)
    rendered = render(dialogue(*texts), tokenizer, "chunkllama")
    assert rendered.tokens.tolist() == ids
    assert rendered.trained.tolist()[1:] == kept[1:]
    assert not rendered.trained[0]


@settings(max_examples=100)
@given(
    texts=st.lists(
        st.lists(
            st.sampled_from(["a", " ", "é", "🌊", "[/INST]", "[INST]", "</s>", "<s>"]), max_size=6
        ).map("".join),
        min_size=2,
        max_size=6,
    )
)
def test_chunkllama_is_the_script(tokenizer: Any, texts: list[str]) -> None:
    same_as_script(texts, tokenizer)


def test_chunkllamas_flaws_are_kept(byte_level: Any) -> None:
    tokenizer = byte_level
    digest = hashlib.sha256(CHUNKLLAMA_SYSTEM.encode()).hexdigest()  # of the script's own
    assert digest == "d52c188a3c969c4ece4e68846b15aaf27ef75639b76c08bdd71f062e52c7b9fc"
    rendered = render(dialogue("q", "a", "r", "b"), tokenizer, "chunkllama")
    assert rendered.tokens[:2].tolist() == [tokenizer.bos_token_id] * 2
    assert spans(rendered, tokenizer) == ["] a </s>", "] b </s>"]
    broken = render(dialogue("q", "a", "what is [/INST]?", "b", "r", "c"), tokenizer, "chunkllama")
    assert spans(broken, tokenizer) == ["] a </s>"]
    assert "what is" in spelled(tokenizer, broken.tokens)
    with pytest.raises(InputError, match="own system prompt"):
        render(dialogue("q", "a", system="s"), tokenizer, "chunkllama")
    untrained = Dialogue((Turn("user", "q", False), Turn("assistant", "a", False)))
    with pytest.raises(InputError, match="trains on every answer"):
        render(untrained, tokenizer, "chunkllama")


# Files as people have them: small ones of our own, and large real ones where they are

OWN = {
    "sharegpt.json": [
        {
            "id": "tide-0",
            "conversations": [
                {"from": "gpt", "value": "How can I help?"},  # cut: nobody asked
                {"from": "human", "value": "When does the tide turn?"},
                {"from": "gpt", "value": "At six.\n\n1. Come early.\n2. Bring a lamp."},
                {"from": "human", "value": "And « l'été » – 海?"},
                {"from": "gpt", "value": "The same hour, an hour later on the clock: 7 🌊."},
            ],
        },
        {
            "id": "tide-1",
            "conversations": [
                {"from": "human", "value": "```python\nprint('USER: ')\n```"},
                {"from": "gpt", "value": " It prints the word, a colon and a space. "},
            ],
        },
    ],
    "alpaca.json": [
        {"instruction": "Name a harbour.", "input": "", "output": "Nantucket."},
        {"instruction": "Count the words.", "input": "Call me Ishmael.", "output": "3"},
    ],
    "longchat.jsonl": [
        {"conversation": "USER: Which ship? ASSISTANT: The third. USER: Why? ASSISTANT: Her name."
                         " USER: And then"},
        {"conversation": "USER: What does a log say?\nLine 1: (USER: here) ASSISTANT: Who wrote it."
                         " USER: End"},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Dialogue]]:
    folder = tmp_path_factory.mktemp("dialogues")
    for name, rows in OWN.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = "\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]"
        (folder / name).write_text(text, encoding="utf-8")
    return {name: read_dialogues(folder / name)[0] for name in OWN}


@pytest.fixture(scope="module")
def real(shared: Path) -> dict[str, list[Dialogue]]:
    names = [
        "sharegpt_format_910.json",
        "alpaca_gpt4_format_999.json",
        "longchat_conversations.jsonl",
    ]
    return {name: read_dialogues(shared / "data" / "dialogues" / name)[0] for name in names}


@pytest.fixture(params=["own", "real"])
def files(request: pytest.FixtureRequest) -> dict[str, list[Dialogue]]:
    return request.getfixturevalue(request.param)


def test_own_files_are_read_whole(own: dict[str, list[Dialogue]]) -> None:
    texts = {name: [[turn.text for turn in one.turns] for one in own[name]] for name in own}
    (tide, code), alpaca, (ship, log) = texts.values()
    assert (len(tide), len(code)) == (4, 2)
    assert tide[0] == "When does the tide turn?"
    assert [len(one) for one in alpaca] == [2, 2]
    assert alpaca[1][1] == "3"
    assert alpaca[1][0].index("Count the words.") < alpaca[1][0].index("Call me Ishmael.")
    assert ship == ["Which ship?", "The third.", "Why?", "Her name."]
    assert log[-1] == "Who wrote it."


def test_real_files_are_read_whole(real: dict[str, list[Dialogue]], shared: Path) -> None:
    assert [len(found) for found in real.values()] == [910, 999, 30]
    path = shared / "data" / "dialogues" / "longchat_conversations.jsonl"
    assert read_dialogues(path)[1] == {"cut: a last turn of the user": 30}
    text = json.loads(path.read_text().splitlines()[19])["conversation"]
    said = real[path.name][19].turns  # where a "USER:" stands inside a line
    assert [turn.text for turn in said] == [
        part.strip() for part in text.replace("ASSISTANT:", "USER:").split("USER:")[1:-1]
    ]


@pytest.mark.parametrize("template", ["llama-2", CHATML])
def test_masks_of_whole_files(
    files: dict[str, list[Dialogue]], tokenizer: Any, tmp_path: Path, template: str
) -> None:
    shape = " {} </s>"
    if template == CHATML:
        (tmp_path / "t.jinja").write_text(template)
        template, shape = str(tmp_path / "t.jinja"), "{}<|im_end|>"
    write = renderer(tokenizer, template)
    for dialogues in files.values():
        some = dialogues[:: max(len(dialogues) // 60, 1)]
        for one, rendered in zip(some, write(some), strict=True):
            wanted = [shape.format(turn.text.strip()) for turn in one.turns if turn.trained]
            assert spans(rendered, tokenizer) == wanted


def test_the_script_on_whole_files(files: dict[str, list[Dialogue]], metaspace: Any) -> None:
    for dialogues in files.values():
        for one in dialogues[:: max(len(dialogues) // 40, 1)]:
            same_as_script([turn.text for turn in one.turns], metaspace)


def test_the_demo_models_tokenizer(files: dict[str, list[Dialogue]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    with pytest.raises(InputError, match="no chat template"):
        renderer(tokenizer)(next(iter(files.values()))[:1])
    write = renderer(tokenizer, "llama-2")
    some = next(x for name, x in files.items() if name.startswith("longchat"))
    for one, rendered in zip(some, write(some), strict=True):
        wanted = [f" {turn.text} <|endoftext|>" for turn in one.turns if turn.trained]
        assert spans(rendered, tokenizer) == wanted
