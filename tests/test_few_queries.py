"""Few queries on Hopper: pieces in tiles, and beginnings that rows have in common.

WGMMA has no interpreter. So on a CPU the kernel itself is what it promises, in plain JAX, with the
list of blocks that it would walk; what is around it is real, and so is the kernel on a GPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import lower, shapes
from test_backends import BENCHES, Bench
from test_blocks import Case, Pool, attend, setting

from dca_jax.attention import mosaic_gpu, op
from dca_jax.attention.backend import PLAIN
from dca_jax.attention.mosaic_gpu import decode, few_queries
from dca_jax.attention.pages import Common
from dca_jax.attention.softmax import MASKED
from dca_jax.attention.stored import Scales
from dca_jax.dca import PHASES, DCAConfig, key_range

PAGE = 128


def promised(layer, columns, dtype, key, value, key_scale, value_scale, pages, problem):
    """`_attend_shares`, all by the last share; nobody has a part in the slots of the others."""
    assert key_scale is None
    batch, _, kv_heads, width, dim = columns.query.shape
    outs = np.full((problem.shares + batch - 1, kv_heads, width, dim), np.nan, np.float32)
    stats = np.zeros((problem.shares, batch, kv_heads, 2, width), np.float32)
    stats[:, :, :, 0] = MASKED
    share, block = problem.shares - 1, problem.tiles.block
    for row in range(batch):
        keys, values = (np.asarray(x, np.float32)[pages[row]] for x in (key, value))
        keys, values = (x.reshape(-1, *x.shape[2:]) for x in (keys, values))
        begun = int(columns.key_offset[row])
        count = problem.num_keys if columns.end is None else int(columns.end[row])
        span = decode.Keys(columns.key_offset[row], count)
        if columns.index is None:
            index = int(columns.offset[row]) + np.arange(width) // problem.group
            index = np.where(np.arange(width) < problem.reach * problem.group, index, -1)
        else:
            index = np.asarray(columns.index[row])
        index = np.where(index < int(columns.lengths[row]), index, -1)
        last = jnp.minimum(columns.offset[row] + problem.reach, columns.lengths[row]) - 1
        work = decode._Work.of(columns.offset[row], last, span, problem)
        units = [tuple(map(int, work.locate(jnp.int32(n)))) for n in range(int(work.ends[-1]))]
        number = np.arange(len(keys)) // block
        for head in range(kv_heads):
            logits = np.full((width, len(keys), len(problem.phases)), -np.inf)
            for p, phase in enumerate(problem.phases):
                low, high = (
                    np.asarray(span.slot(x))
                    for x in key_range(jnp.asarray(index), phase, problem.dca)
                )
                slot = np.arange(len(keys))
                met = (slot >= low[:, None]) & (slot < high[:, None]) & (index >= 0)[:, None]
                listed = [n for at, n in units if at == p]
                assert len(set(listed)) == len(listed)
                assert set(number[met.any(axis=0)]) <= set(listed), "a block that is not visited"
                query = np.asarray(columns.query[row, p, head], np.float32)
                logits[:, :, p] = np.where(met, query @ keys[:, head].T, -np.inf)
            if not np.isfinite(logits).any():
                continue
            top = np.maximum(logits.max(axis=(1, 2)), MASKED)
            weights = np.exp2(logits - top[:, None, None]).sum(axis=2)
            outs[share + row, head] = weights @ values[:, head]
            stats[share, row, head] = top, weights.sum(axis=1)
        assert begun % PAGE == 0
    return jnp.asarray(outs), jnp.asarray(stats)


@pytest.fixture(params=[0, *(pytest.param(dim, marks=pytest.mark.gpu) for dim in (64, 128, 256))])
def bench(request, monkeypatch):
    """mosaic_gpu by head_dim; on a CPU with the kernel's promise in its place, in float32."""
    if request.param:
        return BENCHES["mosaic_gpu"]._replace(dim=request.param)
    monkeypatch.setattr(decode, "_attend_shares", promised)
    return Bench("promised", dim=64)


def read(bench: Bench, case: Case, pool: Pool, common: Common | None = None) -> jax.Array:
    arrays = {
        "key": pool.filled(case.rotated()),
        "value": pool.filled(case.value),
        "layer": jnp.int32(0),
        "pages": jnp.asarray(pool.table),
    }
    if bench.name == "mosaic_gpu":
        return attend(bench, case, **arrays, common=common)
    options: Any = {"dca": case.dca, "phases": PHASES, "pages": arrays["pages"]}
    stack = arrays["key"], arrays["value"], arrays["layer"]
    with pytest.MonkeyPatch.context() as patched:  # the promise computes in float32
        patched.setattr(few_queries, "fits", _fits_as_bfloat16)
        patched.setattr(mosaic_gpu.decode_tiles, "fits", _fits_as_bfloat16)
        given = (case.query, *stack, case.rows)
        return mosaic_gpu.forward(*given, with_lse=False, common=common, **options)[0]


