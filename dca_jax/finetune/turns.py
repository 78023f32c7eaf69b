"""Training data: dialogues with turns, and plain texts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Turn:
    """A turn of a dialogue.

    Attributes:
        role: system, user, assistant, or tool (the result of a tool call).
        text: the text from the file.
        trained: whether it has a loss; True only for turns of the assistant.
        more: other keys for chat templates, such as `tool_calls`, as JSON values.
    """

    role: Role
    text: str
    trained: bool
    more: Mapping[str, Any] = field(default_factory=dict)

    def message(self) -> dict[str, Any]:
        """The turn as a message for chat templates."""
        return {"role": self.role, "content": self.text, **self.more}


@dataclass(frozen=True)
class Dialogue:
    """Turns in order: optionally system, then user and assistant alternating.

    Between two turns of the assistant there may be tool turns. `tools` has their descriptions for
    chat templates.
    """

    turns: tuple[Turn, ...]
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Text:
    """Plain text that is trained on, after an optional prompt that is not."""

    text: str
    prompt: str = ""
