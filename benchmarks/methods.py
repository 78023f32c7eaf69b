"""Time to read a prompt with each position method, compared with DCA and RoPE, on one device.

    python benchmarks/methods.py measure --out outputs/methods.json
    python benchmarks/methods.py measure --shapes smollm2-135m --tokens 128k --what attention

For the shapes of some models, in bfloat16 at batch 1: the attention of a whole prompt, from
unrotated queries and keys to the output; and prefill by a model with random weights, piece by piece
as in the engine (only the first layers of a large model). pi, ntk and yarn run rope's program.
Before a method is timed, its output is compared with that of plain XLA for some queries at the
beginning, middle and end of the same prompt.

Ratios are relative to DCA, which is timed first for each shape.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import generate
import jax
import jax.numpy as jnp
import numpy as np
import typer
from common import (
    Report,
    machine,
    numbers,
    reason,
    require_live_device,
    show,
    start_compiling,
    timed,
)
from jaxtyping import Array

from dca_jax import KVCache, Llama, dual_chunk_attention
from dca_jax.config import LlamaConfig
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.inference.buckets import capacity_bucket
from dca_jax.inference.compiled import compiled
from dca_jax.inference.methods import Method, method_by_name
from dca_jax.inference.pieces import NARROW
from dca_jax.inference.steps import empty_hidden, read
from dca_jax.rope import RopeConfig

SHAPES = generate.PRESETS | {
    "smollm2-135m": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rope=RopeConfig(theta=100_000.0),
    ),
}
# DPE's scales are those published for Llama-3-8B, for all shapes.
NAMES = (
    *("dca", "rope", "rerope", "self-extend", "streaming-llm", "lm-infinite", "string", "jet-long"),
    *("adagrope", "lampe", "dpe:1024,4,4,2,16,32,32,16,128", "dca-intra", "dca-intra-inter"),
)
LAYERS = 8  # of a model, at most
CHECKED = 512  # queries compared at each place
LARGEST_ERROR = 1e-2  # of the norm; both round to bfloat16 on the way
COLUMNS = ("shape", "tokens", "what", "layers", "method", "error", "ms", "of DCA")

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__
)


@dataclass(frozen=True)
class Case:
    """A method by name, applied to a shape and a prompt length."""

    shape: str
    name: str
    tokens: int

    @property
    def config(self) -> LlamaConfig:
        """Of the model."""
        return SHAPES[self.shape]

    @property
    def method(self) -> Method:
        """For the whole model, however many of its layers are read."""
        return method_by_name(self.name, self.config, self.tokens)


@app.callback()
def main() -> None:
    """Makes `measure` a subcommand."""


@app.command()
@exit_on_input_error()
def measure(
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/methods.json"
    ),
    shapes: Annotated[
        str, typer.Option(help=f"Models, separated by commas, of: {', '.join(SHAPES)}.")
    ] = "smollm2-135m,llama-3-8b",
    tokens: Annotated[str, typer.Option(help="Of the prompt; 4k is 4096.")] = "64k",
    methods: Annotated[str, typer.Option(help="Names, separated by spaces.")] = " ".join(NAMES),
    what: Annotated[str, typer.Option(help="Of: attention, read.")] = "attention,read",
    minutes: Annotated[
        float, typer.Option(help="Start no further measurement after this many minutes.")
    ] = math.inf,
) -> None:
    """Checks and times every method; one that cannot run gets a row with the reason."""
    kinds = {"attention": attention_rows, "read": read_rows}
    wanted = [kind.strip() for kind in what.split(",")]
    if unknown := {*wanted} - {*kinds} | {*shapes.split(",")} - {*SHAPES}:
        raise InputError(f"{', '.join(sorted(unknown))}: not known; see --help")
    report = Report(out, machine() | {"benchmark": "methods"}, minutes=minutes)
    (length,) = numbers(tokens)
    with ThreadPoolExecutor() as pool:
        for kind in wanted:
            for shape in shapes.split(","):
                cases = [Case(shape, name, length) for name in methods.split()]
                peer: float | None = None
                for row in kinds[kind](cases, pool, report):
                    peer = row.get("ms") if row["method"] == cases[0].name else peer
                    is_timed = peer is not None and "ms" in row
                    report.add(row | ({"of DCA": row["ms"] / peer} if is_timed else {}))
                    require_live_device()
    show(f"Position methods on {report.facts['device']}", COLUMNS, report.rows)


def _row(case: Case, what: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Adds a row with the results of `work`, or with the reason for its failure."""
    row = {"shape": case.shape, "tokens": case.tokens, "what": what, "method": case.name}
    try:
        return row | work()
    except Exception as error:  # out of memory, or an unsupported shape
        return row | {"failed": reason(error)}


# --- attention ---------------------------------------------------------------------------------


