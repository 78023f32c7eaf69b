"""Commands that measure: `eval ...`."""

import hashlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dca_jax.cli import benchmarks
from dca_jax.cli.options import (
    AdapterOption,
    BatchOption,
    CacheDtypeOption,
    DtypeOption,
    LengthOption,
    LimitOption,
    MeshOption,
    MethodOption,
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
from dca_jax.evaluation import (
    few_shot,
    l_eval,
    needle,
    passkey,
    report,
    speed,
    texts,
    windows,
)
from dca_jax.evaluation.benchmark_files import longest_text
from dca_jax.evaluation.examples import Choice
from dca_jax.evaluation.haystacks import Haystack
from dca_jax.evaluation.paper import MODELS
from dca_jax.inference.documents import read_document
from dca_jax.lengths import parse_tokens

app = typer.Typer(
    name="eval",
    help="Evaluate a model on long texts: each of the paper's tables and figures is one command.",
    epilog="Each command writes a folder: one line per sample as it finishes, then a summary, a "
    "table and plots. Repeat an interrupted command to resume it. `dca-jax eval report` makes one "
    "page from many such folders.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)


class Form(StrEnum):
    """Values of `eval perplexity --form`."""

    paper = "paper"
    strided = "strided"
    rolling = "rolling"


class PasskeyForm(StrEnum):
    """Values of `eval passkey --form`."""

    paper = "paper"
    fitted = "fitted"


PaperOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Show the paper's figures alongside, for one of " + ", ".join(MODELS)
    ),
]


@app.command()
@exit_on_input_error()
def perplexity(
    model: ModelArgument,
    text: Annotated[Path | None, typer.Option(help="A text file (UTF-8) or a PDF.")] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(help="A file of token ids instead: .npy, or raw like ChunkLlama's .bin."),
    ] = None,
    length: LengthOption = ["4k", "8k", "16k", "32k", "64k"],  # noqa: B006
    method: MethodsOption = ["rope", "dca:chunkllama_ppl"],  # noqa: B006
    form: Annotated[
        Form, typer.Option(help="How windows are placed and averaged; see the docs.")
    ] = Form.paper,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens between window starts (default: 256; 512 for strided)."),
    ] = None,
    output: OutputOption = None,
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    mesh: MeshOption = None,
    adapter: AdapterOption = None,
    weights: WeightsOption = None,
    sparse: SparseOption = "auto",
    batch: BatchOption = None,
    limit: LimitOption = None,
    paper: PaperOption = None,
) -> None:
    """Perplexity of a long text by context length (Tables 1 and 2).

    For example:

    - `dca-jax eval perplexity ./Llama-2-7b-hf --tokens pg19.validation.bin --paper llama2-7b`

    - `dca-jax eval perplexity ./Llama-2-7b-hf --text book.txt --length 4k --length 32k --limit 8`
    """
    if (text is None) == (tokens is None):
        raise InputError("give either --text or --tokens")
    lengths = [parse_tokens(n) for n in length]
    loading = {"weights": weights, "cache_dtype": cache_dtype, "sparse": sparse}
    opened = find_model(model, method, dtype, mesh, adapter, **loading, context=max(lengths))
    if tokens is not None:
        source = texts.read_token_file(tokens, opened.llm.model.config.vocab_size)
    else:
        assert text is not None
        source = texts.read_text(opened.llm, text)
    prefix: list[int] = []
    if form == Form.rolling:
        prefix = [texts.prefix_token(opened.llm)]
    elif form == Form.strided and text is not None:
        prefix = texts.special_prefix(opened.llm)
    stride = windows.STRIDES.get(form.value) if stride is None else stride
    cut = {"form": form.value, "lengths": lengths, "stride": stride, "batch": batch, "limit": limit}
    llm = load_model(model, opened, windows.batches(len(prefix) + len(source.tokens), **cut))
    settings = {"form": form.value, "stride": stride, "prefix": prefix, **source.facts}
    with run(output, "perplexity", model, llm, settings, paper, adapter=adapter) as log:
        windows.evaluate(
            llm.model,
            texts.joined(prefix, source.tokens),
            log,
            form=form.value,
            methods=method,
            lengths=lengths,
            stride=stride,
            batch=batch,
            limit=limit,
            cache_dtype=llm.cache_dtype,
        )


