"""The cost of sparse prefill in quality: a real model's needles and perplexity, by selector.

    python benchmarks/sparse_quality.py measure MODEL --text moby-dick.txt --text alice.txt
    python benchmarks/sparse_quality.py show outputs/sparse_quality
    python benchmarks/sparse_quality.py draw outputs/sparse_quality --to masses.png

Every selector reads the same texts, each beginning at another sentence of a book, with the DCA
setting that `dca-jax` chooses. A text contains needles ("One of the special magic numbers for
bold-ladder is: 5213971.") far apart. Once it is read, a separate question asks for each, in the
model's chat form. As in `dca-jax`, what was read before a question is shared by all of them: all of
the prompt but its last tiles. A needle is found if each of its seven digits is the most likely
token after the previous ones, as greedy decoding would write it.

Perplexity is that of the same texts' tokens, and of windows of `--long` tokens without needles.
`loss` is its relative growth over dense reading, and `error` the standard error of its mean over
texts. `missed` counts needles that dense reading finds and this selector does not, `gained` the
reverse; `answer` is the mean NLL of all digits of a needle.

The share is an argument of the compiled program, so there is one program per selector, and all
lengths use one cache. `skip-softmax` runs only if it is named; its shares are values of lambda. At
least 32 blocks are kept, as always; shares that amount to the same blocks at a length are read
once. To resume an interrupted run, repeat the command; what is in OUT is not read again. The most
informative cells come first.
"""

import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from common import numbers, reason, say, show
from jax.experimental import io_callback
from jaxtyping import Array
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sparse_log import BLOCK, DENSE, SKIP, Cell, Log

import dca_jax
from dca_jax.attention.backend import KeyBlocks
from dca_jax.attention.op import BACKENDS, choose_implementation
from dca_jax.attention.sparse import Piece, PooledQueries, SampledRows, SkipSoftmax, Sparse
from dca_jax.attention.sparse.best import blocks_to_keep
from dca_jax.config import choose_dca
from dca_jax.dca import DCAConfig, phases_within
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.evaluation.haystacks import Haystack
from dca_jax.evaluation.needle import ADJECTIVES, NEEDLE, NOUNS
from dca_jax.evaluation.texts import encode
from dca_jax.inference.compiled import compiler_options
from dca_jax.inference.documents import read_document
from dca_jax.inference.score import read_piece
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama

HEAD = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the numbers afterwards.\n"
)
QUESTION = "\nWhat is the special magic number for {key} mentioned in the provided text?"
BEGINNING = " The special magic number for {key} mentioned in the provided text is "
REST = 100  # tokens of a text that are read with the question, and form the last tiles with it
# tokens read at once; tokens of the rest of a text, a question and its answer
PIECE, ASKED = 4096, 384
COLUMNS = (
    *("tokens", "sparse", "share", "texts", "perplexity", "loss", "error"),
    *("needles", "found", "missed", "gained", "answer"),
)
MASSES = ("rows", "pooled")  # whose kept share of the attention is recorded

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__
)


