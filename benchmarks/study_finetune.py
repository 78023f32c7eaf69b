"""Finetunes the study's model with DCA beyond its trained length, with both gradients.

`exact` is this library's gradient, `detached` that of ChunkLlama's code, which detaches the
log-sum-exp where it merges its passes (`examples/detached_merge.py`). Both are trained from the
same weights on the same rows: dialogues, and whole books as long texts. `measure` reads
OUT/exact/model.
"""

import json
import math
import runpy
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from common import machine, numbers, say

from dca_jax.attention.op import BACKENDS
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.evaluation.results import write_json
from dca_jax.finetune.settings import DataFile, Settings
from dca_jax.inference.documents import read_document
from dca_jax.weights.folder import load_weights

ROOT = Path(__file__).resolve().parent.parent
GRADIENTS = ("exact", "detached")
HELD_OUT = 8 * 16_384 * 4  # characters of the held-out book: about eight rows of 16k
SAVE = 50  # updates between checkpoints


@exit_on_input_error()
def run(
    model: Annotated[str, typer.Argument(help="Folder or GGUF file of a model, as in dca-jax.")],
    data: Annotated[list[Path], typer.Option(help="Dialogues (JSON), as for dca-jax finetune.")],
    book: Annotated[list[Path], typer.Option(help="Books (UTF-8) to train on, each as one text.")],
    held_out: Annotated[Path, typer.Option(help="A held-out book to measure the loss on.")],
    out: Annotated[Path, typer.Option(help="Folder for both runs.")] = Path(
        "outputs/real_model_finetune"
    ),
    length: Annotated[str, typer.Option(help="Tokens per row.")] = "16k",
    method: Annotated[str, typer.Option(help="The DCA setting.")] = "dca:paper",
    steps: Annotated[int, typer.Option(min=1, help="Number of updates.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Rows per update.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-5,
    gradients: Annotated[str, typer.Option(help="In order of priority.")] = ",".join(GRADIENTS),
    dtype: Annotated[
        str, typer.Option(help="Dtype of activations; weights are float32.")
    ] = "bfloat16",
) -> None:
    """Trains all weights with each gradient, resuming interrupted runs; writes OUT/results.json."""
    from dca_jax.finetune.run import check_output, finetune  # training code is slow to import

    names = gradients.split(",")
    if not set(names) <= set(GRADIENTS):
        raise InputError(f"--gradients takes {', '.join(GRADIENTS)}; got {gradients}")
    out.mkdir(parents=True, exist_ok=True)
    books = texts(book, out / "books.jsonl")
    apart = texts([held_out], out / "held_out.jsonl", HELD_OUT)
    base = Settings(
        model=model,
        output=str(out / names[0]),
        data=tuple(DataFile(str(path)) for path in (*data, books)),
        eval_data=(DataFile(str(apart)),),
        length=numbers(length)[0],
        method=method,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        dtype=dtype,
        save_every=SAVE,
        eval_every=SAVE,
    )
    detached = runpy.run_path(str(ROOT / "examples/detached_merge.py"))
    BACKENDS.setdefault("detached", detached["DetachedMerge"]())
    results: dict[str, Any] = machine() | {"settings": base.as_yaml(), "runs": {}}
    begin = time.monotonic()
    if len(names) > 1:
        results["gradient_error"] = compared(base, names, detached["gradient_error"])
        error = results["gradient_error"]["all"]
        say(
            f"{time.monotonic() - begin:.1f} s: {names[1]} gradient, first rows: off by {error:.1%}"
        )
    for name in names:
        settings = replace(base, output=str(out / name))
        if not (out / name / "model").exists():
            check_output(out / name, settings)
            finetune(settings, implementation=None if name == "exact" else name)
        results["runs"][name] = losses(out / name / "metrics.jsonl")
        write_json(results, out / "results.json")
        say(f"{time.monotonic() - begin:.1f} s: {name}: {results['runs'][name]}")


def texts(books: list[Path], path: Path, characters: int | None = None) -> Path:
    """Writes whole texts as a file for `dca-jax finetune`; every token is trained on."""
    lines = [json.dumps({"text": read_document(book)[:characters]}) for book in books]
    path.write_text("\n".join(lines) + "\n")
    return path


def compared(settings: Settings, names: list[str], error: Any) -> dict[str, float]:
    """Relative difference of the two gradients on the first update's rows, by parameter."""
    from dca_jax.finetune.inputs import read_inputs, training_rows
    from dca_jax.finetune.loss import summed_nll
    from dca_jax.finetune.run import open_setup
    from dca_jax.finetune.train import place

    setup = open_setup(settings)
    config = setup.config
    params = load_weights(setup.folder, config, dtype=jnp.dtype("float32"), sharding=None)
    rows = next(iter(training_rows(setup, read_inputs(setup).data)))
    first = place({name: x[:1] for name, x in rows.items()}, 1, None).first()

    def gradient(name: str) -> Any:
        build = replace(setup, implementation=None if name == "exact" else name).build

        def loss(params: Any) -> jax.Array:
            sums = summed_nll(build(params), *first)
            return sums.nll / sums.tokens

        return jax.device_get(jax.jit(jax.grad(loss))(params))

    return error(*(gradient(name) for name in names))


def losses(path: Path) -> dict[str, float]:
    """The held-out loss before and after, and the mean seconds of an update."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    trained = [line["loss"] for line in lines if "loss" in line]
    return {
        "held_out_before": held_out[0],
        "held_out_after": held_out[-1],
        "loss_of_last_updates": float(np.mean(trained[-10:])),
        "held_out_perplexity_after": math.exp(held_out[-1]),
    }
