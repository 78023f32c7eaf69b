"""Groups requests by shared prefix, so that the prefix is read once.

A question with four choices is four requests with one context; questions about a document are
contexts with one prefix. lm-eval passes each of them in full.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dca_jax.inference.prefix import common_beginning

LEAST = 64  # shortest prefix worth a separate prefill: the smallest piece
FEW = 16  # tokens of a context that may be reread for each choice: where words merge
LONG = 2048  # shortest prefix worth more than reading other contexts in batches


class Family(NamedTuple):
    """Texts with a shared prefix.

    Attributes:
        shared: number of tokens that are read once.
        members: indices of the texts.
    """

    shared: int
    members: list[int]


def families(
    texts: Sequence[Int[np.ndarray, " _"]], contexts: Sequence[int], *, share: bool = True
) -> list[Family]:
    """Groups texts by prefix; each text is in one group.

    The last token of a context is never shared, because the next token is predicted from it.

    Args:
        texts: ids of each text.
        contexts: for each text, the number of tokens before the scored part; at least 1.
        share: False for a separate group per text.
    """
    if not share:
        return [Family(0, [number]) for number in range(len(texts))]
    # Big-endian bytes sort like the ids, so texts with a shared prefix are neighbors.
    order = sorted(range(len(texts)), key=lambda number: texts[number].astype(">u4").tobytes())
    groups: list[Family] = []
    whole = 0  # tokens that the group's first member could have shared
    for number in order:
        most = contexts[number] - 1
        if groups:
            shared, members = groups[-1]
            common = common_beginning(texts[members[-1]], texts[number])
            less = min(shared, common, most)
            lost = len(members) * (shared - less)  # reread for each member
            if less >= LEAST and (whole - less <= FEW or (less >= LONG and lost < less)):
                groups[-1] = Family(less, [*members, number])
                continue
        groups.append(Family(most, [number]))
        whole = most
    return [group if len(group.members) > 1 else Family(0, group.members) for group in groups]
