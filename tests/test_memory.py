"""What memory is free, and that what does not fit is refused before work."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_fixtures import invoke
from tiny_llm import CHAT_TEMPLATE, LEAST, byte_level_tokenizer, save_tokenizer

from dca_jax import memory
from dca_jax.cli.launch import FRACTIONS
from dca_jax.errors import InputError
from dca_jax.planning.shapes import SHAPES
from dca_jax.weights import parameters as weights

GIB = 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 16 GiB, 10 of them free, in which groups and processes have no limit."""
    files = {"/proc/meminfo": "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 10485760 kB\n"}
    lines = memory._lines

    def read(path):
        path = str(path)
        if path in files:
            return files[path].splitlines()
        return [] if path.startswith(("/proc", "/sys")) else lines(path)

    monkeypatch.setattr(memory, "_lines", read)
    monkeypatch.setattr(memory, "_address_space", lambda: None)
    return files


def figures():
    cpu = jax.devices("cpu")[0]
    return memory.total_bytes(cpu), memory.free_bytes(cpu)


def test_a_machine_without_limits(machine):
    assert figures() == (16 * GIB, 10 * GIB)


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        (
            "0::/a/b",
            {
                "/sys/fs/cgroup/a/memory.max": f"{4 * GIB}",
                "/sys/fs/cgroup/a/memory.current": f"{3 * GIB}",
                "/sys/fs/cgroup/a/memory.stat": f"anon 7\ninactive_file {GIB}",
                "/sys/fs/cgroup/a/b/memory.max": "max",
                "/sys/fs/cgroup/a/b/memory.current": "5",
            },
        ),
        (
            "9:cpu:/a\n4:memory:/a",
            {
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}",
                "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}",
                "/sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB}",
            },
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_a_container_has_what_its_group_has(machine, groups, files):
    machine |= {"/proc/self/cgroup": groups, **files}
    assert figures() == (4 * GIB, 2 * GIB)


def test_a_limit_of_address_space_counts(machine, monkeypatch):
    monkeypatch.setattr(memory, "_address_space", lambda: 6 * GIB)
    machine["/proc/self/statm"] = f"{2 * GIB // os.sysconf('SC_PAGE_SIZE')} 1 1"
    assert figures() == (6 * GIB, 4 * GIB)


def test_weights_that_cannot_fit_are_refused_before_any_is_read(monkeypatch):
    config = LEAST
    like = {row.path: row.abstract(config, jnp.float32, None) for row in weights.parameters(config)}
    monkeypatch.setattr(weights, "free_bytes", lambda device: 100)
    with pytest.raises(InputError, match=r"the weights take .* which is more than it has free"):
        weights.load_tree(config, like, lambda row, index: pytest.fail("something was read"))


@pytest.mark.parametrize("given", [{}, {FRACTIONS[0]: "0.5"}, {FRACTIONS[1]: "0.5"}], ids=str)
def test_a_command_takes_of_a_gpu_what_a_plan_counts_on(given):
    code = """
import json, os, sys
CliRunner().invoke(app, ["explain", "--help"])
CliRunner().invoke(app, ["explain", "--trained-length", "8"])
print(json.dumps({k: v for k, v in os.environ.items() if k.endswith("MEM_FRACTION")}))
"""
    kept = {k: v for k, v in os.environ.items() if k not in FRACTIONS}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | given, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == (given or {FRACTIONS[0]: str(memory.GPU_SHARE)})


# --- commands, before they read weights ----------------------------------------------------------

LONG = 40_000  # tokens, whose keys and values take 19.5 GiB in bfloat16


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory):
    """Llama-2-7B but for its weights, which are not there, and things for it to read."""
    folder = tmp_path_factory.mktemp("7b")
    (folder / "config.json").write_text(json.dumps(SHAPES["llama-2-7b"].to_hf()))
    save_tokenizer(folder, byte_level_tokenizer(), chat_template=CHAT_TEMPLATE)
    np.save(folder / "ids.npy", np.ones(LONG + 300, np.int32))
    texts = {"instructions": ["Who?"], "outputs": ["Ahab"], "input": "Call me Ishmael. " * 10_000}
    (folder / "l-eval.jsonl").write_text(json.dumps(texts))
    (folder / "text.jsonl").write_text(json.dumps({"text": "Call me Ishmael. " * 8}))
    return folder


