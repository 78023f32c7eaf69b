"""Which requests begin alike, so that what they share is read once.

A question with four choices is four requests with one context; the questions about a document are
as many contexts with one beginning. lm-eval hands over each of them whole.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dca_jax.inference.prefix import common_beginning

LEAST = 64  # tokens of a beginning worth a reading of its own: the smallest piece
FEW = 16  # tokens of a context that may be read once for each choice: where words merge
LONG = 2048  # tokens of a beginning that is worth more than reading other contexts in batches


class Family(NamedTuple):
    """Texts that begin alike.

    Attributes:
        shared: how many tokens are read once.
        members: numbers of the texts.
    """

    shared: int
    members: list[int]


def families(
    texts: Sequence[Int[np.ndarray, " _"]], contexts: Sequence[int], *, share: bool = True
) -> list[Family]:
    """Texts grouped by what they begin with, each in one group.

    Of a context the last token is never shared: what follows is predicted from it.

    Args:
        texts: ids.
        contexts: of each text, how many tokens come before what is to be scored; at least 1.
        share: False makes a group of each.
    """
    if not share:
        return [Family(0, [number]) for number in range(len(texts))]
    # Big-endian bytes are in the order of the ids, and texts that begin alike are neighbors.
    order = sorted(range(len(texts)), key=lambda number: texts[number].astype(">u4").tobytes())
    groups: list[Family] = []
    whole = 0  # what the group's first member could have shared
    for number in order:
        most = contexts[number] - 1
        if groups:
            shared, members = groups[-1]
            common = common_beginning(texts[members[-1]], texts[number])
            less = min(shared, common, most)
            lost = len(members) * (shared - less)  # read once more for each member
            if less >= LEAST and (whole - less <= FEW or (less >= LONG and lost < less)):
                groups[-1] = Family(less, [*members, number])
                continue
        groups.append(Family(most, [number]))
        whole = most
    return [group if len(group.members) > 1 else Family(0, group.members) for group in groups]
