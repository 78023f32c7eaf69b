"""Hugging Face -> Orbax -> Hugging Face: nothing lost, nothing half-written, restored anywhere."""

import fcntl
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conversion_helpers import (
    BFLOAT16,
    make_tiny,
    random_tensors,
    read_index,
    read_safetensors,
    tiny_config,
    write_checkpoint,
)
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file
from typer.testing import CliRunner

from checkpoints_convert import hf_to_orbax, orbax_to_hf, verify
from dca_jax.errors import InputError
from dca_jax.weights import orbax as checkpoint
from dca_jax.weights import parameters as parameters_module
from dca_jax.weights.files import is_converted, written_aside
from dca_jax.weights.folder import load_weights
from dca_jax.weights.huggingface import read_config
from dca_jax.weights.parameters import abstract_params

REPOSITORY = Path(__file__).resolve().parent.parent


def load_converted(folder, **options):
    config = read_config(folder)
    return config, load_weights(folder, config, **options)


def converted(tmp_path: Path, **options) -> tuple[Path, Path]:
    source = make_tiny(tmp_path / "source", **options)
    hf_to_orbax.convert(source, tmp_path / "orbax")
    return source, tmp_path / "orbax"


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def assert_same_bits(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert got[name].tobytes() == tensor.tobytes(), name


# There and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16, np.float32])
@pytest.mark.parametrize("piece_size", [50, 2**24])
def test_round_trip_is_bit_identical(tmp_path, monkeypatch, dtype, piece_size):
    monkeypatch.setattr(parameters_module, "PIECE_SIZE", piece_size)
    source, orbax = converted(
        tmp_path, shards=3, dtype=np.dtype(dtype), attention_bias=True, mlp_bias=True
    )
    orbax_to_hf.convert(orbax, tmp_path / "back")
    assert_same_bits(read_safetensors(tmp_path / "back"), read_safetensors(source))


QWEN_EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "mlp_only_layers": [1],
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
}


@pytest.mark.parametrize("family", [QWEN_EXPERTS, MIXTRAL], ids=["qwen3_moe", "mixtral"])
def test_experts_there_and_back(tmp_path, monkeypatch, family):
    """One tensor for each expert there, one array here; in pieces; loaded alike from both."""
    monkeypatch.setattr(parameters_module, "PIECE_SIZE", 50)
    source, orbax = converted(tmp_path, shards=3, **family)
    orbax_to_hf.convert(orbax, tmp_path / "back", shard_bytes=4000)
    assert_same_bits(read_safetensors(tmp_path / "back"), read_safetensors(source))
    config = read_config(source)
    found = [load_weights(path, config, dtype=jnp.float32) for path in (source, orbax)]
    jax.tree.map(np.testing.assert_array_equal, *found)
    up = found[0]["layers"]["experts"]["up_proj"]["kernel"]
    names = "mlp.experts.3.up_proj", "block_sparse_moe.experts.3.w3"
    theirs = read_safetensors(source)
    name = next(n for n in names if f"model.layers.2.{n}.weight" in theirs)
    np.testing.assert_array_equal(
        up[-1, 3], theirs[f"model.layers.2.{name}.weight"].T.astype(np.float32)
    )


def test_round_trip_of_a_checkpoint_with_two_dtypes(tmp_path):
    config = tiny_config()
    tensors = random_tensors(config)
    norms = {k: v.astype(np.float32) for k, v in tensors.items() if "norm" in k}
    source = write_checkpoint(tmp_path / "source", config, tensors | norms)
    hf_to_orbax.convert(source, tmp_path / "orbax")
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "back")
    assert_same_bits(read_safetensors(tmp_path / "back"), tensors | norms)


def test_tied_embeddings_come_back_under_one_name(tmp_path):
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    stored = {
        "lm_head.weight" if k == "model.embed_tokens.weight" else k: v for k, v in tensors.items()
    }
    source = write_checkpoint(tmp_path / "source", config, stored)
    hf_to_orbax.convert(source, tmp_path / "orbax")
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "back")
    assert_same_bits(read_safetensors(tmp_path / "back"), tensors)


