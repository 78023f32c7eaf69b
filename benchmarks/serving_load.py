"""A server under load: every answer is compared, and a failure must affect its request only."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import Report, say

import dca_jax
from dca_jax.distributed import exit_on_input_error
from dca_jax.inference.options import Options
from dca_jax.inference.sampling import Sampler

LONGEST, NEW = 4000, 48  # maximum tokens of a prompt and of an answer
CANCELLED, MALFORMED = 0.05, 0.02
TIE = 1e-4  # logits closer than this are ties in float32
NAME = "demo"


@exit_on_input_error()
def load(
    model: Annotated[str, typer.Option(help="A small model.")] = "models/demo-python-7m",
    requests: Annotated[int, typer.Option(help="Number of requests.")] = 1000,
    clients: Annotated[int, typer.Option(help="Number of client threads.")] = 32,
    minutes: Annotated[
        float, typer.Option(help="Send no further request after this many minutes.")
    ] = 1e9,
    compare: Annotated[int, typer.Option(help="Maximum number of answers to compare.")] = 10**9,
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/serving-load.json"
    ),
) -> None:
    """Sends a server many requests at once, compares answers, kills it, and restarts it."""
    report = Report(out, {"benchmark": "serving load", "model": model})
    llm = dca_jax.load(model)
    code = "\n".join(
        path.read_text() for path in sorted(Path(dca_jax.__file__).parent.rglob("*.py"))
    )
    text = llm.tokenize(code[:400_000])
    with tempfile.TemporaryDirectory() as folder:
        with serving(model, Path(folder)) as server:
            report.add({"what": "start", "seconds": server.seconds})
            asked = _ask_all(server, text, requests, clients, minutes, report)
        _kill_and_restart(model, Path(folder), text, report)
    wrong = _compare(llm, asked[:compare], report)
    if wrong:
        raise SystemExit(f"{wrong} answers differ from those of generate")


# --- the server --------------------------------------------------------------------------------


@dataclass
class Serving:
    """A server's process."""

    process: subprocess.Popen[str]
    address: str
    programs: Path
    seconds: float

    def memory(self) -> float:
        """Its resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1e3

    def compiled(self) -> int:
        """Number of programs compiled with this folder as JAX's cache."""
        return sum(path.name.endswith("-cache") for path in self.programs.iterdir())


@contextlib.contextmanager
def serving(model: str, programs: Path) -> Iterator[Serving]:
    """Runs `dca-jax serve` with a folder that keeps every program it compiles."""
    options = f"--port 0 --name {NAME} --context {LONGEST + NEW} --rows 16 --cache 64k".split()
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "COLUMNS": "300",
    }
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "dca_jax", "serve", model, *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | kept,
    )
    assert process.stderr is not None
    try:
        found = None
        while found is None:
            line = process.stderr.readline()
            if not line:
                raise SystemExit("the server ended before it was ready")
            found = re.search(r"http://\S+/v1", line)
        threading.Thread(target=_repeat, args=(process.stderr,), daemon=True).start()
        yield Serving(process, found[0], programs, time.perf_counter() - start)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
        process.wait()


def _repeat(lines: Any) -> None:
    for line in lines:
        say(f"server: {line.rstrip()}")


# --- requests ----------------------------------------------------------------------------------


@dataclass
class Question:
    """A request and its outcome."""

    prompt: list[int]
    options: Options
    kind: str
    text: str = ""
    finish_reason: str | None = None
    tokens: int = 0
    outcome: str = "lost"
    seconds: list[float] = field(default_factory=list)


def questions(text: list[int], seed: int = 0) -> Iterator[Question]:
    """Endless requests with prompts of all lengths, half of them with a shared beginning."""
    rng = random.Random(seed)
    while True:
        length = round(LONGEST ** rng.random())
        start = rng.choice([0, 7000, rng.randrange(len(text) - LONGEST)])
        sampler = rng.choice(
            [Sampler()] * 3
            + [Sampler(temperature=0.8, top_p=0.95), Sampler(repetition_penalty=1.2)]
            + [Sampler(temperature=1.0, top_k=40, min_p=0.02)]
        )
        options = Options(
            max_new_tokens=rng.randint(1, NEW), sampler=sampler, seed=rng.randrange(2**31)
        )
        chance = rng.random()
        kind = "cancelled" if chance < CANCELLED else rng.choice(["whole", "streamed"])
        if chance > 1 - MALFORMED:
            kind = "malformed"
        yield Question(text[start : start + length], options, kind)


