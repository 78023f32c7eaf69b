"""A server's speed and stability: steps, first tokens, clients; and answers under load.

    python benchmarks/serving.py measure --out outputs/serving.json
    python benchmarks/serving.py peer --out outputs/serving-peer.json
    python benchmarks/serving.py load --requests 1000 --clients 32

`measure` uses the engine in this process, without HTTP, and a model with random bfloat16 weights.
`share` is the time that reading the weights and keys once takes at the device's copy bandwidth
(measured in the same run), divided by the time of a step. `peer` runs the same clients with
transformers' continuous batching (`generate_batch`), one batch per number of clients. `load` starts
`dca-jax serve` with a small model and compares every answer with `generate`.
"""

import itertools
import math
import os
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from dca_jax.memory import GPU_SHARE

os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(GPU_SHARE))

import jax
import numpy as np
import typer
from common import Report, copy_bandwidth, machine, numbers, reason, require_live_device, say, show
from generate import PRESETS, random_model
from serving_load import load

from dca_jax.distributed import exit_on_input_error
from dca_jax.inference.llm import LLM
from dca_jax.inference.options import Options
from dca_jax.lengths import parse_tokens
from dca_jax.serving.engine import Engine, Job
from dca_jax.serving.pages import common_beginnings
from dca_jax.serving.programs import COMMON, Programs, Texts, groups_of
from dca_jax.serving.sizing import choose_pages

COLUMNS = ("what", "rows", "tokens", "ms", "share", "first token s", "between ms", "tokens/s")
COLUMNS += ("longest pause s", "usual ms", "cached")

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__
)
app.command()(load)

PresetOption = Annotated[str, typer.Option(help=f"The model's shape: {', '.join(PRESETS)}.")]
ClientsOption = Annotated[
    str, typer.Option(help="Numbers of simultaneous clients, separated by commas.")
]
PromptOption = Annotated[str, typer.Option(help="Tokens per prompt of a client.")]
AnswerOption = Annotated[int, typer.Option(help="Tokens per answer.")]


@app.command()
@exit_on_input_error()
def measure(
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/serving.json"
    ),
    preset: PresetOption = "llama-3-8b",
    rows: Annotated[int, typer.Option(help="Maximum number of simultaneous texts.")] = 32,
    clients: ClientsOption = "32,8,1",
    prompt: PromptOption = "4k",
    answer: AnswerOption = 256,
    book: Annotated[str, typer.Option(help="Tokens of the long text.")] = "100k",
    questions: Annotated[
        int, typer.Option(help="Number of simultaneous questions about the long text.")
    ] = 100,
    cache_dtype: Annotated[str, typer.Option(help="bfloat16, int8 or fp8.")] = "bfloat16",
    cache: Annotated[
        str | None, typer.Option(help="Tokens of the cache (default: as many as fit).")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Start nothing further after this many minutes.")
    ] = math.inf,
) -> None:
    """Times steps, pieces, first tokens, pauses and clients; a failure does not stop the rest."""
    long, short = parse_tokens(book), parse_tokens(prompt)
    report = Report(out, {"benchmark": "serving", "model": preset}, minutes=minutes)
    report.facts |= machine()
    bandwidth = copy_bandwidth(2.0 if jax.default_backend() == "gpu" else 0.01)
    report.facts["copy GB/s"] = bandwidth / 1e9
    model = random_model(PRESETS[preset], dca=True, implementation=None)
    llm = LLM(
        model=model,
        tokenizer=None,
        stop_ids=frozenset(),
        cache_dtype=np.dtype(
            jax.numpy.dtype({"fp8": "float8_e4m3fn"}.get(cache_dtype, cache_dtype))
        ),
    )
    context = long + max(1024, 2 * answer)
    tokens = None if cache is None else parse_tokens(cache)
    pages = choose_pages(llm, context=context, rows=rows, tokens=tokens)
    engine = Engine(llm, context=context, rows=rows, pages=pages)
    start = time.perf_counter()
    engine.start(lambda name: say(f"{time.perf_counter() - start:6.1f} s  compiling: {name}"))
    report.add({"what": "start", "ms": 1e3 * (time.perf_counter() - start), "tokens": pages * 128})
    most, *fewer = (
        (lambda count=count: [several(engine, count, short, answer)]) for count in numbers(clients)
    )
    parts: list[Callable[[], Iterable[dict[str, Any]]]] = [
        most,
        lambda: steps_in_common(engine, long),
        lambda: rests(engine, long),
        lambda: about_a_book(engine, long, questions),
        lambda: steps(engine, short, bandwidth),
        *fewer,
        lambda: pauses(engine, long, min(8, rows - 1)),
        lambda: pieces(engine, long),
    ]
    for part in parts:
        if report.out_of_time():
            break
        try:
            for row in part():
                report.add(row)
        except Exception as error:
            report.add({"what": "failed", "failed": reason(error)})
            require_live_device()
    show(f"Serving on {report.facts.get('device')}", COLUMNS, report.rows)


