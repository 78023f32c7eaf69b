"""Mixtures of experts: beside transformers, a dense float64 computation, and one device."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract import collective_sizes
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from lowering import lower
from tiny_llm import DIVISIBLE

from dca_jax import experts as experts_module
from dca_jax.config import LlamaConfig, LoraConfig, MixtureConfig
from dca_jax.device import Device
from dca_jax.errors import InputError
from dca_jax.experts import Experts, balance_of, load_balancing_loss
from dca_jax.grouped import (
    PRODUCTS,
    block_size,
    choose,
    chosen_products,
    collect,
    lay_out,
    spread,
)
from dca_jax.inference.generate import generate
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama
from dca_jax.products import few_rows, row_products
from dca_jax.products.packed import Packed, pack
from dca_jax.sharding import describe, make_mesh, parse_mesh
from dca_jax.weights.folder import load_weights
from dca_jax.weights.parameters import lora_parameters
from dca_jax.weights.placement import check_mesh, parameter_shardings

# --- beside transformers -----------------------------------------------------------------------

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # Every second layer: dense, sparse, dense.
    "qwen3-moe": ("Qwen3MoeConfig", QWEN | {"num_hidden_layers": 3, "decoder_sparse_step": 2}),
    "qwen3-moe-normed": (
        "Qwen3MoeConfig",
        QWEN | {"num_hidden_layers": 2, "norm_topk_prob": True, "attention_bias": True},
    ),
    "mixtral": ("MixtralConfig", {"num_hidden_layers": 2, "num_local_experts": 4}),
}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 60)).astype(np.int32)


def save_tiny(folder: Path, family: str) -> Any:
    """A tiny random model of the family, saved as transformers saves it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config_class, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(TINY | options))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def load(folder: Path, **options: Any) -> Llama:
    config = LlamaConfig.from_hf(json.loads((folder / "config.json").read_text()))
    assert LlamaConfig.from_hf(config.to_hf()) == config
    params = load_weights(folder, config, dtype=jnp.float32)
    return Llama.from_params(config, params, dtype=jnp.float32, **options)


@jax.jit
def step(model: Llama, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache | None]:
    hidden, cache_after = model.hidden_states(tokens, cache=cache)
    return model.unembed(hidden), cache_after


@pytest.mark.parametrize("family", ["qwen3-moe", "qwen3-moe-normed"])
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    """A whole text, and the same text as a long piece and a token after a cache."""
    torch = pytest.importorskip("torch")
    theirs = save_tiny(tmp_path, family)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    largest = np.abs(expected).max()
    assert largest > 1
    model = load(tmp_path)
    got = jax.jit(Llama.__call__)(model, jnp.asarray(TOKENS))
    np.testing.assert_allclose(got, expected, atol=1e-5 * largest, rtol=0)
    if family == "qwen3-moe-normed":
        return  # a cache is read alike by all
    cache: Any = KVCache.create(model.config, batch=2, capacity=64, dtype=jnp.float32)
    pieces = []
    for start, stop in ((0, 59), (59, 60)):
        logits, cache = step(model, jnp.asarray(TOKENS[:, start:stop]), cache)
        pieces.append(logits)
    got = np.concatenate(pieces, axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-5 * largest, rtol=0)


def test_mixtral_and_the_loss_of_uneven_choices_are_those_of_transformers(tmp_path: Path) -> None:
    """Logits; and with padding, over all layers together, the loss."""
    torch = pytest.importorskip("torch")
    theirs = save_tiny(tmp_path, "mixtral")
    mask = np.ones_like(TOKENS)
    mask[1, 40:] = 0
    with torch.no_grad():
        out = theirs(
            torch.tensor(TOKENS), attention_mask=torch.tensor(mask), output_router_logits=True
        )
    model, is_text = load(tmp_path), mask == 1

    @jax.jit
    def run(model: Llama) -> tuple[jax.Array, jax.Array]:
        lengths = jnp.asarray([60, 40], jnp.int32)
        hidden, balance = model.balanced_hidden_states(jnp.asarray(TOKENS), lengths)
        return balance, model.unembed(hidden)

    balance, logits = run(model)
    np.testing.assert_allclose(float(balance), float(out.aux_loss), rtol=1e-5)
    expected = out.logits.numpy()[is_text]
    largest = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(logits)[is_text], expected, atol=1e-5 * largest, rtol=0)


