"""Peak memory of blockwise attention on a CPU, by length: it grows with T, not with T squared.

Each length runs forward and backward in its own process. Reported is its peak resident memory minus
that of a process that attends to one token. Prints a table and writes JSON.

    python benchmarks/attention_memory.py --out outputs/attention_memory.json
"""

import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
LENGTHS = (1, 8192, 16384, 32768)


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/attention_memory.json"
    ),
    length: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Measures DCA's forward and backward pass at 8k, 16k and 32k tokens, float32."""
    if length:
        measure(length)
        return
    command = [sys.executable, __file__, "--length"]
    rows = [
        json.loads(subprocess.run([*command, str(n)], check=True, capture_output=True).stdout)
        for n in LENGTHS
    ]
    table = Table("tokens", "inputs and gradients, MiB", "peak above baseline, MiB", "seconds")
    for row in rows[1:]:
        row["above_baseline_mib"] = row["peak_mib"] - rows[0]["peak_mib"]
        cells = (row["arrays_mib"], row["above_baseline_mib"], row["seconds"])
        table.add_row(str(row["length"]), *(f"{cell:.0f}" for cell in cells))
    Console().print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    figures = {"machine": platform.machine(), "jax": rows[0]["jax"], "rows": rows}
    out.write_text(json.dumps(figures, indent=1) + "\n")


def measure(length: int) -> None:
    """Runs one length and prints its figures as JSON."""
    import jax
    import jax.numpy as jnp

    from dca_jax import DCAConfig, RopeConfig, dual_chunk_attention

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        out = dual_chunk_attention(
            query,
            key,
            value,
            dca=DCAConfig.paper(4096),
            rope=RopeConfig(),
            implementation="xla",
        )
        return jnp.sum(jnp.square(out))

    heads = (HEADS, KV_HEADS, KV_HEADS)
    arrays = [
        jax.random.normal(jax.random.key(seed), (1, length, n, HEAD_DIM))
        for seed, n in enumerate(heads)
    ]
    start = time.perf_counter()
    grads = jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays))
    seconds = time.perf_counter() - start
    figures = {
        "length": length,
        "jax": jax.__version__,
        "arrays_mib": sum(x.nbytes for x in [*arrays, *grads]) / 2**20,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "seconds": seconds,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
