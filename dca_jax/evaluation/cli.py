"""The command line `dca-jax eval ...`: parse, call the library, print."""

import hashlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

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
from dca_jax.evaluation.command import load_model, names_of, parse_tokens, run, task_files
from dca_jax.evaluation.haystacks import Haystack
from dca_jax.evaluation.methods import METHODS
from dca_jax.evaluation.paper import MODELS
from dca_jax.inference.documents import read_document

app = typer.Typer(
    name="eval",
    help="Evaluate a model on long texts: the paper's tables and figures, each by one command.",
    epilog="Each command writes a folder: a line a sample as it comes (the same command goes on "
    "where it was stopped), then a summary, a table and pictures. `dca-jax eval report` makes one "
    "page of many such folders.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


class Form(StrEnum):
    """The choices of `eval perplexity --form`."""

    paper = "paper"
    strided = "strided"
    rolling = "rolling"


class PasskeyForm(StrEnum):
    """The choices of `eval passkey --form`."""

    paper = "paper"
    fitted = "fitted"


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder, a converted folder, or a name on the Hugging Face Hub.",
    ),
]
MethodOption = Annotated[
    list[str],
    typer.Option(
        "--method",
        metavar="NAME",
        help="How to read, several times for several: " + ", ".join(METHODS) + ", with a setting "
        "as in **dca:chunkllama**, or over a scaled rope as in **dca+ntk:2**.",
    ),
]
LengthOption = Annotated[
    list[str],
    typer.Option("--length", metavar="TOKENS", help="Such as 4096 or 4k; several times for more."),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(help="The folder of the results; default: outputs/, by command and model."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16 or float32; default: bfloat16, on a CPU float32."),
]
MeshOption = Annotated[
    str | None,
    typer.Option(
        metavar="AXES",
        help="Share the work between devices, as in **context=2,tensor=4**; default: one device.",
    ),
]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Texts read together.")]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help="Only so many samples of each kind; for a first look.")
]
PaperOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Show the paper's figures beside: " + ", ".join(MODELS)),
]


@app.command()
@exit_on_input_error()
def perplexity(
    model: ModelArgument,
    text: Annotated[Path | None, typer.Option(help="A text file (UTF-8) or a PDF.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Token ids instead: .npy, or raw as ChunkLlama's .bin.")
    ] = None,
    length: LengthOption = ["4k", "8k", "16k", "32k", "64k"],  # noqa: B006
    method: MethodOption = ["rope", "dca:chunkllama_ppl"],  # noqa: B006
    form: Annotated[
        Form, typer.Option(help="Which windows, and how they are averaged; see the docs.")
    ] = Form.paper,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from window to window; 256, strided: 512.")
    ] = None,
    output: OutputOption = None,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    batch: BatchOption = None,
    limit: LimitOption = None,
    paper: PaperOption = None,
) -> None:
    """Perplexity of a long text by length of context (Tables 1 and 2).

    For example:

    - `dca-jax eval perplexity ./Llama-2-7b-hf --tokens pg19.validation.bin --paper llama2-7b`

    - `dca-jax eval perplexity ./Llama-2-7b-hf --text book.txt --length 4k --length 32k --limit 8`
    """
    if (text is None) == (tokens is None):
        raise InputError("give either --text or --tokens")
    lengths = [parse_tokens(n) for n in length]
    llm = load_model(model, dtype, mesh)
    if tokens is not None:
        source = texts.read_token_file(tokens, llm.model.config.vocab_size)
    else:
        assert text is not None
        source = texts.read_text(llm, text)
    prefix: list[int] = []
    if form == Form.rolling:
        prefix = [texts.prefix_token(llm)]
    elif form == Form.strided and text is not None:
        prefix = texts.special_prefix(llm)
    stride = windows.STRIDES.get(form.value) if stride is None else stride
    settings = {"form": form.value, "stride": stride, "prefix": prefix, **source.facts}
    with run(output, "perplexity", model, llm, settings, paper) as log:
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
        )


