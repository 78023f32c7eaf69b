"""Packed matrices: beside NumPy's arithmetic, in models, on meshes, through files and commands."""

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lowering
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec
from shared_fixtures import invoke

import dca_jax
from dca_jax.config import LlamaConfig, MixtureConfig
from dca_jax.errors import InputError
from dca_jax.kv_cache import KVCache
from dca_jax.model import Llama
from dca_jax.products import few_rows, packed_row
from dca_jax.products.packed import FORMS, Packed, block_sizes, pack, packed_forms
from dca_jax.sharding import make_mesh
from dca_jax.weights import layouts
from dca_jax.weights.packer import matrices, packer
from dca_jax.weights.parameters import Parameter, abstract_params, parameters
from dca_jax.weights.placement import parameter_shardings

DENSE = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=64,
)
# Experts, and one table for both ends.
SPARSE = replace(
    DENSE,
    model_type="qwen3_moe",
    qk_norm=True,
    tie_word_embeddings=True,
    mixture=MixtureConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128),
)
TOKENS = np.random.default_rng(0).integers(0, DENSE.vocab_size, (4, 12)).astype(np.int32)
Tree = dict[str, Any]


def by_hand(packed: Packed, row: Parameter) -> np.ndarray:
    """The array that a packed parameter stands for, float64."""
    values, lead, inputs = np.asarray(packed.values), packed.lead, packed.num_inputs
    scale, zero = (  # outputs before inputs, as the values have them
        part if part is None else np.moveaxis(part, range(lead, lead + inputs), range(-inputs, 0))
        for part in (packed.scale, packed.zero)
    )
    if values.dtype == np.uint8:  # the halves of each group side by side
        groups = values.reshape(*values.shape[:-1], np.asarray(scale).shape[-1], -1)
        groups = np.concatenate([groups % 16, groups // 16], axis=-1)
        values = groups.reshape(*values.shape[:-1], -1)

    def spread(part: Any) -> np.ndarray:
        part = np.asarray(part).astype(np.float64)
        for axis, size in enumerate(values.shape):
            part = part.take([n * part.shape[axis] // size for n in range(size)], axis)
        return part

    found = values.astype(np.float64) - (0 if zero is None else spread(zero))
    found *= spread(scale)
    # Outputs stand before inputs: Hugging Face's order, with the heads apart.
    letters = [axis for group in row.groups for axis in group]
    lead = row.leading
    return found.transpose([*range(lead), *(lead + letters.index(axis) for axis in row.axes)])


@functools.cache
def arrays(config: LlamaConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    leaves = flatten_dict(abstract_params(config, dtype=jnp.float32), sep=".")
    return {
        name: (rng.standard_normal(leaf.shape) * (0.1 if len(leaf.shape) > 2 else 1.0)).astype(
            np.float32
        )
        for name, leaf in leaves.items()
    }


def packed_params(config: LlamaConfig, form: str, mesh: str | None = None) -> Tree:
    place = None if mesh is None else parameter_shardings(config, make_mesh(mesh))
    then, leaves = packer(matrices(config), form), {}
    for row in parameters(config):
        leaf = arrays(config)[row.path]
        array = jnp.array(leaf) if place is None else jax.device_put(leaf, place(row.path))
        change = then(row)
        leaves[row.path] = array if change is None else change(array)
        assert array.is_deleted() == (row in matrices(config))
    return unflatten_dict(leaves, sep=".")


@functools.cache
def unpacked_model(config: LlamaConfig, form: str) -> Llama:
    """A model of plain arrays, which NumPy unpacked."""
    leaves = flatten_dict(packed_params(config, form), sep=".")
    for row in matrices(config):
        leaves[row.path] = jnp.array(by_hand(leaves[row.path], row), jnp.float32)
    return model(unflatten_dict(leaves, sep="."), config)


def model(params: Tree, config: LlamaConfig) -> Llama:
    """Of plain attention, which takes a third of DCA's compiling."""
    return Llama.from_params(config, params, dtype=jnp.float32)


@jax.jit
def all_logits(model: Llama, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, ...]:
    """Of whole texts; of their beginnings into a cache, and of one token that follows."""
    whole = model(tokens)
    hidden, cache = model.hidden_states(tokens[:, :-1], cache=cache)
    last, _ = model.hidden_states(tokens[:, -1:], cache=cache)
    return whole, model.unembed(hidden), model.unembed(last[:, 0])


def logits(model: Llama, config: LlamaConfig, mesh: str | None = None) -> list[np.ndarray]:
    devices = None if mesh is None else make_mesh(mesh)
    cache = KVCache.create(config, batch=4, capacity=16, dtype=jnp.float32, mesh=devices)
    return [np.asarray(x) for x in all_logits(model, TOKENS, cache)]


def close(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


# --- one matrix ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_inputs", [1, 2])
def test_packing_is_off_by_no_more_than_it_says(form: str, num_inputs: int) -> None:
    matrix = np.random.default_rng(2).standard_normal((32, 8, 192)).astype(np.float32)
    matrix[0, 0] = 0
    packed = jax.jit(pack, static_argnums=(1, 2))(matrix, form, num_inputs)
    assert packed.shape == matrix.shape
    got = np.asarray(jax.jit(Packed.unpack, static_argnums=1)(packed, "float32"))
    scale = np.asarray(packed.scale).astype(np.float32)
    scale = np.moveaxis(scale, range(num_inputs), range(-num_inputs, 0))
    for axis, (count, size) in enumerate(zip(scale.shape, matrix.shape, strict=True)):
        scale = scale.repeat(size // count, axis=axis)
    error = np.abs(got - matrix)
    if form == "fp8":
        assert (error <= np.maximum(np.abs(matrix) / 16, scale * 2**-10)).all()
    elif form == "int8":
        assert (error <= scale * 0.5001).all()
    else:
        assert (error <= scale).all()
        assert (error <= scale * 0.5001).mean() > 0.97
    assert (error[1:] > scale[1:] / 4).mean() > 0.1  # it is packed


def test_a_size_that_does_not_divide_has_smaller_groups() -> None:
    assert block_sizes("int4:128", (5, 192), 1) == (1, 64)
    assert block_sizes("fp8", (3, 96, 128), 1) == (1, 32, 128)
    with pytest.raises(InputError, match=r"must divide the 7 on a device; choose int8"):
        block_sizes("int4", (6, 7), 1)


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "form"),
    [
        (DENSE, "int8"),
        pytest.param(SPARSE, "int4:32", marks=pytest.mark.slow),
        pytest.param(DENSE, "fp8", marks=pytest.mark.slow),
    ],
)
def test_a_model_computes_with_what_its_weights_stand_for(config: LlamaConfig, form: str) -> None:
    packed = model(packed_params(config, form), config)
    close(logits(packed, config), logits(unpacked_model(config, form), config))


@pytest.fixture
def interpreted_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(few_rows, "INTERPRET", True)
    all_logits.clear_cache()
    yield
    all_logits.clear_cache()


@pytest.mark.parametrize(
    ("config", "form", "count"),
    [
        (DENSE, "int4", 5),  # q, k, v; o; gate, up; down; the unembedding
        pytest.param(SPARSE, "int8", 3, marks=pytest.mark.slow),
        pytest.param(DENSE, "fp8", 5, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("interpreted_kernel")
def test_the_kernel_for_few_rows(config: LlamaConfig, form: str, count: int) -> None:
    packed = model(packed_params(config, form), config)
    cache = KVCache.create(config, batch=4, capacity=16, dtype=jnp.float32)
    assert str(jax.make_jaxpr(all_logits)(packed, TOKENS, cache)).count("pallas_call[") == count
    close(logits(packed, config), logits(unpacked_model(config, form), config))


@pytest.mark.parametrize(
    ("mesh", "form", "config"),
    [
        ("tensor=4", "int8", DENSE),  # more than kv heads
        pytest.param("fsdp=2,tensor=2", "int4:32", SPARSE, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_gives_what_one_device_does(mesh: str, form: str, config: LlamaConfig) -> None:
    params = packed_params(config, form, mesh)
    place = parameter_shardings(config, make_mesh(mesh))
    for row in matrices(config):
        packed = flatten_dict(params, sep=".")[row.path]
        spec = place(row.path).spec
        turned = [*range(row.leading), *(row.leading + axis for axis in row.inner_order)]
        assert packed.values.sharding.spec == PartitionSpec(*(spec[axis] for axis in turned))
    close(logits(model(params, config), config, mesh), logits(unpacked_model(config, form), config))


# --- one row on Hopper --------------------------------------------------------------------------


def random_stack(form: str, inputs: int, outputs: int) -> Packed:
    """Two matrices, of which the second is to be multiplied by."""
    matrices = np.random.default_rng(outputs).standard_normal((2, outputs, inputs))
    packed = [pack(jnp.asarray(m, jnp.float32), form, 1, order=(1, 0)) for m in matrices]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *packed)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["int8", "int4:32", "int4", "int4:128"])
def test_one_row_on_a_gpu(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two stacks in one launch, and split inputs, against float64."""
    monkeypatch.setattr(packed_row, "INT4_WEIGHTS", 0)
    monkeypatch.setattr(packed_row, "INT8_OUTPUTS", 0)
    monkeypatch.setattr(packed_row, "BUSY", 0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4096)), jnp.bfloat16)
    stacks = [random_stack(form, 4096, outputs) for outputs in (512, 256)]
    if jax.devices()[0].device_kind.split()[-1] in ("H100", "H200"):
        assert packed_row.choose_plan(x, stacks) is not None
    got = jax.jit(few_rows.multiply)(x, stacks, jnp.int32(1))
    for ours, stack in zip(got, stacks, strict=True):
        matrix = np.asarray(stack[1].unpack_inner(jnp.float32), np.float64)
        want = np.asarray(x, np.float64) @ matrix.T
        np.testing.assert_allclose(ours, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("form", ["int8", "int4:32", "int4:128"])
def test_one_row_by_large_matrices_has_its_kernel(form: str) -> None:
    """Compiled for an H200 as far as the kernel's own compiler goes; on no other GPU."""
    whole = functools.partial(pack, form=form, num_inputs=1, order=(1, 0))
    ones = [jax.eval_shape(whole, jax.ShapeDtypeStruct((n, 4096), "float32")) for n in (2**14, 512)]
    stacks = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), ones)
    shapes = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16), stacks
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    assert "dca_packed_row" in lowering.lower(few_rows.multiply, *shapes, layer)
    with lowering.device("NVIDIA A100"):
        assert packed_row.choose_plan(*shapes) is None
    with lowering.device("NVIDIA H200"):
        assert packed_row.choose_plan(*shapes) is not None
        assert packed_row.choose_plan(jax.ShapeDtypeStruct((2, 4096), jnp.bfloat16), stacks) is None


# --- what a user does ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_is_packed_while_it_is_read(folder: Path) -> None:
    """Through Python and the command line, read by another method too; what it is called."""
    plain, packed = (dca_jax.load(folder, dca=None, weights=form) for form in (None, "int8"))
    assert packed_forms(plain.model) == ""
    assert packed_forms(packed.model) == "int8"
    config = plain.model.config
    leaves = flatten_dict(packed.model.params(), sep=".")
    for row in matrices(config):
        leaves[row.path] = jnp.array(by_hand(leaves[row.path], row), jnp.float32)
    params = unflatten_dict(leaves, sep=".")
    same = replace(plain, model=Llama.from_params(config, params, dca=None, dtype=jnp.float32))
    want = same.generate("Call me", max_new_tokens=6)[0].text
    assert packed.generate("Call me", max_new_tokens=6)[0].text == want
    options = ["--weights", "int8", "--max-new-tokens", 6, "--method", "rope", "--json"]
    result = invoke("generate", folder, "Call me", *options)
    assert json.loads(result.stdout)["text"] == want


@pytest.mark.parametrize("mesh", [None, pytest.param("fsdp=2,tensor=2", marks=pytest.mark.slow)])
def test_int4_kernels_lie_in_memory_as_a_tpu_reads_them(
    folder: Path, mesh: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On devices said to be TPUs: the last axis of outputs innermost, and the same weights."""
    plain = dca_jax.load(folder, dca=None, weights="int4:32", mesh=mesh)
    monkeypatch.setattr(layouts, "platform", lambda matrix: "tpu")
    moved = dca_jax.load(folder, dca=None, weights="int4:32", mesh=mesh)
    want, got = (flatten_dict(llm.model.params(), sep=".") for llm in (plain, moved))
    for row in matrices(plain.model.config):
        values = got[row.path].values
        np.testing.assert_array_equal(values, want[row.path].values)
        order = values.format.layout.major_to_minor
        outputs = values.ndim - len(row.groups[1])
        assert order[-1] == (outputs if row.path.endswith(".kernel") else values.ndim) - 1
        assert want[row.path].values.format.layout.major_to_minor == tuple(range(values.ndim))
    text = plain.generate("Call me", max_new_tokens=4)[0].text
    assert moved.generate("Call me", max_new_tokens=4)[0].text == text


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"weights must be one of int8, int4, .*, got 'int3'"):
        dca_jax.load(folder, weights="int3")
    assert invoke("generate", folder, "x", "--weights", "int3").exit_code == 2
    arguments = ["llama-2-7b", "--device", "h200", "--context-length", "1k", "--train"]
    result = invoke("plan", *arguments, "--weights", "int8")
    assert result.exit_code == 2
    assert "weights that are trained are not packed in int8" in " ".join(result.stderr.split())
    result = invoke("plan", *arguments, "--lora-rank", 4, "--weights", "int8")
    assert "give --base with --lora-rank" in result.stderr
