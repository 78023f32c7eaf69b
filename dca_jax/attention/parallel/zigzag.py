"""The zigzag layout of a text that is split over devices.

A causal query reads only earlier tokens, so equal slices of a text are unequal work. Instead, a
text of T tokens is split into 2C blocks of T / (2C) tokens, and device c of the C along the mesh
axis `context` holds block c followed by block 2C - 1 - c:

    C = 4, blocks   0 1 2 3 4 5 6 7        device 0   [0 | 7]
                    0 1 2 3 3 2 1 0        device 1   [1 | 6]
                        device             device 2   [2 | 5]
                                           device 3   [3 | 4]

With an early block and a late one, every device's queries read the same number of keys (Llama 3
uses this layout with "2 x CP chunks": arXiv 2407.21783, section 3.3.2).

Activations, ids and caches all have this layout; a cache of capacity S is split like a text of S
tokens. `zigzag_order` and `natural_order` reorder whole arrays on the host; the other functions run
inside `jax.shard_map`, on one device's share.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dca_jax.errors import InputError
from dca_jax.sharding import Shards

AXIS = "context"


def zigzag_order(length: int, size: int) -> Int[np.ndarray, " length"]:
    """The text index in each slot, device by device; int32.

    `tokens[:, zigzag_order(T, C)]`, sharded over its last axis, is a batch of texts in zigzag.

    Args:
        length: T, number of tokens of the text including padding.
        size: C, number of devices.

    Raises:
        InputError: the length is not a multiple of 2C.
    """
    if length < 1 or length % (2 * size):
        raise InputError(
            f"a text split over {size} devices in zigzag must have a positive multiple of "
            f"{2 * size} tokens, got {length}; pad it to the next one"
        )
    blocks = np.arange(length, dtype=np.int32).reshape(2, size, -1)
    return np.stack([blocks[0], blocks[1, ::-1]], axis=1).reshape(length)


def natural_order(length: int, size: int) -> Int[np.ndarray, " length"]:
    """The slot of each text index: the inverse of `zigzag_order`; int32."""
    order = zigzag_order(length, size)
    slots = np.empty_like(order)
    slots[order] = np.arange(length, dtype=np.int32)
    return slots


# --- inside jax.shard_map ----------------------------------------------------------------------


def zigzag_positions(num_local: int, axis_name: str = AXIS) -> Int[Array, " num_local"]:
    """Text index of each of this device's `num_local` tokens (T / C of them), int32."""
    size, device = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    width = half_width(num_local)
    within = jnp.arange(width, dtype=jnp.int32)
    starts = [block_of(device, half, size) * width for half in (0, 1)]
    return jnp.concatenate([start + within for start in starts])


def zigzag_slots(
    index: Int[Array, "*shape"], num_local: int, axis_name: str = AXIS
) -> Int[Array, "*shape"]:
    """This device's slot of a text index, from 0 to `num_local` - 1; `num_local` if elsewhere.

    So a scatter with mode="drop" writes each token of a replicated batch to its slot, and on no
    other device. Indices at or beyond the capacity have no slot.
    """
    size, device = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    width = half_width(num_local)
    block, within = index // width, index % width
    early, late = (block_of(device, half, size) for half in (0, 1))
    elsewhere = jnp.where(block == late, width + within, num_local)
    return jnp.where(block == early, within, elsewhere)


def zigzag_to_natural(
    x: Shaped[Array, "B t *rest"], axis_name: str = AXIS
) -> Shaped[Array, "B t *rest"]:
    """From zigzag to contiguous slices (device d: blocks 2d and 2d + 1); differentiable.

    This takes two collective permutes, each of half of the device's data.
    """
    early, late = to_halves(x)
    even, odd = _early_late(early, late, axis_name)
    back = [[(there, here) for here, there in _routes(parity, axis_name)] for parity in (0, 1)]
    first = jax.lax.ppermute(even, axis_name, back[0])
    second = jax.lax.ppermute(odd, axis_name, back[1])
    return from_halves(jnp.stack([first, second]))


def to_halves(x: Shaped[Array, "B t *rest"]) -> Shaped[Array, "2 B h *rest"]:
    """Separates a device's two blocks; for one row (B = 1) no data moves."""
    batch, num_local, *rest = x.shape
    return jnp.moveaxis(x.reshape(batch, 2, half_width(num_local), *rest), 1, 0)


def from_halves(x: Shaped[Array, "2 B h *rest"]) -> Shaped[Array, "B t *rest"]:
    """The inverse of `to_halves`."""
    _, batch, width, *rest = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(batch, 2 * width, *rest)


def half_width(num_local: int) -> int:
    """Tokens per block; a device holds two blocks.

    Raises:
        InputError: the number is odd.
    """
    if num_local % 2:
        raise InputError(
            f"in zigzag a device holds two blocks of equal length, got {num_local} tokens per "
            "device; pad the text to a multiple of twice the number of devices"
        )
    return num_local // 2


def block_of(device: Int[Array, ""], half: int | Int[Array, ""], size: int) -> Int[Array, ""]:
    """The number of a device's early (half 0) or late (half 1) block among the text's 2C blocks."""
    return jnp.where(jnp.equal(half, 0), device, 2 * size - 1 - device)


def _routes(parity: int, axis_name: str) -> list[tuple[int, int]]:
    """(d, the zigzag device of block 2d + parity): a permutation of the devices for each parity."""
    size = jax.lax.axis_size(axis_name)
    blocks = [2 * device + parity for device in range(size)]
    return [(d, min(block, 2 * size - 1 - block)) for d, block in enumerate(blocks)]


def _early_late(a: Array, b: Array, axis_name: str) -> tuple[Array, Array]:
    """(a, b) on even devices, (b, a) on odd ones: an even device's early block is an even one."""
    is_even = jax.lax.axis_index(axis_name) % 2 == 0
    return jnp.where(is_even, a, b), jnp.where(is_even, b, a)


def pad_to_zigzag(tokens: Int[Array, "B T"], context: int) -> Int[Array, "B padded"]:
    """Texts padded to a multiple of 2 * context tokens, in zigzag order."""
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % (2 * context))))
    return tokens[:, zigzag_order(tokens.shape[1], context)]


def unpad_from_zigzag(
    x: Float[Array, "B padded D"], length: int, shards: Shards
) -> Float[Array, "B T D"]:
    """The inverse of `pad_to_zigzag`, for values computed for each token."""
    text = shards.spec("BTD")
    x = shards.local(zigzag_to_natural, (text,), text)(x)
    if length % shards.size("context"):
        x = shards.put(x, shards.spec("BTD", whole="T"))
    return x[:, :length]
