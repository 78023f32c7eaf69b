"""Commands that generate: `generate` and `chat`."""

import fcntl
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dca_jax.cli.options import (
    AdapterOption,
    CacheDtypeOption,
    ConfigOption,
    ContextOption,
    DtypeOption,
    MeshOption,
    MethodOption,
    ModelArgument,
    NewTokensOption,
    SeedOption,
    SparseOption,
    ThinkingOption,
    WeightsOption,
    find_model,
    load_model,
    refuse_several_processes,
    with_sampler,
)
from dca_jax.disk import append, writing
from dca_jax.distributed import exit_on_input_error, from_primary, is_primary
from dca_jax.errors import InputError
from dca_jax.inference.chat import Conversation
from dca_jax.inference.documents import question_tokens, read_document
from dca_jax.inference.llm import LLM
from dca_jax.inference.methods import reading
from dca_jax.inference.options import Options
from dca_jax.inference.progress import progress
from dca_jax.inference.requests import Request, answers, batches, make_requests, read_lines
from dca_jax.inference.sampling import Sampler
from dca_jax.lengths import parse_tokens
from dca_jax.text_files import decode
from dca_jax.weights.files import refuse_existing

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

STDIN = "-"
CONTEXT = 4  # default length of `chat` for length-dependent methods, in trained lengths

Requests = Callable[[LLM], list[Request]]


@app.command()
@exit_on_input_error()
@with_sampler
def generate(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The text to continue; **-**, or no argument in a pipe, reads standard input.",
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Continue this text file (UTF-8) or PDF.")
    ] = None,
    document: Annotated[
        Path | None, typer.Option(help="A text file or PDF to ask a --question about.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="The question about --document.")] = None,
    input: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='Many prompts: one JSON object per line with "prompt" or "messages" (chat); other '
            "fields are copied to the output. **-** reads standard input.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Write the output of --json to this new file."),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object per line: the input's fields, text, finish_reason, "
            "prompt_tokens, completion_tokens.",
        ),
    ] = False,
    batch: Annotated[
        int, typer.Option(min=1, help="Number of prompts of --input to process together.")
    ] = 8,
    method: MethodOption = "auto",
    max_new_tokens: NewTokensOption = "256",
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Stop before this string; may be repeated."),
    ] = None,
    seed: SeedOption = 0,
    sampler: Sampler = Sampler(),
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    mesh: MeshOption = None,
    adapter: AdapterOption = None,
    weights: WeightsOption = None,
    sparse: SparseOption = "auto",
    context: ContextOption = None,
    config: ConfigOption = None,
    thinking: ThinkingOption = None,
) -> None:
    r"""Continue a prompt, a file or many prompts, or answer a question about a document.

    The new text goes to standard output as it is generated, everything else to standard error.

    For example:

    - `dca-jax generate ./Llama-2-7b-hf "Once upon a time"`

    - `git diff | dca-jax generate ./Llama-2-7b-hf --max-new-tokens 64`

    - `dca-jax generate ./Llama-2-7b-chat-hf --document book.pdf --question "Who is Ahab?"`

    - `dca-jax generate ./CodeLlama-7b-hf --file long.py --stop $'\ndef ' --method dca:chunkllama`

    - `dca-jax generate ./Llama-2-7b-chat-hf --input prompts.jsonl --output answers.jsonl`

    - `dca-jax generate ./Llama-2-7b-hf "Dear" --temperature 0.8 --top-p 0.95 --seed 7`

    - `dca-jax generate ./Llama-2-70b-hf --file book.txt --mesh context=2,tensor=4`
    """
    options = Options(
        max_new_tokens=parse_tokens(max_new_tokens),
        sampler=sampler,
        seed=seed,
        stop=stop or (),
    )
    if (document is None) != (question is None):
        raise InputError("--document and --question go together")
    if as_json and output is not None:
        raise InputError("give either --json (to print) or --output (to write a file)")
    if output is not None:
        _check_output(output)
    make = _requests(prompt, file, document, question, input, thinking)
    longest = None if context is None else parse_tokens(context)
    loading = {"weights": weights, "cache_dtype": cache_dtype, "config": config, "sparse": sparse}
    opened = find_model(model, [method], dtype, mesh, adapter, context=longest, **loading)
    requests = make(opened.llm)
    together = batches(opened.llm.model.config, requests, method, batch, options)
    llm = load_model(model, opened, (_need(some, options) for _, some in together))
    if input is None and output is None and not as_json:
        (request,) = requests
        reader = reading(llm, method, len(request.tokens) + options.max_new_tokens)
        for piece in reader.stream(request.tokens, options):
            print(piece, end="", flush=True)
        print()
        return
    if len(requests) > 1:
        options = replace(options, progress=False)
    failed: list[str] = []
    with _lines(output) as write, progress("generate", len(requests)) as advance:
        for lines in answers(llm, requests, method=method, batch=batch, options=options):
            for line in lines:
                plain = output is None and not as_json
                write(line["text"] if plain else json.dumps(line, ensure_ascii=False))
                failed += [line["error"]] if line["finish_reason"] == "error" else []
            advance(len(lines))
    if failed:
        raise InputError(
            f"{len(failed)} of {len(requests)} prompts have no complete answer; "
            f"the first: {failed[0]}"
        )


