"""Products of a few rows on Hopper: against float64, and in a model that draws tokens."""

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import lowering
import numpy as np
import pytest
from flax import nnx

from dca_jax.config import LlamaConfig, LoraConfig, MixtureConfig
from dca_jax.dca import DCAConfig
from dca_jax.device import SHARED_BYTES, current_device
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama
from dca_jax.products import dense_plan, dense_rows
from dca_jax.products.dense_plan import ROWS, STEP, Plan, choose_plan
from dca_jax.products.dense_rows import Norm

# The float32 model's rows have that kernel on a GPU.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)

LLAMA = LlamaConfig(
    vocab_size=61,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=128,
    max_position_embeddings=64,
)
QWEN2 = replace(LLAMA, model_type="qwen2", qkv_bias=True)
QWEN3 = replace(LLAMA, model_type="qwen3", qk_norm=True)
# A layer with an MLP, then one with experts.
MIXTURE = replace(
    QWEN3,
    model_type="qwen3_moe",
    mixture=MixtureConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, dense_layers=(0,)
    ),
)
ADAPTED = LoraConfig(rank=2, targets=("o_proj", "gate_proj"))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if jax.default_backend() == "cpu":
        monkeypatch.setattr(dense_rows, "INTERPRET", True)
        monkeypatch.setattr(dense_plan, "SPLITS", (1,))  # there are no clusters in the interpreter


def needs_hopper() -> None:
    if (current_device().capability or (0, 0))[0] != 9:
        pytest.skip("needs a Hopper GPU")


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray(jnp.asarray(x, dtype), np.float64)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("dtype", "rows", "widths", "kind", "plan"),
    [
        ("bfloat16", 1, (128, 64, 64), "norm", Plan(64, 1, 3)),
        ("float16", 1, (128,), "residual", Plan(128, 1, 2)),
        ("bfloat16", 3, (128,), "residual", Plan(64, 1, 4)),
        pytest.param("float16", 3, (256, 256), "", Plan(256, 1, 2), marks=pytest.mark.slow),
        pytest.param("bfloat16", 8, (128, 128), "gated", Plan(64, 1, 2), marks=pytest.mark.slow),
    ],
)
def test_rows_times_a_layers_matrices(
    dtype: str, rows: int, widths: tuple[int, ...], kind: str, plan: Plan
) -> None:
    compare(dtype, rows, 512, widths, kind, plan)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(
    ("inputs", "widths", "kind"),
    [
        (4096, (4096, 1024, 1024), "norm"),
        (4096, (4096,), "residual"),
        (4096, (14336, 14336), "gated"),
        (14336, (4096,), "residual"),
        (4096, (4096, 4096, 4096), "norm"),
        (4096, (11008, 11008), "gated"),
        (11008, (4096,), "residual"),
        (896, (896, 128, 128), "norm"),
    ],
)
def test_models_shapes_on_hopper(
    rows: int, inputs: int, widths: tuple[int, ...], kind: str
) -> None:
    needs_hopper()
    compare("bfloat16", rows, inputs, widths, kind, None)


def compare(
    dtype: str, rows: int, inputs: int, widths: tuple[int, ...], kind: str, plan: Plan | None
) -> None:
    """Beside float64, with what surrounds the product; float32 sums are rounded once."""
    rng, layer, norms = np.random.default_rng(rows), 1, kind in ("norm", "gated")
    x, scale = rng.standard_normal((rows, inputs)), 1 + rng.standard_normal((2, inputs)) / 9
    stacks = [rng.standard_normal((2, inputs, width), np.float32) for width in widths]
    residual = 20 * rng.standard_normal((rows, widths[0]))

    def multiply(x: jax.Array, stacks: list[jax.Array], layer: jax.Array) -> tuple[jax.Array, ...]:
        norm = Norm(jnp.asarray(scale, dtype), layer, 1e-5) if norms else None
        added = jnp.asarray(residual, dtype) if kind == "residual" else None
        options = {"norm": norm, "residual": added, "gated": kind == "gated"}
        return dense_rows.multiply(x, stacks, layer, plan=plan, **options)

    run = jax.jit(multiply)
    arrays = jnp.asarray(x, dtype), [jnp.asarray(stack, dtype) for stack in stacks]
    got = run(*arrays, jnp.int32(layer))

    x = rounded(x, dtype)
    if norms:
        normed = rounded(x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-5), dtype)
        x = rounded(normed * rounded(scale[layer], dtype), dtype)
    expected = [x @ rounded(stack[layer], dtype) for stack in stacks]
    if kind == "gated":
        gate, up = expected
        expected = [gate / (1 + np.exp(-gate)) * up]
    if kind == "residual":
        expected[0] += rounded(residual, dtype)
    assert len(got) == len(expected)
    for ours, exact in zip(got, expected, strict=True):
        half = float(jnp.finfo(dtype).eps) / 2
        tolerance = {"rtol": 1.1 * half, "atol": half / 8 * np.abs(exact).max()}
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, **tolerance)
    if not dense_rows.INTERPRET:
        for _ in range(20):  # the order of sums is fixed
            for ours, again in zip(got, run(*arrays, jnp.int32(layer)), strict=True):
                np.testing.assert_array_equal(ours, again)


