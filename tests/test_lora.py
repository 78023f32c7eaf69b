"""LoRA beside dense arithmetic: values, gradients, packed bases, meshes, and its files."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion_helpers import make_tiny, read_safetensors
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file
from shared_fixtures import invoke

from checkpoints_convert import hf_to_orbax, orbax_to_hf
from dca_jax.config import LORA_TARGETS, LlamaConfig, LoraConfig
from dca_jax.errors import InputError
from dca_jax.finetune.export import layers_on_host
from dca_jax.finetune.lora import init_lora, join, split
from dca_jax.inference.methods import with_method
from dca_jax.model import Llama
from dca_jax.products.packed import Packed
from dca_jax.sharding import make_mesh
from dca_jax.weights.adapters import load_adapter, merge_lora, save_adapter
from dca_jax.weights.files import PARAMS
from dca_jax.weights.folder import load_weights, open_weights
from dca_jax.weights.huggingface import read_config
from dca_jax.weights.orbax import StreamedArray, restore, save
from dca_jax.weights.packer import packer
from dca_jax.weights.parameters import (
    abstract_params,
    load_tree,
    lora_parameters,
    parameters,
    pieces,
    projections,
)
from dca_jax.weights.placement import parameter_shardings

# Grouped queries, every bias there is, and no two sizes alike.
CONFIG = LlamaConfig(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
)
LORA = LoraConfig(rank=3, alpha=5.0)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 19)).astype(np.int32)
Tree = dict[str, Any]


def flat(tree: Any) -> dict[str, Any]:
    return flatten_dict(tree, sep=".")


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    """A base with biases, and weights large enough for the logits to differ; attention is soft."""
    rng = np.random.default_rng(1)
    leaves = flat(abstract_params(CONFIG, dtype=jnp.float32))
    sizes = {"kernel": 0.15, "bias": 0.3, "scale": 1.0, "embedding": 1.0}
    return {
        name: (sizes[name.rpartition(".")[2]] * rng.standard_normal(leaf.shape)).astype(np.float32)
        for name, leaf in leaves.items()
    }


def base_params(mesh: str | None = None, dtype: Any = np.float32) -> Tree:
    """New arrays at each call: quantizing uses them up."""
    leaves = {name: leaf.astype(dtype) for name, leaf in arrays().items()}
    if mesh is None:
        return unflatten_dict({k: jnp.array(v) for k, v in leaves.items()}, sep=".")
    place = parameter_shardings(CONFIG, make_mesh(mesh))
    return unflatten_dict({k: jax.device_put(v, place(k)) for k, v in leaves.items()}, sep=".")


def trained(lora: LoraConfig = LORA, mesh: str | None = None) -> Tree:
    """Adapters as training may leave them: neither A nor B is zero."""
    rng = np.random.default_rng(2)
    place = None if mesh is None else parameter_shardings(CONFIG, make_mesh(mesh), lora=lora)
    leaves = {}
    for row in lora_parameters(CONFIG, lora):
        leaf = (0.2 * rng.standard_normal(row.shape(CONFIG))).astype(np.float32)
        leaves[row.path] = (
            jnp.array(leaf) if place is None else jax.device_put(leaf, place(row.path))
        )
    return unflatten_dict(leaves, sep=".")


def packed(base: Tree, form: str = "int8") -> Tree:
    leaves, then = flat(base), packer(projections(CONFIG), form)
    for row in parameters(CONFIG):
        if (change := then(row)) is not None:
            leaves[row.path] = change(leaves[row.path])
    return unflatten_dict(leaves, sep=".")


def merged(adapters: Tree, base: Tree, lora: LoraConfig = LORA) -> Tree:
    """As a run's model is made; on the devices of the base."""
    leaves = flat(base)
    on_host = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    read = merge_lora(lambda row, index: on_host[row.path][index], adapters, lora)
    like = {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in leaves.items()
    }
    return load_tree(CONFIG, like, read)


def model(params: Tree, **options: Any) -> Llama:
    """Of plain attention, which takes a third of DCA's compiling."""
    return Llama.from_params(CONFIG, params, **{"dtype": jnp.float32} | options)


logits = jax.jit(Llama.__call__)