def attention_rows(cases: list[Case], pool: Executor, report: Report) -> Iterator[dict[str, Any]]:
    """Checks and times each method's attention."""
    inputs = jax.eval_shape(partial(random_inputs, cases[0]))
    some = jax.ShapeDtypeStruct((1, CHECKED, *inputs[0].shape[2:]), inputs[0].dtype)
    offset = jax.ShapeDtypeStruct((1,), jnp.int32)
    started = [
        (
            case,
            start_compiling(pool, partial(attention, case), *inputs),
            start_compiling(pool, partial(plain_form, case), some, *inputs[1:], offset),
        )
        for case in cases
    ]
    wait(future for _, *both in started for future in both)
    arrays = jax.jit(random_inputs, static_argnums=0)(cases[0])

    def work(run: Future, form: Future) -> dict[str, Any]:
        error = largest_error(run.result()(*arrays), form.result(), arrays)
        if not error < LARGEST_ERROR:
            return {"error": error, "failed": f"the XLA form differs by more than {LARGEST_ERROR}"}
        time = timed(run.result(), *arrays)
        return {"error": error, "ms": time.median, "low": time.low, "high": time.high}

    for case, run, form in started:
        if report.out_of_time():
            return
        yield _row(case, "attention", partial(work, run, form))


def random_inputs(case: Case) -> list[Array]:
    """Query, key and value."""
    config = case.config
    heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    return [
        jax.random.normal(
            jax.random.key(seed, impl="rbg"), (1, case.tokens, n, config.head_dim), jnp.bfloat16
        )
        for seed, n in enumerate(heads)
    ]


def attention(case: Case, query: Array, key: Array, value: Array) -> Array:
    """Attention by the best implementation for the device."""
    method = case.method
    return dual_chunk_attention(query, key, value, dca=method.dca, rope=method.rope)


def plain_form(case: Case, query: Array, key: Array, value: Array, offset: Array) -> Array:
    """Attention of some queries from `offset` on, in plain XLA."""
    method = case.method
    return dual_chunk_attention(
        *(query, key, value),
        dca=method.dca,
        rope=method.rope,
        query_offset=offset,
        context_lengths=jnp.asarray([case.tokens], jnp.int32),
        implementation="xla",
    )


def largest_error(out: Array, form: Callable[..., Array], arrays: list[Array]) -> float:
    """The largest error at three places, relative to the norm."""
    query, key, value = arrays
    last = query.shape[1] - CHECKED
    errors = []
    for place in (0, last // 2, last):
        here = slice(place, place + CHECKED)
        expected = form(query[:, here], key, value, jnp.asarray([place], jnp.int32))
        ours, theirs = (np.asarray(x, np.float32) for x in (out[:, here], expected))
        errors.append(float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)))
    return max(errors)


# --- a model -----------------------------------------------------------------------------------


def read_rows(cases: list[Case], pool: Executor, report: Report) -> Iterator[dict[str, Any]]:
    """Times prefill of the prompt with each method, piece by piece."""
    config = cases[0].config
    config = replace(config, num_hidden_layers=min(config.num_hidden_layers, LAYERS))
    base = generate.random_model(config, dca=False, implementation=None)
    capacity, width = capacity_bucket(cases[0].tokens), NARROW[0]
    whole = np.asarray([cases[0].tokens], np.int32)
    text = np.random.default_rng(0).integers(0, config.vocab_size, (1, cases[0].tokens))
    pieces = [text[:, at : at + width].astype(np.int32) for at in range(0, text.shape[1], width)]
    full = {piece.shape[1] for piece in pieces}
    if full != {width}:
        raise InputError(f"{whole[0]} tokens must be a multiple of a piece's {width}")

    def empty() -> KVCache:
        return KVCache.create(config, batch=1, capacity=capacity, dtype=base.dtype)

    def run(program: Any, pieces: list[np.ndarray]) -> tuple[Array, float]:
        """Reads the prompt; returns the last hidden state and seconds."""
        cache, hidden = empty(), empty_hidden(base, 1)
        jax.block_until_ready(cache)
        begin = time.perf_counter()
        for piece in pieces:
            hidden, cache = program(cache, hidden, piece, np.asarray([width], np.int32), whole)
        jax.block_until_ready(hidden)
        return hidden, time.perf_counter() - begin

    def work(program: Any, compiling: Future) -> dict[str, Any]:
        compiling.result()
        found = [run(program, pieces) for _ in range(2)]
        if not np.isfinite(np.asarray(found[0][0], np.float32)).all():
            return {"failed": "the hidden state is not finite"}
        return {"layers": config.num_hidden_layers, "ms": 1e3 * min(time for _, time in found)}

    started = []
    for case in cases:
        model = with_method(base, case.method)
        program = compiled(read, model, 1, capacity, width, donated=1)
        started.append((case, program, pool.submit(run, program, pieces[:1])))
    wait(compiling for *_, compiling in started)
    for case, program, compiling in started:
        if report.out_of_time():
            return
        yield _row(case, "read", partial(work, program, compiling))


def with_method(base: Llama, method: Method) -> Llama:
    """The same weights with another position method."""
    config = replace(base.config, rope=method.rope)
    return Llama.from_params(config, base.params(), dca=method.dca, dtype=base.dtype)


if __name__ == "__main__":
    app()
