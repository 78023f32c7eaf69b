"""A checkpoint's local folder or file, downloaded from the Hugging Face Hub if there is none."""

import re
from pathlib import Path

from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.weights.files import is_converted
from dca_jax.weights.gguf_file import SUFFIX, gguf_files, is_gguf

# Files to download from a repository: configs, tokenizers, chat templates, and weights in the first
# format that it has. Many repositories have the same weights under other names too
# (consolidated.safetensors).
COMPANIONS = ("*.json", "*.txt", "*.jinja", "tokenizer.model", "*.tiktoken", "LICENSE*")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
# A pattern's * also matches subfolders, of which only chat templates are needed.
INNER = ("*/*.json", "*/*.txt", "*/*.tiktoken", "*/LICENSE*", "*/*.safetensors", "*/*.bin")


def find_folder(path: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a checkpoint, or its GGUF file; downloads a checkpoint on the Hub.

    For a folder with one GGUF file, whole or split, and no other weights, that file is returned.

    Args:
        path: as in `load`.
        weights: whether to download the weights too.

    Raises:
        InputError: an invalid or missing path that cannot be downloaded either, or a folder with
            several GGUF files.
    """
    if not isinstance(path, str | Path) or not str(path).strip():
        raise InputError(
            f"a model must be a folder, a file or a name on the Hub, got {shown(path)}"
        )
    folder = Path(path)
    try:
        is_folder, is_there = folder.is_dir(), folder.exists()
    except OSError:  # a name that the file system refuses
        is_folder, is_there = False, False
    if is_folder:
        return _only_gguf(folder) or folder
    if is_there and is_gguf(folder):
        return folder
    if is_there:
        raise InputError(
            f"{path} is a file; give the folder that holds config.json and weights, or a .gguf file"
        )
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
        raise InputError(
            f"{shown(str(path), quote=False)} is neither a folder nor the name of a model on the "
            "Hugging Face Hub ('owner/name')"
        )
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    def download(*patterns: str) -> Path:
        wanted = [*COMPANIONS, *patterns]
        return Path(snapshot_download(str(path), allow_patterns=wanted, ignore_patterns=[*INNER]))

    try:
        if not weights:
            return download()
        folder = download(WEIGHTS[0])
        return folder if any(folder.glob(WEIGHTS[0])) else download(WEIGHTS[1])
    except Exception as error:  # whatever stops a download, it is outside this program
        raise InputError(
            f"there is no folder {path}, and it could not be downloaded from the Hugging Face Hub "
            "either (offline, misspelled, or not yours to read): "
            f"{shown(str(error), quote=False)}"
        ) from error


def _only_gguf(folder: Path) -> Path | None:
    """The only GGUF file, or the first part of the only split one, in a folder without others."""
    if is_converted(folder) or any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        return None
    files = sorted(path for path in folder.glob(f"*{SUFFIX}") if is_gguf(path))
    if not files:
        return None
    if set(gguf_files(files[0])) != set(files):
        names = ", ".join(path.name for path in files[:5])
        raise InputError(
            f"{folder} holds {len(files)} GGUF files ({shown(names, quote=False)}); name the one "
            "that is meant"
        )
    return files[0]
