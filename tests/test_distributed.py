"""Two processes of four CPU devices each: the same results as one, and no end that hangs."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from distributed_worker import MESH, NEW_TOKENS, PROMPTS, evaluate
from safetensors.numpy import load_file, save_file
from tiny_llm import make_llm
from typer.testing import CliRunner

import dca_jax
from dca_jax import distributed
from dca_jax.cli import app
from dca_jax.errors import InputError
from dca_jax.weights.orbax import restore
from dca_jax.weights.parameters import abstract_params

pytestmark = pytest.mark.processes

PATIENCE = 150  # seconds that any of these may take on a machine that does much else besides
SILENCE = 10  # --peer-timeout
# What Python prints goes to a file of its own: the CPU's collectives print to the process' output.
CLI = (
    "import os, sys; sys.stdout = open(os.environ['PRINTED'], 'w', 1); sys.argv[0] = 'dca-jax'; "
    "from dca_jax.cli import main; main()"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_llm(tmp_path_factory.mktemp("models") / "tiny")
    tensors = load_file(folder / "model.safetensors")
    # Weights of a size as trained ones have it, so that float32 rounds off no more than in those.
    tensors = {k: v * np.float32(0.3 if v.ndim > 1 else 1) for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return dca_jax.load(folder)


class Process:
    """One of several, its output in files: a full pipe would stop it."""

    def __init__(self, number: int, arguments: list, environment: dict[str, str], folder: Path):
        self.out, self.err = folder / f"printed.{number}", folder / f"err.{number}"
        self.out.touch()
        with (folder / f"out.{number}").open("w") as out, self.err.open("w") as err:
            self.popen = subprocess.Popen(
                [sys.executable, "-u", *map(str, arguments)],
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                env=environment | {"PRINTED": str(self.out)},
            )

    @property
    def printed(self) -> str:
        """Python's standard output."""
        return self.out.read_text(errors="replace")

    @property
    def said(self) -> str:
        """Standard error."""
        return self.err.read_text(errors="replace")

    def wait(self, seconds: float = PATIENCE) -> int:
        return self.popen.wait(seconds)

    def wait_until(self, done) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            assert self.popen.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)


@contextlib.contextmanager
def processes(folder: Path, *commands: list, **environment: str) -> Iterator[list[Process]]:
    """Starts these commands together, on a port of their own; none outlives the block.

    A "{n}" in the value of an environment variable stands for the process' number.
    """
    with socket.socket(socket.AF_INET6) as held:
        # Held, so that nobody else gets it, and shared, so that the coordinator does.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("", 0))
        port = held.getsockname()[1]
        common = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "4",
            "XLA_FLAGS": "--xla_backend_optimization_level=0"
            " --xla_llvm_disable_expensive_passes=true"
            " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
            "COORDINATOR": f"127.0.0.1:{port}",
            "JAX_COORDINATOR_PORT": str(port),
            "COLUMNS": "100",
        }
        started: list[Process] = []
        try:
            for number, command in enumerate(commands):
                own = {k: v.replace("{n}", str(number)) for k, v in environment.items()}
                arguments = [str(part).replace("{port}", str(port)) for part in command]
                started.append(Process(number, arguments, common | own, folder))
            yield started
        finally:
            for process in started:
                process.popen.kill()  # a stopped one, too
                process.wait()


def worker(task: str, out: Path, folder: Path, *more) -> list:
    return [Path(__file__).with_name("distributed_worker.py"), task, out, folder, *more]


def flags(number: int, *more) -> list[str]:
    place = f"--coordinator 127.0.0.1:{{port}} --num-processes 2 --process-id {number}"
    return ["-c", CLI, *place.split(), "--peer-timeout", str(SILENCE), *more]


RANKS = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "{n}"}


