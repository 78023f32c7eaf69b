"""Every position method at the size of a few tiles, for the tests of the kernels' bands."""

from dca_jax.attention.bands import PositionMethod
from dca_jax.dca import DCAConfig
from dca_jax.inference.baselines import (
    DCAAblation,
    LMInfinite,
    ReRoPE,
    SelfExtend,
    ShiftedRoPE,
    StreamingLLM,
)
from dca_jax.inference.rivals import DPE, AdaGroPE, JetLong, LaMPE

NAMES = (
    *("rerope", "self-extend", "streaming-llm", "lm-infinite", "string", "dca-intra"),
    *("dca-intra-inter", "jet-long", "adagrope", "lampe", "dpe"),
)


def method_for(name: str, head_dim: int) -> PositionMethod:
    """A method whose windows cut blocks, and whose groups divide nothing."""
    chunks = DCAConfig(chunk_len=200, max_query_position=250)
    planes = tuple(1 + 7 * plane // (head_dim // 2) for plane in range(head_dim // 2))
    return {
        "rerope": ReRoPE(window=150, trained_length=300),
        "self-extend": SelfExtend(group=5, window=133),
        "streaming-llm": StreamingLLM(sinks=4, recent=290),
        "lm-infinite": LMInfinite(sinks=10, window=141),
        "string": ShiftedRoPE(shift=210, local_window=30),
        "dca-intra": DCAAblation(dca=chunks, inter=False),
        "dca-intra-inter": DCAAblation(dca=chunks, inter=True),
        "jet-long": JetLong(trained_length=256, window=70),
        "adagrope": AdaGroPE(positions=160),
        "lampe": LaMPE(slope=0.004, shift=-2.0, most=400.0, head=60, tail=20),
        "dpe": DPE(window=100, scales=planes),
    }[name]
