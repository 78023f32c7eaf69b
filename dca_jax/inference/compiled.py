"""The compiled programs of a process: few, whatever it is asked."""

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

PROGRAMS = 32  # that a process keeps, those used last; each takes some megabytes of the host
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}


def compiler_options() -> dict[str, Any] | None:
    """What to give `jax.jit(..., compiler_options=)` for a function that calls `read` or `decode`.

    A layer's weights lie in a stack. Left to itself, XLA on a GPU copies them out of it for
    Triton's products, and joins those of q, k and v, which copies them too; cuBLAS reads them where
    they lie. 7B at 32k tokens on an H200: the prompt in 1.24 s instead of 1.34, and a token in 9.6
    ms instead of 15.3.
    """
    return GPU_OPTIONS if jax.default_backend() == "gpu" else None


def compiled(
    function: Callable[..., Any], model: Any, *shape: int, donated: int | None = None
) -> Callable[..., Any]:
    """`function` of a model and other arguments, as a program of the other arguments.

    Every door to a model takes its programs from here, so that there is one bound for all: the
    `PROGRAMS` used last are kept, and what another one took is free again.

    The numbers of a position method and the frequencies of a rope are given to a program: so one
    serves all settings of a method, and plain attention with any scaling. DCA's settings are part
    of it, for kernels are made for them.

    Args:
        function: of a module, so that it is found again; `model` is its first argument, and the
            others are arrays.
        model: any pytree. It is taken apart here, once, and not at every call.
        shape: all that the shapes of the other arguments depend on.
        donated: number of the argument that is updated where it lies, and not copied.
    """
    model, given = _apart(model) if isinstance(model, Llama) else (model, None)
    leaves, tree = jax.tree.flatten(model)
    return functools.partial(_program(function, tree, shape, donated), (leaves, given))


class _Given(NamedTuple):
    """What a model's positions are computed from: see `split`, and `Frequencies`."""

    numbers: dict[str, Array]
    frequencies: tuple[Array, Array] | None


def _apart(model: Llama) -> tuple[Llama, _Given]:
    """A model that says only what its program is compiled for, and what the program is given."""
    rope, head_dim, frequencies = model.config.rope, model.config.head_dim, None
    form, numbers = (None, {}) if model.dca is None else split(model.dca)
    if rope.rope_type != "dynamic":  # whose frequencies a program works out for each text
        frequencies = inverse_frequencies(rope, head_dim)[0], logit_scale(rope, head_dim)
        rope = RopeConfig()
    kind = copy.copy(model)
    kind.config, kind.dca, kind.rope = replace(model.config, rope=rope), form, rope
    given, mesh = _Given(numbers, frequencies), mesh_of(model)
    if mesh is not None:
        given = jax.device_put(given, NamedSharding(mesh, PartitionSpec()))
    return kind, given


def _together(model: Llama, given: _Given) -> Llama:
    """The model again, inside its program; `model` is a new one, and is changed."""
    if model.dca is not None:
        model.dca = joined(model.dca, given.numbers)
    if given.frequencies is not None:
        model.rope = Frequencies(*given.frequencies)
    return model


@functools.lru_cache(maxsize=PROGRAMS)
def _program(
    function: Callable[..., Any], tree: Any, shape: tuple[int, ...], donated: int | None
) -> Any:
    # A function of its own: what is compiled for it goes when it goes.
    def of_leaves(parts: tuple[list[Any], _Given | None], *args: Any) -> Any:
        leaves, given = parts
        model = jax.tree.unflatten(tree, leaves)
        return function(model if given is None else _together(model, given), *args)

    of_leaves.__name__ = function.__name__  # for profiles and logs
    # What is donated may be of use to nothing but the result.
    options = {} if donated is None else {"donate_argnums": donated, "keep_unused": True}
    return jax.jit(of_leaves, compiler_options=compiler_options(), **options)
