"""Reading documents (text files and PDFs) and asking questions about them."""

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

# Limits for a PDF, whose file size says little about its content. Reading 300 pages of a book takes
# two seconds; a file of one megabyte can have some thousands of pages.
SECONDS, SECONDS_PER_MB, MOST_SECONDS = 60, 60, 600
MEMORY = 2 * 2**30  # bytes
MOST_PAGES = 20_000


def read_document(path: str | Path) -> str:
    """The text of a document: the pages of a PDF (by its suffix), else the file's text.

    Raises:
        InputError: a missing or empty file; as in `dca_jax.text_files.read_text_file`; a PDF that
            is damaged, encrypted or without text (a scan), or that exceeds the limits on pages,
            time or memory (`MOST_PAGES`, `MOST_SECONDS`, `MEMORY`).
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
            f"{path} has no text on its {len(pages)} pages; if it is a scan, run OCR on it"
        )
    return text


def _why_not(path: Path, error: RaisedError) -> str:
    match error.kind:
        case "Encrypted":
            return f"{path} is encrypted; save it without its password"
        case "DependencyError" if "AES" in str(error):
            return (
                f"{path} is encrypted with AES, which pypdf needs another package for: install "
                "`cryptography`, or save the file without encryption"
            )
        case "TooManyPages":
            return f"{path} has {error} pages, and at most {MOST_PAGES} are read; split it"
    return f"{path} cannot be read as a PDF ({error.kind}: {error})"


def read_once(llm: LLM, document: str, *, progress: bool | None = None) -> Prefix:
    """Prefills a document once, to ask many questions about it (`ask(..., prefix=)`)."""
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
    """Asks a question about a document and yields the answer as it is generated.

    A chat model receives document and question as one message; other models complete "Answer:"
    after them. Options are those of `LLM.generate`; `prefix` is the result of `read_once` for the
    document, which only saves time.
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
    """The prompt of `ask` as token ids; `thinking` as in `Options`."""
    if llm.has_chat_template:
        return llm.apply_chat_template([_message(document, question)], thinking=thinking)
    return llm.tokenize(document + _ending(question))


def _message(document: str, question: str) -> dict[str, str]:
    return {"role": "user", "content": f"{document}\n\n{question}"}


def _ending(question: str) -> str:
    return f"\n\nQuestion: {question}\nAnswer:"
