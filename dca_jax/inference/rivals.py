"""Methods of 2025 and 2026, most of which look at how long the whole text is.

As those of `dca_jax.inference.baselines`: frozen dataclasses, given to a model in place of a
`DCAConfig`; the drawings show the relative position of query i (row) and key j (column).

The length L of a text (`Rows.whole`) is the whole prompt's while it is read, in pieces or at once,
and the text's so far when a token is drawn: the token is read with the positions of that length,
over all keys, for they are kept raw. What earlier tokens have been read as stays. Each row of a
batch has its own length, and one compiled program serves all lengths.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from dca_jax.attention.bands import Band, Number, PositionMethod, Series, near_band
from dca_jax.errors import InputError
from dca_jax.inference.baselines import check_positive
from dca_jax.inference.distances import stepped_band

LEVELS = 24  # of AdaGroPE: groups of up to 2^23 tokens that keep some positions


@dataclass(frozen=True, kw_only=True)
class JetLong(PositionMethod):
    """Jet-Long (arXiv 2607.07740): groups beyond a window, as large as the text's length asks for.

    A text of at most w tokens is read as by plain RoPE. Of a longer one, G = ceil(L / w), and the
    relative position is i - j up to a distance of w0, and beyond it floor(i / G) - floor(j / G):
    nothing stands farther than w - 1. Unlike Self-Extend's, far tokens are not moved away by the
    window, so that positions repeat.

    ::

        w = 4, w0 = 2, L = 8      4   2  2  2  1  0
                                  5   2  2  1  2  1  0
                                  6   3  3  2  2  2  1  0
                                  7   3  3  2  2  1  2  1  0

    Source: the authors' code, github.com/jet-ai-projects/Jet-Long
    (jetlm/modeling/jetlong/modeling_qwen3_jetlong.py; its three calls of attention, one of them
    taken off again, are this one softmax); not compared with the paper's text. There G is one for a
    batch, made for its longest text; here each row has its own.

    Attributes:
        trained_length: w, tokens. window: w0, tokens, below w; 2048 for 32,768 in the paper.
    """

    trained_length: int
    window: int
    by_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self, "trained_length", "window")
        if self.window >= self.trained_length:
            raise InputError(
                f"window ({self.window}) must be below the trained length ({self.trained_length})"
            )

    @property
    def max_position(self) -> Number:
        """The last of the trained positions."""
        return self.trained_length - 1

    def bands(self, index: Int[Array, "B T"], whole: Int[Array, " B"]) -> tuple[Band, ...]:
        """Far (in groups) and near."""
        group = jnp.maximum(whole - 1, 0)[:, None] // self.trained_length + 1
        far = Band(jnp.zeros_like(index), index - self.window, index // group, lambda j: j // group)
        return far, near_band(index, self.window + 1)


@dataclass(frozen=True, kw_only=True)
class AdaGroPE(PositionMethod):
    """AdaGroPE (Xu et al., ACL 2025): the farther away, the more tokens share a position.

    A text of at most P tokens is read as by plain RoPE. A longer one uses the positions 0 to P - 1
    too, and repeats them no more than it must: r_n = floor(P / 4n) of them stand for n tokens, for
    each n = 1, 2, 4 ... below the largest number G that is needed; of the rest the nearer ones
    stand for G - 1 tokens and the farther ones for G, such that the positions end with the text.

    ::

        P = 8, L = 10             6   6  5  4  3  2  1  0
                                  7   6  6  5  4  3  2  1  0
                                  8   7  6  6  5  4  3  2  1  0
                                  9   7  7  6  6  5  4  3  2  1  0

    Source: aclanthology.org/2025.acl-long.28, eqs. 4 to 17 and algorithm 1; eq. 15 is misprinted
    (its factor is n - k, as in eqs. 5, 10 and 13). The paper's reuse ratio r is 1/4, as in all its
    experiments. No code is published. Positions are the paper's for every query, f(i - j).

    Attributes:
        positions: P, at most the trained length c; in the paper c for perplexity, c/2 for tasks,
            c/4 for tasks whose texts are hardly longer than c.
    """

    positions: int
    by_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self, "positions")

    @property
    def max_position(self) -> Number:
        """The last of the positions."""
        return self.positions - 1

    def bands(self, index: Int[Array, "B T"], whole: Int[Array, " B"]) -> tuple[Band | Series, ...]:
        """One for each number of tokens that share a position."""
        kept, at, far = self._kept()
        levels, largest, more = self._needed(whole, at, far)
        P = self.positions
        # The ranges of distances: those that are kept, then those of G - 1 and of G tokens.
        once = (P - more - at[levels]) * (largest - 1)
        split = far[levels] + once

        def of(level: Array) -> Band:
            is_kept, is_last = level < levels, level == levels + 1
            group = jnp.where(is_kept, 1 << level, jnp.where(is_last, largest, largest - 1))
            start = jnp.where(is_kept, far[level], jnp.where(is_last, split, far[levels]))
            end = jnp.where(is_last, whole, jnp.where(level == levels, split, start))
            stop = jnp.where(is_kept, start + (kept[level] << level), end)
            last = jnp.where(largest == 1, 0, P - more)
            base = jnp.where(is_kept, at[level], jnp.where(is_last, last, at[levels]))
            start, stop, base = (x[:, None] for x in (start, stop, base))
            q = jnp.maximum(group, 1)[:, None]
            return stepped_band(index, start, stop, base, q=q)

        return (Series(jnp.max(levels) + 2, LEVELS + 2, of),)

    def _kept(self) -> tuple[Array, Array, Array]:
        """Of n = 2^k tokens, for each k: r_n, and where these positions and distances begin."""
        power = jnp.arange(LEVELS, dtype=jnp.int32)
        kept = jnp.asarray(self.positions, jnp.int32) >> (power + 2)
        at, far = (jnp.cumsum(x, dtype=jnp.int32) - x for x in (kept, kept << power))
        return kept, at, far

    def _needed(self, whole: Array, at: Array, far: Array) -> tuple[Array, Array, Array]:
        """Of each row: how many powers of two are below G, G itself, and how many stand for G."""
        power = jnp.arange(LEVELS, dtype=jnp.int32)[None, :]
        room = self.positions - at  # positions that are left for G, if so many powers are below
        largest = jnp.maximum(-((far[None, :] - whole[:, None]) // room[None, :]), 1)
        levels = jnp.argmax(largest <= 1 << power, axis=1).astype(jnp.int32)
        largest = jnp.take_along_axis(largest, levels[:, None], axis=1)[:, 0]
        more = room[levels] - (room[levels] * largest + far[levels] - whole)
        return levels, largest, more


@dataclass(frozen=True, kw_only=True)
class LaMPE(PositionMethod):
    """LaMPE (Zhang et al., arXiv 2508.02308): the text's length says how far positions reach.

    A text of L tokens is mapped to m positions, m = floor(M / (1 + exp(-(a L + b)))): s1 at the
    true distance, the last s2 at true steps too, and the middle at even ones. At distance d:

        d up to s1,  s1 + floor((m - s1 - s2) (d - s1) / (L - s1 - s2)),  m - L + d from L - s2 on

    Not only of long texts: the curve is made for what a model does best with, and may map a text
    within the trained length too. Texts below 2 s1 tokens are read as by plain RoPE, and so are
    those that m does not shorten.

    ::

        m = 6, s1 = 2, s2 = 1     6   4  3  3  2  2  1  0
        for L = 9                 7   4  4  3  3  2  2  1  0
                                  8   5  4  4  3  3  2  2  1  0

    Source: the positions are those of a description of the paper, not compared with its text. The
    curves are the authors' code's, github.com/scar-on/LaMPE (llama_cache1.py, `remap_uselen`),
    which floors the positions of keys and queries separately, with the slope m / (L - 1), and keeps
    the prompt's m while tokens are drawn. The curve is computed in float32 here: m may differ by
    one where it is almost an integer.

    Attributes:
        slope, shift, most: a (per token), b and M (positions) of the curve.
        head, tail: s1 and s2, tokens.
        short, short_mapped: below `short` tokens m is `short_mapped`; 0 and 0: nowhere.
    """

    slope: float
    shift: float
    most: float
    head: int
    tail: int
    short: int = 0
    short_mapped: int = 0
    by_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self, "head", "tail")
        if self.slope <= 0 or self.most <= self.head + self.tail:
            raise InputError(
                f"LaMPE's curve needs a slope above 0 and more than head + tail = "
                f"{self.head + self.tail} positions, got {self.slope} and {self.most}"
            )

    @property
    def max_position(self) -> None:
        """None: it grows with the text, up to M."""
        return None

    def mapped(self, whole: Int[Array, " B"]) -> Int[Array, " B"]:
        """m, the positions that texts of so many tokens are mapped to."""
        curve = 1 + jnp.exp(-(jnp.float32(self.slope) * whole.astype(jnp.float32) + self.shift))
        found = jnp.floor(self.most / curve).astype(jnp.int32)
        found = jnp.where(whole < self.short, self.short_mapped, found)
        found = jnp.clip(found, self.head + self.tail + 1, whole)
        return jnp.where(whole < 2 * self.head, whole, found)

    def bands(self, index: Int[Array, "B T"], whole: Int[Array, " B"]) -> tuple[Band, ...]:
        """The tail, the middle and the head."""
        mapped = self.mapped(whole)
        plain = mapped == whole
        near = jnp.where(plain, whole, self.head)[:, None]
        far = jnp.where(plain, whole, whole - self.tail)[:, None]
        beyond = self.head + self.tail
        p, q = (jnp.where(plain, 1, x - beyond)[:, None] for x in (mapped, whole))
        head = near_band(index, 1)._replace(start=jnp.maximum(index - (near - 1), 0))
        tail = head._replace(
            start=jnp.zeros_like(index),
            stop=index - (far - 1),
            query_position=head.query_position - (whole - mapped)[:, None],
        )
        return tail, stepped_band(index, near, far, self.head, p=p, q=q), head


@dataclass(frozen=True, kw_only=True)
class DPE(PositionMethod):
    """DPE (Lu et al., arXiv 2504.18857): each plane of a head has groups of its own size.

    i - j below the window w; beyond it, in plane p with the scale s_p,
    floor(i / s_p) - floor(j / s_p) + w - floor(w / s_p): Self-Extend, plane by plane.

    The scales come from a measurement on a model: how far its planes, in eight groups, still tell
    distances. The paper goes on to leave those planes as they are that a head hardly uses; that
    needs a choice for each layer and head, and is not done here (as by default in the released
    code's example).

    Source: the authors' code, github.com/LuLuLuyi/DPE (dpe_for_llama.py, whose prefill has w / s_p
    unrounded, and whose decoding is this; they agree where the scales divide w); not compared with
    the paper's text.

    Attributes:
        window: w, tokens; 1024 in the paper. scales: s_p, one for each plane of a head.
    """

    window: int
    scales: tuple[int, ...]

    def __post_init__(self) -> None:
        check_positive(self, "window")
        if not self.scales or min(self.scales) < 1:
            raise InputError(f"scales must be positive, one for each plane, got {self.scales}")

    @property
    def max_position(self) -> None:
        """None: it grows with the text, if slower."""
        return None

    def bands(self, index: Int[Array, "B T"], whole: Int[Array, " B"]) -> tuple[Band, ...]:
        """Far (in groups) and near."""
        scales = jnp.asarray(self.scales, jnp.int32)[None, None, :]
        shift = self.window - self.window // scales
        far = Band(
            jnp.zeros_like(index),
            index - (self.window - 1),
            index[:, :, None] // scales + shift,
            lambda j: j[:, :, None] // scales,
        )
        return far, near_band(index, self.window)
