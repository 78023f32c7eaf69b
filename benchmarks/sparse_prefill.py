"""Sparse prefill: the cost of choosing key blocks, and the time of a whole prompt.

    python benchmarks/sparse_prefill.py measure --out outputs/sparse_prefill.json
    python benchmarks/sparse_prefill.py measure --preset tiny --long 4k --middle 2k --check 2k

The shape of Qwen2.5-7B with the DCA setting of Qwen2.5-7B-Instruct-1M and random bfloat16 weights.
The names of selectors fix the share that is read, so times equal those with real weights; answers
are meaningless. The parts run in this order, and a failure of one does not affect the others:

    check    the scoring kernel compared with the same scores in plain XLA on the CPU; also with the
             heads of SmolLM2-135M (`pooled`: the lists only)
    choose   scoring and choosing for one piece at the end of the long text, compared with attention
             to all keys and to the chosen ones
    middle   a prompt of medium length, read densely and sparsely
    pieces   pieces of the long text, in a cache with random keys and values before them, and the
             time that a line through them predicts for the whole
    whole    the whole long text, if enough minutes are left
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
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
    reason,
    require_live_device,
    show,
    start_compiling,
    timed,
)
from jaxtyping import Array
from million import QWEN_1M, at, filled_cache, step

from dca_jax import DCAConfig, KVCache, Llama
from dca_jax.attention.backend import Rows
from dca_jax.attention.blocks import BLOCK
from dca_jax.attention.op import attend, make_rows
from dca_jax.attention.sparse import (
    Piece,
    PooledQueries,
    SampledRows,
    Sparse,
    VerticalSlash,
    choose_sparse,
)
from dca_jax.config import LlamaConfig
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.inference import steps
from dca_jax.inference.buckets import capacity_bucket
from dca_jax.inference.compiled import compiler_options
from dca_jax.inference.pieces import prompt_pieces
from dca_jax.inference.steps import empty_hidden
from dca_jax.lengths import parse_tokens
from dca_jax.planning.shapes import SHAPES

MIDDLE = ("off", "rows:0.1", "rows:0.05", "pooled:0.05")
LONG = ("rows:0.1", "rows:0.05", "pooled:0.05")
CHOOSE = ("rows:0.05", "rows4:0.05", "rows16:0.05", "pooled:0.05", "qwen-1m")
ATTEND = ("rows:0.1", "rows:0.05", "qwen-1m")
LINES = 1000, 6096  # for each head: the most frequent entry of MInference's table for Qwen2.5-7B-1M
CHECKED = {"heads of the model": None, "9/3 heads of 64": (9, 3, 64)}
PLACES = 5  # where pieces are timed, from the first to the last of the text
# a reading starts if this multiple of its predicted time is left, plus these seconds
SPARE = 1.1, 20.0
COLUMNS = (
    "what",
    "sparse",
    "ms",
    "of dense",
    "of ideal",
    "read s",
    "predicted s",
    "peak GB",
    "finite",
)

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
        "outputs/sparse_prefill.json"
    ),
    preset: Annotated[str, typer.Option(help="The model's shape.")] = "qwen2.5-7b",
    long: Annotated[str, typer.Option(help="Tokens of the long text.")] = "1M",
    middle: Annotated[str, typer.Option(help="Tokens of the medium-length text.")] = "256k",
    check: Annotated[str, typer.Option(help="Tokens of the text for checks.")] = "16k",
    minutes: Annotated[
        float, typer.Option(help="Start nothing further after this many minutes.")
    ] = 9.0,
    only: Annotated[
        list[str] | None, typer.Option(help="Among check, choose, middle, pieces and whole.")
    ] = None,
) -> None:
    """Runs all parts within the time limit."""
    config = {**SHAPES, **generate.PRESETS}.get(preset)
    if config is None:
        raise InputError(f"{preset!r} is not one of {', '.join(SHAPES)}")
    lengths = {"long": parse_tokens(long), "middle": parse_tokens(middle)}
    width = prompt_pieces(config, jax.default_backend(), packed=False).widths[0]
    if any(length % width for length in lengths.values()):
        raise InputError(f"{lengths} must be multiples of a piece's {width} tokens")
    facts = machine() | {"benchmark": "sparse_prefill", "model": preset, **lengths}
    report = Report(out, facts, minutes=minutes)
    wanted = only or ["check", "choose", "middle", "pieces", "whole"]
    for name, heads in CHECKED.items() if "check" in wanted else ():
        shape = config
        if heads is not None:
            names = "num_attention_heads", "num_key_value_heads", "head_dim"
            shape = replace(config, **dict(zip(names, heads, strict=True)))
        run = partial(check_scores, report, shape, parse_tokens(check), name)
        guarded(report, "check", name, run)
    if "choose" in wanted:
        choose(report, config, lengths["long"], width)
    if {"middle", "pieces", "whole"} & set(wanted):
        read(report, config, lengths, width, wanted)
    show(f"sparse prefill on {report.facts.get('device')}", COLUMNS, report.rows)


def guarded(report: Report, what: str, name: str, run: Callable[[], Any]) -> Any:
    """Runs one part, unless out of time; a failure becomes a row."""
    if report.out_of_time():
        return None
    try:
        return run()
    except Exception as error:
        report.add({"what": what, "sparse": name, "failed": reason(error)})
        require_live_device()
        return None


# --- one piece ---------------------------------------------------------------------------------


def draw(config: LlamaConfig, tokens: int, keys: int) -> tuple[Array, Array]:
    """Queries [1, T, N, H] and keys [1, 1, S, K, H], some of which many queries match."""
    heads, kv_heads, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )

    @jax.jit
    def make(key: Array) -> tuple[Array, Array]:
        one, two, three = jax.random.split(key, 3)
        query = jax.random.normal(one, (1, tokens, heads, dim), jnp.bfloat16)
        keys_ = jax.random.normal(two, (1, 1, keys, kv_heads, dim), jnp.bfloat16)
        loud = jax.random.uniform(three, (1, 1, keys, 1, 1)) < 0.01
        return query, keys_ * jnp.where(loud, 2, 1).astype(jnp.bfloat16)

    return make(jax.random.key(0, impl="rbg"))


def rows_of(config: LlamaConfig, dca: DCAConfig, tokens: int, keys: int) -> Rows:
    """Rows of a piece at the end of the keys in a longer text, so that no tile is dense."""
    shape = (1, tokens, config.num_attention_heads, config.head_dim)
    whole = jnp.asarray([keys + 2 * tokens], jnp.int32)
    options = {"query_offset": keys - tokens, "context_lengths": whole}
    return make_rows(shape, dca=dca, rope=config.rope, **options)


def piece_of(query: Array, key: Array, rows: Rows) -> Piece:
    """The input of a selector."""
    zero = jnp.int32(0)
    whole = rows.lengths + 2 * query.shape[1]
    return Piece(query, key, zero, rows, whole, None, zero, zero)


def check_scores(report: Report, config: LlamaConfig, keys: int, heads: str) -> None:
    """Compares this device's scores with plain XLA's on the CPU, over DCA's three phases."""
    dca = DCAConfig(chunk_len=keys // 4 // 512 * 512 or BLOCK, max_query_position=keys // 3)
    tokens = min(1024, keys)
    query, key = draw(config, tokens, keys)
    rows = rows_of(config, dca, tokens, keys)
    sampled = (SampledRows(0.1, count) for count in (8, 16, 4))
    for selector in (*sampled, PooledQueries(0.1)):

        def scores(query: Array, key: Array, rows: Rows, selector: Any = selector) -> Any:
            piece = piece_of(query, key, rows)
            wanted = jnp.ones((1, piece.num_tiles), bool)
            blocks = Sparse(selector=selector, threshold=0).blocks(piece, dca)
            if isinstance(selector, PooledQueries):
                return jnp.where(selector.kept(piece, wanted, dca), 1.0, 0.0), blocks
            return selector.scores(piece, wanted, dca), blocks

        ours, blocks = jax.tree.map(np.asarray, jax.jit(scores)(query, key, rows))
        with jax.default_device(jax.devices("cpu")[0]):
            given = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (query, key, rows))
            theirs, expected = jax.tree.map(np.asarray, jax.jit(scores)(*given))
        tile = np.arange((keys - tokens) // BLOCK, keys // BLOCK)[:, None]
        met = np.arange(theirs.shape[3])[None, :] <= tile
        error = np.abs(np.where(met, ours - theirs, 0)).max() / np.abs(theirs).max()
        lists = zip(_listed(blocks), _listed(expected), strict=True)
        differ = sum(len(a ^ b) for a, b in lists)
        report.add(
            {
                "what": f"check, {heads}",
                "sparse": selector.name,
                "largest error": float(error),
                "blocks chosen otherwise": differ,
                "of": int(expected.counts.sum()),
                "finite": bool(np.isfinite(np.where(met, ours, 0)).all()),
            }
        )


def _listed(blocks: Any) -> list[set[int]]:
    counts, numbers = blocks.counts.sum(axis=3), blocks.numbers
    return [set(numbers[at][: counts[at]].tolist()) for at in np.ndindex(counts.shape)]


def choose(report: Report, config: LlamaConfig, keys: int, tokens: int) -> None:
    """Times one piece: attention to all keys, the choice, and attention to the chosen keys."""
    dca = DCAConfig.from_hf(QWEN_1M)
    query, key = draw(config, tokens, keys)
    value, rows = key[::-1], rows_of(config, dca, tokens, keys)
    one = {"dca": dca, "layer": jnp.int32(0)}
    how = {name: named(config, name) for name in (*CHOOSE, *ATTEND)}

    def dense(query: Array, key: Array, value: Array, rows: Rows) -> Array:
        return attend(query, key, value, rows=rows, **one)

    def lists(query: Array, key: Array, value: Array, rows: Rows, blocks: Any) -> Array:
        return attend(query, key, value, rows=rows, blocks=blocks, **one)

    def scores(query: Array, key: Array, rows: Rows) -> Array:
        piece = piece_of(query, key, rows)
        wanted = jnp.ones((1, piece.num_tiles), bool)
        selector = how["rows:0.05"].selector
        assert isinstance(selector, SampledRows)
        return selector.scores(piece, wanted, dca)

    def blocks(query: Array, key: Array, rows: Rows, *, name: str) -> Any:
        return how[name].blocks(piece_of(query, key, rows), dca)

    some = query, key, rows
    like = jax.eval_shape(partial(blocks, name=ATTEND[0]), *some)
    with ThreadPoolExecutor() as pool:
        of_dense = start_compiling(pool, dense, query, key, value, rows)
        of_lists = start_compiling(pool, lists, query, key, value, rows, like)
        of_scores = start_compiling(pool, scores, *some)
        of_blocks = {name: start_compiling(pool, partial(blocks, name=name), *some) for name in how}
    whole: list[float] = []

    def note(what: str, name: str, run: Future, *arrays: Any, share: float | None = None) -> None:
        found = timed(run.result(), *arrays).median
        row = {"what": what, "sparse": name, "ms": found, "share": share}
        if whole:
            row["of dense"] = found / whole[0]
            row["of ideal"] = None if share is None else whole[0] * share / found
        report.add(row)
        if run is of_dense:
            whole.append(found)

    def of_chosen(name: str) -> None:
        chosen = of_blocks[name].result()(*some)
        share = float(chosen.counts.sum()) / _all_blocks(chosen.counts.shape, keys, tokens)
        arrays = query, key, value, rows, chosen
        note("attention, chosen keys", name, of_lists, *arrays, share=share)

    arrays = query, key, value, rows
    run = partial(note, "attention, all keys", "off", of_dense, *arrays)
    guarded(report, "attention, all keys", "off", run)
    run = partial(note, "scores", "rows", of_scores, *some)
    guarded(report, "scores", "rows", run)
    for name in CHOOSE:
        run = partial(note, "scores, best, lists", name, of_blocks[name], *some)
        guarded(report, "scores, best, lists", name, run)
    for name in ATTEND:
        guarded(report, "attention, chosen keys", name, partial(of_chosen, name))


def _all_blocks(shape: tuple[int, ...], keys: int, tokens: int) -> float:
    """Number of blocks that a piece's tiles can attend to, over all kv heads."""
    first, last = (keys - tokens) // BLOCK, keys // BLOCK
    return shape[0] * shape[1] * sum(range(first + 1, last + 1))


# --- whole prompts -----------------------------------------------------------------------------


def named(config: LlamaConfig, name: str) -> Sparse:
    """A setting without threshold, so that even short texts are read sparsely."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    # needs a checkpoint's table: this one has the same pattern for every head
    if name == "qwen-1m":
        vertical, slash = (((count,) * heads,) * layers for count in LINES)
        return Sparse(selector=VerticalSlash(vertical=vertical, slash=slash), threshold=0)
    found = choose_sparse(name, None, layers=layers, heads=heads)
    assert found is not None
    return replace(found, threshold=0)


def read(
    report: Report, config: LlamaConfig, lengths: dict[str, int], width: int, wanted: list[str]
) -> None:
    """Times the medium text, pieces of the long one, and the whole long one if time allows."""
    random = generate.random_model(config, dca=True, implementation=None)
    options = {"dca": DCAConfig.from_hf(QWEN_1M), "dtype": jnp.bfloat16}

    def model(name: str) -> Llama:
        how = None if name == "off" else named(config, name)
        return Llama.from_params(config, random.params(), sparse=how, **options)

    models = {name: model(name) for name in {**dict.fromkeys(MIDDLE), **dict.fromkeys(LONG)}}
    if "middle" in wanted:
        reader = Reader(report, models, lengths["middle"], width)
        cache, dense = reader.start(MIDDLE), None
        for name in MIDDLE:
            seconds, cache = reader.whole("middle", name, cache)
            dense = seconds if name == "off" else dense
            if seconds is not None:
                of = None if dense is None else seconds / dense
                row = {"what": "middle", "sparse": name, "tokens": lengths["middle"]}
                report.add(row | {"read s": seconds, "of dense": of, "peak GB": peak()})
        del cache, reader
    if not {"pieces", "whole"} & set(wanted) or report.out_of_time():
        return
    reader, said = Reader(report, models, lengths["long"], width), dict.fromkeys(LONG, 0.0)
    cache = reader.start(LONG)
    for name in LONG if "pieces" in wanted else ():
        found, cache = reader.pieces(name, cache)
        said[name] = found or 0.0
    for name in LONG if "whole" in wanted else ():
        times, more = SPARE
        needed, left = times * said[name] + more, 60 * report.minutes_left()
        row = {"what": "whole", "sparse": name, "tokens": lengths["long"]}
        if needed > left:
            report.add(row | {"failed": f"not read: it needs {needed:.0f} s, {left:.0f} are left"})
            continue
        seconds, cache = reader.whole("whole", name, cache)
        if seconds is not None:
            report.add(row | {"read s": seconds, "predicted s": said[name], "peak GB": peak()})


class Reader:
    """Reads one random text through one cache, with models that differ in how they read."""

    def __init__(self, report: Report, models: dict[str, Llama], length: int, width: int) -> None:
        self.report, self.models, self.length, self.width = report, models, length, width
        model = next(iter(models.values()))
        shape = 1, length
        text = np.random.default_rng(0).integers(0, model.config.vocab_size, shape)
        self.model, self.text = model, text.astype(np.int32)
        self.programs: dict[str, Future] = {}

    def start(self, names: Iterable[str]) -> KVCache:
        """Makes a cache of random numbers after compiling the programs of these models."""
        cache = self.filled()
        jitted = jax.jit(steps.read, donate_argnames="cache", compiler_options=compiler_options())
        tokens, number = self.text[:, : self.width], np.asarray([self.width], np.int32)
        with ThreadPoolExecutor() as pool:
            for name in names:
                hidden = empty_hidden(self.model, 1)
                arguments = self.models[name], cache, hidden, tokens, number, number
                try:
                    compiling = jitted.lower(*arguments).compile
                    self.programs[name] = pool.submit(compiling)
                except Exception as error:  # an unsupported shape: raised where the result is used
                    self.programs[name] = Future()
                    self.programs[name].set_exception(error)
        return cache

    def filled(self) -> KVCache:
        """A new cache."""
        return filled_cache(self.model, capacity_bucket(self.length))

    def piece(self, name: str, cache: KVCache, place: int) -> tuple[Array, KVCache]:
        """Reads one piece and waits for it."""
        program = self.programs[name].result()
        return step(program, self.models[name], cache, self.text, place, self.width)

    def whole(self, what: str, name: str, cache: KVCache) -> tuple[float | None, KVCache]:
        """Seconds of reading the text from its first token to its last; None if it failed."""

        def run() -> tuple[float, KVCache]:
            _, read = self.piece(name, at(cache, 0), 0)  # warm-up, not counted
            start, read = time.perf_counter(), at(read, 0)
            for place in range(0, self.length, self.width):
                hidden, read = self.piece(name, read, place)
            seconds = time.perf_counter() - start
            if not np.isfinite(np.asarray(hidden, np.float32)).all():
                self.report.add({"what": what, "sparse": name, "finite": False})
            return seconds, read

        return self._guarded(what, name, cache, run)

    def pieces(self, name: str, cache: KVCache) -> tuple[float | None, KVCache]:
        """Times pieces along the text; returns the seconds that a line predicts for the whole."""

        def run() -> tuple[float, KVCache]:
            last = self.length // self.width - 1
            places = [round(n * last / (PLACES - 1)) * self.width for n in range(PLACES)]
            places[-1] -= self.width * (last > 1)  # the end of the last piece is read densely
            read, line = cache, []
            for place in places:
                seconds = []
                for _ in range(2):
                    read = at(read, place)
                    start = time.perf_counter()
                    hidden, read = self.piece(name, read, place)
                    seconds.append(time.perf_counter() - start)
                line.append(min(seconds))
                finite = bool(np.isfinite(np.asarray(hidden, np.float32)).all())
                row = {"what": "piece", "sparse": name, "tokens before": place}
                self.report.add(row | {"ms": line[-1] * 1e3, "finite": finite})
            slope, base = np.polyfit(places, line, 1)
            said = sum(base + slope * place for place in range(0, self.length, self.width))
            row = {"what": "line", "sparse": name, "tokens": self.length}
            self.report.add(row | {"predicted s": float(said)})
            return float(said), read

        return self._guarded("pieces", name, cache, run)

    def _guarded(
        self, what: str, name: str, cache: KVCache, run: Callable[[], tuple[float, KVCache]]
    ) -> tuple[float | None, KVCache]:
        """The result and the cache, or a new cache if the old one was donated."""
        found = guarded(self.report, what, name, run)
        if found is not None:
            return found
        return None, self.filled() if cache.key.is_deleted() else cache


def peak() -> float | None:
    """The largest memory in use so far, in GB."""
    found = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return found and found / 1e9


if __name__ == "__main__":
    app()
