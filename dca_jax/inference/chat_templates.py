"""Conversations as a model's chat template writes them.

A template is a program of whoever made the model, in Jinja's language. Jinja's sandbox keeps it
from the machine, but neither from looping for ever nor from taking all memory, and it may raise
anything. So it runs in a separate process (`dca_jax.bounded`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dca_jax.bounded.workers import RaisedError, StoppedError, Workers
from dca_jax.errors import InputError
from dca_jax.fields import shown

SECONDS = 10  # for one conversation, which takes milliseconds
MEMORY = 2**30  # bytes; a conversation of ten million characters takes a tenth

OPEN_END = "CONTINUE_FINAL_MESSAGE_TAG "  # the one that transformers marks the place with
EXAMPLE = '{"role": "user", "content": "..."}'


def own_template(tokenizer: Any) -> str:
    """A tokenizer's chat template; of several, the one called default.

    Raises:
        InputError: there is none, there are several and none is the default, or it is no text.
    """
    found = getattr(tokenizer, "chat_template", None)
    if not found:
        raise InputError(
            "this tokenizer has no chat template: the model was not made for chat. Give a plain "
            "prompt, or use the model's chat version"
        )
    if isinstance(found, Mapping):
        if "default" not in found:
            names = shown(", ".join(sorted(map(str, found))), quote=False)
            raise InputError(
                f"this tokenizer has several chat templates ({names}), and none is called default; "
                "save the one to use as chat_template.jinja in the model's folder"
            )
        found = found["default"]
    if not isinstance(found, str):
        raise InputError(f"the tokenizer's chat template must be a text, got {shown(found)}")
    return found


class RefusedError(InputError):
    """A template refuses a conversation, or fails on it; it may write others."""


@dataclass(frozen=True)
class Conversation:
    """What a template writes beginnings of.

    Attributes:
        messages: `{"role": ..., "content": ...}` and whatever else the template knows.
        cuts: of each text, how many messages it has, and whether it ends in the template's
            generation prompt.
        tools: descriptions of the tools that the assistant may call.
    """

    messages: Sequence[Any]
    cuts: Sequence[tuple[int, bool]]
    tools: Sequence[Any] = ()

    def request(self) -> dict[str, Any]:
        """As JSON has it.

        Raises:
            InputError: a message that is no object.
        """
        messages = [_plain_message(one, number) for number, one in enumerate(self.messages, 1)]
        cuts, tools = [list(cut) for cut in self.cuts], list(self.tools) or None
        return {"messages": messages, "cuts": cuts, "tools": tools}


def _refusal(error: Sequence[str], what: str) -> RefusedError:
    """Of the name of what was raised, and its message."""
    kind, message = error[0], shown(error[1], quote=False)
    if kind == "Refused":
        return RefusedError(f"the chat template refuses {what}: {message}")
    reason = f"{kind}: {message}" if message else kind
    return RefusedError(f"the chat template fails on {what} ({reason}); mend it, or use another")


class ChatTemplates:
    """What writes conversations, by any template; its process is started with the first."""

    def __init__(self) -> None:
        self._workers = Workers("dca_jax.bounded.chat_template", seconds=SECONDS, memory=MEMORY)

    def write(
        self,
        template: str,
        variables: Mapping[str, str | bool],
        messages: Sequence[Any],
        cuts: Sequence[tuple[int, bool]],
        *,
        what: str = "these messages",
    ) -> list[str]:
        """Beginnings of a conversation, as `tokenizer.apply_chat_template(..., tokenize=False)`.

        Args:
            template: in Jinja's language.
            variables: the special tokens by name, as in `tokenizer.special_tokens_map`; and what
                else the template is told, such as `enable_thinking`.
            messages: `{"role": ..., "content": ...}` and whatever else the template knows.
            cuts: of each text, how many messages it has, and whether it ends in the template's
                generation prompt.
            what: the conversation's name in messages of errors.

        Returns:
            A text for each cut.

        Raises:
            InputError: a message that is no object of JSON, or holds half of a surrogate pair; a
                template that is none, that refuses the messages, or that fails, loops or takes
                too much memory.
        """
        one = Conversation(messages, cuts)
        (found,) = self.write_all(template, variables, [one], what=what)
        if isinstance(found, RefusedError):
            raise found
        return found

    def write_all(
        self,
        template: str,
        variables: Mapping[str, str | bool],
        conversations: Sequence["Conversation"],
        *,
        what: str = "these messages",
    ) -> list["list[str] | RefusedError"]:
        """As `write` of each, in one request: the process is asked once for all of them.

        Returns:
            A conversation's texts, or why the template does not write it, in its place.

        Raises:
            InputError: what no template could write, or one that loops or takes too much memory.
        """
        try:
            request = {
                "template": template,
                "variables": dict(variables),
                "conversations": [one.request() for one in conversations],
            }
            replies = self._workers.ask(request)
        except InputError:
            raise
        except (StoppedError, RaisedError) as error:
            if len(conversations) > 1:  # together they may take more than one may
                single = ([one] for one in conversations)
                return [self.write_all(template, variables, one, what=what)[0] for one in single]
            if isinstance(error, RaisedError):
                return [_refusal([error.kind, str(error)], what)]
            raise InputError(
                f"the chat template is stopped on {what}: {error}; mend it, or use another"
            ) from None
        except UnicodeEncodeError:
            raise InputError(
                f"{what}, or the chat template, hold half of a surrogate pair, which is no text"
            ) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"{what} must be made of texts, numbers, lists and objects, as JSON has them "
                f"({shown(str(error), quote=False)})"
            ) from None
        return [r["texts"] if "texts" in r else _refusal(r["error"], what) for r in replies]

    def write_open(
        self, template: str, variables: Mapping[str, str], messages: Sequence[Any]
    ) -> str:
        """A conversation whose last message is still being written.

        Like transformers' `continue_final_message`: it ends where that message's content does.

        Args:
            template, variables, messages: as for `write`; the last content is a text.

        Raises:
            InputError: as `write`, or the template leaves the last message out.
        """
        *before, last = messages
        content = last["content"]
        marked = [*before, {**last, "content": content + OPEN_END}]
        (text,) = self.write(template, variables, marked, [(len(marked), False)])
        end = text.rfind(OPEN_END.strip())
        if end < 0 or content.strip() not in text:
            raise InputError(
                "the chat template leaves the last message out, so it cannot be continued; mend "
                "it, or use another"
            )
        # Where a template trims what a message ends in, that is no part of the text.
        return text[:end] if text.startswith(OPEN_END, end) else text[:end].rstrip()


def _plain_message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"message {number} must be like {EXAMPLE}, got {shown(message)}")
    return _plain(message)


def _plain(value: Any) -> Any:
    """A value without what JSON knows under another name."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
