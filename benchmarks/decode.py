"""Decode attention on one GPU: one query per row over a long KV cache, against copy bandwidth.

    python benchmarks/decode.py measure --lengths 32k,128k --batches 1,8 --out outputs/decode.json

A decoding step reads every key and value once, so it is compared with the rate at which the device
copies, measured in the same run: `share` is the time that reading those bytes takes at that rate,
divided by the measured time. Calls are chained in one compiled loop over the layers of a cache that
is too large for the device's L2 cache, as in a model. Times are per call, without Python, and
include the loop's own overhead, which `empty loop` shows.

Our variants read a layer in place in a cache [L, B, S, K, H], on every available backend, with DCA
and with plain causal attention, and from 8-bit caches. For those, `share` counts their own bytes,
including scales, and `error` is the relative distance of the worst head's output from that of plain
XLA on the same numbers with a float32 query. The peers are plain attention. They get separate
arrays per layer (Pallas in its preferred layout), so that none has to copy a layer.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import typer
from common import (
    Report,
    copy_bandwidth,
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
from dca_jax.attention.backend import Rows
from dca_jax.attention.mosaic_gpu.decode_tiles import DecodeTiles
from dca_jax.attention.mosaic_gpu.few_queries import decode as decode_on_hopper
from dca_jax.attention.op import BACKENDS, make_rows
from dca_jax.attention.stored import Scales
from dca_jax.dca import phases_within
from dca_jax.device import current_device
from dca_jax.distributed import exit_on_input_error
from dca_jax.dtypes import CACHE_DTYPES

DCA, ROPE = DCAConfig.paper(4096), RopeConfig()
CACHE = 0.5e9  # least bytes of keys and values per chain: 8 times the H200's L2 cache
MIN_LAYERS, MAX_LAYERS = 2, 32
CHAIN = 0.02  # seconds a chain should take at the copy bandwidth
KEY = ("keys", "batch", "lengths", "variant")
COLUMNS = (*KEY, "us", "GB/s", "share", "error")

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__
)

# Query [B, 1, N, H], keys and values, the rows, and which layer: the output.
Decode = Callable[[Array, Array, Array, Rows, Array], Array]


class Variant(NamedTuple):
    """A way to compute decode attention, over a stack of layers or a list of them."""

    name: str
    decode: Decode
    stacked: bool
    heads_first: bool = False  # keys and values are [B, K, S, H]
    cache: str | None = None  # "int8" or "fp8": pairs of values and of scales [B, K, S]

    def bytes_of_token(self, kv_heads: int, head_dim: int) -> int:
        """Bytes of one token's keys and values."""
        return 2 * kv_heads * (2 * head_dim if self.cache is None else head_dim + 4)


class Chain(NamedTuple):
    """A loop of `calls` calls; `run` takes `make_inputs()` and the rows' lengths."""

    run: Callable[[Array, Any, Any, Array], Array]
    calls: int
    make_inputs: Callable[[], tuple[Array, Any, Any]]


