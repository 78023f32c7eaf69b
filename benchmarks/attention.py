"""Compares DCA with plain causal attention, which cannot do DCA, on one GPU, in one process.

    python benchmarks/attention.py measure --lengths 8k,32k --out outputs/attention.json
    python benchmarks/attention.py plot outputs/attention*.json --out docs/images/attention.svg

Our variants run on every backend that is available, from unrotated queries and keys to the output:
the fused kernel; the paper's three passes and their merge; and plain causal attention by the same
kernel, as a control. The peers are plain causal attention by cuDNN and by JAX's own Pallas kernels
(Triton, and its Mosaic GPU example, in float16), each with rotation of queries and keys and without
it. The peers' cosines and sines are precomputed and not timed; ours are.

Speeds are relative to cuDNN with rotation, which is timed before the other variants of a length and
again after them, to show how far the clock has drifted.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import typer
from common import (
    Report,
    machine,
    merged,
    numbers,
    on_gpu,
    reason,
    require_live_device,
    say,
    show,
    start_compiling,
    timed,
)
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from dca_jax import DCAConfig, RopeConfig, dual_chunk_attention
from dca_jax.attention import attention_pass, merge_passes
from dca_jax.attention.op import BACKENDS
from dca_jax.dca import PHASES
from dca_jax.device import current_device
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.rope import inverse_frequencies

DCA, ROPE = DCAConfig.paper(4096), RopeConfig()
PEER = "cuDNN + rope"
PASSES = ("forward", "forward + backward")
KEY = ("tokens", "heads", "head_dim", "pass", "variant")
COLUMNS = ("tokens", "heads", "head_dim", "pass", "variant", "ms", "TFLOP/s", "speed")

# Query, key, value, and the peers' cos and sin [T, head_dim / 2], to the output.
Attention = Callable[[Array, Array, Array, Array, Array], Array]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__
)


@dataclass(frozen=True)
class Variant:
    """A way to compute attention.

    Attributes:
        scaled: it expects queries that are already scaled.
    """

    name: str
    attention: Attention
    dtype: Any = jnp.bfloat16
    scaled: bool = False


class Case(NamedTuple):
    """One table of variants; the batch is 1."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    kind: str  # one of PASSES


@app.command()
@exit_on_input_error()
def measure(
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/attention.json"
    ),
    lengths: Annotated[
        str, typer.Option(help="Tokens, separated by commas; 4k is 4096.")
    ] = "4k,8k,16k,32k,64k,128k,256k",
    heads: Annotated[
        str, typer.Option(help="Query and kv heads: 32/8 is grouped-query attention.")
    ] = "32/8,32/32",
    head_dim: Annotated[int, typer.Option(help="Elements per head.")] = 128,
    passes: Annotated[
        str, typer.Option(help="forward, backward (both passes), or both separated by a comma.")
    ] = "forward,backward",
    variants: Annotated[
        str, typer.Option(help="Only variants whose name contains one of these, and the peer.")
    ] = "",
    minutes: Annotated[
        float, typer.Option(help="Start no further measurement after this many minutes.")
    ] = math.inf,
) -> None:
    """Times every variant at every length; a variant that cannot run gets a row with the reason.

    Measure one length, one pass or a few variants at a time if you like: `plot` joins the files.
    From 64k tokens on, the plain XLA backend takes half a minute or more per variant.
    """
    if not on_gpu():
        raise InputError(f"needs a GPU (cuDNN is the peer); JAX runs on {jax.default_backend()}")
    wanted = [word.strip() for word in variants.split(",") if word.strip()]
    kinds = [kind for kind in PASSES if any(kind.endswith(p.strip()) for p in passes.split(","))]
    if not kinds:
        raise InputError(f"passes are forward and backward, got {passes!r}")
    report = Report(out, machine() | {"benchmark": "attention"}, minutes=minutes)
    with ThreadPoolExecutor() as pool:
        for length, layout, kind in itertools.product(numbers(lengths), heads.split(","), kinds):
            if report.out_of_time():
                break
            case = Case(length, *_split_heads(layout), head_dim, kind)
            chosen = [
                variant
                for variant in all_variants(case)
                if not wanted or any(word in variant.name for word in wanted)
            ]
            compare(report, case, start_all([cudnn_with_rope(), *chosen], case, pool))
    show("Attention", COLUMNS, report.rows)


