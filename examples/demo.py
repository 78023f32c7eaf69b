"""What Dual Chunk Attention does to a small model, on any laptop: `make demo` runs this.

    python examples/demo.py                  # the model in models/
    python examples/demo.py path/to/model    # any other Hugging Face folder of a small model

It converts the model to Orbax, prints its perplexity by context length for plain RoPE, three RoPE
scalings and DCA (Table 1 of the paper), asks it for a passkey hidden in longer and longer texts
(Fig. 5), and has it read code of 16 trained lengths, recall comments from it and continue it. Plots
and figures go to outputs/demo/; `docs/lab/demo.md` explains them.
"""

import bisect
import dataclasses
import itertools
import json
import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import demo_data
import jax
import numpy as np
import typer
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import dca_jax
from checkpoints_convert import hf_to_orbax
from dca_jax import LLM, DCAConfig, InputError, Llama, RopeConfig
from dca_jax.distributed import exit_on_input_error
from dca_jax.evaluation.passkey import PasskeyGrid, first_number, passkey_grid, passkey_prompt
from dca_jax.evaluation.plots import plot_passkey, plot_perplexity
from dca_jax.inference.score import window_nlls

REPOSITORY = Path(__file__).resolve().parent.parent
TIMES = (1, 2, 4, 8, 16)  # context lengths, in trained lengths
TEXTS = 2  # held-out texts of the greatest length, each read at all lengths
DEPTHS = (0.0, 0.3, 0.7, 1.0)  # of the passkey
SCALINGS = {"PI": "linear", "NTK": "dynamic", "YaRN": "yarn"}
METHODS = ("RoPE", *SCALINGS, "DCA")
# Read at the same time, so that no core waits while the other compiles, or computes what cannot be
# divided. The methods of a group have compiled programs in common.
GROUPS = (("RoPE", "PI", "YaRN"), ("DCA", "NTK"))
DOCUMENT = "unittest/mock.py"  # held out
# Comments inserted into the document, the first at its beginning. In training, the demo model saw
# such comments and questions with other names and numbers, at most 512 tokens apart.
NOTES = {
    "server_port": "48213",
    "retry_limit": "10795",
    "max_users": "66324",
    "archive_size": "90418",
}
CONTINUATION_TOKENS = 60
OUTPUT = REPOSITORY / "outputs" / "demo"

console = Console()


# --- the methods -------------------------------------------------------------------------------


def with_method(llm: LLM, method: str, length: int) -> LLM:
    """The same weights with another method, for texts of `length` tokens.

    A scaling gets the factor length / trained length, as in the paper's comparison; a factor of 1
    is plain RoPE.
    """
    config = llm.model.config
    trained = config.trained_length
    if method in SCALINGS and length > trained:
        rope = RopeConfig(
            rope_type=SCALINGS[method],
            theta=config.rope.theta,
            factor=length / trained,
            original_max_position_embeddings=trained,
        )
        config = dataclasses.replace(config, rope=rope)
    dca = DCAConfig.paper(trained) if method == "DCA" else None
    params, dtype = llm.model.params(), llm.model.dtype
    return dataclasses.replace(llm, model=Llama.from_params(config, params, dca=dca, dtype=dtype))


# --- (a) perplexity by length ------------------------------------------------------------------


