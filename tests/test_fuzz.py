"""Damaged files of every kind: each is refused with one sentence, or read; nothing else happens.

Every input is a good file, damaged in a few places by a generator whose seed is the input's name,
which a failure says. A few of each kind run with every test; `make fuzz` runs many more.
"""

import json
import os
import random
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversion_helpers import TINY, make_tiny
from test_chat_templates import CONVERSATIONS, TEMPLATES
from test_documents import damaged_pdf, write_pdf
from tiny_gguf import byte_level, wide_config, write_gguf
from tiny_llm import CHAT_TEMPLATE, byte_level_tokenizer, metaspace_tokenizer, save_tokenizer

from checkpoints_convert import hf_to_orbax
from dca_jax.config import LlamaConfig, choose_dca
from dca_jax.errors import InputError
from dca_jax.evaluation.benchmark_files import read_json_lines
from dca_jax.finetune.dialogues import read_dialogues
from dca_jax.finetune.settings import Settings, read_settings
from dca_jax.inference import chat_templates, documents
from dca_jax.inference.chat_templates import ChatTemplates
from dca_jax.inference.requests import read_lines
from dca_jax.inference.tokenizer import decode, encode, find_stop_ids, load_tokenizer
from dca_jax.weights.folder import load_weights
from dca_jax.weights.gguf_file import read_gguf
from dca_jax.weights.gguf_tokenizer import tokenizer_files
from dca_jax.weights.huggingface import open_checkpoint, read_config

NUMBER = int(os.environ.get("DCA_JAX_FUZZ", "12"))
SLOW = max(NUMBER // 10, 3)  # of those that take a process each, or seconds
SECONDS = 20  # for one input, on a busy machine

TRAINED = TINY | {"eos_token_id": [2, 3], "torch_dtype": "bfloat16"}
CONFIGS = [
    TRAINED,
    TRAINED | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}},
    TRAINED
    | {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    TRAINED | {"model_type": "mistral", "sliding_window": 32},
    TRAINED
    | {
        "model_type": "qwen2",
        "use_sliding_window": False,
        "max_window_layers": 3,
        "dual_chunk_attention_config": {"chunk_size": 48, "local_size": 16},
    },
]
DIALOGUES = [
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"instruction": "q", "input": "", "output": "a"},
    {"inputs": ["q", "r"], "outputs": ["a", "b"], "model": "gpt-4"},
    {"conversation": "USER: q ASSISTANT: a USER: r ASSISTANT: b"},
]
REQUESTS = [
    {"id": 1, "prompt": "Call me Ishmael."},
    {"messages": [{"role": "user", "content": "Call me"}], "tags": ["ä", None, {"deep": 1.5}]},
]
ROWS = [{"input": "a text", "instructions": ["q", "r"], "outputs": ["a", "b"]}]
SETTINGS = """\
model: ./m
output: "out \\u00e9"
data:
  a.json: 2
  b.json: {min_tokens: 4k, weight: 0.5}
eval_data: [c.json, d.json=3]
learning_rate: 2e-5
length: 16_384
pack: yes
lora_targets: [q_proj, v_proj]
steps: 0x10
# the end
"""

# --- damage ------------------------------------------------------------------------------------

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**63, 10**400, 1.5, -0.0, 1e308, float("nan")),
    *(float("inf"), "", "a", "1e-6", "\ud83d", "\0", "x" * 10_000, [], [[]], [1, "a", None], {}),
    *({"a": {"a": {}}}, {"type": "x"}, {"content": 3}, "../x", "<s>", "{{ 1 / 0 }}"),
]
PIECES = [
    *(b"", b"\0", b"\xff", b"\xfe\xff", b"{", b"}", b"[" * 3, b'"', b",", b":", b"\n", b"\\ud83d"),
    *(b"-", b"99999999999999999999", b"1e999", b"NaN", b"null", b"true", b" " * 9, b"\xe2\x80\xa8"),
    *(b"[" * 5000, b"<<", b">>", b"*a", b"&a", b"!!int ", b"0x_", b"2024-13-45", b"1_0", b"---\n"),
    *(b"{{", b"}}", b"{% for i in range(9) %}", b"{% endfor %}", b"|tojson", b" * 9999999", b"~"),
    *(b"{% if ", b"%}", b"[0]", b".x", b"()", b" / 0", b"none", b"endobj", b"/Filter /LZWDecode"),
]


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, put in, taken out or doubled."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(content) + 1)
        size = rng.choice((0, 1, 1, 2, 9, rng.randrange(len(content) + 1)))
        piece = rng.choice((*PIECES, rng.randbytes(rng.randrange(1, 5)), content[at : at + size]))
        if rng.random() < 0.2:
            content, size = content[: rng.choice((at, len(content)))], 0
        content = content[:at] + piece + content[at + size :]
    return content


