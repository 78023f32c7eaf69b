"""Options before COMMAND: the version, and those for several processes."""

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

CACHE_BYTES = 2**32  # limit for compiled programs on disk; the least recently used are deleted
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
            help="Host of process 0, and a free port on it.",
        ),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(
            envvar="JAX_NUM_PROCESSES",
            rich_help_panel=PROCESSES,
            help="Total number of processes on all hosts.",
        ),
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(
            envvar="JAX_PROCESS_ID",
            rich_help_panel=PROCESSES,
            help="Number of this process, counting from 0.",
        ),
    ] = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            rich_help_panel=PROCESSES,
            help="Detect values that are not given from SLURM, MPI, Kubernetes or the TPU pod.",
        ),
    ] = False,
    start_timeout: Annotated[
        int,
        typer.Option(rich_help_panel=PROCESSES, help="Seconds to wait for all processes to start."),
    ] = START_TIMEOUT,
    peer_timeout: Annotated[
        int,
        typer.Option(
            rich_help_panel=PROCESSES,
            help="Seconds without a heartbeat after which a process counts as dead.",
        ),
    ] = PEER_TIMEOUT,
) -> None:
    """Run Llama-family models on texts far beyond their training context, without finetuning.

    `dca-jax COMMAND --help` explains a command, with examples. Compiled programs are cached between
    runs (in JAX_COMPILATION_CACHE_DIR, if it is set). Commands use 95 % of a GPU's memory, unless
    XLA_CLIENT_MEM_FRACTION is set.
    """
    del version
    # Only its tokenizers are used, so its warning that PyTorch is missing does not matter.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    _keep_programs()
    if not any(name in os.environ for name in FRACTIONS):
        os.environ[FRACTIONS[0]] = str(GPU_SHARE)  # read when JAX first initializes its devices
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
        raise InputError("--num-processes and --process-id need --coordinator")


def _keep_programs() -> None:
    """Enables JAX's compilation cache on disk; if its folder cannot be written, logs that once."""
    import jax  # takes seconds, and showing help does not need it

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = str(home / "dca_jax" / "xla")
        # By default only programs that took a second to compile are cached; a command compiles many
        # smaller ones.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        if jax.config.jax_compilation_cache_max_size == -1:  # unbounded by default
            jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    if folder and "://" not in folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(4096))
                file.flush()
        except OSError as error:
            reason = error.strerror or error
            log.warning(
                "%s cannot be written (%s): compiled programs are not cached", folder, reason
            )
            folder = ""
    jax.config.update("jax_compilation_cache_dir", folder or None)
    # If the disk fills up later, JAX would warn for every program.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
