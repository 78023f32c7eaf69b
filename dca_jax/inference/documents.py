"""Documents: their text, from text files of any kind and from PDF, and questions about it."""

from collections.abc import Generator
from pathlib import Path
from typing import Unpack

from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.inference.llm import LLM
from dca_jax.inference.options import OptionNames, Options
from dca_jax.inference.prefix import Prefix
from dca_jax.text_files import read_text_file


def read_document(path: str | Path) -> str:
    """The text of a document: of a PDF (by its suffix) that of its pages, else the file as it is.

    Raises:
        InputError: no such file, what `dca_jax.text_files.read_text_file` refuses, an empty file, a
            PDF that is damaged, encrypted or without text (a scan).
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
    from pypdf import PdfReader  # text files are read without it
    from pypdf.errors import DependencyError

    try:
        with PdfReader(path) as reader:
            if reader.is_encrypted and not reader.decrypt(""):
                raise InputError(f"{path} is encrypted; save it without its password")
            pages = [page.extract_text() for page in reader.pages]
    except InputError:
        raise
    except DependencyError:
        raise InputError(
            f"{path} is encrypted with AES, which pypdf reads by another package: install "
            "`cryptography`, or save the file without encryption"
        ) from None
    except Exception as error:  # damage reaches every corner of a PDF reader
        raise InputError(
            f"{path} cannot be read as a PDF ({type(error).__name__}: "
            f"{shown(str(error), quote=False)})"
        ) from None
    # A font may map a glyph to half a surrogate pair, which no tokenizer takes.
    pages = [page.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for page in pages]
    text = "\n\n".join(page for page in pages if page.strip())
    if not text:
        raise InputError(
            f"{path} holds no text on its {len(pages)} pages; if it is a scan, put it through OCR"
        )
    return text


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
        return llm.stream(question_tokens(llm, document, question), chosen)
    if llm.has_chat_template:
        return llm.stream_chat([_message(document, question)], chosen)
    return llm.stream(_ending(question), chosen)


def question_tokens(llm: LLM, document: str, question: str) -> list[int]:
    """The prompt of `ask`, as token ids."""
    if llm.has_chat_template:
        return llm.apply_chat_template([_message(document, question)])
    return llm.tokenize(document + _ending(question))


def _message(document: str, question: str) -> dict[str, str]:
    return {"role": "user", "content": f"{document}\n\n{question}"}


def _ending(question: str) -> str:
    return f"\n\nQuestion: {question}\nAnswer:"
