"""What sparse reading costs in quality: perplexity and needles of a real model, by selector.

    python benchmarks/sparse_quality.py MODEL --text book.txt --lengths 16k,64k --windows 8
    python benchmarks/sparse_quality.py MODEL --text book.txt --lengths 16k --needles 100 --chat

Every selector reads the same windows, spread over the text, and the same needles, with DCA by
`--method`, beside dense reading. Repeat an interrupted command to go on: what is in OUT is not
read again. `threshold` is lowered to 0, so that short windows are read sparsely too. `loss` is the
part by which perplexity grows, `least` and `most` those of single windows; `found` the needles.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import machine, numbers, say, show

import dca_jax
from dca_jax.attention.sparse import choose_sparse
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.evaluation import needle
from dca_jax.evaluation.haystacks import Haystack
from dca_jax.evaluation.results import ResultLog
from dca_jax.evaluation.texts import read_text
from dca_jax.inference.documents import read_document
from dca_jax.inference.methods import reading
from dca_jax.inference.score import Reader

COLUMNS = ("sparse", "tokens", "share", "windows", "perplexity", "loss", "least", "most", "found")
OFF = "off"


@exit_on_input_error()
def main(
    model: Annotated[str, typer.Argument(help="A folder or file, as dca-jax takes it.")],
    text: Annotated[Path, typer.Option(help="A text file (UTF-8) or a PDF.")],
    out: Annotated[Path, typer.Option(help="A folder for what has been read.")] = Path(
        "outputs/sparse_quality"
    ),
    selectors: Annotated[str, typer.Option(help="As --sparse takes them.")] = (
        "rows:0.05,rows:0.1,rows:0.2,pooled:0.1"
    ),
    lengths: Annotated[str, typer.Option(help="Tokens of a window; 16k is 16384.")] = "16k",
    windows: Annotated[int, typer.Option(min=1, help="Windows of each length.")] = 8,
    needles: Annotated[int, typer.Option(min=0, help="Needles of each length.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Ask by the chat template.")] = False,
    method: Annotated[str, typer.Option(help="As dca-jax takes it.")] = "dca",
    dtype: Annotated[str | None, typer.Option(help="Of weights and activations.")] = None,
) -> None:
    """Perplexity and needles by length and selector."""
    llm = dca_jax.load(model, dca=None, dtype=dtype)
    names = [OFF, *filter(None, selectors.split(","))]
    readers = {name: _reading_by(llm, name) for name in names}
    tokens = np.asarray(read_text(llm, text).tokens, np.int32)
    facts = {"model": Path(model).name, "text": text.name, "method": method}
    facts["dtype"] = llm.model.dtype.name
    log = _Windows(out / "windows.jsonl", facts)
    rows = []
    for length in numbers(lengths):
        starts = np.linspace(0, len(tokens) - length, windows).astype(int).tolist()
        if starts[-1] < 0:
            raise InputError(f"{text} has {len(tokens)} tokens, fewer than {length}")
        for name, reader in readers.items():
            log.read(reading(reader, method, length), name, tokens, length, starts)
            row = log.summary(name, length, starts)
            sparse = reader.model.sparse
            row["share"] = 1.0 if sparse is None else sparse.share(length)
            if needles:
                folder = out / f"needle-{name.replace(':', '-')}"
                row["found"] = _needles(reader, folder, facts, text, length, needles, chat)
            rows.append(row)
            say(json.dumps(row))
    show(f"{facts['model']} on {facts['text']}", COLUMNS, rows)


def _reading_by(llm: dca_jax.LLM, name: str) -> dca_jax.LLM:
    """The model with a selector that reads even short texts sparsely; nothing is copied."""
    config, model = llm.model.config, llm.model.reading(0)
    sizes = {"layers": config.num_hidden_layers, "heads": config.num_attention_heads}
    how = choose_sparse(name, config.sparse_attention, **sizes)
    options = {"dtype": model.dtype, "sparse": how and replace(how, threshold=0)}
    return replace(llm, model=dca_jax.Llama.from_params(config, model.params(), **options))


def _needles(
    llm: dca_jax.LLM,
    folder: Path,
    facts: dict[str, Any],
    text: Path,
    length: int,
    trials: int,
    chat: bool,
) -> float:
    """The part of single needles that is found, each noted as it comes."""
    hay = Haystack.of_text(read_document(text))
    method = facts["method"]
    with ResultLog(folder, "needle", {**facts, "chat": chat}) as log:
        options = {"tasks": ["single"], "methods": [method], "lengths": [length]}
        needle.evaluate(llm, hay, log, trials=trials, chat=chat, batch=1, **options)
        found = [
            r.value for r in log.records if r.key.get("length") == length and r.value is not None
        ]
    return float(np.mean(np.asarray(found, np.float64)))


class _Windows:
    """The NLL of windows, a line each, appended as they come."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.nlls = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(machine() | facts) + "\n")
        head, *lines = path.read_text().splitlines()
        noted = {name: json.loads(head).get(name) for name in facts}
        if noted != facts:
            raise InputError(f"{path} is of {noted}, and not of {facts}; give another --out")
        for line in lines:
            row = json.loads(line)
            self.nlls[row["sparse"], row["tokens"], row["start"]] = row["nll"]

    def read(
        self, llm: dca_jax.LLM, name: str, tokens: np.ndarray, length: int, starts: Iterable[int]
    ) -> None:
        """Reads the windows that are not there yet."""
        missing = [start for start in starts if (name, length, start) not in self.nlls]
        reader = Reader(llm.model, 1, length) if missing else None
        for start in missing:
            assert reader is not None
            nll = float(reader.nll(tokens[None, start : start + length]).mean(dtype=np.float64))
            self.nlls[name, length, start] = nll
            row = {"sparse": name, "tokens": length, "start": start, "nll": nll}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            say(json.dumps(row))

    def summary(self, name: str, length: int, starts: Iterable[int]) -> dict[str, Any]:
        """Perplexity over all windows, and beside dense reading."""
        pairs = [(self.nlls[name, length, at], self.nlls[OFF, length, at]) for at in starts]
        moved = [math.expm1(nll - dense) for nll, dense in pairs]
        mean, dense = (float(np.mean(column)) for column in zip(*pairs, strict=True))
        return {
            "sparse": name,
            "tokens": length,
            "windows": len(pairs),
            "perplexity": math.exp(mean),
            "loss": math.expm1(mean - dense),
            "least": min(moved),
            "most": max(moved),
        }


if __name__ == "__main__":
    typer.run(main)
