"""Tokenizers of GGUF files: transformers' ids, or those of the format's rules where they differ."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import byte_level, sentencepiece, write_gguf
from tiny_gguf import wide_config as wide
from tiny_llm import CHAT_TEMPLATE, byte_level_tokenizer, metaspace_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dca_jax.errors import InputError
from dca_jax.inference.tokenizer import decode, encode, load_tokenizer
from dca_jax.weights.gguf_file import read_gguf
from dca_jax.weights.gguf_tokenizer import SPLITS, tokenizer_files
from dca_jax.weights.huggingface import read_config

WORDS = (
    "Call me Ishmael. money in my purse,\tparticular watery PART don't WE'LL 12345 1 22 ½² naïve "
    "e\u0301 海は広い мир ﬁ 🙂 \n\n {x:=3} snake_case <|user|> </s> <s> ... -- \u00a0 ١٢٣ ǅ ʰ 3.14"
).split(" ")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def lines(count: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(1, 12))) for _ in range(count)]


def write(folder: Path, tokenizer: dict[str, Any]) -> Path:
    return write_gguf(folder / "m.gguf", wide(num_hidden_layers=1), ["Q8_0"], tokenizer=tokenizer)


def both(path: Path) -> tuple[Any, Any]:
    """Ours, and transformers' own conversion of the file."""
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    return load_tokenizer(path), theirs


# Of these transformers has the same rule. It has none for "smollm".
@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken", "smaug-bpe"])
def test_byte_level_ids_are_those_of_transformers(tmp_path, pre):
    path = write(tmp_path, byte_level(byte_level_tokenizer(400), pre, add_bos_token=False))
    ours, theirs = both(path)
    for line in lines(200):
        ids = encode(ours, line)
        assert ids == theirs(line).input_ids, repr(line)
        assert decode(ours, ids, skip_special_tokens=False) == line
    assert (ours.bos_token, ours.eos_token_id) == ("<s>", 2)


def regex_ids(tokenizer: Tokenizer, text: str, splits: list[str]) -> list[int]:
    """The ids of a text without special tokens, cut by regular expressions one after another."""
    import regex

    pieces = [text]
    for split in splits:
        cut = []
        for piece in pieces:
            at = 0
            for found in regex.finditer(split, piece):
                cut += [piece[at : found.start()], found.group()]
                at = found.end()
            cut.append(piece[at:])
        pieces = cut
    return [n for piece in pieces if piece for n in tokenizer.encode(piece).ids]


def test_smollm_splits_off_every_digit_first(tmp_path):
    """As the model's own tokenizer; two spaces before a digit are then one piece."""
    trained = byte_level_tokenizer(400)
    path = write(tmp_path, byte_level(trained, "smollm"))
    ours = load_tokenizer(path)
    shell = json.loads(trained.to_str()) | {"added_tokens": [], "post_processor": None}
    shell["pre_tokenizer"] |= {"use_regex": False}
    bare = Tokenizer.from_str(json.dumps(shell))
    for line in [*lines(200), "a  12", "x   3  ½"]:
        line = line.replace("<s>", "").replace("</s>", "").replace("<|user|>", "")
        assert encode(ours, line) == regex_ids(bare, line, [r"\p{N}", GPT2]), repr(line)


def greedy_ids(text: str, scores: dict[str, float], vocab: dict[str, int]) -> list[int]:
    """SentencePiece's algorithm: of all neighbours join the best, the leftmost of equals."""
    pieces = list(text)
    while True:
        pairs = enumerate(itertools.pairwise(pieces))
        known = [(scores[a + b], -n) for n, (a, b) in pairs if a + b in scores]
        if not known:
            break
        at = -max(known)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    ids = []
    for piece in pieces:
        ids += [vocab[piece]] if piece in vocab else [vocab[f"<0x{n:02X}>"] for n in piece.encode()]
    return ids


