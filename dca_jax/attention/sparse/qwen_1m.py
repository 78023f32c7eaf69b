"""`qwen-1m`: vertical and slash lines, as configured in Qwen's million-token checkpoints.

A table in the checkpoint (`sparse_attention_config.json`) has the number of key columns
(*vertical*) and of distances (*slash*) for every query head. The last 64 queries of a segment of
the text select them, by the softmax of their logits over all earlier keys:

    vertical  the keys with the most attention from all 64 together; always the first 30
    slash     the distances i - j with the most attention; always those of the last 100 keys

              j                    One line each in a segment of 8 queries; a block that a line
         i    .  |  .  \\ .         touches is read whole, so no key of Qwen's own choice is
              .  |  .  . \\         missing.
              .  |  .  .  .

The logits use the model's own positions, with one exception, as in Qwen's code: positions relative
to earlier chunks are not clamped (P_q = i mod s + s, and i mod s + Q), so that the relative
position is constant along a line.

The servers that Qwen recommends use the last queries of each *piece* of a prompt, so their
selection depends on how it is split; here segments begin at multiples of 4,096 in the text.

Source: `vertical_and_slash` of vLLM's and SGLang's backends for dual chunk attention; MInference
(arXiv 2407.02490).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dca_jax.attention.blocks import BLOCK
from dca_jax.attention.sparse.best import largest
from dca_jax.attention.sparse.masses import Queries, by_kv_head, walk_keys
from dca_jax.attention.sparse.piece import Keys, Piece, Selector
from dca_jax.dca import PHASES, DCAConfig, Phase
from dca_jax.errors import InputError
from dca_jax.fields import shown
from dca_jax.rope import rotate

SEGMENT = 4096  # tokens with a common selection of lines
FIRST, LAST = 30, 100  # columns, and distances of keys, that are always selected
KIND = "vertical_and_slash"
Table = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class VerticalSlash(Selector):
    """The blocks that lines of each query head touch.

    Attributes:
        vertical, slash: number of lines for each query head of each layer.
        last_q: number of queries at the end of a segment that select them.
    """

    vertical: Table
    slash: Table
    last_q: int = 64

    @property
    def segment(self) -> int:
        """Number of tokens with a common selection of lines."""
        return SEGMENT

    @property
    def name(self) -> str:
        """As `--sparse` takes it."""
        return "qwen-1m"

    @property
    def rows_of_tile(self) -> int:
        """Queries that stand for a tile."""
        return -(-self.last_q * BLOCK // SEGMENT)

    def counts(self, blocks: int) -> None:
        """As in `Selector.counts`: None, because the lines depend on the text."""
        return

    def kept(
        self, piece: Piece, wanted: Bool[Array, "B tiles"], dca: DCAConfig
    ) -> Bool[Array, "B K tiles blocks"]:
        """As `Selector.kept`."""
        segments = -(-piece.query.shape[1] // SEGMENT)
        per_segment = SEGMENT // BLOCK
        missing = segments * per_segment - piece.num_tiles
        wanted = jnp.pad(wanted, ((0, 0), (0, missing)))
        wanted = wanted.reshape(-1, segments, per_segment).any(axis=2)

        def of_segment(number: Int[Array, ""]) -> Bool[Array, "B K t blocks"]:
            return self._of_segment(piece, number, wanted[:, number], dca)

        kept = jax.lax.map(of_segment, jnp.arange(segments, dtype=jnp.int32))
        kept = jnp.moveaxis(kept, 0, 2)
        return kept.reshape(*kept.shape[:2], -1, kept.shape[-1])[:, :, : piece.num_tiles]

    def _of_segment(
        self, piece: Piece, number: Int[Array, ""], wanted: Bool[Array, " B"], dca: DCAConfig
    ) -> Bool[Array, "B K t blocks"]:
        batch, num_queries, heads, _ = piece.query.shape
        kv_heads = piece.key.shape[3]
        begin = piece.rows.offset + number * SEGMENT
        end = jnp.minimum(begin + SEGMENT, piece.rows.lengths)
        back = jnp.arange(self.last_q - 1, -1, -1, dtype=jnp.int32)
        index = end[:, None] - 1 - back[None, :]
        met = (index >= begin[:, None]) & wanted[:, None]
        slot = jnp.clip(index - piece.rows.offset[:, None], 0, num_queries - 1)
        query = jnp.take_along_axis(piece.query, slot[:, :, None, None], axis=1)
        rotated: dict[Phase, Array] = {
            p: by_kv_head(_critical(query, index, p, piece, dca), kv_heads) for p in PHASES
        }
        group = heads // kv_heads
        index, met = (jnp.repeat(x, group, axis=1) for x in (index, met))
        keys = piece.keys()
        columns, lines = line_masses(rotated, index, met, keys, dca, group)
        vertical, slash = (self._of_heads(x, piece, kv_heads) for x in (self.vertical, self.slash))
        j = jnp.arange(keys.count, dtype=jnp.int32)[None, None, None, :]
        last = end[:, None, None, None] - 1
        columns = jnp.where((j < FIRST) & (j <= last), jnp.inf, columns)
        lines = jnp.where((j > last - LAST) & (j <= last), jnp.inf, lines)
        columns, lines = (
            largest(_bits(x), count[None]).any(axis=2)
            for x, count in ((columns, vertical), (lines, slash))
        )
        blocks = columns.reshape(batch, kv_heads, -1, BLOCK).any(axis=3)
        far = _block_distances(lines, end - 1)
        tile = begin[:, None] // BLOCK + jnp.arange(SEGMENT // BLOCK, dtype=jnp.int32)[None, :]
        own = jnp.arange(blocks.shape[2], dtype=jnp.int32)[None, None, :]
        apart = tile[:, :, None] - own
        at = jnp.clip(apart, 0, far.shape[2] - 1)[:, None]
        touched = jnp.take_along_axis(far[:, :, None, :], at, axis=3)
        return (touched & (apart >= 0)[:, None]) | blocks[:, :, None, :]

    def _of_heads(self, table: Table, piece: Piece, kv_heads: int) -> Int[Array, "K G"]:
        """A layer's entries for the query heads on this device."""
        of_layer = jnp.asarray(table, jnp.int32)[piece.number]
        here = jax.lax.dynamic_slice_in_dim(of_layer, piece.head, piece.query.shape[2])
        return here.reshape(kv_heads, -1)


