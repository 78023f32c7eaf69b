"""`dca-jax plan`: whether a model fits a mesh, the longest texts, and the best mesh.

Memory is estimated in `dca_jax.planning.memory` from shapes alone.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from rich.filesize import decimal

from dca_jax.attention.sparse import Sparse
from dca_jax.config import LlamaConfig, LoraConfig, axis_sizes
from dca_jax.dtypes import cache_dtype_name, parse_cache_dtype
from dca_jax.errors import InputError
from dca_jax.memory import GPU_SHARE
from dca_jax.model import REMAT
from dca_jax.planning.memory import DEVICES, DeviceKind, Job, Usage, active_bytes
from dca_jax.products.packed import check_form
from dca_jax.sharding import AXES, describe
from dca_jax.weights.kept import Kept
from dca_jax.weights.parameters import parameters
from dca_jax.weights.placement import check_mesh, cut_by_fsdp, cut_by_tensor

MOST_DEVICES = 1024  # largest recommended mesh


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The result of `plan`.

    Attributes:
        sizes: sizes of the mesh by axis.
        active: bytes of weights that generating a token reads on each device, for a mixture of
            experts; None for other models and in training.
        fits: whether it fits into the device's memory.
        longest: largest number of tokens per text that fits; 0 if none does.
        recommended: the best mesh for the same number of devices; None if none suffices.
        why: the reason for it.
        fewest: the best mesh with the fewest devices (a power of two); None beyond `MOST_DEVICES`.
    """

    model: str
    device: DeviceKind
    sizes: dict[str, int]
    batch: int
    context_length: int
    train: bool
    lora: LoraConfig | None
    weights: str | None
    remat: str
    state: str
    cache_dtype: str
    sparse: Sparse | None
    usage: Usage
    active: int | None
    fits: bool
    longest: int
    recommended: dict[str, int] | None
    why: str
    fewest: dict[str, int] | None

    @property
    def fraction(self) -> float | None:
        """The required `XLA_CLIENT_MEM_FRACTION`, if JAX's default is too small.

        Commands set it to `dca_jax.memory.GPU_SHARE`; your own script must set it itself.
        """
        device, total = self.device, self.usage.total
        if not self.fits or total <= device.share * device.memory:
            return None
        return math.ceil(100 * GPU_SHARE * total / device.memory) / 100

    def facts(self) -> dict[str, str]:
        """Facts about the plan for users, by name, in order."""
        device, usage, count = self.device, self.usage, math.prod(self.sizes.values())
        told = (
            ""
            if self.fraction is None
            else f" (in a script, with XLA_CLIENT_MEM_FRACTION={self.fraction})"
        )
        verdict = f"yes{told}" if self.fits else "no"
        if self.recommended is None:
            advice = f"none: {self.why}"
        else:
            advice = f"{written(self.recommended)}: {self.why}"
        if self.fewest is not None and math.prod(self.fewest.values()) < count:
            advice += f"; {written(self.fewest)} would do"
        elif self.recommended is None and self.fewest is not None:
            advice += f"; {written(self.fewest)} is"
        purpose = "to train on" if self.train else "including those generated"
        if self.lora is not None:
            purpose = f"to train adapters of rank {self.lora.rank} on"
        purpose += "" if self.weights is None else f", over {self.weights} weights"
        kept = {"kept per layer": self.remat, "state": self.state} if self.train else {}
        if self.cache_dtype in ("int8", "fp8"):
            kept["KV cache"] = f"in {self.cache_dtype}"
        if self.sparse is not None:
            kept["prompts"] = f"read by {self.sparse.told(self.context_length)}"
        parts = {name: decimal(size) for name, size in asdict(usage).items() if size}
        return {
            "devices": f"{count} x {device.name}, {describe(self.sizes)}",
            "texts": f"{self.batch} of {self.context_length:,} tokens, {purpose}",
            **kept,
            **parts,
            **({} if self.active is None else {"weights read per token": decimal(self.active)}),
            "total per device": f"{decimal(usage.total)} of {decimal(device.memory)}",
            "fits": verdict,
            "longest that fits": f"{self.longest:,} tokens" if self.longest else "none",
            "recommended mesh": advice,
        }

    def as_json(self) -> dict[str, Any]:
        """Bytes, tokens and meshes (in the form of `--mesh`) for scripts."""
        meshes = {"recommended": self.recommended, "fewest": self.fewest}
        return {
            "model": self.model,
            "device": self.device.name,
            "mesh": written(self.sizes),
            "devices": math.prod(self.sizes.values()),
            "batch": self.batch,
            "context_length": self.context_length,
            "train": self.train,
            "lora_rank": self.lora and self.lora.rank,
            "weights": self.weights,
            "remat": self.remat if self.train else None,
            "state": self.state if self.train else None,
            "cache_dtype": None if self.train else self.cache_dtype,
            "sparse": self.sparse and self.sparse.selector.name,
            "share_read": self.sparse and self.sparse.share(self.context_length),
            "bytes": asdict(self.usage) | {"total": self.usage.total},
            "active_weights": self.active,
            "memory": self.device.memory,
            "fits": self.fits,
            "mem_fraction": self.fraction,
            "longest_context": self.longest,
            **{name: sizes and written(sizes) for name, sizes in meshes.items()},
            "why": self.why,
        }