def test_shards_of_the_way_back(tmp_path):
    _, orbax = converted(tmp_path)
    orbax_to_hf.convert(orbax, tmp_path / "back", shard_bytes=2000)
    index = read_index(tmp_path / "back")
    files = sorted(set(index.values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert {path.name for path in (tmp_path / "back").glob("*.safetensors")} == set(files)
    for file in files:
        header = int.from_bytes((tmp_path / "back" / file).read_bytes()[:8], "little")
        assert (tmp_path / "back" / file).stat().st_size - 8 - header <= 2000
    config = read_config(orbax)
    assert_same(
        load_weights(tmp_path / "back", config, dtype=jnp.bfloat16),
        load_converted(orbax)[1],
    )


def test_transformers_reads_what_comes_back(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source, orbax = converted(tmp_path, dtype=np.dtype(np.float32))
    orbax_to_hf.convert(orbax, tmp_path / "back", shard_bytes=5000)
    tokens = torch.arange(10)[None]
    theirs, ours = (
        transformers.AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        for folder in (source, tmp_path / "back")
    )
    assert torch.equal(theirs, ours)


def test_what_stands_beside_the_weights(tmp_path):
    source, orbax = converted(tmp_path, shards=2)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (orbax / name).read_bytes() == (source / name).read_bytes()
    provenance = json.loads((orbax / "provenance.json").read_text())
    assert provenance["source"] == "source"
    assert str(tmp_path) not in (orbax / "provenance.json").read_text()
    assert provenance["dtype"] == ["bfloat16"]
    assert provenance["files"].keys() == {
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    for name, facts in provenance["files"].items():
        assert facts["bytes"] == (source / name).stat().st_size
        assert len(facts["sha256"]) == 64


def test_a_companion_that_is_a_link_out_of_its_folder(tmp_path):
    source = make_tiny(tmp_path / "source")
    (source / "tokenizer.json").rename(tmp_path / "secret")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"tokenizer\.json is a link that leads out of its folder"):
        hf_to_orbax.convert(source, tmp_path / "orbax")
    assert_only(tmp_path, "source", "secret")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_another_dtype_on_the_way(tmp_path, dtype):
    source = make_tiny(tmp_path / "source", torch_dtype="bfloat16")
    hf_to_orbax.convert(source, tmp_path / "there", dtype=jnp.dtype(dtype))
    hf_to_orbax.convert(source, tmp_path / "keep")
    orbax_to_hf.convert(tmp_path / "there", tmp_path / "there and back")
    orbax_to_hf.convert(tmp_path / "keep", tmp_path / "back", dtype=jnp.dtype(dtype))
    expected = {k: v.astype(jnp.dtype(dtype)) for k, v in read_safetensors(source).items()}
    for folder in ("there and back", "back"):
        assert_same_bits(read_safetensors(tmp_path / folder), expected)
        # transformers would convert the weights to what config.json says
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config == tiny_config(torch_dtype=jnp.dtype(dtype).name)


# Orbax -----------------------------------------------------------------------------------------


def shardings(config):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))

    def sharding(path):
        row = next(row for row in parameters_module.TABLE if row.path == path)
        sizes = row.shape(config)
        spec = [None] * len(sizes)
        for axis in range(row.stacked, len(sizes)):
            for name in ("tensor", "fsdp"):
                if spec[axis] is None and name not in spec and sizes[axis] % mesh.shape[name] == 0:
                    spec[axis] = name
        return NamedSharding(mesh, PartitionSpec(*spec))

    return sharding


def test_plain_orbax_restores_it_onto_a_mesh(tmp_path, monkeypatch):
    monkeypatch.setattr(parameters_module, "PIECE_SIZE", 150)
    source, orbax = converted(tmp_path, shards=2)
    config = read_config(source)
    like = abstract_params(config, dtype=jnp.bfloat16, sharding=shardings(config))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(orbax / "params", like)
    assert_same(restored, load_weights(source, config, dtype=jnp.bfloat16))
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert leaf.sharding == wanted.sharding
    kernel = restored["layers"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "tensor", "fsdp", None)
    assert kernel.addressable_shards[0].data.shape == (3, 3, 2, 6)


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_load_converted(tmp_path, dtype):
    source, orbax = converted(tmp_path)
    config = read_config(source)
    expected = load_weights(source, config, dtype=dtype or jnp.bfloat16)
    found_config, params = load_converted(orbax, dtype=dtype)
    assert found_config == config
    assert_same(params, expected)
    _, spread = load_converted(orbax, dtype=dtype, sharding=shardings(config))
    assert_same(spread, expected)
    assert len(spread["embed_tokens"]["embedding"].sharding.device_set) == 8
    assert is_converted(orbax)
    assert not is_converted(source)


def test_save_restore_and_export_of_arrays(tmp_path):
    """A tree in memory, sharded, goes out in the same format and so back to Hugging Face."""
    source = make_tiny(tmp_path / "source")
    config = read_config(source)
    params = load_weights(source, config, dtype=jnp.bfloat16, sharding=shardings(config))
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    checkpoint.save(folder / "params", params)
    on_one_device = abstract_params(config, dtype=jnp.bfloat16)
    assert_same(checkpoint.restore(folder / "params", on_one_device), params)
    orbax_to_hf.convert(folder, tmp_path / "back")
    assert_same_bits(read_safetensors(tmp_path / "back"), read_safetensors(source))
    with pytest.raises(InputError, match="exists already"):
        checkpoint.save(folder / "params", params)


def test_export_of_what_plain_orbax_saved(tmp_path):
    source, orbax = converted(tmp_path)
    _, params = load_converted(orbax)
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", params)
    orbax_to_hf.convert(folder, tmp_path / "back")
    assert_same_bits(read_safetensors(tmp_path / "back"), read_safetensors(source))


def test_interrupted_save_leaves_nothing_that_looks_whole(tmp_path):
    def pieces():
        yield {"values": ((slice(0, 1), slice(0, 4)), np.ones((1, 4), np.float32))}
        raise InputError("in the middle")

    broken = checkpoint.StreamedArray(
        shape=(2, 4), dtype=np.dtype(np.float32), chunks=(1, 4), pieces=pieces
    )
    with pytest.raises(InputError, match="in the middle"):
        checkpoint.save(tmp_path / "params", {"a": jnp.ones(3, jnp.float32), "b": broken})
    assert not (tmp_path / "params").exists()
    checkpoint.save(tmp_path / "params", {"a": jnp.ones(3, jnp.float32)})
    assert [path.name for path in tmp_path.iterdir()] == ["params"]


def test_restore_of_another_model(tmp_path):
    _, orbax = converted(tmp_path)
    for changes, message in (
        ({"vocab_size": 25}, r"has shape \(24, 12\), expected \(25, 12\)"),
        ({"mlp_bias": True}, r"layers\.mlp\.down_proj\.bias is missing from"),
        ({"tie_word_embeddings": True}, r"lm_head\.kernel is not expected in"),
    ):
        (orbax / "config.json").write_text(json.dumps(tiny_config(**changes)))
        with pytest.raises(InputError, match=message):
            load_converted(orbax)
        with pytest.raises(InputError, match=message):
            orbax_to_hf.convert(orbax, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "damage", ["missing chunk", "noise", "no list", "bad list", "no array", "bad description"]
)
def test_damaged_orbax_checkpoint(tmp_path, damage):
    _, orbax = converted(tmp_path)
    array = orbax / "params" / "layers.mlp.up_proj.kernel"
    if damage == "missing chunk":
        (array / "1.0.0").unlink()
    elif damage == "noise":
        (array / "1.0.0").write_bytes(b"noise")
    elif damage == "no list":
        (orbax / "params" / "_METADATA").unlink()
    elif damage == "bad list":
        (orbax / "params" / "_METADATA").write_text("{}")
    elif damage == "no array":
        shutil.rmtree(array)
    else:
        (array / ".zarray").write_text("{")
    message = {
        "no list": "is not an Orbax checkpoint",
        "bad list": "is damaged",
        "bad description": r"mlp\.up_proj\.kernel/\.zarray is not JSON",
    }.get(damage, r"is damaged \(.*mlp\.up_proj\.kernel")
    with pytest.raises(InputError, match=message):
        load_converted(orbax)
    with pytest.raises(InputError, match=message):
        orbax_to_hf.convert(orbax, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_restore_of_a_damaged_checkpoint(tmp_path):
    """Through Orbax itself, which leaves the reads of the other arrays unfinished behind it."""
    checkpoint.save(tmp_path / "params", {"a": jnp.ones((2, 3, 4), jnp.float32)})
    (tmp_path / "params" / "a" / "1.0.0").unlink()
    like = {"a": jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)}
    with pytest.raises(InputError, match=r"is damaged \(NOT_FOUND: .* is missing\)"):
        checkpoint.restore(tmp_path / "params", like)
    gc.collect()


def test_weights_that_are_not_finite_in_orbax(tmp_path):
    source, orbax = converted(tmp_path)
    config = read_config(source)
    params = load_weights(source, config, dtype=jnp.float32)
    params["norm"]["scale"] = params["norm"]["scale"].at[3].set(jnp.nan)
    shutil.rmtree(orbax / "params")
    checkpoint.save(orbax / "params", params)
    with pytest.raises(InputError, match=r"norm\.scale holds nan, and weights must be finite"):
        load_converted(orbax)


def test_orbax_checkpoint_that_names_an_array_outside_its_folder(tmp_path):
    _, orbax = converted(tmp_path)
    listing = (orbax / "params" / "_METADATA").read_text()
    (orbax / "params" / "_METADATA").write_text(listing.replace('"scale"', '"/../../../x"'))
    with pytest.raises(InputError, match="names an array outside its folder"):
        load_converted(orbax)


# Interruptions ---------------------------------------------------------------------------------


def assert_only(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_a_nan_in_the_last_shard_leaves_nothing(tmp_path):
    config = tiny_config()
    tensors = random_tensors(config)
    source = write_checkpoint(tmp_path / "source", config, tensors, shards=2)
    tensors["lm_head.weight"][-1, -1] = np.nan  # the last weight of the last parameter
    broken = write_checkpoint(tmp_path / "broken", config, tensors, shards=2)
    with pytest.raises(InputError, match=r"lm_head\.weight holds nan"):
        hf_to_orbax.convert(broken, tmp_path / "orbax")
    assert_only(tmp_path, "source", "broken")
    hf_to_orbax.convert(source, tmp_path / "orbax")
    assert_only(tmp_path, "source", "broken", "orbax")


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from checkpoints_convert import hf_to_orbax, orbax_to_hf
    from dca_jax.weights import huggingface, orbax

    module, owner, name, source, destination = sys.argv[1:]
    owner = {"Checkpoint": huggingface.Checkpoint, "orbax": orbax}[owner]
    original, calls = getattr(owner, name), []

    def then_die(*args, **kwargs):
        calls.append(1)
        if len(calls) == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, then_die)
    {"hf_to_orbax": hf_to_orbax, "orbax_to_hf": orbax_to_hf}[module].convert(
        Path(source), Path(destination)
    )
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [("hf_to_orbax", "Checkpoint", "read"), ("orbax_to_hf", "orbax", "read_piece")],
)
def test_a_killed_conversion_leaves_nothing_whole(tmp_path, module, owner, name):
    source, orbax = converted(tmp_path)
    convert, origin = (
        (hf_to_orbax.convert, source) if module == "hf_to_orbax" else (orbax_to_hf.convert, orbax)
    )
    destination = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), module, owner, name, origin, destination],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert_only(tmp_path, "source", "orbax", ".out.partial")
    assert any((tmp_path / ".out.partial").iterdir())
    convert(origin, destination)
    assert_only(tmp_path, "source", "orbax", "out")
    expected = origin if module == "orbax_to_hf" else orbax
    if module == "hf_to_orbax":
        got = load_converted(destination)[1]
    else:
        got = load_weights(destination, read_config(destination), dtype=jnp.bfloat16)
    assert_same(got, load_converted(expected)[1])