def test_sentencepiece_ids(tmp_path):
    """Those of transformers, but where a space is put before a text that begins with one."""
    metadata = sentencepiece(metaspace_tokenizer())
    path = write(tmp_path, metadata)
    ours, theirs = both(path)
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = {token: number for number, token in enumerate(tokens)}
    normal = {t: s for t, s, n in zip(tokens, scores, range(400), strict=True) if 6 <= n < 144}
    for line in lines(200):
        line = line.replace("<s>", "").replace("</s>", "").replace("<|user|>", "")
        ids = encode(ours, line)
        assert ids == [1, *greedy_ids("▁" + line.replace(" ", "▁"), normal, vocab)], repr(line)
        if line and line[0] != " ":
            assert ids == theirs(line).input_ids, repr(line)
            assert decode(ours, ids) == line
    assert encode(ours, "<s>[a]</s>") == [1, 1, *greedy_ids("▁[a]", normal, vocab), 2]
    without = load_tokenizer(write(tmp_path, metadata | {"tokenizer.ggml.add_space_prefix": False}))
    assert encode(without, "me", add_special_tokens=False) == greedy_ids("me", normal, vocab)


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({"pre": "llama-bpe"}, True),
        ({"pre": "qwen2"}, False),
        ({"pre": "qwen2", "add_bos_token": True}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
    ],
)
def test_bos(tmp_path, changes, begins):
    tokenizer = load_tokenizer(write(tmp_path, byte_level(byte_level_tokenizer(), **changes)))
    assert (encode(tokenizer, "Call")[0] == 1) == begins


def test_a_word_of_llama_3_that_is_a_token_is_that_token(tmp_path):
    """Llama 3's tokenizer has words that its merges do not reach."""
    metadata = byte_level(byte_level_tokenizer(), "llama-bpe", add_bos_token=False)
    metadata["tokenizer.ggml.tokens"][-1] = "Ishmaelite"
    metadata["tokenizer.ggml.merges"].pop()
    assert encode(load_tokenizer(write(tmp_path, metadata)), "Ishmaelite") == [299]
    split = load_tokenizer(write(tmp_path, metadata | {"tokenizer.ggml.pre": "qwen2"}))
    assert len(encode(split, "Ishmaelite")) > 1


def test_templates_and_ends(tmp_path):
    metadata = byte_level(byte_level_tokenizer(), "gpt-2", eot_token_id=5)
    metadata["tokenizer.ggml.tokens"][3] = "<|im_end|>"
    metadata |= {
        "tokenizer.chat_template": CHAT_TEMPLATE,
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "tools",
    }
    path = write(tmp_path, metadata)
    templates = load_tokenizer(path).chat_template
    assert templates == {"default": CHAT_TEMPLATE, "tool_use": "tools"}
    assert read_config(path).eos_token_ids == (2, 5, 3)


def test_a_file_without_a_tokenizer(tmp_path):
    assert load_tokenizer(write(tmp_path, {})) is None
    assert load_tokenizer(write(tmp_path, {"tokenizer.ggml.model": "none"})) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "its tokenizer is 't5', which is not read; expected gpt2"),
        ({"pre": "mystery"}, r"in the way 'mystery' \(tokenizer.ggml.pre\), which is not read"),
        ({"pre": ""}, "in the way ''"),
        ({"tokens": "x"}, "tokens must be a list of texts, got 'x'"),
        ({"tokens": ["a", "b", "a"]}, "or has 'a' twice"),
        ({"merges": ["a b c"]}, "'a b c' in tokenizer.ggml.merges is not a pair"),
        ({"merges": [1, 2]}, "merges must be a list of texts"),
        ({"token_type": [1, 2]}, "token_type must be a number for each of 300 tokens"),
        ({"bos_token_id": 300}, "bos_token is id 300 of 300 tokens"),
        ({"bos_token_id": "1"}, "bos_token_id must be an integer"),
        ({"add_bos_token": 1}, "add_bos_token must be true or false"),
        ({"model": "llama"}, "scores must be a number for each of 300 tokens"),
        (
            {"model": "llama", "scores": [0.5] * 300, "remove_extra_whitespaces": True},
            "changes texts",
        ),
    ],
    ids=str,
)
def test_metadata_that_is_no_tokenizer_is_refused(tmp_path, changes, message):
    metadata = byte_level(byte_level_tokenizer(), "gpt-2")
    path = write(tmp_path, metadata | {f"tokenizer.ggml.{k}": v for k, v in changes.items()})
    with pytest.raises(InputError, match=message):
        tokenizer_files(read_gguf(path))


def test_every_split_is_a_regular_expression():
    import regex

    assert all(regex.compile(split) for splits in SPLITS.values() for split in splits if split)
