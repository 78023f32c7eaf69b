"""The memory plan: beside real arrays, the compiler's figures, and what an H200 measured."""

import json
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from abstract import abstract_cache, lower, lower_update
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_fixtures import invoke
from tiny_llm import make_llm

from dca_jax.cli.options import Base, CacheDtype, Dtype, Remat
from dca_jax.config import LlamaConfig
from dca_jax.dtypes import CACHE_DTYPES, DTYPES
from dca_jax.errors import InputError
from dca_jax.finetune.settings import BASES
from dca_jax.inference.buckets import capacity_bucket
from dca_jax.kv_cache import KVCache
from dca_jax.memory import GPU_SHARE
from dca_jax.model import REMAT, Llama
from dca_jax.planning import plan as planning
from dca_jax.planning.memory import DEVICES, LOSS_TOKENS, Job
from dca_jax.planning.plan import Plan, plan, recommend, written
from dca_jax.planning.shapes import SHAPES, find_shape
from dca_jax.serving.plan import plan_server
from dca_jax.sharding import make_mesh, parse_mesh
from dca_jax.weights.parameters import parameters
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


def plan_for(name: str, mesh: str | None, device: str = "h200", **options: Any) -> Plan:
    sizes = None if mesh is None else parse_mesh(mesh)
    return plan(name, SHAPES[name], mesh=sizes, device=device, **options)


def job_for(config: LlamaConfig, **options: Any) -> Job:
    common: dict[str, Any] = {"batch": 1, "train": False, "dtype": jnp.dtype(jnp.bfloat16)}
    return Job(config=config, **{"device": DEVICES["h200"], **common, **options})


# Peaks of `memory_stats` on one or two H200s: GB of one device, for so many tokens in the cache.
@pytest.mark.parametrize(
    ("model", "mesh", "tokens", "peak"),
    [
        ("llama-2-7b", "tensor=1", 8192 + 33, 19.4),
        ("llama-2-7b", "tensor=1", 32768 + 33, 33.76),
        ("llama-2-7b", "tensor=1", 131_072 + 17, 91.67),
        ("llama-2-7b", "tensor=2", 131_072 + 33, 47.6),
        ("llama-2-7b", "context=2", 131_072 + 33, 58.89),
        ("llama-2-70b", "tensor=2", 16384 + 33, 74.4),
        ("llama-2-70b", "tensor=2", 98304, 87.48),
        ("llama-2-70b", "tensor=2", 327_680, 125.06),
    ],
)
def test_peaks_measured_on_h200s(model: str, mesh: str, tokens: int, peak: float) -> None:
    found = plan_for(model, mesh, context_length=tokens)
    print(f"{model} {mesh} {tokens}: {found.usage.total / 1e9:.2f} GB, measured {peak}")
    assert found.usage.total == pytest.approx(peak * 1e9, rel=0.1)


