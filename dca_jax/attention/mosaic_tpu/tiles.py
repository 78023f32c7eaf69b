"""How much goes through a kernel at once, by chip and heads; and what VMEM that takes."""

import dataclasses
import math
from collections.abc import Callable

from dca_jax.attention.device import Device
from dca_jax.attention.mosaic_tpu.heads import LANES, Heads
from dca_jax.dca import DCAConfig

MIB = 2**20
DECODE_ROWS = 256  # up to so many queries, counting all heads, are decoded
SMEM = 640 * 1024  # of a core's 1 MiB of scalar memory, what the words of a walk may take


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A core's VMEM, the cores that act as one device, and what to put through a kernel.

    Blocks are of queries and keys, for one head of 128 in 16 bits. The compiler's schedules of an
    unmasked block are what they were chosen by (docs/tpu.md): smaller ones cost more a logit.
    """

    vmem: int
    cores: int = 1
    forward: tuple[int, int] = (1024, 1024)
    dq: tuple[int, int] = (1024, 1024)
    dkv: tuple[int, int] = (1024, 1024)
    decode: int = 2 * MIB  # bytes of a block of keys


V4 = Chip(vmem=16 * MIB, cores=2, dq=(512, 1024), dkv=(512, 1024), decode=MIB)
V5E = Chip(vmem=128 * MIB)
V5P = Chip(vmem=64 * MIB, cores=2)
V6E = Chip(vmem=128 * MIB)
V7X = Chip(vmem=64 * MIB)
# By the name that JAX gives them.
CHIPS = {
    "TPU v4": V4,
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "TPU7x": V7X,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Queries and keys of a block in each kernel; in decoding, keys, and the parts of a row."""

    forward: tuple[int, int]
    dq: tuple[int, int]
    dkv: tuple[int, int]
    decode: int
    parts: int


def choose_tiles(device: Device, heads: Heads, dca: DCAConfig, itemsize: int) -> Tiles:
    """The tiles for a chip, for heads of a number and width, and for a chunk length.

    Blocks of keys divide the chunk where some of about the right size do: a block that lies across
    two chunks is met twice near the diagonal. Tiles of queries may lie across chunks for nothing.
    """
    chip = CHIPS[device.kind]
    shrink = max(heads.head_dim * itemsize // 256, 1) * heads.together

    def tile(
        size: tuple[int, int], vmem: Callable[[tuple[int, int], Heads, int], int]
    ) -> tuple[int, int]:
        queries, keys = max(size[0] // shrink, LANES), size[1]
        while queries > LANES and queries > 8 * dca.chunk_len:  # many chunks are many stages
            queries //= 2
        while True:
            chosen = queries, follow(dca.chunk_len, keys)
            if vmem(chosen, heads, itemsize) <= chip.vmem * 7 // 8 or keys <= LANES:
                return chosen
            queries, keys = (queries // 2, keys) if queries > 2 * LANES else (queries, keys // 2)

    token = heads.kv * heads.head_dim * itemsize
    return Tiles(
        forward=tile(chip.forward, forward_vmem),
        dq=tile(chip.dq, dq_vmem),
        dkv=tile(chip.dkv, dkv_vmem),
        decode=follow(dca.chunk_len, max(chip.decode // token // LANES, 1) * LANES),
        parts=chip.cores,
    )


def vmem_limit(device: Device, need: int) -> int:
    """The VMEM that the compiler may give a kernel which needs about `need` bytes."""
    return min(3 * need // 2, CHIPS[device.kind].vmem)


def follow(chunk_len: int, keys: int) -> int:
    """About `keys` keys, which divide a chunk: in whole lanes, or else in whole sublanes."""
    for whole in (LANES, 16):
        fits = range(whole * math.ceil(0.7 * keys / whole), keys * 3 // 2 + 1, whole)
        dividing = [size for size in fits if chunk_len % size == 0]
        if dividing:
            return min(dividing, key=lambda size: abs(size - keys))
    while keys > LANES and keys > 8 * chunk_len:
        keys //= 2
    return keys


def forward_vmem(tile: tuple[int, int], heads: Heads, itemsize: int) -> int:
    """Bytes of VMEM that the forward kernel needs, from above.

    What is moved lies twice, so that one block is fetched while the other is used. How often the
    compiler keeps a block's logits was read off its own figures, and tests/tpu_aot compares them.
    """
    block = _Block(tile, heads, itemsize)
    moved = 2 * block.queries + 2 * block.keys + block.turns + block.scalars
    kept = block.placed + block.wide_placed + 2 * block.scalars
    return 2 * moved + kept + block.parts(4) + block.logits(1.25, wide=1.75)


def dq_vmem(tile: tuple[int, int], heads: Heads, itemsize: int) -> int:
    """Bytes of VMEM that the kernel of the query's gradient needs, from above."""
    block = _Block(tile, heads, itemsize)
    moved = 3 * block.queries + 2 * block.keys + block.turns + 2 * block.scalars
    kept = 2 * block.placed + 2 * block.wide_placed
    copies = 1.75 if heads.together == 1 else 1.5
    return 2 * moved + kept + block.parts(4) + block.logits(copies, wide=2.25)


def dkv_vmem(tile: tuple[int, int], heads: Heads, itemsize: int) -> int:
    """Bytes of VMEM that the kernel of the gradients of key and value needs, from above."""
    block = _Block(tile, heads, itemsize)
    moved = 2 * block.queries + 4 * block.keys + block.turns + 2 * block.scalars
    kept = 2 * block.placed + 2 * 4 * block.keys // itemsize
    copies = (2.75, 4.5) if heads.together == 1 else (1.5, 2.5)
    return 2 * moved + kept + block.parts(5) + block.logits(copies[0], wide=copies[1])


def decode_vmem(num_rows: int, block_k: int, heads: Heads, itemsize: int) -> int:
    """Bytes of VMEM that decoding needs, from above; `num_rows` queries, counting all heads."""
    width, dim = (_whole(x) for x in (heads.kv * heads.head_dim, heads.head_dim))
    rows = math.ceil(num_rows / 16) * 16
    moved = 2 * itemsize * block_k * width + rows * (dim * (itemsize + 4) + 4 * LANES)
    kept = rows * (width * (itemsize + 4) + 2 * 4 * LANES)
    return 2 * moved + kept + 4 * rows * (2 * block_k + 2 * width) + MIB


class _Block:
    """Bytes of what a kernel works on at once."""

    def __init__(self, tile: tuple[int, int], heads: Heads, itemsize: int) -> None:
        lanes = _whole(tile[0])
        self.queries = tile[0] * _whole(heads.query_width) * itemsize
        self.keys = tile[1] * _whole(heads.width) * itemsize
        self.turns = 3 * 4 * heads.head_dim * lanes  # cos and sin of three phases
        self.scalars = 4 * 8 * heads.together * lanes  # one number a query
        # Queries, transposed, in the lanes of their kv heads; and the same in float32.
        self.placed = heads.together * heads.width * lanes * itemsize
        self.wide_placed = self.placed * 4 // itemsize
        self._one = 4 * lanes * tile[1] * heads.together
        self._is_wide = itemsize == 4

    def parts(self, copies: int) -> int:
        """Float32 is multiplied in parts of 16 bits: so many copies of a block's keys, for them."""
        return copies * self.keys if self._is_wide else 0

    def logits(self, copies: float, *, wide: float) -> int:
        """So many copies of the block's logits; `wide` where the inputs are float32."""
        return int(self._one * (wide if self._is_wide else copies))


def _whole(lanes: int) -> int:
    return math.ceil(lanes / LANES) * LANES
