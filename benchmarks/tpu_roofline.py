"""Lower bounds of DCA's time on each TPU, from arithmetic, bytes moved and published peaks.

    python benchmarks/tpu_roofline.py

Nothing is measured here. A time is the larger of two: all arithmetic at the chip's bfloat16 peak,
and all bytes at its memory bandwidth. The bytes are those that our kernels' blocks move. Prints the
tables of docs/lab/tpu.md. Figures are per whole chip; JAX counts a v7x as two devices.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from dca_jax.attention.mosaic_tpu.heads import Heads
from dca_jax.attention.mosaic_tpu.tiles import choose_tiles
from dca_jax.config import LlamaConfig
from dca_jax.dca import DCAConfig
from dca_jax.device import Device
from dca_jax.planning.shapes import SHAPES
from dca_jax.weights.parameters import parameters

LENGTHS = {"32k": 2**15, "128k": 2**17, "1M": 2**20}
MODELS = ("llama-2-7b", "llama-3-70b")
ITEM = 2  # bytes of a bfloat16
DCA = DCAConfig.paper(4096)


class Chip(NamedTuple):
    """A chip's peaks as Google publishes them (cloud.google.com/tpu/docs, November 2026)."""

    name: str
    kind: str  # name of its device in JAX
    flops: float  # per second, bfloat16
    bandwidth: float  # bytes per second
    memory: float  # bytes

    @property
    def ridge(self) -> float:
        """Operations per byte at which arithmetic and memory take the same time."""
        return self.flops / self.bandwidth


CHIPS = (
    Chip("v4", "TPU v4", 275e12, 1200e9, 32 * 2**30),
    Chip("v5e", "TPU v5 lite", 197e12, 819e9, 16e9),
    Chip("v5p", "TPU v5", 459e12, 2765e9, 95 * 2**30),
    Chip("v6e", "TPU v6 lite", 918e12, 1638e9, 32e9),
    Chip("v7x", "TPU7x", 2307e12, 7380e9, 192 * 2**30),
)


class Work(NamedTuple):
    """Operations (multiplication and addition count as two) and bytes moved from and to HBM."""

    flops: float
    moved: float

    def seconds(self, chip: Chip) -> float:
        """The lower bound of the time on one chip."""
        return max(self.flops / chip.flops, self.moved / chip.bandwidth)


def attention_prefill(length: int, heads: Heads, block_q: int) -> Work:
    """One layer's attention over a whole text, in blocks of `block_q` queries.

    Each block reads the keys and values before it, its queries, and cos and sin of three phases.
    """
    pairs = length * (length + 1) / 2
    blocks = math.ceil(length / block_q)
    keys = sum(min((block + 1) * block_q, length) for block in range(blocks))  # of one head
    token = heads.head_dim * ITEM
    cos_sin = 3 * 4 * heads.head_dim
    moved = heads.query * (2 * keys * token + length * (2 * token + cos_sin))
    return Work(4 * pairs * heads.query * heads.head_dim, moved)


def attention_decode(length: int, heads: Heads) -> Work:
    """One layer's attention of one new token: every key and value once, for all query heads."""
    return Work(
        4 * length * heads.query * heads.head_dim, 2 * length * heads.kv * heads.head_dim * ITEM
    )


def weights(config: LlamaConfig) -> int:
    """Parameters that every token is multiplied with: all but the table of embeddings."""
    every = sum(math.prod(row.shape(config)) for row in parameters(config))
    return every - config.vocab_size * config.hidden_size


def heads_of(config: LlamaConfig) -> Heads:
    """Attention with all of the model's heads on one device."""
    return Heads(
        query=config.num_attention_heads, kv=config.num_key_value_heads, head_dim=config.head_dim
    )


def model_prefill(length: int, config: LlamaConfig, block_q: int) -> Work:
    """A whole prompt; weights are read once, and activations between layers are not counted."""
    layer = attention_prefill(length, heads_of(config), block_q)
    flops = 2 * weights(config) * length + config.num_hidden_layers * layer.flops
    return Work(flops, weights(config) * ITEM + config.num_hidden_layers * layer.moved)


