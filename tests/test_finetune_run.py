"""A whole run: to a model that others read, through kill, SIGTERM, a full disk and NaN."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conversion_helpers import TINY, read_safetensors
from flax.traverse_util import flatten_dict
from jax.experimental.compilation_cache import compilation_cache
from tiny_llm import fast_tokenizer, make_llm
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import dca_jax
from checkpoints_convert import orbax_to_hf
from dca_jax.cli import app
from dca_jax.config import LlamaConfig
from dca_jax.dca import DCAConfig
from dca_jax.errors import InputError
from dca_jax.finetune import inputs, rendered_files, run
from dca_jax.finetune.checkpoints import Checkpoints
from dca_jax.finetune.export import exported_config
from dca_jax.finetune.rendered import Rendered
from dca_jax.finetune.run import finetune, stopping
from dca_jax.finetune.settings import DataFile, Settings, read_settings
from dca_jax.finetune.train import Metrics, State
from dca_jax.finetune.train import start as begin
from dca_jax.weights.adapters import ADAPTERS, load_adapter

CLI = "import sys; from dca_jax.cli import main; sys.argv[0] = 'dca-jax'; main()"
STEPS = 10


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As the command line has it: what one run has compiled, the next need not."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a size as trained ones have it: else the first loss is 50."""
    from safetensors.numpy import load_file, save_file

    folder = make_llm(tmp_path_factory.mktemp("models") / "tiny")
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v * np.float32(0.2 if v.ndim > 1 else 1) for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen of them, of which a model can learn how they go on."""
    path = tmp_path_factory.mktemp("data") / "dialogues.json"
    entries = [
        {
            "conversations": [
                {"from": "human", "value": f"What comes after {n}?"},
                {"from": "gpt", "value": f"After {n} comes {n + 1}." * (1 + n % 3)},
            ]
        }
        for n in range(24)
    ]
    path.write_text(json.dumps(entries))
    return path


def settings(model: Path, dialogues: Path, output: Path, **changes: Any) -> Settings:
    """A run that takes seconds: rows of two and a half chunks, an update of two batches."""
    values: dict[str, Any] = {
        "data": (DataFile(str(dialogues)),),
        "eval_data": (DataFile(str(dialogues)),),
        "length": 96,
        "steps": STEPS,
        "batch": 2,
        "accumulate": 2,
        "learning_rate": 3e-3,
        "dtype": "float32",
        "method": "dca:40,60",
        "save_every": 3,
        "eval_every": 5,
    } | changes
    return Settings(model=str(model), output=str(output), **values)


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each update, each noted once."""
    noted = [line for line in lines(output) if "loss" in line]
    assert len({line["step"] for line in noted}) == len(noted)
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in noted}


@pytest.fixture(scope="module")
def whole(model: Path, dialogues: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    chosen = settings(model, dialogues, output, report=("tensorboard",))
    assert finetune(chosen) == output / "model"
    return output


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.02)


# --- what a run leaves -------------------------------------------------------------------------


def test_a_run_learns_and_tells(whole: Path) -> None:
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    held_out = {line["step"]: line["eval_loss"] for line in lines(whole) if "eval_loss" in line}
    assert list(held_out) == [0, 5, 10]
    assert held_out[10] < held_out[5] < held_out[0]
    assert all(line["tokens_per_second"] > 0 for line in lines(whole) if "loss" in line)
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["10", "9"]
    assert not list(whole.rglob("*partial*"))
    (events,) = (whole / "tensorboard").iterdir()
    assert b"eval_loss" in events.read_bytes()


def test_a_reporter_that_is_not_installed_is_named(
    model: Path, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"report wandb needs wandb: pip install"):
        finetune(settings(model, dialogues, tmp_path / "run", report=("wandb",)))
    assert not (tmp_path / "run").exists()


