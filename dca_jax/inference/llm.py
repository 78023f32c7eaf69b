"""Text in, text out: a model with its tokenizer and the generation engine."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dca_jax.distributed import is_primary
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.inference.buckets import new_cache
from dca_jax.inference.chat_templates import ChatTemplates, own_template
from dca_jax.inference.generate import NotFiniteError, Run, check_prompts
from dca_jax.inference.logits import text_logits
from dca_jax.inference.options import OptionNames, Options
from dca_jax.inference.prefix import Prefix
from dca_jax.inference.prompts import (
    Message,
    Prompt,
    Prompts,
    check_messages,
    each_prompt,
    token_ids,
)
from dca_jax.inference.score import perplexity
from dca_jax.inference.text_stream import FinishReason, TextStream
from dca_jax.inference.tokenizer import encode
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama

LONG_PROMPT = 8192  # tokens from which a prefill gets a progress bar


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A model's continuation of a prompt.

    Attributes:
        text: the new text, without the stop string or the stop id that ended it.
        tokens: the new token ids, including a stop id.
        finish_reason: "stop" after a stop id or stop string, "length" at `max_new_tokens`, "error"
            if the text could not be continued.
        prompt_tokens: number of tokens in the prompt, prefix included.
        error: why the text could not be continued (non-finite logits), if there were several
            prompts; else None.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | Literal["error"]
    prompt_tokens: int
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class LLM:
    """A language model that reads and writes text; `dca_jax.load` makes one.

    Attributes:
        model: the Flax model.
        tokenizer: the tokenizer, from `transformers`; None if the folder has none, and then prompts
            must be token ids.
        stop_ids: ids that end a text, from the config, the generation config and the tokenizer.
        cache_dtype: dtype of the KV cache.
        chat_templates: renders conversations.
    """

    model: Llama
    tokenizer: Any
    stop_ids: frozenset[int]
    cache_dtype: Any
    chat_templates: ChatTemplates = field(default_factory=ChatTemplates, repr=False, compare=False)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a text, with the special tokens that the tokenizer adds (BOS).

        Raises:
            InputError: an empty text; also as in `dca_jax.inference.tokenizer.encode`.
        """
        if not isinstance(text, str):
            raise InputError(f"a text must be a string, got {shown(text)}")
        if not text:
            raise InputError("the text is empty; give at least one character")
        return encode(self._tokenizer(), text)

    def apply_chat_template(
        self, messages: Sequence[Message], *, thinking: bool | None = None
    ) -> list[int]:
        """The token ids of a conversation, up to the beginning of the model's answer.

        Args:
            messages: `{"role": ..., "content": ...}`, in order; the template determines which roles
                (such as tools) and which other keys are allowed.
            thinking: as in `Options`.

        Raises:
            InputError: no messages; also as in `ChatTemplates.write` and `encode`, such as a
                tokenizer without a template, or messages that the template refuses.
        """
        tokenizer = self._tokenizer()
        check_messages(messages)
        asked = {} if thinking is None else {"enable_thinking": thinking}
        (text,) = self.chat_templates.write(
            own_template(tokenizer),
            tokenizer.special_tokens_map | asked,
            messages,
            [(len(messages), True)],
        )
        return encode(tokenizer, text, add_special_tokens=False)

    def generate(
        self,
        prompts: Prompts,
        options: Options | None = None,
        **changes: Unpack[OptionNames],
    ) -> list[Generation]:
        """Continues each prompt; several are processed as one batch.

        Args:
            prompts: one prompt or several, each a string or a list of token ids. With a prefix, the
                text after it; the result is the same as for prefix and prompt as one text.
            options: generation options (default: `Options()`).
            **changes: fields of `Options` that override `options`.

        Raises:
            InputError: an empty prompt, an id outside the vocabulary, an unknown or invalid option,
                a prefix of another model, or a prompt whose cache does not fit into memory.
        """
        chosen = self._for_prompts(Options.of(options, changes))
        rows = [self._continued(prompt, chosen.prefix) for prompt in each_prompt(prompts)]
        return self._generate(rows, chosen)

    def stream(
        self,
        prompt: Prompt,
        options: Options | None = None,
        **changes: Unpack[OptionNames],
    ) -> Generator[str]:
        """Continues one prompt and yields the text of `generate` as it is generated.

        The arguments are those of `generate` and are checked at the call. Close the iterator to
        stop early.
        """
        chosen = self._for_prompts(Options.of(options, changes))
        return self._stream(self._continued(prompt, chosen.prefix), chosen)

    def chat(
        self,
        messages: Sequence[Message],
        options: Options | None = None,
        **changes: Unpack[OptionNames],
    ) -> Generation:
        """The model's answer to a conversation; options as in `generate`.

        With a prefix, the part that the conversation shares with it is not read again.
        """
        chosen = Options.of(options, changes)
        tokens = self.apply_chat_template(messages, thinking=chosen.thinking)
        return self._generate([tokens], chosen)[0]

    def stream_chat(
        self,
        messages: Sequence[Message],
        options: Options | None = None,
        **changes: Unpack[OptionNames],
    ) -> Generator[str]:
        """`chat`, yielding text as it is generated."""
        chosen = Options.of(options, changes)
        return self._stream(self.apply_chat_template(messages, thinking=chosen.thinking), chosen)

    def prefill(
        self,
        text: Prompt,
        *,
        reuse: Prefix | None = None,
        room: int = 2048,
        progress: bool | None = None,
    ) -> Prefix:
        """Reads a text once, for many prompts that begin with it (`prefix=` when generating).

        The results equal those of reading each prompt whole, except for methods that depend on the
        length of a text: a DCA temperature, dynamic NTK, and position methods for a given length.
        With these, the prefix is read with its own length.

        Args:
            text: the text or its token ids.
            reuse: an earlier prefix. The part that the texts share is not read again. Its memory is
                reused, so it cannot be used afterwards.
            room: tokens of question and answer that fit before the cache must be copied into a
                larger one.
            progress: as in `Options`.

        Raises:
            InputError: an empty text, an id outside the vocabulary, an earlier prefix that is in
                use, or a text that does not fit into memory.
        """
        tokens = self._continued(text, None)
        check_prompts([tokens], self.model.config.vocab_size)
        if isinstance(room, bool) or not isinstance(room, int) or room < 0:
            raise InputError(f"room must be a number of tokens of at least 0, got {shown(room)}")
        cache, to_read = self._cache([tokens], max(room, 1), reuse)
        run = Run(self.model, [tokens], max_new_tokens=1, cache=cache)
        label = self._reading_label(len(tokens))
        with _progress_bar(to_read, progress, label) as run.on_piece:
            jax.block_until_ready(run.read_prompts())  # so that it has been read when this returns
        given = text if isinstance(text, str) else None
        return Prefix(self.model, run.cache, tuple(tokens), given)

    def logits(
        self, tokens: Int[Array | np.ndarray, "B T"] | list[list[int]]
    ) -> Float[np.ndarray, "B T V"]:
        """Logits, float32, of whole texts of equal length; those at token t predict token t + 1.

        Raises:
            InputError: not rows of ids, rows of different lengths, an id outside the vocabulary, or
                plain attention over more than the model's sliding window.
        """
        if isinstance(tokens, str) or not np.iterable(tokens):
            raise InputError(f"tokens must be rows of token ids, got {shown(tokens)}")
        rows = [token_ids(row) for row in tokens]
        lengths = sorted({len(row) for row in rows})
        if len(lengths) != 1:
            raise InputError(f"all rows must have the same length, got {lengths}")
        check_prompts(rows, self.model.config.vocab_size)
        return text_logits(self.model, np.asarray(rows, np.int32))

    def perplexity(
        self,
        text: str | Sequence[int] | Int[np.ndarray, " T"],
        *,
        window: int | None = None,
        stride: int | None = None,
    ) -> float:
        """exp of the mean negative log-likelihood of a text's tokens, without the first.

        Args:
            text: the text or its token ids.
            window: tokens per window; each window is an independent text (default: the whole text).
            stride: tokens from one window to the next (default: `window`).

        Raises:
            InputError: an invalid text, an id outside the vocabulary, a window of fewer than two
                tokens or longer than the text, or a stride below one.
        """
        tokens = self.tokenize(text) if isinstance(text, str) else token_ids(text)
        check_prompts([tokens], self.model.config.vocab_size)
        for name, value in (("window", window), ("stride", stride)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise InputError(f"{name} must be a number of tokens, got {shown(value)}")
        window = len(tokens) if window is None else window
        options = {"window": window, "stride": stride, "cache_dtype": self.cache_dtype}
        return perplexity(self.model, np.asarray(tokens, np.int32), **options)

    def _for_prompts(self, options: Options) -> Options:
        """`options`, refused if they have fields that are only for conversations."""
        if options.thinking is not None:
            raise InputError(
                "thinking is an option of chat templates; use it with `chat`, `stream_chat` or a "
                "conversation, and leave it out of `generate` and `stream`"
            )
        return options

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError(
                "this model's folder has no tokenizer, so prompts must be token ids; for text, put "
                "the tokenizer's files (tokenizer.json, tokenizer_config.json) beside config.json"
            )
        return self.tokenizer

    def _continued(self, prompt: Prompt, prefix: Prefix | None) -> list[int]:
        """The ids of prefix and prompt as one text.

        A string is tokenized as a whole, because a token may span the boundary.
        """
        if isinstance(prompt, str):
            if prefix is not None and prefix.text is not None and prompt:
                return self.tokenize(prefix.text + prompt)
            if prefix is not None and prompt:
                ids = encode(self._tokenizer(), prompt, add_special_tokens=False)
                return [*prefix.tokens, *ids]
            return self.tokenize(prompt)
        return [*(() if prefix is None else prefix.tokens), *token_ids(prompt)]

    def _cache(
        self, rows: list[list[int]], room: int, prefix: Prefix | None
    ) -> tuple[KVCache, int]:
        """A cache with the part that each row shares with the prefix, and the remaining tokens.

        The cache has `room` for new tokens. At least the last token of each row remains.
        """
        length = max(map(len, rows)) + room
        to_read = sum(map(len, rows))
        if prefix is None:
            return new_cache(self.model, len(rows), length, self.cache_dtype), to_read
        shared = [min(prefix.shared(row), len(row) - 1) for row in rows]
        if len(rows) > 1:
            return prefix.copies(self.model, shared, length), to_read - sum(shared)
        return prefix.take(self.model, shared[0], length), to_read - shared[0]

    def _reading_label(self, length: int) -> str:
        """The label of the progress bar; for sparse prefill, with the share that is read."""
        how = self.model.reading(length).sparse
        return "reading" if how is None else f"reading ({how.told(length)})"

    def _generate(self, rows: list[list[int]], options: Options) -> list[Generation]:
        streams = self._text_streams(rows, options)
        failed: dict[int, NotFiniteError] = {}
        for _ in self._pieces(rows, streams, options, failed):
            pass
        if len(rows) == 1 and failed:
            raise failed[0]
        return [
            Generation(
                text=stream.text,
                tokens=tuple(stream.tokens),
                finish_reason="error" if number in failed else stream.finish_reason or "length",
                prompt_tokens=len(row),
                error=str(failed[number]) if number in failed else None,
            )
            for number, (row, stream) in enumerate(zip(rows, streams, strict=True))
        ]

    def _stream(self, row: list[int], options: Options) -> Generator[str]:
        self._tokenizer()
        streams = self._text_streams([row], options)
        return self._texts(row, streams, options)

    def _texts(self, row: list[int], streams: list[TextStream], options: Options) -> Generator[str]:
        failed: dict[int, NotFiniteError] = {}
        yield from (piece for (piece,) in self._pieces([row], streams, options, failed) if piece)
        if failed:
            raise failed[0]

    def _text_streams(self, rows: list[list[int]], options: Options) -> list[TextStream]:
        """Checks arguments that a generator would check too late, and creates the text streams."""
        check_prompts(rows, self.model.config.vocab_size)
        if options.stop:
            self._tokenizer()
        stop_ids = self.stop_ids | set(options.stop_ids)
        return [
            TextStream(self.tokenizer, row, stop_ids=stop_ids, stop=options.stop) for row in rows
        ]

    def _pieces(
        self,
        rows: list[list[int]],
        streams: list[TextStream],
        options: Options,
        failed: dict[int, NotFiniteError],
    ) -> Iterator[list[str]]:
        """Runs the engine; yields each row's new text and collects the whole text in `streams`.

        `failed` receives the errors of rows that could not be continued.
        """
        prefix, drawn = options.prefix, []
        cache, to_read = self._cache(rows, options.max_new_tokens, prefix)
        run = Run(
            self.model,
            rows,
            max_new_tokens=options.max_new_tokens,
            sampler=options.sampler,
            seed=options.seed,
            stop_ids=streams[0].stop_ids,
            cache=cache,
        )
        try:
            segments = iter(run)
            label = self._reading_label(max(map(len, rows)))
            with _progress_bar(to_read, options.progress, label) as run.on_piece:
                first = next(segments)  # reads the prompts
            for segment in itertools.chain([first], segments):
                drawn += segment[0]
                rows_of_segment = enumerate(zip(streams, segment, strict=True))
                yield [_push(run, n, stream, new) for n, (stream, new) in rows_of_segment]
            for row, position in run.failed.items():
                if streams[row].finish_reason is None:
                    failed[row] = NotFiniteError(self.model, row, position)
            yield [stream.close() for stream in streams]
        finally:
            if prefix is not None and len(rows) == 1:
                prefix.give_back(run.cache, [*rows[0], *drawn], len(rows[0]))


def _push(run: Run, row: int, stream: TextStream, tokens: list[int]) -> str:
    """Adds a row's new tokens to its text stream, and ends the row if the text has ended."""
    text = ""
    for token in tokens:
        if stream.finish_reason is None:  # the segment may continue beyond a stop string
            text += stream.push(token)
    if stream.finish_reason is not None:
        run.finish(row)
    return text


@contextlib.contextmanager
def _progress_bar(
    tokens: int, show: bool | None, label: str
) -> Iterator[Callable[[int], None] | None]:
    """A bar over `tokens` prompt tokens; yields a callback for each piece, None without a bar."""
    if show is None:
        show = tokens >= LONG_PROMPT and sys.stderr.isatty()
    if not show or not is_primary():
        yield None
        return
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task("reading", total=tokens)
        yield lambda read: bar.advance(task, read)