REAL_FITS = few_queries.fits


def _fits_as_bfloat16(query: Any, key: Any) -> bool:
    return REAL_FITS(*(jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (query, key)))


# Chunks that pages do not end with, chunks shorter than a page, and plain attention.
SETTINGS = [setting(300, 400), setting(40, 40), PLAIN]


@pytest.mark.parametrize("dca", SETTINGS, ids=["s=300", "s=40", "plain"])
def test_a_short_piece_is_read_in_tiles(bench: Bench, dca: DCAConfig) -> None:
    """Ragged rows: one in the middle of a chunk, one of a single token, one that is not there."""
    case = Case.of(
        [597, 0, 130], [650, 1, 130], (64, 700, 8, 2), dca, dim=bench.dim, dtype=bench.dtype
    )
    found = read(bench, case, Pool.of(case, PAGE))
    bench.agrees(found, case.expected())


@pytest.mark.parametrize("dca", SETTINGS, ids=["s=300", "s=40", "plain"])
def test_what_rows_have_in_common_is_read_once(bench: Bench, dca: DCAConfig) -> None:
    """Two groups and two rows of none; in a group some are a chunk further than others."""
    lengths = [513, 900, 640, 257, 385, 512, 1]
    starts = [n - 1 for n in lengths]
    case = Case.of(starts, lengths, (1, 900, 8, 2), dca, dim=bench.dim, dtype=bench.dtype)
    pool = Pool.of(case, PAGE)
    key, value, table = case.key, case.value, pool.table.copy()
    for rows, pages in (([0, 1, 2], 4), ([3, 4], 2)):
        shared = slice(0, pages * PAGE)
        for row in rows[1:]:
            table[row, :pages] = table[rows[0], :pages]
            key = key.at[row, shared].set(key[rows[0], shared])
            value = value.at[row, shared].set(value[rows[0], shared])
    case, pool = case._replace(key=key, value=value), pool._replace(table=table)
    common = Common(
        rows=jnp.asarray([[0, 1, 2, 7, 7], [3, 4, 7, 7, 7], [7] * 5], jnp.int32),
        tokens=jnp.asarray([4 * PAGE, 2 * PAGE, 0], jnp.int32),
        place=jnp.asarray([0, 1, 2, 5, 6, 15, 15], jnp.int32),
    )
    bench.agrees(read(bench, case, pool, common), case.expected())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "quantized", "most"),
    [
        (32, 8, 128, False, 14),
        pytest.param(28, 4, 128, False, 8, marks=pytest.mark.slow),
        pytest.param(32, 8, 128, True, 16, marks=pytest.mark.slow),
        pytest.param(9, 3, 64, False, 21, marks=pytest.mark.slow),
        pytest.param(8, 8, 256, False, 32, marks=pytest.mark.slow),
    ],
)
def test_pieces_and_common_beginnings_lower(heads, kv_heads, dim, quantized, most) -> None:
    dtype = jnp.int8 if quantized else jnp.bfloat16
    pool = jax.ShapeDtypeStruct((2, 99, PAGE, kv_heads, dim), dtype)
    options: dict[str, Any] = {"pages": jax.ShapeDtypeStruct((4, 32), jnp.int32)}
    if quantized:
        scale = jax.ShapeDtypeStruct((2, 99, kv_heads, PAGE), jnp.float32)
        options["scales"] = Scales(scale, scale)

    def forward(query: Any, key: Any, layer: Any, rows: Any, options: Any) -> Any:
        static: Any = {"dca": DCAConfig.paper(4096), "implementation": "mosaic_gpu"}
        return op.attend(query, key, key, layer=layer, rows=rows, **static, **options)

    like = jax.ShapeDtypeStruct((2, 4, 32 * PAGE, kv_heads, dim), dtype)
    for num_queries in (1, 64):
        query, _, _, layer, rows = shapes(4, num_queries, 1, heads, kv_heads, dim, jnp.bfloat16)
        assert mosaic_gpu.rows_at_once(query, like) == most
        more = {}
        if num_queries == 1:
            numbers = ((2, most), (2,), (4,))
            more["common"] = Common(*(jax.ShapeDtypeStruct(x, jnp.int32) for x in numbers))
        text = lower(forward, query, pool, layer, rows, options | more)
        assert "dca_decode" in text
        assert "dca_forward" not in text
