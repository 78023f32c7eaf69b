"""A conversation that reads nothing twice."""

import threading
from collections.abc import Generator
from dataclasses import replace
from typing import Unpack

from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.inference.buckets import new_cache
from dca_jax.inference.llm import LLM, Message
from dca_jax.inference.options import OptionNames, Options
from dca_jax.inference.prefix import Prefix

ROOM = 2048  # tokens of the next turns for which the cache need not grow
BUSY = "the last answer is still being given; finish it, or close it"


class Conversation:
    """Turns of a chat; each reads only what the turns before it have neither read nor written.

    An answer is not read again if the chat template writes it, in the next turn, as the tokens it
    was drawn as; from the first token that differs on, it is.

    Args:
        llm: a chat model: its tokenizer must have a chat template.
        system: the system message, if any.

    Raises:
        InputError: no chat template, or one that takes no system message.

    Attributes:
        messages: all so far, in the form that chat templates take.
    """

    def __init__(self, llm: LLM, *, system: str | None = None) -> None:
        self._llm, self._system = llm, system
        self._prefix: Prefix | None = None
        self._answering = threading.Lock()
        self.messages: list[Message] = []
        self.reset()
        # Better now than after a long question: is there a template, and does it take these?
        llm.apply_chat_template([*self.messages, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Starts again, with the system message only."""
        self.messages = (
            [] if self._system is None else [{"role": "system", "content": self._system}]
        )

    def ask(
        self, text: str, options: Options | None = None, **changes: Unpack[OptionNames]
    ) -> Generator[str]:
        """Yields the answer as it comes; an answer that is cut short stays as far as it came.

        Options are those of `LLM.generate`; `prefix` is the conversation's own.

        Raises:
            InputError: at once, what `LLM.generate` refuses, or messages that the chat template
                refuses.
        """
        chosen = Options.of(options, changes)
        if self._answering.locked():
            raise InputError(BUSY)
        if chosen.prefix is not None:
            raise InputError("a conversation has a prefix of its own; give none")
        if not isinstance(text, str):
            raise InputError(f"what is asked must be a string, got {shown(text)}")
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        if self._prefix is None or not self._prefix.usable:
            cache = new_cache(self._llm.model, 1, 1, self._llm.cache_dtype)
            self._prefix = Prefix(self._llm.model, cache, (), None, room=ROOM)
        chosen = replace(chosen, prefix=self._prefix)
        return self._answer(messages, self._llm.stream_chat(messages, chosen), self._prefix)

    def _answer(
        self, messages: list[Message], pieces: Generator[str], prefix: Prefix
    ) -> Generator[str]:
        if not self._answering.acquire(blocking=False):
            raise InputError(BUSY)
        answer = ""
        try:
            for piece in pieces:
                answer += piece
                yield piece
        finally:
            pieces.close()
            prefix.keep()
            self.messages = [*messages, {"role": "assistant", "content": answer}]
            self._answering.release()