def line_masses(
    queries: Queries,
    index: Int[Array, "B M"],
    wanted: Bool[Array, "B M"],
    keys: Keys,
    dca: DCAConfig,
    group: int,
) -> tuple[Float[Array, "B K G S"], Float[Array, "B K G S"]]:
    """The attention of some consecutive queries together on each key, and on each distance.

    The distance i - j is indexed by the key at this distance from the last query.
    """
    batch, kv_heads, rows, _ = next(iter(queries.values())).shape
    count, num_keys = rows // group, keys.count
    walk = queries, index, wanted, keys, dca
    f32 = jnp.float32
    state = jnp.full((batch, kv_heads, rows), -jnp.inf, f32)

    def add(lse: Array, at: Array, logits: Array) -> Array:
        return jnp.logaddexp(lse, jax.nn.logsumexp(logits, axis=-1).astype(f32))

    lse = walk_keys(*walk, state, add)
    lse = jnp.where(jnp.isfinite(lse), lse, 0)[..., None]

    def note(state: tuple[Array, Array], at: Array, logits: Array) -> tuple[Array, Array]:
        columns, lines = state
        p = jnp.exp(logits.astype(f32) - lse)
        p = p.reshape(batch, kv_heads, count, group, -1)
        columns = _add_at(columns, at, p.sum(axis=2))
        return columns, _add_at(lines, at, _along_lines(p))

    columns = jnp.zeros((batch, kv_heads, group, num_keys), f32)
    lines = jnp.zeros((batch, kv_heads, group, num_keys + count - 1), f32)
    columns, lines = walk_keys(*walk, (columns, lines), note)
    return columns, lines[..., :num_keys]


def _along_lines(p: Float[Array, "B K R G span"]) -> Float[Array, "B K G span+R-1"]:
    """Sums along diagonals: row r of the R rows is shifted R - 1 - r places to the right."""
    batch, kv_heads, count, group, span = p.shape
    rows = jnp.swapaxes(p, 2, 3)[..., ::-1, :]  # the last row, which is not shifted, comes first
    wide = jnp.pad(rows, [(0, 0)] * 4 + [(0, count)])
    # Reshaped to rows shorter by one, each row begins one place further to the right.
    flat = wide.reshape(batch, kv_heads, group, -1)[..., : count * (span + count - 1)]
    return flat.reshape(batch, kv_heads, group, count, -1).sum(axis=3)


