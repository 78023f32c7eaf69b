"""Commands that prepare a run: `convert`, `info`, `plan` and `explain`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from dca_jax.attention.backend import PLAIN
from dca_jax.attention.bands import PositionMethod
from dca_jax.attention.sparse import Sparse, choose_sparse
from dca_jax.cli.options import (
    AdapterOption,
    Base,
    CacheDtypeOption,
    ConfigOption,
    Dtype,
    MethodOption,
    ModelArgument,
    Remat,
    SparseOption,
    State,
    Weights,
    WeightsOption,
    refuse_several_processes,
)
from dca_jax.config import LlamaConfig, LoraConfig, lora_targets
from dca_jax.dca import DCAConfig
from dca_jax.disk import writing, written
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.inference.methods import method_by_name
from dca_jax.lengths import parse_tokens
from dca_jax.planning.explain import explain, plot_relative_positions, position_matrix
from dca_jax.planning.facts import checkpoint_facts
from dca_jax.planning.memory import DEVICES
from dca_jax.planning.plan import Plan, plan
from dca_jax.planning.shapes import SHAPES, find_shape
from dca_jax.products.packed import STORED
from dca_jax.serving.plan import ROWS, ServerPlan, plan_server
from dca_jax.sharding import parse_mesh
from dca_jax.weights.files import is_converted, refuse_existing
from dca_jax.weights.folder import kept_forms
from dca_jax.weights.hub import find_folder
from dca_jax.weights.huggingface import read_config
from dca_jax.weights.kept import Kept
from dca_jax.weights.packer import packing

MATRIX_TOKENS = 32  # the matrix is printed for texts of up to this many tokens
PLOTTED_TOKENS = 4096  # and plotted up to this many: its size is quadratic

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
@exit_on_input_error()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="The folder or GGUF file to convert, or a name on the Hugging Face Hub.",
        ),
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="The folder to create; it must not exist yet.")
    ],
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Dtype of weights that are written unquantized (default: unchanged; bfloat16 for "
            "weights that a converted folder has quantized)."
        ),
    ] = None,
    weights: Annotated[
        Weights,
        typer.Option(
            help="How to quantize matrices in Orbax: **int8**, **int4** or **fp8**; as in the "
            "source (**stored**); or none (**unpacked**)."
        ),
    ] = Weights.stored,
    adapter: AdapterOption = None,
) -> None:
    """Convert a Hugging Face folder or a GGUF file to Orbax, or a converted folder back.

    Orbax checkpoints can be loaded on any device mesh; each device reads only its part. Quantized
    matrices stay quantized in them and are unpacked when converted back. DST appears only when it
    is complete. If the command is interrupted, repeat it.

    For example:

    - `dca-jax convert ./Llama-2-7b-hf ./llama2-7b --dtype bfloat16`

    - `dca-jax convert Qwen/Qwen2.5-7B-Instruct-1M ./qwen-1m`

    - `dca-jax convert ./llama2-7b ./Llama-2-7b-again`

    - `dca-jax convert ./Llama-3.1-8B-Q4_K_M.gguf ./llama3-8b --dtype bfloat16`

    - `dca-jax convert ./Llama-2-7b-hf ./llama2-7b-int4 --weights int4`

    - `dca-jax convert ./Llama-2-7b-hf ./merged --adapter ./run/adapter`
    """
    refuse_several_processes("convert")
    # The converters import this package, so they are imported only where they are needed.
    from checkpoints_convert import hf_to_orbax, orbax_to_hf
    from checkpoints_convert.common import prepare_process, told_if_stopped

    prepare_process()
    refuse_existing(destination)
    folder = find_folder(source)
    options: dict[str, Any] = {
        "dtype": None if dtype is None else np.dtype(dtype.value),
        "adapter": adapter,
        "show": True,
    }
    back = is_converted(folder)
    if back and weights not in (Weights.stored, Weights.unpacked):
        raise InputError(
            f"{folder} is a converted folder, and converting it back to Hugging Face format writes "
            f"unquantized weights; omit --weights {weights.value}"
        )
    with told_if_stopped(destination):
        if back:
            orbax_to_hf.convert(folder, destination, **options)
        else:
            hf_to_orbax.convert(folder, destination, weights=weights.value, **options)
    print(f"wrote {destination}")


@app.command()
@exit_on_input_error()
def info(model: ModelArgument, config: ConfigOption = None) -> None:
    """Describe a checkpoint without reading its weights.

    For example: `dca-jax info ./Qwen2.5-7B-Instruct-1M`
    """
    folder = find_folder(model, weights=False)
    table = Table(title=model, show_header=False)
    for name, value in checkpoint_facts(folder, config).items():
        table.add_row(name, value)
    Console().print(table)


@app.command("plan")
@exit_on_input_error()
def plan_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder or a name on the Hugging Face Hub, whose config.json is read; or one of "
            f"{', '.join(SHAPES)}.",
        ),
    ],
    device: Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")],
    context_length: Annotated[
        str,
        typer.Option(
            metavar="TOKENS", help="Length of each text, new tokens included, such as 128k."
        ),
    ],
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="AXES",
            help="Device mesh, as in other commands (default: the fewest devices that suffice).",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Number of texts at once, over all devices (default: 1; with --serve, 32 at most)."
        ),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option(
            "--serve",
            help="Plan a server: how many texts of which length it serves at once, and how much "
            "cache remains for others; --context-length is the longest text, answer included.",
        ),
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="Plan for training with AdamW instead of generating.")
    ] = False,
    dtype: Annotated[
        Dtype,
        typer.Option(help="Dtype of activations and of weights that are not trained."),
    ] = Dtype.bfloat16,
    cache_dtype: CacheDtypeOption = None,
    state: Annotated[
        State,
        typer.Option(help="With --train: dtype of trained weights, gradients and moments."),
    ] = State.float32,
    lora_rank: Annotated[
        int, typer.Option(help="With --train: train LoRA adapters of this rank.")
    ] = 0,
    base: Annotated[
        Base, typer.Option(help="With --lora-rank: format of the frozen weights.")
    ] = Base.dtype,
    weights: WeightsOption = None,
    remat: Annotated[
        Remat,
        typer.Option(help="With --train: what to save per layer, as in `dca-jax finetune`."),
    ] = Remat.attention,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print bytes, tokens and meshes as JSON, for scripts.")
    ] = False,
    config: ConfigOption = None,
    sparse: SparseOption = "auto",
) -> None:
    """Estimate memory per device before loading anything.

    For example:

    - `dca-jax plan llama-2-70b --device h200 --mesh tensor=4 --context-length 100k`

    - `dca-jax plan llama-2-70b --device h200 --weights int4 --context-length 100k`

    - `dca-jax plan ./Llama-2-7b-hf --device v5e --context-length 16k --batch 8 --train`

    - `dca-jax plan llama-2-7b --device a100-80g --context-length 16k --train --state bfloat16`

    - `dca-jax plan llama-2-70b --device h200 --context-length 16k --train --lora-rank 16`

    - `dca-jax plan llama-2-7b --device h200 --context-length 256k --cache-dtype int8`

    - `dca-jax plan llama-3-8b --device h200 --context-length 128k --serve`
    """
    tokens = parse_tokens(context_length)
    shape = find_shape(model, context=tokens, file=config)
    if base is not Base.dtype and not lora_rank:
        raise InputError(f"--base {base.value} needs --lora-rank")
    if weights is not None and lora_rank:
        raise InputError("give --base with --lora-rank, and --weights without")
    form, kept = None if base in (Base.dtype, Base.stored) else base.value, {}
    if base is Base.stored:
        kept = {} if model in SHAPES else _kept(model, shape, STORED)
        if not kept:
            raise InputError(
                f"--base {STORED} keeps weights as quantized in the checkpoint, but {model} is not "
                "known to have any; choose int8 or int4 to quantize them, or dtype"
            )
    elif not train:
        form, keep = packing(None if weights is None else weights.value, on_cpu=False)
        kept = {} if model in SHAPES else _kept(model, shape, keep)
    elif weights is not None:
        form = weights.value
    common: dict[str, Any] = {
        "device": device,
        "mesh": None if mesh is None else parse_mesh(mesh),
        "dtype": dtype.value,
        "cache_dtype": None if cache_dtype is None else cache_dtype.value,
        "weights": form,
        "kept": kept,
    }
    if serve:
        if train or lora_rank:
            raise InputError(
                "--serve plans a server, which does not train; give only one of --serve and --train"
            )
        _tell(plan_server(model, shape, context=tokens, rows=batch or ROWS, **common), as_json)
        return
    found = plan(
        model,
        shape,
        context_length=tokens,
        batch=1 if batch is None else batch,
        train=train,
        lora=LoraConfig(rank=lora_rank, targets=lora_targets(shape)) if lora_rank else None,
        remat=remat.value,
        state=state.value,
        sparse=None if train else _sparse(sparse, shape, shape.dca or PLAIN),
        **common,
    )
    _tell(found, as_json)


def _tell(found: Plan | ServerPlan, as_json: bool) -> None:
    """Prints a plan."""
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    table = Table(title=found.model, show_header=False)
    for name, value in found.facts().items():
        table.add_row(name, value)
    Console().print(table)


def _kept(model: str, shape: LlamaConfig, keep: str | None) -> dict[str, Kept]:
    """How the checkpoint's weights are quantized; prints a note if its files are not available."""
    try:
        return kept_forms(find_folder(model, weights=False), shape, keep)
    except InputError as error:
        told = f"quantized weights are not known, so all are counted as unquantized: {error}"
        print(told, file=sys.stderr)
        return {}


