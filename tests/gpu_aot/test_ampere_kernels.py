"""The kernels for Ampere and Ada, compiled to machine code for an A100 and an L40S without one."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ampere_kernels import SHAPES, STEPS
from conftest import REPOSITORY

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin"
    ),
    pytest.mark.gpu_aot,
]

# Bytes of shared memory per CTA (CUDA C++ Programming Guide).
CARDS = {"a100": ("sm_80", 163 * 1024), "l40s": ("sm_89", 99 * 1024)}
RESERVED = 1024  # of them, by CUDA
KERNELS = {"prefill": ["forward"], "decode": ["forward"], "gradient": ["dkv", "dq"]}


@pytest.mark.parametrize("card", CARDS)
def test_kernels_fit_into_registers_and_shared_memory(card: str, tmp_path: Path) -> None:
    """Tensor cores by `mma.sync`, no register spilled, and shared memory within the card's."""
    here = Path(__file__).parent
    paths = [str(REPOSITORY), str(here), str(here.parent), *sys.path]
    subprocess.run(
        [sys.executable, str(here / "ampere_kernels.py"), card, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    architecture, available = CARDS[card]
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == len(STEPS) * len(SHAPES)
    for folder in folders:
        step, _, dtype = folder.name.split()
        found = sorted(folder.glob("*.ptxas"))
        assert [re.split("[_.]", file.name)[2] for file in found] == KERNELS[step]
        for file in found:
            ptx = file.with_suffix(".ptx").read_text(encoding="utf-8")
            told = file.read_text(encoding="utf-8")
            resources = file.with_suffix(".resources.txt").read_text(encoding="utf-8")
            registers = re.findall(r"Used (\d+) registers", told)[0]
            shared = int(re.findall(r"smem_scratch_bytes=(\d+)", resources)[0])
            print(f"{card} {folder.name} {file.stem}: {registers} registers, {shared} bytes")
            kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
            assert f".target {architecture}" in ptx
            assert f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" in ptx
            assert "0 bytes spill stores, 0 bytes spill loads" in told
            assert shared + RESERVED <= available
