"""Packed checkpoints of Hugging Face: packed here bit by bit, as the formats say, and read."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conversion_helpers import random_tensors, read_safetensors, tiny_config
from jax.sharding import PartitionSpec
from safetensors.torch import save_file
from shared_fixtures import invoke

from checkpoints_convert import hf_to_orbax, orbax_to_hf
from dca_jax.errors import InputError
from dca_jax.evaluation.fingerprint import fingerprint
from dca_jax.products.packed import Packed as Kept
from dca_jax.products.packed import is_packed
from dca_jax.sharding import make_mesh
from dca_jax.weights.folder import kept_forms, load_weights
from dca_jax.weights.huggingface import open_checkpoint, read_config
from dca_jax.weights.packer import matrices
from dca_jax.weights.parameters import parameters
from dca_jax.weights.placement import parameter_shardings

SIZES = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 16, "num_hidden_layers": 2}
PLAIN = "model.layers.1.mlp.down_proj"  # the module that is not packed

Packed = tuple[dict[str, np.ndarray | torch.Tensor], np.ndarray]
rng = np.random.default_rng(0)


def words(values: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Any:
    """Integers packed into int32 along an axis, one bit field after another from the lowest.

    Field k of a word is value `order[k]` of those that it holds.
    """
    count = 32 // bits
    values = values if axis == 1 else values.T
    padded = np.zeros((len(values), -(-values.shape[1] // count) * count), np.int64)
    padded[:, : values.shape[1]] = values
    packed = np.zeros((len(values), padded.shape[1] // count), np.int64)
    for row, word in np.ndindex(packed.shape):
        for field in range(count):
            at = word * count + (field if order is None else order[field])
            packed[row, word] |= int(padded[row, at]) << (bits * field)
    packed = packed.astype(np.uint32).view(np.int32)
    return np.ascontiguousarray(packed if axis == 1 else packed.T)


def scales(*shape: int) -> np.ndarray:
    return (rng.random(shape) * 0.01 + 1e-3).astype(np.float16)


def awq(outs: int, ins: int) -> Packed:
    q, z = rng.integers(0, 16, (ins, outs)), rng.integers(0, 16, (ins // 32, outs))
    s, order = scales(ins // 32, outs), (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {"qweight": words(q, 4, 1, order), "qzeros": words(z, 4, 1, order), "scales": s}
    return parts, ((q - z.repeat(32, 0)) * s.astype(np.float64).repeat(32, 0)).T


def gptq(bits: int, *, ordered: bool, version: int = 1) -> Callable[[int, int], Packed]:
    def pack(outs: int, ins: int) -> Packed:
        q = rng.integers(0, 2**bits, (ins, outs))
        z = rng.integers(0, 2**bits, (ins // 32, outs))
        s, group = scales(ins // 32, outs), np.arange(ins) // 32
        group = group if ordered else rng.permutation(group)
        parts = {
            "qweight": words(q, bits, 0),
            "qzeros": words((z - (version == 1)) % 2**bits, bits, 1),
            "scales": s,
            "g_idx": group.astype(np.int32),
        }
        return parts, ((q - z[group]) * s.astype(np.float64)[group]).T

    return pack


def packed_int(bits: int, size: int, *, zeros: bool = False, acts: bool = False) -> Any:
    """compressed-tensors' pack-quantized; values are signed, and are stored with half added."""

    def pack(outs: int, ins: int) -> Packed:
        half, width = 2 ** (bits - 1), size or ins
        q = rng.integers(-half, half, (outs, ins))
        z = rng.integers(-half, half, (outs, ins // width)) * zeros
        s, group = scales(outs, ins // width), np.arange(ins) // width
        group = rng.permutation(group) if acts else group
        parts = {
            "weight_packed": words(q + half, bits, 1),
            "weight_scale": s,
            "weight_shape": np.array([outs, ins]),
        }
        if zeros:
            parts["weight_zero_point"] = words(z + half, bits, 0)
        if acts:
            parts["weight_g_idx"] = group.astype(np.int32)
        return parts, (q - z[:, group]) * s.astype(np.float64)[:, group]

    return pack


def float8(name: str, block: tuple[int, int] | None) -> Callable[[int, int], Packed]:
    """Float8 with scales by block, by row (None, in float32), or one for all (0, 0)."""

    def pack(outs: int, ins: int) -> Packed:
        q = torch.from_numpy(rng.standard_normal((outs, ins)).astype(np.float32))
        q = q.to(torch.float8_e4m3fn)
        if block == (0, 0):
            s = np.array(0.0123, np.float32)
            spread = s.astype(np.float64)
        elif block is None:
            s = scales(outs, 1).astype(np.float32)
            spread = s.astype(np.float64)
        else:
            s = scales(-(-outs // block[0]), -(-ins // block[1])).astype(np.float32)
            spread = s.astype(np.float64).repeat(block[0], 0).repeat(block[1], 1)[:outs, :ins]
        return {"weight": q, name: s}, q.double().numpy() * spread

    return pack


def int8(outs: int, ins: int) -> Packed:
    q, s = rng.integers(-128, 128, (outs, ins)).astype(np.int8), scales(outs, 1)
    return {"weight": q, "weight_scale": s}, q * s.astype(np.float64)


def compressed(form: str, bits: int, strategy: str, kind: str = "int", **more: Any) -> dict:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head", PLAIN],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "kv_cache_scheme": None,
    }


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
AWQ |= {"modules_to_not_convert": [PLAIN]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": [PLAIN]}
W4 = ("pack-quantized", 4, "group")
CASES: dict[str, tuple[dict[str, Any], Callable[[int, int], Packed]]] = {
    "awq": (AWQ, awq),
    "gptq": (GPTQ, gptq(4, ordered=True)),
    "gptq-desc_act": (GPTQ | {"desc_act": True}, gptq(4, ordered=False)),
    "gptq-8": (GPTQ | {"bits": 8}, gptq(8, ordered=True)),
    "gptq-v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, gptq(4, ordered=True, version=2)),
    "fp8": (FP8 | {"weight_block_size": [128, 128]}, float8("weight_scale_inv", (128, 128))),
    "fp8-ragged": (FP8 | {"weight_block_size": [40, 56]}, float8("weight_scale_inv", (40, 56))),
    "w4a16": (compressed(*W4, group_size=32), packed_int(4, 32)),
    "w4a16-zeros": (
        compressed(*W4, group_size=32, symmetric=False),
        packed_int(4, 32, zeros=True),
    ),
    "w4a16-actorder": (
        compressed(*W4, group_size=32, actorder="group"),
        packed_int(4, 32, acts=True),
    ),
    "w8a16": (compressed("pack-quantized", 8, "channel"), packed_int(8, 0)),
    "w8a8": (compressed("int-quantized", 8, "channel"), int8),
    "fp8-channel": (
        compressed("float-quantized", 8, "channel", "float"),
        float8("weight_scale", None),
    ),
    "fp8-tensor": (
        compressed("float-quantized", 8, "tensor", "float"),
        float8("weight_scale", (0, 0)),
    ),
    "fp8-block": (
        compressed("float-quantized", 8, "block", "float", block_structure=[64, 64]),
        float8("weight_scale", (64, 64)),
    ),
}


def write(folder: Path, name: str) -> dict[str, np.ndarray]:
    """A checkpoint with every linear layer but one packed; what its weights are, in float32."""
    quantization, pack = CASES[name]
    config = tiny_config(**SIZES, quantization_config=quantization)
    stored, expected = {}, {}
    for tensor, value in random_tensors(config, dtype=np.dtype(np.float32)).items():
        module = tensor.removesuffix(".weight")
        if module.endswith("_proj") and module != PLAIN:
            parts, value = pack(*value.shape)
            stored |= {f"{module}.{part}": each for part, each in parts.items()}
        else:
            stored[tensor] = value
        expected[tensor] = value.astype(np.float32)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: torch.as_tensor(v) for k, v in stored.items()}, folder / "model.safetensors")
    return expected


@pytest.mark.parametrize("name", CASES)
def test_packed_weights(tmp_path, name):
    """Whole, and in pieces whose edges lie within words, groups and blocks."""
    expected = write(tmp_path, name)
    checkpoint = open_checkpoint(tmp_path, read_config(tmp_path))
    (kind,) = checkpoint.packed
    assert kind.startswith(CASES[name][0]["quant_method"])
    tensors = [t for each in checkpoint.tensors.values() for t in each if t.packed]
    assert len(tensors) == 2 * 7 - 1
    for tensor in tensors:
        whole = expected[f"{tensor.name.rpartition('.')[0]}.weight"]
        assert tensor.shape == whole.shape
        rows, columns = whole.shape
        for index in (
            (slice(0, rows), slice(0, columns)),
            (slice(5, rows - 9), slice(29, 61)),
            (slice(rows - 1, rows), slice(columns - 1, columns)),
        ):
            np.testing.assert_allclose(tensor.read(index), whole[index], rtol=2e-7, atol=0)


UNPACKED = ("gptq-desc_act", "gptq-8", "w4a16-actorder")  # in no form of ours


@pytest.mark.parametrize("name", CASES)
def test_weights_that_stay_packed(tmp_path, name, caplog):
    """To the bit what they stand for; those of a row whose modules are not all packed are not."""
    expected = write(tmp_path, name)
    config = read_config(tmp_path)
    found = load_weights(tmp_path, config, dtype=jnp.float32, keep="stored")
    check_kept(found, config, expected, [] if name in UNPACKED else KEPT)
    if name in UNPACKED:
        assert "they are unpacked to float32" in caplog.text
    else:
        form = {"aw": "int4", "gp": "int4", "w4": "int4", "w8": "int8", "fp": "fp8"}[name[:2]]
        assert f"they stay so ({form}" in caplog.text
        assert "except down_proj: unpacked to float32 while loading" in caplog.text
    kept = kept_forms(tmp_path, config, "stored")
    leaves = jax.tree.leaves(found, is_leaf=is_packed)
    sizes = [x.nbytes for leaf in leaves if is_packed(leaf) for x in jax.tree.leaves(leaf)]
    rows = [row for row in matrices(config) if row.path in kept]
    assert sum(sizes) == 2 * sum(kept[r.path].bytes(r, r.inner(r.shape(config))) for r in rows)
    # And so they do in a converted folder, which takes no more on the disk.
    folder = tmp_path / "orbax"
    hf_to_orbax.convert(tmp_path, folder)
    again = load_weights(folder, read_config(folder), dtype=jnp.float32, keep="stored")
    same_bits(again, found)
    assert kept_forms(folder, config, "stored") == kept
    if rows:
        chunks = [
            path.stat().st_size
            for row in rows
            for path in (folder / "params").glob(f"{row.path}.*/*[0-9]")
        ]
        frames = 16 * len(chunks)  # of zstd, which tiny arrays feel
        assert 0.7 * sum(sizes) < sum(chunks) < 1.02 * sum(sizes) + frames


def same_bits(got, want):
    """Packed or not, the same dtypes, values and places."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (one.dtype, one.sharding) == (other.dtype, other.sharding)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("name", ["awq", "fp8", "w8a16"])
def test_weights_stay_packed_on_a_mesh(tmp_path, name):
    """Groups end where devices part: 32 inputs of 96 on two devices are 16 of 48."""
    expected = write(tmp_path, name)
    config, mesh = read_config(tmp_path), make_mesh("fsdp=2,tensor=2")
    where = parameter_shardings(config, mesh)
    found = load_weights(tmp_path, config, dtype=jnp.float32, sharding=where, keep="stored")
    check_kept(found, config, expected, KEPT)
    for row in matrices(config):
        leaf = functools.reduce(dict.__getitem__, row.path.split("."), found)
        if is_packed(leaf):
            spec = where(row.path).spec
            spec = [*spec, *[None] * (leaf.ndim - len(spec))]
            turned = [spec[0], *(spec[1 + axis] for axis in row.inner_order)]
            assert leaf.values.sharding.spec == PartitionSpec(*turned)
    hf_to_orbax.convert(tmp_path, tmp_path / "orbax")
    options = {"dtype": jnp.float32, "sharding": where, "keep": "stored"}
    same_bits(load_weights(tmp_path / "orbax", config, **options), found)


KEPT = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up")]


unpack = jax.jit(Kept.unpack, static_argnums=1)


def check_kept(found, config, expected, kept):
    """Which matrices are packed, and what all stand for."""
    for row in parameters(config):
        leaf = functools.reduce(dict.__getitem__, row.path.split("."), found)
        assert is_packed(leaf) == (row.path.split(".")[-2] in kept)
        leaf = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), leaf)  # from all devices
        ours = np.asarray(unpack(leaf, "float32") if is_packed(leaf) else leaf)
        theirs = [row.to_ours(expected[n], row.sizes(config)) for n in row.their_names(config)]
        theirs = np.stack(theirs) if row.stacked else theirs[0]
        np.testing.assert_allclose(ours, theirs, rtol=2e-7, atol=0)


def test_commands_know_what_stays_packed(tmp_path):
    """`plan` and `info`; and `--weights` that packs, or does not; an evaluation knows it again."""
    write(tmp_path, "awq")
    before = fingerprint(tmp_path)
    damage(tmp_path, {f"{Q}qweight": 1})
    assert fingerprint(tmp_path) != before
    shape = ["--device", "h200", "--context-length", "64", "--json"]
    sizes = {
        how: json.loads(invoke("plan", tmp_path, *shape, *how).stdout)["bytes"]["weights"]
        for how in ((), ("--weights", "stored"), ("--weights", "unpacked"), ("--weights", "int8"))
    }
    assert sizes[()] == sizes["--weights", "stored"] < sizes["--weights", "unpacked"] / 1.4
    assert sizes["--weights", "stored"] != sizes["--weights", "int8"]
    shown = "".join(invoke("info", tmp_path).stdout.replace("│", "").split())
    assert "inbfloat16andint4:16,int4:32(6of9matricesstaypacked;aCPUunpacksthem)" in shown


@pytest.mark.parametrize("name", ["awq", "gptq-desc_act", "fp8-ragged"])
def test_from_the_folder_to_the_devices_and_to_other_folders(tmp_path, name, caplog):
    expected = write(tmp_path / "packed", name)
    config = read_config(tmp_path / "packed")
    hf_to_orbax.convert(tmp_path / "packed", tmp_path / "orbax")
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "hf", dtype=np.dtype(np.float32))
    assert read_config(tmp_path / "orbax") == read_config(tmp_path / "hf") == config
    assert "quantization_config" not in (tmp_path / "hf" / "config.json").read_text()
    for tensor, value in read_safetensors(tmp_path / "hf").items():
        np.testing.assert_allclose(value, expected[tensor], rtol=2e-7, atol=0)
    mesh = make_mesh("fsdp=2,tensor=2")
    shardings = parameter_shardings(config, mesh)
    cut = load_weights(tmp_path / "packed", config, dtype=jnp.float32, sharding=shardings)
    assert "are packed (" in caplog.text
    assert "they are unpacked to float32 while loading" in caplog.text
    whole = load_weights(tmp_path / "hf", config, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, cut, whole)


GROUP = CASES["w4a16"][0]["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "is 'bitsandbytes', which is not supported; expected fp8",
        ),
        ({"quant_method": "mxfp4"}, "quant_method is 'mxfp4'"),
        (AWQ | {"version": "gemv"}, "version is 'gemv', which is not supported; expected gemm"),
        (AWQ | {"bits": 8}, "bits is 8"),
        (AWQ | {"group_size": 0}, "group_size is 0"),
        (GPTQ | {"bits": 3}, "bits is 3, which is not supported; expected 4 or 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (FP8, "weight_block_size is None"),
        (FP8 | {"weight_block_size": [128, 128], "fmt": "e5m2"}, "fmt is 'e5m2'"),
        (compressed("marlin-24", 4, "group", group_size=128), "format is 'marlin-24 of int4'"),
        (compressed("pack-quantized", 2, "channel"), "format is 'pack-quantized of int2'"),
        (compressed(*W4), "strategy is 'group'"),
        (compressed(*W4, group_size=32) | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (
            compressed(*W4, group_size=32) | {"config_groups": {"a": GROUP, "b": GROUP}},
            r"config_groups is \['a', 'b'\], which is not supported; expected one group",
        ),
        ({"quant_method": ["awq"]}, "quant_method must be a string"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, "must be a list of names"),
    ],
    ids=str,
)
def test_other_packings_are_refused_by_name(tmp_path, changes, message):
    config = tiny_config(**SIZES, quantization_config=changes)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        read_config(tmp_path)


Q = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("awq", {f"{Q}scales": None}, "q_proj.qweight in .* has no scales beside it"),
        (
            "awq",
            {f"{Q}scales": (2, 64)},
            r"scales .* has shape \(2, 64\); expected \(3, 64\)",
        ),
        ("awq", {f"{Q}qweight": (96, 7)}, r"expected \(3, 56\)"),
        ("gptq", {f"{Q}g_idx": (95,)}, r"g_idx .* has shape \(95,\); expected \(96,\)"),
        ("gptq", {f"{Q}qweight": (12,)}, r"is packed and has 1 axes; expected 2"),
        ("fp8", {f"{Q}weight_scale_inv": None}, "has no weight_scale_inv beside it"),
        ("fp8", {f"{Q}weight_scale_inv": (2, 1)}, r"has shape \(2, 1\); expected \(1, 1\)"),
        ("w4a16", {f"{Q}weight_shape": (3,)}, r"has shape \(3,\); expected \(2,\)"),
        ("w4a16", {f"{Q}weight_packed": (64, 9)}, r"weight_shape is \[64, 96\]; they do not fit"),
        ("fp8-channel", {f"{Q}weight": (60, 96)}, r"expected \(60, 1\) or \(60,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, name, change, message):
    write(tmp_path, name)
    damage(tmp_path, change)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path, read_config(tmp_path))


def damage(folder: Path, change: dict[str, Any]) -> None:
    """Takes tensors out, cuts them to a shape, or gives one an element."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    for name, value in change.items():
        if value is None:
            del tensors[name]
        elif isinstance(value, tuple):
            cut = tensors[name].view(torch.uint8).flatten()
            size = tensors[name].element_size()
            for axis in value:
                size *= axis
            cut = cut.repeat(-(-size // len(cut)))[:size]
            tensors[name] = cut.view(tensors[name].dtype).reshape(value)
        else:
            tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("awq", {f"{Q}scales": float("nan")}, "q_proj.qweight holds nan"),
        ("fp8", {f"{Q}weight_scale_inv": float("inf")}, "q_proj.weight holds "),
        ("fp8", {f"{Q}weight": float("nan")}, "q_proj.weight holds nan"),
        ("gptq", {f"{Q}g_idx": 99}, "g_idx in model.safetensors names group 99 of 3"),
        ("gptq", {f"{Q}g_idx": -1}, "g_idx in model.safetensors names group -1 of 3"),
    ],
)
def test_values_that_make_no_weights_are_refused(tmp_path, name, change, message):
    write(tmp_path, name)
    damage(tmp_path, change)
    for keep in (None, "stored"):
        with pytest.raises(InputError, match=message):
            load_weights(tmp_path, read_config(tmp_path), dtype=jnp.float32, keep=keep)


def test_modules_to_not_convert(tmp_path):
    """One that is packed all the same is refused; packed weights need a config that says how."""
    write(tmp_path, "awq")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = [Q.removesuffix(".")]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"q_proj is packed, and quantization_config .* says that"):
        open_checkpoint(tmp_path, read_config(tmp_path))
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"has dtype I32; expected .* config.json must say how"):
        open_checkpoint(tmp_path, read_config(tmp_path))
