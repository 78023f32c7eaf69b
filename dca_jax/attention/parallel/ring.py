"""Ring attention: keys and values circulate, so no device ever holds those of the whole text.

`dca_jax.attention.parallel.context` describes the layout, the forms, and when to use which.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dca_jax.attention.backend import SAVED, Rows
from dca_jax.attention.parallel.context import EARLY, LATE, Kernel, OfOut, for_each_row, rows_at
from dca_jax.attention.parallel.zigzag import AXIS, block_of, from_halves, half_width, to_halves
from dca_jax.attention.softmax import merge_passes
from dca_jax.dca import DCAConfig

Half = int | Int[Array, ""]  # EARLY or LATE
Keys = tuple[Float[Array, "2 B h K H"], Float[Array, "2 B h K H"]]  # keys and values


def ring_attention(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B t K H"],
    value: Float[Array, "B t K H"],
    rows: Rows,
    *,
    dca: DCAConfig | None,
    implementation: str | None = None,
    axis_name: str = AXIS,
) -> Float[Array, "B t N H"]:
    """Causal DCA over whole texts in zigzag; keys and values go around a ring (arXiv 2310.01889).

    In each of C steps every device computes two pairs of blocks, so the work is equal. The next
    keys are transferred during a step, which hides the transfer if a step (8 h^2 N H FLOPs for
    blocks of h tokens) takes longer than sending 4 h K H elements. A device holds its own share of
    the keys and two more in transit, for any C, so this form suits long texts.

    Args:
        query: raw queries: this device's t = T / C tokens of each text, in zigzag. Hopper's kernels
            read keys in place if t is a multiple of 16, and otherwise copy a block per call.
        key: keys rotated to their text index (`rotate_keys` at `zigzag_positions`).
        value: values.
        rows: the rows of the whole texts: `lengths` up to T, ragged or not. A text starts at index
            0; `offset` and `key_offset` are not used.
        dca: DCA setting, or None for plain causal attention.
        implementation: a backend (`dca_jax.attention.op.BACKENDS`), or None for the best.
        axis_name: the mesh axis over which texts are split.

    Returns:
        [B, t, N, H] in the dtype of `query`, zeros for padding; exactly differentiable in query,
        key and value. Partial results and gradients are summed in float32 (float64 for float64).

    Raises:
        InputError: t is odd, or the implementation cannot run.
    """
    batch, num_local, kv_heads, head_dim = key.shape
    width = half_width(num_local)
    blocks = jax.ShapeDtypeStruct((2, batch, width, kv_heads, head_dim), key.dtype)
    block = jax.ShapeDtypeStruct((batch, width, *query.shape[2:]), query.dtype)
    num_keys = num_local * jax.lax.axis_size(axis_name)
    kernel = Kernel.choose(
        implementation, block, blocks, dca, num_keys=num_keys, axis_name=axis_name
    )
    return _ring(kernel, query, key, value, rows)


# --- the ring ----------------------------------------------------------------------------------
#
# In this section a device's two blocks are separate, [2, B, h, ..]. For a kernel they are two
# layers of keys, of which it reads one in place, or, flattened, 2B rows.


class _Ring(NamedTuple):
    """One device's place in the ring, and its queries."""

    kernel: Kernel
    query: Float[Array, "2 B h N H"]
    per_row: Rows
    size: int
    device: Int[Array, ""]

    @classmethod
    def here(cls, kernel: Kernel, query: Float[Array, "B t N H"], rows: Rows) -> "_Ring":
        axis = kernel.axis_name
        device = jax.lax.axis_index(axis)
        return cls(kernel, to_halves(query), rows, jax.lax.axis_size(axis), device)

    def to_next(self, x: tuple[Array, ...]) -> tuple[Array, ...]:
        hops = [(device, (device + 1) % self.size) for device in range(self.size)]
        return tuple(jax.lax.ppermute(a, self.kernel.axis_name, hops) for a in x)

    def begin(self, device: Array, half: Half) -> Array:
        """Text index of the first token of a device's block."""
        return block_of(device, half, self.size) * self.query.shape[2]

    def rows_of_pair(self, mine: Half, sender: Array, theirs: Half) -> Rows:
        return rows_at(self.per_row, self.begin(self.device, mine), self.begin(sender, theirs))

    def own_blocks(self, keys: Keys) -> tuple[tuple[Array, tuple[Array, Array]], Rows]:
        """Both blocks of queries and of keys as 2B rows, for one causal kernel call."""
        batch = self.query.shape[1]
        begins = jnp.stack([self.begin(self.device, half) for half in (EARLY, LATE)])
        begins = jnp.repeat(begins, batch)
        rows = for_each_row(self.per_row, lambda x: jnp.concatenate([x, x]), batch)
        layer = _as_rows(keys[0])[None], _as_rows(keys[1])[None]
        at = rows._replace(offset=begins, key_offset=begins)
        return (_as_rows(self.query), layer), at

    def go_around(
        self,
        keys: Keys,
        own_blocks: Callable[[Keys], tuple],
        pair: Callable[[tuple, Keys, Array, Half, Half], tuple],
    ) -> tuple:
        """Processes every pair of query and key blocks with attention, and returns the final state.

        Args:
            keys: this device's keys and values, [2, B, h, K, H] each.
            own_blocks: (keys) -> state; each own block of queries with the same block of keys.
            pair: (state, keys, sender, mine, theirs) -> state; query block `mine` with block
                `theirs` of the keys from `sender`. A state has a part that stays on the device, and
                a part that travels one step behind the keys and returns home with the last step.
        """

        def visit(keys: Keys, state: tuple, n: int | Array) -> tuple:
            stays, travels = state
            sender = (self.device - n) % self.size
            # The late block reads every early one. Among blocks of the same half, early ones are
            # read by later devices, and late ones by earlier devices: so exactly one of the two.
            state = pair((stays, self.to_next(travels)), keys, sender, LATE, EARLY)
            half = jnp.where(sender < self.device, EARLY, LATE)
            return pair(state, keys, sender, half, half)

        def step(n: Array, carry: tuple) -> tuple:
            keys, state = carry
            arriving = self.to_next(keys)  # transferred while this step computes
            return arriving, visit(keys, state, n)

        arriving = self.to_next(keys)
        state = pair(own_blocks(keys), keys, self.device, LATE, EARLY)
        if self.size > 1:
            last = self.size - 1
            keys, state = jax.lax.fori_loop(1, last, step, (arriving, state))
            state = visit(keys, state, last)
        stays, travels = state
        return stays, self.to_next(travels)


