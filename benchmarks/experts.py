"""Mixtures of experts: grouped matrix products compared with a dense one, and a whole model.

    python benchmarks/experts.py measure --out outputs/experts.json
    python benchmarks/experts.py measure --preset tiny-experts --tokens 256 --lengths 256

First, the products of one layer (`dca_jax.grouped`) with every implementation that the device has,
forward and with gradients: random tokens, each with k random experts, compared with one dense
product of as many multiplications. `share` is the dense product's time divided by theirs. Every
implementation is checked against float32 before it is timed. Then the few rows of decoding, where
`share` is the time that reading the chosen matrices once takes at copy bandwidth, divided by the
measured time. Finally `generate.py` runs prefill and decoding with the whole model, ours and
transformers', and writes `OUT.generate.json` (skipped by `--lengths ""`).
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import generate
import jax
import jax.numpy as jnp
import numpy as np
import typer
from common import Report, copy_bandwidth, machine, reason, require_live_device, show, timed
from jaxtyping import Array

from dca_jax.config import LlamaConfig
from dca_jax.device import current_device
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.grouped import (
    PRODUCTS,
    Layout,
    block_size,
    choose,
    chosen_products,
    lay_out,
    spread,
)
from dca_jax.lengths import parse_tokens

COLUMNS = ("product", "way", "rows", "matrix", "ms", "TFLOP/s", "share", "error", "chosen")
GROUPS_FOR_SLOW = 16  # beyond, only the default implementation is timed: others take minutes

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
        "outputs/experts.json"
    ),
    preset: Annotated[
        str, typer.Option(help="A mixture of experts known to `generate.py`.")
    ] = "qwen3-30b-a3b",
    tokens: Annotated[
        str, typer.Option(help="Number of tokens in the products, such as 8k.")
    ] = "8k",
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths for the whole model; none skips it.")
    ] = "32k",
    minutes: Annotated[
        float, typer.Option(help="Time limit in minutes for the whole model.")
    ] = 8.0,
) -> None:
    """Times the products of one layer, then prefill and decoding of the model."""
    config = generate.PRESETS.get(preset)
    if config is None or config.mixture is None:
        raise InputError(f"{preset!r} is not a mixture of experts in generate.py")
    count = parse_tokens(tokens)
    facts = {"benchmark": "experts", "model": preset, "tokens": count}
    report = Report(out, machine() | facts)
    for name, inputs, outputs in shapes(config):
        for row in measure_products(config, count, inputs, outputs):
            report.add({"product": name} | row)
    for row in measure_few(config):
        report.add(row)
    show(f"Experts on {report.facts.get('device')}", COLUMNS, report.rows)
    if lengths:
        jax.clear_caches()
        path = out.with_suffix(".generate.json")
        options = ["--presets", preset, "--lengths", lengths, "--out", str(path)]
        script = str(Path(generate.__file__))
        command = [sys.executable, script, "measure", *options, "--minutes", str(minutes)]
        subprocess.run(command, check=True)


def shapes(config: LlamaConfig) -> list[tuple[str, int, int]]:
    """Name, inputs and outputs of a layer's two kinds of products."""
    mixture = config.mixture
    assert mixture is not None
    wide, narrow = config.hidden_size, mixture.moe_intermediate_size
    return [("gate, up", wide, narrow), ("down", narrow, wide)]


def dtype() -> Any:
    """The dtype to measure in: a CPU computes bfloat16 through float32."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def inputs_of(
    config: LlamaConfig, tokens: int, inputs: int, outputs: int
) -> tuple[Array, Array, np.ndarray]:
    """Tokens, the kernels of one layer, and each token's experts."""
    mixture = config.mixture
    assert mixture is not None
    experts, k = mixture.num_experts, mixture.num_experts_per_tok
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k].astype(np.int32)
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (tokens, inputs), dtype())
    kernels = 0.02 * jax.random.normal(keys[1], (1, experts, inputs, outputs), dtype())
    return x, kernels.astype(dtype()), chosen


