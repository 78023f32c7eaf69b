"""A conversation that reads nothing twice."""

from collections.abc import Iterator
from typing import Unpack

from dca_jax.inference.llm import LLM, Message, Options
from dca_jax.inference.prefix import Prefix

ROOM = 2048  # tokens of the next turns for which the cache need not grow


class Conversation:
    """Turns of a chat; each reads only what the turns before it have not read.

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
        self.messages: list[Message] = []
        self.reset()
        # Better now than after a long question: is there a template, and does it take these?
        llm.apply_chat_template([*self.messages, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Starts again, with the system message only."""
        self.messages = (
            [] if self._system is None else [{"role": "system", "content": self._system}]
        )

    def ask(self, text: str, **options: Unpack[Options]) -> Iterator[str]:
        """Yields the answer as it comes; an answer that is cut short stays as far as it came.

        `options` are those of `LLM.generate`, `prefix` excepted.

        Raises:
            InputError: the tokenizer has no chat template, or it refuses the messages.
        """
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        tokens = self._llm.apply_chat_template(messages)
        known = self._prefix if self._prefix is not None and self._prefix.usable else None
        self._prefix = self._llm.prefill(
            tokens,
            reuse=known,
            room=options.get("max_new_tokens", 256) + ROOM,
            progress=options.get("progress"),
        )
        options["prefix"] = self._prefix
        answer = ""
        try:
            for piece in self._llm.stream_chat(messages, **options):
                answer += piece
                yield piece
        finally:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
