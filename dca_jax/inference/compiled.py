"""The compiled programs of a process: few, whatever it is asked."""

import functools
from collections.abc import Callable
from typing import Any

import jax

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

    Args:
        function: of a module, so that it is found again; `model` is its first argument, and the
            others are arrays.
        model: any pytree. It is taken apart here, once, and not at every call.
        shape: all that the shapes of the other arguments depend on.
        donated: number of the argument that is updated where it lies, and not copied.
    """
    leaves, tree = jax.tree.flatten(model)
    return functools.partial(_program(function, tree, shape, donated), leaves)


@functools.lru_cache(maxsize=PROGRAMS)
def _program(
    function: Callable[..., Any], tree: Any, shape: tuple[int, ...], donated: int | None
) -> Any:
    # A function of its own: what is compiled for it goes when it goes.
    def of_leaves(leaves: list[Any], *args: Any) -> Any:
        return function(jax.tree.unflatten(tree, leaves), *args)

    of_leaves.__name__ = function.__name__  # for profiles and logs
    # What is donated may be of use to nothing but the result.
    options = {} if donated is None else {"donate_argnums": donated, "keep_unused": True}
    return jax.jit(of_leaves, compiler_options=compiler_options(), **options)
