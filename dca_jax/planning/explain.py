"""What a setting of Dual Chunk Attention does to a text: in figures, and as a picture."""

import math
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from dca_jax.dca import DCAConfig, relative_positions, temperature

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def explain(dca: DCAConfig, length: int) -> str:
    """What this setting does to a text of `length` tokens, in words and figures."""
    c = dca.trained_length
    tau = float(temperature(jnp.asarray([length], jnp.int32), dca)[0])
    furthest = min(length - 1, dca.inter_position)
    slope = dca.temperature_slope
    rows = {
        "trained length c": "not given" if c is None else f"{c} tokens",
        "chunk length s": f"{dca.chunk_len} tokens ({math.ceil(length / dca.chunk_len)} chunks)",
        "largest query position Q": str(dca.max_query_position),
        "identity range": f"texts up to {dca.identity_range} tokens are read as by plain RoPE",
        "local window": f"tokens at most {dca.local_window} apart keep their true distance",
        "largest relative position": f"{furthest} (plain RoPE: {length - 1})",
        "temperature": f"logits x {tau:.4f}" + (f" (slope {slope})" if slope else " (none)"),
    }
    width = max(map(len, rows))
    return "\n".join(
        [f"Dual Chunk Attention on a text of {length} tokens"]
        + [f"  {name:<{width}}  {value}" for name, value in rows.items()]
    )


def plot_relative_positions(length: int, dca: DCAConfig, axes: "Axes | None" = None) -> "Axes":
    """Draws `relative_positions`, numbers in the cells while they can be read (<= 32 tokens)."""
    import matplotlib.pyplot as plt

    if axes is None:
        _, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    matrix = np.ma.masked_less(relative_positions(length, dca), 0)
    image = axes.imshow(matrix, cmap="viridis", interpolation="nearest")
    if length <= 32:
        threshold = 0.6 * float(matrix.max())
        for (i, j), value in np.ndenumerate(matrix.filled(-1)):
            if value >= 0:
                color = "black" if value > threshold else "white"
                axes.text(j, i, str(value), ha="center", va="center", color=color, fontsize=7)
    for edge in range(dca.chunk_len, length, dca.chunk_len):
        axes.axhline(edge - 0.5, color="tab:red", linewidth=0.8)
        axes.axvline(edge - 0.5, color="tab:red", linewidth=0.8)
    axes.set(
        xlabel="key j",
        ylabel="query i",
        title=f"relative position, s = {dca.chunk_len}, Q = {dca.max_query_position}",
    )
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    return axes