def test_the_gradient_of_uneven_choices_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    moe = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 30, 32)).astype(np.float32)
    router = rng.standard_normal((32, 8)).astype(np.float32)
    mask = np.arange(30)[None, :] < np.array([[30], [11]])
    weight = torch.tensor(router, requires_grad=True)
    gates = torch.tensor(x).reshape(-1, 32) @ weight
    theirs = moe.load_balancing_loss_func((gates,), 8, 3, torch.tensor(mask.astype(np.int64)))
    theirs.backward()
    layer = layer_of()

    def loss(router: jax.Array) -> jax.Array:
        balance = balance_of(
            layer.route(jnp.asarray(x), router[None], jnp.int32(0)), jnp.asarray(mask)
        )
        return load_balancing_loss(jax.tree.map(lambda a: a[None], balance))

    got, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(router))
    np.testing.assert_allclose(float(got), theirs.item(), rtol=1e-5)
    assert weight.grad is not None
    np.testing.assert_allclose(gradient, weight.grad.numpy(), atol=1e-6)


# --- the products, and a layer -------------------------------------------------------------------

SIZES = np.array([5, 0, 40, 1, 0, 17], np.int32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["ragged", "blocks"])
def test_products_of_groups(name: str, transposed: bool) -> None:
    """Empty groups, one of a row, ones of several blocks; rows that belong to none."""
    with jax.enable_x64(True):
        keys, beyond, block = jax.random.split(jax.random.key(0), 3), 9, 8
        group = np.repeat(np.arange(7), [*SIZES, beyond]).astype(np.int32)
        group = np.random.default_rng(0).permutation(group)
        rows = len(group)
        x = jax.random.normal(keys[0], (rows, 7), jnp.float64)
        kernels = jax.random.normal(keys[1], (2, 6, 7, 5), jnp.float64)
        weights = jax.random.normal(keys[2], (rows, 5), jnp.float64)

        def ours(x: jax.Array, kernels: jax.Array) -> jax.Array:
            layout = lay_out(jnp.asarray(group), 6, block)
            stack = kernels.swapaxes(2, 3) if transposed else kernels
            how = jnp.int32(1), layout.sizes, block, transposed
            return collect(PRODUCTS[name](spread(x, layout), stack, *how), layout)

        def dense(x: jax.Array, kernels: jax.Array) -> jax.Array:
            matrices = jnp.concatenate([kernels[1], jnp.zeros((1, 7, 5))])[group]
            return jnp.einsum("ri,rio->ro", x, matrices)

        def graded(x: jax.Array, kernels: jax.Array) -> list[Any]:
            both = (
                jax.vjp(lambda x, kernels, f=f: f(x, kernels), x, kernels) for f in (ours, dense)
            )
            return [(out, *back(weights)) for out, back in both]

        got, expected = jax.jit(graded)(x, kernels)
        for ours_, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(ours_, theirs, atol=1e-12)


