"""The attention kernels compiled by Mosaic for real TPUs, at real sizes, without a TPU.

The compiler refuses a kernel that does not fit the chip. What it says of memory is printed and held
against ours: no copies of queries, keys or values beside the kernel, a compact log-sum-exp, and the
VMEM that `tiles` expects.
"""

import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.mesh import AbstractDevice
from jax.experimental import topologies
from kernels import ROPE

from dca_jax.attention import mosaic_tpu, op
from dca_jax.attention.backend import KeyBlocks
from dca_jax.attention.blocks import BLOCK, num_tiles
from dca_jax.attention.mosaic_tpu import tiles
from dca_jax.attention.mosaic_tpu.heads import Heads
from dca_jax.attention.stored import Scales
from dca_jax.dca import PHASES, DCAConfig
from dca_jax.device import Device

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
    pytest.mark.timeout(1800),
]

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "v7x": "tpu7x:2x2x1",
}
LLAMA = Heads(query=32, kv=8, head_dim=128)
NARROW = Heads(query=32, kv=8, head_dim=64)
WIDE = Heads(query=16, kv=8, head_dim=256)
ODD = Heads(query=40, kv=5, head_dim=128)
LONG = 131072


def chip(name: str) -> Any:
    # A v4 chip's two cores are one device, as they are on a v4's own hosts.
    options = {"chip_config_name": "megacore"} if name == "v4" else {}
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[name], **options
    )
    return topology.devices[0]


