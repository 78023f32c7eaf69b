"""Converted folders whose matrices are packed: packed on the way, read anywhere, refused if bad."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conversion_helpers import make_tiny, read_safetensors
from flax.traverse_util import flatten_dict
from shared_fixtures import invoke
from test_conversion import QWEN_EXPERTS
from test_packed_weights import by_hand
from test_quantized import same_bits

from checkpoints_convert import hf_to_orbax, orbax_to_hf
from dca_jax.config import LlamaConfig
from dca_jax.errors import InputError
from dca_jax.products.packed import is_packed, packed_forms
from dca_jax.sharding import make_mesh
from dca_jax.weights import orbax_packed
from dca_jax.weights.folder import load_weights
from dca_jax.weights.huggingface import read_config
from dca_jax.weights.packer import matrices, packer
from dca_jax.weights.parameters import parameters
from dca_jax.weights.placement import parameter_shardings

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "head_dim": 16,
    "num_hidden_layers": 2,
}
Q = "layers.self_attn.q_proj.kernel"  # [2, 64, 96] there


def stand_for(params: Any, want: Any, config: LlamaConfig) -> None:
    """Packed matrices stand for these arrays, by NumPy in float64; the others are the same."""
    got, want = (flatten_dict(tree, sep=".") for tree in (params, want))
    for row in parameters(config):
        leaf = got[row.path]
        leaf = by_hand(leaf, row) if is_packed(leaf) else np.asarray(leaf)
        np.testing.assert_allclose(leaf, want[row.path], rtol=2e-7, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "family"), [("int4", QWEN_EXPERTS), ("int8", {}), ("fp8", {})])
def test_a_checkpoint_is_packed_into_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, family: dict[str, Any]
) -> None:
    """To the bit as on loading, but in pieces; on a mesh it stands for the same weights."""
    monkeypatch.setattr(orbax_packed, "PIECE_SIZE", 40 * 96)
    more: dict[str, Any] = {"moe_intermediate_size": 32} if family else {}
    source = make_tiny(tmp_path / "hf", **(SIZES | family | more))
    config = read_config(source)
    hf_to_orbax.convert(source, tmp_path / "orbax", weights=form)
    options: dict[str, Any] = {"dtype": jnp.float32}
    packing = packer(matrices(config), form)
    want = load_weights(source, config, then=packing, **options)
    got = load_weights(tmp_path / "orbax", config, keep="stored", **options)
    same_bits(got, want)
    # What asks for just this form packs nothing again; and none need stay packed.
    same_bits(load_weights(tmp_path / "orbax", config, keep=form, then=packing, **options), want)
    plain = load_weights(tmp_path / "orbax", config, **options)
    assert packed_forms(plain) == ""
    stand_for(want, plain, config)
    where = parameter_shardings(config, make_mesh("fsdp=2,tensor=2"))
    cut = load_weights(tmp_path / "orbax", config, keep="stored", sharding=where, **options)
    assert packed_forms(cut) != ""
    stand_for(cut, plain, config)


def test_there_and_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the commands; a line says what is unpacked, and into what."""
    source, folder = make_tiny(tmp_path / "hf", **SIZES), tmp_path / "orbax"
    done = invoke("convert", source, folder, "--weights", "int4")
    assert done.exit_code == 0, done.stderr
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["dtype"] == ["bfloat16", "int4:16", "int4:32"]
    shown = " ".join(invoke("info", folder).stdout.replace("│", "").split())
    assert "(Orbax, int4:16, int4:32)" in shown
    assert "(9 of 9 matrices stay packed; a CPU unpacks them)" in shown
    plan = ["--device", "h200", "--context-length", "64", "--json"]
    size = {
        path: json.loads(invoke("plan", path, *plan, *how).stdout)["bytes"]["weights"]
        for path, how in ((folder, ()), (source, ("--weights", "int4")))
    }
    assert size[folder] == size[source]

    config, back = read_config(folder), tmp_path / "back"
    assert config == read_config(source)
    assert invoke("convert", folder, back).exit_code == 0
    assert "packed (int4:16, int4:32); they are unpacked to bfloat16 while" in caplog.text
    assert "quantization_config" not in (back / "config.json").read_text()
    tensors = read_safetensors(back)
    assert {value.dtype for value in tensors.values()} == {jnp.dtype(jnp.bfloat16)}
    want = load_weights(folder, config, dtype=jnp.bfloat16)
    same_bits(load_weights(back, config, dtype=jnp.bfloat16), want)
    refused = invoke("convert", folder, tmp_path / "no", "--weights", "int8")
    assert refused.exit_code == 2
    assert (
        "converting it back to Hugging Face format writes unquantized weights; omit --weights int8"
        in refused.stderr
    )


def test_a_packed_folder_can_be_unpacked_on_the_way(tmp_path: Path) -> None:
    source = make_tiny(tmp_path / "hf", **SIZES)
    hf_to_orbax.convert(source, tmp_path / "plain", weights="unpacked")
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()
    with pytest.raises(InputError, match=r"weights must be one of int8, int4, .*, got 'int3'"):
        hf_to_orbax.convert(source, tmp_path / "no", weights="int3")
    assert not (tmp_path / "no").exists()


# --- bad ones -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    hf_to_orbax.convert(make_tiny(root / "hf", **SIZES), root / "orbax", weights="int4:32")
    return root / "orbax"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "orbax"))


