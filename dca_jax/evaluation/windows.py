"""Perplexity over the windows of a long text, in three published forms.

They differ in where windows start, which tokens of a window count, and how windows are averaged, so
their figures are not comparable:

    paper     ChunkLlama's `ppl/test_ppl.py`, for Tables 1 and 2. Windows of L tokens start at 0,
              stride, 2 stride ... < N - L, except the last one; no BOS precedes a window.
              All of a window's L - 1 predicted tokens count, including those with little context;
              the mean is over a window, then over windows. (It uses 2.71828 for e: at a perplexity
              of 8 the difference is 1e-5.)
    strided   "Perplexity of fixed-length models" of the transformers documentation: windows of L
              tokens every `stride`, up to the end of the text; in each, only the tokens that no
              earlier window has covered count. The weights are the original's: where windows
              overlap, a mean over n tokens has weight n - 1, except in the first window.
    rolling   lm-evaluation-harness' `loglikelihood_rolling`: a prefix token (BOS, else EOS), then
              disjoint windows that predict L tokens each, given one token of the previous window;
              the last window gets as much context as fits. Every token counts once.

The paper's stride is 256; for 70B models 2048 and, above 96k tokens, L / 2.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dca_jax.errors import InputError
from dca_jax.evaluation import paper
from dca_jax.evaluation.forms import Form
from dca_jax.evaluation.results import Record, ResultLog, in_batches
from dca_jax.evaluation.tables import Outcome, Table, number
from dca_jax.evaluation.tables import tokens as tokens_text
from dca_jax.inference.methods import method_by_name, with_method
from dca_jax.inference.pieces import NARROW
from dca_jax.inference.progress import progress, reading_work
from dca_jax.inference.score import Reader, check_ids
from dca_jax.model import Llama

FORMS = ("paper", "strided", "rolling")
TOGETHER = 8  # default batch of windows shorter than a piece of a text
STRIDES = {"paper": 256, "strided": 512}  # the sources' values
FORM = Form(
    key={"method": str, "length": int, "start": int},
    value={"nll": float, "tokens": int, "weight": int},
    settings={"form": FORMS, "trained_length": int, "tokens": int, "bytes": int, "words": int},
    optional=frozenset({"tokens", "bytes", "words"}),
)
LARGEST_EXPONENT = 700.0  # exp of much more overflows float64


class Window(NamedTuple):
    """Tokens `start` to `stop` of a text, read as a separate text; those from `first` on count.

    `weight` is the weight of the window's mean in the mean over windows.
    """

    start: int
    stop: int
    first: int
    weight: int


def make_windows(form: str, count: int, length: int, stride: int | None = None) -> list[Window]:
    """The windows of a text of `count` tokens.

    Args:
        form: one of `FORMS`. For "rolling" the text begins with the prefix token, and `count`
            includes it.
        length: L, the number of tokens that the model reads; "rolling" predicts one more.
        stride: number of tokens between window starts (default: the source's).

    Raises:
        InputError: the form is unknown, the text is too short for a window, or the length or
            stride is invalid.
    """
    if form not in FORMS:
        raise InputError(f"form {form!r} is not known; expected one of {', '.join(FORMS)}")
    if form == "rolling":
        if stride is not None:
            raise InputError("the rolling form has no stride: its windows are disjoint")
        return _rolling(count, length)
    stride = STRIDES[form] if stride is None else stride
    if length < 2 or stride < 1:
        raise InputError(
            f"a window needs at least 2 tokens and a stride of at least 1, got {length} and "
            f"{stride}"
        )
    windows = (_paper if form == "paper" else _strided)(count, length, stride)
    if not windows:
        raise InputError(
            f"a text of {count:,} tokens has no window of {length:,}: the form 'paper' omits the "
            f"last one, so it needs more than {length + stride:,}; or use the form 'strided'"
        )
    return windows


def _paper(count: int, length: int, stride: int) -> list[Window]:
    starts = range(0, count - length, stride)[:-1]
    return [Window(start, start + length, start + 1, 1) for start in starts]


def _strided(count: int, length: int, stride: int) -> list[Window]:
    windows: list[Window] = []
    counted = 0
    for start in range(0, count, stride):
        stop = min(start + length, count)
        labels = stop - counted
        if stop - start > 1:  # a single token predicts nothing
            windows.append(Window(start, stop, max(counted, start + 1), labels - 1))
        counted = stop
        if stop == count:
            break
    return windows


def _rolling(count: int, length: int) -> list[Window]:
    if count < 2 or length < 1:
        raise InputError(f"the rolling form needs at least one token to predict, got {count - 1}")
    windows = []
    for first in range(1, count, length):  # the prefix, token 0, is not predicted
        stop = min(first + length, count)
        windows.append(Window(max(stop - length - 1, 0), stop, first, stop - first))
    return windows


def batches(
    count: int,
    *,
    form: str,
    lengths: Sequence[int],
    stride: int | None = None,
    batch: int | None = None,
    limit: int | None = None,
) -> Iterator[tuple[int, int]]:
    """Rows and tokens of the largest batch that `evaluate` reads for each length.

    Arguments and errors as in `make_windows` and `evaluate`.
    """
    windows = {n: _spread(make_windows(form, count, n, stride), limit) for n in lengths}
    for length, some in windows.items():
        rows = _rows(len(some), length, batch)
        yield rows, _capacity(rows, windows, batch)


def _rows(windows: int, length: int, batch: int | None) -> int:
    """Batch size for windows of one length: one, or a common number for all short windows."""
    return min(windows, batch or (TOGETHER if _is_short(length) else 1))


def _is_short(length: int) -> bool:
    return length < NARROW[0]


def _capacity(rows: int, windows: Mapping[int, Sequence[Window]], batch: int | None) -> int:
    """Cache capacity in tokens for this batch size, so that one program reads all lengths.

    Short windows have a capacity of their own: several are read at once, and long ones one by one.
    """
    return max(
        window.stop - window.start
        for length, some in windows.items()
        for window in some
        if batch is not None or rows == 1 or _is_short(length)
    )


def evaluate(
    model: Llama,
    tokens: Int[np.ndarray, " N"],
    log: ResultLog,
    *,
    form: str,
    methods: Sequence[str],
    lengths: Sequence[int],
    stride: int | None = None,
    batch: int | None = None,
    limit: int | None = None,
    cache_dtype: Any = None,
) -> None:
    """Records the mean NLL of every window that the log lacks, for every method and length.

    Batches do not depend on the log's contents, because rounding depends on the batch: a resumed
    run yields the same figures as an uninterrupted one.

    Args:
        model: the model with its own rope, as loaded.
        tokens: the text; for "rolling" it begins with the prefix token.
        methods: names known to `dca_jax.inference.methods`.
        lengths: window lengths in tokens.
        batch: number of windows read together (default: `TOGETHER` short ones or one long one).
        limit: largest number of windows of each length, spread over the text.
        cache_dtype: dtype of the KV cache (default: the model's).

    Raises:
        InputError: ids are outside the vocabulary, or `make_windows` or `with_method` raises; all
            before anything is read.
    """
    check_ids(tokens, model.config.vocab_size)
    windows = {n: _spread(make_windows(form, len(tokens), n, stride), limit) for n in lengths}
    cells = [(method, length) for method in methods for length in lengths]
    for method, length in cells:  # fail before reading
        method_by_name(method, model.config, length)
    due = {cell: list(_due(windows[cell[1]], cell, batch, log)) for cell in cells}
    work = {length: reading_work(model.config, length) for length in lengths}
    total = sum(
        work[length] * len(some) for (_, length), groups in due.items() for some, _ in groups
    )
    with progress("perplexity", total) as advance:
        for (method, length), groups in due.items():
            reading = with_method(model, method, length)

            def on_piece(read: int, length: int = length) -> None:
                advance(work[length] * read / max(1, length - 1))  # the last token is not read

            def make(rows: int, reading: Llama = reading, told: Any = on_piece) -> Reader:
                return Reader(reading, rows, _capacity(rows, windows, batch), told, cache_dtype)

            for some, size in groups:
                _read(make, tokens, some, size, log, (method, length))


def _due(
    windows: Sequence[Window], cell: tuple[str, int], batch: int | None, log: ResultLog
) -> Iterator[tuple[list[Window], int]]:
    """Batches of windows of equal length that are not all in the log, each with its batch size."""
    for _, group in groupby(windows, lambda window: window.stop - window.start):
        same = list(group)
        size = _rows(len(same), cell[1], batch)
        batches = (same[start : start + size] for start in range(0, len(same), size))
        lacking = [some for some in batches if any(_key(*cell, w) not in log for w in some)]
        if lacking:
            yield [window for some in lacking for window in some], size


def _read(
    make: Callable[[int], Reader],
    tokens: np.ndarray,
    windows: Sequence[Window],
    batch: int,
    log: ResultLog,
    cell: tuple[str, int],
) -> None:
    """Reads and records windows of one length; `make` creates a reader for a number of rows."""
    readers: dict[int, Reader] = {}  # for a batch, and for single windows if the batch failed

    def run(some: Sequence[Window]) -> None:
        begin = time.perf_counter()
        size = batch if len(some) > 1 else 1
        if size not in readers:
            readers.clear()
            readers[size] = make(size)
        rows = readers[size].nll(np.stack([tokens[w.start : w.stop] for w in some]))
        means = [
            float(row[window.first - window.start - 1 :].mean(dtype=np.float64))
            for row, window in zip(rows, some, strict=True)
        ]
        if not all(map(math.isfinite, means)):
            raise InputError(f"the NLL is not finite: {means}; check the checkpoint or the dtype")
        seconds = (time.perf_counter() - begin) / len(some)
        for window, mean in zip(some, means, strict=True):
            value = {"nll": mean, "tokens": window.stop - window.first, "weight": window.weight}
            if (key := _key(*cell, window)) not in log:
                log.add(key, value, seconds)

    def fail(window: Window, error: Exception) -> None:
        if (key := _key(*cell, window)) not in log:
            log.fail(key, error, 0.0)

    in_batches(windows, batch, run, fail)


def _key(method: str, length: int, window: Window) -> dict[str, str | int]:
    return {"method": method, "length": length, "start": window.start}


def _spread(windows: list[Window], limit: int | None) -> list[Window]:
    """At most `limit` windows, evenly spaced from the first one on."""
    if limit is None or limit >= len(windows):
        return windows
    if limit < 1:
        raise InputError(f"the limit of windows must be at least 1, got {limit}")
    return [windows[n * len(windows) // limit] for n in range(limit)]


# --- results -----------------------------------------------------------------------------------


def mean_nll(records: Sequence[Record]) -> float:
    """The mean over windows with the form's weights, in nats per token."""
    values = [record.value for record in records if record.value is not None]
    return math.fsum(value["nll"] * value["weight"] for value in values) / _weight(records)


def _weight(records: Sequence[Record]) -> int:
    return sum(record.value["weight"] for record in records if record.value is not None)


def _exp(nats: float) -> float | None:
    """A perplexity of at least 1; None on overflow."""
    return math.exp(max(nats, 0.0)) if nats < LARGEST_EXPONENT else None  # 0 may be -1e-8 here


def outcome(
    settings: Mapping[str, Any], records: Sequence[Record], paper_model: str | None
) -> Outcome:
    """Perplexity by method and length, next to the paper's figures for a model.

    If the rolling form has read the whole text, lm-evaluation-harness' other measures are included,
    from the text's bytes and words in the settings.
    """
    cells: dict[str, dict[int, list[Record]]] = {}
    for record in records:
        methods = cells.setdefault(record.key["method"], {})
        methods.setdefault(record.key["length"], []).append(record)
    # In the strided form a window of one token has weight 0, and all others may have failed.
    cells = {m: {n: some for n, some in row.items() if _weight(some)} for m, row in cells.items()}
    scores = {
        method: {
            str(length): {
                "nll": (nll := mean_nll(some)),
                "perplexity": _exp(nll),
                "windows": len(some),
                **_text_measures(settings, some, nll),
            }
            for length, some in sorted(row.items())
        }
        for method, row in cells.items()
    }
    lengths = sorted({int(length) for row in scores.values() for length in row})
    header, rows = ["method"], []
    theirs = {m: paper.row(paper.PERPLEXITY, paper_model, m) for m in scores}
    shown = {n for row in theirs.values() for n in row} & set(lengths)
    for length in lengths:
        header += [tokens_text(length), *(["paper"] if length in shown else [])]
    for method, row in scores.items():
        cells_of_row = [method]
        for length in lengths:
            value = row.get(str(length))
            cells_of_row.append("" if value is None else _shown(value["perplexity"]))
            if length in shown:
                cells_of_row.append(paper.figure(theirs[method].get(length)))
        rows.append(cells_of_row)
    title = f"Perplexity by tokens of context ({settings['form']} form)"
    curves = {
        method: {
            int(n): value["perplexity"]
            for n, value in row.items()
            if value["perplexity"] is not None
        }
        for method, row in scores.items()
    }

    def draw(path: Path) -> None:
        from dca_jax.evaluation.plots import plot_perplexity  # matplotlib is slow to import

        plot_perplexity(curves, path, trained_length=settings["trained_length"])

    tables = [Table(title=title, header=header, rows=rows)] if rows else []
    return Outcome(
        scores=scores,
        tables=tables,
        pictures={"perplexity.png": draw} if any(curves.values()) else {},
    )


def _shown(perplexity: float | None) -> str:
    return number(perplexity) if perplexity is not None else f"> e^{LARGEST_EXPONENT:.0f}"


def _text_measures(
    settings: Mapping[str, Any], records: Sequence[Record], nll: float
) -> dict[str, float | None]:
    counted = sum(record.value["tokens"] for record in records if record.value is not None)
    whole = settings["form"] == "rolling" and counted == settings.get("tokens")
    if not (whole and settings.get("bytes") and settings.get("words")):
        return {}
    total = nll * counted
    return {
        "byte_perplexity": _exp(total / settings["bytes"]),
        "bits_per_byte": total / settings["bytes"] / math.log(2),
        "word_perplexity": _exp(total / settings["words"]),
    }
