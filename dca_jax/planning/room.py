"""Checks whether a job fits into the devices' free memory, before weights are read.

The required memory is estimated by `dca_jax.planning.memory`, as in `dca-jax plan`; the free memory
is queried from the devices (`dca_jax.memory`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dca_jax.attention.sparse import Sparse
from dca_jax.config import LlamaConfig, LoraConfig
from dca_jax.dtypes import parse_cache_dtype
from dca_jax.errors import InputError
from dca_jax.memory import free_bytes
from dca_jax.planning.memory import FLOAT32, GIB, DeviceKind, Job
from dca_jax.sharding import AXES, axis_size
from dca_jax.weights.kept import Kept

# Estimates were within 7 % of measured peaks, so a job that exceeds memory by less may still run.
TOLERANCE = 1.07


def check_room(
    config: LlamaConfig,
    mesh: Mesh | None,
    *,
    context_length: int,
    batch: int,
    dtype: DTypeLike,
    train: bool = False,
    lora: LoraConfig | None = None,
    weights: str | None = None,
    kept: Mapping[str, Kept] | None = None,
    remat: str = "attention",
    state: DTypeLike = FLOAT32,
    cache_dtype: DTypeLike | None = None,
    sparse: Sparse | None = None,
) -> None:
    """Refuses a job that cannot fit, and names lengths and batches that would.

    The arguments are those of `dca_jax.planning.plan.plan`, except `mesh`: the devices' mesh; None
    is the first device.

    Raises:
        InputError: the job needs more than the free memory. Never if that is unknown.
    """
    device = device_at_hand(mesh)
    if device is None:
        return
    sizes = {axis: axis_size(mesh, axis) for axis in AXES}
    job = Job(
        config=config,
        device=device,
        context_length=context_length,
        batch=batch,
        train=train,
        dtype=jnp.dtype(dtype),
        lora=lora,
        weights=weights,
        kept=kept or {},
        remat=remat,
        state=jnp.dtype(state),
        cache_dtype=None if cache_dtype is None else parse_cache_dtype(cache_dtype),
        sparse=sparse,
    )
    if job.usage(sizes).total > TOLERANCE * device.memory:
        raise InputError(_refusal(job, sizes))


def device_at_hand(mesh: Mesh | None) -> DeviceKind | None:
    """The kind of this process's devices, with the least free memory of any; None if unknown."""
    devices: list[Any] = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    free = [bytes for bytes in map(free_bytes, devices) if bytes is not None]
    if len(free) < len(devices):
        return None
    # All CPU devices share one machine.
    memory = min(free) // (len(devices) if devices[0].platform == "cpu" else 1)
    return DeviceKind(
        devices[0].device_kind, devices[0].platform, memory, len(devices), runtime=0, links=0
    )


def _refusal(job: Job, sizes: dict[str, int]) -> str:
    usage, free, longest = job.usage(sizes), job.device.memory, job.longest(sizes)
    task = "training on" if job.train else "reading"
    if job.train:
        parts = {
            "weights, gradients and optimizer": usage.weights + usage.gradients + usage.optimizer,
            "activations": usage.activations,
        }
        advice = "a shorter length, a smaller batch, state bfloat16, LoRA, or a mesh with fsdp"
    else:
        parts = {"weights": usage.weights, "KV cache": usage.cache}
        advice = "less at once, bfloat16, packed weights, or a mesh of more devices"
    told = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    needed = (
        f"{task} {job.batch} x {job.context_length} tokens takes {usage.total / GIB:.1f} GiB of "
        f"each device ({told}), but only {free / GIB:.1f} GiB are free"
    )
    if not longest:
        return f"{needed}: not even one token fits; choose {advice}, or a smaller model"
    fitting = [f"{job.batch} x {longest}"]
    rows = _largest_batch(job, sizes)
    if rows:
        fitting.append(f"{rows} x {job.context_length}")
    new = "" if job.train else ", new ones included"
    return f"{needed}: {' or '.join(fitting)} tokens fit{new}; choose {advice}"


def _largest_batch(job: Job, sizes: dict[str, int]) -> int:
    """The largest smaller batch of this length that fits and divides over the mesh; 0 if none."""
    step = sizes["data"] * sizes["fsdp"]
    low, high = 0, (job.batch - 1) // step
    while low < high:  # more rows never take less
        middle = (low + high + 1) // 2
        fits = replace(job, batch=middle * step).fits(sizes)
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * step
