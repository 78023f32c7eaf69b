"""Several texts in one row: each attends to itself alone, beside a dense float64 computation."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import relative_position

from dca_jax.attention import packed
from dca_jax.attention.packed import attend_to_packed
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.rope import RopeConfig

DCA = DCAConfig(chunk_len=10, max_query_position=15)
# Of both widths (12 and 90 tokens), one to several batches of each.
SIZES = [[41, 1, 10, 11, 20, 2], [7, 31, 9, 21, 8, 1, 1]]
LENGTH, HEADS, KV_HEADS, WIDTH = 90, 4, 2, 8


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "NARROWEST", 12)
    monkeypatch.setattr(packed, "WIDER", 8)


def text_index(sizes: list[list[int]], length: int = LENGTH) -> np.ndarray:
    rows = [np.concatenate([np.arange(n) for n in row]) for row in sizes]
    padded = [np.pad(row, (0, length - len(row)), constant_values=-1) for row in rows]
    return np.stack(padded).astype(np.int32)


def arrays(batch: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    shapes = [(batch, LENGTH, n, WIDTH) for n in heads]
    return [rng.normal(size=shape).astype(np.float32) * np.float32(1.5) for shape in shapes]


@jax.jit
def dense(query: Any, key: Any, value: Any, relative: Any, seen: Any) -> Any:
    """A row [T, N, H], each query turned towards each key that it sees; autodiff of it is exact."""
    half = WIDTH // 2
    key, value = (jnp.repeat(x, HEADS // KV_HEADS, axis=1) for x in (key, value))
    frequency = (10_000.0 ** (-np.arange(half) / half))[None, None, :]
    turn = jnp.exp(1j * relative[:, :, None] * frequency)
    q, k = (x[..., :half] + 1j * x[..., half:] for x in (query, key))
    logits = jnp.einsum("inf,ijf,jnf->nij", q, turn, k.conj()).real / np.sqrt(WIDTH)
    weights = jax.nn.softmax(jnp.where(seen[None], logits, -1e300), axis=-1)
    return jnp.einsum("nij,jnh->inh", weights * seen[None], value)


def positions(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair of a row: the relative position in its text, and whether the key is seen."""
    relative, seen, start = np.zeros((LENGTH, LENGTH)), np.zeros((LENGTH, LENGTH), bool), 0
    for size in sizes:
        for i in range(size):
            for j in range(i + 1):
                here = start + i, start + j
                relative[here] = relative_position(i, j, DCA.chunk_len, DCA.max_query_position)
                seen[here] = True
        start += size
    return relative, seen


def test_each_text_is_read_alone_in_value_and_gradient() -> None:
    query, key, value, cotangent = arrays()
    index = jnp.asarray(text_index(SIZES))

    @jax.jit
    def ours(do: Any, *args: Any) -> Any:
        def read(*args: Any) -> Any:
            return attend_to_packed(*args, index, dca=DCA, rope=RopeConfig())

        out, back = jax.vjp(read, *args)
        return out, back(do)

    found, gradients = ours(*map(jnp.asarray, (cotangent, query, key, value)))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        for row, sizes in enumerate(SIZES):
            wide = [jnp.asarray(x[row], jnp.float64) for x in (query, key, value)]
            relative, seen = positions(sizes)
            want, back = jax.vjp(lambda *x, r=relative, m=seen: dense(*x, r, m), *wide)
            end = sum(sizes)
            np.testing.assert_allclose(found[row, :end], want[:end], atol=2e-5)
            assert not np.asarray(found[row, end:]).any()
            do = cotangent[row].astype(np.float64)
            do[end:] = 0
            for one, theirs in zip(gradients, back(jnp.asarray(do)), strict=True):
                np.testing.assert_allclose(one[row], theirs, atol=1e-4)


def test_frequencies_and_temperature_are_those_of_each_text() -> None:
    """Dynamic NTK stretches for the longest text alone, whatever shares its row."""
    rope = RopeConfig(rope_type="dynamic", factor=4.0, original_max_position_embeddings=12)
    query, key, value, _ = map(jnp.asarray, arrays(batch=1))
    together = attend_to_packed(
        query, key, value, jnp.asarray(text_index([[70, 15]])), dca=None, rope=rope
    )
    alone = attend_to_packed(
        *(jnp.roll(x, -70, axis=1) for x in (query, key, value)),
        jnp.asarray(text_index([[15]])),
        dca=None,
        rope=rope,
    )
    np.testing.assert_allclose(together[0, 70:85], alone[0, :15], atol=1e-6)


def test_the_memory_is_that_of_a_row_and_not_of_every_text_at_its_length() -> None:
    length = 1024
    index = jnp.zeros((1, length), jnp.int32)  # as many texts as there are tokens
    like = [jax.ShapeDtypeStruct((1, length, n, WIDTH), jnp.float32) for n in (HEADS, 2, 2)]

    def loss(*args: Any) -> Any:
        return attend_to_packed(*args, index, dca=None, rope=RopeConfig()).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*like).compile()
    sizes = [
        int(np.prod([int(n) for n in shape.split(",")]))
        for shape in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    ]
    assert max(sizes) <= HEADS * 512 * length  # logits of a tile of the blockwise backend


def test_the_dense_reference_is_refused() -> None:
    query, key, value, _ = map(jnp.asarray, arrays())
    with pytest.raises(InputError, match="'reference' does not support packed texts"):
        attend_to_packed(
            *(query, key, value, jnp.asarray(text_index(SIZES))),
            dca=DCA,
            rope=RopeConfig(),
            implementation="reference",
        )