@app.command()
@exit_on_input_error()
def measure(
    model: Annotated[str, typer.Argument(help="Folder or file of a model, as in dca-jax.")],
    text: Annotated[list[Path], typer.Option(help="Books (UTF-8), used in turn.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path(
        "outputs/sparse_quality"
    ),
    selectors: Annotated[str, typer.Option(help="In order of priority.")] = (
        "rows,pooled,rows16,rows4"
    ),
    shares: Annotated[str, typer.Option(help="In order of priority.")] = "0.1,0.05,0.2",
    lengths: Annotated[str, typer.Option(help="Tokens per text with needles.")] = "64k,16k,32k",
    long: Annotated[
        str, typer.Option(help="Tokens per window without needles; may be empty.")
    ] = "128k",
    texts: Annotated[int, typer.Option(min=1, help="Texts per length.")] = 25,
    windows: Annotated[int, typer.Option(min=1, help="Windows per long length.")] = 3,
    needles: Annotated[int, typer.Option(min=1, help="Needles per text.")] = 4,
    masses: Annotated[
        bool, typer.Option(help="Record the attention mass of the kept blocks.")
    ] = True,
    dtype: Annotated[str | None, typer.Option(help="Dtype of weights and activations.")] = None,
    minutes: Annotated[
        float, typer.Option(help="Start nothing further after this many minutes.")
    ] = math.inf,
) -> None:
    """Reads all texts with all selectors within the time limit, and prints the table of `show`."""
    begin = time.monotonic()
    llm = dca_jax.load(model, dtype=dtype, sparse="off")
    short, more = numbers(lengths), numbers(long) if long else []
    names = [name for name in selectors.split(",") if name]
    percents = [float(share) for share in shares.split(",")]
    facts = {"model": Path(model).name, "dtype": llm.model.dtype.name, "needles": needles}
    log = Log(out / "readings.jsonl", facts)
    study = Study(llm, text, max(*short, *more, 1), needles)
    programs = study.compiled(names, masses)
    say(f"{time.monotonic() - begin:.1f} s: loaded and traced")
    cells = list(cells_of(short, more, names, percents))
    wanted = [
        (cell, number, kind)
        for cell, kind in cells
        for number in range(texts if kind == "needles" else windows)
    ]
    if masses:
        wanted[len(wanted) // 4 : 0] = [
            (Cell(short[0], name, percents[0]), 0, "masses") for name in MASSES if name in names
        ]
    for cell, number, kind in wanted:
        if time.monotonic() - begin > 60 * minutes:
            say("out of time: the rest was not read")
            break
        if (*cell, number, kind) in log.rows:
            continue
        row = {**cell._asdict(), "text": number, "kind": kind}
        start = time.monotonic()
        try:
            found = study.read(programs, cell, number, kind)
        except InputError:
            raise
        except Exception as error:  # one cell's failure must not lose the others
            say(f"{row}: {reason(error)}")
            continue
        row |= found | {"seconds": time.monotonic() - start}
        log.add(row)
        shown = {name: value for name, value in row.items() if name != "masses"}
        say(f"{time.monotonic() - begin:.1f} s: {json.dumps(shown)}")
    show_folder(out)


@app.command("show")
@exit_on_input_error()
def show_folder(
    folder: Annotated[Path, typer.Argument(help="The folder OUT of `measure`.")],
) -> None:
    """Prints a row for each selector, share and length."""
    log = Log(folder / "readings.jsonl", None)
    show(f"{log.facts['model']} on {log.facts['device']}", COLUMNS, log.summary())


@app.command()
@exit_on_input_error()
def draw(
    folder: Annotated[Path, typer.Argument(help="The folder OUT of `measure`.")],
    to: Annotated[Path, typer.Option(help="The plot to write, PNG or SVG.")],
) -> None:
    """Plots the share of each head's attention that falls on the kept blocks."""
    log = Log(folder / "readings.jsonl", None)
    rows = [row for row in log.rows.values() if row["kind"] == "masses"]
    if not rows:
        raise InputError(f"{folder} has no masses; run measure with --masses")
    figure = Figure(figsize=(4.2 * len(rows), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, row in zip(np.ravel(figure.subplots(1, len(rows), sharey=True)), rows, strict=True):
        kept = np.asarray(row["masses"])
        image = axes.imshow(kept, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes.set_title(f"{row['selector']}:{row['share']:g}, {row['tokens']:,} tokens", fontsize=10)
        axes.set_xlabel("query head")
        axes.set_xticks(range(kept.shape[1]))
        axes.label_outer()
    figure.axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=figure.axes, label="share of the attention in the blocks kept")
    figure.savefig(to, dpi=150)


def cells_of(
    short: list[int], long: list[int], names: list[str], shares: list[float]
) -> Iterator[tuple[Cell, str]]:
    """Cells and their kinds, the most informative first; shares that keep equal blocks once."""
    seen = set()

    def new(tokens: int, name: str, share: float, kind: str) -> Iterator[tuple[Cell, str]]:
        kept = told(name, share, -(-tokens // BLOCK)).tobytes()
        if (tokens, name, kept, kind) not in seen:
            seen.add((tokens, name, kept, kind))
            yield Cell(tokens, name, share), kind

    where = [(tokens, "needles") for tokens in short] + [(tokens, "window") for tokens in long]
    for tokens, kind in where:
        yield Cell(tokens, DENSE, 1.0), kind
        yield from new(tokens, names[0], shares[0], kind)
    rounds = [
        *((name, shares[0]) for name in names[:2]),
        *((names[0], share) for share in shares[1:]),
        *((name, share) for share in shares for name in names[1:]),
    ]
    for name, share in rounds:
        for tokens, kind in where:
            yield from new(tokens, name, share, kind)


# --- texts -------------------------------------------------------------------------------------


class Text(NamedTuple):
    """Tokens that are read once, and the questions about them.

    Attributes:
        read: the tokens that all questions share.
        questions: the tokens that follow for each question, and the expected digits.
    """

    read: np.ndarray
    questions: list[tuple[np.ndarray, np.ndarray]]

    @property
    def whole(self) -> int:
        """Tokens of the prompts, which all have the same tiles."""
        return len(self.read) + max((len(ids) for ids, _ in self.questions), default=0)


def with_needles(
    llm: dca_jax.LLM, sentences: list[list[int]], number: int, tokens: int, needles: int
) -> Text:
    """A text of about `tokens` tokens with needles, and a question for each."""
    draw = np.random.default_rng([tokens, number])
    pairs = draw.choice(len(ADJECTIVES) * len(NOUNS), needles, replace=False)
    keys = [f"{ADJECTIVES[n // len(NOUNS)]}-{NOUNS[n % len(NOUNS)]}" for n in pairs]
    values = [str(value) for value in draw.integers(1_000_000, 10_000_000, needles)]
    first, last = _around(llm)
    questions = []
    for key in keys:
        asked = encode(llm, QUESTION.format(key=key))
        questions.append([*asked, *last, *encode(llm, BEGINNING.format(key=key))])
    room = (tokens - REST - max(map(len, questions)) - 8) // BLOCK * BLOCK
    # Each needle is somewhere in the middle of its part of the text.
    head = [*first, *encode(llm, HEAD)]
    places = ((np.arange(needles) + draw.uniform(0.2, 0.8, needles)) / needles * room).astype(int)
    ids, at, hidden = list(head), int(draw.integers(len(sentences))), 0
    while len(ids) < room + REST:
        if hidden < needles and len(ids) >= places[hidden]:
            ids += encode(llm, " " + NEEDLE.format(key=keys[hidden], value=values[hidden]))
            hidden += 1
        ids += sentences[at % len(sentences)]
        at += 1
    rest = ids[room : room + REST]
    asked = [
        (np.asarray([*rest, *question], np.int32), np.asarray(encode(llm, value), np.int32))
        for question, value in zip(questions, values, strict=True)
    ]
    return Text(np.asarray(ids[:room], np.int32), asked)


def _around(llm: dca_jax.LLM) -> tuple[list[int], list[int]]:
    """The token ids that the chat template puts before and after a user's message."""
    one, two = (
        list(llm.apply_chat_template([{"role": "user", "content": word}])) for word in ("A", "B")
    )
    same = [a == b for a, b in zip(one, two, strict=True)]
    at = same.index(False)
    return one[:at], one[at + 1 :]


# --- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Kept:
    """What a program is told (`told`), as an argument of it."""

    counts: Array


@dataclass(frozen=True, eq=False)
class Rows(SampledRows):
    """`rows`, with the number of kept blocks as an argument."""

    given: Kept | None = None

    def counts(self, blocks: int) -> Any:
        """See `Selector.counts`."""
        assert self.given is not None
        return self.given.counts[:blocks]


@dataclass(frozen=True, eq=False)
class Pooled(PooledQueries):
    """`pooled`, with the number of kept blocks as an argument."""

    given: Kept | None = None

    def counts(self, blocks: int) -> Any:
        """See `Selector.counts`."""
        assert self.given is not None
        return self.given.counts[:blocks]


@dataclass(frozen=True, kw_only=True, eq=False)
class Watched(Sparse):
    """Records the share of each head's attention that falls on the kept blocks."""

    note: Callable[..., None]

    def blocks(self, piece: Piece, dca: DCAConfig) -> KeyBlocks:
        """See `Sparse.blocks`."""
        blocks = super().blocks(piece, dca)
        query, key, layer, rows = piece.query, piece.key, piece.layer, piece.rows
        shape = jax.ShapeDtypeStruct(query.shape, query.dtype)
        like = jax.ShapeDtypeStruct(key.shape, key.dtype)
        name = choose_implementation(None, shape, like, dca, listed=True)
        phases = phases_within(key.shape[2], dca)
        options = {"dca": dca, "phases": phases, "with_lse": True}
        forward = functools.partial(BACKENDS[name].forward, query, key, key, layer, rows, **options)
        whole, kept = forward()[1], forward(blocks=blocks)[1]
        assert whole is not None
        assert kept is not None
        meets = jnp.isfinite(whole)
        share = jnp.where(meets, jnp.exp(kept - jnp.where(meets, whole, 0)), 0)
        sums = share.sum(axis=(0, 2)), meets.sum(axis=(0, 2))
        io_callback(self.note, None, piece.number, *sums)
        return blocks


@dataclass(frozen=True, eq=False)
class Skip(SkipSoftmax):
    """`skip-softmax` with lambda as an argument."""

    part: float = math.nan
    given: Kept | None = None

    @property
    def skip(self) -> Any:
        """See `Selector.skip`."""
        assert self.given is not None
        return jnp.log(self.given.counts[0])


def told(name: str, share: float, blocks: int) -> np.ndarray:
    """The argument of a selector's program: the number of blocks each tile keeps, or lambda."""
    return np.asarray([share], np.float32) if name == SKIP else blocks_to_keep(share, blocks)


class Study:
    """The model, its texts, and the one cache through which all are read."""

    def __init__(self, llm: dca_jax.LLM, books: list[Path], longest: int, needles: int) -> None:
        self.llm, self.needles = llm, needles
        self.config = llm.model.config
        self.dca = choose_dca("auto", self.config)
        texts = [read_document(path) for path in books]
        self.sentences = [
            [encode(llm, f" {unit}") for unit in Haystack.of_text(text).units] for text in texts
        ]
        self.ids = [np.asarray(encode(llm, text), np.int32) for text in texts]
        self.capacity = -(-longest // PIECE) * PIECE + PIECE
        options = {"batch": 1, "capacity": self.capacity, "dtype": llm.model.dtype}
        self.cache: KVCache | None = KVCache.create(self.config, **options)
        self.sums: dict[int, list[np.ndarray]] = {}
        self._text = functools.lru_cache(maxsize=64)(self._make_text)

    def compiled(self, names: list[str], masses: bool) -> dict[str, Future]:
        """Programs that read a piece, by selector, and one that asks; compiled in threads."""
        pool = ThreadPoolExecutor()
        found = {"ask": self._start(pool, DENSE, ASKED)}
        for name in (DENSE, *names):
            found[name] = self._start(pool, name, PIECE)
        for name in MASSES if masses else ():
            found[f"masses of {name}"] = self._start(pool, name, PIECE, watched=True)
        return found

    def _start(
        self, pool: ThreadPoolExecutor, name: str, width: int, *, watched: bool = False
    ) -> Future:
        def run(params: Any, kept: Array, cache: KVCache, *arrays: Array) -> Any:
            return read_piece(self._model(params, name, kept, watched), cache, *arrays)

        row = jax.ShapeDtypeStruct((1, width), jnp.int32)
        one = jax.ShapeDtypeStruct((1,), jnp.int32)
        kept = jax.eval_shape(lambda: self._told(name, 1.0))
        jitted = jax.jit(run, donate_argnums=2, compiler_options=compiler_options())
        arguments = self.llm.model.params(), kept, self.cache, row, row, one, one
        try:
            return pool.submit(jitted.lower(*arguments).compile)
        except Exception as error:  # raised where it is used
            failed: Future = Future()
            failed.set_exception(error)
            return failed

    def _model(self, params: Any, name: str, kept: Array, watched: bool) -> Llama:
        sparse = None
        if name != DENSE:
            given = Kept(kept)
            how = {SKIP: Skip(given=given), "pooled": Pooled(given=given)}
            selector = how.get(name) or Rows(count=int(name.removeprefix("rows") or 8), given=given)
            sparse = Sparse(selector=selector, threshold=0)
            if watched:
                sparse = Watched(selector=selector, threshold=0, note=self._note)
        options = {"dca": self.dca, "dtype": self.llm.model.dtype, "sparse": sparse}
        return Llama.from_params(self.config, params, **options)

    def _told(self, name: str, share: float) -> Array:
        return jnp.asarray(told(name, share, self.capacity // BLOCK))

    def _note(self, layer: Any, share: Any, count: Any) -> None:
        sums = np.asarray(share, np.float64), np.asarray(count, np.float64)
        old = self.sums.setdefault(int(layer), [np.zeros_like(x) for x in sums])
        self.sums[int(layer)] = [a + b for a, b in zip(old, sums, strict=True)]

    def _make_text(self, tokens: int, number: int, kind: str) -> Text:
        if kind != "window":
            sentences = self.sentences[number % len(self.sentences)]
            return with_needles(self.llm, sentences, number, tokens, self.needles)
        # Windows are consecutive, as far as the books go.
        starts = [
            (book, at)
            for book, ids in enumerate(self.ids)
            for at in range(0, len(ids) - tokens + 1, tokens)
        ]
        if number >= len(starts):
            raise InputError(f"the texts have {len(starts)} windows of {tokens} tokens")
        book, at = starts[number]
        return Text(self.ids[book][at : at + tokens], [])

    def read(
        self, programs: dict[str, Future], cell: Cell, number: int, kind: str
    ) -> dict[str, Any]:
        """NLL of the text and of its second half, and the needles found; or masses."""
        text = self._text(cell.tokens, number, kind)
        kept, dense = self._told(cell.selector, cell.share), self._told(DENSE, 1.0)
        name = cell.selector if kind != "masses" else f"masses of {cell.selector}"
        self.sums.clear()
        self._empty()
        nll = []
        targets = np.append(text.read[1:], text.questions[0][0][0] if text.questions else 0)
        for at in range(0, len(text.read), PIECE):
            ids = text.read[at : at + PIECE], targets[at : at + PIECE]
            found, _ = self._run(programs[name], kept, *ids, PIECE, text.whole)
            nll.append(found)
        if kind == "masses":
            jax.effects_barrier()
            pairs = [self.sums[layer] for layer in sorted(self.sums)]
            return {"masses": [(share / count).round(4).tolist() for share, count in pairs]}
        known = len(text.read) - (not text.questions)
        nll = np.concatenate(nll)[:known].astype(np.float64)
        row = {"nll": nll.mean(), "late": nll[len(nll) // 2 :].mean(), "read": len(text.read)}
        if text.questions:
            asked = [
                self._ask(programs["ask"], dense, len(text.read), *question)
                for question in text.questions
            ]
            row["found"], row["answers"] = map(list, zip(*asked, strict=True))
        return row

    def _ask(
        self, program: Future, kept: Array, read: int, question: np.ndarray, digits: np.ndarray
    ) -> tuple[bool, float]:
        """Whether greedy decoding would write the digits after a question, and their NLL."""
        assert self.cache is not None
        self.cache = self.cache.rollback([read])
        ids = np.concatenate([question, digits])
        nll, best = self._run(program, kept, ids[:-1], ids[1:], ASKED, read + len(question))
        return bool(best[-len(digits) :].all()), float(nll[-len(digits) :].sum())

    def _run(
        self,
        program: Future,
        kept: Array,
        ids: np.ndarray,
        targets: np.ndarray,
        width: int,
        whole: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reads tokens; returns each next token's NLL, and whether it is the most likely one."""
        count = len(ids)
        given = np.zeros((2, 1, width), np.int32)
        given[:, 0, :count] = ids, targets
        cache, self.cache = self.cache, None
        arrays = *given, np.asarray([count], np.int32), np.asarray([whole], np.int32)
        nll, best, self.cache = program.result()(self.llm.model.params(), kept, cache, *arrays)
        return np.asarray(nll)[0, :count], np.asarray(best)[0, :count]

    def _empty(self) -> None:
        if self.cache is None:  # a failed reading had donated it
            options = {"batch": 1, "capacity": self.capacity, "dtype": self.llm.model.dtype}
            self.cache = KVCache.create(self.config, **options)
        self.cache = self.cache.rollback([0])


if __name__ == "__main__":
    app()
