"""lm-evaluation-harness through its own command line: `lm-eval`."""

import json
import sys
from typing import Annotated

import typer

from dca_jax.cli.options import (
    AdapterOption,
    CacheDtypeOption,
    DtypeOption,
    MeshOption,
    MethodOption,
    ModelArgument,
    SparseOption,
    WeightsOption,
    check_method,
    refuse_several_processes,
)
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.lengths import parse_tokens
from dca_jax.weights.hub import find_folder
from dca_jax.weights.huggingface import read_config

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command("lm-eval", context_settings={"ignore_unknown_options": True})  # they are lm-eval's
@exit_on_input_error()
def lm_eval(
    model: ModelArgument,
    rest: Annotated[
        list[str] | None,
        typer.Argument(metavar="OPTIONS OF LM-EVAL", help="Options passed to `lm-eval run`."),
    ] = None,
    method: MethodOption = "auto",
    max_length: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Longest request to accept, answer included (default: no limit).",
        ),
    ] = None,
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    mesh: MeshOption = None,
    adapter: AdapterOption = None,
    weights: WeightsOption = None,
    sparse: SparseOption = "auto",
) -> None:
    """Run lm-evaluation-harness: LongBench, RULER, SCROLLS and all its other tasks.

    Options that are not listed here are passed to `lm-eval run`.

    For example:

    - `dca-jax lm-eval ./Llama-2-7b-hf --method dca --max-length 32k --tasks longbench`

    - `dca-jax lm-eval ./Llama-2-7b-hf --tasks ruler --metadata '{"max_seq_lengths":[32768]}'`
    """
    refuse_several_processes("lm-eval")
    arguments: dict[str, str | int] = {"pretrained": model, "method": method}
    if max_length is not None:
        arguments["max_length"] = parse_tokens(max_length)
    if dtype is not None:
        arguments["dtype"] = dtype.value
    if cache_dtype is not None:
        arguments["cache_dtype"] = cache_dtype.value
    if mesh is not None:
        arguments["mesh"] = mesh
    if adapter is not None:
        arguments["peft"] = str(adapter)
    if weights is not None:
        arguments["weights"] = weights.value
    if sparse != "auto":
        arguments["sparse"] = sparse
    # Checked before lm-eval builds its tasks, which takes minutes.
    check_method(method, read_config(find_folder(model, weights=False)))
    try:
        from lm_eval.__main__ import cli_evaluate

        from dca_jax.lm_eval.output import output_checked  # the package registers the model
    except ModuleNotFoundError as error:
        raise InputError(
            f"lm-eval needs packages that are not installed ({error}): pip install 'dca_jax[eval]'"
        ) from None
    # lm-eval's parser reads sys.argv.
    sys.argv = ["lm-eval", "run", "--model", "dca_jax", "--model_args", json.dumps(arguments)]
    sys.argv += rest or []
    with output_checked(sys.argv[1:]):
        cli_evaluate()
