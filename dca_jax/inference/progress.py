"""A progress bar with the remaining time on standard error; in a file, one line per minute."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dca_jax.config import LlamaConfig
from dca_jax.distributed import is_primary
from dca_jax.weights.parameters import count_parameters

Advance = Callable[[float], None]

LINE = 60.0  # seconds between lines without a terminal
WINDOW = (
    600.0  # seconds over which the speed is averaged: a piece of a long text takes many seconds
)


@contextmanager
def progress(name: str, total: float) -> Iterator[Advance]:
    """A bar over `total` units of work; yields a function to call with the units just done."""
    console = Console(stderr=True, quiet=not is_primary())
    if not console.is_terminal:
        yield _lines(console, name, total)
        return
    columns = (
        TextColumn(name),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, speed_estimate_period=WINDOW) as bar:
        task = bar.add_task(name, total=total)
        yield lambda units: bar.advance(task, units)


def _lines(console: Console, name: str, total: float) -> Advance:
    """The function that `progress` yields without a terminal; it prints a line now and then."""
    begin = last = time.monotonic()
    done = 0.0

    def advance(units: float) -> None:
        nonlocal last, done
        done += units
        now = time.monotonic()
        if now - last < LINE or not done:
            return
        last = now
        spent, left = (
            timedelta(seconds=round(seconds))
            for seconds in (now - begin, (now - begin) * (total - done) / done)
        )
        console.print(
            f"{name}: {done / total:.0%} after {spent}, about {left} left",
            highlight=False,
            soft_wrap=True,
        )

    return advance


def reading_work(config: LlamaConfig, tokens: int) -> float:
    """Floating-point operations for reading a text of `tokens` tokens.

    A token takes two operations per parameter (of experts, only the chosen ones), and its attention
    four times the width of all query heads for each earlier token, half the text on average. So the
    estimate of the remaining time also works for a run over lengths from 4k to 1M, where the last
    takes most of the time.
    """
    weights = count_parameters(config, active=True)
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return tokens * (2.0 * weights + 2.0 * width * tokens)