def test_its_model_is_read_by_dca_jax_and_by_transformers(
    whole: Path, model: Path, tmp_path: Path
) -> None:
    llm = dca_jax.load(whole / "model")
    assert llm.model.dca == DCAConfig(chunk_len=40, max_query_position=60)
    with Checkpoints(whole / "checkpoints", keep=2) as checkpoints:
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            begin(llm.model.params()),
        )
        state, _ = checkpoints.restore(like)
    assert int(state.step) == STEPS
    jax.tree.map(np.testing.assert_array_equal, state.params, llm.model.params())
    start = flatten_dict(dca_jax.load(model).model.params(), sep=".")
    for name, leaf in flatten_dict(state.params, sep=".").items():
        assert not np.array_equal(leaf, start[name]), f"{name} has not changed"

    orbax_to_hf.convert(whole / "model", tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 300, (1, 40))  # up to s tokens DCA is RoPE
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(llm.logits(tokens), want, atol=2e-4)


def exported_again(run: Path, chosen: Settings, output: Path) -> Path:
    """A run that has ended, whose same command with `export: hf` writes another model."""
    shutil.copytree(run, output, ignore=lambda _, names: {"model", "adapter"} & set(names))
    return finetune(replace(chosen, output=str(output), export="hf"))


def test_a_run_may_leave_a_hugging_face_folder(
    whole: Path, model: Path, dialogues: Path, tmp_path: Path
) -> None:
    chosen = settings(model, dialogues, whole, report=("tensorboard",))
    folder = exported_again(whole, chosen, tmp_path / "run")
    orbax_to_hf.convert(whole / "model", tmp_path / "hf")
    written, converted = read_safetensors(folder), read_safetensors(tmp_path / "hf")
    assert list(written) == list(converted)
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, converted[name])
    assert (folder / "config.json").read_bytes() == (tmp_path / "hf/config.json").read_bytes()
    assert AutoTokenizer.from_pretrained(folder)("Call me").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.float32
    assert losses(tmp_path / "run") == losses(whole)  # no update was made


@pytest.mark.slow
def test_lora_on_packed_weights_exports_the_merged_model(
    model: Path, dialogues: Path, tmp_path: Path
) -> None:
    """On weights as they are: the run that begins with an adapter of PEFT's."""
    output = tmp_path / "run"
    changes = {"lora_rank": 4, "lora_targets": ("q_proj", "down_proj"), "base": "int4", "steps": 3}
    finetune(settings(model, dialogues, output, **changes))
    start, end = dca_jax.load(model).model, dca_jax.load(output / "model").model
    lora, adapters = load_adapter(output / "adapter", start.config)
    assert (lora.rank, set(lora.targets)) == (4, {"q_proj", "down_proj"})
    before = flatten_dict(start.params(), sep=".")
    low_rank = flatten_dict(adapters, sep=".")
    for name, leaf in flatten_dict(end.params(), sep=".").items():
        want = before[name]
        if name.endswith(("q_proj.kernel", "down_proj.kernel")):
            assert not np.array_equal(leaf, want), name
            a, b = (low_rank[name.replace("kernel", part)] for part in ADAPTERS)
            want = want + lora.scale * jnp.einsum("lir,lr...->li...", a, b, precision="highest")
        np.testing.assert_allclose(leaf, want, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own
def test_a_run_begins_with_an_adapter_of_peft(model: Path, dialogues: Path, tmp_path: Path) -> None:
    """At a rate of nothing it exports what PEFT merges; and PEFT opens what it leaves."""
    peft = pytest.importorskip("peft")

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    torch.manual_seed(0)
    targets = ["mlp.down_proj", "self_attn.q_proj"]
    asked = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_rslora=True, init_lora_weights=False
    )
    peft.get_peft_model(base(), asked).save_pretrained(tmp_path / "theirs")
    changes = {"adapter": str(tmp_path / "theirs"), "steps": 1, "learning_rate": 1e-12}
    chosen = settings(model, dialogues, tmp_path / "run", export="hf", **changes)
    folder = finetune(chosen)
    tokens = torch.tensor(np.random.default_rng(0).integers(0, 300, (1, 40)))
    with torch.no_grad():
        want, again, merged, plain = (
            opened(tokens).logits.numpy()
            for opened in (
                peft.PeftModel.from_pretrained(base(), tmp_path / "theirs"),
                peft.PeftModel.from_pretrained(base(), tmp_path / "run/adapter"),
                AutoModelForCausalLM.from_pretrained(folder),
                base(),
            )
        )
    np.testing.assert_allclose(merged, want, atol=1e-4)
    np.testing.assert_allclose(again, want, atol=1e-4)
    assert np.abs(want - plain).max() > 1e-2
    with pytest.raises(InputError, match="give adapter or lora_rank"):
        replace(chosen, lora_rank=8)
    with pytest.raises(InputError, match="is not a folder; expected one with adapter_config"):
        finetune(replace(chosen, output=str(tmp_path / "none"), adapter=str(tmp_path / "none")))


