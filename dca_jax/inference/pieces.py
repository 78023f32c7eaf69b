"""How a text is split into pieces, which are read one after another.

A piece is padded to one of a few widths, so that few programs are compiled. Its time is that of its
width plus a constant, because every piece reads all weights: with Llama-3-8B's shape on an H200, 22
microseconds per token plus 4.5 ms, or 10 ms if weights are unpacked from int4. The constant is
counted as tokens here (`overhead`). So wide pieces read long texts, and narrow ones waste little at
their ends.
"""

from collections.abc import Iterator
from typing import NamedTuple

from dca_jax.config import LlamaConfig

# Widths of pieces of one text, widest first; the first one bounds the memory for activations.
NARROW = (4096, 512, 64)
WIDE = (8192, 1024, 256, 64)
WIDEST = (16_384, 2048, 512, 64)
IN_CACHE = (512, 64)  # on a CPU, whose caches would not hold the activations of many more tokens
ENDS = 64  # for the ends of several texts, which are read together


class Pieces(NamedTuple):
    """How texts are split.

    Attributes:
        widths: the widths, widest first.
        overhead: the time of a piece besides that of its width, in tokens.
    """

    widths: tuple[int, ...]
    overhead: int

    def cut(self, length: int) -> Iterator[tuple[int, int]]:
        """The tokens and the width of each piece of `length` tokens, in order.

        A piece is padded to a width if that takes no longer than pieces of the next width.
        """
        for width, following in zip(self.widths, (*self.widths[1:], 0), strict=True):
            while length > 0 and self._is_worth(width, following, length):
                yield min(length, width), width
                length -= min(length, width)

    def _is_worth(self, width: int, following: int, length: int) -> bool:
        if not following:
            return True
        return width + self.overhead <= -(-length // following) * (following + self.overhead)

    def widest(self, length: int) -> int:
        """The width of the first, widest piece of `length` tokens."""
        return next(self.cut(length))[1]


def overhead(platform: str) -> int:
    """`Pieces.overhead` of one text: little on a CPU, whose products take longer than its reads."""
    return 16 if platform == "cpu" else 256


def prompt_pieces(
    config: LlamaConfig, platform: str, *, packed: bool, batch: int = 1, segment: int = 1
) -> Pieces:
    """How prompts are read.

    On a CPU pieces are narrower, unless they unpack weights. On a GPU they are wider, and wider
    still if they unpack weights. With a mixture of experts they are widest on any device, so that
    reading an expert's weights pays off.

    Args:
        platform: of the device, as in JAX, such as "cpu", "gpu" or "tpu".
        packed: whether weights are packed.
        batch: number of texts that are read at once; each has its share of the tokens.
        segment: number that divides all widths.
    """
    widths = _narrow(config, platform, packed)
    if platform == "gpu":
        widths = WIDEST if packed else WIDE
    if config.mixture is not None:
        widths = WIDEST
    return _shared(widths, platform, batch, segment)


def scored_pieces(
    config: LlamaConfig, platform: str, *, packed: bool, batch: int = 1, segment: int = 1
) -> Pieces:
    """How texts are read whose every token is scored; arguments as in `prompt_pieces`.

    They are narrow, because every token has logits.
    """
    return _shared(_narrow(config, platform, packed), platform, batch, segment)


def _narrow(config: LlamaConfig, platform: str, packed: bool) -> tuple[int, ...]:
    is_light = platform == "cpu" and not packed and config.mixture is None
    return IN_CACHE if is_light else NARROW


def _shared(widths: tuple[int, ...], platform: str, batch: int, segment: int) -> Pieces:
    """The pieces of each text of a batch: at least 128 tokens of the widest, 16 of the others."""
    most, *_ = widths
    widest = max(128, most // (1 << (batch - 1).bit_length()))
    own = [width * widest // most for width in widths]
    kept = dict.fromkeys(-(-w // segment) * segment for w in own if w >= min(16, widest))
    return Pieces(tuple(kept), overhead(platform) * widest // most)
