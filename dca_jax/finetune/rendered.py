"""What a dialogue becomes: tokens, and which of them the loss counts."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from dca_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class Rendered:
    """A dialogue as tokens.

    Attributes:
        tokens: the whole, special ones included.
        trained: `trained[p]` says that token p is a target: predicted from those before it, and
            counted by the loss. False at position 0, before which there is nothing.
    """

    tokens: Int[np.ndarray, " n"]
    trained: Bool[np.ndarray, " n"]


class NotRenderedError(InputError):
    """A dialogue that cannot be written, where others may be.

    Attributes:
        reason: the same for all that have it, to count them by.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message
