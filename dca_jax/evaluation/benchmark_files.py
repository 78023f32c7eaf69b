"""Benchmark files with questions about long documents, and truncation of documents."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dca_jax.errors import InputError
from dca_jax.evaluation.texts import encode
from dca_jax.fields import shown
from dca_jax.inference.llm import LLM
from dca_jax.inference.tokenizer import decode
from dca_jax.text_files import check_characters, json_lines, read_text_file

CUT = 100  # words that ChunkLlama removes from a document at a time, until it fits


def read_json_lines(path: Path, *fields: str) -> list[dict[str, Any]]:
    """The objects in a JSON lines file.

    Args:
        fields: required fields, with the types in `FIELDS`.

    Raises:
        InputError: a missing file, or a line that is not an object with these fields.
    """
    rows = []
    for number, row in json_lines(read_text_file(path), f"{path}"):
        where = f"{path}: line {number}"
        if not isinstance(row, dict):
            raise InputError(f"{where} is {shown(row)}, expected an object")
        missing = [name for name in fields if name not in row]
        if missing:
            raise InputError(f"{where} lacks {', '.join(missing)}")
        for name in fields:
            FIELDS[name](row[name], f"{where}: {name}")
        for one, other in PAIRS:
            if {one, other} <= set(fields) and len(row[one]) != len(row[other]):
                raise InputError(
                    f"{where}: there are {len(row[one])} {one} and {len(row[other])} {other}"
                )
        rows.append(row)
    if not rows:
        raise InputError(f"{path} is empty")
    return rows


def check_text(value: Any, where: str) -> None:
    """Raises InputError unless a value is a string that a tokenizer can encode."""
    if not isinstance(value, str):
        raise InputError(f"{where} is {shown(value)}, expected a string")
    check_characters(value, where)


def _check_answer(value: Any, where: str) -> None:
    check_text(value, where)
    if not value.strip():
        raise InputError(f"{where} is empty, expected an answer")


def _check_name(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        check_text(value, where)


def _check_answers(value: Any, where: str) -> None:
    """One answer, or a list of them."""
    if isinstance(value, str):
        _check_answer(value, where)
        return
    _list_of(_check_answer)(value, where)
    if not value:
        raise InputError(f"{where} is empty, expected an answer")


def _list_of(check: Callable[[Any, str], None]) -> Callable[[Any, str], None]:
    def check_all(values: Any, where: str) -> None:
        if not isinstance(values, list):
            raise InputError(f"{where} is {shown(values)}, expected a list of strings")
        for number, value in enumerate(values, start=1):
            check(value, f"{where}, item {number},")

    return check_all


# The check of each field in the lines of benchmarks; references must not be empty.
FIELDS: dict[str, Callable[[Any, str], None]] = {
    "input": check_text,
    "instructions": _list_of(check_text),
    "outputs": _list_of(_check_answer),
    "query": check_text,
    "output": _check_answer,
    "query_examples": _list_of(check_text),
    "output_examples": _list_of(check_text),
    "id": _check_name,
    "gt": _check_answer,
    "context": check_text,
    "answer": _check_answers,
}
PAIRS = (("instructions", "outputs"), ("query_examples", "output_examples"))


@dataclass(frozen=True)
class Document:
    """A document, and how much of it fits into a prompt.

    Attributes:
        text: the whole text.
        limit: maximum number of tokens, including special ones.
        words: number of words at which truncation starts.
        side: side to truncate: "left" keeps the end, "right" the beginning.
    """

    text: str
    limit: int
    words: int
    side: str

    def cut(self, count_tokens: Callable[[str], int]) -> str:
        """The document, truncated as in ChunkLlama and L-Eval if it has too many tokens.

        They keep `words` words, then 100 fewer in each round, until the limit is met; words are
        separated by single spaces. So slightly more than necessary is removed.
        """
        text, words = self.text, self.words
        while text and count_tokens(text) > self.limit:
            parts = text.split(" ")
            if self.side == "left":
                text = " ".join(parts[-words:] if words > 0 else [])
            else:
                text = " ".join(parts[: max(words, 0)])
            words -= CUT
        if not text:
            raise InputError(f"{self.limit} tokens are no room for a document")
        return text


def cut_in_the_middle(llm: LLM, text: str, limit: int) -> str:
    """A text truncated in the middle to about `limit` tokens, half from each end.

    This is as in InfiniteBench and LongBench v2; a few tokens may be added where the halves meet.
    """
    ids = encode(llm, text)
    if len(ids) <= limit:
        return text
    half = limit // 2
    if half < 1:
        raise InputError(f"{limit} tokens are no room for a prompt")
    return decode(llm.tokenizer, [*ids[:half], *ids[-half:]])


def cached_cut(document: Document, count_tokens: Callable[[str], int]) -> Callable[[], str]:
    """`Document.cut`, computed on first use, because many questions share a document."""
    return functools.cache(lambda: document.cut(count_tokens))


def longest_text(llm: LLM, texts: Sequence[str]) -> int:
    """Number of tokens of the text with the most characters."""
    return len(llm.tokenize(max(texts, key=len)))