def compile_for(
    name: str,
    part: str,
    length: int,
    heads: Heads,
    *,
    chunk_len: int = 3072,
    dtype: Any = jnp.bfloat16,
    cache: Any = None,
) -> Any:
    """forward, backward, or decode (2 new tokens), of one of several layers of a cache.

    The cache may be in 8 bits; eight layers of it do not fit a chip's VMEM, to which XLA may
    otherwise copy it, and count it as its own instead of the kernel's.
    """
    layers = 8 if part == "decode" else 2
    device = chip(name)
    dca = DCAConfig(chunk_len=chunk_len, max_query_position=chunk_len + 1023)
    num_queries = 2 if part == "decode" else length
    query_shape = (1, num_queries, heads.query, heads.head_dim)
    cache_shape = (layers, 1, length, heads.kv, heads.head_dim)

    def like(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.SingleDeviceSharding(device)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def flat(shape: tuple[int, ...], dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return like(*shape[:-2], shape[-2] * shape[-1], dtype=dtype)

    def run(
        query: Any, key: Any, value: Any, layer: Any, offset: Any, scales: Any, *saved: Any
    ) -> Any:
        # The heads' axis is taken apart as the model does it, from arrays that have it flat.
        query, key, value = (
            x.reshape(shape)
            for x, shape in ((query, query_shape), (key, cache_shape), (value, cache_shape))
        )
        rows = op.make_rows(query_shape, dca=dca, rope=ROPE, query_offset=offset)
        arguments, options = (query, key, value, layer, rows), {"dca": dca, "phases": PHASES}
        if part == "backward":
            do = saved[0].reshape(query_shape)
            gradients = mosaic_tpu.backward(*arguments, do, *saved[1:], **options)
            return [x.reshape(*x.shape[:2], -1) for x in gradients]
        options["scales"] = scales
        out, lse = mosaic_tpu.forward(*arguments, with_lse=part == "forward", **options)
        return out.reshape(1, num_queries, -1), lse

    stat = like(1, heads.query, num_queries, dtype=jnp.float32)
    saved = (flat(query_shape), stat, stat) if part == "backward" else ()
    number, scales = like(1, dtype=jnp.int32), None
    if cache is not None:
        scale: Any = like(layers, 1, heads.kv, length, dtype=jnp.float32)
        scales = Scales(scale, scale)
    kept = flat(cache_shape, cache or dtype)
    abstract = AbstractDevice(device.device_kind, device.num_cores, "tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(run).lower(
            *(flat(query_shape), kept, kept),
            *(like(dtype=jnp.int32), number, scales, *saved),
        )
    return lowered.compile()


def vmem(compiled: Any) -> dict[str, int]:
    """The VMEM that each kernel uses, in bytes, by the compiler's own figure.

    Below the memory that a kernel is given may lie an array that XLA put there: it is not counted.
    """
    used = {}
    for line in compiled.as_text().splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            name = re.search(r"%(dca_tpu_[a-z]+)", line)
            memory = (
                r'scoped_memory_configs":\[\{"memory_space":"1","offset":"(\d+)","size":"(\d+)"'
            )
            given = re.search(f'"{memory}', line)
            taken = re.search(f'"used_{memory}', line)
            assert name, line[:200]
            assert given, line[:200]
            assert taken, line[:200]
            used[name[1]] = int(taken[1]) + int(taken[2]) - int(given[1])
    return used


def check(name: str, part: str, length: int, heads: Heads, **options: Any) -> None:
    compiled = compile_for(name, part, length, heads, **options)
    dtype = jnp.dtype(options.get("dtype", jnp.bfloat16))
    kept = jnp.dtype(options.get("cache", dtype))
    chosen = tiles.choose_tiles(
        Device("tpu", chip(name).device_kind, None),
        heads,
        DCAConfig(chunk_len=options.get("chunk_len", 3072), max_query_position=2**20),
        dtype.itemsize,
    )
    expected = {
        "dca_tpu_forward": tiles.forward_vmem(chosen.forward, heads, dtype.itemsize),
        "dca_tpu_dq": tiles.dq_vmem(chosen.dq, heads, dtype.itemsize),
        "dca_tpu_dkv": tiles.dkv_vmem(chosen.dkv, heads, dtype.itemsize),
        "dca_tpu_decode": tiles.decode_vmem(
            2 * heads.query, chosen.decode, heads, dtype.itemsize, kept.itemsize
        ),
    }
    used = vmem(compiled)
    available = tiles.CHIPS[chip(name).device_kind].vmem
    analysis = compiled.memory_analysis()
    temporary, out = analysis.temp_size_in_bytes, analysis.output_size_in_bytes
    print(f"{name} {part} of {length} tokens, {heads.query}/{heads.kv} heads of {heads.head_dim}:")
    print(f"  HBM: {temporary / 1e6:.1f} MB beside arguments and {out / 1e6:.1f} MB of results")
    for kernel, size in used.items():
        print(f"  {kernel}: {size / 1e6:.2f} MB of VMEM, expected {expected[kernel] / 1e6:.2f} MB")
        assert size <= expected[kernel] < (1.6 if kept == dtype else 2) * size
        assert expected[kernel] <= available
    wanted = {"forward": 1, "backward": 2, "decode": 1}[part]
    assert len(used) == wanted
    needed = 3 * 4 * heads.head_dim * length if part != "decode" else 0  # cos, sin of three phases
    if part == "backward":  # log-sum-exp and delta, in the kernels' units and layout
        needed += 2 * 4 * heads.query * length
    assert temporary < 1.05 * needed + 16e6
    if part == "decode":  # keys and values, each double-buffered
        block = chosen.decode * heads.kv * heads.head_dim * kept.itemsize
        assert used["dca_tpu_decode"] >= 4 * block
    if part == "forward":
        queries = heads.query * length
        assert out < queries * (heads.head_dim * dtype.itemsize + 4) * 1.001


@pytest.mark.slow
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_compiles_for_one_chip(part: str) -> None:
    """As few heads as there can be, which take a quarter of the time of all 32."""
    check("v5e", part, 8192, Heads(query=4, kv=1, head_dim=128))


def test_decodes_on_one_chip() -> None:
    check("v5e", "decode", 32768, LLAMA)


@pytest.mark.parametrize("heads", [ODD, Heads(query=32, kv=4, head_dim=64)])
def test_decodes_any_number_of_heads_without_a_copy(heads: Heads) -> None:
    check("v5p", "decode", 32768, heads)


@pytest.mark.parametrize(
    ("name", "heads", "cache"),
    [
        ("v5e", LLAMA, jnp.int8),
        *(
            pytest.param(name, heads, cache, marks=pytest.mark.tpu_aot)
            for name in TOPOLOGIES
            for heads in (LLAMA, NARROW, WIDE)
            for cache in (jnp.int8, jnp.float8_e4m3fn)
        ),
    ],
)
def test_decodes_from_8_bits_without_a_copy(name: str, heads: Heads, cache: Any) -> None:
    check(name, "decode", 32768, heads, cache=cache)


@pytest.mark.parametrize(
    ("name", "heads", "page", "cache"),
    [
        ("v5e", LLAMA, 128, None),
        *(
            pytest.param(name, heads, page, cache, marks=pytest.mark.tpu_aot)
            for name in ("v4", "v6e", "v7x")
            for heads, page, cache in (
                (LLAMA, 128, jnp.int8),
                (NARROW, 1024, None),
                (WIDE, 384, jnp.float8_e4m3fn),
            )
        ),
    ],
)
def test_decodes_from_pages_without_a_copy(name: str, heads: Heads, page: int, cache: Any) -> None:
    """Eight rows of 32,768 tokens, from a pool of two layers."""
    device, rows_of_batch, pages_per_row = chip(name), 8, 32_768 // page
    dca = DCAConfig(chunk_len=3072, max_query_position=4095)
    pool = 2, rows_of_batch * pages_per_row, page, heads.kv * heads.head_dim

    def like(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.SingleDeviceSharding(device)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def run(query: Any, key: Any, value: Any, offset: Any, pages: Any, scales: Any) -> Any:
        query = query.reshape(rows_of_batch, 1, heads.query, heads.head_dim)
        key, value = (x.reshape(*x.shape[:3], heads.kv, heads.head_dim) for x in (key, value))
        rows = op.make_rows(query.shape, dca=dca, rope=ROPE, query_offset=offset)
        options: dict[str, Any] = {"implementation": "mosaic_tpu", "pages": pages, "scales": scales}
        out = op.attend(query, key, value, dca=dca, rows=rows, layer=jnp.int32(1), **options)
        return out.reshape(rows_of_batch, -1)

    query = like(rows_of_batch, heads.query * heads.head_dim, dtype=jnp.bfloat16)
    kept, scales = like(*pool, dtype=cache or jnp.bfloat16), None
    if cache is not None:
        scale: Any = like(*pool[:2], heads.kv, page, dtype=jnp.float32)
        scales = Scales(scale, scale)
    table = like(rows_of_batch, pages_per_row)
    abstract = AbstractDevice(device.device_kind, device.num_cores, "tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(run).lower(query, kept, kept, like(rows_of_batch), table, scales)
    compiled = lowered.compile()
    assert set(vmem(compiled)) == {"dca_tpu_decode"}
    assert compiled.memory_analysis().temp_size_in_bytes < 16e6  # a layer's keys have 268 MB


@pytest.mark.tpu_aot
@pytest.mark.parametrize("heads", [LLAMA, NARROW, WIDE], ids=["128", "64", "256"])
@pytest.mark.parametrize("part", ["forward", "backward", "decode"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_compiles_for_every_chip_at_128k(name: str, part: str, heads: Heads) -> None:
    check(name, part, LONG, heads)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("chunk_len", [2816, 20240])
@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("name", ["v4", "v6e"])
def test_blocks_that_divide_other_chunks(name: str, part: str, chunk_len: int) -> None:
    check(name, part, 32768, LLAMA, chunk_len=chunk_len)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("part", ["forward", "backward", "decode"])
@pytest.mark.parametrize(
    ("name", "heads"),
    [("v4", LLAMA), ("v4", NARROW), ("v4", WIDE), ("v6e", WIDE), ("v7x", LLAMA)],
    ids=["v4-128", "v4-64", "v4-256", "v6e-256", "v7x-128"],
)
def test_float32(name: str, heads: Heads, part: str) -> None:
    check(name, part, 32768, heads, dtype=jnp.float32)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", ["v5p", "v6e"])
@pytest.mark.parametrize("heads", [Heads(query=28, kv=4, head_dim=128), NARROW, WIDE])
def test_lists_of_a_million_keys_are_read_in_place(name: str, heads: Heads) -> None:
    """The last 4,096 queries, of which scalar memory holds the words of a few tiles at once."""
    device, length, tokens = chip(name), 2**20, 4096
    dca = DCAConfig(chunk_len=253_952, max_query_position=262_144)

    def like(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.SingleDeviceSharding(device)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    query_shape = 1, tokens, heads.query, heads.head_dim
    cache_shape = 2, 1, length, heads.kv, heads.head_dim

    def run(query: Any, key: Any, value: Any, offset: Any, blocks: KeyBlocks) -> Any:
        query, key, value = (
            x.reshape(shape)
            for x, shape in ((query, query_shape), (key, cache_shape), (value, cache_shape))
        )
        rows = op.make_rows(query_shape, dca=dca, rope=ROPE, query_offset=offset)
        options = {"dca": dca, "phases": PHASES, "with_lse": False, "blocks": blocks}
        return mosaic_tpu.forward(query, key, value, jnp.int32(1), rows, **options)[0]

    tiles_of = num_tiles(tokens)
    lists = KeyBlocks(like(1, heads.kv, tiles_of, 3), like(1, heads.kv, tiles_of, length // BLOCK))
    kept = like(2, 1, length, heads.kv * heads.head_dim, dtype=jnp.bfloat16)
    query = like(1, tokens, heads.query * heads.head_dim, dtype=jnp.bfloat16)
    abstract = AbstractDevice(device.device_kind, device.num_cores, "tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    with jax.sharding.use_abstract_mesh(mesh):
        compiled = jax.jit(run).lower(query, kept, kept, like(1), lists).compile()
    used, expected = vmem(compiled)["dca_tpu_lists"], mosaic_tpu.lists.vmem_bytes(heads, 2)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(f"{name}, {heads}: {used / 1e6:.2f} MB of VMEM, expected {expected / 1e6:.2f}")
    print(f"  HBM: {temporary / 1e6:.1f} MB beside arguments")
    assert used <= expected <= tiles.CHIPS[device.device_kind].vmem
    assert temporary < 1e9  # no copy of the keys, of which a layer has more