@app.command(name="passkey")
@exit_on_input_error()
def passkey_command(
    model: ModelArgument,
    length: LengthOption = ["4k", "8k", "12k", "16k", "20k"],  # noqa: B006
    method: MethodsOption = ["rope", "dca:chunkllama"],  # noqa: B006
    form: Annotated[
        PasskeyForm,
        typer.Option(help="**paper**: ChunkLlama's prompt; **fitted**: at most --length tokens."),
    ] = PasskeyForm.paper,
    grid: Annotated[
        int | None,
        typer.Option(
            min=1, help="Hide the key at this many evenly spaced depths (16 in the paper's Fig. 5)."
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Number of prompts for each length and depth.")
    ] = 20,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask through the model's chat template.")
    ] = False,
    output: OutputOption = None,
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    mesh: MeshOption = None,
    adapter: AdapterOption = None,
    weights: WeightsOption = None,
    sparse: SparseOption = "auto",
    batch: BatchOption = None,
    paper: PaperOption = None,
) -> None:
    """Passkeys hidden in filler text, at random or evenly spaced depths (Fig. 4 to 7).

    For example:

    - `dca-jax eval passkey ./Llama-2-13b-hf --length 4k --length 16k --trials 50`

    - `dca-jax eval passkey ./Llama-2-13b-hf --grid 16 --method pi --method ntk --method dca`
    """
    lengths = [parse_tokens(n) for n in length]
    loading = {"weights": weights, "cache_dtype": cache_dtype, "sparse": sparse}
    opened = find_model(model, method, dtype, mesh, adapter, **loading, context=max(lengths))
    tokens = passkey.prompt_tokens(opened.llm, form.value, max(lengths), chat=chat)
    llm = load_model(model, opened, [(min(batch or 1, trials * (grid or 1)), tokens)])
    depths = None if grid is None else [(n + 1) / grid for n in range(grid)]
    settings = {"form": form.value, **({"chat": True} if chat else {})}
    with run(output, "passkey", model, llm, settings, paper, adapter=adapter) as log:
        passkey.evaluate(
            llm,
            log,
            form=form.value,
            methods=method,
            lengths=lengths,
            depths=depths,
            trials=trials,
            chat=chat,
            batch=batch,
        )


@app.command(name="needle")
@exit_on_input_error()
def needle_command(
    model: ModelArgument,
    haystack: Annotated[
        Path | None,
        typer.Option(
            help="A long text (UTF-8) or PDF to hide needles in (default: filler sentences)."
        ),
    ] = None,
    task: Annotated[
        list[str],
        typer.Option(help="One of " + ", ".join(needle.TASKS) + "; may be repeated."),
    ] = ["single"],  # noqa: B006
    length: LengthOption = ["4k", "8k", "16k", "32k", "64k", "128k"],  # noqa: B006
    method: MethodsOption = ["rope", "dca"],  # noqa: B006
    grid: Annotated[
        int | None,
        typer.Option(min=2, help="Put the single needle at this many depths, from start to end."),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Number of samples for each length and depth.")
    ] = 10,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask through the model's chat template.")
    ] = False,
    output: OutputOption = None,
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    mesh: MeshOption = None,
    adapter: AdapterOption = None,
    weights: WeightsOption = None,
    sparse: SparseOption = "auto",
    batch: BatchOption = None,
) -> None:
    """Needles in your own haystack, one or several, and chains of variables (after RULER).

    For example:

    - `dca-jax eval needle ./Llama-2-7b-chat-hf --haystack book.txt --grid 10 --chat`

    - `dca-jax eval needle ./Qwen2.5-7B-Instruct-1M --task multi-query --task variables --length 1M`
    """
    hay = Haystack.noise() if haystack is None else _own_haystack(haystack)
    text = "\n".join(hay.units).encode()
    settings = {
        "haystack": "noise" if haystack is None else haystack.name,
        "sha256": hashlib.sha256(text).hexdigest(),
        "chat": chat,
        **({"places": "any line"} if haystack is None else {}),
    }
    lengths = [parse_tokens(n) for n in length]
    loading = {"weights": weights, "cache_dtype": cache_dtype, "sparse": sparse}
    opened = find_model(model, method, dtype, mesh, adapter, **loading, context=max(lengths))
    llm = load_model(model, opened, [(min(batch or 1, trials * (grid or 1)), max(lengths))])
    with run(output, "needle", model, llm, settings, None, adapter=adapter) as log:
        needle.evaluate(
            llm,
            hay,
            log,
            tasks=task,
            methods=method,
            lengths=lengths,
            depths=None if grid is None else [n / (grid - 1) for n in range(grid)],
            trials=trials,
            chat=chat,
            batch=batch,
        )


