"""Context parallelism on 8 CPU devices against the dense oracle, in value and gradient.

The oracle reads the whole text on one device in float64. Everything parallel gets the text in
zigzag, on C devices, and its result is put back into the text's order.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.mesh import AbstractDevice
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from kernels import QUICK

from dca_jax.attention import rotate_keys, xla
from dca_jax.attention.backend import PLAIN, Rows
from dca_jax.attention.op import make_rows
from dca_jax.attention.parallel import context, ring, zigzag
from dca_jax.attention.triton import common, tiles
from dca_jax.dca import DCAConfig, dense_attention
from dca_jax.errors import InputError
from dca_jax.rope import RopeConfig

TEXT = P(None, "context")  # [B, T, ..]
CACHE = P(None, None, "context")  # [L, B, S, ..]


def mesh_of(size: int) -> Mesh:
    return jax.make_mesh(
        (1, 1, size, 1),
        ("data", "fsdp", "context", "tensor"),
        axis_types=(AxisType.Explicit,) * 4,
        devices=jax.devices("cpu")[:size],
    )


def on(mesh: Mesh, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` under shard_map, compiled; it puts host arrays where they belong."""
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    jitted = jax.jit(mapped, compiler_options=QUICK)

    def call(*args: Any) -> Any:
        placed = jax.tree.map(
            lambda spec, tree: jax.device_put(tree, NamedSharding(mesh, spec)),
            in_specs,
            args,
            is_leaf=lambda x: isinstance(x, P),
        )
        return jitted(*placed)

    call.lower = jitted.lower  # type: ignore[attr-defined]
    return call