@pytest.fixture
def free(machine):
    """Sets how many GiB of the machine are free."""

    def set_free(gib):
        machine["/proc/meminfo"] = f"MemTotal: {32 * 2**20} kB\nMemAvailable: {gib * 2**20} kB\n"

    return set_free


READING = {
    "generate": "generate {folder} x --max-new-tokens 40000",
    "chat": "chat {folder} --context-length 40000",
    "perplexity": "eval perplexity {folder} --tokens {folder}/ids.npy --length 40000",
    "passkey": "eval passkey {folder} --length 40000",
    "needle": "eval needle {folder} --length 40000",
    "few-shot": "eval few-shot {folder} --data narrativeqa={folder}/l-eval.jsonl "
    "--max-length 40000",
    "l-eval": "eval l-eval {folder} --data quality={folder}/l-eval.jsonl --max-length 40000",
    "speed": "eval speed {folder} --length 40000",
}


def refused(command, folder):
    """What a command says, which ends with code 2."""
    found = invoke(*f"{command} --dtype bfloat16".format(folder=folder).split())
    assert found.exit_code == 2, found.output
    return found.stderr


def check_figure(told):
    """Keys and values of 32 layers and 32 heads of 128; what else is read takes half a GiB."""
    longest = int(re.search(r"20\.0 GiB are free: 1 x (\d+) tokens fit", told)[1])
    room = (20 * GIB - 2 * 6_738_415_616) // (2 * 2 * 32 * 32 * 128)
    assert 0.8 * room < longest < room


@pytest.mark.parametrize("command", READING.values(), ids=READING)
def test_a_command_refuses_what_cannot_fit_before_weights(
    command, seven_billion, free, monkeypatch
):
    monkeypatch.chdir(seven_billion)
    files = sorted(seven_billion.iterdir())
    free(20)
    check_figure(refused(command, seven_billion))
    assert sorted(seven_billion.iterdir()) == files


def test_lm_eval_refuses_what_cannot_fit_before_weights(seven_billion, free):
    model = pytest.importorskip("dca_jax.lm_eval").DcaJaxLM
    free(20)
    with pytest.raises(InputError) as told:
        model(str(seven_billion), max_length=LONG, dtype="bfloat16")
    check_figure(str(told.value))


def test_a_model_that_cannot_fit_at_all(seven_billion, free):
    free(10)
    told = refused("generate {folder} x --max-new-tokens 1", seven_billion)
    assert "weights 12.6" in told
    assert "not even one token fits" in told


def test_a_batch_is_refused_with_one_that_fits(seven_billion, free):
    free(20)
    command = "eval perplexity {folder} --tokens {folder}/ids.npy --length 4096 --batch 8"
    assert re.search(r"8 x \d+ or 3 x 4096 tokens fit", refused(command, seven_billion))


FINETUNE = "finetune --model {{folder}} --data {{folder}}/text.jsonl --length 65536 --output {}"


@pytest.mark.parametrize("options", ["", "--pack none", "--lora-rank 8"])
def test_finetuning_that_cannot_fit_is_refused(options, seven_billion, free, tmp_path):
    free(16)
    told = refused(f"{FINETUNE.format(tmp_path / 'run')} {options}", seven_billion)
    said = "1 x " if "lora" in options else "not even one token fits"
    assert said in told.partition("GiB are free: ")[2]
    assert not (tmp_path / "run").exists()


def test_a_short_dialogue_needs_no_long_row(seven_billion, free, tmp_path):
    free(16)
    command = f"{FINETUNE.format(tmp_path / 'run')} --pack none --lora-rank 8"
    assert "GiB are free" not in refused(command, seven_billion)  # but that there are no weights