@app.command(name="passkey")
@exit_on_input_error()
def passkey_command(
    model: ModelArgument,
    length: LengthOption = ["4k", "8k", "12k", "16k", "20k"],  # noqa: B006
    method: MethodOption = ["rope", "dca:chunkllama"],  # noqa: B006
    form: Annotated[
        PasskeyForm,
        typer.Option(help="**paper**: ChunkLlama's prompt; **fitted**: never longer than asked."),
    ] = PasskeyForm.paper,
    grid: Annotated[
        int | None,
        typer.Option(min=1, help="Hide the key at so many even depths (the paper's 16: Fig. 5)."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Prompts of each length and depth.")] = 20,
    output: OutputOption = None,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    batch: BatchOption = None,
    paper: PaperOption = None,
) -> None:
    """Passkeys hidden in dull text, at random depths or on a grid of them (Fig. 4 to 7).

    For example:

    - `dca-jax eval passkey ./Llama-2-13b-hf --length 4k --length 16k --trials 50`

    - `dca-jax eval passkey ./Llama-2-13b-hf --grid 16 --method pi --method ntk --method dca`
    """
    llm = load_model(model, dtype, mesh)
    depths = None if grid is None else [(n + 1) / grid for n in range(grid)]
    with run(output, "passkey", model, llm, {"form": form.value}, paper) as log:
        passkey.evaluate(
            llm,
            log,
            form=form.value,
            methods=method,
            lengths=[parse_tokens(n) for n in length],
            depths=depths,
            trials=trials,
            batch=batch,
        )


@app.command(name="needle")
@exit_on_input_error()
def needle_command(
    model: ModelArgument,
    haystack: Annotated[
        Path | None,
        typer.Option(help="A long text (UTF-8) or PDF to hide things in; default: dull noise."),
    ] = None,
    task: Annotated[
        list[str], typer.Option(help="Of " + ", ".join(needle.TASKS) + "; several times for more.")
    ] = ["single"],  # noqa: B006
    length: LengthOption = ["4k", "8k", "16k", "32k", "64k", "128k"],  # noqa: B006
    method: MethodOption = ["rope", "dca"],  # noqa: B006
    grid: Annotated[
        int | None,
        typer.Option(min=2, help="Put the single needle at so many depths, from start to end."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Samples of each length and depth.")] = 10,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask as a user would, by the model's chat template.")
    ] = False,
    output: OutputOption = None,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    batch: BatchOption = None,
) -> None:
    """Needles in a haystack of your own, several at once, and chains of variables (after RULER).

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
    }
    llm = load_model(model, dtype, mesh)
    with run(output, "needle", model, llm, settings, None) as log:
        needle.evaluate(
            llm,
            hay,
            log,
            tasks=task,
            methods=method,
            lengths=[parse_tokens(n) for n in length],
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
            help="Of " + ", ".join(few_shot.TASKS) + ": ChunkLlama's file, or L-Eval's.",
        ),
    ],
    method: MethodOption = ["dca"],  # noqa: B006
    max_length: Annotated[
        str, typer.Option(help="Tokens of prompt and answer; documents are cut from the left.")
    ] = "16000",
    output: OutputOption = None,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    batch: BatchOption = None,
    limit: LimitOption = None,
    paper: PaperOption = None,
) -> None:
    """Questions about long documents, with examples, for base models (Table 3).

    For example:

    - `dca-jax eval few-shot ./Llama-2-7b-hf --data qasper=few_shot_qasper.jsonl --paper llama2-7b`

    - `dca-jax eval few-shot ./Llama-2-7b-hf --data qmsum=meeting_summ.jsonl --limit 20`
    """
    files, length = task_files(data), parse_tokens(max_length)
    settings = {"max_length": length, "files": names_of(files)}
    llm = load_model(model, dtype, mesh)
    with run(output, "few-shot", model, llm, settings, paper) as log:
        options = {"methods": method, "max_length": length, "limit": limit, "batch": batch}
        few_shot.evaluate(llm, log, files=files, **options)


@app.command(name="l-eval")
@exit_on_input_error()
def l_eval_command(
    model: ModelArgument,
    data: Annotated[
        list[str],
        typer.Option(metavar="TASK=FILE", help="Of " + ", ".join(l_eval.TASKS) + ": L-Eval's."),
    ],
    method: MethodOption = ["dca"],  # noqa: B006
    max_length: Annotated[
        str, typer.Option(help="Tokens of prompt and answer; documents are cut from the right.")
    ] = "16000",
    chat: Annotated[
        bool, typer.Option("--chat", help="By the model's own chat template, not Llama 2's prompt.")
    ] = False,
    output: OutputOption = None,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
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
    settings = {"max_length": length, "chat": chat, "files": names_of(files)}
    llm = load_model(model, dtype, mesh)
    with run(output, "l-eval", model, llm, settings, paper) as log:
        options = {"methods": method, "max_length": length, "limit": limit, "batch": batch}
        l_eval.evaluate(llm, log, files=files, chat=chat, **options)


@app.command(name="speed")
@exit_on_input_error()
def speed_command(
    model: ModelArgument,
    length: LengthOption = ["4k", "8k", "16k", "32k"],  # noqa: B006
    attention: Annotated[
        list[str], typer.Option(help="Of dense, flash and dca; several times for several.")
    ] = list(speed.ATTENTIONS),  # noqa: B006
    method: Annotated[str, typer.Option(metavar="NAME", help="The setting of dca.")] = "dca",
    trials: Annotated[
        int, typer.Option(min=1, help="Readings timed, fewer where they take long.")
    ] = speed.TRIALS,
    output: OutputOption = None,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
) -> None:
    """Time and memory of reading a prompt with dense, flash and Dual Chunk Attention (Fig. 3).

    For example: `dca-jax eval speed ./Llama-2-7b-hf --length 4k --length 32k`
    """
    lengths = [parse_tokens(n) for n in length]
    llm = load_model(model, dtype, mesh)
    with run(output, "speed", model, llm, {"method": method}, None) as log:
        options = {"attentions": attention, "lengths": lengths, "setting": method}
        speed.evaluate(llm.model, log, trials=trials, **options)


@app.command(name="report")
@exit_on_input_error()
def report_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of results.")],
) -> None:
    """Make one HTML page, with everything in it, of all results in a folder and below it.

    For example: `dca-jax eval report outputs`
    """
    print(report.write_page(folder))
