"""GGUF files: weights and configs as `gguf` and transformers have them; bad files are refused."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import torch
from conversion_helpers import random_tensors, read_safetensors
from shared_fixtures import invoke
from tiny_gguf import (
    BY_BLOCKS,
    BY_LIBRARY,
    PLAIN,
    add_value,
    byte_level,
    finish,
    packed,
    write_gguf,
)
from tiny_gguf import wide_config as wide
from tiny_llm import byte_level_tokenizer
from transformers import AutoModelForCausalLM

import dca_jax
from checkpoints_convert import hf_to_orbax, orbax_to_hf, verify
from dca_jax.config import LlamaConfig
from dca_jax.errors import InputError
from dca_jax.evaluation.fingerprint import fingerprint
from dca_jax.inference.load import open_model
from dca_jax.products.packed import is_packed, packed_forms
from dca_jax.sharding import make_mesh
from dca_jax.weights import gguf_blocks
from dca_jax.weights.folder import load_weights
from dca_jax.weights.gguf_file import read_gguf
from dca_jax.weights.hub import find_folder
from dca_jax.weights.huggingface import read_config
from dca_jax.weights.placement import parameter_shardings

KINDS = [*PLAIN, *BY_LIBRARY, *BY_BLOCKS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose matrices are stored in every format, with a tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    tokenizer = byte_level(byte_level_tokenizer(), "gpt-2")
    return write_gguf(path, wide(eos_token_id=2), KINDS, tokenizer=tokenizer)


def theirs(path: Path) -> Any:
    """The model as transformers unpacks it, in float32."""
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    )


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_unpacked_as_the_library_does(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(gguf_blocks, "TOGETHER", 7)  # the last part is smaller
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    raw = gguf.GGMLQuantizationType[kind]
    data = packed(rng.standard_normal((20, 768), np.float32), kind, rng)
    writer.add_tensor("a", data, raw_dtype=raw)
    finish(writer)
    tensor = read_gguf(tmp_path / "a.gguf").tensors["a"]
    expected = gguf.dequantize(gguf.GGUFReader(tmp_path / "a.gguf").tensors[0].data, raw)
    assert tensor.shape == (20, 768)
    assert tensor.packed == ("" if kind in PLAIN else kind)
    for rows, columns in (((0, 20), (0, 768)), ((3, 11), (250, 519)), ((19, 20), (767, 768))):
        index = (slice(*rows), slice(*columns))
        np.testing.assert_array_equal(tensor.read(index).astype(np.float32), expected[index])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q8_0"])
def test_weights_that_stay_packed(tmp_path, kind):
    """To the bit what the library unpacks; rows of q and k in Hugging Face's order."""
    path = write_gguf(tmp_path / "m.gguf", wide(), [kind])
    config = read_config(path)
    plain = load_weights(path, config, dtype=jax.numpy.float32)
    kept = load_weights(path, config, dtype=jax.numpy.float32, keep="stored")
    assert packed_forms(kept) == ("int8:32" if kind == "Q8_0" else "int4:32")
    unpacked = jax.tree.map(
        lambda x: x.unpack(jax.numpy.float32) if is_packed(x) else x, kept, is_leaf=is_packed
    )
    jax.tree.map(np.testing.assert_array_equal, unpacked, plain)
    hf_to_orbax.convert(path, tmp_path / "orbax")
    for keep, found in ((None, plain), ("stored", kept)):
        again = load_weights(tmp_path / "orbax", config, dtype=jax.numpy.float32, keep=keep)
        jax.tree.map(np.testing.assert_array_equal, again, found)


def test_weights_are_those_of_transformers_to_the_bit(model, tmp_path, caplog):
    """Through Orbax and back to Hugging Face; their logits too."""
    hf_to_orbax.convert(model, tmp_path / "orbax", dtype=np.dtype(np.float32))
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "hf", dtype=np.dtype(np.float32))
    ours, expected = read_safetensors(tmp_path / "hf"), theirs(model).state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(ours[name], tensor.numpy(), err_msg=name)
    result = verify.compare(model, tmp_path / "orbax", length=40)
    assert result.max_difference < 1e-4
    assert result.top1_agreement == 1
    assert read_config(tmp_path / "orbax") == read_config(model)
    llm = dca_jax.load(model)
    assert "are packed (IQ4_NL, IQ4_XS, Q2_K, " in caplog.text
    assert llm.stop_ids == {2}


