"""The device that a computation is compiled for; backends use it to decide if they can run."""

import re
from typing import Any, NamedTuple

import jax

# Compute capability of GPUs by a word in their name, for compiling without such a GPU.
CAPABILITIES = {
    "V100": (7, 0),
    "T4": (7, 5),
    **dict.fromkeys(("A100", "A800", "A30"), (8, 0)),
    **dict.fromkeys(("A10", "A10G", "A40", "A5000", "A6000", "3080", "3090"), (8, 6)),
    **dict.fromkeys(("L4", "L20", "L40", "L40S", "4080", "4090", "Ada"), (8, 9)),
    **dict.fromkeys(("H100", "H200", "H800", "H20", "GH200"), (9, 0)),
    **dict.fromkeys(("B200", "GB200"), (10, 0)),
    **dict.fromkeys(("B300", "GB300"), (10, 3)),
    **dict.fromkeys(("5080", "5090", "Blackwell"), (12, 0)),
}

# Properties of an H100 or H200 (CUDA C++ Programming Guide; NVIDIA's datasheet), by which kernels
# split their work.
SHARED_BYTES = 227 * 1024  # maximum shared memory of a CTA
MULTIPROCESSORS = 132  # where the device does not say; see `multiprocessors`


class Device(NamedTuple):
    """A platform, a device model and its compute capability."""

    platform: str  # "cpu", "gpu" (NVIDIA's), "rocm", "tpu"
    kind: str  # as JAX names it: "NVIDIA H200", "TPU v5e"
    capability: tuple[int, int] | None  # CUDA compute capability; None if not NVIDIA's, or unknown


def current_device() -> Device:
    """The device of the current mesh, else that of `jax.default_device`, else JAX's default.

    A mesh names the kind of its devices. If this machine has such a device, its properties are
    queried; otherwise (ahead-of-time compilation) they come from `CAPABILITIES`.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is None:
        return _described(_default_device())
    for device in _local_devices(abstract.platform):
        if device.device_kind == abstract.device_kind:
            return _described(device)
    words = re.split(r"[\s-]+", abstract.device_kind)
    capability = next((CAPABILITIES[word] for word in words if word in CAPABILITIES), None)
    platform = "gpu" if abstract.platform == "cuda" else abstract.platform
    return Device(platform, abstract.device_kind, capability)


def multiprocessors() -> int:
    """Number of multiprocessors of the current GPU: an H100 PCIe has 114, an H20 78.

    A mesh names it, so none of its devices need be present. Without a mesh JAX's default device is
    asked; one that is no GPU stands for an H200, as in ahead-of-time compilation.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.num_cores or MULTIPROCESSORS
    return getattr(_default_device(), "core_count", None) or MULTIPROCESSORS


def describe(device: Device) -> str:
    """A description of a device for error messages."""
    if device.platform == "gpu" and device.capability is None:
        return f"{device.kind}, an unknown GPU (its compute capability is known where one is)"
    have = (
        "" if device.capability is None else ", compute capability {}.{}".format(*device.capability)
    )
    return f"{device.kind} ({device.platform}{have})"


def _described(device: Any) -> Device:
    found = str(getattr(device, "compute_capability", None))
    numbers = re.fullmatch(r"(\d+)\.(\d+)", found)
    if numbers is not None:
        return Device("gpu", device.device_kind, (int(numbers[1]), int(numbers[2])))
    # On AMD GPUs, which also have JAX's platform "gpu", it is a name such as gfx942.
    platform = "rocm" if found.startswith("gfx") else device.platform
    return Device(platform, device.device_kind, None)


def _default_device() -> Any:
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=chosen)[0] if isinstance(chosen, str) else chosen


def _local_devices(platform: str) -> list[Any]:
    try:
        return jax.local_devices(backend=platform)
    except RuntimeError:  # this machine has no such device
        return []