def model_decode(length: int, config: LlamaConfig) -> Work:
    """One token of one text."""
    layer = attention_decode(length, heads_of(config))
    flops = 2 * weights(config) + config.num_hidden_layers * layer.flops
    return Work(flops, weights(config) * ITEM + config.num_hidden_layers * layer.moved)


def cache_bytes(length: int, config: LlamaConfig) -> int:
    """Keys and values of one text, in all layers."""
    layer = 2 * length * config.num_key_value_heads * config.head_dim * ITEM
    return config.num_hidden_layers * layer


# --- tables ------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spelled(seconds: float) -> str:
    """Three digits with a suitable unit."""
    units = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))
    unit, size = next((row for row in units if seconds >= row[1]), units[-1])
    return f"{seconds / size:.3g} {unit}"


def block_q_of(chip: Chip, heads: Heads) -> int:
    """The block_q of our forward kernel on the chip."""
    return choose_tiles(Device("tpu", chip.kind, None), heads, DCA, ITEM).forward[0]


def peaks() -> str:
    """The chips, and the smallest block of queries that is not limited by memory.

    A block of q queries and a key of H elements: 4 q H operations for 4 H bytes of key and value.
    """
    heads = Heads(query=32, kv=8, head_dim=128)
    rows = [
        [
            chip.name,
            f"{chip.flops / 1e12:.0f}",
            f"{chip.bandwidth / 1e9:.0f}",
            f"{chip.memory / 1e9:.0f}",
            f"{chip.ridge:.0f}",
            str(block_q_of(chip, heads)),
        ]
        for chip in CHIPS
    ]
    columns = ["chip", "TFLOP/s, bf16", "GB/s", "HBM, GB"]
    return table([*columns, "FLOP per byte, or block_q needed", "our block_q"], rows)


def attention() -> str:
    """One layer, 32 query heads and 8 kv heads of 128, one text."""
    heads = Heads(query=32, kv=8, head_dim=128)
    rows = []
    for name, length in LENGTHS.items():
        prefill = {
            chip: attention_prefill(length, heads, block_q_of(chip, heads)) for chip in CHIPS
        }
        decode = dict.fromkeys(CHIPS, attention_decode(length, heads))
        for kind, works in (("prefill", prefill), ("decode", decode)):
            (work,) = set(works.values())  # block_q is the same on all chips
            numbers = [f"{work.flops:.2e}", f"{work.moved:.2e}", f"{work.flops / work.moved:.0f}"]
            times = [spelled(work.seconds(chip)) for chip, work in works.items()]
            rows.append([f"{kind}, {name}", *numbers, *times])
    columns = ["one layer", "FLOP", "bytes", "FLOP per byte"]
    return table([*columns, *(chip.name for chip in CHIPS)], rows)


def models() -> str:
    """Whole models on the fewest chips (a power of two) that hold weights and one text's cache."""
    rows = []
    for model in MODELS:
        config = SHAPES[model]
        for name, length in LENGTHS.items():
            held = (weights(config) + config.vocab_size * config.hidden_size) * ITEM
            held += cache_bytes(length, config)
            cells = []
            for chip in CHIPS:
                # A tenth is left for programs and activations.
                chips = 2 ** max(math.ceil(math.log2(held / (0.9 * chip.memory))), 0)
                block_q = block_q_of(chip, heads_of(config))
                prefill = model_prefill(length, config, block_q).seconds(chip) / chips
                decode = model_decode(length, config).seconds(chip) / chips
                cells.append(f"{chips}: {spelled(prefill)}, {spelled(decode)}")
            rows.append([f"{model}, {name}", f"{held / 1e9:.0f}", *cells])
    return table(["model, text", "GB in memory", *(chip.name for chip in CHIPS)], rows)


def main() -> None:
    """Prints the tables of docs/lab/tpu.md."""
    print("\n\n".join([peaks(), attention(), models()]))


if __name__ == "__main__":
    main()
