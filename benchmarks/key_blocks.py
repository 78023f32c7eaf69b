"""Attention over lists of key blocks and through pages, on one GPU: correctness and speed.

    python benchmarks/key_blocks.py measure --minutes 5 --out outputs/key_blocks.json

First, small cases of every head_dim are compared with the masked oracle in float32: `error` is the
relative distance from it, and `equal` says whether two variants agree bit for bit (a full list and
no list, where chunks are whole blocks; shuffled pages and no pages). Where quiet blocks are skipped
(skip-softmax), the oracle is plain XLA, and `moved` is the distance from reading them. Second,
times for the last queries of a long text with the shape of Qwen2.5-7B-1M: lists of a random `share`
of the blocks (`kept` includes the edges that every tile reads), where `of ideal` is the dense time
times the share kept, divided by the measured time, including the sorting of queries into tiles; and
skip-softmax over all blocks, with all or few of them loud. Third, decoding over the layers of a
cache as in a model, through shuffled pages of several sizes; there `of ideal` is the time without
pages divided by the measured time.
"""

import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from common import (
    Report,
    machine,
    merged,
    numbers,
    reason,
    require_live_device,
    say,
    show,
    start_compiling,
    timed,
)
from jaxtyping import Array

from dca_jax import DCAConfig, RopeConfig
from dca_jax.attention import attend
from dca_jax.attention.backend import KeyBlocks, Rows
from dca_jax.attention.blocks import BLOCK, edge_blocks, full_blocks, key_blocks, num_tiles
from dca_jax.attention.mosaic_gpu import flash_forward
from dca_jax.attention.mosaic_gpu.forward_tiles import LIST_TILES
from dca_jax.attention.op import make_rows
from dca_jax.attention.stored import Scales, quantize
from dca_jax.dca import PHASES, key_range
from dca_jax.distributed import exit_on_input_error

QWEN = DCAConfig(chunk_len=253_952, max_query_position=262_144)
SKIP = 0.1  # lambda of skip-softmax: small relative to loud keys, large relative to quiet ones
LOUD = 1.0, 0.1  # shares of the blocks
CHAIN = 0.02  # estimated seconds of a chain of decoding calls
KEY = ("what", "keys", "batch", "variant")
COLUMNS = (*KEY, "kept", "ms", "of ideal", "of dense", "error", "equal", "moved")

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__
)


@app.command()
@exit_on_input_error()
def measure(
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/key_blocks.json"
    ),
    implementation: Annotated[str, typer.Option(help="The backend.")] = "mosaic_gpu",
    what: Annotated[
        str, typer.Option(help="Among check, lists and decode.")
    ] = "check,lists,decode",
    head_dims: Annotated[
        str, typer.Option(help="Values of head_dim for the checks.")
    ] = "64,128,256",
    lengths: Annotated[str, typer.Option(help="Keys of the texts.")] = "128k,1024k",
    queries: Annotated[
        int, typer.Option(help="Number of queries at the end of a text, read with lists.")
    ] = 4096,
    shares: Annotated[str, typer.Option(help="Percent of the blocks in a list.")] = "100,10,5,2",
    heads: Annotated[str, typer.Option(help="Query and kv heads.")] = "28/4",
    head_dim: Annotated[int, typer.Option(help="Elements per head.")] = 128,
    decoded: Annotated[str, typer.Option(help="Keys per row in decoding.")] = "128k",
    batches: Annotated[str, typer.Option(help="Rows decoded together.")] = "1,8",
    pages: Annotated[str, typer.Option(help="Tokens per page.")] = "128,256,1k",
    minutes: Annotated[
        float, typer.Option(help="Start no further measurement after this many minutes.")
    ] = math.inf,
) -> None:
    """Checks, then times; each case on its own, so that a failure does not affect the others."""
    report = Report(out, machine() | {"benchmark": "key_blocks", "heads": heads}, minutes=minutes)
    wanted = [word.strip() for word in what.split(",")]
    query_heads, kv_heads = map(int, heads.split("/"))
    shape = query_heads, kv_heads, head_dim
    with ThreadPoolExecutor() as pool:
        if "check" in wanted:
            for dim in numbers(head_dims):
                check(report, implementation, dim)
        if "lists" in wanted:
            for keys in numbers(lengths):
                time_lists(report, implementation, keys, queries, shape, numbers(shares), pool)
        if "decode" in wanted:
            for batch in numbers(batches):
                sizes = numbers(decoded)[0], batch, *shape
                time_decoding(report, implementation, sizes, numbers(pages), pool)
    show("Lists of key blocks, and pages", COLUMNS, report.rows)


