"""What comes before COMMAND: the version, and the options of several processes."""

import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Annotated

import typer

import dca_jax
from dca_jax.distributed import (
    PEER_TIMEOUT,
    START_TIMEOUT,
    exit_on_input_error,
    initialize,
    print_once,
)
from dca_jax.errors import InputError
from dca_jax.memory import GPU_SHARE

CACHE_BYTES = 2**32  # of compiled programs on disk; those longest unused go
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

log = logging.getLogger(__name__)

PROCESSES = "Several processes (before COMMAND, the same on each host)"


def _show_version(wanted: bool) -> bool:
    if wanted:
        print(f"dca-jax {dca_jax.__version__}")
        raise typer.Exit
    return wanted


@exit_on_input_error()
def launch(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            rich_help_panel=PROCESSES,
            help="Host of process 0 and a free port there.",
        ),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(
            envvar="JAX_NUM_PROCESSES",
            rich_help_panel=PROCESSES,
            help="Number of processes on all hosts.",
        ),
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(
            envvar="JAX_PROCESS_ID",
            rich_help_panel=PROCESSES,
            help="Number of this process, from 0.",
        ),
    ] = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            rich_help_panel=PROCESSES,
            help="Take what is not given from SLURM, MPI, Kubernetes or the TPU pod.",
        ),
    ] = False,
    start_timeout: Annotated[
        int,
        typer.Option(rich_help_panel=PROCESSES, help="Seconds to wait for all processes to start."),
    ] = START_TIMEOUT,
    peer_timeout: Annotated[
        int,
        typer.Option(
            rich_help_panel=PROCESSES, help="Seconds of silence after which a process is dead."
        ),
    ] = PEER_TIMEOUT,
) -> None:
    """Run Llama-family models on texts far beyond their training context, without finetuning.

    `dca-jax COMMAND --help` explains a command, with examples. Compiled programs are kept between
    runs (in JAX_COMPILATION_CACHE_DIR, if it is set). Of a GPU's memory commands take 95 %, unless
    XLA_CLIENT_MEM_FRACTION is set.
    """
    del version
    # Only its tokenizers are used, so nobody needs to be told that there is no PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    _keep_programs()
    if not any(name in os.environ for name in FRACTIONS):
        os.environ[FRACTIONS[0]] = str(GPU_SHARE)  # read when JAX first meets its devices
    if coordinator is not None or distributed:
        initialize(
            coordinator,
            num_processes,
            process_id,
            start_timeout=start_timeout,
            peer_timeout=peer_timeout,
        )
        print_once()
    elif not (num_processes is None and process_id is None):
        raise InputError("the number of processes and a process id go with --coordinator")


def _keep_programs() -> None:
    """Has JAX keep what it compiles, unless there is nowhere to: then it says so, once."""
    import jax  # takes seconds, and what only shows help does without it

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = str(home / "dca_jax" / "xla")
        # By default only what took a second is kept, and a command compiles several such things.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        if jax.config.jax_compilation_cache_max_size == -1:  # it has no bound, unless one is given
            jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    if folder and "://" not in folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(4096))
                file.flush()
        except OSError as error:
            reason = error.strerror or error
            log.warning("%s cannot be written (%s): compiled programs are not kept", folder, reason)
            folder = ""
    jax.config.update("jax_compilation_cache_dir", folder or None)
    # Of a disk that fills up meanwhile JAX would speak at every program.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
