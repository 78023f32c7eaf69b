"""Blackwell's kernel without a Blackwell GPU: its values in JAX's GPU interpreter, and lowered.

The interpreter executes `tcgen05`, tensor memory and barriers, and detects races by what these
guarantee; test_backends.py runs the contract of all backends in it. What it does not show: the vote
in PTX, layouts of registers and shared memory, and speed. tests/gpu_aot/ compiles to machine code.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import QUICK, ROPE, draw
from lowering import device, lower, lower_forward, shapes

from dca_jax.attention import attend, dual_chunk_attention, mosaic_blackwell
from dca_jax.attention.backend import PLAIN, KeyBlocks
from dca_jax.attention.blocks import num_tiles
from dca_jax.attention.mosaic_blackwell.tiles import BLOCK_Q, STAGES, TMEM_COLUMNS, tmem_columns
from dca_jax.attention.op import choose_implementation, make_rows, rotate_keys
from dca_jax.attention.stored import Scales
from dca_jax.dca import PHASES, DCAConfig, Phase, dense_attention
from dca_jax.errors import InputError

B200 = "NVIDIA B200"
DCA = DCAConfig.paper(4096)
CALL = "stablehlo.custom_call @mosaic_gpu_v2"

# Every head_dim in either dtype, every grouping, every set of phases, and lengths that no block
# divides. Each takes JAX seconds.
VARIANTS = [
    pytest.param((1, 4096, 4096, 32, 8, 128, jnp.bfloat16), DCA, PHASES, id="gqa"),
    pytest.param(
        *((2, 1003, 1005, 6, 2, 128, jnp.float16), DCA, PHASES[1:]),
        id="ragged",
        marks=pytest.mark.by_name,
    ),
    pytest.param(
        *((1, 1024, 1024, 4, 4, 64, jnp.float16), DCA, PHASES),
        id="mha",
        marks=pytest.mark.by_name,
    ),
    pytest.param(
        *((1, 4096, 4096, 4, 4, 128, jnp.bfloat16), PLAIN, ("intra",)),
        id="plain",
        marks=pytest.mark.by_name,
    ),
    pytest.param(
        *((1, 1024, 1024, 8, 1, 64, jnp.bfloat16), DCA, ("inter",)),
        id="inter",
        marks=pytest.mark.by_name,
    ),
    pytest.param(
        *((1, 1024, 1024, 4, 2, 128, jnp.float16), DCA, ("succ",)),
        id="succ",
        marks=pytest.mark.by_name,
    ),
]


@pytest.mark.parametrize(("sizes", "dca", "phases"), VARIANTS)
def test_forward_lowers(sizes: tuple, dca: DCAConfig, phases: tuple[Phase, ...]) -> None:
    text = lower_forward(mosaic_blackwell, shapes(*sizes), dca, phases, kind=B200)
    assert CALL in text


@pytest.mark.by_name
@pytest.mark.parametrize("kind", [B200, "NVIDIA GB300"])
def test_forward_without_log_sum_exp_lowers(kind: str) -> None:
    sizes = (1, 1024, 1024, 4, 2, 64, jnp.bfloat16)
    options: Any = {"with_lse": False, "kind": kind}
    assert CALL in lower_forward(mosaic_blackwell, shapes(*sizes), DCA, PHASES, **options)


@pytest.mark.parametrize(
    ("num_queries", "page", "cache", "by_kernel"),
    [
        (1, None, None, False),
        (15, 128, jnp.int8, False),
        pytest.param(300, 256, jnp.int8, True, marks=pytest.mark.by_name),
        pytest.param(16, None, jnp.float8_e4m3fn, True, marks=pytest.mark.by_name),
        pytest.param(300, 128, None, True, marks=pytest.mark.by_name),
    ],
)
def test_caches_of_every_kind_lower(
    num_queries: int, page: int | None, cache: Any, by_kernel: bool
) -> None:
    """Few queries are read by plain XLA; for many, pages are laid out and 8 bits unpacked."""
    query, key, _, layer, rows = shapes(2, num_queries, page or 4096, 4, 2, 128, jnp.bfloat16)
    options: dict[str, Any] = {}
    if page is not None:
        key = jax.ShapeDtypeStruct((2, 99, *key.shape[2:]), key.dtype)
        options["pages"] = jax.ShapeDtypeStruct((2, 4096 // page), jnp.int32)
    if cache is not None:
        key = jax.ShapeDtypeStruct(key.shape, cache)
        scale = jax.ShapeDtypeStruct((*key.shape[:2], 2, key.shape[2]), jnp.float32)
        options["scales"] = Scales(scale, scale)

    def forward(query: Any, key: Any, layer: Any, rows: Any, options: Any) -> Any:
        static: Any = {"dca": DCA, "implementation": "mosaic_blackwell"}
        return attend(query, key, key, layer=layer, rows=rows, **static, **options)

    text = lower(forward, query, key, layer, rows, options, kind=B200)
    assert (CALL in text) == by_kernel


@pytest.mark.by_name
def test_the_gradient_is_by_plain_xla() -> None:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        options: Any = {"dca": DCA, "rope": ROPE, "implementation": "mosaic_blackwell"}
        return jnp.sum(dual_chunk_attention(q, k, v, **options).astype(jnp.float32))

    query = jax.ShapeDtypeStruct((1, 256, 4, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
    text = lower(jax.grad(loss, (0, 1, 2)), query, key, key, kind=B200)
    assert text.count(CALL) == 1


# --- values ------------------------------------------------------------------------------------


def by_definition(q: Any, k: Any, v: Any, dca: DCAConfig, rows: Any) -> np.ndarray:
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    return np.asarray(dense_attention(*wide, dca=dca, **rows.of_dca()))


def by_kernel(q: Any, k: Any, v: Any, dca: DCAConfig, rows: Any) -> tuple[Any, Any]:
    """Output and log-sum-exp."""
    options: Any = {"dca": dca, "phases": PHASES, "with_lse": True}
    forward = jax.jit(partial(mosaic_blackwell.forward, **options), compiler_options=QUICK)
    return forward(q, k[None], v[None], jnp.int32(0), rows)


@pytest.mark.by_name
@pytest.mark.usefixtures("interpreted_mosaic_blackwell")
@pytest.mark.parametrize(
    ("dim", "dtype", "growth"),
    [(64, jnp.bfloat16, 30.0), (128, jnp.float16, 0.0), (128, jnp.bfloat16, 1.5)],
)
def test_more_blocks_than_are_in_flight(dim: int, dtype: Any, growth: float) -> None:
    """CTAs of many steps, and of all phases: each slot of keys is used several times.

    Logits that grow along the text rescale the sum with each block; those that grow by less than
    the slack leave it, and make weights larger than 1.
    """
    length = 4 * BLOCK_Q + 77
    dca = DCAConfig(chunk_len=300, max_query_position=420)
    q, k, v = (x[:, :, :1] for x in draw(1, 1, length, length, 1, 1, dim))
    k = k + growth * jnp.linspace(0, 1, length)[None, :, None, None] * jnp.sign(q[:, -1:])
    q = q[:, -BLOCK_Q - 20 :]
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    rows = make_rows(q.shape, dca=dca, rope=ROPE, query_offset=length - q.shape[1])
    out, lse = by_kernel(q, k, v, dca, rows)
    expected = by_definition(q, k, v, dca, rows)
    error = np.linalg.norm(np.float64(out) - expected) / np.linalg.norm(expected)
    assert error < (2e-3 if dtype == jnp.float16 else 1e-2)
    assert np.isfinite(lse).all()


@pytest.mark.by_name
@pytest.mark.usefixtures("interpreted_mosaic_blackwell")
def test_queries_without_keys_and_rows_of_different_texts() -> None:
    """Slices that end before, hold, and begin after a row's keys; text of one token; padding."""
    dca = DCAConfig(chunk_len=90, max_query_position=130)
    q, raw, v = draw(3, 4, 150, 203, 1, 1, 64, jnp.bfloat16)
    offset = jnp.asarray([300, 0, 20, 100], jnp.int32)
    lengths = jnp.asarray([450, 1, 101, 250], jnp.int32)
    rows = make_rows(q.shape, dca=dca, rope=ROPE, lengths=lengths, query_offset=offset)
    rows = rows._replace(key_offset=jnp.asarray([200, 0, 500, 160], jnp.int32))
    index = rows.key_offset[:, None] + jnp.arange(203, dtype=jnp.int32)[None]
    k = rotate_keys(raw, index, dca=dca, inv_freq=rows.inv_freq)
    out, lse = by_kernel(q, k, v, dca, rows)
    expected = by_definition(q, k, v, dca, rows)
    np.testing.assert_allclose(np.float32(out), expected, atol=2e-2, rtol=0)
    text = np.asarray(offset)[:, None] + np.arange(150)
    begun = (text >= np.asarray(rows.key_offset)[:, None]) & (text < np.asarray(lengths)[:, None])
    assert begun.any(axis=1).tolist() == [True, True, False, True]
    np.testing.assert_array_equal(np.isfinite(lse[:, 0]), begun)
    assert (np.asarray(lse[:, 0])[~begun] == -np.inf).all()
    assert not np.asarray(out)[~begun].any()


