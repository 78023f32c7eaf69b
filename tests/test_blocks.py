"""Lists of key blocks, and pages: what they mean, on every backend, beside the oracle in float64.

What a list leaves out is worked out here anew, pair by pair of query and key.
"""

import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from kernels import QUICK, ROPE, draw
from test_backends import BENCHES, INTERPRETED, MARKS, Bench

from dca_jax.attention import op
from dca_jax.attention.backend import PLAIN, KeyBlocks, Rows
from dca_jax.attention.blocks import BLOCK, allowed_keys, key_blocks, num_tiles
from dca_jax.attention.mosaic_gpu import flash_forward, forward_tiles
from dca_jax.attention.mosaic_tpu import lists as tpu_lists
from dca_jax.attention.mosaic_tpu import tiles
from dca_jax.attention.stored import Scales, quantize
from dca_jax.dca import PHASES, DCAConfig
from dca_jax.errors import InputError
from dca_jax.inference.baselines import ReRoPE


class Case(NamedTuple):
    """Queries of several rows, all keys of their texts, and what a selector kept at random."""

    query: jax.Array
    key: jax.Array  # not rotated
    value: jax.Array
    rows: Rows
    kept: np.ndarray  # [B, K, tiles, blocks]
    dca: DCAConfig

    @classmethod
    def of(
        cls,
        offset: list[int],
        lengths: list[int],
        sizes: tuple[int, int, int, int],  # queries, keys, query heads, kv heads
        dca: DCAConfig,
        *,
        dim: int = 16,
        dtype: Any = jnp.float32,
    ) -> "Case":
        query, key, value = draw(sizes[0], len(offset), *sizes, dim, dtype)
        starts, ends = (jnp.asarray(x, jnp.int32) for x in (offset, lengths))
        options: dict[str, Any] = {"dca": dca, "lengths": ends, "query_offset": starts}
        rows = op.make_rows(query.shape, rope=ROPE, **options)
        shape = len(offset), sizes[3], num_tiles(sizes[0]), -(-sizes[1] // BLOCK)
        kept = np.random.default_rng(sizes[1]).random(shape) < 0.4
        return cls(query, key, value, rows, kept, dca)

    def rotated(self) -> jax.Array:
        index = jnp.arange(self.key.shape[1], dtype=jnp.int32)[None]
        return op.rotate_keys(self.key, index, dca=self.dca, inv_freq=self.rows.inv_freq)

    def blocks(self) -> KeyBlocks:
        @partial(jax.jit, compiler_options=QUICK)
        def listed(kept: jax.Array, rows: Rows) -> KeyBlocks:
            return key_blocks(kept, rows=rows, dca=self.dca, most=kept.shape[3])

        return listed(jnp.asarray(self.kept), self.rows)

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

    def expected(self, allowed: np.ndarray | None = None) -> np.ndarray:
        return oracle.attention(
            *(np.asarray(x, np.float64) for x in (self.query, self.key, self.value)),
            s=self.dca.chunk_len,
            largest=self.dca.max_query_position,
            offset=np.asarray(self.rows.offset).tolist(),
            lengths=np.asarray(self.rows.lengths).tolist(),
            allowed=allowed,
        )


def setting(s: int, largest: int) -> DCAConfig:
    return DCAConfig(chunk_len=s, max_query_position=largest)


# A row that begins in the middle of a chunk and of a tile, one with padding, one of a single token.
RAGGED = [640, 130, 0], [870, 301, 1], (230, 870, 2, 1), setting(300, 400)
EVEN = [768], [1024], (256, 1024, 2, 2), setting(256, 300)  # chunks and pieces of whole blocks
SHORT = [129], [330], (201, 330, 4, 1), setting(40, 40)  # chunks shorter than a block
WHOLE = [0], [300], (300, 300, 1, 1), PLAIN
CASES = {"ragged": RAGGED, "even": EVEN, "short": SHORT, "plain": WHOLE}


@functools.cache
def drawn(name: str, dim: int = 16, dtype: Any = jnp.float32) -> Case:
    return Case.of(*CASES[name], dim=dim, dtype=dtype)


@functools.cache
def lists_of(name: str) -> KeyBlocks:
    return drawn(name).blocks()


@functools.cache
def expected(name: str, dim: int, dtype: Any) -> np.ndarray:
    """The masked oracle's output."""
    case = drawn(name, dim, dtype)
    return case.expected(case.allowed())


def interpret(bench: Bench, request: pytest.FixtureRequest) -> None:
    """The kernels that a CPU can run so."""
    if bench.name in INTERPRETED:
        request.getfixturevalue(INTERPRETED[bench.name])


def benches(*names: str) -> list[Any]:
    return [pytest.param(BENCHES[name], marks=MARKS.get(name, ()), id=name) for name in names]


def attend(bench: Bench, case: Case, **options: Any) -> jax.Array:
    """By the bench's backend, over the keys laid out or over a pool in `options`."""
    arrays = {"key": case.rotated(), "value": case.value} | options

    @partial(jax.jit, compiler_options=QUICK)
    def run(query: jax.Array, rows: Rows, arrays: dict[str, Any]) -> jax.Array:
        return op.attend(query, rows=rows, dca=case.dca, implementation=bench.name, **arrays)

    return run(case.query, case.rows, arrays)


# --- lists -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_list_leaves_out_what_was_not_kept_of_blocks_met_in_full(name: str) -> None:
    """As many keys as by the definition; no edge and no unmet block in a list; in order."""
    case = drawn(name)
    blocks, allowed = lists_of(name), case.allowed()
    sizes = {"num_queries": case.query.shape[1], "num_keys": case.key.shape[1]}

    @partial(jax.jit, compiler_options=QUICK)
    def mask_of(blocks: KeyBlocks, rows: Rows) -> jax.Array:
        return allowed_keys(blocks, rows, case.dca, **sizes)

    mask = mask_of(blocks, case.rows)
    index = np.asarray(case.rows.offset)[:, None] + np.arange(sizes["num_queries"])
    met = np.arange(sizes["num_keys"]) <= index[..., None]
    np.testing.assert_array_equal(np.asarray(mask) & met[:, None], allowed & met[:, None])
    counts, numbers = (np.asarray(x) for x in blocks[:2])
    s = case.dca.chunk_len
    for place in np.ndindex(*counts.shape[:3]):
        listed = numbers[place][: counts[place].sum()]
        assert (np.diff(listed) > 0).all()
        tile = int(case.rows.offset[place[0]]) // BLOCK + place[2]
        first, last = tile * BLOCK // s, (tile * BLOCK + BLOCK - 1) // s
        chunk = listed * BLOCK // s
        assert first == last or (chunk <= first - 2).all()
        by_phase = [(chunk <= first - 2).sum(), (chunk == first - 1).sum(), (chunk == first).sum()]
        assert counts[place].tolist() == by_phase


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bench", benches("reference", "xla", "mosaic_tpu", "mosaic_gpu"))
def test_attention_over_lists(
    bench: Bench, name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = drawn(name, bench.dim, bench.dtype)
    if bench.name == "mosaic_tpu":
        request.getfixturevalue("interpreted_mosaic_tpu")
        words = tpu_lists.words_of_tile(case.key.shape[1], case.key.shape[2], 3, case.dca)
        monkeypatch.setattr(tiles, "SMEM", 2 * 4 * words)  # for two tiles of three rows
    out = attend(bench, case, blocks=lists_of(name))
    bench.agrees(out, expected(name, bench.dim, bench.dtype))
    if name == "even":  # something was left out
        assert np.abs(case.expected() - np.asarray(out, np.float64)).max() > 0.1


def with_quiet_blocks(bench: Bench) -> Case:
    """Two rows; of one head the odd blocks' logits are small, of the other every third's."""
    sizes, dca = (256, 1024, 4, 2), setting(256, 300)
    case = Case.of([768, 768], [1024, 900], sizes, dca, dim=bench.dim, dtype=bench.dtype)
    block = np.arange(1024) // BLOCK
    quiet = np.stack([block % 2 == 1, block % 3 == 1], axis=1)[None, :, :, None]
    key = case.key * jnp.asarray(np.where(quiet, 0.03, 1), bench.dtype)
    return case._replace(key=key, kept=np.ones_like(case.kept))


def passed_by(case: Case, part: float) -> np.ndarray:
    """Which blocks half a tile of each head passes by, by the definition [B, N, halves, blocks]."""
    s, largest = case.dca.chunk_len, case.dca.max_query_position
    query, key = (np.asarray(x, np.float64) for x in (case.query, case.key))
    heads, half = query.shape[2], query.shape[3] // 2
    frequency = 10_000.0 ** (-np.arange(half) / half)
    found = np.zeros((len(query), heads, query.shape[1] // 64, key.shape[1] // BLOCK), bool)
    for b, n in np.ndindex(found.shape[:2]):
        own = key[b, :, n // (heads // key.shape[2])]
        k = own[:, :half] + 1j * own[:, half:]
        index = int(case.rows.offset[b]) + np.arange(query.shape[1])
        logits = np.full((len(index), len(k)), -np.inf)
        for t, i in enumerate(index[index < int(case.rows.lengths[b])]):
            turn = oracle.relative_positions(int(i), s, largest)
            q = query[b, t, n, :half] + 1j * query[b, t, n, half:]
            turned = q * np.exp(1j * np.outer(turn, frequency)) * np.conj(k[: i + 1])
            logits[t, : i + 1] = turned.real.sum(1) / np.sqrt(2 * half)
        of_block = logits.reshape(len(index), -1, BLOCK).max(axis=2)
        before = np.maximum.accumulate(of_block, axis=1)
        before = np.concatenate([np.full((len(index), 1), -np.inf), before[:, :-1]], axis=1)
        large = of_block > before + np.log(part)
        found[b, n] = ~large.reshape(-1, 64, large.shape[1]).any(axis=1)
    return found


@pytest.mark.parametrize("bench", benches("xla", "mosaic_gpu"))
def test_blocks_of_small_logits_are_passed_by(bench: Bench) -> None:
    """By half a tile of each query head; in a row whose number is -inf, none."""
    case, part = with_quiet_blocks(bench), 0.3
    left_out = passed_by(case, part)
    left_out[1] = False
    assert 0.1 < left_out[0].mean() < 0.6
    assert (left_out[0, 0] != left_out[0, 3]).any()
    skip = jnp.asarray([np.log(part), -np.inf], jnp.float32)
    out = attend(bench, case, blocks=case.blocks()._replace(skip=skip))
    allowed = ~left_out.repeat(64, axis=2).repeat(BLOCK, axis=3)
    by_head = case._replace(key=case.key.repeat(2, axis=2), value=case.value.repeat(2, axis=2))
    expected = by_head.expected(allowed)
    bench.agrees(out, expected)
    assert np.abs(case.expected() - expected)[0].max() > 0.01
    half = case._replace(query=case.query[:, BLOCK:], kept=case.kept[:, :, 1:])
    half = half._replace(rows=case.rows._replace(offset=case.rows.offset + BLOCK))
    piece = attend(bench, half, blocks=half.blocks()._replace(skip=skip))
    bench.agrees(piece, expected[:, BLOCK:])


def test_who_cannot_pass_by_blocks_says_so() -> None:
    blocks = lists_of("even")._replace(skip=jnp.zeros(1, jnp.float32))
    with pytest.raises(InputError, match="skip-softmax runs with mosaic_gpu and xla"):
        attend(BENCHES["reference"], drawn("even"), blocks=blocks)
    with pytest.raises(InputError, match="one number for each of 1 rows"):
        attend(BENCHES["xla"], drawn("even"), blocks=blocks._replace(skip=jnp.zeros(2)))


@pytest.mark.parametrize("bench", benches("xla"))
def test_a_row_of_one_token_and_its_padding_have_their_log_sum_exp(bench: Bench) -> None:
    case = drawn("ragged", bench.dim, bench.dtype)
    backend = op.BACKENDS[bench.name]
    options: dict[str, Any] = {"dca": case.dca, "phases": PHASES, "blocks": lists_of("ragged")}

    @partial(jax.jit, compiler_options=QUICK)
    def forward(*arrays: jax.Array) -> Any:
        return backend.forward(*arrays, jnp.int32(0), case.rows, with_lse=True, **options)

    _, lse = forward(case.query, case.rotated()[None], case.value[None])
    assert np.isfinite(lse[0]).all()
    assert np.isneginf(lse[2, :, 1:]).all()
    # A text's first token reads itself alone.
    own = (np.float64(case.query[2, 0, 0]) * np.float64(case.key[2, 0, 0])).sum()
    assert float(lse[2, 0, 0]) == pytest.approx(own / np.sqrt(bench.dim), abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_full_list_is_the_dense_kernel_to_the_bit(dim: int) -> None:
    case = Case.of(*EVEN[:2], (256, 1024, 8, 2), EVEN[3], dim=dim, dtype=jnp.bfloat16)
    case = case._replace(kept=np.ones_like(case.kept))
    out = attend(BENCHES["mosaic_gpu"], case, blocks=case.blocks())

    @jax.jit
    def dense(rows: Rows, *arrays: jax.Array) -> jax.Array:  # constant rows would turn otherwise
        options = {"dca": case.dca, "phases": PHASES, "with_lse": False}
        tiles = forward_tiles.LIST_TILES[dim]
        return flash_forward.forward(*arrays, jnp.int32(0), rows, tiles=tiles, **options)[0]

    arrays = case.query, case.rotated()[None], case.value[None]
    np.testing.assert_array_equal(out, dense(case.rows, *arrays))


# --- pages -------------------------------------------------------------------------------------


class Pool(NamedTuple):
    """Pages in any order, of a cache of one layer; what no row has is 1e4."""

    table: np.ndarray  # [B, pages of a row]
    page: int

    @classmethod
    def of(cls, case: Case, page: int, *, shuffled: bool = True) -> "Pool":
        batch, count = len(case.rows.offset), -(-case.key.shape[1] // page)
        where = np.arange(batch * count + 2)
        if shuffled:
            where = np.random.default_rng(page).permutation(where)
        where = where[: batch * count]
        return cls(where.reshape(batch, count).astype(np.int32), page)

    def filled(self, x: jax.Array) -> jax.Array:
        """[B, S, ...] as [1, P, page, ...]."""
        batch, count = self.table.shape
        room = [(0, 0), (0, count * self.page - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
        pieces = np.pad(np.asarray(x), room, constant_values=100)
        pool = np.full((1, batch * count + 2, self.page, *x.shape[2:]), 100, pieces.dtype)
        pool[0, self.table] = pieces.reshape(batch, count, self.page, *x.shape[2:])
        return jnp.asarray(pool)


@pytest.mark.parametrize(("name", "page"), [("ragged", 128), ("even", 256)])
@pytest.mark.parametrize("bench", benches(*BENCHES))
def test_pages(bench: Bench, name: str, page: int, request: pytest.FixtureRequest) -> None:
    """Over lists, all that is met, and few queries; by our kernels, as pages in order to the bit.

    Few queries, where a block of their kernel lies in one page, also as keys laid out. Prefill from
    pages takes turns where that from keys laid out does not, and the two round differently.
    """
    interpret(bench, request)
    case = drawn(name, bench.dim, bench.dtype)
    pages, in_order = (
        {
            "key": pool.filled(case.rotated()),
            "value": pool.filled(case.value),
            "pages": jnp.asarray(pool.table),
            "layer": jnp.int32(0),
        }
        for pool in (Pool.of(case, page), Pool.of(case, page, shuffled=False))
    )
    if bench.name in ("reference", "xla", "mosaic_gpu"):
        over_lists = attend(bench, case, blocks=lists_of(name), **pages)
        bench.agrees(over_lists, expected(name, bench.dim, bench.dtype))
    few = case._replace(query=case.query[:, -1:])
    few = few._replace(rows=case.rows._replace(offset=case.rows.lengths - 1))
    # Prefills that copy the pages out are tested without them: it takes a minute here. So does
    # Ampere's in the interpreter, which reads the ragged rows.
    copied = bench.name in ("mosaic_tpu", "mosaic_blackwell")
    for queries in (
        (few,) if copied or (bench.name, name) == ("mosaic_ampere", "even") else (case, few)
    ):
        found = attend(bench, queries, **pages)
        bench.agrees(found, queries.expected())
        if bench.name == "mosaic_gpu":
            laid_out = {} if queries is few and page == 256 else in_order
            np.testing.assert_array_equal(found, attend(bench, queries, **laid_out))


@pytest.mark.parametrize("num_queries", [1, 200])
@pytest.mark.parametrize("bench", benches(*BENCHES))
def test_pages_of_keys_in_8_bits(
    bench: Bench, num_queries: int, request: pytest.FixtureRequest
) -> None:
    if bench.name in ("mosaic_tpu", "mosaic_blackwell", "mosaic_ampere") and num_queries > 1:
        pytest.skip("its prefill copies the pages out")
    interpret(bench, request)
    case = drawn("even", bench.dim, bench.dtype)
    case = case._replace(query=case.query[:, -num_queries:])
    case = case._replace(rows=case.rows._replace(offset=case.rows.lengths - num_queries))
    pool = Pool.of(case, 128)
    stored = [quantize(x, jnp.int8) for x in (case.rotated(), case.value)]
    laid_out = {
        **dict(zip(("key", "value"), (q[None] for q, _ in stored), strict=True)),
        "scales": Scales(*(jnp.swapaxes(scale, 1, 2)[None] for _, scale in stored)),
        "layer": jnp.int32(0),
    }
    pages = {
        **dict(zip(("key", "value"), (pool.filled(q) for q, _ in stored), strict=True)),
        "scales": Scales(*(jnp.swapaxes(pool.filled(scale), 2, 3) for _, scale in stored)),
        "pages": jnp.asarray(pool.table),
        "layer": jnp.int32(0),
    }
    found, contiguous = (attend(bench, case, **options) for options in (pages, laid_out))
    bench.agrees(found, np.asarray(contiguous, np.float64))


# --- what is refused ---------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    case, xla = drawn("even"), BENCHES["xla"]
    blocks, table = lists_of("even"), jnp.zeros((1, 8), jnp.int32)
    pool = jnp.zeros((3, 128, 2, 16), jnp.float32)
    for options, message in (
        ({"blocks": blocks._replace(counts=blocks.counts[:, :1])}, "must have counts"),
        ({"blocks": blocks._replace(numbers=blocks.numbers[:, :, 1:])}, "and numbers"),
        ({"key": pool, "value": pool, "pages": table[:, :0]}, "a page table for 1 rows"),
        ({"key": pool[:, :96], "value": pool[:, :96], "pages": table}, "a multiple of 128 tokens"),
    ):
        with pytest.raises(InputError, match=message):
            attend(xla, case, **options)
    with pytest.raises(InputError, match="capacity of at least 1"):
        key_blocks(jnp.asarray(case.kept), rows=case.rows, dca=case.dca, most=0)
    with pytest.raises(InputError, match="not with ReRoPE"):
        attend(xla, case._replace(dca=ReRoPE(window=8)), blocks=blocks)
    with pytest.raises(InputError, match="'triton' cannot run: it does not support lists"):
        attend(BENCHES["triton"], case, blocks=blocks)


@pytest.mark.parametrize("what", ["over lists of key blocks", "through pages"])
def test_a_gradient_is_refused_by_name(what: str) -> None:
    case = drawn("even")
    pool = Pool.of(case, 128)
    options: dict[str, Any] = {"blocks": lists_of("even")}
    if what == "through pages":
        options = {name: pool.filled(getattr(case, name)) for name in ("key", "value")}
        options |= {"pages": jnp.asarray(pool.table), "layer": jnp.int32(0)}

    def loss(query: jax.Array) -> jax.Array:
        return attend(BENCHES["xla"], case._replace(query=query), **options).sum()

    with pytest.raises(InputError, match=f"attention {what} has no gradient"):
        jax.grad(loss)(case.query)
