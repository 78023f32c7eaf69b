"""Converts the tokenizer in a GGUF file's metadata to Hugging Face's files.

There are two kinds. `gpt2` is byte-level BPE: it has tokens and merges, and in `pre` the name of
the splitting before the merges, for which llama.cpp has regular expressions. `llama` is
SentencePiece BPE: it has tokens and scores, from which merges are derived.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dca_jax import fields
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.weights.gguf_file import GGUF

GGML = "tokenizer.ggml."
TEMPLATE, TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# End-of-turn tokens, which also end a text in llama.cpp: many files name only the end of a text.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|eom_id|>", "<end_of_turn>")
SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # kinds of tokens

# Splitting before the merges. (?i: ) is for English contractions; \p{L} are letters, \p{N} digits,
# \p{M} marks.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"\p{N}" + _REST
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By `pre`: the consecutive splits; None is GPT-2's own, which ByteLevel includes.
SPLITS: dict[str, tuple[str | None, ...]] = {
    "gpt-2": (None,),
    "smollm": (r"\p{N}", None),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), (_LLAMA3,)),
    **dict.fromkeys(("smaug-bpe", "dbrx"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
}
# In these a word that is a token becomes that token without merges, and BOS comes first.
WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"}


def end_ids(file: GGUF) -> list[int]:
    """Every id that ends a text or a turn.

    Raises:
        InputError: an id is not a token id.
    """
    where = f"{file.path}"
    named = [fields.integer(file.metadata, GGML + each, where, least=0) for each in ENDS]
    tokens = file.metadata.get(f"{GGML}tokens")
    by_text = [tokens.index(t) for t in TURN_ENDS if isinstance(tokens, list) and t in tokens]
    return list(dict.fromkeys(n for n in [*named, *by_text] if n is not None))


def tokenizer_files(file: GGUF) -> dict[str, Any]:
    """The contents of `tokenizer.json` and `tokenizer_config.json`; empty without a tokenizer.

    Raises:
        InputError: the kind of tokenizer is not supported, or metadata is missing or wrong.
    """
    metadata, where = file.metadata, f"{file.path}"
    kind = fields.text(metadata, f"{GGML}model", where)
    if kind in ("", "none", "no_vocab"):
        return {}
    if kind not in ("gpt2", "llama"):
        raise InputError(
            f"{where}: its tokenizer is {shown(kind)}, which is not supported; expected gpt2 (BPE) "
            "or llama (SentencePiece)"
        )
    tokens = _texts(file, "tokens")
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) < len(tokens) or not tokens:
        twice = next((t for n, t in enumerate(tokens) if vocab[t] != n), "")
        raise InputError(f"{where}: its vocabulary is empty, or has {shown(twice)} twice")
    special = {
        name: fields.integer(metadata, GGML + key, where, least=0) for name, key in SPECIAL.items()
    }
    for name, number in special.items():
        if number is not None and number >= len(tokens):
            raise InputError(f"{where}: {name} is id {number} of {len(tokens)} tokens")
    described = _byte_level(file, vocab) if kind == "gpt2" else _sentencepiece(file, vocab, special)
    begins = kind == "llama" or metadata.get(f"{GGML}pre") in WHOLE_WORDS
    begins = fields.boolean(metadata, f"{GGML}add_bos_token", where, default=begins)
    bos = special["bos_token"]
    settings: dict[str, Any] = {
        name: tokens[number] for name, number in special.items() if number is not None
    }
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added_tokens(file, tokens),
            "post_processor": None if bos is None or not begins else _begin(tokens[bos], bos),
            **described,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **settings,
            **_chat_template(file),
        },
    }


def _byte_level(file: GGUF, vocab: dict[str, int]) -> dict[str, Any]:
    where = f"{file.path}"
    pre = fields.text(file.metadata, f"{GGML}pre", where)
    if pre not in SPLITS:
        raise InputError(
            f"{where}: its tokenizer splits texts with {shown(pre)} ({GGML}pre), which is not "
            f"supported; expected one of {', '.join(SPLITS)}"
        )
    merges = [merge.split(" ") for merge in _texts(file, "merges")]
    wrong = next((m for m in merges if not _is_merge(m, vocab)), None)
    if wrong is not None:
        raise InputError(
            f"{where}: {shown(' '.join(wrong))} in {GGML}merges is not a pair of tokens that merge "
            "into one"
        )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps: list[dict[str, Any]] = [
        {
            "type": "Split",
            "pattern": {"Regex": split},
            "behavior": "Isolated",
            "invert": False,
        }
        for split in SPLITS[pre]
        if split is not None
    ]
    steps.append(byte_level | {"use_regex": None in SPLITS[pre]})
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in WHOLE_WORDS,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _is_merge(pair: list[str], vocab: dict[str, int]) -> bool:
    return len(pair) == 2 and pair[0] in vocab and pair[1] in vocab and pair[0] + pair[1] in vocab


def _sentencepiece(
    file: GGUF, vocab: dict[str, int], special: dict[str, int | None]
) -> dict[str, Any]:
    """Like SentencePiece and llama.cpp, adds a space before a text even if it begins with one."""
    where, metadata = f"{file.path}", file.metadata
    scores = metadata.get(f"{GGML}scores")
    if not isinstance(scores, np.ndarray) or scores.shape != (len(vocab),):
        raise InputError(f"{where}: {GGML}scores must be a number for each of {len(vocab)} tokens")
    if f"{GGML}precompiled_charsmap" in metadata or fields.boolean(
        metadata, f"{GGML}remove_extra_whitespaces", where
    ):
        raise InputError(f"{where}: its tokenizer normalizes texts, which is not supported")
    prefix = fields.boolean(metadata, f"{GGML}add_space_prefix", where, default=True)
    space, unknown = "\N{LOWER ONE EIGHTH BLOCK}", special["unk_token"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": space}
    normalizers = [{"type": "Prepend", "prepend": space}, replace] if prefix else [replace]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": space}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else list(vocab)[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(vocab, scores.tolist(), _kinds(file, len(vocab))),
        },
    }


def _merges(
    vocab: dict[str, int], scores: Sequence[float], kinds: np.ndarray
) -> list[tuple[str, str]]:
    """Every merge of two tokens into one, best token first.

    SentencePiece merges the two neighbours whose token has the best score, leftmost first. Only
    text tokens result from merges, not control tokens or bytes.
    """
    found = [
        (-scores[number], number, left, right)
        for token, number in vocab.items()
        if kinds[number] in (NORMAL, USER_DEFINED)
        for left, right in ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        if left in vocab and right in vocab
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _added_tokens(file: GGUF, tokens: list[str]) -> list[dict[str, Any]]:
    """Tokens that are matched in a text before anything else."""
    return [
        {
            "id": number,
            "content": tokens[number],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for number, kind in enumerate(_kinds(file, len(tokens)).tolist())
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and tokens[number]
    ]


def _kinds(file: GGUF, count: int) -> np.ndarray:
    kinds = file.metadata.get(f"{GGML}token_type", np.full(count, NORMAL))
    if not isinstance(kinds, np.ndarray) or kinds.shape != (count,):
        raise InputError(
            f"{file.path}: {GGML}token_type must be a number for each of {count} tokens"
        )
    return kinds


def _texts(file: GGUF, name: str) -> list[str]:
    value = file.metadata.get(GGML + name)
    if not isinstance(value, list):
        raise InputError(f"{file.path}: {GGML}{name} must be a list of texts, got {shown(value)}")
    return value


def _begin(token: str, number: int) -> dict[str, Any]:
    """The post-processor that adds BOS before a text."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _chat_template(file: GGUF) -> dict[str, Any]:
    where, metadata = f"{file.path}", file.metadata
    found = {"default": fields.text(metadata, TEMPLATE, where)}
    names = metadata.get(TEMPLATES, [])
    if not isinstance(names, list):
        raise InputError(f"{where}: {TEMPLATES} must be a list of names, got {shown(names)}")
    found |= {name: fields.text(metadata, f"{TEMPLATE}.{name}", where) for name in names}
    found = {name: text for name, text in found.items() if text}
    if not found:
        return {}
    if set(found) == {"default"}:
        return {"chat_template": found["default"]}
    return {"chat_template": [{"name": n, "template": text} for n, text in found.items()]}
