"""A checkpoint's local folder, downloaded from the Hugging Face Hub where there is none."""

import re
from pathlib import Path

from dca_jax.errors import InputError

# What is fetched from the Hub, of a repository's top folder: weights; and configs, tokenizers and
# chat templates.
WEIGHTS = ("*.safetensors",)
COMPANIONS = ("*.json", "*.txt", "*.jinja", "tokenizer.model", "*.tiktoken")


def find_folder(path: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a checkpoint; one on the Hugging Face Hub is downloaded.

    Args:
        path: as in `load`.
        weights: False downloads all but the weights.

    Raises:
        InputError: neither a folder nor a model that can be downloaded.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{path} is a file; give the folder that holds config.json and weights")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
        raise InputError(
            f"{path} is no folder, and no name of a model on the Hugging Face Hub ('owner/name')"
        )
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    try:
        wanted = [*COMPANIONS, *(WEIGHTS if weights else ())]
        return Path(snapshot_download(str(path), allow_patterns=wanted, ignore_patterns="*/*"))
    except Exception as error:  # whatever stops a download, it is outside this program
        raise InputError(
            f"there is no folder {path}, and it could not be downloaded from the Hugging Face Hub "
            f"either (offline, misspelled, or not yours to read): {error}"
        ) from error
