"""Products of few rows on a CPU, by blocks: against float64, from a packed matrix's parts."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dca_jax.products import cpu_rows, few_rows, row_products
from dca_jax.products.packed import Packed, pack

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="how a CPU multiplies")

RNG = np.random.default_rng(0)
normal = RNG.standard_normal


def close(got: jax.Array, expected: np.ndarray) -> None:
    """Up to the rounding of float32 sums."""
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("inputs", [320, 330, 317, 5])
def test_blocks_of_inputs(inputs: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of each matrix; the last may begin early, among the inputs of the one before.

    317 is a prime, and 5 inputs are one block.
    """
    monkeypatch.setattr(cpu_rows, "BLOCK", 4 * 64 * 50)
    x = jnp.asarray(normal((1, inputs)), dtype)
    stacks = [jnp.asarray(normal((3, inputs, n)), dtype) for n in (64, 256, 96)]
    assert row_products.can_multiply(x, stacks)
    got = jax.jit(row_products.row_products)(x, stacks, np.array([2], np.int32))
    for ours, stack in zip(got, stacks, strict=True):
        close(ours, np.asarray(x, np.float64) @ np.asarray(stack, np.float64)[2])


def test_one_row_of_up_to_32_bits() -> None:
    """Wider rows would be rounded; several rows may have matrices of their own."""
    stacks = [jnp.zeros((1, 8, 16))]
    for rows, dtype, expected in ((1, np.float32, True), (2, np.float32, False), (1, float, False)):
        x = jax.ShapeDtypeStruct((rows, 8), np.dtype(dtype))
        assert row_products.can_multiply(x, stacks) == expected
    for rows, dtype, expected in (
        (16, np.float32, True),
        (17, np.float32, False),
        (1, float, False),
    ):
        assert few_rows.are_few(rows, np.dtype(dtype)) == expected


def numbers_of(matrix: Packed) -> np.ndarray:
    """(value - zero) * scale + offset, [outputs, inputs] in float64, from the description."""
    values = np.asarray(matrix.values)
    groups = matrix.scale.shape[0]
    if matrix.form == "int4":
        bytes_ = values.reshape(len(values), groups, -1)
        values = np.concatenate([bytes_ & 15, bytes_ >> 4], axis=2).reshape(len(values), -1)
    outputs, inputs = values.shape

    def spread(part: jax.Array) -> np.ndarray:
        wide = np.asarray(part, np.float64).T
        wide = np.repeat(wide, outputs // wide.shape[0], axis=0)
        return np.repeat(wide, inputs // wide.shape[1], axis=1)

    wide = values.astype(np.float64)
    if matrix.zero is not None:
        wide = wide - spread(matrix.zero)
    wide = wide * spread(matrix.scale)
    return wide if matrix.offset is None else wide + spread(matrix.offset)


def stack_of(form: str, inputs: int, outputs: int) -> Packed:
    """Three matrices; "Q8_0" and "Q4_1" as in such a GGUF file."""
    if form == "Q8_0":
        values = jnp.asarray(RNG.integers(-128, 128, (3, outputs, inputs)), jnp.int8)
        scale = jnp.asarray(normal((3, inputs // 32, outputs)), jnp.float32)
        return Packed(values, scale, None, (1, 0), 1)
    one = partial(pack, form="int4:32" if form == "Q4_1" else form, num_inputs=1, order=(1, 0))
    packed = [one(jnp.asarray(normal((outputs, inputs)), jnp.float32)) for _ in range(3)]
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), *packed)
    if form == "Q4_1":
        offset = jnp.asarray(normal(stack.scale.shape), jnp.float32)
        stack = replace(stack, zero=None, offset=offset)
    return stack


@pytest.mark.parametrize(("rows", "dtype"), [(1, "float32"), (16, "float32"), (3, "bfloat16")])
@pytest.mark.parametrize("form", ["int8", "Q8_0", "int4", "int4:32", "Q4_1", "fp8"])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 90), (256, 384), (64, 7)])
def test_blocks_of_outputs(
    inputs: int, outputs: int, form: str, rows: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several blocks, which scales of fp8 share or not; the last may begin early."""
    monkeypatch.setattr(cpu_rows, "BLOCK", 4 * 128 * 35)
    x, stack = jnp.asarray(normal((rows, inputs)), dtype), stack_of(form, inputs, outputs)
    assert few_rows.are_few(rows, x.dtype)
    (got,) = jax.jit(few_rows.multiply)(x, [stack], jnp.int32(1))
    close(got, np.asarray(x, np.float64) @ numbers_of(stack[1]).T)