def nll(model: Llama, tokens: jax.Array) -> jax.Array:
    hidden, _ = model.hidden_states(tokens)
    return model.nll(hidden, jnp.roll(tokens, -1, axis=1)).mean()


@functools.partial(jax.jit, static_argnames="lora")
def loss_and_gradients(adapters: Tree, base: Tree, lora: LoraConfig) -> tuple[jax.Array, Tree]:
    def loss(adapters: Tree) -> jax.Array:
        whole = model(join(adapters, base), lora=lora, remat="layer")
        return nll(whole, jnp.asarray(TOKENS))

    return jax.value_and_grad(loss)(adapters)


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    got, want = np.asarray(got), np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


# --- values and gradients ----------------------------------------------------------------------


def test_new_adapters_change_nothing() -> None:
    adapters = init_lora(CONFIG, LORA, jax.random.key(0))
    base = base_params()
    got = logits(model(join(adapters, base), lora=LORA), TOKENS)
    np.testing.assert_array_equal(got, logits(model(base), TOKENS))
    q_proj = adapters["layers"]["self_attn"]["q_proj"]
    assert q_proj["lora_a"].shape == (2, 24, 3)
    assert q_proj["lora_b"].shape == (2, 3, 4, 6)
    assert not q_proj["lora_b"].any()
    bound = 24**-0.5
    assert 0.9 * bound < jnp.abs(q_proj["lora_a"]).max() < bound
    o_proj = adapters["layers"]["self_attn"]["o_proj"]
    assert o_proj["lora_a"].shape == (2, 4, 6, 3)
    assert o_proj["lora_b"].shape == (2, 3, 24)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adapters))


@pytest.mark.parametrize("targets", [LORA_TARGETS, LORA_TARGETS[::2], LORA_TARGETS[1::2]])
def test_logits_are_those_of_the_merged_model(targets: tuple[str, ...]) -> None:
    lora = replace(LORA, targets=targets)
    adapters = trained(lora)
    got = logits(model(join(adapters, base_params()), lora=lora), TOKENS)
    want = logits(model(merged(adapters, base_params(), lora)), TOKENS)
    close(got, want)
    assert np.abs(want - logits(model(base_params()), TOKENS)).max() > 0.1


def by_hand(base: Tree, adapters: Tree) -> Tree:
    """W + alpha / r A B, with every axis of inputs and of outputs flattened."""
    leaves, low_rank = flat(base), flat(adapters)
    for row in projections(CONFIG):
        module = row.path.removesuffix("kernel")
        a, b = low_rank[f"{module}lora_a"], low_rank[f"{module}lora_b"]
        a, b = a.reshape(2, -1, LORA.rank), b.reshape(2, LORA.rank, -1)
        delta = jnp.matmul(a, b, precision="highest").reshape(leaves[row.path].shape)
        leaves[row.path] = leaves[row.path] + LORA.alpha / LORA.rank * delta
    return unflatten_dict(leaves, sep=".")


def test_gradients_are_those_through_dense_weights() -> None:
    adapters, base = trained(), base_params()
    loss, gradients = loss_and_gradients(adapters, base, LORA)

    @jax.jit
    @jax.value_and_grad
    def dense(adapters: Tree) -> jax.Array:
        return nll(model(by_hand(base, adapters)), jnp.asarray(TOKENS))

    want_loss, want = dense(adapters)
    close(loss, want_loss)
    for name, leaf in flat(gradients).items():
        assert np.abs(leaf).max() > 1e-5, name
        close(leaf, flat(want)[name])


