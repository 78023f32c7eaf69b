"""A folder's tokenizer: the ids are tokenizer.json's, templates and ends of texts as files say."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_llm import CHAT_TEMPLATE, LEAST, byte_level_tokenizer, metaspace_tokenizer, save_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from dca_jax.errors import InputError
from dca_jax.inference.tokenizer import ADVICE, encode, find_stop_ids, load_tokenizer

TEXTS = ("a b", " a  b", "x </s>y", "a#é\n", "<s> hi</s> ", "<|user|>hi")
CONFIG = replace(LEAST, vocab_size=300, eos_token_ids=(2,))


def token(content: str, **flags: Any) -> dict[str, Any]:
    """As files describe a special token."""
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": content, "special": True} | plain | flags


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


# --- tokenizer.json as it is -------------------------------------------------------------------


def sentencepiece_like(*, prepend: bool) -> Tokenizer:
    """A normalizer in place of a pre-tokenizer, <unk> for what is unknown, no byte tokens."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab")]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    before = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*before, spaces])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


BOTH = {
    "byte level": byte_level_tokenizer,
    "metaspace": metaspace_tokenizer,
    "prepended": lambda: sentencepiece_like(prepend=True),
    "not prepended": lambda: sentencepiece_like(prepend=False),
}


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip", "normalized"])
@pytest.mark.parametrize("kind", ["byte level", "prepended"])
def test_an_added_token_keeps_its_flags(tmp_path: Path, kind: str, flag: str) -> None:
    """One that tokenizer_config.json alone knows, as the library would read it there."""
    tokenizer = BOTH[kind]()
    new = {"content": "b c", flag: True} | ({} if flag == "normalized" else {"normalized": False})
    number = str(tokenizer.get_vocab_size())
    save_tokenizer(tmp_path, tokenizer, added_tokens_decoder={number: {"special": False} | new})
    tokenizer.add_tokens([AddedToken(**new)])
    for text in ("ab c", "a b c d", " b c ", "ab cb"):
        read = encode(load_tokenizer(tmp_path), text)
        assert read == tokenizer.encode(text).ids, text


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": True},
        {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "add_eos_token": True},
        {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"},
        {"model_max_length": 3, "truncation_side": "left"},
        {"split_special_tokens": True},
        {"added_tokens_decoder": {"2": token("</s>", lstrip=True, rstrip=True)}},
        {"eos_token": token("</s>", lstrip=True), "bos_token": token("<s>", rstrip=True)},
    ],
    ids=str,
)
def test_ids_are_those_of_the_file(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    tokenizer = BOTH[kind]()
    expected = [tokenizer.encode(text).ids for text in TEXTS]
    bare = tokenizer.encode("a b", add_special_tokens=False).ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=20)
    save_tokenizer(tmp_path, tokenizer, **settings)
    found = load_tokenizer(tmp_path)
    assert [encode(found, text) for text in TEXTS] == expected
    assert (found.bos_token_id, found.eos_token_id) == (1, 2)
    assert encode(found, "a b", add_special_tokens=False) == bare


def test_tokens_that_only_the_older_files_name(tmp_path: Path) -> None:
    """They get the ids that transformers gives them."""
    save_tokenizer(tmp_path, byte_level_tokenizer(), pad_token="<pad>")
    write(tmp_path, "added_tokens.json", {"<|a|>": 300, "<|b|>": 301})
    write(tmp_path, "special_tokens_map.json", {"eos_token": token("<|b|>"), "bos_token": "<s>"})
    theirs, ours = AutoTokenizer.from_pretrained(str(tmp_path)), load_tokenizer(tmp_path)
    text = "x <|a|> y<|b|> </s>"
    assert encode(ours, text) == theirs(text).input_ids
    assert {300, 301} < set(encode(ours, text))
    assert ours.eos_token_id == theirs.eos_token_id == 301
    assert ours.decode(encode(ours, "x<|b|>y"), skip_special_tokens=True) == "xy"


def ending(kind: str) -> Any:
    specials = [("<s>", 1), ("</s>", 2)]
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    if kind == "template":
        return template
    if kind == "sequence":
        return processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return processors.BertProcessing(("</s>", 2), ("<s>", 1))


@pytest.mark.parametrize("kind", ["template", "sequence", "bert"])
def test_nothing_is_put_behind_a_prompt(tmp_path: Path, kind: str) -> None:
    tokenizer = byte_level_tokenizer()
    bare = tokenizer.encode("Call me", add_special_tokens=False).ids
    tokenizer.post_processor = ending(kind)
    assert tokenizer.encode("Call me").ids == [1, *bare, 2]
    save_tokenizer(tmp_path, tokenizer)
    assert encode(load_tokenizer(tmp_path), "Call me") == [1, *bare]


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {})
    assert load_tokenizer(tmp_path) is None


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokenizer_config.json", {"model_max_length": "20"}, "model_max_length must be a finite"),
        ("tokenizer_config.json", [], "holds a JSON list, expected an object"),
        ("tokenizer_config.json", {"eos_token": 7}, "eos_token must be the text of a token, got 7"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "must be an object, got "),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "a"}}, "cannot be read: "),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"1": 3}},
            "must be the text of a token",
        ),
        ("tokenizer_config.json", {"extra_special_tokens": 3}, "must be a list, got 3"),
        (
            "tokenizer_config.json",
            {"chat_template": 3},
            "chat_template must be a string, or a list",
        ),
        ("tokenizer_config.json", {"chat_template": [{"name": "a"}]}, "list of objects with name"),
        ("added_tokens.json", {"<|a|>": "300"}, "must be an integer from 0"),
        ("tokenizer.json", {"model": 3}, "the tokenizer in .* cannot be read: "),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, value: Any, message: str) -> None:
    save_tokenizer(tmp_path, byte_level_tokenizer())
    write(tmp_path, name, value)
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "special_tokens_map.json", "chat_template.jinja"]
)
def test_a_link_out_of_the_folder(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    save_tokenizer(inside, byte_level_tokenizer())
    (inside / name).unlink(missing_ok=True)
    (tmp_path / name).write_text("{}")
    (inside / name).symlink_to(tmp_path / name)
    with pytest.raises(InputError, match="a link that leads out of its folder"):
        load_tokenizer(inside)


def test_a_folder_of_templates_that_is_a_link_out(tmp_path: Path) -> None:
    inside, outside = tmp_path / "model", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "tool.jinja").write_text("secret")
    save_tokenizer(inside, byte_level_tokenizer())
    (inside / "additional_chat_templates").symlink_to(outside)
    with pytest.raises(InputError, match="a link that leads out of its folder"):
        load_tokenizer(inside)