@pytest.mark.slow
def test_a_run_is_lengthened(
    whole: Path,
    model: Path,
    dialogues: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From its last checkpoint, by the cosine of all updates; and nothing is rendered again."""
    output = tmp_path / "run"
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns("tensorboard"))
    monkeypatch.setattr(inputs, "render_all", None)
    with pytest.raises(InputError, match="can be lengthened but not shortened"):
        finetune(settings(model, dialogues, output, steps=9))
    longer = settings(model, dialogues, output, steps=12)
    finetune(longer)
    rate = 3e-3 * (1 + np.cos(np.pi * 9 / 11)) / 2  # 1 of the 12 warms up
    said = "lengthened from 10 to 12 updates: from here the learning rate follows the cosine of 12"
    assert f"{said}, so after 10 it is {rate:.3g} where it would have been 0" in (
        " ".join(capsys.readouterr().out.split())
    )
    found = losses(output)
    assert {n: found[n] for n in range(1, STEPS + 1)} == losses(whole)
    assert list(found) == list(range(1, 13))
    assert (output / "model-after-10").is_dir()
    assert read_settings(output / "finetune.yaml", {}) == longer
    ended, longest = (dca_jax.load(output / n).model.params() for n in ("model-after-10", "model"))
    ours, theirs = (flatten_dict(x, sep=".")["norm.scale"] for x in (longest, ended))
    assert not np.array_equal(ours, theirs)


def test_rendered_dialogues_are_kept_by_what_decides_them(whole: Path, tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "a.txt", fast_tokenizer()
    file.write_text("Call me")
    keys = [rendered_files.key_of(file, tokenizer, "t", {"cut": 8})]
    keys += [rendered_files.key_of(file, tokenizer, *rest) for rest in (("u", {}), ("t", {}))]
    file.write_text("Call him")
    keys.append(rendered_files.key_of(file, tokenizer, "t", {"cut": 8}))
    assert len(set(keys)) == 4
    some = [Rendered(np.arange(n, dtype=np.int32), np.arange(n) % 3 == 1) for n in (5, 1, 12)]
    rendered_files.keep(tmp_path / "kept", keys[0], (some, {"dropped: why": 2}))
    found = rendered_files.kept(tmp_path / "kept", keys[0])
    assert found is not None
    assert found[1] == {"dropped: why": 2}
    for one, want in zip(found[0], some, strict=True):
        np.testing.assert_array_equal(one.tokens, want.tokens)
        np.testing.assert_array_equal(one.trained, want.trained)
    assert rendered_files.kept(tmp_path / "kept", keys[1]) is None
    (path,) = (tmp_path / "kept").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert rendered_files.kept(tmp_path / "kept", keys[0]) is None


# --- interruptions -----------------------------------------------------------------------------


def flags_of(chosen: Settings) -> list[str]:
    return [
        *("--model", chosen.model, "--output", chosen.output, "--data", chosen.data[0].path),
        *("--eval-data", chosen.eval_data[0].path, "--length", "96", "--steps", str(STEPS)),
        *("--batch", "2", "--accumulate", "2", "--learning-rate", "3e-3", "--dtype", "float32"),
        *("--method", "dca:40,60", "--save-every", "3", "--eval-every", "5"),
    ]


@pytest.mark.processes
def test_killed_and_resumed_it_has_the_same_losses_bit_for_bit(
    whole: Path, model: Path, dialogues: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    chosen = settings(model, dialogues, output)
    command = [sys.executable, "-c", CLI, "finetune", *flags_of(chosen)]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            wait_for(
                lambda: (
                    process.poll() is not None
                    or ((output / "checkpoints" / "3").exists() and 4 in losses_so_far(output))
                )
            )
            assert process.poll() is None, (tmp_path / "log").read_text()
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert not (output / "model").exists()
    finetune(chosen)
    assert losses(output) == losses(whole)
    assert [x for x in lines(output) if "eval_loss" in x] == [
        x for x in lines(whole) if "eval_loss" in x
    ]
    for name in ("config.json", "tokenizer.json"):
        same = (output / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()
        assert same, name


def losses_so_far(output: Path) -> set[int]:
    found = (output / "metrics.jsonl").read_text()
    return {json.loads(x)["step"] for x in found.splitlines(keepends=True) if x.endswith("\n")}


@pytest.mark.slow
def test_sigterm_saves_and_leaves_and_another_mesh_goes_on(
    whole: Path, model: Path, dialogues: Path, tmp_path: Path
):
    output = tmp_path / "run"
    chosen = settings(model, dialogues, output, save_every=100)

    def ask() -> None:
        wait_for(lambda: (output / "metrics.jsonl").exists() and 2 in losses_so_far(output))
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        finetune(chosen)
    assert ended.value.code == 128 + signal.SIGTERM
    (saved,) = (int(p.name) for p in (output / "checkpoints").iterdir())
    assert 2 <= saved < STEPS
    assert max(losses(output)) == saved
    finetune(replace(chosen, mesh="fsdp=2"))  # onto another mesh
    assert {n: losses(output)[n] for n in range(1, saved)} == {
        n: losses(whole)[n] for n in range(1, saved)
    }
    for step, found in losses(output).items():
        np.testing.assert_allclose(found, losses(whole)[step], rtol=2e-3)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(model: Path, dialogues: Path, tmp_path: Path):
    output = tmp_path / "run"
    chosen = settings(
        model, dialogues, output, learning_rate=1e30, warmup=0.5, save_every=1, eval_data=()
    )
    with pytest.raises(InputError, match=r"step (\d+): the loss is .* is complete") as raised:
        finetune(chosen)
    step = int(str(raised.value).split()[1].rstrip(":"))
    saved = sorted(int(p.name) for p in (output / "checkpoints").iterdir())
    assert saved
    assert max(saved) == step - 1
    assert max(losses(output)) == step - 1
    assert all(np.isfinite(x).all() for x in losses(output).values())


def overflowing(build: Any, settings: Settings, steps: int) -> Any:
    """In place of an update: a loss that is fine, and from step 2 on a parameter that is not."""

    def update(state: State, frozen: Any, batch: Any) -> tuple[State, Metrics]:
        step = state.step + 1
        scale = state.params["norm"]["scale"]
        scale = scale.at[0].set(jnp.where(step < 2, scale[0], jnp.nan))
        params = state.params | {"norm": {"scale": scale}}
        one = jnp.float32(1)
        return state._replace(params=params, step=step), Metrics(one, one, one, jnp.bool_(True))

    return update


@pytest.mark.parametrize(("steps", "save_every"), [(2, 100), (2, 1), (9, 2)])
def test_parameters_that_are_not_finite_are_neither_saved_nor_exported(
    model: Path,
    dialogues: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    save_every: int,
):
    """The loss of an update is of the parameters before it: the last one is looked at, too."""
    output = tmp_path / "run"
    chosen = settings(
        model, dialogues, output, steps=steps, save_every=save_every, eval_every=100, eval_data=()
    )
    monkeypatch.setattr(run, "make_update", overflowing)
    kept = (
        "the checkpoint of step 1 is complete" if save_every == 1 else "no checkpoint had been sav"
    )
    with pytest.raises(InputError, match=f"step 2: the loss is finite, but the updated .*; {kept}"):
        finetune(chosen)
    assert not (output / "model").exists()
    saved = [path.name for path in (output / "checkpoints").iterdir()]
    assert saved == (["1"] if save_every == 1 else [])


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = begin({"a": jnp.ones(3), "b": jnp.arange(3.0)})
    bad = state._replace(square={"a": jnp.ones(3), "b": jnp.array([0, jnp.inf, 1])})
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with Checkpoints(tmp_path, keep=2) as found:
        with pytest.raises(InputError, match="step 0: the loss is finite, but the updated"):
            found.save(bad, {})
        assert found.latest is None
        with monkeypatch.context() as patched:  # as one of an earlier version may be
            patched.setattr(Checkpoints, "check", lambda self, state: None)
            found.save(bad, {})
        found.wait()
        with pytest.raises(InputError, match=r"/0 holds NaN or infinity; remove this folder"):
            found.restore(like)


def test_a_run_may_be_called_from_any_thread() -> None:
    """Only Python's main thread may ask for signals: a web server's runs without them."""
    told: list[int] = []

    def work() -> None:
        with stopping() as stop:
            told.append(stop())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert told == [0]
    assert signal.getsignal(signal.SIGTERM) is before


def test_processes_agree_on_a_signal_one_update_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the host need not wait for the devices' exchange; one process alone needs none."""
    alone = run.agreement()
    assert [alone(number) for number in (0, 15, 0)] == [0, 15, 0]
    monkeypatch.setattr(run, "several_processes", lambda: True)
    agreed = run.agreement()
    assert [agreed(number) for number in (0, 15, 0, 0)] == [0, 0, 15, 0]


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Lets no file grow beyond 20 kB from when it is called: as on a full disk, writes fail.

    What is printed goes to no file meanwhile, for pytest's own would be full, too.
    """
    before, nowhere = resource.getrlimit(resource.RLIMIT_FSIZE), io.StringIO()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]

    def shrink() -> None:
        monkeypatch.setattr(sys, "stdout", nowhere)
        monkeypatch.setattr(sys, "stderr", nowhere)
        with Path(os.devnull).open("w") as null:
            for descriptor in (1, 2):
                os.dup2(null.fileno(), descriptor)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    yield shrink
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for descriptor, original in zip((1, 2), kept, strict=True):
        os.dup2(original, descriptor)
        os.close(original)


@pytest.mark.slow
def test_a_full_disk_is_reported_and_the_run_goes_on_later(
    whole: Path, model: Path, dialogues: Path, tmp_path: Path, small_files: Callable[[], None]
) -> None:
    output = tmp_path / "run"
    chosen = settings(model, dialogues, output)

    def fill() -> None:
        wait_for(lambda: (output / "checkpoints" / "3").exists())
        small_files()

    threading.Thread(target=fill, daemon=True).start()
    with pytest.raises(InputError, match=r"could not be written .* the last good one is [36]"):
        finetune(chosen)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    finetune(chosen)
    assert losses(output) == losses(whole)


def test_a_full_disk_under_the_model_is_said_and_the_same_command_writes_it_later(
    whole: Path, model: Path, dialogues: Path, tmp_path: Path, small_files: Callable[[], None]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns("model", "tensorboard"))
    chosen = settings(model, dialogues, output)
    small_files()
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(InputError, match=r"model cannot be written: .*\. The last checkpoint has"):
        finetune(chosen)
    assert not [path for path in output.iterdir() if "model" in path.name]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    finetune(chosen)
    ours, theirs = (dca_jax.load(folder / "model").model.params() for folder in (output, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_model_trained_without_dca_keeps_the_length_it_was_trained_on() -> None:
    """Qwen2.5-1M's config.json has 262,144 nowhere but in its DCA setting."""
    asked = {"original_max_position_embeddings": 64, "chunk_size": 48, "local_size": 8}
    config = TINY | {"max_position_embeddings": 256, "dual_chunk_attention_config": asked}
    base = LlamaConfig.from_hf(config)
    assert base.trained_length == 64
    for dca in (None, base.dca, DCAConfig.paper(64)):
        written = exported_config(config, dtype="float32", dca=dca, trained_length=64)
        found = LlamaConfig.from_hf(written)
        assert (found.trained_length, found.dca, written["dtype"]) == (64, dca, "float32")
    assert config["max_position_embeddings"] == 256  # what was given is left as it was


# --- what is refused, before any work ----------------------------------------------------------


def test_another_run_a_finished_run_and_a_folder_of_something_else(
    whole: Path, model: Path, dialogues: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="a finished run"):
        finetune(settings(model, dialogues, whole))
    output = tmp_path / "run"
    output.mkdir()
    (output / "finetune.yaml").write_text((whole / "finetune.yaml").read_text())
    with pytest.raises(InputError, match="a run with a different learning_rate, seed"):
        finetune(settings(model, dialogues, output, seed=1, learning_rate=1.0))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is not a finetuning run"):
        finetune(settings(model, dialogues, tmp_path / "file"))
    with pytest.raises(InputError, match=r"file/run cannot be written: Not a directory"):
        finetune(settings(model, dialogues, tmp_path / "file/run"))
    (tmp_path / "other" / "thing").mkdir(parents=True)
    with pytest.raises(InputError, match="is not a finetuning run"):
        finetune(settings(model, dialogues, tmp_path / "other"))


def test_no_dialogue_is_left(model: Path, dialogues: Path, tmp_path: Path) -> None:
    data = (DataFile(str(dialogues), min_tokens=10_000),)
    with pytest.raises(InputError, match="no dialogue is left"):
        finetune(settings(model, dialogues, tmp_path / "run", data=data))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": "fsdp=8"}, "batch 2 does not divide over the mesh's 8 devices"),
        ({"mesh": "tensor=3"}, "tensor=3 does not divide"),
        ({"template": "alpaca"}, "'alpaca' is not a template"),
        ({"method": "dca:papers"}, "DCA setting 'papers' is not known"),
        ({"method": "self-extend"}, "cannot be trained: config.json cannot express it"),
        ({"method": "dca+ntk:2"}, "cannot be trained"),
        ({"data": (DataFile("/nowhere.json"),)}, "/nowhere.json"),
        ({"lora_rank": 4, "lora_targets": ("x_proj",)}, "x_proj"),
        ({"lora_rank": 10**9}, "lora_rank 1000000000 is more than the model's width of"),
        ({"steps": None, "epochs": 1e30}, "epochs of .* rows are .* updates; at most"),
    ],
)
def test_bad_input(model: Path, dialogues: Path, tmp_path: Path, changes: Any, message: str):
    with pytest.raises(InputError, match=message):
        finetune(settings(model, dialogues, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "checkpoints").exists()


# --- settings and commands ---------------------------------------------------------------------


def test_a_file_of_settings_and_flags_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: ./m\noutput: out\nlearning_rate: 1e-5\npack: none\n"
        "data:\n  a.json: 2\n  b.json: {min_tokens: 9}\nlora_targets: [q_proj]\n"
    )
    found = read_settings(path, {"steps": "7", "seed": None, "eval_data": ["c=d.json=0.5"]})
    assert found.data == (DataFile("a.json", 2.0), DataFile("b.json", 1.0, min_tokens=9))
    assert found.eval_data == (DataFile("c=d.json", 0.5),)
    assert (found.learning_rate, found.steps, found.pack, found.seed) == (1e-5, 7, "none", 0)
    again = tmp_path / "again.yaml"
    again.write_text(json.dumps(found.as_yaml()))  # JSON is YAML
    assert read_settings(again, {}) == found


