"""Alternatives to DCA for assigning positions to tokens beyond the trained length.

Each is a `PositionMethod`: a frozen dataclass that is passed to a model instead of a `DCAConfig`.
Their names on the command line are in `dca_jax.inference.methods`.

The diagrams show the relative position P_q(i) - P_k(j) of query i (row) and key j (column); a dot
is a masked key.
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
    also multiplies query i by max(1, ln(i + 1) / ln(trained length)), so that attention is not
    diluted over more keys than in training; `trained_length` enables this. Texts of at most
    `window` + 1 tokens are read as with plain RoPE.

    Attributes:
        window: w in tokens; the released code has 512 for a trained length of 4096, its results
            1024.
        trained_length: trained length in tokens, or None to leave the logits unscaled.
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
        """max(1, logarithm of the query's number of keys to the base of the trained length)."""
        if self.trained_length is None:
            return None
        keys = (index + 1).astype(jnp.float32)
        return jnp.maximum(jnp.log(keys) / jnp.log(jnp.float32(self.trained_length)), 1.0)


@dataclass(frozen=True, kw_only=True)
class SelfExtend(PositionMethod):
    """Self-Extend (Jin et al., arXiv 2401.01325): grouped positions beyond a window.

    The relative position is i - j within the window w, and floor(i / G) - floor(j / G) + w -
    floor(w / G) beyond it.

    ::

        G = 2, w = 4:             4   4  3  2  1  0
                                  5   4  4  3  2  1  0
                                  6   5  5  4  3  2  1  0
                                  7   5  5  4  4  3  2  1  0

    Source: the released code, github.com/datamllab/LongLM (self_extend_patch/Llama_4_40.py:
    `self_extend_forward`; its flash attention variant prefills with unrounded w / G and decodes as
    here; the two agree if G divides w), and its README, "How to choose the group_size and
    neighbor_window": with a trained length c, texts of up to (c - w) G + w tokens use only trained
    positions. Texts of at most w + 1 tokens are read as with plain RoPE.

    Attributes:
        group: G, number of tokens that share a position.
        window: w, number of tokens that keep their own position.
    """

    group: int
    window: int

    def __post_init__(self) -> None:
        check_positive(self, "group", "window")

    @property
    def max_position(self) -> None:
        """None: it grows with the text, though G times slower."""
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

    The original has a rolling cache of the first n tokens and the R most recent ones, and uses
    positions within that cache: the query has position min(i, n + R), the sinks 0 .. n - 1, and a
    key of the window the query's position minus its true distance. So the relative position is
    i - j within the window, and min(i, n + R) - j to a sink. Here the cache holds every token, and
    a mask excludes the others. This equals the original when it reads token by token, as it too
    rotates keys when reading them. Texts of at most n + R + 1 tokens are read as with plain RoPE.

    ::

        n = 2, R = 3:             5   5  4  3  2  1  0
                                  6   5  4  .  3  2  1  0
                                  7   5  4  .  .  3  2  1  0
                                  8   5  4  .  .  .  3  2  1  0

    Source: the paper, section 3.2 and figure 4 ("positions within the cache rather than those in
    the original text"), and github.com/mit-han-lab/streaming-llm (streaming_llm/pos_shift/
    modify_llama.py; examples/eval_long_ppl.py).

    Attributes:
        sinks: n in tokens; 4 in the paper.
        recent: R in tokens, excluding the query itself; in the paper n + R is the trained length c,
            so the largest position is c, one beyond training.
    """

    sinks: int
    recent: int

    def __post_init__(self) -> None:
        check_positive(self, "sinks", "recent")

    @property
    def max_position(self) -> Number:
        """The size of the original's cache, n + R."""
        return self.sinks + self.recent

    def bands(self, index: Int[Array, "B T"], whole: Int[Array, " B"]) -> tuple[Band, ...]:
        """Sinks and window."""
        stop = jnp.minimum(index - self.recent, self.sinks)
        place = jnp.minimum(index, self.sinks + self.recent)
        first = Band(jnp.zeros_like(index), stop, place, lambda j: j)
        return first, near_band(index, self.recent + 1)


@dataclass(frozen=True, kw_only=True)
class LMInfinite(PositionMethod):
    """LM-Infinite (Han et al., arXiv 2308.16137): a Lambda-shaped mask and a distance limit.

    A query attends to the last c tokens, including its own, at their true distance, and to the
    first n tokens at distance min(i - j, c), where c is the trained length.

    ::

        n = 2, c = 4:             4   4  3  2  1  0
                                  5   4  4  3  2  1  0
                                  6   4  4  .  3  2  1  0
                                  7   4  4  .  .  3  2  1  0

    Source: the paper, section 4.1 (n_global, n_local = L_pretrain and w(q, k, min(d, L_pretrain));
    without the optional top-k middle tokens of later versions) and
    github.com/Glaciohound/LM-Infinite (models/lambda_attention.py). Texts of at most c + 1 tokens
    are read as with plain RoPE.

    Attributes:
        sinks: n in tokens; 10 to 100 in the paper.
        window: c in tokens.
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
    """STRING (An et al., arXiv 2410.18745): shifts large, rarely trained positions closer.

    The relative position is i - j below S, and i - j - S + W from S on, so the last positions of
    the trained range, which are rarely trained, are not used.

    ::

        S = 4, W = 2:             4   2  3  2  1  0
                                  5   3  2  3  2  1  0
                                  6   4  3  2  3  2  1  0

    For texts within the trained length c: a text of L tokens uses positions below L - S + W.

    Source: the paper, section 4.1, eq. 4, figure 5 and algorithm 1, and github.com/HKUNLP/STRING
    (string_for_llama.py). Its prefill counts the keys at i - j = S twice, once in each part; its
    decoding, the paper's eq. 4 and this code do not. Texts of at most S tokens keep their
    positions.

    Attributes:
        shift: S in tokens; in the paper a third of the text's length.
        local_window: W in tokens, at most S; 128 in the paper. Far tokens are at least W away.
    """

    shift: int
    local_window: int

    def __post_init__(self) -> None:
        check_positive(self, "shift", "local_window")
        if self.local_window > self.shift:
            raise InputError(
                f"local_window ({self.local_window}) must not exceed shift ({self.shift}): far "
                "tokens would be placed farther away than they are"
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
    """DCA without its successive-chunk pass, or with only the intra-chunk pass (figure 4).

    ::

        s = 3, Q = 5, intra       3   .  .  . |0            and inter   3   5  4  3 |0
                                  4   .  .  . |1  0                     4   5  4  3 |1  0
                                  5   .  .  . |2  1  0                  5   5  4  3 |2  1  0

    With the intra- and inter-chunk passes, every earlier chunk, including the previous one, is read
    as DCA reads older chunks. This loses the order of tokens near the edge of a chunk, which the
    successive-chunk pass preserves.

    Source: arXiv 2402.17463, sections 3.1, 3.2 and 4.3.

    Attributes:
        dca: the DCA setting.
        inter: whether to use the inter-chunk pass as well.
    """

    dca: DCAConfig
    inter: bool

    @property
    def max_position(self) -> Number:
        """As DCA's."""
        return self.dca.max_query_position

    def bands(self, index: Int[Array, "B T"], whole: Int[Array, " B"]) -> tuple[Band, ...]:
        """The earlier chunks (if `inter`) and the query's own."""

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
