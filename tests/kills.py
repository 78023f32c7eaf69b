"""Is anything ever half-written? Commands are killed at random moments, then run to the end.

    python tests/kills.py                           # 40 conversions, 40 finetunes, 20 evaluations
    python tests/kills.py --only finetune --runs 8  # fewer, of one kind
    python tests/kills.py --seed 7                  # other moments

Each run gets SIGTERM, SIGINT or SIGKILL, once or twice, and is then repeated until it finishes. It
must leave what an undisturbed run leaves: the same weights, the same results, and no other files. A
signal that can be caught must be answered with a sentence instead of a traceback.

Runs work on a copy of the tree, one at a time, each in a fork of a process that has imported
everything, since importing takes most of a command's time and writes nothing. Exit status 1 means
that something was wrong.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
# Python drops what a signal raises in a callback of the garbage collector, such as JAX's.
DROPPED = re.compile(
    r"Exception ignored in: <function _xla_gc_callback.*?^\w+: ?\w*\n", re.MULTILINE | re.DOTALL
)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def import_everything(tree: Path) -> None:
    """Imports what a command needs from a copy of the tree, without touching a device."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(tree))
    for name in (
        *("dca_jax.cli", "dca_jax.finetune.run", "dca_jax.evaluation.plots"),
        *("checkpoints_convert.hf_to_orbax", "orbax.checkpoint", "transformers"),
    ):
        __import__(name)


def run_forked(command: list[str], place: Path) -> int:
    """Starts a command in a fork of this process; its errors go to `place`."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        for stream, name in ((1, os.devnull), (2, place / "errors")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv = ["dca-jax", *command]
        from dca_jax.cli import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # do not return to the campaign


class Kind(NamedTuple):
    """A command that writes, and the part of its output that must not depend on being killed."""

    runs: int
    command: Callable[[str, Path, Path], list[str]]  # from the model, the inputs and the output
    outcome: Callable[[Path], str]


def converting(model: str, inputs: Path, output: Path) -> list[str]:
    return ["convert", model, str(output)]


def finetuning(model: str, inputs: Path, output: Path) -> list[str]:
    settings = "--length 256 --batch 2 --steps 8 --save-every 2 --dtype float32 --export hf"
    data = str(inputs / "dialogues.json")
    words = ["--template", "llama-2", *settings.split()]
    return ["finetune", "--model", model, "--data", data, "--output", str(output), *words]


def evaluating(model: str, inputs: Path, output: Path) -> list[str]:
    settings = "--length 256 --length 512 --method rope --method dca:paper --dtype float32"
    text = str(inputs / "text.txt")
    words = ["--text", text, "--output", str(output), *settings.split()]
    return ["eval", "perplexity", model, *words]


def converted_weights(folder: Path) -> str:
    """A digest of the arrays: Orbax writes the same arrays into different bytes each time."""
    import jax
    import numpy as np

    from dca_jax.weights.folder import load_weights
    from dca_jax.weights.huggingface import read_config

    config = read_config(folder)
    leaves = jax.tree.leaves(load_weights(folder, config))
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


def trained_weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def results(folder: Path) -> str:
    """All records and scores to the last digit, except times; records in any order."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            named = {k: timeless(v) for k, v in value.items() if "second" not in k}
            return {k: v for k, v in named.items() if "time" not in k}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    summary = timeless(json.loads((folder / "summary.json").read_text()))
    lines = sorted(json.dumps(timeless(record), sort_keys=True) for record in records)
    return json.dumps([summary.get("scores", summary), lines], sort_keys=True)


KINDS = {
    "convert": Kind(40, converting, converted_weights),
    "finetune": Kind(40, finetuning, trained_weights),
    "evaluate": Kind(20, evaluating, results),
}


def write_inputs(folder: Path) -> None:
    rows = [
        {
            "conversations": [
                {"from": "human", "value": f"Tell me story {i} of a cat and a dog. " * 8},
                {"from": "gpt", "value": f"Once upon {i} times a cat met a dog. " * 12},
            ]
        }
        for i in range(24)
    ]
    (folder / "dialogues.json").write_text(json.dumps(rows))
    draw = random.Random(0)
    words = ["the", "cat", "and", "dog", "saw", "a", "house", "where", "they", "lived.", "He"]
    (folder / "text.txt").write_text(" ".join(draw.choice(words) for _ in range(4_000)))