@pytest.mark.parametrize("block", [1, 4, 128])
def test_every_row_has_one_place_and_every_block_one_group(block: int) -> None:
    group = np.random.default_rng(block).integers(0, 9, 200).astype(np.int32)
    group[group == 3] = 4  # one is empty; 8 is no group
    run = jax.jit(lay_out, static_argnums=(1, 2))
    layout = jax.tree.map(np.asarray, run(jnp.asarray(group), 8, block))
    places = len(layout.source)
    np.testing.assert_array_equal(layout.sizes, np.bincount(group, minlength=9)[:8])
    np.testing.assert_array_equal(layout.place < places, group < 8)
    belongs = np.flatnonzero(group < 8)
    np.testing.assert_array_equal(layout.source[layout.place[belongs]], belongs)
    assert np.sum(layout.source < 200) == len(belongs)
    standing = layout.source.reshape(-1, block)
    for rows in standing:
        assert len(set(group[rows[rows < 200]])) <= 1
    # The groups' blocks follow each other, as a product finds them.
    first = [group[rows[0]] for rows in standing if rows[0] < 200]
    expected = np.repeat(np.arange(8), -(-layout.sizes // block))
    np.testing.assert_array_equal(first, expected)


@pytest.mark.parametrize("way", ["rows", "kernel"])
def test_few_rows_times_their_own_matrices(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_products, "INTERPRET", way == "kernel")
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (4, 256))
    stacks = tuple(jax.random.normal(key, (2, 6, 256, 128)) for key in keys[1:])
    groups = jnp.asarray([5, 0, 5, 2], jnp.int32)
    got = jax.jit(chosen_products)(x, stacks, jnp.int32(1), groups)
    for ours, kernels in zip(got, stacks, strict=True):
        expected = np.einsum("ri,rio->ro", x, kernels[1, groups], dtype=np.float64)
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def packed_experts(form: str, inputs: int, outputs: int) -> Packed:
    """Those of two layers with six experts, of normal numbers."""
    matrices = np.random.default_rng(outputs).standard_normal((12, inputs, outputs))
    packed = [pack(jnp.asarray(m.T, jnp.float32), form, 1, order=(1, 0)) for m in matrices]
    return jax.tree.map(lambda *parts: jnp.stack(parts).reshape(2, 6, *parts[0].shape), *packed)


def check_few_packed_rows(forms: tuple[str, str], dtype: Any, tolerance: float) -> None:
    """Eight rows times the matrices of their experts in two stacks, against float64."""
    rng, groups = np.random.default_rng(0), jnp.asarray([5, 0, 5, 2, 1, 3, 4, 0], jnp.int32)
    x = jnp.asarray(rng.standard_normal((8, 768)), dtype)
    stacks = tuple(packed_experts(form, 768, 256) for form in forms)
    for ours, stack in zip(
        jax.jit(chosen_products)(x, stacks, jnp.int32(1), groups), stacks, strict=True
    ):
        own = np.asarray(stack[1, groups].unpack_inner(jnp.float32), np.float64)
        expected = np.einsum("ri,roi->ro", np.asarray(x, np.float64), own)
        error = np.linalg.norm(np.asarray(ours, np.float64) - expected)
        assert error < tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "forms",
    [
        pytest.param((gate, down), id=f"{gate}+{down}", marks=marks)
        for gate, down, marks in (
            ("int4:128", "int4:128", ()),
            ("fp8", "fp8", pytest.mark.slow),
            ("int8", "int4:32", pytest.mark.slow),
        )
    ],
)
def test_few_rows_times_their_own_packed_matrices(
    forms: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "INTERPRET", True)
    check_few_packed_rows(forms, jnp.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "forms",
    [("int4:128", "int4:128"), ("fp8", "fp8"), ("int8", "int4:32"), ("int8", "int8")],
    ids="+".join,
)
def test_few_rows_times_their_own_packed_matrices_on_a_gpu(forms: tuple[str, str]) -> None:
    check_few_packed_rows(forms, jnp.bfloat16, 4e-3)


@pytest.mark.parametrize("matrix", [(256, 128), (384, 512)])
@pytest.mark.parametrize(
    ("name", "transposed"),
    [
        ("blocks", False),
        pytest.param("mosaic_gpu", False, marks=pytest.mark.gpu),
        pytest.param("mosaic_gpu", True, marks=pytest.mark.gpu),
    ],
)
def test_products_of_groups_in_16_bits(
    name: str, transposed: bool, matrix: tuple[int, int]
) -> None:
    """Value and gradients of bfloat16 rows and matrices, against float64; the same bits twice."""
    rng, inputs, outputs = np.random.default_rng(0), *matrix
    group = rng.permutation(np.repeat(np.arange(7), [300, 0, 128, 1, 129, 257, 9])).astype(np.int32)
    block = block_size(name, len(group), 6)
    shapes = (len(group), inputs), (2, 6, inputs, outputs), (len(group), outputs)
    x, kernels, weights = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes)

    @jax.jit
    def graded(x: jax.Array, kernels: jax.Array) -> tuple[jax.Array, ...]:
        def product(x: jax.Array, kernels: jax.Array) -> jax.Array:
            layout = lay_out(jnp.asarray(group), 6, block)
            stack = kernels.swapaxes(2, 3) if transposed else kernels
            how = jnp.int32(1), layout.sizes, block, transposed
            return collect(PRODUCTS[name](spread(x, layout), stack, *how), layout)

        out, back = jax.vjp(product, x, kernels)
        return out, *back(weights)

    got = graded(x, kernels)
    wide_x, matrices, dy = (np.asarray(a, np.float64) for a in (x, kernels, weights))
    out, dx, dw = np.zeros_like(dy), np.zeros_like(wide_x), np.zeros_like(matrices)
    for number in range(6):
        own = group == number
        out[own] = wide_x[own] @ matrices[1, number]
        dx[own] = dy[own] @ matrices[1, number].T
        dw[1, number] = wide_x[own].T @ dy[own]
    for ours, expected in zip(got, (out, dx, dw), strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float64) - expected)
        assert error < 4e-3 * np.linalg.norm(expected)  # bfloat16's own rounding: 1.7e-3
        assert np.isfinite(np.asarray(ours, np.float32)).all()
    for ours, again in zip(got, graded(x, kernels), strict=True):
        np.testing.assert_array_equal(ours, again)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_few_rows_in_16_bits_on_a_gpu() -> None:
    rng, groups = np.random.default_rng(0), jnp.asarray([5, 0, 5, 2, 1, 3, 4, 0], jnp.int32)
    x = jnp.asarray(rng.standard_normal((8, 768)), jnp.bfloat16)
    stacks = tuple(jnp.asarray(rng.standard_normal((2, 6, 768, 256)), jnp.bfloat16) for _ in "ab")
    got = jax.jit(chosen_products)(x, stacks, jnp.int32(1), groups)
    for ours, kernels in zip(got, stacks, strict=True):
        own = np.asarray(kernels[1, groups], np.float64)
        expected = np.einsum("ri,rio->ro", np.asarray(x, np.float64), own)
        error = np.linalg.norm(np.asarray(ours, np.float64) - expected)
        assert error < 4e-3 * np.linalg.norm(expected)


