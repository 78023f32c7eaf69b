"""Compiling for an absent GPU, as far as the kernels' own compiler goes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.mesh import AbstractDevice

from dca_jax.attention.backend import Backend, Rows
from dca_jax.attention.bands import Method
from dca_jax.dca import DCAConfig, Phase


def device(kind: str) -> Any:
    """A context in which JAX compiles for `kind`, such as "NVIDIA H200"."""
    abstract = AbstractDevice(device_kind=kind, num_cores=132, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=abstract)
    return jax.sharding.use_abstract_mesh(mesh)


def lower(function: Callable[..., Any], *shapes: Any, kind: str = "NVIDIA H200") -> str:
    """The lowered program's text; raises what the kernel's compiler does."""
    with device(kind):
        return jax.export.export(jax.jit(function), platforms=["cuda"])(*shapes).mlir_module()


def shapes(
    batch: int, num_queries: int, num_keys: int, heads: int, kv_heads: int, dim: int, dtype: Any
) -> tuple[Any, ...]:
    """query, key, value, layer and rows of a cache of two layers, as shapes."""
    query = jax.ShapeDtypeStruct((batch, num_queries, heads, dim), dtype)
    cache = jax.ShapeDtypeStruct((2, batch, num_keys, kv_heads, dim), dtype)
    number = jax.ShapeDtypeStruct((batch,), jnp.int32)
    rows = Rows(
        inv_freq=jax.ShapeDtypeStruct((1, dim // 2), jnp.float32),
        scale=jax.ShapeDtypeStruct((batch,), jnp.float32),
        offset=number,
        lengths=number,
        key_offset=number,
        whole=number,
    )
    return query, cache, cache, jax.ShapeDtypeStruct((), jnp.int32), rows


def lower_forward(
    backend: Backend,
    shapes: tuple[Any, ...],
    dca: Method,
    phases: tuple[Phase, ...],
    *,
    with_lse: bool = True,
    kind: str = "NVIDIA H200",
) -> str:
    def forward(*arrays: Any) -> Any:
        options: Any = {"dca": dca, "phases": phases, "with_lse": with_lse}
        return backend.forward(*arrays, **options)

    return lower(forward, *shapes, kind=kind)


def lower_backward(
    backend: Backend, shapes: tuple[Any, ...], dca: DCAConfig, phases: tuple[Phase, ...]
) -> str:
    def backward(*arrays: Any) -> Any:
        return backend.backward(*arrays, dca=dca, phases=phases)

    query = shapes[0]
    lse = jax.ShapeDtypeStruct((query.shape[0], query.shape[2], query.shape[1]), jnp.float32)
    return lower(backward, *shapes, query, lse, lse)
