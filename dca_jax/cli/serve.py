"""The command that serves a model: `serve`."""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dca_jax.cli.options import (
    AdapterOption,
    CacheDtypeOption,
    ConfigOption,
    DtypeOption,
    MeshOption,
    MethodOption,
    ModelArgument,
    WeightsOption,
    find_model,
    load_model,
    refuse_several_processes,
)
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.inference.methods import reading
from dca_jax.lengths import parse_tokens

KEY = "DCA_JAX_API_KEY"
CONTEXT = 4  # default length of texts, in trained lengths

log = logging.getLogger(__name__)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
@exit_on_input_error()
def serve(
    model: ModelArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen on; **0.0.0.0** means all networks.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 chooses a free one.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="The model's name for clients (default: the last part of MODEL)."),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Length of the longest text, answer included, such as 128k (default: 4 times the "
            "trained length). A model with a second config for longer texts (**config_1m.json**) "
            "uses it if needed.",
        ),
    ] = None,
    rows: Annotated[
        int,
        typer.Option(min=1, max=1024, help="Maximum number of texts generated at the same time."),
    ] = 32,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Size of the cache in tokens, for all texts together (default: as many as fit; on "
            "a CPU, --rows texts of --context if that is less).",
        ),
    ] = None,
    method: MethodOption = "auto",
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    mesh: MeshOption = None,
    adapter: AdapterOption = None,
    weights: WeightsOption = None,
    config: ConfigOption = None,
) -> None:
    """Serve a model over OpenAI's protocol, with continuous batching.

    A common prefix of several texts is read only once. On Ctrl-C or SIGTERM the server finishes the
    answers in progress; a second signal ends it at once. If **DCA_JAX_API_KEY** is set in the
    environment, clients must send that key.

    For example:

    - `dca-jax serve ./Llama-2-7b-chat-hf`

    - `dca-jax serve ./Qwen2.5-7B-Instruct-1M --context 256k --cache-dtype int8 --port 8080`

    - `curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d
    '{"messages": [{"role": "user", "content": "Hello"}]}'`
    """
    refuse_several_processes("serve")
    try:
        from dca_jax.serving.http import make_app
        from dca_jax.serving.server import Server, is_loopback, listen
    except ModuleNotFoundError as error:
        raise InputError(
            f"serving needs the package {error.name}: pip install 'dca_jax[serve]'"
        ) from None
    from dca_jax.serving.engine import Engine, check_served
    from dca_jax.serving.sizing import choose_pages

    key = os.environ.get(KEY)
    if key is not None and not key.strip():
        raise InputError(f"{KEY} is empty; set a key, or unset the variable")
    wanted, tokens = (None if one is None else parse_tokens(one) for one in (context, cache))
    loading = {"weights": weights, "cache_dtype": cache_dtype, "config": config, "sparse": "off"}
    with listen(host, port) as listening:  # before loading, which takes minutes
        if key is None and not is_loopback(listening):
            log.warning(
                "anyone who can reach %s can use this server; set %s to require a key", host, KEY
            )
        opened = find_model(model, [method], dtype, mesh, adapter, context=wanted, **loading)
        length = wanted or CONTEXT * opened.llm.model.config.trained_length
        check_served(reading(opened.llm, method, length), length)
        llm = reading(load_model(model, opened, [(1, length)]), method, length)
        pages = choose_pages(llm, context=length, rows=rows, tokens=tokens)
        engine = Engine(llm, context=length, rows=rows, pages=pages)
        console = Console(stderr=True, highlight=False)
        with console.status("compiling") as status:
            engine.start(lambda what: status.update(f"compiling: {what}"))
        served = name or Path(model).resolve().name
        address, bound = listening.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        console.print(
            f"{served} at http://{shown}:{bound}/v1: texts of up to {length:,} tokens, {rows} at "
            f"once, a cache of {pages * engine.programs.page:,}",
            markup=False,
            soft_wrap=True,
        )
        Server(make_app(engine, served, key=key)).run(sockets=[listening])
        engine.stop()
