"""What the kernels for Ampere have of their own (see test_backends.py), and lowered without a GPU.

`tests/gpu_aot/test_ampere_kernels.py` compiles them to machine code.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import lowering
import numpy as np
import pytest
from kernels import ROPE, draw

from dca_jax.attention import dual_chunk_attention, mosaic_ampere, op
from dca_jax.attention.backend import PLAIN
from dca_jax.attention.mosaic_ampere.walks import Place, Plan, Steps
from dca_jax.attention.mosaic_gpu.ranges import Walk
from dca_jax.attention.stored import Scales
from dca_jax.dca import PHASES, DCAConfig
from dca_jax.device import Device
from dca_jax.errors import InputError

S = 40  # no multiple of the tile
DCA = DCAConfig(chunk_len=S, max_query_position=60)
WIDE = DCAConfig(chunk_len=700, max_query_position=1000)


@pytest.mark.by_name
@pytest.mark.usefixtures("interpreted_mosaic_ampere")
@pytest.mark.parametrize("num_queries", [2, 20])
def test_slices_of_a_cache_that_differ_from_row_to_row(num_queries: int) -> None:
    """Few queries, packed and split, and many; slices before, around and beyond their own places.

    One compilation serves them all: where the slices begin is data.
    """
    offset = jnp.asarray([100, 7, 118], jnp.int32)
    q, k, v = draw(13, 3, num_queries, 96, 6, 2, 16)

    def run(begin: jax.Array, name: str) -> jax.Array:
        rows = op.make_rows(q.shape, dca=DCA, rope=ROPE, query_offset=offset)
        rows = rows._replace(key_offset=begin)
        return op.attend(q, k, v, dca=DCA, rows=rows, implementation=name)

    ours, theirs = (jax.jit(partial(run, name=name)) for name in ("mosaic_ampere", "reference"))
    for begins in ([33, 8, 119], [200, 200, 200]):
        begin = jnp.asarray(begins, jnp.int32)
        np.testing.assert_allclose(ours(begin), theirs(begin), atol=1e-5, rtol=0)
    assert not np.asarray(ours(begin)).any()


def test_steps_are_those_of_the_walks() -> None:
    """Each block once, in the order of the spans, also where spans are empty."""
    counts, starts, phases = [2, 0, 3, 0, 1, 0, 2], [4, 9, 0, 7, 3, 1, 10], [0, 1, 2, 2, 1, 1, 0]
    walks = [
        Walk(phase, jnp.full((1, 1), start, jnp.int32), jnp.full((1, 1), count, jnp.int32))
        for phase, start, count in zip(phases, starts, counts, strict=True)
    ]
    plan = Plan.of(walks[:3], walks[3:])
    steps = Steps(plan.spans[0, 0], plan.phases, plan.full)
    assert [int(n) for n in steps.count()] == [5, 8]
    place, met = Place.of(jnp.int32(0), steps), []
    for n in range(8):
        met.append((int(place.phase), n + int(place.shift)))
        place = place.next(jnp.int32(n + 1), steps)
    expected = [
        (phase, start + n)
        for phase, start, count in zip(phases, starts, counts, strict=True)
        for n in range(count)
    ]
    assert met == expected


# --- lowering for GPUs, without one ------------------------------------------------------------


class Kind(jax.sharding.AbstractDevice):
    """A kind of device that tells its architecture, as a real one does."""

    @property
    def compute_capability(self) -> str:
        return {"NVIDIA A100-SXM4-80GB": "8.0", "NVIDIA L40S": "8.9"}[self.device_kind]


def exported(kind: str, function: Any, *shapes: Any) -> str:
    device = Kind(device_kind=kind, num_cores=108, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.export.export(jax.jit(function), platforms=["cuda"])(*shapes).mlir_module()


def read(
    *arrays: Any, phases: Any = PHASES, dca: DCAConfig = WIDE, pages: jax.Array | None = None
) -> Any:
    options: Any = {"dca": dca, "phases": phases, "with_lse": True, "pages": pages}
    return mosaic_ampere.forward(*arrays, **options)


def test_decoding_lowers_for_cuda() -> None:
    shapes = lowering.shapes(2, 1, 4001, 8, 2, 128, jnp.bfloat16)
    assert "mosaic_gpu_v2" in exported("NVIDIA A100-SXM4-80GB", read, *shapes)


@pytest.mark.by_name
@pytest.mark.parametrize(
    ("kind", "head_dim", "dtype"),
    [("NVIDIA A100-SXM4-80GB", 128, jnp.bfloat16), ("NVIDIA L40S", 64, jnp.float16)],
)
def test_lowers_for_cuda(kind: str, head_dim: int, dtype: Any) -> None:
    """Gradients at odd lengths, one pass and plain attention, pages, and a cache in 8 bits."""

    def train(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = dual_chunk_attention(q, k, v, dca=WIDE, rope=ROPE, implementation="mosaic_ampere")
        return jnp.sum(out.astype(jnp.float32))

    q = jax.ShapeDtypeStruct((1, 2001, 8, head_dim), dtype)
    k = jax.ShapeDtypeStruct((1, 2001, 2, head_dim), dtype)
    text = exported(kind, jax.grad(train, (0, 1, 2)), q, k, k)
    assert text.count("mosaic_gpu_v2") == 3  # forward, dq, dkv

    arrays = lowering.shapes(2, 1, 4001, 8, 2, head_dim, dtype)
    for phases, dca in ((("succ",), WIDE), (("intra",), PLAIN)):
        assert "mosaic_gpu_v2" in exported(kind, partial(read, phases=phases, dca=dca), *arrays)
    pool = jax.ShapeDtypeStruct((3, 70, 128, 2, head_dim), dtype)
    pages = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    scales = Scales(*[jax.ShapeDtypeStruct((3, 70, 2, 128), jnp.float32)] * 2)
    in_8_bits = jax.ShapeDtypeStruct(pool.shape, jnp.int8)

    def from_pages(pages: jax.Array, *arrays: Any) -> Any:
        return read(*arrays, pages=pages)

    def from_pages_in_8_bits(pages: jax.Array, scales: Scales, *arrays: Any) -> Any:
        options: Any = {"dca": WIDE, "phases": PHASES, "with_lse": False, "pages": pages}
        return mosaic_ampere.forward(*arrays, scales=scales, **options)

    paged, packed = (pool, pool), (in_8_bits, in_8_bits)
    for text in (
        exported(kind, from_pages, pages, arrays[0], *paged, *arrays[3:]),
        exported(kind, from_pages_in_8_bits, pages, scales, arrays[0], *packed, *arrays[3:]),
    ):
        assert "mosaic_gpu_v2" in text


def why_not(device: Device, head_dim: int = 128, dtype: Any = jnp.bfloat16) -> str | None:
    q = jax.ShapeDtypeStruct((1, 64, 8, head_dim), dtype)
    k = jax.ShapeDtypeStruct((1, 1, 64, 2, head_dim), dtype)
    return mosaic_ampere.unsupported(device, q, k, DCA)


def test_says_why_it_cannot_run() -> None:
    hopper = Device("gpu", "NVIDIA H200", (9, 0))
    for device in (hopper, Device("gpu", "NVIDIA A100", (8, 0)), Device("gpu", "L40", (8, 9))):
        assert [why_not(device, dim) for dim in (16, 32, 64, 128, 256)] == [None] * 5
    assert "got cpu (cpu)" in (why_not(Device("cpu", "cpu", None)) or "")
    assert "capability 7.5" in (why_not(Device("gpu", "Tesla T4", (7, 5))) or "")
    assert "got float32" in (why_not(hopper, dtype=jnp.float32) or "")
    assert "got 96" in (why_not(hopper, head_dim=96) or "")
    with pytest.raises(InputError, match=r"mosaic_ampere.* cannot run: .*capability 8\.0"):
        dual_chunk_attention(
            *draw(0, 1, 8, 8, 2, 2, 16), dca=None, rope=ROPE, implementation="mosaic_ampere"
        )
