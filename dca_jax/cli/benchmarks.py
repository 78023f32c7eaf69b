"""Published long-text benchmarks: `eval ruler`, `infinite-bench` and `longbench-v2`."""

import hashlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dca_jax.cli.options import (
    AdapterOption,
    BatchOption,
    CacheDtypeOption,
    DtypeOption,
    LengthOption,
    LimitOption,
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
from dca_jax.errors import InputError
from dca_jax.evaluation import infinite_bench, longbench_v2
from dca_jax.evaluation.benchmark_files import longest_text
from dca_jax.evaluation.ruler import task as ruler
from dca_jax.evaluation.ruler.benchmark import SEED, TASKS
from dca_jax.evaluation.ruler.sources import read_sources
from dca_jax.lengths import parse_tokens


class LongBenchForm(StrEnum):
    """Values of `eval longbench-v2 --form`."""

    answer = "answer"
    letter = "letter"


ChatOption = Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")]


@exit_on_input_error()
def ruler_command(
    model: ModelArgument,
    task: Annotated[
        list[str],
        typer.Option(
            help="One of " + ", ".join(TASKS) + "; may be repeated (default: all whose files are "
            "given)."
        ),
    ] = [],  # noqa: B006
    length: LengthOption = ["4k", "8k", "16k", "32k", "64k", "128k"],  # noqa: B006
    method: MethodsOption = ["rope", "dca"],  # noqa: B006
    haystack: Annotated[
        Path | None,
        typer.Option(
            help="Text to hide needles in: RULER's **PaulGrahamEssays.json**, or any text or PDF."
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
    """RULER's thirteen tasks, with its original prompts, scores and effective length.

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
    read = dict(contents(files))
    if haystack is not None:
        named = contents({"haystack": haystack})["haystack"]
        checksum = hashlib.sha256(f"{splitter} {named['sha256']}".encode()).hexdigest()
        name = f"{named['name']} (sentences end by {splitter})"
        read["haystack"] = {"name": name, "sha256": checksum}
    with run(output, "ruler", model, llm, settings, None, read, adapter=adapter) as log:
        ruler.evaluate(llm, sources, log, methods=method, trials=trials, batch=batch, **options)


@exit_on_input_error()
def infinite_bench_command(
    model: ModelArgument,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="TASK=FILE",
            help="InfiniteBench's file for a task; tasks: " + ", ".join(infinite_bench.TASKS) + ".",
        ),
    ] = [],  # noqa: B006
    length: Annotated[
        list[str],
        typer.Option(
            "--length",
            metavar="TOKENS",
            help="Generate questions of this length, such as 64k; may be repeated.",
        ),
    ] = [],  # noqa: B006
    task: Annotated[
        list[str], typer.Option(help="With --length: tasks to generate; may be repeated.")
    ] = list(infinite_bench.TASKS),  # noqa: B006
    trials: Annotated[
        int, typer.Option(min=1, help="With --length: number of questions per task and length.")
    ] = 20,
    method: MethodsOption = ["rope", "dca"],  # noqa: B006
    max_length: Annotated[
        str,
        typer.Option(
            metavar="TOKENS",
            help="With --data: length of prompt and answer in tokens; longer ones are cut in the "
            "middle.",
        ),
    ] = "128k",
    chat: ChatOption = False,
    output: OutputOption = None,
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    mesh: MeshOption = None,
    adapter: AdapterOption = None,
    weights: WeightsOption = None,
    sparse: SparseOption = "auto",
    batch: BatchOption = None,
    limit: LimitOption = None,
) -> None:
    """InfiniteBench's passkeys, number strings and JSON values, from its files or of any length.

    For example:

    - `dca-jax eval infinite-bench ./Llama-2-7b-hf --length 16k --length 64k`

    - `dca-jax eval infinite-bench ./Qwen2.5-7B-Instruct-1M --chat --data
      kv_retrieval=kv_retrieval.jsonl --max-length 128k`
    """
    if not data and not length:
        raise InputError(
            "give question files (--data TASK=FILE), or --length to generate questions"
        )
    given, lengths = task_files(data), [parse_tokens(n) for n in length]
    files = infinite_bench.read_files(given)
    infinite_bench.check_tasks(task)
    longest = parse_tokens(max_length)
    contexts = [asked.context for some in files.values() for asked in some[:limit]]
    loading = {"weights": weights, "cache_dtype": cache_dtype, "sparse": sparse}
    longest_made = max(lengths, default=0)
    context = max(longest_made, longest if contexts else 0)
    opened = find_model(model, method, dtype, mesh, adapter, **loading, context=context)
    longest_read = min(longest, longest_text(opened.llm, contexts)) if contexts else 0
    need = max(longest_made, longest_read)
    llm = load_model(model, opened, [(batch or 1, need)])
    settings = {"chat": chat, "max_length": longest}
    with run(
        output, "infinite-bench", model, llm, settings, None, contents(given), adapter=adapter
    ) as log:
        infinite_bench.evaluate(
            llm,
            log,
            files=files,
            tasks=task,
            methods=method,
            lengths=lengths,
            trials=trials,
            max_length=longest,
            limit=limit,
            chat=chat,
            batch=batch,
        )


@exit_on_input_error()
def longbench_v2_command(
    model: ModelArgument,
    data: Annotated[Path, typer.Option(metavar="FILE", help="LongBench v2's **data.json**.")],
    form: Annotated[
        LongBenchForm,
        typer.Option(
            help="**answer**: the model writes an answer, as on the leaderboard; **letter**: the "
            "most likely letter is the answer, which needs no decoding."
        ),
    ] = LongBenchForm.answer,
    method: MethodsOption = ["dca"],  # noqa: B006
    max_length: Annotated[
        str,
        typer.Option(
            metavar="TOKENS",
            help="Length of a prompt in tokens; longer ones are cut in the middle.",
        ),
    ] = str(longbench_v2.MAX_LENGTH),
    chat: ChatOption = False,
    output: OutputOption = None,
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    mesh: MeshOption = None,
    adapter: AdapterOption = None,
    weights: WeightsOption = None,
    sparse: SparseOption = "auto",
    batch: BatchOption = None,
    limit: LimitOption = None,
) -> None:
    """Questions with four choices about texts of up to two million words (LongBench v2).

    For example:

    - `dca-jax eval longbench-v2 ./Qwen2.5-7B-Instruct-1M --data data.json --chat`

    - `dca-jax eval longbench-v2 ./Llama-2-7b-hf --data data.json --form letter --max-length 32k`
    """
    rows, length = longbench_v2.read_file(data), parse_tokens(max_length)
    loading = {"weights": weights, "cache_dtype": cache_dtype, "sparse": sparse}
    opened = find_model(model, method, dtype, mesh, adapter, **loading, context=length)
    texts = [row["context"] for row in rows[:limit]]
    longest = min(length, longest_text(opened.llm, texts))
    rows_at_once = batch or 1 if form == LongBenchForm.answer else 1
    llm = load_model(model, opened, [(min(rows_at_once, len(texts)), longest)])
    settings = {"form": form.value, "max_length": length, "chat": chat}
    read = contents({"longbench-v2": data})
    with run(output, "longbench-v2", model, llm, settings, None, read, adapter=adapter) as log:
        options = {"form": form.value, "methods": method, "max_length": length, "chat": chat}
        longbench_v2.evaluate(llm, log, rows, limit=limit, batch=batch, **options)
