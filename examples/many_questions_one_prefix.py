"""Asks many questions about one document, which is read once.

python examples/many_questions_one_prefix.py MODEL book.txt "Who is Ahab?" "Who is Queequeg?"
"""

import time
from pathlib import Path

import typer

import dca_jax
from dca_jax.inference.documents import ask, read_document, read_once


def main(model: str, document: Path, questions: list[str], max_new_tokens: int = 64) -> None:
    """Answers QUESTIONS about DOCUMENT (text or PDF), with the time of each."""
    llm = dca_jax.load(model)
    text = read_document(document)
    begin = time.perf_counter()
    prefix = read_once(llm, text)
    print(f"read {len(prefix.tokens)} tokens in {time.perf_counter() - begin:.1f} s")
    for question in questions:
        begin = time.perf_counter()
        answer = "".join(ask(llm, text, question, prefix=prefix, max_new_tokens=max_new_tokens))
        print(f"\n{question}\n{answer.strip()}\n({time.perf_counter() - begin:.1f} s)")


if __name__ == "__main__":
    typer.run(main)