@pytest.mark.parametrize("tied", [False, True])
def test_biases_and_tied_embeddings(tmp_path, tied):
    """Qwen2, whose rows stand as in Hugging Face; and a Llama with biases, whose do not."""
    for changes in ({"model_type": "qwen2"}, {"attention_bias": True, "mlp_bias": True}):
        config = wide(tie_word_embeddings=tied, head_dim=64, **changes)
        path = write_gguf(tmp_path / f"{config['model_type']}.gguf", config, ["F32"])
        found, read = read_config(path), load_weights(path, read_config(path))
        assert (found.qkv_bias, found.tie_word_embeddings) == (True, tied)
        for name, value in random_tensors(config, dtype=np.dtype(np.float32)).items():
            if not name.startswith("model.layers.1.self_attn."):
                continue
            module, kind = name.split(".")[-2:]
            ours = read["layers"]["self_attn"][module]["kernel" if kind == "weight" else "bias"][1]
            expected = value if value.ndim == 1 else 0.1 * value.T
            np.testing.assert_array_equal(np.asarray(ours).reshape(expected.shape), expected)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_qwen3_is_that_of_transformers(tmp_path, kind):
    """Norms of heads; a mixture's experts, stacked in the file. The logits are compared too."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768}
    experts = experts if kind == "qwen3_moe" else {}
    config = wide(model_type=kind, head_dim=128, **experts)  # transformers knows these sizes only
    more = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 768}
    path = tmp_path / "m.gguf"
    more = more if kind == "qwen3_moe" else {}
    tokenizer = byte_level(byte_level_tokenizer(), "qwen2")
    write_gguf(path, config, ["Q8_0", "Q6_K"], more=more, tokenizer=tokenizer)
    found = read_config(path)
    assert found.qk_norm
    assert kind == "qwen3" or found.mixture.norm_topk_prob
    hf_to_orbax.convert(path, tmp_path / "orbax")
    orbax_to_hf.convert(tmp_path / "orbax", tmp_path / "hf", dtype=np.dtype(np.float32))
    ours, expected = read_safetensors(tmp_path / "hf"), theirs(path).state_dict()
    for name, tensor in expected.items():
        if "experts" not in name:
            np.testing.assert_array_equal(ours[name], tensor.numpy(), err_msg=name)
    result = verify.compare(path, tmp_path / "orbax", length=20, batch=1)
    assert result.kl < 1e-9  # the random experts' logits are large, so rounding differs by 2e-4
    assert result.top1_agreement == 1


def test_each_device_gets_its_part(model):
    config = read_config(model)
    mesh = make_mesh("fsdp=2,tensor=2")
    whole = load_weights(model, config, dtype="bfloat16")
    cut = load_weights(model, config, dtype="bfloat16", sharding=parameter_shardings(config, mesh))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    assert len(cut["lm_head"]["kernel"].sharding.device_set) == 4


# --- configs -----------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, {}),
        ({"num_key_value_heads": 4}, {"attention.head_count_kv": [4, 4]}),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, {"rope.scale_linear": 2.5}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.5}},
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5},
        ),
        (
            {"rope_scaling": YARN | {"finetuned": True}},
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
                "rope.scaling.finetuned": True,
            },
        ),
        (
            {
                "model_type": "qwen2",
                "architectures": ["Qwen2ForCausalLM"],
                "max_position_embeddings": 1_010_000,
                "dual_chunk_attention_config": {
                    "chunk_size": 262144,
                    "local_size": 8192,
                    "original_max_position_embeddings": 262144,
                },
            },
            {},
        ),
    ],
)
def test_configs(tmp_path, changes, more):
    config = wide(**{"bos_token_id": None, "eos_token_id": None, **changes})
    assert read_config(write_gguf(tmp_path / "m.gguf", config, ["Q8_0"], more=more)) == (
        LlamaConfig.from_hf(config)
    )


def llama3_factors(head_dim: int, theta: float) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1's scaling, by its formula."""
    factors = []
    for plane in range(head_dim // 2):
        length = 2 * np.pi * theta ** (2 * plane / head_dim)
        smooth = (8192 / length - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / 8 + smooth)
        factors.append(8 if length > 8192 else 1 if length < 8192 / 4 else between)
    return np.array(factors, np.float32)


def test_llama3_scaling_comes_as_factors(tmp_path):
    config = wide(rope_theta=500_000.0, rope_scaling=LLAMA3, bos_token_id=None, eos_token_id=None)
    factors = llama3_factors(64, 500_000.0)
    assert len(set(factors[(factors > 1) & (factors < 8)])) > 1
    tensors = {"rope_freqs.weight": factors}
    path = write_gguf(tmp_path / "m.gguf", config, ["Q8_0"], tensors=tensors)
    assert read_config(path) == LlamaConfig.from_hf(config)
    load_weights(path, read_config(path))
    for wrong in (factors**1.01, factors * 0, factors[:-1], factors * np.nan):
        path = write_gguf(
            tmp_path / "w.gguf", config, ["Q8_0"], tensors={"rope_freqs.weight": wrong}
        )
        with pytest.raises(InputError, match=r"^tensor rope_freqs.weight in "):
            read_config(path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"expert_count": 8}, r"llama.expert_count = 8 is not known"),
        ({"attention.scale": 0.5}, r"llama.attention.scale = 0.5 is not known"),
        ({"attention.head_count_kv": [2, 1]}, r"head_count_kv differs between layers"),
        ({"rope.dimension_count": 32}, r"llama.rope.dimension_count is 32, and heads of 64"),
        ({"rope.scaling.type": "longrope"}, r"rope.scaling.type is 'longrope'"),
        ({"block_count": "2"}, r"block_count must be an integer from 1 .*got '2'"),
        ({"block_count": 70_000}, r"it has 70000 layers, and it has 21 tensors"),
        ({"block_count": 3}, r"are not those of the model in its metadata: 9 tensors are missing"),
        ({"context_length": 0}, r"context_length must be an integer"),
        ({"attention.head_count": 3}, r"must be a multiple of"),
        ({"embedding_length": 128}, r"has shape \(300, 256\); metadata asks for \(300, 128\)"),
    ],
)
def test_metadata_that_is_no_model_is_refused(tmp_path, more, message):
    path = write_gguf(tmp_path / "m.gguf", wide(), ["Q8_0"], more=more)
    with pytest.raises(InputError, match=message):
        load_weights(path, read_config(path))


