"""The memory plan of LoRA: beside real arrays, the compiler's figures, and full training."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from abstract import unchecked
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from dca_jax.config import LlamaConfig, LoraConfig
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.finetune.lora import init_lora, join
from dca_jax.model import Llama
from dca_jax.planning.memory import DEVICES, F32, LOSS_TOKENS, Job
from dca_jax.planning.plan import plan
from dca_jax.planning.shapes import SHAPES
from dca_jax.sharding import make_mesh, parse_mesh
from dca_jax.weights.kept import Kept
from dca_jax.weights.packer import matrices, packed_stack, packer
from dca_jax.weights.parameters import abstract_params, lora_parameters, parameters, projections
from dca_jax.weights.placement import parameter_shardings

SMALL = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=4096,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
)
LORA = LoraConfig(rank=8)


def job_for(config: LlamaConfig, **options: Any) -> Job:
    common: dict[str, Any] = {"batch": 1, "train": True, "dtype": jnp.dtype(jnp.bfloat16)}
    return Job(config=config, **{"device": DEVICES["h200"], "lora": LORA, **common, **options})


def bytes_of_one_device(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("form", [None, "int8", "int4"])
def test_weights_are_those_of_real_arrays(form: str | None) -> None:
    """Byte for byte; on more devices of `tensor` than there are kv heads, too."""
    sizes, mesh = parse_mesh("fsdp=2,tensor=4"), make_mesh("fsdp=2,tensor=4")
    place = parameter_shardings(SMALL, mesh, lora=LORA)
    base = {
        row.path: jnp.zeros(row.shape(SMALL), jnp.bfloat16, device=place(row.path))
        for row in parameters(SMALL)
    }
    if form is not None:
        then = packer(projections(SMALL), form)
        for row in parameters(SMALL):
            if (change := then(row)) is not None:
                base[row.path] = change(base[row.path])
    params = unflatten_dict(base, sep=".")
    adapters = bytes_of_one_device(init_lora(SMALL, LORA, jax.random.key(0), place))
    usage = job_for(SMALL, context_length=300, batch=2, weights=form).usage(sizes)
    assert usage.weights == bytes_of_one_device(params) + adapters
    assert usage.gradients == adapters
    assert usage.optimizer == 2 * adapters


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="compiles for the CPU's devices")
@pytest.mark.parametrize(
    ("sizes", "form"),
    [("fsdp=2", None), pytest.param("tensor=2", "int8", marks=pytest.mark.slow)],
)
def test_the_formula_beside_the_compiler(sizes: str, form: str | None) -> None:
    batch, length, optimizer = 4, LOSS_TOKENS, optax.adamw(1e-5)
    mesh = make_mesh(sizes)
    place = parameter_shardings(SMALL, mesh, lora=LORA)
    base = abstract_params(SMALL, dtype=jnp.float32, sharding=place)
    if form is not None:
        base = packed_shapes(base, form)
    adapters = unflatten_dict(
        {row.path: row.abstract(SMALL, jnp.float32, place) for row in lora_parameters(SMALL, LORA)},
        sep=".",
    )
    tokens = jax.ShapeDtypeStruct(
        (batch, length), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec())
    )

    def step(adapters: Any, state: Any, base: Any, tokens: jax.Array) -> tuple[Any, Any]:
        def loss(adapters: Any) -> jax.Array:
            options: dict[str, Any] = {"dca": DCAConfig.paper(512), "dtype": jnp.float32}
            options |= {"lora": LORA, "remat": "layer"}
            whole = Llama.from_params(SMALL, join(adapters, base), **options)
            hidden, _ = whole.hidden_states(tokens)
            rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context"))
            targets = jax.sharding.reshard(jnp.roll(tokens, -1, axis=1), rows)
            return jax.checkpoint(whole.nll)(hidden, targets).sum()

        gradients = jax.grad(loss)(adapters)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            updates, state = optimizer.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state

    moments, *rest = jax.eval_shape(optimizer.init, adapters)
    state = (moments._replace(mu=adapters, nu=adapters), *rest)
    with unchecked():
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(adapters, state, base, tokens)
    analysis = lowered.compile().memory_analysis()

    options: dict[str, Any] = {"context_length": length, "batch": batch, "weights": form}
    usage = job_for(SMALL, dtype=jnp.dtype(jnp.float32), **options).usage(mesh.shape)
    held = usage.weights + usage.optimizer
    assert held == pytest.approx(analysis.argument_size_in_bytes, rel=0.01)
    # With adapters the CPU's compiler, which adds no product to another in place, keeps three more
    # arrays of the MLP's width.
    wide = F32 * batch * length * SMALL.intermediate_size // 2
    working = usage.gradients + usage.copies + usage.activations + 3 * wide
    assert working == pytest.approx(analysis.temp_size_in_bytes, rel=0.1)


def packed_shapes(base: dict[str, Any], form: str) -> dict[str, Any]:
    """What `packer` gives, as shapes."""
    for row in projections(SMALL):
        node = base
        for name in row.path.split(".")[:-1]:
            node = node[name]
        node["kernel"] = jax.eval_shape(
            lambda kernel, row=row: packed_stack(kernel, form, row),
            node["kernel"],
        )
    return base


def test_what_lora_saves_of_llama_2_7b() -> None:
    """Two bytes a parameter, or one and little more, where full training takes sixteen."""
    common: dict[str, Any] = {"device": "a100-80g", "context_length": 16384, "train": True}
    config, lora = SHAPES["llama-2-7b"], LoraConfig(rank=16)
    mesh = parse_mesh("tensor=1")
    full = plan("llama-2-7b", config, mesh=mesh, **common)
    half = plan("llama-2-7b", config, mesh=mesh, lora=lora, **common)
    int8 = plan("llama-2-7b", config, mesh=mesh, lora=lora, weights="int8", **common)
    adapters = 39_976_960  # of rank 16, for all projections
    assert half.usage.weights == 2 * 6_738_415_616 + F32 * adapters
    assert half.usage.optimizer == 2 * half.usage.gradients == 2 * F32 * adapters
    tables = 2 * 32000 * 4096  # which stay in two bytes
    assert int8.usage.weights == pytest.approx(6.738e9 + tables + F32 * adapters, rel=5e-3)
    assert not full.fits
    assert half.fits
    assert int8.usage.total < half.usage.total < full.usage.total
    assert half.facts()["texts"] == "1 of 16,384 tokens, to train adapters of rank 16 on"
    assert int8.facts()["texts"].endswith("of rank 16 on, over int8 weights")
    assert int8.as_json()["lora_rank"] == 16
    assert int8.as_json()["weights"] == "int8"
    assert full.as_json()["lora_rank"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": LORA}, "LoRA is a way to train"),
        ({"weights": "int8", "train": True}, "weights that are trained are not packed in int8"),
        ({"weights": "int3"}, "weights must be one of int8, int4, .*, got 'int3'"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan("small", SMALL, device="h200", mesh=None, context_length=512, **options)


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_packed_weights_of_generation_are_those_of_real_arrays(form: str) -> None:
    """All matrices, tables too."""
    sizes, mesh = parse_mesh("fsdp=2,tensor=4"), make_mesh("fsdp=2,tensor=4")
    place, then, base = parameter_shardings(SMALL, mesh), packer(matrices(SMALL), form), {}
    for row in parameters(SMALL):
        leaf = jnp.zeros(row.shape(SMALL), jnp.bfloat16, device=place(row.path))
        change = then(row)
        base[row.path] = leaf if change is None else change(leaf)
    options: dict[str, Any] = {"train": False, "lora": None, "weights": form}
    usage = job_for(SMALL, context_length=300, batch=2, **options).usage(sizes)
    assert usage.weights == bytes_of_one_device(base)


def test_meshes_that_divide_pairs_of_int4_are_left_out() -> None:
    """Four devices along `tensor` would have 5 inputs each of the last projection's 20."""
    config = replace(SMALL, intermediate_size=20, num_key_value_heads=4)
    options: dict[str, Any] = {"device": "h200", "context_length": 64, "batch": 4}
    kept = {"layers.mlp.down_proj.kernel": Kept("int4", (1, 4), np.dtype(np.float16))}
    for how in ({"weights": "int4"}, {"kept": kept}):
        found = plan("small", config, mesh=parse_mesh("data=4"), **options, **how)
        assert found.recommended is not None
        assert found.recommended["tensor"] < 4
        with pytest.raises(InputError, match=r"an even number|an odd number"):
            plan("small", config, mesh=parse_mesh("tensor=4"), **options, **how)