def product_shapes(jaxpr: Any) -> list[tuple[int, ...]]:
    """Sorted shapes of what every matrix product gives, in loops too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found += [tuple(sorted(out.aval.shape)) for out in equation.outvars]
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            found += product_shapes(inner) if hasattr(inner, "eqns") else []
    return found


def test_a_frozen_kernel_takes_no_gradient_product() -> None:
    kernels = {tuple(sorted(row.shape(CONFIG)[1:])) for row in projections(CONFIG)}
    base = base_params()
    with_lora = jax.make_jaxpr(loss_and_gradients, static_argnums=2)(trained(), base, LORA)
    assert not kernels & set(product_shapes(with_lora.jaxpr))
    full = jax.make_jaxpr(jax.grad(lambda base: nll(model(base), jnp.asarray(TOKENS))))(base)
    assert kernels <= set(product_shapes(full.jaxpr))


def test_a_bfloat16_base_has_float32_adapters() -> None:
    base = base_params(dtype=jnp.bfloat16)
    adapters = trained()
    whole = model(join(adapters, base), lora=LORA, dtype=jnp.bfloat16)
    got = logits(whole, TOKENS)
    params = merged(adapters, base)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    close(got, logits(model(params, dtype=jnp.bfloat16), TOKENS), 0.05)


def test_another_method_keeps_the_adapters() -> None:
    params = join(trained(), packed(base_params()))
    whole = model(params, lora=LORA)
    plain = with_method(whole, "rope", 19)
    want = model(params, lora=LORA, dca=None)
    np.testing.assert_array_equal(logits(plain, TOKENS), logits(want, TOKENS))


# --- packed bases ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_packed_base_computes_with_what_it_stands_for(form: str) -> None:
    adapters, before = trained(), arrays()
    base = packed(base_params(), form)
    got = logits(model(join(adapters, base), lora=LORA), TOKENS)
    leaves = flat(base)
    kernels = {row.path for row in projections(CONFIG)}
    unpacked = jax.jit(lambda leaf: leaf.unpack(jnp.float32))
    for name, leaf in leaves.items():
        assert isinstance(leaf, Packed) == (name in kernels)
        if name in kernels:
            leaves[name] = unpacked(leaf)
        else:
            np.testing.assert_array_equal(leaf, before[name])
    close(got, logits(model(merged(adapters, unflatten_dict(leaves, sep="."))), TOKENS))
    near = logits(model(merged(adapters, base_params())), TOKENS)
    close(got, near, 0.05 if form == "int8" else 0.5)
    with pytest.raises(AssertionError):  # but it is no longer the same
        close(got, near, 1e-4)


def test_a_base_is_packed_while_it_is_read(tmp_path: Path) -> None:
    """No two layers of kernels are whole at once."""
    config = read_config(make_tiny(tmp_path / "hf", dtype=np.dtype(np.float32)))
    before = flat(load_weights(tmp_path / "hf", config, dtype=jnp.float32))
    kernels = {row.path for row in projections(config)}
    pack = packer(projections(config), "int8")
    held: list[jax.Array] = []

    def then(row: Any) -> Any:
        change = pack(row)
        assert (change is not None) == (row.path in kernels)

        def watched(leaf: jax.Array) -> Any:
            assert len(leaf) == 1
            assert all(kernel.is_deleted() for kernel in held)
            held.append(leaf)
            return change(leaf)

        return change and watched

    after = flat(load_weights(tmp_path / "hf", config, dtype=jnp.float32, then=then))
    assert len(held) == len(kernels) * config.num_hidden_layers
    for name, leaf in before.items():
        if name in kernels:
            error = np.abs(np.asarray(after[name].unpack(jnp.float32)) - np.asarray(leaf))
            assert error.max() <= np.asarray(after[name].scale).max() / 2 * (1 + 1e-4)
        else:
            np.testing.assert_array_equal(leaf, after[name])


# --- meshes ------------------------------------------------------------------------------------


@functools.cache
def on_one_device(form: str | None) -> tuple[float, dict[str, np.ndarray]]:
    base = base_params() if form is None else packed(base_params(), form)
    loss, gradients = loss_and_gradients(trained(), base, LORA)
    return float(loss), flat(jax.tree.map(np.asarray, gradients))


@pytest.mark.parametrize(
    ("mesh", "form"),
    [
        # More than kv heads.
        pytest.param("tensor=4", "int8", marks=pytest.mark.slow),
        pytest.param("fsdp=2,context=2,tensor=2", None, marks=pytest.mark.slow),
        pytest.param("fsdp=2,tensor=2", "int8", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_gives_what_one_device_does(mesh: str, form: str | None) -> None:
    base, adapters = base_params(mesh), trained(LORA, mesh)
    if form is not None:
        places = {row.path: flat(base)[row.path].sharding for row in projections(CONFIG)}
        base = packed(base, form)
        for name, place in places.items():
            assert sorted(map(str, flat(base)[name].values.sharding.spec)) == sorted(
                map(str, place.spec)
            )
    loss, gradients = loss_and_gradients(adapters, base, LORA)
    want_loss, want = on_one_device(form)
    close(loss, want_loss)
    for name, leaf in flat(gradients).items():
        close(leaf, want[name])
        assert leaf.sharding.is_equivalent_to(flat(adapters)[name].sharding, leaf.ndim), name


def test_adapters_are_cut_as_their_kernels_are(tmp_path: Path) -> None:
    mesh = "fsdp=2,tensor=2"
    place = parameter_shardings(CONFIG, make_mesh(mesh), lora=LORA)
    adapters = init_lora(CONFIG, LORA, jax.random.key(3), place)
    q_proj, o_proj = (adapters["layers"]["self_attn"][name] for name in ("q_proj", "o_proj"))
    assert q_proj["lora_a"].sharding.spec == PartitionSpec(None, "fsdp", None)
    assert q_proj["lora_b"].sharding.spec == PartitionSpec(None, None, "tensor", None)
    assert o_proj["lora_a"].sharding.spec == PartitionSpec(None, "tensor", None, None)
    assert o_proj["lora_b"].sharding.spec == PartitionSpec(None, None, "fsdp")
    for name, leaf in flat(init_lora(CONFIG, LORA, jax.random.key(3))).items():
        np.testing.assert_array_equal(leaf, flat(adapters)[name], err_msg=name)

    adapters, want = trained(LORA, mesh), flat(merged(trained(), base_params()))
    save_adapter(tmp_path / "adapter", adapters, CONFIG, LORA)
    for name, leaf in flat(merged(adapters, base_params(mesh))).items():
        close(leaf, want[name], 1e-6)
        assert leaf.sharding.is_equivalent_to(place(name), leaf.ndim), name
    _, again = load_adapter(tmp_path / "adapter", CONFIG, sharding=place)
    for name, leaf in flat(again).items():
        np.testing.assert_array_equal(leaf, flat(trained())[name])
        assert leaf.sharding == place(name)


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
def test_pieces_of_arrays_on_a_mesh(mesh: str | None) -> None:
    read, count = layers_on_host(base_params(mesh)), 0
    for row in parameters(CONFIG):
        for index in pieces(row, CONFIG):
            np.testing.assert_array_equal(read(row, index), arrays()[row.path][index])
            count += 1
    assert count > len(parameters(CONFIG))


def test_split_and_join_are_inverse() -> None:
    lora = replace(LORA, targets=("k_proj",))
    whole = jax.eval_shape(lambda: Llama(CONFIG, lora=lora, rngs=nnx.Rngs(0)).params())
    adapters, base = split(whole)
    assert set(flat(adapters)) == {f"layers.self_attn.k_proj.lora_{x}" for x in "ab"}
    assert flat(base).keys() == arrays().keys()
    assert flat(join(adapters, base)).keys() == flat(whole).keys()
    assert join(adapters, base)["norm"]["scale"] is whole["norm"]["scale"]


def test_orbax_keeps_adapters(tmp_path: Path) -> None:
    adapters = trained()
    save(tmp_path / "adapters", adapters)
    place = parameter_shardings(CONFIG, make_mesh("tensor=2"), lora=LORA)
    rows = lora_parameters(CONFIG, LORA)
    like = {row.path: row.abstract(CONFIG, jnp.float32, place) for row in rows}
    again = flat(restore(tmp_path / "adapters", unflatten_dict(like, sep=".")))
    assert again.keys() == flat(adapters).keys()
    for name, leaf in again.items():
        np.testing.assert_array_equal(leaf, flat(adapters)[name])
        assert leaf.sharding == place(name)


@functools.cache
def _torch() -> Any:
    return pytest.importorskip("torch"), pytest.importorskip("transformers")


def torch_logits(theirs: Any, tokens: np.ndarray) -> np.ndarray:
    torch, _ = _torch()
    with torch.no_grad():
        return theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def tiny_adapters(folder: Path, lora: LoraConfig) -> tuple[LlamaConfig, Tree]:
    config = read_config(make_tiny(folder, dtype=np.dtype(np.float32), attention_bias=True))
    rng = np.random.default_rng(4)
    leaves = {
        row.path: jnp.array(0.5 * rng.standard_normal(row.shape(config)), jnp.float32)
        for row in lora_parameters(config, lora)
    }
    return config, unflatten_dict(leaves, sep=".")


def test_a_merged_model_goes_back_to_hugging_face(tmp_path: Path) -> None:
    _, transformers = _torch()
    config, adapters = tiny_adapters(tmp_path / "hf", LORA)
    base = load_weights(tmp_path / "hf", config, dtype=jnp.float32)
    tokens = np.arange(20, dtype=np.int32)[None] % config.vocab_size
    options: dict[str, Any] = {"lora": LORA, "dtype": jnp.float32}
    ours = logits(Llama.from_params(config, join(adapters, base), **options), tokens)

    converted = tmp_path / "converted"
    converted.mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", converted)
    dtype = np.dtype(np.float32)
    read = merge_lora(open_weights(tmp_path / "hf", config, dtype=dtype)[1], adapters, LORA)
    rows = parameters(config)
    leaves = {row.path: StreamedArray.of(row, config, read, dtype) for row in rows}
    save(converted / PARAMS, unflatten_dict(leaves, sep="."))
    again = Llama.from_params(config, load_weights(converted, config), dtype=jnp.float32)
    close(logits(again, tokens), ours)
    orbax_to_hf.convert(converted, tmp_path / "back")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    close(torch_logits(theirs, tokens), ours)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
def test_peft_opens_ours_and_we_open_pefts(tmp_path: Path) -> None:
    """Whatever PEFT's config may say of an adapter that is plain LoRA; and merged on disk, too."""
    torch, transformers = _torch()
    peft = pytest.importorskip("peft")
    root_scaled = replace(LORA, rslora=True)
    config, adapters = tiny_adapters(tmp_path / "hf", LORA)
    save_adapter(tmp_path / "ours", adapters, config, LORA)
    save_adapter(tmp_path / "ours with rslora", adapters, config, root_scaled)

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")

    for name, options in {
        "theirs": {"target_modules": ["v_proj", "gate_proj", "o_proj"]},
        "rslora": {"target_modules": ["mlp.up_proj", "q_proj"], "use_rslora": True},
        "pattern": {"target_modules": r".*\.(k|down)_proj"},
        "all but one": {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    }.items():
        asked = peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **options)
        torch.manual_seed(0)
        peft.get_peft_model(base(), asked).save_pretrained(tmp_path / name)
    tokens = np.arange(20, dtype=np.int32)[None] % config.vocab_size
    plain = torch_logits(base().eval(), tokens)
    names = ("ours", "ours with rslora", "theirs", "rslora", "pattern", "all but one")
    found = {}
    for name in names:
        folder = tmp_path / name
        # In float64: float32 alone moves theirs by up to 2e-5 of the largest, and ours by 7e-6.
        theirs = peft.PeftModel.from_pretrained(base(), folder).eval().double()
        found[name] = torch_logits(theirs, tokens)
        merged = load_weights(tmp_path / "hf", config, dtype=jnp.float32, adapter=folder)
        ours = logits(Llama.from_params(config, merged, dtype=jnp.float32), tokens)
        close(ours, found[name])
        assert np.abs(found[name] - plain).max() > 1e-2
    # Converted: merged on the way there, or on the way back.
    done = invoke("convert", tmp_path / "hf", tmp_path / "m", "--adapter", tmp_path / "rslora")
    assert done.exit_code == 0, done.stderr
    files = json.loads((tmp_path / "m/provenance.json").read_text())["adapter"]["files"]
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    orbax_to_hf.convert(tmp_path / "m", tmp_path / "merged there")
    hf_to_orbax.convert(tmp_path / "hf", tmp_path / "orbax")
    adapter = tmp_path / "rslora"
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "merged back", adapter=adapter)
    for folder in (tmp_path / "merged there", tmp_path / "merged back"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        close(torch_logits(theirs, tokens), found["rslora"])
    with pytest.raises(InputError, match="is not a folder; expected one with adapter_config"):
        load_weights(tmp_path / "hf", config, adapter=tmp_path / "nowhere")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"layers_to_transform": [1]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_variants_of_peft_are_refused_by_name(tmp_path: Path, options: Tree) -> None:
    _, transformers = _torch()
    peft = pytest.importorskip("peft")
    config = read_config(make_tiny(tmp_path / "hf", dtype=np.dtype(np.float32)))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    asked = peft.LoraConfig(r=2, target_modules=["q_proj"], **options)
    peft.get_peft_model(base, asked).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=f"sets {next(iter(options))} .*merge_and_unload"):
        load_adapter(tmp_path / "adapter", config)


