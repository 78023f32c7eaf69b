"""A folder's tokenizer: an unmodified tokenizer.json, chat templates, and the ids that end a text.

The object comes from `transformers`, for its chat templates and decoding. But if there is a
tokenizer.json, that file alone determines the ids of a text. (`AutoTokenizer` of transformers 5
rebuilds Llama's and others' from the vocabulary and loses normalizers and unknown tokens.)
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from jaxtyping import Int

from dca_jax import fields
from dca_jax.bounded.workers import RaisedError, StoppedError, Workers
from dca_jax.config import LlamaConfig
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.text_files import check_characters, read_text_file
from dca_jax.weights.files import member, read_json, template_files
from dca_jax.weights.gguf import write_companions
from dca_jax.weights.gguf_file import is_gguf

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
GENERATION = "generation_config.json"

# The files of a tokenizer. A folder without any of `VOCABULARIES` has none.
VOCABULARIES = (FILE, "tokenizer.model", "vocab.json", SETTINGS)
FILES = (*VOCABULARIES, SPECIAL, ADDED, "merges.txt", "chat_template.jinja", "chat_template.json")

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token

SECONDS, MEMORY = 120, 8 * 2**30  # limits for testing a tokenizer.json; the largest take 2 s

ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # the environment variable that turns it off

log = logging.getLogger(__name__)


# --- loading -----------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder or a GGUF file, an object of `transformers`; None if there is none.

    A text's ids are those of tokenizer.json, but nothing is appended to a text: an EOS would be
    between a prompt and its continuation.

    Raises:
        InputError: a file that cannot be read, is damaged or is outside the folder, or a tokenizer
            that would run code from the checkpoint.
    """
    if is_gguf(folder):
        with TemporaryDirectory() as written:
            write_companions(folder, Path(written))
            return load_tokenizer(Path(written))
    present = [name for name in FILES if (folder / name).is_symlink() or (folder / name).exists()]
    for name in present:
        member(folder, name)
    if not any(name in VOCABULARIES for name in present):
        return None
    settings = read_json(folder, SETTINGS) if SETTINGS in present else {}
    where = f"{folder / SETTINGS}"
    fields.number(settings, "model_max_length", where, above=0)
    templates = _chat_templates(folder, settings)
    with _refusing(f"the tokenizer in {folder} cannot be read"):
        if FILE in present:
            tokenizer = _from_file(folder, settings)
        else:
            with _without_advice():
                from transformers import AutoTokenizer  # takes seconds to import

            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
            _put_nothing_behind(backend)
    only = next(iter(templates.values()), None)
    tokenizer.chat_template = templates if len(templates) > 1 else only
    return tokenizer


@contextmanager
def _without_advice() -> Iterator[None]:
    """Imports transformers without its advice to install PyTorch, which tokenizers do not need."""
    given = os.environ.get(ADVICE)
    os.environ[ADVICE] = "1" if given is None else given
    try:
        yield
    finally:
        if given is None:
            del os.environ[ADVICE]


def _from_file(folder: Path, settings: Mapping[str, Any]) -> Any:
    """The tokenizer in tokenizer.json, with the special tokens named in the other files."""
    with ThreadPoolExecutor(1) as pool:  # another process tries the file during the import
        tried = pool.submit(_try_file, member(folder, FILE))
        with _without_advice():
            from transformers import AddedToken, PreTrainedTokenizerFast  # takes a second to import
        tried.result()
    where, named = f"{folder / SETTINGS}", dict(settings)
    described = fields.mapping(settings, "added_tokens_decoder", where)
    if described is None and (folder / SPECIAL).exists():  # as in transformers, which wrote both
        named |= read_json(folder, SPECIAL)
    special = {
        name: _content(value, name, where)
        for name, value in named.items()
        if name.endswith("_token") and value is not None and not isinstance(value, bool)
    }
    extra = named.get("extra_special_tokens") or named.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, Mapping) else extra
    if not isinstance(extra, list):
        raise InputError(f"{where}: extra_special_tokens must be a list, got {shown(extra)}")
    wanted = [*special.values(), *(_content(v, "extra_special_tokens", where) for v in extra)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(member(folder, FILE)))
    # Tokens that only the older files have. Those in tokenizer.json are not changed.
    older = read_json(folder, ADDED) if (folder / ADDED).exists() else {}
    by_id = {fields.integer(older, text, ADDED, default=0, least=0): text for text in older}
    by_id |= {int(number): token for number, token in (described or {}).items()}
    for _, token in sorted(by_id.items()):
        text = _content(token, "added_tokens_decoder", where)
        if tokenizer.backend_tokenizer.token_to_id(text) is None:
            flags = token if isinstance(token, Mapping) else {"special": text in wanted}
            read = {n: fields.boolean(flags, n, where) for n in FLAGS if flags.get(n) is not None}
            tokenizer.add_tokens([AddedToken(text, **read)])
    known = tokenizer.added_tokens_encoder
    tokenizer.add_tokens([text for text in wanted if text not in known], special_tokens=True)
    for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        setattr(tokenizer, name, special.get(name))
    return tokenizer


def _try_file(path: Path) -> None:
    """Refuses a tokenizer.json that makes Rust panic, which may end the process that reads it."""
    workers = Workers("dca_jax.bounded.tokenizer_file", seconds=SECONDS, memory=MEMORY)
    try:
        workers.ask({"path": os.fsencode(path.absolute()).hex()})
    except (RaisedError, StoppedError) as error:
        raise InputError(f"{path} cannot be read as a tokenizer: {error}") from None
    finally:
        workers.close()