@app.command()
@exit_on_input_error()
def measure(
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/decode.json"
    ),
    lengths: Annotated[
        str, typer.Option(help="Keys per row, separated by commas; 4k is 4096.")
    ] = "4k,8k,16k,32k,64k,128k,256k",
    batches: Annotated[str, typer.Option(help="Rows decoded together.")] = "1,8",
    heads: Annotated[str, typer.Option(help="Query and kv heads.")] = "32/8",
    head_dim: Annotated[int, typer.Option(help="Elements per head.")] = 128,
    variants: Annotated[
        str, typer.Option(help="Only variants whose name contains one of these.")
    ] = "",
    tiles: Annotated[
        str,
        typer.Option(
            help="Of mosaic_gpu over caches in 8 bits: keys a block, stages and CTAs to try, as "
            "64x4x264,128x3x132."
        ),
    ] = "",
    minutes: Annotated[
        float, typer.Option(help="Start no further measurement after this many minutes.")
    ] = math.inf,
) -> None:
    """Times decode attention: microseconds per call, GB/s, and share of the copy bandwidth.

    A batch is measured with all rows full, and with ragged rows of 1/B, 2/B ... of the keys.
    """
    query_heads, kv_heads = map(int, heads.split("/"))
    wanted = [word.strip() for word in variants.split(",") if word.strip()]
    bandwidth = copy_bandwidth()
    say(f"copy bandwidth {bandwidth / 1e12:.3f} TB/s")
    facts = {"benchmark": "decode", "copy GB/s": bandwidth / 1e9}
    facts |= {"heads": heads, "head_dim": head_dim}
    report = Report(out, machine() | facts, minutes=minutes)
    with ThreadPoolExecutor() as pool:
        for keys, batch in itertools.product(numbers(lengths), numbers(batches)):
            if report.out_of_time():
                break
            shape = batch, keys, query_heads, kv_heads, head_dim
            chosen = [
                variant
                for variant in (*all_variants(shape), *of_tiles(tiles))
                if not wanted or any(word in variant.name for word in wanted)
            ]
            compare(report, shape, start_all(chosen, shape, bandwidth, pool), bandwidth)
    show(f"Decode attention, copying at {bandwidth / 1e9:.0f} GB/s", COLUMNS, report.rows)


@app.command("show")
@exit_on_input_error()
def show_files(
    files: Annotated[list[Path], typer.Argument(help="JSON files from `measure`.")],
) -> None:
    """Prints the rows of one or more files as a table; of repeated rows, the last one."""
    facts, rows = merged(files, KEY)
    show(f"Decode attention on {facts['device']}", COLUMNS, rows)


def start_all(
    variants: Iterable[Variant], shape: tuple[int, ...], bandwidth: float, pool: Executor
) -> list[tuple[Variant, Chain, Future]]:
    """Starts compiling all variants' chains at once."""
    started = []
    for variant in variants:
        chain = chain_of_calls(variant, shape, bandwidth)
        lengths = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
        inputs = jax.eval_shape(chain.make_inputs)
        started.append((variant, chain, start_compiling(pool, chain.run, *inputs, lengths)))
    return started


def compare(
    report: Report,
    shape: tuple[int, ...],
    started: list[tuple[Variant, Chain, Future]],
    bandwidth: float,
) -> None:
    """Adds a row per variant for full rows and, with a batch, one for ragged rows."""
    batch, keys, _, kv_heads, head_dim = shape
    wait(future for _, _, future in started)  # compiling and timing would disturb each other
    kinds = {"full": jnp.full(batch, keys, jnp.int32)}
    if batch > 1:
        kinds["ragged"] = (jnp.arange(batch, dtype=jnp.int32) + 1) * keys // batch
    made_for, inputs = None, ()
    for (variant, chain, compiled), kind in itertools.product(started, kinds):
        if report.out_of_time():
            return
        row: dict[str, Any] = {"keys": keys, "batch": batch, "lengths": kind}
        row |= {"variant": variant.name}
        try:
            wanted = variant.stacked, variant.heads_first, variant.cache
            if made_for != wanted:
                inputs = ()  # frees the previous one's first
                made_for, inputs = wanted, chain.make_inputs()
            if variant.cache is not None:
                row["error"] = error_of(variant, shape, inputs, kinds[kind])
            time = timed(compiled.result(), *inputs, kinds[kind])
        except Exception as error:  # out of memory, or an unsupported shape
            report.add(row | {"failed": reason(error)})
            require_live_device()
            continue
        row["us"] = time.median * 1e3 / chain.calls
        if variant.name != EMPTY:
            token = variant.bytes_of_token(kv_heads, head_dim)
            rate = token * int(kinds[kind].sum()) / row["us"] * 1e6
            row |= {"GB/s": rate / 1e9, "share": rate / bandwidth}
        report.add(row)


