"""Logits of whole texts, computed in few shapes for any number and length of texts."""

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from dca_jax.errors import InputError
from dca_jax.inference.buckets import multiple, power_of_two
from dca_jax.inference.compiled import compiled
from dca_jax.inference.steps import whole
from dca_jax.memory import free_bytes
from dca_jax.model import Llama
from dca_jax.sharding import axis_size, mesh_of

WIDTHS = (64, 256, 1024)  # tokens to which texts are padded; longer ones to a power of two
TOGETHER = 8  # the shortest texts are read in batches of this size, others one by one


def text_logits(model: Llama, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
    """Logits, float32, of whole texts of equal length, computed in few shapes.

    Texts are padded to 64, 256, 1024, 2048 ... tokens. The logits of padding are removed on the
    host, where slicing compiles nothing.

    Raises:
        InputError: plain attention over more than the model's sliding window, or more logits than
            fit into the host's memory.
    """
    batch, length = tokens.shape
    model.check_window(length)
    size = batch * length * model.config.vocab_size * np.dtype(np.float32).itemsize
    free = free_bytes(jax.local_devices(backend="cpu")[0])
    if free is not None and size > free:
        raise InputError(
            f"the logits of {batch} x {length} tokens take {size / 2**30:.1f} GiB, but only "
            f"{free / 2**30:.1f} GiB are free; give fewer tokens, or use `perplexity`"
        )
    mesh = mesh_of(model)
    width = next((width for width in WIDTHS if width >= length), power_of_two(length))
    width = multiple(width, 32 * axis_size(mesh, "context"))
    if model.dca is None and model.config.sliding_window is not None:
        width = min(width, model.config.sliding_window)
    some = TOGETHER if batch > 1 and length <= WIDTHS[0] else 1
    rows = multiple(some, axis_size(mesh, "data", "fsdp"))
    padded = np.zeros((multiple(batch, rows), width), np.int32)
    padded[:batch, :length] = tokens
    lengths = np.full((rows,), length, np.int32)
    read = compiled(_logits, model, rows, width)
    found = np.empty((batch, length, model.config.vocab_size), np.float32)
    for first in range(0, batch, rows):
        logits = np.asarray(read(padded[first : first + rows], lengths))
        found[first : first + rows] = logits[: batch - first, :length]
    return found


def _logits(
    model: Llama, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> Float[Array, "B T V"]:
    return whole(model, model(tokens, lengths))
