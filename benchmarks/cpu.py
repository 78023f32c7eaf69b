"""A small model on a laptop's CPU, compared with transformers in one process.

    python benchmarks/cpu.py SmolLM2-135M-Instruct.Q4_1.gguf --out outputs/cpu.json

Both read one prompt of random ids and then decode greedily, with their default number of threads.
Ours uses DCA; the peer is transformers on PyTorch with its defaults: plain attention by SDPA, its
default KV cache, the logits of the last token only. `--ours` and `--peers` name dtypes, `--ours`
also forms of packed weights, with which ours computes in float32. The engines take turns, so that
other load on the machine affects all of them equally, after a warm-up round in which ours compiles.
A figure is the median over the rounds; `cpu` is processor time, which depends less on other
processes than wall time does.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import Report, machine, numbers, say, show
from transformers import AutoModelForCausalLM

import dca_jax
from dca_jax.distributed import exit_on_input_error
from dca_jax.dtypes import DTYPES
from dca_jax.inference.generate import Run

COLUMNS = ("engine", "task", "tokens", "ms", "cpu ms", "speed", "speed by cpu")
WARM_UP = 4  # tokens decoded in the warm-up round

# Prefill, then single tokens; each iteration ends when its token is known.
Engine = Callable[[list[int], int], Iterator[Any]]


@exit_on_input_error()
def main(
    model: Annotated[Path, typer.Argument(help="A GGUF file or a Hugging Face folder.")],
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/cpu.json"
    ),
    length: Annotated[str, typer.Option(help="Tokens of the prompt; 2k is 2048.")] = "2k",
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Number of tokens decoded after the first.")
    ] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Number of timed rounds.")] = 3,
    ours: Annotated[
        str,
        typer.Option(help="Dtypes or `--weights` of ours; `speed` is the first one's over each."),
    ] = "float32",
    peers: Annotated[str, typer.Option(help="Dtypes of the peer.")] = "float32,bfloat16",
) -> None:
    """Times prefill and decoding with each engine."""
    (tokens,) = numbers(length)
    loaded = {f"dca_jax {kind}": load(model, kind) for kind in ours.split(",")}
    vocab_size = next(iter(loaded.values())).model.config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocab_size, tokens).tolist()
    engines: dict[str, Engine] = {name: own(llm) for name, llm in loaded.items()}
    engines |= {f"transformers {dtype}": peer(model, dtype) for dtype in peers.split(",")}
    for name, engine in engines.items():
        say(f"{name}: warm-up round")
        measured(engine, ids, WARM_UP)
    found: dict[str, list[np.ndarray]] = {name: [] for name in engines}
    for number in range(rounds):
        for name, engine in engines.items():
            found[name].append(measured(engine, ids, new_tokens))
            say(f"round {number}, {name}: (ms, cpu ms) {found[name][-1].round(1).tolist()}")
    facts = {"benchmark": "cpu", "model": model.name, "rounds": rounds, **machine()}
    report = Report(out, facts | {"threads of PyTorch": torch.get_num_threads()})
    rows = list(summary(found, tokens, new_tokens))
    for row in rows:
        report.add(row)
    show(f"{model.name}, {tokens} tokens", COLUMNS, rows)


def load(model: Path, kind: str) -> dca_jax.LLM:
    """In a dtype, or in float32 with packed weights."""
    if kind in DTYPES:
        return dca_jax.load(model, dtype=kind)
    return dca_jax.load(model, dtype="float32", weights=kind)


def own(llm: dca_jax.LLM) -> Engine:
    """Prefill and greedy decoding of ours."""

    def run(ids: list[int], new_tokens: int) -> Iterator[Any]:
        yield from Run(llm.model, [ids], max_new_tokens=new_tokens + 1)

    return run


def peer(model: Path, dtype: str) -> Engine:
    """The same weights, unpacked, in a model of transformers."""
    is_file = model.is_file()
    options = {"gguf_file": model.name} if is_file else {}
    torch_model = AutoModelForCausalLM.from_pretrained(
        model.parent if is_file else model, dtype=getattr(torch, dtype), **options
    )
    torch_model.eval()

    def run(ids: list[int], new_tokens: int) -> Iterator[Any]:
        given, cache = torch.tensor([ids]), None
        with torch.inference_mode():
            for _ in range(new_tokens + 1):
                out = torch_model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
                given, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
                yield given.item()

    return run


def measured(engine: Engine, ids: list[int], new_tokens: int) -> np.ndarray:
    """Wall and processor milliseconds: [prefill with the first token, each further token][2]."""
    steps = engine(ids, new_tokens)
    marks = [(time.perf_counter(), time.process_time())]
    next(steps)
    marks.append((time.perf_counter(), time.process_time()))
    for _ in steps:
        pass
    marks.append((time.perf_counter(), time.process_time()))
    return 1e3 * np.diff(marks, axis=0) / [[1], [new_tokens]]


def summary(
    found: dict[str, list[np.ndarray]], tokens: int, new_tokens: int
) -> Iterator[dict[str, Any]]:
    """A row for each engine and task: medians, and the first engine's speed relative to it."""
    medians = {
        name: [[statistics.median(each) for each in task] for task in np.stack(rounds, axis=-1)]
        for name, rounds in found.items()
    }
    for task, (what, count) in enumerate((("prefill", tokens), ("a token", new_tokens))):
        for name, median in medians.items():
            ms, cpu = median[task]
            first_ms, first_cpu = next(iter(medians.values()))[task]
            row = {"engine": name, "task": what, "tokens": count, "ms": ms, "cpu ms": cpu}
            yield row | {"speed": ms / first_ms, "speed by cpu": cpu / first_cpu}


if __name__ == "__main__":
    typer.run(main)
