"""Asks a question about a document many times longer than the model's training texts.

python examples/ask_a_document.py MODEL book.pdf "Who is Ahab?"
"""

from pathlib import Path

import typer

import dca_jax
from dca_jax.inference.documents import ask, read_document


def main(model: str, document: Path, question: str, max_new_tokens: int = 256) -> None:
    """Prints MODEL's answer to QUESTION about DOCUMENT (text or PDF) as it is generated."""
    llm = dca_jax.load(model)
    text = read_document(document)
    trained = llm.model.config.trained_length
    print(f"{len(llm.tokenize(text))} tokens; the model was trained on {trained}")
    for piece in ask(llm, text, question, max_new_tokens=max_new_tokens):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    typer.run(main)