def draw(seed: int, *shapes: tuple[int, ...], dtype: Any = jnp.float64) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def pad(x: np.ndarray, length: int) -> np.ndarray:
    return np.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def value_and_grad(dca: DCAConfig | None, implementation: str = "xla") -> Callable:
    """(q, k, v, weight, rows), all local in zigzag -> (out, gradients of sum(out * weight))."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array, rows: Rows) -> tuple:
        positions = zigzag.zigzag_positions(q.shape[1])[None]

        def read(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            rotated = rotate_keys(k, positions, dca=dca, inv_freq=rows.inv_freq)
            return ring.ring_attention(
                q, rotated, v, rows=rows, dca=dca, implementation=implementation
            )

        out, pull_back = jax.vjp(read, q, k, v)
        return out, pull_back(weight.astype(out.dtype))

    return run


def dense(
    q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array, rows: Rows, dca: DCAConfig | None
) -> tuple:
    """The same of the oracle, for whole texts in their own order."""
    index = jnp.arange(k.shape[1], dtype=jnp.int32)[None]

    def read(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        rotated = rotate_keys(k, index, dca=dca, inv_freq=rows.inv_freq)
        return dense_attention(q, rotated, v, dca=dca or PLAIN, **rows.of_dca())

    out, pull_back = jax.vjp(read, q, k, v)
    return out, pull_back(weight)


def compare(
    *,
    size: int,
    lengths: list[int],
    dca: DCAConfig | None,
    heads: tuple[int, int] = (4, 2),
    dtype: Any = jnp.float64,
    atol: float = 1e-12,
    rope: RopeConfig | None = None,
    dim: int = 8,
    implementation: str = "xla",
) -> None:
    """Value and gradient; the longest text's length is padded to a multiple of 2C."""
    batch, length = len(lengths), max(lengths)
    padded = -(-length // (2 * size)) * 2 * size
    query, keys = (batch, length, heads[0], dim), (batch, length, heads[1], dim)
    arrays = draw(length, query, keys, keys, query, dtype=dtype)
    rows = make_rows(
        query, dca=dca, rope=rope or RopeConfig(), lengths=jnp.asarray(lengths, jnp.int32)
    )
    order, back = zigzag.zigzag_order(padded, size), zigzag.natural_order(padded, size)

    specs = (TEXT, TEXT, TEXT, TEXT, Rows(*[P()] * len(rows)))
    run = value_and_grad(dca, implementation)
    parallel = on(mesh_of(size), run, specs, (TEXT, (TEXT, TEXT, TEXT)))
    out, grads = parallel(*(pad(x, padded)[:, order] for x in arrays), rows)
    wide = [jnp.asarray(x, jnp.float64 if jax.config.jax_enable_x64 else None) for x in arrays]
    expected, expected_grads = jax.jit(dense, static_argnums=5)(*wide, rows, dca)
    for name, ours, theirs in zip(
        ("out", "query", "key", "value"), (out, *grads), (expected, *expected_grads), strict=True
    ):
        assert ours.dtype == dtype
        ours = np.asarray(ours)[:, back]
        np.testing.assert_allclose(ours[:, :length], theirs, atol=atol, rtol=0, err_msg=name)
        assert not ours[:, length:].any(), name
        assert np.abs(theirs).max() > 0.1


# Rows that differ in the scale of their logits, and in their frequencies.
WARM = DCAConfig(chunk_len=3, max_query_position=5, trained_length=6, temperature_slope=0.1)
DYNAMIC = RopeConfig(rope_type="dynamic", factor=4.0, original_max_position_embeddings=3)

# Chunks shorter and longer than a block, dividing it or not; Q = s, 2s - 1 and between; a text that
# ends in the middle of a block, rows that end anywhere, one of them after a single token.
SETTINGS: dict[str, dict[str, Any]] = {
    "one_device": {
        "size": 1,
        "lengths": [29, 1],
        "dca": DCAConfig(chunk_len=12, max_query_position=17),
    },
    "short_chunks": {"size": 4, "lengths": [43, 1, 20], "dca": WARM, "rope": DYNAMIC},
    "long_chunks": {
        "size": 8,
        "lengths": [63, 17],
        "dca": DCAConfig(chunk_len=23, max_query_position=23),
        "heads": (8, 1),
        "dtype": jnp.float32,
        "atol": 1e-5,
    },
    "plain": {"size": 4, "lengths": [45, 1, 13], "dca": None, "heads": (2, 2)},
}


@pytest.fixture
def tiles_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of queries and blocks of keys in each block of a text."""
    monkeypatch.setattr(xla, "TILE", 4)
    monkeypatch.setattr(xla, "CPU_TILE", 4)
    monkeypatch.setattr(xla, "LOGITS", 12)


SLOW = pytest.mark.slow
QUICK_ONE = "short_chunks"


@pytest.mark.parametrize(
    "setting", [pytest.param(x, marks=[SLOW] * (x != QUICK_ONE)) for x in SETTINGS]
)
@pytest.mark.usefixtures("tiles_of_four")
def test_equals_the_oracle(setting: str) -> None:
    with jax.enable_x64(True):
        compare(**SETTINGS[setting])


@pytest.mark.slow
def test_pallas_kernels_run_under_the_same_shard_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that an interpreter can run; one chunk, so that it has one phase to interpret."""
    small = tiles.Tile(block_q=16, block_k=16, num_warps=4, num_stages=2)
    entry = tiles.Tiles(forward=small, dq=small, dkv=small, decode=small)
    for table in (tiles.AMPERE, tiles.HOPPER):
        monkeypatch.setitem(table, 64, entry)
    monkeypatch.setattr(common, "INTERPRET", True)
    monkeypatch.setattr(tiles, "MAX_PACKED", 16)
    compare(
        size=2,
        lengths=[75, 30],
        dca=None,
        heads=(2, 1),
        dtype=jnp.float32,
        atol=1e-5,
        dim=16,
        implementation="triton",
    )


@pytest.mark.slow
def test_the_ring_lowers_for_gpus() -> None:
    """Hopper's kernels under shard_map; a program has each of a ring's four calls but once."""
    h200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    names, types = ("data", "fsdp", "context", "tensor"), (AxisType.Explicit,) * 4
    mesh = AbstractMesh((1, 1, 8, 1), names, axis_types=types, abstract_device=h200)
    dca, query = DCAConfig.paper(4096), (1, 8192, 8, 128)
    rows = make_rows(query, dca=dca, rope=RopeConfig())
    specs = (TEXT, TEXT, TEXT, TEXT, Rows(*[P()] * len(rows)))
    run = jax.shard_map(
        value_and_grad(dca, "mosaic_gpu"),
        mesh=mesh,
        in_specs=specs,
        out_specs=(TEXT, (TEXT, TEXT, TEXT)),
        check_vma=False,
    )
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, TEXT))
        for shape in (query, (1, 8192, 2, 128), (1, 8192, 2, 128), query)
    ]
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.export.export(jax.jit(run), platforms=["cuda"])(*shapes, rows)
    text = program.mlir_module()
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 4
    assert "collective_permute" in text
    assert "all_gather" not in text


def test_bfloat16_within_its_own_rounding() -> None:
    dca, shape, keys = None, (1, 128, 2, 32), (1, 128, 1, 32)
    low = [jnp.asarray(x, jnp.bfloat16) for x in draw(0, shape, keys, keys, shape)]
    rows = make_rows(shape, dca=dca, rope=RopeConfig())
    exact = jax.jit(dense, static_argnums=5)(*(x.astype(jnp.float32) for x in low), rows, dca)
    order, back = zigzag.zigzag_order(128, 2), zigzag.natural_order(128, 2)
    specs = (TEXT, TEXT, TEXT, TEXT, Rows(*[P()] * len(rows)))
    parallel = on(mesh_of(2), value_and_grad(dca), specs, (TEXT, (TEXT, TEXT, TEXT)))
    shared = parallel(*(np.asarray(x)[:, order] for x in low), rows)
    for ours, theirs in zip(jax.tree.leaves(shared), jax.tree.leaves(exact), strict=True):
        assert ours.dtype == jnp.bfloat16
        difference = np.asarray(ours, np.float32)[:, back] - theirs
        assert np.linalg.norm(difference) < 1e-2 * np.linalg.norm(theirs)


