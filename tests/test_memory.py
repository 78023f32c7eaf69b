"""What memory is free, and that what does not fit is refused before work."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from tiny_llm import LEAST

from dca_jax import memory
from dca_jax.cli.launch import FRACTIONS
from dca_jax.errors import InputError
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


def test_a_command_takes_of_a_gpu_what_a_plan_counts_on():
    code = """
import json, os, sys
from typer.testing import CliRunner
from dca_jax.cli import app
kept = dict(os.environ)
for given in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(kept | given)
    CliRunner().invoke(app, ["explain", "--help"])
    CliRunner().invoke(app, ["explain", "--trained-length", "8"])
    print(json.dumps({k: v for k, v in os.environ.items() if k.endswith("MEM_FRACTION")}))
"""
    kept = {k: v for k, v in os.environ.items() if k not in FRACTIONS}
    cases = [{}, {FRACTIONS[0]: "0.5"}, {FRACTIONS[1]: "0.5"}]
    command = [sys.executable, "-c", code, json.dumps(cases)]
    done = subprocess.run(command, env=kept, capture_output=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [{FRACTIONS[0]: str(memory.GPU_SHARE)}, *cases[1:]]
