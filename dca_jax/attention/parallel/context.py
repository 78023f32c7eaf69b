"""Context parallelism: one long text split over the devices along the mesh axis `context`.

Device c of C holds the queries and keys of blocks c and 2C - 1 - c of the text's 2C blocks
(`dca_jax.attention.parallel.zigzag`). Keys are sent rotated, because their rotation depends only on
their own index; queries are unrotated and stay. Each kernel call combines one block of queries with
one range of keys, and gets the text indices where both begin (`Rows.offset`, `Rows.key_offset`),
from which the kernel derives DCA's phases as usual. The outputs of several calls are merged by
log-sum-exp, so the result is that of one softmax over the whole text.

    ring_attention    (in the module `ring`) prefill, evaluation, training: keys are sent around
    decode_attention  few queries over a cache that is split like a text: keys are not sent

Gradient. The ring has one custom_vjp around the whole. It saves this device's q, k, v, out and the
*global* log-sum-exp, with which the flash backward of each pair of blocks is exact on its own (see
`dca_jax.attention.op`). `rows` has no gradient.

Both run inside `jax.shard_map` over the whole mesh with `check_vma=False`. With `check_vma=True`
JAX 0.11.2 refuses a Pallas kernel whose outputs do not say over which mesh axes they vary
(`manual_axis_type`), refuses the kernel's body in interpret mode even if they do say, and refuses
a loop that starts from a constant, as those of the `xla` backend do.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from dca_jax.attention.backend import PLAIN, Rows
from dca_jax.attention.op import BACKENDS, choose_implementation
from dca_jax.attention.parallel.zigzag import AXIS, block_of, half_width, to_halves
from dca_jax.attention.softmax import output_delta
from dca_jax.attention.stored import Scales
from dca_jax.dca import DCAConfig, Phase, phases_within
from dca_jax.errors import InputError

EARLY, LATE = 0, 1  # a device's two blocks


def decode_attention(
    query: Float[Array, "B T N H"],
    key: Num[Array, "L B S K H"],
    value: Num[Array, "L B S K H"],
    layer: Int[Array, ""],
    rows: Rows,
    *,
    dca: DCAConfig | None,
    implementation: str | None = None,
    axis_name: str = AXIS,
    scales: Scales | None = None,
) -> Float[Array, "B T N H"]:
    """Few queries over a KV cache split in zigzag order: one token each, or the next chat turn.

    Every device has all the queries and attends to its own keys in one kernel call, with its two
    blocks as two rows; the results are merged by log-sum-exp (arXiv 2408.04093). Devices exchange a
    maximum of B N T and a sum of B T N (H + 1) float32 numbers, but no keys. It is for inference
    and has no gradient.

    Args:
        query: unrotated, the same on every device of the axis; any T.
        key, value: this device's part of all layers of a cache whose C * S slots are text indices
            in zigzag order; keys are rotated.
        layer: index of the layer to read.
        rows: as in `dca_jax.attention.attend` for the whole cache: `offset` is the text index of
            the first query, `lengths` include the queries. `key_offset` is ignored.
        dca, implementation, axis_name: as in `ring_attention`.
        scales: scales of 8-bit keys and values; the device's two blocks are separate rows.

    Returns:
        [B, T, N, H] in the dtype of `query`, the same on every device of the axis.

    Raises:
        InputError: an odd S, or an implementation that cannot run.
    """
    size, device = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    num_layers, batch, num_slots, kv_heads, head_dim = key.shape
    width = half_width(num_slots)
    as_rows = (num_layers, 2 * batch, width, kv_heads, head_dim)  # a view, without a copy
    keys, twice = (key.reshape(as_rows), value.reshape(as_rows)), jnp.repeat(query, 2, axis=0)
    kernel = Kernel.choose(
        implementation,
        jax.ShapeDtypeStruct(twice.shape, twice.dtype),
        jax.ShapeDtypeStruct(as_rows, key.dtype),
        dca,
        num_keys=size * num_slots,
        axis_name=axis_name,
    )
    begins = [block_of(device, half, size) * width for half in (EARLY, LATE)]
    rows = for_each_row(rows, lambda x: jnp.repeat(x, 2, axis=0), batch)
    rows = rows._replace(key_offset=jnp.tile(jnp.stack(begins), batch))
    out, lse = kernel.forward(twice, keys, layer, rows, scales)

    out = out.astype(lse.dtype).reshape(batch, 2, *query.shape[1:])
    lse = lse.reshape(batch, 2, *lse.shape[1:])
    m_max = jax.lax.pmax(lse.max(axis=1), axis_name)
    m_max = jnp.where(jnp.isfinite(m_max), m_max, 0)  # padding has no keys anywhere
    weight = jnp.swapaxes(jnp.exp(lse - m_max[:, None]), 2, 3)[..., None]
    sums = jnp.sum(weight * out, axis=1), jnp.sum(weight, axis=1)
    total, weights = jax.lax.psum(sums, axis_name)
    return (total / jnp.where(weights > 0, weights, 1)).astype(query.dtype)


# --- one kernel call ---------------------------------------------------------------------------


class OfOut(NamedTuple):
    """Inputs of the backward pass from an output over all its keys on all devices."""

    do: Float[Array, "*block T N H"]
    lse: Float[Array, "*block N T"]
    delta: Float[Array, "*block N T"]  # rowsum(dO * O)

    @classmethod
    def of_halves(cls, do: Array, out: Array, lse: Float[Array, "2 B N h"]) -> "OfOut":
        """From do and out [B,t,N,H] of a device, with its two blocks separated: [2, B, ..]."""
        do, out = to_halves(do), to_halves(out)
        return cls(do, lse, output_delta(do, out, lse.dtype))


class Kernel(NamedTuple):
    """The backend with all static arguments of its calls (hashable, for `custom_vjp`).

    Its two calls are separate jitted functions, so that a program with many calls of the same
    shape, such as a ring, builds the kernel only once.
    """

    name: str
    dca: DCAConfig
    phases: tuple[Phase, ...]
    axis_name: str

    @classmethod
    def choose(
        cls,
        implementation: str | None,
        query: jax.ShapeDtypeStruct,
        key: jax.ShapeDtypeStruct,
        dca: DCAConfig | None,
        *,
        num_keys: int,
        axis_name: str,
    ) -> "Kernel":
        """Chooses the backend for calls with these shapes, on texts of up to `num_keys` tokens."""
        dca = dca or PLAIN
        name = choose_implementation(implementation, query, key, dca)
        if name == "reference":
            raise InputError(
                "implementation 'reference' needs whole texts and cannot split one over devices; "
                f"expected one of {', '.join(BACKENDS)}, or None"
            )
        return cls(name, dca, phases_within(num_keys, dca), axis_name)

    @functools.partial(jax.jit, static_argnums=0)
    def forward(
        self,
        query: Float[Array, "B T N H"],
        keys: tuple[Num[Array, "L B S K H"], Num[Array, "L B S K H"]],
        layer: Int[Array, ""],
        rows: Rows,
        scales: Scales | None = None,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
        """Output and log-sum-exp over a layer of `keys`, a pair of keys and values."""
        options = {"dca": self.dca, "phases": self.phases, "with_lse": True, "scales": scales}
        out, lse = BACKENDS[self.name].forward(query, *keys, layer, rows, **options)
        assert lse is not None  # it was asked for
        return out, lse

    @functools.partial(jax.jit, static_argnums=0)
    def backward(
        self,
        query: Float[Array, "B T N H"],
        keys: tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]],
        layer: Int[Array, ""],
        rows: Rows,
        of_out: OfOut,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Gradients of query, key and value, to be summed with others: in the dtype of `lse`."""
        dtype = of_out.lse.dtype
        dq, dk, dv = BACKENDS[self.name].backward(
            query, *keys, layer, rows, *of_out, dca=self.dca, phases=self.phases
        )
        return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype)


def for_each_row(rows: Rows, repeat: Callable[[Array], Array], batch: int) -> Rows:
    """`rows` with more rows; frequencies common to a batch stay common."""
    one_for_all = rows.inv_freq.shape[0] == 1 < batch
    inv_freq = rows.inv_freq if one_for_all else repeat(rows.inv_freq)
    return Rows(*(repeat(x) for x in rows))._replace(inv_freq=inv_freq)


def rows_at(rows: Rows, offset: Int[Array, ""], key_offset: Int[Array, ""]) -> Rows:
    """`rows` with their queries and their keys beginning at these text indices."""
    zero = jnp.zeros_like(rows.lengths)
    return rows._replace(offset=zero + offset, key_offset=zero + key_offset)
