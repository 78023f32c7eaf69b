"""Incremental decoding of tokens to text, with stop strings."""

from collections.abc import Collection, Sequence
from typing import Any, Literal

from dca_jax.inference.token_bytes import TokenBytes
from dca_jax.inference.tokenizer import decode
from dca_jax.text_files import check_characters

CONTEXT = 8  # maximum number of prompt tokens as context for decoding the first new ones

FinishReason = Literal["stop", "length"]


class TextStream:
    """The text of one row's new tokens, as they are generated.

    The text of a token depends on the tokens before it: a character may be split over several
    tokens, and the space before a word belongs to the word. So tokens are decoded together with
    those before them, and text is released once it is certain: no incomplete characters, and
    nothing that may be the beginning of a stop string.

    Args:
        tokenizer: a tokenizer of `transformers`; with None there is no text, but stop ids work.
        prompt: the row's prompt.
        stop_ids: ids that end the text; they are tokens of the row, but not part of its text.
        stop: strings that end the text; the text ends before the first complete one. One that
            contains the name of a special token, such as `</s>`, also matches that token.

    Attributes:
        tokens: the tokens pushed, up to and including the one that ended the text.
        text: the text released so far.
        finish_reason: None while the text continues.

    Raises:
        InputError: a stop string with half of a surrogate pair; also as in `decode`.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        *,
        stop_ids: Collection[int] = (),
        stop: Sequence[str] = (),
    ) -> None:
        for one in stop:
            check_characters(one, "a stop string")
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.stop_ids = stop_ids
        self._tokenizer, self._bytes = tokenizer, TokenBytes(tokenizer)
        names = self._bytes.special.values()
        self._named_stop = [s for s in stop if any(name in s for name in names)]
        self._stop = [s for s in stop if s not in self._named_stop]
        self._window = self._context(list(prompt))  # the first `_read` of these are already text
        self._read = len(self._window)
        while self._bytes.inside_character(self._window[: self._read]):
            self._read -= 1  # the prompt ends inside a character that the first token completes
        # Decoded text that may be the beginning of a stop string. Names of special tokens, which
        # are not part of the text, are False in `_shown`.
        self._held, self._shown = "", []

    def push(self, token: int) -> str:
        """Takes the next token; returns the text that has become certain."""
        self.tokens.append(token)
        if token in self.stop_ids:
            return self._end("stop")
        self._window.append(token)
        name = self._bytes.special.get(token, "") if self._named_stop else ""
        return self._release(self._decoded(complete_only=True), name)

    def close(self) -> str:
        """Ends the text at the maximum number of tokens; returns the text held back so far."""
        return "" if self.finish_reason else self._end("length")

    def _end(self, reason: FinishReason) -> str:
        text = self._release(self._decoded(complete_only=False))
        if self.finish_reason is None:  # no stop string at the end
            self.finish_reason = reason
            text += self._give_out(len(self._held))
        return text

    def _decoded(self, *, complete_only: bool) -> str:
        """The text of the window's new tokens; nothing while its last character is incomplete."""
        if self._read == len(self._window):
            return ""
        if complete_only and self._bytes.inside_character(self._window):
            return ""
        before = self._decode(self._window[: self._read])
        text = self._decode(self._window)[len(before) :]
        if (
            text
        ):  # otherwise it was a special token, and the next one still needs the context before it
            self._window = self._window[self._read :]
        self._read = len(self._window)
        return text

    def _context(self, prompt: list[int]) -> list[int]:
        """The end of the prompt, starting at a character boundary."""
        for start in range(max(len(prompt) - CONTEXT, 0), len(prompt)):
            if not self._bytes.continues_character(prompt[start]):
                return prompt[start:]
        return prompt if len(prompt) <= CONTEXT else []

    def _decode(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        return decode(self._tokenizer, tokens)

    def _release(self, new: str, name: str = "") -> str:
        """Adds decoded text and then the name of a special token to the text held back.

        Releases the text that cannot belong to a stop string.
        """
        self._held += new + name
        self._shown += [True] * len(new) + [False] * len(name)
        at = [index for index, shown in enumerate(self._shown) if shown]
        visible = "".join(self._held[index] for index in at)
        matches = [  # (end, start) in `_held`
            (at[start + len(stop) - 1], at[start])
            for stop in self._stop
            if (start := visible.find(stop)) >= 0
        ] + [
            (start + len(stop) - 1, start)
            for stop in self._named_stop
            if (start := self._held.find(stop)) >= 0
        ]
        if matches:
            out = self._give_out(min(matches)[1])
            self.finish_reason, self._held, self._shown = "stop", "", []
            return out
        certain = len(self._held)
        for stop in self._stop:
            if keep := _overlap(visible, stop):
                certain = min(certain, at[-keep])
        for stop in self._named_stop:
            certain = min(certain, len(self._held) - _overlap(self._held, stop))
        return self._give_out(certain)

    def _give_out(self, length: int) -> str:
        """Moves the beginning of the text held back into `text`."""
        out = "".join(
            letter
            for letter, shown in zip(self._held[:length], self._shown[:length], strict=True)
            if shown
        )
        self._held, self._shown = self._held[length:], self._shown[length:]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
