"""Updates of finetuning at 16k tokens: tokens a second, MFU, and peak memory beside `plan`'s.

    python benchmarks/finetune.py measure --mesh fsdp=2 --batch 2 --out outputs/finetune.json
    python benchmarks/finetune.py measure --lora-rank 16 --base dtype --base int8
    python benchmarks/finetune.py measure --state float32 --state bfloat16 --texts 1 --texts 16

A model of a published shape with random weights made on the devices, and random tokens, all of them
trained on: no checkpoint and no data are read. What is timed is the library's own update, from
tokens to new weights (`dca_jax.finetune.train.make_update`), under its own `jax.jit`; each variant
is warmed up by two updates and then timed over several in a row. MFU counts what an update must do
(`dca_jax.finetune.meters.update_flops`) over the makers' peak; what is computed again is not
counted. The paper's finetuning of 7B took 40 GPU hours (section 4.1; its GPUs are A100s) for
16k updates of 16k tokens: 1,820 tokens a second and device.

A variant has a process of its own, so that a peak is its own.
"""

import itertools
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from common import Report, machine, reason, show
from flax.traverse_util import unflatten_dict

from dca_jax.config import LoraConfig
from dca_jax.dca import DCAConfig
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.finetune.lora import init_lora
from dca_jax.finetune.meters import PEAKS, update_flops
from dca_jax.finetune.settings import DataFile, Settings
from dca_jax.finetune.train import make_update, place, start
from dca_jax.model import Llama
from dca_jax.planning.plan import plan
from dca_jax.planning.shapes import SHAPES
from dca_jax.sharding import describe, make_mesh, parse_mesh
from dca_jax.weights.packer import packer
from dca_jax.weights.parameters import parameters, projections
from dca_jax.weights.placement import parameter_shardings

PAPER = 16_000 * 16_384 / (40 * 3600)  # tokens a second of one A100
KINDS = {"NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100-80g"}
COLUMNS = (
    "devices remat state lora_rank base texts seconds tokens_per_second_device over_paper mfu"
    " peak_gb plan_gb"
).split()


@dataclass(frozen=True)
class Variant:
    """What is measured."""

    preset: str
    mesh: str
    length: int
    batch: int
    accumulate: int
    remat: str
    lora_rank: int
    base: str
    state: str
    texts: int
    updates: int


