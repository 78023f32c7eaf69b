"""Position methods of 2025 and 2026, most of which depend on the length of the whole text.

As in `dca_jax.inference.baselines`, they are frozen dataclasses that are passed to a model instead
of a `DCAConfig`; the diagrams show the relative position of query i (row) and key j (column).

The length L of a text (`Rows.whole`) is that of the whole prompt during the prefill, in pieces or
not, and that of the text so far during decoding. A decoded token uses the positions for that
length over all keys, which are cached raw; values of earlier tokens are not recomputed. Each row of
a batch has its own length, and one compiled program serves all lengths.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from dca_jax.attention.bands import Band, Number, PositionMethod, Series, near_band
from dca_jax.errors import InputError
from dca_jax.inference.baselines import check_positive
from dca_jax.inference.distances import stepped_band

LEVELS = 24  # AdaGroPE's group sizes 1, 2, 4 ... 2^23


@dataclass(frozen=True, kw_only=True)
class JetLong(PositionMethod):
    """Jet-Long (arXiv 2607.07740): groups beyond a window, sized by the text's length.

    A text of at most w tokens is read as with plain RoPE. For a longer one, G = ceil(L / w), and
    the relative position is i - j up to a distance of w0, and floor(i / G) - floor(j / G) beyond
    it, at most w - 1. Unlike in Self-Extend, far positions are not shifted by the window, so
    positions repeat.

    ::

        w = 4, w0 = 2, L = 8      4   2  2  2  1  0
                                  5   2  2  1  2  1  0
                                  6   3  3  2  2  2  1  0
                                  7   3  3  2  2  1  2  1  0

    Source: the authors' code, github.com/jet-ai-projects/Jet-Long
    (jetlm/modeling/jetlong/modeling_qwen3_jetlong.py; its three attention calls, one of which is
    subtracted, equal this one softmax); not compared with the paper's text. There a batch shares
    one G, computed for its longest text; here each row has its own.

    Attributes:
        trained_length: w in tokens.
        window: w0 in tokens, below w; 2048 for a trained length of 32,768 in the paper.
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
    """AdaGroPE (Xu et al., ACL 2025): more tokens share a position the farther away they are.

    A text of at most P tokens is read as with plain RoPE. A longer one also uses the positions 0 to
    P - 1 and repeats them as little as possible: r_n = floor(P / 4n) positions are shared by n
    tokens each, for each n = 1, 2, 4 ... below the largest group size G that is needed. Of the
    remaining positions, the nearer ones are shared by G - 1 tokens and the farther ones by G, so
    that the positions reach exactly to the end of the text.

    ::

        P = 8, L = 10             6   6  5  4  3  2  1  0
                                  7   6  6  5  4  3  2  1  0
                                  8   7  6  6  5  4  3  2  1  0
                                  9   7  7  6  6  5  4  3  2  1  0

    Source: aclanthology.org/2025.acl-long.28, eqs. 4 to 17 and algorithm 1; eq. 15 is misprinted
    (its factor is n - k, as in eqs. 5, 10 and 13). The reuse ratio r is 1/4, as in all the paper's
    experiments. No code is published. Every query has the paper's positions, f(i - j).

    Attributes:
        positions: P, at most the trained length c; in the paper c for perplexity, c/2 for tasks,
            and c/4 for tasks whose texts are hardly longer than c.
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
        """One band for each number of tokens that share a position."""
        kept, at, far = self._kept()
        levels, largest, more = self._needed(whole, at, far)
        P = self.positions
        # Ranges of distances: those of powers of two, then those of G - 1 and of G tokens.
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
        """For each group size n = 2^k: r_n, and the first of its positions and distances."""
        power = jnp.arange(LEVELS, dtype=jnp.int32)
        kept = jnp.asarray(self.positions, jnp.int32) >> (power + 2)
        at, far = (jnp.cumsum(x, dtype=jnp.int32) - x for x in (kept, kept << power))
        return kept, at, far

    def _needed(self, whole: Array, at: Array, far: Array) -> tuple[Array, Array, Array]:
        """For each row: number of powers of two below G, G itself, number of positions for G."""
        power = jnp.arange(LEVELS, dtype=jnp.int32)[None, :]
        room = self.positions - at  # positions left for G, given that many smaller powers
        largest = jnp.maximum(-((far[None, :] - whole[:, None]) // room[None, :]), 1)
        levels = jnp.argmax(largest <= 1 << power, axis=1).astype(jnp.int32)
        largest = jnp.take_along_axis(largest, levels[:, None], axis=1)[:, 0]
        more = room[levels] - (room[levels] * largest + far[levels] - whole)
        return levels, largest, more


@dataclass(frozen=True, kw_only=True)
class LaMPE(PositionMethod):
    """LaMPE (Zhang et al., arXiv 2508.02308): the text's length determines the range of positions.

    A text of L tokens is mapped to m = floor(M / (1 + exp(-(a L + b)))) positions: the first s1
    distances and the last s2 have steps of 1, those between have equal, smaller steps. At distance
    d:

        d up to s1,  s1 + floor((m - s1 - s2) (d - s1) / (L - s1 - s2)),  m - L + d from L - s2 on

    This applies not only to long texts: the curve is fitted to a model's best results, and may
    also map a text within the trained length. Texts below 2 s1 tokens are read as with plain RoPE,
    as are those for which m is not below L.

    ::

        m = 6, s1 = 2, s2 = 1     6   4  3  3  2  2  1  0
        for L = 9                 7   4  4  3  3  2  2  1  0
                                  8   5  4  4  3  3  2  2  1  0

    Source: the positions follow a description of the paper, not compared with its text. The curves
    are from the authors' code, github.com/scar-on/LaMPE (llama_cache1.py, `remap_uselen`), which
    floors the positions of keys and queries separately, with the slope m / (L - 1), and keeps the
    prompt's m during decoding. The curve is computed in float32 here: m may differ by one where it
    is almost an integer.

    Attributes:
        slope, shift, most: a (per token), b and M (positions) of the curve.
        head, tail: s1 and s2 in tokens.
        short, short_mapped: below `short` tokens m is `short_mapped`; 0 and 0 disable this.
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
        """m, the number of positions to which texts of these lengths are mapped."""
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
    """DPE (Lu et al., arXiv 2504.18857): each rotary plane of a head has its own group size.

    The relative position is i - j within the window w; beyond it, in plane p with the scale s_p,
    floor(i / s_p) - floor(j / s_p) + w - floor(w / s_p): Self-Extend, plane by plane.

    The scales are measured on a model: they show up to which distance its planes, in eight groups,
    are effective. The paper also leaves planes that a head hardly uses unchanged. This requires a
    choice for each layer and head, and is not implemented here (it is also off by default in the
    released code's example).

    Source: the authors' code, github.com/LuLuLuyi/DPE (dpe_for_llama.py, which prefills with
    unrounded w / s_p and decodes as here; the two agree if the scales divide w); not compared with
    the paper's text.

    Attributes:
        window: w in tokens; 1024 in the paper.
        scales: s_p, one for each plane of a head.
    """

    window: int
    scales: tuple[int, ...]

    def __post_init__(self) -> None:
        check_positive(self, "window")
        if not self.scales or min(self.scales) < 1:
            raise InputError(f"scales must be positive, one for each plane, got {self.scales}")

    @property
    def max_position(self) -> None:
        """None: it grows with the text, though more slowly."""
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
