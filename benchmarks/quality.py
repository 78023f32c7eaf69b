"""What packed weights and 8-bit caches cost a real model: perplexity and retrieval, beside exact.

    python benchmarks/quality.py MODEL --text book.txt --lengths 512,2k --windows 8

Each variant reads the same windows, spread over the text, and answers the same passkey prompts, by
the same method; `loss` is the part by which perplexity grows, and `least` and `most` are those of
single windows. A variant is weights, a cache, or both: "int8", "cache:int8", "int8+cache:int8".
"""

import math
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from common import Report, machine, numbers, say, show

import dca_jax
from dca_jax.distributed import exit_on_input_error
from dca_jax.evaluation.passkey import is_found, key_tokens, passkey_prompt
from dca_jax.evaluation.texts import read_text
from dca_jax.inference.llm import LLM
from dca_jax.inference.score import Reader

VARIANTS = "exact,int8,fp8,int4:32,int4,int4:128,cache:int8,cache:fp8,int8+cache:int8"
COLUMNS = ("variant", "task", "tokens", "samples", "perplexity", "loss", "least", "most", "found")
ANSWER_TOKENS = 12


@exit_on_input_error()
def main(
    model: Annotated[str, typer.Argument(help="A folder or file, as dca-jax takes it.")],
    text: Annotated[Path, typer.Option(help="A text file (UTF-8) or a PDF.")],
    out: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")] = Path(
        "outputs/quality.json"
    ),
    lengths: Annotated[str, typer.Option(help="Tokens of a window; 4k is 4096.")] = "512,2k",
    windows: Annotated[int, typer.Option(min=1, help="Windows of each length.")] = 8,
    passkeys: Annotated[str, typer.Option(help="Tokens of passkey prompts; none if empty.")] = "",
    trials: Annotated[int, typer.Option(min=1, help="Prompts of each length.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Prompts read at once.")] = 10,
    variants: Annotated[str, typer.Option(help="Separated by commas, `exact` first.")] = VARIANTS,
) -> None:
    """Perplexity and passkeys found, by variant."""
    report = Report(out, machine() | {"benchmark": "quality", "model": Path(model).name})
    report.facts["text"] = text.name
    exact: dict[int, list[float]] = {}
    prompts: dict[int, list[tuple[list[int], list[list[int]]]]] = {}
    for variant in variants.split(","):
        start = time.monotonic()
        llm = loaded(model, variant)
        tokens = np.asarray(read_text(llm, text).tokens, np.int32)
        for length in numbers(lengths):
            nlls = losses(llm, tokens, length, windows)
            row = {"variant": variant, "task": "perplexity", "tokens": length, "samples": windows}
            row |= compared(nlls, exact.setdefault(length, nlls))
            report.add(row)
        for length in numbers(passkeys) if passkeys else ():
            if length not in prompts:
                prompts[length] = [prompt(llm, length, trial) for trial in range(trials)]
            found = retrieved(llm, prompts[length], batch)
            row = {"variant": variant, "task": "passkey", "tokens": length, "samples": trials}
            report.add(row | {"found": found})
        say(f"{variant}: {time.monotonic() - start:.0f} s")
        del llm
        jax.clear_caches()
    show(f"{report.facts['model']} on {text.name}", COLUMNS, report.rows)


def loaded(model: str, variant: str) -> LLM:
    """The model as a variant has it."""
    options: dict[str, Any] = {}
    for part in variant.split("+"):
        if part != "exact":
            name, _, dtype = part.partition("cache:")
            options |= {"cache_dtype": dtype} if dtype else {"weights": name}
    return dca_jax.load(model, **options)


def losses(llm: LLM, tokens: np.ndarray, length: int, windows: int) -> list[float]:
    """Mean negative log-likelihood of each window, in nats."""
    starts = np.linspace(0, len(tokens) - length, windows).astype(int)
    reader = Reader(llm.model, 1, length, cache_dtype=llm.cache_dtype)
    rows = (tokens[start : start + length] for start in starts)
    return [float(reader.nll(row[None]).mean(dtype=np.float64)) for row in rows]


def compared(nlls: list[float], exact: list[float]) -> dict[str, float]:
    """Perplexity, and how much larger it is than the exact one."""
    moved = [math.expm1(a - b) for a, b in zip(nlls, exact, strict=True)]
    count = len(nlls)
    return {
        "perplexity": math.exp(sum(nlls) / count),
        "loss": math.expm1((sum(nlls) - sum(exact)) / count),
        "least": min(moved),
        "most": max(moved),
    }


def prompt(llm: LLM, length: int, trial: int) -> tuple[list[int], list[list[int]]]:
    """A passkey prompt at a random depth, and the tokens that answer it."""
    rng = np.random.default_rng([0, length, trial])
    made = passkey_prompt(lambda text: len(llm.tokenize(text)), length, rng.random(), rng)
    return llm.tokenize(made.text), key_tokens(llm, made.key)


def retrieved(llm: LLM, prompts: list[tuple[list[int], list[list[int]]]], batch: int) -> float:
    """The share of the keys that were found."""
    right = 0
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        answers = llm.generate([p for p, _ in some], max_new_tokens=ANSWER_TOKENS)
        for answer, (_, expected) in zip(answers, some, strict=True):
            right += is_found(answer.tokens, expected)
    return right / len(prompts)


if __name__ == "__main__":
    typer.run(main)
