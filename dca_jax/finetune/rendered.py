"""A rendered dialogue: its tokens, and which of them have a loss."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from dca_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class Rendered:
    """A dialogue as tokens.

    Attributes:
        tokens: all tokens, including special ones.
        trained: `trained[p]` is True if token p is a target of the loss, predicted from the tokens
            before it. It is False at position 0.
    """

    tokens: Int[np.ndarray, " n"]
    trained: Bool[np.ndarray, " n"]


class NotRenderedError(InputError):
    """A dialogue that cannot be rendered; others may work.

    Attributes:
        reason: a common reason, by which such dialogues are counted.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message
