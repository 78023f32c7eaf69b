"""A finetuning run from its settings to a model: load, train, save, resume, export.

The folder of a run:

    finetune.yaml all its settings rendered/        its dialogues as tokens
    (`dca_jax.finetune.rendered_files`) metrics.jsonl    a line for each update, and for each
    evaluation checkpoints/     checkpoints of the state (`dca_jax.finetune.checkpoints`)
    adapter/         the LoRA adapter in PEFT format, after the run has ended
    model/           the trained model, after the run has ended (`dca_jax.finetune.export`)
"""

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.status import Status

from dca_jax.attention.bands import PositionMethod
from dca_jax.config import LlamaConfig, LoraConfig
from dca_jax.dca import DCAConfig
from dca_jax.disk import writing, written
from dca_jax.distributed import from_primary, is_primary, several_processes
from dca_jax.errors import InputError
from dca_jax.finetune.checkpoints import ADVICE, Checkpoints
from dca_jax.finetune.data import Rows, Source, longest_row, row, text_lengths
from dca_jax.finetune.export import export
from dca_jax.finetune.inputs import number_of_updates, read_inputs, training_rows
from dca_jax.finetune.lora import init_lora
from dca_jax.finetune.loss import summed_nll
from dca_jax.finetune.meters import Meters, check_reports, update_flops
from dca_jax.finetune.preview import preview
from dca_jax.finetune.settings import Settings, read_settings
from dca_jax.finetune.setup import Setup
from dca_jax.finetune.templates import template_source
from dca_jax.finetune.train import (
    Batch,
    Build,
    Metrics,
    Params,
    State,
    abstract_state,
    joined,
    learning_rate,
    make_update,
    place,
    start,
)
from dca_jax.inference.methods import method_by_name
from dca_jax.inference.tokenizer import load_tokenizer
from dca_jax.planning.room import check_room
from dca_jax.products.packed import STORED
from dca_jax.sharding import axis_size, make_mesh
from dca_jax.weights.adapters import load_adapter, open_adapter
from dca_jax.weights.folder import kept_forms, load_weights
from dca_jax.weights.hub import find_folder
from dca_jax.weights.huggingface import read_config
from dca_jax.weights.kept import Kept
from dca_jax.weights.packer import packer
from dca_jax.weights.parameters import lora_parameters, parameters, projections

SETTINGS, CHECKPOINTS, MODEL, ADAPTER = "finetune.yaml", "checkpoints", "model", "adapter"


def finetune(settings: Settings, *, implementation: str | None = None) -> Path:
    """Starts or resumes a run with these settings; returns the folder of the finished model.

    On SIGTERM or Ctrl-C it saves a checkpoint and raises `SystemExit` (143 or 130); after a kill it
    resumes from its last checkpoint. In both cases the losses are those of an uninterrupted run,
    bitwise if the device is deterministic, as CPUs are.

    Args:
        implementation: attention implementation, a name in `dca_jax.attention.op.BACKENDS`; None
            picks the best on the device. It is not a setting of the run, because all of them
            compute the same.

    Raises:
        InputError: settings, data or a checkpoint that do not fit, before any weight is read; a
            non-finite loss, with the step; a checkpoint that cannot be written.
    """
    setup = replace(open_setup(settings), implementation=implementation)
    output = Path(settings.output)
    from_primary(lambda: check_output(output, settings))
    if settings.pack != "none":  # its rows are as long as its dialogues
        check_memory(setup, settings.length)
    inputs = read_inputs(setup)
    rows = training_rows(setup, inputs.data)
    if settings.pack == "none":
        check_memory(setup, longest_row(inputs.data, settings.length))
    steps = number_of_updates(settings, inputs.data)
    from_primary(lambda: lengthen(output, settings, inputs.data, steps))
    from_primary(lambda: write_settings(output, settings))
    from_primary(lambda: inputs.keep(output))
    with Checkpoints(output / CHECKPOINTS, keep=settings.keep) as checkpoints:
        state = train(setup, checkpoints, rows, inputs.held_out, steps)
    with _status(f"writing {output / MODEL}"):
        export(setup, output, state.params)
    return output / MODEL


# --- before any weight is read -----------------------------------------------------------------