@app.command("explain")
@exit_on_input_error()
def explain_command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Use the trained length and the setting of this model."
        ),
    ] = None,
    trained_length: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help="Trained length, if no MODEL is given."),
    ] = None,
    method: MethodOption = "auto",
    length: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS", help="Length of the text (default: 4 times the trained length)."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Save a plot of the relative positions (PNG, PDF).")
    ] = None,
    config: ConfigOption = None,
    sparse: SparseOption = "auto",
) -> None:
    """Show the positions that a method assigns: chunks, distances, temperature.

    For up to 32 tokens, the matrix of relative positions is printed: row i, column j is the
    distance at which token i sees token j.

    For example:

    - `dca-jax explain ./Llama-2-7b-hf --length 32k`

    - `dca-jax explain --trained-length 4k --method dca:chunkllama --length 64k`

    - `dca-jax explain --method dca:6,9 --length 12` (Figure 2 of the paper)

    - `dca-jax explain --trained-length 8 --method self-extend:2,4 --length 16`
    """
    if model is not None and trained_length is not None:
        raise InputError("give either a MODEL or --trained-length")
    trained = None if trained_length is None else parse_tokens(trained_length)
    tokens = None if length is None else parse_tokens(length)
    if model is not None:
        shape = read_config(find_folder(model, weights=False), context=tokens, file=config)
    elif trained is not None:
        shape = _some_model(trained)
    elif method.startswith("dca") and "," in method:
        shape = _some_model(1)  # s and Q are enough
    else:
        raise InputError("give a MODEL, or --trained-length, or a --method such as dca:6,9")
    if tokens is None:
        tokens = 4 * shape.trained_length
        if model is None and trained is None:
            setting = method_by_name(method, shape, 1).dca
            setting = getattr(setting, "dca", setting)  # an ablation wraps it
            assert isinstance(setting, DCAConfig)
            tokens = 4 * setting.chunk_len
    dca, rope = method_by_name(method, shape, tokens)
    if plot is not None:
        _save_plot(plot, tokens, dca)
    print(explain(dca, tokens, rope, _sparse(sparse, shape, dca)))
    if tokens <= MATRIX_TOKENS:
        print("\n" + _matrix(tokens, dca))