def _split_heads(layout: str) -> tuple[int, int]:
    try:
        query_heads, kv_heads = map(int, layout.split("/"))
    except ValueError:
        raise InputError(f"expected heads such as 32/8, got {layout!r}") from None
    if min(query_heads, kv_heads) < 1 or query_heads % kv_heads:
        raise InputError(f"query heads must be a multiple of kv heads, got {layout!r}")
    return query_heads, kv_heads


def start_all(
    variants: Iterable[Variant], case: Case, pool: Executor
) -> list[tuple[Variant, Future]]:
    """Starts compiling all variants at once."""
    return [(variant, _start(variant, case, pool)) for variant in variants]


def _start(variant: Variant, case: Case, pool: Executor) -> Future:
    def forward_backward(
        query: Array, key: Array, value: Array, cos: Array, sin: Array, do: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        out, pull = jax.vjp(lambda q, k, v: variant.attention(q, k, v, cos, sin), query, key, value)
        return out, pull(do)

    function = variant.attention if case.kind == PASSES[0] else forward_backward
    inputs = jax.eval_shape(partial(random_inputs, case, variant.dtype, variant.scaled))
    return start_compiling(pool, function, *inputs)


def compare(report: Report, case: Case, started: list[tuple[Variant, Future]]) -> None:
    """Adds a row for every variant; the first is the peer, which is repeated at the end."""
    wait(future for _, future in started)  # compiling and timing would disturb each other
    flops = 2 * case.heads * case.head_dim * case.tokens**2
    flops *= 1 if case.kind == PASSES[0] else 3.5  # five matrix products backward, two forward
    peer_ms: float | None = None
    made_for, inputs = None, []
    for number, (variant, compiled) in enumerate([*started, started[0]]):
        if number and report.out_of_time():
            return
        again = number == len(started)
        row: dict[str, Any] = {
            "tokens": case.tokens,
            "heads": f"{case.heads}/{case.kv_heads}",
            "head_dim": case.head_dim,
            "pass": case.kind,
            "variant": f"{variant.name}, again" if again else variant.name,
        }
        try:
            wanted = variant.dtype, variant.scaled
            if made_for != wanted:
                inputs = []  # frees the previous one's first
                made_for, inputs = wanted, _inputs(case, *wanted)
            time = timed(compiled.result(), *inputs)
        except Exception as error:  # out of memory, or an unsupported shape
            report.add(row | {"failed": reason(error)})
            require_live_device()
            continue
        if number == 0:
            peer_ms = time.median
        speed = None if peer_ms is None else peer_ms / time.median
        rates = {"TFLOP/s": flops / time.median / 1e9, "speed": speed}
        report.add(row | {"ms": time.median, "low": time.low, "high": time.high} | rates)


def random_inputs(case: Case, dtype: Any, scaled: bool) -> list[Array]:
    """Query, key, value, cos and sin; for a backward pass also the output's gradient."""
    counts = case.heads, case.kv_heads, case.kv_heads, case.heads
    query, key, value, do = (
        jax.random.normal(
            jax.random.key(seed, impl="rbg"), (1, case.tokens, count, case.head_dim), dtype
        )
        for seed, count in enumerate(counts)
    )
    if scaled:
        query /= math.sqrt(case.head_dim)
    index = jnp.arange(case.tokens, dtype=jnp.float32)
    angle = index[:, None] * inverse_frequencies(ROPE, case.head_dim)
    inputs = [query, key, value, jnp.cos(angle), jnp.sin(angle)]
    return inputs if case.kind == PASSES[0] else [*inputs, do]


_inputs = jax.jit(random_inputs, static_argnums=(0, 1, 2))


# --- variants ----------------------------------------------------------------------------------


def all_variants(case: Case) -> Iterator[Variant]:
    """All variants but the main peer: ours on each available backend, then the other peers."""
    shapes = (
        jax.ShapeDtypeStruct((1, case.tokens, case.heads, case.head_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 1, case.tokens, case.kv_heads, case.head_dim), jnp.bfloat16),
    )
    for name, backend in BACKENDS.items():
        refusal = backend.unsupported(current_device(), *shapes, DCA)
        if refusal is None:
            yield from ours(name)
        else:
            say(f"{name}: {refusal}")
    yield Variant("cuDNN", cudnn)
    if case.heads == case.kv_heads:  # it supports no other
        yield Variant("JAX Triton mha + rope", rotated(triton_mha))
        yield Variant("JAX Triton mha", triton_mha)
    name, options = "JAX Mosaic GPU example", {"dtype": jnp.float16, "scaled": True}
    yield Variant(f"{name} + rope", rotated(mosaic_example), **options)
    yield Variant(name, mosaic_example, **options)


def cudnn_with_rope() -> Variant:
    """The main peer, to which speeds are relative."""
    return Variant(PEER, rotated(cudnn))


def ours(name: str) -> Iterator[Variant]:
    """DCA fused and in three passes, and plain causal attention, on one backend."""

    def fused(dca: DCAConfig | None) -> Attention:
        return lambda query, key, value, cos, sin: dual_chunk_attention(
            query, key, value, dca=dca, rope=ROPE, implementation=name
        )

    def three_passes(query: Array, key: Array, value: Array, cos: Array, sin: Array) -> Array:
        options: dict[str, Any] = {"dca": DCA, "rope": ROPE, "implementation": name}
        outs, lses = [], []
        for phase in PHASES:
            out, lse = attention_pass(query, key, value, phase=phase, **options)
            outs.append(out)
            lses.append(lse)
        return merge_passes(outs, lses)[0]

    yield Variant(f"{name}: DCA", fused(DCA))
    yield Variant(f"{name}: DCA, three passes", three_passes)
    yield Variant(f"{name}: plain causal", fused(None))


def rotated(attention: Attention) -> Attention:
    """Attention preceded by RoPE of queries and keys."""

    def rope(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Array:
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = cos[None, :, None, :], sin[None, :, None, :]
        turned = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)

    def with_rope(query: Array, key: Array, value: Array, cos: Array, sin: Array) -> Array:
        return attention(rope(query, cos, sin), rope(key, cos, sin), value, cos, sin)

    return with_rope


def cudnn(query: Array, key: Array, value: Array, cos: Array, sin: Array) -> Array:
    """Plain causal attention by cuDNN."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")


def triton_mha(query: Array, key: Array, value: Array, cos: Array, sin: Array) -> Array:
    """Plain causal attention by JAX's Pallas-Triton kernel, with its default blocks."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    scale = 1 / math.sqrt(query.shape[-1])
    return mha(query, key, value, None, sm_scale=scale, causal=True)


def mosaic_example(query: Array, key: Array, value: Array, cos: Array, sin: Array) -> Array:
    """Plain causal attention by JAX's own example, which does not apply the scale."""
    from jax.experimental.pallas.ops.gpu.attention_mgpu import TuningConfig, attention

    block_kv = 128 if query.shape[-1] <= 128 else 64  # as many as fit into shared memory
    tiles = TuningConfig(block_q=64, block_kv=block_kv, max_concurrent_steps=2, causal=True)
    return attention(query, key, value, tiles)


# --- the picture -------------------------------------------------------------------------------


@app.command()
@exit_on_input_error()
def plot(
    files: Annotated[list[Path], typer.Argument(help="JSON files from `measure`.")],
    out: Annotated[Path, typer.Option(help="The plot to write: .svg, .png or .pdf.")] = Path(
        "docs/images/attention.svg"
    ),
    head_dim: Annotated[int, typer.Option(help="head_dim of the rows to plot.")] = 128,
) -> None:
    """Plots the speed relative to cuDNN by length, from one or more files, and prints their rows.

    If several files measured the same thing, the last one counts.
    """
    facts, rows = merged(files, KEY)
    rows.sort(key=lambda row: [str(row["heads"]), row["pass"], row["tokens"]])
    show(f"Attention on {facts['device']}", COLUMNS, rows)
    drawn = [r for r in rows if r.get("speed") is not None and r["head_dim"] == head_dim]
    drawn = [row for row in drawn if not row["variant"].startswith(PEER)]
    if not drawn:
        raise InputError(f"no row of head_dim {head_dim} has a speed over {PEER}")
    figure = draw(drawn, f"{facts['device']}, head_dim {head_dim}, batch 1, bfloat16")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".partial.{out.name}")
    figure.savefig(aside, metadata={"Date": None} if out.suffix == ".svg" else None)
    aside.replace(out)