def finetuning(folder: Path, data: Path) -> list:
    words = ["finetune", "--model", folder, "--data", data, "--eval-data", data, "--length", "64"]
    words += ["--lora-rank", "2", "--batch", "2", "--steps", "3", "--save-every", "2"]
    return [*words, "--learning-rate", "3e-3", "--dtype", "float32"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, folder):
    """Where two processes have left what they found, generated and finetuned: to begin takes long.

    What lies between the processes is the outermost axis; the others are within each of them.
    """
    place = tmp_path_factory.mktemp("pair")
    dialogues = [{"instruction": f"Say {n}.", "output": f"This is {n}."} for n in range(12)]
    (place / "data.json").write_text(json.dumps(dialogues))
    prompts = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    (place / "prompts.jsonl").write_text(prompts)
    generate = ["generate", folder, "--input", place / "prompts.jsonl", "--json", "--mesh", MESH]
    generate += ["--max-new-tokens", NEW_TOKENS]
    finetune = finetuning(folder, place / "data.json")
    finetune += ["--output", place / "both", "--mesh", "fsdp=2,tensor=4"]
    words = [json.dumps(list(map(str, command))) for command in (generate, finetune)]
    outs = [place / f"found.{n}" for n in range(2)]
    with processes(place, *(worker("all", out, folder, *words) for out in outs), **RANKS) as both:
        codes = [process.wait(3 * PATIENCE) for process in both]
        assert codes == [0, 0], both[0].said + both[1].said
        assert both[0].printed.endswith(f"wrote {place / 'both' / 'model'}\n")
        assert both[1].printed == ""
    return place


def test_two_processes_give_what_one_gives(tmp_path, folder, llm, pair):
    found = [json.loads((pair / f"found.{n}").read_text()) for n in range(2)]
    generations = llm.generate(PROMPTS, max_new_tokens=NEW_TOKENS)
    nll = evaluate(llm, tmp_path / "alone")
    for own in found:
        assert own["devices"] == [4, 8]
        np.testing.assert_allclose(own["nll"], nll, rtol=0, atol=1e-5)
        # Its half of the matrices, and the norms' scales whole: 7 of 12 float32 each.
        scales = 7 * 12 * 4
        assert own["read"] == (own["whole"] - scales) // 2 + scales
        assert own["learned"] == {"text": "ünïcode", "numbers": [1, 2.5, None]}
        assert own["refused"] == "there is no such folder"
        assert own["printed"] == ""
    assert [own["called"] for own in found] == [[0], []]
    said = [json.loads(line) for line in (pair / "printed.0").read_text().splitlines()[:3]]
    assert [(one["text"], one["completion_tokens"]) for one in said] == [
        (one.text, len(one.tokens)) for one in generations
    ]
    lines = (pair / "results" / "results.jsonl").read_text().splitlines()
    assert len(lines) == len(nll) == 3  # written by one of them
    config = llm.model.config
    saved = restore(pair / "saved", abstract_params(config, dtype=np.float32))
    for got, expected in zip(jax.tree.leaves(saved), jax.tree.leaves(llm.model), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_two_processes_finetune_as_one_does(tmp_path, folder, pair):
    """LoRA, whose adapters lie on both: the same losses, and files written once."""
    words = [*finetuning(folder, pair / "data.json"), "--output", tmp_path / "one"]
    found = CliRunner().invoke(app, list(map(str, words)))
    assert found.exit_code == 0, found.output
    places = pair / "both", tmp_path / "one"
    runs = [
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in places
    ]
    for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3), ("eval_loss", 1e-4)):
        noted = [[line.get(name, 0) for line in run] for run in runs]
        np.testing.assert_allclose(*noted, rtol=tolerance, err_msg=name)
    ours, theirs = (dca_jax.load(place / "model").model for place in places)
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("number", "silence", "messages"),
    [
        # A killed one is noticed at once here, by the connection.
        (signal.SIGKILL, SILENCE, ("another process ended first", "another task died")),
        # As if its host's network were gone.
        (signal.SIGSTOP, 2 * SILENCE, ("stopped sending heartbeats",)),
    ],
    ids=["killed", "silent"],
)
def test_a_process_that_is_gone_ends_the_other(tmp_path, number, silence, messages):
    outs = [tmp_path / f"running.{n}" for n in range(2)]
    commands = [worker("forever", out, tmp_path) for out in outs]
    with processes(tmp_path, *commands, **RANKS) as (primary, other):
        primary.wait_until(outs[0].exists)
        other.popen.send_signal(number)
        gone = time.monotonic()
        assert primary.wait() not in (0, None)
        assert time.monotonic() - gone < silence + 20
        assert any(message in primary.said for message in messages), primary.said