def _own_haystack(path: Path) -> Haystack:
    return Haystack.of_text(read_document(path))


@app.command(name="few-shot")
@exit_on_input_error()
def few_shot_command(
    model: ModelArgument,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="TASK=FILE",
            help="ChunkLlama's or L-Eval's file for a task; tasks: "
            + ", ".join(few_shot.TASKS)
            + ".",
        ),
    ],
    pool: Annotated[
        list[str],
        typer.Option(
            metavar="TASK=FILE",
            help="Choose the examples from this file, such as the task's training set: JSON lines "
            "with query and output, or L-Eval's format.",
        ),
    ] = [],  # noqa: B006
    examples: Annotated[
        Choice | None,
        typer.Option(
            help="With --pool: random examples (the default), or the most (best) or least (worst) "
            "similar to the question by BM25 (Table 5)."
        ),
    ] = None,
    method: MethodsOption = ["dca:chunkllama"],  # noqa: B006
    max_length: Annotated[
        str,
        typer.Option(
            metavar="TOKENS",
            help="Length of prompt and answer in tokens; documents are truncated on the left.",
        ),
    ] = "16000",
    output: OutputOption = None,
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    mesh: MeshOption = None,
    adapter: AdapterOption = None,
    weights: WeightsOption = None,
    sparse: SparseOption = "auto",
    batch: BatchOption = None,
    limit: LimitOption = None,
    paper: PaperOption = None,
) -> None:
    """Questions about long documents, with examples, for base models (Tables 3 and 5).

    For example:

    - `dca-jax eval few-shot ./Llama-2-7b-hf --data qasper=few_shot_qasper.jsonl --paper llama2-7b`

    - `dca-jax eval few-shot ./Llama-2-7b-hf --data qmsum=meeting_summ.jsonl --limit 20`

    - `dca-jax eval few-shot ./Llama-2-7b-hf --data qasper=test.jsonl --pool qasper=train.jsonl
      --examples best --paper llama2-7b`
    """
    if examples is not None and not pool:
        raise InputError("--examples needs --pool TASK=FILE to choose from")
    files, pools, length = task_files(data), task_files(pool, "--pool"), parse_tokens(max_length)
    choice = examples or Choice.random
    chosen = {"max_length": length, "pools": pools, "choice": choice}
    # What is wrong with the files is said before any weight is read.
    items = few_shot.read_files(files, **chosen)
    loading = {"weights": weights, "cache_dtype": cache_dtype, "sparse": sparse}
    opened = find_model(model, method, dtype, mesh, adapter, **loading, context=length)
    documents = [item.document for some in items.values() for item in some[:limit]]
    need = min(batch or 1, len(documents)), min(length, longest_text(opened.llm, documents))
    llm = load_model(model, opened, [need])
    settings = {"max_length": length} | ({"examples": choice.value} if pools else {})
    data_files = contents(files | {f"{task} (pool)": path for task, path in pools.items()})
    with run(output, "few-shot", model, llm, settings, paper, data_files, adapter=adapter) as log:
        few_shot.evaluate(llm, log, files=files, methods=method, limit=limit, batch=batch, **chosen)