def draw(rows: list[dict[str, Any]], title: str) -> Figure:
    """Speed by length: a panel for each number of heads and pass that has rows, on one x axis."""
    layouts = list(dict.fromkeys(row["heads"] for row in rows))
    kinds = [kind for kind in PASSES if any(row["pass"] == kind for row in rows)]
    figure = Figure(figsize=(5 * len(kinds) + 2.6, 3.6 * len(layouts)), layout="constrained")
    grid = figure.subplots(len(layouts), len(kinds), squeeze=False, sharex=True)
    handles: dict[str, Any] = {}
    for line, layout in enumerate(layouts):
        for column, kind in enumerate(kinds):
            axes: Axes = grid[line, column]
            here = [row for row in rows if row["heads"] == layout and row["pass"] == kind]
            if not here:
                axes.remove()
                continue
            handles |= _curves(axes, here)
            query_heads, kv_heads = layout.split("/")
            axes.set_title(f"{kind}, {query_heads} query and {kv_heads} kv heads", fontsize=10)
    lengths = sorted({row["tokens"] for row in rows})  # of all panels, which share the axis
    names = [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths]
    axes = figure.axes[0]
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, names)
    axes.xaxis.set_minor_locator(NullLocator())
    figure.supxlabel("tokens")
    figure.supylabel("speed relative to cuDNN, plain causal, with RoPE")
    figure.suptitle(title)
    figure.legend(list(handles.values()), list(handles), loc="outside right center", fontsize=8)
    return figure


