"""Shared by test files: one tiny model on disk and in memory, and the command line.

Session fixtures are made once per worker; no test modifies them.
"""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import golden_llama
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from tiny_llm import make_llm
from typer.testing import CliRunner

import dca_jax
from dca_jax.attention import mosaic_tpu, op, xla
from dca_jax.attention.mosaic_ampere import tiles as ampere_tiles
from dca_jax.attention.mosaic_gpu import vote
from dca_jax.attention.mosaic_tpu import tiles
from dca_jax.attention.triton import common as triton_common
from dca_jax.attention.triton import tiles as triton_tiles
from dca_jax.cli import app, measure
from dca_jax.device import Device
from dca_jax.model import Llama


def invoke(*arguments: object, **options: Any) -> Any:
    """Runs `dca-jax` with these arguments in this process; unexpected errors are raised."""
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, words, catch_exceptions=False, **options)


def invoke_eval(*arguments: object) -> Any:
    """Runs `dca-jax eval`; exceptions are kept in the result."""
    return CliRunner().invoke(measure.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer and a chat template, in Hugging Face's format."""
    return make_llm(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def llm(folder: Path) -> dca_jax.LLM:
    """`folder`, loaded with default arguments."""
    return dca_jax.load(folder)


@pytest.fixture
def compilations() -> Generator[list[str]]:
    """A list that grows with every program XLA compiles, also for operations outside `jax.jit`."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **more: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(more.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def paper_llm(folder: Path) -> dca_jax.LLM:
    return dca_jax.load(folder, dca="paper", dtype="float32")


@pytest.fixture(scope="session")
def plain_llm(folder: Path) -> dca_jax.LLM:
    """`folder` without DCA."""
    return dca_jax.load(folder, dca=None, dtype="float32")


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """What the released ChunkLlama generated and computed with `golden_model`."""
    return golden_llama.load_outputs()


@pytest.fixture(scope="session")
def golden_model() -> Llama:
    return golden_llama.load_model(golden_llama.load_setting())


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blockwise backend with tiles so small that short texts cross many of them."""
    monkeypatch.setattr(xla, "TILE", 16)
    monkeypatch.setattr(xla, "CPU_TILE", 16)
    monkeypatch.setattr(xla, "LOGITS", 16 * 18)  # no block of keys ends where a chunk does


@pytest.fixture
def interpreted_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Pallas-Triton kernels in Pallas' interpreter, with small tiles."""
    tiles = triton_tiles
    small = tiles.Tile(block_q=16, block_k=16, num_warps=4, num_stages=2)
    all_small = tiles.Tiles(forward=small, dq=small, dkv=small, decode=small)
    monkeypatch.setattr(triton_common, "INTERPRET", True)
    for table in (tiles.AMPERE, tiles.HOPPER):
        monkeypatch.setitem(table, 64, all_small)  # also for narrower heads
    monkeypatch.setattr(tiles, "MAX_PACKED", 16)
    monkeypatch.setattr(tiles, "SPLIT_KEYS", 32)


@pytest.fixture
def interpreted_mosaic_ampere(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """The kernels of Ampere in Pallas' GPU interpreter, with small tiles."""
    small = ampere_tiles.Tile(block_q=16, block_k=16)
    all_small = ampere_tiles.Tiles(forward=small, decode=small, dq=small, dkv=small)
    monkeypatch.setattr(ampere_tiles, "INTERPRET", True)
    for head_dim in ampere_tiles.TILES:  # those of the CPU, which is none of the smaller chips
        monkeypatch.setitem(ampere_tiles.TILES, head_dim, all_small)
    monkeypatch.setattr(ampere_tiles, "MAX_PACKED", 16)
    monkeypatch.setattr(ampere_tiles, "SPLIT_KEYS", 32)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


@pytest.fixture
def interpreted_mosaic_blackwell(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """A B200 whose kernel runs in the interpreter.

    The interpreter detects races, by the guarantees that `tcgen05` gives, and barriers that nobody
    waits for; it fills uninitialized memory with NaN. The vote, which is in PTX, is replaced.
    """
    monkeypatch.setattr(op, "current_device", lambda: Device("gpu", "NVIDIA B200", (10, 0)))
    monkeypatch.setattr(vote, "any_in_warpgroup", lambda x, layout: jnp.any(x > 0))
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
        races = gpu_callbacks._races
        assert races is None or not races.races_found  # None: no kernel ran
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


@pytest.fixture
def interpreted_mosaic_tpu(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """A TPU whose kernels run in the interpreter, on two cores, with small blocks.

    The interpreter detects races, also between two cores that share a kernel, and out-of-bounds
    reads, and fills uninitialized memory with NaN.
    """
    v5e = Device("tpu", "TPU v5e", None)
    small = tiles.Tiles(forward=(16, 16), dq=(16, 16), dkv=(16, 16), decode=32, decode_splits=2)
    monkeypatch.setattr(op, "current_device", lambda: v5e)
    monkeypatch.setattr(mosaic_tpu, "current_device", lambda: v5e)
    monkeypatch.setattr(tiles, "choose_tiles", lambda *_: small)
    monkeypatch.setattr(tiles, "DECODE_QUERIES", 16)
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with pltpu.force_tpu_interpret_mode(params):
        yield
    races = interpret_pallas_call.races
    assert races is None or not races.races_found  # None: no kernel ran
    pltpu.reset_tpu_interpret_mode_state()
