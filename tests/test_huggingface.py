"""Reading Hugging Face folders: every name and layout right, and every broken folder refused."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion_helpers import (
    BFLOAT16,
    make_tiny,
    random_tensors,
    read_index,
    read_safetensors,
    tiny_config,
    write_checkpoint,
    write_index,
)
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from dca_jax.config import LlamaConfig, axis_sizes
from dca_jax.errors import InputError
from dca_jax.weights import parameters as parameters_module
from dca_jax.weights.folder import load_weights
from dca_jax.weights.huggingface import open_checkpoint, read_config
from dca_jax.weights.parameters import TABLE, parameters, pieces

FAMILIES = {
    "llama": tiny_config(),
    "llama biased": tiny_config(attention_bias=True, mlp_bias=True),
    "mistral": tiny_config(architectures=["MistralForCausalLM"], model_type="mistral"),
    "qwen2": tiny_config(architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
    "qwen3": tiny_config(architectures=["Qwen3ForCausalLM"], model_type="qwen3"),
    "tied": tiny_config(tie_word_embeddings=True),
}


def load(folder: Path, **options):
    return load_weights(folder, read_config(folder), **({"dtype": jnp.float32} | options))


def expected_params(config: dict, tensors: dict[str, np.ndarray]) -> dict:
    """The tree, spelled out by hand."""
    D, H = config["hidden_size"], config["head_dim"]
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}

    def stack(name, *shape):
        layers = [tensors[f"model.layers.{i}.{name}"].T for i in range(config["num_hidden_layers"])]
        return np.stack([layer.reshape(shape or layer.shape) for layer in layers])

    def linear(name, *shape, bias=()):
        leaf = {"kernel": stack(f"{name}.weight", *shape)}
        if f"model.layers.0.{name}.bias" in tensors:
            leaf["bias"] = stack(f"{name}.bias", *bias)
        return leaf

    norms = {}
    if config["model_type"] == "qwen3":
        norms = {n: {"scale": stack(f"self_attn.{n}.weight")} for n in ("q_norm", "k_norm")}
    tree = {
        "embed_tokens": {"embedding": tensors["model.embed_tokens.weight"]},
        "layers": {
            "input_layernorm": {"scale": stack("input_layernorm.weight")},
            "post_attention_layernorm": {"scale": stack("post_attention_layernorm.weight")},
            "self_attn": {
                "q_proj": linear("self_attn.q_proj", D, 4, H, bias=(4, H)),
                "k_proj": linear("self_attn.k_proj", D, 2, H, bias=(2, H)),
                "v_proj": linear("self_attn.v_proj", D, 2, H, bias=(2, H)),
                "o_proj": linear("self_attn.o_proj", 4, H, D),
                **norms,
            },
            "mlp": {n: linear(f"mlp.{n}") for n in ("gate_proj", "up_proj", "down_proj")},
        },
        "norm": {"scale": tensors["model.norm.weight"]},
    }
    if not config["tie_word_embeddings"]:
        tree["lm_head"] = {"kernel": tensors["lm_head.weight"].T}
    return tree


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_where_it_belongs(tmp_path, family):
    config = FAMILIES[family]
    tensors = random_tensors(config)
    write_checkpoint(tmp_path, config, tensors)
    assert_same(load(tmp_path), expected_params(config, tensors))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_transformers(family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    raw = dict(FAMILIES[family])
    hf_config = transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf_config)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    config = LlamaConfig.from_hf(raw)
    ours = {
        name: row.their_shape(config)
        for row in parameters(config)
        for name in row.their_names(config)
    }
    assert ours == theirs


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.path} {row.when}")
def test_the_mapping_and_its_inverse(row):
    mixture = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
    raw = tiny_config(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", **mixture)
    config = LlamaConfig.from_hf(raw)
    theirs = np.arange(np.prod(row.their_shape(config))).reshape(row.their_shape(config))
    ours = row.to_ours(theirs, axis_sizes(config))
    assert ours.shape == row.shape(config)[row.leading :]
    np.testing.assert_array_equal(row.to_theirs(ours), theirs)


@pytest.mark.parametrize("shards", [2, 5])
@pytest.mark.parametrize("piece_size", [1, 50, 350])
def test_shards_and_small_pieces(tmp_path, monkeypatch, shards, piece_size):
    """However the checkpoint is cut, in files or in reading, the result is the same."""
    monkeypatch.setattr(parameters_module, "PIECE_SIZE", piece_size)
    folder = make_tiny(tmp_path, shards=shards)
    assert_same(load(folder), expected_params(tiny_config(), read_safetensors(folder)))


def test_pieces_cover_a_part_once(monkeypatch):
    monkeypatch.setattr(parameters_module, "PIECE_SIZE", 50)
    config = LlamaConfig.from_hf(tiny_config())
    for row in parameters(config):
        shape = row.shape(config)
        part = tuple(slice(size // 3, size) for size in shape)
        count = np.zeros(shape, np.int32)
        for index in pieces(row, config, part):
            count[index] += 1
        expected = np.zeros(shape, np.int32)
        expected[part] = 1
        np.testing.assert_array_equal(count, expected)


def test_onto_a_mesh(tmp_path):
    """Each of 8 devices gets its own part, replicas included, inside `jax.set_mesh` and outside."""
    folder = make_tiny(tmp_path, shards=2)
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "tensor", "data"))
    specs = {
        "embed_tokens.embedding": PartitionSpec("tensor", "fsdp"),
        "layers.self_attn.q_proj.kernel": PartitionSpec(None, "fsdp", "tensor"),
        "layers.self_attn.k_proj.kernel": PartitionSpec(None, "fsdp", None, "tensor"),
        "layers.self_attn.o_proj.kernel": PartitionSpec(None, "tensor", "data", "fsdp"),
        "layers.mlp.down_proj.kernel": PartitionSpec(None, ("fsdp", "tensor"), "data"),
        "lm_head.kernel": PartitionSpec("fsdp", "tensor"),
    }

    def sharding(path):
        return NamedSharding(mesh, specs.get(path, PartitionSpec()))

    expected = expected_params(tiny_config(), read_safetensors(folder))
    outside = load(folder, sharding=sharding)
    with jax.set_mesh(mesh):
        inside = load(folder, sharding=sharding)
    for params in (outside, inside):
        assert_same(jax.device_get(params), expected)
        q_proj = params["layers"]["self_attn"]["q_proj"]["kernel"]
        assert q_proj.sharding == sharding("layers.self_attn.q_proj.kernel")
        assert q_proj.addressable_shards[0].data.shape == (3, 6, 2, 6)


@pytest.mark.parametrize("stored", [BFLOAT16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("wanted", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes(tmp_path, stored, wanted):
    folder = make_tiny(tmp_path, dtype=np.dtype(stored))
    embedding = load(folder, dtype=wanted)["embed_tokens"]["embedding"]
    assert embedding.dtype == wanted
    expected = read_safetensors(folder)["model.embed_tokens.weight"].astype(jnp.dtype(wanted))
    np.testing.assert_array_equal(embedding, expected)


@pytest.mark.parametrize("names", ["model.embed_tokens", "lm_head", "model.embed_tokens lm_head"])
def test_tied_embeddings_under_either_name(tmp_path, names):
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    table = tensors.pop("model.embed_tokens.weight")
    write_checkpoint(
        tmp_path, config, tensors | {f"{name}.weight": table for name in names.split()}
    )
    params = load(tmp_path)
    assert "lm_head" not in params
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], table.astype(np.float32))


def test_tied_embeddings_that_differ(tmp_path):
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    write_checkpoint(tmp_path, config, tensors | {"lm_head.weight": head})
    with pytest.raises(InputError, match=r"ties the embeddings.*differ"):
        load(tmp_path)


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path):
    config = tiny_config()
    tensors = random_tensors(config)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    write_checkpoint(tmp_path, config, tensors | buffer)
    assert_same(load(tmp_path), expected_params(config, tensors))


def test_a_snapshot_of_the_hugging_face_cache(tmp_path):
    """There every file is a link into `blobs`, and that is as it should be."""
    original = make_tiny(tmp_path / "original", shards=2)
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(original.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert_same(load(snapshot), load(original))


def test_progress_adds_up(tmp_path):
    seen: list[tuple[str, int]] = []
    params = load(make_tiny(tmp_path), progress=lambda path, size: seen.append((path, size)))
    assert sum(size for _, size in seen) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert "layers.mlp.up_proj.kernel" in dict(seen)


# What is refused -------------------------------------------------------------------------------


def refused(folder: Path, message: str) -> None:
    """Opening the checkpoint fails before a weight is read."""
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder, read_config(folder))


def rewrite(folder: Path, change) -> None:
    tensors = read_safetensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_tensor(tmp_path):
    folder = make_tiny(tmp_path)
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, r"1 tensors are missing \(model\.layers\.1\.mlp\.up_proj\.weight\)")


def test_extra_tensor(tmp_path):
    folder = make_tiny(tmp_path)
    rewrite(folder, lambda tensors: tensors.update({"adapter.weight": np.ones(3, np.float32)}))
    refused(folder, r"1 have no place in it \(adapter\.weight\)")


def test_weights_of_a_deeper_model(tmp_path):
    folder = make_tiny(tmp_path)
    config = tiny_config(num_hidden_layers=2)
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, r"9 have no place in it \(.*model\.layers\.2\..* and 4 more\)")


def test_wrong_shape(tmp_path):
    folder = make_tiny(tmp_path)
    name = "model.layers.2.self_attn.k_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: np.ones((12, 24), np.float32)}))
    refused(folder, rf"{name}.* has shape \(12, 24\); config\.json asks for \(12, 12\)")


def test_truncated_file(tmp_path):
    folder = make_tiny(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, r"model\.safetensors is truncated or corrupt")


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"\xff" * 64, (16).to_bytes(8, "little") + b'{"a": nonsense}}' + bytes(64)],
    ids=["empty", "short", "noise", "not JSON"],
)
def test_corrupt_header(tmp_path, content):
    folder = make_tiny(tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, r"model\.safetensors is truncated or corrupt")


def test_truncated_shard(tmp_path):
    folder = make_tiny(tmp_path, shards=3)
    file = folder / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(folder, r"00003-of-00003\.safetensors is truncated or corrupt")


@pytest.mark.parametrize("where", ["../elsewhere.safetensors", "absolute", "..", "a/b.safetensors"])
def test_index_that_names_a_file_outside_its_folder(tmp_path, where):
    folder = make_tiny(tmp_path / "model", shards=2)
    outside = tmp_path / "elsewhere.safetensors"
    (folder / "model-00002-of-00002.safetensors").rename(outside)
    index = read_index(folder)
    name = str(outside) if where == "absolute" else where
    write_index(folder, {k: name if v.startswith("model-00002") else v for k, v in index.items()})
    refused(folder, "outside its folder")


def test_shard_that_is_a_link_out_of_its_folder(tmp_path):
    folder = make_tiny(tmp_path / "model", shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, "a link that leads out of its folder")


def test_single_file_that_is_a_link_out_of_its_folder(tmp_path):
    folder = make_tiny(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, "a link that leads out of its folder")


def test_missing_shard(tmp_path):
    folder = make_tiny(tmp_path, shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, r"model-00002-of-00002\.safetensors is missing")


def test_index_that_says_what_a_shard_lacks(tmp_path):
    folder = make_tiny(tmp_path, shards=2)
    write_index(folder, read_index(folder) | {"phantom": "model-00001-of-00002.safetensors"})
    refused(folder, r"phantom is in model-00001-of-00002\.safetensors, which lacks it")


def test_index_that_says_another_shard(tmp_path):
    folder = make_tiny(tmp_path, shards=2)
    name = next(n for n, file in read_index(folder).items() if file.startswith("model-00002"))
    write_index(folder, read_index(folder) | {name: "model-00001-of-00002.safetensors"})
    refused(folder, rf"{name} is in model-00002.*says model-00001")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "is not a file name"),
        ('{"weight_map": {"a": ["x"]}}', "is not a file name"),
        ("[1]", "expected an object"),
        ("{", "is not JSON"),
    ],
)
def test_broken_index(tmp_path, index, message):
    folder = make_tiny(tmp_path, shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, message)


def test_tensor_in_two_files(tmp_path):
    folder = make_tiny(tmp_path, shards=2)
    index = read_index(folder)
    tensors = read_safetensors(folder)
    twice = {"ghost": tensors["model.norm.weight"]}
    for shard in set(index.values()):
        part = {name: tensors[name] for name, file in index.items() if file == shard}
        save_file(part | twice, folder / shard)
    refused(folder, "ghost is in more than one file")


@pytest.mark.parametrize("dtype", [np.int8, np.int64, "float8_e4m3fn"])
def test_dtype_that_is_not_a_float_we_know(tmp_path, dtype):
    folder = make_tiny(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = np.ones((20, 12), np.float32).astype(np.dtype(dtype))
    rewrite(folder, lambda tensors: tensors.update({name: weight}))
    refused(folder, rf"{name}.* has dtype (I8|I64|F8_E4M3); expected one of BF16")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16, np.float32])
def test_weights_that_are_not_finite(tmp_path, value, dtype):
    config = tiny_config()
    tensors = random_tensors(config, dtype=np.dtype(dtype))
    tensors["model.layers.1.mlp.down_proj.weight"][7, 3] = value
    write_checkpoint(tmp_path, config, tensors)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj.* holds .*must be finite"):
        load(tmp_path)


def test_weights_too_large_for_the_dtype(tmp_path):
    config = tiny_config()
    tensors = random_tensors(config, dtype=np.dtype(np.float32))
    tensors["model.norm.weight"][0] = 1e5
    write_checkpoint(tmp_path, config, tensors)
    load(tmp_path, dtype=jnp.bfloat16)
    with pytest.raises(InputError, match=r"100000\.0, too large for float16; use bfloat16"):
        load(tmp_path, dtype=jnp.float16)


def test_layers_of_different_dtype(tmp_path):
    config = tiny_config()
    tensors = random_tensors(config)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float32)
    write_checkpoint(tmp_path, config, tensors)
    load(tmp_path)
    row = next(row for row in TABLE if row.path == "layers.mlp.up_proj.kernel")
    with pytest.raises(InputError, match=r"different dtypes \(bfloat16, float32\)"):
        open_checkpoint(tmp_path, read_config(tmp_path)).dtype(row)


def test_folder_without_weights(tmp_path):
    folder = make_tiny(tmp_path)
    (folder / "model.safetensors").unlink()
    refused(folder, r"holds no weights: expected model\.safetensors or pytorch_model\.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config\.json is missing"),
        (b"{", r"config\.json is not JSON"),
        (b'{"model_type": "ll\xe4ma"}', r"config\.json is not UTF-8 text \(byte 18\)"),
        (b"[]", r"config\.json holds a JSON list, expected an object"),
        (b'{"architectures": ["GPT2LMHeadModel"]}', "GPT2LMHeadModel"),
    ],
)
def test_bad_config(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_config(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        read_config(tmp_path / "nowhere")