def damaged_value(value: Any, rng: random.Random) -> Any:
    """Another value somewhere inside: of another type, missing, doubled, or nested deep."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if (chance := rng.random()) < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if chance < 0.15:
            return value | {rng.choice(("", "a", "\ud83d", "x" * 300)): value[key]}
        return value | {key: damaged_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        if (chance := rng.random()) < 0.1:
            return value[:at] + value[at + 1 :]
        if chance < 0.2:
            return value + value[at:]
        return [*value[:at], damaged_value(value[at], rng), *value[at + 1 :]]
    if rng.random() < 0.03:
        for _ in range(rng.choice((30, 300))):
            value = [value]
        return value
    if isinstance(value, int | float) and rng.random() < 0.3:
        return rng.choice(
            (
                -value,
                value + 1,
                value * 2,
                value // 3,
                f"{value:.9g}" if abs(value) < 1e300 else "9",
                [value],
            )
        )
    return rng.choice(VALUES)


def damaged_json(values: list[Any], rng: random.Random) -> bytes:
    """One of the values, damaged as a value, as text, or both."""
    value = rng.choice(values)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        value = damaged_value(value, rng)
    text = json.dumps(value, indent=rng.choice((None, None, 1))).encode()
    return damaged_bytes(text, rng) if rng.random() < 0.3 else text


def damaged_lines(values: list[Any], rng: random.Random) -> bytes:
    lines = [json.dumps(rng.choice(values)).encode() for _ in range(rng.randrange(1, 4))]
    lines[rng.randrange(len(lines))] = damaged_json(values, rng)
    return rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines)


# --- what is read ------------------------------------------------------------------------------


class Kinds:
    """For each kind of file, what damages one and reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_tiny(folder / "weights")
        hf_to_orbax.convert(folder / "weights", folder / "converted", weights="int4:32")
        self.described = json.loads((folder / "converted" / "config.json").read_text())
        self.weights = (folder / "weights" / "model.safetensors").read_bytes()
        self.tokenizers = []
        for number, make in enumerate((byte_level_tokenizer, metaspace_tokenizer)):
            (folder / f"tokenizer{number}").mkdir()
            save_tokenizer(folder / f"tokenizer{number}", make(), chat_template=CHAT_TEMPLATE)
            self.tokenizers.append(
                {path.name: json.loads(path.read_text()) for path in folder.glob(f"*{number}/*")}
            )
        self.pdfs = [
            write_pdf(folder / "a.pdf", "Call me Ishmael.", "Some years ago").read_bytes(),
            damaged_pdf(
                folder / "b.pdf",
                zlib.compress(b"BT /F 12 Tf 20 200 Td (hello) Tj ET"),
                filters=b"/Filter /FlateDecode",
            ).read_bytes(),
        ]
        tokenizer = byte_level(byte_level_tokenizer(), "gpt-2")
        gguf = folder / "good.gguf"
        write_gguf(gguf, wide_config(num_hidden_layers=1), ["Q4_0"], tokenizer=tokenizer)
        self.gguf_bytes = gguf.read_bytes()
        self.templates = ChatTemplates()

    def config(self, rng: random.Random) -> None:
        (self.folder / "config.json").write_bytes(damaged_json(CONFIGS, rng))
        config = read_config(self.folder)
        choose_dca("auto", config)
        assert isinstance(config, LlamaConfig)

    def safetensors(self, rng: random.Random) -> None:
        (size,) = struct.unpack("<Q", self.weights[:8])
        header, data = self.weights[8 : 8 + size], self.weights[8 + size :]
        if rng.random() < 0.6:
            header = damaged_json([json.loads(header)], rng)
        length = rng.choice((*[len(header)] * 9, 0, 2**63, len(header) - 1, len(header) + 9))
        content = struct.pack("<Q", length) + header + data
        content = damaged_bytes(content, rng) if rng.random() < 0.3 else content
        (self.folder / "weights" / "model.safetensors").write_bytes(content)
        config = read_config(self.folder / "weights")
        found = load_weights(self.folder / "weights", config)
        assert np.isfinite(np.asarray(found["norm"]["scale"], np.float32)).all()

    def converted(self, rng: random.Random) -> None:
        """What config.json says of packed matrices, or a description of their arrays."""
        folder, key = self.folder / "converted", "quantization_config"
        array = rng.choice(sorted((folder / "params").glob("*.kernel.*/.zarray")))
        before, how = array.read_bytes(), self.described[key]
        if rng.random() < 0.5:
            how = damaged_value(how, rng)
        else:
            array.write_bytes(damaged_json([json.loads(before)], rng))
        (folder / "config.json").write_text(json.dumps(self.described | {key: how}))
        try:
            config = read_config(folder)
            found = load_weights(folder, config, keep="stored")
        finally:
            array.write_bytes(before)
        assert np.isfinite(np.asarray(found["norm"]["scale"], np.float32)).all()

    def tokenizer(self, rng: random.Random) -> None:
        folder = self.folder / "tokenizer"
        folder.mkdir(exist_ok=True)
        files = rng.choice(self.tokenizers)
        hurt = rng.choice(list(files))
        for name, value in files.items():
            content = damaged_json([value], rng) if name == hurt else json.dumps(value).encode()
            (folder / name).write_bytes(content)
        config = LlamaConfig.from_hf(TRAINED | {"vocab_size": 400})
        tokenizer = load_tokenizer(folder)
        assert all(number < 400 for number in find_stop_ids(folder, config, tokenizer))
        ids = encode(tokenizer, "Call me <s>Ishmaël 海")
        assert all(isinstance(number, int) for number in ids)
        decode(tokenizer, ids).encode()

    def gguf(self, rng: random.Random) -> None:
        header = self.gguf_bytes.rindex(b"blk.0.") + 80  # all but the weights
        begin, rest = bytearray(self.gguf_bytes[:header]), self.gguf_bytes[header:]
        for _ in range(rng.choice((0, 1, 1, 2, 9))):
            begin[rng.randrange(header)] = rng.choice((0, 1, 3, 0xFF, rng.randrange(256)))
        content = (damaged_bytes(begin, rng) if rng.random() < 0.3 else bytes(begin)) + rest
        path = self.folder / "damaged.gguf"
        path.write_bytes(content)
        config = read_config(path)
        checkpoint = open_checkpoint(path, config)
        assert sum(map(len, checkpoint.tensors.values())) == 12
        files = tokenizer_files(read_gguf(path))
        json.dumps(files, ensure_ascii=False).encode()
        find_stop_ids(path, config, None)

    def requests(self, rng: random.Random) -> None:
        for fields in read_lines(damaged_lines(REQUESTS, rng), "in.jsonl").values():
            assert ("prompt" in fields) != ("messages" in fields)
            json.dumps(fields, ensure_ascii=False).encode()

    def dialogues(self, rng: random.Random) -> None:
        rows = damaged_json([DIALOGUES[:1] * 2, DIALOGUES[3:4] * 2, DIALOGUES], rng)
        content = rows if rng.random() < 0.5 else damaged_lines(DIALOGUES[:1], rng)
        (self.folder / "d.json").write_bytes(content)
        for one in read_dialogues(self.folder / "d.json")[0]:
            assert [turn.role for turn in one.turns][-2:] == ["user", "assistant"]
            "".join(turn.text for turn in one.turns).encode()

    def rows(self, rng: random.Random) -> None:
        (self.folder / "rows.jsonl").write_bytes(damaged_lines(ROWS, rng))
        for row in read_json_lines(self.folder / "rows.jsonl", *ROWS[0]):
            assert len(row["instructions"]) == len(row["outputs"])

    def settings(self, rng: random.Random) -> None:
        content = damaged_bytes(SETTINGS.encode(), rng)
        if rng.random() < 0.3:  # JSON is YAML
            plain = {"model": "m", "output": "o", "data": {"a.json": {"weight": 2}}, "steps": 5}
            content = damaged_json([plain], rng)
        (self.folder / "run.yaml").write_bytes(content)
        assert isinstance(read_settings(self.folder / "run.yaml", {}), Settings)

    def pdf(self, rng: random.Random) -> None:
        (self.folder / "damaged.pdf").write_bytes(damaged_bytes(rng.choice(self.pdfs), rng))
        documents.read_document(self.folder / "damaged.pdf").encode()

    def template(self, rng: random.Random) -> None:
        template = rng.choice(list(TEMPLATES.values())).encode()
        for _ in range(rng.choice((1, 2))):
            template = damaged_bytes(template, rng)
        messages = rng.choice(list(CONVERSATIONS.values()))
        messages = damaged_value(messages, rng) if rng.random() < 0.3 else messages
        messages = messages if isinstance(messages, list) else [messages]
        cuts = [(len(messages), rng.random() < 0.5)]
        (text,) = self.templates.write(
            template.decode(errors="replace"), {"bos_token": "<s>"}, messages, cuts
        )
        text.encode()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    return Kinds(tmp_path_factory.mktemp("fuzz"))


