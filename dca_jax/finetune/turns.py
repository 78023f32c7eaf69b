"""What is trained on: a dialogue's turns, or a plain text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: system, user, assistant, or tool, which gives what a call of the assistant's returned.
        text: as the file has it.
        trained: whether the loss counts it; True for turns of the assistant only.
        more: what else a chat template reads of it, such as `tool_calls`; as JSON has it.
    """

    role: Role
    text: str
    trained: bool
    more: Mapping[str, Any] = field(default_factory=dict)

    def message(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.text, **self.more}


@dataclass(frozen=True)
class Dialogue:
    """Turns in order: perhaps one of the system, then user and assistant by turns.

    Between two turns of the assistant there may be those of tools. `tools` describes them, as
    chat templates take it.
    """

    turns: tuple[Turn, ...]
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Text:
    """Plain text, all of which is trained on; after a prompt, if any, which is not."""

    text: str
    prompt: str = ""