def open_setup(settings: Settings) -> Setup:
    """Opens the checkpoint's config and tokenizer, and makes the mesh.

    Raises:
        InputError: a checkpoint or setting that does not fit.
    """
    check_reports(settings.report)
    folder = find_folder(settings.model)
    config = read_config(folder)
    mesh = make_mesh(settings.mesh) if settings.mesh or several_processes() else None
    if settings.pack == "segments" and axis_size(mesh, "context") > 1:
        raise InputError(
            "pack segments needs whole rows on a device, but this mesh splits them along context; "
            "use fsdp or tensor, or pack whole"
        )
    rows = axis_size(mesh, "data", "fsdp")
    if settings.batch % rows:
        raise InputError(
            f"batch {settings.batch} does not divide over the mesh's {rows} devices of data and "
            f"fsdp; give a multiple of {rows}, or split rows with context"
        )
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise InputError(f"{folder} has no tokenizer; put its files beside config.json")
    chat_template = None
    own = settings.template == "chat"  # plain texts need no chat template
    if settings.template != "chunkllama" and not (own and not tokenizer.chat_template):
        chat_template = template_source(tokenizer, settings.template)
    setup = Setup(
        settings=settings,
        folder=folder,
        config=config,
        tokenizer=tokenizer,
        chat_template=chat_template,
        dca=_trained_dca(settings, config),
        lora=_lora(settings, config),
        mesh=mesh,
    )
    _ = setup.sharding  # refuses a mesh that the model cannot be split over
    return setup


def _lora(settings: Settings, config: LlamaConfig) -> LoraConfig | None:
    """The adapters to train; None for all weights."""
    if settings.adapter:
        return open_adapter(settings.adapter, config)[0]
    if not settings.lora_rank:
        return None
    if settings.lora_rank > config.hidden_size:
        raise InputError(
            f"lora_rank {settings.lora_rank} is more than the model's width of "
            f"{config.hidden_size}: give a lower one, or 0 to train all weights"
        )
    return LoraConfig(
        rank=settings.lora_rank, alpha=settings.lora_alpha, targets=settings.lora_targets
    )


def _trained_dca(settings: Settings, config: LlamaConfig) -> DCAConfig | None:
    """The setting of a method that can be stored in the trained model's config.json."""
    dca, rope = method_by_name(settings.method, config, settings.length)
    if isinstance(dca, PositionMethod) or rope != config.rope:
        raise InputError(
            f"method {settings.method!r} cannot be trained: config.json cannot express it; "
            "expected auto, none, or dca with a setting (set scaled RoPE in config.json)"
        )
    return dca


def check_output(output: Path, settings: Settings) -> None:
    """Refuses an output folder that does not belong to this run.

    Raises:
        InputError: a finished run, another run, or a folder with something else.
    """
    before = settings_before(output)
    if before is not None:
        differing = before.differing(settings)
        if (output / MODEL).exists() and not differing and before.lasts_as_long_as(settings):
            raise InputError(
                f"{output} holds a finished run with the model {output / MODEL}. To lengthen it, "
                "give more steps or epochs"
            )
        if differing:
            raise InputError(
                f"{output} holds a run with a different {', '.join(differing)}; resume with its "
                "original settings, or choose another output"
            )
    elif output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"{output} exists and is not a finetuning run; choose another output")


def check_memory(setup: Setup, length: int) -> None:
    """Refuses rows of `length` tokens that do not fit into the devices' memory.

    Raises:
        InputError: as in `dca_jax.planning.room.check_room` and `kept_base`.
    """
    settings = setup.settings
    check_room(
        setup.config,
        setup.mesh,
        context_length=length,
        batch=settings.batch,
        dtype=settings.dtype,
        train=True,
        lora=setup.lora,
        weights=packed_base(settings),
        kept=kept_base(setup),
        remat=settings.remat,
        state=settings.state,
    )


def packed_base(settings: Settings) -> str | None:
    """The form in which the layers' frozen kernels are packed while loading; None if unpacked."""
    return None if settings.base in ("dtype", STORED) else settings.base


def kept_base(setup: Setup) -> dict[str, Kept]:
    """The forms of frozen weights that stay packed as in the checkpoint, by path (base `stored`).

    Raises:
        InputError: there are no such weights.
    """
    if setup.settings.base != STORED:
        return {}
    kept = kept_forms(setup.folder, setup.config, STORED)
    if not kept:
        raise InputError(
            f"base {STORED} keeps weights as quantized in the checkpoint, but {setup.folder} has "
            "none that can be kept; choose base int8 or int4 to quantize them, or dtype"
        )
    return kept


