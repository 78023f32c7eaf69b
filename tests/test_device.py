"""Which device a program is for: asked of the device, on a mesh too, and of a table elsewhere."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice

from dca_jax import device as device_module
from dca_jax.attention import mosaic_gpu, op, triton
from dca_jax.dca import DCAConfig
from dca_jax.device import MULTIPROCESSORS, Device, current_device, multiprocessors

DCA = DCAConfig(chunk_len=8, max_query_position=12)


class StandIn(NamedTuple):
    """What of a JAX device is asked."""

    platform: str
    device_kind: str
    compute_capability: Any = None
    core_count: int | None = None


@contextmanager
def mesh_of(kind: str, platform: str = "gpu") -> Iterator[None]:
    """Inside a mesh of such devices, as `jax.set_mesh` and `jax.shard_map` leave it."""
    abstract = AbstractDevice(device_kind=kind, num_cores=100, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=abstract)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The devices of this machine: fill it."""
    devices: list[Any] = []
    monkeypatch.setattr(device_module.jax, "local_devices", lambda **_: devices)
    return devices


def refusals(device: Device) -> list[str | None]:
    query = jax.ShapeDtypeStruct((1, 64, 8, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 1, 64, 2, 128), jnp.bfloat16)
    return [backend.unsupported(device, query, key, DCA) for backend in (triton, mosaic_gpu)]


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA L4", "8.9"),
        ("NVIDIA A10G", "8.6"),
        ("NVIDIA GeForce RTX 4090", "8.9"),
        ("NVIDIA H800", "9.0"),
        ("NVIDIA GB200", "10.0"),
        ("NVIDIA of next year", "13.1"),
    ],
)
def test_a_gpu_that_is_here_is_asked_on_a_mesh_and_off_it(
    present: list[Any], kind: str, capability: str
) -> None:
    present += [StandIn("cpu", "cpu"), StandIn("gpu", kind, capability)]
    major, minor = capability.split(".")
    expected = Device("gpu", kind, (int(major), int(minor)))
    for platform in ("gpu", "cuda"):
        with mesh_of(kind, platform):
            assert current_device() == expected
    del present[0]
    assert current_device() == expected
    assert refusals(expected)[0] is None
    assert (refusals(expected)[1] is None) == (capability == "9.0")


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0)),
        ("NVIDIA A800-SXM4-80GB", (8, 0)),
        ("NVIDIA A10G", (8, 6)),
        ("NVIDIA RTX A6000", (8, 6)),
        ("NVIDIA L4", (8, 9)),
        ("NVIDIA L40S", (8, 9)),
        ("NVIDIA GeForce RTX 4090", (8, 9)),
        ("NVIDIA RTX 6000 Ada Generation", (8, 9)),
        ("NVIDIA H100 80GB HBM3", (9, 0)),
        ("NVIDIA H800", (9, 0)),
        ("NVIDIA H20", (9, 0)),
        ("NVIDIA GH200 480GB", (9, 0)),
        ("NVIDIA B200", (10, 0)),
        ("NVIDIA GB200", (10, 0)),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0)),
        ("Tesla T4", (7, 5)),
    ],
)
def test_a_gpu_that_is_not_here_is_in_the_table(
    present: list[Any], kind: str, capability: tuple[int, int]
) -> None:
    with mesh_of(kind, "cuda"):
        assert current_device() == Device("gpu", kind, capability)


def test_a_gpu_that_nobody_knows_is_said_to_be_unknown(present: list[Any]) -> None:
    with mesh_of("NVIDIA X1"):
        device = current_device()
    assert device == Device("gpu", "NVIDIA X1", None)
    for reason in refusals(device):
        assert reason is not None
        assert "got NVIDIA X1, an unknown GPU" in reason


@pytest.mark.parametrize("on_mesh", [False, True])
def test_amd_runs_in_plain_xla_and_says_so_once(
    present: list[Any], caplog: pytest.LogCaptureFixture, on_mesh: bool
) -> None:
    kind = f"AMD Instinct MI300X {on_mesh}"
    present.append(StandIn("gpu", kind, "gfx942"))
    q, k = jax.ShapeDtypeStruct((1, 8, 4, 64), jnp.bfloat16), (1, 1, 8, 2, 64)

    def chosen() -> str:
        shape = jax.ShapeDtypeStruct(k, jnp.bfloat16)
        return op.choose_implementation(None, q, shape, DCA)

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            if on_mesh:
                with mesh_of(kind):
                    assert current_device() == Device("rocm", kind, None)
                    assert chosen() == "xla"
            else:
                assert chosen() == "xla"
    (line,) = [r.message for r in caplog.records if "runs in plain XLA" in r.message]
    assert f"got {kind} (rocm)" in line


def test_the_default_device_counts(present: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = StandIn("gpu", "NVIDIA H200", "9.0"), jax.devices("cpu")[0]
    by_backend = {"cpu": [cpu], None: [gpu]}
    monkeypatch.setattr(
        device_module.jax, "local_devices", lambda backend=None: by_backend[backend]
    )
    assert current_device().capability == (9, 0)
    for default in (cpu, "cpu"):
        with jax.default_device(default):
            assert current_device() == Device("cpu", cpu.device_kind, None)


def test_a_mesh_or_the_device_says_how_many_multiprocessors_there_are(present: list[Any]) -> None:
    present.append(StandIn("gpu", "NVIDIA H100 PCIe", "9.0", core_count=114))
    assert multiprocessors() == 114
    with mesh_of("NVIDIA H20", "cuda"):
        assert multiprocessors() == 100
    present[0] = StandIn("cpu", "cpu")
    assert multiprocessors() == MULTIPROCESSORS


def test_a_concrete_mesh_of_what_is_here() -> None:
    (first, *_) = jax.local_devices()
    mesh = jax.make_mesh((1,), ("x",), devices=[first])
    with jax.set_mesh(mesh):
        assert current_device().kind == first.device_kind
