"""The gradient of released DCA code as an attention backend, for comparison.

`dca_jax.attention.op.BACKENDS["detached"] = DetachedMerge()` makes it available as an
`implementation`.
"""

import math
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from dca_jax.attention.backend import Backend
from dca_jax.attention.op import BACKENDS, choose_implementation
from dca_jax.attention.softmax import output_delta


class DetachedMerge:
    """The best backend's attention, with the gradient of ChunkLlama's merge of passes.

    There o = sum_p w_p o_p over the three phases, w the softmax of their log-sum-exp, detached. So
    a phase's dS = P * (dP - delta_p) has the delta of its own output, delta_p = rowsum(dO * o_p),
    where the exact gradient has rowsum(dO * o). P, and so dv, is right in both.
    """

    def unsupported(self, device: Any, query: Any, key: Any, dca: Any, **kinds: bool) -> str | None:
        """No reason: the best backend can run."""
        return None

    def forward(
        self, query: Any, key: Any, value: Any, layer: Any, rows: Any, **options: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        """The best backend's forward pass."""
        best = best_backend(query, key, options["dca"])
        return best.forward(query, key, value, layer, rows, **options)

    def backward(
        self,
        query: Any,
        key: Any,
        value: Any,
        layer: Any,
        rows: Any,
        do: Any,
        lse: Any,
        delta: Any,
        *,
        dca: Any,
        phases: tuple[Any, ...],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One phase after another, each with its own delta; their sum in the dtype of `lse`."""
        best = best_backend(query, key, dca)
        parts = []
        for phase in phases:
            options = {"dca": dca, "phases": (phase,)}
            out, _ = best.forward(query, key, value, layer, rows, with_lse=False, **options)
            own = output_delta(do, out, lse.dtype)
            some = best.backward(query, key, value, layer, rows, do, lse, own, **options)
            parts.append([x.astype(lse.dtype) for x in some])
        sums = jax.tree.map(lambda *some: sum(some[1:], some[0]), *parts)
        dq, dk, dv = (x.astype(query.dtype) for x in sums)
        return dq, dk, dv


def best_backend(query: jax.Array, key: jax.Array, dca: Any) -> Backend:
    """The backend that attention uses by default."""
    queries, keys = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key))
    return BACKENDS[choose_implementation(None, queries, keys, dca)]


def gradient_error(exact: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """|other - exact| / |exact| for each kind of parameter (q_proj, ...), and for all of them."""
    squares: dict[str, np.ndarray] = {}
    others = flatten_dict(other)
    for path, leaf in flatten_dict(exact).items():
        a, b = (np.asarray(x, np.float64) for x in (leaf, others[path]))
        square = np.array([np.square(b - a).sum(), np.square(a).sum()])
        for name in ("all", path[-2]):
            squares[name] = squares.get(name, np.zeros(2)) + square
    return {name: math.sqrt(error / whole) for name, (error, whole) in squares.items()}
