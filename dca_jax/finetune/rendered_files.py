"""Rendered dialogues kept in the run's folder, so that a run that goes on need not render again.

    OUTPUT/rendered/KEY.safetensors    tokens int32 and trained (bits) of all dialogues of a file,
                                       one after another; ends int64; what was left out, and why

KEY is a digest of all that decides what is in it: the data file's contents, the tokenizer, the
template and the settings. What cannot be read is rendered again.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dca_jax.disk import writing, written
from dca_jax.errors import InputError
from dca_jax.finetune.rendered import Rendered

VERSION = 1  # another one where what dialogues are rendered to changes
Kept = tuple[list[Rendered], dict[str, int]]


def key_of(path: Path, tokenizer: Any, template: str, options: dict[str, Any]) -> str:
    """A digest of what a file is rendered to.

    Args:
        template: its text. options: what else decides, as JSON has it.

    Raises:
        InputError: a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = tokenizer.get_vocab() if backend is None else backend.to_str()
    parts = [VERSION, path.suffix.lower(), content, template, options, vocabulary]
    parts.append({name: str(token) for name, token in tokenizer.special_tokens_map.items()})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def keep(folder: Path, key: str, kept: Kept) -> None:
    """Writes a file's dialogues, aside and then renamed.

    Raises:
        InputError: a disk that is full, or not ours.
    """
    dialogues, counts = kept
    path = _file(folder, key)
    if path.exists():
        return
    tensors = {
        "tokens": np.concatenate([np.zeros(0, np.int32), *(one.tokens for one in dialogues)]),
        "trained": np.packbits(np.concatenate([_NONE, *(one.trained for one in dialogues)])),
        "ends": np.cumsum([len(one.tokens) for one in dialogues], dtype=np.int64),
    }
    with writing(folder):
        folder.mkdir(exist_ok=True)
    metadata = {"counts": json.dumps(counts)}
    written(path, lambda aside: save_file(tensors, aside, metadata))


def kept(folder: Path, key: str) -> Kept | None:
    """What `keep` has written under a key; None if there is nothing, or nothing whole."""
    try:
        with safe_open(_file(folder, key), framework="numpy") as file:
            counts = json.loads((file.metadata() or {})["counts"])
            tokens, bits, ends = (file.get_tensor(name) for name in ("tokens", "trained", "ends"))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    if (tokens.dtype, bits.dtype, ends.dtype) != (np.int32, np.uint8, np.int64):
        return None
    starts = np.concatenate([np.zeros(1, np.int64), ends])
    if starts[-1] != len(tokens) or 8 * len(bits) < len(tokens) or (np.diff(starts) < 1).any():
        return None
    trained = np.unpackbits(bits, count=len(tokens)).astype(np.bool_)
    pairs = zip(starts[:-1].tolist(), ends.tolist(), strict=True)
    return [Rendered(tokens[a:b], trained[a:b]) for a, b in pairs], counts


_NONE = np.zeros(0, np.bool_)


def _file(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"
