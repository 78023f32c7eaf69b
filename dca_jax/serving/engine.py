"""One thread owns the model: it reads pieces of prompts and generates tokens, step by step.

The scheduler chooses the next step, and the programs run it. A step is launched before the tokens
of the previous step have come back, so the device does not wait for the host; if a text turns out
to have ended, its extra token is dropped. Other threads submit and cancel texts.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np

from dca_jax.attention.bands import PositionMethod
from dca_jax.attention.pages import Common
from dca_jax.attention.stored import is_quantized
from dca_jax.device import current_device
from dca_jax.errors import InputError
from dca_jax.inference.generate import check_prompts
from dca_jax.inference.llm import LLM
from dca_jax.inference.options import Options
from dca_jax.inference.pieces import Pieces, overhead
from dca_jax.inference.prefix import depends_on_length
from dca_jax.inference.sampling import Sampler
from dca_jax.inference.steps import FAILED
from dca_jax.inference.text_stream import FinishReason, TextStream
from dca_jax.serving.pages import Pages, common_beginnings
from dca_jax.serving.programs import COMMON, Drawn, Programs, Texts, groups_of
from dca_jax.serving.scheduler import Draw, QueueFullError, Read, Row, Scheduler
from dca_jax.sharding import axis_size, describe, mesh_of

PAGE = 128  # tokens; the block size of the attention kernels
# Number of page reads that a step must save to read common prefixes once. A page saves 1.3 us and
# the second kernel costs 2.5 ms, by a straight-line fit over steps of 4, 16 and 32 texts
# (Llama-3-8B's shape, one H200), so it pays off from about 1,900 pages; at 2,400 it saved 1 ms.
WORTH = 1700
PIECE_SECONDS = 0.2  # limit for a piece of a prompt, if a narrower one takes less

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Delta:
    """The update of a text with one more token.

    Attributes:
        text: new text that has become certain.
        token: the token's id; None if there was none.
        logprobs: log-probabilities of the token and of the most likely ones; None unless requested.
        finish_reason: None while the text continues.
        error: the message, if finish_reason is "error".
    """

    text: str
    token: int | None = None
    logprobs: tuple[float, tuple[tuple[int, float], ...]] | None = None
    finish_reason: FinishReason | Literal["error"] | None = None
    error: str | None = None


@dataclass(eq=False, kw_only=True)
class Job:
    """A text that is being generated.

    Attributes:
        prompt_tokens: tokens of its prompt.
    """

    row: Row
    options: Options
    choice: int
    logprobs: bool
    deliver: Callable[[Delta], None]
    stream: TextStream
    table: np.ndarray = field(repr=False)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompt."""
        return self.row.prompt

    @property
    def cached_tokens(self) -> int:
        """Number of prompt tokens that did not have to be read."""
        return self.row.cached


@dataclass(frozen=True)
class _Flight:
    """A step that has been launched."""

    step: Read | Draw
    jobs: list[Job]
    drawn: Drawn
    started: float