def _ask_all(
    server: Serving, text: list[int], requests: int, clients: int, minutes: float, report: Report
) -> list[Question]:
    import openai

    client = openai.OpenAI(base_url=server.address, api_key="none", max_retries=0, timeout=1800)
    source, lock, end = questions(text), threading.Lock(), time.monotonic() + 60 * minutes
    asked: list[Question] = []
    memory = [server.memory()]
    compiled = server.compiled()

    def work() -> None:
        while True:
            with lock:
                if len(asked) >= requests or time.monotonic() > end:
                    return
                one = next(source)
                asked.append(one)
                if len(asked) % max(1, min(requests, 10_000) // 10) == 0:
                    memory.append(server.memory())
                    say(f"{len(asked)} asked, the server holds {memory[-1]:.0f} MB")
            one.outcome = _ask(client, one)

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(work) for _ in range(clients)]:
            done.result()
    seconds = time.perf_counter() - start
    memory.append(server.memory())
    told = Counter(f"{one.kind}: {one.outcome}" for one in asked)
    read = sum(len(one.prompt) for one in asked)
    firsts = sorted(one.seconds[0] for one in asked if one.seconds)
    report.add(
        {
            "what": "load",
            "requests": len(asked),
            "clients": clients,
            "seconds": seconds,
            "prompt tokens/s": read / seconds,
            "tokens/s": sum(one.tokens for one in asked) / seconds,
            "first token s (median)": firsts[len(firsts) // 2] if firsts else None,
            "first token s (99 %)": firsts[len(firsts) * 99 // 100] if firsts else None,
            "MB at the start, and after each tenth": [round(m) for m in memory],
            "compiled after the start": server.compiled() - compiled,
            **dict(sorted(told.items())),
        }
    )
    return asked


def _ask(client: Any, one: Question) -> str:
    """Sends the request; returns the outcome in one word."""
    import openai

    sampler, start = one.options.sampler, time.perf_counter()
    body: dict[str, Any] = {
        "model": NAME,
        "prompt": one.prompt,
        "max_tokens": one.options.max_new_tokens,
        "temperature": sampler.temperature,
        "seed": one.options.seed,
        "extra_body": {
            "top_k": sampler.top_k,
            "top_p": sampler.top_p,
            "min_p": sampler.min_p,
            "repetition_penalty": sampler.repetition_penalty,
        },
    }
    try:
        if one.kind == "malformed":
            try:
                client.completions.create(**body | {"prompt": [*one.prompt, -1]})
            except openai.BadRequestError:
                return "refused"
            return "taken"
        if one.kind == "whole":
            said = client.completions.create(**body)
            one.text, one.finish_reason = said.choices[0].text, said.choices[0].finish_reason
            one.tokens = said.usage.completion_tokens
            return "answered"
        stream = client.completions.create(**body, stream=True)
        for chunk in stream:
            one.seconds.append(time.perf_counter() - start)
            choice = chunk.choices[0]
            one.text, one.finish_reason = one.text + choice.text, choice.finish_reason
            one.tokens += 1
            if one.kind == "cancelled":
                stream.close()
                return "gone"
        return "answered"
    except openai.OpenAIError as error:
        return type(error).__name__


def _kill_and_restart(model: str, programs: Path, text: list[int], report: Report) -> None:
    """kill -9 under load: clients get an error, and a new server serves."""
    import openai

    def ask(server: Serving, client: Any, one: Question) -> None:
        one.outcome = _ask(client, one)

    source = questions(text, seed=1)
    some = [
        Question(next(source).prompt, Options(max_new_tokens=NEW), "streamed") for _ in range(8)
    ]
    with serving(model, programs) as server:
        client = openai.OpenAI(base_url=server.address, api_key="none", max_retries=0)
        threads = [threading.Thread(target=ask, args=(server, client, one)) for one in some]
        for thread in threads:
            thread.start()
        while not any(one.seconds for one in some):
            time.sleep(0.05)
        server.process.kill()
        for thread in threads:
            thread.join(30)
    told = Counter(one.outcome for one in some)
    with serving(model, programs) as server:
        client = openai.OpenAI(base_url=server.address, api_key="none", max_retries=0)
        again = Question(text[:50], Options(max_new_tokens=4), "whole")
        outcome = _ask(client, again)
        report.add(
            {
                "what": "kill -9 and restart",
                "clients were told": dict(told),
                "restart seconds": server.seconds,
                "then": outcome,
            }
        )


# --- answers -----------------------------------------------------------------------------------


def _compare(llm: dca_jax.LLM, asked: list[Question], report: Report) -> int:
    """Number of answers that differ from `generate` by more than a tie between two tokens."""
    equal, ties, wrong = 0, 0, 0
    for number, one in enumerate(asked):
        if one.kind == "malformed" or one.outcome not in ("answered", "gone"):
            continue
        alone = llm.generate(one.prompt, one.options)[0]
        if one.kind == "cancelled":
            same = alone.text.startswith(one.text)
        else:
            same = (alone.text, alone.finish_reason) == (one.text, one.finish_reason)
        if same:
            equal += 1
        elif _closest(llm, one.prompt, list(alone.tokens)) < TIE:
            ties += 1
        else:
            wrong += 1
            say(f"not equal: {one}, alone {alone}")
        if number % 100 == 99:
            say(f"{number + 1} compared: {equal} equal, {ties} ties, {wrong} wrong")
    lost = sum(one.outcome == "lost" for one in asked)
    report.add({"what": "compared", "equal": equal, "ties": ties, "wrong": wrong, "lost": lost})
    return wrong + lost


def _closest(llm: dca_jax.LLM, prompt: list[int], tokens: list[int]) -> float:
    """The smallest gap between the two most likely tokens' logits anywhere in an answer."""
    logits = llm.logits([[*prompt, *tokens]])[0, len(prompt) - 1 : -1]
    top = np.sort(logits, axis=-1)[:, -2:]
    return float((top[:, 1] - top[:, 0]).min())