def settings_before(output: Path) -> Settings | None:
    """The settings of the run in a folder; None if there is none."""
    path = output / SETTINGS
    return read_settings(path, {}) if path.is_file() else None


def lengthen(output: Path, settings: Settings, data: Sequence[Source], steps: int) -> None:
    """Lengthens a run to `steps` updates, and prints what that changes.

    The model of a finished run is kept under another name.

    Raises:
        InputError: the run was planned with more updates.
    """
    before = settings_before(output)
    if before is None or before.lasts_as_long_as(settings):
        return
    planned = number_of_updates(before, data)
    if steps < planned:
        raise InputError(
            f"a run can be lengthened but not shortened: {output} has {planned:,} updates, but "
            f"{steps:,} were requested; choose another output"
        )
    for name in (MODEL, ADAPTER):
        if (output / name).exists():
            with writing(output):
                (output / name).rename(output / f"{name}-after-{planned}")
    saved = (path.name for path in (output / CHECKPOINTS).glob("*"))
    done = max((int(name) for name in saved if name.isdigit()), default=0)
    old, new = (float(np.asarray(learning_rate(settings, n)(done))) for n in (planned, steps))
    print(
        f"lengthened from {planned:,} to {steps:,} updates: from here the learning rate follows "
        f"the cosine of {steps:,}, so after {done:,} it is {new:.3g} where it would have been "
        f"{old:.3g}"
    )


def write_settings(output: Path, settings: Settings) -> None:
    """Creates the run's folder and writes the settings, under a temporary name first."""
    import yaml

    text = yaml.safe_dump(settings.as_yaml(), sort_keys=False)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    written(output / SETTINGS, lambda aside: aside.write_text(text, encoding="utf-8"))


def show_rows(settings: Settings, count: int, console: Console) -> None:
    """Prints the first rows of a run and marks the tokens with a loss; reads no weights."""
    setup = open_setup(replace(settings, mesh=""))
    stream = training_rows(setup, read_inputs(setup).data)
    for number, batch in zip(range(count), stream, strict=False):
        console.rule(f"row {number + 1}")
        preview(row(batch, 0), setup.tokenizer, console)


# --- training ----------------------------------------------------------------------------------


def train(
    setup: Setup,
    checkpoints: Checkpoints,
    rows: grain.IterDataset,
    held_out: Sequence[Rows],
    steps: int,
) -> State:
    """Makes the remaining updates and returns the last state."""
    settings = setup.settings
    with _status(f"loading {setup.folder}"):
        state, frozen, place_in_rows = load_state(setup, checkpoints)
    done = int(state.step)
    stream = iter(rows)
    if place_in_rows is not None:
        stream.set_state(place_in_rows)
    update = jax.jit(make_update(setup.build, settings, steps), donate_argnums=0)
    evaluate = make_evaluation(setup.build)
    meters = Meters(Path(settings.output), settings, step=done, steps=steps)
    pending: tuple[int, Metrics, int, float] | None = None
    agreed = agreement()
    with meters, stopping() as stop:
        if held_out and done == 0:
            meters.evaluation(0, evaluate(state.params, frozen, held_out, setup.mesh))
        for step in range(done + 1, steps + 1):
            batch = next(stream)
            tokens = int(batch["lengths"].sum())
            flops = update_flops(setup.config, text_lengths(batch), lora=setup.lora)
            state, metrics = update(state, frozen, place(batch, settings.accumulate, setup.mesh))
            if pending is not None:  # the previous one, so that the devices never wait for the host
                tell(meters, *pending, checkpoints)
            pending = step, metrics, tokens, flops
            stopped = agreed(stop())
            last = stopped or step == steps
            if last or step % settings.save_every == 0 or step % settings.eval_every == 0:
                tell(meters, *pending, checkpoints)
                pending = None
            if held_out and (step % settings.eval_every == 0 or step == steps):
                checkpoints.check(state)
                meters.evaluation(step, evaluate(state.params, frozen, held_out, setup.mesh))
            if last or step % settings.save_every == 0:
                checkpoints.save(state, stream.get_state())
            if stopped:
                checkpoints.wait()
                meters.say(f"stopped and saved after {step} of {steps} updates")
                raise SystemExit(128 + stopped)
        checkpoints.wait()
    return state