def test_a_file_given_twice_is_taken_twice_also_when_a_run_is_resumed(tmp_path: Path) -> None:
    flags = {"model": "m", "output": "o", "data": ["a.json=2", "b.json", "a.json=0.5"]}
    chosen = read_settings(None, flags)
    run.write_settings(tmp_path, chosen)
    again = read_settings(tmp_path / "finetune.yaml", {})
    assert (
        again.data
        == chosen.data
        == (DataFile("a.json", 2.0), DataFile("b.json"), DataFile("a.json", 0.5))
    )
    assert again.differing(chosen) == []


def test_the_papers_recipe_is_a_file_of_settings() -> None:
    path = Path(__file__).parent.parent / "examples" / "finetune_16k.yaml"
    found = read_settings(path, {})
    assert found.data == (DataFile("sharegpt.json", min_tokens=4096), DataFile("alpaca_gpt4.json"))
    rows = found.batch * found.accumulate * found.steps
    assert (rows, found.length, found.learning_rate) == (16_000, 16_384, 2e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lenght: 5", "no setting 'lenght'; did you mean length"),
        ("length: 5.5", "length is a whole number, got 5.5"),
        ("pack: bfd", "pack is one of cut, whole, segments, none; got 'bfd'"),
        ("pack: true", "pack is a text"),
        ("gpt4_only: 1", "gpt4_only is true or false, got 1"),
        ("batch: true", "batch is a whole number"),
        ("warmup: 1.5", "warmup must be from 0 to below 1"),
        ("remat: all", "remat is one of layer, attention, products; got 'all'"),
        ("report: mail", "report is one of tensorboard, wandb"),
        ("seed:", "seed is empty"),
        ("base: int8", "int8 goes with LoRA"),
        ("weight_decay: .nan", "weight_decay must be finite"),
        ("weight_decay: -.inf", "weight_decay must be finite"),
        ("learning_rate: 1e39", "learning_rate must be finite, in float32 too, got 1e.39"),
        ("learning_rate: 1e-60", "learning_rate must be above 0"),
        ("lora_alpha: 1" + 400 * "0", "an integer of 1329 bits is too large a number"),
        ("beta2: 0.99999999999", "beta2 must be from 0 to below 1"),
        ("beta1: true", "beta1 is a number, got True"),
        ("epochs: true", "epochs is a number, got True"),
        ("batch: 100000000", "at most 134,217,728 are made at once"),
        ("accumulate: 100000000", "at most 134,217,728 are made at once"),
        ("length: 1000000000", "at most 134,217,728 are made at once"),
        ("length: 9000M", "a text has at most 2147483647"),
        ("seed: -1", "seed must be at least 0"),
        ("seed: 4294967296", "seed must be at most"),
        ("steps: 10000000000", "steps must be at most"),
        ("output: 7", "output is a text"),
        ("output: [a]", "output is a text"),
        ("data: {a: true}", "a has a weight, or weight and min_tokens, each a number; got True"),
        ("data: {a: {min_tokens: true}}", "each a number"),
        ("data: {a: {min_tokens: .inf}}", "each a number"),
        ("data: {a: {min_tokens: 1.5}}", "each a number"),
        ("data: {a: .nan}", "must have a weight from 1e-06 to 1000"),
        ("data: {a: 1e9}", "must have a weight from 1e-06 to 1000"),
        ("data: [a=0]", "must have a weight from 1e-06 to 1000"),
        ("data: [5]", "data is a list of files"),
        ("- a", "holds no settings"),
        ("a: [", "is not YAML"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    flags = {"model": "m", "output": "o", "data": "d"}
    flags.pop(text.partition(":")[0], None)  # a flag would stand in its place
    with pytest.raises(InputError, match=message):
        read_settings(path, flags)


def test_the_commands(model: Path, dialogues: Path) -> None:
    runner = CliRunner()
    found = runner.invoke(app, ["finetune"])
    assert found.exit_code == 2
    assert "model is not given" in found.output
    flags = ["--model", str(model), "--data", str(dialogues), "--length", "64", "--rows", "1"]
    found = runner.invoke(app, ["preview", *flags])
    assert found.exit_code == 0, found.output
    assert "row 1" in found.output
    assert "of 64 tokens" in found.output
    wide = {"COLUMNS": "200"}
    shown = runner.invoke(app, ["finetune", "--help"], env=wide).output
    assert "--learning-rate" in shown
    assert "2e-05" in shown
