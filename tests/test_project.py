"""The scaffolding itself: what the other tests take for granted, and what a user installs."""

import ast
import graphlib
import importlib
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import checking
import jax
import jax.numpy as jnp
import mutations
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

import dca_jax
from dca_jax import dca

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts CPU devices")
def test_eight_cpu_devices():
    assert jax.device_count() == 8


def test_dtypes_are_never_promoted_in_silence():
    with pytest.raises(ValueError, match="numpy_dtype_promotion"):
        jnp.ones(3, jnp.bfloat16) + jnp.ones(3, jnp.float32)


def test_ranks_are_never_promoted_in_silence():
    with pytest.raises(ValueError, match="numpy_rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_annotations_of_the_package_are_checked():
    config = dca.DCAConfig(chunk_len=6, max_query_position=9)
    with pytest.raises(TypeCheckError):
        dca.key_position(jnp.zeros(3, jnp.float32), config)


def test_an_int_may_stand_for_a_float():
    assert dca.DCAConfig.paper(8, temperature_slope=0) == dca.DCAConfig.paper(8)
    with pytest.raises(TypeCheckError):
        dca.DCAConfig.paper(8, temperature_slope="0")


def test_annotations_of_flax_modules_are_checked(tmp_path, monkeypatch):
    """The import hook and nnx get along: build, jit, differentiate, and still catch a shape."""
    source = """
        import jax, jax.numpy as jnp
        from flax import nnx
        from jaxtyping import Array, Float

        class Scale(nnx.Module):
            def __init__(self, size: int, *, rngs: nnx.Rngs) -> None:
                self.kernel = nnx.Param(jax.random.normal(rngs.params(), (size, size), jnp.float32))

            def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
                return x @ self.kernel[...]

        def first(x: Float[Array, "B D"], y: Float[Array, " D"]) -> Float[Array, " D"]:
            def add(x: int) -> int:
                return x + 1

            return y[: add(0) if y[0] < 0 else add("0") if y[0] > 0 else None]
    """
    (tmp_path / "hooked_module.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    checking.install("hooked_module")
    module = importlib.import_module("hooked_module")
    model = module.Scale(4, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 4), jnp.float32)
    assert jax.jit(lambda m, x: m(x))(model, x).shape == (2, 4)
    gradient = jax.grad(lambda m: m(x).sum())(model)
    assert gradient.kernel[...].shape == (4, 4)
    with pytest.raises(TypeCheckError):
        model(jnp.ones((2, 4, 1), jnp.float32))
    # Axes are the same in all arguments and in what is returned; functions inside have their own.
    assert module.first(x, jnp.zeros(4)).shape == (4,)
    for y, message in ((jnp.zeros(3), "parameter y"), (-x[0], "return"), (x[0], "parameter x='0'")):
        with pytest.raises(TypeCheckError, match=message):
            module.first(x, y)


def test_attention_alone_loads_no_checkpoint_library_and_nothing_needs_torch():
    """Every module of both packages imports where PyTorch does not."""
    heavy = set("orbax tensorstore optax rich transformers matplotlib".split())
    code = f"""
        import importlib, pkgutil, sys
        import dca_jax.attention
        print(sorted({heavy!r} & {{name.partition(".")[0] for name in sys.modules}}))
        sys.modules["torch"] = None  # makes `import torch` raise
        for name in ("dca_jax", "checkpoints_convert"):
            package = importlib.import_module(name)
            for module in pkgutil.walk_packages(package.__path__, name + "."):
                if not module.name.endswith("__main__"):
                    importlib.import_module(module.name)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "[]\n"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('case "$1" in --version) echo Python 3.11.2;; *) exit 1;; esac', "Python 3.11.2"),
        (None, "No Python at"),
    ],
    ids=["old", "absent"],
)
def test_make_says_which_python_it_needs(tmp_path, script, message):
    python = tmp_path / "python"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    venv = tmp_path / "venv"
    run = subprocess.run(
        ["make", f"{venv}/pyvenv.cfg", f"VENV={venv}", f"PYTHON={python}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))},
    )
    assert run.returncode != 0
    assert message in run.stderr
    assert "Python 3.12 or newer" in run.stderr
    assert not venv.exists()


def imports() -> dict[str, set[str]]:
    """Each module of both packages, and those of them that it imports, anywhere in it."""
    files = [*Path("dca_jax").rglob("*.py"), *Path("checkpoints_convert").rglob("*.py")]
    modules = {".".join(f.with_suffix("").parts).removesuffix(".__init__"): f for f in files}
    del modules["dca_jax"]  # gives the public names, lazily

    def imported(name):
        for node in ast.walk(ast.parse(modules[name].read_text())):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found = full if full in modules else str(node.module)
                    if found in modules and found != name:
                        yield found

    return {name: set(imported(name)) for name in modules}


def test_no_module_imports_in_a_circle():
    graph = imports()
    assert len(tuple(graphlib.TopologicalSorter(graph).static_order())) == len(graph)


def test_the_attention_knows_no_model():
    known = {f"dca_jax.{name}" for name in "dca rope sharding device dtypes errors fields".split()}
    for name, imported in imports().items():
        if name.startswith("dca_jax.attention"):
            others = {x for x in imported if not x.startswith("dca_jax.attention")}
            assert others <= known, name


def test_every_public_name_is_there():
    assert all(getattr(dca_jax, name) is not None for name in dca_jax.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = dca_jax.nothing


def test_deliberate_faults_still_stand_where_they_are_to_be_made():
    """Code that has moved, or a test of another name, is noticed before `mutations.py` is run."""
    for fault in mutations.FAULTS:
        code = (REPOSITORY / "dca_jax" / fault.file).read_text(encoding="utf-8")
        assert code.count(fault.old) == 1, fault.name
        path, _, test = fault.tests.split()[0].partition("::")
        tests = (REPOSITORY / path).read_text(encoding="utf-8")
        assert not test or f"def {test.partition('[')[0]}(" in tests, fault.name
