"""Shared by the tests of all backends' kernels: inputs, and the dense oracle."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dca_jax.attention import merge_passes
from dca_jax.attention.backend import Backend, Rows
from dca_jax.attention.op import BACKENDS
from dca_jax.attention.softmax import output_delta
from dca_jax.dca import PHASES, DCAConfig
from dca_jax.device import current_device
from dca_jax.rope import RopeConfig

ROPE = RopeConfig()

# For large programs that run once: most of the time goes into compiling them.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def draw(
    seed: int,
    batch: int,
    num_queries: int,
    num_keys: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and value."""
    rng = np.random.default_rng(seed)
    shapes = (num_queries, heads), (num_keys, kv_heads), (num_keys, kv_heads)
    q, k, v = (rng.normal(size=(batch, n, h, dim)) for n, h in shapes)
    return jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype)


def runs_here(name: str, head_dim: int) -> None:
    """Skips where the kernel says that it cannot run."""
    query = jax.ShapeDtypeStruct((1, 512, 4, head_dim), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 1, 4096, 2, head_dim), jnp.bfloat16)
    reason = BACKENDS[name].unsupported(current_device(), query, key, DCAConfig.paper(512))
    if reason is not None:
        pytest.skip(reason)


def with_gradients(attention: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
    """Compiled: attention(*inputs), and the gradients of its randomly weighted sum."""

    @partial(jax.jit, compiler_options=QUICK)
    def run(*inputs: jax.Array) -> list[jax.Array]:
        out, pull_back = jax.vjp(attention, *inputs)
        return [out, *pull_back(weight_of(out).astype(out.dtype))]

    return run


def weight_of(out: jax.Array) -> jax.Array:
    """The weights in the sum of these outputs."""
    return jnp.asarray(np.random.default_rng(9).normal(size=out.shape), jnp.float32)


def attend_by_slices(
    backend: Backend,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    do: jax.Array,
    *,
    cuts: Sequence[int],
    dca: DCAConfig,
    rows: Rows,
) -> list[jax.Array]:
    """Output and gradients of query, rotated key and value, with each slice of keys on its own.

    Like devices that share a text: outputs are merged by log-sum-exp; then each slice's backward
    pass uses the global log-sum-exp and delta, query gradients are summed and key gradients
    concatenated.
    """
    options: dict[str, Any] = {"dca": dca, "phases": PHASES}
    layer, batch = jnp.int32(0), query.shape[0]
    slices = [
        (key[None, :, begin:end], value[None, :, begin:end], jnp.full(batch, begin, jnp.int32))
        for begin, end in zip([0, *cuts], [*cuts, key.shape[1]], strict=True)
    ]
    parts = []
    for keys, values, begin in slices:
        at = rows._replace(key_offset=begin)
        parts.append(backend.forward(query, keys, values, layer, at, with_lse=True, **options))
    wide = [out.astype(jnp.float32) for out, _ in parts]
    out, lse = merge_passes(wide, [lse for _, lse in parts])
    delta = output_delta(do, out, jnp.dtype(jnp.float32))
    gradients = []
    for keys, values, begin in slices:
        at = rows._replace(key_offset=begin)
        gradients.append(
            backend.backward(query, keys, values, layer, at, do, lse, delta, **options)
        )
    dqs, dks, dvs = zip(*gradients, strict=True)
    dq = jnp.sum(jnp.stack([x.astype(jnp.float32) for x in dqs]), axis=0)
    return [out, dq, jnp.concatenate(dks, 1), jnp.concatenate(dvs, 1)]