def test_plans_fit_in_shared_memory_and_divide_their_matrices() -> None:
    """Of rows, steps in flight, sums and results; some is left for barriers and reductions."""
    found, options = 0, itertools.product((False, True), repeat=2)
    for inputs, width, count, (gated, norm) in itertools.product(
        range(64, 30_000, 448), (64, 128, 576, 896, 4096, 14336, 28672), (1, 2, 3), list(options)
    ):
        if gated and count != 2:
            continue
        plan = choose_plan(inputs, [width] * count, gated=gated, norm=norm)
        if plan is None:
            continue
        found += 1
        each, part = 1 + gated, inputs // plan.splits
        rows = ROWS * (part if norm else plan.stages * STEP) * 2
        steps = plan.stages * STEP * plan.tile * each * 2
        sums = (plan.splits - 1) * each * plan.tile * ROWS * 4
        results = ROWS * plan.tile * 2
        assert rows + steps + sums + results <= SHARED_BYTES - 12_288
        assert width % plan.tile == part % STEP == inputs % plan.splits == 0
        assert plan.stages * STEP <= part
    assert found > 100


def test_plans_are_the_ones_that_were_fastest() -> None:
    """On an H200: Llama-3-8B's q, k and v; o; gate and up; down; Llama-2-7B's."""
    assert choose_plan(4096, [4096, 1024, 1024], norm=True) == Plan(256, 4, 5)
    assert choose_plan(4096, [4096]) == Plan(256, 4, 5)
    assert choose_plan(4096, [14336, 14336], gated=True, norm=True) == Plan(128, 1, 4)
    assert choose_plan(14336, [4096]) == Plan(256, 4, 5)
    assert choose_plan(4096, [4096, 4096, 4096], norm=True) == Plan(256, 2, 5)
    assert choose_plan(11008, [4096]) == Plan(256, 4, 5)
    assert choose_plan(4096, [4096, 1000]) is None


@pytest.mark.parametrize(
    ("inputs", "widths", "gated"),
    [
        (4096, (4096, 1024, 1024), False),
        pytest.param(8192, (8192,), False, marks=pytest.mark.slow),
        pytest.param(8192, (28672, 28672), True, marks=pytest.mark.slow),
        (14336, (4096,), False),
    ],
)
def test_compiles_for_hopper(inputs: int, widths: tuple[int, ...], gated: bool) -> None:
    """As far as the kernel's own compiler goes, which counts shared memory."""

    def multiply(x: jax.Array, stacks: list[jax.Array], layer: jax.Array) -> tuple[jax.Array, ...]:
        norm = Norm(jnp.ones((2, inputs), x.dtype), layer, 1e-5) if inputs < 9000 else None
        assert dense_rows.can_multiply(x, stacks, gated=gated, norm=norm is not None)
        return dense_rows.multiply(x, stacks, layer, norm=norm, gated=gated)

    x = jax.ShapeDtypeStruct((ROWS, inputs), jnp.bfloat16)
    stacks = [jax.ShapeDtypeStruct((2, inputs, width), jnp.bfloat16) for width in widths]
    lowered = lowering.lower(multiply, x, stacks, jax.ShapeDtypeStruct((), jnp.int32))
    assert lowered.count("dca_dense_rows") >= 1


def test_other_devices_and_shapes_are_refused(interpreted: None) -> None:
    def can(
        rows: int, inputs: int, width: int, dtype: str = "bfloat16", *, norm: bool = False
    ) -> bool:
        x = jax.ShapeDtypeStruct((rows, inputs), jnp.dtype(dtype))
        matrix = jax.ShapeDtypeStruct((2, inputs, width), x.dtype)
        return dense_rows.can_multiply(x, [matrix], norm=norm)

    assert can(1, 256, 64)
    assert can(8, 256, 64)
    assert can(1, 65_536, 64)
    assert not can(1, 65_536, 64, norm=True)  # its rows stay in shared memory
    assert not can(9, 256, 64)
    assert not can(1, 320, 64)
    assert not can(1, 256, 96)
    assert not can(1, 256, 64, "float32")