FAST = (
    "config safetensors converted gguf tokenizer requests dialogues rows settings template".split()
)


@pytest.mark.timeout(0 if NUMBER > 100 else 600)
@pytest.mark.filterwarnings("ignore")  # libraries say much about damaged files
@pytest.mark.parametrize("kind", [*FAST, "pdf"])
def test_damaged_files_are_refused_or_read(
    kinds: Kinds, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MOST_SECONDS", 5)
    monkeypatch.setattr(chat_templates, "SECONDS", 2)
    kinds.templates = ChatTemplates()
    read: Callable[[random.Random], None] = getattr(kinds, kind)
    refused, wrong = 0, []
    number = NUMBER if kind in FAST else SLOW
    for name in (f"{kind} {n}" for n in range(number)):
        begin = time.monotonic()
        try:
            read(random.Random(name))
        except InputError as error:
            refused += 1
            if "\n" in str(error) or len(str(error)) > 700:
                wrong.append(f"{name}: {str(error)[:300]!r}... is not one sentence")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # whatever it is, that it comes out is the fault
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        if (seconds := time.monotonic() - begin) > SECONDS:
            wrong.append(f"{name}: took {seconds:.0f} seconds")
    print(f"{kind}: {number} inputs, {refused} refused, {number - refused - len(wrong)} read")
    assert wrong == []
    assert NUMBER < 12 or refused
