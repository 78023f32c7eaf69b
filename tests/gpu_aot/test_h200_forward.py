"""Hopper's forward kernel, compiled to machine code for an H200 without one."""

import importlib.util
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lowering
import pytest
from h200 import OPTIONS, h200s
from jax.sharding import SingleDeviceSharding

from dca_jax.attention import mosaic_gpu
from dca_jax.dca import PHASES, DCAConfig, Phase
from dca_jax.device import SHARED_BYTES

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin"
    ),
    pytest.mark.gpu_aot,
]

TOKENS = 8192
SPILLED = 64  # bytes per thread, none in the loops over full blocks; for two phases twice that


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "phases", "with_lse"),
    [
        pytest.param(32, 8, 64, PHASES, False, id="64"),
        pytest.param(9, 3, 64, PHASES[1:], True, id="64, two phases"),
        pytest.param(32, 8, 64, ("intra",), True, id="64, a pass"),
        pytest.param(32, 8, 128, PHASES, False, id="128"),
        pytest.param(9, 3, 128, PHASES[1:], True, id="128, two phases"),
        pytest.param(32, 8, 128, ("succ",), True, id="128, a pass"),
        pytest.param(16, 4, 256, PHASES, False, id="256"),
        pytest.param(16, 4, 256, ("inter",), True, id="256, a pass"),
    ],
)
def test_registers_and_shared_memory_suffice(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    heads: int,
    kv_heads: int,
    dim: int,
    phases: tuple[Phase, ...],
    with_lse: bool,
) -> None:
    """WGMMA is not serialized, and hardly a register is spilled."""
    for what in ("PTX", "PTXAS"):
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{what}", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    where = SingleDeviceSharding(h200s(1)[0])
    arrays = lowering.shapes(1, TOKENS, TOKENS, heads, kv_heads, dim, jnp.bfloat16)
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arrays)
    options: Any = {"dca": DCAConfig.paper(4096), "phases": phases, "with_lse": with_lse}
    program = jax.jit(partial(mosaic_gpu.forward, **options)).lower(*arrays).compile(OPTIONS)
    text = program.as_text()
    assert text is not None
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 1

    ptx, log, resources = (
        next(tmp_path.glob(f"*.{end}")).read_text(encoding="utf-8")
        for end in ("ptx", "ptxas", "resources.txt")
    )
    assert "wgmma.mma_async" in ptx
    assert "for 'sm_90a'" in log  # machine code, not only PTX
    assert "C7513" not in log  # of serialized WGMMA
    frame = re.search(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert frame is not None
    spilled = [int(x) for x in frame.groups()]
    assert max(spilled) <= SPILLED * (2 if len(phases) == 2 else 1)
    shared = int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1])  # pyright: ignore[reportOptionalSubscript]
    assert shared + 1024 <= SHARED_BYTES
    print(f"{spilled} bytes spilled, {shared} bytes of shared memory")
