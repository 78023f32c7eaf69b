"""DCA beside plain causal attention by cuDNN, on one GPU, in one process.

    python benchmarks/attention.py --out outputs/attention.json

bfloat16, batch 1, 32 query and 8 kv heads of 128, random inputs. Ours counts its rotations; cuDNN
gets rotated inputs for nothing. Every variant is warmed up for half a second and then timed as one
block, so that all run at the clock that a loaded chip settles at. Prints a table, writes JSON.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.table import Table

from dca_jax import DCAConfig, RopeConfig, dual_chunk_attention
from dca_jax.attention.op import BACKENDS

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
WARM_UP, BLOCK = 0.5, 1.0  # seconds


def main(
    out: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")] = Path(
        "outputs/attention.json"
    ),
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "8192,32768",
) -> None:
    """Times every backend, forward and forward + backward."""
    if jax.default_backend() != "gpu":
        raise SystemExit(f"needs a GPU (cuDNN is the peer); JAX runs on {jax.default_backend()}")
    rows: list[dict[str, Any]] = []
    for length in map(int, lengths.split(",")):
        peer: dict[str, float] = {}
        for name, attention in variants().items():
            for kind, milliseconds in times(attention, length).items():
                peer.setdefault(kind, milliseconds)  # cuDNN comes first
                ratio = peer[kind] / milliseconds
                rows.append(
                    {"tokens": length, "variant": name, "pass": kind, "ms": milliseconds}
                    | {"speed_over_cudnn": ratio}
                )
    table = Table("tokens", "pass", "variant", "ms", "speed / cuDNN", title="Attention")
    for row in rows:
        figures = f"{row['ms']:.2f}", f"{row['speed_over_cudnn']:.3f}"
        table.add_row(str(row["tokens"]), row["pass"], row["variant"], *figures)
    Console().print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0].device_kind
    out.write_text(json.dumps({"device": device, "jax": jax.__version__, "rows": rows}, indent=1))


def variants() -> dict[str, Callable[..., jax.Array]]:
    """cuDNN first, then DCA by each of our backends."""

    def cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation="cudnn"
        )

    def ours(name: str) -> Callable[..., jax.Array]:
        return lambda query, key, value: dual_chunk_attention(
            query,
            key,
            value,
            dca=DCAConfig.paper(4096),
            rope=RopeConfig(),
            implementation=name,
        )

    return {"cuDNN, plain causal": cudnn} | {f"DCA, {name}": ours(name) for name in BACKENDS}


def times(attention: Callable[..., jax.Array], length: int) -> dict[str, float]:
    """Milliseconds a call, forward and forward + backward."""
    shapes = [(1, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    arrays = [
        jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
        for seed, shape in enumerate(shapes)
    ]
    weight = jax.random.normal(jax.random.key(3), shapes[0], jnp.bfloat16)

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sum((attention(*arrays) * weight).astype(jnp.float32))

    return {
        "forward": timed(jax.jit(attention), arrays),
        "forward + backward": timed(jax.jit(jax.grad(loss, (0, 1, 2))), arrays),
    }


def timed(function: Callable[..., Any], arrays: list[jax.Array]) -> float:
    """Milliseconds a call over about a second of calls, after as long a warm-up as it needs."""
    jax.block_until_ready(function(*arrays))  # compiles
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < WARM_UP or calls < 2:
        jax.block_until_ready(function(*arrays))
        calls += 1
    calls = max(2, int(BLOCK * calls / (time.perf_counter() - start)))
    start = time.perf_counter()
    results = [function(*arrays) for _ in range(calls)][-1]
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / calls * 1e3


if __name__ == "__main__":
    typer.run(main)
