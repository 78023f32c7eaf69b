"""The Mosaic GPU kernels without a GPU: every variant lowers for an H200; the choice of backend.

What they compute is tested on a GPU, in test_gpu.py: WGMMA has no interpreter.
"""

import itertools
import logging
import re
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import device, lower, lower_backward, lower_forward, shapes

from dca_jax.attention import attend, dual_chunk_attention, mosaic_gpu
from dca_jax.attention.backend import PLAIN, KeyBlocks, Rows
from dca_jax.attention.blocks import num_tiles
from dca_jax.attention.mosaic_gpu import backward_spans, decode, forward_tiles, widening
from dca_jax.attention.mosaic_gpu.decode_tiles import DecodeTiles
from dca_jax.attention.mosaic_gpu.forward_cta import Problem, Refs, Shared
from dca_jax.attention.mosaic_gpu.forward_schedule import Worker
from dca_jax.attention.mosaic_gpu.ranges import (
    Keys,
    any_met,
    full_and_edge_walks,
    locate,
    ranges_of_queries,
    recall,
    remember,
    steps,
)
from dca_jax.attention.op import choose_implementation
from dca_jax.attention.softmax import FAR
from dca_jax.attention.stored import Scales
from dca_jax.dca import PHASES, DCAConfig, Phase
from dca_jax.errors import InputError
from dca_jax.rope import RopeConfig

DCA = DCAConfig.paper(4096)