@app.command(name="l-eval")
@exit_on_input_error()
def l_eval_command(
    model: ModelArgument,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="TASK=FILE", help="Tasks: " + ", ".join(l_eval.TASKS) + "; files: L-Eval's."
        ),
    ],
    method: MethodsOption = ["dca:chunkllama"],  # noqa: B006
    max_length: Annotated[
        str,
        typer.Option(
            metavar="TOKENS",
            help="Length of prompt and answer in tokens; documents are truncated on the right.",
        ),
    ] = "16000",
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Use the model's own chat template instead of Llama 2's prompt."
        ),
    ] = False,
    output: OutputOption = None,
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    mesh: MeshOption = None,
    adapter: AdapterOption = None,
    weights: WeightsOption = None,
    sparse: SparseOption = "auto",
    batch: BatchOption = None,
    limit: LimitOption = None,
    paper: PaperOption = None,
) -> None:
    """Questions about long documents, without examples, for chat models (Table 4).

    For example:

    - `dca-jax eval l-eval ./Llama-2-7b-chat-hf --data tpo=tpo.jsonl --data sci_fi=sci_fi.jsonl`

    - `dca-jax eval l-eval ./Qwen2.5-7B-Instruct-1M --data quality=quality.jsonl --chat`
    """
    files, length = task_files(data), parse_tokens(max_length)
    # What is wrong with the files is said before any weight is read.
    rows = l_eval.read_files(files, length)
    loading = {"weights": weights, "cache_dtype": cache_dtype, "sparse": sparse}
    opened = find_model(model, method, dtype, mesh, adapter, **loading, context=length)
    documents = [row["input"] for some in rows.values() for row in some[:limit]]
    need = min(batch or 1, len(documents)), min(length, longest_text(opened.llm, documents))
    llm = load_model(model, opened, [need])
    settings = {"max_length": length, "chat": chat}
    with run(
        output, "l-eval", model, llm, settings, paper, contents(files), adapter=adapter
    ) as log:
        options = {"methods": method, "max_length": length, "limit": limit, "batch": batch}
        l_eval.evaluate(llm, log, files=files, chat=chat, **options)


app.command(name="ruler")(benchmarks.ruler_command)
app.command(name="infinite-bench")(benchmarks.infinite_bench_command)
app.command(name="longbench-v2")(benchmarks.longbench_v2_command)


@app.command(name="speed")
@exit_on_input_error()
def speed_command(
    model: ModelArgument,
    length: LengthOption = ["4k", "8k", "16k", "32k"],  # noqa: B006
    attention: Annotated[
        list[str], typer.Option(help="One of dense, flash and dca; may be repeated.")
    ] = list(speed.ATTENTIONS),  # noqa: B006
    method: MethodOption = "dca",
    trials: Annotated[
        int, typer.Option(min=1, help="Number of timed runs; fewer if they take long.")
    ] = speed.TRIALS,
    output: OutputOption = None,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    adapter: AdapterOption = None,
    weights: WeightsOption = None,
) -> None:
    """Prefill time and memory with dense, flash and Dual Chunk Attention (Fig. 3).

    For example: `dca-jax eval speed ./Llama-2-7b-hf --length 4k --length 32k`
    """
    lengths = [parse_tokens(n) for n in length]
    loading = {"weights": weights, "context": max(lengths), "sparse": "off"}
    opened = find_model(model, [method], dtype, mesh, adapter, **loading)
    # Running out of memory is a result here, so only the shortest text must fit.
    llm = load_model(model, opened, [(1, min(lengths))])
    with run(output, "speed", model, llm, {"method": method}, None, adapter=adapter) as log:
        options = {"attentions": attention, "lengths": lengths, "setting": method}
        speed.evaluate(llm.model, log, trials=trials, **options)


@app.command(name="report")
@exit_on_input_error()
def report_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of results.")],
) -> None:
    """Make one self-contained HTML page from all results in a folder and its subfolders.

    For example: `dca-jax eval report outputs`
    """
    print(report.write_page(folder))
