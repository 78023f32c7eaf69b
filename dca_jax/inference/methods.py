"""Methods for long texts by name, as accepted by `--method`.

`auto` and `dca` use the checkpoint's own DCA setting, or else the paper's for its trained length;
`dca:paper` and others name a setting, and `dca:paper@0.1` adds a temperature with that slope
(`DCAConfig.temperature_slope`). `none` and `rope` are plain attention. Some methods change the
rotary frequencies (pi, ntk, yarn: `dca_jax.rope`), others the positions
(`dca_jax.attention.bands`): DCA, and those of `dca_jax.inference.baselines`. All are training-free
and use the same weights (`with_method`).

A name is `METHOD` or `METHOD:ARGUMENTS` (such as `rerope:1024` or `dca:192k,256k`), and may end in
`+pi:F`, `+ntk:F` or `+yarn:F`, which first scale the frequencies for a window of F times the
trained one: `dca+ntk:2` is DCA on a model whose window is doubled with NTK. (A model that was
*trained* with PI or NTK has this in its config and needs no such suffix: `dca` uses the model's own
RoPE.)
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from dca_jax.attention.bands import PositionMethod
from dca_jax.config import LlamaConfig
from dca_jax.dca import PRESETS, DCAConfig, preset_dca
from dca_jax.errors import InputError
from dca_jax.fields import LARGEST, shown
from dca_jax.inference.baselines import (
    DCAAblation,
    LMInfinite,
    ReRoPE,
    SelfExtend,
    ShiftedRoPE,
    StreamingLLM,
)
from dca_jax.inference.calibrations import dpe_setting, lampe_setting
from dca_jax.inference.distances import LONGEST
from dca_jax.inference.llm import LLM
from dca_jax.inference.rivals import AdaGroPE, JetLong
from dca_jax.lengths import parse_tokens
from dca_jax.model import Llama
from dca_jax.rope import RopeConfig, attention_factor

# --- frequencies -------------------------------------------------------------------------------


def scaled_rope(
    kind: str, rope: RopeConfig, *, factor: int, trained_length: int, head_dim: int
) -> RopeConfig:
    """A RoPE for `factor` times the window with one of the scalings.

    pi: positions divided by the factor (arXiv 2306.15595, eq. 3). ntk: theta times
    factor^(d / (d - 2)), so that the slowest plane rotates as slowly as with pi and the fastest is
    unchanged (LocalLLaMA, "NTK-Aware Scaled RoPE", 2023). yarn: NTK by parts, and a temperature
    (arXiv 2309.00071). A factor of 1 changes nothing.

    Raises:
        InputError: a RoPE with another scaling, which this one cannot be combined with.
    """
    if factor == 1:
        return rope
    over = {"pi": ("default", "linear"), "ntk": ("default", "linear", "llama3")}
    if rope.rope_type not in over.get(kind, ("default",)):
        raise InputError(
            f"{kind} cannot be combined with this model's RoPE of type {rope.rope_type!r}, only "
            f"with {' and '.join(over.get(kind, ('default',)))}. Methods that change positions "
            "(dca, rerope, self-extend, ...) work with any"
        )
    if kind == "pi":
        return replace(rope, rope_type="linear", factor=rope.factor * factor)
    if kind == "ntk" and head_dim == 2:
        raise InputError(
            "ntk scales the planes of a head differently, but a head_dim of 2 has only one"
        )
    if kind == "ntk":
        return replace(rope, theta=rope.theta * factor ** (head_dim / (head_dim - 2)))
    return replace(
        rope,
        rope_type="yarn",
        factor=float(factor),
        original_max_position_embeddings=trained_length,
    )


# STRING's code multiplies cos and sin by this, against the smoothing of the logits. LaMPE's code,
# which is based on it, does the same.
STRING_FACTOR = 0.1 * math.log(2) + 1

# --- names -------------------------------------------------------------------------------------


class Method(NamedTuple):
    """The RoPE and DCA of a method: `Llama(replace(config, rope=rope), dca=dca)`."""

    dca: DCAConfig | PositionMethod | None
    rope: RopeConfig


class _Wanted(NamedTuple):
    """The model and lengths for which a name is resolved."""

    config: LlamaConfig
    rope: RopeConfig
    trained: int  # tokens of the window, after scaling
    length: int  # tokens to be read
    arguments: str

    def integers(self, usage: str, *defaults: int) -> tuple[int, ...]:
        """The comma-separated arguments as integers, or `defaults` if there are none."""
        if not self.arguments:
            return defaults
        parts = self.arguments.split(",")
        try:
            if len(parts) == len(defaults):
                return tuple(parse_tokens(part.strip()) for part in parts)
        except InputError:
            pass
        raise InputError(
            f"method argument {shown(self.arguments)} is not {usage!r}, in tokens of at most "
            f"{LARGEST}"
        )


def _plain(wanted: _Wanted) -> Method:
    _refuse_arguments(wanted)
    return Method(None, wanted.rope)


def _auto(wanted: _Wanted) -> Method:
    _refuse_arguments(wanted)
    return Method(_dca_setting(wanted), wanted.rope)


def _scaled(kind: str) -> Callable[[_Wanted], Method]:
    def build(wanted: _Wanted) -> Method:
        _refuse_arguments(wanted)
        rope = scaled_rope(
            kind,
            wanted.rope,
            factor=max(-(-wanted.length // wanted.trained), 1),
            trained_length=wanted.trained,
            head_dim=wanted.config.head_dim,
        )
        return Method(None, rope)

    return build


def _rerope(wanted: _Wanted) -> Method:
    (window,) = wanted.integers("rerope:W", max(wanted.trained // 8, 1))
    return Method(ReRoPE(window=window, trained_length=wanted.trained), wanted.rope)


def _self_extend(wanted: _Wanted) -> Method:
    c, length = wanted.trained, wanted.length
    window = max(c // 4, 1)
    group = 1
    if length > c:  # the smallest group with w + (L - w) / G below 2c/3
        group = (length - window) // max(2 * c // 3 - window, 1) + 1
    group, window = wanted.integers("self-extend:G,W", group, window)
    return Method(SelfExtend(group=group, window=window), wanted.rope)


def _streaming_llm(wanted: _Wanted) -> Method:
    sinks, recent = wanted.integers("streaming-llm:SINKS,RECENT", 4, wanted.trained - 4)
    return Method(StreamingLLM(sinks=sinks, recent=recent), wanted.rope)


def _lm_infinite(wanted: _Wanted) -> Method:
    (sinks,) = wanted.integers("lm-infinite:SINKS", 10)
    return Method(LMInfinite(sinks=sinks, window=wanted.trained), wanted.rope)


def _string(wanted: _Wanted) -> Method:
    third = max(int(0.33 * wanted.length), 1)
    shift, window = wanted.integers("string:S,W", third, min(128, third))
    rope = replace(wanted.rope, attention_factor=attention_factor(wanted.rope) * STRING_FACTOR)
    return Method(ShiftedRoPE(shift=shift, local_window=window), rope)


def _jet_long(wanted: _Wanted) -> Method:
    c = wanted.trained
    (window,) = wanted.integers("jet-long:W0", max(c // 16, 1))  # 2,048 of 32,768
    return Method(JetLong(trained_length=c, window=window), wanted.rope)


def _adagrope(wanted: _Wanted) -> Method:
    (positions,) = wanted.integers("adagrope:P", wanted.trained)
    return Method(AdaGroPE(positions=positions), wanted.rope)


def _lampe(wanted: _Wanted) -> Method:
    if wanted.length > LONGEST:
        raise InputError(f"lampe reads texts of at most {LONGEST} tokens, got {wanted.length}")
    factor = attention_factor(wanted.rope) * STRING_FACTOR
    rope = replace(wanted.rope, attention_factor=factor)
    return Method(lampe_setting(wanted.arguments, wanted.config, wanted.trained), rope)


def _dpe(wanted: _Wanted) -> Method:
    return Method(dpe_setting(wanted.arguments, wanted.config, wanted.trained), wanted.rope)


def _dca(wanted: _Wanted) -> Method:
    return Method(_dca_setting(wanted), wanted.rope)


def _ablation(inter: bool) -> Callable[[_Wanted], Method]:
    def build(wanted: _Wanted) -> Method:
        return Method(DCAAblation(dca=_dca_setting(wanted), inter=inter), wanted.rope)

    return build


def _dca_setting(wanted: _Wanted) -> DCAConfig:
    setting, at, slope = wanted.arguments.partition("@")
    found = _setting_without_temperature(wanted._replace(arguments=setting))
    if not at:
        return found
    try:
        number = float(slope)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise InputError(
            f"method argument {shown(wanted.arguments)}: after @, expected the slope of the "
            "temperature, a number of at least 0, as in dca:paper@0.1"
        )
    return replace(found, trained_length=wanted.trained, temperature_slope=number)


def _setting_without_temperature(wanted: _Wanted) -> DCAConfig:
    if "," in wanted.arguments:
        chunk_len, largest = wanted.integers("dca:S,Q", 0, 0)
        return DCAConfig(chunk_len=chunk_len, max_query_position=largest)
    setting = wanted.arguments or "auto"
    if setting not in (*PRESETS, "auto"):
        raise InputError(
            f"DCA setting {shown(setting)} is not known; expected one of {', '.join(PRESETS)}, "
            "auto (the checkpoint's own), or S,Q (chunk length and largest query position, in "
            "tokens)"
        )
    # The checkpoint's own setting is only for the window it was trained on.
    own = wanted.config.dca if wanted.trained == wanted.config.trained_length else None
    if setting == "qwen":
        return DCAConfig.qwen(wanted.trained, own=own)
    if setting == "auto" and own is not None:
        return own
    return preset_dca("paper" if setting == "auto" else setting, wanted.trained)


def _refuse_arguments(wanted: _Wanted) -> None:
    if wanted.arguments:
        raise InputError(
            f"this method takes no arguments, got {wanted.arguments!r}; a factor is given as "
            "rope+pi:4"
        )


_METHODS: dict[str, tuple[str, Callable[[_Wanted], Method]]] = {
    "auto": ("the same as dca", _auto),
    "none": ("plain attention, same as rope", _plain),
    "rope": ("the model's own RoPE, all keys at their true distance", _plain),
    "pi": ("Position Interpolation by ceil(L / c), for L tokens read and c trained", _scaled("pi")),
    "ntk": ("NTK-aware RoPE, theta scaled for ceil(L / c)", _scaled("ntk")),
    "yarn": ("YaRN (NTK by parts, and a temperature) by ceil(L / c)", _scaled("yarn")),
    "rerope": ("[:W] relative positions stop growing at W (default c/8)", _rerope),
    "self-extend": (
        "[:G,W] beyond W tokens, positions in groups of G (defaults by L, c/4)",
        _self_extend,
    ),
    "streaming-llm": ("[:N,R] the first N tokens and the last R only (4, c - 4)", _streaming_llm),
    "lm-infinite": ("[:N] the first N tokens (10) and the last c only", _lm_infinite),
    "string": ("[:S,W] beyond S tokens (0.33 L), positions shifted to begin at W (128)", _string),
    "jet-long": ("[:W0] beyond W0 tokens (c/16), positions in groups of ceil(L / c)", _jet_long),
    "adagrope": ("[:P] P positions (c), shared by more tokens at larger distances", _adagrope),
    "lampe": ("[:A,B,M,S1,S2] M/(1+exp(-AL-B)) positions, true at both ends", _lampe),
    "dpe": ("[:W,S1,...] Self-Extend, with a group size for each part of a head's planes", _dpe),
    "dca": ("[:SETTING] Dual Chunk Attention (the checkpoint's own setting, else paper)", _dca),
    "dca-intra": ("[:SETTING] ablation: DCA's own chunk only", _ablation(inter=False)),
    "dca-intra-inter": ("[:SETTING] ablation: DCA without the successive pass", _ablation(True)),
}
_SCALINGS = ("pi", "ntk", "yarn")
METHODS = tuple(_METHODS)


def method_by_name(
    name: str, config: LlamaConfig, context_length: int, *, trained_length: int | None = None
) -> Method:
    """Resolves a method's name for a model.

    Args:
        name: see the module docstring; `METHODS` and `describe_methods` list the names.
        config: the model's own config, with the RoPE it was trained with.
        context_length: L, number of tokens to be read; pi, ntk, yarn, self-extend and string depend
            on it.
        trained_length: c, in tokens (default: the config's).

    Returns:
        The `dca` argument for `Llama`, and the RoPE to use instead of the config's.

    Raises:
        InputError: an unknown name (the known ones are listed), arguments that do not fit, or a
            scaling that does not work with the model's RoPE.
    """
    trained = config.trained_length if trained_length is None else trained_length
    if trained < 1 or context_length < 1:
        raise InputError(
            f"lengths must be positive (tokens), got {context_length} to read and {trained} trained"
        )
    base, plus, scaling = name.partition("+")
    rope = config.rope
    if plus:
        kind, _, digits = scaling.partition(":")
        is_number = digits.isascii() and digits.isdecimal() and len(digits) < 20
        factor = int(digits) if is_number else 0
        if kind not in _SCALINGS or factor < 1:
            raise InputError(
                f"method {shown(name)} ends in {shown('+' + scaling)}; expected +pi:F, +ntk:F or "
                "+yarn:F with a whole number F, as in dca+ntk:2"
            )
        if trained * factor > LARGEST:
            raise InputError(
                f"method {shown(name)} gives a window of {trained * factor} tokens; a text has at "
                f"most {LARGEST}"
            )
        rope = scaled_rope(
            kind, rope, factor=factor, trained_length=trained, head_dim=config.head_dim
        )
        trained *= factor
    key, _, arguments = base.partition(":")
    if key not in _METHODS:
        raise InputError(f"method {shown(key)} is not known; expected one of\n{describe_methods()}")
    _, build = _METHODS[key]
    return build(_Wanted(config, rope, trained, context_length, arguments))


def describe_methods() -> str:
    """The methods, one per line, with name, arguments and description; for errors and help."""
    width = max(map(len, _METHODS))
    lines = [f"  {name:<{width}}  {summary}" for name, (summary, _) in _METHODS.items()]
    return "\n".join(
        [
            *lines,
            "c is the trained length, L the length to be read. SETTING is one of",
            f"{', '.join(PRESETS)}, auto, or S,Q.",
            "It may end in @A: a temperature with slope A.",
            "Any name may end in +pi:F, +ntk:F or +yarn:F: first scale the window to F c tokens.",
        ]
    )


def with_method(
    model: Llama, name: str, context_length: int, *, trained_length: int | None = None
) -> Llama:
    """The same weights with another method; nothing is copied.

    Arguments and errors are those of `method_by_name`; `model` must have its own RoPE, as loaded.
    """
    dca, rope = method_by_name(name, model.config, context_length, trained_length=trained_length)
    sparse = model.sparse
    if sparse is not None:  # what a checkpoint asks for goes with its DCA
        plain = dca is None and sparse.by_checkpoint
        sparse = None if plain else sparse.for_method(dca)
    return Llama.from_params(
        replace(model.config, rope=rope),
        model.params(),
        dca=dca,
        dtype=model.dtype,
        remat=model.remat,
        implementation=model.implementation,
        sparse=sparse,
        lora=model.lora,
    )


def reading(llm: LLM, name: str, length: int) -> LLM:
    """The same model with a method for texts of up to `length` tokens; nothing is copied.

    For methods that depend on the length, it is rounded up to whole trained lengths. So few
    settings are compiled, and texts of similar length are read with the same setting.

    Args:
        llm: a model loaded with `dca=None`, with its own RoPE. Errors are those of
            `method_by_name`.
    """
    length = whole_length(llm.model.config, length)
    return replace(llm, model=with_method(llm.model, name, length))


def whole_length(config: LlamaConfig, length: int) -> int:
    """A length in tokens, rounded up to whole trained lengths."""
    trained = config.trained_length
    return -(-length // trained) * trained