def _curves(axes: Axes, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Draws one panel; returns its curves by name."""
    curves: dict[str, Any] = {}
    for name in dict.fromkeys(row["variant"] for row in rows):
        points = sorted((row["tokens"], row["speed"]) for row in rows if row["variant"] == name)
        lengths, speeds = zip(*points, strict=True)
        (curves[name],) = axes.plot(lengths, speeds, **_style(name))
    axes.axhline(1, color="black", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelbottom=True)  # there may be no panel below
    axes.grid(visible=True, axis="y", alpha=0.25)
    return curves


def _style(name: str) -> dict[str, Any]:
    """Color by implementation, line style by variant; colors of Okabe and Ito (2008)."""
    colors = {"mosaic_gpu": "#D55E00", "triton": "#0072B2", "xla": "#009E73", "cuDNN": "#000000"}
    colors |= {"JAX Triton": "#56B4E9", "JAX Mosaic": "#E69F00", "mosaic_ampere": "#F0E442"}
    color = next((c for start, c in colors.items() if name.startswith(start)), "#CC79A7")
    plain = ("plain causal", "mha", "example", "cuDNN")
    line = "--" if name.endswith("passes") else ":" if name.endswith(plain) else "-"
    marker = "s" if name.endswith("passes") else "o" if name.endswith(": DCA") else "."
    return {"color": color, "linestyle": line, "marker": marker, "markersize": 5, "linewidth": 1.6}


if __name__ == "__main__":
    app()
