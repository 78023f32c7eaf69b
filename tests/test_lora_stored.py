"""LoRA over matrices that stay packed as a checkpoint has them, beside dense arithmetic."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion_helpers import make_tiny
from flax.traverse_util import flatten_dict, unflatten_dict
from shared_fixtures import invoke
from test_finetune_run import settings
from test_quantized import write
from tiny_gguf import byte_level, wide_config, write_gguf
from tiny_llm import byte_level_tokenizer

from checkpoints_convert import hf_to_orbax, orbax_to_hf
from dca_jax.config import LlamaConfig, LoraConfig
from dca_jax.errors import InputError
from dca_jax.finetune.lora import join
from dca_jax.finetune.run import finetune
from dca_jax.model import Llama
from dca_jax.products.packed import is_packed, packed_forms
from dca_jax.sharding import make_mesh
from dca_jax.weights.adapters import load_adapter
from dca_jax.weights.folder import load_weights
from dca_jax.weights.huggingface import read_config
from dca_jax.weights.parameters import lora_parameters, parameters, projections
from dca_jax.weights.placement import parameter_shardings

LORA = LoraConfig(rank=3, alpha=5.0)
Tree = dict[str, Any]


def flat(tree: Any) -> dict[str, Any]:
    return flatten_dict(tree, sep=".")


def adapters_of(config: LlamaConfig, where: Any = None) -> Tree:
    """As training may leave them: neither A nor B is zero."""
    rng, leaves = np.random.default_rng(2), {}
    for row in lora_parameters(config, LORA):
        leaf = (0.1 * rng.standard_normal(row.shape(config))).astype(np.float32)
        leaves[row.path] = jax.device_put(leaf, None if where is None else where(row.path))
    return unflatten_dict(leaves, sep=".")


def nll(params: Tree, config: LlamaConfig, lora: LoraConfig | None) -> jax.Array:
    """Of plain attention, which takes a third of DCA's compiling."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 19)).astype(np.int32)
    model = Llama.from_params(config, params, lora=lora, dtype=jnp.float32, remat="layer")
    hidden, _ = model.hidden_states(jnp.asarray(tokens))
    return model.nll(hidden, jnp.asarray(np.roll(tokens, -1, axis=1)), model.unembedding()).mean()


@functools.partial(jax.jit, static_argnames="config")
@jax.value_and_grad
def kept(adapters: Tree, base: Tree, config: LlamaConfig) -> jax.Array:
    return nll(join(adapters, base), config, LORA)


@functools.partial(jax.jit, static_argnames="config")
@jax.value_and_grad
def dense(adapters: Tree, base: Tree, config: LlamaConfig) -> jax.Array:
    """W + alpha / r A B, with every axis of inputs and of outputs flattened."""
    leaves, low_rank = flat(base), flat(adapters)
    for row in projections(config):
        module, layers = row.path.removesuffix("kernel"), config.num_hidden_layers
        a = low_rank[f"{module}lora_a"].reshape(layers, -1, LORA.rank)
        b = low_rank[f"{module}lora_b"].reshape(layers, LORA.rank, -1)
        delta = LORA.alpha / LORA.rank * jnp.matmul(a, b, precision="highest")
        leaves[row.path] = leaves[row.path] + delta.reshape(leaves[row.path].shape)
    return nll(unflatten_dict(leaves, sep="."), config, None)


def by_tests(folder: Path, name: str) -> tuple[Path, LlamaConfig, Tree]:
    """A checkpoint of Hugging Face's, and its weights as the test computes them."""
    expected = write(folder, name)
    config, leaves = read_config(folder), {}
    for row in parameters(config):
        theirs = [row.to_ours(expected[n], row.sizes(config)) for n in row.their_names(config)]
        leaves[row.path] = jnp.asarray(np.stack(theirs) if row.stacked else theirs[0])
    return folder, config, unflatten_dict(leaves, sep=".")