# --- single steps ------------------------------------------------------------------------------


def steps(engine: Engine, length: int, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Times a step for each number of texts of `length` tokens, each in its own pages."""
    programs, leaves = engine.programs, engine.llm.model
    weights = sum(x.nbytes for x in jax.tree.leaves(leaves.params()))
    weights -= leaves.embed_tokens.embedding[...].nbytes
    pool = sum(x.nbytes for x in jax.tree.leaves(programs.state.stored))
    of_token = pool / (programs.num_pages * programs.page)
    for batch in reversed(programs.batches):
        texts, used = programs.texts(batch), -(-(length + 1) // programs.page)
        if batch * used > programs.num_pages:
            continue
        texts.slots[:] = np.arange(batch)
        texts.lengths[:] = texts.prompts[:] = length
        # Neighboring pages of a text lie far apart in the pool.
        places = np.random.default_rng(0).permutation(programs.num_pages)[: batch * used]
        texts.pages[:, :used] = places.reshape(batch, used)
        seconds = _median(lambda texts=texts: programs.draw(texts).token)
        moved = weights + batch * (length + 1) * of_token
        share = moved / bandwidth / seconds
        yield {"what": "step", "rows": batch, "tokens": length, "ms": 1e3 * seconds, "share": share}
    programs.reset()


def steps_in_common(engine: Engine, length: int) -> Iterator[dict[str, Any]]:
    """Times a step of texts that share a long beginning, read separately and in common."""
    programs = engine.programs
    shared = length // programs.page - 1
    for batch in reversed(programs.batches):
        if batch < COMMON or shared + 2 * batch > programs.num_pages:
            continue
        texts = _long_texts(programs, batch, shared)
        ways = {"step, each for itself": texts}
        if programs.members:
            limits = {"members": programs.members, "most": groups_of(batch)}
            groups = common_beginnings(texts.pages.tolist(), **limits)
            ways["step, in common"] = texts._replace(common=programs.common(batch, groups))
        for name, texts in ways.items():
            seconds = _median(lambda texts=texts: programs.draw(texts).token)
            yield {"what": name, "rows": batch, "tokens": length, "ms": 1e3 * seconds}
    programs.reset()


def rests(engine: Engine, length: int) -> Iterator[dict[str, Any]]:
    """Times the last tokens of prompts about a long text, one prompt and several at once."""
    programs = engine.programs
    width, shared = programs.pieces[-1], length // programs.page - 1
    for batch in sorted({1, programs.rests}):
        texts, tokens = _long_texts(programs, batch, shared), [[1] * width] * batch
        seconds = _median(
            lambda texts=texts, tokens=tokens: programs.read(texts, tokens, width).token
        )
        name = f"rests after {shared * programs.page}"
        yield {"what": name, "rows": batch, "tokens": width, "ms": 1e3 * seconds}
    programs.reset()


def _long_texts(programs: Programs, batch: int, shared: int) -> Texts:
    """Texts that share this many pages and have two of their own each."""
    texts, count = programs.texts(batch), shared + 2 * batch
    texts.slots[:] = np.arange(batch)
    texts.lengths[:] = shared * programs.page + np.arange(batch)
    texts.prompts[:] = texts.lengths + programs.pieces[-1]
    places = np.random.default_rng(0).permutation(programs.num_pages)[:count]
    texts.pages[:, :shared] = places[:shared]
    texts.pages[:, shared : shared + 2] = places[shared:].reshape(batch, 2)
    return texts


def pieces(engine: Engine, length: int) -> Iterator[dict[str, Any]]:
    """Times a piece of each width, at the beginning and at the end of a text."""
    programs = engine.programs
    texts = programs.texts(1)
    texts.slots[:], texts.prompts[:] = 0, length
    texts.pages[0] = np.arange(programs.table) % programs.num_pages
    for width, start in itertools.product(
        programs.pieces, (0, max(0, length - programs.pieces[0]))
    ):
        texts.lengths[:] = start
        tokens = [[1] * width]
        seconds = _median(
            lambda width=width, tokens=tokens: programs.read(texts, tokens, width).token
        )
        yield {"what": f"piece at {start}", "tokens": width, "ms": 1e3 * seconds}
    programs.reset()


def _median(step: Callable[[], Any], seconds: float = 0.3, blocks: int = 5) -> float:
    """Seconds per step, over blocks of steps that are queued at once."""
    jax.block_until_ready(step())
    start = time.perf_counter()
    jax.block_until_ready(step())
    count = max(1, int(seconds / (time.perf_counter() - start)))
    found = []
    for _ in range(blocks):
        start, last = time.perf_counter(), None
        for _ in range(count):
            last = step()
        jax.block_until_ready(last)
        found.append((time.perf_counter() - start) / count)
    return statistics.median(found)


# --- texts through the engine ------------------------------------------------------------------


class Asked:
    """A submitted text and the arrival times of its tokens."""

    def __init__(self, engine: Engine, prompt: list[int], new: int) -> None:
        self.times: list[float] = []
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.begun = time.perf_counter()
        self.jobs: list[Job] = engine.submit(
            [prompt], Options(max_new_tokens=new), [self._take], ignore_stop_ids=True
        )

    def _take(self, delta: Any) -> None:
        self.times.append(time.perf_counter())
        if delta.finish_reason is not None:
            self._ended.put(delta.error)

    def wait(self) -> "Asked":
        """Waits until the text is finished."""
        error = self._ended.get()
        if error is not None:
            raise RuntimeError(error)
        return self

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.begun

    @property
    def between(self) -> list[float]:
        """Seconds from each token to the next."""
        return [b - a for a, b in itertools.pairwise(self.times)]


def some_tokens(engine: Engine, length: int, seed: int) -> list[int]:
    """A meaningless text."""
    vocab = engine.llm.model.config.vocab_size
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


def about_a_book(engine: Engine, length: int, questions: int) -> Iterator[dict[str, Any]]:
    """Times reading a long text, questions about it in turn, and many at once."""
    text = some_tokens(engine, length, 1)
    read = Asked(engine, text, 1).wait()
    yield {"what": "a book read", "tokens": length, "first token s": read.first}
    alone = [Asked(engine, [*text, *some_tokens(engine, 64, n)], 8).wait() for n in range(2, 9)]
    yield {
        "what": "a question about it",
        "tokens": length + 64,
        "first token s": statistics.median(one.first for one in alone),
        "between ms": 1e3 * statistics.median(x for one in alone for x in one.between),
        "cached": alone[-1].jobs[0].cached_tokens,
    }
    start = time.perf_counter()
    asked = [Asked(engine, [*text, *some_tokens(engine, 64, n)], 64) for n in range(questions)]
    for one in asked:
        one.wait()
    seconds = time.perf_counter() - start
    yield {
        "what": f"{questions} questions at once",
        "tokens": length + 64,
        "first token s": statistics.median(one.first for one in asked),
        "between ms": 1e3 * statistics.median(x for one in asked for x in one.between),
        "tokens/s": 64 * questions / seconds,
    }


def pauses(engine: Engine, length: int, rows: int) -> Iterator[dict[str, Any]]:
    """Times the pauses of running texts while a long text is read."""
    short = [
        Asked(engine, some_tokens(engine, 512, n), 2000 if length > 4096 else 64)
        for n in range(rows)
    ]
    while any(len(one.times) < 8 for one in short):
        time.sleep(0.01)
    read = Asked(engine, some_tokens(engine, length, 99), 1).wait()
    ended = read.times[0]
    during = [
        b - a
        for one in short
        for a, b in itertools.pairwise(one.times)
        if read.begun <= a and b <= ended
    ]
    before = [b - a for one in short for a, b in itertools.pairwise(one.times) if b <= read.begun]
    for one in short:
        engine.cancel(one.jobs)
    yield {
        "what": "pauses while a book is read",
        "rows": rows,
        "tokens": length,
        "first token s": read.first,
        "longest pause s": max(during, default=math.nan),
        "between ms": 1e3 * statistics.median(during) if during else math.nan,
        "usual ms": 1e3 * statistics.median(before) if before else math.nan,
    }


def several(engine: Engine, clients: int, length: int, new: int) -> dict[str, Any]:
    """Times clients that send one request after the other, all with different prompts."""
    each = max(2, 8 // clients)
    found: list[Asked] = []

    def client(number: int) -> None:
        for turn in range(each):
            prompt = some_tokens(engine, length, 1000 + 100 * number + turn)
            found.append(Asked(engine, prompt, new).wait())

    start = time.perf_counter()
    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    return {
        "what": "clients",
        "rows": clients,
        "tokens": length,
        "first token s": statistics.median(one.first for one in found),
        "between ms": 1e3 * statistics.median(x for one in found for x in one.between),
        "longest pause s": max(x for one in found for x in one.between),
        "tokens/s": len(found) * new / seconds,
    }


# --- the peer ----------------------------------------------------------------------------------


@app.command()
@exit_on_input_error()
def peer(
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/serving-peer.json"
    ),
    preset: PresetOption = "llama-3-8b",
    clients: ClientsOption = "32,8,1",
    prompt: PromptOption = "4k",
    answer: AnswerOption = 256,
    minutes: Annotated[
        float, typer.Option(help="Start nothing further after this many minutes.")
    ] = math.inf,
) -> None:
    """The same prompts and answers with transformers' continuous batching and its defaults.

    Its warm-up is not counted: the time is from handing over the prompts to the last token.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers import LlamaConfig as HfConfig

    report = Report(out, {"benchmark": "serving", "model": preset} | machine(), minutes=minutes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields: dict[str, Any] = {**PRESETS[preset].to_hf(), "eos_token_id": None}
    del fields["architectures"]
    config: Any = HfConfig(**fields)
    for attention in ("flash_attention_2", "sdpa"):
        try:
            with torch.device(device):
                model: Any = AutoModelForCausalLM.from_config(
                    config, dtype=torch.bfloat16, attn_implementation=attention
                ).eval()
        except Exception as error:
            say(f"{attention}: {reason(error)}")
            continue
        for count in numbers(clients):
            if report.out_of_time():
                break
            rng = np.random.default_rng(count)
            prompts = rng.integers(0, config.vocab_size, (count, parse_tokens(prompt))).tolist()
            row = {"what": f"transformers, {attention}", "rows": count}
            try:
                row |= answered(model, prompts, answer)
            except Exception as error:
                row["failed"] = reason(error)
            report.add(row | {"tokens": parse_tokens(prompt)})
        del model
    show(f"transformers on {report.facts.get('device')}", COLUMNS, report.rows)


def answered(model: Any, prompts: list[list[int]], new: int) -> dict[str, Any]:
    """Times transformers' answers to prompts that arrive at once."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    answers = model.generate_batch(
        prompts, generation_config=settings, record_timestamps=True
    ).values()
    drawn = [len(one.generated_tokens) for one in answers]
    if drawn != [new] * len(prompts):
        raise RuntimeError(f"{len(drawn)} answers of {min(drawn, default=0)} tokens and more")
    begun = min(one.created_time for one in answers)
    seconds = max(one.timestamps[-1] for one in answers) - begun
    return {
        "first token s": statistics.median(one.timestamps[0] - one.created_time for one in answers),
        "between ms": 1e3
        * statistics.median(
            b - a for one in answers for a, b in itertools.pairwise(one.timestamps)
        ),
        "tokens/s": sum(drawn) / seconds,
    }


if __name__ == "__main__":
    app()
