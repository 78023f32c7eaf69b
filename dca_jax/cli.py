"""The command line, `dca-jax ...`: parse, call the library, print."""

import os
import sys
from enum import StrEnum
from json import dumps
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from dca_jax.config import LoraConfig, choose_dca
from dca_jax.dca import PRESETS, DCAConfig, parse_dca, preset_dca, relative_positions
from dca_jax.distributed import (
    PEER_TIMEOUT,
    START_TIMEOUT,
    ending_together,
    exit_on_input_error,
    initialize,
    is_primary,
    print_once,
    several_processes,
)
from dca_jax.errors import InputError
from dca_jax.evaluation import cli as evaluation
from dca_jax.finetune import cli as finetuning
from dca_jax.inference.chat import Conversation
from dca_jax.inference.documents import ask, read_document
from dca_jax.inference.llm import LLM, Options
from dca_jax.inference.load import load
from dca_jax.inference.sampling import Sampler
from dca_jax.planning.explain import explain, plot_relative_positions
from dca_jax.planning.facts import checkpoint_facts
from dca_jax.planning.memory import DEVICES
from dca_jax.planning.plan import plan
from dca_jax.planning.shapes import SHAPES, find_shape
from dca_jax.sharding import parse_mesh
from dca_jax.weights.hub import find_folder
from dca_jax.weights.huggingface import read_config
from dca_jax.weights.orbax import is_converted

MATRIX_TOKENS = 32  # texts of at most so many tokens have their matrix printed
PLOTTED_TOKENS = 4096  # and of at most so many drawn: the matrix is square
PROCESSES = "Several processes (one of these commands on each host, before COMMAND)"

