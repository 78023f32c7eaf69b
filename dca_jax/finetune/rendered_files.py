"""Rendered dialogues stored in the run's folder, so that a resumed run does not render again.

    OUTPUT/rendered/KEY.safetensors    tokens int32 and trained (bits) of all dialogues of a file,
                                       one after another; ends int64; the dropped ones by reason

KEY is a digest of everything that determines the contents: the data file, the tokenizer, the
template and the settings. A file that cannot be read is rendered again.
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

VERSION = 1  # increase it when the rendering changes
Kept = tuple[list[Rendered], dict[str, int]]


def key_of(path: Path, tokenizer: Any, template: str, options: dict[str, Any]) -> str:
    """A digest that identifies the rendering of a file.

    Args:
        template: text of the template.
        options: other settings that affect the rendering, as JSON values.

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
    """Writes a file's dialogues under a temporary name, and renames it.

    Raises:
        InputError: the disk is full or not writable.
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
    """The dialogues that `keep` wrote under a key; None if absent or damaged."""
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
