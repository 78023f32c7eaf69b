"""Documents: their text, from text files of any kind and from PDF, and questions about it."""

import os
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from dca_jax.bounded.workers import RaisedError, StoppedError, Workers
from dca_jax.errors import InputError
from dca_jax.inference.llm import LLM
from dca_jax.inference.options import OptionNames, Options
from dca_jax.inference.prefix import Prefix
from dca_jax.text_files import read_text_file

# Of a PDF, which is small or large beside what it unpacks to. Reading 300 pages of a book takes two
# seconds, and a megabyte of file holds up to some thousands.
SECONDS, SECONDS_PER_MB, MOST_SECONDS = 60, 60, 600
MEMORY = 2 * 2**30  # bytes
MOST_PAGES = 20_000


def read_document(path: str | Path) -> str:
    """The text of a document: of a PDF (by its suffix) that of its pages, else the file as it is.

    Raises:
        InputError: no such file, what `dca_jax.text_files.read_text_file` refuses, an empty file, a
            PDF that is damaged, encrypted or without text (a scan), or that takes more pages, time
            or memory than a document does (`MOST_PAGES`, `MOST_SECONDS`, `MEMORY`).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    if path.suffix.lower() == ".pdf":
        return _read_pdf(path)
    text = read_text_file(path)
    if not text:
        raise InputError(f"{path} is empty")
    return text


def _read_pdf(path: Path) -> str:
    size = path.stat().st_size
    seconds = min(SECONDS + SECONDS_PER_MB * size / 1e6, MOST_SECONDS)
    workers = Workers("dca_jax.bounded.pdf", seconds=round(seconds), memory=MEMORY)
    try:
        pages = workers.ask({"path": os.fsencode(path.absolute()).hex(), "pages": MOST_PAGES})
    except RaisedError as error:
        raise InputError(_why_not(path, error)) from None
    except StoppedError as error:
        raise InputError(
            f"{path} cannot be read as a PDF: {error}; save its text as a text file, or split it"
        ) from None
    finally:
        workers.close()
    text = "\n\n".join(page for page in pages if page.strip())
    if not text:
        raise InputError(
            f"{path} holds no text on its {len(pages)} pages; if it is a scan, put it through OCR"
        )
    return text


def _why_not(path: Path, error: RaisedError) -> str:
    match error.kind:
        case "Encrypted":
            return f"{path} is encrypted; save it without its password"
        case "DependencyError" if "AES" in str(error):
            return (
                f"{path} is encrypted with AES, which pypdf reads by another package: install "
                "`cryptography`, or save the file without encryption"
            )
        case "TooManyPages":
            return f"{path} has {error} pages, and at most {MOST_PAGES} are read; split it"
    return f"{path} cannot be read as a PDF ({error.kind}: {error})"


def read_once(llm: LLM, document: str, *, progress: bool | None = None) -> Prefix:
    """Has the model read a document, to be asked about it many times (`ask(..., prefix=)`)."""
    if llm.has_chat_template:
        tokens = llm.apply_chat_template([{"role": "user", "content": document}])
        return llm.prefill(tokens, progress=progress)
    return llm.prefill(document, progress=progress)


def ask(
    llm: LLM,
    document: str,
    question: str,
    options: Options | None = None,
    **changes: Unpack[OptionNames],
) -> Generator[str]:
    """Asks about a document and yields the answer as it comes.

    A chat model gets document and question as one message; any other completes "Answer:" after
    them. Options are those of `LLM.generate`; `prefix` is what `read_once` made of the document,
    and changes nothing but the time.
    """
    chosen = Options.of(options, changes)
    if chosen.prefix is None:
        tokens = question_tokens(llm, document, question, thinking=chosen.thinking)
        return llm.stream(tokens, replace(chosen, thinking=None))
    if llm.has_chat_template:
        return llm.stream_chat([_message(document, question)], chosen)
    return llm.stream(_ending(question), chosen)


def question_tokens(
    llm: LLM, document: str, question: str, *, thinking: bool | None = None
) -> list[int]:
    """The prompt of `ask`, as token ids; `thinking` as in `Options`."""
    if llm.has_chat_template:
        return llm.apply_chat_template([_message(document, question)], thinking=thinking)
    return llm.tokenize(document + _ending(question))


def _message(document: str, question: str) -> dict[str, str]:
    return {"role": "user", "content": f"{document}\n\n{question}"}


def _ending(question: str) -> str:
    return f"\n\nQuestion: {question}\nAnswer:"
