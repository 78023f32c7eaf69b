"""The Pallas TPU kernels: in TPU interpret mode against the oracle, and compiled for real chips.

The blocks are made small here, so that short texts cross many of them. The interpreter looks for
races and for reads out of bounds, and fills memory nobody has written with NaN. Compiling needs no
TPU, only libtpu.
"""

import importlib.util
import os
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from dca_jax.attention import attention_pass, dual_chunk_attention, merge_passes, mosaic_tpu, op
from dca_jax.attention.device import Device
from dca_jax.dca import PHASES, DCAConfig
from dca_jax.errors import InputError
from dca_jax.rope import RopeConfig

ROPE = RopeConfig()
S = 24  # no multiple of the block
DCA = DCAConfig(chunk_len=S, max_query_position=36)
SMALL = mosaic_tpu.Tiles(forward=(16, 16), dq=(16, 16), dkv=(16, 16), decode_keys=64)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    monkeypatch.setattr(mosaic_tpu, "INTERPRET", pltpu.InterpretParams(detect_races=True))
    monkeypatch.setattr(mosaic_tpu, "choose_tiles", lambda device, head_dim: SMALL)
    monkeypatch.setattr(mosaic_tpu, "PACKED_ROWS", 16)
    yield
    races = interpret_pallas_call.races
    assert races is not None
    assert not races.races_found
    pltpu.reset_tpu_interpret_mode_state()


def draw(
    seed: int, batch: int, num_queries: int, num_keys: int, heads: int, kv_heads: int, dim: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = (num_queries, heads), (num_keys, kv_heads), (num_keys, kv_heads)
    q, k, v = (rng.normal(size=(batch, n, h, dim)) for n, h in shapes)
    return jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)


def check_value_and_gradient(
    inputs: tuple[jax.Array, jax.Array, jax.Array], **options: Any
) -> tuple[jax.Array, ...]:
    """Ours against the dense oracle's, on one random cotangent; returns our four arrays."""
    weight = jnp.asarray(np.random.default_rng(9).normal(size=inputs[0].shape), jnp.float32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
        out = dual_chunk_attention(q, k, v, rope=ROPE, implementation=name, **options)
        return jnp.sum(out * weight), out

    grad = jax.jit(
        jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=3, compiler_options=QUICK
    )
    (_, out), bars = grad(*inputs, "mosaic_tpu")
    (_, expected), expected_bars = grad(*inputs, "reference")
    for ours, theirs in zip((out, *bars), (expected, *expected_bars), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
    assert np.abs(expected_bars[2]).max() > 1e-3
    return out, *bars


@pytest.mark.usefixtures("interpreted")
def test_edges_as_the_rows_of_a_batch() -> None:
    """Texts of 1, s - 1, s, s + 1, 2s, 2s + 1 and 2s + 7 tokens, the shorter ones padded."""
    edges = [1, S - 1, S, S + 1, 2 * S, 2 * S + 1, 2 * S + 7]
    inputs = draw(0, len(edges), edges[-1], edges[-1], 1, 1, 64)
    lengths = jnp.asarray(edges, jnp.int32)
    out, *_ = check_value_and_gradient(inputs, dca=DCA, lengths=lengths)
    for row, length in enumerate(edges):
        assert not np.asarray(out[row, length:]).any()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("length", [1, S + 1])
def test_edges_as_shapes(length: int) -> None:
    check_value_and_gradient(draw(length, 1, length, length, 2, 2, 128), dca=DCA)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("chunk_len", "largest"),
    [(5, 5), (32, 40)],
    ids=["many chunks a tile", "two tiles a chunk"],
)
def test_chunk_lengths(chunk_len: int, largest: int) -> None:
    dca = DCAConfig(chunk_len=chunk_len, max_query_position=largest)
    check_value_and_gradient(draw(1, 1, 70, 70, 1, 1, 128), dca=dca)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (8, 1, 128), (2, 1, 256)])
def test_heads(heads: int, kv_heads: int, dim: int) -> None:
    check_value_and_gradient(draw(2, 1, S + 3, S + 3, heads, kv_heads, dim), dca=DCA)


@pytest.mark.usefixtures("interpreted")
def test_plain_causal_attention() -> None:
    check_value_and_gradient(draw(3, 1, 20, 20, 1, 1, 128), dca=None)


@pytest.mark.usefixtures("interpreted")
def test_offset_lengths_and_temperature() -> None:
    """Two rows at different places of their texts, one padded."""
    dca = DCAConfig(chunk_len=S, max_query_position=36, trained_length=40, temperature_slope=0.1)
    options: dict[str, Any] = {
        "query_offset": jnp.asarray([13, 50], jnp.int32),
        "lengths": jnp.asarray([33, 81], jnp.int32),
        "context_lengths": jnp.asarray([120, 81], jnp.int32),
    }
    check_value_and_gradient(draw(4, 2, 35, 90, 1, 1, 128), dca=dca, **options)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 128), (8, 2, 64)])