def error_of(
    variant: Variant, shape: tuple[int, ...], inputs: tuple[Any, ...], lengths: Array
) -> float:
    """Relative distance of the worst head's output from plain XLA's with a float32 query."""
    batch, _, query_heads, _, head_dim = shape
    layer = jnp.int32(1)

    @jax.jit
    def distance(query: Array, key: Any, value: Any, lengths: Array) -> Array:
        options = {"dca": DCA, "rope": ROPE, "lengths": lengths, "query_offset": lengths - 1}
        rows = make_rows((batch, 1, query_heads, head_dim), **options)
        exact = ours("xla", DCA, query.astype(jnp.float32), key, value, rows, layer)
        found = variant.decode(query, key, value, rows, layer)
        norm = partial(jnp.linalg.norm, axis=-1)
        return jnp.max(norm(found.astype(jnp.float32) - exact) / norm(exact))

    return float(distance(*inputs, lengths))


def chain_of_calls(
    variant: Variant, shape: tuple[int, ...], bandwidth: float, dtype: Any = jnp.bfloat16
) -> Chain:
    """Many calls in one function.

    Args:
        shape: batch, keys of a row, query heads, kv heads, head_dim.
        bandwidth: bytes per second, to estimate how long a call takes.
    """
    batch, keys, query_heads, kv_heads, head_dim = shape
    size = batch * keys * variant.bytes_of_token(kv_heads, head_dim)
    layers = min(max(MIN_LAYERS, math.ceil(CACHE / size)), MAX_LAYERS)
    rounds = max(1, round(CHAIN * bandwidth / size / layers))
    query_shape = batch, 1, query_heads, head_dim
    layer_shape = (batch, keys, kv_heads, head_dim)
    if variant.heads_first:
        layer_shape = (batch, kv_heads, keys, head_dim)

    def make_inputs() -> tuple[Array, Any, Any]:
        query = jax.random.normal(jax.random.key(0), query_shape, dtype)
        if variant.cache is not None:
            return query, *(
                _random_bytes(seed, layers, layer_shape, variant.cache) for seed in (1, 2)
            )
        return query, *(
            _random_layers(seed, layers, layer_shape, dtype, variant.stacked) for seed in (1, 2)
        )

    def rows_of(lengths: Array) -> Rows:
        return make_rows(query_shape, dca=DCA, rope=ROPE, lengths=lengths, query_offset=lengths - 1)

    def next_query(query: Array, out: Array) -> Array:
        """The next query: depends on the previous call, but hardly changes."""
        return query + out.astype(query.dtype) * jnp.asarray(2**-10, query.dtype)

    def over_stack(query: Array, key: Array, value: Array, lengths: Array) -> Array:
        rows = rows_of(lengths)

        def call(n: Array, query: Array) -> Array:
            layer = jax.lax.rem(n, jnp.int32(layers))
            return next_query(query, variant.decode(query, key, value, rows, layer))

        return jax.lax.fori_loop(0, rounds * layers, call, query)

    def over_list(query: Array, key: list, value: list, lengths: Array) -> Array:
        rows = rows_of(lengths)

        def one_round(_: Array, query: Array) -> Array:
            for k, v in zip(key, value, strict=True):
                query = next_query(query, variant.decode(query, k, v, rows, jnp.int32(0)))
            return query

        return jax.lax.fori_loop(0, rounds, one_round, query)

    return Chain(over_stack if variant.stacked else over_list, rounds * layers, make_inputs)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _random_layers(
    seed: int, layers: int, shape: tuple[int, ...], dtype: Any, stacked: bool
) -> Any:
    """[L, ...] or a list of L arrays, normal; made one layer at a time to save memory."""
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), layers)
    normal = partial(jax.random.normal, shape=shape, dtype=dtype)
    return jax.lax.map(normal, keys) if stacked else [normal(key) for key in keys]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _random_bytes(
    seed: int, layers: int, shape: tuple[int, ...], cache: str
) -> tuple[Array, Array]:
    """Normal numbers in 8 bits, and scales that all differ."""
    batch, keys, kv_heads, _ = shape
    largest = {"int8": 40.0, "fp8": 140.0}[cache]

    def layer(key: Array) -> tuple[Array, Array]:
        x = jnp.clip(jax.random.normal(key, shape, jnp.float32), -3, 3) * largest
        scale = jax.random.uniform(key, (batch, kv_heads, keys), jnp.float32, 0.5, 1.5) / largest
        return x.astype(CACHE_DTYPES[cache]), scale

    return jax.lax.map(layer, jax.random.split(jax.random.key(seed, impl="rbg"), layers))