class Campaign:
    """Runs of one kind in a folder of their own."""

    def __init__(self, kind: Kind, place: Path, model: str) -> None:
        self.kind, self.place, self.model = kind, place, model
        self.inputs, self.output = place / "inputs", place / "outputs" / "out"
        self.inputs.mkdir(parents=True)
        self.output.parent.mkdir()
        write_inputs(self.inputs)
        self.codes: Counter[str] = Counter()
        self.ended = False  # whether the last run finished before its signal
        self.seconds = 0.0  # seconds of the last undisturbed run: a busy machine gets slower

    def run(self, sign: signal.Signals | None = None, seconds: float = 0) -> tuple[int, str]:
        """Runs the command and sends a signal after some time; returns its exit code and errors."""
        begin = time.perf_counter()
        pid = run_forked(self.kind.command(self.model, self.inputs, self.output), self.place)
        status = 0
        if sign is not None:
            over = 0
            while not over and time.perf_counter() - begin < seconds:
                over, status = os.waitpid(pid, os.WNOHANG)
                time.sleep(0.01)
            if not over:
                os.kill(pid, sign)
                _, status = os.waitpid(pid, 0)
        else:
            _, status = os.waitpid(pid, 0)
            self.seconds = time.perf_counter() - begin
        return os.waitstatus_to_exitcode(status), (self.place / "errors").read_text()

    def outcome(self) -> str:
        """The contents of the output, read by another process, since this one touches no device."""
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return pool.apply(self.kind.outcome, (self.output,))

    def undisturbed(self) -> str:
        """The output of an undisturbed run: the second one, which compiles nothing."""
        for _ in range(2):
            shutil.rmtree(self.output, ignore_errors=True)
            code, errors = self.run()
            if code:
                sys.exit(f"the command fails undisturbed, with code {code}:\n{errors[-2000:]}")
        return self.outcome()

    def faults_of_a_run(self, draw: random.Random, number: int) -> list[str]:
        """Kills a run once or twice; returns what was wrong with its messages."""
        shutil.rmtree(self.output, ignore_errors=True)
        faults, self.ended = [], False
        for again in range(draw.choice((1, 1, 2))):
            sign = SIGNALS[(number + again) % len(SIGNALS)]
            seconds = draw.uniform(0.05, 1.0) * self.seconds
            code, errors = self.run(sign, seconds)
            told, dropped = DROPPED.subn("", errors)
            self.codes[f"{sign.name} {code}{' (dropped)' * bool(dropped)}"] += 1
            if "Traceback" in told:
                where = f"{sign.name} after {seconds:.2f} s of {self.seconds:.2f}"
                faults.append(f"a traceback, {where}:\n{told[-1500:]}")
            self.ended = code == 0
            if self.ended:  # the signal came too late
                break
        return faults

    def faults_of_the_end(self, expected: str) -> list[str]:
        """Runs the command to its end, unless it finished before; returns what is wrong with it."""
        # A converted folder is complete or absent.
        converted = self.kind is KINDS["convert"] and self.output.exists()
        if not self.ended and not converted:
            code, errors = self.run()
            if code:
                return [f"run again it ends with code {code}:\n{errors[-1500:]}"]
        faults = []
        if self.outcome() != expected:
            faults.append("its output differs from an undisturbed run's")
        others = [file.name for file in self.output.parent.iterdir() if file != self.output]
        if others:
            faults.append(f"left behind: {others}")
        return faults


def campaign(name: str, runs: int, seed: int, place: Path, model: str) -> int:
    """All runs of a kind, one line each; returns the number of wrong ones."""
    begin = time.perf_counter()
    one = Campaign(KINDS[name], place, model)
    expected = one.undisturbed()
    print(f"{name}: an undisturbed run takes {one.seconds:.1f} s", flush=True)
    draw, wrong = random.Random(seed), 0
    for number in range(runs):
        faults = one.faults_of_a_run(draw, number) + one.faults_of_the_end(expected)
        wrong += bool(faults)
        codes = ", ".join(f"{code} x {count}" for code, count in sorted(one.codes.items()))
        print(f"{name} {number + 1}/{runs}, {wrong} wrong; codes: {codes}", flush=True)
        for fault in faults:
            print(f"  {fault}", flush=True)
    print(f"{name}: {runs} runs in {time.perf_counter() - begin:.0f} s, {wrong} wrong", flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=KINDS, action="append", help="one kind of command")
    parser.add_argument("--runs", type=int, help="of each kind (default: 40, 40 and 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--model", default=str(REPOSITORY / "models" / "demo-python-7m"))
    options = parser.parse_args()
    model = str(Path(options.model).resolve())
    with tempfile.TemporaryDirectory() as name:
        for package in ("dca_jax", "checkpoints_convert"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / package, Path(name) / package, ignore=ignored)
        import_everything(Path(name))
        wrong = 0
        for kind in options.only or KINDS:
            runs = options.runs or KINDS[kind].runs
            wrong += campaign(kind, runs, options.seed, Path(name) / f"{kind}-runs", model)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