def test_decode_reads_one_layer_of_a_ragged_cache(heads: int, kv_heads: int, dim: int) -> None:
    """Rows at different lengths; keys beyond a row's length do not matter."""
    offset = jnp.asarray([0, S, 3 * S + 5], jnp.int32)
    q, k, v = draw(5, 3, 2, 90, heads, kv_heads, dim)
    rows = op.make_rows(q.shape, dca=DCA, rope=ROPE, query_offset=offset)
    beyond = jnp.arange(90)[None, :, None, None] >= (offset + 2)[:, None, None, None]
    caches = [jnp.stack([x + 1, jnp.where(beyond, 1e4, x), x - 1]) for x in (k, v)]
    layer = jnp.int32(1)
    out = op.attend(q, *caches, dca=DCA, rows=rows, layer=layer, implementation="mosaic_tpu")
    expected = op.attend(q, k, v, dca=DCA, rows=rows, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=2e-5, rtol=0)


@pytest.mark.usefixtures("interpreted")
def test_single_phases_merge_into_the_whole_and_have_its_gradient() -> None:
    q, k, v = draw(6, 1, 2 * S + 2, 2 * S + 2, 1, 1, 128)

    def merged(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        passes = [
            attention_pass(q, k, v, phase=phase, dca=DCA, rope=ROPE, implementation="mosaic_tpu")
            for phase in PHASES
        ]
        return merge_passes([out for out, _ in passes], [lse for _, lse in passes])[0]

    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return dual_chunk_attention(q, k, v, dca=DCA, rope=ROPE, implementation="reference")

    weight = jnp.asarray(np.random.default_rng(9).normal(size=q.shape), jnp.float32)

    def value_and_gradient(f: Any, *inputs: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(f, *inputs)
        return out, *pull(weight)

    run = jax.jit(value_and_gradient, static_argnums=0, compiler_options=QUICK)
    results = [run(f, q, k, v) for f in (merged, whole)]
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.usefixtures("interpreted")
def test_twice_the_same_bits() -> None:
    q, k, v = draw(8, 1, S + 2, S + 2, 1, 1, 128)
    rows = op.make_rows(q.shape, dca=DCA, rope=ROPE)

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return op.attend(q, k, v, dca=DCA, rows=rows, implementation="mosaic_tpu")

    grad = jax.jit(lambda q, k, v: jax.vjp(run, q, k, v)[1](q), compiler_options=QUICK)
    for one, two in zip(grad(q, k, v), grad(q, k, v), strict=True):
        np.testing.assert_array_equal(one, two)


# --- the tables --------------------------------------------------------------------------------


def test_tables_name_every_block_that_is_met_and_no_more_steps_than_the_grid_has() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        s, block_q, block_k = (int(x) for x in rng.integers(1, 40, 3))
        num_queries, num_keys = (int(x) for x in rng.integers(1, 150, 2))
        offset = int(rng.integers(0, max(num_keys - num_queries, 0) + 1))
        lengths = int(min(offset + num_queries, num_keys) - rng.integers(0, 3))
        rows = op.Rows(
            jnp.zeros((1, 1)),
            jnp.ones(1),
            jnp.asarray([offset], jnp.int32),
            jnp.asarray([max(lengths, 0)], jnp.int32),
        )
        dca, blocks = DCAConfig(chunk_len=s, max_query_position=s), (block_q, block_k)
        shape = (num_queries, num_keys)
        span = np.asarray(mosaic_tpu._spans(*shape, rows, dca, PHASES))[:, 0]
        j = np.arange(num_keys)[:, None]
        met = (span[:, :1] <= j[None]) & (j[None] < span[:, 1:])  # [P, S, T]
        key_table = mosaic_tpu._key_table(*shape, rows, dca, PHASES, blocks)
        _check_table(
            np.asarray(key_table),
            met.transpose(0, 2, 1),
            blocks,
            mosaic_tpu._most_steps(dca, PHASES, block_q, num_keys, block_k, s % block_k == 0),
        )
        _check_table(
            np.asarray(mosaic_tpu._query_table(*shape, rows, dca, PHASES, blocks)),
            met,
            (block_k, block_q),
            mosaic_tpu._most_steps(dca, PHASES, block_k, num_queries, block_q, False),
        )


def _check_table(table: np.ndarray, met: np.ndarray, blocks: tuple[int, int], steps: int) -> None:
    """`met` [P, resting, moving]; a tile may lack its last rows, and these ask for no mask."""
    resting, moving = blocks
    for tile in range(-(-met.shape[1] // resting)):
        entries = table.reshape(-1, len(PHASES), mosaic_tpu.ENTRY)[tile]
        rows = met[:, tile * resting : (tile + 1) * resting]
        begin = 0
        for phase, (end, shift, full_lo, full_hi) in enumerate(entries):
            visited = range(begin + shift, end + shift)
            for block in range(-(-met.shape[2] // moving)):
                cut = rows[phase, :, block * moving : (block + 1) * moving]
                assert block in visited or not cut.any()
                if block in visited and full_lo <= block < full_hi:
                    assert cut.all()
                    assert cut.shape[1] == moving
            begin = end
        assert begin <= steps


# --- what runs where ---------------------------------------------------------------------------


def test_says_why_it_cannot_run() -> None:
    tpu, cpu = Device("tpu", "TPU v5e", None), Device("cpu", "cpu", None)
    dca = DCAConfig(chunk_len=2048, max_query_position=3000)

    def reason(device: Device, dim: int = 128, kv_heads: int = 8, dtype: Any = jnp.bfloat16) -> Any:
        query = jax.ShapeDtypeStruct((1, 4096, 4 * kv_heads, dim), dtype)
        key = jax.ShapeDtypeStruct((1, 1, 4096, kv_heads, dim), dtype)
        return mosaic_tpu.unsupported(device, query, key, dca)

    assert reason(tpu) is None
    assert reason(tpu, dim=64) is None
    assert reason(tpu, dim=256, dtype=jnp.float32) is None
    assert "needs a TPU" in reason(cpu)
    assert "head_dim" in reason(tpu, dim=80)
    assert "even or one" in reason(tpu, dim=64, kv_heads=3)
    assert "float16" in reason(tpu, dtype=jnp.float16)
    for kind in mosaic_tpu.VMEM_MIB:
        for dim in (64, 128, 256):
            assert reason(Device("tpu", kind, None), dim=dim) is None


def test_named_on_another_machine_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="needs a TPU"):
        dual_chunk_attention(
            *draw(0, 1, 8, 8, 1, 1, 128), dca=DCA, rope=ROPE, implementation="mosaic_tpu"
        )


# --- compiled by Mosaic for chips that are not here --------------------------------------------


def compile_for(topology: str, part: str, length: int, heads: int, kv_heads: int, dim: int) -> Any:
    """forward, backward or decode, in bfloat16, for one chip of a topology."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu otherwise asks a cloud where it runs
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # no chip is taken: several may compile
    chip = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(chip)
    dca = DCAConfig(chunk_len=3072, max_query_position=4095)

    def like(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    num_queries = 1 if part == "decode" else length
    query = like(1, num_queries, heads, dim)
    key = like(2, 1, length, kv_heads, dim)
    layer, offset = like(dtype=jnp.int32), like(1, dtype=jnp.int32)

    def run(query: Any, key: Any, value: Any, layer: Any, offset: Any, *saved: Any) -> Any:
        rows = op.make_rows(query.shape, dca=dca, rope=ROPE, query_offset=offset)
        options: dict[str, Any] = {"dca": dca, "phases": PHASES}
        if part == "backward":
            return mosaic_tpu.backward(query, key, value, layer, rows, *saved, **options)
        return mosaic_tpu.forward(query, key, value, layer, rows, **options)

    stat = like(1, heads, num_queries, dtype=jnp.float32)
    saved = (query, stat, stat) if part == "backward" else ()
    tiles = mosaic_tpu.choose_tiles(Device("tpu", chip.device_kind, None), dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mosaic_tpu, "choose_tiles", lambda device, head_dim: tiles)
        return jax.jit(run).lower(query, key, key, layer, offset, *saved).compile()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("part", ["forward", "backward", "decode"])
def test_compiles_for_a_real_chip(part: str) -> None:
    """At 32k tokens; the kernels' own VMEM limit is `vmem_bytes`, so compiling proves it enough."""
    text = compile_for("v5e:2x2", part, 32768, 32, 8, 128).as_text()
    assert text.count("tpu_custom_call") >= (2 if part == "backward" else 1)


@pytest.mark.usefixtures("interpreted")
def test_bfloat16_beside_the_float32_oracle() -> None:
    inputs = draw(3, 1, 60, 60, 2, 1, 128)
    narrow = [x.astype(jnp.bfloat16) for x in inputs]
    options: dict[str, Any] = {"dca": DCA, "rope": ROPE}
    out = dual_chunk_attention(*narrow, implementation="mosaic_tpu", **options)
    wide = (x.astype(jnp.float32) for x in narrow)
    expected = dual_chunk_attention(*wide, implementation="reference", **options)
    assert out.dtype == jnp.bfloat16
    error = jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    assert error < 5e-3


def test_it_says_that_it_needs_a_tpu() -> None:
    inputs = draw(0, 1, 8, 8, 2, 1, 128)
    with pytest.raises(InputError, match=r"'mosaic_tpu' cannot run: it needs a TPU"):
        dual_chunk_attention(*inputs, dca=DCA, rope=ROPE, implementation="mosaic_tpu")
