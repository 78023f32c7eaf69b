"""Options shared by several commands, and functions that use them."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dca_jax.attention.sparse import NAMES
from dca_jax.config import LlamaConfig
from dca_jax.distributed import is_primary, several_processes
from dca_jax.errors import InputError
from dca_jax.inference.llm import LLM
from dca_jax.inference.load import Opened, open_model
from dca_jax.inference.methods import METHODS, method_by_name
from dca_jax.inference.sampling import Sampler
from dca_jax.planning.room import check_room
from dca_jax.products.packed import STORED, UNPACKED
from dca_jax.sharding import mesh_of
from dca_jax.weights.hub import find_folder
from dca_jax.weights.huggingface import read_config


class Dtype(StrEnum):
    """Values of `--dtype` (`dca_jax.dtypes.DTYPES`)."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Weights(StrEnum):
    """Values of `--weights` (`dca_jax.products.packed.FORMS`, and those that pack nothing)."""

    int8 = "int8"
    int4 = "int4"
    int4_32 = "int4:32"
    int4_128 = "int4:128"
    fp8 = "fp8"
    stored = STORED
    unpacked = UNPACKED


class CacheDtype(StrEnum):
    """Values of `--cache-dtype` (`dca_jax.dtypes.CACHE_DTYPES`)."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    int8 = "int8"
    fp8 = "fp8"


class Remat(StrEnum):
    """Values of `--remat` (`dca_jax.model.REMAT`)."""

    layer = "layer"
    attention = "attention"
    products = "products"


class Base(StrEnum):
    """Values of `--base` (`dca_jax.finetune.settings.BASES`)."""

    dtype = "dtype"
    int8 = "int8"
    int4 = "int4"
    stored = STORED


class State(StrEnum):
    """Values of `--state` (`dca_jax.finetune.settings.DTYPES`)."""

    float32 = "float32"
    bfloat16 = "bfloat16"


_NAMES = ", ".join(METHODS)
_METHOD_HELP = (
    f"{_NAMES}; with a setting as in **dca:chunkllama** or **dca:3072,4095**, or combined with "
    "scaled RoPE as in **dca+ntk:2**."
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face or converted folder, a GGUF file, or a name on the Hugging Face Hub.",
    ),
]
MethodOption = Annotated[
    str, typer.Option(metavar="NAME", help="Method for long texts: " + _METHOD_HELP)
]
MethodsOption = Annotated[
    list[str],
    typer.Option(
        "--method",
        metavar="NAME",
        help="Method for long texts; may be repeated: " + _METHOD_HELP,
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(help="Dtype of weights and activations (default: bfloat16; float32 on CPU)."),
]
CacheDtypeOption = Annotated[
    CacheDtype | None,
    typer.Option(
        help="Dtype of the KV cache (default: that of activations). **int8** and **fp8** take half "
        "the memory of bfloat16 and make decoding after a long text faster."
    ),
]
MeshOption = Annotated[
    str | None,
    typer.Option(
        metavar="AXES",
        help="How to split the work over devices: **tensor**=4 splits weights and heads, "
        "**context**=2 the text, **data** and **fsdp** the batch; separate axes by commas "
        "(default: one device).",
    ),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A LoRA adapter (PEFT folder) to merge into the weights."),
]
WeightsOption = Annotated[
    Weights | None,
    typer.Option(
        help="Quantize the weights while loading: **int8** and **fp8** take half the memory of "
        "bfloat16, **int4** (in groups of 64, or as given, such as **int4:128**) about a quarter."
    ),
]
ContextOption = Annotated[
    str | None,
    typer.Option(
        metavar="TOKENS",
        help="Length of the longest text, such as 1M. A model with a second config for longer "
        "texts (**config_1m.json**) uses it if needed.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Config to use instead of the model's **config.json**."),
]
ThinkingOption = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking",
        help="Whether the model thinks before it answers, if its chat template has the choice "
        "(Qwen3).",
    ),
]
SparseOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"Sparse prefill of long prompts: {NAMES}. **auto** follows the model's config, "
        "**off** reads every key, **rows:0.05** reads a twentieth of the key blocks.",
    ),
]
SeedOption = Annotated[int, typer.Option(help="Random seed for sampling.")]
NewTokensOption = Annotated[
    str, typer.Option(metavar="TOKENS", help="Maximum number of new tokens.")
]

# Options of the `eval` commands.
LengthOption = Annotated[
    list[str],
    typer.Option("--length", metavar="TOKENS", help="Length such as 4096 or 4k; may be repeated."),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the results (default: outputs/COMMAND-MODEL-CHECKSUM, the checksum being "
        "of the model's files)."
    ),
]
BatchOption = Annotated[
    int | None, typer.Option(min=1, help="Number of texts to process together.")
]
LimitOption = Annotated[
    int | None,
    typer.Option(min=1, help="Maximum number of samples of each kind, for a quick test."),
]

_SAMPLING = {
    "temperature": (float, "0 always takes the most likely token; 1 samples from the model."),
    "top_k": (int | None, "Sample from the K most likely tokens."),
    "top_p": (float | None, "Sample from the most likely tokens whose probabilities add up to P."),
    "min_p": (float | None, "Sample from tokens at least P times as likely as the most likely."),
    "repetition_penalty": (
        float,
        "Values above 1 make tokens that are already in the text less likely.",
    ),
}


def with_sampler(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces a command's parameter `sampler` by the options that define a sampler."""

    @functools.wraps(command)
    def call(**given: Any) -> None:
        sampler = Sampler(**{name: given.pop(name) for name in _SAMPLING})
        command(sampler=sampler, **given)

    greedy, parameters = Sampler(), []
    for parameter in inspect.signature(command).parameters.values():
        keyword = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        if parameter.name != "sampler":
            parameters.append(keyword)
            continue
        for name, (kind, text) in _SAMPLING.items():
            option = typer.Option(help=text, rich_help_panel="Sampling")
            annotation = Annotated[kind, option]
            default = getattr(greedy, name)
            parameters.append(keyword.replace(name=name, default=default, annotation=annotation))
    return with_signature(call, parameters)


