"""Tokens to text, one at a time: what can be shown already, and where a stop string cuts."""

from collections.abc import Collection, Sequence
from typing import Any, Literal

from dca_jax.inference.token_bytes import TokenBytes
from dca_jax.inference.tokenizer import decode
from dca_jax.text_files import check_characters

CONTEXT = 8  # tokens of the prompt that the first new ones are decoded after, at most

FinishReason = Literal["stop", "length"]


class TextStream:
    """The text of one row's new tokens, as it comes.

    What a token reads depends on the tokens before it: a character may be spread over several
    tokens, and the space before a word belongs to the word. So tokens are decoded together with
    those before them, and text is given out when it is certain: no half characters, and nothing
    that may turn out to be the beginning of a stop string.

    Args:
        tokenizer: of `transformers`; with None there is no text, and stop ids still count.
        prompt: the row's prompt.
        stop_ids: ids that end the text; they are tokens of the row and no part of its text.
        stop: strings that end the text, the first to be complete; the text ends before it. One that
            holds the name of a special token, such as `</s>`, ends it at that token, too.

    Attributes:
        tokens: those pushed, up to and with the one that ended the text.
        text: all that has been given out.
        finish_reason: None while the text goes on.

    Raises:
        InputError: a stop string with half of a surrogate pair, or what `decode` refuses.
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
        self._window = self._context(list(prompt))  # of these, the first `_read` are text already
        self._read = len(self._window)
        while self._bytes.inside_character(self._window[: self._read]):
            self._read -= 1  # the prompt ends inside a character, which the first token completes
        # Decoded, and perhaps the beginning of a stop string; the names of special tokens, which
        # are no part of the text, are False in `_shown`.
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
        """The tokens have reached their number; returns the text held back so far."""
        return "" if self.finish_reason else self._end("length")

    def _end(self, reason: FinishReason) -> str:
        text = self._release(self._decoded(complete_only=False))
        if self.finish_reason is None:  # no stop string in the last of it
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
        if text:  # else it was a special token, and what follows still needs the context before it
            self._window = self._window[self._read :]
        self._read = len(self._window)
        return text

    def _context(self, prompt: list[int]) -> list[int]:
        """The end of the prompt, from where a character begins."""
        for start in range(max(len(prompt) - CONTEXT, 0), len(prompt)):
            if not self._bytes.continues_character(prompt[start]):
                return prompt[start:]
        return prompt if len(prompt) <= CONTEXT else []

    def _decode(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        return decode(self._tokenizer, tokens)

    def _release(self, new: str, name: str = "") -> str:
        """Adds decoded text, and then the name of a special token, to what is held back.

        Gives out what no stop string can reach.
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
        """Moves the beginning of what is held back into `text`."""
        out = "".join(
            letter
            for letter, shown in zip(self._held[:length], self._shown[:length], strict=True)
            if shown
        )
        self._held, self._shown = self._held[length:], self._shown[length:]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
