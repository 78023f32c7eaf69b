"""Settings files: what their YAML means, and that nothing in one takes long, or much, or more."""

import time
from pathlib import Path

import pytest

from dca_jax.errors import InputError
from dca_jax.finetune.settings import read_settings
from dca_jax.finetune.yaml_files import read_yaml


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_what_a_settings_file_is_made_of(tmp_path: Path) -> None:
    text = """\
# a comment
model: ./m          # a text
length: 16_384
steps: 0x10
pack: yes
learning_rate: 2.0e-5
rate: 2e-5
seed: ~
output: "a: b \\u00e9 #"
data:
  a.json: 2
  b.json: {min_tokens: 4096}
lora_targets: [q_proj, 'v_proj']
eval_data:
- c.json
"""
    assert read_yaml(write(tmp_path, text)) == {
        "model": "./m",
        "length": 16384,
        "steps": 16,
        "pack": True,
        "learning_rate": 2e-5,
        "rate": "2e-5",
        "seed": None,
        "output": "a: b é #",
        "data": {"a.json": 2, "b.json": {"min_tokens": 4096}},
        "lora_targets": ["q_proj", "v_proj"],
        "eval_data": ["c.json"],
    }
    assert read_yaml(write(tmp_path, b"\xef\xbb\xbfmodel: m\r\nseed: 1\r\n")) == {
        "model": "m",
        "seed": 1,
    }


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{now}: &{now} [{', '.join(['*' + before] * 10)}]\n"
    for before, now in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("length: !!int abc", "line 1: 'abc' is read as int and is none; a text needs quotes"),
        ("seed: 1\nlength: 0x_", "line 2: '0x_' is read as int"),
        ("length: 0b_", "is read as int"),
        ("length: !!float x", "is read as float"),
        ("pack: !!bool maybe", "is read as bool"),
        ("model: 2024-13-45", "'2024-13-45' is read as timestamp and is none; a text needs quot"),
        ("model: !!timestamp x", "is read as timestamp"),
        ("model: 2024-01-01 10:00:00 +99:99", "is read as timestamp"),
        ("model: !!binary 'é'", "line 1"),
        ("length: " + "9" * 5000, "is read as int"),
        ("length: 0x" + "f" * 5000, "an integer of 20000 bits is too large a number"),
        (f"? {10**30}\n: 1", "too large a number"),
        ("3: x", "the name of a setting is a text, got 3"),
        ("? [a]\n: 1", "line 1: .*found unhashable key"),
        ("data:\n  ? {a: 1}\n  : 1", "line 2: .*found unhashable key"),
        (LAUGHS, r"line 2 repeats a value by the alias \*a; write the value itself"),
        ("a: &a [*a]", "repeats a value"),
        ("base: &b {seed: 1}\n<<: *b", r"line 2 repeats a value by the alias \*b"),
        ("data: *.json", "line 1"),
        ("seed: 1\nmodel: m\nseed: 2", "line 1: 'seed' appears twice; keep one"),
        ("data:\n  a.json: 1\n  a.json: 2", "line 2: 'a.json' appears twice"),
        ("a: " + "[" * 200_000, "nested too deeply"),
        ("a: " + "[" * 20 + "]" * 20, "nested too deeply"),
        ("a: " + "{b: " * 50 + "1" + "}" * 50, "nested too deeply"),
        ("\n".join(" " * n + "a:" for n in range(60)), "nested too deeply"),
        ("a: [" + "1, " * 100_000 + "]", "characters, too many for a file of settings"),
        ("model: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("model: !x m", "could not determine a constructor"),
        ("a: 1\n---\nb: 2", "line 2: expected a single document in the stream but found another"),
        ("a: [", "is not YAML: line 1: "),
        ("a: 'b", "is not YAML: line 1: "),
        ("a: b\n\tc: d", "is not YAML: line 2: "),
        ("a: b: c", "is not YAML: line 1: mapping values are not allowed here"),
        ("%YAML 9.9\n--- a", "is not YAML: line 1: "),
        ("a: \x07", "is not YAML: "),
        (r'model: "\ud83d"', "line 1 contains half of a surrogate pair"),
        (r'model: "a\0b"', "line 1 holds a NUL character"),
        (b"a: \xff", "is not UTF-8 text"),
        ("", "holds no settings"),
        ("- a", "holds no settings"),
        ("just text", "holds no settings"),
    ],
)
def test_what_is_no_settings_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = write(tmp_path, text)
    begin = time.monotonic()
    with pytest.raises(InputError, match=message) as raised:
        read_yaml(path)
    assert time.monotonic() - begin < 2
    said = str(raised.value)
    assert said.startswith(str(path))
    assert len(said) < len(str(path)) + 300
    assert "\n" not in said


@pytest.mark.parametrize(
    "text",
    [
        "data: {a: {min_tokens: .inf}}",
        "data: {a: {weight: .nan}}",
        "data: {a: {weights: 1}}",
        "data: {a: {min_tokens: [1]}}",
        "data: [[a]]",
        "data: [1]",
        "data: {1: 2}\nlength: .inf",
        "length: -.inf",
        "seed: .nan",
        "steps: !!set {a}",
        "model: !!binary aGk=",
        "model: [m]",
        "epochs: 2024-01-01",
        "lora_targets: [1]",
        "learning_rate: 1e999",
        "length: 1e999",
    ],
)
def test_values_of_the_wrong_kind(tmp_path: Path, text: str) -> None:
    flags = {"model": "m", "output": "o", "data": "d"}
    given = {name: value for name, value in flags.items() if f"{name}:" not in text}
    with pytest.raises(InputError) as raised:
        read_settings(write(tmp_path, text), given)
    assert len(str(raised.value)) < 300


def test_the_advice_on_texts_and_aliases(tmp_path: Path) -> None:
    for text, value in (("'2024-13-45'", "2024-13-45"), ("'*.json'", "*.json"), ("'0x_'", "0x_")):
        assert read_yaml(write(tmp_path, f"model: {text}")) == {"model": value}
