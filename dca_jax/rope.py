"""Rotary position embedding: the frequencies of every rope type, and the rotation.

RoPE scaling changes the *frequencies*; DCA changes the *positions* (`dca_jax.dca`). They compose.
The frequencies and the attention factor equal those of `transformers.modeling_rope_utils`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dca_jax import fields
from dca_jax.dtypes import compute_dtype
from dca_jax.errors import InputError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")

# Keys of `rope_scaling` and `rope_parameters`: those common to every type, and those of one type.
KNOWN = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned"}
KNOWN |= {"factor", "original_max_position_embeddings"}
SMALLEST, LARGEST_FACTOR = 1e-30, 1e6  # outside these, float32 cannot represent the frequencies
YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
OWN = {
    "yarn": ("attention_factor", *YARN, "truncate"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """A model's rotary frequencies. The fields are those of Hugging Face's `rope_parameters`.

    Attributes:
        rope_type: one of `ROPE_TYPES`. "linear" is Position Interpolation (arXiv 2306.15595),
            "dynamic" is dynamic NTK, "yarn" is arXiv 2309.00071, "llama3" is Llama 3.1's.
        theta: base of the geometric series of wavelengths (`rope_theta`).
        factor: context extension factor (every type but "default").
        original_max_position_embeddings: trained length in tokens before the extension
            ("dynamic", "yarn", "llama3").
        attention_factor: factor on cos and sin (so logits are multiplied by its square); None means
            the default of the type ("yarn": 0.1 ln(factor) + 1; others: 1).
        beta_fast, beta_slow, mscale, mscale_all_dim, truncate: "yarn" only.
        low_freq_factor, high_freq_factor: "llama3" only.
        finetuned: whether the model was trained further at the extended length ("yarn" only); the
            frequencies are the same.
    """

    rope_type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    finetuned: bool = False

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise InputError(
                f"rope_type {self.rope_type!r} is not supported; expected one of "
                f"{', '.join(ROPE_TYPES)}. Ignoring it would give the model positions that it was "
                "not trained for."
            )
        values, where = vars(self), f"rope ({self.rope_type})"
        fields.number(values, "theta", where, above=1)
        fields.number(values, "factor", where, least=1)
        for name in ("attention_factor", *YARN, "low_freq_factor", "high_freq_factor"):
            fields.number(values, name, where, above=SMALLEST)
        if self.factor > LARGEST_FACTOR:
            raise InputError(
                f"{where}: factor must be at most {LARGEST_FACTOR:g}, got {self.factor}"
            )
        fields.integer(values, "original_max_position_embeddings", where)
        for name in ("truncate", "finetuned"):
            fields.boolean(values, name, where)
        if self.rope_type == "yarn" and self.beta_fast < self.beta_slow:
            raise InputError(
                f"rope_type 'yarn' needs beta_fast >= beta_slow, got {self.beta_fast} and "
                f"{self.beta_slow}"
            )
        if self.rope_type in ("dynamic", "yarn", "llama3"):
            length = self.original_max_position_embeddings
            if length is None or length < 1:
                raise InputError(
                    f"rope_type {self.rope_type!r} needs original_max_position_embeddings (the "
                    f"trained length, a positive number of tokens), got {length}"
                )
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise InputError(
                "rope_type 'llama3' needs low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "RopeConfig":
        """Reads the rope of a Hugging Face `config.json`, in its old or its new form.

        Old: `rope_theta` and `rope_scaling` at top level (the type under "type" or "rope_type").
        New (transformers 5): `rope_parameters`, which includes `rope_theta`.

        Raises:
            InputError: an unknown rope type, a missing key, or rotation of only part of the head.
        """
        # As in transformers, `rope_scaling` replaces `rope_parameters` if both are present.
        scaling = fields.mapping(config, "rope_scaling", "config.json")
        params = dict(scaling or fields.mapping(config, "rope_parameters", "config.json") or {})
        nested = [name for name, value in params.items() if isinstance(value, Mapping)]
        if nested:
            raise InputError(
                f"config.json has rope parameters by type of layer ({', '.join(nested)}): a model "
                "whose layers have different rotary frequencies is not supported"
            )
        rope_type = params.get("rope_type") or params.get("type") or "default"
        if rope_type == "longrope" or rope_type == "su":
            raise InputError(
                f"rope_type {rope_type!r} (two frequency tables, switched by length) is not "
                "supported: a cached key would depend on how long its text becomes. Use a "
                "checkpoint with one of: " + ", ".join(ROPE_TYPES)
            )
        if rope_type not in ROPE_TYPES:
            raise InputError(
                f"rope_type {fields.shown(rope_type)} is not supported; expected one of "
                f"{', '.join(ROPE_TYPES)}"
            )
        unknown = sorted(set(params) - KNOWN - set(OWN.get(rope_type, ())))
        if unknown:
            raise InputError(
                f"rope_type {rope_type!r} has no {', '.join(map(fields.shown, unknown))}: it may "
                "change the frequencies, so it is not ignored; expected "
                f"{', '.join(sorted(KNOWN | set(OWN.get(rope_type, ()))))}"
            )
        partial = params.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise InputError(
                f"partial_rotary_factor {partial} is not supported: the whole head must be rotated"
            )
        where = f"the rope parameters of config.json ({rope_type})"
        theta = fields.number(params, "rope_theta", where, above=1)
        if theta is None:
            theta = fields.number(config, "rope_theta", "config.json", default=10_000.0, above=1)
        kwargs: dict[str, Any] = {"rope_type": rope_type, "theta": theta}
        trained = fields.integer(config, "max_position_embeddings", "config.json")
        original = (
            fields.integer(config, "original_max_position_embeddings", "config.json")
            or fields.integer(params, "original_max_position_embeddings", where)
            or trained
        )
        if rope_type == "dynamic":
            original = trained  # transformers' dynamic NTK uses only max_position_embeddings
        if rope_type in ("dynamic", "yarn", "llama3"):
            kwargs["original_max_position_embeddings"] = original
        finetuned = fields.boolean(params, "finetuned", where)
        if rope_type == "yarn":
            kwargs["finetuned"] = finetuned
        if rope_type != "default":
            factor = fields.number(params, "factor", where, least=1)
            if factor is None and rope_type == "yarn" and trained and original:
                factor = trained / original
            if factor is None:
                raise InputError(f"rope_type {rope_type!r} needs a factor, got none in {params}")
            kwargs["factor"] = factor
        for name in OWN.get(rope_type, ()):
            if params.get(name) is not None:
                read = fields.boolean if name == "truncate" else fields.number
                kwargs[name] = read(params, name, where)
            elif rope_type == "llama3":
                raise InputError(f"rope_type 'llama3' needs {name}, got none in {params}")
        return cls(**kwargs)

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` of a new-form Hugging Face `config.json` (inverse of `from_hf`)."""
        params: dict[str, Any] = {"rope_type": self.rope_type, "rope_theta": self.theta}
        if self.rope_type != "default":
            params["factor"] = self.factor
        if self.rope_type in ("yarn", "llama3"):
            params["original_max_position_embeddings"] = self.original_max_position_embeddings
        if self.rope_type == "llama3":
            params |= {n: getattr(self, n) for n in ("low_freq_factor", "high_freq_factor")}
        if self.rope_type == "yarn":
            params |= {n: getattr(self, n) for n in OWN["yarn"] if getattr(self, n) is not None}
            params |= {"finetuned": True} if self.finetuned else {}
        return params


