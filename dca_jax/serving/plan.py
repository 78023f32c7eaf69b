"""`dca-jax plan --serve`: the texts that a server can hold at once, and its spare cache.

It uses the same estimates as the server (`dca_jax.serving.sizing`), from the model's shape alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from rich.filesize import decimal

from dca_jax.config import LlamaConfig
from dca_jax.dtypes import parse_cache_dtype
from dca_jax.errors import InputError
from dca_jax.planning.memory import DEVICES, DeviceKind, Job, cache_bytes, frozen_bytes
from dca_jax.products.packed import check_form
from dca_jax.serving.sizing import PAGE, SHARE, beside_bytes
from dca_jax.sharding import AXES, describe
from dca_jax.weights.kept import Kept
from dca_jax.weights.placement import check_mesh

ROWS = 32  # texts at once, the default of `dca-jax serve`
SHORTEST = 1024  # tokens of the shortest texts in the plan


@dataclass(frozen=True, kw_only=True)
class ServerPlan:
    """What fits into a server.

    Attributes:
        sizes: sizes of the mesh by axis.
        rows: maximum number of texts at once.
        context: number of tokens of the longest text.
        weights: bytes of weights per device.
        beside: bytes per device for prefill and decoding.
        page: bytes of a page.
        pages: number of pages.
    """

    model: str
    device: DeviceKind
    sizes: dict[str, int]
    rows: int
    context: int
    weights: int
    beside: int
    page: int
    pages: int

    @property
    def fits(self) -> bool:
        """Whether one text of the maximum length fits."""
        return self.pages * PAGE >= self.context

    def texts(self) -> list[dict[str, int]]:
        """Texts at once and spare tokens of the cache, for lengths from `SHORTEST` on."""
        lengths, length = [], SHORTEST
        while length < self.context:
            lengths.append(length)
            length *= 4
        found = []
        for length in (*lengths, self.context):
            each = -(-length // PAGE)
            count = min(self.rows, self.pages // each)
            found.append(
                {"tokens": length, "texts": count, "kept": (self.pages - count * each) * PAGE}
            )
        return found

    def facts(self) -> dict[str, str]:
        """Facts about the plan for users, by name, in order."""
        count = math.prod(self.sizes.values())
        told = {
            "devices": f"{count} x {self.device.name}, {describe(self.sizes)}",
            "weights": decimal(self.weights),
            "prefill and decoding": decimal(self.beside),
            "cache": f"{self.pages * PAGE:,} tokens: {self.pages:,} pages of {decimal(self.page)}",
            "fits": "yes" if self.fits else f"no: not one text of {self.context:,} tokens",
        }
        for each in self.texts() if self.fits else []:
            told[f"texts of {each['tokens']:,}"] = (
                f"{each['texts']} at once, and {each['kept']:,} cached tokens of others"
            )
        return told

    def as_json(self) -> dict[str, Any]:
        """Bytes and tokens for scripts."""
        return {
            "model": self.model,
            "device": self.device.name,
            "devices": math.prod(self.sizes.values()),
            "rows": self.rows,
            "context_length": self.context,
            "bytes": {"weights": self.weights, "beside": self.beside, "page": self.page},
            "memory": self.device.memory,
            "pages": self.pages,
            "cache_tokens": self.pages * PAGE,
            "fits": self.fits,
            "texts": self.texts(),
        }


def plan_server(
    model: str,
    config: LlamaConfig,
    *,
    device: str,
    mesh: Mapping[str, int] | None,
    context: int,
    rows: int = ROWS,
    dtype: DTypeLike = jnp.bfloat16,
    weights: str | None = None,
    kept: Mapping[str, Kept] | None = None,
    cache_dtype: DTypeLike | None = None,
) -> ServerPlan:
    """Estimates what fits into a server.

    Args:
        model: name of the model, for the plan only.
        device: one of `DEVICES`.
        mesh: sizes by axis; a server supports only `tensor`. None uses the fewest devices of one
            island that hold a text.
        context: number of tokens of the longest text, answer included.
        rows: maximum number of texts at once.
        dtype: dtype of weights and activations.
        weights, kept, cache_dtype: as in `dca_jax.planning.plan.plan`.

    Raises:
        InputError: an unknown device, a mesh of other axes, or a number that is not positive.
    """
    if device not in DEVICES:
        raise InputError(f"device {device!r} is not known; expected one of {', '.join(DEVICES)}")
    if context < 2 or rows < 1:
        raise InputError(
            f"a server needs a context of at least 2 tokens and at least 1 text, got {context} and "
            f"{rows}"
        )
    check_form(weights)
    stored = parse_cache_dtype(dtype if cache_dtype is None else cache_dtype)
    kind, width = DEVICES[device], jnp.dtype(dtype)
    job = Job(
        config=config,
        device=kind,
        context_length=PAGE,
        batch=1,
        train=False,
        dtype=width,
        lora=None,
        weights=weights,
        kept=kept or {},
        remat="attention",
        state=jnp.dtype(jnp.float32),
        cache_dtype=stored,
        sparse=None,
    )

    def planned(tensor: int) -> ServerPlan:
        sizes = dict.fromkeys(AXES, 1) | {"tensor": tensor}
        check_mesh(config, sizes)
        held, page = frozen_bytes(job, sizes), cache_bytes(job, sizes)
        beside = beside_bytes(config, context=context, rows=rows, dtype=width)
        links = kind.links if tensor > 1 else 0
        free = kind.memory - held - kind.runtime - links
        return ServerPlan(
            model=model,
            device=kind,
            sizes=sizes,
            rows=rows,
            context=context,
            weights=held,
            beside=beside,
            page=page,
            pages=max(0, int((SHARE * free - beside) // page)),
        )

    if mesh is not None:
        others = {axis: size for axis, size in mesh.items() if axis != "tensor" and size > 1}
        if others:
            raise InputError(
                f"a server shares its model by tensor only, and this mesh has {describe(others)}; "
                "use tensor, or a server for each device"
            )
        return planned(mesh.get("tensor", 1))
    found = planned(1)
    for tensor in (2, 4, 8):
        if found.fits or tensor > kind.island or config.num_key_value_heads % tensor:
            break
        found = planned(tensor)
    return found
