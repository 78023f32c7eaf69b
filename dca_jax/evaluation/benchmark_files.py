"""Long documents with questions: the files of benchmarks, and cutting documents to length."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dca_jax.errors import InputError
from dca_jax.text_files import json_lines, read_text_file

CUT = 100  # words that ChunkLlama takes off a document at a time, until it fits


def read_json_lines(path: Path, *fields: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines.

    Args:
        fields: that every one must have.

    Raises:
        InputError: no such file, or a line that is no object with these fields.
    """
    rows = []
    for number, row in json_lines(read_text_file(path), f"{path}"):
        missing = [name for name in fields if not isinstance(row, dict) or name not in row]
        if missing:
            raise InputError(f"{path}: line {number} lacks {', '.join(missing)}")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} is empty")
    return rows


@dataclass(frozen=True)
class Document:
    """A document, and how much of it a prompt has room for.

    Attributes:
        text: the whole.
        limit: tokens, special ones included.
        words: where cutting begins: from so many words on.
        side: "left" keeps the end, "right" the beginning.
    """

    text: str
    limit: int
    words: int
    side: str

    def cut(self, count_tokens: Callable[[str], int]) -> str:
        """The document, cut as ChunkLlama and L-Eval cut it if it has too many tokens.

        They keep `words` words, then 100 fewer at each round, until the limit is met; a word is
        what stands between two spaces. So a little more is cut off than would have to be.
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


def cached_cut(document: Document, count_tokens: Callable[[str], int]) -> Callable[[], str]:
    """`Document.cut` when it is first asked for; many questions share a document."""
    return functools.cache(lambda: document.cut(count_tokens))