# --- what runs where ---------------------------------------------------------------------------


def like(dim: int = 128, dtype: Any = jnp.bfloat16) -> tuple[Any, Any]:
    query = jax.ShapeDtypeStruct((1, 100, 8, dim), dtype)
    return query, jax.ShapeDtypeStruct((1, 1, 100, 2, dim), dtype)


@pytest.mark.parametrize("kind", [B200, "NVIDIA GB200", "NVIDIA B300"])
def test_it_is_chosen_by_name_only(kind: str) -> None:
    """It was never run on such a GPU."""
    with device(kind):
        assert choose_implementation(None, *like(), DCA) == "triton"
        assert choose_implementation("mosaic_blackwell", *like(), DCA) == "mosaic_blackwell"


@pytest.mark.parametrize(
    ("kind", "dim", "dtype", "message"),
    [
        ("NVIDIA H200", 128, jnp.bfloat16, "capability 10.0 or 10.3.*got NVIDIA H200"),
        ("NVIDIA GeForce RTX 5090", 128, jnp.bfloat16, "capability 10.0 or 10.3"),
        (B200, 128, jnp.float32, "bfloat16 or float16"),
        (B200, 96, jnp.bfloat16, r"head_dim must be one of \[64, 128\], got 96"),
        (B200, 256, jnp.bfloat16, "768 columns of tensor memory per CTA, and there are 512"),
    ],
)
def test_what_it_cannot_do_is_refused(kind: str, dim: int, dtype: Any, message: str) -> None:
    with device(kind), pytest.raises(InputError, match=message):
        choose_implementation("mosaic_blackwell", *like(dim, dtype), DCA)


def test_lists_of_key_blocks_are_refused() -> None:
    query, key, _, layer, rows = shapes(2, 300, 1024, 4, 2, 128, jnp.bfloat16)
    of_tiles = 2, 2, num_tiles(300)
    blocks = KeyBlocks(
        *(jax.ShapeDtypeStruct((*of_tiles, size), jnp.int32) for size in (3, 8)), skip=None
    )

    def forward(query: Any, key: Any, layer: Any, rows: Any, blocks: Any) -> Any:
        static: Any = {"dca": DCA, "implementation": "mosaic_blackwell"}
        return attend(query, key, key, layer=layer, rows=rows, blocks=blocks, **static)

    with pytest.raises(InputError, match="does not support lists of key blocks"):
        lower(forward, query, key, layer, rows, blocks, kind=B200)


@pytest.mark.parametrize("dim", STAGES)
def test_tensor_memory_holds_both_tiles(dim: int) -> None:
    assert tmem_columns(dim) <= TMEM_COLUMNS