class Engine:
    """Continuous batching with one model.

    Args:
        llm: the model, with its method.
        context: number of tokens of the longest text, answer included.
        rows: maximum number of texts processed at the same time.
        pages: number of pages of `PAGE` tokens in the cache.
        queue: maximum number of waiting texts.

    Raises:
        InputError: a model that a paged cache does not support, or a cache too small for one text.
    """

    def __init__(
        self, llm: LLM, *, context: int, rows: int = 32, pages: int, queue: int = 256
    ) -> None:
        check_served(llm, context)
        if context > pages * PAGE:
            raise InputError(
                f"a text of {context} tokens does not fit into a cache of {pages * PAGE}; give a "
                "context of at most that, or more pages"
            )
        self.llm, self.context = llm, context
        self._options = {"context": context, "rows": rows, "pages": pages, "page": PAGE}
        self._rows, self._queue = rows, queue
        self.programs = Programs(llm.model, cache_dtype=llm.cache_dtype, **self._options)
        self._by_length = depends_on_length(llm.model)
        self._changed = threading.Condition()
        self._scheduler = self._new_scheduler()
        self._jobs: dict[Row, Job] = {}
        # Seconds for (number, width) of pieces at the start of their texts.
        self._base: dict[tuple[int, int], float] = {}
        self._slope = 0.0  # additional seconds per token and earlier token
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self, progress: Callable[[str], None] = lambda name: None) -> None:
        """Compiles all programs and starts the thread.

        Args:
            progress: function called with the name of the next program.
        """
        for name in self.programs.compile():
            progress(name)
        for batch, width in self.programs.reads:
            for _ in range(2):  # the first run of a program is slower than the others
                start = time.perf_counter()
                drawn = self.programs.read(self.programs.texts(batch), [], width)
                jax.block_until_ready(drawn.token)
                self._base[batch, width] = time.perf_counter() - start
        for batch in self.programs.batches:
            jax.block_until_ready(self.programs.draw(self.programs.texts(batch)).token)
        self._thread = threading.Thread(target=self._run, name="dca_jax engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after all texts have ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        options: Options,
        deliver: Sequence[Callable[[Delta], None]],
        *,
        choices: int = 1,
        logprobs: bool = False,
        ignore_stop_ids: bool = False,
    ) -> list[Job]:
        """Submits texts: `choices` for each prompt, one prompt after another.

        The texts are those of `LLM.generate([prompt] * choices, options)`.

        Args:
            options: generation options; `prefix`, `progress` and `thinking` are ignored.
            deliver: for each text, a function called with each `Delta` in the engine's thread.
            ignore_stop_ids: whether to continue to `max_new_tokens` regardless of stop ids.

        Raises:
            InputError: an empty prompt, an id outside the vocabulary, or more than `context`.
            QueueFullError: too many texts are waiting.
        """
        check_prompts(prompts, self.llm.model.config.vocab_size)
        longest, new = max(map(len, prompts)), options.max_new_tokens
        if longest + new > self.context:
            raise InputError(
                f"a prompt of {longest} tokens and {new} new ones are {longest + new}, and this "
                f"server reads {self.context}: give a prompt of at most "
                f"{max(0, self.context - new)} tokens, or ask for at most "
                f"{max(0, self.context - longest)} new ones"
            )
        stop_ids = () if ignore_stop_ids else self.llm.stop_ids | set(options.stop_ids)
        texts = [(prompt, choice) for prompt in prompts for choice in range(choices)]
        if len(texts) > self._queue:
            raise InputError(
                f"a request for {len(texts)} texts, and the queue holds at most {self._queue}; "
                "ask for fewer at once"
            )
        streams = [
            TextStream(self.llm.tokenizer, prompt, stop_ids=stop_ids, stop=options.stop)
            for prompt, _ in texts
        ]
        with self._changed:
            if self._stopping:
                raise QueueFullError("the server is ending; ask another")
            kinds = [len(prompt) if self._by_length else 0 for prompt, _ in texts]
            rows = self._scheduler.submit(
                [prompt for prompt, _ in texts], new, kinds=kinds, drawn_too=not self._by_length
            )
            jobs = [
                Job(
                    row=row,
                    options=options,
                    choice=choice,
                    logprobs=logprobs,
                    deliver=tell,
                    stream=stream,
                    table=np.zeros((self.programs.table,), np.int32),
                )
                for row, (_, choice), tell, stream in zip(
                    rows, texts, deliver, streams, strict=True
                )
            ]
            self._jobs |= dict(zip(rows, jobs, strict=True))
            self._changed.notify()
        return jobs

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Cancels texts; their pages are freed before the next step."""
        with self._changed:
            for job in jobs:
                self._end(job)
            self._changed.notify()

    def counts(self) -> dict[str, int]:
        """Numbers of running and waiting texts, and of used, kept and free pages."""
        with self._changed:
            pages = self._scheduler.pages
            return {
                "running": len(self._scheduler.running),
                "waiting": len(self._scheduler.waiting),
                "pages_used": pages.count - pages.available,
                "pages_kept": pages.kept,
                "pages_free": pages.available - pages.kept,
            }

    # --- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        flight: _Flight | None = None
        while True:
            try:
                with self._changed:
                    step = self._scheduler.next(self._pieces)
                    if step is None and flight is None:
                        if self._scheduler.leaving:
                            continue
                        if self._stopping:
                            return
                        self._changed.wait()
                        continue
                    prepared = None if step is None else self._prepare(step)
                before, flight = flight, None
                if prepared is not None:
                    flight = self._launch(*prepared)
                if before is not None:
                    self._collect(before)
                if flight is not None and isinstance(flight.step, Read):
                    self._collect(flight)  # the next step may share its pages
                    flight = None
            except Exception:
                log.exception("a step of the server failed; its texts are given up")
                flight = None
                self._begin_anew()

    def _pieces(self, rows: Sequence[Row]) -> list[int]:
        """Tokens to read at once from the first rows, within the time limit of a piece."""
        widths, first = self.programs.pieces, rows[0]
        quick = [w for w in widths if self._seconds([first], w) <= PIECE_SECONDS]
        pieces = Pieces(tuple(quick) or widths[-1:], overhead(current_device().platform))
        counts = [next(pieces.cut(first.left))[0]]
        narrow = widths[-1]
        rests = [row for row in rows[: self.programs.rests] if row.left <= narrow]
        if counts[0] == first.left <= narrow:
            while len(counts) < len(rests):
                if self._seconds(rows[: len(counts) + 1], narrow) > PIECE_SECONDS:
                    break
                counts.append(rows[len(counts)].left)
        return counts

    def _seconds(self, rows: Sequence[Row], width: int) -> float:
        """Estimated seconds for a piece of each row."""
        batch = 1 if len(rows) == 1 else self.programs.rests
        return self._base[batch, width] + self._slope * width * sum(row.read for row in rows)

    def _prepare(self, step: Read | Draw) -> tuple[Read | Draw, list[Job], Texts]:
        """The step's texts in their present state."""
        jobs, count = [self._jobs[row] for row in step.rows], len(step.rows)
        if isinstance(step, Read):
            size = 1 if count == 1 else self.programs.rests
            lengths = [piece.start for piece in step.pieces]
        else:
            size = min(n for n in self.programs.batches if n >= count)
            lengths = [row.read - 1 for row in step.rows]
        texts, samplers = self.programs.texts(size), [job.options.sampler for job in jobs]
        for n, (row, job) in enumerate(zip(step.rows, jobs, strict=True)):
            job.table[row.changed : len(row.pages)] = row.pages[row.changed :]
            row.changed = len(row.pages)
            texts.pages[n] = job.table
            texts.slots[n], texts.prompts[n], texts.lengths[n] = row.slot, row.prompt, lengths[n]
            texts.seeds[n], texts.choices[n] = job.options.seed, job.choice
        samplers += [Sampler()] * (size - len(jobs))
        ranked = np.asarray(any(job.logprobs for job in jobs))
        common = None
        if isinstance(step, Draw) and self.programs.members and size >= COMMON:
            common = self._common([row.pages for row in step.rows], size)
        sampler = Sampler.of_rows(samplers)
        return step, jobs, texts._replace(sampler=sampler, ranked=ranked, common=common)

    def _common(self, tables: Sequence[Sequence[int]], size: int) -> Common | None:
        """The common prefixes of these texts, if reading them once saves enough."""
        limits = {"members": self.programs.members, "most": groups_of(size)}
        groups = common_beginnings(tables, **limits)
        saved = sum((len(rows) - 1) * pages for rows, pages in groups)
        return self.programs.common(size, groups) if saved >= WORTH else None

    def _launch(self, step: Read | Draw, jobs: list[Job], texts: Texts) -> _Flight:
        started = time.perf_counter()
        if isinstance(step, Draw):
            return _Flight(step, jobs, self.programs.draw(texts), started)
        for piece, job in zip(step.pieces, jobs, strict=True):
            # Only now, because tokens generated by earlier pieces are not part of the text.
            if piece.is_last and job.options.sampler.penalizes:
                self.programs.mark(piece.row.slot, piece.row.tokens)
        tokens = [piece.row.tokens[piece.start : piece.end] for piece in step.pieces]
        return _Flight(step, jobs, self.programs.read(texts, tokens, self._width(step)), started)

    def _width(self, step: Read) -> int:
        most = max(piece.count for piece in step.pieces)
        return min(width for width in self.programs.pieces if width >= most)

    def _collect(self, flight: _Flight) -> None:
        """Waits for a step and adds its tokens to their texts."""
        step, drawn = flight.step, flight.drawn
        tokens = np.asarray(drawn.token).tolist()
        drawn_from = [True] * len(flight.jobs)
        if isinstance(step, Read):
            self._time(step, time.perf_counter() - flight.started)
            drawn_from = self._collect_pieces(step, flight.jobs, np.asarray(drawn.finite))
        ranked = any(job.logprobs for job in flight.jobs)
        logprobs = [np.asarray(x).tolist() for x in drawn[1:4]] if ranked else None
        for n, (job, token) in enumerate(zip(flight.jobs, tokens, strict=False)):
            if not drawn_from[n]:
                continue
            told = None
            if job.logprobs and logprobs is not None:
                own, top, of_top = (x[n] for x in logprobs)
                told = own, tuple(zip(top, of_top, strict=True))
            self._push(job, token, told)

    def _collect_pieces(self, step: Read, jobs: list[Job], finite: np.ndarray) -> list[bool]:
        """Which of the texts got a token; texts with non-finite values end."""
        drawn_from = []
        for piece, job, is_finite in zip(step.pieces, jobs, finite, strict=False):
            drawn_from.append(bool(is_finite) and piece.is_last)
            if not is_finite:
                self._fail(job, piece.end)
                continue
            with self._changed:
                self._scheduler.has_read(piece.row, piece.end)
        return drawn_from

    def _time(self, step: Read, seconds: float) -> None:
        """Updates the time estimate of a piece."""
        width, before = self._width(step), sum(piece.start for piece in step.pieces)
        if before > width:
            batch = 1 if len(step.pieces) == 1 else self.programs.rests
            more = max(0.0, seconds - self._base[batch, width]) / (width * before)
            self._slope += (more - self._slope) / 2

    def _push(self, job: Job, token: int, logprobs: Any) -> None:
        if job.row.stage == "ended":
            return
        if token == FAILED:
            self._fail(job, len(job.row.tokens))
            return
        with self._changed:
            self._scheduler.has_drawn(job.row, token)
        try:
            text = job.stream.push(token)
            if len(job.stream.tokens) == job.options.max_new_tokens:
                text += job.stream.close()
        except InputError as error:
            self._give_up(job, str(error))
            return
        reason = job.stream.finish_reason
        if reason is not None:
            with self._changed:
                self._end(job)
        job.deliver(Delta(text=text, token=token, logprobs=logprobs, finish_reason=reason))

    def _fail(self, job: Job, position: int) -> None:
        """Ends a text with non-finite values, and clears them from its pages."""
        with self._changed:
            own = self._end(job)
        self.programs.clear(own)
        self._tell_error(
            job,
            f"the logits after token {position} are not finite: the weights hold NaN or infinity, "
            f"or overflow {self.llm.model.dtype}; check the checkpoint, or compute in float32",
        )

    def _give_up(self, job: Job, error: str) -> None:
        with self._changed:
            self._end(job)
        self._tell_error(job, error)

    def _tell_error(self, job: Job, error: str) -> None:
        job.deliver(Delta(text=job.stream.close(), finish_reason="error", error=error))

    def _end(self, job: Job) -> list[int]:
        self._jobs.pop(job.row, None)
        return self._scheduler.end(job.row)

    def _new_scheduler(self) -> Scheduler:
        pages = Pages(self._options["pages"], PAGE)
        # If positions depend on the text's length, reading a token differs from generating it.
        again = not self._by_length
        return Scheduler(pages, rows=self._rows, queue=self._queue, again=again)

    def _begin_anew(self) -> None:
        """Resets after a failed step, which may have lost the cache: ends all texts."""
        with self._changed:
            jobs, self._jobs = list(self._jobs.values()), {}
            for job in jobs:
                self._scheduler.end(job.row)
            self._scheduler = self._new_scheduler()
        for job in jobs:
            self._tell_error(job, "the server failed while it wrote this text; ask again")
        self.programs.reset()


