"""Lists of key blocks, and pages: what they mean, on every backend, beside the oracle in float64.

What a list leaves out is worked out here anew, pair by pair of query and key.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from kernels import QUICK, ROPE, draw

from dca_jax.attention import op
from dca_jax.attention.backend import PLAIN, KeyBlocks, Rows
from dca_jax.attention.blocks import BLOCK, allowed_keys, key_blocks, num_tiles
from dca_jax.dca import DCAConfig

S = 300  # no multiple of a block
DCA = DCAConfig(chunk_len=S, max_query_position=400)
EVEN = DCAConfig(chunk_len=256, max_query_position=300)


class Case(NamedTuple):
    """Queries of several rows, all keys of their texts, and what a selector kept at random."""

    query: jax.Array
    key: jax.Array  # not rotated
    value: jax.Array
    rows: Rows
    kept: np.ndarray  # [B, K, tiles, blocks]
    dca: DCAConfig

    @classmethod
    def draw(
        cls,
        offset: list[int],
        lengths: list[int],
        num_queries: int,
        num_keys: int,
        dca: DCAConfig = DCA,
        *,
        heads: tuple[int, int] = (4, 2),
        dim: int = 16,
        dtype: Any = jnp.float32,
        share: float = 0.4,
    ) -> "Case":
        query, key, value = draw(
            num_queries, len(offset), num_queries, num_keys, *heads, dim, dtype
        )
        starts, ends = (jnp.asarray(x, jnp.int32) for x in (offset, lengths))
        options: dict[str, Any] = {"dca": dca, "lengths": ends, "query_offset": starts}
        rows = op.make_rows(query.shape, rope=ROPE, **options)
        shape = len(offset), heads[1], num_tiles(num_queries), -(-num_keys // BLOCK)
        kept = np.random.default_rng(num_keys).random(shape) < share
        return cls(query, key, value, rows, kept, dca)

    def rotated(self) -> jax.Array:
        index = jnp.arange(self.key.shape[1], dtype=jnp.int32)[None]
        return op.rotate_keys(self.key, index, dca=self.dca, inv_freq=self.rows.inv_freq)

    def blocks(self, most: int | None = None) -> KeyBlocks:
        most = most or self.kept.shape[3]
        return key_blocks(jnp.asarray(self.kept), rows=self.rows, dca=self.dca, most=most)

    def allowed(self) -> np.ndarray:
        """Which keys each query may read [B, K, T, S], by the definition."""
        num_queries, num_keys = self.query.shape[1], self.key.shape[1]
        s, key = self.dca.chunk_len, np.arange(self.kept.shape[3] * BLOCK)
        allowed = np.zeros((*self.kept.shape[:2], num_queries, num_keys), bool)
        for b, offset in enumerate(np.asarray(self.rows.offset)):
            for tile in range(offset // BLOCK, (offset + num_queries - 1) // BLOCK + 1):
                query = np.arange(tile * BLOCK, (tile + 1) * BLOCK)[:, None]
                behind = np.minimum(query // s - key // s, 2)
                phase = np.where(query >= key, behind, -1)  # -1: not met
                of_block = phase.reshape(BLOCK, -1, BLOCK).swapaxes(0, 1).reshape(-1, BLOCK**2)
                met_in_full = (of_block == of_block[:, :1]).all(1) & (of_block[:, 0] >= 0)
                read = self.kept[b, :, tile - offset // BLOCK] | ~met_in_full
                of_tile = slice(max(tile * BLOCK - offset, 0), (tile + 1) * BLOCK - offset)
                allowed[b, :, of_tile] = read.repeat(BLOCK, axis=1)[:, None, :num_keys]
        return allowed

    def expected(self, allowed: np.ndarray | None = None, **changed: np.ndarray) -> np.ndarray:
        arrays = {"query": self.query, "key": self.key, "value": self.value} | changed
        return oracle.attention(
            *(np.asarray(x, np.float64) for x in arrays.values()),
            s=self.dca.chunk_len,
            largest=self.dca.max_query_position,
            offset=np.asarray(self.rows.offset).tolist(),
            lengths=np.asarray(self.rows.lengths).tolist(),
            allowed=allowed,
        )


# A row in the middle of a chunk and of a tile, one at their edge, and one of a single token.
RAGGED = [700, 640, 130, 0], [970, 1010, 301, 1], 270, 1010
CASES = {
    "chunks that blocks do not divide": Case.draw(*RAGGED),
    "chunks that they divide": Case.draw([768, 256], [1152, 512], 384, 1152, EVEN, heads=(4, 1)),
    "chunks shorter than a block": Case.draw(
        [129], [430], 301, 430, DCAConfig(chunk_len=40, max_query_position=40), heads=(2, 2)
    ),
    "plain attention": Case.draw([0], [500], 500, 500, PLAIN, heads=(2, 1)),
}
BACKENDS = ("reference", "xla")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def read(name: str, **options: Any) -> Any:
    return jax.jit(partial(op.attend, implementation=name, **options), compiler_options=QUICK)


def test_a_list_leaves_out_what_was_not_kept_of_blocks_met_in_full(case: Case) -> None:
    """As many keys as by the definition, no edge and no unmet block in a list."""
    blocks, allowed = case.blocks(), case.allowed()
    sizes = {"num_queries": case.query.shape[1], "num_keys": case.key.shape[1]}
    mask = allowed_keys(blocks, case.rows, case.dca, **sizes)
    index = np.asarray(case.rows.offset)[:, None] + np.arange(sizes["num_queries"])
    met = np.arange(sizes["num_keys"]) <= index[..., None]
    np.testing.assert_array_equal(np.asarray(mask) & met[:, None], allowed & met[:, None])
    counts, numbers = (np.asarray(x) for x in blocks)
    for place in np.ndindex(*counts.shape[:3]):
        listed = numbers[place][: counts[place].sum()]
        assert (np.diff(listed) > 0).all()
        tile = int(case.rows.offset[place[0]]) // BLOCK + place[2]
        first, last = tile * BLOCK // case.dca.chunk_len, (tile * BLOCK + 127) // case.dca.chunk_len
        chunks = listed * BLOCK // case.dca.chunk_len
        assert first == last or not (chunks > first - 2).any()
        by_phase = [
            (first - chunks >= 2).sum(),
            (first - chunks == 1).sum(),
            (chunks == first).sum(),
        ]
        assert counts[place].tolist() == by_phase


@pytest.mark.parametrize("name", BACKENDS)
def test_attention_over_lists(name: str, case: Case) -> None:
    out = read(name, dca=case.dca)(
        case.query, case.rotated(), case.value, rows=case.rows, blocks=case.blocks()
    )
    np.testing.assert_allclose(out, case.expected(case.allowed()), atol=2e-6)
    assert np.abs(case.expected() - np.asarray(out)).max() > 1e-2