# --- variants ----------------------------------------------------------------------------------

EMPTY = "empty loop"


def all_variants(shape: tuple[int, ...]) -> Iterator[Variant]:
    """Ours on each available backend, then the peers."""
    batch, keys, query_heads, kv_heads, head_dim = shape
    yield Variant(EMPTY, lambda query, key, value, rows, layer: query, stacked=True)
    shapes = (
        jax.ShapeDtypeStruct((batch, 1, query_heads, head_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((MIN_LAYERS, batch, keys, kv_heads, head_dim), jnp.bfloat16),
    )
    for name, backend in BACKENDS.items():
        refusal = backend.unsupported(current_device(), *shapes, DCA)
        if refusal is not None:
            say(f"{name}: {refusal}")
            continue
        yield Variant(f"{name}: DCA", partial(ours, name, DCA), stacked=True)
        yield Variant(f"{name}: plain causal", partial(ours, name, None), stacked=True)
        for cache in ("int8", "fp8"):
            decode = partial(ours, name, DCA)
            yield Variant(f"{name}: DCA {cache}", decode, stacked=True, cache=cache)
    yield Variant("cuDNN", partial(jax_nn, "cudnn"), stacked=False)
    yield Variant("jax.nn, XLA", partial(jax_nn, "xla"), stacked=False)
    yield Variant("JAX Triton gqa", triton_gqa, stacked=False, heads_first=True)


def of_tiles(sizes: str) -> Iterator[Variant]:
    """The Hopper kernel over 8-bit caches, with other tiles than its own."""
    for size in filter(None, sizes.split(",")):
        block, stages, ctas = map(int, size.split("x"))
        tiles = DecodeTiles(block=block, num_stages=stages, ctas=ctas)
        for cache in ("int8", "fp8"):
            decode = partial(with_tiles, tiles)
            yield Variant(f"tiles {size} {cache}", decode, stacked=True, cache=cache)


def with_tiles(
    tiles: DecodeTiles, query: Array, key: Any, value: Any, rows: Rows, layer: Array
) -> Array:
    """Like `ours` with DCA, by the Hopper kernel."""
    scales = Scales(key[1], value[1])
    phases = phases_within(key[0].shape[2], DCA)
    options = {"dca": DCA, "phases": phases, "with_lse": False, "scales": scales, "tiles": tiles}
    return decode_on_hopper(query, key[0], value[0], layer, rows, **options)[0]


def ours(
    name: str,
    dca: DCAConfig | None,
    query: Array,
    key: Any,
    value: Any,
    rows: Rows,
    layer: Array,
) -> Array:
    """Attention of the last token of each row, as in the model's decode step."""
    options = {"dca": dca, "rows": rows, "layer": layer, "implementation": name}
    if isinstance(key, tuple):
        (key, key_scale), (value, value_scale) = key, value
        options["scales"] = Scales(key_scale, value_scale)
    return attend(query, key, value, **options)


def jax_nn(
    implementation: Any, query: Array, key: Array, value: Array, rows: Rows, layer: Array
) -> Array:
    """Plain attention by `jax.nn.dot_product_attention`."""
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=rows.lengths, implementation=implementation
    )


def triton_gqa(query: Array, key: Array, value: Array, rows: Rows, layer: Array) -> Array:
    """Plain attention by JAX's Pallas-Triton decode kernel, with its default blocks."""
    from jax.experimental.pallas.ops.gpu.decode_attention import gqa

    # The kernel transposes heads and tokens itself, which undoes this: nothing is moved.
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    start = jnp.zeros_like(rows.lengths)
    return gqa(query[:, 0], key, value, start_idx=start, kv_seq_len=rows.lengths)[:, None]


if __name__ == "__main__":
    app()
