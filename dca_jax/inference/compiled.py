"""The compiled programs of a process, limited in number."""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from dca_jax.attention.bands import joined, split
from dca_jax.model import Llama
from dca_jax.rope import Frequencies, RopeConfig, inverse_frequencies, logit_scale
from dca_jax.sharding import mesh_of

PROGRAMS = 32  # kept per process, the most recently used; each takes some megabytes of host memory
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}


def compiler_options() -> dict[str, Any] | None:
    """Options for `jax.jit(..., compiler_options=)` with a function that calls `read` or `decode`.

    The weights of all layers are in a stack. By default, XLA on a GPU copies a layer's weights out
    of it for Triton's products and to concatenate those of q, k and v. With these options cuBLAS
    reads them in place. For 7B at 32k tokens on an H200, a prompt takes 1.24 s instead of 1.34, and
    a token 9.6 ms instead of 15.3.
    """
    return GPU_OPTIONS if jax.default_backend() == "gpu" else None


def compiled(
    function: Callable[..., Any], model: Any, *shape: int, donated: int | None = None
) -> Callable[..., Any]:
    """Compiles `function` of a model and other arguments as a program of the other arguments.

    Every entry point takes its programs from here, so one limit applies to all: the `PROGRAMS` most
    recently used are kept, and the others are freed.

    The numbers of a position method and the frequencies of a RoPE are arguments of a program. So
    one program works for all settings of a method, and for plain attention with any RoPE scaling.
    DCA's settings are static, because kernels are specialized for them.

    Args:
        function: a module-level function, so that it is found in the cache; its first argument is
            `model`, and the others are arrays.
        model: any pytree; it is flattened once here and not at every call.
        shape: everything that determines the shapes of the other arguments.
        donated: number of the argument that is updated in place.
    """
    model, given = _apart(model) if isinstance(model, Llama) else (model, None)
    leaves, tree = jax.tree.flatten(model)
    return functools.partial(_program(function, tree, shape, donated), (leaves, given))


class _Given(NamedTuple):
    """The inputs for a model's positions; see `split` and `Frequencies`."""

    numbers: dict[str, Array]
    frequencies: tuple[Array, Array] | None


def _apart(model: Llama) -> tuple[Llama, _Given]:
    """Splits a model into the static part for compilation and the arguments of the program."""
    rope, head_dim, frequencies = model.config.rope, model.config.head_dim, None
    form, numbers = (None, {}) if model.dca is None else split(model.dca)
    if rope.rope_type != "dynamic":  # its frequencies are computed per text in the program
        frequencies = inverse_frequencies(rope, head_dim)[0], logit_scale(rope, head_dim)
        rope = RopeConfig()
    kind = copy.copy(model)
    kind.config, kind.dca, kind.rope = replace(model.config, rope=rope), form, rope
    given, mesh = _Given(numbers, frequencies), mesh_of(model)
    if mesh is not None:
        given = jax.device_put(given, NamedSharding(mesh, PartitionSpec()))
    return kind, given


def _together(model: Llama, given: _Given) -> Llama:
    """Rebuilds the model inside its program; modifies `model`, which is a fresh copy."""
    if model.dca is not None:
        model.dca = joined(model.dca, given.numbers)
    if given.frequencies is not None:
        model.rope = Frequencies(*given.frequencies)
    return model


@functools.lru_cache(maxsize=PROGRAMS)
def _program(
    function: Callable[..., Any], tree: Any, shape: tuple[int, ...], donated: int | None
) -> Any:
    # A new function object, so that its compiled program is freed with it.
    def of_leaves(parts: tuple[list[Any], _Given | None], *args: Any) -> Any:
        leaves, given = parts
        model = jax.tree.unflatten(tree, leaves)
        return function(model if given is None else _together(model, given), *args)

    of_leaves.__name__ = function.__name__  # for profiles and logs
    # Donated memory may be usable only for the result.
    options = {} if donated is None else {"donate_argnums": donated, "keep_unused": True}
    return jax.jit(of_leaves, compiler_options=compiler_options(), **options)