def _status(text: str) -> Status:
    return Console(stderr=True, quiet=not is_primary()).status(text)


def load_state(
    setup: Setup, checkpoints: Checkpoints
) -> tuple[State, Params, dict[str, Any] | None]:
    """The state to start from, the frozen weights, and the position in the rows (or None)."""
    settings, config, lora = setup.settings, setup.config, setup.lora
    where, frozen = setup.sharding, {}
    if lora is None:
        rows = parameters(config)
    else:
        rows = lora_parameters(config, lora)
        form, keep = packed_base(settings), STORED if kept_base(setup) else None
        then = None if form is None else packer(projections(config), form)
        options = {"dtype": jnp.dtype(settings.dtype), "sharding": where, "keep": keep}
        frozen = load_weights(setup.folder, config, then=then, **options)
    if checkpoints.latest is not None:
        like = {row.path: row.abstract(config, jnp.dtype(settings.state), where) for row in rows}
        state, place_in_rows = checkpoints.restore(abstract_state(unflatten_dict(like, sep=".")))
        return state, frozen, place_in_rows
    if lora is None:
        dtype = jnp.dtype(settings.state)
        params = load_weights(setup.folder, config, dtype=dtype, sharding=where)
    elif settings.adapter:
        _, params = load_adapter(settings.adapter, config, sharding=where)
    else:
        params = init_lora(config, lora, jax.random.key(settings.seed), where)
    return start(params), frozen, None


def tell(
    meters: Meters,
    step: int,
    metrics: Metrics,
    tokens: int,
    flops: float,
    checkpoints: Checkpoints,
) -> None:
    """Waits for an update and reports its metrics.

    Raises:
        InputError: a non-finite loss or gradient; the last checkpoint is on disk.
    """
    loss, norm, trained, finite = (float(np.asarray(x)) for x in metrics)
    if not finite:
        raise InputError(
            f"step {step}: the loss is {loss:g} and the gradient's norm {norm:g}; "
            f"{checkpoints.kept()}. {ADVICE}"
        )
    meters.update(step, {"loss": loss, "grad_norm": norm, "trained_tokens": trained}, tokens, flops)


def make_evaluation(build: Build) -> Callable[..., float]:
    """The mean loss over the trained tokens of batches of rows, in nats."""

    @jax.jit
    def sums(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        found = summed_nll(build(joined(params, frozen)), *batch.first())
        return found.nll, found.tokens

    def evaluate(params: Params, frozen: Params, rows: Sequence[Rows], mesh: Mesh | None) -> float:
        found = [sums(params, frozen, place(batch, 1, mesh)) for batch in rows]
        nll, tokens = (
            sum(float(np.asarray(x)) for x in column) for column in zip(*found, strict=True)
        )
        if not math.isfinite(nll):
            raise InputError(
                f"the loss on the held-out dialogues is {nll:g}: they overflow the dtype or the "
                "model is broken; compute in float32, or check the dialogues"
            )
        return nll / tokens

    return evaluate


# --- signals -----------------------------------------------------------------------------------


@contextmanager
def stopping() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the number of the signal received, or 0 if none was.

    The first SIGTERM or Ctrl-C is recorded; a second one ends the program at once. Only Python's
    main thread can handle signals, so in other threads a run cannot be stopped in this way.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    asked = 0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        asked = number

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agreement() -> Callable[[int], int]:
    """A function from this process's signal to one that all processes agree on.

    All must stop after the same update. With several processes, a call starts an exchange and
    returns the result of the previous call, which has finished with its update. So the host stays
    ahead of the devices, and a signal takes effect one update later.
    """
    if not several_processes():
        return lambda number: number
    axis = "devices"
    mesh = Mesh(np.array(jax.devices()), (axis,))
    highest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    before: jax.Array | None = None

    def agreed(number: int) -> int:
        nonlocal before
        mine = np.full(jax.local_device_count(), number, np.int32)
        where = NamedSharding(mesh, PartitionSpec(axis))
        found, before = before, highest(jax.make_array_from_process_local_data(where, mine))
        return 0 if found is None else int(np.asarray(found))

    return agreed
