"""The walks that the Pallas TPU kernels follow, and what else they have of their own.

What they compute: test_backends.py, in TPU interpret mode. `tpu_aot/` compiles them for real chips.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.core import subjaxprs
from kernels import QUICK, ROPE, draw

from dca_jax.attention import dual_chunk_attention, merge_passes, mosaic_tpu, op
from dca_jax.attention.mosaic_tpu import runs, steps, tiles
from dca_jax.dca import PHASES, DCAConfig, Phase
from dca_jax.device import Device
from dca_jax.errors import InputError

S = 24  # no multiple of the block
DCA = DCAConfig(chunk_len=S, max_query_position=36)
V5E = Device("tpu", "TPU v5e", None)

reference = jax.jit(functools.partial(op.attend, dca=DCA, implementation="reference"))


@pytest.mark.usefixtures("interpreted_mosaic_tpu")
def test_decode_reads_one_layer_of_a_ragged_cache() -> None:
    """Rows at different lengths; keys beyond them do not matter; an odd number of heads."""
    offset = jnp.asarray([0, S - 1, 2 * S, 3 * S + 5], jnp.int32)
    q, k, v = draw(5, 4, 2, 90, 3, 3, 64)
    rows = op.make_rows(q.shape, dca=DCA, rope=ROPE, query_offset=offset)
    beyond = jnp.arange(90)[None, :, None, None] >= (offset + 2)[:, None, None, None]
    caches = [jnp.stack([x + 1, jnp.where(beyond, 1e4, x), x - 1]) for x in (k, v)]
    layer = jnp.int32(1)
    options: dict[str, Any] = {"dca": DCA, "rows": rows, "layer": layer}
    read = functools.partial(op.attend, implementation="mosaic_tpu", **options)
    out = jax.jit(read, compiler_options=QUICK)(q, *caches)
    expected = reference(q, k, v, rows=rows)
    np.testing.assert_allclose(out, expected, atol=2e-5, rtol=0)


@pytest.mark.usefixtures("interpreted_mosaic_tpu")
def test_decode_merges_slices_of_a_cache() -> None:
    """As devices that share a cache do; the first row attends to no key of the last slice."""
    q, k, v = draw(7, 2, 2, 75, 2, 1, 128)
    rows = op.make_rows(q.shape, dca=DCA, rope=ROPE, query_offset=jnp.asarray([40, 73], jnp.int32))

    def merged(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        parts = []
        for begin, end in ((0, 51), (51, 75)):
            at = rows._replace(key_offset=jnp.full(2, begin, jnp.int32))
            keys, values = k[None, :, begin:end], v[None, :, begin:end]
            options: dict[str, Any] = {"dca": DCA, "phases": PHASES, "with_lse": True}
            parts.append(mosaic_tpu.forward(q, keys, values, jnp.int32(0), at, **options))
        return merge_passes([out for out, _ in parts], [lse for _, lse in parts])[0]

    expected = reference(q, k, v, rows=rows)
    out = jax.jit(merged, compiler_options=QUICK)(q, k, v)
    np.testing.assert_allclose(out, expected, atol=2e-5, rtol=0)


def distance(ours: jax.Array, theirs: jax.Array) -> float:
    difference = ours.astype(jnp.float32) - theirs
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(theirs))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_on_a_tpu(dtype: Any, dim: int) -> None:
    """Value and gradient, and decoding, of ragged rows, with the chip's own blocks."""
    if jax.default_backend() != "tpu":
        pytest.skip("needs a TPU")
    check_on_a_tpu(dtype, dim)


