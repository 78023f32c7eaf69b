"""Settings of methods that are calibrated per model: the published ones, and parsing of others.

A model is identified by its shape, which a base model and its finetunes share.
"""

from typing import Any, NamedTuple

from dca_jax.config import LlamaConfig
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.inference.rivals import DPE, LaMPE
from dca_jax.lengths import parse_tokens


class _Shape(NamedTuple):
    """The shape that identifies a published model."""

    hidden_size: int
    layers: int
    trained: int
    theta: float

    @classmethod
    def of(cls, config: LlamaConfig, trained: int) -> "_Shape":
        return cls(config.hidden_size, config.num_hidden_layers, trained, config.rope.theta)


LLAMA_2_7B = _Shape(4096, 32, 4096, 1e4)
LLAMA_3_8B = _Shape(4096, 32, 8192, 5e5)
LLAMA_3_1_8B = _Shape(4096, 32, 131072, 5e5)
MISTRAL_7B_2 = _Shape(4096, 32, 32768, 1e6)
QWEN_2_5_7B = _Shape(3584, 28, 32768, 1e6)

# The scale of each eighth of the planes. Source: github.com/LuLuLuyi/DPE, README and config/
# dpe_config.yaml; Llama 3's are the README's and those of its RULER results.
DPE_WINDOW = 1024
DPE_SCALES = {
    LLAMA_3_8B: (4, 4, 2, 16, 32, 32, 16, 128),
    LLAMA_3_1_8B: (2, 32, 32, 2, 2, 2, 2, 1),
    MISTRAL_7B_2: (4, 16, 2, 16, 32, 16, 16, 2),
    QWEN_2_5_7B: (2, 16, 8, 8, 32, 8, 2, 4),
}


# a, b and M of the curve, and the length below which 1,536 positions are used instead. Source:
# github.com/scar-on/LaMPE, `remap_uselen`.
LAMPE_CURVES: dict[_Shape, dict[str, Any]] = {
    LLAMA_2_7B: {
        "slope": 8.673006440952035e-05,
        "shift": -0.648012322406978,
        "most": 2489.1055552214357,
        "short": 8192,
        "short_mapped": 1536,
    },
    LLAMA_3_8B: {
        "slope": 0.00010493097327094324,
        "shift": -2.466638011138158,
        "most": 6204.409324666837,
        "short": 8192,
        "short_mapped": 1536,
    },
    LLAMA_3_1_8B: {
        "slope": 4.505261149632588e-05,
        "shift": -2.788576860718702,
        "most": 82358.52413056031,
    },
}
LAMPE_HEAD, LAMPE_TAIL = 512, 200


def dpe_setting(arguments: str, config: LlamaConfig, trained: int) -> DPE:
    """DPE with the given window and scales, or with those published for a model of this shape.

    Args:
        arguments: "", or W,S1,S2,...: window in tokens, and scales for equal parts of the planes.

    Raises:
        InputError: malformed arguments, scales that do not divide the planes, or no arguments for a
            model without published ones.
    """
    planes = config.head_dim // 2
    window, scales = DPE_WINDOW, DPE_SCALES.get(_Shape.of(config, trained))
    if arguments:
        window, *given = _integers(arguments)
        scales = tuple(given)
    if scales is None:
        raise InputError(
            "dpe's scales are calibrated per model, and none are published for one of this shape "
            f"({config.hidden_size} wide, {config.num_hidden_layers} layers, {trained} trained "
            "tokens); give a window and scales, as in dpe:1024,4,4,2,16,32,32,16,128 (for each "
            "eighth of a head's planes, from the fastest to the slowest), or use self-extend"
        )
    if not scales or planes % len(scales):
        raise InputError(
            f"dpe's {len(scales)} scales do not divide a head's {planes} planes into equal parts; "
            "expected dpe:W,S1,S2,... with as many scales as divide them"
        )
    each = planes // len(scales)
    return DPE(window=window, scales=tuple(scale for scale in scales for _ in range(each)))


def lampe_setting(arguments: str, config: LlamaConfig, trained: int) -> LaMPE:
    """LaMPE with the given curve, the one published for this shape, or a scaled one.

    Other models use Llama 3's curve and head, scaled by their trained length. This is our own
    choice, because no rule is published.

    Args:
        arguments: "", or A,B,M,S1,S2: the curve's numbers, and the tokens of head and tail.

    Raises:
        InputError: malformed arguments.
    """
    if arguments:
        parts = arguments.split(",")
        try:
            slope, shift, most = (float(part) for part in parts[:3])
            head, tail = (parse_tokens(part.strip()) for part in parts[3:])
        except (ValueError, InputError):
            raise InputError(
                f"method argument {shown(arguments)} is not 'lampe:A,B,M,S1,S2': three numbers and "
                "two lengths, as in lampe:1.05e-4,-2.47,6204,512,200"
            ) from None
        return LaMPE(slope=slope, shift=shift, most=most, head=head, tail=tail)
    curve = LAMPE_CURVES.get(_Shape.of(config, trained))
    if curve is not None:
        return LaMPE(**curve, head=LAMPE_HEAD, tail=LAMPE_TAIL)
    like, ratio = LAMPE_CURVES[LLAMA_3_8B], trained / LLAMA_3_8B.trained
    return LaMPE(
        slope=like["slope"] / ratio,
        shift=like["shift"],
        most=like["most"] * ratio,
        head=max(int(LAMPE_HEAD * ratio), 1),
        tail=max(int(LAMPE_TAIL * ratio), 1),
        short=int(like["short"] * ratio),
        short_mapped=int(like["short_mapped"] * ratio),
    )


def _integers(arguments: str) -> list[int]:
    try:
        return [parse_tokens(part.strip()) for part in arguments.split(",")]
    except InputError:
        raise InputError(
            f"method argument {shown(arguments)} is not 'dpe:W,S1,S2,...', a window in tokens and "
            "scales"
        ) from None
