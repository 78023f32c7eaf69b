"""The tiles (block_q, block_kv) of each kernel, by chip and heads, and the VMEM that they take."""

import dataclasses
import math
from collections.abc import Callable

from dca_jax.attention.mosaic_tpu.heads import LANES, Heads
from dca_jax.dca import DCAConfig
from dca_jax.device import Device

MIB = 2**20
DECODE_QUERIES = 256  # up to this many queries, counting all heads, the decoding kernel is used
SMEM = 640 * 1024  # what the words of the steps may take of a core's 1 MiB of scalar memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A core's VMEM, the cores that act as one device, and the tiles to start from.

    Tiles are (block_q, block_kv) for one head of 128 in 16 bits. They were chosen by the compiler's
    schedules of an unmasked block (docs/lab/tpu.md): smaller tiles cost more for each logit.
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
# By JAX's `device_kind`.
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
    """(block_q, block_kv) of each kernel; of the decoding kernel, block_kv and the splits of a row.

    The splits of a row run on different cores; each reads its share of the row's keys.
    """

    forward: tuple[int, int]
    dq: tuple[int, int]
    dkv: tuple[int, int]
    decode: int
    decode_splits: int


def choose_tiles(device: Device, heads: Heads, dca: DCAConfig, itemsize: int) -> Tiles:
    """The tiles for a chip, given the number and width of the heads, and the chunk length.

    A block of keys across two chunks is processed twice near the diagonal, so block_kv divides the
    chunk length if a divisor of about the right size exists. A block of queries may span chunks at
    no cost.
    """
    chip = CHIPS[device.kind]
    shrink = max(heads.head_dim * itemsize // 256, 1) * heads.q_per_pack

    def fit(
        size: tuple[int, int], vmem: Callable[[tuple[int, int], Heads, int], int]
    ) -> tuple[int, int]:
        block_q, block_kv = max(size[0] // shrink, LANES), size[1]
        while block_q > LANES and block_q > 8 * dca.chunk_len:  # each chunk it spans is one run
            block_q //= 2
        while True:
            tile = block_q, choose_block_kv(dca.chunk_len, block_kv)
            if vmem(tile, heads, itemsize) <= chip.vmem * 7 // 8 or block_kv <= LANES:
                return tile
            if block_q > 2 * LANES:
                block_q //= 2
            else:
                block_kv //= 2

    token = heads.kv * heads.head_dim * itemsize
    return Tiles(
        forward=fit(chip.forward, forward_vmem),
        dq=fit(chip.dq, dq_vmem),
        dkv=fit(chip.dkv, dkv_vmem),
        decode=choose_block_kv(dca.chunk_len, max(chip.decode // token // LANES, 1) * LANES),
        decode_splits=chip.cores,
    )


def vmem_limit(device: Device, need: int) -> int:
    """The VMEM that the compiler may give a kernel which needs about `need` bytes."""
    return min(3 * need // 2, CHIPS[device.kind].vmem)


def choose_block_kv(chunk_len: int, target: int) -> int:
    """A block_kv of about `target` that divides the chunk length, if there is one.

    Multiples of 128 (whole vectors of lanes) are preferred to multiples of 16 (whole sublanes).
    """
    for multiple in (LANES, 16):
        sizes = range(multiple * math.ceil(0.7 * target / multiple), target * 3 // 2 + 1, multiple)
        divisors = [size for size in sizes if chunk_len % size == 0]
        if divisors:
            return min(divisors, key=lambda size: abs(size - target))
    while target > LANES and target > 8 * chunk_len:
        target //= 2
    return target


def block_of_page(page: int, target: int) -> int:
    """The largest block_kv up to `target` that divides a page, in whole vectors of lanes."""
    sizes = range(LANES, max(target, LANES) + 1, LANES)
    return max(size for size in sizes if page % size == 0)


def forward_vmem(tile: tuple[int, int], heads: Heads, itemsize: int) -> int:
    """An upper bound on the bytes of VMEM that the forward kernel needs.

    Inputs and outputs are double-buffered. How many copies of a block's logits the compiler keeps
    was read from its own figures, and tests/tpu_aot compares this bound with them.
    """
    sizes = _TileBytes(tile, heads, itemsize)
    buffered = 2 * sizes.queries + 2 * sizes.keys + sizes.rotation_tables + sizes.scalars
    scratch = sizes.expanded + sizes.expanded_float32 + 2 * sizes.scalars
    return 2 * buffered + scratch + sizes.key_parts(4) + sizes.logits(1.25, float32=1.75)


def dq_vmem(tile: tuple[int, int], heads: Heads, itemsize: int) -> int:
    """An upper bound on the bytes of VMEM that the dq kernel needs."""
    sizes = _TileBytes(tile, heads, itemsize)
    buffered = 3 * sizes.queries + 2 * sizes.keys + sizes.rotation_tables + 2 * sizes.scalars
    scratch = 2 * sizes.expanded + 2 * sizes.expanded_float32
    copies = 1.75 if heads.q_per_pack == 1 else 1.5
    return 2 * buffered + scratch + sizes.key_parts(4) + sizes.logits(copies, float32=2.25)


def dkv_vmem(tile: tuple[int, int], heads: Heads, itemsize: int) -> int:
    """An upper bound on the bytes of VMEM that the dkv kernel needs."""
    sizes = _TileBytes(tile, heads, itemsize)
    buffered = 2 * sizes.queries + 4 * sizes.keys + sizes.rotation_tables + 2 * sizes.scalars
    scratch = 2 * sizes.expanded + 2 * 4 * sizes.keys // itemsize
    copies = (2.75, 4.5) if heads.q_per_pack == 1 else (1.5, 2.5)
    return 2 * buffered + scratch + sizes.key_parts(5) + sizes.logits(copies[0], float32=copies[1])


def decode_vmem(
    num_queries: int, block_kv: int, heads: Heads, itemsize: int, kept: int | None = None
) -> int:
    """An upper bound on the bytes of VMEM for decoding `num_queries`, counting all heads.

    Keys and values take `kept` bytes an element; by default `itemsize`. If they are fewer, there
    are their scales, and some chips' compilers keep a block as it is multiplied, too.
    """
    width, dim = (whole_lanes(x) for x in (heads.kv * heads.head_dim, heads.head_dim))
    queries = math.ceil(num_queries / 16) * 16
    buffered = 2 * (kept or itemsize) * block_kv * width
    buffered += queries * (dim * (itemsize + 4) + 4 * LANES)
    widened = 0
    if kept is not None and kept < itemsize:
        buffered += 2 * 4 * block_kv * math.ceil(heads.kv / 8) * 8
        widened = itemsize * block_kv * width
    scratch = queries * (width * (itemsize + 4) + 2 * 4 * LANES)
    working = widened + 4 * queries * (2 * block_kv + 2 * width)
    return 2 * buffered + scratch + working + MIB


class _TileBytes:
    """Bytes of the arrays that a kernel works on at once."""

    def __init__(self, tile: tuple[int, int], heads: Heads, itemsize: int) -> None:
        block_q, block_kv = tile
        lanes = whole_lanes(block_q)
        self.queries = block_q * whole_lanes(heads.q_width) * itemsize
        self.keys = block_kv * whole_lanes(heads.kv_width) * itemsize
        self.rotation_tables = 3 * 4 * heads.head_dim * lanes  # cos and sin of three phases
        self.scalars = 4 * 8 * heads.q_per_pack * lanes  # one number for each query
        # Queries, transposed, in the lanes of their kv heads; and the same in float32.
        self.expanded = heads.q_per_pack * heads.kv_width * lanes * itemsize
        self.expanded_float32 = self.expanded * 4 // itemsize
        self._logits = 4 * lanes * block_kv * heads.q_per_pack
        self._is_float32 = itemsize == 4

    def key_parts(self, copies: int) -> int:
        """Copies of a block of keys: float32 products are computed in parts of 16 bits."""
        return copies * self.keys if self._is_float32 else 0

    def logits(self, copies: float, *, float32: float) -> int:
        """Copies of the tile's logits: `float32` of them for float32 inputs, else `copies`."""
        return int(self._logits * (float32 if self._is_float32 else copies))


def whole_lanes(size: int) -> int:
    """`size` rounded up to whole vectors of lanes."""
    return math.ceil(size / LANES) * LANES