@pytest.mark.parametrize("kind", ["NVIDIA A100", "NVIDIA B200"])
def test_other_generations_are_refused(kind: str) -> None:
    x = jax.ShapeDtypeStruct((1, 256), jnp.bfloat16)
    with lowering.device(kind):
        assert not dense_rows.can_multiply(x, [jax.ShapeDtypeStruct((2, 256, 64), x.dtype)])


ATTENTION, MLP = [{"norm"}, {"residual"}], [{"norm", "gated"}, {"residual"}]
MODELS = pytest.mark.parametrize(
    ("config", "lora", "rows", "launches"),
    [
        # q, k and v; o; gate and up; down; one program for both layers
        (LLAMA, None, 1, [*ATTENTION, *MLP]),
        (QWEN2, None, 3, [*ATTENTION, *MLP]),
        (QWEN3, None, 1, [*ATTENTION, *MLP]),
        # what an adapter adds comes before the residual sum and before the gate
        (LLAMA, ADAPTED, 1, [{"norm"}, set(), {"norm"}, {"residual"}]),
        (MIXTURE, None, 1, [*ATTENTION, *MLP, *ATTENTION]),
        (LLAMA, None, 9, []),
    ],
    ids=["llama", "bias", "qk-norm", "lora", "experts", "many"],
)


@MODELS
@pytest.mark.usefixtures("interpreted")
def test_a_token_has_few_launches(
    config: LlamaConfig,
    lora: LoraConfig | None,
    rows: int,
    launches: list[set[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = watch(monkeypatch)
    jax.eval_shape(lambda: draw(make(config, lora, jnp.float32), rows))
    assert found == []
    jax.eval_shape(lambda: draw(make(config, lora, jnp.float16), rows))
    assert found == launches


@MODELS
@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_tokens_are_drawn_as_by_plain_products(
    config: LlamaConfig, lora: LoraConfig | None, rows: int, launches: list[set[str]]
) -> None:
    compare_models(config, lora, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8])
def test_tokens_are_drawn_on_hopper(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_hopper()
    found = watch(monkeypatch)
    compare_models(LLAMA, None, rows)
    assert found == [*ATTENTION, *MLP]


def compare_models(config: LlamaConfig, lora: LoraConfig | None, rows: int) -> None:
    """In float16, beside the same weights in a float32 model, which has no such kernel."""
    half, full = (make(config, lora, dtype) for dtype in (jnp.float16, jnp.float32))
    rng = np.random.default_rng(0)
    leaves = [  # biases and LoRA count
        leaf + jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)
        for leaf in jax.tree.leaves(half)
    ]
    exact, ours = (
        np.asarray(jax.jit(draw, static_argnums=1)(jax.tree.unflatten(tree, leaves), rows))
        for tree in map(jax.tree.structure, (full, half))
    )
    np.testing.assert_allclose(ours, exact, atol=0.02 * exact.std())


def make(config: LlamaConfig, lora: LoraConfig | None, dtype: Any) -> Llama:
    dca = DCAConfig(chunk_len=6, max_query_position=9)
    options = {"param_dtype": jnp.float16, "dtype": dtype, "rngs": nnx.Rngs(0)}
    return Llama(config, dca=dca, lora=lora, **options)


def draw(model: Llama, rows: int) -> jax.Array:
    """The last token's logits, after all others are in the cache."""
    tokens = jax.random.randint(jax.random.key(0), (rows, 13), 0, model.config.vocab_size)
    cache = KVCache.create(model.config, batch=rows, capacity=16, dtype=model.dtype)
    _, cache = model.hidden_states(tokens[:, :-1], cache=cache)
    hidden, _ = model.hidden_states(tokens[:, -1:], cache=cache)
    return model.unembed(hidden[:, 0])


def watch(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The options of each launch from now on, by their names."""
    multiply, found = dense_rows.multiply, []

    def counted(*args: Any, **options: Any) -> tuple[jax.Array, ...]:
        found.append({name for name, value in options.items() if value is not None})
        return multiply(*args, **options)

    monkeypatch.setattr(dense_rows, "multiply", counted)
    return found
