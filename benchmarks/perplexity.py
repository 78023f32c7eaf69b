"""Perplexity of a long text: tokens per second, memory, and attention's share of the time.

    python benchmarks/perplexity.py --model llama-3-8b --lengths 128k --out outputs/perplexity.json

A model's shape with random bfloat16 weights, generated on the device: the perplexity is
meaningless, but takes as long as a real one. The text is read like a window of `dca-jax eval
perplexity`. Then attention is timed alone, a piece's queries over one layer's keys, at each place
of the text; its share is that time for all layers and pieces, divided by the time of the whole
reading.
"""

import math
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from common import Report, machine, numbers, reason, show, timed
from generate import random_model

from dca_jax import Llama
from dca_jax.attention.backend import PLAIN
from dca_jax.attention.op import attend, choose_implementation, make_rows
from dca_jax.distributed import exit_on_input_error
from dca_jax.inference.buckets import cache_shape
from dca_jax.inference.pieces import scored_pieces
from dca_jax.inference.score import Reader
from dca_jax.planning.shapes import SHAPES, find_shape
from dca_jax.products.packed import packed_forms

COLUMNS = ("model", "tokens", "method", "attention", "s", "tokens/s", "attention s", "share")
COLUMNS += ("peak GB",)


@exit_on_input_error()
def main(
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/perplexity.json"
    ),
    model: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3-8b",
    lengths: Annotated[
        str, typer.Option(help="Tokens per window, separated by commas; 4k is 4096.")
    ] = "128k",
    plain: Annotated[bool, typer.Option("--plain", help="Also measure plain attention.")] = False,
) -> None:
    """Reads a window of each length, after a warm-up, and times its attention alone."""
    report = Report(out, machine() | {"benchmark": "perplexity"})
    for method in ("dca", "rope") if plain else ("dca",):
        reading = random_model(find_shape(model), dca=method == "dca", implementation=None)
        for length in sorted(numbers(lengths)):
            row = {"model": model, "tokens": length, "method": method}
            try:
                report.add(row | measured(reading, length))
            except Exception as error:  # not fitting is a result too
                report.add(row | {"failed": reason(error)})
    show(f"Perplexity on {report.facts.get('device')}", COLUMNS, report.rows)
    if any("failed" in row for row in report.rows):
        raise SystemExit(1)


def measured(model: Llama, length: int) -> dict[str, Any]:
    """Times one window, and its attention alone."""
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length))
    reader = Reader(model, 1, length)
    reader.nll(tokens.astype(np.int32))
    begin = time.perf_counter()
    nll = reader.nll(tokens.astype(np.int32))
    seconds = time.perf_counter() - begin
    if not np.isfinite(nll).all():
        raise ValueError("the NLL is not finite")
    stats = jax.devices()[0].memory_stats() or {}
    name, alone = attention_seconds(model, length)
    return {
        "attention": name,
        "s": seconds,
        "tokens/s": length / seconds,
        "attention s": alone,
        "share": alone / seconds,
        "peak GB": stats.get("peak_bytes_in_use", math.nan) / 1e9,
    }


def attention_seconds(model: Llama, length: int) -> tuple[str, float]:
    """Seconds of attention for all layers and pieces of a text, and the implementation."""
    config, platform = model.config, jax.default_backend()
    pieces = scored_pieces(config, platform, packed=bool(packed_forms(model)))
    keys = (*cache_shape(model, 1, length), config.num_key_value_heads, config.head_dim)
    key, value = (jax.random.normal(jax.random.key(n), keys, model.dtype) for n in range(2))

    @jax.jit
    def piece(query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array) -> jax.Array:
        rows = make_rows(
            query.shape,
            dca=model.dca,
            rope=config.rope,
            query_offset=start[None],
            context_lengths=jnp.full((1,), length, jnp.int32),
        )
        return attend(query, key, value, dca=model.dca, rows=rows)

    milliseconds = 0.0
    heads, start = (config.num_attention_heads, config.head_dim), 0
    for count, padded in pieces.cut(length - 1):
        query = jax.random.normal(jax.random.key(2), (1, padded, *heads), model.dtype)
        milliseconds += timed(piece, query, key, value, jnp.int32(start)).median
        start += count
    query_like = jax.ShapeDtypeStruct((1, pieces.widths[0], *heads), model.dtype)
    key_like = jax.ShapeDtypeStruct((1, *keys), model.dtype)
    name = choose_implementation(None, query_like, key_like, model.dca or PLAIN)
    return name, config.num_hidden_layers * milliseconds / 1e3


if __name__ == "__main__":
    typer.run(main)