def plan(
    model: str,
    config: LlamaConfig,
    *,
    device: str,
    mesh: Mapping[str, int] | None,
    context_length: int,
    batch: int = 1,
    train: bool = False,
    dtype: DTypeLike = jnp.bfloat16,
    lora: LoraConfig | None = None,
    weights: str | None = None,
    kept: Mapping[str, Kept] | None = None,
    remat: str = "attention",
    state: DTypeLike = jnp.float32,
    cache_dtype: DTypeLike | None = None,
    sparse: Sparse | None = None,
) -> Plan:
    """Estimates the memory of a task.

    Args:
        model: name of the model, for the plan only.
        device: one of `DEVICES`.
        mesh: sizes by axis (`dca_jax.sharding.parse_mesh`); None uses the fewest devices that
            suffice.
        context_length: number of tokens of each text, including new ones.
        batch: number of texts at once.
        train: whether to train instead of generating.
        dtype: dtype of activations and of weights that are not trained.
        lora: adapters to train instead of all weights.
        weights: a form of `dca_jax.products.packed.FORMS` for all matrices or, with `lora`, for the
            kernels of the layers.
        kept: forms of weights that stay packed, by path (`dca_jax.weights.folder.kept_forms`).
        remat: what training saves per layer, a key of `dca_jax.model.REMAT`.
        state: dtype of trained weights, gradients and moments.
        cache_dtype: dtype of the KV cache, as in `dca_jax.load` (default: `dtype`).
        sparse: sparse prefill setting; None for dense prefill.

    Raises:
        InputError: an unknown device or `remat`; a mesh that does not divide the model or the
            batch; no mesh given and none that suffices; `lora` without `train`; packed weights that
            are trained; or a `cache_dtype` in training, which has no cache.
    """
    if device not in DEVICES:
        raise InputError(f"device {device!r} is not known; expected one of {', '.join(DEVICES)}")
    if remat not in REMAT:
        raise InputError(f"remat {remat!r} is not known; expected one of {', '.join(REMAT)}")
    if context_length < 1 or batch < 1:
        raise InputError(
            f"the context length and the batch must be at least 1, got {context_length} and {batch}"
        )
    check_form(weights)
    if lora is not None and not train:
        raise InputError("LoRA is a way to train")
    if weights is not None and train and lora is None:
        raise InputError(
            f"weights that are trained are not packed in {weights}: it is for generation, and for "
            "the base of LoRA"
        )
    if train and cache_dtype is not None:
        raise InputError("training has no KV cache; leave out the cache dtype")
    cached = parse_cache_dtype(dtype if cache_dtype is None else cache_dtype)
    kept = {} if kept is None or (train and lora is None) else kept
    names = {
        kept[row.path].name(row, row.inner(row.shape(config)))
        for row in parameters(config)
        if row.path in kept
    }
    job = Job(
        config=config,
        device=DEVICES[device],
        context_length=context_length,
        batch=batch,
        train=train,
        dtype=jnp.dtype(dtype),
        lora=lora,
        weights=weights,
        kept=kept,
        remat=remat,
        state=jnp.dtype(state),
        cache_dtype=cached,
        sparse=sparse,
    )
    fewest = _fewest(job)
    if mesh is None and fewest is None:
        raise InputError(
            f"{model} with {batch} x {context_length} tokens fits no mesh of up to {MOST_DEVICES} "
            f"devices of kind {device}; give a shorter context or a smaller batch, or a --mesh to "
            "see what it takes"
        )
    sizes = dict.fromkeys(AXES, 1) | dict(mesh or fewest or {})
    check_mesh(config, sizes)
    rows = sizes["data"] * sizes["fsdp"]
    if train and batch % rows:
        raise InputError(
            f"data times fsdp is {rows} devices, which do not divide the batch of {batch} texts; "
            "give a batch that is a multiple, or split the texts by context instead"
        )
    recommended = recommend(job, math.prod(sizes.values()))
    return Plan(
        model=model,
        device=job.device,
        sizes=sizes,
        batch=batch,
        context_length=context_length,
        train=train,
        lora=lora,
        weights=weights or ", ".join(sorted(names)) or None,
        remat=remat,
        state=jnp.dtype(state).name,
        cache_dtype=cache_dtype_name(cached),
        sparse=sparse,
        usage=job.usage(sizes),
        active=None if train or config.mixture is None else active_bytes(job, sizes),
        fits=job.fits(sizes),
        longest=job.longest(sizes),
        recommended=recommended,
        why=_why(job, recommended),
        fewest=fewest,
    )


