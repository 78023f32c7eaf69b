"""The effect of a method on the positions of a text, in figures and as a plot."""

import dataclasses
import math
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dca_jax.attention import bands
from dca_jax.attention.bands import PositionMethod, each_band
from dca_jax.attention.sparse import Sparse
from dca_jax.dca import DCAConfig, relative_positions, temperature
from dca_jax.rope import RopeConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def explain(
    dca: DCAConfig | PositionMethod | None,
    length: int,
    rope: RopeConfig | None = None,
    sparse: Sparse | None = None,
) -> str:
    """Describes the effect of a method on a text of `length` tokens.

    Args:
        dca: a DCA setting, another method, or None for plain attention.
        rope: the RoPE, which is described if it is given and scaled.
        sparse: the sparse prefill setting, which is described if it is given.
    """
    if isinstance(dca, DCAConfig):
        name, rows = "Dual Chunk Attention", _of_dca(dca, length)
    elif dca is None:
        name, rows = "Plain attention", {"largest relative position": str(length - 1)}
    else:
        name, rows = type(dca).__name__, _of_method(dca, length)
    if rope is not None and rope.rope_type != "default":
        rows["rope"] = f"{rope.rope_type}, factor {rope.factor:g}"
    if sparse is not None:
        rows["read as a prompt"] = sparse.told(length)
    width = max(map(len, rows))
    return "\n".join(
        [f"{name} on a text of {length} tokens"]
        + [f"  {row:<{width}}  {value}" for row, value in rows.items()]
    )


def _of_dca(dca: DCAConfig, length: int) -> dict[str, str]:
    c = dca.trained_length
    tau = float(temperature(jnp.asarray([length], jnp.int32), dca)[0])
    furthest = min(length - 1, dca.inter_position)
    slope = dca.temperature_slope
    return {
        "trained length c": "not given" if c is None else f"{c} tokens",
        "chunk length s": f"{dca.chunk_len} tokens ({math.ceil(length / dca.chunk_len)} chunks)",
        "largest query position Q": str(dca.max_query_position),
        "identity range": f"texts of up to {dca.identity_range} tokens are read as with plain RoPE",
        "local window": f"tokens at most {dca.local_window} apart keep their true distance",
        "largest relative position": f"{furthest} (plain RoPE: {length - 1})",
        "temperature": f"logits x {tau:.4f}" + (f" (slope {slope})" if slope else " (none)"),
    }


def _of_method(method: PositionMethod, length: int) -> dict[str, str]:
    """The method's own fields, and the keys of the text's last token."""
    last = jnp.asarray([[length - 1]], jnp.int32)
    furthest, met = 0, 0
    for band in each_band(method.bands(last, jnp.asarray([length], jnp.int32))):
        start, stop = (int(np.asarray(edge)[0, 0]) for edge in (band.start, band.stop))
        if start < stop:
            key = jnp.asarray([[start]], jnp.int32)  # the furthest
            first = 0 if band.key_position is None else np.asarray(band.key_position(key))[0, 0]
            relative = np.max(np.asarray(band.query_position)[0, 0] - first)
            if band.steps is not None:
                relative -= int(np.asarray(band.steps.nearer(key))[0, 0, 0])
            furthest = max(furthest, int(relative))
            met += stop - start
    fields = dataclasses.fields(method)  # pyright: ignore[reportArgumentType] -- each is one
    return {
        **{field.name.replace("_", " "): str(getattr(method, field.name)) for field in fields},
        "keys of the last token": f"{met} of {length}",
        "largest relative position": f"{furthest} (plain RoPE: {length - 1})",
    }


def position_matrix(
    length: int, dca: DCAConfig | PositionMethod | None
) -> Int[np.ndarray, "length length"]:
    """Relative position of query i (row) and key j (column); -1 for masked keys; int32."""
    if isinstance(dca, DCAConfig):
        return relative_positions(length, dca)
    if dca is not None:
        return bands.relative_positions(length, dca)
    i = np.arange(length, dtype=np.int32)
    return np.maximum(i[:, None] - i[None, :], np.int32(-1))


def plot_relative_positions(
    length: int, dca: DCAConfig | PositionMethod | None, axes: "Axes | None" = None
) -> "Axes":
    """Plots `position_matrix`, with numbers in the cells for up to 32 tokens."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    if axes is None:
        _, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    matrix = np.ma.masked_less(position_matrix(length, dca), 0)
    image = axes.imshow(matrix, cmap="viridis", interpolation="nearest")
    if length <= 32:
        threshold = 0.6 * float(matrix.max())
        for (i, j), value in np.ndenumerate(matrix.filled(-1)):
            if value >= 0:
                color = "black" if value > threshold else "white"
                axes.text(j, i, str(value), ha="center", va="center", color=color, fontsize=7)
    title = "relative position"
    if isinstance(dca, DCAConfig):
        title += f", s = {dca.chunk_len}, Q = {dca.max_query_position}"
        for edge in range(dca.chunk_len, length, dca.chunk_len):
            axes.axhline(edge - 0.5, color="tab:red", linewidth=0.8)
            axes.axvline(edge - 0.5, color="tab:red", linewidth=0.8)
    axes.set(xlabel="key j", ylabel="query i", title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(image, ax=axes, shrink=0.8, ticks=MaxNLocator(integer=True))
    return axes