def test_two_writers_of_one_destination(tmp_path):
    source = make_tiny(tmp_path / "source")
    other = tmp_path / ".out.partial"
    other.mkdir()
    (other / "theirs").touch()
    lock = os.open(other, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another process is writing"):
        hf_to_orbax.convert(source, tmp_path / "out")
    assert (other / "theirs").exists()
    os.close(lock)
    hf_to_orbax.convert(source, tmp_path / "out")
    assert_only(tmp_path, "source", "out")


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path):
    destination = tmp_path / "out"

    def write():
        with written_aside(destination) as aside:
            (aside / "ours").touch()
            destination.mkdir()

    with pytest.raises(InputError, match="exists already"):
        write()
    assert_only(tmp_path, "out")
    assert_only(destination)


# The commands ----------------------------------------------------------------------------------


def command(app, *args) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr


def test_commands_there_and_back(tmp_path):
    source = make_tiny(tmp_path / "source")
    code, out, err = command(hf_to_orbax.app, source, tmp_path / "orbax", "--dtype", "float32")
    assert (code, "wrote" in out) == (0, True), err
    back = (orbax_to_hf.app, tmp_path / "orbax", tmp_path / "back", "--shard-size", "4KB")
    assert command(*back)[0] == 0
    assert len(set(read_index(tmp_path / "back").values())) > 1
    got = read_safetensors(tmp_path / "back")
    assert_same_bits(got, {k: v.astype(np.float32) for k, v in read_safetensors(source).items()})