def _add_at(acc: Array, at: Array, new: Array) -> Array:
    old = jax.lax.dynamic_slice_in_dim(acc, at, new.shape[-1], axis=acc.ndim - 1)
    return jax.lax.dynamic_update_slice_in_dim(acc, old + new, at, axis=acc.ndim - 1)


def _critical(
    query: Float[Array, "B R N H"],
    index: Int[Array, "B R"],
    phase: Phase,
    piece: Piece,
    dca: DCAConfig,
) -> Float[Array, "B R N H"]:
    """Queries at unclamped positions, so that lines have constant relative positions; rounded."""
    beyond = {"intra": 0, "succ": dca.chunk_len, "inter": dca.max_query_position}[phase]
    seen = rotate(query.astype(jnp.float32), index % dca.chunk_len + beyond, piece.rows.inv_freq)
    return (seen * piece.rows.scale[:, None, None, None]).astype(query.dtype)


def _bits(mass: Float[Array, "..."]) -> Int[Array, "..."]:
    """Integers in the order of the masses; -1 for a line without any attention."""
    bits = jax.lax.bitcast_convert_type(mass, jnp.int32)
    return jnp.where(mass > 0, bits, -1)


def _block_distances(
    lines: Bool[Array, "B K S"], last: Int[Array, " B"]
) -> Bool[Array, "B K blocks"]:
    """How many blocks back the lines of a tile are: a distance touches one or two blocks."""
    distance = jnp.arange(lines.shape[2], dtype=jnp.int32)[None, None, :]
    at = last[:, None, None] - distance
    chosen = jnp.take_along_axis(lines, jnp.maximum(at, 0), axis=2) & (at >= 0)
    chosen = chosen.reshape(*lines.shape[:2], -1, BLOCK)
    cut = chosen[..., 1:].any(axis=3)  # not a multiple of 128: touches the block before too
    return chosen.any(axis=3) | jnp.pad(cut, ((0, 0), (0, 0), (1, 0)))[..., :-1]


# --- the table ---------------------------------------------------------------------------------


def has_table(text: str | None) -> bool:
    """Whether a checkpoint's JSON is a table of lines; other files may have the same name."""
    return text is not None and _is_table(json.loads(text))


def _is_table(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and all(isinstance(x, Mapping) for x in found)


def read_table(text: str, *, layers: int, heads: int, last_q: int = 64) -> VerticalSlash:
    """The selector for a checkpoint's table: a list of layers, each an object of heads by number.

    Raises:
        InputError: not such a table, or a table for another model.
    """
    where = "the table of sparse attention (sparse_attention_config)"
    table = json.loads(text)
    if not _is_table(table):
        raise InputError(
            f"{where} must be a list with an object for each layer, got {shown(table)}"
        )
    if len(table) != layers:
        raise InputError(f"{where} has {len(table)} layers, but the model has {layers}")
    vertical, slash = [], []
    for number, layer in enumerate(table):
        if sorted(layer) != sorted(map(str, range(heads))):
            raise InputError(
                f"{where} must name heads 0 to {heads - 1} in each layer, got "
                f"{', '.join(map(shown, layer)) or 'none'} in layer {number}"
            )
        lines = [
            _lines(layer[str(head)], f"{where}, layer {number}, head {head}")
            for head in range(heads)
        ]
        vertical.append(tuple(v for v, _ in lines))
        slash.append(tuple(s for _, s in lines))
    return VerticalSlash(tuple(vertical), tuple(slash), last_q)


def _lines(entry: Any, where: str) -> tuple[int, int]:
    """The numbers of vertical and slash lines of a head."""
    if isinstance(entry, list) and len(entry) >= 3 and entry[0] == KIND:
        counts = entry[1:3]
        if all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts):
            vertical, slash = counts
            return 130 if vertical == 30 else vertical, slash  # as in Qwen's servers
    raise InputError(f'{where} must be ["{KIND}", vertical, slash, score], got {shown(entry)}')