def test_an_adapter_means_to_peft_what_it_means_here(tmp_path: Path) -> None:
    """W + alpha / r B A of each tensor by its name, by hand, in transformers' model."""
    torch, transformers = _torch()
    lora = replace(LORA, targets=("q_proj", "o_proj", "down_proj"))
    config, adapters = tiny_adapters(tmp_path / "hf", lora)
    save_adapter(tmp_path / "adapter", adapters, config, lora, base_model="some/base")
    setting = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert setting["r"] == 3
    assert setting["lora_alpha"] == 5.0
    assert setting["target_modules"] == ["q_proj", "o_proj", "down_proj"]
    assert setting["base_model_name_or_path"] == "some/base"

    tensors = read_safetensors(tmp_path / "adapter")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    assert tensors[f"{prefix}.lora_A.weight"].shape == (3, 12)
    assert tensors[f"{prefix}.lora_B.weight"].shape == (24, 3)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    weights = theirs.state_dict()
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix("lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            weights[f"{module}weight"] += torch.tensor(5.0 / 3 * (b @ a))
    base = load_weights(tmp_path / "hf", config, dtype=jnp.float32)
    tokens = np.arange(20, dtype=np.int32)[None] % config.vocab_size
    whole = Llama.from_params(config, join(adapters, base), lora=lora, dtype=jnp.float32)
    close(torch_logits(theirs, tokens), logits(whole, tokens))

    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(setting | {"target_modules": setting["target_modules"][::-1]}))
    found, again = load_adapter(tmp_path / "adapter", config)
    assert found == lora  # in whatever order its targets are written
    for name, leaf in flat(again).items():
        np.testing.assert_array_equal(leaf, flat(adapters)[name])
    with pytest.raises(InputError, match="exists already"):
        save_adapter(tmp_path / "adapter", adapters, config, lora)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", trained(), CONFIG, LORA)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "of peft_type 'LOHA'; expected 'LORA'"),
        ({"bias": "all"}, "sets bias 'all', which is not supported; merge"),
        ({"no_such_thing": {"x": 1}}, "sets no_such_thing {'x': 1}, which is not supported"),
        ({"target_modules": {"q_proj": 1}}, "target_modules {'q_proj': 1}; expected a list"),
        ({"target_modules": ["q_proj", "lm_head"]}, "LoRA targets .* got q_proj, lm_head"),
        ({"target_modules": ["q_proj"]}, "24 have no place in it"),
        ({"r": 4}, r"has shape \(3, 24\); config.json asks for \(4, 24\)"),
        ({"r": "three"}, "r 'three' and lora_alpha 5; expected numbers"),
    ],
)
def test_adapters_that_are_refused(adapter: Path, changes: Tree, message: str) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        load_adapter(adapter, CONFIG)


def test_an_adapter_that_is_not_finite_or_not_there(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, file)
    with pytest.raises(InputError, match="holds nan"):
        load_adapter(adapter, CONFIG)
    file.unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(adapter, CONFIG)
    with pytest.raises(InputError, match="is not a folder"):
        load_adapter(adapter / "elsewhere", CONFIG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "LoRA rank must be a positive integer, got 0"),
        ({"alpha": float("nan")}, "LoRA alpha must be positive, got nan"),
        (
            {"targets": ("q_proj", "lm_head")},
            "one or more of q_proj, .*; got q_proj, lm_head",
        ),
        ({"targets": ("q_proj", "q_proj")}, "each once; got q_proj, q_proj"),
        ({"targets": ()}, "got none"),
    ],
)
def test_settings_that_are_refused(options: Tree, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoraConfig(**options)


def test_a_model_without_the_setting_refuses_adapters() -> None:
    with pytest.raises(InputError, match=r"unexpected parameters: .*q_proj\.lora_b"):
        model(join(trained(), base_params()))
