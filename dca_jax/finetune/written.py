"""Renders dialogues with a chat template, and finds the assistant's turns in the text.

Existing templates do not mark where an answer begins and ends. It is found by rendering beginnings
of the dialogue:

    up to the question, with the generation prompt    <s>[INST] How far? [/INST]
    up to the answer                                  <s>[INST] How far? [/INST] Ten miles. </s>
                                                                                ^^^^^^^^^^^^^^^^

The text that the model is given before it answers is never trained on. The text that it must
generate
is: if a template has no generation prompt, that includes the header of the answer.

For n rounds this renders text quadratic in n. Most templates render a round in the same way at any
position. So in a long dialogue each round is rendered once, after a short round that represents the
earlier ones. If these rounds add up exactly to the dialogue, the positions of their answers are
known. Otherwise all beginnings are rendered.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dca_jax.finetune.rendered import NotRenderedError
from dca_jax.inference.chat_templates import ChatTemplates, Conversation, RefusedError

FEW = 4  # up to this many answers, all beginnings are rendered
TOGETHER = 2**19  # characters of dialogues per request to the template's process

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A dialogue for templates; `answers` are the numbers of the messages trained on."""

    messages: Sequence[Message]
    answers: Sequence[int]
    tools: Sequence[Any] = ()

    @property
    def size(self) -> int:
        """Characters, about."""
        return sum(len(message["content"]) + 100 for message in self.messages)


@dataclass(frozen=True)
class Written:
    """A text, and the character ranges that are trained on."""

    text: str
    spans: list[tuple[int, int]]


class TurnWriter:
    """Renders dialogues with one template.

    Args:
        source: the template.
        variables: the special tokens by name.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self._source, self._variables = source, variables
        self._templates = ChatTemplates()

    def write(self, chats: Sequence[Chat]) -> list[Written | NotRenderedError]:
        """Each dialogue's text, or the reason why the template cannot render it.

        Raises:
            InputError: the template loops or uses too much memory.
        """
        return [found for group in _groups(chats) for found in self._write_group(group)]

    def _write_group(self, chats: Sequence[Chat]) -> list[Written | NotRenderedError]:
        asked = [_rounds(one) if len(one.answers) > FEW else [_beginnings(one)] for one in chats]
        replies = iter(self._ask([conversation for some in asked for conversation in some]))
        found = []
        for chat, some in zip(chats, asked, strict=True):
            texts = [next(replies) for _ in some]
            if len(some) == 1:
                found.append(_from_beginnings(chat, texts[0]))
                continue
            joined = _from_rounds(chat, texts)
            if joined is None:
                (whole,) = self._ask([_beginnings(chat)])
                joined = _from_beginnings(chat, whole)
            found.append(joined)
        return found

    def _ask(self, conversations: Sequence[Conversation]) -> list[list[str] | RefusedError]:
        what = "this dialogue"
        return self._templates.write_all(self._source, self._variables, conversations, what=what)


def _groups(chats: Sequence[Chat]) -> Iterator[list[Chat]]:
    """The dialogues of each request."""
    group, size = [], 0
    for chat in chats:
        if group and size + chat.size > TOGETHER:
            yield group
            group, size = [], 0
        group.append(chat)
        size += chat.size
    if group:
        yield group


# --- by beginnings -----------------------------------------------------------------------------


def _beginnings(chat: Chat) -> Conversation:
    cuts = [cut for n in chat.answers for cut in ((n, True), (n + 1, False))]
    return Conversation(chat.messages, [(len(chat.messages), False), *cuts], chat.tools)


def _from_beginnings(chat: Chat, texts: list[str] | RefusedError) -> Written | NotRenderedError:
    if isinstance(texts, RefusedError):
        return NotRenderedError(f"{texts}")
    whole, *written = texts
    for n, prompt, answered in zip(chat.answers, written[::2], written[1::2], strict=True):
        error = _difference(prompt, answered, n) or _difference(answered, whole, n)
        if error is not None:
            return error
    ends = [len(text) for text in written]
    return Written(whole, list(zip(ends[::2], ends[1::2], strict=True)))


def _difference(beginning: str, whole: str, turn: int) -> NotRenderedError | None:
    if whole.startswith(beginning):
        return None
    same = next(n for n, char in enumerate(beginning) if whole[n : n + 1] != char)
    reason = "this chat template writes the beginning of a dialogue otherwise than the whole"
    return NotRenderedError(
        f"{reason}, so which tokens of turn {turn + 1} are the assistant's cannot be told: up to "
        f"there it ends in {beginning[same:][:40]!r} where the whole has {whole[same:][:40]!r}. "
        "Choose the template llama-2, or give a .jinja file that writes turn after turn",
        f"{reason}, so the assistant's tokens cannot be told",
    )


# --- by rounds ---------------------------------------------------------------------------------


def _round_ends(chat: Chat) -> list[int]:
    """For each round, the number of the message after it; a round begins with the user."""
    starts = [n for n, message in enumerate(chat.messages) if message["role"] == "user"]
    return [*starts[1:], len(chat.messages)]


def _stub(chat: Chat) -> list[Message]:
    """A minimal dialogue in place of the earlier rounds; with a system turn if there is one."""
    head = [message for message in chat.messages[:1] if message["role"] == "system"]
    return [*head, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def _rounds(chat: Chat) -> list[Conversation]:
    """The whole dialogue, its first round, and each other round after the stub."""
    ends, stub = _round_ends(chat), _stub(chat)
    asked = [Conversation(chat.messages, [(len(chat.messages), False)], chat.tools)]
    for start, end in pairwise([0, *ends]):
        before = stub if start else []
        shift = len(before) - start
        answers = chat.answers[bisect_left(chat.answers, start) : bisect_left(chat.answers, end)]
        cuts = [cut for n in answers for cut in ((n + shift, True), (n + 1 + shift, False))]
        cuts = [(len(before) or end, False), (end + shift, False), *cuts]
        asked.append(Conversation([*before, *chat.messages[start:end]], cuts, chat.tools))
    return asked


def _from_rounds(chat: Chat, replies: list[list[str] | RefusedError]) -> Written | None:
    """The positions of the answers, if the rounds add up to the whole."""
    if any(isinstance(reply, RefusedError) for reply in replies):
        return None
    (whole,), *rounds = (reply for reply in replies if isinstance(reply, list))
    spans, done = [], 0
    for number, (before, end, *cuts) in enumerate(rounds):
        known = len(before) if number else 0
        if number and not all(text.startswith(before) for text in (end, *cuts)):
            return None
        if not whole.startswith(end[known:], done):
            return None
        for prompt, answered in zip(cuts[::2], cuts[1::2], strict=True):
            if not (answered.startswith(prompt) and end.startswith(answered)):
                return None
            spans.append((done + len(prompt) - known, done + len(answered) - known))
        done += len(end) - known
    return Written(whole, spans) if done == len(whole) else None
