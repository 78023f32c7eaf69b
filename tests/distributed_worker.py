"""One of several in `test_distributed`: python distributed_worker.py TASK OUT FOLDER [COMMAND ..].

Its place among them comes from the environment, as under a launcher. What it found goes into OUT as
JSON; then it runs `dca-jax` with each command, a JSON list of words.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import dca_jax
from dca_jax import distributed
from dca_jax.cli import app
from dca_jax.errors import InputError
from dca_jax.evaluation import windows
from dca_jax.evaluation.results import ResultLog
from dca_jax.sharding import make_mesh
from dca_jax.weights.folder import load_weights
from dca_jax.weights.huggingface import read_config
from dca_jax.weights.orbax import restore, save
from dca_jax.weights.parameters import abstract_params
from dca_jax.weights.placement import parameter_shardings

PROMPTS = ["Call me Ishmael. Some years ago, never mind how long", "precisely", "x"]
MESH = "data=2,context=2,tensor=2"
NEW_TOKENS = 9
TEXT = np.random.default_rng(5).integers(3, 300, 150)
WINDOWS = {"form": "strided", "methods": ["dca"], "lengths": [90], "stride": 30, "batch": 2}


def read_a_text(folder: Path, out: Path) -> dict[str, Any]:
    llm = dca_jax.load(folder, mesh=MESH)
    return {
        "devices": [jax.local_device_count(), jax.device_count()],
        "nll": evaluate(llm, out.parent / "results"),
    }


def evaluate(llm: dca_jax.LLM, results: Path) -> list[float]:
    """Mean NLL of each window of a text."""
    with ResultLog(results, "perplexity", {}) as log:
        windows.evaluate(llm.model, TEXT, log, **WINDOWS)
    return [record.value["nll"] for record in log.records if record.value is not None]


def read_and_save(folder: Path, out: Path) -> dict[str, Any]:
    """Reads a checkpoint's own half, saves it from both, and reads it back onto another mesh."""
    config = read_config(folder)
    read: list[int] = []
    params = load_weights(
        folder,
        config,
        dtype=jnp.float32,
        sharding=parameter_shardings(config, make_mesh("fsdp=2,tensor=4")),
        progress=lambda path, size: read.append(size),
    )
    saved = out.parent / "saved"
    save(saved, params)
    place = parameter_shardings(config, make_mesh("tensor=2,fsdp=2,context=2"))
    again = restore(saved, abstract_params(config, dtype=jnp.float32, sharding=place))
    whole = load_weights(folder, config, dtype=jnp.float32)
    for found, expected in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        for shard in found.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])
    return {"read": sum(read), "whole": sum(leaf.nbytes for leaf in jax.tree.leaves(whole))}


def ask_the_primary() -> dict[str, Any]:
    """Which process did what, and what each learned of it."""
    called: list[int] = []

    def secret() -> dict[str, Any]:
        called.append(jax.process_index())
        return {"text": "ünïcode", "numbers": [1, 2.5, None]}

    def refuse() -> None:
        raise InputError("there is no such folder")

    refused = ""
    learned = distributed.from_primary(secret)
    try:
        distributed.from_primary(refuse)
    except InputError as error:
        refused = str(error)
    return {"learned": learned, "refused": refused, "called": called}


def compute_forever(out: Path) -> None:
    """Sums over all devices, again and again; leaves a file when the first sum is there."""
    mesh = make_mesh("data=8")
    whole = NamedSharding(mesh, PartitionSpec())
    ones = jax.make_array_from_callback(
        (8,), NamedSharding(mesh, PartitionSpec("data")), lambda index: np.ones(8)[index]
    )
    total = jax.jit(lambda x: jax.sharding.reshard(x, whole).sum())
    while True:
        total(ones).block_until_ready()
        out.touch()
        time.sleep(0.05)


def main(task: str, out: Path, folder: Path, commands: list[str]) -> None:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    with distributed.ending_together():
        distributed.initialize(
            os.environ["COORDINATOR"],
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
            start_timeout=120,
            peer_timeout=10,
        )
        if task == "forever":
            compute_forever(out)
        found = read_a_text(folder, out) | read_and_save(folder, out) | ask_the_primary()
        found["printed"] = Path(os.environ["PRINTED"]).read_text()
        out.write_text(json.dumps(found))
        distributed.print_once()
        for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):  # no command is to join again
            del os.environ[name]
        for command in commands:
            app(json.loads(command), standalone_mode=False)


if __name__ == "__main__":
    # Apart from what the CPU's collectives print.
    with Path(os.environ["PRINTED"]).open("w", buffering=1) as sys.stdout:
        main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