def refused(folder: Path, message: str) -> None:
    """On loading and on the way back, with one sentence."""

    def load() -> None:
        load_weights(folder, read_config(folder), dtype=jnp.float32, keep="stored")

    def back() -> None:
        orbax_to_hf.convert(folder, folder.parent / "back")

    for read in (load, back):
        with pytest.raises(InputError, match=message) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
    assert not (folder.parent / "back").exists()


def at(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets a value, or takes it out where it is ..."""

    def change(found: dict[str, Any]) -> None:
        for key in keys[:-1]:
            found = found[key]
        if value is ...:
            del found[keys[-1]]
        else:
            found[keys[-1]] = value

    return change


DESCRIPTIONS = {
    "newer": (at("version", value=2), "version is 2, and this dca_jax reads 1; install a newer"),
    "no version": (at("version", value=...), "version is None, and this dca_jax reads 1"),
    "true": (at("version", value=True), "version must be an integer from 1"),
    "method": (at("quant_method", value="awq"), "quant_method is 'awq', and a converted folder's"),
    "list": (at("matrices", value=[Q]), "matrices must be an object"),
    "form": (
        at("matrices", Q, "form", value="int2"),
        "form is 'int2', which is not supported; .*new",
    ),
    "other form": (at("matrices", Q, "form", value="int8"), r"\.zero is not expected in"),
    "float8": (at("matrices", Q, "form", value="fp8"), r"\.zero is not expected in"),
    "text": (at("matrices", Q, value="int4"), f"{Q} must be an object, got 'int4'"),
    "tile": (at("matrices", Q, "tile", value=[1, 0]), "tile must be two sizes, or null for all"),
    "one size": (at("matrices", Q, "tile", value=[1]), "tile must be two sizes"),
    "vast": (at("matrices", Q, "tile", value=[1, 10**300]), "tile must be two sizes"),
    "other tile": (
        at("matrices", Q, "tile", value=[1, 16]),
        r"scale .* has shape \(2, 64, 3\), ex",
    ),
    "whole": (at("matrices", Q, "tile", value=[1, None]), r"has shape \(2, 64, 3\), expected"),
    "scale": (at("matrices", Q, "scale", value="float64"), "scale is 'float64'; expected one of"),
    "no scale": (at("matrices", Q, "scale", value=...), "scale is ''; expected one of"),
    "other scale": (
        at("matrices", Q, "scale", value="float16"),
        "has dtype bfloat16; .* with floa",
    ),
    "offset": (at("matrices", Q, "offset", value="float16"), r"\.offset is missing from"),
    "key": (at("matrices", Q, "act_order", value=True), "act_order is not known; expected form"),
    "plain": (at("matrices", Q, value=...), r"q_proj\.kernel is missing from|is not expected in"),
    "norm": (
        at("matrices", "norm.scale", value={"form": "int8", "tile": [1, 1], "scale": "float32"}),
        "says that norm.scale is packed in .*, but this model has no such matrix",
    ),
    "no model": (
        at("matrices", "x" * 1000, value={"form": "int8", "tile": [1, 1], "scale": "float32"}),
        "but this model has no such matrix",
    ),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions_that_are_refused(folder: Path, name: str) -> None:
    change, message = DESCRIPTIONS[name]
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, message)


def test_a_description_that_is_not_there(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, r"parameter embed_tokens\.embedding is missing from")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scale", {"dtype": "<f4"}, "has dtype float32; config.json says .* with bfloat16"),
        ("scale", {"shape": [2, 64, 4]}, r"has shape \(2, 64, 4\), expected \(2, 64, 3\)"),
        ("values", {"shape": [2, 64, 49]}, r"has shape \(2, 64, 49\), expected \(2, 64, 48\)"),
        ("values", {"dtype": "|i1"}, "has dtype int8; config.json says .* with uint8"),
        ("values", {"chunks": [2**40, 64, 48]}, "are larger than the array"),
    ],
)
def test_arrays_that_are_refused(
    folder: Path, part: str, change: dict[str, Any], message: str
) -> None:
    file = folder / "params" / f"{Q}.{part}" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(folder, message)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("scale", float("nan"), "q_proj.weight holds nan"),
        ("scale", float("inf"), "q_proj.weight holds (nan|inf|-inf)"),
        ("zero", 16, r"q_proj\.kernel\.zero in .* contains 16, but int4 allows at most 15"),
        ("values", None, "is damaged"),
        ("zero", ..., "is damaged"),
    ],
)
def test_damaged_data(folder: Path, part: str, value: Any, message: str) -> None:
    """A value of another kind, a chunk that is cut short, and one that is gone."""
    array = folder / "params" / f"{Q}.{part}"
    chunk = next(iter(sorted(array.glob("*[0-9]"))))
    if value is ...:
        chunk.unlink()
    elif value is None:
        chunk.write_bytes(chunk.read_bytes()[:-9])
    else:
        import tensorstore

        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{array}/"}}
        store = tensorstore.open(spec, open=True).result()
        store[0, 3, 1].write(np.array(value, store.dtype.numpy_dtype)).result()
    refused(folder, message)


def test_scales_that_are_not_finite_are_not_converted(tmp_path: Path) -> None:
    from test_quantized import Q as MODULE
    from test_quantized import damage, write

    write(tmp_path / "hf", "awq")
    damage(tmp_path / "hf", {f"{MODULE}scales": float("nan")})
    with pytest.raises(InputError, match=r"q_proj\.qweight holds nan"):
        hf_to_orbax.convert(tmp_path / "hf", tmp_path / "orbax")
    assert not (tmp_path / "orbax").exists()