class Panic(BaseException):
    """Like pyo3's PanicException, which is no Exception either."""


def panic(*_: object, **__: object) -> None:
    raise Panic("index out of bounds")


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_tokenizer_that_cannot_be_read_says_so_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer(tmp_path, byte_level_tokenizer())
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast", panic)
    with pytest.raises(InputError, match=r"the tokenizer in .* cannot be read: index out of"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(tmp_path)


PREFIXED = {"type": "BPE", "vocab": {"a": 0, "é": 1, "aé": 2}, "merges": [["a", "é"]]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Rust ends the process: a panic while another one is cleaned up after.
        ({"model": PREFIXED | {"continuing_subword_prefix": "#"}}, "SIGABRT"),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////fw=="}},
            "Cannot parse precompiled_charsmap",
        ),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size must be non-zero"),
    ],
)
def test_a_file_that_rust_panics_on_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture, changes: dict[str, Any], message: str
) -> None:
    save_tokenizer(tmp_path, byte_level_tokenizer())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=f"cannot be read as a tokenizer: .*{message}"):
        load_tokenizer(tmp_path)
    assert "panicked" not in capfd.readouterr().err


def test_a_tokenizer_that_fails_on_a_text_says_so_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot encode this text: index out of bounds"):
        encode(panic, "x")
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    save_tokenizer(tmp_path, words, unk_token=None, bos_token=None, eos_token=None)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"the tokenizer cannot encode this text: .*UNK"):
        encode(tokenizer, "a b")
    with pytest.raises(InputError, match=r"half of a surrogate pair .* at character 2"):
        encode(tokenizer, "a \ud800")


# --- chat templates ----------------------------------------------------------------------------


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in templates.items()]


def test_chat_templates_wherever_they_are(tmp_path: Path) -> None:
    def template(files: dict[str, str] | None = None, **settings: Any) -> Any:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        save_tokenizer(folder, byte_level_tokenizer(), **settings)
        for name, text in (files or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        return load_tokenizer(folder).chat_template

    inner = "additional_chat_templates/tool.jinja"
    as_json = json.dumps({"chat_template": "from json"})
    assert template() is None
    assert template(chat_template="one") == "one"
    assert template(chat_template=named(default="one", tool="two")) == {
        "default": "one",
        "tool": "two",
    }
    assert template(chat_template=named(rag="one")) == "one"
    assert template({"chat_template.jinja": "file"}, chat_template="one") == "file"
    assert template({"chat_template.json": as_json}) == "from json"
    assert template({"chat_template.json": as_json}, chat_template="one") == "one"
    assert template({inner: "t"}, chat_template="one") == {"default": "one", "tool": "t"}
    both = {"chat_template.jinja": "file", inner: "t"}
    assert template(both) == {"default": "file", "tool": "t"}


def test_the_default_template_is_the_one_that_is_used(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, byte_level_tokenizer(), chat_template=named(rag="a", tool="b"))
    assert load_tokenizer(tmp_path).chat_template == {"rag": "a", "tool": "b"}
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "hi"}]
    written = load_tokenizer(tmp_path).apply_chat_template(messages, tokenize=False)
    assert written == "<|user|>hi\n"


# --- ends of texts -----------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [2**31, [[2]], "2", 1.5, float("nan"), True, [2, None], -1])
def test_stop_ids_that_are_no_ids(tmp_path: Path, wrong: Any) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": wrong})
    with pytest.raises(
        InputError, match=r"generation_config\.json: eos_token_id must be a token id"
    ):
        find_stop_ids(tmp_path, CONFIG, None)


def test_stop_ids_outside_the_vocabulary_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": [299, 300]})
    with caplog.at_level(logging.WARNING):
        assert find_stop_ids(tmp_path, CONFIG, None) == {2, 299}
    assert "id 300 of generation_config.json is outside the model's vocabulary" in caplog.text


@pytest.mark.slow
def test_reading_a_tokenizer_advises_nobody_to_install_pytorch(folder):
    """A process of its own, in which PyTorch cannot be found."""
    code = (
        "import importlib.util as util, os, sys; find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'torch' else find(name, *more)\n"
        "from pathlib import Path; from dca_jax.inference.tokenizer import ADVICE, load_tokenizer\n"
        "load_tokenizer(Path(sys.argv[1])); assert ADVICE not in os.environ\n"
        "from transformers.utils import is_torch_available; assert not is_torch_available()"
    )
    clean = {k: v for k, v in os.environ.items() if k != ADVICE}
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, env=clean
    )
    assert done.returncode == 0, done.stderr
    assert "PyTorch" not in done.stderr
