"""Number of programs a process compiles for mixed requests, and the memory they hold.

    python benchmarks/programs.py --requests 500 --out outputs/programs.json

Six kinds of requests go to one `LLM` in turn: generation (with random length, batch, number of new
tokens, sampler, seed and stop ids), the same after a prefix, streams of one text, turns of
conversations, logits, and perplexities. Every program that XLA compiles is counted, including those
of operations outside `jax.jit`. Every 50 requests give a row: programs compiled and alive, resident
memory, and the slots of the first three kinds' KV caches, relative to those that the texts need.
Prints a table and writes JSON.
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
from dca_jax.inference.chat import Conversation
from dca_jax.inference.llm import LLM

# the event that JAX records for each program
COMPILED = "/jax/core/compile/backend_compile_duration"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
COLUMNS = ("requests", "compiled", "alive", "resident MB", "slots", "seconds")


def main(
    model: Annotated[str, typer.Option(help="Folder of a model.")] = "models/demo-python-7m",
    requests: Annotated[int, typer.Option(help="Number of requests.")] = 500,
    longest: Annotated[int, typer.Option(help="Tokens of the longest prompt.")] = 2000,
    largest: Annotated[int, typer.Option(help="Prompts in the largest batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Random seed of the requests.")] = 0,
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/programs.json"
    ),
) -> None:
    """Measures programs and memory over many requests."""
    llm = dca_jax.load(model)
    compiled = _count_programs()
    settings = {"model": model, "longest": longest, "largest": largest, "seed": seed}
    report = Report(out, machine() | settings)
    mixed = Requests(llm, random.Random(seed), longest, largest)
    made, needed = 0, 0
    begin = time.perf_counter()
    for number in range(1, requests + 1):
        slots = mixed.one()
        made, needed = made + slots[0], needed + slots[1]
        if number % 50 == 0 or number == requests:
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


class Requests:
    """Random requests to one model, with conversations of several turns."""

    def __init__(self, llm: LLM, draw: random.Random, longest: int, largest: int) -> None:
        llm.tokenizer.chat_template = TEMPLATE  # the demo model has none
        self.llm, self.draw, self.longest, self.largest = llm, draw, longest, largest
        self.conversation = Conversation(llm)

    def one(self) -> tuple[int, int]:
        """Runs one request; returns the slots of its caches, and those that its texts need."""
        kind = self.draw.choice(("generate", "prefix", "stream", "chat", "logits", "score"))
        if kind in ("generate", "prefix"):
            return self._generate(after_prefix=kind == "prefix")
        if kind == "stream":
            return self._stream()
        if kind == "chat":
            self._chat()
        elif kind == "logits":
            ids = self._text(self.longest)
            self.llm.logits([ids] * self._batch())
        else:
            self.llm.perplexity([1, *self._text(self.longest)])
        return 0, 0

    def _batch(self) -> int:
        return self.draw.choice([1, 1, 1, self.draw.randint(1, self.largest)])

    def _text(self, most: int) -> list[int]:
        length = int(math.exp(self.draw.uniform(0, math.log(most))))
        return [self.draw.randrange(1, self.llm.model.config.vocab_size) for _ in range(length)]

    def _options(self) -> dict[str, Any]:
        draw = self.draw
        sampler = Sampler(
            temperature=draw.choice([0, 0, 0.7, 1.2]),
            top_k=draw.choice([None, 5, 50]),
            top_p=draw.choice([None, 0.9]),
            min_p=draw.choice([None, None, 0.05]),
            repetition_penalty=draw.choice([1.0, 1.0, 1.2]),
        )
        vocab = self.llm.model.config.vocab_size
        return {
            "max_new_tokens": int(math.exp(draw.uniform(0, math.log(64)))),
            "sampler": sampler,
            "seed": draw.randrange(1000),
            "stop_ids": [draw.randrange(vocab) for _ in range(draw.randint(0, 20))],
        }

    def _chat(self) -> None:
        if self.draw.random() < 0.2:
            self.conversation.reset()
        words = " ".join(f"word{n}" for n in self._text(self.longest // 8))
        for _ in self.conversation.ask(words, **self._options()):
            pass

    def _stream(self) -> tuple[int, int]:
        prompt, options = self._text(self.longest), self._options()
        for _ in self.llm.stream(prompt, **options):
            pass
        needed = len(prompt) + options["max_new_tokens"]
        return math.prod(cache_shape(self.llm.model, 1, needed)), needed

    def _generate(self, *, after_prefix: bool) -> tuple[int, int]:
        llm, options = self.llm, self._options()
        prompts = [self._text(self.longest) for _ in range(self._batch())]
        held, made, needed = 0, 0, 0
        if after_prefix:
            before, room = self._text(self.longest), self.draw.choice([16, 100, 512])
            options["prefix"] = llm.prefill(before, room=room)
            held, needed = len(before), len(before) + room
            made = math.prod(cache_shape(llm.model, 1, needed))
        llm.generate(prompts, **options)
        lengths = [held + len(prompt) + options["max_new_tokens"] for prompt in prompts]
        made += math.prod(cache_shape(llm.model, len(prompts), max(lengths)))
        return made, needed + sum(lengths)


def _count_programs() -> list[int]:
    """A list with one number, which counts the programs compiled so far."""
    compiled = [0]

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        compiled[0] += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(listen)
    return compiled


def _resident() -> int:
    """Resident memory of this process in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    typer.run(main)
