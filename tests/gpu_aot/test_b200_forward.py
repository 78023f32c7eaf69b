"""Blackwell's forward kernel, compiled to machine code for GPUs that nobody had at hand."""

import importlib.util
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lowering
import pytest
from b200 import OPTIONS, blackwell
from jax.sharding import SingleDeviceSharding

from dca_jax.attention import mosaic_blackwell
from dca_jax.attention.backend import PLAIN
from dca_jax.attention.mosaic_blackwell.tiles import tmem_columns
from dca_jax.dca import PHASES, DCAConfig, Phase
from dca_jax.device import SHARED_BYTES

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin"
    ),
    pytest.mark.gpu_aot,
]

DCA = DCAConfig.paper(4096)
TOKENS, CAPACITY = 4096, 65_536


class Program(NamedTuple):
    """A compiled program: its text, and the bytes it needs besides arguments and results."""

    text: str
    working: int


def compiled(
    minor: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: Any,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    with_lse: bool,
) -> Program:
    where = SingleDeviceSharding(blackwell(minor))
    arrays = lowering.shapes(1, TOKENS, CAPACITY, heads, kv_heads, dim, dtype)
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arrays)
    options: Any = {"dca": dca, "phases": phases, "with_lse": with_lse}
    forward = partial(mosaic_blackwell.forward, **options)
    program = jax.jit(forward).lower(*arrays).compile(OPTIONS)
    return Program(program.as_text(), program.memory_analysis().temp_size_in_bytes)


@pytest.mark.parametrize(
    ("minor", "heads", "kv_heads", "dim", "dtype", "dca", "phases", "with_lse"),
    [
        pytest.param(0, 32, 8, 128, jnp.bfloat16, DCA, PHASES, True, id="fused"),
        pytest.param(0, 32, 8, 128, jnp.bfloat16, DCA, PHASES, False, id="without lse"),
        pytest.param(0, 32, 32, 128, jnp.float16, DCA, ("succ",), True, id="a pass"),
        pytest.param(0, 32, 8, 128, jnp.bfloat16, PLAIN, ("intra",), True, id="plain"),
        pytest.param(0, 9, 3, 64, jnp.bfloat16, DCA, PHASES, True, id="heads of 64"),
        pytest.param(0, 9, 3, 64, jnp.float16, DCA, PHASES[1:], True, id="two phases"),
        pytest.param(3, 32, 8, 128, jnp.bfloat16, DCA, PHASES, True, id="10.3"),
    ],
)
def test_a_piece_is_read_by_tensor_cores_without_spilling(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    minor: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: Any,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    with_lse: bool,
) -> None:
    """Its registers, shared and tensor memory are there, and no layer of the cache is copied."""
    for what in ("PTX", "PTXAS"):
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{what}", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    case = minor, heads, kv_heads, dim, dtype, dca, phases, with_lse
    # jaxlib 0.11.2 compiles kernels of a process for the first GPU that they met: others' an H200.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        program = pool.submit(compiled, *case).result()
    assert program.text.count('custom_call_target="mosaic_gpu_v2"') == 1
    query = TOKENS * heads * dim * 2
    assert program.working < (len(phases) + 1.1) * query  # rotated queries, lse of whole tiles

    ptx, log, resources = (
        next(tmp_path.glob(f"*.{end}")).read_text(encoding="utf-8")
        for end in ("ptx", "ptxas", "resources.txt")
    )
    assert f".target sm_10{minor}a" in ptx
    for instruction in ("mma", "commit", "ld", "st", "alloc", "dealloc"):
        assert f"tcgen05.{instruction}" in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert f"for 'sm_10{minor}a'" in log  # machine code, not only PTX
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log
    shared, columns = (
        int(re.search(rf"{name}=(\d+)", resources)[1])  # pyright: ignore[reportOptionalSubscript]
        for name in ("smem_scratch_bytes", "tmem_scratch_cols")
    )
    barriers = 8 * 64  # more than there are
    assert shared + barriers <= SHARED_BYTES
    assert columns == tmem_columns(dim) <= 512
    print(f"{shared} bytes of shared memory, {columns} columns of tensor memory")