def test_an_error_of_all_is_said_once(tmp_path):
    """And the processes find each other through SLURM's environment."""
    command = ["-c", CLI, "--distributed", "chat", tmp_path]
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "{n}",
        "SLURM_LOCALID": "{n}",
    }
    with processes(tmp_path, command, command, **slurm) as (primary, other):
        assert (primary.wait(), other.wait()) == (2, 2), primary.said + other.said
        assert primary.said.startswith("error: chat runs in one process")
        assert primary.said.count("\n") == 1
        assert (other.said, primary.printed, other.printed) == ("", "", "")


def test_an_error_of_one_is_said_by_it_and_ends_all(tmp_path):
    """And the processes find each other where the command line says."""
    ask = ["explain", "--length", "9", "--trained-length"]
    both = flags(0, *ask, "64"), flags(1, *ask, "63")
    with processes(tmp_path, *both) as (primary, other):
        assert other.wait() == 2, other.said
        assert other.said.startswith("error: process 1 of 2: preset 'paper' needs")
        assert primary.wait() not in (0, None)  # it had said all it had to say, and waited
        assert "chunk length" in primary.printed


def test_one_process_may_be_all_there_are(tmp_path):
    """It finds itself through Open MPI's environment."""
    command = ["-c", CLI, "--distributed", "explain", "--trained-length", "63"]
    mpi = {
        "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "1",
        "OMPI_COMM_WORLD_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    }
    with processes(tmp_path, command, **mpi) as (alone,):
        assert alone.wait() == 2
        assert alone.said.startswith("error: preset 'paper' needs a trained length")
        assert alone.said.count("\n") == 1


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_never_comes_is_missed(tmp_path, number):
    command = flags(number, "--start-timeout", "2", "explain", "--trained-length", "64")
    with processes(tmp_path, command) as (alone,):
        assert alone.wait() == 1
        assert alone.said.startswith(f"error: process {number} has waited 2 s at 127.0.0.1:")
        assert "not all processes have started" in alone.said


def test_without_a_launcher_it_must_be_told(tmp_path):
    command = ["-c", CLI, "--distributed", "explain", "--trained-length", "64"]
    with processes(tmp_path, command) as (alone,):
        assert alone.wait() == 2
        assert alone.said.startswith(
            "error: the coordinator or number of processes could not be detected"
        )


@pytest.mark.parametrize(
    ("coordinator", "count", "number", "options", "message"),
    [
        ("node1", 2, 0, {}, "such as node1:8476; got 'node1'"),
        ("node1:http", 2, 0, {}, "got 'node1:http'"),
        (":8476", 2, 0, {}, "got ':8476'"),
        ("node1:8476", 0, 0, {}, "must be at least 1, got 0"),
        ("node1:8476", 2, 2, {}, "less than the number of processes, 2; got 2"),
        ("node1:8476", 2, -1, {}, "got -1"),
        ("node1:8476", 2, 0, {"start_timeout": 0}, "got 0 and 60"),
        ("node1:8476", 2, 0, {"peer_timeout": 9}, "got 300 and 9"),
    ],
)
def test_a_place_that_cannot_be_is_refused(coordinator, count, number, options, message):
    with pytest.raises(InputError, match=message):
        distributed.initialize(coordinator, count, number, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--process-id", "0"], "need --coordinator"),
        (["--coordinator", "node1", "--process-id", "0"], "such as node1:8476"),
    ],
)
def test_the_command_line_refuses_it_too(arguments, message):
    result = CliRunner().invoke(app, [*arguments, "explain", "--trained-length", "64"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.startswith("error: ")


def test_one_process_alone_needs_none_of_it(capsys):
    assert distributed.is_primary()
    assert not distributed.several_processes()
    assert distributed.from_primary(lambda: {"a": 1}) == {"a": 1}
    distributed.print_once()
    print("still here")
    assert capsys.readouterr().out == "still here\n"
    with pytest.raises(InputError, match="as it was"), distributed.ending_together():
        raise InputError("as it was")
    with pytest.raises(SystemExit, match="3"), distributed.ending_together():
        raise SystemExit(3)