def measure_here(variant: Variant) -> dict[str, Any]:
    """Times a variant in this process."""
    config, sizes = SHAPES[variant.preset], parse_mesh(variant.mesh)
    mesh = make_mesh(sizes)
    lora = LoraConfig(rank=variant.lora_rank) if variant.lora_rank else None
    where = parameter_shardings(config, mesh, lora=lora)
    dtype = jnp.dtype(variant.state) if lora is None else jnp.bfloat16

    def random_leaf(number: int, row: Any) -> jax.Array:
        def make() -> jax.Array:
            if row.path.endswith("scale"):
                return jnp.ones(row.shape(config), dtype)
            key = jax.random.fold_in(jax.random.key(0), number)
            if not row.stacked:
                return 0.02 * jax.random.normal(key, row.shape(config), dtype)
            layers, *shape = row.shape(config)  # one at a time: what it is drawn from is larger
            keys = jax.random.split(key, layers)
            return jax.lax.map(lambda key: 0.02 * jax.random.normal(key, shape, dtype), keys)

        return jax.jit(make, out_shardings=where(row.path))()

    leaves: dict[str, Any] = {}
    packed = None if variant.base == "dtype" else packer(projections(config), variant.base)
    for number, row in enumerate(parameters(config)):
        leaf = random_leaf(number, row)
        change = None if packed is None else packed(row)
        leaves[row.path] = leaf if change is None else change(leaf)
        del leaf
    params, frozen = unflatten_dict(leaves, sep="."), {}
    del leaves
    if lora is not None:
        params, frozen = init_lora(config, lora, jax.random.key(1), where), params

    def build(params: Any) -> Llama:
        return Llama.from_params(
            config,
            params,
            dca=DCAConfig.paper(config.max_position_embeddings),
            remat=variant.remat,
            lora=lora,
        )

    settings = Settings(
        model=variant.preset, output="-", data=(DataFile("-"),), state=variant.state
    )
    update = jax.jit(make_update(build, settings, 1000), donate_argnums=0)
    state, rows = start(params), variant.batch * variant.accumulate
    del params
    rng, shape = np.random.default_rng(0), (rows, variant.length)
    arrays = {
        "tokens": rng.integers(0, config.vocab_size, shape, np.int32),
        "trained": np.arange(variant.length)[None, :].repeat(rows, axis=0) > 0,
        "lengths": np.full(rows, variant.length, np.int32),
    }
    if variant.texts > 1:  # as `pack: segments` has them
        index = np.arange(variant.length, dtype=np.int32) % -(-variant.length // variant.texts)
        arrays |= {"text_index": index[None].repeat(rows, axis=0)}
        arrays["trained"] &= index[None] > 0
    batch = place(arrays, variant.accumulate, mesh)
    begin = time.perf_counter()
    for number in range(2 + variant.updates):
        if number == 2:
            begin = time.perf_counter()
        state, metrics = update(state, frozen, batch)
        if number < 2:
            jax.block_until_ready(metrics)
    loss = float(metrics.loss)
    seconds = (time.perf_counter() - begin) / variant.updates
    return figures(variant, seconds, loss, lora)


def figures(
    variant: Variant, seconds: float, loss: float, lora: LoraConfig | None
) -> dict[str, Any]:
    """What follows from the seconds of an update."""
    config, sizes = SHAPES[variant.preset], parse_mesh(variant.mesh)
    count, rows = int(np.prod(list(sizes.values()))), variant.batch * variant.accumulate
    speed = rows * variant.length / seconds / count
    kind = jax.devices()[0].device_kind
    flops = update_flops(config, [variant.length] * rows, lora=lora)
    stats = jax.local_devices()[0].memory_stats() or {}
    planned = plan(
        variant.preset,
        config,
        device=KINDS.get(kind, "h200"),
        mesh=sizes,
        context_length=variant.length,
        batch=variant.batch,
        train=True,
        lora=lora,
        weights=None if variant.base == "dtype" else variant.base,
        remat=variant.remat,
        state=variant.state,
    )
    return {
        "devices": f"{count}, {describe(sizes)}",
        "seconds": seconds,
        "tokens_per_second_device": speed,
        "over_paper": speed / PAPER,
        "mfu": flops / seconds / count / PEAKS[kind] if kind in PEAKS else None,
        "peak_gb": stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None,
        "plan_gb": planned.usage.total / 1e9 if kind in KINDS else None,
        "loss": loss,
    }


app = typer.Typer(add_completion=False)


@app.command()
@exit_on_input_error()
def measure(
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("outputs/finetune.json"),
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-2-7b",
    mesh: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    length: Annotated[int, typer.Option(help="Tokens per row.")] = 16_384,
    batch: Annotated[int, typer.Option(help="Rows per batch, over all devices.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Batches per update.")] = 1,
    remat: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    lora_rank: Annotated[
        list[int] | None, typer.Option(help="LoRA rank; 0 trains all weights. May be repeated.")
    ] = None,
    base: Annotated[list[str] | None, typer.Option(help="dtype, int8, int4; with LoRA.")] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(help="Dtype of weights and moments when training all: float32, bfloat16."),
    ] = None,
    texts: Annotated[
        list[int] | None,
        typer.Option(help="Texts per row, each attending only to itself (default: one)."),
    ] = None,
    updates: Annotated[
        int, typer.Option(help="Number of timed updates, after two for warm-up.")
    ] = 4,
    minutes: Annotated[
        float, typer.Option(help="Start no further variant after this many minutes.")
    ] = 60.0,
) -> None:
    """Time updates in every combination of what may be repeated."""
    for sizes in map(parse_mesh, mesh or []):
        if batch % (shards := sizes["data"] * sizes["fsdp"]):
            raise InputError(
                f"a mesh of {shards} shards of the batch needs as many rows, got {batch}"
            )
    report = Report(out, machine() | {"preset": preset, "length": length}, minutes=minutes)
    combinations = itertools.product(
        mesh or ["tensor=1"],
        remat or ["attention"],
        lora_rank or [0],
        base or ["dtype"],
        state or ["float32"],
        texts or [1],
    )
    for one_mesh, policy, rank, kept, kind, count in combinations:
        if report.out_of_time():
            break
        if kept == "int8" and not rank:
            continue
        variant = Variant(
            *(preset, one_mesh, length, batch, accumulate, policy, rank, kept, kind, count, updates)
        )
        named = {"mesh": one_mesh, "remat": policy, "lora_rank": rank, "base": kept}
        named |= {"state": kind, "texts": count}
        command = [sys.executable, __file__, "one", json.dumps(asdict(variant))]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = done.stdout.strip().splitlines()
        if done.returncode == 0 and lines:
            report.add(named | json.loads(lines[-1]))
        else:
            report.add(named | {"failed": " ".join(done.stderr.split())[-300:]})
    show(f"{preset}, rows of {length:,} tokens", COLUMNS, report.rows)


@app.command(hidden=True)
def one(variant: str) -> None:
    """One variant, as JSON on standard output."""
    try:
        print(json.dumps(measure_here(Variant(**json.loads(variant)))))
    except Exception as error:
        sys.exit(reason(error))


if __name__ == "__main__":
    app()
