"""Every position method by the Hopper kernel on a GPU, against the dense definition in float64."""

from typing import Any, NamedTuple

import band_methods
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dca_jax.attention import attend, dual_chunk_attention, mosaic_gpu, xla
from dca_jax.attention.backend import Rows
from dca_jax.attention.op import choose_implementation, make_rows
from dca_jax.attention.stored import Scales, quantize
from dca_jax.dtypes import CACHE_DTYPES
from dca_jax.inference.rivals import AdaGroPE, LaMPE
from dca_jax.rope import RopeConfig

pytestmark = pytest.mark.gpu

ROPE = RopeConfig()
HEADS = [  # every head_dim, in groups that make clusters and that do not
    pytest.param(9, 3, 64, jnp.bfloat16, id="smollm2"),
    pytest.param(8, 2, 128, jnp.bfloat16, id="llama"),
    pytest.param(4, 4, 128, jnp.float16, id="mha"),
    pytest.param(4, 2, 256, jnp.bfloat16, id="256"),
]
# Of the norm: queries, keys and each band's output are rounded to 16 bits.
ALLOWED = 6e-3


class Text(NamedTuple):
    """Pieces of texts in one layer of a cache of three; beyond a row's tokens lies no key."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    rows: Rows
    real: list[int]

    @property
    def cache(self) -> list[jax.Array]:
        return [jnp.stack([x * 0, x, x * 0]) for x in (self.key, self.value)]


def draw(
    method: Any,
    heads: tuple[int, int, int],
    dtype: Any,
    *,
    starts: list[int],
    real: list[int],
    capacity: int,
) -> Text:
    num_heads, kv_heads, dim = heads
    keys = jax.random.split(jax.random.key(sum(real)), 3)
    shapes = (max(real), num_heads), (capacity, kv_heads), (capacity, kv_heads)
    q, k, v = (
        jax.random.normal(key, (len(real), *shape, dim), jnp.float32).astype(dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )
    lengths = jnp.asarray(starts, jnp.int32) + jnp.asarray(real, jnp.int32)
    beyond = (jnp.arange(capacity)[None] >= lengths[:, None])[:, :, None, None]
    k, v = (jnp.where(beyond, jnp.asarray(1e4, dtype), x) for x in (k, v))
    rows = make_rows(
        q.shape,
        dca=method,
        rope=ROPE,
        lengths=lengths,
        query_offset=jnp.asarray(starts, jnp.int32),
    )
    return Text(q, k, v, rows, real)


run = jax.jit(attend, static_argnames=("dca", "implementation"))


def check(method: Any, text: Text, **extras: Any) -> None:
    """Each row beside the definition, and twice the same."""
    options: dict[str, Any] = {"dca": method, "rows": text.rows}
    cache = {"layer": jnp.int32(1), "implementation": "mosaic_gpu"} | extras
    out = run(text.query, *text.cache, **options, **cache)
    again = run(text.query, *text.cache, **options, **cache)
    np.testing.assert_array_equal(out, again)
    with jax.enable_x64(True):
        wide = (x.astype(jnp.float64) for x in text[:3])
        expected = np.asarray(run(*wide, implementation="reference", **options))
    for row, count in enumerate(text.real):
        assert error(out[row, :count], expected[row, :count]) < ALLOWED, row
        late = slice(max(count - 64, 0), count)
        assert error(out[row, late], expected[row, late]) < 1.5 * ALLOWED, row
        assert not np.asarray(out[row, count:]).any()


def error(ours: Any, theirs: Any) -> float:
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dtype"), HEADS)
@pytest.mark.parametrize("name", band_methods.NAMES)
def test_ragged_pieces_of_a_cache(
    name: str, heads: int, kv_heads: int, dim: int, dtype: Any
) -> None:
    method = band_methods.method_for(name, dim)
    pieces: dict[str, Any] = {"starts": [830, 17, 0, 250], "real": [270, 200, 1, 150]}
    check(method, draw(method, (heads, kv_heads, dim), dtype, **pieces, capacity=1208))


@pytest.mark.parametrize("name", band_methods.NAMES)
def test_whole_texts(name: str) -> None:
    """Of one less, as many and one more than a tile; and shorter than the kernel is for."""
    method = band_methods.method_for(name, 128)
    for longest in (1, 63, 64, 127, 128, 129, 900):
        pieces: dict[str, Any] = {"starts": [0, 0], "real": [longest, (longest + 1) // 2]}
        check(method, draw(method, (8, 2, 128), jnp.bfloat16, **pieces, capacity=longest))


@pytest.mark.parametrize("name", ["self-extend", "adagrope", "lampe", "dpe"])
def test_far_into_a_text(name: str) -> None:
    """Many blocks of each band, in groups of a hundred tokens and more."""
    method = band_methods.method_for(name, 64)
    if name == "adagrope":
        method = AdaGroPE(positions=1000)
    if name == "lampe":
        method = LaMPE(slope=0.0001, shift=-2.0, most=3000.0, head=500, tail=200)
    pieces: dict[str, Any] = {"starts": [19_700, 5_000], "real": [300, 100]}
    check(method, draw(method, (6, 3, 64), jnp.bfloat16, **pieces, capacity=20_000))


@pytest.mark.parametrize("name", band_methods.NAMES)
def test_log_sum_exp_over_a_slice_of_the_keys(name: str) -> None:
    """Beside the XLA form in float32; some queries meet no key of the slice, or of a band."""
    method = band_methods.method_for(name, 128)
    pieces: dict[str, Any] = {"starts": [430, 17], "real": [270, 200]}
    text = draw(method, (8, 2, 128), jnp.bfloat16, **pieces, capacity=702)
    rows = text.rows._replace(key_offset=jnp.asarray([100, 150], jnp.int32))
    key, value = (x[None, :, 100:400] for x in (text.key, text.value))
    options: dict[str, Any] = {"dca": method, "phases": (), "with_lse": True}

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows) -> Any:
        ours = mosaic_gpu.forward(q, k, v, jnp.int32(0), rows, **options)
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return ours, xla.forward(q, k, v, jnp.int32(0), rows, **options)

    (out, lse), (expected, expected_lse) = both(text.query, key, value, rows)
    assert lse.dtype == jnp.float32
    np.testing.assert_array_equal(jnp.isneginf(lse), jnp.isneginf(expected_lse))
    met = jnp.isfinite(expected_lse)
    np.testing.assert_allclose(lse[met], expected_lse[met], atol=0.03)
    assert error(out, expected) < ALLOWED


@pytest.mark.parametrize("name", ["rerope", "adagrope"])
def test_weights_that_leave_the_range_of_the_first_block(name: str) -> None:
    """Logits that grow by far from block to block, which a lagging maximum must follow."""
    method = band_methods.method_for(name, 128)
    text = draw(method, (8, 2, 128), jnp.bfloat16, starts=[0], real=[900], capacity=900)
    ramp = jnp.linspace(0.1, 4.0, 900, dtype=jnp.float32).astype(jnp.bfloat16)
    steep = text._replace(key=text.key * ramp[None, :, None, None])
    options: dict[str, Any] = {"dca": method, "rows": text.rows}
    out = run(steep.query, steep.key, steep.value, implementation="mosaic_gpu", **options)
    rough = run(steep.query, steep.key, steep.value, implementation="xla", **options)
    wide = (x.astype(jnp.float32) for x in steep[:3])
    expected = run(*wide, implementation="reference", **options)
    # Rounded queries and keys err with the logits, in either form.
    assert error(out, expected) < 1.1 * error(rough, expected) + 1e-3


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_cache_in_8_bits(dtype: str) -> None:
    method = band_methods.method_for("self-extend", 128)
    pieces: dict[str, Any] = {"starts": [830, 17], "real": [270, 200]}
    text = draw(method, (8, 2, 128), jnp.bfloat16, **pieces, capacity=1208)
    packed = [quantize(x, CACHE_DTYPES[dtype]) for x in (text.key, text.value)]
    scales = Scales(*(jnp.swapaxes(scale, 1, 2)[None] for _, scale in packed))
    given = (text.query, *(x[None] for x, _ in packed))
    options: dict[str, Any] = {"dca": method, "rows": text.rows}
    options |= {"scales": scales, "layer": jnp.int32(0)}
    out = run(*given, implementation="mosaic_gpu", **options)
    wide = (text.query.astype(jnp.float32), *given[1:])
    expected = run(*wide, implementation="reference", **options)
    for row, count in enumerate(text.real):
        assert error(out[row, :count], expected[row, :count]) < ALLOWED


@pytest.mark.parametrize("name", ["rerope", "lampe", "dpe"])
def test_gradient(name: str) -> None:
    """Forward by the kernel, backward in plain XLA."""
    method = band_methods.method_for(name, 64)
    text = draw(method, (4, 2, 64), jnp.bfloat16, starts=[0], real=[400], capacity=400)
    weight = jax.random.normal(jax.random.key(9), text.query.shape, jnp.float32)

    def gradient(implementation: str, *arrays: jax.Array) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            options: Any = {"dca": method, "rope": ROPE, "implementation": implementation}
            out = dual_chunk_attention(q, k, v, **options)
            return jnp.sum(out.astype(jnp.float32) * weight)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

    ours = gradient("mosaic_gpu", *text[:3])
    wide = (x.astype(jnp.float32) for x in text[:3])
    for mine, theirs in zip(ours, gradient("reference", *wide), strict=True):
        assert mine.dtype == jnp.bfloat16
        assert error(mine, theirs) < 2e-2


def test_methods_are_read_by_the_kernel_here() -> None:
    query = jax.ShapeDtypeStruct((1, 512, 9, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 1, 512, 3, 64), jnp.bfloat16)
    for name in band_methods.NAMES:
        method = band_methods.method_for(name, 64)
        assert choose_implementation(None, query, key, method) == "mosaic_gpu"
