"""The number of pages in a server's cache, from the memory left by the weights."""

import math

from jax.typing import DTypeLike

from dca_jax.config import LlamaConfig
from dca_jax.errors import InputError
from dca_jax.inference.buckets import cache_bytes, device_memory, reading_bytes
from dca_jax.inference.llm import LLM
from dca_jax.serving.engine import PAGE
from dca_jax.serving.programs import PIECES
from dca_jax.sharding import mesh_of

SHARE = 0.9  # share of the free memory; the rest is for XLA's other needs
CPU_SHARE = 0.25  # share of a machine's memory, which other programs need too
LOGITS = 8  # 4-byte numbers per vocabulary token and text during decoding


def choose_pages(llm: LLM, *, context: int, rows: int, tokens: int | None = None) -> int:
    """The number of pages for a server's cache.

    Args:
        llm: the model with its weights.
        context: number of tokens of the longest text.
        rows: number of texts at once.
        tokens: size of the cache in tokens; None for as many as fit (on a CPU at most `rows` texts
            of `context`).

    Raises:
        InputError: the cache does not fit into memory, or is too small for one text.
    """
    config, mesh = llm.model.config, mesh_of(llm.model)
    page = cache_bytes(config, 1, PAGE, llm.cache_dtype, mesh)
    _, free = device_memory(llm.model)
    beside = beside_bytes(config, context=context, rows=rows, dtype=llm.model.dtype)
    on_cpu = next(iter(llm.model.norm.scale[...].devices())).platform == "cpu"
    room = (CPU_SHARE if on_cpu else SHARE) * free - beside
    most = math.inf if room == math.inf else max(0, int(room // page))
    wanted = rows * -(-context // PAGE)
    if tokens is not None:
        pages = -(-tokens // PAGE)
    elif on_cpu or most == math.inf:
        pages = int(min(most, wanted))
    else:
        pages = int(most)
    if pages > most or pages * PAGE < context:
        fits = "any number" if most == math.inf else f"{int(most) * PAGE}"
        raise InputError(
            f"texts of {context} tokens need a cache of at least as many, and this one would have "
            f"{pages * PAGE}; {fits} fit beside the weights: give a shorter --context, another "
            "--cache, --cache-dtype int8, packed weights, or a mesh"
        )
    return pages


def beside_bytes(config: LlamaConfig, *, context: int, rows: int, dtype: DTypeLike) -> int:
    """Bytes for reading a piece and generating a token per text, besides weights and cache.

    Args:
        context, rows: as in `choose_pages`.
        dtype: dtype of activations.
    """
    reading = reading_bytes(config, 1, min(context, PIECES[-1]), dtype)
    return reading + LOGITS * 4 * rows * config.vocab_size