# Every head_dim in either dtype, every grouping, every set of phases, and lengths that no block
# divides.
VARIANTS = [
    pytest.param((1, 4096, 4096, 32, 8, 128, jnp.bfloat16), DCA, PHASES, id="gqa"),
    pytest.param((2, 1003, 1005, 6, 2, 128, jnp.float16), DCA, PHASES[1:], id="ragged"),
    pytest.param(
        (1, 4096, 4096, 4, 4, 128, jnp.bfloat16),
        PLAIN,
        ("intra",),
        id="plain",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        (1, 1024, 1024, 8, 1, 64, jnp.bfloat16), DCA, ("inter",), id="inter", marks=pytest.mark.slow
    ),
    pytest.param(
        (1, 1024, 1024, 4, 4, 64, jnp.float16), DCA, PHASES, id="mha", marks=pytest.mark.slow
    ),
    pytest.param(
        (1, 1024, 1024, 4, 2, 256, jnp.float16), DCA, ("succ",), id="succ", marks=pytest.mark.slow
    ),
    pytest.param(
        (1, 1024, 1024, 8, 1, 256, jnp.bfloat16),
        DCA,
        ("intra",),
        id="intra",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("sizes", "dca", "phases"), VARIANTS)
def test_forward_lowers(sizes: tuple, dca: DCAConfig, phases: tuple[Phase, ...]) -> None:
    assert "mosaic_gpu" in lower_forward(mosaic_gpu, shapes(*sizes), dca, phases)


@pytest.mark.parametrize("dim", [128, 256])
def test_forward_without_log_sum_exp_lowers(dim: int) -> None:
    sizes = (1, 1024, 1024, 4, 2, dim, jnp.bfloat16)
    text = lower_forward(mosaic_gpu, shapes(*sizes), DCA, PHASES, with_lse=False)
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(("sizes", "dca", "phases"), VARIANTS)
def test_backward_lowers(sizes: tuple, dca: DCAConfig, phases: tuple[Phase, ...]) -> None:
    assert "mosaic_gpu" in lower_backward(mosaic_gpu, shapes(*sizes), dca, phases)


@pytest.mark.parametrize("dim", [128, pytest.param(256, marks=pytest.mark.slow)])
def test_the_gradient_lowers_under_vmap_as_one_launch_after_another(dim: int) -> None:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        options: Any = {"dca": DCA, "rope": RopeConfig(), "implementation": "mosaic_gpu"}
        return jnp.sum(dual_chunk_attention(q, k, v, **options).astype(jnp.float32))

    query = jax.ShapeDtypeStruct((3, 1, 256, 4, dim), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((3, 1, 256, 2, dim), jnp.bfloat16)
    text = lower(jax.vmap(jax.grad(loss, (0, 1, 2))), query, key, key)
    assert "stablehlo.while" in text
    assert "dca_backward" in text


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype"),  # every two of grouping, head_dim and dtype together
    [
        (4, 4, 64, jnp.bfloat16),
        pytest.param(4, 4, 128, jnp.float16, marks=pytest.mark.slow),
        pytest.param(4, 4, 256, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(32, 8, 64, jnp.float16, marks=pytest.mark.slow),
        (32, 8, 128, jnp.bfloat16),
        pytest.param(32, 8, 256, jnp.float16, marks=pytest.mark.slow),
        pytest.param(8, 1, 64, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(8, 1, 128, jnp.float16, marks=pytest.mark.slow),
        (8, 1, 256, jnp.bfloat16),
    ],
)
def test_decoding_lowers(heads: int, kv_heads: int, dim: int, dtype: Any) -> None:
    sizes = (2, 1, 4096, heads, kv_heads, dim, dtype)
    assert "mosaic_gpu" in lower_forward(mosaic_gpu, shapes(*sizes), DCA, PHASES)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype", "cache"),
    [
        pytest.param(4, 4, 64, jnp.bfloat16, jnp.float8_e4m3fn, marks=pytest.mark.slow),
        pytest.param(32, 8, 64, jnp.float16, jnp.int8, marks=pytest.mark.slow),
        (32, 8, 128, jnp.bfloat16, jnp.int8),
        (8, 1, 128, jnp.float16, jnp.float8_e4m3fn),
        pytest.param(8, 1, 256, jnp.bfloat16, jnp.int8, marks=pytest.mark.slow),
        pytest.param(4, 4, 256, jnp.bfloat16, jnp.float8_e4m3fn, marks=pytest.mark.slow),
    ],
)
def test_decoding_from_8_bits_lowers(
    heads: int, kv_heads: int, dim: int, dtype: Any, cache: Any
) -> None:
    query, key, _, *rest = shapes(2, 1, 4096, heads, kv_heads, dim, dtype)
    key = jax.ShapeDtypeStruct(key.shape, cache)
    scale: Any = jax.ShapeDtypeStruct((2, 2, kv_heads, 4096), jnp.float32)

    def forward(*arrays: Any) -> Any:
        *given, scales = arrays
        options: Any = {"dca": DCA, "phases": PHASES, "with_lse": True, "scales": scales}
        return mosaic_gpu.forward(*given, **options)

    text = lower(forward, query, key, key, *rest, Scales(scale, scale))
    assert "dca_decode" in text
    before = re.search(r"stablehlo.convert.*(i8|f8E4M3FN)", text)
    assert before is None  # nothing is unpacked but on the chip


@pytest.mark.parametrize(
    ("num_queries", "heads", "kv_heads", "dim", "listed", "page", "cache"),
    [
        (1000, 28, 4, 128, True, None, None),
        pytest.param(1000, 8, 1, 256, True, 256, None, marks=pytest.mark.slow),
        pytest.param(1000, 9, 3, 64, False, 256, None, marks=pytest.mark.slow),
        (1000, 4, 2, 128, True, 128, jnp.int8),
        (1, 28, 4, 128, False, 256, None),
        (1, 8, 2, 128, False, 128, jnp.int8),
        pytest.param(1000, 4, 4, 64, True, 128, None, marks=pytest.mark.slow),
        pytest.param(1000, 4, 2, 128, False, 128, None, marks=pytest.mark.slow),
        pytest.param(2, 4, 4, 64, False, 128, None, marks=pytest.mark.slow),
        pytest.param(1, 8, 1, 256, False, 128, None, marks=pytest.mark.slow),
        pytest.param(1, 8, 2, 64, True, None, None, marks=pytest.mark.slow),
    ],
)
def test_lists_and_pages_lower(
    num_queries: int,
    heads: int,
    kv_heads: int,
    dim: int,
    listed: bool,
    page: int | None,
    cache: Any,
) -> None:
    """A few queries over a list are read by the prefill kernel."""
    arrays = shapes(2, num_queries, page or 4096, heads, kv_heads, dim, jnp.bfloat16)
    query, key, _, layer, rows = arrays
    options: dict[str, Any] = {}
    if page is not None:
        key = jax.ShapeDtypeStruct((2, 99, *key.shape[2:]), key.dtype)
        options["pages"] = jax.ShapeDtypeStruct((2, 4096 // page), jnp.int32)
    if cache is not None:
        key = jax.ShapeDtypeStruct(key.shape, cache)
        scale: Any = jax.ShapeDtypeStruct((*key.shape[:2], kv_heads, key.shape[2]), jnp.float32)
        options["scales"] = Scales(scale, scale)
    if listed:
        of_tiles = 2, kv_heads, num_tiles(num_queries)
        lists: Any = [jax.ShapeDtypeStruct((*of_tiles, n), jnp.int32) for n in (3, 7)]
        options["blocks"] = KeyBlocks(*lists)

    def forward(query: Any, key: Any, layer: Any, rows: Any, options: Any) -> Any:
        static: Any = {"dca": DCA, "implementation": "mosaic_gpu"}
        return attend(query, key, key, layer=layer, rows=rows, **static, **options)

    text = lower(forward, query, key, layer, rows, options)
    assert ("dca_decode" if num_queries < 3 and not listed else "dca_forward") in text


@pytest.mark.parametrize("dim", [64, 256])
def test_blocks_are_passed_by_together(dim: int) -> None:
    """All threads of a warpgroup vote; heads whose blocks are of fewer keys are refused."""
    query, key, _, layer, rows = shapes(2, 300, 1024, 4, 2, dim, jnp.bfloat16)
    of_tiles = 2, 2, num_tiles(300)
    lists: Any = [jax.ShapeDtypeStruct((*of_tiles, n), jnp.int32) for n in (3, 8)]
    lists += [jax.ShapeDtypeStruct((2,), jnp.float32)]
    blocks = KeyBlocks(*lists)

    def forward(query: Any, key: Any, layer: Any, rows: Any, blocks: Any) -> Any:
        static: Any = {"dca": DCA, "implementation": "mosaic_gpu"}
        return attend(query, key, key, layer=layer, rows=rows, blocks=blocks, **static)

    if dim == 256:
        with pytest.raises(InputError, match="needs head_dim 64 or 128"):
            lower(forward, query, key, layer, rows, blocks)
    else:
        assert "dca_forward" in lower(forward, query, key, layer, rows, blocks)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_bytes_are_widened_where_wgmma_wants_them(dim: int) -> None:
    """By the layouts' own account of which thread holds which element, in which register."""
    elements, number = np.arange(64 * dim), jnp.arange(dim, dtype=jnp.float32)
    ordered = np.int32(widening.ordered_for_keys(number))
    wanted = elements.reshape(64, dim)[:, ordered]  # K, as q's elements stand
    widen_and_compare(widening.key_words(), widening.key_pairs, (64, dim), wanted)

    rows = np.int32(widening.in_order_of_head(number))  # of each element of a head
    wanted = np.empty((dim, 64), int)
    wanted[rows] = elements.reshape(64, dim).T
    widen_and_compare(widening.value_words(dim), widening.value_pairs, (64, dim), wanted)


def widen_and_compare(layout: Any, fill: Any, shape: tuple[int, int], wanted: np.ndarray) -> None:
    """`fill` puts into WGMMA's left side the elements of `wanted`, out of those 0, 1 .. of x."""
    words, left = layout.to_mgpu(), mgpu.WGMMA_LAYOUT
    held, needed = owners(words, shape), owners(left, wanted.shape)
    for thread in range(128):
        wide = np.empty(left.registers_shape(wanted.shape), object)
        registers = np.empty(words.registers_shape(shape), object)
        for at, bytes_of in held.items():
            registers[at] = bytes_of[thread]
        fill(registers, wide, lambda a, b, i, j: (a[i], b[j]))
        for at, places in needed.items():
            assert wide[at] == tuple(wanted.ravel()[places[thread]])


def owners(layout: Any, shape: tuple[int, int]) -> dict[tuple[int, ...], np.ndarray]:
    """Of each register, the elements of a row-major array that it holds [threads, vector]."""
    strides = layout.tiling.tile_strides((shape[1], 1))
    tiled = layout.tiling.tile_shape(shape)

    def offsets(dims: tuple[int, ...]) -> np.ndarray:
        sizes = [tiled[d] for d in dims]
        index = np.indices(sizes).reshape(len(dims), -1)
        return np.sum([i * strides[d] for i, d in zip(index, dims, strict=True)], axis=0)

    warp, lane = offsets(layout.warp_dims), offsets(layout.lane_dims)
    thread = (warp[:, None] + lane[None, :]).reshape(-1, 1)
    element = thread + offsets((layout.vector_dim,))[None, :]
    return {
        at: element + sum(i * s for i, s in zip(at, strides, strict=True))
        for at in np.ndindex(layout.registers_shape(shape))
    }


# --- which blocks the kernels visit ------------------------------------------------------------

# Few shapes of arrays, because each is compiled; what lies where in them is free.
SIZES = {
    "s": st.integers(1, 90),
    "first": st.integers(0, 300),
    "num_queries": st.sampled_from([1, 70]),
    "padding": st.integers(0, 40),
    "key_offset": st.integers(0, 400),  # 400 is beyond every query
    "num_keys": st.sampled_from([43, 300]),
    "number": st.sampled_from([1, 3]),
}


class Case(NamedTuple):
    """Queries and a slice of their text's keys, and which meet in each phase."""

    dca: DCAConfig
    phases: tuple[Phase, ...]
    rows: Rows
    met: np.ndarray  # [phases, T, S]

    @classmethod
    def of(
        cls,
        s: int,
        first: int,
        num_queries: int,
        padding: int,
        key_offset: int,
        num_keys: int,
        number: int,
    ) -> "Case":
        dca, phases = DCAConfig(chunk_len=s, max_query_position=s + 3), PHASES[-number:]
        length = max(first + num_queries - padding, 0)
        numbers = (jnp.asarray([x], jnp.int32) for x in (first, length, key_offset, length))
        rows = Rows(jnp.zeros((1, 1)), jnp.ones(1), *numbers)
        index = np.arange(first, first + num_queries)[:, None]
        text = key_offset + np.arange(num_keys)[None, :]
        behind = index // s - text // s
        in_phase = {"intra": (behind == 0) & (text <= index), "succ": behind == 1}
        in_phase["inter"] = behind >= 2
        met = np.stack([in_phase[phase] & (index < length) for phase in phases])
        return cls(dca, phases, rows, met)


@settings(max_examples=40)
@given(block=st.sampled_from([8, 16, 64]), **SIZES)
def test_a_tile_of_queries_walks_over_each_key_once(block: int, **sizes: int) -> None:
    """All meet full blocks, edges are masked by row; together each key, once, in its phase."""
    case = Case.of(**sizes)
    offset, length, key_offset = (x[0] for x in case.rows[2:5])
    keys = Keys(key_offset, sizes["num_keys"])
    index = offset + jnp.arange(sizes["num_queries"], dtype=jnp.int32)
    last = jnp.minimum(index[-1], length - 1)
    memory = np.zeros((3 * len(case.phases), 2), np.int32)
    remember(*full_and_edge_walks(offset, last, case.phases, case.dca, keys, block), memory)
    full, edges = recall(jnp.asarray(memory))
    met = any_met(offset, last, case.phases, case.dca, keys)
    assert bool(met) == (int(steps(full + edges)) > 0)  # else nobody would consume what is fed
    ranges = [
        np.asarray(ranges_of_queries(index, length, jnp.int32(n), case.phases, case.dca, keys))
        for n in range(len(case.phases))
    ]
    visits = np.zeros_like(case.met, int)
    for walks, masked in ((full, False), (edges, True)):
        for n in range(int(steps(walks))):
            phase, at = (int(x) for x in locate(jnp.int32(n), walks, jnp.int32(0)))
            slots = np.arange(at * block, (at + 1) * block)
            start, stop = ranges[phase][:, :, None]
            mask = (slots >= start) & (slots < stop)
            assert masked or mask[: int(last) - int(offset) + 1].all()
            inside = slots < sizes["num_keys"]
            assert not mask[:, ~inside].any()
            visits[phase][:, slots[inside]] += mask[:, inside]
    np.testing.assert_array_equal(visits, case.met)


@pytest.mark.slow
@settings(max_examples=40)
@given(blocks=st.sampled_from([(8, 16), (16, 8), (32, 64)]), **SIZES)
def test_a_tile_of_keys_walks_over_each_query_once_and_adds_in_order(
    blocks: tuple[int, int], **sizes: int
) -> None:
    """What the kernel's warps do with the backward's tables.

    A tile of keys waits until as many have added to a dQ as must come before it. So those that
    visit a tile of queries must be number 0, 1, 2 .., in the order in which they are launched: then
    each waits only for tiles launched before it, which wait for no later one, and all come to
    an end, tiles that visit nothing included.
    """
    case = Case.of(**sizes)
    num_queries, num_keys = case.met.shape[1:]
    block_q, block_kv = blocks
    index = case.rows.offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    low, high = backward_spans.key_ranges(
        index, case.rows, num_keys, block_q, case.dca, case.phases
    )
    spans = backward_spans.spans_of(low, high, num_keys, block_q, block_kv)[0]
    low, high = (np.asarray(x)[0] for x in (low, high))
    padded = low.shape[1]
    visits = np.zeros((len(case.phases), padded, spans.shape[0] * block_kv), int)
    added = np.zeros((len(case.phases), padded // block_q), int)
    for tile, ends in enumerate(np.asarray(spans).reshape(-1, len(case.phases), 2, 3)):
        slots = np.arange(tile * block_kv, (tile + 1) * block_kv)
        for phase, pairs in enumerate(ends):
            for start, middle, stop in pairs:
                assert padded // block_q >= start >= middle >= stop >= 0
                for m in range(start - 1, stop - 1, -1):
                    queries = slice(m * block_q, (m + 1) * block_q)
                    mask = (low[phase, queries, None] <= slots) & (
                        slots < high[phase, queries, None]
                    )
                    is_text = low[phase, queries, None] < FAR
                    # Where nothing is masked padding has weight 0, by its log-sum-exp of -inf.
                    assert m >= middle or (mask | ~is_text).all()
                    visits[phase][queries, tile * block_kv : (tile + 1) * block_kv] += mask
                    assert added[phase, m] == tile - low[phase, m * block_q] // block_kv
                    added[phase, m] += 1
    np.testing.assert_array_equal(visits[:, :num_queries, :num_keys], case.met)
    assert not visits[:, num_queries:].any()
    assert not visits[:, :, num_keys:].any()
    # Sums that are read have been written by the first to come, and no query is left out.
    is_met = low < high
    assert not (is_met & np.repeat(added == 0, block_q, axis=1)).any()
    np.testing.assert_array_equal(is_met[:, :num_queries], case.met.any(axis=2))


@settings(max_examples=40)
@given(block=st.sampled_from([8, 64]), **SIZES)
def test_decoding_has_each_block_once_in_its_list(block: int, **sizes: int) -> None:
    """Every key that a row's queries meet lies in a block of the row's list, once a phase."""
    case = Case.of(**sizes)
    offset, length, key_offset = (x[0] for x in case.rows[2:5])
    problem = decode._Problem(
        reach=sizes["num_queries"],
        group=1,
        shares=1,
        num_keys=sizes["num_keys"],
        num_rows=1,
        dca=case.dca,
        phases=case.phases,
        tiles=DecodeTiles(block=block, num_stages=2),
    )
    last = jnp.minimum(offset + sizes["num_queries"], length) - 1
    keys = Keys(key_offset, sizes["num_keys"])
    work = decode._Work.of(offset, last, keys, problem)
    listed = [tuple(map(int, work.locate(jnp.int32(n)))) for n in range(int(work.ends[-1]))]
    assert len(set(listed)) == len(listed)
    needed = {(p, slot // block) for p, _, slot in zip(*case.met.nonzero(), strict=True)}
    assert needed <= set(listed)
    assert all(0 <= at * block < sizes["num_keys"] for _, at in listed)


@pytest.mark.parametrize(
    ("shape", "group", "tokens", "phases"),
    [
        ((1, 8192, 32), 4, 3072, PHASES),
        ((1, 8192, 32), 4, 3072, ("intra",)),
        ((2, 1003, 6), 3, 200, ("succ",)),
        ((3, 650, 4), 2, 40, ("intra",)),
        ((1, 5000, 4), 1, 700, ("intra",)),
        ((1, 1, 2), 2, 40, PHASES),
    ],
)
def test_workers_share_the_tiles(
    shape: tuple[int, int, int], group: int, tokens: int, phases: tuple[Phase, ...]
) -> None:
    """Each tile of each head goes to one worker; none has much more work than the others."""
    batch, num_queries, heads = shape
    dca = DCAConfig(chunk_len=tokens, max_query_position=tokens + 3)
    tiles, cluster = forward_tiles.TILES[128], 2 if group % 2 == 0 else 1
    problem = Problem(num_queries, group, cluster, dca, phases, tiles, None, len(phases))
    nothing: Any = [None] * len(Refs._fields)
    gmem = Refs(*nothing)._replace(out=jax.ShapeDtypeStruct((*shape, 128), jnp.bfloat16))
    smem = Shared(*[jnp.arange(2)] * len(Shared._fields))
    num_tiles = -(-num_queries // tiles.block_q)
    items = heads // cluster * num_tiles * batch
    workers = min(132 // cluster, items)

    @jax.jit
    def share(number: jax.Array) -> tuple[jax.Array, ...]:
        worker = Worker(problem, gmem, smem, number, jnp.int32(0), workers)

        def numbers(n: jax.Array) -> tuple[jax.Array, ...]:
            cta = worker.cta(n, jnp.int32(0))
            return cta.batch, cta.head, cta.tile

        most = jnp.arange(-(-items // workers), dtype=jnp.int32)
        return worker.num_tiles(), *jax.vmap(numbers)(most)

    counts, *of_all = jax.vmap(share)(jnp.arange(workers, dtype=jnp.int32))
    first = jnp.arange(num_tiles, dtype=jnp.int32) * tiles.block_q
    last = jnp.minimum(first + tiles.block_q, num_queries) - 1
    keys = Keys(jnp.int32(0), num_queries)
    full, edges = full_and_edge_walks(first, last, phases, dca, keys, tiles.block_k)
    work = np.sum([walk.count for walk in (*full, *edges)], axis=0)
    seen, sums = [], []
    for number, count in enumerate(np.asarray(counts)):
        mine = np.stack([np.asarray(x)[number, :count] for x in of_all], axis=1)
        seen += map(tuple, mine.tolist())
        sums.append(int(work[mine[:, 2]].sum()))
    expected = itertools.product(range(batch), range(0, heads, cluster), range(num_tiles))
    assert sorted(seen) == sorted(expected)
    assert max(sums) <= np.mean(sums) + work.max()


# --- what runs where ---------------------------------------------------------------------------


def like(dim: int = 128, dtype: Any = jnp.bfloat16) -> tuple[Any, Any]:
    query = jax.ShapeDtypeStruct((1, 100, 8, dim), dtype)
    return query, jax.ShapeDtypeStruct((1, 1, 100, 2, dim), dtype)


@pytest.mark.parametrize(
    ("kind", "dim", "dtype", "chosen"),
    [
        ("NVIDIA H200", 128, jnp.bfloat16, "mosaic_gpu"),
        ("NVIDIA H100 80GB HBM3", 64, jnp.float16, "mosaic_gpu"),
        ("NVIDIA H200", 32, jnp.bfloat16, "triton"),
        ("NVIDIA A100-SXM4-80GB", 128, jnp.bfloat16, "triton"),
        ("NVIDIA H200", 80, jnp.bfloat16, "xla"),
        ("NVIDIA H200", 128, jnp.float32, "xla"),
    ],
)
def test_the_best_that_can_run_is_chosen(kind: str, dim: int, dtype: Any, chosen: str) -> None:
    with device(kind):
        assert choose_implementation(None, *like(dim, dtype), DCA) == chosen


def test_falling_back_on_a_gpu_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with device("NVIDIA H200"), caplog.at_level(logging.WARNING, logger="dca_jax"):
        for _ in range(3):
            assert choose_implementation(None, *like(96), DCA) == "xla"
    assert len(caplog.records) == 1
    assert "head_dim" in caplog.text


def test_a_named_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(InputError, match="Hopper"):
        choose_implementation("mosaic_gpu", *like(), DCA)
    with device("NVIDIA H200"), pytest.raises(InputError, match="bfloat16 or float16"):
        choose_implementation("mosaic_gpu", *like(dtype=jnp.float32), DCA)
    with device("NVIDIA H200"), pytest.raises(InputError, match="head_dim"):
        choose_implementation("mosaic_gpu", *like(96), DCA)


def test_shared_memory_is_checked_before_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = forward_tiles.ForwardTiles(
        block_k=128, num_stages=4, resident=True, registers=128, cluster=2
    )
    monkeypatch.setitem(forward_tiles.TILES, 128, tiles)
    with device("NVIDIA H200"), pytest.raises(InputError, match="bytes of shared memory"):
        choose_implementation("mosaic_gpu", *like(), DCAConfig(chunk_len=8, max_query_position=9))


def test_a_cuda_that_miscompiles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, refused in ((12_060, False), (12_080, True), (12_090, True), (12_091, False)):
        versions = SimpleNamespace(cuda_runtime_get_version=lambda version=version: version)
        monkeypatch.setattr(mosaic_gpu, "cuda_versions", versions)
        with device("NVIDIA H200"):
            chosen = choose_implementation(None, *like(), DCA)
        assert chosen == ("triton" if refused else "mosaic_gpu")