def measure_products(
    config: LlamaConfig, tokens: int, inputs: int, outputs: int
) -> list[dict[str, Any]]:
    """A row for the dense product and for each implementation, forward and with gradients."""
    x, kernels, choices = inputs_of(config, tokens, inputs, outputs)
    chosen = choose(current_device(), x.dtype, (inputs, outputs))
    flops = 2.0 * choices.size * inputs * outputs
    common = {"rows": choices.size, "matrix": f"{inputs} x {outputs}"}

    def dense(x: Array, kernels: Array, layer: Array, sizes: Array, block: int) -> Array:
        return jnp.dot(x, kernels[layer, 0])

    rows: list[dict[str, Any]] = []
    for passes, times in ((forward, 1.0), (with_gradients, 3.0)):
        base: float | None = None
        for way, product in {"dense": dense, **PRODUCTS}.items():
            row = common | {"way": f"{way}, {passes.__name__.replace('_', ' ')}"}
            if way not in ("dense", chosen) and kernels.shape[1] > GROUPS_FOR_SLOW:
                continue
            if way == "mosaic_gpu" and chosen != way:
                continue
            block = block_size(way, choices.size, kernels.shape[1])
            layout = lay_out(jnp.asarray(choices.ravel()), kernels.shape[1], block)
            # The dense product has no padding.
            laid = jnp.repeat(x, choices.shape[1], axis=0) if way == "dense" else spread(x, layout)
            try:
                run = jax.jit(partial(passes, partial(product, block=block)))
                error = None if way == "dense" else checked(run, x, laid, kernels, layout)
                arrays = laid, kernels, jnp.int32(0), layout.sizes
                milliseconds = timed(run, *arrays).median
            except Exception as failure:  # a kernel that this device does not support
                require_live_device()
                rows.append(row | {"failed": reason(failure)})
                continue
            base = milliseconds if way == "dense" else base
            row |= {"ms": milliseconds, "TFLOP/s": times * flops / milliseconds / 1e9}
            row |= {"share": base and base / milliseconds, "error": error, "chosen": way == chosen}
            rows.append(row)
    return rows


def forward(product: Callable[..., Array], *arrays: Array) -> Array:
    """The product."""
    return product(*arrays)


def with_gradients(product: Callable[..., Array], *arrays: Array) -> Any:
    """The gradients of the sum of squares of the product by rows and kernels, and the product."""
    x, kernels, *rest = arrays
    out, back = jax.vjp(lambda x, kernels: product(x, kernels, *rest), x, kernels)
    return out, *back(out)


def checked(
    run: Callable[..., Any], x: Array, laid: Array, kernels: Array, layout: Layout
) -> float:
    """The largest relative error (Frobenius norm) of some groups' results against float32.

    Raises:
        ValueError: the error is larger than the dtype explains.
    """
    results = run(laid, kernels, jnp.int32(0), layout.sizes)
    out, *gradients = results if isinstance(results, tuple) else (results,)
    place, worst = np.asarray(layout.place), 0.0
    experts, times = kernels.shape[1], len(place) // len(x)
    group = np.asarray(layout.sizes).cumsum().searchsorted(np.arange(len(place)), side="right")
    order = np.argsort(place)  # rows in the order of their groups

    def compare(got: Array, want: np.ndarray) -> None:
        nonlocal worst
        error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
        worst = max(worst, float(error))

    for number in range(0, experts, max(1, experts // 8)):
        rows = order[group == number]
        if not len(rows):
            continue
        own, matrix = np.asarray(x[rows // times], np.float32), np.asarray(kernels[0, number])
        matrix = matrix.astype(np.float32)
        compare(out[place[rows]], own @ matrix)
        if gradients:
            dx, dw = gradients
            dy = np.asarray(out[place[rows]], np.float32)
            compare(dx[place[rows]], dy @ matrix.T)
            compare(dw[0, number], own.T @ dy)
    if not worst < (1e-5 if x.dtype == jnp.float32 else 1e-2):
        raise ValueError(f"a relative error of {worst:.2g}")
    return worst


def measure_few(config: LlamaConfig) -> list[dict[str, Any]]:
    """One token's experts, each with its own matrices of a stack of layers, in turn."""
    mixture, rows = config.mixture, []
    assert mixture is not None
    k, layers = mixture.num_experts_per_tok, 8 if jax.default_backend() == "gpu" else 2
    bandwidth = copy_bandwidth(2.0 if jax.default_backend() == "gpu" else 0.01)
    gate_and_up, down = shapes(config)
    for (name, inputs, outputs), count in ((gate_and_up, 2), (down, 1)):
        x, kernels, _ = inputs_of(config, k, inputs, outputs)
        # More than the device's cache holds.
        stacks = tuple(
            jnp.concatenate([kernels * (n + 1) for n in range(layers)]) for _ in range(count)
        )
        groups = jnp.arange(k, dtype=jnp.int32) * (mixture.num_experts // k)

        def all_layers(x: Array, stacks: tuple[Array, ...], groups: Array) -> Array:
            def one(layer: Array, sums: Array) -> Array:
                return sums + sum(chosen_products(x, stacks, layer, groups))

            zeros = jnp.zeros((len(x), stacks[0].shape[3]), x.dtype)
            return jax.lax.fori_loop(jnp.int32(0), jnp.int32(len(stacks[0])), one, zeros)

        milliseconds = timed(jax.jit(all_layers), x, stacks, groups).median / layers
        read = count * k * inputs * outputs * x.dtype.itemsize
        rows.append(
            {
                "product": name,
                "way": "few rows",
                "rows": k,
                "matrix": f"{inputs} x {outputs}",
                "ms": milliseconds,
                "share": read / bandwidth / milliseconds * 1e3,
            }
        )
    return rows


if __name__ == "__main__":
    app()