def test_the_product_is_chosen_by_device_and_shape() -> None:
    hopper = Device("gpu", "NVIDIA H200", (9, 0))
    assert choose(Device("tpu", "TPU v5p", None), jnp.bfloat16, (2048, 768)) == "ragged"
    assert choose(hopper, jnp.bfloat16, (2048, 768)) == "mosaic_gpu"
    assert choose(hopper, jnp.float32, (2048, 768)) == "blocks"
    assert choose(hopper, jnp.bfloat16, (2048, 96)) == "blocks"
    assert choose(Device("gpu", "NVIDIA A100", (8, 0)), jnp.bfloat16, (2048, 768)) == "blocks"


@pytest.mark.parametrize("matrix", [(2048, 768), (384, 640)])
def test_the_kernels_for_hopper_compile_as_far_as_their_own_compiler_goes(
    matrix: tuple[int, int],
) -> None:
    x, kernels = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((4096, matrix[0]), (48, 128, *matrix))
    )
    sizes, layer = jax.ShapeDtypeStruct((128,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)

    def loss(x: jax.Array, kernels: jax.Array, layer: jax.Array, sizes: jax.Array) -> jax.Array:
        return PRODUCTS["mosaic_gpu"](x, kernels, layer, sizes, 128).astype(jnp.float32).sum()

    text = lower(jax.value_and_grad(loss, argnums=(0, 1)), x, kernels, layer, sizes)
    assert text.count("grouped_product") >= 2
    assert text.count("grouped_outer") >= 1


CONFIG = replace(
    DIVISIBLE,
    qk_norm=True,
    model_type="qwen3_moe",
    mixture=MixtureConfig(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24),
)


def layer_of(dtype: Any = jnp.float32) -> Experts:
    """One layer's mixture, its weights large enough for experts to differ."""
    stacked = Experts(CONFIG, dtype=dtype, rngs=nnx.Rngs(0))
    return jax.tree.map(lambda w: 20 * w[0], stacked)


@pytest.mark.parametrize("norm", [True, False])
def test_gradients_are_those_of_a_dense_computation(norm: bool) -> None:
    """All experts for all tokens in float64, with the weights of those not chosen zero."""
    with jax.enable_x64(True):
        layer = layer_of(jnp.float64)
        layer.mixture = replace(layer.mixture, norm_topk_prob=norm)
        x = jax.random.normal(jax.random.key(1), (2, 30, 32), jnp.float64)

        def dense(layer: Experts, x: jax.Array) -> jax.Array:
            p = jax.nn.softmax(x @ layer.router.kernel[...], axis=-1)
            least = jnp.sort(p, axis=-1)[..., -3:-2]
            w = jnp.where(p >= least, p, 0)
            w = w / w.sum(axis=-1, keepdims=True) if norm else w
            gate = jnp.einsum("btd,edm->btem", x, layer.gate_proj.kernel[...])
            up = jnp.einsum("btd,edm->btem", x, layer.up_proj.kernel[...])
            inner = gate / (1 + jnp.exp(-gate)) * up
            each = jnp.einsum("btem,emd->bted", inner, layer.down_proj.kernel[...])
            return jnp.einsum("bted,bte->btd", each, w)

        ways = (lambda layer, x: layer(x)[0]), dense
        outs = [jax.jit(way)(layer, x) for way in ways]
        np.testing.assert_allclose(outs[0], outs[1], atol=1e-11)
        got, expected = (
            jax.jit(jax.grad(lambda e, x, w=way: jnp.sin(w(e, x)).sum(), argnums=(0, 1)))(layer, x)
            for way in ways
        )
        for ours, theirs in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            scale = float(jnp.abs(theirs).max())
            np.testing.assert_allclose(ours, theirs, atol=1e-10 * scale)


def test_tokens_in_another_order_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of()
    x = jax.random.normal(jax.random.key(1), (1, 41, 32))
    order = np.random.default_rng(0).permutation(41)

    def run(x: jax.Array) -> jax.Array:
        return jax.jit(lambda layer, x: layer(x)[0])(layer, x)

    y = run(x)
    np.testing.assert_allclose(run(x[:, order]), y[:, order], atol=1e-5)
    np.testing.assert_array_equal(run(x), y)  # the same twice
    monkeypatch.setattr(experts_module, "PIECE", 16)
    np.testing.assert_allclose(run(x), y, atol=1e-5)
    # As a GPU and a TPU do for few rows: only what is chosen is read.
    monkeypatch.setattr(experts_module, "are_few", lambda rows, groups: True)
    np.testing.assert_allclose(run(x[:, :2]), y[:, :2], atol=1e-5)


# --- on a mesh -----------------------------------------------------------------------------------

LENGTHS = np.array([37, 5, 1, 20, 36, 30, 2, 19], np.int32)
BATCH = np.random.default_rng(1).integers(0, 96, (8, 37)).astype(np.int32)
IS_TEXT = np.arange(37)[None, :] < LENGTHS[:, None]


@functools.cache
def graded_layer(mesh: str | None) -> Any:
    """The second of two layers: its output, and the gradients of its parameters and its input."""
    layer = jax.tree.map(lambda w: 20 * w, Experts(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (8, 12, 32))
    if mesh is not None:
        devices = make_mesh(mesh)
        place = parameter_shardings(CONFIG, devices)

        def put(path: Any, leaf: jax.Array) -> jax.Array:
            return jax.device_put(leaf, place(f"layers.experts.{path[0].name}.kernel"))

        layer = jax.tree_util.tree_map_with_path(put, layer)
        spec = PartitionSpec(("data", "fsdp"), "context")
        x = jax.device_put(x, NamedSharding(devices, spec))

    def loss(layer: Experts, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, routing = layer(x, jnp.int32(1))
        return jnp.sin(y).sum() + jnp.square(routing.probabilities).sum(), y

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(layer, x)


def test_a_layer_on_a_mesh_is_that_of_one_device() -> None:
    """Experts whole, rows cut by two axes; the model below cuts experts and texts, too."""
    mesh = "data=2,fsdp=4"
    for ours, theirs in zip(*map(jax.tree.leaves, map(graded_layer, (mesh, None))), strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)


@functools.cache
def params() -> dict[str, np.ndarray]:
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    leaves = flatten_dict(model.params(), sep=".")
    return {k: np.asarray(v) * np.float32(10 if v.ndim > 2 else 1) for k, v in leaves.items()}


def model_on(mesh: str | None) -> Llama:
    """Of plain attention, which takes a third of DCA's compiling."""
    place = None if mesh is None else parameter_shardings(CONFIG, make_mesh(mesh))
    leaves = {
        name: jnp.asarray(leaf) if place is None else jax.device_put(leaf, place(name))
        for name, leaf in params().items()
    }
    return Llama.from_params(CONFIG, unflatten_dict(leaves, sep="."), dtype=jnp.float32)


def loss_and_logits(model: Llama, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean NLL and the loss of uneven choices, and the logits: of one forward pass."""
    hidden, balance = model.balanced_hidden_states(tokens, jnp.asarray(LENGTHS))
    nll = model.nll(hidden, jnp.roll(tokens, -1, axis=1))
    counts = np.arange(tokens.shape[1])[None, :] < LENGTHS[:, None] - 1  # the last has no target
    mean = jnp.where(counts, nll, 0).sum() / np.float32(counts.sum())
    return mean + balance, model.unembed(hidden)


@functools.cache
def graded() -> Any:
    return jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))


@functools.cache
def expected() -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    (loss, logits), gradient = graded()(model_on(None), BATCH)
    return float(loss), np.asarray(logits), flatten_dict(gradient.params(), sep=".")


@pytest.mark.parametrize(
    "mesh", [None, pytest.param("fsdp=2,context=2,tensor=2", marks=pytest.mark.slow)]
)
def test_a_model_on_a_mesh_is_that_of_one_device_whatever_the_padding(mesh: str | None) -> None:
    loss, logits, gradient = expected()
    padded = np.where(IS_TEXT, BATCH, 7).astype(np.int32)
    (got_loss, got_logits), got = graded()(model_on(mesh), padded)
    np.testing.assert_allclose(float(got_loss), loss, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(got_logits)[IS_TEXT], logits[IS_TEXT], atol=1e-5)
    for name, leaf in flatten_dict(got.params(), sep=".").items():
        scale = np.abs(gradient[name]).max()
        np.testing.assert_allclose(leaf, gradient[name], atol=1e-5 * scale, err_msg=name)


@pytest.mark.slow
def test_generated_tokens_are_those_of_one_device() -> None:
    """Experts, heads and a cache's slots are all cut."""
    mesh = "fsdp=2,context=2,tensor=2"
    prompts = [BATCH[0, :30].tolist(), BATCH[1, :5].tolist()]
    texts = [generate(model_on(m), prompts, max_new_tokens=6) for m in (None, mesh)]
    assert texts[0] == texts[1]


def test_no_device_gathers_the_experts() -> None:
    """What moves while a text is read is smaller than one projection of one layer's experts."""
    wide = replace(CONFIG, mixture=replace(CONFIG.mixture, moe_intermediate_size=512))
    place = parameter_shardings(wide, make_mesh("fsdp=4,tensor=2"))
    shapes = jax.eval_shape(lambda: Llama(wide, rngs=nnx.Rngs(0)).params())
    leaves = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(name))
        for name, leaf in flatten_dict(shapes, sep=".").items()
    }
    model = Llama.from_params(wide, unflatten_dict(leaves, sep="."), dtype=jnp.float32)
    lowered = jax.jit(Llama.__call__).lower(
        model, jax.ShapeDtypeStruct((8, 16), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32)
    )
    moved = collective_sizes(lowered.compile().as_text())
    assert 0 < max(moved) < leaves["layers.experts.up_proj.kernel"].size // 2 // 8


def test_sizes_that_do_not_divide_name_those_that_would() -> None:
    with pytest.raises(InputError, match=r"tensor=8 does not divide .* 12 elements of an expert"):
        odd = replace(CONFIG, mixture=replace(CONFIG.mixture, moe_intermediate_size=12))
        check_mesh(odd, parse_mesh("tensor=8"))
    with pytest.raises(InputError, match=r"fsdp=16 does not divide the number of experts 8"):
        check_mesh(CONFIG, parse_mesh("fsdp=16"))
    assert describe(parse_mesh("fsdp=8")) == "fsdp=8"


# --- adapters ------------------------------------------------------------------------------------


def test_lora_adapts_attention_and_says_so_of_experts() -> None:
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    rows = lora_parameters(CONFIG, LoraConfig(rank=4, targets=attention))
    assert {row.path.split(".")[2] for row in rows} == set(attention)
    lora = LoraConfig(rank=4, targets=attention)
    tokens = jax.ShapeDtypeStruct((2, 9), jnp.int32)
    model = jax.eval_shape(lambda: Llama(CONFIG, lora=lora, rngs=nnx.Rngs(0)))
    assert jax.eval_shape(Llama.__call__, model, tokens).shape == (2, 9, 96)
    assert "lora_a" in model.params()["layers"]["self_attn"]["q_proj"]
    with pytest.raises(InputError, match="cannot adapt gate_proj, up_proj, down_proj of this"):
        lora_parameters(CONFIG, LoraConfig(rank=4))
