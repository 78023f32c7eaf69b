"""Long texts to evaluate on: text files, and files of token ids."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.inference import tokenizer
from dca_jax.inference.documents import read_document
from dca_jax.inference.llm import LLM

SAMPLE = 1024  # bytes at a file's start that distinguish text from token ids
TEXT_BYTES = frozenset(b"\t\n\r") | frozenset(range(32, 127))


@dataclass(frozen=True, kw_only=True)
class LongText:
    """A text as token ids, and the facts that identify it in the settings of a run.

    Attributes:
        tokens: token ids without special tokens before or after the text.
        facts: its file's name and checksum, and the numbers of bytes and words.
    """

    tokens: Int[np.ndarray, " N"]
    facts: dict[str, Any]


def read_text(llm: LLM, path: Path) -> LongText:
    """A text file (UTF-8) or PDF, tokenized whole.

    Raises:
        InputError: a file that cannot be read, or a model without a tokenizer.
    """
    text = read_document(path)
    tokens = np.asarray(encode(llm, text), np.int32)
    facts = {
        "text": path.name,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": len(tokens),
        "bytes": len(text.encode()),
        "words": len(re.split(r"\s+", text)),  # counted as in lm-evaluation-harness
    }
    return LongText(tokens=tokens, facts=facts)


def read_token_file(path: Path, vocab_size: int) -> LongText:
    """Token ids from a `.npy` file of integers, or from a raw file of unsigned integers.

    A raw file, such as the paper's `pg19_llama2.validation.bin`, has 16 bits per token if the
    vocabulary fits, otherwise 32. (ChunkLlama writes 32 and reads 16, so a file with zeros in every
    other place is refused.)

    Raises:
        InputError: a missing file, or one without ids of this vocabulary.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    try:
        ids = _npy_ids(path) if path.suffix.lower() == ".npy" else _raw_ids(path, vocab_size)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(ids) == 0 or ids.min() < 0 or ids.max() >= vocab_size:
        raise InputError(f"{path} holds no ids of a vocabulary of {vocab_size}")
    tokens = np.asarray(ids, np.int32)
    facts = {
        "text": path.name,
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "tokens": len(tokens),
    }
    return LongText(tokens=tokens, facts=facts)


def _npy_ids(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # an unexpected end of file, an invalid Python literal, ...
        reason = shown(str(error), quote=False)
        raise InputError(f"{path} is not an array of numbers: {reason}") from None
    if not isinstance(ids, np.ndarray):
        ids.close()
        raise InputError(f"{path} is a zip file of arrays (.npz); save the array of ids alone")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"{path} holds {ids.dtype} {ids.shape}; expected a list of integers")
    return ids


def _raw_ids(path: Path, vocab_size: int) -> np.ndarray:
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    with path.open("rb") as file:
        start = file.read(SAMPLE)
    if len(start) >= SAMPLE // 16 and all(byte in TEXT_BYTES for byte in start):
        raise InputError(f"{path} is text, not raw token ids; give it as --text")
    if path.stat().st_size % dtype.itemsize:
        raise InputError(f"{path}: {path.stat().st_size} bytes are not a list of {dtype} ids")
    ids = np.fromfile(path, dtype)
    if dtype == np.uint16 and len(ids) > 1 and not ids[1::2].any():
        raise InputError(f"{path} seems to have 32 bits per token; save it as .npy instead")
    return ids


def joined(prefix: list[int], tokens: Int[np.ndarray, " N"]) -> Int[np.ndarray, " M"]:
    """The tokens of a text after those of a prefix."""
    return np.concatenate([np.asarray(prefix, np.int32), tokens])


def encode(llm: LLM, text: str) -> list[int]:
    """The ids of a piece of text, without special tokens."""
    if llm.tokenizer is None:
        raise InputError("this model's folder has no tokenizer, so it can read token files only")
    return tokenizer.encode(llm.tokenizer, text, add_special_tokens=False)


def special_prefix(llm: LLM) -> list[int]:
    """The ids that the tokenizer adds before a text: BOS, or none."""
    bare, whole = encode(llm, "a"), llm.tokenize("a")
    for start in range(len(whole) - len(bare) + 1):  # some also append an EOS
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


def prefix_token(llm: LLM) -> int:
    """The token before a text in the rolling form: BOS, or else EOS.

    Raises:
        InputError: the model has neither.
    """
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(llm.tokenizer, name, None)
        if found is not None:
            return found
    config = llm.model.config
    for found in (config.bos_token_id, *config.eos_token_ids):
        if found is not None:
            return found
    raise InputError("the model has neither a BOS nor an EOS token to begin a text with")
