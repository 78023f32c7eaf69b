"""Whole models compiled for real TPUs: they fit, and no program moves or copies what is large.

Nothing runs: libtpu compiles for a topology, on any x86-64 Linux machine. The models have their
full depth, for a `lax.scan` over 80 layers compiles like one over two. What is looked at in the
optimized program:

- one attention kernel, in the body of the scan over the layers;
- no array of tokens by tokens, so no attention beside the kernel;
- nothing makes an array as large as the cache or one layer's keys, but what updates it in place;
- no exchange between devices that moves as much as one layer's keys of the whole text (or, where
  a text is shared, more than the stream of its tokens).
"""

import importlib.util
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest
from abstract import lower
from jax.experimental import topologies
from jax.sharding import Mesh

from dca_jax.config import LlamaConfig
from dca_jax.inference.buckets import capacity_bucket
from dca_jax.inference.pieces import NARROW, WIDEST
from dca_jax.planning.memory import DEVICES
from dca_jax.planning.plan import plan
from dca_jax.planning.shapes import SHAPES
from dca_jax.sharding import make_mesh, parse_mesh

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
    pytest.mark.timeout(3600),
]

LENGTH = 32768 + 33  # a prompt and what is drawn after it
BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}
MOVES = ("all-gather", "all-to-all", "collective-permute", "ragged-all-to-all")
# What hands an array on, or writes into it where it lies. What is inside a fusion is looked at too.
IN_PLACE = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"),
    *("fusion", "scatter", "dynamic-update-slice", "opt-barrier"),
}


class Case(NamedTuple):
    """A model on the chips of a topology."""

    chip: str
    topology: str
    model: str
    mesh: str

    @property
    def id(self) -> str:
        return f"{self.model}-{self.chip}"


# The 7B has pieces of 2048 tokens here, for 4096 is its hidden size: `tokens_by_tokens` could not
# tell the two apart.
QUICK = Case("v5e", "2x2", "llama-2-7b", "tensor=4")
CASES = [
    Case("v4", "2x2x1", "llama-2-7b", "tensor=4"),
    Case("v5p", "2x2x1", "llama-2-7b", "tensor=1"),
    Case("v6e", "2x2", "llama-2-7b", "tensor=4"),
    Case("v7x", "2x2x1", "llama-2-7b", "tensor=1"),
    Case("v4", "2x2x2", "llama-3-70b", "tensor=8"),
    Case("v5e", "4x4", "llama-3-70b", "tensor=16"),
    Case("v5p", "2x2x2", "llama-3-70b", "tensor=8"),
    Case("v6e", "2x4", "llama-3-70b", "tensor=8"),
    Case("v7x", "2x2x1", "llama-3-70b", "tensor=8"),
]
EXPERTS = [
    Case("v5p", "2x2x1", "qwen3-30b-a3b", "tensor=4"),
    Case("v6e", "2x2", "qwen3-30b-a3b", "tensor=4"),
]
WHOLE = Case("v5p", "2x2x2", "llama-3-70b", "context=2,tensor=4")


def tokens_of(case: Case) -> int:
    if case in EXPERTS:
        return WIDEST[0]
    return 2048 if case.model == "llama-2-7b" else NARROW[0]


def mesh_of(case: Case) -> Mesh:
    name = {"v7x": "tpu7x"}.get(case.chip, case.chip)
    # A v4 chip's two cores are one device, as they are on a v4's own hosts.
    options = {"chip_config_name": "megacore"} if case.chip == "v4" else {}
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{name}:{case.topology}", **options
    )
    return make_mesh(case.mesh, topology.devices)


class Instruction(NamedTuple):
    """One of an optimized program; a fusion counts as one, and so does what is inside it."""

    computation: str
    opcode: str
    shapes: list[tuple[str, tuple[int, ...]]]  # dtype and sizes of each result
    text: str

    @property
    def num_bytes(self) -> int:
        return sum(BYTES.get(dtype, 8) * math.prod(sizes) for dtype, sizes in self.shapes)


