"""What every test shares: strict JAX, checked shapes, no network.

On a machine with a GPU and JAX's CUDA plugin the suite runs on the GPU, in full float32 precision
except for tests marked ``gpu``, which choose their own; ``JAX_PLATFORMS=cpu`` keeps it on the CPU.
"""

import atexit
import gc
import itertools
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

# Read at import, so before any import: nothing may reach for a network, and the two processes of
# `pytest -n 2` share one GPU's memory.
os.environ["HF_HUB_OFFLINE"] = "1"
# Two processes share two cores: threads of NumPy and of PyTorch spin while they wait for each
# other. The oracles' products are small.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
# The processes that tests start keep what they compile for each other, in a folder that is thrown
# away at the end: what an earlier run compiled has no part in this one.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dca_jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"  # as the command line has it
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Eight devices on two busy cores can keep one another waiting for longer than the 40 s after which
# XLA takes a collective for stuck and aborts the process.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=500"
)
if not any(any(Path("/dev").glob(name)) for name in ("nvidia*", "kfd", "accel*", "vfio/[0-9]*")):
    # libtpu is here to compile with; it need not look for a TPU, loudly.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Thousands of programs run once each: to compile them is most of the suite's time. A third of
    # it was LLVM making them fast, and two thirds of the rest MLIR, begun anew for each fusion.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"  # the other core is busy

import checking
import hypothesis
import jax
import matplotlib as mpl
import pytest

gc.disable()  # Until the tests run: what imports and collection make is to stay.

checking.install("dca_jax", "checkpoints_convert")

# Not in this process, which keeps its programs itself: to write one takes a tenth of compiling it.
jax.config.update("jax_compilation_cache_dir", None)
jax.config.update("jax_num_cpu_devices", 8)
# Or the next program is compiled while eight devices meet in this one's collectives, and waits are
# so long on two cores that XLA gives up.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

mpl.use("Agg")

# No deadline: a first example compiles. Derandomized: a run on one commit says the same twice.
hypothesis.settings.register_profile("dca_jax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("dca_jax")

MOST_MAPS = 40_000
TESTS = itertools.count()
REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    # Not where tests are only handed to others, who would wait for it: it takes seconds to load.
    if getattr(config.option, "dist", "no") == "no" or hasattr(config, "workerinput"):
        from dca_jax.inference import buckets

        # Tests ask in turn for caches of more shapes than a process of a user's keeps programs for.
        # The modules that read this number are imported later.
        buckets.SHAPES = 64
        config.pluginmanager.import_plugin("shared_fixtures")  # "fixtures" is one of pytest's own


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip(f"needs an NVIDIA GPU; JAX runs on {jax.default_backend()} here")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    # A GPU multiplies float32 matrices in TF32 unless told otherwise: right to 1e-3, not to 1e-6.
    full = jax.default_backend() == "gpu" and not item.get_closest_marker("gpu")
    with jax.default_matmul_precision("highest" if full else None):
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()
    # To trace a program makes tens of thousands of objects that are to stay: to look at them after
    # every 700 took a seventh of the time of tracing.
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    # Every compiled program maps pieces of memory, and Linux allows a process 65,530: beyond that
    # the compiler ends it ("Aborted"). A worker of the whole suite compiles thousands of programs.
    maps = Path("/proc/self/maps")  # long ones take tens of milliseconds to read
    if next(TESTS) % 16 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models, books and golden data beside the repository."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the shared data folder; {path} does not exist")
    return path