@app.command()
@exit_on_input_error()
@with_sampler
def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    method: MethodOption = "auto",
    context_length: Annotated[
        str | None,
        typer.Option(
            "--context-length",
            "--context",
            metavar="TOKENS",
            help="Longest expected conversation, for methods that depend on the length (pi, ntk, "
            "yarn, self-extend, string; default: 4 times the trained length). A model with a "
            "second config for longer texts (**config_1m.json**) uses it if needed.",
        ),
    ] = None,
    config: ConfigOption = None,
    thinking: ThinkingOption = None,
    max_new_tokens: NewTokensOption = "1024",
    seed: SeedOption = 0,
    sampler: Sampler = Sampler(),
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    mesh: MeshOption = None,
    adapter: AdapterOption = None,
    weights: WeightsOption = None,
    sparse: SparseOption = "auto",
) -> None:
    """Talk to a chat model; each turn reads only the new tokens.

    `/reset` starts over, `/quit` (or Ctrl-D) ends the chat, Ctrl-C stops an answer.

    For example: `dca-jax chat ./Llama-2-7b-chat-hf --temperature 0.7 --top-p 0.9`
    """
    refuse_several_processes("chat")
    options = Options(
        max_new_tokens=parse_tokens(max_new_tokens), sampler=sampler, seed=seed, thinking=thinking
    )
    length = None if context_length is None else parse_tokens(context_length)
    loading = {"weights": weights, "cache_dtype": cache_dtype, "config": config, "sparse": sparse}
    opened = find_model(model, [method], dtype, mesh, adapter, context=length, **loading)
    llm = load_model(model, opened, [(1, length or options.max_new_tokens)])
    if length is None:
        length = CONTEXT * llm.model.config.trained_length
    conversation = Conversation(reading(llm, method, length), system=system)
    console = Console(highlight=False)
    console.print("[dim]/reset starts over, /quit ends the chat, Ctrl-C stops an answer[/dim]")
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


def _say(console: Console, conversation: Conversation, text: str, options: Options) -> None:
    """Prints one answer; neither Ctrl-C nor an error in an answer ends the chat."""
    try:
        for piece in conversation.ask(text, options):
            console.out(piece, end="", highlight=False)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    except InputError as error:
        console.print(f"error: {error}", style="red", markup=False, end="")
    console.print()


def _requests(
    prompt: str | None,
    file: Path | None,
    document: Path | None,
    question: str | None,
    input: Path | None,
    thinking: bool | None,
) -> Requests:
    """Reads prompts from the given source; returns a function that tokenizes them."""
    given = [source for source in (prompt, file, document, input) if source is not None]
    if len(given) > 1:
        raise InputError(
            "give only one of a prompt, --file, --document (with --question) and --input; got "
            f"{len(given)} of them"
        )
    if input is not None:
        from_stdin = str(input) == STDIN
        data = _standard_input().encode() if from_stdin else _read(input)
        lines = read_lines(data, "standard input" if from_stdin else str(input))
        return lambda llm: make_requests(llm, lines, thinking=thinking)
    if document is not None and question is not None:
        about = {"document": str(document), "question": question}
        text = read_document(document)
        return lambda llm: [Request(about, question_tokens(llm, text, question, thinking=thinking))]
    if thinking is not None:
        raise InputError(
            "--thinking needs a conversation: --document with --question, or --input with messages"
        )
    if file is not None:
        whole, named = read_document(file), {"file": str(file)}
        return lambda llm: [Request(named, llm.tokenize(whole))]
    if prompt is None or prompt == STDIN:
        prompt = _standard_input().removesuffix("\n")  # added by `echo`
    fields: dict[str, Any] = {"prompt": prompt}
    if not prompt:
        raise InputError("the text is empty; give at least one character")
    return lambda llm: [Request(fields, llm.tokenize(fields["prompt"]))]


def _need(together: Sequence[Request], options: Options) -> tuple[int, int]:
    """Rows and tokens that a batch needs."""
    longest = max(len(request.tokens) for request in together)
    return len(together), longest + options.max_new_tokens


def _standard_input() -> str:
    """Standard input of the primary process, read to its end."""

    def read() -> str:
        if sys.stdin.isatty():
            raise InputError(
                "there is no prompt: give one as an argument or on standard input, or give --file, "
                "--document with --question, or --input"
            )
        return decode(sys.stdin.buffer.read(), "standard input")

    return from_primary(read)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _check_output(output: Path) -> None:
    def check() -> None:
        refuse_existing(output)
        if not output.parent.is_dir():
            raise InputError(f"{output.parent} is not a folder; create it first")

    from_primary(check)


@contextmanager
def _lines(output: Path | None) -> Iterator[Callable[[str], None]]:
    """Yields a function that writes a line to standard output or to `output`.

    The file is written under a temporary name and renamed at the end. If the block raises, the
    lines so far stay in the temporary file, and a message says where. A lock that ends with the
    process keeps a second process from writing to it.
    """
    if output is None:
        yield lambda line: print(line, flush=True)
        return
    if not is_primary():
        yield lambda line: None
        return
    aside = output.with_name(f".{output.name}.partial")
    written = 0
    with writing(output):
        opened = aside.open("ab", buffering=0)
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is writing {output}; wait for it, or choose another name"
            ) from None
        file.truncate(0)

        def write(line: str) -> None:
            nonlocal written
            append(file, f"{line}\n".encode(errors="replace"), output)
            written += 1

        try:
            yield write
            refuse_existing(output)
            with writing(output):
                aside.rename(output)
        except BaseException:
            if written:
                print(f"the first {written} answers are in {aside}", file=sys.stderr)
            else:
                aside.unlink()
            raise
    print(f"wrote {output}", file=sys.stderr)