def written(sizes: Mapping[str, int]) -> str:
    """The mesh in the form of `--mesh`."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "tensor=1"


# --- which mesh --------------------------------------------------------------------------------


def recommend(job: Job, count: int) -> dict[str, int] | None:
    """The best mesh of `count` devices that the job fits into, or None.

    For generation: `tensor`, which splits the weights, the cache and the work of every token,
    within an island and up to one kv head per device; then `data` as far as it divides the batch;
    then `context`. More than one device per kv head only if nothing else fits; never `fsdp`,
    because every token would gather the weights.

    For training: `fsdp` as far as it divides the batch, because it also splits the optimizer and
    moves the least data; then `tensor`, then `context`.
    """
    kv_heads, island = job.config.num_key_value_heads, job.device.island

    def order(sizes: dict[str, int]) -> tuple[Any, ...]:
        data, fsdp, _, tensor = sizes.values()
        within = tensor <= min(kv_heads, island)
        narrow = (not within, -tensor if within else tensor)
        return (-fsdp, *narrow, -data) if job.train else (*narrow, -data)

    fitting = (sizes for sizes in _meshes(job, count) if job.fits(sizes))
    return min(fitting, key=order, default=None)


def _meshes(job: Job, count: int) -> Iterator[dict[str, int]]:
    """Every mesh of `count` devices that divides the model and the batch."""
    found = axis_sizes(job.config)
    for tensor in _divisors(count):
        if any(found[letter] % tensor for letter in cut_by_tensor(job.config)):
            continue
        if found["K"] % tensor and tensor % found["K"]:
            continue
        for rows in _divisors(math.gcd(count // tensor, job.batch)):
            context = count // tensor // rows
            for fsdp in _divisors(rows) if job.train else [1]:
                if all(found[letter] % fsdp == 0 for letter in cut_by_fsdp(job.config)):
                    sizes = (rows // fsdp, fsdp, context, tensor)
                    yield dict(zip(AXES, sizes, strict=True))


def _fewest(job: Job) -> dict[str, int] | None:
    """The recommended mesh with the smallest sufficient number of devices, a power of two."""
    counts = (2**n for n in range(MOST_DEVICES.bit_length()))
    return next(filter(None, (recommend(job, count) for count in counts)), None)


def _why(job: Job, sizes: dict[str, int] | None) -> str:
    """The reason for a recommended mesh, in one line."""
    if sizes is None:
        return "no mesh of this size suffices"
    reasons = {
        "data": "splits the batch, whose texts are independent",
        "fsdp": "splits weights, gradients, optimizer and batch",
        "context": "splits the texts over the remaining devices",
        "tensor": "splits weights, heads and cache where links are fast",
    }
    if sizes["tensor"] > job.config.num_key_value_heads:
        reasons["tensor"] = "splits the weights, which do not fit with one device per kv head"
    parts = [f"{axis}={size} {reasons[axis]}" for axis, size in sizes.items() if size > 1]
    return "; ".join(reversed(parts)) or f"{describe(sizes)} suffices, without communication"


def _divisors(n: int) -> list[int]:
    return [size for size in range(1, n + 1) if n % size == 0]
