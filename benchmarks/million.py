"""A text of a million tokens on one device: the time of pieces along it, and peak memory.

    python benchmarks/million.py measure --out outputs/million.json
    python benchmarks/million.py measure --preset tiny --tokens 64k --whole 8k

The shape of Qwen2.5-7B with the DCA setting of Qwen2.5-7B-Instruct-1M and random bfloat16 weights.
Reading the whole text densely takes minutes. Instead, the engine reads single pieces in a full-size
cache, which holds random keys and values up to where the piece begins. The time of a piece grows
linearly with the number of tokens before it, so the time of the whole text is predicted by a line
through the pieces that were timed, summed over all pieces. As a check, the first tokens are read
completely.
"""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import generate
import jax
import jax.numpy as jnp
import numpy as np
import typer
from common import Report, machine, show
from jaxtyping import Array

from dca_jax import DCAConfig, KVCache, Llama
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.inference.buckets import capacity_bucket
from dca_jax.inference.compiled import compiled
from dca_jax.inference.pieces import prompt_pieces
from dca_jax.inference.steps import empty_hidden, read
from dca_jax.lengths import parse_tokens
from dca_jax.planning.plan import plan
from dca_jax.planning.shapes import SHAPES

QWEN_1M = {
    "chunk_size": 262_144,
    "local_size": 8_192,
    "original_max_position_embeddings": 262_144,
}
PLACES = 5  # where pieces are timed, from the first to the last of the text
COLUMNS = ("tokens before", "piece ms", "finite", "read s", "predicted s", "peak GB", "plan GB")

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__
)


@app.callback()
def main() -> None:
    """Makes `measure` a subcommand."""


@app.command()
@exit_on_input_error()
def measure(
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/million.json"
    ),
    preset: Annotated[str, typer.Option(help="The model's shape.")] = "qwen2.5-7b",
    tokens: Annotated[str, typer.Option(help="Tokens of the text.")] = "1M",
    whole: Annotated[str, typer.Option(help="Number of first tokens to read completely.")] = (
        "128k"
    ),
    device: Annotated[
        str, typer.Option(help="Device for the plan printed next to the measured memory.")
    ] = "h200",
) -> None:
    """Times pieces along the text, then reads its beginning completely."""
    config = {**SHAPES, **generate.PRESETS}.get(preset)
    if config is None:
        raise InputError(f"{preset!r} is not one of {', '.join(SHAPES)}")
    length, first = parse_tokens(tokens), parse_tokens(whole)
    width = prompt_pieces(config, jax.default_backend(), packed=False).widths[0]
    if length % width or first % width:
        raise InputError(f"{length} and {first} tokens must be multiples of a piece's {width}")
    report = Report(out, machine() | {"benchmark": "million", "model": preset, "tokens": length})
    random = generate.random_model(config, dca=True, implementation=None)
    model = Llama.from_params(
        config, random.params(), dca=DCAConfig.from_hf(QWEN_1M), dtype=jnp.bfloat16
    )
    cache = filled_cache(model, capacity_bucket(length))
    text = np.random.default_rng(0).integers(0, config.vocab_size, (1, length)).astype(np.int32)
    program = compiled(read, model, 1, cache.capacity, width, donated=1)
    places = [round(n * (length // width - 1) / (PLACES - 1)) * width for n in range(PLACES)]
    line: list[float] = []
    for place in [places[0], *places]:  # the first call compiles
        seconds = []
        for _ in range(2):
            cache = at(cache, place)
            start = time.perf_counter()
            hidden, cache = step(program, model, cache, text, place, width)
            seconds.append(time.perf_counter() - start)
        line.append(min(seconds))
        if len(line) > 1:
            found = bool(np.isfinite(np.asarray(hidden, np.float32)).all())
            report.add({"tokens before": place, "piece ms": line[-1] * 1e3, "finite": found})
    slope, base = np.polyfit(places, line[1:], 1)

    def said(length: int) -> float:
        return float(sum(base + slope * place for place in range(0, length, width)))

    start, cache = time.perf_counter(), at(cache, 0)
    for place in range(0, first, width):
        hidden, cache = step(program, model, cache, text, place, width)
    seconds = time.perf_counter() - start
    report.add({"tokens before": 0, "read s": seconds, "predicted s": said(first), "whole": first})
    planned = plan(preset, config, device=device, mesh={}, context_length=length).usage.total
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    row: dict[str, Any] = {"tokens before": 0, "whole": length, "predicted s": said(length)}
    report.add(row | {"peak GB": peak and peak / 1e9, "plan GB": planned / 1e9})
    show(f"{length:,} tokens on {report.facts.get('device')}", COLUMNS, report.rows)


def step(
    program: Any, model: Llama, cache: KVCache, text: np.ndarray, place: int, width: int
) -> tuple[Array, KVCache]:
    """Reads one piece and waits for it."""
    hidden = empty_hidden(model, 1)
    piece, lengths = text[:, place : place + width], np.asarray([width], np.int32)
    total = np.asarray([text.shape[1]], np.int32)
    return jax.block_until_ready(program(cache, hidden, piece, lengths, total))


def at(cache: KVCache, length: int) -> KVCache:
    """The cache as if it held `length` tokens."""
    lengths = jax.device_put(np.asarray([length], np.int32), cache.lengths.sharding)
    return replace(cache, lengths=lengths)


def filled_cache(model: Llama, capacity: int) -> KVCache:
    """A cache full of normal numbers, made a few tokens of a layer at a time.

    Making them must take less memory than reading does, whose peak is to be measured.
    """
    cache = KVCache.create(model.config, batch=1, capacity=capacity, dtype=model.dtype)
    at_once = math.gcd(capacity, 32_768)

    def fill(stack: Array, layer: Array, key: Array) -> Array:
        def fill_some(n: Array, stack: Array) -> Array:
            shape = (1, stack.shape[1], at_once, *stack.shape[3:])
            some = jax.random.normal(jax.random.fold_in(key, n), shape, stack.dtype)
            return jax.lax.dynamic_update_slice(stack, some, (layer, 0, n * at_once, 0))

        return jax.lax.fori_loop(0, capacity // at_once, fill_some, stack)

    filling = jax.jit(fill, donate_argnums=0)
    stacks = []
    for number, stack in enumerate((cache.key, cache.value)):
        stacks.append(stack)
        for layer in range(len(stack)):
            key = jax.random.fold_in(jax.random.key(number, impl="rbg"), layer)
            stacks[number] = filling(stacks[number], jnp.int32(layer), key)
    return replace(cache, key=stacks[0], value=stacks[1])


if __name__ == "__main__":
    app()
