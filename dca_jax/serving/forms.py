"""The format of answers: OpenAI's objects, whole and as chunks of a stream."""

import abc
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dca_jax.inference.llm import LLM
from dca_jax.inference.token_bytes import TokenBytes
from dca_jax.inference.tokenizer import decode
from dca_jax.serving.engine import Delta, Job

LEAST = -9999.0  # OpenAI's value for the logarithm of 0, which JSON cannot represent


@dataclass
class Choice:
    """The state of one text of an answer."""

    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    logprobs: list[Delta] = field(default_factory=list)

    def take(self, delta: Delta) -> None:
        """Adds the update of one more token."""
        self.text += delta.text
        self.tokens += delta.token is not None
        self.finish_reason, self.error = delta.finish_reason, delta.error
        if delta.logprobs is not None:
            self.logprobs.append(delta)


class Tokens:
    """The representation of tokens next to their log-probabilities."""

    def __init__(self, llm: LLM) -> None:
        self._tokenizer, self._bytes = llm.tokenizer, TokenBytes(llm.tokenizer)

    def shown(self, token: int) -> tuple[str, list[int]]:
        """A token's text (whole characters) and its bytes."""
        if self._tokenizer is None:
            return f"token_id:{token}", []
        found = self._bytes.of(token)
        if found is None:
            text = self._bytes.special.get(token) or decode(self._tokenizer, [token])
            piece = self._tokenizer.convert_ids_to_tokens(token)
            if piece is not None and piece.startswith("▁") and not text.startswith(" "):
                text = " " + text  # a decoder removes the space at the start of a text
            found = text.encode(errors="replace")
        return found.decode(errors="replace"), list(found)


class Form(abc.ABC):
    """One of the two protocols.

    Args:
        model: the model's name for clients.
        top: as in `Wanted`.
    """

    kind, chunk_kind, prefix = "", "", ""

    def __init__(self, model: str, tokens: Tokens, top: int | None) -> None:
        self._model, self._tokens, self._top = model, tokens, top
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        named = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return named | {"choices": choices}

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """An answer that is not streamed."""
        told = [self.choice(n, choice) for n, choice in enumerate(choices)]
        return self._object(self.kind, told) | {"usage": usage}

    def chunk(self, index: int, delta: Delta, *, usage: bool) -> dict[str, Any]:
        """A piece of a streamed answer; `usage` says whether the last one will have it."""
        told = {"index": index, **self.delta(index, delta), "finish_reason": delta.finish_reason}
        return self._object(self.chunk_kind, [told]) | ({"usage": None} if usage else {})

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice in a stream, if any."""
        return None

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk with the usage."""
        return self._object(self.chunk_kind, []) | {"usage": usage}

    @abc.abstractmethod
    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """One text of an answer that is not streamed."""

    @abc.abstractmethod
    def delta(self, index: int, delta: Delta) -> dict[str, Any]:
        """A chunk of a text."""


class ChatForm(Form):
    """`/v1/chat/completions`."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, index: int) -> dict[str, Any]:
        """Who speaks."""
        begun = {"role": "assistant", "content": ""}
        told = {"index": index, "delta": begun, "logprobs": None, "finish_reason": None}
        return self._object(self.chunk_kind, [told])

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A message."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def delta(self, index: int, delta: Delta) -> dict[str, Any]:
        """A chunk of a message."""
        told = [delta] if delta.logprobs is not None else []
        return {"delta": {"content": delta.text}, "logprobs": self._logprobs(told)}

    def _logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        if self._top is None:
            return None
        content = []
        for delta in deltas:
            assert delta.token is not None
            assert delta.logprobs is not None
            own, top = delta.logprobs
            others = [self._entry(token, logprob) for token, logprob in top[: self._top]]
            content.append(self._entry(delta.token, own) | {"top_logprobs": others})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self._tokens.shown(token)
        return {"token": text, "logprob": finite(logprob), "bytes": data}


class CompletionForm(Form):
    """`/v1/completions`."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, tokens: Tokens, top: int | None) -> None:
        super().__init__(model, tokens, top)
        self._offsets: dict[int, int] = {}  # characters of each choice so far

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A text."""
        logprobs = self._logprobs(index, choice.logprobs)
        told = {"logprobs": logprobs, "finish_reason": choice.finish_reason}
        return {"index": index, "text": choice.text, **told}

    def delta(self, index: int, delta: Delta) -> dict[str, Any]:
        """A chunk of a text."""
        told = [delta] if delta.logprobs is not None else []
        return {"text": delta.text, "logprobs": self._logprobs(index, told)}

    def _logprobs(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        if self._top is None:
            return None
        texts, own, tops, offsets, at = [], [], [], [], self._offsets.get(index, 0)
        for delta in deltas:
            assert delta.token is not None
            assert delta.logprobs is not None
            logprob, top = delta.logprobs
            text = self._tokens.shown(delta.token)[0]
            texts.append(text)
            own.append(finite(logprob))
            likely: dict[str, float] = {}
            for token, one in top[: self._top]:  # of two that look the same, the more likely one
                likely.setdefault(self._tokens.shown(token)[0], finite(one))
            tops.append(likely)
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        return {
            "tokens": texts,
            "token_logprobs": own,
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def finite(logprob: float) -> float:
    """A number that JSON can represent."""
    return logprob if math.isfinite(logprob) else LEAST


def usage(jobs: Sequence[Job], choices: Sequence[Choice], per_prompt: int) -> dict[str, Any]:
    """Token usage of a request; a prompt counts once, whatever its number of choices."""
    prompts = jobs[::per_prompt]
    read, drawn = sum(job.prompt_tokens for job in prompts), sum(c.tokens for c in choices)
    return {
        "prompt_tokens": read,
        "completion_tokens": drawn,
        "total_tokens": read + drawn,
        "prompt_tokens_details": {"cached_tokens": sum(job.cached_tokens for job in prompts)},
    }
