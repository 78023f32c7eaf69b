"""A checkpoint of Llama 2 70B's heads: read, converted and restored across meshes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conversion_helpers import random_tensors, tiny_config, write_checkpoint
from flax.traverse_util import flatten_dict

from checkpoints_convert import hf_to_orbax
from dca_jax.sharding import make_mesh
from dca_jax.weights import orbax as checkpoint
from dca_jax.weights import parameters as parameters_module
from dca_jax.weights.files import PARAMS
from dca_jax.weights.folder import load_weights
from dca_jax.weights.huggingface import read_config
from dca_jax.weights.parameters import abstract_params
from dca_jax.weights.placement import parameter_shardings
from dca_jax.weights.tensor_files import StoredTensor

# 64 heads and 8 kv heads, in more files than layers; the width is 8192 / 64, the heads' 128 / 64.
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 12,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 2,
    "vocab_size": 512,
}
FILES = 15
PIECE = 2**13  # elements: a device's part of a layer's MLP is one piece, or four
# Slices of an MLP's kernel along D and F on each of them.
MESHES = {"fsdp=2,tensor=4": (2, 4), "data=2,context=2,tensor=2": (1, 2)}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    config = tiny_config(**SHAPE)
    folder = tmp_path_factory.mktemp("70b") / "hf"
    return write_checkpoint(folder, config, random_tensors(config), shards=FILES)


@pytest.fixture(scope="module")
def whole(source) -> dict[str, np.ndarray]:
    """Every parameter as one array on the host, by path."""
    params = load_weights(source, read_config(source), dtype=jnp.bfloat16)
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep=".").items()}


@pytest.fixture(scope="module")
def converted(source) -> Path:
    folder = source.with_name("orbax")
    hf_to_orbax.convert(source, folder)
    return folder


def placed(source: Path, mesh: str) -> Callable[[str], Any]:
    return parameter_shardings(read_config(source), make_mesh(mesh))


def assert_same_bits(params: dict[str, Any], whole: dict[str, np.ndarray]) -> None:
    """Every device has, bit for bit, its own part of every parameter."""
    found = flatten_dict(params, sep=".")
    assert found.keys() == whole.keys()
    for path, leaf in found.items():
        assert (leaf.dtype, len(leaf.sharding.device_set)) == (jnp.bfloat16, 8)
        for shard in leaf.addressable_shards:
            expected = whole[path][shard.index]
            np.testing.assert_array_equal(
                np.asarray(shard.data).view(np.uint16), expected.view(np.uint16), path
            )


@pytest.mark.parametrize("mesh", MESHES)
def test_each_device_is_given_its_own_slices(source, whole, mesh, monkeypatch):
    monkeypatch.setattr(parameters_module, "PIECE_SIZE", PIECE)
    read: dict[str, list[tuple[int, ...]]] = {}
    from_file = StoredTensor.read

    def noted(tensor: StoredTensor, index: tuple[slice, ...]) -> np.ndarray:
        piece = from_file(tensor, index)
        read.setdefault(tensor.name, []).append(piece.shape)
        return piece

    monkeypatch.setattr(StoredTensor, "read", noted)
    sharding = placed(source, mesh)
    params = load_weights(source, read_config(source), dtype=jnp.bfloat16, sharding=sharding)
    assert_same_bits(params, whole)
    # Every element is read once, however many devices hold it, and never many together.
    sizes = {name: [math.prod(shape) for shape in shapes] for name, shapes in read.items()}
    assert sum(map(sum, sizes.values())) == sum(leaf.size for leaf in whole.values())
    assert max(map(max, sizes.values())) <= PIECE
    # No piece is wider than what one device has of it.
    of_width, of_ffw = MESHES[mesh]
    layer = read["model.layers.7.mlp.up_proj.weight"]  # [F, D]
    assert {width for _, width in layer} == {SHAPE["hidden_size"] // of_width}
    assert max(rows for rows, _ in layer) <= SHAPE["intermediate_size"] // of_ffw


def test_it_converts_and_opens_on_another_mesh(source, converted, whole):
    params = load_weights(converted, read_config(converted), sharding=placed(source, "tensor=8"))
    assert_same_bits(params, whole)


@pytest.mark.slow
def test_what_one_mesh_saved_is_restored_on_another(source, converted, whole, tmp_path):
    def restored(params: Path, mesh: str) -> dict[str, Any]:
        config = read_config(source)
        like = abstract_params(config, dtype=jnp.bfloat16, sharding=placed(source, mesh))
        return checkpoint.restore(params, like)

    checkpoint.save(tmp_path / "saved", restored(converted / PARAMS, "fsdp=8"))
    for mesh in ("context=4,tensor=2", "fsdp=2,context=2,tensor=2"):
        assert_same_bits(restored(tmp_path / "saved", mesh), whole)
