"""A conversation that reuses its KV cache between turns."""

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

ROOM = 2048  # tokens of further turns that fit before the cache must grow
BUSY = "the last answer is still being generated; finish or close it first"


class Conversation:
    """Turns of a chat; each turn reads only tokens that are not yet in the cache.

    An answer is not read again if the chat template renders it in the next turn with the same
    tokens that were generated. Otherwise it is read again from the first token that differs.

    Args:
        llm: a chat model: its tokenizer must have a chat template.
        system: the system message, if any.

    Raises:
        InputError: no chat template, or one that does not accept a system message.

    Attributes:
        messages: all messages so far, in the form that chat templates accept.
    """

    def __init__(self, llm: LLM, *, system: str | None = None) -> None:
        self._llm, self._system = llm, system
        self._prefix: Prefix | None = None
        self._answering = threading.Lock()
        self.messages: list[Message] = []
        self.reset()
        # Check early that there is a template and that it accepts these messages.
        llm.apply_chat_template([*self.messages, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Starts over with only the system message."""
        self.messages = (
            [] if self._system is None else [{"role": "system", "content": self._system}]
        )

    def ask(
        self, text: str, options: Options | None = None, **changes: Unpack[OptionNames]
    ) -> Generator[str]:
        """Yields the answer as it is generated; a stopped answer stays in the conversation.

        Options are those of `LLM.generate`, except `prefix`: the conversation has its own.

        Raises:
            InputError: at the call, as in `LLM.generate`, or if the chat template refuses the
                messages.
        """
        chosen = Options.of(options, changes)
        if self._answering.locked():
            raise InputError(BUSY)
        if chosen.prefix is not None:
            raise InputError("a conversation has its own prefix; leave out prefix")
        if not isinstance(text, str):
            raise InputError(f"the question must be a string, got {shown(text)}")
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
