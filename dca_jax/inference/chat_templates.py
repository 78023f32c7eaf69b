"""Rendering conversations with a model's chat template.

A template is a Jinja program from the author of the model. Jinja's sandbox denies it access to the
machine, but it can still loop forever, use up all memory or raise any exception. So it runs in a
separate process (`dca_jax.bounded`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dca_jax.bounded.workers import RaisedError, StoppedError, Workers
from dca_jax.errors import InputError
from dca_jax.fields import shown

SECONDS = 10  # limit for one conversation, which takes milliseconds
MEMORY = 2**30  # bytes; a conversation of ten million characters takes a tenth of it

OPEN_END = "CONTINUE_FINAL_MESSAGE_TAG "  # the same marker as in transformers
EXAMPLE = '{"role": "user", "content": "..."}'


def own_template(tokenizer: Any) -> str:
    """A tokenizer's chat template; if there are several, the one named default.

    Raises:
        InputError: no template, several without a default, or one that is not a string.
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
                f"this tokenizer has several chat templates ({names}), and none is named default; "
                "save the one to use as chat_template.jinja in the model's folder"
            )
        found = found["default"]
    if not isinstance(found, str):
        raise InputError(f"the tokenizer's chat template must be a string, got {shown(found)}")
    return found


class RefusedError(InputError):
    """A template refuses a conversation or fails on it; it may work for others."""


@dataclass(frozen=True)
class Conversation:
    """A conversation for rendering.

    Attributes:
        messages: `{"role": ..., "content": ...}` and any other keys that the template uses.
        cuts: for each text, the number of messages, and whether it ends with the template's
            generation prompt.
        tools: descriptions of the tools that the assistant may call.
    """

    messages: Sequence[Any]
    cuts: Sequence[tuple[int, bool]]
    tools: Sequence[Any] = ()

    def request(self) -> dict[str, Any]:
        """The conversation as a JSON object.

        Raises:
            InputError: a message that is not an object.
        """
        messages = [_plain_message(one, number) for number, one in enumerate(self.messages, 1)]
        cuts, tools = [list(cut) for cut in self.cuts], list(self.tools) or None
        return {"messages": messages, "cuts": cuts, "tools": tools}


def _refusal(error: Sequence[str], what: str) -> RefusedError:
    """The error for an exception's name and message."""
    kind, message = error[0], shown(error[1], quote=False)
    if kind == "Refused":
        return RefusedError(f"the chat template refuses {what}: {message}")
    reason = f"{kind}: {message}" if message else kind
    return RefusedError(f"the chat template fails on {what} ({reason}); fix it, or use another")


class ChatTemplates:
    """Renders conversations with any template; its process starts with the first one."""

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
        """Renders a conversation like `tokenizer.apply_chat_template(..., tokenize=False)`.

        Args:
            template: the Jinja source.
            variables: the special tokens by name, as in `tokenizer.special_tokens_map`, and other
                variables of the template, such as `enable_thinking`.
            messages: `{"role": ..., "content": ...}` and any other keys that the template uses.
            cuts: for each text, the number of messages, and whether it ends with the template's
                generation prompt.
            what: the conversation's name in error messages.

        Returns:
            A text for each cut.

        Raises:
            InputError: a message that is not a JSON object or contains half of a surrogate pair; an
                invalid template, or one that refuses the messages, fails, loops or uses too much
                memory.
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
        """Like `write` for each conversation, in a single request to the process.

        Returns:
            For each conversation, its texts, or the reason why the template cannot render it.

        Raises:
            InputError: invalid messages, or a template that loops or uses too much memory.
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
            if len(conversations) > 1:  # together they may exceed the limits of one
                single = ([one] for one in conversations)
                return [self.write_all(template, variables, one, what=what)[0] for one in single]
            if isinstance(error, RaisedError):
                return [_refusal([error.kind, str(error)], what)]
            raise InputError(
                f"the chat template was stopped on {what}: {error}; fix it, or use another"
            ) from None
        except UnicodeEncodeError:
            raise InputError(
                f"{what}, or the chat template, contain half of a surrogate pair, which is not text"
            ) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"{what} must consist of JSON values (strings, numbers, lists and objects) "
                f"({shown(str(error), quote=False)})"
            ) from None
        return [r["texts"] if "texts" in r else _refusal(r["error"], what) for r in replies]

    def write_open(
        self, template: str, variables: Mapping[str, str], messages: Sequence[Any]
    ) -> str:
        """Renders a conversation whose last message is to be continued.

        Like transformers' `continue_final_message`, it ends where that message's content ends.

        Args:
            template, variables, messages: as in `write`; the last content is a string.

        Raises:
            InputError: as in `write`, or if the template omits the last message.
        """
        *before, last = messages
        content = last["content"]
        marked = [*before, {**last, "content": content + OPEN_END}]
        (text,) = self.write(template, variables, marked, [(len(marked), False)])
        end = text.rfind(OPEN_END.strip())
        if end < 0 or content.strip() not in text:
            raise InputError(
                "the chat template omits the last message, so it cannot be continued; fix "
                "it, or use another"
            )
        # A template may trim the end of a message, which is then not part of the text.
        return text[:end] if text.startswith(OPEN_END, end) else text[:end].rstrip()


def _plain_message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"message {number} must be like {EXAMPLE}, got {shown(message)}")
    return _plain(message)


def _plain(value: Any) -> Any:
    """A value converted to JSON's own types."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
