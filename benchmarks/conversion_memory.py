"""Peak host memory of conversion, on a generated 2 GB checkpoint in shards.

    python benchmarks/conversion_memory.py

Each task runs in its own process, which reports its peak resident set (`resource.getrusage`). The
bound is twice the largest tensor of the source checkpoint plus 1 GiB. The loaders fill CPU arrays
here, which are host memory too, so their size is subtracted. The checkpoint is also written by
another process, because on Linux a child process starts with its parent's peak.
"""

import json
import math
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import typer
from rich import print
from rich.table import Table
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 20,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LAYERS_PER_SHARD = 3
TASKS = ("write", "imports", "hf_to_orbax", "orbax_to_hf", "load_hf", "load_orbax")


def tensor_shapes() -> list[dict[str, tuple[int, ...]]]:
    """Name and shape of every tensor, shard by shard."""
    hidden, ffw, vocab = (
        CONFIG[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    key = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffw, hidden),
        "mlp.up_proj": (ffw, hidden),
        "mlp.down_proj": (hidden, ffw),
    }
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (vocab, hidden)}]
    for first in range(0, CONFIG["num_hidden_layers"], LAYERS_PER_SHARD):
        numbers = range(first, min(first + LAYERS_PER_SHARD, CONFIG["num_hidden_layers"]))
        shards.append(
            {f"model.layers.{i}.{name}.weight": layer[name] for i in numbers for name in layer}
        )
    shards.append({"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)})
    return shards


def write_checkpoint(folder: Path) -> None:
    """Writes random bfloat16 weights, one shard at a time."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rng = np.random.default_rng(0)
    shards = tensor_shapes()
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, name)
        tensors = {
            tensor: (rng.standard_normal(shape, np.float32) * np.float32(0.02)).astype(
                ml_dtypes.bfloat16
            )
            for tensor, shape in shapes.items()
        }
        save_file(tensors, folder / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run_task(task: str, folder: Path) -> None:
    """Runs one task; prints this process's peak, the size of its arrays (bytes) and seconds."""
    if task == "write":
        write_checkpoint(folder / "hf")
        return
    import jax

    from checkpoints_convert import hf_to_orbax, orbax_to_hf
    from checkpoints_convert.common import prepare_process
    from dca_jax.weights.folder import load_weights
    from dca_jax.weights.huggingface import read_config

    prepare_process()
    jax.devices()
    start, held = time.perf_counter(), 0
    if task == "hf_to_orbax":
        hf_to_orbax.convert(folder / "hf", folder / "orbax")
    elif task == "orbax_to_hf":
        orbax_to_hf.convert(folder / "orbax", folder / "back", shard_bytes=5 * 10**8)
    elif task.startswith("load_"):
        source = folder / task.removeprefix("load_")
        params = load_weights(source, read_config(source))
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    sys.stdout.write(json.dumps({"task": task, "peak": peak, "held": held, "seconds": seconds}))


def measure(folder: Path) -> dict[str, Any]:
    """Makes the checkpoint in `folder`, runs every task on it and returns the figures (bytes)."""
    sizes = [2 * math.prod(shape) for shard in tensor_shapes() for shape in shard.values()]
    rows = []
    for task in TASKS:
        command = [sys.executable, __file__, "--task", task, "--folder", str(folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        if done.stdout:
            rows.append(json.loads(done.stdout))
    names = ("jax", "orbax-checkpoint", "tensorstore", "safetensors", "numpy")
    return {
        "checkpoint_bytes": sum(sizes),
        "largest_tensor_bytes": max(sizes),
        "bound_bytes": 2 * max(sizes) + 2**30,
        "rows": rows,
        "versions": {name: metadata.version(name) for name in names},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write the figures to.")] = Path(
        "outputs/conversion_memory.json"
    ),
    task: Annotated[str | None, typer.Option(hidden=True)] = None,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure the peak host memory of conversion and loading; needs 7 GB of disk temporarily."""
    if task is not None and folder is not None:
        run_task(task, folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    table = Table(
        "task",
        "peak MB",
        "of it arrays MB",
        "bound MB",
        "seconds",
        title=f"{result['checkpoint_bytes'] / 1e9:.2f} GB checkpoint, largest tensor "
        f"{result['largest_tensor_bytes'] / 1e6:.0f} MB",
    )
    for row in result["rows"]:
        table.add_row(
            row["task"],
            f"{row['peak'] / 1e6:.0f}",
            f"{row['held'] / 1e6:.0f}",
            f"{result['bound_bytes'] / 1e6:.0f}",
            f"{row['seconds']:.1f}",
        )
    print(table)
    over = [r["task"] for r in result["rows"] if r["peak"] - r["held"] > result["bound_bytes"]]
    if over:
        print(f"over the bound: {', '.join(over)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
