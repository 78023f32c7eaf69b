"""Mixtures of experts: products of groups of rows beside a dense one, and a whole model.

    python benchmarks/experts.py measure --out outputs/experts.json
    python benchmarks/experts.py measure --preset tiny-experts --tokens 256 --lengths 256

First the products of one layer (`dca_jax.grouped`), with every way that the device has, forward and
with the gradients: random tokens, each with its k random experts, beside one dense product of the
same numbers of multiplications. `share` is the dense one's time over theirs. Each way is held
against float32 before it is timed. The few rows of decoding come after, with the share of the time
that reading the chosen matrices once would take. Then `generate.py` reads and decodes with the
whole model, ours and transformers', into `OUT.generate.json` (left out by `--lengths ""`).
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
from common import Report, copy_bandwidth, reason, require_live_device, show, timed
from jaxtyping import Array

from dca_jax.config import LlamaConfig
from dca_jax.device import current_device
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.grouped import PRODUCTS, choose, chosen_product
from dca_jax.lengths import parse_tokens

COLUMNS = ("product", "way", "rows", "matrix", "ms", "TFLOP/s", "share", "error", "chosen")
GROUPS_FOR_RAGGED = 16  # beyond, only TPUs have more than a product of all rows with all matrices

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__
)


@app.callback()
def main() -> None:
    """Keeps `measure` a command of its own."""


@app.command()
@exit_on_input_error()
def measure(
    out: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")] = Path(
        "outputs/experts.json"
    ),
    preset: Annotated[
        str, typer.Option(help="A mixture of `generate.py`'s models.")
    ] = "qwen3-30b-a3b",
    tokens: Annotated[str, typer.Option(help="Tokens of the products, such as 8k.")] = "8k",
    lengths: Annotated[
        str, typer.Option(help="Prompts of the whole model; none leaves it out.")
    ] = "32k",
    minutes: Annotated[float, typer.Option(help="Of the whole model, at most.")] = 8.0,
) -> None:
    """Times the products of a layer, then prefill and decoding of the model."""
    config = generate.PRESETS.get(preset)
    if config is None or config.mixture is None:
        raise InputError(f"{preset!r} is no mixture of experts of generate.py")
    count = parse_tokens(tokens)
    report = Report(out, {"benchmark": "experts", "model": preset, "tokens": count})
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
    """Name, inputs and outputs of a layer's two kinds of product."""
    mixture = config.mixture
    assert mixture is not None
    wide, narrow = config.hidden_size, mixture.moe_intermediate_size
    return [("gate, up", wide, narrow), ("down", narrow, wide)]


def dtype() -> Any:
    """That of the measurement: a CPU computes bfloat16 through float32."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def inputs_of(config: LlamaConfig, tokens: int, inputs: int, outputs: int) -> tuple[Array, ...]:
    """Rows sorted by expert, kernels of one layer, its number, rows of each expert."""
    mixture = config.mixture
    assert mixture is not None
    experts, k = mixture.num_experts, mixture.num_experts_per_tok
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k]
    sizes = np.bincount(chosen.ravel(), minlength=experts).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (tokens * k, inputs), dtype())
    kernels = 0.02 * jax.random.normal(keys[1], (1, experts, inputs, outputs), dtype())
    return x, kernels.astype(dtype()), jnp.int32(0), jnp.asarray(sizes)


def measure_products(
    config: LlamaConfig, tokens: int, inputs: int, outputs: int
) -> list[dict[str, Any]]:
    """A row for the dense product and for each way; forward, and with both gradients."""
    x, kernels, layer, sizes = inputs_of(config, tokens, inputs, outputs)
    chosen = choose(current_device(), x.dtype, (inputs, outputs))
    flops = 2.0 * len(x) * inputs * outputs
    common = {"rows": len(x), "matrix": f"{inputs} x {outputs}"}

    def dense(x: Array, kernels: Array, layer: Array, sizes: Array) -> Array:
        return jnp.dot(x, kernels[layer, 0])

    rows: list[dict[str, Any]] = []
    for passes, times in ((forward, 1.0), (with_gradients, 3.0)):
        base: float | None = None
        for way, product in {"dense": dense, **PRODUCTS}.items():
            row = common | {"way": f"{way}, {passes.__name__.replace('_', ' ')}"}
            slow = way == "ragged" and jax.default_backend() != "tpu"
            if slow and len(sizes) > GROUPS_FOR_RAGGED:
                continue
            if way == "mosaic_gpu" and chosen != way:
                continue
            try:
                run = jax.jit(partial(passes, product))
                error = None if way == "dense" else checked(product, x, kernels, layer, sizes)
                milliseconds = timed(run, x, kernels, layer, sizes).median
            except Exception as failure:  # a kernel that this device does not take
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
    """The product, and the gradients of rows and kernels."""
    x, kernels, *rest = arrays
    out, back = jax.vjp(lambda x, kernels: product(x, kernels, *rest), x, kernels)
    return out, back(out)


def checked(
    product: Callable[..., Array], x: Array, kernels: Array, layer: Array, sizes: Array
) -> float:
    """The relative error (Frobenius) of the last rows of some groups, against float32.

    Raises:
        ValueError: more than the dtype explains.
    """
    out = np.asarray(jax.jit(product)(x, kernels, layer, sizes)[: int(sizes.sum())], np.float32)
    ends = np.cumsum(np.asarray(sizes))
    worst = 0.0
    for group in range(0, len(ends), max(1, len(ends) // 8)):
        rows = slice(max(ends[group] - 20, ends[group] - int(sizes[group])), ends[group])
        if rows.start < rows.stop:
            want = np.asarray(x[rows], np.float32) @ np.asarray(kernels[0, group], np.float32)
            worst = max(worst, float(np.linalg.norm(out[rows] - want) / np.linalg.norm(want)))
    if not worst < (1e-5 if x.dtype == jnp.float32 else 1e-2):
        raise ValueError(f"a relative error of {worst:.2g}")
    return worst


def measure_few(config: LlamaConfig) -> list[dict[str, Any]]:
    """One token's choices, each with its own matrix out of a stack of two layers."""
    mixture, rows = config.mixture, []
    assert mixture is not None
    k = mixture.num_experts_per_tok
    bandwidth = copy_bandwidth(2.0 if jax.default_backend() == "gpu" else 0.01)
    for name, inputs, outputs in shapes(config):
        x, kernels, _, _ = inputs_of(config, 1, inputs, outputs)
        stack = jnp.concatenate([kernels, kernels])
        groups = jnp.arange(k, dtype=jnp.int32) * (mixture.num_experts // k)
        milliseconds = timed(jax.jit(chosen_product), x, stack, jnp.int32(1), groups).median
        read = k * inputs * outputs * x.dtype.itemsize
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