def _content(value: Any, name: str, where: str) -> str:
    """The text of a special token, given alone or with its flags."""
    text = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        raise InputError(f"{where}: {name} must be the text of a token, got {shown(value)}")
    return text


def _put_nothing_behind(backend: Any) -> None:
    """Removes what the post-processor appends to a text; what it prepends stays."""
    from tokenizers import Tokenizer, models

    if backend.post_processor is None:
        return
    shell = Tokenizer(models.BPE())
    shell.post_processor = backend.post_processor
    described = json.loads(shell.to_str())
    changed = _without_ending(described["post_processor"])
    if changed != described["post_processor"]:
        described["post_processor"] = changed
        backend.post_processor = Tokenizer.from_str(json.dumps(described)).post_processor


def _without_ending(processor: dict[str, Any]) -> dict[str, Any]:
    if processor["type"] == "Sequence":
        return processor | {"processors": [_without_ending(p) for p in processor["processors"]]}
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        token, number = processor["cls"]
        before, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"id": "A", "type_id": 0}
        return {
            "type": "TemplateProcessing",
            "single": [before, {"Sequence": text}],
            "pair": [before, {"Sequence": text}, {"Sequence": text | {"id": "B"}}],
            "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
        }
    if processor["type"] == "TemplateProcessing":
        parts = processor["single"]
        last = max(n for n, part in enumerate(parts) if "Sequence" in part)
        return processor | {"single": parts[: last + 1]}
    return processor


# --- text to ids and back ----------------------------------------------------------------------


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The ids of a text.

    Raises:
        InputError: the text contains half a character (a lone surrogate), the tokenizer has no
            token for a part of it, or it fails in another way.
    """
    check_characters(text, "the text")
    with _refusing("the tokenizer cannot encode this text"):
        return tokenizer(text, verbose=False, add_special_tokens=add_special_tokens).input_ids


def encode_with_places(
    tokenizer: Any, texts: Sequence[str]
) -> list[tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]]:
    """The ids of each text, without special tokens, and the character range of each id.

    Some tokenizers exclude spaces from the ranges; a token then begins where the previous one
    ended.

    Args:
        tokenizer: a fast tokenizer.

    Raises:
        InputError: as in `encode`, for any of the texts.
    """
    for text in texts:
        check_characters(text, "the text")
    with _refusing("the tokenizer cannot encode this text"):
        found = tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
    encoded = []
    for ids, places in zip(found.input_ids, found.offset_mapping, strict=True):
        begins, ends = np.asarray(places, np.int64).reshape(-1, 2).T
        before = np.concatenate([[0], ends[:-1]])
        encoded.append((np.asarray(ids, np.int32), np.minimum(begins, before), ends))
    return encoded


def decode(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """The text of ids.

    Raises:
        InputError: the tokenizer fails on them.
    """
    with _refusing("the tokenizer cannot decode these ids"):
        return tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turns whatever a tokenizer raises into an InputError."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic in its Rust code is not an Exception
        reason = shown(str(error), quote=False) or type(error).__name__
        raise InputError(f"{what}: {reason}") from error


# --- chat templates ----------------------------------------------------------------------------


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Every chat template of a folder, by name; later sources override earlier ones."""
    found = _named_templates(settings, f"{folder / SETTINGS}")
    if not found and (folder / "chat_template.json").exists():
        found = _named_templates(
            read_json(folder, "chat_template.json"), f"{folder / 'chat_template.json'}"
        )
    if (folder / "chat_template.jinja").exists():
        found["default"] = read_text_file(member(folder, "chat_template.jinja"))
    for path in template_files(folder):
        found[path.stem] = read_text_file(path)
    return found


def _named_templates(settings: Mapping[str, Any], where: str) -> dict[str, str]:
    """The templates in `chat_template`: a string, a list of names and strings, or an object."""
    value = settings.get("chat_template")
    if value is None or isinstance(value, str):
        return {} if value is None else {"default": value}
    pairs: list[tuple[Any, Any]] = [(None, None)]
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        pairs = [(entry.get("name"), entry.get("template")) for entry in value]
    found = {n: text for n, text in pairs if isinstance(n, str) and isinstance(text, str)}
    if len(found) < len(pairs):
        raise InputError(
            f"{where}: chat_template must be a string, or a list of objects with name and template "
            f"(each name once), got {shown(value)}"
        )
    return found


# --- ends of texts -----------------------------------------------------------------------------


def find_stop_ids(folder: Path, config: LlamaConfig, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a text, from config.json, generation_config.json and the tokenizer.

    Chat versions often have theirs in only one of the three. An id outside the model's vocabulary
    cannot be generated, so it is skipped with a log message.

    Raises:
        InputError: generation_config.json has something else than token ids.
    """
    ids = dict.fromkeys(config.eos_token_ids, "config.json")
    if (folder / GENERATION).exists():
        where = f"{folder / GENERATION}"
        named = fields.token_ids(read_json(folder, GENERATION), "eos_token_id", where)
        ids |= dict.fromkeys(named, GENERATION)
    own = getattr(tokenizer, "eos_token_id", None)
    if own is not None:
        ids[own] = "the tokenizer"
    for number, where in ids.items():
        if number >= config.vocab_size:
            log.warning(
                "the end-of-text id %d of %s is outside the model's vocabulary (%d ids) and is "
                "ignored",
                *(number, where, config.vocab_size),
            )
    return frozenset(number for number in ids if number < config.vocab_size)
