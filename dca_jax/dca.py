"""Dual Chunk Attention: the paper in one file.

An et al., "Training-Free Long-Context Scaling of Large Language Models", ICML 2024
(arXiv 2402.17463). A text is cut into chunks of `s` tokens. Key positions are counted from the
start of their chunk. A query has one of three positions, depending on how far back the key's chunk
is, so that no relative position exceeds those the model was trained on. With n(i) = i // s:

    key j                       P_k(j) = j mod s
    query i, same chunk         P_q(i) = i mod s                  intra   n(i) - n(j) == 0, j <= i
    query i, previous chunk     P_q(i) = min(i mod s + s, Q)      succ    n(i) - n(j) == 1
    query i, older chunks       P_q(i) = min(2s - 1, Q)           inter   n(i) - n(j) >= 2

    logit(i, j) = tau * <rope(q_i, P_q), rope(k_j, P_k)> / sqrt(head_dim), one softmax over j <= i

Figure 2 of the paper (s = 6, Q = 9, 12 tokens), the matrix P_q(i) - P_k(j):

    i\\j  0  1  2  3  4  5 | 6  7  8  9 10 11
     0   0                |
     1   1  0             |
     2   2  1  0          |                      intra: what plain RoPE has
     3   3  2  1  0       |
     4   4  3  2  1  0    |
     5   5  4  3  2  1  0 |
    ----------------------+------------------
     6   6  5  4  3  2  1 | 0
     7   7  6  5  4  3  2 | 1  0
     8   8  7  6  5  4  3 | 2  1  0              succ: exact up to the local window,
     9   9  8  7  6  5  4 | 3  2  1  0           then clipped at Q
    10   9  8  7  6  5  4 | 4  3  2  1  0
    11   9  8  7  6  5  4 | 5  4  3  2  1  0

The fast implementations in `dca_jax.attention` compute the same as `dense_attention` here.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dca_jax import fields
from dca_jax.dtypes import compute_dtype
from dca_jax.errors import InputError
from dca_jax.fields import LARGEST
from dca_jax.rope import rotate

Phase = Literal["inter", "succ", "intra"]
PHASES: tuple[Phase, ...] = ("inter", "succ", "intra")  # in the order of their keys


@dataclass(frozen=True, kw_only=True)
class DCAConfig:
    """The setting of Dual Chunk Attention: chunk length, largest query position and temperature.

    "Chunk size" means two things: the stride (the paper's text) and the largest query position
    (all released code, and Hugging Face's key). The fields here have unambiguous names instead.

    Attributes:
        chunk_len: s, the stride of the chunks in tokens.
        max_query_position: Q, the largest position of a query; s <= Q, and Q must not exceed the
            trained length, or the model would see relative positions it was not trained on.
        trained_length: c, the trained length of the model in tokens, if known.
        temperature_slope: a in m(L) = max(1, 1 + a ln(L / c)); logits are multiplied by tau = m^2
            for a text of L tokens. 0 (the default, as in the paper's results) means no temperature.
    """

    chunk_len: int
    max_query_position: int
    trained_length: int | None = None
    temperature_slope: float = 0.0

    def __post_init__(self) -> None:
        for name in ("chunk_len", "max_query_position", "trained_length"):
            value = getattr(self, name)
            if value is None and name == "trained_length":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
                raise InputError(
                    f"{name} must be a positive integer (tokens) of at most {LARGEST}, got "
                    f"{fields.shown(value)}"
                )
        if self.chunk_len > self.max_query_position:
            raise InputError(
                f"chunk_len ({self.chunk_len}) must not exceed max_query_position "
                f"({self.max_query_position}): the first tokens of a chunk would be too close to "
                "the chunk before"
            )
        if self.trained_length is not None and self.max_query_position > self.trained_length:
            raise InputError(
                f"max_query_position ({self.max_query_position}) exceeds the trained length "
                f"({self.trained_length}): the model would see positions it was not trained on"
            )
        slope = fields.number(
            vars(self), "temperature_slope", "a DCA setting", default=0.0, least=0
        )
        if slope > 0.0 and self.trained_length is None:
            raise InputError(
                "temperature_slope needs trained_length, the length where the temperature starts"
            )

    @property
    def local_window(self) -> int:
        """w: every pair of tokens at most this far apart keeps its true distance (w = c - s)."""
        return self.inter_position - self.chunk_len + 1

    @property
    def identity_range(self) -> int:
        """Number of tokens up to which the result equals plain RoPE attention."""
        return self.inter_position + 1

    @property
    def inter_position(self) -> int:
        """min(2s - 1, Q): the position of a query relative to keys of older chunks (eq. 5)."""
        return min(2 * self.chunk_len - 1, self.max_query_position)

    @classmethod
    def paper(cls, trained_length: int, *, temperature_slope: float = 0.0) -> "DCAConfig":
        """Section 3 and 4.1: s = 3c/4, Q = c - 1."""
        return preset_dca("paper", trained_length, temperature_slope=temperature_slope)

    @classmethod
    def chunkllama(cls, trained_length: int, *, temperature_slope: float = 0.0) -> "DCAConfig":
        """ChunkLlama's default: chunk_size 3c/4, local window c/8; s = 5c/8, Q = 3c/4.

        The released code sets `temperature_slope` to 0.05.
        """
        return preset_dca("chunkllama", trained_length, temperature_slope=temperature_slope)

    @classmethod
    def chunkllama_ppl(cls, trained_length: int, *, temperature_slope: float = 0.0) -> "DCAConfig":
        """ChunkLlama's perplexity script (Table 1): local window c/4; s = c/2, Q = 3c/4."""
        return preset_dca("chunkllama_ppl", trained_length, temperature_slope=temperature_slope)

    @classmethod
    def chunkllama_flash_decoding(
        cls, trained_length: int, *, temperature_slope: float = 0.0
    ) -> "DCAConfig":
        """ChunkLlama's flash decoding: local window c/16; s = 11c/16, Q = 3c/4.

        The released code sets `temperature_slope` to 0.1.
        """
        return preset_dca(
            "chunkllama_flash_decoding", trained_length, temperature_slope=temperature_slope
        )

    @classmethod
    def qwen(
        cls, trained_length: int, *, temperature_slope: float = 0.1, own: "DCAConfig | None" = None
    ) -> "DCAConfig":
        """Qwen2.5-1M's setting: a window of c/32 and the temperature 1 + 0.1 ln(L / c).

        Args:
            own: a checkpoint's setting, whose chunk length and largest position are kept if given.
        """
        if own is None:
            return preset_dca("qwen", trained_length, temperature_slope=temperature_slope)
        return replace(own, trained_length=trained_length, temperature_slope=temperature_slope)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DCAConfig":
        """Reads Hugging Face's `dual_chunk_attention_config` (Qwen2.5-1M).

        `chunk_size` there is the largest query position and `local_size` the window, so
        s = chunk_size - local_size. With `original_max_position_embeddings` c, the servers that
        read this key also apply the temperature with a = 0.1, and so does this function (the
        temperature is 1 up to c tokens). The key `trained_length`, which `to_hf` writes, is c
        without a temperature. For the keys of sparse attention, see `SparseConfig`.
        """
        missing = [key for key in ("chunk_size", "local_size") if config.get(key) is None]
        if missing:
            raise InputError(f"dual_chunk_attention_config lacks {', '.join(missing)}")
        where = "dual_chunk_attention_config"
        chunk_size = fields.integer(config, "chunk_size", where) or 1
        local_size = fields.integer(config, "local_size", where, least=0) or 0
        if local_size >= chunk_size:
            raise InputError(
                "dual_chunk_attention_config needs integers 0 <= local_size < chunk_size, got "
                f"local_size {local_size!r} and chunk_size {chunk_size!r}"
            )
        trained = fields.integer(config, "original_max_position_embeddings", where, least=0) or None
        return cls(
            chunk_len=chunk_size - local_size,
            max_query_position=chunk_size,
            trained_length=trained or fields.integer(config, "trained_length", where),
            temperature_slope=0.0 if trained is None else 0.1,
        )

    def to_hf(self) -> dict[str, Any]:
        """The `dual_chunk_attention_config` that `from_hf` reads back.

        Without a temperature the trained length is written under a key specific to this package,
        because other programs apply a temperature if `original_max_position_embeddings` is present.

        Raises:
            InputError: a temperature slope other than 0 and 0.1, which the format cannot express.
        """
        config = {
            "chunk_size": self.max_query_position,
            "local_size": self.max_query_position - self.chunk_len,
        }
        if self.temperature_slope not in (0.0, 0.1):
            raise InputError(
                f"dual_chunk_attention_config only supports the temperature slopes 0 and 0.1, got "
                f"{self.temperature_slope}"
            )
        if self.trained_length is not None:
            slope = self.temperature_slope > 0
            key = "original_max_position_embeddings" if slope else "trained_length"
            config[key] = self.trained_length
        return config


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """The sparse-attention keys of a `dual_chunk_attention_config`, for reading prompts.

    They describe an approximation of dense attention (see `dca_jax.attention.sparse`).

    Attributes:
        enabled: whether the checkpoint enables sparse attention; None if it does not say, in which
            case servers enable it if there is a table (`patterns`).
        threshold: number of tokens up to which a text is still read densely.
        last_q: number of queries from which the pattern of a piece is estimated.
        patterns: the table of each layer's heads, as JSON; None without one.
    """

    enabled: bool | None = None
    threshold: int = 32768
    last_q: int = 64
    patterns: str | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "SparseConfig | None":
        """Reads a `dual_chunk_attention_config`; None if it has no such key."""
        if not any(key.startswith(SPARSE) and value is not None for key, value in config.items()):
            return None
        where, table = "dual_chunk_attention_config", config.get("sparse_attention_config")
        said = config.get("sparse_attention_enabled") is not None
        return cls(
            enabled=fields.boolean(config, "sparse_attention_enabled", where) if said else None,
            threshold=fields.integer(config, "sparse_attention_threshold", where, default=32768),
            last_q=fields.integer(config, "sparse_attention_last_q", where, default=64),
            patterns=None if table is None else json.dumps(table),
        )

    @property
    def wanted(self) -> bool:
        """Whether a server of this checkpoint would use sparse attention."""
        return self.patterns is not None if self.enabled is None else self.enabled

    def to_hf(self) -> dict[str, Any]:
        """The keys of `dual_chunk_attention_config` that `from_hf` reads back."""
        table = None if self.patterns is None else json.loads(self.patterns)
        written = {
            "sparse_attention_enabled": self.enabled,
            "sparse_attention_config": table,
            "sparse_attention_threshold": self.threshold,
            "sparse_attention_last_q": self.last_q,
        }
        return {key: value for key, value in written.items() if value is not None}


SPARSE = "sparse_attention_"  # the prefix of its keys


# --- published settings ------------------------------------------------------------------------


class Preset(NamedTuple):
    """A published setting as functions of the trained length c (tokens).

    Attributes:
        divisor: c must be a multiple of this.
        chunk_len, max_query_position: s and Q.
        temperature_slope: the slope behind its published results.
    """

    divisor: int
    chunk_len: Callable[[int], int]
    max_query_position: Callable[[int], int]
    temperature_slope: float = 0.0


PRESETS: dict[str, Preset] = {
    "paper": Preset(4, lambda c: 3 * c // 4, lambda c: c - 1),
    "chunkllama": Preset(8, lambda c: 5 * c // 8, lambda c: 3 * c // 4),
    "chunkllama_ppl": Preset(4, lambda c: c // 2, lambda c: 3 * c // 4),
    "chunkllama_flash_decoding": Preset(16, lambda c: 11 * c // 16, lambda c: 3 * c // 4),
    # Qwen2.5-1M: 253,952 and 262,144 of 262,144.
    "qwen": Preset(32, lambda c: 31 * c // 32, lambda c: c, 0.1),
}


def preset_dca(
    name: str, trained_length: int, *, temperature_slope: float | None = None
) -> DCAConfig:
    """A published setting, by its name in `PRESETS`, for a trained length in tokens.

    Without `temperature_slope`, the preset's own slope is used.

    Raises:
        InputError: an unknown name, or a trained length that the preset does not support.
    """
    if name not in PRESETS:
        raise InputError(
            f"DCA setting {name!r} is not known; expected auto, none, or one of "
            f"{', '.join(PRESETS)}"
        )
    preset, c = PRESETS[name], trained_length
    if isinstance(c, bool) or not isinstance(c, int):
        raise InputError(f"the trained length must be an integer, got {c!r}")
    if c < preset.divisor or c % preset.divisor:
        raise InputError(
            f"preset {name!r} needs a trained length that is a positive multiple of "
            f"{preset.divisor}, got {c}; or give chunk_len and max_query_position yourself"
        )
    return DCAConfig(
        chunk_len=preset.chunk_len(c),
        max_query_position=preset.max_query_position(c),
        trained_length=c,
        temperature_slope=(
            preset.temperature_slope if temperature_slope is None else temperature_slope
        ),
    )


# --- positions ---------------------------------------------------------------------------------


def key_position(index: Int[Array, "..."], dca: DCAConfig) -> Int[Array, "..."]:
    """P_k(j): the key's index within its chunk (section 3, eq. 2)."""
    return index % dca.chunk_len


def query_position(index: Int[Array, "..."], phase: Phase, dca: DCAConfig) -> Int[Array, "..."]:
    """P_q(i) of query `index` relative to the keys of a phase (eqs. 3, 5 and 7)."""
    s = dca.chunk_len
    if phase == "intra":
        return index % s
    if phase == "succ":
        return jnp.minimum(index % s + s, dca.max_query_position)
    return jnp.full_like(index, dca.inter_position)


def key_range(
    index: Int[Array, "..."], phase: Phase, dca: DCAConfig
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """[start, stop) of the keys that query `index` attends to in a phase; empty if stop <= start.

    The three ranges are adjacent and together cover [0, index + 1), so attention is one softmax
    over them in any order.
    """
    s = dca.chunk_len
    chunk_start = index - index % s
    if phase == "intra":
        return chunk_start, index + 1
    if phase == "succ":
        return jnp.maximum(chunk_start - s, 0), chunk_start
    return index * 0, chunk_start - s


def phases_within(num_keys: int, dca: DCAConfig) -> tuple[Phase, ...]:
    """The phases that occur in a text of `num_keys` tokens: all three beyond two chunks."""
    met = 1 if num_keys <= dca.chunk_len else 2 if num_keys <= 2 * dca.chunk_len else 3
    return PHASES[-met:]


def relative_positions(length: int, dca: DCAConfig) -> Int[np.ndarray, "length length"]:
    """The matrix M of Figure 2: P_q(i) - P_k(j) for j <= i, and -1 above the diagonal; int32."""
    i, j = np.arange(length)[:, None], np.arange(length)[None, :]
    index = jnp.arange(length)
    position = {p: np.asarray(query_position(index, p, dca))[:, None] for p in PHASES}
    behind = i // dca.chunk_len - j // dca.chunk_len
    query = np.select([behind == 0, behind == 1], [position["intra"], position["succ"]])
    query = np.where(behind >= 2, position["inter"], query)
    return np.where(j <= i, query - j % dca.chunk_len, -1).astype(np.int32)


# --- temperature -------------------------------------------------------------------------------


def temperature(lengths: Int[Array, " B"], dca: DCAConfig) -> Float[Array, " B"]:
    """tau = m(L)^2, the factor on the logits of a text of L tokens; float32, 1 if there is none.

    m(L) = max(1, 1 + a ln(L / c)), as in ChunkLlama (a = 0.05) and Qwen2.5-1M (a = 0.1).
    """
    if dca.temperature_slope == 0.0 or dca.trained_length is None:
        return jnp.ones(lengths.shape, jnp.float32)
    ratio = jnp.maximum(lengths, 1).astype(jnp.float32) / dca.trained_length
    return jnp.maximum(1.0 + dca.temperature_slope * jnp.log(ratio), 1.0) ** 2


# --- the oracle --------------------------------------------------------------------------------


def dense_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    dca: DCAConfig,
    inv_freq: Float[Array, "#B half"],
    scale: Float[Array, " B"],
    offset: Int[Array, " B"],
    lengths: Int[Array, " B"],
    key_offset: Int[Array, " B"],
    allowed: Bool[Array, "B K T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """The definition, with the full [T, S] matrix; every fast path is tested against it.

    Computation is in float32, or in float64 for float64 inputs.

    Args:
        query: unrotated queries; query head n attends to kv head n // (N / K).
        key: keys rotated to `key_position`.
        inv_freq: radians per position (`dca_jax.rope.inverse_frequencies`).
        scale: factor on row b's logits: tau / sqrt(H), times the square of YaRN's factor.
        offset: text index of row b's first query.
        lengths: number of tokens of row b's text. Queries at or beyond it are padding; their output
            is zero.
        key_offset: text index of row b's first key. The output of a query without keys is zero.
        allowed: mask of the keys that a query may read, of those it attends to (default: all).

    Returns:
        The output, in the dtype of `query`.
    """
    compute = compute_dtype(query.dtype)
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x.astype(compute), group, axis=2) for x in (key, value))
    i = offset[:, None] + jnp.arange(query.shape[1], dtype=jnp.int32)[None, :]
    j = key_offset[:, None] + jnp.arange(key.shape[1], dtype=jnp.int32)[None, :]
    chunks_back = (i // dca.chunk_len)[:, :, None] - (j // dca.chunk_len)[:, None, :]
    logits = {}
    for phase in PHASES:
        rotated = rotate(query.astype(compute), query_position(i, phase, dca), inv_freq)
        rotated = rotated * scale.astype(compute)[:, None, None, None]
        logits[phase] = jnp.einsum("BTNH,BSNH->BNTS", rotated, key, precision="highest")
    behind = chunks_back[:, None]
    chosen = jnp.where(behind == 1, logits["succ"], logits["inter"])
    chosen = jnp.where(behind == 0, logits["intra"], chosen)
    met = (j[:, None, :] <= i[:, :, None]) & (i < lengths[:, None])[:, :, None]
    met = met[:, None]
    if allowed is not None:
        met = met & jnp.repeat(allowed, group, axis=1)
    any_met = met.any(axis=-1, keepdims=True)
    # A softmax over no keys is 0/0; its output is defined as zero.
    chosen = jnp.where(met, chosen, jnp.where(any_met, -jnp.inf, 0))
    weights = jnp.where(any_met, jax.nn.softmax(chosen, axis=-1), 0)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value, precision="highest").astype(query.dtype)
