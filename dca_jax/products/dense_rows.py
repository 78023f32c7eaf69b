"""Products of a few rows with dense matrices on Hopper, as in decoding.

The kernel (`dca_jax.products.dense_kernel`) also does what would otherwise take a launch each: the
RMSNorm of the rows before a product, and the residual sum or SiLU's gate after it.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dca_jax.device import current_device
from dca_jax.products.dense_plan import ROWS, Plan, choose_plan

INTERPRET = False  # tests set it: the kernel then runs on any device, in Pallas' GPU interpreter


class Norm(NamedTuple):
    """An RMSNorm of the rows.

    Attributes:
        scale: the scales of all layers, in the dtype of the rows.
        layer: which of them to use.
        epsilon: added to the mean square.
    """

    scale: Float[Array, "L inputs"]
    layer: Int[Array, ""]
    epsilon: float


def can_multiply(
    x: Any, matrices: Sequence[Any], *, gated: bool = False, norm: bool = False
) -> bool:
    """Whether the kernel runs here with these rows and stacks of matrices (or their shapes).

    Args:
        gated, norm: whether `multiply` will be called with them.
    """
    capability = (9, 0) if INTERPRET else current_device().capability
    return (
        capability is not None
        and capability[0] == 9  # WGMMA
        and len(x) <= ROWS
        and x.dtype in (jnp.bfloat16, jnp.float16)
        and all(matrix.dtype == x.dtype for matrix in matrices)
        and choose_plan(x.shape[1], [m.shape[2] for m in matrices], gated=gated, norm=norm)
        is not None
    )


def multiply(
    x: Float[Array, "rows inputs"],
    stacks: Sequence[Float[Array, "L inputs _"]],
    layer: Int[Array, ""],
    *,
    norm: Norm | None = None,
    residual: Float[Array, "rows outputs"] | None = None,
    gated: bool = False,
    plan: Plan | None = None,
) -> tuple[Float[Array, "rows _"], ...]:
    """x times matrix `layer` of each stack, in the dtype of x, in one launch.

    Args:
        x: up to `ROWS` rows, bfloat16 or float16 like the stacks.
        norm: normalizes the rows first.
        residual: is added to the product with a single matrix.
        gated: the stacks are two, gate and up, and the only result is silu(x gate) * (x up).
        plan: how to divide the product (default: that of `choose_plan`).
    """
    widths = [stack.shape[2] for stack in stacks]
    plan = plan or choose_plan(x.shape[1], widths, gated=gated, norm=norm is not None)
    assert plan is not None, "as `can_multiply` says"
    widths = widths[: len(widths) // (1 + gated)]
    # JAX's compiler for Hopper takes half a second to import, and most processes run elsewhere.
    from dca_jax.products import dense_kernel

    problem = dense_kernel.Problem(
        plan=plan,
        rows=len(x),
        part=x.shape[1] // plan.splits,
        starts=list(itertools.accumulate((width // plan.tile for width in widths), initial=0)),
        gated=gated,
        epsilon=None if norm is None else norm.epsilon,
    )
    scale, scale_layer = (None, None) if norm is None else (norm.scale, _one(norm.layer))
    arrays = _one(layer), x, scale, scale_layer, residual, list(stacks)
    out = dense_kernel.launch(arrays, problem, interpret=INTERPRET)
    return tuple(jnp.split(out, list(itertools.accumulate(widths))[:-1], axis=1))


def _one(number: Int[Array, ""]) -> Int[Array, " 1"]:
    return number.astype(jnp.int32).reshape(1)