def with_signature(
    call: Callable[..., None], parameters: Sequence[inspect.Parameter]
) -> Callable[..., None]:
    """The same function with the given signature, for Typer."""
    call.__signature__ = inspect.Signature(parameters)
    call.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return call


def find_model(
    model: str,
    methods: Sequence[str],
    dtype: Dtype | None,
    mesh: str | None,
    adapter: Path | None,
    *,
    weights: Weights | None = None,
    context: int | None = None,
    config: Path | None = None,
    cache_dtype: CacheDtype | None = None,
    sparse: str = "auto",
) -> Opened:
    """Opens a command's model with its own RoPE and no method; every command uses this function.

    Every method is derived from it (`dca_jax.inference.methods`) without loading or copying again.

    Raises:
        InputError: an unknown method; also as in `dca_jax.inference.load.open_model`.
    """
    shape = read_config(find_folder(model, weights=False), context=context, file=config)
    for method in methods:
        check_method(method, shape)
    named = {"dtype": dtype, "cache_dtype": cache_dtype, "weights": weights}
    options: dict[str, Any] = {n: None if one is None else one.value for n, one in named.items()}
    options |= {"mesh": mesh, "adapter": adapter, "sparse": sparse}
    return open_model(model, dca=None, context=context, config=config, **options)


def load_model(model: str, opened: Opened, needs: Iterable[tuple[int, int]]) -> LLM:
    """Loads the weights of an opened model, after checking that there is memory for the texts too.

    Args:
        model: the model's name.
        needs: rows and tokens of each batch to read.

    Raises:
        InputError: as in `dca_jax.planning.room.check_room` and `Opened.load`.
    """
    empty = opened.llm.model
    for batch, length in needs:
        options = {"context_length": length, "batch": batch, "dtype": empty.dtype}
        options |= {"weights": opened.weights, "kept": opened.kept}
        options |= {"cache_dtype": opened.llm.cache_dtype}
        options |= {"sparse": empty.sparse}
        check_room(empty.config, mesh_of(empty), **options)
    with Console(stderr=True, quiet=not is_primary()).status(f"loading {model}"):
        return opened.load()


def check_method(method: str, config: LlamaConfig) -> None:
    """Raises InputError if the method is unknown or does not work with this model."""
    method_by_name(method, config, config.trained_length)


def refuse_several_processes(command: str) -> None:
    """Raises InputError if a command that only works in one process runs in several."""
    if several_processes():
        raise InputError(f"{command} runs in one process; start it without --coordinator")
