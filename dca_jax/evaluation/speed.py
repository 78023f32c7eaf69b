"""Time and memory of a prefill, by prompt length and attention (Figure 3).

    dense   plain attention with the full matrix of logits, [heads, T, T] in float32
    flash   plain blockwise attention: the engine's chunked prefill
    dca     the same prefill with Dual Chunk Attention

Times are means over runs after one that compiles; the prompt's ids are random. Memory is the
compiled program's own estimate for the largest piece, including weights and KV cache: unlike a
device's peak memory, it applies to this case only. The activations of a piece do not grow with the
text, so apart from the weights, `flash` and `dca` grow with the cache, and `dense` with the square
of the length. (The paper reads the whole prompt at once in all three.)
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dca_jax.errors import InputError
from dca_jax.evaluation.forms import Form
from dca_jax.evaluation.results import Record, ResultLog, in_batches
from dca_jax.evaluation.tables import Outcome, Table, number
from dca_jax.evaluation.tables import tokens as tokens_text
from dca_jax.inference.buckets import new_cache, pieces_of
from dca_jax.inference.compiled import compiler_options
from dca_jax.inference.generate import Run
from dca_jax.inference.methods import method_by_name, with_method
from dca_jax.inference.progress import progress, reading_work
from dca_jax.inference.steps import read
from dca_jax.model import Llama

ATTENTIONS = ("dense", "flash", "dca")
FORM = Form(
    key={"attention": ATTENTIONS, "length": int},
    value={"seconds": float, "planned_bytes": int},
)
TRIALS, SECONDS = 20, 20.0  # timed runs at most, and their total time at most


def evaluate(
    model: Llama,
    log: ResultLog,
    *,
    attentions: Sequence[str],
    lengths: Sequence[int],
    setting: str = "dca",
    trials: int = TRIALS,
) -> None:
    """Times every attention at every length; cases that do not fit are recorded as failed.

    Args:
        model: the model with its own rope, as loaded.
        attentions: names in `ATTENTIONS`.
        setting: the setting of "dca", a name known to `dca_jax.inference.methods`.
        trials: number of runs of each case, fewer if they take long.

    Raises:
        InputError: an attention or setting is unknown, or there are no trials.
    """
    for name in attentions:
        if name not in ATTENTIONS:
            raise InputError(f"attention {name!r} is not one of {', '.join(ATTENTIONS)}")
    if trials < 1:
        raise InputError(f"there must be at least one trial, got {trials}")
    method_by_name(setting, model.config, max(lengths, default=1))
    cells = [{"attention": a, "length": n} for n in lengths for a in attentions]
    missing = [cell for cell in cells if cell not in log]
    work = {length: reading_work(model.config, length) for length in lengths}
    with progress("speed", sum(work[cell["length"]] for cell in missing)) as advance:

        def run(some: Sequence[dict[str, Any]]) -> None:
            (cell,) = some
            begin = time.perf_counter()
            value = _measured(model, cell["attention"], cell["length"], setting, trials)
            log.add(cell, value, time.perf_counter() - begin)
            advance(work[cell["length"]])

        in_batches(missing, 1, run, lambda cell, error: log.fail(cell, error, 0.0))


def _measured(
    model: Llama, attention: str, length: int, setting: str, trials: int
) -> dict[str, float]:
    reading = with_method(model, setting if attention == "dca" else "rope", length)
    tokens = np.random.default_rng(length).integers(0, model.config.vocab_size, (1, length))
    tokens = tokens.astype(np.int32)
    if attention == "dense":
        reading.implementation = "reference"
        program = jax.jit(last_logits)
        planned = _planned_bytes(program, reading, tokens)

        def once() -> Any:
            return program(reading, tokens)
    else:
        planned = _planned_bytes(*_largest_piece(reading, length))
        prompt = tokens[0].tolist()

        def once() -> Any:
            return Run(reading, [prompt], max_new_tokens=1).read_prompts()

    jax.block_until_ready(once())
    seconds: list[float] = []
    while len(seconds) < trials and sum(seconds) < SECONDS:
        begin = time.perf_counter()
        jax.block_until_ready(once())
        seconds.append(time.perf_counter() - begin)
    mean = sum(seconds) / len(seconds)
    return {
        "seconds": mean,
        "fastest": min(seconds),
        "slowest": max(seconds),
        "trials": len(seconds),
        "tokens_per_second": length / mean,
        "planned_bytes": planned,
    }


def last_logits(model: Llama, tokens: Any) -> Any:
    """The logits after whole texts that are read at once."""
    hidden, _ = model.hidden_states(tokens)
    return model.unembed(hidden[:, -1])


def _largest_piece(model: Llama, length: int) -> tuple[Any, ...]:
    """The engine's `read`, compiled as in the engine, and arguments for the largest piece."""
    leaves, tree = jax.tree.flatten(new_cache(model, 1, length + 1))

    def piece(model: Llama, cache: Any, *rest: Any) -> Any:
        return jax.tree.leaves(read(model, jax.tree.unflatten(tree, cache), *rest))

    program = jax.jit(piece, donate_argnums=1, compiler_options=compiler_options())
    width = pieces_of(model).widest(length)
    hidden = np.zeros((1, model.config.hidden_size), model.dtype)
    tokens = np.zeros((1, width), np.int32)
    lengths = np.full((1,), min(width, length), np.int32)
    return program, model, leaves, hidden, tokens, lengths, lengths


def _planned_bytes(program: Any, *arguments: Any) -> int:
    """Device bytes that a compiled program needs for arguments, results and temporaries."""
    plan = program.lower(*arguments).compile().memory_analysis()
    return int(
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes
    )


def outcome(
    settings: Mapping[str, Any], records: Sequence[Record], paper_model: str | None
) -> Outcome:
    """Milliseconds and gigabytes by attention and length."""
    del settings, paper_model  # the paper has a plot of this, but no figures
    values = {(r.key["attention"], r.key["length"]): r.value or {} for r in records}
    lengths = sorted({length for _, length in values})
    names = [name for name in ATTENTIONS if any(name == a for a, _ in values)]

    def curve(name: str, figure: Callable[[dict[str, Any]], float]) -> dict[int, float]:
        return {n: figure(values[name, n]) for n in lengths if (name, n) in values}

    times = {name: curve(name, lambda value: 1e3 * value["seconds"]) for name in names}
    memory = {name: curve(name, lambda value: value["planned_bytes"] / 1e9) for name in names}
    header = ["attention", *map(tokens_text, lengths)]
    tables = [
        Table(
            title=title,
            header=header,
            rows=[
                [name, *(number(row.get(n), digits) for n in lengths)] for name, row in of.items()
            ],
        )
        for title, of, digits in (
            ("Reading a prompt (ms)", times, 1),
            ("Memory of a device (GB)", memory, 2),
        )
    ]

    def draw(path: Path) -> None:
        from dca_jax.evaluation.plots import plot_speed  # matplotlib is slow to import

        plot_speed(times, memory, path)

    scores = {name: {str(n): values[name, n] for n in times[name]} for name in names}
    pictures = {"speed.png": draw} if records else {}
    return Outcome(scores=scores, tables=tables if records else [], pictures=pictures)