def check_on_a_tpu(dtype: Any, dim: int, s: int = 640) -> None:
    dca = DCAConfig(chunk_len=s, max_query_position=s + s // 3)
    length = 5 * s + 7
    inputs = draw(7, 2, length, length, 8, 2, dim, dtype)
    lengths = jnp.asarray([length, s + 1], jnp.int32)
    limit = 1e-4 if dtype == jnp.float32 else 1e-2

    def run(implementation: str, *inputs: jax.Array) -> list[jax.Array]:
        options: dict[str, Any] = {"dca": dca, "rope": ROPE, "implementation": implementation}
        attention = functools.partial(dual_chunk_attention, **options)
        out, pull_back = jax.vjp(functools.partial(attention, lengths=lengths), *inputs)
        # The last two tokens of the first row, the second row being shorter.
        query = jnp.concatenate([inputs[0][:1, -2:], inputs[0][1:, s - 1 : s + 1]])
        return [out, *pull_back(inputs[0]), attention(query, *inputs[1:], query_offset=lengths - 2)]

    with jax.default_matmul_precision("highest"):
        ours = jax.jit(run, static_argnums=0)("mosaic_tpu", *inputs)
        wide = (x.astype(jnp.float32) for x in inputs)
        theirs = jax.jit(run, static_argnums=0)("reference", *wide)
    for mine, expected in zip(ours, theirs, strict=True):
        for one, other in zip(mine, expected, strict=True):
            assert distance(one, other) < limit


@pytest.mark.parametrize("num_queries", [2, 300], ids=["decode", "prefill"])
def test_a_kernel_writes_the_log_sum_exp_on_request_only(
    num_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number a query and head, and none where nobody trains."""
    monkeypatch.setattr(op, "current_device", lambda: V5E)
    monkeypatch.setattr(mosaic_tpu, "current_device", lambda: V5E)
    inputs = draw(0, 2, num_queries, num_queries, 4, 2, 128)
    options: dict[str, Any] = {"dca": DCA, "rope": ROPE, "implementation": "mosaic_tpu"}
    attention = functools.partial(dual_chunk_attention, **options)

    def training(*inputs: jax.Array) -> jax.Array:
        return jax.vjp(attention, *inputs)[0]

    queries = 2 * num_queries * 4
    assert written(attention, *inputs) == [queries * 128]
    assert written(training, *inputs) == [queries * 128, queries]


def written(function: Callable[..., jax.Array], *inputs: jax.Array) -> list[int]:
    """Sizes of what the one kernel of a program writes."""
    found, left = [], [jax.make_jaxpr(function)(*inputs).jaxpr]
    while left:
        jaxpr = left.pop()
        found += [e.outvars for e in jaxpr.eqns if e.primitive.name == "pallas_call"]
        left += [x for x in subjaxprs(jaxpr) if x.eqns]
    (results,) = found
    return [math.prod(x.aval.shape) for x in results]


# --- the steps of the grids --------------------------------------------------------------------


def rows_at(offset: list[int], lengths: list[int], key_offset: list[int]) -> op.Rows:
    numbers = (jnp.asarray(x, jnp.int32) for x in (offset, lengths, key_offset, lengths))
    return op.Rows(jnp.zeros((1, 1)), jnp.ones(len(offset)), *numbers)


def true_phases(shape: tuple[int, int], rows: op.Rows, row: int, s: int) -> np.ndarray:
    """[T, S]: how many chunks, at most two, lie between query and key; -1: not attended to."""
    offset, length, key_offset = (int(x[row]) for x in rows[2:5])
    i = offset + np.arange(shape[0])[:, None]
    j = key_offset + np.arange(shape[1])[None, :]
    return np.where((j <= i) & (i < length), np.minimum(i // s - j // s, 2), -1)


def computed_phases(
    layout: steps.Steps,
    tables: steps.Tables,
    shape: tuple[int, int],
    tile: tuple[int, int],
    rows: op.Rows,
    row: int,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    *,
    keys_outer: bool,
) -> np.ndarray:
    """`true_phases` as a kernel sees them; asserts that no pair is computed twice."""
    offset, length, key_offset = (int(x[row]) for x in rows[2:5])
    found = np.full(shape, -1)
    begun, ended = set(), set()
    assert int(tables.num_steps) <= layout.max_steps
    grid = np.mgrid[: layout.num_workers, : int(tables.num_steps)]
    workers, numbers = grid.astype(np.int32).reshape(2, -1)
    read = layout.read(tables.words, jnp.int32(row), jnp.asarray(workers), jnp.asarray(numbers))
    columns = [np.broadcast_to(x, workers.shape).tolist() for x in read]
    before = None
    for worker, outer, inner, _, run_index, word in zip(workers.tolist(), *columns, strict=True):
        if not word & (steps.ACTIVE | steps.BLOCK_BEGIN):
            assert before == (worker, outer, inner)  # an idle step loads nothing
        before = worker, outer, inner
        if word & steps.BLOCK_BEGIN:
            begun.add((outer, worker))
        if word & steps.ACTIVE:
            assert (outer, worker) in begun - ended
            q, kv = (inner, outer) if keys_outer else (outer, inner)
            key_begin, key_end, succ = (int(x) for x in tables.runs[run_index : run_index + 3])
            t = np.arange(q * tile[0], min((q + 1) * tile[0], shape[0]))
            j = np.arange(kv * tile[1], min((kv + 1) * tile[1], shape[1]))
            assert t.size
            assert j.size
            i = offset + t[:, None]
            behind = (i >= succ).astype(int) + (i >= succ + dca.chunk_len)
            mask = (key_begin <= j) & (j < key_end) & (j < i + 1 - key_offset) & (i < length)
            mask &= np.isin(behind, [runs.CHUNKS_BEHIND[phase] for phase in phases])
            if word & steps.FULL:
                assert mask.all()
                assert t.size == tile[0]
            here = found[np.ix_(t, j)]
            assert (here[mask] == -1).all()
            found[np.ix_(t, j)] = np.where(mask, behind, here)
        if word & steps.BLOCK_END:
            ended.add((outer, worker))
    assert begun == ended
    assert {outer for outer, _ in begun} == set(range(layout.num_outer))
    return found


def make_steps(
    shape: tuple[int, int],
    rows: op.Rows,
    dca: DCAConfig,
    phases: tuple[Phase, ...],
    tile: tuple[int, int],
    *,
    keys_outer: bool = False,
    splits: int | None = None,
) -> tuple[steps.Steps, steps.Tables]:
    """Computed in one program: one operation after another would be compiled for each shape."""
    make_runs = runs.query_runs if keys_outer else runs.kv_runs
    layouts: list[steps.Steps] = []

    def make_tables(rows: op.Rows) -> steps.Tables:
        made = make_runs(*shape, rows, dca, phases, tile)
        if splits is None:
            layout, tables = steps.pair_blocks(*made)
        else:
            layout, tables = steps.split_block(*made, splits)
        layouts.append(layout)
        return tables

    words, numbers, num_steps = jax.jit(make_tables, compiler_options=QUICK)(rows)
    return layouts[0], steps.Tables(np.asarray(words), np.asarray(numbers), num_steps)


@pytest.mark.parametrize(
    ("s", "shape", "tile"),
    [
        pytest.param(24, (70, 90), (16, 16), marks=pytest.mark.slow),
        (7, (61, 61), (16, 24)),  # many chunks a block
        (32, (90, 64), (12, 16)),  # blocks of keys divide the chunk
        (1, (9, 12), (4, 5)),
        (40, (5, 150), (8, 16)),  # less than a block of queries
    ],
)
def test_every_pair_is_computed_once_in_its_phase(
    s: int, shape: tuple[int, int], tile: tuple[int, int]
) -> None:
    rng = np.random.default_rng(s)
    offset = [0, 0, 0, *rng.integers(0, 100, 4).tolist(), 3 * s]
    key_offset = [0, s, 200, *rng.integers(0, 90, 4).tolist(), 0]
    lengths = [max(x + shape[0] - int(rng.integers(0, 9)), 0) for x in offset]
    rows = rows_at(offset, lengths, key_offset)
    dca = DCAConfig(chunk_len=s, max_query_position=s)
    each = (PHASES, PHASES[1:], ("inter",), ("succ",), ("intra",)) if s == 24 else (PHASES,)
    for phases in each:
        codes = [runs.CHUNKS_BEHIND[phase] for phase in phases]
        ways: list[tuple[tuple[int, int], dict[str, Any]]] = [
            (tile, {}),
            (tile, {"keys_outer": True}),
            ((shape[0], tile[1]), {"splits": 2}),
        ]
        for size, way in ways:
            layout, tables = make_steps(shape, rows, dca, phases, size, **way)
            for row in range(len(offset)):
                expected = true_phases(shape, rows, row, s)
                keys_outer = way.get("keys_outer", False)
                arguments = (shape, size, rows, row, dca, phases)
                found = computed_phases(layout, tables, *arguments, keys_outer=keys_outer)
                np.testing.assert_array_equal(
                    found, np.where(np.isin(expected, codes), expected, -1)
                )


@pytest.mark.parametrize(
    ("chunk_len", "dims", "itemsizes"),
    [
        (2560, [128], [2]),
        pytest.param(2816, [64, 128, 256], [2, 4], marks=pytest.mark.slow),
        (3072, [128], [2]),
        (20240, [128], [2]),
    ],
)
def test_blocks_computed_at_128k_are_those_of_causal_attention(
    chunk_len: int, dims: list[int], itemsizes: list[int]
) -> None:
    """By the words that the index maps read: logits of all tiles computed, over the triangle's."""
    length = 131072
    rows = rows_at([0], [length], [0])
    dca = DCAConfig(chunk_len=chunk_len, max_query_position=chunk_len)
    ways = set()  # the tiles of any chip
    for kind, dim, itemsize in itertools.product(tiles.CHIPS, dims, itemsizes):
        heads = mosaic_tpu.Heads(query=32, kv=8, head_dim=dim)
        chosen = tiles.choose_tiles(Device("tpu", kind, None), heads, dca, itemsize)
        ways |= {(chosen.forward, False), (chosen.dq, False), (chosen.dkv, True)}
    for tile, keys_outer in ways:
        _, tables = make_steps((length, length), rows, dca, PHASES, tile, keys_outer=keys_outer)
        computed = np.count_nonzero(tables.words & steps.ACTIVE)
        ratio = computed * tile[0] * tile[1] / (length * (length + 1) / 2)
        assert 1 <= ratio < 1.02


def test_workers_have_equally_many_steps_under_causal_attention() -> None:
    """So cores that share the workers have equal work, and no step is idle."""
    length, dca = 32768, DCAConfig(chunk_len=3072, max_query_position=4095)
    rows = rows_at([0], [length], [0])
    layout, tables = make_steps((length, length), rows, dca, PHASES, (1024, 1024))
    words = tables.words.reshape(layout.num_workers, layout.max_steps)
    assert set(np.count_nonzero(words & steps.ACTIVE, axis=1)) == {33}
    assert int(tables.num_steps) == 33


def test_blocks_of_keys_divide_the_chunk() -> None:
    assert [tiles.choose_block_kv(s, 1024) for s in (2048, 2560, 2816, 3072, 4096, 20240)] == [
        1024,
        1280,
        1408,
        1024,
        1024,
        880,
    ]
    assert tiles.choose_block_kv(20011, 512) == 512  # a prime
    assert tiles.choose_block_kv(3, 512) == 128


# --- what runs where ---------------------------------------------------------------------------


def test_says_why_it_cannot_run() -> None:
    dca = DCAConfig(chunk_len=2048, max_query_position=3000)

    def reason(
        device: Device = V5E,
        dim: int = 128,
        kv_heads: int = 8,
        dtype: Any = jnp.bfloat16,
        length: int = 4096,
    ) -> Any:
        query = jax.ShapeDtypeStruct((1, length, 4 * kv_heads, dim), dtype)
        key = jax.ShapeDtypeStruct((1, 1, length, kv_heads, dim), dtype)
        return mosaic_tpu.unsupported(device, query, key, dca)

    assert reason() is None
    assert reason(dim=64, kv_heads=3) is None
    for elsewhere in (Device("cpu", "cpu", None), Device("gpu", "NVIDIA H200", (9, 0))):
        assert "needs a TPU (one of TPU v4, TPU v5" in reason(elsewhere)
        assert f"got {elsewhere.kind} ({elsewhere.platform})" in reason(elsewhere)
    assert "head_dim" in reason(dim=80)
    assert "float16" in reason(dtype=jnp.float16)
    assert "smaller pieces" in reason(length=2**21)
    for kind in tiles.CHIPS:
        for dim in (64, 128, 256):
            for dtype in (jnp.bfloat16, jnp.float32):
                assert reason(Device("tpu", kind, None), dim=dim, dtype=dtype) is None


def test_what_a_tpu_runs_where_nobody_names_an_implementation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(op, "current_device", lambda: V5E)
    query = jax.ShapeDtypeStruct((1, 512, 8, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 1, 4096, 2, 128), jnp.bfloat16)
    for kinds in ({}, {"listed": True}, {"paged": True}):
        assert op.choose_implementation(None, query, key, DCA, **kinds) == "mosaic_tpu"
    both = {"listed": True, "paged": True}
    assert op.choose_implementation(None, query, key, DCA, **both) == "xla"
    with pytest.raises(InputError, match="lists of key blocks or pages, but not both"):
        op.choose_implementation("mosaic_tpu", query, key, DCA, **both)
    # The lists of a tile of all rows and heads are to fit into scalar memory.
    many = jax.ShapeDtypeStruct((1, 8, 2**21, 8, 128), jnp.bfloat16)
    queries = jax.ShapeDtypeStruct((8, 512, 8, 128), jnp.bfloat16)
    assert op.choose_implementation(None, queries, many, op.PLAIN, listed=True) == "xla"


def test_it_says_that_it_needs_a_tpu() -> None:
    inputs = draw(0, 1, 8, 8, 2, 1, 128)
    with pytest.raises(InputError, match=r"'mosaic_tpu' cannot run: it needs a TPU"):
        dual_chunk_attention(*inputs, dca=DCA, rope=ROPE, implementation="mosaic_tpu")