def _sparse(name: str, shape: LlamaConfig, dca: DCAConfig | PositionMethod | None) -> Sparse | None:
    """The model's sparse prefill setting with a method."""
    sizes = {"layers": shape.num_hidden_layers, "heads": shape.num_attention_heads}
    how = choose_sparse(name, shape.sparse_attention, **sizes)
    if how is None or (how.by_checkpoint and dca is None):
        return None
    return how.for_method(dca)


def _some_model(trained_length: int) -> LlamaConfig:
    """A model for which only the trained length matters (and, for `ntk`, heads of 128)."""
    return LlamaConfig(
        vocab_size=1,
        hidden_size=128,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=trained_length,
    )


def _matrix(length: int, dca: DCAConfig | PositionMethod | None) -> str:
    """Relative positions in columns, with DCA's chunks separated and a dot for a masked key."""
    matrix = position_matrix(length, dca)
    chunk_len = dca.chunk_len if isinstance(dca, DCAConfig) else length
    width = len(str(matrix.max())) + 1
    lines = []
    for i, row in enumerate(matrix):
        if i and i % chunk_len == 0:
            lines.append("")
        cells = [f"{n if n >= 0 else '.':>{width}}" for n in row[: i + 1]]
        edges = range(0, i + 1, chunk_len)
        lines.append(" |".join("".join(cells[edge : edge + chunk_len]) for edge in edges))
    return "\n".join(lines)


def _save_plot(path: Path, length: int, dca: DCAConfig | PositionMethod | None) -> None:
    import matplotlib.pyplot as plt  # slow to import, and needed only here

    with writing(path):
        if not path.parent.is_dir():
            raise InputError(f"--plot {path}: {path.parent} is not a folder; create it first")
    if length > PLOTTED_TOKENS:
        raise InputError(f"--plot draws up to {PLOTTED_TOKENS} tokens, got --length {length}")
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    plot_relative_positions(length, dca, axes)
    try:
        kind = path.suffix.removeprefix(".") or "png"
        written(path, lambda aside: figure.savefig(aside, dpi=150, format=kind))
    except ValueError as error:  # a format that Matplotlib does not support
        if isinstance(error, InputError):
            raise
        raise InputError(f"--plot {path} cannot be written: {error}") from None
    finally:
        plt.close(figure)
    print(f"saved {path}", file=sys.stderr)