def by_library(folder: Path, name: str) -> tuple[Path, LlamaConfig, Tree]:
    """A GGUF file, and its weights as `gguf` unpacks them."""
    path = write_gguf(folder / "m.gguf", wide_config(), [name])
    config = read_config(path)
    return path, config, load_weights(path, config, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("make", "name", "mesh"),
    [
        pytest.param(by_tests, "awq", None, marks=pytest.mark.slow),
        pytest.param(by_tests, "awq", "fsdp=2,tensor=2", marks=pytest.mark.slow),
        (by_library, "Q4_K", None),
        pytest.param(by_tests, "gptq", None, marks=pytest.mark.slow),
        pytest.param(by_tests, "fp8-ragged", None, marks=pytest.mark.slow),
        pytest.param(by_tests, "w8a8", None, marks=pytest.mark.slow),
    ],
)
def test_value_and_gradients(tmp_path: Path, make: Callable, name: str, mesh: str | None) -> None:
    """Those of adapters over the dequantized base in float32; from a converted folder the same."""
    path, config, whole = make(tmp_path / "hf", name) if make is by_tests else make(tmp_path, name)
    where = None if mesh is None else parameter_shardings(config, make_mesh(mesh), lora=LORA)
    hf_to_orbax.convert(path, tmp_path / "orbax")
    # Some of these random weights are so large that merging alone, of dense matrices too, moves
    # float32's gradients: by 3e-4 for GGUF's, 1e-4 for w8a8's, 1e-6 for the others'.
    computed = kept if make is by_library or name == "w8a8" else dense
    want_loss, want = computed(adapters_of(config), whole, config)
    options: Tree = {"dtype": jnp.float32, "sharding": where, "keep": "stored"}
    base = load_weights(tmp_path / "orbax", config, **options)
    assert packed_forms(base) != ""
    # Tables too, where the file has them packed.
    assert is_packed(base["embed_tokens"]["embedding"]) == (make is by_library)
    loss, gradients = kept(adapters_of(config, where), base, config)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    for leaf_name, leaf in flat(gradients).items():
        other = np.asarray(flat(want)[leaf_name])
        assert np.abs(other).max() > 1e-6, leaf_name
        assert np.linalg.norm(leaf - other) < 1e-5 * np.linalg.norm(other), leaf_name


@pytest.mark.slow
def test_a_run_over_a_gguf_file(tmp_path: Path) -> None:
    """It leaves an adapter of PEFT's, and the model that it makes of the unpacked weights."""
    tokenizer = byte_level(byte_level_tokenizer(), "gpt-2")
    source = write_gguf(tmp_path / "m.gguf", wide_config(), ["Q4_0"], tokenizer=tokenizer)
    data = tmp_path / "d.json"
    turns = [{"from": "human", "value": "Call me"}, {"from": "gpt", "value": "Ishmael. " * 3}]
    data.write_text(json.dumps([{"conversations": turns}] * 4))
    changes: Tree = {"lora_rank": 4, "base": "stored", "steps": 2, "eval_data": ()}
    changes |= {"template": "llama-2"}
    run = settings(source, data, tmp_path / "run", **changes, accumulate=1, export="hf")
    finetune(run)
    config = read_config(source)
    lora, adapters = load_adapter(tmp_path / "run/adapter", config)
    assert any(np.abs(leaf).max() > 0 for name, leaf in flat(adapters).items() if "_b" in name)
    # Merged by PEFT's rule into what is unpacked, by another road.
    hf_to_orbax.convert(source, tmp_path / "orbax", adapter=tmp_path / "run/adapter")
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "hf")
    before = flat(load_weights(source, config, dtype=jnp.float32))
    for folder in ("run/model", "hf"):
        found = flat(load_weights(tmp_path / folder, config, dtype=jnp.float32))
        for row in projections(config):
            module, layers = row.path.removesuffix("kernel"), config.num_hidden_layers
            a, b = (np.asarray(flat(adapters)[f"{module}lora_{x}"], np.float64) for x in "ab")
            delta = a.reshape(layers, -1, lora.rank) @ b.reshape(layers, lora.rank, -1)
            leaf = np.asarray(before[row.path], np.float64)
            leaf = leaf + lora.alpha / lora.rank * delta.reshape(leaf.shape)
            np.testing.assert_allclose(found[row.path], leaf, rtol=0, atol=1e-6)


def test_what_is_planned_and_refused(tmp_path: Path) -> None:
    write(tmp_path / "awq", "awq")
    make_tiny(tmp_path / "plain")
    shape = ["--device", "h200", "--context-length", "64", "--train", "--lora-rank", "2"]

    def weights(*more: str) -> int:
        done = invoke("plan", tmp_path / "awq", *shape, "--json", *more)
        return json.loads(done.stdout)["bytes"]["weights"]

    config = read_config(tmp_path / "awq")
    base = load_weights(tmp_path / "awq", config, dtype=jnp.bfloat16, keep="stored")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    rows = lora_parameters(config, LoraConfig(rank=2))
    adapters = sum(4 * int(np.prod(row.shape(config))) for row in rows)
    assert weights("--base", "stored") == held + adapters < weights()
    told = invoke("plan", tmp_path / "awq", *shape, "--base", "stored").stdout
    assert "over int4:16, int4:32 weights" in " ".join(told.replace("│", "").split())
    for model in (tmp_path / "plain", "llama-2-7b"):
        done = invoke("plan", model, *shape, "--base", "stored")
        assert done.exit_code == 2
        assert "--base stored keeps weights as quantized" in done.stderr
    with pytest.raises(InputError, match="base stored goes with LoRA"):
        settings(tmp_path / "plain", tmp_path / "d.json", tmp_path / "run", base="stored")
