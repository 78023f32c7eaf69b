"""Keys and values as they are stored, in 8 bits too, beside NumPy's own numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dca_jax.attention.layer import write
from dca_jax.attention.stored import Stored, dequantize, quantize


@pytest.mark.parametrize(
    ("dtype", "theirs", "largest"),
    [(jnp.int8, np.int8, 127), (jnp.float8_e4m3fn, ml_dtypes.float8_e4m3fn, 448)],
)
def test_numbers_and_scales_are_numpys(dtype: Any, theirs: Any, largest: float) -> None:
    x = np.float32(np.random.default_rng(0).standard_t(3, size=(500, 3, 16)))
    x[0, 0] = 0
    x[0, 1] = [-7, 7, *[0.0] * 14]  # both ends
    q, found = jax.jit(quantize, static_argnums=1)(x, dtype)
    scale = np.asarray(found)
    np.testing.assert_allclose(scale, np.abs(x).max(axis=-1) / largest, rtol=3e-7)
    ratio = x / np.where(scale == 0, 1, scale)[..., None]
    expected = (np.rint(ratio) if theirs == np.int8 else ratio).astype(theirs)
    np.testing.assert_array_equal(np.asarray(q).astype(np.float32), expected.astype(np.float32))
    assert not np.asarray(q)[0, 0].any()
    np.testing.assert_array_equal(np.float32(q)[0, 1, :2], [-largest, largest])
    back = dequantize(q, found, jnp.float32)
    np.testing.assert_allclose(back, np.float32(expected) * scale[..., None], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    x = np.ones((2, 8), np.float32)
    x[1, 3] = bad
    for dtype in (jnp.int8, jnp.float8_e4m3fn):
        read = dequantize(*quantize(jnp.asarray(x), dtype), jnp.float32)
        assert np.isfinite(read[0]).all()
        assert not np.isfinite(read[1]).all()


@pytest.mark.parametrize("slot", [0, 3, 4, 9])
def test_one_token_is_written_in_its_place_or_not_at_all(slot: int) -> None:
    """As NumPy writes it; a slot beyond the cache's four is dropped."""
    rng = np.random.default_rng(0)
    before = rng.standard_normal((3, 2, 4, 10)).astype(np.float32)
    new = rng.standard_normal((2, 1, 1, 2, 5)).astype(np.float32)
    cache = Stored(jnp.array(before), jnp.array(before), None, None)
    at = jnp.int32(2), jnp.array([[1]]), jnp.array([[slot]])
    got = jax.jit(write)(cache, *at, *jnp.array(new))
    for ours, each in zip((got.key, got.value), new, strict=True):
        want = before.copy()
        if slot < 4:
            want[2, 1, slot] = each.reshape(10)
        np.testing.assert_array_equal(ours, want)