def _ring_saving(
    kernel: Kernel, query: Array, key: Array, value: Array, rows: Rows
) -> tuple[Array, tuple]:
    ring = _Ring.here(kernel, query, rows)

    def own_blocks(keys: Keys) -> tuple:
        blocks, at = ring.own_blocks(keys)
        out, lse = kernel.forward(*blocks, jnp.int32(0), at)
        return (_as_halves(out).astype(lse.dtype), _as_halves(lse)), ()

    def pair(state: tuple, keys: Keys, sender: Array, mine: Half, theirs: Half) -> tuple:
        (outs, lses), _ = state
        at = ring.rows_of_pair(mine, sender, theirs)
        out, lse = kernel.forward(_take(ring.query, mine), keys, jnp.int32(theirs), at)
        out, lse = merge_passes(
            [_take(outs, mine), out.astype(lse.dtype)], [_take(lses, mine), lse]
        )
        return (_put(outs, out, mine), _put(lses, lse, mine)), ()

    (outs, lse), _ = ring.go_around((to_halves(key), to_halves(value)), own_blocks, pair)
    out = checkpoint_name(from_halves(outs.astype(query.dtype)), SAVED)
    lse = checkpoint_name(lse, SAVED)
    return out, (query, key, value, rows, out, lse)


def _ring_forward(kernel: Kernel, query: Array, key: Array, value: Array, rows: Rows) -> Array:
    return _ring_saving(kernel, query, key, value, rows)[0]


def _ring_backward(kernel: Kernel, saved: tuple, do: Array) -> tuple:
    query, key, value, rows, out, lse = saved
    ring = _Ring.here(kernel, query, rows)
    of_out = OfOut.of_halves(do, out, lse)

    def own_blocks(keys: Keys) -> tuple:
        blocks, at = ring.own_blocks(keys)
        gradients = kernel.backward(*blocks, jnp.int32(0), at, OfOut(*map(_as_rows, of_out)))
        dq, dk, dv = map(_as_halves, gradients)
        return dq, (dk, dv)

    def pair(state: tuple, keys: Keys, sender: Array, mine: Half, theirs: Half) -> tuple:
        dqs, (dks, dvs) = state
        at = ring.rows_of_pair(mine, sender, theirs)
        of_block = OfOut(*(_take(x, mine) for x in of_out))
        gradients = kernel.backward(_take(ring.query, mine), keys, jnp.int32(theirs), at, of_block)
        of_keys = _add(dks, gradients[1], theirs), _add(dvs, gradients[2], theirs)
        return _add(dqs, gradients[0], mine), of_keys

    keys = (to_halves(key), to_halves(value))
    dq, (dk, dv) = ring.go_around(keys, own_blocks, pair)
    return (
        from_halves(dq).astype(query.dtype),
        from_halves(dk).astype(key.dtype),
        from_halves(dv).astype(value.dtype),
        None,
    )


def _as_rows(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def _as_halves(x: Array) -> Array:
    return x.reshape(2, -1, *x.shape[1:])


def _take(x: Array, half: Half) -> Array:
    return jax.lax.dynamic_index_in_dim(x, half, keepdims=False)


def _put(x: Array, block: Array, half: Half) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, block, half, 0)


def _add(x: Array, block: Array, half: Half) -> Array:
    return _put(x, _take(x, half) + block, half)


_ring = jax.custom_vjp(_ring_forward, nondiff_argnums=(0,))
_ring.defvjp(_ring_saving, _ring_backward)
