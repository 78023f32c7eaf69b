"""Identifies the model of a result by checksums of every file that affects its answers.

All bytes are included. Headers, sizes and a few blocks would be faster to read, but could not
distinguish checkpoints that differ in a few weights, such as after training one layer or a few
steps with a small learning rate. Modification times change when files are copied. So the weights
are read once more, by up to eight threads: 1.1 GB/s for each core (measured on a busy AMD EPYC with
SHA instructions), no slower than most disks. They have just been loaded, so they are still in the
page cache as far as they fit. An evaluation takes longer than that.

The same weights in other files (resharded, converted) count as another model: they are refused or
evaluated again, never mixed up.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dca_jax.errors import InputError
from dca_jax.weights.adapters import CONFIG_FILE, WEIGHTS_FILE
from dca_jax.weights.files import PARAMS, is_converted
from dca_jax.weights.gguf_file import gguf_files, is_gguf
from dca_jax.weights.tensor_files import list_tensors

# Other files that count: config, tokenizer, end-of-text ids and chat templates.
OTHERS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"
PIECE = 64 * 2**20  # bytes of a file that one thread reads
BLOCK = 2**20  # bytes read at once


def fingerprint(folder: Path, adapter: Path | None = None) -> dict[str, str]:
    """Checksums (SHA-256, hexadecimal) of a model's weights, and of each of its other files.

    Args:
        folder: folder of a loaded checkpoint, or its GGUF file.
        adapter: folder of a LoRA adapter that has been merged into it.

    Raises:
        InputError: a file that cannot be read.
    """
    if is_gguf(folder):  # it includes all other files
        found = {"weights": checksum(folder.parent, gguf_files(folder))}
    else:
        found = {"weights": checksum(folder, _weight_files(folder))}
    for name in OTHERS:
        if (folder / name).is_file():
            found[name] = checksum(folder, [folder / name])
    templates = sorted((folder / TEMPLATES).glob("*.jinja"))
    if templates:
        found[TEMPLATES] = checksum(folder, templates)
    if adapter is not None:
        files = [adapter / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
        found["adapter"] = checksum(adapter, files)
    return found


def short_name(fingerprint: dict[str, str]) -> str:
    """Eight digits of a fingerprint, for a folder name."""
    parts = "".join(f"{name} {value}\n" for name, value in sorted(fingerprint.items()))
    return hashlib.sha256(parts.encode()).hexdigest()[:8]


def checksum(folder: Path, files: Sequence[Path]) -> str:
    """A checksum of the names and contents of files in a folder or its subfolders."""
    try:
        pieces = [
            (path, start)
            for path in files
            for start in range(0, max(path.stat().st_size, 1), PIECE)
        ]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = list(pool.map(_digest, pieces))
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from None
    whole = hashlib.sha256()
    for (path, start), digest in zip(pieces, digests, strict=True):
        whole.update(f"{path.relative_to(folder).as_posix()} {start}\0".encode() + digest)
    return whole.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    if is_converted(folder):
        return sorted(path for path in (folder / PARAMS).rglob("*") if path.is_file())
    return sorted({tensor.path for tensor in list_tensors(folder, packed=True).values()})


def _digest(piece: tuple[Path, int]) -> bytes:
    path, start = piece
    found = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        for at in range(0, PIECE, BLOCK):
            block = file.read(min(BLOCK, PIECE - at))
            if not block:
                break
            found.update(block)
    return found.digest()
