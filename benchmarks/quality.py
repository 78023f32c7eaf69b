"""What a KV cache in 8 bits costs: perplexity of a real model on a real text, beside the exact one.

    python benchmarks/quality.py MODEL --text book.txt --lengths 512,2k --windows 8

Every cache reads the same windows, spread over the text, with the same weights. `loss` is the part
by which perplexity grows; `least` and `most` are those of single windows.
"""

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import Report, machine, numbers, show

import dca_jax
from dca_jax.distributed import exit_on_input_error
from dca_jax.evaluation.texts import read_text
from dca_jax.inference.score import Reader

COLUMNS = ("tokens", "windows", "cache", "perplexity", "loss", "least", "most")


@exit_on_input_error()
def main(
    model: Annotated[str, typer.Argument(help="A folder or file, as dca-jax takes it.")],
    text: Annotated[Path, typer.Option(help="A text file (UTF-8) or a PDF.")],
    out: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")] = Path(
        "outputs/quality.json"
    ),
    lengths: Annotated[str, typer.Option(help="Tokens of a window; 4k is 4096.")] = "512,2k",
    windows: Annotated[int, typer.Option(min=1, help="Windows of each length.")] = 8,
    caches: Annotated[str, typer.Option(help="Dtypes of the cache.")] = "int8,fp8",
) -> None:
    """Perplexity by length and dtype of the cache."""
    llm = dca_jax.load(model)
    tokens = np.asarray(read_text(llm, text).tokens, np.int32)
    facts = {"benchmark": "quality", "model": Path(model).name, "text": text.name}
    report = Report(out, machine() | facts | {"dtype": llm.model.dtype.name})
    for length in numbers(lengths):
        starts = np.linspace(0, len(tokens) - length, windows).astype(int)
        rows = [tokens[start : start + length] for start in starts]
        exact: list[float] = []
        for cache in (None, *caches.split(",")):
            reader = Reader(llm.model, 1, length, cache_dtype=cache)
            nlls = [float(reader.nll(row[None]).mean(dtype=np.float64)) for row in rows]
            exact = exact or nlls
            moved = [math.expm1(a - b) for a, b in zip(nlls, exact, strict=True)]
            row: dict[str, Any] = {"tokens": length, "windows": windows, "cache": cache or "exact"}
            row["perplexity"] = math.exp(sum(nlls) / windows)
            row["loss"] = math.expm1((sum(nlls) - sum(exact)) / windows)
            report.add(row | {"least": min(moved), "most": max(moved)})
    show(f"{facts['model']} on {facts['text']}", COLUMNS, report.rows)


if __name__ == "__main__":
    typer.run(main)
