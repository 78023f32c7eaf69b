"""What packed weights and 8-bit caches cost a real model in perplexity and retrieval.

    python benchmarks/quality.py MODEL --text book.txt --lengths 512,2k --windows 8

Each variant reads the same windows, spread over the text, and answers the same passkey prompts,
with the same method. `loss` is the relative growth of perplexity over `exact`, `error` its standard
error over the windows; `least` and `most` are the growth in single windows. A variant names
weights, a cache, or both: "int8", "cache:int8", "int8+cache:int8". If the file's weights are
packed, give an unpacked copy (`dca-jax convert --dtype bfloat16`). Each variant has its own
process, and `--at-once` of them share the device, since most of the time goes into compiling.
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import Report, machine, numbers, say, show

import dca_jax
from dca_jax.distributed import exit_on_input_error
from dca_jax.evaluation.passkey import is_found, key_tokens, passkey_prompt, passkey_text
from dca_jax.evaluation.texts import read_text
from dca_jax.inference.llm import LLM
from dca_jax.inference.score import Reader

VARIANTS = "exact,int8,fp8,int4:32,int4,int4:128,cache:int8,cache:fp8,int8+cache:int8"
COLUMNS = (
    "variant",
    "task",
    "tokens",
    "samples",
    "perplexity",
    "loss",
    "error",
    "least",
    "most",
    "found",
)
ANSWER_TOKENS = 12


@exit_on_input_error()
def main(
    model: Annotated[str, typer.Argument(help="Folder or file of a model, as in dca-jax.")],
    text: Annotated[Path, typer.Option(help="A text file (UTF-8) or a PDF.")],
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/quality.json"
    ),
    lengths: Annotated[str, typer.Option(help="Tokens per window; 4k is 4096.")] = "512,2k",
    windows: Annotated[int, typer.Option(min=1, help="Windows per length.")] = 8,
    passkeys: Annotated[
        str, typer.Option(help="Tokens of the passkey prompts; empty for none.")
    ] = "",
    trials: Annotated[int, typer.Option(min=1, help="Prompts per length.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Prompts processed at once.")] = 10,
    variants: Annotated[
        str, typer.Option(help="Variants separated by commas, `exact` first.")
    ] = VARIANTS,
    at_once: Annotated[int, typer.Option(min=1, help="Variants that share the device.")] = 1,
    child: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measures perplexity and passkeys found by each variant."""
    if child:
        found = measured(
            *(model, variants, text, numbers(lengths), windows),
            *(numbers(passkeys) if passkeys else [], trials, batch),
        )
        for row in found:
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
        return
    report = Report(out, {"benchmark": "quality", "model": Path(model).name, "text": text.name})
    options = ["--text", text, "--lengths", lengths, "--windows", windows, "--passkeys", passkeys]
    options += ["--trials", trials, "--batch", batch]
    command = [sys.executable, __file__, model, *map(str, options), "--child", "--variants"]
    environment = os.environ | {"XLA_CLIENT_MEM_FRACTION": f"{0.9 / at_once:.3f}"}
    nlls: dict[tuple[str, int], list[float]] = {}
    lock = threading.Lock()

    def run(variant: str) -> None:
        start = time.monotonic()
        with subprocess.Popen(
            [*command, variant], stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            for line in process.stdout or ():
                found = json.loads(line)
                if "task" not in found:
                    report.facts |= found
                    continue
                if "nlls" in found:
                    nlls[variant, found["tokens"]] = found.pop("nlls")
                with lock:
                    report.add({"variant": variant} | found)
        if process.returncode:
            report.add({"variant": variant, "failed": f"exit code {process.returncode}; see above"})
        say(f"{variant}: {time.monotonic() - start:.0f} s")

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, variants.split(",")))
    for row in report.rows:
        own, exact = (nlls.get((name, row.get("tokens", 0))) for name in (row["variant"], "exact"))
        if row.get("task") == "perplexity" and own and exact:
            row |= compared(own, exact)
    report.rows.sort(key=lambda row: (row.get("task", ""), row.get("tokens", 0)))
    report.write()
    show(f"{report.facts['model']} on {text.name}", COLUMNS, report.rows)


def measured(
    model: str,
    variant: str,
    text: Path,
    lengths: list[int],
    windows: int,
    passkeys: list[int],
    trials: int,
    batch: int,
) -> Iterator[dict[str, Any]]:
    """Facts about the machine, then a row per length and task, for one variant."""
    llm = loaded(model, variant)
    yield machine()
    tokens = np.asarray(read_text(llm, text).tokens, np.int32)
    for length in lengths:
        nlls = losses(llm, tokens, length, windows)
        row = {"task": "perplexity", "tokens": length, "samples": windows, "nlls": nlls}
        yield row | {"perplexity": math.exp(sum(nlls) / windows)}
    for length in passkeys:
        found = retrieved(llm, prompts(llm, length, trials), batch)
        yield {"task": "passkey", "tokens": length, "samples": trials, "found": found}


def loaded(model: str, variant: str) -> LLM:
    """The model with a variant's weights and cache."""
    options: dict[str, Any] = {"weights": "unpacked"}
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
    """Relative growth of perplexity over the exact one; no error for one window."""
    moved = np.subtract(nlls, exact)
    found = {
        "loss": math.expm1(moved.mean()),
        "least": math.expm1(moved.min()),
        "most": math.expm1(moved.max()),
    }
    if len(moved) > 1:  # of a small difference of NLL, which is that of perplexity
        found["error"] = float(moved.std(ddof=1)) / math.sqrt(len(moved))
    return found


def prompts(llm: LLM, length: int, trials: int) -> list[tuple[list[int], list[list[int]]]]:
    """Passkey prompts at random depths, and the answer's tokens for each.

    All have as much filler as fits into the first, minus a sentence, since a key may take more
    tokens.
    """
    rng = np.random.default_rng([0, length])
    first = passkey_prompt(lambda text: len(llm.tokenize(text)), length, 0.5, rng)
    sentences = first.text.count(".") - passkey_text(0, 0.5, first.key).count(".") - 1
    made = []
    for _ in range(trials):
        key, depth = str(rng.integers(10_000, 100_000)), rng.random()
        prompt = llm.tokenize(passkey_text(sentences, depth, key))
        made.append((prompt, key_tokens(llm, key)))
    return made


def retrieved(llm: LLM, prompts: list[tuple[list[int], list[list[int]]]], batch: int) -> float:
    """Share of the keys that were found."""
    right = 0
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        answers = llm.generate([p for p, _ in some], max_new_tokens=ANSWER_TOKENS)
        for answer, (_, expected) in zip(answers, some, strict=True):
            right += is_found(answer.tokens, expected)
    return right / len(prompts)


if __name__ == "__main__":
    typer.run(main)
