"""How many programs a process compiles for mixed requests, and what memory they keep.

    python benchmarks/programs.py --requests 230 --out outputs/programs.json

Requests of random length, batch, number of new tokens, sampler, seed and stop ids, a quarter of
them after a prefix, go to one `LLM` one after the other. Every program that XLA compiles counts,
those of operations outside `jax.jit` too. A row after every 50 requests: programs compiled and
alive, resident memory, and the slots of the KV caches over those that the texts need. Prints a
table, writes JSON.
"""

import math
import random
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from common import Report, machine, show

import dca_jax
from dca_jax import Sampler
from dca_jax.inference.buckets import cache_shape
from dca_jax.inference.llm import LLM

COMPILED = "/jax/core/compile/backend_compile_duration"  # the event that JAX notes of each program
COLUMNS = ("requests", "compiled", "alive", "resident MB", "slots", "seconds")


def main(
    model: Annotated[str, typer.Option(help="A model's folder.")] = "models/demo-python-7m",
    requests: Annotated[int, typer.Option(help="How many requests.")] = 230,
    longest: Annotated[int, typer.Option(help="Tokens of the longest prompt.")] = 2000,
    largest: Annotated[int, typer.Option(help="Prompts of the largest batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")] = Path(
        "outputs/programs.json"
    ),
) -> None:
    """Measures programs and memory over many requests."""
    llm = dca_jax.load(model)
    compiled = _count_programs()
    settings = {"model": model, "longest": longest, "largest": largest, "seed": seed}
    report = Report(out, machine() | settings)
    draw = random.Random(seed)
    made, needed = 0, 0
    begin = time.perf_counter()
    for number in range(1, requests + 1):
        slots = _request(llm, draw, longest, largest)
        made, needed = made + slots[0], needed + slots[1]
        if number % 25 == 0 or number == requests:
            report.add(
                {
                    "requests": number,
                    "compiled": compiled[0],
                    "alive": len(jax.devices()[0].client.live_executables()),
                    "resident MB": _resident() / 1e6,
                    "slots": made / needed,
                    "seconds": time.perf_counter() - begin,
                }
            )
    show("Programs by requests; slots over those needed", COLUMNS, report.rows)


def _request(llm: LLM, draw: random.Random, longest: int, largest: int) -> tuple[int, int]:
    """One request; returns the slots of its caches, and those that its texts need."""

    def text(most: int) -> list[int]:
        length = int(math.exp(draw.uniform(0, math.log(most))))
        return [draw.randrange(1, llm.model.config.vocab_size) for _ in range(length)]

    prompts = [text(longest) for _ in range(draw.choice([1, 1, 1, draw.randint(1, largest)]))]
    new_tokens = int(math.exp(draw.uniform(0, math.log(64))))
    sampler = Sampler(
        temperature=draw.choice([0, 0, 0.7, 1.2]),
        top_k=draw.choice([None, 5, 50]),
        top_p=draw.choice([None, 0.9]),
        min_p=draw.choice([None, None, 0.05]),
        repetition_penalty=draw.choice([1.0, 1.0, 1.2]),
    )
    stop_ids = [draw.randrange(llm.model.config.vocab_size) for _ in range(draw.randint(0, 20))]
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "sampler": sampler,
        "seed": draw.randrange(1000),
        "stop_ids": stop_ids,
    }
    held, made, needed = 0, 0, 0
    if draw.random() < 0.25:
        before = text(longest)
        room = draw.choice([16, 100, 512])
        options["prefix"] = llm.prefill(before, room=room)
        held, needed = len(before), len(before) + room
        made = math.prod(cache_shape(llm.model, 1, needed))
    llm.generate(prompts, **options)
    lengths = [held + len(prompt) + new_tokens for prompt in prompts]
    made += math.prod(cache_shape(llm.model, len(prompts), max(lengths)))
    return made, needed + sum(lengths)


def _count_programs() -> list[int]:
    """A list whose one number grows with every program that is compiled."""
    compiled = [0]

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        compiled[0] += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(listen)
    return compiled


def _resident() -> int:
    """Bytes of this process in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    typer.run(main)