@pytest.mark.parametrize("kept", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("mesh", ["tensor=1", "tensor=4", "context=2,fsdp=2", "data=2,tensor=2"])
def test_weights_and_cache_are_those_of_real_arrays(mesh: str, kept: Any) -> None:
    """Byte for byte, for each of the mesh's devices; also where kv heads are kept twice."""
    sizes, devices = parse_mesh(mesh), make_mesh(mesh)
    options = {"dtype": jnp.dtype(jnp.float32), "cache_dtype": jnp.dtype(kept)}
    job = job_for(SMALL, context_length=300, batch=3, **options)
    usage = job.usage(sizes)
    place = parameter_shardings(SMALL, devices)
    weights = (
        jnp.zeros(row.shape(SMALL), jnp.float32, device=place(row.path))
        for row in parameters(SMALL)
    )
    capacity = capacity_bucket(300, sizes["context"])
    rows = sizes["data"] * sizes["fsdp"]
    batch = -(-3 // rows) * rows
    cache = KVCache.create(SMALL, batch=batch, capacity=capacity, dtype=kept, mesh=devices)
    assert usage.weights == sum(w.addressable_shards[0].data.nbytes for w in weights)
    arrays = jax.tree.leaves(cache.stored)
    assert len(arrays) == (2 if kept == jnp.float32 else 4)
    assert usage.cache == sum(x.addressable_shards[0].data.nbytes for x in arrays)
    assert cache.num_bytes == sum(x.nbytes for x in arrays)
    like = abstract_cache(SMALL, devices, batch, capacity, kept)  # what other tests take
    for ours, real in zip(jax.tree.leaves(like), jax.tree.leaves(cache), strict=True):
        assert (ours.shape, ours.dtype) == (real.shape, real.dtype)
        assert ours.sharding.is_equivalent_to(real.sharding, real.ndim)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="compiles for the CPU's devices")
@pytest.mark.parametrize(
    ("mesh", "batch"), [("tensor=1", 1), ("data=2,tensor=2", 4), ("context=2,tensor=2", 1)]
)
def test_the_formula_beside_the_compiler(mesh: str, batch: int) -> None:
    """A wide MLP, so that the CPU's attention, which no other device runs, hardly counts."""
    sizes = parse_mesh(mesh)
    job = job_for(SMALL, context_length=8192, batch=batch, dtype=jnp.dtype(jnp.float32))
    step = "read_whole" if sizes["context"] > 1 else "read"
    capacity = capacity_bucket(8192, sizes["context"])
    options: dict[str, Any] = {"capacity": capacity, "tokens": 8192 // batch, "batch": batch}
    lowered = lower(step, SMALL, make_mesh(mesh), dtype=jnp.float32, **options)
    analysis = lowered.compile().memory_analysis()
    usage = job.usage(sizes)
    held = usage.weights + usage.cache
    assert held == pytest.approx(analysis.argument_size_in_bytes, rel=0.01)
    assert usage.activations == pytest.approx(analysis.temp_size_in_bytes, rel=0.1)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="compiles for the CPU's devices")
@pytest.mark.parametrize(
    "remat",
    [pytest.param(x, marks=pytest.mark.slow) for x in REMAT],
)
def test_the_formula_of_training_beside_the_compiler(remat: str) -> None:
    batch, length, mesh = 4, 2 * LOSS_TOKENS, make_mesh("fsdp=2")
    options: dict[str, Any] = {"rows": batch, "length": length, "dtype": jnp.float32}
    lowered = lower_update(SMALL, mesh, remat=remat, **options)
    analysis = lowered.compile().memory_analysis()

    options = {"context_length": length, "batch": batch, "train": True, "remat": remat}
    usage = job_for(SMALL, dtype=jnp.dtype(jnp.float32), **options).usage(mesh.shape)
    held = usage.weights + usage.optimizer
    assert held == pytest.approx(analysis.argument_size_in_bytes, rel=0.01)
    working = usage.gradients + usage.copies + usage.activations
    assert working == pytest.approx(analysis.temp_size_in_bytes, rel=0.1)


def test_shapes_have_the_published_number_of_parameters() -> None:
    counts = {
        name: sum(math.prod(row.shape(config)) for row in parameters(config))
        for name, config in SHAPES.items()
    }
    assert counts == {
        "llama-2-7b": 6_738_415_616,
        "llama-2-13b": 13_015_864_320,
        "llama-2-70b": 68_976_648_192,
        "llama-3-8b": 8_030_261_248,
        "llama-3-70b": 70_553_706_496,
        "qwen2.5-7b": 7_615_616_512,
        "qwen2.5-14b": 14_770_033_664,
        "mixtral-8x7b": 46_702_792_704,
        "qwen3-30b-a3b": 30_532_122_624,
        "qwen3-235b-a22b": 235_093_634_560,
    }


def test_training_counts_sixteen_bytes_a_parameter() -> None:
    usage = plan_for("llama-2-7b", "fsdp=8", context_length=16384, batch=8, train=True).usage
    states = usage.weights + usage.gradients + usage.optimizer
    # All but the norms, which lie everywhere whole, are cut by fsdp.
    assert states == pytest.approx(16 * 6_738_415_616 / 8, rel=1e-3)
    assert usage.cache == 0
    # Each layer keeps the stream it starts from: 16384 tokens of 4096 elements.
    assert usage.activations > 32 * 16384 * 4096 * 2


@given(
    name=st.sampled_from(["llama-2-7b", "llama-3-70b", "qwen2.5-7b"]),
    device=st.sampled_from(sorted(DEVICES)),
    count=st.sampled_from([1, 2, 4, 6, 8, 16]),
    batch=st.integers(1, 8),
    train=st.booleans(),
)
@settings(max_examples=20)
def test_the_longest_context_is_the_longest_that_fits(
    name: str, device: str, count: int, batch: int, train: bool
) -> None:
    job = job_for(
        SHAPES[name], device=DEVICES[device], context_length=4096, batch=batch, train=train
    )
    sizes = recommend(job, count)
    if sizes is None:
        return
    assert math.prod(sizes.values()) == count
    longest = job.longest(sizes)
    assert longest >= 4096
    assert replace(job, context_length=longest).fits(sizes)
    assert not replace(job, context_length=longest + 1).fits(sizes)


@pytest.mark.parametrize(
    ("model", "device", "options", "mesh"),
    [
        ("llama-2-7b", "h200", {"context_length": 4096}, "tensor=1"),
        ("llama-2-7b", "v5e", {"context_length": 8192}, "tensor=2"),
        ("llama-2-70b", "h200", {"context_length": 16384}, "tensor=2"),
        # Its 8 kv heads are not enough to cut 141 GB for 16 GB devices.
        ("llama-3-70b", "v5e", {"context_length": 8192}, "tensor=16"),
        # Beyond one kv head a device, the text is cut.
        ("llama-3-8b", "v6e", {"context_length": 4_000_000}, "context=8,tensor=8"),
        ("llama-2-7b", "h200", {"context_length": 16384, "batch": 8, "train": True}, "fsdp=2"),
    ],
)
def test_the_fewest_devices(model: str, device: str, options: Any, mesh: str) -> None:
    found = plan_for(model, None, device, **options)
    assert found.fits
    assert written(found.sizes) == mesh
    assert found.recommended == found.fewest == found.sizes


def test_what_is_recommended_for_so_many_devices() -> None:
    found = plan_for("llama-2-70b", "context=8", "h200", context_length=100_000, batch=2)
    assert not found.fits  # each device would hold all weights
    assert found.recommended == parse_mesh("tensor=8")
    assert "splits weights" in found.why
    many = plan_for("llama-3-8b", "tensor=8", "h200", context_length=100_000, batch=4)
    assert many.recommended == parse_mesh("tensor=8")
    more = plan_for("llama-3-8b", "data=2,tensor=8", "h200", context_length=8192, batch=4)
    assert more.recommended == parse_mesh("data=2,tensor=8")


def test_it_says_what_jax_must_be_told_to_take() -> None:
    """70B at 16k tokens on two A100s, as in the paper: more than JAX's three quarters of each."""
    found = plan_for("llama-2-70b", "tensor=2", "a100-80g", context_length=16384)
    assert found.fits
    assert found.fraction is not None
    assert 0.75 < found.fraction < 0.95
    assert f"XLA_CLIENT_MEM_FRACTION={found.fraction}" in found.facts()["fits"]
    assert found.usage.total <= GPU_SHARE * 79.2 * 2**30  # what a command takes
    assert plan_for("llama-2-70b", "tensor=2", "h200", context_length=16384).fraction is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu9"}, "expected one of h200"),
        ({"context_length": 0}, "at least 1, got 0 and 1"),
        ({"remat": "none"}, "expected one of layer, attention, products"),
        ({"mesh": parse_mesh("tensor=3")}, "tensor=3 does not divide the model's 32 query heads"),
        ({"mesh": parse_mesh("fsdp=3")}, "fsdp=3 does not divide the hidden size 4096"),
        ({"mesh": parse_mesh("fsdp=2"), "train": True}, "do not divide the batch of 1 texts"),
        ({"train": True, "cache_dtype": "int8"}, "training has no KV cache"),
        ({"cache_dtype": "int4"}, "cache dtype 'int4' is not supported; expected one of bfloat16"),
        ({"mesh": None, "context_length": 2**34}, "fits no mesh of up to 4 devices"),
    ],
)
def test_refused(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MOST_DEVICES", 4)  # all their meshes are tried
    common: dict[str, Any] = {"device": "h200", "mesh": None, "context_length": 4096}
    with pytest.raises(InputError, match=message):
        plan("llama-2-7b", SHAPES["llama-2-7b"], **common | options)


# --- the command -------------------------------------------------------------------------------


def test_it_takes_what_training_takes() -> None:
    assert list(Remat) == list(REMAT)
    assert list(Base) == list(BASES)
    assert list(Dtype) == list(DTYPES)
    assert list(CacheDtype) == list(CACHE_DTYPES)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def test_the_command_prints_a_table() -> None:
    options = ("--device", "h200", "--mesh", "tensor=4", "--context-length", "100000")
    result = invoke("plan", "llama-2-70b", *options)
    assert result.exit_code == 0
    for text in ("4 x NVIDIA H200", "34.5 GB", "tensor=2 would do", "fits", "longest that fits"):
        assert text in result.output
    small = invoke("plan", "llama-2-70b", *options, "--cache-dtype", "int8", "--json")
    found = json.loads(small.stdout)
    assert found["cache_dtype"] == "int8"
    # 80 layers, 8 kv heads of 128 and their scales, 106,496 places, over four devices.
    assert found["bytes"]["cache"] == 2 * 80 * 106_496 * 8 * (128 + 4) // 4


def test_the_command_prints_json_of_a_checkpoint_without_weights(tmp_path: Any) -> None:
    folder = make_llm(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    result = invoke("plan", str(folder), "--device", "v5e", "--context-length", "4k", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["fits"]
    assert found["mesh"] == found["recommended"] == "tensor=1"
    assert found["bytes"]["total"] == sum(
        size for name, size in found["bytes"].items() if name != "total"
    )
    model = jax.eval_shape(lambda: Llama(find_shape(str(folder)), rngs=nnx.Rngs(0)))
    assert found["bytes"]["weights"] == sum(2 * leaf.size for leaf in jax.tree.leaves(model))


def test_the_command_refuses() -> None:
    options = ("--device", "h200", "--context-length", "4096")
    result = invoke("plan", "llama-2-7b", *options, "--mesh", "tensor=3")
    assert result.exit_code == 2
    assert "sizes that do: [1, 2, 4, 8, 16, 32]" in result.stderr
    result = invoke("plan", "llama-9-1t", *options)
    assert result.exit_code == 2
    assert "llama-3-70b" in result.stderr


# --- a server ----------------------------------------------------------------------------------

MEASURED = 864_640  # tokens of the cache that `dca-jax serve` chose on an H200


def test_a_server_holds_what_it_was_seen_to_hold() -> None:
    options: dict[str, Any] = {"device": "h200", "mesh": None, "context": 103_424}
    found = plan_server("llama-3-8b", SHAPES["llama-3-8b"], **options)
    assert found.pages * 128 == pytest.approx(MEASURED, rel=0.01)
    assert found.sizes["tensor"] == 1
    for each in found.texts():
        pages = -(-each["tokens"] // 128)
        assert each["texts"] == min(32, found.pages // pages)
        assert each["texts"] * pages * 128 + each["kept"] == found.pages * 128
    assert found.texts()[-1]["tokens"] == 103_424
    half = plan_server("llama-3-8b", SHAPES["llama-3-8b"], **options, cache_dtype="int8")
    assert half.pages == pytest.approx(2 * found.pages, rel=0.04)  # scales, too


def test_a_server_of_a_large_model_shares_it_by_tensor_and_by_nothing_else() -> None:
    config = SHAPES["llama-2-70b"]
    options: dict[str, Any] = {"device": "h200", "context": 102_400}
    found = plan_server("llama-2-70b", config, mesh=None, **options)
    assert found.sizes["tensor"] == 2
    one = plan_server("llama-2-70b", config, mesh={"tensor": 1}, **options)
    assert not one.fits
    assert one.facts()["fits"].startswith("no: not one text of 102,400")
    with pytest.raises(InputError, match="by tensor only, and this mesh has"):
        plan_server("llama-2-70b", config, mesh={"data": 2}, **options)
    with pytest.raises(InputError, match="at least 1 text"):
        plan_server("llama-2-70b", config, mesh=None, rows=0, **options)


def test_the_command_plans_a_server() -> None:
    options = "--device h200 --context-length 64k --serve --batch 8 --json".split()
    told = json.loads(invoke("plan", "llama-2-7b", *options).stdout)
    assert told["fits"] is True
    assert told["texts"][0] == {"tokens": 1024, "texts": 8, "kept": told["cache_tokens"] - 8192}
    result = invoke("plan", "llama-2-7b", *options, "--train")
    assert result.exit_code == 2
    assert "does not train" in result.stderr
