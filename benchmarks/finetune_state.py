"""Loss curves of a model finetuned with its state in float32 and in bfloat16, on the same rows.

    python benchmarks/finetune_state.py models/demo-python-7m --data a.json --eval-data b.json

Prints the mean loss of each tenth of the updates and the held-out loss; `OUT/results.json` has the
loss of every update. A difference no larger than that between seeds is not significant.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from dca_jax.finetune.run import finetune
from dca_jax.finetune.settings import DTYPES, DataFile, Settings

TENTHS = 10


def main() -> None:
    """Trains with every state and every seed, and prints the results."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--out", type=Path, default=Path("outputs/finetune-state"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of activations")
    given = parser.parse_args()
    results = {
        f"{state}, seed {seed}": curves(given, state, seed)
        for seed in range(given.seeds)
        for state in DTYPES
    }
    (given.out / "results.json").write_text(json.dumps(results, indent=1))
    show(results)


def curves(given: argparse.Namespace, state: str, seed: int) -> dict[str, list[float]]:
    """The loss of every update of a run, and the held-out loss before and after it."""
    output = given.out / f"{state}-{seed}"
    settings = Settings(
        model=given.model,
        output=str(output),
        data=(DataFile(given.data),),
        eval_data=(DataFile(given.eval_data),),
        template="llama-2",
        length=given.length,
        steps=given.steps,
        batch=given.batch,
        learning_rate=given.learning_rate,
        dtype=given.dtype,
        state=state,
        seed=seed,
        save_every=given.steps,
        eval_every=given.steps,
    )
    finetune(settings)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines if name in line] for name in ("loss", "eval_loss")}


def show(results: dict[str, dict[str, Any]]) -> None:
    """The results as a Markdown table."""
    print("| run | mean loss of each tenth of the updates | held out, before | after |")
    print("|---|---|---|---|")
    for name, found in results.items():
        tenths = [np.mean(part) for part in np.array_split(np.array(found["loss"]), TENTHS)]
        told = " ".join(f"{loss:.3f}" for loss in tenths)
        first, *_, last = found["eval_loss"]
        print(f"| {name} | {told} | {first:.4f} | {last:.4f} |")


if __name__ == "__main__":
    main()