def instructions(text: str) -> Iterator[Instruction]:
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.removeprefix("ENTRY ").split()[0].lstrip("%")
        match = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(", line)
        if match:
            found = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            shapes = [(dtype, tuple(map(int, filter(None, s.split(","))))) for dtype, s in found]
            yield Instruction(computation, match[2], shapes, line)


def check_one_kernel_in_the_scan(program: list[Instruction], cache: tuple[int, ...]) -> None:
    """The scan over layers is the loop that carries all layers of the cache along."""
    kernels = [i for i in program if 'custom_call_target="tpu_custom_call"' in i.text]
    # XLA's own kernels for products of groups of rows are not those of the attention.
    (kernel,) = [i for i in kernels if "ragged-dot" not in i.text.partition(" = ")[0]]
    body = re.compile(rf"body=%?{re.escape(kernel.computation)}\b")
    (scan,) = [i for i in program if body.search(i.text)]
    assert scan.opcode == "while"
    assert [sizes for _, sizes in scan.shapes].count(cache) == 2


def check_nothing_is_tokens_by_tokens(program: list[Instruction], counts: set[int]) -> None:
    for instruction in program:
        for _, sizes in instruction.shapes:
            assert sum(size in counts for size in sizes) < 2, instruction.text[:300]


def check_keys_stay(
    program: list[Instruction], copied: set[int], allowed: int, *, new: bool
) -> None:
    """Nothing makes an array of so many elements, no exchange moves so many bytes.

    `new`: memory may be set apart for a cache that the layers then write.
    """
    for instruction in program:
        what = instruction.text[:300]
        allocates = new and 'custom_call_target="AllocateBuffer"' in instruction.text
        if instruction.opcode not in IN_PLACE and not allocates:
            assert all(math.prod(sizes) not in copied for _, sizes in instruction.shapes), what
        if instruction.opcode.removesuffix("-start") in MOVES:
            assert instruction.num_bytes <= allowed, what


def check(step: str, case: Case) -> None:
    config, sizes = SHAPES[case.model], parse_mesh(case.mesh)
    capacity, tokens = capacity_bucket(LENGTH, sizes["context"]), tokens_of(case)
    lowered = lower(
        step,
        config,
        mesh_of(case),
        capacity=capacity,
        tokens=tokens,
        dtype=jnp.bfloat16,
        implementation="mosaic_tpu",
    )
    compiled = lowered.compile()

    analysis: Any = compiled.memory_analysis()
    held, working = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    device = DEVICES[case.chip]
    shares = f"{held / 1e9:.2f} GB held, {working / 1e9:.3f} GB while it runs"
    print(f"{case.id} {case.mesh} {step}: {shares}, of {device.memory / 1e9:.1f} GB")
    assert held + working < device.memory
    planned = plan(case.model, config, device=case.chip, mesh=sizes, context_length=LENGTH).usage
    unused = 2 * config.vocab_size * config.hidden_size // sizes["tensor"] if step == "read" else 0
    assert planned.weights + planned.cache - unused == pytest.approx(held, rel=0.005)
    assert held + working < planned.total * 1.1

    program = list(instructions(compiled.as_text()))
    assert len(program) > 100
    heads = max(config.num_key_value_heads, sizes["tensor"]) // sizes["tensor"]
    share = capacity // sizes["context"]  # of a text, in two blocks
    cache = (config.num_hidden_layers, 1, share, heads * config.head_dim)
    if step == "read_whole":  # a ring has a kernel for each kind of pair of blocks
        check_nothing_is_tokens_by_tokens(program, {capacity, share, share // 2})
        copied = {math.prod(cache)}  # and not the layer just made, which is an activation
        allowed = 4 * share * config.hidden_size  # the stream goes back to the text's own order
    else:
        check_nothing_is_tokens_by_tokens(program, {tokens, capacity})
        check_one_kernel_in_the_scan(program, cache)
        copied = {math.prod(cache), math.prod(cache[1:])}
        allowed = 2 * math.prod(cache[1:]) * math.prod(sizes.values())  # a layer's keys, of all
    check_keys_stay(program, copied, allowed, new=step == "read_whole")
    if config.mixture is not None:
        check_experts_stay(program, config, sizes["tensor"], step)


def check_experts_stay(
    program: list[Instruction], config: LlamaConfig, tensor: int, step: str
) -> None:
    """No projection of all layers' experts is made again; drawing a token, not of one layer's."""
    mixture = config.mixture
    assert mixture is not None
    inner = mixture.moe_intermediate_size // tensor
    layer = mixture.num_experts * config.hidden_size * inner
    stack = config.num_hidden_layers * layer
    for instruction in program:
        if instruction.opcode not in IN_PLACE:
            for _, sizes in instruction.shapes:
                assert math.prod(sizes) < (layer if step == "decode" else stack), instruction.text


@pytest.mark.parametrize("step", [pytest.param("read", marks=pytest.mark.tpu_aot), "decode"])
def test_quick(step: str) -> None:
    check(step, QUICK)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("step", ["read", "decode"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_chip(case: Case, step: str) -> None:
    check(step, case)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("step", ["read", "decode"])
@pytest.mark.parametrize("case", EXPERTS, ids=lambda case: case.id)
def test_experts(case: Case, step: str) -> None:
    check(step, case)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("weights", ["int4:128", "int8"])
def test_packed_weights_stay(weights: str) -> None:
    """A program that draws tokens has no room for a copy of an MLP's values of all layers."""
    config, case = SHAPES["llama-3-8b"], Case("v5e", "2x2", "llama-3-8b", "tensor=4")
    capacity = capacity_bucket(LENGTH, 1)
    options: dict[str, Any] = {"implementation": "mosaic_tpu", "weights": weights}
    lowered = lower("decode", config, mesh_of(case), capacity=capacity, **options)
    compiled = lowered.compile()
    working = compiled.memory_analysis().temp_size_in_bytes
    print(f"{case.id} {weights} decode: {working / 1e9:.3f} GB while it runs")
    values = config.num_hidden_layers * config.hidden_size * config.intermediate_size // 4
    values //= 2 if weights.startswith("int4") else 1
    assert working < values


@pytest.mark.tpu_aot
def test_a_whole_text_shared_by_devices() -> None:
    check("read_whole", WHOLE)