@dataclass(frozen=True, eq=False)
class Frequencies:
    """Precomputed frequencies, passed to a program so that it works for every RoPE.

    Attributes:
        inv_freq: radians per position, float32.
        scale: the result of `logit_scale`, float32.
    """

    inv_freq: Float[Array, " half"]
    scale: Float[Array, ""]


def logit_scale(rope: RopeConfig | Frequencies, head_dim: int) -> Float[Array, ""]:
    """Factor on the logits, without the temperature: attention_factor^2 / sqrt(head_dim)."""
    if isinstance(rope, Frequencies):
        return rope.scale
    return jnp.float32(attention_factor(rope) ** 2 / math.sqrt(head_dim))


def attention_factor(rope: RopeConfig) -> float:
    """Factor on cos and sin; logits are multiplied by its square (YaRN, section 3.4)."""
    if rope.attention_factor is not None:
        return float(rope.attention_factor)
    if rope.rope_type != "yarn":
        return 1.0

    def mscale(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def inverse_frequencies(
    rope: RopeConfig | Frequencies, head_dim: int, lengths: Int[Array, " B"] | None = None
) -> Float[Array, "1 half"] | Float[Array, "B half"]:
    """Angle per position, in radians, for each of the head's `head_dim / 2` planes; float32.

    Args:
        rope: the model's RoPE.
        head_dim: an even number.
        lengths: number of tokens of each row's text; used only by dynamic NTK, which gives the
            unscaled frequencies without it.

    Returns:
        [B, head_dim / 2] for dynamic NTK with `lengths`, else [1, head_dim / 2].
    """
    if isinstance(rope, Frequencies):
        return rope.inv_freq[None, :]
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    if rope.rope_type == "dynamic" and lengths is not None:
        trained = rope.original_max_position_embeddings or 0  # validated: never None here
        ratio = jnp.maximum(lengths, trained).astype(jnp.float32) / trained
        stretch = (rope.factor * ratio - (rope.factor - 1.0)) ** (head_dim / (head_dim - 2))
        return 1.0 / (rope.theta * stretch)[:, None] ** jnp.asarray(exponent)[None, :]
    # The powers are rounded to float32 once. The rest follows transformers operation by operation,
    # so that the angles also agree at distant positions.
    period = np.power(np.float64(rope.theta), exponent.astype(np.float64)).astype(np.float32)
    frequency = np.float32(1.0) / period
    if rope.rope_type == "linear":
        frequency = frequency / np.float32(rope.factor)
    elif rope.rope_type == "yarn":
        frequency = _yarn(rope, head_dim, period)
    elif rope.rope_type == "llama3":
        frequency = _llama3(rope, frequency)
    return jnp.asarray(frequency, jnp.float32)[None, :]


def _yarn(rope: RopeConfig, head_dim: int, period: np.ndarray) -> np.ndarray:
    """NTK-by-parts: fast planes keep their frequency, slow ones are interpolated (section 3.2)."""
    trained = rope.original_max_position_embeddings or 0

    def plane(
        rotations: float,
    ) -> float:  # the plane with this many rotations over the trained length
        return head_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = plane(rope.beta_fast), plane(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    keep = (1 - ramp).astype(np.float32)
    interpolated = np.float32(1.0) / (np.float32(rope.factor) * period)
    return interpolated * (1 - keep) + np.float32(1.0) / period * keep


def _llama3(rope: RopeConfig, frequency: np.ndarray) -> np.ndarray:
    """Llama 3.1: high frequencies are kept, low ones divided by `factor`, with a ramp between."""
    trained = rope.original_max_position_embeddings or 0
    wavelength = np.float32(2 * math.pi) / frequency
    factor, low, high = (
        np.float32(x) for x in (rope.factor, rope.low_freq_factor, rope.high_freq_factor)
    )
    smooth = (trained / wavelength - low) / (high - low)
    between = (1 - smooth) * frequency / factor + smooth * frequency
    result = np.where(wavelength > trained / low, frequency / factor, between)
    return np.where(wavelength < trained / high, frequency, result)


def rotate(
    x: Float[Array, "B T *heads H"],
    positions: Int[Array, "#B T *#half"],
    inv_freq: Float[Array, "#B half"],
) -> Float[Array, "B T *heads H"]:
    """Rotates every head of `x` to its token's position; angles, cos and sin in float32.

    Plane p is formed by elements p and p + H/2 (the Hugging Face layout). The result has the dtype
    of `x`; the arithmetic is float32, or float64 for float64 `x`. Negative positions rotate back:
    `rotate(rotate(x, p), -p)` is `x`. Each plane may have its own position.

    Source: RoFormer (arXiv 2104.09864) eq. 34; `transformers` `apply_rotary_pos_emb`.
    """
    compute = compute_dtype(x.dtype)
    positions = positions if positions.ndim == 3 else positions[:, :, None]
    angle = positions.astype(jnp.float32) * inv_freq[:, None, :]
    angle = angle.reshape(angle.shape[:2] + (1,) * (x.ndim - 3) + angle.shape[2:])
    cos, sin = jnp.cos(angle).astype(compute), jnp.sin(angle).astype(compute)
    first, second = jnp.split(x.astype(compute), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jax.lax.convert_element_type(rotated, x.dtype)