def held_out_tokens(llm: LLM, length: int) -> np.ndarray:
    """`TEXTS` pieces of `length` tokens, evenly spread over the held-out standard library."""
    try:
        tokens = np.array(llm.tokenize(demo_data.held_out_text()), np.int32)
    except FileNotFoundError as error:  # a Python without its sources
        raise InputError(str(error)) from None
    starts = [n * (len(tokens) - length) // TEXTS for n in range(TEXTS)]
    return np.concatenate([tokens[start : start + length] for start in starts])


def perplexities(llm: LLM, tokens: np.ndarray, lengths: list[int]) -> dict[str, dict[int, float]]:
    """{length: perplexity} for each method; all lengths use the same tokens."""
    known: dict[Any, float] = {}  # by configuration: methods coincide where the factor is 1
    results: dict[str, dict[int, float]] = {method: {} for method in METHODS}

    def read(methods: Sequence[str]) -> None:
        for method, length in itertools.product(methods, lengths):
            model = with_method(llm, method, length).model
            key = (model.config, model.dca, length)
            if key not in known:
                nlls = []
                for nll in window_nlls(model, tokens, window=length, capacity=max(lengths)):
                    nlls.append(nll)
                    advance(length)
                known[key] = float(np.exp(np.mean(nlls)))
            else:
                advance(len(tokens))
            results[method][length] = known[key]

    with progress("perplexity", len(METHODS) * len(lengths) * len(tokens)) as advance:
        together(read, GROUPS)
    return results


def perplexity_table(results: dict[str, dict[int, float]]) -> Table:
    """A table in the form of the paper's Table 1."""
    lengths = list(results["RoPE"])
    table = Table(title="Perplexity of held-out code by context length")
    table.add_column("method")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    table.add_column(f"{lengths[-1] // lengths[0]}x / 1x", justify="right")
    for method, curve in results.items():
        cells = [f"{curve[length]:,.2f}" for length in lengths]
        ratio = f"{curve[lengths[-1]] / curve[lengths[0]]:.2f}"
        table.add_row(method, *cells, ratio, style="bold green" if method == "DCA" else None)
    return table


# --- (b) passkey -------------------------------------------------------------------------------


def passkey_grids(llm: LLM, lengths: list[int]) -> dict[str, PasskeyGrid]:
    """Keys found by length and depth, for plain RoPE and DCA on the same prompts."""
    total = 2 * sum(lengths) * len(DEPTHS)
    methods = "RoPE", "DCA"

    def ask(method: str) -> PasskeyGrid:
        model = with_method(llm, method, max(lengths))
        return passkey_grid(model, lengths, DEPTHS, batch=1, on_tokens=advance)

    with progress("passkey", total) as advance:
        return dict(zip(methods, together(ask, methods), strict=True))


def passkey_table(grids: dict[str, PasskeyGrid]) -> Table:
    """Keys found at each length, over all depths."""
    grid = grids["DCA"]
    prompts = grid.trials * len(grid.depths)
    table = Table(title=f"Passkeys found, by context length ({prompts} depths each)")
    table.add_column("method")
    for length in grid.lengths:
        table.add_column(f"{length:,}", justify="right")
    for method, grid in grids.items():
        cells = [f"{found} of {prompts}" for found in grid.found.sum(axis=1)]
        table.add_row(method, *cells, style="bold green" if method == "DCA" else None)
    return table


# --- (c) a long document -----------------------------------------------------------------------


class Document(NamedTuple):
    """The beginning of a module with notes between its lines, and the line that follows it."""

    text: str
    tokens: int
    tokens_ago: dict[str, int]  # for each note, tokens from its value to the end
    next_line: str  # the first line of a function


def annotated_document(count_tokens: Callable[[str], int], source: str, length: int) -> Document:
    """The longest `Document` of at most `length` tokens; its notes are spread evenly."""
    lines = source.splitlines()
    blank = [n for n, line in enumerate(lines) if not line]

    def text(num_lines: int) -> str:
        wanted = [num_lines * n // len(NOTES) for n in range(len(NOTES))]
        places = {
            min(blank, key=lambda at: abs(at - w)): n for w, n in zip(wanted, NOTES, strict=True)
        }
        noted = [
            f"\n# {places[n]} is {NOTES[places[n]]}, keep this in mind\n" if n in places else line
            for n, line in enumerate(lines[:num_lines])
        ]
        return "\n".join(noted) + "\n"

    heads = [
        n for n, line in enumerate(lines) if line.lstrip().startswith("def ") and line.endswith(":")
    ]
    fitting = bisect.bisect_right(heads, length, key=lambda n: count_tokens(text(n)))
    if fitting == 0:
        raise InputError(f"{length} tokens are too few for the beginning of {DOCUMENT}")
    end = heads[fitting - 1]
    document = text(end)
    tokens = count_tokens(document)
    ago = {
        name: tokens - count_tokens(document[: document.index(f" {value}, keep")])
        for name, value in NOTES.items()
    }
    return Document(document, tokens, ago, lines[end])


def long_document(llm: LLM, length: int) -> Document:
    """`annotated_document` of the held-out `DOCUMENT`."""
    source = (demo_data.stdlib() / DOCUMENT).read_text(encoding="utf-8")
    return annotated_document(lambda text: len(llm.tokenize(text)), source, length)


def read_document(llm: LLM, document: Document) -> dict[str, Any]:
    """Reads the document with plain RoPE and with DCA; asks for its notes, then continues it."""
    name, value = next(iter(NOTES.items()))
    console.print(
        f"\nThe first {document.tokens:,} tokens of {DOCUMENT}, with {len(NOTES)} comments between "
        f'its lines, such as "# {name} is {value}, keep this in mind":\n'
    )
    readers = {method: with_method(llm, method, document.tokens) for method in ("RoPE", "DCA")}
    with console.status("RoPE and DCA read ..."):
        read = together(lambda llm: llm.prefill(document.text, progress=False), readers.values())
    prefixes = dict(zip(readers, read, strict=True))
    answers: dict[str, dict[str, str]] = {name: {} for name in NOTES}
    for name, method in itertools.product(NOTES, readers):
        question = f"\n# what was {name}? {name} is"
        (answer,) = readers[method].generate(question, prefix=prefixes[method], max_new_tokens=8)
        answers[name][method] = answer.text.strip().partition("\n")[0]
    console.print(answer_table(document, answers))
    said = dict.fromkeys(readers, "")
    console.print(f"\nThe next line is {document.next_line.strip()!r}. How does it go on?\n")
    with Live(side_by_side(said), console=console) as live:
        for method, reader in readers.items():
            options = {"prefix": prefixes[method], "max_new_tokens": CONTINUATION_TOKENS}
            for piece in reader.stream(document.next_line, **options):
                said[method] += piece
                live.update(side_by_side(said))
    return {
        "document": DOCUMENT,
        "tokens": document.tokens,
        "notes": {
            name: {"value": NOTES[name], "tokens_ago": document.tokens_ago[name], **answers[name]}
            for name in NOTES
        },
        "next_line": document.next_line,
        "continuations": said,
    }


def answer_table(document: Document, answers: dict[str, dict[str, str]]) -> Table:
    """What each method answered to "# what was ...?"; right answers are green."""
    table = Table(title="What the comments said")
    table.add_column("# what was ...?")
    table.add_column("tokens ago", justify="right")
    table.add_column("value")
    for method in ("RoPE", "DCA"):
        right = sum(first_number(answers[name][method]) == v for name, v in NOTES.items())
        table.add_column(f"{method}: {right} of {len(NOTES)}")
    for name, value in NOTES.items():
        given = [
            Text(answer, style="bold green" if first_number(answer) == value else "red")
            for answer in answers[name].values()
        ]
        table.add_row(name, f"{document.tokens_ago[name]:,}", value, *given)
    return table


def side_by_side(said: dict[str, str]) -> Table:
    """The text each method has written so far, in panels."""
    table = Table.grid(expand=True)
    for _ in said:
        table.add_column(ratio=1)
    table.add_row(
        *[Panel(Text(text.lstrip("\n") or "..."), title=method) for method, text in said.items()]
    )
    return table


# --- the run -----------------------------------------------------------------------------------


def together(work: Callable[[Any], Any], inputs: Iterable[Any]) -> list[Any]:
    """The result of `work` for each input, all computed at the same time."""
    pool = ThreadPoolExecutor()
    try:
        return list(pool.map(work, inputs))
    finally:  # after Ctrl-C, `progress` ends what still runs
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` tokens; yields a function that advances it, in any thread.

    After the block the function raises, so that threads end which the block left behind.
    """
    columns = (TextColumn(name), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    over = threading.Event()

    def advance(tokens: int) -> None:
        if over.is_set():
            raise RuntimeError(f"{name} was interrupted")
        bar.advance(task, tokens)

    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=total)
        try:
            yield advance
        finally:
            over.set()


def find_model() -> Path:
    """The only model in models/."""
    folders = sorted(path.parent for path in (REPOSITORY / "models").glob("*/config.json"))
    if len(folders) != 1:
        found = ", ".join(folder.name for folder in folders) or "none"
        raise InputError(f"expected one model in {REPOSITORY / 'models'}, found {found}; name one")
    return folders[0]


def save_json(value: Any, path: Path) -> None:
    """Writes JSON aside and renames it, so that the file is never incomplete."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def keep_compiled(folder: Path) -> None:
    """Keeps compiled programs for the next run (JAX_COMPILATION_CACHE_DIR is respected)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default only programs that took a second to compile are kept; here many take less.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Records how long the block takes."""
    start = time.monotonic()
    yield
    seconds[step] = round(time.monotonic() - start, 1)


@exit_on_input_error()
def main(
    model: Annotated[
        Path | None,
        typer.Argument(help="Hugging Face folder of a small model; by default the one in models/."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for plots and figures.")] = OUTPUT,
) -> None:
    """Show what Dual Chunk Attention does to a small model, in a few minutes on a CPU."""
    source = (model or find_model()).resolve()
    seconds: dict[str, float] = {}
    with timed(seconds, "total"):
        output.mkdir(parents=True, exist_ok=True)
        keep_compiled(output / "compilation_cache")
        # Orbax's warnings are not about anything that a reader of the demo could change.
        logging.getLogger("absl").setLevel(logging.ERROR)
        with timed(seconds, "conversion"), tempfile.TemporaryDirectory() as scratch:
            hf_to_orbax.convert(source, Path(scratch) / source.name)
            llm = dca_jax.load(Path(scratch) / source.name, dca=None, dtype="float32")
        trained = llm.model.config.trained_length
        lengths = [times * trained for times in TIMES]
        # Fail now rather than after minutes of work.
        tokens, document = held_out_tokens(llm, lengths[-1]), long_document(llm, lengths[-1])
        passkey_prompt(lambda text: len(llm.tokenize(text)), trained, 0.5, np.random.default_rng())
        console.print(f"[bold]{source.name}[/bold] was trained on texts of {trained:,} tokens.\n")
        with timed(seconds, "perplexity"):
            curves = perplexities(llm, tokens, lengths)
        console.print(perplexity_table(curves))
        plot_perplexity(curves, output / "perplexity.png", trained_length=trained)
        with timed(seconds, "passkey"):
            grids = passkey_grids(llm, lengths)
        console.print(passkey_table(grids))
        plot_passkey(grids, output / "passkey.png", trained_length=trained)
        with timed(seconds, "document"):
            completions = read_document(llm, document)
    results = {
        "model": source.name,
        "trained_length": trained,
        "perplexity": curves,
        "passkey": {method: grid.to_dict() for method, grid in grids.items()},
        "document": completions,
        "seconds": seconds,
        "python": platform.python_version(),  # whose standard library was read
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    save_json(results, output / "results.json")
    console.print(f"\nPlots and figures: {output} ({seconds['total']:.0f} s).")


if __name__ == "__main__":
    typer.run(main)
