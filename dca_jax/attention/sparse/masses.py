"""The share of a query's attention on each block of keys, in plain XLA.

A few queries represent a tile. Their logits with all earlier keys are computed one span of keys at
a time, and only the log-sum-exp of each block is kept, never the logits of a whole text.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dca_jax.attention.blocks import BLOCK
from dca_jax.attention.mosaic_gpu import miscompiling_cuda
from dca_jax.attention.sparse.piece import Keys, Piece
from dca_jax.dca import DCAConfig, Phase, key_range, phases_within
from dca_jax.device import current_device
from dca_jax.dtypes import compute_dtype

# Keys per span: a CPU's caches are small, and a GPU must launch each step.
SPAN, CPU_SPAN = 16_384, 1024
HOPPER_HEAD_DIMS = (64, 128)
TOGETHER = 32  # queries of a head per product, whatever the length of a piece

Queries = Mapping[Phase, Float[Array, "B K M H"]]


def block_scores(
    rotated: Mapping[Phase, Float[Array, "B tiles R N H"]],
    index: Int[Array, "B tiles R"],
    wanted: Bool[Array, "B tiles"],
    piece: Piece,
    dca: DCAConfig,
    *,
    of_maximum: float,
) -> Float[Array, "B K tiles blocks"]:
    """Scores of key blocks from R queries of each tile, over all heads that share a list.

    A score is the mean of the queries' probabilities plus `of_maximum` times the largest, with a
    softmax for each query over the keys up to its own. The blocks are those of the cache. Tiles are
    processed in groups of fixed size, so that the arithmetic is the same in every piece.

    Args:
        rotated: the queries rotated for each phase, times the logit scale.
        index: their text indices; later keys are masked. They are the last query of each of R equal
            parts of a tile.
        wanted: tiles to score; the scores of other tiles are meaningless.
    """
    batch, tiles, count = index.shape
    if _is_for_hopper(piece, dca):
        # JAX's compiler for this kernel takes half a second to import.
        from dca_jax.attention.sparse import hopper

        return hopper.block_scores(rotated, piece, dca, of_maximum)
    together = max(1, TOGETHER // count)
    keys = piece.keys()
    kv_heads, heads = piece.key.shape[3], piece.query.shape[2]
    group = heads // kv_heads

    def split(x: Array) -> Array:
        missing = -tiles % together
        x = jnp.pad(x, [(0, missing if axis == 1 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(batch, -1, together, *x.shape[2:]), 1, 0)

    def of_some(args: tuple[dict[Phase, Array], Array, Array]) -> Array:
        rotated, index, wanted = args
        queries: dict[Phase, Array] = {
            phase: by_kv_head(query, kv_heads) for phase, query in rotated.items()
        }
        wanted = jnp.broadcast_to(wanted[:, :, None], index.shape)
        index, wanted = (jnp.repeat(x.reshape(batch, -1), group, axis=1) for x in (index, wanted))
        masses = _log_masses(queries, index, wanted, keys, dca)
        total = jax.nn.logsumexp(masses, axis=-1, keepdims=True)
        p = jnp.exp(masses - jnp.where(jnp.isfinite(total), total, 0))
        p = p.reshape(batch, kv_heads, together, count * group, -1)
        return p.mean(axis=3) + of_maximum * p.max(axis=3)

    dtype = piece.query.dtype
    given = {phase: split(query.astype(dtype)) for phase, query in rotated.items()}
    scores = jax.lax.map(of_some, (given, split(index), split(wanted)))
    scores = jnp.moveaxis(scores, 0, 2)
    return scores.reshape(batch, kv_heads, -1, scores.shape[-1])[:, :, :tiles]


def _is_for_hopper(piece: Piece, dca: DCAConfig) -> bool:
    """Whether the kernel in `hopper` supports this piece on this device."""
    return (
        current_device().capability == (9, 0)
        and not miscompiling_cuda()
        and piece.query.dtype in (jnp.bfloat16, jnp.float16)
        and piece.query.shape[3] in HOPPER_HEAD_DIMS
        and dca.chunk_len % BLOCK == 0
    )


def by_kv_head(query: Float[Array, "B *rows N H"], kv_heads: int) -> Float[Array, "B K M H"]:
    """Queries grouped by kv head: rows in order, with the query heads inside each row."""
    batch, head_dim = query.shape[0], query.shape[-1]
    query = query.reshape(batch, -1, kv_heads, query.shape[-2] // kv_heads, head_dim)
    return jnp.moveaxis(query, 2, 1).reshape(batch, kv_heads, -1, head_dim)


def _log_masses(
    queries: Queries,
    index: Int[Array, "B M"],
    wanted: Bool[Array, "B M"],
    keys: Keys,
    dca: DCAConfig,
) -> Float[Array, "B K M blocks"]:
    """The logits' log-sum-exp over each block of keys; -inf for a block without visible keys."""

    def note(masses: Array, at: Array, logits: Array) -> Array:
        new = jax.nn.logsumexp(logits.reshape(*logits.shape[:3], -1, BLOCK), axis=-1)
        block = at // BLOCK
        old = jax.lax.dynamic_slice_in_dim(masses, block, new.shape[3], axis=3)
        # A border between chunks may cut a block into keys of two phases.
        return jax.lax.dynamic_update_slice_in_dim(masses, jnp.logaddexp(old, new), block, axis=3)

    some = next(iter(queries.values()))
    shape = (*some.shape[:3], keys.count // BLOCK)
    masses = jnp.full(shape, -jnp.inf, compute_dtype(some.dtype))
    return walk_keys(queries, index, wanted, keys, dca, masses, note)


def walk_keys[State](
    queries: Queries,
    index: Int[Array, "B M"],
    wanted: Bool[Array, "B M"],
    keys: Keys,
    dca: DCAConfig,
    state: State,
    update: Callable[[State, Int[Array, ""], Float[Array, "B K M span"]], State],
) -> State:
    """Visits all keys that some queries attend to, phase by phase, one span at a time.

    Args:
        queries: the queries rotated for each phase, rounded.
        index: their text indices.
        wanted: mask of the queries to process.
        keys: the keys, in whole blocks (`Piece.keys`).
        update: function that returns the state after a span from its first key, a multiple of 128,
            and its logits; these are float32, and -inf for keys outside the phase.
    """
    num_keys = keys.count
    span = min(CPU_SPAN if current_device().platform == "cpu" else SPAN, num_keys)
    for phase in phases_within(num_keys, dca):
        query = queries[phase]
        start, stop = key_range(index, phase, dca)
        stop = jnp.where(wanted, jnp.minimum(stop, num_keys), start)
        meets = start < stop
        first = jnp.min(jnp.where(meets, start, jnp.int32(2**31 - 1))) // span
        last = (jnp.max(jnp.where(meets, stop, 0)) + (span - 1)) // span

        def step(
            n: Array, state: State, query: Array = query, start: Array = start, stop: Array = stop
        ) -> State:
            # The last span may overlap the one before, and the overlap is masked.
            at = jnp.minimum(n * span, num_keys - span)
            logits = _product(query, keys.span(at, span).astype(query.dtype))
            if keys.scale is not None:
                logits = logits * keys.scales(at, span).astype(logits.dtype)
            j = at + jnp.arange(span, dtype=jnp.int32)[None, None, :]
            low = jnp.maximum(start, n * span)[:, :, None]
            met = (j >= low) & (j < stop[:, :, None])
            return update(state, at, jnp.where(met[:, None], logits, -jnp.inf))

        state = jax.lax.fori_loop(first, last, step, state)
    return state


def _product(
    query: Float[Array, "B K M H"], key: Float[Array, "B S K H"]
) -> Float[Array, "B K M S"]:
    """Logits with float32 sums (float64 for float64); float32 inputs are not rounded."""
    precision = None if query.dtype.itemsize < 4 else "highest"
    options = {"precision": precision, "preferred_element_type": compute_dtype(query.dtype)}
    return jnp.einsum("BKMH,BSKH->BKMS", query, key, **options)