def test_bad_input_is_one_message_and_exit_code_2(tmp_path):
    source = make_tiny(tmp_path / "source")
    code, out, err = command(hf_to_orbax.app, source, source)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "exists already; remove it or choose another name" in err
    assert err.count("\n") == 1
    code, _, err = command(orbax_to_hf.app, source, tmp_path / "out")
    assert (code, "is not an Orbax checkpoint" in err) == (2, True)
    code, _, err = command(orbax_to_hf.app, source, tmp_path / "out", "--shard-size", "big")
    assert (code, "'big' is not understood; expected for example 5GB" in err) == (2, True)
    code, _, err = command(hf_to_orbax.app, source, tmp_path / "no" / "such" / "folder")
    assert (code, "is not a folder; create it first" in err) == (2, True)
    assert_only(tmp_path, "source")


def test_the_module_as_a_process(tmp_path):
    folder = make_tiny(tmp_path / "source")
    save_file({"a": np.ones(3, np.int32)}, folder / "model.safetensors")
    run = subprocess.run(
        [sys.executable, "-m", "checkpoints_convert.hf_to_orbax", folder, tmp_path / "out"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: tensor a in model.safetensors has dtype I32; expected")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("module", [hf_to_orbax, orbax_to_hf, verify])
def test_help_teaches(module):
    code, out, _ = command(module.app, "--help")
    assert code == 0
    assert "Example: python -m checkpoints_convert." in out


def test_float64_needs_a_choice(tmp_path):
    source = make_tiny(tmp_path / "source", dtype=np.dtype(np.float64))
    with pytest.raises(InputError, match=r"stored as float64; choose --dtype float32"):
        hf_to_orbax.convert(source, tmp_path / "out")
    hf_to_orbax.convert(source, tmp_path / "out", dtype=np.dtype(np.float32))


# verify ----------------------------------------------------------------------------------------


def transformers_model(folder: Path, family: str = "Llama") -> Path:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,  # logits that are far from uniform
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
def test_verify_agrees_with_transformers(tmp_path, family):
    source = transformers_model(tmp_path / "source", family)
    hf_to_orbax.convert(source, tmp_path / "orbax")
    result = verify.compare(source, tmp_path / "orbax")
    assert result.max_difference < 1e-3
    assert 0 <= abs(result.kl) < 1e-9
    assert result.top1_agreement == 1.0


def test_verify_finds_a_wrong_weight(tmp_path):
    source = transformers_model(tmp_path / "source")
    hf_to_orbax.convert(source, tmp_path / "right")
    hf_to_orbax.convert(source, tmp_path / "rounded", dtype=jnp.dtype(jnp.bfloat16))
    _, params = load_converted(tmp_path / "right")
    flat = flatten_dict(params)
    kernel = flat["layers", "self_attn", "q_proj", "kernel"]
    flat["layers", "self_attn", "q_proj", "kernel"] = kernel[:, :, ::-1]
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "config.json").write_bytes((source / "config.json").read_bytes())
    checkpoint.save(wrong / "params", jax.tree.map(jnp.asarray, _nested(flat)))
    code, out, _ = command(verify.app, source, tmp_path / "right")
    assert (code, "100.0%" in out) == (0, True)
    rounded = verify.compare(source, tmp_path / "rounded")
    assert 1e-9 < rounded.kl < 1e-2
    code, out, _ = command(verify.app, source, wrong)
    assert (code, "the models differ" in out) == (1, True)


def _nested(flat):
    from flax.traverse_util import unflatten_dict

    return unflatten_dict(flat)


def test_verify_of_another_model(tmp_path):
    source, orbax = converted(tmp_path)
    (source / "config.json").write_text(json.dumps(tiny_config(rope_theta=5e5)))
    code, _, err = command(verify.app, source, orbax)
    assert (code, "are of different models" in err) == (2, True)


def test_verify_without_pytorch(tmp_path, monkeypatch):
    source, orbax = converted(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = command(verify.app, source, orbax)
    assert (code, "which is not installed; install torch" in err) == (2, True)
