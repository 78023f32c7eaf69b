"""Sparse reading of prompts: each selector beside its definition in NumPy float64, and in use."""

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import dense_llama
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import QUICK
from lowering import lower, shapes
from oracle import relative_positions
from shared_fixtures import invoke

import dca_jax
from dca_jax.attention.backend import PLAIN
from dca_jax.attention.op import make_rows, rotate_keys
from dca_jax.attention.sparse import (
    Piece,
    PooledQueries,
    SampledRows,
    Selector,
    SkipSoftmax,
    Sparse,
    VerticalSlash,
    best,
    choose_sparse,
    masses,
    qwen_1m,
)
from dca_jax.attention.stored import Scales, quantize
from dca_jax.dca import DCAConfig, SparseConfig
from dca_jax.errors import InputError
from dca_jax.inference.baselines import ReRoPE
from dca_jax.inference.generate import Run
from dca_jax.inference.load import open_model
from dca_jax.inference.methods import with_method
from dca_jax.inference.score import token_nll
from dca_jax.kv_cache import KVCache, PagedCache, create_pool
from dca_jax.rope import RopeConfig
from dca_jax.serving.engine import Engine
from dca_jax.sharding import make_mesh

S, Q = 200, 300  # a chunk ends within a tile
DCA = DCAConfig(chunk_len=S, max_query_position=Q)
KV_HEADS, GROUP, DIM = 2, 2, 16
TOKENS, LEAST = 1280, 5
FREQUENCY = 10_000.0 ** (-2.0 * np.arange(DIM // 2) / DIM)
TABLE = VerticalSlash(((3, 20, 5, 9),), ((4, 30, 2, 110),), last_q=64)
SELECTORS = [SampledRows(0.4), SampledRows(0.4, 4), PooledQueries(0.4), TABLE]
named = pytest.mark.parametrize("selector", SELECTORS, ids=lambda one: one.name)


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which short texts have many segments and blocks to choose from."""
    monkeypatch.setattr(best, "LEAST", LEAST)
    monkeypatch.setattr(masses, "CPU_SPAN", 384)  # which does not divide the text
    monkeypatch.setattr(qwen_1m, "SEGMENT", 256)


def draw(seed: int, batch: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys, raw: some keys that many look for, and some queries that look for one."""
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(batch, TOKENS, KV_HEADS * GROUP, DIM))
    key = rng.normal(size=(batch, TOKENS, KV_HEADS, DIM))
    query += 0.5
    key[:, rng.choice(TOKENS, 12)] += 1.5
    return query.astype(np.float32), key.astype(np.float32)


def lists(
    selector: Selector,
    query: np.ndarray,
    key: np.ndarray,
    *,
    offset: Any = 0,
    whole: Any = TOKENS,
    scales: Scales | None = None,
    threshold: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """`Sparse.blocks` of a piece: which blocks stand in its tiles' lists, and their counts."""
    batch, tokens = query.shape[:2]
    place = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), (batch,))
    whole = jnp.broadcast_to(jnp.asarray(whole, jnp.int32), (batch,))
    counts, numbers, _ = _lists(
        selector, threshold, jnp.asarray(query), jnp.asarray(key), place, whole, scales
    )
    counts, numbers = np.asarray(counts), np.asarray(numbers)
    kept = np.zeros((*counts.shape[:3], -(-key.shape[1] // 128)), bool)
    for at in np.ndindex(counts.shape[:3]):
        kept[at][numbers[at][: counts[at].sum()]] = True
    return kept[:, :, : -(-tokens // 128)], counts


@partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def _lists(
    selector: Selector,
    threshold: int,
    query: jax.Array,
    key: jax.Array,
    offset: jax.Array,
    whole: jax.Array,
    scales: Scales | None,
) -> Any:
    rows = make_rows(
        query.shape,
        dca=DCA,
        rope=RopeConfig(),
        query_offset=offset,
        lengths=jnp.minimum(offset + query.shape[1], whole),
        context_lengths=whole,
    )
    if scales is None:
        index = jnp.arange(key.shape[1], dtype=jnp.int32)[None]
        key = rotate_keys(key, index, dca=DCA, inv_freq=rows.inv_freq)
    zero = jnp.int32(0)
    piece = Piece(query, key[None], zero, rows, whole, scales, zero, zero)
    return Sparse(selector=selector, threshold=threshold).blocks(piece, DCA)


# --- the definitions, in NumPy float64 ---


def logits(query: np.ndarray, key: np.ndarray, position: np.ndarray) -> np.ndarray:
    """One head's [rows, keys], by the relative position of each pair."""
    turn = np.exp(1j * position[:, :, None] * FREQUENCY)
    half = DIM // 2
    q = query[:, :half] + 1j * query[:, half:]
    k = key[:, :half] + 1j * key[:, half:]
    return (q[:, None] * turn * np.conj(k)[None]).real.sum(axis=2) / math.sqrt(DIM)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def block_sums(p: np.ndarray) -> np.ndarray:
    return np.add.reduceat(p, np.arange(0, p.shape[-1], 128), axis=-1)


def scores(selector: Any, query: np.ndarray, key: np.ndarray, tile: int, head: int) -> np.ndarray:
    """Of each block up to the tile's own, for a kv head."""
    query, key = query.astype(np.float64), key[:, head].astype(np.float64)
    group = range(head * GROUP, (head + 1) * GROUP)
    end = 128 * (tile + 1)
    if isinstance(selector, PooledQueries):
        i = np.arange(128 * tile, end)
        back = (end - 1) // S - np.arange(end) // S  # the phase of the tile's last query
        places = np.stack([i % S, np.minimum(i % S + S, Q), np.full(128, min(2 * S - 1, Q))])
        position = places[np.minimum(back, 2)].T - np.arange(end)[None] % S
        mean = [logits(query[i, n], key[:end], position).mean(axis=0) for n in group]
        return np.mean([block_sums(softmax(x)) for x in mean], axis=0)
    apart = 128 // selector.count
    found = []
    for i in range(128 * tile + apart - 1, end, apart):
        position = relative_positions(i, S, Q)[None]
        for n in group:
            p = block_sums(softmax(logits(query[i : i + 1, n], key[: i + 1], position)[0]))
            found.append(np.pad(p, (0, tile + 1 - len(p))))
    return np.mean(found, axis=0) + np.max(found, axis=0) / 8


def best_of(selector: Any, query: np.ndarray, key: np.ndarray, tile: int, head: int) -> set[int]:
    return chosen_of(scores(selector, query, key, tile, head), tile, selector.share)


def chosen_of(score: np.ndarray, tile: int, share: float) -> set[int]:
    kept = {0, max(tile - 1, 0), tile}
    count = max(LEAST, math.ceil(round(share * (tile + 1), 9)))
    others = sorted(set(range(tile + 1)) - kept, key=lambda block: -score[block])
    return kept | set(others[: max(count - 3, 0)])


def lines_of(query: np.ndarray, key: np.ndarray, tile: int, head: int) -> set[int]:
    """What vertical and slash lines touch: pair by pair, by the last 64 queries of a segment."""
    query, key = query.astype(np.float64), key[:, head].astype(np.float64)
    begin = tile * 128 // 256 * 256
    end = min(begin + 256, TOKENS)
    rows = np.arange(end - 64, end)
    back = rows[:, None] // S - np.arange(end)[None] // S
    place = rows % S
    place = np.stack([place, place + S, place + Q])  # not clamped
    position = np.take_along_axis(place.T, np.clip(back, 0, 2), axis=1) - np.arange(end) % S
    i = np.arange(128 * tile, 128 * (tile + 1))
    kept = set()
    for n in range(head * GROUP, (head + 1) * GROUP):
        z = logits(query[rows, n], key[:end], position)
        p = softmax(np.where(rows[:, None] >= np.arange(end)[None], z, -np.inf))
        columns, far = p.sum(axis=0), np.zeros(end)
        np.add.at(far, np.maximum(rows[:, None] - np.arange(end)[None], 0), p)
        columns[:30], far[:100] = np.inf, np.inf
        vertical = np.argsort(-columns, kind="stable")[: TABLE.vertical[0][n]]
        slash = np.argsort(-far, kind="stable")[: TABLE.slash[0][n]]
        touched = (i[:, None] - slash[None]).ravel()
        kept |= set(vertical // 128) | set(touched[touched >= 0] // 128)
    return kept


def full_blocks(tile: int, s: int = S) -> set[int]:
    """Those that all of a tile's queries meet in full, in one phase: what a list may hold."""
    first, last = tile * 128 // s, (tile * 128 + 127) // s
    full = set()
    for block in range(tile):
        chunks = {block * 128 // s, (block * 128 + 127) // s}
        back = {min(query - chunk, 2) for query in (first, last) for chunk in chunks}
        full |= {block} if len(back) == 1 else set()
    return full


@named
def test_a_selector_is_its_definition(selector: Any) -> None:
    query, key = draw(0)
    kept, _ = lists(selector, query, key)
    dense = (TOKENS - 128) // 128
    more = 0
    for head in range(KV_HEADS):
        for tile in range(TOKENS // 128):
            expected = set(range(tile + 1))
            if tile < dense:
                choose = lines_of if selector is TABLE else partial(best_of, selector)
                expected = choose(query[0], key[0], tile, head) | {0, max(tile - 1, 0), tile}
            more += len(full_blocks(tile) - expected)
            assert set(np.nonzero(kept[0, head, tile])[0]) == expected & full_blocks(tile)
    assert more > 8  # there was something to leave out


@pytest.mark.parametrize(
    "selector", [SampledRows(0.4), PooledQueries(0.4), TABLE], ids=lambda x: x.name
)
def test_a_choice_depends_on_nothing_but_the_text(selector: Any) -> None:
    """Not on pieces, on room in the cache, or on the other rows of a batch and their order."""
    whole = TOKENS - 70
    query, key = draw(1, batch=2)
    kept, _ = lists(selector, query[:1], key[:1], whole=whole)
    pieces = []
    for begin in range(0, TOKENS, 512):
        some = np.zeros((2, 512, *query.shape[2:]), np.float32)
        end = min(begin + 512, TOKENS)
        some[1, : end - begin] = query[0, begin:end]
        some[0, :256] = query[1, 256:512]  # another text, at another place
        room = np.pad(key[::-1], ((0, 0), (0, 200), (0, 0), (0, 0)))
        piece, _ = lists(selector, some, room, offset=[256, begin], whole=[900, whole])
        pieces.append(piece[1:, :, :, : kept.shape[3]])
    together = np.concatenate(pieces, axis=2)[:, :, : kept.shape[2]]
    np.testing.assert_array_equal(together, kept)


def test_short_prompts_and_ends_are_read_densely() -> None:
    query, key = draw(2, batch=2)
    kept, counts = lists(SampledRows(0.1), query, key, whole=[TOKENS - 1, 600], threshold=600)
    every = [full_blocks(tile) for tile in range(TOKENS // 128)]
    for tile, full in enumerate(every):
        sparse = [set(np.nonzero(kept[0, head, tile])[0]) for head in range(KV_HEADS)]
        if tile >= (TOKENS - 1 - 128) // 128:
            assert sparse == [full, full]
        if tile < 4:
            assert set(np.nonzero(kept[1, 0, tile])[0]) == full
    assert counts[0, :, 7].sum() < 2 * len(every[7])


def test_keys_in_8_bits_choose_what_they_stand_for() -> None:
    """Scales of another size for each key: what is not multiplied by them chooses otherwise."""
    query, key = draw(3)
    rows = make_rows(query.shape, dca=DCA, rope=RopeConfig())
    index = jnp.arange(TOKENS, dtype=jnp.int32)[None]
    rotated = rotate_keys(jnp.asarray(key), index, dca=DCA, inv_freq=rows.inv_freq)
    q, scale = quantize(rotated, jnp.int8)
    back = np.asarray(q, np.float32) * np.asarray(scale)[..., None]
    raw = rotate_keys_back(back)
    scales = Scales(*[jnp.swapaxes(scale, 1, 2)[None]] * 2)
    ours, _ = lists(SampledRows(0.4), query, np.asarray(q), scales=scales)
    theirs, _ = lists(SampledRows(0.4), query, raw)
    np.testing.assert_array_equal(ours, theirs)


def rotate_keys_back(key: np.ndarray) -> np.ndarray:
    half = DIM // 2
    turn = np.exp(-1j * (np.arange(key.shape[1]) % S)[:, None, None] * FREQUENCY)
    k = (key[..., :half] + 1j * key[..., half:]) * turn
    return np.concatenate([k.real, k.imag], axis=-1).astype(np.float32)


# --- in use ---


SHARE, THRESHOLD = 0.4, 300
PAPER = DCAConfig(chunk_len=48, max_query_position=63)
SPARSE = Sparse(selector=SampledRows(SHARE), threshold=THRESHOLD)
TEXT = np.random.default_rng(5).integers(6, 300, 1000).tolist()


@pytest.fixture(scope="module")
def sparse_llm(folder: Path) -> dca_jax.LLM:
    return dca_jax.load(folder, dca=PAPER, dtype="float32", sparse=SPARSE)


def pairs_read(weights: np.ndarray) -> np.ndarray:
    """Pairs of tokens that are read: the definition of `rows`, from a layer's dense weights."""
    p = weights[0]
    heads, length, _ = p.shape
    blocks = -(-length // 128)
    read = np.zeros(p.shape, bool)
    group = heads // 2
    for tile in range(blocks):
        rows = slice(128 * tile, 128 * (tile + 1))
        if length <= THRESHOLD or 128 * (tile + 1) > length - 128:
            read[:, rows] = True
            continue
        sampled = block_sums(p[:, 128 * tile + 15 : 128 * (tile + 1) : 16])[..., : tile + 1]
        for head in range(2):
            own = slice(head * group, (head + 1) * group)
            mass = sampled[own].mean(axis=(0, 1)) + sampled[own].max(axis=(0, 1)) / 8
            kept = chosen_of(mass, tile, SHARE)
            for block in kept | (set(range(tile + 1)) - full_blocks(tile, 48)):
                read[own, rows, 128 * block : 128 * (block + 1)] = True
    return read[None]


def in_float64(llm: dca_jax.LLM, chosen: dense_llama.Chosen) -> np.ndarray:
    """Log-probabilities [T, V] of TEXT by a model that shares no code with ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best, "LEAST", LEAST)
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), llm.model.params())
        text, config = np.asarray([TEXT]), llm.model.config
        found = dense_llama.logits(params, text, config, 48, 63, chosen=chosen, xp=np)[0]
        return found - np.logaddexp.reduce(found, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def expected(sparse_llm: dca_jax.LLM) -> np.ndarray:
    return in_float64(sparse_llm, pairs_read)


def test_a_text_is_read_sparsely(sparse_llm: dca_jax.LLM, expected: np.ndarray) -> None:
    """At once and in pieces, beside a model in float64 that masks what is not read."""
    whole = jax.nn.log_softmax(sparse_llm.logits([TEXT])[0])
    np.testing.assert_allclose(whole, expected, atol=1e-2)
    pieces = token_nll(sparse_llm.model, np.asarray([TEXT]), capacity=1280)[0]
    np.testing.assert_allclose(pieces, -expected[np.arange(999), TEXT[1:]], atol=1e-2)
    dense = in_float64(sparse_llm, lambda weights: True)
    assert np.abs(dense[np.arange(999), TEXT[1:]] + pieces).max() > 0.1


@pytest.mark.slow
def test_a_prefix_reads_its_dense_end_again(sparse_llm: dca_jax.LLM) -> None:
    """What a cache holds is what one reading of the whole prompt leaves in it."""
    prefix = sparse_llm.prefill(TEXT[:900], room=200)
    assert prefix.shared(TEXT) == (900 - 128) // 128 * 128
    assert prefix.shared(TEXT[:890]) == (890 - 128) // 128 * 128
    assert prefix.shared(TEXT[:300]) == 0  # read densely, all of it
    cache = prefix.take(sparse_llm.model, prefix.shared(TEXT), 1100)
    whole = room(sparse_llm, 1, cache.capacity)
    run, whole = (Run(sparse_llm.model, [TEXT], max_new_tokens=1, cache=x) for x in (cache, whole))
    run.read_prompts()
    whole.read_prompts()
    ours, theirs = (np.asarray(x.cache.value)[:, 0, :1000] for x in (run, whole))
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    # Another prompt has been read in it, and its end densely, within the prefix.
    prefix.give_back(run.cache, TEXT, len(TEXT))
    cache = prefix.take(sparse_llm.model, prefix.shared(TEXT[:600]), 1100)
    prefix.give_back(cache, TEXT[:600], 600)
    assert prefix.shared(TEXT) == (600 - 128) // 128 * 128


def room(llm: dca_jax.LLM, batch: int, capacity: int = 1280) -> KVCache:
    return KVCache.create(llm.model.config, batch=batch, capacity=capacity, dtype=jnp.float32)


@pytest.mark.slow
def test_rows_of_a_batch_are_read_as_each_alone(
    sparse_llm: dca_jax.LLM, expected: np.ndarray
) -> None:
    """One long and sparse, one short and dense, in one batch."""
    prompts = [TEXT, TEXT[:200]]
    run = Run(sparse_llm.model, prompts, max_new_tokens=1, cache=room(sparse_llm, 2))
    logits = sparse_llm.model.unembed(run.read_prompts())
    first = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(first[0], expected[-1], atol=1e-2)
    short = jax.nn.log_softmax(sparse_llm.logits([TEXT[:200]])[0, -1])
    np.testing.assert_allclose(first[1], short, atol=1e-2)


@pytest.mark.slow
def test_meshes_of_tensor_and_data(folder: Path, expected: np.ndarray) -> None:
    mesh = make_mesh("data=2,tensor=2")
    llm = dca_jax.load(folder, dca=PAPER, dtype="float32", sparse=SPARSE, mesh=mesh)
    found = token_nll(llm.model, np.asarray([TEXT, TEXT[::-1]]), capacity=1280)
    wanted = -expected[np.arange(999), TEXT[1:]]
    np.testing.assert_allclose(found[0], wanted, atol=1e-2)


def test_what_is_refused(folder: Path, sparse_llm: dca_jax.LLM) -> None:
    rerope = ReRoPE(window=8, trained_length=64)
    with pytest.raises(InputError, match="ReRoPE does not support sparse prefill"):
        dca_jax.load(folder, dca=rerope, sparse="rows")
    with pytest.raises(InputError, match="ReRoPE does not support sparse prefill"):
        with_method(sparse_llm.model, "rerope", 64)
    with pytest.raises(InputError, match=r"rows:0\.1: this mesh splits texts along `context`"):
        dca_jax.load(folder, sparse="rows", mesh="context=2")
    tokens, lengths = jnp.zeros((1, 128), jnp.int32), jnp.asarray([128], jnp.int32)
    with pytest.raises(InputError, match=r"sparse prefill .*, which has no gradient"):
        sparse_llm.model.balanced_hidden_states(tokens, lengths)
    with pytest.raises(InputError, match="pieces of a multiple of 128 tokens"):
        sparse_llm.model.hidden_states(
            tokens[:, :64], cache=room(sparse_llm, 1), context_lengths=lengths
        )
    table, two = jnp.zeros((1, 2), jnp.int32), {"pages": 2, "page": 128, "dtype": jnp.float32}
    pool = create_pool(sparse_llm.model.config, **two)._asdict()
    none = jnp.zeros((1,), jnp.int32)
    paged = PagedCache(**pool, pages=table, lengths=none, frequency_lengths=none)
    with pytest.raises(InputError, match="a paged cache cannot be read sparsely"):
        sparse_llm.model.hidden_states(tokens, cache=paged, context_lengths=lengths)
    with pytest.raises(InputError, match=r"a server reads densely, .*sparse='off'"):
        Engine(sparse_llm, context=128, rows=1, pages=2)
    refused = invoke("generate", folder, "Call me", "--sparse", "xattention")
    assert refused.exit_code == 2
    assert "expected one of auto, off, rows" in refused.stderr
    said = invoke("generate", folder, "Call me", "--sparse", "rows", "--max-new-tokens", "1")
    assert said.exit_code == 0


def test_a_checkpoint_is_read_as_it_asks(folder: Path, tmp_path: Path, caplog: Any) -> None:
    """Its table, its threshold; and densely by methods that are not its own."""
    copied = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((copied / "config.json").read_text())
    config["dual_chunk_attention_config"] = {
        "chunk_size": 64,
        "local_size": 16,
        "sparse_attention_enabled": True,
        "sparse_attention_threshold": 500,
    }
    (copied / "config.json").write_text(json.dumps(config))
    heads = {str(n): [qwen_1m.KIND, 30, 8, 1.0] for n in range(config["num_attention_heads"])}
    table = json.dumps([heads] * config["num_hidden_layers"])
    (copied / "sparse_attention_config.json").write_text(table)
    how = dca_jax.load(copied).model.sparse
    assert how is not None
    assert (how.described, how.by_checkpoint) == ("qwen-1m beyond 500 tokens", True)
    assert "as set in the checkpoint" in caplog.text
    told = invoke("info", copied)
    assert re.search(r"long prompts \(auto\)\W+qwen-1m beyond 500 tokens", told.stdout)
    opened = open_model(copied, dca=None).llm.model
    assert with_method(opened, "dca", 64).sparse == how
    for method in ("rope", "rerope"):
        assert with_method(opened, method, 64).sparse is None
    assert dca_jax.load(copied, dca=None).model.sparse is None
    assert dca_jax.load(copied, sparse="off").model.sparse is None
    assert dca_jax.load(copied, mesh="context=2").model.sparse is None  # says so, and is dense
    # ModelOpt's file of the same name says nothing of this.
    (copied / "sparse_attention_config.json").write_text('{"config_groups": {}}')
    how = dca_jax.load(copied).model.sparse
    assert how is not None
    assert how.selector == SampledRows()


# --- the kernel ---


@pytest.mark.parametrize(
    ("count", "heads", "dim"), [(8, 28, 128), (16, 28, 128), (4, 4, 64), (8, 4, 256)]
)
def test_the_kernel_lowers_where_it_fits(count: int, heads: int, dim: int) -> None:
    dca = DCAConfig(chunk_len=1024, max_query_position=1536)

    def scores(query: jax.Array, key: jax.Array, _: Any, layer: jax.Array, rows: Any) -> jax.Array:
        piece = Piece(query, key, layer, rows, rows.lengths, None, layer, layer)
        wanted = jnp.ones((1, piece.num_tiles), bool)
        return SampledRows(0.1, count).scores(piece, wanted, dca)

    text = lower(scores, *shapes(1, 512, 8192, heads, 4, dim, jnp.bfloat16))
    assert ("dca_block_masses" in text) == (dim < 256)


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "offset"), [(8, 2560), (16, 512), (4, 3584)])
def test_the_kernel_scores_as_plain_xla_does(count: int, offset: int) -> None:
    """Across three phases, the own block of each tile, and heads that fill a unit, or two."""
    dca = DCAConfig(chunk_len=1024, max_query_position=1536)
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(2, 512, 16, 128)), jnp.bfloat16)
    key = jnp.asarray(rng.normal(size=(3, 2, 4100, 2, 128)), jnp.bfloat16)

    def scores(query: jax.Array, key: jax.Array) -> jax.Array:
        rows = make_rows(query.shape, dca=dca, rope=RopeConfig(), query_offset=offset)
        piece = Piece(query, key, jnp.int32(1), rows, rows.lengths, None, *[jnp.int32(0)] * 2)
        return SampledRows(0.1, count).scores(piece, jnp.ones((2, 4), bool), dca)

    ours = np.asarray(jax.jit(scores)(query, key))
    with jax.default_device(jax.devices("cpu")[0]):
        theirs = np.asarray(jax.jit(scores)(*(jnp.asarray(np.asarray(x)) for x in (query, key))))
    met = np.arange(theirs.shape[3]) <= offset // 128 + np.arange(4)[:, None]
    np.testing.assert_allclose(np.where(met, ours, 0), np.where(met, theirs, 0), atol=1e-4)


# --- names ---


def test_names() -> None:
    wish = SparseConfig(threshold=4096)
    options: Any = {"layers": 1, "heads": 2}
    assert choose_sparse("off", wish, **options) is None
    assert choose_sparse("auto", wish, **options) is None
    assert choose_sparse("auto", None, **options) is None
    for name, selector in {
        "rows": SampledRows(0.1, 8),
        "rows:0.05": SampledRows(0.05, 8),
        "rows4": SampledRows(0.1, 4),
        "rows16:0.2": SampledRows(0.2, 16),
        "pooled": PooledQueries(0.1),
        "pooled:0.05": PooledQueries(0.05),
        "skip-softmax:0.001": SkipSoftmax(0.001),
    }.items():
        found = choose_sparse(name, wish, **options)
        assert found == Sparse(selector=selector, threshold=4096)
        assert choose_sparse(selector.name, None, **options) == Sparse(selector=selector)
    for name in ("rows:", "rows:0", "rows:1.5", "rows:x", "rows3", "xattention", "qwen-1m"):
        with pytest.raises(InputError, match=r"rows"):
            choose_sparse(name, wish, **options)
    for name in ("skip-softmax", "skip-softmax:1", "skip-softmax:x"):
        with pytest.raises(InputError, match="fraction of the largest weight"):
            choose_sparse(name, wish, **options)


def test_short_prompts_pass_by_nothing() -> None:
    """Of a batch, the rows up to the threshold; what is passed by of others is not known before."""
    how = Sparse(selector=SkipSoftmax(0.01), threshold=500)
    query, key = jnp.zeros((2, 256, 2, 16)), jnp.zeros((1, 2, 512, 1, 16))
    offset, whole = jnp.asarray([0, 256], jnp.int32), jnp.asarray([400, 900], jnp.int32)
    rows = make_rows(query.shape, dca=None, rope=RopeConfig(), query_offset=offset)
    piece = Piece(query, key, jnp.int32(0), rows, whole, None, *[jnp.int32(0)] * 2)
    blocks = how.blocks(piece, PLAIN)
    np.testing.assert_allclose(np.asarray(blocks.skip), [-np.inf, np.log(0.01)], rtol=1e-6)
    assert np.asarray(blocks.counts.sum(axis=(1, 3)))[:, :2].tolist() == [[0, 1], [2, 3]]
    assert how.told(400) == "all keys"
    assert how.told(900) == "skip-softmax:0.01, all keys scored"


def test_what_a_checkpoint_asks_for() -> None:
    layer = {"0": ["vertical_and_slash", 30, 800, 0.9], "1": ["vertical_and_slash", 5, 9, 1]}
    wish = SparseConfig(patterns=json.dumps([layer]), last_q=32)
    found = choose_sparse("auto", wish, layers=1, heads=2)
    table = VerticalSlash(((130, 5),), ((800, 9),), last_q=32)
    assert found == Sparse(selector=table, by_checkpoint=True)
    assert choose_sparse("qwen-1m", wish, layers=1, heads=2) == Sparse(selector=table)
    # ModelOpt's file of this name, and a wish without a table.
    for patterns in ('{"config_groups": {}}', None):
        other = SparseConfig(patterns=patterns, enabled=True)
        found = choose_sparse("auto", other, layers=1, heads=2)
        assert getattr(found, "selector", None) == SampledRows()
    for change, message in [
        ([], "qwen-1m needs the checkpoint's table"),
        ([layer, layer], "2 layers, but the model has 1"),
        ([{"0": layer["0"]}], "heads 0 to 1"),
        ([layer | {"1": ["stream_llm", 1, 2, 3]}], "head 1 must be"),
    ]:
        with pytest.raises(InputError, match=message):
            wrong = SparseConfig(patterns=json.dumps(change))
            choose_sparse("qwen-1m", wrong, layers=1, heads=2)


def test_what_two_prompts_share() -> None:
    sparse = Sparse(selector=SampledRows(), threshold=1000)
    assert sparse.shared(700, 900, 1000) == 700  # both dense
    assert sparse.shared(700, 900, 1001) == 0  # one is, and the other is not
    assert sparse.shared(5000, 5000, 9000) == 4864
    assert sparse.shared(4000, 9000, 9000) == 3968
    assert sparse.shared(9000, 9000, 9100) == (9000 - 128) // 128 * 128
