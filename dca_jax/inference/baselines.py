"""Other ways than DCA's of giving positions to tokens beyond the trained length.

Each is a `PositionMethod`: a frozen dataclass, given to a model in place of a `DCAConfig`. Their
names on the command line are in `dca_jax.inference.methods`.

The drawings show the relative position P_q(i) - P_k(j) of query i (row) and key j (column); a dot
is a key that is not met.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dca_jax.attention.bands import Band, Number, PositionMethod, near_band
from dca_jax.dca import DCAConfig, key_position, key_range, query_position
from dca_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ReRoPE(PositionMethod):
    """Rectified RoPE (Su, 2023): relative position min(i - j, w).

    Window 3:                 2   2  1  0
                              3   3  2  1  0
                              4   3  3  2  1  0
                              5   3  3  3  2  1  0

    Source: kexue.fm/archives/9708 and its code, github.com/bojone/rerope (rerope_patch.py), which
    also multiplies query i by max(1, ln(i + 1) / ln(trained length)), so that attention does not
    thin out over more keys than were trained; this is what `trained_length` asks for. Texts of at
    most `window` + 1 tokens are read as by plain RoPE.

    Attributes:
        window: w, tokens; 512 for 4096 trained ones in the released code, 1024 in its results.
        trained_length: tokens; None leaves the logits as they are.
    """

    window: int
    trained_length: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "window")
        if self.trained_length is not None and self.trained_length < 2:
            raise InputError(f"trained_length must be at least 2, got {self.trained_length}")

    @property
    def max_position(self) -> Number:
        """The window."""
        return self.window

    def bands(self, index: Int[Array, "B T"], whole: Int[Array, " B"]) -> tuple[Band, ...]:
        """Far and near."""
        stop = index - (self.window - 1)
        far = Band(jnp.zeros_like(index), stop, jnp.full_like(index, self.window), None)
        return far, near_band(index, self.window)

    def logit_factor(self, index: Int[Array, "B T"]) -> Float[Array, "B T"] | None:
        """max(1, log of the query's number of keys to the base of the trained length)."""
        if self.trained_length is None:
            return None
        keys = (index + 1).astype(jnp.float32)
        return jnp.maximum(jnp.log(keys) / jnp.log(jnp.float32(self.trained_length)), 1.0)


@dataclass(frozen=True, kw_only=True)
class SelfExtend(PositionMethod):
    """Self-Extend (Jin et al., arXiv 2401.01325): beyond a window, positions go by groups.

    i - j below the window w; else floor(i / G) - floor(j / G) + w - floor(w / G).

    ::

        G = 2, w = 4:             4   4  3  2  1  0
                                  5   4  4  3  2  1  0
                                  6   5  5  4  3  2  1  0
                                  7   5  5  4  4  3  2  1  0

    Source: the released code, github.com/datamllab/LongLM (self_extend_patch/Llama_4_40.py:
    `self_extend_forward`; its form with flash attention prefills with w / G unrounded, and decodes
    as here; they are one where G divides w), and its README, "How to choose the group_size and
    neighbor_window": of c trained tokens, texts of up to (c - w) G + w use trained positions only.
    Texts of at most w + 1 tokens are read as by plain RoPE.

    Attributes:
        group: G, tokens that share a position. window: w, tokens that keep theirs.
    """

    group: int
    window: int

    def __post_init__(self) -> None:
        check_positive(self, "group", "window")

    @property
    def max_position(self) -> None:
        """None: it grows with the text, if G times slower."""
        return None

    def bands(self, index: Int[Array, "B T"], whole: Int[Array, " B"]) -> tuple[Band, ...]:
        """Far (in groups) and near."""
        shift = self.window - self.window // self.group
        stop = index - (self.window - 1)
        far = Band(
            jnp.zeros_like(index), stop, index // self.group + shift, lambda j: j // self.group
        )
        return far, near_band(index, self.window)


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(PositionMethod):
    """StreamingLLM (Xiao et al., arXiv 2309.17453): attention sinks and a window.

    The original keeps a rolling cache of the first n tokens and the R most recent, and numbers its
    places. A query then stands at min(i, n + R), the sinks at 0 .. n - 1, and the window's keys at
    the query's place less their true distance. So the relative position is i - j within the window,
    and min(i, n + R) - j to a sink: here, over a cache that keeps everything, a mask does the rest.
    Equal to the original reading token by token, whose keys too are rotated when read, not when
    written. Texts of at most n + R + 1 tokens are read as by plain RoPE.

    ::

        n = 2, R = 3:             5   5  4  3  2  1  0
                                  6   5  4  .  3  2  1  0
                                  7   5  4  .  .  3  2  1  0
                                  8   5  4  .  .  .  3  2  1  0

    Source: the paper, section 3.2 and figure 4 ("positions within the cache rather than those in
    the original text"), and github.com/mit-han-lab/streaming-llm (streaming_llm/pos_shift/
    modify_llama.py; examples/eval_long_ppl.py).

    Attributes:
        sinks: n tokens, 4 in the paper. recent: R tokens beside the query itself; in the paper
            n + R is the trained length c, so that the largest position is c, one beyond training.
    """

    sinks: int
    recent: int

    def __post_init__(self) -> None:
        check_positive(self, "sinks", "recent")

    @property
    def max_position(self) -> Number:
        """Places of the cache."""
        return self.sinks + self.recent

    def bands(self, index: Int[Array, "B T"], whole: Int[Array, " B"]) -> tuple[Band, ...]:
        """Sinks and window."""
        stop = jnp.minimum(index - self.recent, self.sinks)
        place = jnp.minimum(index, self.sinks + self.recent)
        first = Band(jnp.zeros_like(index), stop, place, lambda j: j)
        return first, near_band(index, self.recent + 1)


@dataclass(frozen=True, kw_only=True)
class LMInfinite(PositionMethod):
    """LM-Infinite (Han et al., arXiv 2308.16137): a mask shaped like a Lambda, distances capped.

    A query meets the last c tokens, its own included, at their true distance, and the first n
    tokens at distance min(i - j, c), with c the trained length.

    ::

        n = 2, c = 4:             4   4  3  2  1  0
                                  5   4  4  3  2  1  0
                                  6   4  4  .  3  2  1  0
                                  7   4  4  .  .  3  2  1  0

    Source: the paper, section 4.1 (n_global, n_local = L_pretrain and w(q, k, min(d, L_pretrain));
    without the optional top-k tokens of the middle that later versions add) and
    github.com/Glaciohound/LM-Infinite (models/lambda_attention.py). Texts of at most c + 1 tokens
    are read as by plain RoPE.

    Attributes:
        sinks: n, 10 to 100 in the paper. window: c, tokens.
    """

    sinks: int
    window: int

    def __post_init__(self) -> None:
        check_positive(self, "sinks", "window")

    @property
    def max_position(self) -> Number:
        """The cap."""
        return self.window

    def bands(self, index: Int[Array, "B T"], whole: Int[Array, " B"]) -> tuple[Band, ...]:
        """The first tokens and the recent ones."""
        stop = jnp.minimum(index - (self.window - 1), self.sinks)
        first = Band(jnp.zeros_like(index), stop, jnp.full_like(index, self.window), None)
        return first, near_band(index, self.window)


@dataclass(frozen=True, kw_only=True)
class ShiftedRoPE(PositionMethod):
    """STRING (An et al., arXiv 2410.18745): far positions, rarely trained, are shifted nearer.

    i - j below S; else i - j - S + W. The last S positions of the trained range are so never used.

    ::

        S = 4, W = 2:             4   2  3  2  1  0
                                  5   3  2  3  2  1  0
                                  6   4  3  2  3  2  1  0

    For texts within the trained length c: a text of L tokens uses positions below L - S + W.

    Source: the paper, section 4.1, eq. 4, figure 5 and algorithm 1, and github.com/HKUNLP/STRING
    (string_for_llama.py), whose prefill counts the keys at i - j = S twice, in both parts; its
    decoding, the paper's eq. 4 and this do not. Texts of at most S tokens keep their positions.

    Attributes:
        shift: S, tokens; in the paper a third of the length read. local_window: W, 128 there, at
            most S: a far token still stands W beyond the nearest ones.
    """

    shift: int
    local_window: int

    def __post_init__(self) -> None:
        check_positive(self, "shift", "local_window")
        if self.local_window > self.shift:
            raise InputError(
                f"local_window ({self.local_window}) must not exceed shift ({self.shift}): far "
                "tokens would stand farther than they are"
            )

    @property
    def max_position(self) -> None:
        """None: it grows with the text."""
        return None

    def bands(self, index: Int[Array, "B T"], whole: Int[Array, " B"]) -> tuple[Band, ...]:
        """Shifted and near."""
        near = near_band(index, self.shift)
        far = near._replace(
            start=jnp.zeros_like(index),
            stop=index - (self.shift - 1),
            query_position=near.query_position - (self.shift - self.local_window),
        )
        return far, near


@dataclass(frozen=True, kw_only=True)
class DCAAblation(PositionMethod):
    """DCA without its successive-chunk pass, or with the intra-chunk pass alone (figure 4).

    ::

        s = 3, Q = 5, intra       3   .  .  . |0            and inter   3   5  4  3 |0
                                  4   .  .  . |1  0                     4   5  4  3 |1  0
                                  5   .  .  . |2  1  0                  5   5  4  3 |2  1  0

    With both, every earlier chunk, the one before included, is read as DCA reads older chunks: so
    the order near the edge of a chunk is lost, which is what the successive pass is for.

    Source: arXiv 2402.17463, sections 3.1, 3.2 and 4.3.

    Attributes:
        dca: the setting whose passes are taken. inter: False for the intra-chunk pass alone.
    """

    dca: DCAConfig
    inter: bool

    @property
    def max_position(self) -> Number:
        """As DCA's."""
        return self.dca.max_query_position

    def bands(self, index: Int[Array, "B T"], whole: Int[Array, " B"]) -> tuple[Band, ...]:
        """The chunks before (where read), and the query's own."""

        def keys(j: Array) -> Array:
            return key_position(j, self.dca)

        start, stop = key_range(index, "intra", self.dca)
        intra = Band(start, stop, query_position(index, "intra", self.dca), keys)
        if not self.inter:
            return (intra,)
        place = query_position(index, "inter", self.dca)
        return Band(jnp.zeros_like(index), start, place, keys), intra


def check_positive(method: PositionMethod, *names: str) -> None:
    """Raises InputError unless these fields are positive integers."""
    for name in names:
        value = getattr(method, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a positive integer (tokens), got {value!r}")