def check_served(llm: LLM, context: int) -> None:
    """Checks that a model can be served; its weights need not be loaded.

    Args:
        context: number of tokens of the longest text, answer included.

    Raises:
        InputError: a mesh, a method, a cache or a context that a server does not support.
    """
    model = llm.model
    mesh, others = mesh_of(model), ("data", "fsdp", "context")
    if axis_size(mesh, *others) > 1:
        raise InputError(
            "a server shares its model among devices by tensor only, and this mesh has "
            f"{describe({axis: axis_size(mesh, axis) for axis in others})}; use tensor, or a "
            "server for each device"
        )
    if isinstance(model.dca, PositionMethod):
        raise InputError(
            f"a server reads by DCA or plain attention, not by {type(model.dca).__name__}; use "
            "the method dca or rope"
        )
    if model.sparse is not None:
        raise InputError(
            f"a server reads densely, and this model sparsely ({model.sparse.selector.name}); load "
            "it with sparse='off'"
        )
    if llm.cache_dtype != model.dtype and not is_quantized(llm.cache_dtype):
        raise InputError(
            f"a server's cache keeps keys in the model's dtype, {model.dtype}, or in int8 or fp8, "
            f"not in {llm.cache_dtype}; leave the cache's dtype out, or choose one of these"
        )
    if context < 2:
        raise InputError(
            f"a context of {context} has no room for a prompt and an answer; give at least 2"
        )
    model.check_window(context)