app = typer.Typer(
    name="dca-jax",
    help="Language models read many times their trained length with Dual Chunk Attention.",
    epilog="`dca-jax COMMAND --help` explains a command, with examples.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)


app.add_typer(evaluation.app)
app.command()(finetuning.finetune)
app.command()(finetuning.preview)


class Dtype(StrEnum):
    """The choices of `--dtype`."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Remat(StrEnum):
    """The choices of `--remat`; `dca_jax.model.REMAT`."""

    layer = "layer"
    attention = "attention"
    products = "products"


class Base(StrEnum):
    """The choices of `--base`."""

    dtype = "dtype"
    int8 = "int8"


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder, a converted folder, or a name on the Hugging Face Hub.",
    ),
]
DcaOption = Annotated[
    str,
    typer.Option(
        "--dca",
        metavar="SETTING",
        help="**auto**: what the checkpoint asks for, else the paper's setting. Or a preset ("
        + ", ".join(PRESETS)
        + "), **S,Q** (chunk length and largest query position), or **none** for plain attention.",
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(help="Of weights and activations; default: bfloat16, on a CPU float32."),
]
MeshOption = Annotated[
    str | None,
    typer.Option(
        metavar="AXES",
        help="Share the work between devices: **tensor**=4 cuts weights and heads, **context**=2 "
        "the text, **data** and **fsdp** the batch; joined by commas. Default: one device.",
    ),
]
TemperatureOption = Annotated[
    float, typer.Option(help="0 takes the most likely token; 1 draws as the model says.")
]
TopKOption = Annotated[int | None, typer.Option(help="Draw from the K most likely tokens.")]
TopPOption = Annotated[
    float | None, typer.Option(help="Draw from the most likely tokens that reach P together.")
]
MinPOption = Annotated[
    float | None, typer.Option(help="Draw from tokens at least P times as likely as the likeliest.")
]
PenaltyOption = Annotated[
    float, typer.Option(help="Above 1: tokens that are in the text already become less likely.")
]
SeedOption = Annotated[int, typer.Option(help="The same seed draws the same text.")]
NewTokensOption = Annotated[int, typer.Option(help="Stop after so many tokens.")]
StopOption = Annotated[
    list[str] | None, typer.Option(help="Stop before this string; may be given several times.")
]


@app.command()
@exit_on_input_error()
def generate(
    model: ModelArgument,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The text to continue.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Continue this file (UTF-8) instead of a prompt.")
    ] = None,
    document: Annotated[
        Path | None, typer.Option(help="A text or PDF file to ask a --question about.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about --document.")] = None,
    dca: DcaOption = "auto",
    max_new_tokens: NewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
) -> None:
    r"""Continue a prompt or a file, or answer a question about a document.

    The new text goes to standard output as it comes; all else goes to standard error.

    For example:

    - `dca-jax generate ./Llama-2-7b-hf "Once upon a time"`

    - `dca-jax generate ./Llama-2-7b-chat-hf --document book.pdf --question "Who is Ahab?"`

    - `dca-jax generate ./CodeLlama-7b-hf --file long.py --stop $'\ndef ' --dca chunkllama`

    - `dca-jax generate ./Llama-2-7b-hf "Dear" --temperature 0.8 --top-p 0.95 --seed 7`

    - `dca-jax generate ./Llama-2-70b-hf --file book.txt --mesh context=2,tensor=4`
    """
    sampler = Sampler(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    options: Options = {
        "max_new_tokens": max_new_tokens,
        "sampler": sampler,
        "seed": seed,
        "stop": stop or [],
    }
    if (document is None) != (question is None):
        raise InputError("--document and --question go together")
    text = _one_text(prompt, file, document)
    llm = _load(model, dca, dtype, mesh)
    pieces = (
        llm.stream(text, **options) if question is None else ask(llm, text, question, **options)
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


@app.command()
@exit_on_input_error()
def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    dca: DcaOption = "auto",
    max_new_tokens: NewTokensOption = 1024,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
) -> None:
    """Talk to a chat model; each turn reads only what is new.

    `/reset` starts again, `/quit` (or Ctrl-D) ends, Ctrl-C cuts an answer short.

    For example: `dca-jax chat ./Llama-2-7b-chat-hf --temperature 0.7 --top-p 0.9`
    """
    _refuse_several_processes("chat")
    sampler = Sampler(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    llm = _load(model, dca, dtype, mesh)
    conversation = Conversation(llm, system=system)
    options: Options = {"max_new_tokens": max_new_tokens, "sampler": sampler, "seed": seed}
    console = Console(highlight=False)
    console.print("[dim]/reset starts again, /quit ends, Ctrl-C cuts an answer short[/dim]")
    while True:
        try:
            text = console.input("[bold green]> [/]").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/reset":
            conversation.reset()
        elif text:
            _say(console, conversation, text, options)


@app.command(name="explain")
@exit_on_input_error()
def explain_command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Take the trained length from here.")
    ] = None,
    trained_length: Annotated[
        int | None, typer.Option(help="Tokens the model was pretrained on, without a MODEL.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = None,
    chunk_len: Annotated[
        int | None, typer.Option(help="s, the stride of the chunks, instead of a preset.")
    ] = None,
    max_query_position: Annotated[
        int | None, typer.Option(help="Q, the largest position of a query; with --chunk-len.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of the text; default: 4 times the trained length.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Save a picture of the relative positions here (PNG, PDF).")
    ] = None,
) -> None:
    """Say what a setting of Dual Chunk Attention does to a text of some length.

    Up to 32 tokens the matrix of relative positions is printed: row i, column j holds how far back
    token i takes token j to be.

    For example:

    - `dca-jax explain ./Llama-2-7b-hf --length 32768`

    - `dca-jax explain --trained-length 4096 --preset chunkllama --length 65536`

    - `dca-jax explain --chunk-len 6 --max-query-position 9 --length 12` (Figure 2 of the paper)
    """
    if (chunk_len is None) != (max_query_position is None):
        raise InputError("--chunk-len and --max-query-position go together")
    if chunk_len is not None and max_query_position is not None:
        if preset is not None:
            raise InputError("give either --preset, or --chunk-len and --max-query-position")
        setting = DCAConfig(
            chunk_len=chunk_len,
            max_query_position=max_query_position,
            trained_length=trained_length,
        )
    elif model is not None:
        config = read_config(find_folder(model, weights=False))
        setting = choose_dca(preset or "auto", config)
    elif trained_length is not None:
        setting = preset_dca(preset or "paper", trained_length)
    else:
        raise InputError(
            "give a MODEL, or --trained-length, or --chunk-len with --max-query-position"
        )
    if setting is None:
        raise InputError("plain attention has nothing to explain; give a preset")
    tokens = 4 * (setting.trained_length or setting.chunk_len) if length is None else length
    if tokens < 1:
        raise InputError(f"--length must be at least 1, got {tokens}")
    if plot is not None:
        _save_plot(plot, tokens, setting)
    print(explain(setting, tokens))
    if tokens <= MATRIX_TOKENS:
        print("\n" + _matrix(tokens, setting))


@app.command()
@exit_on_input_error()
def info(model: ModelArgument) -> None:
    """Say what a checkpoint is, without reading its weights.

    For example: `dca-jax info ./Qwen2.5-7B-Instruct-1M`
    """
    folder = find_folder(model, weights=False)
    table = Table(title=model, show_header=False)
    for name, value in checkpoint_facts(folder, read_config(folder)).items():
        table.add_row(name, value)
    Console().print(table)


@app.command(name="plan")
@exit_on_input_error()
def plan_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder or a name on the Hugging Face Hub, of which config.json is read; or one "
            f"of {', '.join(SHAPES)}.",
        ),
    ],
    device: Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")],
    context_length: Annotated[
        int, typer.Option(help="Tokens of each text, those to be drawn included.")
    ],
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="AXES", help="As other commands take it. Default: the fewest devices that do."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Texts at once, on all devices together.")] = 1,
    train: Annotated[
        bool, typer.Option("--train", help="Train with AdamW instead of generating.")
    ] = False,
    dtype: Annotated[
        Dtype, typer.Option(help="Of weights and activations; training keeps float32 weights.")
    ] = Dtype.bfloat16,
    lora_rank: Annotated[
        int, typer.Option(help="With --train: train LoRA adapters of this rank only.")
    ] = 0,
    base: Annotated[
        Base, typer.Option(help="With --lora-rank: how the weights are kept that are not trained.")
    ] = Base.dtype,
    remat: Annotated[
        Remat,
        typer.Option(
            help="With --train: what is kept of each layer, as `dca-jax finetune` has it."
        ),
    ] = Remat.attention,
    json: Annotated[
        bool, typer.Option("--json", help="For scripts: bytes, tokens and meshes as JSON.")
    ] = False,
) -> None:
    """Say what a model takes of each device's memory, before anything is loaded.

    For example:

    - `dca-jax plan llama-2-70b --device h200 --mesh tensor=4 --context-length 100000`

    - `dca-jax plan ./Llama-2-7b-hf --device v5e --context-length 16384 --batch 8 --train`

    - `dca-jax plan llama-2-70b --device h200 --context-length 16384 --train --lora-rank 16`
    """
    found = plan(
        model,
        find_shape(model),
        device=device,
        mesh=None if mesh is None else parse_mesh(mesh),
        context_length=context_length,
        batch=batch,
        train=train,
        dtype=dtype.value,
        lora=LoraConfig(rank=lora_rank) if lora_rank else None,
        quantized=base is Base.int8,
        remat=remat.value,
    )
    if json:
        print(dumps(found.as_json(), indent=2))
        return
    table = Table(title=model, show_header=False)
    for name, value in found.facts().items():
        table.add_row(name, value)
    Console().print(table)


@app.command()
@exit_on_input_error()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The folder to convert.")],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to make; it must not exist.")
    ],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the written weights; default: as they are.")
    ] = None,
) -> None:
    """Convert a Hugging Face folder to Orbax, or a converted one back.

    Orbax checkpoints open on any mesh of devices, each reading its own part. DST appears only when
    it is whole: after an interruption just run the command again.

    For example:

    - `dca-jax convert ./Llama-2-7b-hf ./llama2-7b --dtype bfloat16`

    - `dca-jax convert ./llama2-7b ./Llama-2-7b-again`
    """
    _refuse_several_processes("convert")
    # The converters build on this package, so they are imported only where they are needed.
    from checkpoints_convert import hf_to_orbax, orbax_to_hf
    from checkpoints_convert.common import prepare_process

    prepare_process()
    converter = orbax_to_hf if is_converted(source) else hf_to_orbax
    wanted = None if dtype is None else np.dtype(dtype.value)
    converter.convert(source, destination, dtype=wanted, show=True)
    print(f"wrote {destination}")


@app.callback()
@exit_on_input_error()
def _prepare(
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            rich_help_panel=PROCESSES,
            help="Process 0's host and a free port there.",
        ),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(
            envvar="JAX_NUM_PROCESSES", rich_help_panel=PROCESSES, help="Of all hosts together."
        ),
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(
            envvar="JAX_PROCESS_ID", rich_help_panel=PROCESSES, help="This one's number, from 0."
        ),
    ] = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            rich_help_panel=PROCESSES,
            help="What is not given comes from SLURM, MPI, Kubernetes or the TPU pod.",
        ),
    ] = False,
    start_timeout: Annotated[
        int,
        typer.Option(
            rich_help_panel=PROCESSES, help="Seconds to wait until all processes are there."
        ),
    ] = START_TIMEOUT,
    peer_timeout: Annotated[
        int,
        typer.Option(
            rich_help_panel=PROCESSES, help="Seconds of silence after which one counts as dead."
        ),
    ] = PEER_TIMEOUT,
) -> None:
    """Keeps compiled programs between runs (JAX_COMPILATION_CACHE_DIR is respected).

    And joins this process with others, before any device is touched.
    """
    # Only its tokenizers are used, so nobody needs to be told that there is no PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "dca_jax" / "xla"))
        # By default only what took a second is kept, and a command compiles several such things.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if coordinator is not None or distributed:
        initialize(
            coordinator,
            num_processes,
            process_id,
            start_timeout=start_timeout,
            peer_timeout=peer_timeout,
        )
        print_once()
    elif not (num_processes is None and process_id is None):
        raise InputError("the number of processes and a process id go with --coordinator")


def main() -> None:
    """The entry point of the command `dca-jax`."""
    with ending_together():
        app()


def _load(model: str, dca: str, dtype: Dtype | None, mesh: str | None) -> LLM:
    setting = parse_dca(dca)
    with Console(stderr=True, quiet=not is_primary()).status(f"loading {model}"):
        return load(model, dca=setting, dtype=None if dtype is None else dtype.value, mesh=mesh)


def _refuse_several_processes(command: str) -> None:
    if several_processes():
        raise InputError(f"{command} runs in one process; start it alone, without --coordinator")


def _one_text(prompt: str | None, file: Path | None, document: Path | None) -> str:
    given = [source for source in (prompt, file, document) if source is not None]
    if len(given) != 1:
        raise InputError(
            "give exactly one of: a prompt, --file, --document (with --question); got "
            f"{len(given)} of them"
        )
    source = given[0]
    return source if isinstance(source, str) else read_document(source)


def _say(console: Console, conversation: Conversation, text: str, options: Options) -> None:
    """Prints one answer; neither Ctrl-C nor an answer that cannot be had ends the chat."""
    try:
        for piece in conversation.ask(text, **options):
            console.out(piece, end="", highlight=False)
    except KeyboardInterrupt:
        console.print(" [dim](cut short)[/dim]", end="")
    except InputError as error:
        console.print(f"error: {error}", style="red", markup=False, end="")
    console.print()


def _matrix(length: int, dca: DCAConfig) -> str:
    """Relative positions in columns, chunks apart, nothing above the diagonal."""
    matrix = relative_positions(length, dca)
    width = len(str(matrix.max())) + 1
    lines = []
    for i, row in enumerate(matrix):
        if i and i % dca.chunk_len == 0:
            lines.append("")
        cells = [f"{n:>{width}}" if n >= 0 else "" for n in row[: i + 1]]
        edges = range(0, i + 1, dca.chunk_len)
        lines.append(" |".join("".join(cells[edge : edge + dca.chunk_len]) for edge in edges))
    return "\n".join(lines)


def _save_plot(path: Path, length: int, dca: DCAConfig) -> None:
    import matplotlib.pyplot as plt  # slow to import, and needed here only

    if not path.parent.is_dir():
        raise InputError(f"--plot {path}: {path.parent} is no folder; create it first")
    if length > PLOTTED_TOKENS:
        raise InputError(f"--plot draws up to {PLOTTED_TOKENS} tokens, got --length {length}")
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    plot_relative_positions(length, dca, axes)
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as error:
        raise InputError(f"--plot {path} cannot be written: {error}") from None
    finally:
        plt.close(figure)
    print(f"saved {path}", file=sys.stderr)
