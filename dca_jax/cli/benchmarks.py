"""Commands that run other people's benchmarks of long texts: `eval ruler`."""

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from dca_jax.cli.options import (
    AdapterOption,
    BatchOption,
    CacheDtypeOption,
    DtypeOption,
    LengthOption,
    MeshOption,
    MethodsOption,
    ModelArgument,
    OutputOption,
    SparseOption,
    WeightsOption,
    find_model,
    load_model,
)
from dca_jax.cli.record import contents, run, task_files
from dca_jax.distributed import exit_on_input_error
from dca_jax.evaluation.ruler import task as ruler
from dca_jax.evaluation.ruler.benchmark import SEED, TASKS
from dca_jax.evaluation.ruler.sources import read_sources
from dca_jax.lengths import parse_tokens

ChatOption = Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")]


@exit_on_input_error()
def ruler_command(
    model: ModelArgument,
    task: Annotated[
        list[str],
        typer.Option(
            help="One of " + ", ".join(TASKS) + "; may be given several times (default: all whose "
            "files are given)."
        ),
    ] = [],  # noqa: B006
    length: LengthOption = ["4k", "8k", "16k", "32k", "64k", "128k"],  # noqa: B006
    method: MethodsOption = ["rope", "dca"],  # noqa: B006
    haystack: Annotated[
        Path | None,
        typer.Option(
            help="Hide needles in this: RULER's **PaulGrahamEssays.json**, or any long text or PDF."
        ),
    ] = None,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="TASK=FILE",
            help="**qa_1**: SQuAD's dev-v2.0.json; **qa_2**: HotpotQA's "
            "hotpot_dev_distractor_v1.json; **cwe**: RULER's english_words.json, for long lists.",
        ),
    ] = [],  # noqa: B006
    trials: Annotated[
        int, typer.Option(min=1, help="Number of samples for each task and length (RULER: 500).")
    ] = 20,
    seed: Annotated[int, typer.Option(min=0, help="RULER's random seed.")] = SEED,
    chat: ChatOption = False,
    output: OutputOption = None,
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    mesh: MeshOption = None,
    adapter: AdapterOption = None,
    weights: WeightsOption = None,
    sparse: SparseOption = "auto",
    batch: BatchOption = None,
) -> None:
    """RULER's thirteen tasks, with its own generators' prompts, scores and effective length.

    For example:

    - `dca-jax eval ruler ./Llama-2-7b-hf --length 4k --length 16k`

    - `dca-jax eval ruler ./Qwen2.5-7B-Instruct-1M --chat --haystack PaulGrahamEssays.json --data
      qa_1=dev-v2.0.json --data qa_2=hotpot_dev_distractor_v1.json --length 128k`
    """
    files, lengths = task_files(data), [parse_tokens(n) for n in length]
    sources, splitter = read_sources(haystack, files)
    tasks = task or ruler.possible_tasks(sources)
    ruler.check(sources, tasks=tasks, lengths=lengths, trials=trials)
    loading = {"weights": weights, "cache_dtype": cache_dtype, "sparse": sparse}
    opened = find_model(model, method, dtype, mesh, adapter, **loading, context=max(lengths))
    options = {"tasks": tasks, "lengths": lengths, "seed": seed, "chat": chat}
    ruler.check_room(opened.llm, sources, **options)
    llm = load_model(model, opened, [(min(batch or 1, trials), max(lengths))])
    words = hashlib.sha256("\n".join(map(" ".join, sources.words)).encode()).hexdigest()
    settings = {"seed": seed, "chat": chat, "words": words}
    read = contents(files)
    if haystack is not None:
        named = contents({"haystack": haystack})["haystack"]
        checksum = hashlib.sha256(f"{splitter} {named['sha256']}".encode()).hexdigest()
        name = f"{named['name']} (sentences end by {splitter})"
        read["haystack"] = {"name": name, "sha256": checksum}
    with run(output, "ruler", model, llm, settings, None, read, adapter=adapter) as log:
        ruler.evaluate(llm, sources, log, methods=method, trials=trials, batch=batch, **options)