# --- files -------------------------------------------------------------------------------------


def one_tensor(path: Path, **values: Any) -> bytes:
    """The bytes of a file of one tensor of 2 rows of 256 in Q4_K, after its metadata."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in values.items():
        add_value(writer, name, value)
    rng = np.random.default_rng(0)
    data = packed(np.zeros((2, 256)), "Q4_K", rng)
    writer.add_tensor("blk", data, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    finish(writer)
    return path.read_bytes()


FORMAT = 4 + 2 * 8  # behind the number of axes and two sizes; behind it the offset
LONG = b"\x08\0\0\0\x02\0\0\0\0\x01"


def edited(content: bytes, at: int, form: str, value: int) -> bytes:
    """The file with a number written over another one, counted from behind the tensor's name."""
    begin = content.index(b"\x03\0\0\0\0\0\0\0blk") + 11 + at
    return content[:begin] + struct.pack(form, value) + content[begin + struct.calcsize(form) :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda c: b"", "is empty"),
    "magic": (lambda c: b"GGML" + c[4:], "is not a GGUF file: it begins with b'GGML'"),
    "version": (
        lambda c: c[:4] + struct.pack("<I", 1) + c[8:],
        "its version is 1; ",
    ),
    "big": (lambda c: c[:4] + struct.pack(">I", 3) + c[8:], "big-endian"),
    "tensors": (lambda c: c[:8] + struct.pack("<Q", 2**40) + c[16:], f"has {2**40} tensors"),
    "entries": (lambda c: c[:16] + struct.pack("<Q", 2**63) + c[24:], "entries of metadata"),
    "name": (lambda c: c[:24] + struct.pack("<Q", 2**60) + c[32:], f"has {2**60} bytes"),
    "short": (lambda c: c[:30], "is truncated or damaged: its description"),
    "shorter data": (lambda c: c[:-1], "tensor 'blk' should have 288 bytes"),
    "axes": (lambda c: edited(c, 0, "<I", 9), "has 9 axes"),
    "row": (lambda c: edited(c, 4, "<Q", 255), "Q4_K packs rows in blocks of 256"),
    "empty row": (lambda c: edited(c, 4, "<Q", 0), "packs rows"),
    "rows": (lambda c: edited(c, 12, "<Q", 2**62), f"should have {144 * 2**62} bytes"),
    "format": (lambda c: edited(c, FORMAT, "<I", 99), r"stored in an unknown type \(99\)"),
    "other format": (
        lambda c: edited(c, FORMAT, "<I", 34),
        "stored in TQ1_0, which is not supported",
    ),
    "far": (lambda c: edited(c, FORMAT + 4, "<Q", 2**50), "tensor 'blk' should have 288 bytes"),
    "unaligned": (lambda c: edited(c, FORMAT + 4, "<Q", 8), "tensor 'blk' should have 288"),
    "not text": (lambda c: c.replace(b"texts", b"te\xffts"), "a name in the metadata is not UTF-8"),
    "twice": (lambda c: c.replace(b"texts", b"words"), "'words' is twice in its metadata"),
    "type": (lambda c: c.replace(b"words\x09", b"words\x63"), r"an unknown type \(99\)"),
    "inner": (lambda c: c.replace(b"\x08\0\0\0\x02", b"\x09\0\0\0\x02"), "lists 2 values of"),
    "list": (lambda c: c.replace(LONG[:9] + b"\0", LONG), f"lists {2**40 + 2} texts"),
    "numbers": (lambda c: c.replace(b"\x05\0\0\0\x02", b"\x05\0\0\0\xff"), "is truncated or dam"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused(tmp_path, name):
    damage, message = DAMAGE[name]
    values = {"words": ["a", "b"], "texts": "x", "sizes": [1, 2]}
    content = one_tensor(tmp_path / "m.gguf", **values)
    changed = damage(content)
    assert changed != content
    (tmp_path / "m.gguf").write_bytes(changed)
    with pytest.raises(InputError, match=message) as caught:
        read_gguf(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("alignment", [0, 7, 24, 2**31, "32"])
def test_an_alignment_that_is_none(tmp_path, alignment):
    content = one_tensor(tmp_path / "m.gguf", **{"general.alignmenx": alignment})
    (tmp_path / "m.gguf").write_bytes(content.replace(b"alignmenx", b"alignment"))
    with pytest.raises(InputError, match=r"general.alignment must be a power of two"):
        read_gguf(tmp_path / "m.gguf")


def test_scales_that_are_not_finite_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", wide(), ["Q4_1"])
    tensor = read_gguf(path).tensors["blk.1.ffn_up.weight"]
    content = bytearray(path.read_bytes())
    content[tensor.offset : tensor.offset + 2] = np.float16("nan").tobytes()
    path.write_bytes(content)
    for keep, message in ((None, ", and weights must be"), ("stored", " or inf, or a scale of it")):
        with pytest.raises(InputError, match=rf"blk.1.ffn_up.weight holds nan{message}"):
            load_weights(path, read_config(path), dtype="float32", keep=keep)


def test_split_files(tmp_path):
    config = wide()
    whole = write_gguf(tmp_path / "whole.gguf", config, ["Q8_0"])
    reader = gguf.GGUFReader(whole)
    parts = [tmp_path / "s" / f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    parts[0].parent.mkdir()
    for number, path in enumerate(parts):
        writer = gguf.GGUFWriter(path, "llama")
        values = {k: f.contents() for k, f in reader.fields.items() if k.startswith("llama.")}
        own = values if number == 0 else {}
        for name, value in own.items():
            add_value(writer, name, value)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        for tensor in reader.tensors[number::2]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        finish(writer)
    expected = load_weights(whole, read_config(whole))
    for given in (*parts, parts[0].parent):
        found = find_folder(given)
        jax.tree.map(
            np.testing.assert_array_equal, load_weights(found, read_config(found)), expected
        )
    assert invoke("info", parts[1]).exit_code == 0
    parts[1].rename(tmp_path / "gone.gguf")
    with pytest.raises(InputError, match=r"file m-00002-of-00002.gguf is missing"):
        read_gguf(parts[0])
    parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(InputError, match=r"is one of 2 parts, but 1 files are named"):
        read_gguf(tmp_path / "alone.gguf")


def test_where_a_gguf_is_found(model, tmp_path):
    assert find_folder(model) == model
    assert find_folder(model.parent) == model
    (tmp_path / "a.gguf").symlink_to(model)
    assert find_folder(tmp_path) == tmp_path / "a.gguf"
    assert open_model(tmp_path / "a.gguf").llm.model.config == open_model(model).llm.model.config
    (tmp_path / "b.gguf").symlink_to(model)
    with pytest.raises(InputError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\); name the one"):
        find_folder(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert find_folder(tmp_path) == tmp_path
    with pytest.raises(InputError, match=r"give the folder that holds config.json and weights, or"):
        find_folder(tmp_path / "model.safetensors")


def test_a_bit_of_it_is_another_model(model, tmp_path):
    copy = tmp_path / "model.gguf"
    content = bytearray(model.read_bytes())
    copy.write_bytes(content)
    assert fingerprint(copy) == fingerprint(model)
    content[-1] ^= 1
    copy.write_bytes(content)
    assert fingerprint(copy) != fingerprint(model)


def test_the_command_line(model, tmp_path):
    shown = invoke("info", model)
    assert "GGUF, IQ4_NL, IQ4_XS," in " ".join(shown.output.split())
    done = invoke("convert", model, tmp_path / "out", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert invoke("generate", model, "Call me", "--max-new-tokens", "1").exit_code == 0
