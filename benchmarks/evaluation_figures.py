"""The paper's Table 1 and Figures 4, 5 and 7 at the demo model's scale, with every method.

    python benchmarks/evaluation_figures.py measure --out outputs/evaluation

runs `dca-jax eval perplexity` and `eval passkey --form fitted` (at random depths and on a grid),
`benchmarks/perplexity.py` for 128k tokens with a Llama-3-8B shape, and `eval report`:

    OUT/perplexity/         Table 1, figure 4 left
    OUT/passkey/            figures 4 right and 7: random depths
    OUT/grid/               figure 5: a heat map per method
    OUT/llama-3-8b.json     tokens a second, memory and the share of attention
    OUT/report.html         all of the above but the last
    OUT.parts/METHOD/       each method's runs and their output

A model of 7M parameters takes longer to compile than to run, and every method is a program of its
own. So each method has a process, several of which share the device, and the results are merged at
the end. To resume an interrupted run, repeat the command; keep both folders.
"""

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from common import say
from tokenizers import Tokenizer

from dca_jax.cli.measure import app as evaluation
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.evaluation.report import SUMMARY, write_page, write_report
from dca_jax.evaluation.results import RUN, ResultLog, read_run
from dca_jax.inference.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path("models/demo-python-7m")
# Two aliases of other methods, and one whose scales must be measured for each model.
LEFT_OUT = ("auto", "none", "dpe")
EVERY = (*(name for name in METHODS if name not in LEFT_OUT), "dca:chunkllama")
EVERY += ("dca:chunkllama_ppl", "dca:chunkllama_flash_decoding", "dca+pi:2", "dca+ntk:2")
TASKS = ("perplexity", "passkey", "grid")
# fields of a part's summary that hold for all parts
FACTS = ("versions", "device", "devices", "platform")
# For processes that share a device: none preallocates most of its memory, and none spends more time
# on autotuning matrix products than these short programs would gain.
SHARING = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0",
}
TOKENS, LONG = "held_out.npy", "llama-3-8b.json"

ModelOption = Annotated[Path, typer.Option(help="The demo model's folder.")]
LengthsOption = Annotated[str, typer.Option(help="Tokens, separated by commas; 4k is 4096.")]
WindowsOption = Annotated[int, typer.Option(help="Windows per length.")]
TrialsOption = Annotated[int, typer.Option(help="Passkeys per length, at random depths.")]
GridOption = Annotated[int, typer.Option(help="Depths of the grid; two passkeys per cell.")]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__
)


@app.command()
@exit_on_input_error()
def measure(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("outputs/evaluation"),
    model: ModelOption = MODEL,
    methods: Annotated[str, typer.Option(help="Names, separated by commas.")] = ",".join(EVERY),
    lengths: LengthsOption = "512,1k,2k,4k,8k",
    windows: WindowsOption = 16,
    trials: TrialsOption = 16,
    grid: GridOption = 16,
    workers: Annotated[
        int, typer.Option(min=1, help="Number of methods evaluated at the same time.")
    ] = 8,
    long_model: Annotated[
        str, typer.Option(help="Shape of the model for the long text.")
    ] = "llama-3-8b",
    long_length: Annotated[str, typer.Option(help="Tokens of the long text.")] = "128k",
) -> None:
    """Evaluates every method and merges the results."""
    parts = out.with_name(out.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    save_tokens(model, parts / TOKENS)
    sizes = ("--lengths", lengths, "--windows", windows, "--trials", trials, "--grid", grid)

    def read(name: str) -> bool:
        folder = parts / name.replace(":", "-")
        command = (__file__, "method", name, folder, model, *sizes)
        return run_script(folder / "log.txt", *command, **SHARING)

    with ThreadPoolExecutor(workers) as pool:
        names = methods.split(",")
        ended = dict(zip(names, pool.map(read, names), strict=True))
    for task in TASKS:
        join([parts / name.replace(":", "-") / task for name in names], out / task)
    say(f"wrote {write_page(out)}")
    if not (out / LONG).is_file():
        script = Path(__file__).with_name("perplexity.py")
        options = ("--model", long_model, "--lengths", long_length, "--out", parts / LONG)
        ended[long_model] = run_script(parts / "long.txt", script, *options)
        if ended[long_model]:
            (parts / LONG).replace(out / LONG)
            say((parts / "long.txt").read_text())
    failed = [name for name, well in ended.items() if not well]
    if failed:
        raise InputError(
            f"not everything was evaluated, see {parts}: {', '.join(failed)}; try again"
        )


@app.command()
@exit_on_input_error()
def method(
    name: str,
    folder: Path,
    model: Path,
    lengths: LengthsOption,
    windows: WindowsOption,
    trials: TrialsOption,
    grid: GridOption,
) -> None:
    """Runs all three evaluations of one method in FOLDER; `measure` starts it as a process."""
    common: list[str] = ["--method", name, "--dtype", "float32"]
    for length in lengths.split(","):
        common += ["--length", length]
    fitted = ["--form", "fitted"]
    commands = {
        "perplexity": ["--tokens", folder.parent / TOKENS, "--stride", 2048, "--limit", windows],
        "passkey": [*fitted, "--trials", trials],
        "grid": [*fitted, "--trials", 2, "--grid", grid],
    }
    ended = []
    for task, options in commands.items():
        command = "perplexity" if task == "perplexity" else "passkey"
        arguments = [command, model, *common, *options, "--output", folder / task]
        try:
            evaluation(list(map(str, arguments)), standalone_mode=False)
        except SystemExit as end:  # some samples failed; the next evaluation may succeed
            ended.append(end.code)
    raise SystemExit(max(map(int, ended), default=0))


def save_tokens(model: Path, path: Path) -> None:
    """The demo model's held-out text as token ids; saved, since it differs between Pythons."""
    if path.is_file():
        return
    held_out_text = runpy.run_path(str(ROOT / "examples/demo_data.py"))["held_out_text"]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode(held_out_text(), add_special_tokens=False).ids
    np.save(path, np.asarray(ids, np.int32))


def run_script(log: Path, *arguments: object, **environment: str) -> bool:
    """Runs a Python script with its output in a file; returns whether it succeeded."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = os.environ | {"PYTHONPATH": path} | environment
    begin = time.monotonic()
    with log.open("w") as output:
        code = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables, check=False
        ).returncode
    say(f"{log}: {'done' if code == 0 else f'exit code {code}'}, {time.monotonic() - begin:.0f} s")
    return code == 0


def join(parts: Sequence[Path], folder: Path) -> None:
    """Merges the runs of several methods into one, with its table and plots."""
    runs = {part: read_run(part) for part in parts if (part / RUN).is_file()}
    if not runs:
        return
    first = next(iter(runs.values()))
    with ResultLog(folder, first.task, first.settings) as log:
        for record in (record for run in runs.values() for record in run.records):
            if record.value is not None and record.key not in log:
                log.add(record.key, record.value, record.seconds)
    summaries = [json.loads((p / SUMMARY).read_text()) for p in runs if (p / SUMMARY).is_file()]
    write_report(folder, {name: summaries[0][name] for name in FACTS} if summaries else None)


if __name__ == "__main__":
    app()
