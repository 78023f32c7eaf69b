"""Which device a computation is being compiled for: what a backend asks before it runs."""

from typing import NamedTuple

import jax

# Compute capability of the GPUs one compiles for without having one (an AbstractDevice).
CAPABILITIES = {"A100": (8, 0), "L40": (8, 9), "H100": (9, 0), "H200": (9, 0), "GH200": (9, 0)}


class Device(NamedTuple):
    """A platform, its model, and what it can do."""

    platform: str  # "cpu", "gpu", "tpu"
    kind: str  # as JAX names it: "NVIDIA H200", "TPU v5e"
    capability: tuple[int, int] | None  # CUDA compute capability, None off NVIDIA


def current_device() -> Device:
    """The device of the mesh in use, if it names one (compiling ahead of time), else JAX's own."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        words = abstract.device_kind.replace("-", " ").split()
        capability = next((CAPABILITIES[word] for word in words if word in CAPABILITIES), None)
        platform = "gpu" if abstract.platform == "cuda" else abstract.platform
        return Device(platform, abstract.device_kind, capability)
    device = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability is not None:
        major, minor = str(capability).split(".")
        return Device(device.platform, device.device_kind, (int(major), int(minor)))
    return Device(device.platform, device.device_kind, None)