@app.command("show")
@exit_on_input_error()
def show_files(
    files: Annotated[list[Path], typer.Argument(help="JSON files from `measure`.")],
) -> None:
    """Prints the rows of one or more files as a table; of repeated rows, the last one."""
    facts, rows = merged(files, KEY)
    show(f"Lists of key blocks, and pages, on {facts['device']}", COLUMNS, rows)


def guarded(report: Report, row: dict[str, Any], fill: Callable[[], dict[str, Any]]) -> None:
    """Adds the row with the results of `fill`, or with the reason for its failure."""
    if report.out_of_time():
        return
    try:
        row = row | fill()
    except Exception as error:
        row = row | {"failed": reason(error)}
        report.add(row)
        require_live_device()
        return
    report.add(row)


# --- correctness -------------------------------------------------------------------------------


class Case(NamedTuple):
    """Queries of two rows, and a cache of two layers with their keys, contiguous and in pages.

    `page_table` holds the place of each row's pages in the pools, in shuffled order.
    """

    query: Array
    key: Array  # [2, B, S, K, H]
    value: Array
    key_pool: Array  # [2, P, page, K, H]
    value_pool: Array
    page_table: Array
    rows: Rows
    dca: DCAConfig

    @classmethod
    def of(
        cls,
        dca: DCAConfig,
        offset: list[int],
        num_queries: int,
        heads: tuple[int, int, int],
        page: int,
        dtype: Any = jnp.bfloat16,
    ) -> "Case":
        """Random inputs; with many queries, all rows but the first end in padding."""
        query_heads, kv_heads, dim = heads
        capacity = -(-(max(offset) + num_queries) // page) * page
        batch, count = len(offset), capacity // page
        draw = np.random.default_rng(capacity)
        query, key, value = (
            jnp.asarray(draw.normal(size=shape), dtype)
            for shape in (
                (batch, num_queries, query_heads, dim),
                (2, batch, capacity, kv_heads, dim),
                (2, batch, capacity, kv_heads, dim),
            )
        )
        where = draw.permutation(batch * count + 3)[: batch * count].astype(np.int32)
        padding = 37 if num_queries > 37 else 0
        ends = [start + num_queries - padding * (row > 0) for row, start in enumerate(offset)]
        rows = make_rows(
            query.shape,
            dca=dca,
            rope=RopeConfig(),
            lengths=jnp.asarray(ends, jnp.int32),
            query_offset=jnp.asarray(offset, jnp.int32),
        )
        key_pool, value_pool = (in_pages(x, where, page) for x in (key, value))
        table = jnp.asarray(where.reshape(batch, count))
        return cls(query, key, value, key_pool, value_pool, table, rows, dca)

    def blocks(self, share: float) -> KeyBlocks:
        """Lists of about this share of the blocks."""
        batch, num_queries = self.query.shape[:2]
        count = -(-self.key.shape[2] // BLOCK)
        shape = batch, self.key.shape[3], num_tiles(num_queries), count
        kept = jnp.asarray(np.random.default_rng(3).random(shape) < share)
        return key_blocks(kept, rows=self.rows, dca=self.dca, most=count)


def in_pages(x: Array, where: np.ndarray, page: int) -> Array:
    """[2, B, S, ...] as a pool [2, P, page, ...] with three extra pages of NaN, never read."""
    pieces = x.reshape(2, -1, page, *x.shape[3:])
    pool = jnp.full((2, pieces.shape[1] + 3, *pieces.shape[2:]), 99, x.dtype)
    return pool.at[:, where].set(pieces)


class Programs:
    """Compiled attention: each program once, traced sequentially and compiled in threads."""

    def __init__(self, name: str, pool: Executor) -> None:
        self.name, self._pool = name, pool
        self._lock, self._found = threading.Lock(), {}

    def run(self, case: Case, key: Array, value: Array, **options: Any) -> Array:
        """Attention of the second layer."""
        return self._run(self.name, case, key, value, options)

    def run_dense_with_list_tiles(self, case: Case) -> Array:
        """The Hopper kernel without a list, but with the tiles it uses with lists."""

        def attention(query: Array, key: Array, value: Array, rows: Rows) -> Array:
            options = {"dca": case.dca, "phases": PHASES, "with_lse": False}
            tiles = LIST_TILES[case.query.shape[3]]
            layer = jnp.int32(1)
            return flash_forward.forward(query, key, value, layer, rows, tiles=tiles, **options)[0]

        return self._compiled("dense", attention, case.query, case.key, case.value, case.rows)

    def definition(self, case: Case, **options: Any) -> Array:
        """The dense oracle's output, in float32."""
        query, key, value = (x.astype(jnp.float32) for x in case[:3])
        wide = case._replace(query=query)
        with jax.default_matmul_precision("highest"):
            return self._run("reference", wide, key, value, options)

    def plainly(self, case: Case, **options: Any) -> Array:
        """Plain XLA's output, in float32."""
        query, key, value = (x.astype(jnp.float32) for x in case[:3])
        with jax.default_matmul_precision("highest"):
            return self._run("xla", case._replace(query=query), key, value, options)

    def _run(self, name: str, case: Case, key: Array, value: Array, options: Any) -> Array:
        def attention(query: Array, key: Array, value: Array, rows: Rows, options: Any) -> Array:
            static = {"dca": case.dca, "implementation": name, "layer": jnp.int32(1)}
            return attend(query, key, value, rows=rows, **static, **options)

        return self._compiled(
            (name, case.dca), attention, case.query, key, value, case.rows, options
        )

    def _compiled(self, label: Any, function: Callable[..., Array], *arguments: Any) -> Array:
        leaves, tree = jax.tree.flatten(arguments)
        key = label, tree, tuple((x.shape, x.dtype) for x in leaves)
        with self._lock:
            if key not in self._found:
                self._found[key] = start_compiling(self._pool, function, *arguments)
        return self._found[key].result()(*arguments)


def check(report: Report, name: str, dim: int) -> None:
    """Checks lists and pages of one head_dim at the edges."""
    page, whole = 256, dim == 128  # the others in part, since compiling takes most of the time
    cases = {
        "s = 512": Case.of(chunks(512, 700), [1536, 512], 640, (8, 2, dim), page),
        "s = 300": Case.of(chunks(300, 400), [1003, 130], 500, (4, 4, dim), page),
    }
    if whole:
        cases["s = 40"] = Case.of(chunks(40, 60), [77, 1], 300, (6, 1, dim), page)
    few = Case.of(chunks(300, 400), [1400, 40], 1, (8, 2, dim), page)
    with ThreadPoolExecutor() as compiling, ThreadPoolExecutor() as running:
        programs = Programs(name, compiling)
        tests = [(f"one query: {title}", test) for title, test in of_pages(programs, few, True)]
        for said, case in cases.items():
            found = (
                *of_lists(programs, case),
                *of_pages(programs, case, said == "s = 512" and whole),
            )
            tests += [(f"{said}: {title}", test) for title, test in found]
        for title, future in [(title, running.submit(test)) for title, test in tests]:
            guarded(report, {"what": f"check {dim}", "variant": title}, future.result)


def chunks(chunk_len: int, largest: int) -> DCAConfig:
    """The DCA setting with this s and Q."""
    return DCAConfig(chunk_len=chunk_len, max_query_position=largest)


Test = Callable[[], dict[str, Any]]


def of_lists(programs: Programs, case: Case) -> Iterator[tuple[str, Test]]:
    """Tests of one case, by name."""
    keys = case.key, case.value

    def beside_oracle(share: float) -> dict[str, Any]:
        options = {"blocks": case.blocks(share)}
        found = programs.run(case, *keys, **options)
        return {"error": relative(found, programs.definition(case, **options))}

    def full() -> dict[str, Any]:
        listed = programs.run(case, *keys, blocks=case.blocks(1.0))
        if programs.name != "mosaic_gpu" or case.dca.chunk_len % BLOCK:
            return {"error": relative(listed, programs.run(case, *keys))}
        expected = programs.run_dense_with_list_tiles(case)
        return {"equal": same(listed, expected), "error": relative(listed, expected)}

    def paged() -> dict[str, Any]:
        options: dict[str, Any] = {"blocks": case.blocks(0.3)}
        expected = programs.run(case, *keys, **options)
        options["pages"] = case.page_table
        return {
            "equal": same(programs.run(case, case.key_pool, case.value_pool, **options), expected)
        }

    def passed_by() -> dict[str, Any]:
        quiet = case._replace(key=with_loud_blocks(case.key, 0.5))
        options = {"blocks": case.blocks(1.0)._replace(skip=jnp.log(jnp.full(2, SKIP)))}
        found = programs.run(case, quiet.key, case.value, **options)
        every = programs.run(case, quiet.key, case.value, blocks=case.blocks(1.0))
        error = relative(found, programs.plainly(quiet, **options))
        return {"error": error, "moved": relative(found, every)}

    yield "30 %", functools.partial(beside_oracle, 0.3)
    yield "nothing but edges", functools.partial(beside_oracle, 0.0)
    yield "full list, dense", full
    yield "30 %, pages", paged
    if (
        programs.name == "mosaic_gpu"
        and case.query.shape[3] < 256
        and not case.dca.chunk_len % BLOCK
    ):
        yield "quiet blocks passed by", passed_by


def with_loud_blocks(key: Array, share: float) -> Array:
    """Keys [L, B, S, K, H]: the first block and random others are loud, most are quiet."""
    chance = np.random.default_rng(11).random(-(-key.shape[2] // BLOCK))
    loud = (chance < share) | (np.arange(len(chance)) == 0)
    factor = np.where(loud, 3, 0.05).repeat(BLOCK)[: key.shape[2]]
    return key * jnp.asarray(factor, key.dtype)[None, None, :, None, None]


def of_pages(programs: Programs, case: Case, in_8_bits: bool) -> Iterator[tuple[str, Test]]:
    """Tests of one case, by name."""

    def paged() -> dict[str, Any]:
        expected = programs.run(case, case.key, case.value)
        found = programs.run(case, case.key_pool, case.value_pool, pages=case.page_table)
        error = relative(found, programs.definition(case))
        return {"equal": same(found, expected), "error": error}

    def quantized() -> dict[str, Any]:
        keys, scales, pools, scale_pools = [], [], [], []
        page, where = case.key_pool.shape[2], np.asarray(case.page_table).ravel()
        for x in (case.key, case.value):
            q, scale = quantize(x, jnp.int8)
            keys.append(q)
            scales.append(jnp.swapaxes(scale, 2, 3))
            pools.append(in_pages(q, where, page))
            scale_pools.append(jnp.swapaxes(in_pages(scale, where, page), 2, 3))
        expected = programs.run(case, *keys, scales=Scales(*scales))
        options = {"scales": Scales(*scale_pools), "pages": case.page_table}
        return {"equal": same(programs.run(case, *pools, **options), expected)}

    yield "pages", paged
    if in_8_bits:
        yield "pages, int8", quantized


def relative(found: Array, expected: Array) -> float:
    """Relative distance of the worst row and head."""
    ours, theirs = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (found, expected))
    size = np.linalg.norm(theirs, axis=(2, 3))
    return float((np.linalg.norm(ours - theirs, axis=(2, 3)) / np.maximum(size, 1e-9)).max())


def same(found: Array, expected: Array) -> str:
    """Whether two arrays are equal bit for bit; otherwise how many numbers differ."""
    differ = int((np.asarray(found) != np.asarray(expected)).sum())
    return "yes" if differ == 0 else f"no: {differ} of {found.size} differ"


# --- speed: lists ------------------------------------------------------------------------------


def time_lists(
    report: Report,
    name: str,
    keys: int,
    queries: int,
    shape: tuple[int, int, int],
    percents: list[int],
    pool: Executor,
) -> None:
    """Times the last queries of a text, densely and over lists."""
    query_heads, kv_heads, dim = shape
    if report.out_of_time():
        return
    row: dict[str, Any] = {"what": "lists", "keys": keys, "batch": 1}
    query = normal(0, (1, queries, query_heads, dim))
    key, value = (normal(seed, (1, keys, kv_heads, dim)) for seed in (1, 2))
    start = jnp.asarray([keys - queries], jnp.int32)
    rows = make_rows(query.shape, dca=QWEN, rope=RopeConfig(), query_offset=start)

    @jax.jit
    def run(query: Array, key: Array, value: Array, rows: Rows, blocks: Any) -> Array:
        options = {"dca": QWEN, "implementation": name, "blocks": blocks}
        return attend(query, key, value, rows=rows, **options)

    texts = Tiles.of(keys, queries)
    lists: dict[str, Any] = {"dense": None}
    for percent in percents:
        lists[f"lists of {percent} %"] = texts.lists(rows, kv_heads, percent / 100)
    arrays = query, key, value, rows
    compiled = {x: start_compiling(pool, run, *arrays, lists[x]) for x in lists}
    every = texts.lists(rows, kv_heads, 1.0)
    with_skip = every._replace(skip=jnp.zeros(1))
    skipping = start_compiling(pool, run, *arrays, with_skip)
    wait([*compiled.values(), skipping])  # compiling and timing would disturb each other
    dense = math.nan

    def time(title: str) -> dict[str, Any]:
        nonlocal dense
        blocks = lists[title]
        ms = timed(compiled[title].result(), *arrays, blocks).median
        if blocks is None:
            dense = ms
            return {"ms": ms, "kept": 1.0}
        kept = texts.share_read(blocks)
        return {"ms": ms, "kept": kept, "of ideal": dense * kept / ms}

    def time_skipping(keys: Array) -> dict[str, Any]:
        blocks = every._replace(skip=jnp.log(jnp.full(1, SKIP)))
        ms = timed(skipping.result(), query, keys, value, rows, blocks).median
        return {"ms": ms, "of dense": ms / dense}

    for title in lists:
        guarded(report, row | {"variant": title}, functools.partial(time, title))
    for share in LOUD:
        title = f"skip-softmax, {share:.0%} of the blocks loud"
        loud = with_loud_blocks(key[None], share)[0]
        guarded(report, row | {"variant": title}, functools.partial(time_skipping, loud))


class Tiles(NamedTuple):
    """The tiles of a text's last queries: which blocks are full, and how many are edges."""

    full: np.ndarray  # [tiles, blocks]
    edges: np.ndarray  # [tiles]

    @classmethod
    def of(cls, keys: int, queries: int) -> "Tiles":
        """The tiles of a text with this many keys; its last queries begin at a multiple of 128."""
        tile = (keys - queries) // BLOCK + np.arange(num_tiles(queries))
        tile = jnp.asarray(tile[tile * BLOCK < keys], jnp.int32)
        number, full, edges = np.arange(-(-keys // BLOCK)), False, 0
        for phase in PHASES:
            begin, end = full_blocks(tile, phase, QWEN)
            start = key_range(tile * BLOCK, phase, QWEN)[0]
            stop = jnp.clip(key_range(tile * BLOCK + (BLOCK - 1), phase, QWEN)[1], 0, keys)
            (_, before), (_, after) = edge_blocks(start, stop, (begin, end))
            edges = edges + np.asarray(before + after)
            begin, end = (np.asarray(x)[:, None] for x in (begin, end))
            full = full | ((begin <= number) & (number < end))
        return cls(np.asarray(full), np.asarray(edges))

    def lists(self, rows: Rows, kv_heads: int, share: float) -> KeyBlocks:
        """This many of each tile's full blocks, chosen at random for each kv head."""
        chance = np.random.default_rng(7).random((kv_heads, *self.full.shape), np.float32)
        rank = np.argsort(np.argsort(np.where(self.full, chance, 2), axis=2), axis=2)
        wanted = np.round(share * self.full.sum(axis=1)).astype(int)
        kept = self.full & (rank < wanted[:, None])
        absent = num_tiles(BLOCK * len(self.full)) - len(self.full)
        kept = np.pad(kept, ((0, 0), (0, absent), (0, 0)))[None]
        make = jax.jit(functools.partial(key_blocks, dca=QWEN, most=max(int(wanted.max()), 1)))
        return make(jnp.asarray(kept), rows=rows)

    def share_read(self, blocks: KeyBlocks) -> float:
        """Share of the dense kernel's blocks that are read, edges included."""
        listed = np.asarray(blocks.counts).sum(axis=(2, 3)).mean()
        return float((listed + self.edges.sum()) / (self.full.sum() + self.edges.sum()))


@functools.partial(jax.jit, static_argnums=(0, 1))
def normal(seed: int, shape: tuple[int, ...]) -> Array:
    """Normal numbers in bfloat16."""
    return jax.random.normal(jax.random.key(seed, impl="rbg"), shape, jnp.bfloat16)


# --- speed: decoding ---------------------------------------------------------------------------


def time_decoding(
    report: Report,
    name: str,
    shape: tuple[int, int, int, int, int],
    pages: list[int],
    pool: Executor,
) -> None:
    """Times one query per row through all layers of a cache, without and with pages."""
    keys, batch, query_heads, kv_heads, dim = shape
    if report.out_of_time():
        return
    size = 4 * batch * keys * kv_heads * dim  # bytes of one layer's keys and values
    layers = max(2, math.ceil(1e9 / size)) if size > 1e6 else 2
    calls = layers * max(1, round(CHAIN / (size / 4e12) / layers)) if size > 1e6 else layers
    query = normal(0, (batch, 1, query_heads, dim))
    caches = [normal(seed, (layers, batch, keys, kv_heads, dim)) for seed in (1, 2)]
    lengths = jnp.full((batch,), keys, jnp.int32)

    @jax.jit
    def chain(query: Array, key: Array, value: Array, lengths: Array, table: Any) -> Array:
        options = {"dca": QWEN, "rope": RopeConfig(), "lengths": lengths}
        rows = make_rows(query.shape, query_offset=lengths - 1, **options)

        def call(n: Array, query: Array) -> Array:
            options = {"layer": jax.lax.rem(n, jnp.int32(layers)), "pages": table}
            out = attend(query, key, value, dca=QWEN, rows=rows, implementation=name, **options)
            return query + out * jnp.asarray(2**-10, query.dtype)

        return jax.lax.fori_loop(0, calls, call, query)

    def inputs(page: int | None, shuffled: bool) -> tuple[Any, ...]:
        if page is None:
            return query, *caches, lengths, None
        count = batch * keys // page
        where = np.random.default_rng(5).permutation(count) if shuffled else np.arange(count)
        table = jnp.asarray(where.reshape(batch, -1), jnp.int32)
        pools = [x.reshape(layers, count, page, kv_heads, dim) for x in caches]
        return query, *pools, lengths, table

    compiled = {
        page: start_compiling(pool, chain, *jax.eval_shape(functools.partial(inputs, page, False)))
        for page in (None, *pages)
    }
    wait(compiled.values())
    row: dict[str, Any] = {"what": "decode", "keys": keys, "batch": batch}
    plain = math.nan

    def time(page: int | None, shuffled: bool) -> dict[str, Any]:
        nonlocal plain
        ms = timed(compiled[page].result(), *inputs(page, shuffled)).median / calls
        if page is None:
            plain = ms
            return {"ms": ms}
        return {"ms": ms, "of ideal": plain / ms}

    guarded(report, row | {"variant": "no pages"}, functools.partial(time, None, False))
    for page, shuffled in itertools.product(pages, (False, True)):
        order = "in any order" if shuffled else "in order"
        title = {"variant": f"pages of {page}, {order}"}
        guarded(report, row | title, functools.partial(time, page, shuffled))
    say(f"{calls} calls a chain, {layers} layers")


if __name__ == "__main__":
    app()