# --- decoding ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "num_queries", "dca"),
    [
        (1, 1, DCAConfig(chunk_len=7, max_query_position=9)),
        (2, 5, DCAConfig(chunk_len=40, max_query_position=47)),
        (4, 1, DCAConfig(chunk_len=8, max_query_position=8)),
        (8, 1, DCAConfig(chunk_len=3, max_query_position=5)),
        (8, 13, DCAConfig(chunk_len=11, max_query_position=21)),
        (8, 3, None),
    ],
)
@pytest.mark.usefixtures("tiles_of_four")
def test_decoding_over_a_shared_cache(size: int, num_queries: int, dca: DCAConfig | None) -> None:
    """A cache written token by token where it belongs, rows of random lengths, padding queries."""
    batch, capacity, dim, layers = 3, 96, 8, 2
    rng = np.random.default_rng(size)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, rows: Rows) -> jax.Array:
        def cut(x: jax.Array) -> jax.Array:  # [L, B, S, K, H], replicated, to this device's slots
            slots = zigzag.zigzag_slots(jnp.arange(capacity, dtype=jnp.int32), capacity // size)
            cache = jnp.full((layers, batch, capacity // size, 2, dim), 1e4, x.dtype)
            return cache.at[:, :, slots].set(x, mode="drop")

        return context.decode_attention(q, cut(k), cut(v), layer, rows, dca=dca)

    with jax.enable_x64(True):
        decode = on(mesh_of(size), run, (P(), P(), P(), P(), Rows(*[P()] * len(Rows._fields))), P())
        whole = jax.jit(dense_attention, static_argnames="dca")
        for _ in range(4):
            cache, queries = (layers, batch, capacity, 2, dim), (batch, num_queries, 4, dim)
            q, k, v = draw(int(rng.integers(1000)), queries, cache, cache)
            start = rng.integers(0, capacity - num_queries + 1, batch)
            start[0] = rng.choice([0, capacity - num_queries])
            new = rng.integers(1, num_queries + 1, batch)
            new[0] = num_queries
            lengths = jnp.asarray(start + new, jnp.int32)
            rows = make_rows(  # each row with frequencies and a scale of its own
                queries,
                dca=dca and WARM,
                rope=DYNAMIC,
                lengths=lengths,
                query_offset=jnp.asarray(start, jnp.int32),
            )
            layer = jnp.int32(rng.integers(layers))
            written = (
                np.arange(capacity)[None, :, None, None] < np.asarray(lengths)[:, None, None, None]
            )
            k, v = (np.where(written[None], x, 1e4) for x in (k, v))
            out = decode(q, k, v, layer, rows)
            assert out.shape == queries
            index = (jnp.asarray(x[int(layer)]) for x in (k, v))
            expected = whole(jnp.asarray(q), *index, dca=dca or PLAIN, **rows.of_dca())
            np.testing.assert_allclose(out, expected, atol=1e-12, rtol=0)


def test_decoding_moves_no_key() -> None:
    """Two all-reduces of the size of the output, and nothing else, cross the axis."""
    size, batch, slots, dim = 8, 2, 64, 16
    mesh = mesh_of(size)
    dca = DCAConfig(chunk_len=40, max_query_position=60)
    rows = make_rows((batch, 1, 4, dim), dca=dca, rope=RopeConfig())

    def run(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows) -> jax.Array:
        layer = jnp.int32(1)
        return context.decode_attention(q, k, v, layer, rows, dca=dca, implementation="xla")

    cache = abstract(mesh, CACHE, 3, batch, size * slots, 2, dim)
    decode = on(mesh, run, (P(), CACHE, CACHE, Rows(*[P()] * len(Rows._fields))), P())
    text = (
        decode.lower(abstract(mesh, P(), batch, 1, 4, dim), cache, cache, rows).compile().as_text()
    )
    assert {kind for kind, _ in collectives(text)} == {"all-reduce"}
    assert max(count for _, count in collectives(text)) <= batch * 4 * dim


# --- what is moved and what is held ------------------------------------------------------------


def abstract(mesh: Mesh, spec: P, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))


def elements(text: str) -> list[int]:
    """The number of elements of every array that some HLO speaks of."""
    shapes = re.findall(r"\b(?:f16|bf16|f32|f64)\[([\d,]*)\]", text)
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]


def collectives(text: str) -> list[tuple[str, int]]:
    """(kind, elements of its largest array) of every collective operation in compiled HLO."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
    return [(kind, max(elements(result))) for result, kind in found]


@pytest.mark.slow
@pytest.mark.usefixtures("tiles_of_four")
def test_the_ring_never_holds_all_keys() -> None:
    """What the compiler makes of value and gradient of a long text: what it moves, and holds."""
    dca, length, dim, mesh = DCAConfig.paper(4096), 65536, 16, mesh_of(8)
    rows = make_rows((1, length, 4, dim), dca=dca, rope=RopeConfig())
    specs = (TEXT, TEXT, TEXT, TEXT, Rows(*[P()] * len(rows)))
    run = on(mesh, value_and_grad(dca), specs, (TEXT, (TEXT, TEXT, TEXT)))
    query, keys = (abstract(mesh, TEXT, 1, length, heads, dim) for heads in (4, 2))
    program = run.lower(query, keys, keys, query, rows).compile()
    whole = length * 2 * dim  # elements of all keys
    assert {kind for kind, _ in collectives(program.as_text())} == {"collective-permute"}
    assert max(elements(program.as_text())) < whole
    # Less than keys and values of the whole text and their gradients would take, in float32.
    assert program.memory_analysis().temp_size_in_bytes < 4 * 4 * whole

    # The same look at a program that gathers all keys sees it: the look is not blind.
    def gathered(keys: jax.Array) -> jax.Array:
        return jnp.cumsum(jax.lax.all_gather(keys, "context", axis=1, tiled=True), axis=1)

    text = on(mesh, gathered, (TEXT,), P()).lower(keys).compile().as_text()
    assert {kind for kind, _ in collectives(text)} == {"all-gather"}
    assert max(elements(text)) >= whole


# --- the layout --------------------------------------------------------------------------------


def test_order_of_the_layout() -> None:
    np.testing.assert_array_equal(
        zigzag.zigzag_order(16, 4).reshape(4, 4),
        [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]],
    )
    for length, size in ((2, 1), (24, 3), (16, 8), (48, 4)):
        order, back = zigzag.zigzag_order(length, size), zigzag.natural_order(length, size)
        np.testing.assert_array_equal(order[back], np.arange(length))
        np.testing.assert_array_equal(back[order], np.arange(length))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_layout_on_the_devices(size: int) -> None:
    """Positions, slots and both reorderings agree with `zigzag_order`, two permutes each way."""
    length, mesh = 12 * size, mesh_of(size)
    order = zigzag.zigzag_order(length, size)
    x = np.arange(2 * length * 3, dtype=np.float32).reshape(2, length, 3)

    def positions() -> tuple[jax.Array, jax.Array]:
        local = zigzag.zigzag_positions(12)
        text = jnp.arange(-1, length + 1, dtype=jnp.int32)
        return local, zigzag.zigzag_slots(text, 12)[None]

    local, slots = on(mesh, positions, (), (P("context"), P("context")))()
    np.testing.assert_array_equal(local, order)
    for device, found in enumerate(np.asarray(slots)):
        mine = order[device * 12 : (device + 1) * 12]
        expected = np.full(length + 2, 12)
        expected[mine + 1] = np.arange(12)
        np.testing.assert_array_equal(found, expected)

    back = on(mesh, zigzag.zigzag_to_natural, (TEXT,), TEXT)
    np.testing.assert_array_equal(back(x[:, order]), x)
    text = back.lower(abstract(mesh, TEXT, *x.shape)).compile().as_text()
    assert size == 1 or [kind for kind, _ in collectives(text)] == ["collective-permute"] * 2

    def pulled_back(x: jax.Array) -> jax.Array:
        return jax.vjp(zigzag.zigzag_to_natural, x)[1](x)[0]

    np.testing.assert_array_equal(on(mesh, pulled_back, (TEXT,), TEXT)(x), x[:, order])


# --- refused -----------------------------------------------------------------------------------


def test_refused() -> None:
    with pytest.raises(InputError, match="multiple of 8 tokens, got 12"):
        zigzag.zigzag_order(12, 4)
    arguments = draw(0, (1, 6, 2, 8), (1, 6, 2, 8), (1, 6, 2, 8), (1, 6, 2, 8), dtype=jnp.float32)
    rows = make_rows((1, 6, 2, 8), dca=None, rope=RopeConfig())
    specs = (TEXT, TEXT, TEXT, TEXT, Rows(*[P()] * len(rows)))
    odd = on(mesh_of(2), value_and_grad(None), specs, (TEXT, (TEXT, TEXT, TEXT)))
    with pytest.raises(InputError, match="two blocks of equal length, got 3 tokens"):
        odd(*arguments, rows)
    oracle = on(mesh_of(1), value_and_grad(None, "reference"), specs, (TEXT, (TEXT, TEXT, TEXT)))
    with pytest.raises(InputError, match="cannot split one over devices"):
        oracle(*arguments, rows)
