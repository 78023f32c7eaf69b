"""How many pages a server's cache has: what memory leaves beside the weights."""

import math

from jax.typing import DTypeLike

from dca_jax.config import LlamaConfig
from dca_jax.errors import InputError
from dca_jax.inference.buckets import cache_bytes, device_memory, reading_bytes
from dca_jax.inference.llm import LLM
from dca_jax.serving.engine import PAGE
from dca_jax.serving.programs import PIECES
from dca_jax.sharding import mesh_of

SHARE = 0.9  # of what is free: the rest is for what XLA needs beside its arrays
CPU_SHARE = 0.25  # of a machine's memory, which is not for the server alone
LOGITS = 8  # numbers of 4 bytes for each token of the vocabulary and each text, while drawing


def choose_pages(llm: LLM, *, context: int, rows: int, tokens: int | None = None) -> int:
    """Pages of the cache of a server.

    Args:
        llm: with its weights. context: tokens of the longest text. rows: texts at once.
        tokens: of the whole cache; None for what fits, on a CPU at most `rows` texts of `context`.

    Raises:
        InputError: it does not fit into memory, or not one text fits into it.
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
    """Bytes that reading a piece and drawing a token for each text take beside weights and cache.

    Args:
        context, rows: as of `choose_pages`. dtype: of activations.
    """
    reading = reading_bytes(config, 1, min(context, PIECES[-1]), dtype)
    return reading + LOGITS * 4 * rows * config.vocab_size
